"""The ledger: every part in closed form for Gaussian data, and by sums over nodes for atoms."""

import math

import pytest
import torch
from torch import Tensor

from ddpm_core import (
    EpsTheta,
    Ledger,
    LinearGaussianProcess,
    ReverseProcess,
    Schedule,
    ScheduleConfig,
    VarianceType,
    bound_from_curve,
    bound_ledger,
    bound_term,
    prior_term,
)
from tests.support.oracles import (
    GaussianData,
    atoms,
    before,
    entropy_bits,
    normal_nodes,
    snr,
    straight,
    symmetric_grid,
    symmetric_grid_at_every_t,
    variance_exploding,
)

LINEAR = Schedule.from_config(ScheduleConfig())
COSINE = Schedule.from_config(ScheduleConfig(kind="cosine", num_timesteps=200))
SHORT = Schedule.from_config(ScheduleConfig(num_timesteps=20, beta_start=0.005, beta_end=0.7))
FEW = Schedule.from_config(ScheduleConfig(num_timesteps=6, beta_start=0.05, beta_end=0.8))
PROCESSES = [LINEAR, COSINE, SHORT, variance_exploding(), straight()]
NAMES = ["linear", "cosine", "short", "ve", "straight"]
FIXED: tuple[VarianceType, ...] = ("fixed_small", "fixed_large", "analytic")
DATA = GaussianData(0.25)
ATOMS = atoms([-1.0, -0.5, 0.25, 1.0], [0.1, 0.4, 0.3, 0.2])
LN_2 = math.log(2)
GAIN = 0.9
"""The imperfect network says 0.9·E[x_0|x_t]."""


def _worse(network: EpsTheta) -> EpsTheta:
    return lambda x_t, t: GAIN * network(x_t, t)


def _gaussian_mse(process: LinearGaussianProcess) -> Tensor:
    """m_θ of the imperfect network: the Bayes error and (1 − 0.9)²·E[E[x_0|x_t]²]."""
    signal = process.a.square() * DATA.variance**2 / DATA.marginal_variance(process)
    return DATA.bayes_x_start_mse(process) + (1 - GAIN) ** 2 * signal


def _reverse(process: LinearGaussianProcess, variance_type: VarianceType, mse: Tensor) -> ReverseProcess:
    return ReverseProcess(process, "x_start", variance_type, clip=False, x_start_mse=mse)


def _gaussian_ledger(process: LinearGaussianProcess, variance_type: VarianceType) -> tuple[Ledger, float]:
    """The ledger with a decoder that is a density, and the variance of that decoder."""
    mse = _gaussian_mse(process)
    reverse = _reverse(process, variance_type, mse)
    first = float(reverse.log_variance_table()[0].exp())
    decoder = (0.5 * math.log(2 * math.pi * first) + 0.5 * float(mse[0]) / first) / LN_2
    x_start, _ = symmetric_grid(DATA)
    entropy = 0.5 * math.log2(2 * math.pi * math.e * DATA.variance)
    prior = float(prior_term(process, x_start).mean())
    return (
        bound_ledger(reverse, mse, prior=prior, decoder=decoder, bayes=DATA.bayes_curve, entropy=entropy),
        first,
    )


@pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
@pytest.mark.parametrize("variance_type", FIXED)
def test_every_part_for_gaussian_data(process: LinearGaussianProcess, variance_type: VarianceType) -> None:
    got, first = _gaussian_ledger(process, variance_type)
    ratio, s2 = snr(process), DATA.variance
    drop = ratio[:-1] - ratio[1:]
    bayes, mse = DATA.bayes_x_start_mse(process), _gaussian_mse(process)
    x = drop * mse[1:]
    area = 0.5 * math.log((1 + s2 * float(ratio[0])) / (1 + s2 * float(ratio[-1])))
    expected = {
        "continuous_time": area,
        "finite_step": 0.5 * float((drop * bayes[1:]).sum()) - area,
        "network_error": 0.5 * float((drop * (mse - bayes)[1:]).sum()),
        "variance_optimum": 0.5 * float((x.log1p() - x).sum()),
        "variance_choice": 0.0,
    }
    if variance_type == "fixed_small":
        expected["variance_choice"] = 0.5 * float((x - x.log1p()).sum())
    elif variance_type == "fixed_large":
        widening = (process.b[1:] / process.b[:-1]).square()
        large = widening.log() - 1 + (1 + x) / widening
        expected["variance_choice"] = 0.5 * float((large - x.log1p()).sum())
    marginal, total = float(DATA.marginal_variance(process)[-1]), float((process.a**2 + process.b**2)[-1])
    expected["prior_mismatch"] = 0.5 * (marginal / total - 1 - math.log(marginal / total))
    left = float(mse[0]) / first
    expected["decoder_excess"] = 0.5 * (left - 1 + math.log(first / float(bayes[0])))
    for name, nats in expected.items():
        assert getattr(got, name) == pytest.approx(nats / LN_2, rel=1e-9, abs=1e-9), name
    assert got.finite_step > 0
    assert got.variance_optimum < 0
    assert got.prior_mismatch is not None
    assert got.prior_mismatch > 0 or process.ends_without_signal


