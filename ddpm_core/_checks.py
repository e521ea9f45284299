"""Checks of arguments. Each raises a ValueError that names the argument, what it must be and what it was."""

from numbers import Integral
from typing import Any

import torch
from torch import Tensor


def require(ok: bool, name: str, must_be: str, value: Any) -> None:
    """Raise ValueError(f"{name}: must be {must_be}, got {value!r}") unless ok."""
    if not ok:
        raise ValueError(f"{name}: must be {must_be}, got {value!r}")


def require_int(name: str, value: Any, least: int | None = None, *, none: str = "") -> None:
    """value must be a whole number by its type (which a bool is not), and at least `least` if that is given.

    none: how the user writes None ("null" in a file), where that will do as well.
    """
    if value is None and none:
        return
    rest = f" or {none}" if none else ""
    require(isinstance(value, Integral) and not isinstance(value, bool), name, f"an int{rest}", value)
    require(least is None or value >= least, name, f"at least {least}{rest}", value)


def check_seed(seed: int) -> None:
    require_int("seed", seed)


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
    """tensor must hold neither NaN nor ±∞.

    Checked on the CPU only, for the reason in `check_timesteps`, and not while a compiler traces, which would break
    its graph here.
    """
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return
    tensor = tensor.detach()
    # one pass in nearly every case; a sum of finite numbers may overflow, and then a second pass decides
    if bool(tensor.sum().isfinite()):
        return
    wrong = ~tensor.isfinite()
    if bool(wrong.any()):
        at = wrong.nonzero()[0].tolist()
        raise ValueError(f"{name}: must be finite, got {float(tensor[tuple(at)])} at {at}")


def check_numbers(name: str, tensor: Tensor) -> None:
    """tensor must be floating-point and finite."""
    check_floating(name, tensor)
    check_finite(name, tensor)


def check_alike(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """tensor must be floating-point, of the shape of like, and finite."""
    check_floating(name, tensor)
    check_same_shape(name, tensor, like_name, like)
    check_finite(name, tensor)


def check_batch(name: str, tensor: Tensor) -> None:
    """tensor must be floating-point `[B, ...]` with one dimension or more besides the batch."""
    check_floating(name, tensor)
    if tensor.dim() < 2:
        raise ValueError(f"{name}: must have the shape [B, ...], got {list(tensor.shape)}")


def check_floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: must be a floating-point tensor, got {tensor.dtype}")
