"""Noise schedules: β_t and every table that follows from it, in float64.

Index t is zero-based: `betas[0]` is the paper's β_1, and `alphas_cumprod_prev[0]` is ᾱ_0 = 1.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ddpm_core._checks import check_floating, require
from ddpm_core.process import (
    PRIOR_WARNING_BITS_PER_DIM,
    LinearGaussianProcess,
    check_subset,
    shifted,
)


@dataclass(frozen=True)
class ScheduleConfig:
    """Which β_t.

    kind "linear": T values evenly spaced from beta_start to beta_end (Ho et al. 2020, section 4).
    kind "cosine": ᾱ_t = f(t)/f(0), f(t) = cos²(π/2 · (t/T + s)/(1 + s)), s = cosine_s, each β at most
    beta_max (Nichol & Dhariwal 2021, Eq. 17).
    Fields of the other kind are ignored. Raises ValueError naming the field that is out of range.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 (read by pydantic, not a field)

    kind: Literal["linear", "cosine"] = "linear"
    num_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    cosine_s: float = 0.008
    beta_max: float = 0.999

    def __post_init__(self) -> None:
        require(self.kind in ("linear", "cosine"), "kind", "'linear' or 'cosine'", self.kind)
        require(self.num_timesteps >= 1, "num_timesteps", "at least 1", self.num_timesteps)
        require(0 < self.beta_start < 1, "beta_start", "between 0 and 1, both excluded", self.beta_start)
        require(
            self.beta_start <= self.beta_end < 1,
            "beta_end",
            f"at least beta_start ({self.beta_start}) and below 1",
            self.beta_end,
        )
        require(0 < self.cosine_s < math.inf, "cosine_s", "positive and finite", self.cosine_s)
        require(0 < self.beta_max < 1, "beta_max", "between 0 and 1, both excluded", self.beta_max)


class Schedule(LinearGaussianProcess):
    """The variance-preserving process of Ho et al. 2020, from β_t. The tables, each float64 `[T]`, are:

    betas, alphas, alphas_cumprod (ᾱ_t), alphas_cumprod_prev (ᾱ_{t−1}), log_alphas_cumprod,
    one_minus_alphas_cumprod, sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod,
    sqrt_recip_alphas_cumprod (1/√ᾱ_t), sqrt_recipm1_alphas_cumprod (√(1/ᾱ_t − 1)), and those of
    `LinearGaussianProcess`: log_snr (ln ᾱ_t − ln(1 − ᾱ_t)), posterior_mean_coef1, posterior_variance (β̃_t), …

    β = 1 is allowed at the last step only (zero terminal SNR); ε then says nothing of x_0 there.
    """

    def __init__(self, betas: Tensor) -> None:
        check_floating("betas", betas)
        if betas.dim() != 1 or betas.shape[0] < 1:
            raise ValueError(f"betas: must have the shape [T] with T >= 1, got {list(betas.shape)}")
        good = (betas > 0) & (betas < 1)
        good[-1] |= betas[-1] == 1
        if not bool(good.all()):
            at = int((~good).nonzero()[0])
            raise ValueError(
                f"betas: must lie between 0 and 1, both excluded (1 is allowed at the last step), "
                f"got {float(betas[at])} at {at}"
            )

        self.betas = betas.detach().to(torch.float64).clone()
        # 1 − ᾱ is taken from ln ᾱ: the difference of two rounded numbers would lose digits near t = 0.
        self.log_alphas_cumprod = torch.log1p(-self.betas).cumsum(0)
        self.one_minus_alphas_cumprod = -torch.expm1(self.log_alphas_cumprod)
        super().__init__(
            0.5 * self.log_alphas_cumprod,
            0.5 * self.one_minus_alphas_cumprod.log(),
            snr_loss=self.betas / self.one_minus_alphas_cumprod,
            total_variance=torch.ones_like(self.betas),
        )
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = self.log_alphas_cumprod.exp()
        self.alphas_cumprod_prev = shifted(self.alphas_cumprod, 1.0)
        self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod = self.a, self.b
        self.sqrt_recip_alphas_cumprod = torch.exp(-self.log_a)
        self.sqrt_recipm1_alphas_cumprod = torch.expm1(-self.log_alphas_cumprod).sqrt()

    @classmethod
    def from_betas(cls, betas: Tensor) -> "Schedule":
        """The schedule of given β_t, a floating-point tensor `[T]` with values strictly between 0 and 1."""
        return cls(betas)

    @classmethod
    def from_config(cls, config: ScheduleConfig) -> "Schedule":
        return cls(_linear_betas(config) if config.kind == "linear" else _cosine_betas(config))

    def at(self, timesteps: Tensor) -> "Schedule":
        """The schedule of the shorter chain through the given timesteps: ᾱ is kept, and β follows from it.

        β_i = 1 − ᾱ_{t_i}/ᾱ_{t_{i−1}}. timesteps: int64 `[S]`, strictly increasing, in 0..T−1.
        """
        check_subset(timesteps, self.num_timesteps)
        log_alphas_cumprod = self.log_alphas_cumprod[timesteps.to(self.betas.device)]
        betas = -torch.expm1(log_alphas_cumprod - shifted(log_alphas_cumprod, 0.0))
        # a step over ᾱ ratios below 1e-16 rounds to β = 1, which is no ε-schedule; the next number below is one
        most = torch.where(log_alphas_cumprod.isinf(), 1.0, 1.0 - 2.0**-53)
        return Schedule(torch.minimum(betas, most))

    def warnings(self) -> list[str]:
        """What a user should know before training with this schedule: plain sentences, mostly none."""
        last = float(self.alphas_cumprod[-1])
        bits = float(self.prior_bits_per_dim(torch.ones(1, 1, dtype=torch.float64)))
        if bits <= PRIOR_WARNING_BITS_PER_DIM:
            return []
        # ln ᾱ_T = −10.1 is where the paper's own schedule ends; small betas scale it in proportion.
        factor = 10.1 / -float(self.log_alphas_cumprod[-1])
        scaled = f"multiply the betas by about {factor:.2g}, "
        advice = scaled if factor * float(self.betas.max()) < 1 else ""
        return [
            f"x_T is not close to N(0, I): alphas_cumprod ends at {last:.3g} (prior term up to {bits:.2g} "
            f"bits/dim, should be below {PRIOR_WARNING_BITS_PER_DIM:g}), so sampling starts from noise that "
            f"training never saw; {advice}raise num_timesteps to about "
            f"{math.ceil(self.num_timesteps * factor)}, or use the cosine schedule"
        ]


def respace(schedule: Schedule, timesteps: Tensor) -> Schedule:
    """`Schedule.at`: the schedule of the shorter chain through the given timesteps."""
    return schedule.at(timesteps)


def _linear_betas(config: ScheduleConfig) -> Tensor:
    return torch.linspace(config.beta_start, config.beta_end, config.num_timesteps, dtype=torch.float64)


def _cosine_betas(config: ScheduleConfig) -> Tensor:
    steps = torch.arange(config.num_timesteps + 1, dtype=torch.float64) / config.num_timesteps
    angle = (steps + config.cosine_s) / (1.0 + config.cosine_s) * (math.pi / 2)
    before, after = angle[:-1], angle[1:]
    # 1 − cos²b/cos²a = sin(b − a)·sin(b + a)/cos²a, without the cancellation.
    betas = torch.sin(after - before) * torch.sin(after + before) / torch.cos(before).square()
    return betas.clamp(max=config.beta_max)