@pytest.mark.parametrize(
    "process", [SHORT, FEW, variance_exploding(), straight()], ids=["short", "few", "ve", "straight"]
)
@pytest.mark.parametrize("variance_type", FIXED)
def test_the_parts_sum_to_the_entropy_and_the_divergence_of_the_chains(
    process: LinearGaussianProcess, variance_type: VarianceType
) -> None:
    """H(x_0) + KL(q(x_0, …, x_T) ‖ p_θ), both joint Gaussians, taken whole."""
    got, _ = _gaussian_ledger(process, variance_type)
    num = process.num_timesteps
    a, b = (
        torch.cat((table.new_full((1,), first), table))
        for table, first in ((process.a, 1.0), (process.b, 0.0))
    )
    q = torch.diag(a.square() * DATA.variance + b.square())
    for t in range(num):
        scale = a[t + 1] / a[t]
        q[t + 1, : t + 1] = q[: t + 1, t + 1] = scale * q[t, : t + 1]
    sigma_squared = _reverse(process, variance_type, _gaussian_mse(process)).log_variance_table().exp()
    p = torch.zeros_like(q)
    p[num, num] = a[num].square() + b[num].square()
    slope_0 = GAIN * a[1:] * DATA.variance / DATA.marginal_variance(process)
    kept = (snr(process) / before(snr(process), math.inf)).nan_to_num()
    coef1 = a[:-1] * (1 - kept)
    coef2 = kept * (a[:-1] / a[1:]).nan_to_num(posinf=0.0)
    for t in reversed(range(num)):
        slope = coef1[t] * slope_0[t] + coef2[t]
        p[t, t + 1 :] = p[t + 1 :, t] = slope * p[t + 1, t + 1 :]
        p[t, t] = slope**2 * p[t + 1, t + 1] + sigma_squared[t]
    kl = 0.5 * (torch.linalg.solve(p, q).trace() - (num + 1) + torch.logdet(p) - torch.logdet(q))
    assert got.entropy is not None
    assert got.total == pytest.approx(got.entropy + float(kl) / LN_2, rel=1e-9)


@pytest.mark.parametrize("variance_type", FIXED)
def test_the_network_s_share_and_the_variance_s_vanish_at_the_best(variance_type: VarianceType) -> None:
    """The best network and variance reach the entropy of Gaussian data but for the prior's mismatch."""
    reverse = _reverse(SHORT, variance_type, DATA.bayes_x_start_mse(SHORT))
    got = bound_ledger(reverse, DATA.bayes_x_start_mse(SHORT), prior=0.0, decoder=0.0, bayes=DATA.bayes_curve)
    assert got.network_error == pytest.approx(0.0, abs=1e-12)
    assert got.finite_step + got.variance_optimum == pytest.approx(0.0, abs=1e-9)
    if variance_type == "analytic":
        assert got.variance_choice == pytest.approx(0.0, abs=1e-12)
    else:
        assert got.variance_choice > 0.01


