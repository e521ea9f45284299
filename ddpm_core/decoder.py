"""The bound's decoder p_θ(x_0|x_1): a Gaussian integrated over the bin of each level (Ho et al. 2020, Eq. 13)."""

import math

import torch
from torch import Tensor

from ddpm_core._checks import check_floating, check_numbers, require_int, values_are_at_hand
from ddpm_core._units import LN_2

_LN_2_PI = math.log(2.0 * math.pi)

_NARROW = 1e-4
"""Half a bin in units of σ, from which on the difference of its ends keeps twelve digits."""


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor, levels: int) -> Tensor:
    """ln P(level of x) in nats, elementwise, under a Gaussian integrated over the level's bin (Eq. 13).

    The levels lie at −1 + 2·l/(levels − 1); a bin reaches 1/(levels − 1) to each side, and the outer two
    are open, so that the probabilities of all levels sum to 1. x holds levels; mean and log_scale (ln σ)
    broadcast to x. Computed in float64 and returned in x's dtype. Values and gradients are finite and keep their
    digits for every σ and mean for which ln P ≈ −(x − mean)²/(2σ²) is a number of that dtype; if the mean is in the
    bin, for every σ. Raises ValueError naming the argument that is not floating-point, does not broadcast to x, or
    is not finite (noticed on the CPU; a log_scale of ±∞ is a σ of 0 or ∞).
    """
    require_int("levels", levels, 2)
    check_numbers("x", x)
    for name, values in (("mean", mean), ("log_scale", log_scale)):
        check_floating(name, values)
        sizes = zip(reversed(values.shape), reversed(x.shape), strict=False)
        if values.dim() > x.dim() or any(have not in (1, want) for have, want in sizes):
            raise ValueError(f"{name}: must broadcast to x {list(x.shape)}, got {list(values.shape)}")
    check_numbers("mean", mean)
    _check_sigma(log_scale)
    check_numbers("log_scale", log_scale)
    return log_mass_of_level(x, mean, log_scale, levels)


def log_mass_of_level(x: Tensor, mean: Tensor, log_scale: Tensor, levels: int) -> Tensor:
    """`discretized_gaussian_log_likelihood` for callers that have checked x and let a network's NaN and ∞ pass."""
    half_bin = 1.0 / (levels - 1)
    offset, log_scale = torch.broadcast_tensors(x.double() - mean.double(), log_scale.double())
    inverse_scale = torch.exp(-log_scale)

    # where a bin is far narrower than σ its two ends are one number, and the mass is density times width
    narrow = half_bin * inverse_scale < _NARROW
    from_density = _log_mass_of_narrow_bin(offset, torch.where(narrow, log_scale, 0.0), half_bin)
    wide_offset, wide_scale = torch.where(narrow, 0.0, offset), torch.where(narrow, 1.0, inverse_scale)
    from_ends = _log_mass_between(
        (wide_offset - half_bin) * wide_scale, (wide_offset + half_bin) * wide_scale
    )
    inner = torch.where(narrow, from_density, from_ends)

    lowest, highest = x < -1.0 + half_bin, x > 1.0 - half_bin
    end = torch.where(lowest, offset + half_bin, half_bin - offset)
    outer = _log_ndtr(end * torch.exp(-log_scale))
    return torch.where(lowest | highest, outer, inner).to(x.dtype)


def _check_sigma(log_scale: Tensor) -> None:
    if values_are_at_hand(log_scale) and bool(log_scale.detach().isinf().any()):
        raise ValueError("log_scale: must be finite, got a sigma of 0 or inf, for which there is no bound")


def gaussian_log_density(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """ln N(x; mean, e^{log_variance}) in nats, elementwise; mean and log_variance broadcast to x."""
    return -0.5 * ((x - mean).square() * torch.exp(-log_variance) + log_variance + _LN_2_PI)


def _log_mass_of_narrow_bin(offset: Tensor, log_scale: Tensor, half_bin: float) -> Tensor:
    """ln of ∫ φ over offset ± half_bin in units of σ, for a half-width h below _NARROW σ.

    φ(z + u) = φ(z)·e^{−z·u}·e^{−u²/2}: the middle factor gives sinh(z·h)/(z·h), the last one −h²/6 to first order.
    (That is for small z·h; else z > 1/h, and h² is below the rounding of z²/2.)
    """
    log_density = gaussian_log_density(offset, torch.zeros_like(offset), 2.0 * log_scale)
    # z·h, for z = offset/σ and h = half_bin/σ
    bend = offset.abs() * half_bin * torch.exp(-2.0 * log_scale)
    return (
        log_density
        + math.log(2.0 * half_bin)
        + _log_sinhc(bend)
        - half_bin**2 / 6.0 * torch.exp(-2.0 * log_scale)
    )


def _log_mass_between(low: Tensor, high: Tensor) -> Tensor:
    """ln(Φ(high) − Φ(low))."""
    # Φ(high) − Φ(low) = Φ(−low) − Φ(−high): the pair further to the left keeps its digits.
    flip = low + high > 0
    left, right = torch.where(flip, -high, low), torch.where(flip, -low, high)
    log_right = _log_ndtr(right)
    # Φ(left)/Φ(right) < e^−700, where the next line would lose its gradient in ∞ − ∞
    nothing = (right - left) * (right + left) < -1400.0
    ratio = _log_ndtr(torch.where(nothing, 0.0, left)) - torch.where(nothing, 1.0, log_right)
    return log_right + torch.where(nothing, 0.0, _log1mexp(ratio))


def _log_sinhc(y: Tensor) -> Tensor:
    """ln(sinh(y)/y) for y ≥ 0; each branch sees only arguments at which it is finite."""
    near = y < 0.01
    square = torch.where(near, y, 0.0).square()
    from_near = square / 6.0 - square.square() / 180.0 + square**3 / 2835.0
    far = torch.where(near, 1.0, y)
    return torch.where(near, from_near, far + torch.log(-torch.expm1(-2.0 * far) / (2.0 * far)))


def _log1mexp(d: Tensor) -> Tensor:
    """ln(1 − e^d) for d < 0, accurate at both ends; each branch sees only arguments at which it is finite."""
    near = d > -LN_2
    from_near = torch.log(-torch.expm1(torch.where(near, d, -1.0)))
    from_far = torch.log1p(-torch.exp(torch.where(near, -1.0, d)))
    return torch.where(near, from_near, from_far)


def _log_ndtr(z: Tensor) -> Tensor:
    """ln Φ(z), with torch.special.log_ndtr's values; but its gradient, e^(−z²/2 − ln Φ), is noise below −1e7."""
    below = z < 0
    tail = torch.where(below, z, 0.0)
    # Φ(z) = ½·erfcx(−z/√2)·e^(−z²/2), whose logarithm has no digits to lose
    far = torch.log(0.5 * torch.special.erfcx(tail * -math.sqrt(0.5))) - 0.5 * tail.square()
    near = torch.log1p(-0.5 * torch.special.erfc(torch.where(below, 0.0, z) * math.sqrt(0.5)))
    return torch.where(below, far, near)
