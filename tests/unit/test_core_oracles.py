"""The oracles themselves: each against sums over x_0 or random draws, since every other test leans on them."""

import math

import pytest
import torch
from torch import Tensor

from ddpm_core import LinearGaussianProcess, Schedule, ScheduleConfig, q_sample, simple_loss, snr_integral
from tests.support.oracles import (
    GaussianData,
    GaussianMixture,
    atoms,
    entropy_bits,
    full,
    normal_nodes,
    straight,
    variance_exploding,
)

SHORT = Schedule.from_config(ScheduleConfig(num_timesteps=20, beta_start=0.005, beta_end=0.7))
PROCESSES = [SHORT, variance_exploding(), straight()]
NAMES = ["vp", "ve", "straight"]
ATOMS = atoms([-1.0, -0.25, 0.5, 1.0], [0.1, 0.4, 0.3, 0.2])
MIXTURE = GaussianMixture(
    torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64),
    torch.tensor([[-0.8], [0.1], [0.9]], dtype=torch.float64),
    torch.tensor([0.01, 0.04, 0.0025], dtype=torch.float64),
)
WIDE = GaussianMixture(
    torch.tensor([0.3, 0.7], dtype=torch.float64),
    torch.tensor([[-0.8, 0.2, 0.5], [0.4, -0.1, 0.0]], dtype=torch.float64),
    torch.tensor([0.02, 0.3], dtype=torch.float64),
)


def _one_gaussian(variance: float, dims: int, parts: int = 1) -> GaussianMixture:
    one = torch.ones(parts, dtype=torch.float64)
    return GaussianMixture(one / parts, torch.zeros(parts, dims, dtype=torch.float64), variance * one)


@pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
@pytest.mark.parametrize(
    "mixture", [_one_gaussian(0.25, 1), _one_gaussian(0.25, 1, 2), _one_gaussian(0.25, 4)]
)
def test_one_gaussian_as_a_mixture_is_gaussian_data(
    process: LinearGaussianProcess, mixture: GaussianMixture
) -> None:
    x = torch.randn(process.num_timesteps, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    t = torch.arange(process.num_timesteps)
    data = GaussianData(0.25)
    for name in ("eps_theta", "x_start_theta"):
        got, expected = (getattr(d, name)(process)(x, t) for d in (mixture, data))
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    if mixture.means.shape[1] == 1:
        torch.testing.assert_close(
            mixture.bayes_x_start_mse(process), data.bayes_x_start_mse(process), rtol=1e-10, atol=0
        )


@pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
def test_the_posterior_mean_is_the_integral_over_x_start(process: LinearGaussianProcess) -> None:
    """E[x_0|x_t] = ∫ x_0·q(x_t|x_0)·p(x_0) / ∫ q(x_t|x_0)·p(x_0), by a grid, for atoms their sum."""
    grid = torch.linspace(-3, 3, 60_001, dtype=torch.float64)
    density = torch.zeros_like(grid)
    for w, mean, variance in zip(MIXTURE.weights, MIXTURE.means[:, 0], MIXTURE.variances, strict=True):
        density += w * torch.distributions.Normal(mean, variance.sqrt()).log_prob(grid).exp()
    for data, points, mass in [(MIXTURE, grid, density), (ATOMS, ATOMS.means[:, 0], ATOMS.weights)]:
        for t in (0, 5, process.num_timesteps - 1):
            a, b = float(process.a[t]), float(process.b[t])
            x_t = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64) * math.hypot(a, b)
            likelihood = torch.exp(-0.5 * ((x_t[:, None] - a * points) / b).square()) * mass
            expected = (likelihood * points).sum(1) / likelihood.sum(1)
            got = data.x_start_theta(process)(x_t.reshape(-1, 1, 1, 1), full(t, x_t)).flatten()
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
def test_the_error_of_a_mixture_in_many_dimensions_is_orthogonal(process: LinearGaussianProcess) -> None:
    """E[(x_0 − E[x_0|x_t])·f(x_t)] = 0 for every f, by random draws."""
    x_start = WIDE.sample(40_000, 1).reshape(-1, 3, 1, 1)
    noise = torch.randn(x_start.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for t in (0, 4, process.num_timesteps - 1):
        at = full(t, x_start)
        x_t = q_sample(process, x_start, at, noise)
        error = (x_start - WIDE.x_start_theta(process)(x_t, at)).flatten(1)
        scaled = x_t.flatten(1) / math.hypot(float(process.a[t]), float(process.b[t]))
        for f in (torch.ones_like(scaled), scaled, scaled[:, :1].square(), torch.sin(2 * scaled).roll(1, 1)):
            product = error * f
            z = product.mean(0) / (product.std(0) / math.sqrt(len(product)))
            assert float(z.abs().max()) < 5


def test_a_tensor_is_read_as_blocks() -> None:
    x = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(3)).double()
    t = torch.tensor([0, 3, 9, 19])
    whole = ATOMS.eps_theta(SHORT)(x, t)
    single = torch.stack([ATOMS.eps_theta(SHORT)(v.reshape(4, 1, 1, 1), t) for v in x.flatten(1).T])
    torch.testing.assert_close(whole.flatten(1), single.flatten(1).T)


