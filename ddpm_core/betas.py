"""Which β_t: the named noise schedules, one function each, and the configuration that picks one.

Index t is zero-based: index 0 is the paper's β_1. T stands for num_timesteps, s for (t + 1)/T.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from ddpm_core._checks import check_floating, require, require_int, require_number
from ddpm_core._identity import config_identity

ScheduleKind: TypeAlias = Literal[
    "linear",
    "linear_scaled",
    "scaled_linear",
    "quadratic",
    "constant",
    "warmup",
    "inverse",
    "cosine",
    "sigmoid",
    "sigmoid_beta",
    "log_snr",
    "betas",
    "alphas_cumprod",
]
"""The names of the schedules; `ScheduleConfig` says what each is."""

REFERENCE_TIMESTEPS = 1000
"""The T for which the β range of "linear_scaled" is given."""

_MOST_LOGIT = 700.0
_NUMBERS = (
    *("beta_start", "beta_end", "cosine_s", "beta_max", "warmup_fraction", "sigmoid_start", "sigmoid_end"),
    *("sigmoid_tau", "log_snr_max", "log_snr_min"),
)


@dataclass(frozen=True)
class ScheduleConfig:
    """Which β_t. The functions of this module, named after the kinds, give the equations and where they are from.

    From beta_start to beta_end: "linear"; "linear_scaled", both ends times 1000/T; "scaled_linear", linear in √β;
    "quadratic"; "constant", beta_end throughout; "warmup", linear over the first warmup_fraction of the steps, then
    constant; "sigmoid_beta", a logistic curve in β.
    "inverse": 1/(T − t), β = 1 at the last step. "cosine" (cosine_s) and "sigmoid" (sigmoid_start, sigmoid_end,
    sigmoid_tau): curves of ᾱ, each β at most beta_max. "log_snr": the log-SNR falls linearly from log_snr_max to
    log_snr_min. "betas" and "alphas_cumprod": the T values given under that name.
    zero_terminal_snr: rescale to ᾱ = 0 at the last step (`ddpm_core.schedules.rescale_zero_terminal_snr`).

    β = 1 at the last step ("inverse", zero_terminal_snr) rules out ε-prediction. With T = 1 what runs from a
    start to an end is at its start. Fields of other kinds are ignored. Raises ValueError naming the field that
    is out of range.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 (read by pydantic, not a field)

    kind: ScheduleKind = "linear"
    num_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    cosine_s: float = 0.008
    beta_max: float = 0.999
    warmup_fraction: float = field(default=0.1, kw_only=True)
    sigmoid_start: float = field(default=-3.0, kw_only=True)
    sigmoid_end: float = field(default=3.0, kw_only=True)
    sigmoid_tau: float = field(default=1.0, kw_only=True)
    log_snr_max: float = field(default=10.0, kw_only=True)
    log_snr_min: float = field(default=-10.0, kw_only=True)
    betas: tuple[float, ...] = field(default=(), kw_only=True)
    alphas_cumprod: tuple[float, ...] = field(default=(), kw_only=True)
    zero_terminal_snr: bool = field(default=False, kw_only=True)

    def identity(self) -> dict[str, Any]:
        """What the schedule is, as plain values to hash."""
        return config_identity(self)

    def __post_init__(self) -> None:
        require(
            self.kind in get_args(ScheduleKind),
            "kind",
            "one of " + ", ".join(map(repr, get_args(ScheduleKind))),
            self.kind,
        )
        require_int("num_timesteps", self.num_timesteps, 1)
        for name in _NUMBERS:
            require_number(name, getattr(self, name))
        require(0 < self.beta_start < 1, "beta_start", "between 0 and 1, both excluded", self.beta_start)
        require(
            self.beta_start <= self.beta_end < 1,
            "beta_end",
            f"at least beta_start ({self.beta_start}) and below 1",
            self.beta_end,
        )
        require(0 < self.cosine_s < math.inf, "cosine_s", "positive and finite", self.cosine_s)
        require(0 < self.beta_max < 1, "beta_max", "between 0 and 1, both excluded", self.beta_max)
        require(
            0 < self.warmup_fraction <= 1, "warmup_fraction", "above 0 and at most 1", self.warmup_fraction
        )
        require(0 < self.sigmoid_tau < math.inf, "sigmoid_tau", "positive and finite", self.sigmoid_tau)
        most = _MOST_LOGIT * self.sigmoid_tau
        for name, logit in (("sigmoid_start", self.sigmoid_start), ("sigmoid_end", self.sigmoid_end)):
            require(abs(logit) <= most, name, f"within ±{_MOST_LOGIT:g}·sigmoid_tau", logit)
        require(
            self.sigmoid_end > self.sigmoid_start,
            "sigmoid_end",
            f"above sigmoid_start ({self.sigmoid_start})",
            self.sigmoid_end,
        )
        require(math.isfinite(self.log_snr_max), "log_snr_max", "finite", self.log_snr_max)
        require(
            -math.inf < self.log_snr_min < self.log_snr_max,
            "log_snr_min",
            f"finite and below log_snr_max ({self.log_snr_max})",
            self.log_snr_min,
        )
        if self.kind == "linear_scaled":
            self._check_scaled_range()
        if self.kind in ("betas", "alphas_cumprod"):
            self._check_given(self.kind, getattr(self, self.kind))
        if self.zero_terminal_snr:
            require(
                self.num_timesteps >= 2,
                "num_timesteps",
                "at least 2 for zero_terminal_snr",
                self.num_timesteps,
            )

    def _check_scaled_range(self) -> None:
        # β = 1 is allowed at the last step, which beta_start reaches only where it equals beta_end or T = 1
        most = self.num_timesteps / REFERENCE_TIMESTEPS
        why = f"for the kind 'linear_scaled' with num_timesteps = {self.num_timesteps} (no beta above 1)"
        require(self.beta_end <= most, "beta_end", f"at most {most:g} {why}", self.beta_end)
        require(
            self.beta_start < most or self.num_timesteps == 1,
            "beta_start",
            f"below {most:g} {why}",
            self.beta_start,
        )

    def _check_given(self, name: str, values: tuple[float, ...]) -> None:
        require(
            len(values) == self.num_timesteps,
            name,
            f"{self.num_timesteps} numbers (num_timesteps)",
            f"{len(values)}",
        )
        table = torch.tensor(values, dtype=torch.float64)
        check_betas(table) if name == "betas" else check_alphas_cumprod(table)


