"""Noise schedules: the variance-preserving process and every table that follows from β_t, in float64.

Index t is zero-based: `betas[0]` is the paper's β_1, and `alphas_cumprod_prev[0]` is ᾱ_0 = 1. The named schedules
are functions of `ddpm_core.betas`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_core import betas as tables
from ddpm_core._checks import check_same_shape, require
from ddpm_core.advice import remedies
from ddpm_core.betas import BETAS, BetaTable, ScheduleConfig
from ddpm_core.process import (
    PRIOR_WARNING_BITS_PER_DIM,
    LinearGaussianProcess,
    check_subset,
    shifted,
)

__all__ = ["Schedule", "ScheduleConfig", "ScheduleReport", "rescale_zero_terminal_snr"]

_LAST_BELOW_1 = 1.0 - 2.0**-53


@dataclass(frozen=True)
class ScheduleReport:
    """What `Schedule.validate` finds. That β lies in (0, 1] and that ᾱ falls is demanded when a schedule is made.

    betas_rise: whether β never falls (by more than 1e-9 of itself). ends_without_signal: β = 1 at the last step.
    alphas_cumprod_falls, noise_is_positive: whether ᾱ falls strictly, and √(1 − ᾱ) is above zero at every t, when
    cast to the dtype asked for. prior_bits_per_dim: the bound's L_T for |x_0| = 1, in bits a dimension.
    warnings: a sentence for each thing that a user should know, with what to change.
    """

    betas_rise: bool
    ends_without_signal: bool
    alphas_cumprod_falls: bool
    noise_is_positive: bool
    prior_bits_per_dim: float
    warnings: tuple[str, ...]


class Schedule(LinearGaussianProcess):
    """The variance-preserving process of Ho et al. 2020, from β_t. The tables, each float64 `[T]`, are:

    betas, alphas, alphas_cumprod (ᾱ_t), alphas_cumprod_prev (ᾱ_{t−1}), log_alphas_cumprod,
    one_minus_alphas_cumprod, sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod,
    sqrt_recip_alphas_cumprod (1/√ᾱ_t), sqrt_recipm1_alphas_cumprod (√(1/ᾱ_t − 1)), and those of
    `LinearGaussianProcess`: log_snr (ln ᾱ_t − ln(1 − ᾱ_t)), posterior_mean_coef1, posterior_variance (β̃_t), …

    β = 1 is allowed at the last step only (zero terminal SNR); ε then says nothing of x_0 there.
    config: the configuration that it was made from, if any; advice in `warnings` is about its fields.
    """

    config: ScheduleConfig | None = None

    def __init__(self, betas: Tensor, *, log_alphas_cumprod: Tensor | None = None) -> None:
        """betas: floating-point `[T]` in (0, 1), the last perhaps 1. Raises ValueError naming betas.

        log_alphas_cumprod: ln ᾱ where the caller knows it with more digits than the betas give.
        """
        given = tables.from_betas(betas)
        self.betas = given.betas
        if log_alphas_cumprod is None:
            self.log_alphas_cumprod, self.alphas = given.log_alphas_cumprod, 1.0 - self.betas
        else:
            check_same_shape("log_alphas_cumprod", log_alphas_cumprod, "betas", betas)
            tables.check_log_alphas_cumprod(log_alphas_cumprod)
            self.log_alphas_cumprod = log_alphas_cumprod.detach().to(torch.float64).clone()
            self.alphas = torch.exp(self.log_alphas_cumprod - shifted(self.log_alphas_cumprod, 0.0))
        # 1 − ᾱ is taken from ln ᾱ: the difference of two rounded numbers would lose digits near t = 0.
        self.one_minus_alphas_cumprod = -torch.expm1(self.log_alphas_cumprod)
        log_noise = self.one_minus_alphas_cumprod.log()
        log_snr = self.log_alphas_cumprod - log_noise
        if log_alphas_cumprod is None and bool((log_snr.diff() >= 0).any()):
            at = _first(log_snr.diff() >= 0) + 1
            raise ValueError(
                f"betas: must be large enough to lower the log-SNR in float64, got {float(betas[at])} at {at}"
            )
        super().__init__(
            0.5 * self.log_alphas_cumprod,
            0.5 * log_noise,
            log_snr=log_snr,
            snr_loss=self.betas / self.one_minus_alphas_cumprod,
            total_variance=torch.ones_like(self.betas),
        )
        self.alphas_cumprod = self.log_alphas_cumprod.exp()
        self.alphas_cumprod_prev = shifted(self.alphas_cumprod, 1.0)
        self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod = self.a, self.b
        self.sqrt_recip_alphas_cumprod = torch.exp(-self.log_a)
        # a product, since 1/ᾱ overflows long before its root
        self.sqrt_recipm1_alphas_cumprod = self.b * self.sqrt_recip_alphas_cumprod

    @classmethod
    def from_betas(cls, betas: Tensor) -> "Schedule":
        """The schedule of given β_t, floating-point `[T]` in (0, 1); the last one may be 1."""
        return cls(betas)

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor) -> "Schedule":
        """The schedule of given ᾱ_t, floating-point `[T]`, strictly falling in (0, 1); the last one may be 0.

        1 − ᾱ has the digits that ᾱ holds: near t = 0 give float64, or betas or the log-SNR instead.
        Raises ValueError naming alphas_cumprod.
        """
        return cls._from_table(tables.from_alphas_cumprod(alphas_cumprod))

    @classmethod
    def from_log_snr(cls, log_snr: Tensor) -> "Schedule":
        """The schedule with ᾱ = sigmoid(log_snr), floating-point `[T]`, strictly falling; the last may be −∞.

        Raises ValueError naming log_snr.
        """
        return cls._from_table(tables.from_log_snr(log_snr))

    @classmethod
    def from_config(cls, config: ScheduleConfig) -> "Schedule":
        """The schedule that the configuration names. Raises ValueError where its numbers make none."""
        schedule = cls._from_table(BETAS[config.kind](config))
        if config.zero_terminal_snr:
            schedule = rescale_zero_terminal_snr(schedule)
        schedule.config = config
        return schedule

    @classmethod
    def _from_table(cls, table: BetaTable) -> "Schedule":
        # a step over ᾱ ratios below 1e-16 rounds to β = 1, which is no ε-schedule; the next number below is one
        below = table.betas.clamp(max=_LAST_BELOW_1)
        betas = torch.where(table.log_alphas_cumprod.isinf(), table.betas, below)
        tables.check_betas(betas)
        falls = table.log_alphas_cumprod < shifted(table.log_alphas_cumprod, 0.0)
        if not bool(falls.all()):
            at = _first(~falls)
            raise ValueError(
                f"betas: must be large enough to lower ln(alphas_cumprod) in float64, got {float(table.betas[at])} "
                f"at {at}"
            )
        return cls(betas, log_alphas_cumprod=table.log_alphas_cumprod)

    def at(self, timesteps: Tensor) -> "Schedule":
        """The schedule of the shorter chain through the given timesteps: ᾱ is kept, and β follows from it.

        β_i = 1 − ᾱ_{t_i}/ᾱ_{t_{i−1}}. timesteps: int64 `[S]`, strictly increasing, in 0..T−1.
        """
        check_subset(timesteps, self.num_timesteps)
        return Schedule._of_logs(self.log_alphas_cumprod[timesteps.to(self.betas.device)])

    @classmethod
    def _of_logs(cls, log_alphas_cumprod: Tensor) -> "Schedule":
        betas = -torch.expm1(log_alphas_cumprod - shifted(log_alphas_cumprod, 0.0))
        return cls._from_table(BetaTable(betas, log_alphas_cumprod))

    def validate(self, dtype: torch.dtype = torch.float32) -> ScheduleReport:
        """What holds of this schedule, and of its tables when cast to dtype, in which q_sample computes."""
        require(dtype.is_floating_point, "dtype", "a floating-point dtype", dtype)
        falls = self.alphas_cumprod.to(dtype).diff() < 0
        noise = self.sqrt_one_minus_alphas_cumprod.to(dtype) > 0
        said = self.warnings()
        falling = (self.betas[1:] < self.betas[:-1] * (1.0 - 1e-9)).nonzero().flatten()
        if falling.numel():
            at = int(falling[0]) + 1
            said.append(
                f"betas fall at {at}, from {float(self.betas[at - 1]):.6g} to {float(self.betas[at]):.6g}: valid, "
                f"but the published schedules take steps that grow with t"
            )
        if not bool(falls.all()):
            said.append(
                f"alphas_cumprod cast to {dtype} does not fall at {_first(~falls) + 1}: keep the tables in float64 "
                f"and cast what was looked up, as gather does"
            )
        if not bool(noise.all()):
            said.append(
                f"the noise √(1 − alphas_cumprod) cast to {dtype} is zero at {_first(~noise)}: start with a larger "
                f"beta, or compute x_t in a wider dtype"
            )
        return ScheduleReport(
            betas_rise=not falling.numel(),
            ends_without_signal=self.ends_without_signal,
            alphas_cumprod_falls=bool(falls.all()),
            noise_is_positive=bool(noise.all()),
            prior_bits_per_dim=self.worst_prior_bits_per_dim,
            warnings=tuple(said),
        )

    def warnings(self) -> list[str]:
        """What a user should know before training with this schedule: plain sentences, mostly none."""
        bits = self.worst_prior_bits_per_dim
        if bits <= PRIOR_WARNING_BITS_PER_DIM:
            return []
        config = self.config or ScheduleConfig("betas", self.num_timesteps, betas=tuple(self.betas.tolist()))
        changes = remedies(config, Schedule.from_config)
        return [
            f"x_T is not close to N(0, I): alphas_cumprod ends at {float(self.alphas_cumprod[-1]):.3g} (prior term "
            f"up to {bits:.2g} bits/dim, should be below {PRIOR_WARNING_BITS_PER_DIM:g}), so sampling starts from "
            f"noise that training never saw; {', or '.join(change.text for change in changes)}"
        ]


def rescale_zero_terminal_snr(schedule: Schedule) -> Schedule:
    """The schedule with √ᾱ moved and scaled so that the first ᾱ stays and the last is 0, x_T noise alone.

    √ᾱ'_t = (√ᾱ_t − √ᾱ_T)·√ᾱ_0/(√ᾱ_0 − √ᾱ_T), index 0 the first step (Lin et al. 2023, arXiv:2305.08891, Alg. 1).
    A schedule that ends without signal is returned as it is. ε-prediction is then impossible: use v or x_start.
    Raises ValueError naming num_timesteps if T = 1, where the first ᾱ is the last one.
    """
    require(
        schedule.num_timesteps >= 2 or schedule.ends_without_signal,
        "num_timesteps",
        "at least 2 for zero_terminal_snr",
        schedule.num_timesteps,
    )
    if schedule.ends_without_signal:
        return schedule
    # In logarithms, so that 1 − ᾱ' keeps its digits near t = 0: √ᾱ'_t/√ᾱ_t = (1 − √(ᾱ_T/ᾱ_t))/(1 − √(ᾱ_T/ᾱ_0))
    log_alphas_cumprod = schedule.log_alphas_cumprod
    factor = torch.log1p(-torch.exp(0.5 * (log_alphas_cumprod[-1] - log_alphas_cumprod)))
    return Schedule._of_logs(log_alphas_cumprod + 2.0 * (factor - factor[0]))


def _first(where: Tensor) -> int:
    return int(where.nonzero()[0])
