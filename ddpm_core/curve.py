"""The error of x̂_0 as a function of the log-SNR, and its integral over the SNR."""

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from ddpm_core._checks import check_finite, check_floating, check_same_shape, require, require_number

Curve: TypeAlias = Callable[[Tensor], Tensor]
"""m(log-SNR): the mean squared error of x̂_0 a dimension, float64 `[N]` → float64 `[N]`, finite at −∞ too.

The scale of a process has no part in it: x_t divided by a_t tells as much of x_0 as x_t does."""

_PANEL = 1.0
_NODES = 16
_NOTHING = 40.0
"""e^−40 is below the rounding of every integral that is not itself that small."""


class MeasuredCurve:
    """A curve through measured points: ln m is linear in the log-SNR between them, and constant beyond the ends.

    Between two points m is then a power of the SNR, whose integral is known.
    """

    def __init__(self, log_snr: Tensor, x_start_mse: Tensor) -> None:
        """log_snr, x_start_mse: floating-point `[N]`, in any order; points that are not finite are left out.

        So a process's log_snr fits, and `BoundAccumulator.per_t().x_start_mse`, nan where nothing was measured.
        Raises ValueError if no point is left, two points have one log-SNR, or an error is not positive.
        """
        for name, values in (("log_snr", log_snr), ("x_start_mse", x_start_mse)):
            check_floating(name, values)
        check_same_shape("x_start_mse", x_start_mse, "log_snr", log_snr)
        log_snr, error = (v.detach().double().cpu().flatten() for v in (log_snr, x_start_mse))
        measured = log_snr.isfinite() & error.isfinite()
        log_snr, order = log_snr[measured].sort()
        error = error[measured][order]
        if not error.numel():
            raise ValueError("x_start_mse: must have a finite point, got none")
        if bool((error <= 0).any()):
            raise ValueError(f"x_start_mse: must be positive, got {float(error.min())}")
        if bool((log_snr.diff() == 0).any()):
            raise ValueError("log_snr: must hold each value once, got one twice")
        self._log_snr, self._log_mse = log_snr, error.log()
        none = error.new_zeros(1)
        # slope i is that below point i: 0 before the first and after the last
        self._slopes = torch.cat((none, self._log_mse.diff() / log_snr.diff(), none))
        self._areas = torch.cat((none, self._area(log_snr[1:], torch.arange(1, error.numel())))).cumsum(0)

    def __call__(self, log_snr: Tensor) -> Tensor:
        """m, float64 of log_snr's shape; ±∞ is a log-SNR too, NaN is none and is refused by name."""
        check_floating("log_snr", log_snr)
        require(not bool(log_snr.isnan().any()), "log_snr", "numbers or ±inf", math.nan)
        log_snr = log_snr.detach().double().cpu()
        segment = torch.searchsorted(self._log_snr, log_snr.contiguous())
        point = (segment - 1).clamp(min=0)
        distance = torch.where(self._slopes[segment] == 0, 0.0, log_snr - self._log_snr[point])
        return torch.exp(self._log_mse[point] + self._slopes[segment] * distance)

    def integral(self, low: float, high: float) -> float:
        """∫ m dSNR from log-SNR low (−∞ is allowed) to high, exactly that of the curve."""
        ends = torch.tensor([low, high], dtype=torch.float64)
        segment = torch.searchsorted(self._log_snr, ends)
        area = self._areas[(segment - 1).clamp(min=0)] + self._area(ends, segment)
        return float(area[1] - area[0])

    def _area(self, log_snr: Tensor, segment: Tensor) -> Tensor:
        """∫ m dSNR from the point below a segment (the first point, for the segment before it) to log_snr."""
        point = (segment - 1).clamp(min=0)
        start = self._log_snr[point]
        power = self._slopes[segment] + 1.0
        flat = power == 0
        grown = torch.expm1(power * (log_snr - start)) / torch.where(flat, 1.0, power)
        return torch.exp(self._log_mse[point] + start) * torch.where(flat, log_snr - start, grown)


def snr_integral(curve: Curve, low: float, high: float) -> float:
    """∫ m dSNR from log-SNR low (−∞ is allowed) to high: ∫ m(λ)·e^λ dλ.

    A MeasuredCurve knows its own; any other is integrated by Gauss–Legendre quadrature in panels of 1 in λ, to
    rounding for a curve that is analytic and does not change within a fraction of a panel.
    Raises ValueError unless low ≤ high < ∞, and naming curve if its values are not finite.
    """
    require_number("low", low)
    require_number("high", high)
    require(high < math.inf, "high", "finite", high)
    require(low <= high, "low", f"at most high ({high})", low)
    if isinstance(curve, MeasuredCurve):
        return curve.integral(low, high)
    if low == high:
        return 0.0
    low = max(low, min(high, 0.0) - _NOTHING)
    panels = max(1, math.ceil((high - low) / _PANEL))
    node, weight = _gauss_legendre(_NODES)
    width = (high - low) / panels
    centre = low + width * (torch.arange(panels, dtype=torch.float64) + 0.5)
    log_snr = (centre[:, None] + 0.5 * width * node).flatten()
    error = curve(log_snr)
    check_floating("curve", error)
    check_same_shape("curve", error, "its argument", log_snr)
    check_finite("curve", error)
    values = (error * log_snr.exp()).reshape(panels, -1)
    return float((values * weight).sum()) * 0.5 * width


def _gauss_legendre(count: int) -> tuple[Tensor, Tensor]:
    """Nodes in (−1, 1) and weights, float64 `[count]`, from the Jacobi matrix (Golub & Welsch 1969)."""
    k = torch.arange(1, count, dtype=torch.float64)
    off = k / (4.0 * k.square() - 1.0).sqrt()
    node, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return node, 2.0 * vectors[0].square()