class BetaTable(NamedTuple):
    """β_t and ln ᾱ_t, float64 `[T]`: either may be known with more digits than the other would give it."""

    betas: Tensor
    log_alphas_cumprod: Tensor


def check_betas(betas: Tensor) -> None:
    """Raises ValueError unless betas is floating-point `[T]` in (0, 1), where the last value may be 1."""
    _check_table("betas", betas)
    good = (betas > 0) & (betas < 1)
    good[-1] |= betas[-1] == 1
    if not bool(good.all()):
        at = int((~good).nonzero()[0])
        raise ValueError(
            f"betas: must lie between 0 and 1, both excluded (1 is allowed at the last step), "
            f"got {float(betas[at])} at {at}"
        )


def check_alphas_cumprod(alphas_cumprod: Tensor) -> None:
    """Raises ValueError unless it is floating-point `[T]`, in (0, 1), strictly falling; the last value may be 0."""
    _check_table("alphas_cumprod", alphas_cumprod)
    before = torch.cat((alphas_cumprod.new_ones(1), alphas_cumprod[:-1]))
    good = (alphas_cumprod > 0) & (alphas_cumprod < before)
    good[-1] |= alphas_cumprod[-1] == 0
    if not bool(good.all()):
        at = int((~good).nonzero()[0])
        raise ValueError(
            f"alphas_cumprod: must fall strictly from below 1 and stay above 0 (0 is allowed at the last step), "
            f"got {float(alphas_cumprod[at])} at {at}"
        )


def from_betas(betas: Tensor) -> BetaTable:
    """ln ᾱ_t = Σ ln(1 − β). Raises ValueError naming betas (see `check_betas`)."""
    check_betas(betas)
    betas = betas.detach().to(torch.float64).clone()
    return BetaTable(betas, torch.log1p(-betas).cumsum(0))


