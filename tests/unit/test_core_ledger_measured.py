"""The ledger of a measured bound, and at its limits."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_core import (
    BoundAccumulator,
    EpsTheta,
    LinearGaussianProcess,
    ReverseProcess,
    Schedule,
    ScheduleConfig,
    VarianceType,
    bound_from_curve,
    bound_ledger,
    consistency_terms,
)
from tests.support.oracles import GaussianData, atoms, variance_exploding

SHORT = Schedule.from_config(ScheduleConfig(num_timesteps=20, beta_start=0.005, beta_end=0.7))
DATA = GaussianData(0.25)
ATOMS = atoms([-1.0, -0.5, 0.25, 1.0], [0.1, 0.4, 0.3, 0.2])
GAIN = 0.9
"""The imperfect network says 0.9·E[x_0|x_t]."""


def _worse(network: EpsTheta) -> EpsTheta:
    return lambda x_t, t: GAIN * network(x_t, t)


def _reverse(process: LinearGaussianProcess, variance_type: VarianceType, mse: Tensor) -> ReverseProcess:
    return ReverseProcess(process, "x_start", variance_type, clip=False, x_start_mse=mse)


def _measured(
    variance_type: VarianceType, clip: bool, mse: Tensor | None = None
) -> tuple[BoundAccumulator, ReverseProcess]:
    reverse = ReverseProcess(SHORT, "x_start", variance_type, clip, x_start_mse=mse)
    accumulator = BoundAccumulator(reverse, levels=9, num_strata=19, seed=0)
    images = ATOMS.sample(300 * 4, 0).reshape(300, 1, 2, 2)
    accumulator.add(_worse(ATOMS.x_start_theta(SHORT)), images, torch.arange(300))
    return accumulator, reverse


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_a_measured_bound_is_divided_without_a_rest(variance_type: VarianceType, clip: bool) -> None:
    """The measured m(t) gives the measured terms to rounding, and the parts sum to the estimate's total."""
    accumulator, reverse = _measured(variance_type, clip)
    estimate, measured = accumulator.result(), accumulator.per_t()
    terms = consistency_terms(reverse, measured.x_start_mse)
    torch.testing.assert_close(terms[1:], measured.term[1:], rtol=1e-9, atol=1e-12)
    got = bound_ledger(reverse, measured.x_start_mse, prior=estimate.prior, decoder=estimate.reconstruction)
    assert got.total == pytest.approx(estimate.total, rel=1e-9)
    assert got.network_error is None
    assert got.entropy is None
    assert got.variance_choice > 0
    with_bayes = bound_ledger(
        reverse,
        measured.x_start_mse,
        prior=estimate.prior,
        decoder=estimate.reconstruction,
        bayes=ATOMS.bayes_curve,
    )
    assert with_bayes.total == pytest.approx(estimate.total, rel=1e-9)
    assert with_bayes.network_error is not None


def test_the_measured_error_makes_the_best_fixed_variance() -> None:
    small, _ = _measured("fixed_small", clip=False)
    large, _ = _measured("fixed_large", clip=False)
    best, analytic = _measured("analytic", clip=False, mse=small.per_t().x_start_mse)
    torch.testing.assert_close(best.per_t().x_start_mse, small.per_t().x_start_mse)
    terms = best.per_t().term
    assert bool((terms <= small.per_t().term + 1e-12).all())
    assert bool((terms <= large.per_t().term + 1e-12).all())
    assert best.result().total < min(small.result().total, large.result().total) - 0.01
    got = bound_ledger(analytic, small.per_t().x_start_mse, prior=0.0, decoder=0.0)
    assert got.variance_choice == pytest.approx(0.0, abs=1e-12)


