"""E[−ELBO] = H(x_0) + KL(q(x_T) ‖ p) + Σ E KL(q(x_{t−1}|x_t) ‖ p_θ(x_{t−1}|x_t)).

The left side is what the library computes, by sums over nodes of (x_0, ε). The right side speaks of the true
reverse kernels q(x_{t−1}|x_t), for which Bayes' rule is taken as it stands: q(x_t|x_{t−1})·q(x_{t−1})/q(x_t).
"""

import math

import pytest
import torch
from torch import Tensor

from ddpm_core import (
    EpsTheta,
    LinearGaussianProcess,
    ReverseProcess,
    Schedule,
    ScheduleConfig,
    VarianceType,
    bound_term,
    discretized_gaussian_log_likelihood,
    prior_term,
    two_sided_prior_term,
    two_sided_term,
)
from tests.support.oracles import (
    GaussianData,
    GaussianMixture,
    atoms,
    entropy_bits,
    full,
    normal_nodes,
    symmetric_grid,
    variance_exploding,
)

FEW = Schedule.from_config(ScheduleConfig(num_timesteps=5, beta_start=0.05, beta_end=0.8))
SHORT = Schedule.from_config(ScheduleConfig(num_timesteps=20, beta_start=0.005, beta_end=0.7))
PROCESSES = [FEW, variance_exploding(5, first=0.3, last=8.0)]
NAMES = ["vp", "ve"]
LN_2 = math.log(2)
ATOMS = atoms([-1.0, -0.5, 0.25, 1.0], [0.1, 0.4, 0.3, 0.2])
MIXTURE = GaussianMixture(
    torch.tensor([0.4, 0.6], dtype=torch.float64),
    torch.tensor([[-0.4], [0.3]], dtype=torch.float64),
    torch.tensor([0.005, 0.01], dtype=torch.float64),
)
FIXED: tuple[VarianceType, ...] = ("fixed_small", "fixed_large", "analytic")


def _nodes(data: GaussianMixture, inner: int, outer: int) -> tuple[Tensor, Tensor, Tensor]:
    """x_0, ε and the weights of E over both; inner nodes for x_0 in each component, one if it is an atom."""
    z, weight = normal_nodes(inner, 9.0) if inner > 1 else (torch.zeros(1).double(), torch.ones(1).double())
    x_start = data.means + data.variances.sqrt()[:, None] * z
    mass = data.weights[:, None] * weight
    eps, eps_weight = normal_nodes(outer, 9.0)
    shape = (len(data.weights), len(z), outer)
    x_start, noise = x_start[..., None].expand(shape), eps.expand(shape)
    return x_start.reshape(-1, 1, 1, 1), noise.reshape(-1, 1, 1, 1), (mass[..., None] * eps_weight).flatten()