def from_alphas_cumprod(alphas_cumprod: Tensor) -> BetaTable:
    """β_t = (ᾱ_{t−1} − ᾱ_t)/ᾱ_{t−1}, a difference that is exact where β ≤ ½.

    The digits of 1 − ᾱ near t = 0 are those that the given ᾱ still has: give float64, or β, or the log-SNR.
    Raises ValueError naming alphas_cumprod (see `check_alphas_cumprod`).
    """
    check_alphas_cumprod(alphas_cumprod)
    after = alphas_cumprod.detach().to(torch.float64)
    before = torch.cat((after.new_ones(1), after[:-1]))
    return BetaTable((before - after) / before, after.log())


def from_log_snr(log_snr: Tensor) -> BetaTable:
    """ᾱ = sigmoid(λ) and β_t = sigmoid(−λ_t)·(1 − exp(λ_t − λ_{t−1})), for any finite λ; the last may be −∞.

    Raises ValueError naming log_snr if it is not floating-point `[T]` and strictly falling.
    """
    check_log_snr(log_snr)
    after = log_snr.detach().to(torch.float64)
    before = torch.cat((after.new_full((1,), math.inf), after[:-1]))
    log_alphas_cumprod = torch.nn.functional.logsigmoid(after)
    return BetaTable(-torch.sigmoid(-after) * torch.expm1(after - before), log_alphas_cumprod)


def check_log_snr(log_snr: Tensor) -> None:
    """Raises ValueError unless it is floating-point `[T]`, strictly falling, finite but for a last −∞."""
    _check_falling(
        "log_snr", log_snr, math.inf, "be finite (-inf is allowed at the last step) and fall strictly"
    )


def check_log_alphas_cumprod(log_alphas_cumprod: Tensor) -> None:
    """Raises ValueError unless it is floating-point `[T]`, strictly falling from below 0, finite but a last −∞."""
    must = "fall strictly from below 0 and be finite (-inf is allowed at the last step)"
    _check_falling("log_alphas_cumprod", log_alphas_cumprod, 0.0, must)


def linear(config: ScheduleConfig) -> BetaTable:
    """T values evenly spaced from beta_start to beta_end (Ho et al. 2020, section 4)."""
    return from_betas(_evenly(config.beta_start, config.beta_end, config))


def linear_scaled(config: ScheduleConfig) -> BetaTable:
    """`linear` with both ends times 1000/T, so that Σβ does not depend on T (Nichol & Dhariwal 2021's code)."""
    scale = REFERENCE_TIMESTEPS / config.num_timesteps
    return from_betas(_evenly(config.beta_start * scale, config.beta_end * scale, config))


def scaled_linear(config: ScheduleConfig) -> BetaTable:
    """√β evenly spaced (Rombach et al. 2022, arXiv:2112.10752; the "quad" of Song et al. 2021's code)."""
    return from_betas(_evenly(config.beta_start**0.5, config.beta_end**0.5, config).square())


def quadratic(config: ScheduleConfig) -> BetaTable:
    """beta_start + (beta_end − beta_start)·(t/(T − 1))²: `linear` that starts without slope."""
    share = _evenly(0.0, 1.0, config).square()
    return from_betas(torch.lerp(*_ends(config), share))


def constant(config: ScheduleConfig) -> BetaTable:
    """beta_end at every step (Ho et al. 2020, appendix B, compares it)."""
    return from_betas(torch.full((config.num_timesteps,), config.beta_end, dtype=torch.float64))


def warmup(config: ScheduleConfig) -> BetaTable:
    """`linear` over the first ⌊warmup_fraction·T + ½⌋ steps, then beta_end as in Ho et al.'s code."""
    betas = torch.full((config.num_timesteps,), config.beta_end, dtype=torch.float64)
    rise = math.floor(config.warmup_fraction * config.num_timesteps + 0.5)
    betas[:rise] = torch.linspace(config.beta_start, config.beta_end, rise, dtype=torch.float64)
    return from_betas(betas)


def inverse(config: ScheduleConfig) -> BetaTable:
    """1/(T − t): each step erases 1/T of the signal, ᾱ_t = 1 − s (Sohl-Dickstein et al. 2015, section 2.4.1)."""
    left = torch.arange(config.num_timesteps, 0, -1, dtype=torch.float64)
    return from_betas(1.0 / left)


