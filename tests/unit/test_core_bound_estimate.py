"""The estimate of the bound over images: strata, standard errors, and what is refused."""

import math

import pytest
import torch
from torch import Tensor

from ddpm_core import (
    BoundAccumulator,
    BoundEstimate,
    EpsTheta,
    ReverseProcess,
    Schedule,
    ScheduleConfig,
    bound_term,
    discretized_gaussian_log_likelihood,
    prior_term,
)
from ddpm_core.bound import stratify
from tests.support.oracles import GaussianData, full

LINEAR = Schedule.from_config(ScheduleConfig())
COSINE = Schedule.from_config(ScheduleConfig(kind="cosine"))
SHORT = Schedule.from_config(ScheduleConfig(num_timesteps=20, beta_start=0.005, beta_end=0.7))
DATA = GaussianData(0.25)


def _levels(levels: int) -> Tensor:
    return torch.linspace(-1, 1, levels, dtype=torch.float64)


@pytest.mark.parametrize("schedule", [LINEAR, COSINE, SHORT], ids=["linear", "cosine", "short"])
@pytest.mark.parametrize("num_strata", [1, 2, 7, 19])
def test_strata_cut_all_of_it(schedule: Schedule, num_strata: int) -> None:
    edges = stratify(schedule, num_strata)
    assert edges.shape == (num_strata + 1,)
    assert int(edges[0]) == 1
    assert int(edges[-1]) == schedule.num_timesteps
    assert bool((edges.diff() >= 1).all())


def test_one_stratum_a_timestep() -> None:
    assert stratify(SHORT, 19).tolist() == list(range(1, 21))
    assert stratify(LINEAR, 999).tolist() == list(range(1, 1001))


def _some_network(x_t: Tensor, t: Tensor) -> Tensor:
    return 0.7 * x_t + 0.01 * t.to(x_t.dtype).reshape(-1, 1, 1, 1) * x_t.square()