def _divergence_of_kernels(
    data: GaussianMixture, network: EpsTheta, reverse: ReverseProcess, t: int
) -> float:
    """E KL(q(x_{t−1}|x_t) ‖ p_θ) in nats for t ≥ 1, by sums over (component, x_{t−1}, x_t)."""
    process = reverse.process
    a, b = process.a, process.b
    scale = a[t] / a[t - 1]
    variance = b[t].square() - scale.square() * b[t - 1].square()
    z, weight = normal_nodes(121, 8.0)
    spread = (a[t - 1].square() * data.variances + b[t - 1].square()).sqrt()
    x_prev = (a[t - 1] * data.means + spread[:, None] * z)[..., None].expand(-1, -1, len(z)).flatten()
    step = z.repeat(x_prev.numel() // len(z))
    x_t = scale * x_prev + variance.sqrt() * step
    mass = (data.weights[:, None, None] * weight[:, None] * weight).flatten()
    log_step = -0.5 * step.square() - 0.5 * (2 * math.pi * variance).log()
    log_q = (
        log_step
        + data.log_density(process, t - 1, x_prev[:, None])
        - data.log_density(process, t, x_t[:, None])
    )
    at, x = full(t, x_t), x_t.reshape(-1, 1, 1, 1)
    mean, log_variance = reverse.transition(network(x, at), x, at)
    log_p = torch.distributions.Normal(mean.flatten(), (0.5 * log_variance.flatten()).exp()).log_prob(x_prev)
    return float(mass @ (log_q - log_p))


def _divergence_from_the_prior(data: GaussianMixture, process: LinearGaussianProcess) -> float:
    """KL(q(x_T) ‖ p) in nats."""
    deviation = (process.a.square() + process.b.square())[-1].sqrt()
    grid = torch.linspace(-12, 12, 12_001, dtype=torch.float64) * deviation
    log_q = data.log_density(process, process.num_timesteps - 1, grid[:, None])
    log_p = torch.distributions.Normal(0.0, deviation).log_prob(grid)
    return float(torch.trapezoid(log_q.exp() * (log_q - log_p), grid))


def _imperfect(network: EpsTheta) -> EpsTheta:
    return lambda x_t, t: 0.85 * network(x_t, t) + 0.05


def _reverse(process: LinearGaussianProcess, variance_type: VarianceType) -> ReverseProcess:
    mse = 0.01 + 0.2 * torch.sigmoid(-process.log_snr)
    return ReverseProcess(process, "x_start", variance_type, clip=False, x_start_mse=mse)


@pytest.mark.parametrize("variance_type", FIXED)
@pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
@pytest.mark.parametrize("perfect", [True, False])
def test_the_identity_for_atoms(
    process: LinearGaussianProcess, variance_type: VarianceType, perfect: bool
) -> None:
    network = ATOMS.x_start_theta(process)
    network = network if perfect else _imperfect(network)
    reverse = _reverse(process, variance_type)
    x_start, noise, mass = _nodes(ATOMS, 1, 241)
    num = process.num_timesteps
    bound = float(mass @ prior_term(process, x_start, unit="nats"))
    for t in range(num):
        term = bound_term(network, reverse, x_start, full(t, x_start), noise, levels=9, unit="nats")
        bound += float(mass @ term)

    # the first kernel is a law on the atoms, and the decoder's one on the levels
    x_1 = process.a[0] * x_start + process.b[0] * noise
    log_share, _, _ = ATOMS.components(
        process.a[:1].expand(len(mass)), process.b[:1].expand(len(mass)), x_1.flatten()[:, None]
    )
    log_q = log_share.log_softmax(1)
    mean, log_variance = reverse.transition(network(x_1, full(0, x_1)), x_1, full(0, x_1))
    log_p = discretized_gaussian_log_likelihood(
        ATOMS.means[:, 0].expand_as(log_q), mean.reshape(-1, 1), 0.5 * log_variance.reshape(-1, 1), 9
    )
    first = float(mass @ (log_q.exp() * (log_q - log_p)).nan_to_num().sum(1))
    kernels = [_divergence_of_kernels(ATOMS, network, reverse, t) for t in range(1, num)]
    expected = entropy_bits(ATOMS) * LN_2 + _divergence_from_the_prior(ATOMS, process) + first + sum(kernels)
    assert bound == pytest.approx(expected, abs=1e-8)
    assert first > 0
    assert min(kernels) > 0


@pytest.mark.parametrize("variance_type", FIXED)
@pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
def test_the_identity_for_a_mixture(process: LinearGaussianProcess, variance_type: VarianceType) -> None:
    """With bins so narrow that a mass is the density times the bin's width, and H the differential entropy."""
    levels = 2**14 + 1
    network = _imperfect(MIXTURE.x_start_theta(process))
    reverse = _reverse(process, variance_type)
    x_start, noise, mass = _nodes(MIXTURE, 81, 81)
    bound = float(mass @ prior_term(process, x_start, unit="nats")) + math.log(2 / (levels - 1))
    for t in range(process.num_timesteps):
        term = bound_term(network, reverse, x_start, full(t, x_start), noise, levels=levels, unit="nats")
        bound += float(mass @ term)

    kernels = sum(
        _divergence_of_kernels(MIXTURE, network, reverse, t) for t in range(1, process.num_timesteps)
    )
    x_1 = process.a[0] * x_start + process.b[0] * noise
    mean, log_variance = reverse.transition(network(x_1, full(0, x_1)), x_1, full(0, x_1))
    log_p = torch.distributions.Normal(mean.flatten(), (0.5 * log_variance.flatten()).exp()).log_prob(
        x_start.flatten()
    )
    data = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(MIXTURE.weights),
        torch.distributions.Normal(MIXTURE.means[:, 0], MIXTURE.variances.sqrt()),
    )
    log_data = data.log_prob(x_start.flatten())
    log_q = (
        torch.distributions.Normal(0.0, process.b[0]).log_prob(process.b[0] * noise.flatten())
        + log_data
        - MIXTURE.log_density(process, 0, x_1.flatten()[:, None])
    )
    entropy, first = -float(mass @ log_data), float(mass @ (log_q - log_p))
    expected = entropy + _divergence_from_the_prior(MIXTURE, process) + first + kernels
    assert bound == pytest.approx(expected, abs=2e-6)
    assert first > 0
    assert kernels > 0.01


