"""The units of a bound. Inside, everything is nats a dimension."""

import math
from typing import Literal, TypeAlias

from torch import Tensor

from ddpm_core._checks import require

LN_2 = math.log(2.0)

Unit: TypeAlias = Literal["bits_per_dim", "nats"]
"""Bits a dimension, or nats of the whole sample (of all its dimensions together)."""


def in_unit(nats_per_dim: Tensor, unit: Unit, num_dims: int) -> Tensor:
    """Raises ValueError naming unit if it is none."""
    require(unit in ("bits_per_dim", "nats"), "unit", "'bits_per_dim' or 'nats'", unit)
    return nats_per_dim / LN_2 if unit == "bits_per_dim" else nats_per_dim * num_dims
