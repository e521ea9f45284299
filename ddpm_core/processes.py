"""Linear-Gaussian processes besides the variance-preserving one, and any process with a given log-SNR.

Two processes with one log-SNR λ are one process in two scales: x_t/√(a² + b²) has the same law in both. So the
posterior, the bound of a network with the same x̂_0 at each λ, and ancestral sampling with the variance types
"fixed_small" and "analytic" are the same in all of them. "fixed_large" is the variance of q's own step,
(b_t/b_{t−1})² times β̃_t: that ratio depends on the scale, and so do its bound and its samples, and those of
"learned_range", whose range it ends.

Whether x_T can be drawn without the data is what `LinearGaussianProcess.warnings` says.
"""

import math
from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ddpm_core._checks import check_floating, check_same_shape, require, require_int, require_number
from ddpm_core.betas import check_log_snr
from ddpm_core.process import LinearGaussianProcess
from ddpm_core.schedules import Schedule

ProcessKind: TypeAlias = Literal[
    "variance_preserving", "variance_exploding", "sub_variance_preserving", "rectified_flow"
]
"""The scales that `process_at` knows."""


def process_from_coefficients(a: Tensor, b: Tensor) -> LinearGaussianProcess:
    """x_t = a_t·x_0 + b_t·ε from tables, floating-point `[T]`: a > 0 (the last may be 0), b > 0, a/b falling.

    The step's share of lost SNR keeps about 16 − log₁₀(1/loss) digits; `process_from_log_snr` and the factories of
    this module know it better. Raises ValueError naming the argument that is wrong.
    """
    for name, table in (("a", a), ("b", b)):
        check_floating(name, table)
        if table.dim() != 1 or table.shape[0] < 1:
            raise ValueError(f"{name}: must have the shape [T] with T >= 1, got {list(table.shape)}")
    check_same_shape("b", b, "a", a)
    for name, table in (("a", a), ("b", b)):
        ok = table > 0
        if name == "a":
            ok[-1] |= table[-1] == 0
        require(bool((ok & table.isfinite()).all()), name, "positive and finite", table.tolist())
    return LinearGaussianProcess(a.double().log(), b.double().log())


def process_from_log_snr(log_snr: Tensor, log_scale: Tensor | None = None) -> LinearGaussianProcess:
    """a = e^{log_scale}·√sigmoid(λ), b = e^{log_scale}·√sigmoid(−λ), so that a² + b² = e^{2·log_scale}.

    log_snr (λ): floating-point `[T]`, strictly falling, finite but for a last −∞. log_scale: `[T]`, finite;
    None is 0, the variance-preserving process. Raises ValueError naming the argument that is wrong.
    """
    check_log_snr(log_snr)
    log_snr = log_snr.double()
    log_scale = torch.zeros_like(log_snr) if log_scale is None else log_scale
    check_floating("log_scale", log_scale)
    check_same_shape("log_scale", log_scale, "log_snr", log_snr)
    log_scale = log_scale.double()
    require(bool(log_scale.isfinite().all()), "log_scale", "finite", log_scale.tolist())
    return LinearGaussianProcess(
        log_scale + 0.5 * logsigmoid(log_snr),
        log_scale + 0.5 * logsigmoid(-log_snr),
        log_snr=log_snr,
        total_variance=torch.exp(2.0 * log_scale),
    )


def process_at(kind: ProcessKind, log_snr: Tensor) -> LinearGaussianProcess:
    """The process of that kind with the given log-SNR λ, floating-point `[T]`, strictly falling.

    "variance_preserving": a² + b² = 1. "variance_exploding": a = 1 (a last λ of −∞ is refused: σ would be
    infinite). "sub_variance_preserving": b = 1 − a². "rectified_flow": b = 1 − a.
    Raises ValueError naming kind or log_snr.
    """
    require(kind in get_args(ProcessKind), "kind", "one of " + ", ".join(get_args(ProcessKind)), kind)
    check_log_snr(log_snr)
    if kind == "variance_exploding":
        require(math.isfinite(log_snr[-1]), "log_snr", "finite for 'variance_exploding'", float(log_snr[-1]))
    return process_from_log_snr(log_snr, _LOG_SCALES[kind](log_snr.double()))


def variance_exploding(
    num_timesteps: int, sigma_min: float = 0.01, sigma_max: float = 50.0
) -> LinearGaussianProcess:
    """x_t = x_0 + σ_t·ε, σ_t geometric from sigma_min to sigma_max (Song et al. 2021, arXiv:2011.13456, Eq. 30).

    Sampling starts from N(0, 1 + sigma_max²). Raises ValueError naming the argument that is out of range; T = 1
    is at sigma_max.
    """
    require_int("num_timesteps", num_timesteps, 1)
    require_number("sigma_min", sigma_min)
    require_number("sigma_max", sigma_max)
    require(0 < sigma_min < math.inf, "sigma_min", "positive and finite", sigma_min)
    require(
        sigma_min < sigma_max < math.inf, "sigma_max", f"above sigma_min ({sigma_min}) and finite", sigma_max
    )
    # from the last to the first, so that one step is at sigma_max
    log_sigma = torch.linspace(math.log(sigma_max), math.log(sigma_min), num_timesteps, dtype=torch.float64)
    return LinearGaussianProcess(torch.zeros_like(log_sigma), log_sigma.flip(0))


def sub_variance_preserving(schedule: Schedule) -> LinearGaussianProcess:
    """x_t = √ᾱ_t·x_0 + (1 − ᾱ_t)·ε with the ᾱ of a schedule (Song et al. 2021, arXiv:2011.13456, Eq. 29)."""
    return LinearGaussianProcess(schedule.log_a, 2.0 * schedule.log_b)


def rectified_flow(num_timesteps: int) -> LinearGaussianProcess:
    """x_t = (1 − s)·x_0 + s·ε with s = (t + 1)/T (Liu et al. 2023, arXiv:2209.03003).

    It ends without signal at s = 1, so ε-prediction is impossible. Its v-prediction is a·ε − b·x_0, not the flow's
    velocity ε − x_0. Raises ValueError naming num_timesteps.
    """
    require_int("num_timesteps", num_timesteps, 1)
    done = torch.arange(1, num_timesteps + 1, dtype=torch.float64)
    left = num_timesteps - done
    # 1 − √(SNR_t/SNR_{t−1}), from whole numbers
    lost = num_timesteps / ((left + 1.0) * done)
    return LinearGaussianProcess(
        (left / num_timesteps).log(), (done / num_timesteps).log(), snr_loss=lost * (2.0 - lost)
    )


def _sub_variance_preserving_log_scale(log_snr: Tensor) -> Tensor:
    # b = 1 − a² and a = r·b with r = e^{λ/2} give a² + a/r = 1, so b = 2/(1 + √(1 + 4·r²)).
    r = torch.exp(0.5 * log_snr)
    log_b = math.log(2.0) - torch.log1p(torch.hypot(torch.ones_like(r), 2.0 * r))
    return log_b - 0.5 * logsigmoid(-log_snr)


_LOG_SCALES: dict[ProcessKind, Callable[[Tensor], Tensor]] = {
    "variance_preserving": torch.zeros_like,
    "variance_exploding": lambda log_snr: -0.5 * logsigmoid(log_snr),
    "sub_variance_preserving": _sub_variance_preserving_log_scale,
    "rectified_flow": lambda log_snr: logsigmoid(-0.5 * log_snr) - 0.5 * logsigmoid(-log_snr),
}