def test_every_part_for_atoms() -> None:
    """Against E[bound_term] and the divergences, each a sum over nodes that knows nothing of SNR or m."""
    entropy = entropy_bits(ATOMS)
    network = _worse(ATOMS.x_start_theta(FEW))
    z, weight = normal_nodes(241, 9.0)
    x_start = ATOMS.means.expand(4, 241).reshape(-1, 1, 1, 1)
    noise = z.repeat(4).reshape(-1, 1, 1, 1)
    mass = (ATOMS.weights[:, None] * weight).flatten()
    mse, terms = [], []
    for t in range(6):
        at = torch.full((len(mass),), t)
        x_t = FEW.a[t] * x_start + FEW.b[t] * noise
        mse.append((mass * (network(x_t, at) - x_start).flatten().square()).sum())
    errors = torch.stack(mse)
    for variance_type in FIXED:
        reverse = _reverse(FEW, variance_type, errors)
        terms = [
            float(mass @ bound_term(network, reverse, x_start, torch.full((len(mass),), t), noise, levels=9))
            for t in range(6)
        ]
        prior = float(mass @ prior_term(FEW, x_start))
        got = bound_ledger(
            reverse, errors, prior=prior, decoder=terms[0], bayes=ATOMS.bayes_curve, entropy=entropy
        )
        assert got.total == pytest.approx(sum(terms) + prior, abs=1e-9)

        grid = torch.linspace(-12, 12, 8001, dtype=torch.float64)
        log_q = ATOMS.log_density(FEW, 5, grid[:, None])
        log_p = torch.distributions.Normal(0.0, 1.0).log_prob(grid)
        mismatch = float(torch.trapezoid(log_q.exp() * (log_q - log_p), grid)) / LN_2
        assert got.prior_mismatch == pytest.approx(mismatch, abs=1e-9)

        x_1 = (FEW.a[0] * x_start + FEW.b[0] * noise).flatten()[:, None]
        log_share, _, _ = ATOMS.components(FEW.a[:1].expand(len(x_1)), FEW.b[:1].expand(len(x_1)), x_1)
        share = log_share.softmax(1)
        conditional = float(mass @ -(share * share.clamp(min=1e-300).log2()).sum(1))
        assert got.decoder_excess == pytest.approx(terms[0] - conditional, abs=1e-9)
        assert got.decoder_excess is not None
        assert got.decoder_excess > 0
        assert got.total - entropy > 0.01
        parts = got.decoder_excess + mismatch + got.finite_step + (got.network_error or 0.0)
        assert got.total == pytest.approx(
            entropy + parts + got.variance_optimum + got.variance_choice, abs=1e-9
        )


@pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
@pytest.mark.parametrize("variance_type", FIXED)
def test_one_curve_gives_the_bound_of_every_schedule(
    process: LinearGaussianProcess, variance_type: VarianceType
) -> None:
    """Against bound_term with the best network, over pairs that have the exact second moments."""
    x_start, noise, t = symmetric_grid_at_every_t(DATA, process)
    reverse = _reverse(process, variance_type, DATA.bayes_x_start_mse(process))
    terms = bound_term(DATA.x_start_theta(process), reverse, x_start, t, noise, levels=17)
    terms = terms.reshape(-1, 4).mean(1)
    got = bound_from_curve(
        process, DATA.bayes_curve, decoder=float(terms[0]), mean_square=0.25, variance_type=variance_type
    )
    torch.testing.assert_close(got.consistency[1:], terms[1:], rtol=1e-8, atol=1e-13)
    assert float(got.consistency[0]) == 0.0
    prior = float(prior_term(process, x_start).mean())
    assert got.total == pytest.approx(float(terms.sum()) + prior, rel=1e-9)


def test_one_curve_of_atoms_gives_the_bound_of_two_schedules() -> None:
    z, weight = normal_nodes(241, 9.0)
    x_start, noise = ATOMS.means.expand(4, 241).reshape(-1, 1, 1, 1), z.repeat(4).reshape(-1, 1, 1, 1)
    mass = (ATOMS.weights[:, None] * weight).flatten()
    for process in (FEW, variance_exploding(8)):
        got = bound_from_curve(process, ATOMS.bayes_curve, decoder=0.0, mean_square=ATOMS.mean_square)
        reverse = ReverseProcess(process, "x_start", clip=False)
        for t in range(1, process.num_timesteps):
            at = torch.full((len(mass),), t)
            term = bound_term(ATOMS.x_start_theta(process), reverse, x_start, at, noise, levels=9)
            assert float(got.consistency[t]) == pytest.approx(float(mass @ term), rel=1e-9)
        assert got.prior == pytest.approx(float(mass @ prior_term(process, x_start)), rel=1e-9)
