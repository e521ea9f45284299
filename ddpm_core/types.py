"""Names for the types that the mathematics shares."""

from collections.abc import Callable
from typing import Literal, TypeAlias

from torch import Tensor

EpsTheta: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""ε_θ(x_t, t): x_t `[B, C, H, W]` and t int64 `[B]`, zero-based, to the predicted noise `[B, C, H, W]`, or to x_0
or v where a `prediction_type` says so, or to `[B, 2C, H, W]` where the variance is learned."""

VarianceType: TypeAlias = Literal["fixed_small", "fixed_large", "learned_range", "analytic"]
"""Which σ_t² p_θ(x_{t−1}|x_t) has; `ddpm_core.reverse.ReverseProcess` says what each is."""
