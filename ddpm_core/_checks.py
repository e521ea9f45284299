"""Checks of arguments. Each raises a ValueError that names the argument, what it must be and what it was."""

from typing import Any

import torch
from torch import Tensor


def require(ok: bool, name: str, must_be: str, value: Any) -> None:
    """Raise ValueError(f"{name}: must be {must_be}, got {value!r}") unless ok."""
    if not ok:
        raise ValueError(f"{name}: must be {must_be}, got {value!r}")


def check_seed(seed: int) -> None:
    require(isinstance(seed, int) and not isinstance(seed, bool), "seed", "an int", seed)


def check_index(index: Tensor, name: str = "index") -> None:
    """index must be an int64 tensor `[B]`."""
    if index.dtype != torch.int64:
        raise ValueError(f"{name}: must be int64, got {index.dtype}")
    if index.dim() != 1:
        raise ValueError(f"{name}: must have the shape [B], got {list(index.shape)}")


def check_timesteps(t: Tensor, num_timesteps: int, like: Tensor) -> None:
    """t must be int64 `[B]` with B = like.shape[0] and 0 <= t < num_timesteps.

    The range is checked on the CPU only: on an accelerator the check would wait for all work in flight, and
    the device's own bounds check catches t >= num_timesteps.
    """
    check_index(t, "t")
    if like.dim() < 1 or t.shape[0] != like.shape[0]:
        raise ValueError(f"t: must have one entry a sample, got {t.shape[0]} for a batch {list(like.shape)}")
    if t.device.type == "cpu" and t.numel():
        low, high = (int(v) for v in torch.aminmax(t))
        if low < 0 or high >= num_timesteps:
            raise ValueError(f"t: must lie in 0..{num_timesteps - 1}, got {low if low < 0 else high}")


def check_same_shape(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    if tensor.shape != like.shape:
        raise ValueError(
            f"{name}: must have the shape of {like_name}, {list(like.shape)}, got {list(tensor.shape)}"
        )


def check_finite(name: str, tensor: Tensor) -> None:
    """tensor must hold neither NaN nor ±∞. Checked on the CPU only, for the reason in `check_timesteps`."""
    if tensor.device.type == "cpu" and not bool(tensor.isfinite().all()):
        at = (~tensor.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"{name}: must be finite, got {float(tensor[tuple(at)].detach())} at {at}")


def check_batch(name: str, tensor: Tensor) -> None:
    """tensor must be floating-point `[B, ...]` with one dimension or more besides the batch."""
    check_floating(name, tensor)
    if tensor.dim() < 2:
        raise ValueError(f"{name}: must have the shape [B, ...], got {list(tensor.shape)}")


def check_floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: must be a floating-point tensor, got {tensor.dtype}")
