"""The true reverse kernel q(x_{t−1}|x_t) by quadrature on one-dimensional data; path laws; depth.

Everything here is one-dimensional, smooth and falls off like a Gaussian, so that the trapezoid rule on a wide grid
is exact to rounding.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ddpm_core import EpsTheta, ReverseProcess, Schedule, bound_term, prior_term, rng
from ddpm_core.hierarchy import Conditional, DiffusionChain, Gaussian, path_bound, path_terms
from tests.support.oracles import full

GRID = torch.linspace(-12, 12, 1201, dtype=torch.float64)
STEP = float(GRID[1] - GRID[0])


def _gauss(value: Tensor, mean: Tensor, variance: Tensor | float) -> Tensor:
    variance = torch.as_tensor(variance, dtype=torch.float64)
    return torch.exp(-0.5 * (value - mean).square() / variance) / (2 * math.pi * variance).sqrt()


@dataclass(frozen=True)
class Kernel:
    """q(u|y) ∝ q(u)·N(y; √(1−β)·u, β) on a window of u around each y: densities, and the first two moments."""

    u: Tensor
    weight: Tensor
    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, before, y: Tensor, beta: float) -> "Kernel":
        """before: the density of u = x_{t−1}; y `[N]`."""
        width = math.sqrt(beta / (1 - beta))
        offsets = torch.linspace(-14, 14, 561, dtype=torch.float64) * width
        u = y[:, None] / math.sqrt(1 - beta) + offsets
        density = before(u) * _gauss(y[:, None], math.sqrt(1 - beta) * u, beta)
        weight = density / density.sum(1, keepdim=True)
        mean = (weight * u).sum(1)
        return cls(u, weight, mean, (weight * (u - mean[:, None]).square()).sum(1))

    def divergence_from_its_gaussian(self) -> Tensor:
        """KL(q(u|y) ‖ the Gaussian with its mean and variance), `[N]` in nats."""
        log_density = (self.weight / (self.u[0, 1] - self.u[0, 0])).clamp(min=1e-300).log()
        gauss = _gauss(self.u, self.mean[:, None], self.variance[:, None]).clamp(min=1e-300).log()
        return (self.weight * (log_density - gauss)).sum(1)


def _atoms_after(alpha_cumprod: float):
    """q(x_t) for x_0 = ±1 with equal odds."""
    mean = math.sqrt(alpha_cumprod) * torch.ones((), dtype=torch.float64)
    return lambda x: 0.5 * (_gauss(x, mean, 1 - alpha_cumprod) + _gauss(x, -mean, 1 - alpha_cumprod))


def test_the_reverse_kernel_becomes_gaussian_as_beta_falls() -> None:
    """E KL(q(x_{t−1}|x_t) ‖ its Gaussian) → β³/12·E[((ln q)''')²], so that T = O(1/β) steps lose O(β²) in all.

    The kernel's skewness is β^{3/2}·(ln q)''' to leading order, and a Gaussian misses skewness²/12. For x_0 = ±1,
    ln q = −x²/(2v) + ln cosh(m·x/v) + const, whose third derivative is −2·(m/v)³·tanh·(1 − tanh²).
    """
    kept = 0.5
    before = _atoms_after(kept)
    betas = [0.08 / 2**k for k in range(6)]
    divergences = []
    for beta in betas:
        after = _atoms_after(kept * (1 - beta))
        kernel = Kernel.of(before, GRID, beta)
        divergences.append(float((after(GRID) * kernel.divergence_from_its_gaussian()).sum()) * STEP)
    orders = [math.log2(a / b) for a, b in pairwise(divergences)]
    assert orders[-1] == pytest.approx(3.0, abs=0.1)
    assert abs(orders[-1] - 3) < abs(orders[0] - 3)

    slope = math.sqrt(kept) / (1 - kept)
    tanh = torch.tanh(slope * GRID)
    third = -2 * slope**3 * tanh * (1 - tanh.square())
    leading = float((before(GRID) * third.square()).sum()) * STEP * betas[-1] ** 3 / 12
    assert divergences[-1] == pytest.approx(leading, rel=0.02)


def test_a_long_step_is_far_from_gaussian() -> None:
    """One step from x_0-like states to noise: q(x_{t−1}|x_t) has two humps, and no Gaussian is near."""
    kernel = Kernel.of(_atoms_after(0.99), torch.zeros(1, dtype=torch.float64), 0.9)
    assert float(kernel.divergence_from_its_gaussian()) > 0.5


# ---- the two path laws


MIXTURE_MEAN, MIXTURE_VARIANCE = 1.0, 0.04
STEEP = Schedule(torch.tensor([0.3, 0.5, 0.8], dtype=torch.float64))


def _marginal(t: int):
    """q(x_t) for q(x_0) = ½·N(−1, 0.04) + ½·N(1, 0.04), from the tables of the closed form; q(x_0) at t = −1."""
    kept = torch.ones((), dtype=torch.float64) if t < 0 else STEEP.alphas_cumprod[t]
    mean, variance = kept.sqrt() * MIXTURE_MEAN, kept * MIXTURE_VARIANCE + 1 - kept
    return lambda x: 0.5 * (_gauss(x, mean, variance) + _gauss(x, -mean, variance))


@dataclass(frozen=True)
class TrueReverse:
    """q(x_{t−1}|x_t) as a decoder: Bayes' rule with its normaliser by quadrature over x_{t−1}, not from q(x_t)."""

    t: int
    x_t: Tensor

    @property
    def mean(self) -> Tensor:
        return self._kernel().mean[:, None]

    def sample(self, noise: Tensor) -> Tensor:
        raise NotImplementedError

    def _kernel(self) -> Kernel:
        return Kernel.of(_marginal(self.t - 1), self.x_t[:, 0], float(STEEP.betas[self.t]))

    def log_density(self, value: Tensor) -> Tensor:
        alpha, beta = STEEP.alphas[self.t], STEEP.betas[self.t]
        normaliser = (_marginal(self.t - 1)(GRID) * _gauss(self.x_t, alpha.sqrt() * GRID, beta)).sum(1) * STEP
        joint = _marginal(self.t - 1)(value[:, 0]) * _gauss(self.x_t[:, 0], alpha.sqrt() * value[:, 0], beta)
        return (joint / normaliser).log()

    def matched(self) -> Gaussian:
        """The Gaussian with the same mean and variance, which is the best that p_θ can be."""
        kernel = self._kernel()
        return Gaussian(kernel.mean[:, None], kernel.variance.log()[:, None])


@dataclass(frozen=True)
class Prior:
    """q(x_T) itself."""

    mean = torch.zeros(())

    def log_density(self, value: Tensor) -> Tensor:
        return _marginal(2)(value[:, 0]).log()

    def sample(self, noise: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class ReversedChain:
    """The forward steps of STEEP, decoded by the true reverse kernel or by its Gaussian."""

    is_gaussian: bool
    num_timesteps: int = 3

    def encode(self, t: int, z: Tensor) -> Gaussian:
        return Gaussian(STEEP.alphas[t].sqrt() * z, STEEP.betas[t].log().expand_as(z))

    def decode(self, t: int, z: Tensor) -> Conditional:
        kernel = TrueReverse(t, z)
        return kernel.matched() if self.is_gaussian else kernel

    def prior(self) -> Prior:
        return Prior()


def _data(count: int) -> Tensor:
    index = torch.arange(count)
    spread = rng.normal(0, "spread", index, (1,), dtype=torch.float64) * math.sqrt(MIXTURE_VARIANCE)
    return spread + MIXTURE_MEAN * (2.0 * rng.integers(0, "sign", index, 2) - 1.0)[:, None]


def test_the_path_laws_agree_for_the_true_reverse_kernel() -> None:
    """q(x_0)·∏q(x_t|x_{t−1}) = q(x_T)·∏q(x_{t−1}|x_t) at every path, so that −ELBO = −ln q(x_0) on each."""
    x = _data(64)
    chain = ReversedChain(is_gaussian=False)
    expected = -_marginal(-1)(x[:, 0]).log()
    total = path_bound(chain, x, seed=0, index=torch.arange(64)).total
    torch.testing.assert_close(total, expected, rtol=1e-9, atol=1e-9)
    # at any path, not only at likely ones
    path = [x, *(0.7 * torch.roll(x, k, 0) for k in (1, 2, 3))]
    torch.testing.assert_close(path_terms(chain, path).total, expected, rtol=1e-9, atol=1e-9)


def test_the_path_laws_differ_for_the_best_gaussian_kernel() -> None:
    """E[−ELBO] − H(x_0) = KL(path laws) = Σ_t E KL(q(x_{t−1}|x_t) ‖ its Gaussian) > 0."""
    count = 3000
    x = _data(count)
    excess = path_bound(ReversedChain(is_gaussian=True), x, seed=0, index=torch.arange(count)).total
    excess = excess + _marginal(-1)(x[:, 0]).log()
    expected = 0.0
    for t in range(3):
        kernel = Kernel.of(_marginal(t - 1), GRID, float(STEEP.betas[t]))
        expected += float((_marginal(t)(GRID) * kernel.divergence_from_its_gaussian()).sum()) * STEP
    stderr = float(excess.std()) / math.sqrt(count)
    assert expected > 0.3
    assert stderr < 0.1 * expected
    assert abs(float(excess.mean()) - expected) < 5 * stderr


# ---- depth


def _between_equal_end_points(depth: int) -> Schedule:
    """T = depth + 1, log-SNR evenly spaced from 1.5 to −9: twice the depth has all its levels.

    Nearer the data σ of the best decoder is so small that the bound hangs on paths too rare to draw.
    """
    log_snr = torch.linspace(1.5, -9, depth + 1, dtype=torch.float64)
    alphas_cumprod = torch.sigmoid(log_snr)
    before = torch.cat((torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]))
    return Schedule(1 - alphas_cumprod / before)


def _best_for_two_atoms(schedule: Schedule) -> EpsTheta:
    """ε*(x_t, t) for x_0 = ±1: x̂_0 = tanh(√ᾱ·x_t/(1 − ᾱ))."""

    def eps_star(x_t: Tensor, t: Tensor) -> Tensor:
        a, b = (schedule.gather(table, t, x_t) for table in (schedule.a, schedule.b))
        return (x_t - a * torch.tanh(a * x_t / b.square())) / b

    return eps_star


NOISE = torch.linspace(-9, 9, 721, dtype=torch.float64)
WEIGHT = _gauss(NOISE, torch.zeros((), dtype=torch.float64), 1.0) * float(NOISE[1] - NOISE[0])


def _best_model(depth: int) -> tuple[EpsTheta, ReverseProcess]:
    """The best network for two atoms with the best variance for it, σ² = β̃ + c1²·Var(x_0|x_t)."""
    schedule = _between_equal_end_points(depth)
    signal, spread = schedule.a, schedule.b
    pred = torch.tanh(signal / spread.square() * (signal + spread * NOISE[:, None]))
    mse = torch.tensordot(WEIGHT, (1 - pred).square(), 1)
    reverse = ReverseProcess(schedule, variance_type="analytic", clip=False, x_start_mse=mse)
    return _best_for_two_atoms(schedule), reverse


def _exact_bound(depth: int) -> float:
    """The bound of two atoms in bits, by quadrature over ε."""
    return _end_terms(depth) + sum(_term(depth, t) for t in range(1, depth + 1))


def _end_terms(depth: int) -> float:
    """Reconstruction and prior."""
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    return _term(depth, 0) + float(prior_term(_between_equal_end_points(depth), x))


def _term(depth: int, t: int) -> float:
    eps_star, reverse = _best_model(depth)
    noise = NOISE.reshape(-1, 1, 1, 1)
    x = torch.ones_like(noise)  # −1 has the same terms
    return float((WEIGHT * bound_term(eps_star, reverse, x, full(t, x), noise, levels=2)).sum())


def test_the_bound_falls_with_depth_between_equal_end_points() -> None:
    """To ½·∫ m(SNR) dSNR and what the end points cost, above the entropy of one bit; the excess falls like 1/T."""
    depths = [1, 2, 4, 8, 16, 32, 64, 128]
    totals = [_exact_bound(depth) for depth in depths]
    assert all(shallow > deep > 1.0 for shallow, deep in pairwise(totals))
    gains = [a - b for a, b in pairwise(totals)]
    assert gains[-2] / gains[-1] == pytest.approx(2.0, rel=0.05)

    _, fine = _best_model(2000)
    assert fine.x_start_mse is not None
    ends = _end_terms(1)
    assert _end_terms(128) == pytest.approx(ends, rel=1e-12)
    integrand = fine.x_start_mse * fine.process.log_snr.exp()
    limit = ends - float(torch.trapezoid(integrand, fine.process.log_snr)) / (2 * math.log(2))
    # the excess is a power series in 1/T: remove its first terms one by one (Romberg)
    rows = totals
    for order in (1, 2, 3, 4):
        rows = [deep + (deep - shallow) / (2**order - 1) for shallow, deep in pairwise(rows)]
    assert rows[-1] == pytest.approx(limit, rel=1e-5)
    assert totals[0] > limit + 0.25


def test_the_path_bound_falls_with_depth_too() -> None:
    """The one function of all hierarchies gives the same totals, at |z| < 5."""
    count = 20_000
    index = torch.arange(count)
    x = (2.0 * rng.integers(1, "sign", index, 2) - 1.0).double().reshape(-1, 1, 1, 1)
    means = []
    for depth in (1, 32):
        chain = DiffusionChain(*_best_model(depth), levels=2)
        total = path_bound(chain, x, seed=0, index=index).bits_per_dim(1).total
        stderr = float(total.std()) / math.sqrt(count)
        assert abs(float(total.mean()) - _exact_bound(depth)) < 5 * stderr
        assert stderr < 0.02
        means.append(float(total.mean()))
    assert means[1] < means[0] - 0.1