def test_a_learned_variance_needs_its_measured_terms() -> None:
    mse = DATA.bayes_x_start_mse(SHORT)
    reverse = ReverseProcess(SHORT, variance_type="learned_range")
    with pytest.raises(ValueError, match=r"^variance_type: "):
        bound_ledger(reverse, mse, prior=0.0, decoder=1.0)
    consistency = consistency_terms(_reverse(SHORT, "analytic", mse), mse) + 0.01
    got = bound_ledger(reverse, mse, prior=0.5, decoder=1.0, consistency=consistency)
    assert got.variance_choice == pytest.approx(0.19, abs=1e-9)
    assert got.total == pytest.approx(1.5 + float(consistency[1:].sum()), rel=1e-12)


def test_a_chain_of_one_step_has_nothing_between_its_ends() -> None:
    one = Schedule.from_betas(torch.tensor([0.4], dtype=torch.float64))
    got = bound_ledger(ReverseProcess(one), torch.tensor([0.1]), prior=0.25, decoder=1.5)
    assert got.total == 1.75
    assert (got.continuous_time, got.finite_step, got.variance_choice) == (0.0, 0.0, 0.0)


def test_an_error_of_zero_is_one_and_at_the_data_none() -> None:
    mse = DATA.bayes_x_start_mse(SHORT)
    perfect = torch.zeros_like(mse)
    got = bound_ledger(ReverseProcess(SHORT), perfect, prior=0.5, decoder=1.0, bayes=DATA.bayes_curve)
    assert got.total == pytest.approx(1.5, abs=1e-12)
    mse[0] = 0.0
    measured = bound_ledger(ReverseProcess(SHORT), mse, prior=0.5, decoder=1.0)
    assert measured.total == pytest.approx(1.5 + float(consistency_terms(ReverseProcess(SHORT), mse).sum()))
    with pytest.raises(ValueError, match=r"^x_start_mse: must be positive"):
        bound_ledger(ReverseProcess(SHORT), perfect, prior=0.5, decoder=1.0)


def test_a_measured_error_that_rises_with_the_snr_makes_finite_steps_gain() -> None:
    rising = torch.exp(0.1 * SHORT.log_snr)
    assert bound_ledger(ReverseProcess(SHORT), rising, prior=0.0, decoder=0.0).finite_step < -0.01


def test_finer_steps_cost_less() -> None:
    """½·Σ ΔSNR·m goes to its area as 1/T."""
    costs = []
    for num in (500, 1000, 2000):
        process = variance_exploding(num, first=0.05, last=50.0)
        mse = DATA.bayes_x_start_mse(process)
        costs.append(
            bound_ledger(
                ReverseProcess(process), mse, prior=0.0, decoder=0.0, bayes=DATA.bayes_curve
            ).finite_step
        )
    assert costs[0] / costs[1] == pytest.approx(2.0, rel=0.01)
    assert costs[1] / costs[2] == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("x_start_mse", lambda r, m: bound_ledger(r, m[:5], prior=0.0, decoder=0.0)),
        ("x_start_mse", lambda r, m: bound_ledger(r, m * math.nan, prior=0.0, decoder=0.0)),
        ("x_start_mse", lambda r, m: consistency_terms(r, -m)),
        ("x_start_mse", lambda r, m: consistency_terms(r, torch.ones(20, dtype=torch.int64))),
        ("consistency", lambda r, m: bound_ledger(r, m, prior=0.0, decoder=0.0, consistency=m[1:])),
        ("entropy", lambda r, m: bound_ledger(r, m, prior=0.0, decoder=0.0, entropy=1.0)),
        (
            "variance_type",
            lambda r, m: bound_from_curve(
                SHORT, DATA.bayes_curve, decoder=0.0, mean_square=1.0, variance_type="learned_range"
            ),
        ),
        (
            "mean_square",
            lambda r, m: bound_from_curve(SHORT, DATA.bayes_curve, decoder=0.0, mean_square=-1.0),
        ),
    ],
)
def test_errors_name_the_argument(name: str, call: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: "):
        call(ReverseProcess(SHORT), DATA.bayes_x_start_mse(SHORT))