def _images(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return _levels(17)[torch.randint(17, (count, 1, 2, 2), generator=generator)]


def _accumulate(
    splits: list[Tensor], *, num_strata: int, seed: int = 0, network: EpsTheta = _some_network
) -> BoundEstimate:
    total = BoundAccumulator(ReverseProcess(SHORT), levels=17, num_strata=num_strata, seed=seed)
    states = []
    for index in splits:
        part = BoundAccumulator(ReverseProcess(SHORT), levels=17, num_strata=num_strata, seed=seed)
        part.add(network, _images(1000)[index % 1000], index)
        states.append(part.state())
    total.load_state(torch.stack(states).sum(0))
    return total.result()


def _numbers(estimate: BoundEstimate) -> list[float]:
    return [v for v in vars(estimate).values() if not isinstance(v, list)] + estimate.per_t


def test_the_estimate_does_not_depend_on_the_division_of_images() -> None:
    index = torch.arange(100)
    whole = _accumulate([index], num_strata=5)
    for splits in ([index[:1], index[1:]], list(index.flip(0).split(7)), [index[::2], index[1::2]]):
        other = _accumulate(splits, num_strata=5)
        assert other.num_images == 100
        assert _numbers(other) == pytest.approx(_numbers(whole), rel=1e-10, nan_ok=True)


def test_the_estimate_is_unbiased() -> None:
    """One t a stratum, many times over, against every t once with many ε."""
    index = torch.arange(20_000)
    exhaustive = _accumulate([index], num_strata=1000)
    for num_strata in (1, 4):
        estimate = _accumulate([index], num_strata=num_strata, seed=1)
        for name in ("reconstruction", "consistency", "total"):
            difference = getattr(estimate, name) - getattr(exhaustive, name)
            stderr = math.hypot(getattr(estimate, name + "_stderr"), getattr(exhaustive, name + "_stderr"))
            assert abs(difference) < 5 * stderr, name
            assert stderr < 0.1 * getattr(exhaustive, name)
    assert sum(exhaustive.per_t[1:]) == pytest.approx(exhaustive.consistency)
    assert exhaustive.per_t[0] == pytest.approx(exhaustive.reconstruction)
    assert exhaustive.total == pytest.approx(
        exhaustive.reconstruction + exhaustive.consistency + exhaustive.prior
    )


def test_the_estimate_for_gaussian_data_in_closed_form() -> None:
    """x_0 = ±s has the data's second moment, so that consistency and prior are those of Gaussian data."""
    estimate_of = BoundAccumulator(
        ReverseProcess(SHORT, variance_type="fixed_large", clip=False), levels=5, num_strata=6, seed=0
    )
    index = torch.arange(4000)
    sign = (index % 2 * 2 - 1).double().reshape(-1, 1, 1, 1)
    estimate_of.add(DATA.eps_theta(SHORT), sign * 0.5, index)
    estimate = estimate_of.result()
    expected = float(DATA.consistency_terms(SHORT, "fixed_large")[1:].sum())
    assert abs(estimate.consistency - expected) < 5 * estimate.consistency_stderr
    assert estimate.consistency_stderr < 0.05 * expected
    assert estimate.prior == pytest.approx(float(prior_term(SHORT, sign[:1] * 0.5)))


def test_every_evaluation_of_an_image_has_noise_of_its_own() -> None:
    noises: list[Tensor] = []

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        noises.append(x_t / SHORT.gather(SHORT.sqrt_one_minus_alphas_cumprod, t, x_t))
        return x_t

    accumulator = BoundAccumulator(ReverseProcess(SHORT), levels=3, num_strata=3, seed=0)
    accumulator.add(network, torch.zeros(2, 1, 2, 2, dtype=torch.float64), torch.arange(2))
    values = torch.stack(noises).flatten()
    assert len(noises) == 4
    assert values.unique().numel() == values.numel()


def test_standard_errors_come_from_the_totals_of_images() -> None:
    index = torch.arange(50)
    singles = [_accumulate([i[None]], num_strata=3) for i in index]
    together = _accumulate([index], num_strata=3)
    for name in ("reconstruction", "consistency", "prior", "total"):
        values = torch.tensor([getattr(single, name) for single in singles], dtype=torch.float64)
        assert getattr(together, name) == pytest.approx(float(values.mean()), rel=1e-9)
        expected = float(values.std() / math.sqrt(50))
        assert getattr(together, name + "_stderr") == pytest.approx(expected, rel=1e-6)
    assert math.isnan(singles[0].total_stderr)


def test_per_t_is_nan_where_nothing_was_drawn() -> None:
    estimate = _accumulate([torch.arange(2)], num_strata=2)
    assert len(estimate.per_t) == 20
    assert 1 <= sum(not math.isnan(v) for v in estimate.per_t[1:]) <= 4
    assert not math.isnan(estimate.per_t[0])


def test_a_schedule_of_one_step_has_two_terms() -> None:
    one = Schedule.from_config(ScheduleConfig(num_timesteps=1, beta_start=0.5, beta_end=0.5))
    accumulator = BoundAccumulator(ReverseProcess(one), levels=17, num_strata=8, seed=0)
    accumulator.add(_some_network, _images(3), torch.arange(3))
    estimate = accumulator.result()
    assert estimate.consistency == 0.0
    assert estimate.total == pytest.approx(estimate.reconstruction + estimate.prior)


def test_adding_keeps_no_graph() -> None:
    weight = torch.tensor(0.5, requires_grad=True, dtype=torch.float64)
    accumulator = BoundAccumulator(ReverseProcess(SHORT), levels=17, num_strata=2, seed=0)
    accumulator.add(lambda x, t: weight * x, _images(2), torch.arange(2))
    assert not accumulator.state().requires_grad


def test_sigma_of_zero_is_refused_by_name() -> None:
    x = torch.zeros(1)
    with pytest.raises(ValueError, match=r"^log_scale: .*sigma of 0"):
        discretized_gaussian_log_likelihood(x, x, torch.log(x), 17)
    with pytest.raises(ValueError, match=r"^variance_type: .*'zero'"):
        ReverseProcess(SHORT, variance_type="zero")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        (
            "levels: ",
            lambda: BoundAccumulator(ReverseProcess(SHORT), levels=1, num_strata=2, seed=0),
        ),
        (
            "num_strata: ",
            lambda: BoundAccumulator(ReverseProcess(SHORT), levels=17, num_strata=0, seed=0),
        ),
        ("num_strata: ", lambda: stratify(SHORT, 20)),
        ("index: ", lambda: _accumulator().add(_some_network, _images(2), torch.tensor([0.0, 1.0]))),
        ("x_start: ", lambda: _accumulator().add(_some_network, _images(2), torch.arange(3))),
        ("x_start: ", lambda: _accumulator().add(_some_network, _images(2).to(torch.uint8), torch.arange(2))),
        ("state: ", lambda: _accumulator().load_state(torch.zeros(3))),
        ("state: ", lambda: _accumulator().result()),
        (
            r"x_start: must be finite, got nan at \[1, 0, 0, 1\]",
            lambda: _accumulator().add(_some_network, _with_nan(), torch.arange(2)),
        ),
        ("x_start: ", lambda: prior_term(SHORT, torch.zeros(2))),
        ("x_start: ", lambda: _term_of(torch.zeros(2))),
        ("eps_theta's output: ", lambda: _accumulator().add(lambda x, t: x[:1], _images(2), torch.arange(2))),
    ],
)
def test_errors_name_the_argument(name: str, call) -> None:
    with pytest.raises(ValueError, match=rf"^{name}"):
        call()


def _with_nan() -> Tensor:
    x_start = _images(2)
    x_start[1, 0, 0, 1] = math.nan
    return x_start


def _term_of(x_start: Tensor) -> Tensor:
    return bound_term(_some_network, ReverseProcess(SHORT), x_start, full(3, x_start), x_start, levels=17)


def _accumulator() -> BoundAccumulator:
    return BoundAccumulator(ReverseProcess(SHORT), levels=17, num_strata=2, seed=0)


def test_strata_are_short_where_the_terms_are_large() -> None:
    """Half of the share is the terms of Gaussian data, of which almost all lies near t = 0."""
    lengths = stratify(LINEAR, 10).diff()
    assert int(lengths[0]) < 20
    assert int(lengths[-1]) > 100


def test_each_stratum_draws_a_timestep_of_its_own() -> None:
    asked: list[Tensor] = []

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        asked.append(t)
        return x_t

    accumulator = BoundAccumulator(ReverseProcess(LINEAR), levels=3, num_strata=30, seed=0)
    accumulator.add(network, torch.zeros(50, 1, 1, 1), torch.arange(50))
    edges = stratify(LINEAR, 30)
    places, lengths = torch.stack(asked[1:]) - edges[:-1, None], edges.diff()
    assert bool(((places >= 0) & (places < lengths[:, None])).all())
    # of two strata of one length, one draw for both would pick the same place in both
    alike = [(i, j) for i in range(30) for j in range(i) if lengths[i] == lengths[j] > 1]
    assert len(alike) > 2
    for i, j in alike:
        assert not torch.equal(places[i], places[j])
