"""Names for the types that the mathematics shares."""

from collections.abc import Callable
from typing import Literal, TypeAlias

from torch import Tensor

EpsTheta: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""ε_θ(x_t, t): x_t `[B, C, H, W]` and t int64 `[B]`, zero-based, to the predicted noise `[B, C, H, W]`."""

VarianceType: TypeAlias = Literal["fixed_small", "fixed_large"]
"""Which σ_t² p_θ(x_{t−1}|x_t) has: β̃_t (`fixed_small`) or β_t (`fixed_large`), Ho et al. section 3.2."""