@pytest.mark.parametrize("data", [ATOMS, MIXTURE], ids=["atoms", "mixture"])
def test_the_area_under_the_bayes_error_is_the_information(data: GaussianMixture) -> None:
    """½∫ m dSNR up to x_t = I(x_0; x_t) = h(x_t) − h(ε·b), the entropy of x_t by quadrature."""
    grid = torch.linspace(-9, 9, 60_001, dtype=torch.float64)
    for log_snr in (-4.0, 0.0, 3.0):
        a, b = (math.sqrt(1 / (1 + math.exp(sign * log_snr))) for sign in (-1, 1))
        log_density = data.components(torch.full_like(grid, a), torch.full_like(grid, b), grid[:, None])[
            0
        ].logsumexp(1)
        entropy = -torch.trapezoid(log_density.exp() * log_density, grid)
        expected = float(entropy) - 0.5 * math.log(2 * math.pi * math.e * b**2)
        assert 0.5 * snr_integral(data.bayes_curve, -math.inf, log_snr) == pytest.approx(expected, abs=1e-9)


def test_all_the_information_in_atoms_is_their_entropy() -> None:
    area = 0.5 * snr_integral(ATOMS.bayes_curve, -math.inf, 9.0) / math.log(2)
    assert area == pytest.approx(entropy_bits(ATOMS), abs=1e-9)
    assert entropy_bits(atoms([0.0, 0.5, 1.0, -1.0], [0.25] * 4)) == 2.0


@pytest.mark.parametrize("data", [ATOMS, MIXTURE], ids=["atoms", "mixture"])
def test_without_signal_the_error_is_the_variance(data: GaussianMixture) -> None:
    mean = float((data.weights * data.means[:, 0]).sum())
    got = data.bayes_curve(torch.tensor([-math.inf, -40.0]))
    torch.testing.assert_close(got, torch.full_like(got, data.mean_square - mean**2), rtol=1e-12, atol=0)


@pytest.mark.parametrize("data", [ATOMS, MIXTURE], ids=["atoms", "mixture"])
def test_the_loss_of_the_best_network_is_the_bayes_error(data: GaussianMixture) -> None:
    """By random draws; and networks to its sides are worse."""
    x_start = data.sample(50_000, 4).reshape(-1, 1, 1, 1)
    noise = torch.randn(x_start.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    t = full(9, x_start)
    eps_star = data.eps_theta(SHORT)
    loss = simple_loss(eps_star, SHORT, x_start, t, noise)
    expected = float(data.bayes_x_start_mse(SHORT)[9] * (SHORT.a[9] / SHORT.b[9]).square())
    assert abs(float(loss.mean()) - expected) < 5 * float(loss.std()) / math.sqrt(len(loss))
    for off in (0.95, 1.05):

        def worse(x: Tensor, t: Tensor, off: float = off) -> Tensor:
            return off * eps_star(x, t)

        assert float(simple_loss(worse, SHORT, x_start, t, noise).mean()) > float(loss.mean())


def test_nodes_have_the_moments_of_the_normal_law() -> None:
    z, weight = normal_nodes(301, 12.0)
    for power, expected in ((0, 1.0), (2, 1.0), (4, 3.0), (6, 15.0)):
        assert float((weight * z**power).sum()) == pytest.approx(expected, rel=1e-13)
    assert float((weight * torch.cos(z)).sum()) == pytest.approx(math.exp(-0.5), rel=1e-13)


def test_samples_have_the_moments_of_the_mixture() -> None:
    x = WIDE.sample(100_000, 6)
    assert float(x.square().mean()) == pytest.approx(WIDE.mean_square, rel=0.02)
    torch.testing.assert_close(x.mean(0), WIDE.weights @ WIDE.means, rtol=0, atol=0.01)
