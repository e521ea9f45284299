"""Orders of convergence in continuous time, between two fixed log-SNRs, on data whose exact solution is known.

The probability flow of one-dimensional data keeps each point's quantile, so that its solution is the quantile
function of one marginal at the distribution function of another. An ancestral step's output density is propagated
on a grid.
"""

import math

import pytest
import torch
from torch import Tensor

from ddpm_core import LinearGaussianProcess, ReverseProcess, SamplerConfig, trajectory
from ddpm_core.chains import retimed
from ddpm_core.processes import process_from_log_snr
from ddpm_core.samplers import step_tables

# Not symmetric about the log-SNR 1.4 at which Gaussian data of variance ¼ has as much signal as noise: between such
# ends 2M's leading error all but cancels, and the order is seen late.
LARGEST, SMALLEST = 4.0, -3.0
NUM_STEPS = (64, 96, 128, 192, 256)


class Mixture:
    """Σ w_k·N(m_k, v_k) in one dimension, at a log-SNR: Σ w_k·N(a·m_k, a²·v_k + b²)."""

    def __init__(self, weights: list[float], means: list[float], variances: list[float]) -> None:
        self.w, self.m, self.v = (torch.tensor(x, dtype=torch.float64) for x in (weights, means, variances))

    def parts(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        """Means and deviations of the parts, `[..., K]`."""
        a2 = torch.sigmoid(log_snr)[..., None]
        return a2.sqrt() * self.m, (a2 * self.v + 1 - a2).sqrt()

    def cdf(self, x: Tensor, log_snr: Tensor) -> Tensor:
        mean, deviation = self.parts(log_snr)
        return (self.w * torch.special.ndtr((x[..., None] - mean) / deviation)).sum(-1)

    def density(self, x: Tensor, log_snr: Tensor) -> Tensor:
        mean, deviation = self.parts(log_snr)
        z = (x[..., None] - mean) / deviation
        return (self.w * torch.exp(-0.5 * z.square()) / deviation).sum(-1) / math.sqrt(2 * math.pi)

    def variance(self, log_snr: Tensor) -> float:
        mean, deviation = self.parts(log_snr)
        first = float((self.w * mean).sum())
        return float((self.w * (mean.square() + deviation.square())).sum()) - first**2

    def quantile(self, level: Tensor, log_snr: Tensor) -> Tensor:
        low, high = torch.full_like(level, -30.0), torch.full_like(level, 30.0)
        for _ in range(80):
            middle = (low + high) / 2
            below = self.cdf(middle, log_snr) < level
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def x_start(self, x_t: Tensor, log_snr: Tensor) -> Tensor:
        """E[x_0|x_t], x_t `[B, 1, 1, 1]`, log_snr `[B]`."""
        x = x_t.flatten()
        mean, deviation = self.parts(log_snr)
        a = torch.sigmoid(log_snr).sqrt()[..., None]
        z = (x[..., None] - mean) / deviation
        share = torch.softmax(self.w.log() - deviation.log() - 0.5 * z.square(), -1)
        each = self.m + a * self.v / deviation.square() * (x[..., None] - mean)
        return (share * each).sum(-1).reshape(x_t.shape)

    def eps(self, x_t: Tensor, log_snr: Tensor) -> Tensor:
        a2 = torch.sigmoid(log_snr).reshape(-1, 1, 1, 1)
        return (x_t - a2.sqrt() * self.x_start(x_t, log_snr)) / (1 - a2).sqrt()


GAUSSIAN = Mixture([1.0], [0.0], [0.25])
MIXTURE = Mixture([0.3, 0.7], [-0.8, 0.5], [0.09, 0.04])


def _chain(num_steps: int) -> LinearGaussianProcess:
    return process_from_log_snr(torch.linspace(LARGEST, SMALLEST, num_steps + 1, dtype=torch.float64))


def _order(num_steps: tuple[int, ...], errors: list[float]) -> float:
    """Minus the slope of the least-squares line through ln error over ln num_steps."""
    x = torch.tensor(num_steps, dtype=torch.float64).log()
    y = torch.tensor(errors, dtype=torch.float64).log()
    x, y = x - x.mean(), y - y.mean()
    return -float((x @ y) / (x @ x))


@pytest.mark.parametrize("data", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
@pytest.mark.parametrize(("kind", "order"), [("ddim", 1.0), ("dpm_solver_pp_2m", 2.0), ("heun", 2.0)])
def test_order_on_the_probability_flow(data: Mixture, kind, order: float) -> None:
    errors = []
    for num_steps in NUM_STEPS:
        chain = _chain(num_steps)
        first, *_, last = trajectory(
            retimed(data.eps, chain.log_snr),
            chain,
            SamplerConfig(kind=kind, num_steps=None, clip=False),
            seed=0,
            index=torch.arange(12),
            shape=(1, 1, 1),
            dtype=torch.float64,
        )
        # the state at the last point is reached by num_steps steps; the one from there to x_0 is left out
        exact = data.quantile(data.cdf(first.x_t.flatten(), chain.log_snr[-1]), chain.log_snr[0])
        errors.append(float((last.x_t.flatten() - exact).square().mean().sqrt()))
    assert errors[-1] < 0.01
    assert _order(NUM_STEPS, errors) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("data", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_order_of_the_ancestral_variance(data: Mixture, variance_type) -> None:
    grid = torch.linspace(-6, 6, 481, dtype=torch.float64)  # finer than half a step's σ
    width = float(grid[1] - grid[0])
    config = SamplerConfig(kind="ancestral", variance_type=variance_type, num_steps=None, clip=False)
    num_steps, errors = (48, 64, 96, 128), []
    for count in num_steps:
        chain = _chain(count)
        tables = step_tables(ReverseProcess(chain, variance_type=variance_type, clip=False), config)
        density = data.density(grid, chain.log_snr[-1])
        for t in reversed(range(1, count + 1)):
            x_start = data.x_start(grid.reshape(-1, 1, 1, 1), chain.log_snr[t].expand(len(grid))).flatten()
            mean = tables.on_x_t[t] * grid + tables.on_x_start[t] * x_start
            z = (grid[:, None] - mean) / tables.sigma[t]
            density = (
                torch.exp(-0.5 * z.square()) @ density * width / (tables.sigma[t] * math.sqrt(2 * math.pi))
            )
        assert float(density.sum() * width) == pytest.approx(1.0, abs=1e-6)
        first = float((density * grid).sum() * width)
        variance = float((density * grid.square()).sum() * width) - first**2
        errors.append(abs(variance - data.variance(chain.log_snr[0])))
    assert errors[-1] < 0.05
    assert _order(num_steps, errors) == pytest.approx(1.0, abs=0.1)


def test_the_reference_flow_is_that_of_the_gaussian() -> None:
    """x_t/√Var(x_t) is kept."""
    high, low = torch.tensor(LARGEST, dtype=torch.float64), torch.tensor(SMALLEST, dtype=torch.float64)
    x = torch.tensor([-1.7, 0.3, 0.9], dtype=torch.float64)
    exact = GAUSSIAN.quantile(GAUSSIAN.cdf(x, low), high)
    torch.testing.assert_close(exact, x * math.sqrt(GAUSSIAN.variance(high) / GAUSSIAN.variance(low)))