def _normal_divergence(mean: Tensor, variance: Tensor, other_mean: Tensor, other_variance: Tensor) -> Tensor:
    """E KL of two normal laws in nats; the means are slopes on a variable of variance 1."""
    return 0.5 * (
        (variance + (mean - other_mean).square()) / other_variance - 1 + (other_variance / variance).log()
    )


@pytest.mark.parametrize("variance_type", FIXED)
@pytest.mark.parametrize("process", [SHORT, variance_exploding(15)], ids=NAMES)
def test_the_identity_for_gaussian_data_in_closed_form(
    process: LinearGaussianProcess, variance_type: VarianceType
) -> None:
    """Both decompositions, with a network that says 0.85·E[x_0|x_t]; the decoder's bins are narrow."""
    data, levels = GaussianData(0.25), 2**18 + 1
    best = data.x_start_theta(process)
    reverse = _reverse(process, variance_type)

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        return 0.85 * best(x_t, t)

    x_start, noise = symmetric_grid(data)
    num = process.num_timesteps
    decoder, *terms = (
        float(
            bound_term(network, reverse, x_start, full(t, x_start), noise, levels=levels, unit="nats").mean()
        )
        for t in range(num)
    )
    decoder += math.log(2 / (levels - 1))
    prior = float(prior_term(process, x_start, unit="nats").mean())

    a, b = (
        torch.cat((table.new_full((1,), at), table)) for table, at in ((process.a, 1.0), (process.b, 0.0))
    )
    marginal = a.square() * 0.25 + b.square()
    slope = a[1:] / a[:-1] * marginal[:-1] / marginal[1:]
    kernel_variance = marginal[:-1] - slope.square() * marginal[1:]
    one = torch.ones(num, 1, 1, 1, dtype=torch.float64)
    mean, log_variance = reverse.transition(network(one, torch.arange(num)), one, torch.arange(num))
    deviation = marginal[1:].sqrt()
    kernels = _normal_divergence(
        slope * deviation, kernel_variance, mean.flatten() * deviation, log_variance.flatten().exp()
    )
    zero = torch.zeros(())
    end = _normal_divergence(zero, marginal[-1], zero, a[-1].square() + b[-1].square())
    entropy = 0.5 * math.log(2 * math.pi * math.e * 0.25)
    expected = entropy + float(end) + float(kernels.sum())
    # a bin of width w under a normal law adds about (w/σ)²/24
    assert decoder + sum(terms) + prior == pytest.approx(expected, abs=1e-6)

    # every sign of the four deviates together has their exact second moments
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 4).reshape(
        16, 4, 1, 1, 1
    )
    x, noises = 0.5 * signs[:, 0], signs[:, 1:].transpose(0, 1)
    two_sided = decoder + float(two_sided_prior_term(process, x, unit="nats").mean())
    for t in range(num - 1):
        term = two_sided_term(network, reverse, x, full(t, x), noises, unit="nats")
        two_sided += float(term.mean())
    assert two_sided == pytest.approx(expected, abs=1e-6)
