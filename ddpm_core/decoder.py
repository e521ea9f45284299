"""The bound's decoder p_θ(x_0|x_1): a Gaussian integrated over the bin of each level (Ho et al. 2020, Eq. 13)."""

import math

import torch
from torch import Tensor

from ddpm_core._checks import check_floating, require
from ddpm_core._units import LN_2


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor, levels: int) -> Tensor:
    """ln P(level of x) in nats, elementwise, under a Gaussian integrated over the level's bin (Eq. 13).

    The levels lie at −1 + 2·l/(levels − 1); a bin reaches 1/(levels − 1) to each side, and the outer two
    are open, so that the probabilities of all levels sum to 1. x holds levels; mean and log_scale (ln σ)
    broadcast to x. Computed in float64 from the smaller tail, so that values and gradients are finite far
    from the mean; returned in x's dtype. Raises ValueError for σ = 0.
    """
    check_floating("x", x)
    require(levels >= 2, "levels", "at least 2", levels)
    if log_scale.device.type == "cpu" and not bool(log_scale.detach().isfinite().all()):
        raise ValueError("log_scale: must be finite, got a sigma of 0 or inf, for which there is no bound")
    half_bin = 1.0 / (levels - 1)
    offset = x.double() - mean.double()
    inverse_scale = torch.exp(-log_scale.double())
    low, high = (offset - half_bin) * inverse_scale, (offset + half_bin) * inverse_scale

    # Φ(high) − Φ(low) = Φ(−low) − Φ(−high): the pair further to the left keeps its digits.
    flip = low + high > 0
    left, right = torch.where(flip, -high, low), torch.where(flip, -low, high)
    log_right = _log_ndtr(right)
    inner = log_right + _log1mexp(_log_ndtr(left) - log_right)

    lowest, highest = x < -1.0 + half_bin, x > 1.0 - half_bin
    outer = _log_ndtr(torch.where(lowest, high, -low))
    return torch.where(lowest | highest, outer, inner).to(x.dtype)


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
