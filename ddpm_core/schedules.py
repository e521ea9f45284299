"""Noise schedules: β_t and every table that follows from it, in float64.

Index t is zero-based: `betas[0]` is the paper's β_1, and `alphas_cumprod_prev[0]` is ᾱ_0 = 1.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ddpm_core._checks import check_floating, check_timesteps, require
from ddpm_core.types import VarianceType

PRIOR_WARNING_BITS_PER_DIM = 1e-3


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


class Schedule:
    """The tables of one schedule, each a float64 tensor `[T]`.

    betas, alphas, alphas_cumprod (ᾱ_t), alphas_cumprod_prev (ᾱ_{t−1}), log_alphas_cumprod,
    one_minus_alphas_cumprod, sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod,
    sqrt_recip_alphas_cumprod (1/√ᾱ_t), sqrt_recipm1_alphas_cumprod (√(1/ᾱ_t − 1)),
    log_snr (ln ᾱ_t − ln(1 − ᾱ_t)), and of the posterior q(x_{t−1}|x_t, x_0), Eq. 6 and 7:
    posterior_mean_coef1 (on x_0), posterior_mean_coef2 (on x_t), posterior_variance (β̃_t, exactly 0 at
    index 0), posterior_log_variance_clipped (ln β̃_t, with index 1's value at index 0; ln β_0 there if T = 1).

    Do not change a table in place. `to` gives a copy on another device.
    """

    def __init__(self, betas: Tensor) -> None:
        check_floating("betas", betas)
        if betas.dim() != 1 or betas.shape[0] < 1:
            raise ValueError(f"betas: must have the shape [T] with T >= 1, got {list(betas.shape)}")
        bad = ~((betas > 0) & (betas < 1))
        if bool(bad.any()):
            at = int(bad.nonzero()[0])
            raise ValueError(
                f"betas: must lie between 0 and 1, both excluded, got {float(betas[at])} at {at}"
            )

        self.betas = betas.detach().to(torch.float64).clone()
        # 1 − ᾱ is taken from ln ᾱ: the difference of two rounded numbers would lose digits near t = 0.
        self.log_alphas_cumprod = torch.log1p(-self.betas).cumsum(0)
        self.one_minus_alphas_cumprod = -torch.expm1(self.log_alphas_cumprod)
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = self.log_alphas_cumprod.exp()
        self.alphas_cumprod_prev = _shift(self.alphas_cumprod, 1.0)
        self.sqrt_alphas_cumprod = (0.5 * self.log_alphas_cumprod).exp()
        self.sqrt_one_minus_alphas_cumprod = self.one_minus_alphas_cumprod.sqrt()
        self.sqrt_recip_alphas_cumprod = (-0.5 * self.log_alphas_cumprod).exp()
        self.sqrt_recipm1_alphas_cumprod = torch.expm1(-self.log_alphas_cumprod).sqrt()
        self.log_snr = self.log_alphas_cumprod - self.one_minus_alphas_cumprod.log()

        one_minus_prev = _shift(self.one_minus_alphas_cumprod, 0.0)
        self.posterior_mean_coef1 = (
            self.betas * self.alphas_cumprod_prev.sqrt() / self.one_minus_alphas_cumprod
        )
        self.posterior_mean_coef2 = one_minus_prev * self.alphas.sqrt() / self.one_minus_alphas_cumprod
        self.posterior_variance = self.betas * one_minus_prev / self.one_minus_alphas_cumprod
        clipped = self.posterior_variance.clone()
        clipped[0] = self.posterior_variance[1] if self.num_timesteps > 1 else self.betas[0]
        self.posterior_log_variance_clipped = clipped.log()

    @classmethod
    def from_betas(cls, betas: Tensor) -> "Schedule":
        """The schedule of given β_t, a floating-point tensor `[T]` with values strictly between 0 and 1."""
        return cls(betas)

    @classmethod
    def from_config(cls, config: ScheduleConfig) -> "Schedule":
        return cls(_linear_betas(config) if config.kind == "linear" else _cosine_betas(config))

    @property
    def num_timesteps(self) -> int:
        return self.betas.shape[0]

    def __repr__(self) -> str:
        last = float(self.alphas_cumprod[-1])
        return f"Schedule(num_timesteps={self.num_timesteps}, last alphas_cumprod={last:.3g})"

    def to(self, device: torch.device | str) -> "Schedule":
        """The same schedule with its tables on device (self, if they are there already)."""
        moved = self.betas.to(device)
        if moved.device == self.betas.device:
            return self
        other = object.__new__(Schedule)
        # The tables are copied, not computed again, so that every device holds the same bits.
        other.__dict__.update({name: table.to(device) for name, table in self.__dict__.items()})
        return other

    def gather(self, table: Tensor, t: Tensor, like: Tensor) -> Tensor:
        """table[t] shaped `[B, 1, ..., 1]` to broadcast over like, in like's dtype and on its device.

        The cast comes after the look-up and after every root and difference: a table in bf16 would give zero
        noise at the first timesteps. With CUDA tensors call `schedule.to(device)` once, or each look-up waits
        for the device. Raises ValueError naming t if it is not int64 `[B]` in 0..T−1.
        """
        check_timesteps(t, self.num_timesteps, like)
        values = table[t.to(table.device)].to(like.dtype).to(like.device)
        return values.reshape(-1, *[1] * (like.dim() - 1))

    def model_log_variance(self, variance_type: VarianceType) -> Tensor:
        """ln σ_t² of p_θ(x_{t−1}|x_t), `[T]`: ln β̃_t for "fixed_small", ln β_t for "fixed_large".

        Both take ln β̃ of index 1 at index 0, where β̃ is 0 and the decoder needs a width (ln β_0 if T = 1).
        """
        check_variance_type(variance_type)
        if variance_type == "fixed_small":
            return self.posterior_log_variance_clipped
        return torch.cat((self.posterior_log_variance_clipped[:1], self.betas[1:].log()))

    def prior_bits_per_dim(self, x_start: Tensor) -> Tensor:
        """KL(q(x_T|x_0) ‖ N(0, I)), `[B]` in bits a dimension, the bound's L_T (Eq. 5).

        ½ · (−ln(1 − ᾱ) − ᾱ + ᾱ·x_0²) / ln 2 at the last step, averaged over the dimensions of
        x_start `[B, ...]`. float64 in, float64 out; float32 otherwise.
        """
        check_floating("x_start", x_start)
        dtype = torch.float64 if x_start.dtype == torch.float64 else torch.float32
        mean_square = x_start.to(dtype).square().flatten(1).mean(1)
        last = float(self.alphas_cumprod[-1])
        return (_log_excess(last) + last * mean_square) / (2.0 * math.log(2.0))

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


def check_variance_type(variance_type: str) -> None:
    """Raises ValueError unless variance_type is one that this version knows."""
    require(
        variance_type in ("fixed_small", "fixed_large"),
        "variance_type",
        "'fixed_small' or 'fixed_large'",
        variance_type,
    )


def respace(schedule: Schedule, timesteps: Tensor) -> Schedule:
    """The schedule of the shorter chain through the given timesteps: ᾱ is kept, and β follows from it.

    β_i = 1 − ᾱ_{t_i}/ᾱ_{t_{i−1}}. timesteps: int64 `[S]`, strictly increasing, in 0..T−1.
    """
    check_timesteps(timesteps, schedule.num_timesteps, like=timesteps)
    if timesteps.numel() == 0 or bool((timesteps.diff() <= 0).any()):
        raise ValueError("timesteps: must be strictly increasing and not empty")
    log_alphas_cumprod = schedule.log_alphas_cumprod[timesteps.to(schedule.betas.device)]
    betas = -torch.expm1(log_alphas_cumprod - _shift(log_alphas_cumprod, 0.0))
    # a step over ᾱ ratios below 1e-16 rounds to β = 1, which is no schedule; the next number below is one
    return Schedule(betas.clamp(max=1.0 - 2.0**-53))


def _linear_betas(config: ScheduleConfig) -> Tensor:
    return torch.linspace(config.beta_start, config.beta_end, config.num_timesteps, dtype=torch.float64)


def _cosine_betas(config: ScheduleConfig) -> Tensor:
    steps = torch.arange(config.num_timesteps + 1, dtype=torch.float64) / config.num_timesteps
    angle = (steps + config.cosine_s) / (1.0 + config.cosine_s) * (math.pi / 2)
    before, after = angle[:-1], angle[1:]
    # 1 − cos²b/cos²a = sin(b − a)·sin(b + a)/cos²a, without the cancellation.
    betas = torch.sin(after - before) * torch.sin(after + before) / torch.cos(before).square()
    return betas.clamp(max=config.beta_max)


def _shift(table: Tensor, first: float) -> Tensor:
    return torch.cat((table.new_full((1,), first), table[:-1]))


def _log_excess(a: float) -> float:
    """−ln(1 − a) − a, without the cancellation at small a."""
    if a < 1e-2:
        return sum(a**k / k for k in range(2, 11))
    return -math.log1p(-a) - a
