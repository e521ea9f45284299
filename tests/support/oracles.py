"""Cases in which everything is known in closed form, derived apart from the code under test.

Gaussian data N(0, s²) in each dimension: the best ε_θ is linear in x_t, so the bound's terms and the moments of
every sampler's output follow exactly.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_core import EpsTheta, Schedule


@dataclass(frozen=True)
class GaussianData:
    """Data N(0, variance) in each dimension. Tables are float64 `[T]`; t = −1 means the data themselves."""

    variance: float

    def marginal_variance(self, schedule: Schedule) -> Tensor:
        """Var(x_t) = ᾱ_t·s² + 1 − ᾱ_t."""
        return schedule.alphas_cumprod * self.variance + (1.0 - schedule.alphas_cumprod)

    def eps_theta(self, schedule: Schedule) -> EpsTheta:
        """ε*(x_t, t) = E[ε | x_t] = √(1 − ᾱ_t)·x_t / Var(x_t)."""
        slope = (1.0 - schedule.alphas_cumprod).sqrt() / self.marginal_variance(schedule)

        def eps_star(x_t: Tensor, t: Tensor) -> Tensor:
            return slope[t].to(x_t.dtype).reshape(-1, *[1] * (x_t.dim() - 1)) * x_t

        return eps_star

    def bayes_eps_mse(self, schedule: Schedule) -> Tensor:
        """Var(ε | x_t) = ᾱ_t·s² / Var(x_t), the floor of L_simple at each t."""
        return schedule.alphas_cumprod * self.variance / self.marginal_variance(schedule)

    def bayes_x_start_mse(self, schedule: Schedule) -> Tensor:
        """m(t) = Var(x_0 | x_t) = s²·(1 − ᾱ_t) / Var(x_t)."""
        return self.variance * (1.0 - schedule.alphas_cumprod) / self.marginal_variance(schedule)

    def consistency_terms(self, schedule: Schedule, variance_type: str) -> Tensor:
        """E[L_t] in bits a dimension for ε*, in the signal-to-noise form; `[T]`, nan at t == 0.

        x = (SNR_{t−1} − SNR_t)·m(t): ½·x for β̃, ½·[ln(β/β̃) − 1 + (β̃/β)·(1 + x)] for β.
        """
        a = schedule.alphas_cumprod
        snr = a / (1.0 - a)
        x = (snr[:-1] - snr[1:]) * self.bayes_x_start_mse(schedule)[1:]
        if variance_type == "fixed_large":
            ratio = (1.0 - a[1:]) / (1.0 - a[:-1])  # β/β̃
            x = ratio.log() - 1.0 + (1.0 + x) / ratio
        return torch.cat((torch.tensor([math.nan], dtype=torch.float64), 0.5 * x / math.log(2.0)))

    def ancestral_slopes(self, schedule: Schedule) -> Tensor:
        """E[x_{t−1} | x_t] = slope·x_t: Cov(x_{t−1}, x_t)/Var(x_t) = √α_t·Var(x_{t−1})/Var(x_t)."""
        after = self.marginal_variance(schedule)
        before = torch.cat((after.new_full((1,), self.variance), after[:-1]))
        return (1.0 - schedule.betas).sqrt() * before / after

    def ddim_slopes(self, schedule: Schedule) -> Tensor:
        """x_{t−1} = slope·x_t for η = 0: (√(ᾱ_{t−1}·ᾱ_t)·s² + √((1 − ᾱ_{t−1})(1 − ᾱ_t))) / Var(x_t)."""
        a = schedule.alphas_cumprod
        b = torch.cat((a.new_ones(1), a[:-1]))
        spread = ((1.0 - b) * (1.0 - a)).sqrt()
        return ((a * b).sqrt() * self.variance + spread) / self.marginal_variance(schedule)


def symmetric_grid(data: GaussianData) -> tuple[Tensor, Tensor]:
    """x_0 = ±s with ε = ±1: four pairs, float64 `[4, 1, 1, 1]`, with the exact first two moments of both.

    The mean of any quadratic form over these pairs is its exact expectation.
    """
    s = math.sqrt(data.variance)
    x_start = torch.tensor([s, s, -s, -s], dtype=torch.float64).reshape(4, 1, 1, 1)
    noise = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64).reshape(4, 1, 1, 1)
    return x_start, noise


def symmetric_grid_at_every_t(data: GaussianData, schedule: Schedule) -> tuple[Tensor, Tensor, Tensor]:
    """x_0, ε `[4·T, 1, 1, 1]` and t `[4·T]`: `symmetric_grid` at t = 0, then at t = 1, ..."""
    x_start, noise = (tensor.repeat(schedule.num_timesteps, 1, 1, 1) for tensor in symmetric_grid(data))
    return x_start, noise, torch.arange(schedule.num_timesteps).repeat_interleave(4)


def full(t: int, batch: Tensor) -> Tensor:
    """t for every sample of the batch."""
    return torch.full((batch.shape[0],), t, dtype=torch.int64)