def cosine(config: ScheduleConfig) -> BetaTable:
    """ᾱ = f(s)/f(0), f(s) = cos²(π/2·(s + c)/(1 + c)), c = cosine_s, each β at most beta_max.

    Nichol & Dhariwal 2021, arXiv:2102.09672, Eq. 17.
    """
    angle = (_shares(config) + config.cosine_s) / (1.0 + config.cosine_s) * (math.pi / 2)
    before, after = angle[:-1], angle[1:]
    # 1 − cos²b/cos²a = sin(b − a)·sin(b + a)/cos²a, without the cancellation.
    betas = torch.sin(after - before) * torch.sin(after + before) / torch.cos(before).square()
    return from_betas(betas.clamp(max=config.beta_max))


def sigmoid(config: ScheduleConfig) -> BetaTable:
    """ᾱ = (σ(u_1) − σ(u_s))/(σ(u_1) − σ(u_0)), u_s = (start + s·(end − start))/τ, σ the logistic function.

    Jabri et al. 2022, arXiv:2212.11972, with sigmoid_start, sigmoid_end and sigmoid_tau; each β at most beta_max.
    """
    share = _shares(config)
    start, end = config.sigmoid_start / config.sigmoid_tau, config.sigmoid_end / config.sigmoid_tau
    u = start + share * (end - start)
    before, after = u[:-1], u[1:]
    # σ(x) − σ(y) = sinh((x − y)/2)/(2·cosh(x/2)·cosh(y/2)), without the cancellation.
    gone, left = torch.sinh((after - before) / 2), torch.sinh((end - before) / 2)
    betas = gone / left * (math.cosh(end / 2) / torch.cosh(after / 2))
    return from_betas(betas.clamp(max=config.beta_max))


def sigmoid_beta(config: ScheduleConfig) -> BetaTable:
    """beta_start + (beta_end − beta_start)·σ(u), u evenly spaced in [−6, 6] (Xu et al. 2022, arXiv:2203.02923)."""
    return from_betas(torch.lerp(*_ends(config), torch.sigmoid(_evenly(-6.0, 6.0, config))))


def log_snr(config: ScheduleConfig) -> BetaTable:
    """The log-SNR evenly spaced from log_snr_max to log_snr_min (Kingma et al. 2021, arXiv:2107.00630)."""
    return from_log_snr(_evenly(config.log_snr_max, config.log_snr_min, config))


def given_betas(config: ScheduleConfig) -> BetaTable:
    """The configuration's own betas."""
    return from_betas(torch.tensor(config.betas, dtype=torch.float64))


def given_alphas_cumprod(config: ScheduleConfig) -> BetaTable:
    """The configuration's own alphas_cumprod."""
    return from_alphas_cumprod(torch.tensor(config.alphas_cumprod, dtype=torch.float64))


BETAS: dict[ScheduleKind, Callable[[ScheduleConfig], BetaTable]] = {
    "linear": linear,
    "linear_scaled": linear_scaled,
    "scaled_linear": scaled_linear,
    "quadratic": quadratic,
    "constant": constant,
    "warmup": warmup,
    "inverse": inverse,
    "cosine": cosine,
    "sigmoid": sigmoid,
    "sigmoid_beta": sigmoid_beta,
    "log_snr": log_snr,
    "betas": given_betas,
    "alphas_cumprod": given_alphas_cumprod,
}


def _evenly(first: float, last: float, config: ScheduleConfig) -> Tensor:
    return torch.linspace(first, last, config.num_timesteps, dtype=torch.float64)


def _ends(config: ScheduleConfig) -> tuple[Tensor, Tensor]:
    start, end = torch.tensor([config.beta_start, config.beta_end], dtype=torch.float64)
    return start, end


def _shares(config: ScheduleConfig) -> Tensor:
    """0, 1/T, ..., 1."""
    return torch.arange(config.num_timesteps + 1, dtype=torch.float64) / config.num_timesteps


def _check_falling(name: str, table: Tensor, below: float, must: str) -> None:
    _check_table(name, table)
    good = table.isfinite()
    good[-1] |= table[-1] == -math.inf
    good &= table < torch.cat((table.new_full((1,), below), table[:-1]))
    if not bool(good.all()):
        at = int((~good).nonzero()[0])
        raise ValueError(f"{name}: must {must}, got {float(table[at])} at {at}")


def _check_table(name: str, table: Tensor) -> None:
    check_floating(name, table)
    if table.dim() != 1 or table.shape[0] < 1:
        raise ValueError(f"{name}: must have the shape [T] with T >= 1, got {list(table.shape)}")
