"""Checks of arguments. Each raises a ValueError that names the argument, what it must be and what it was."""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode


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


def require_number(name: str, value: Any, *, none: str = "") -> None:
    """value must be a real number by its type (which a bool is not); it may be NaN. none: as in `require_int`."""
    if value is None and none:
        return
    rest = f" or {none}" if none else ""
    require(isinstance(value, Real) and not isinstance(value, bool), name, f"a number{rest}", value)


def require_sizes(name: str, value: Any, least: int | None = None) -> None:
    """value must be a sequence of whole numbers, of at least `least` each if that is given."""
    ok = isinstance(value, Sequence) and not isinstance(value, str)
    require(ok, name, "a tuple of ints", value)
    for size in value:
        require_int(name, size, least)


def require_float_dtype(dtype: Any) -> None:
    ok = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    require(ok, "dtype", "a floating-point dtype of torch", dtype)


def check_seed(seed: int) -> None:
    require_int("seed", seed)


def check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: must be a tensor, got {type(value).__name__}")


def values_are_at_hand(tensor: Tensor) -> bool:
    """Whether a look at the values costs next to nothing and may decide what happens.

    Not on an accelerator, where the look would wait for all work in flight. Not while a compiler or a tracer runs,
    whose graph a decision would break or freeze. Not of what stands for many values or none: tensors under vmap or
    another transform of torch.func, and subclasses that answer for themselves, as fake tensors do.
    """
    return (
        not torch.compiler.is_compiling()
        and tensor.device.type == "cpu"
        and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
        # torch has no public questions of these three; there is a test of each
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and _get_current_dispatch_mode() is None
        and not torch._C._is_tracing()
    )


def check_index(index: Tensor, name: str = "index") -> None:
    """index must be an int64 tensor `[B]`."""
    check_tensor(name, index)
    if index.dtype != torch.int64:
        raise ValueError(f"{name}: must be int64, got {index.dtype}")
    if index.dim() != 1:
        raise ValueError(f"{name}: must have the shape [B], got {list(index.shape)}")


def check_timesteps(t: Tensor, num_timesteps: int, like: Tensor) -> None:
    """t must be int64 `[B]` with B = like.shape[0] and 0 <= t < num_timesteps.

    The range is checked where `values_are_at_hand`; elsewhere the device's own bounds check catches
    t >= num_timesteps.
    """
    check_index(t, "t")
    check_tensor("like", like)
    if like.dim() < 1 or t.shape[0] != like.shape[0]:
        raise ValueError(f"t: must have one entry a sample, got {t.shape[0]} for a batch {list(like.shape)}")
    if t.numel() and values_are_at_hand(t):
        low, high = (int(v) for v in torch.aminmax(t))
        if low < 0 or high >= num_timesteps:
            raise ValueError(f"t: must lie in 0..{num_timesteps - 1}, got {low if low < 0 else high}")


def check_same_shape(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.shape != like.shape:
        raise ValueError(
            f"{name}: must have the shape of {like_name}, {list(like.shape)}, got {list(tensor.shape)}"
        )


def check_finite(name: str, tensor: Tensor) -> None:
    """tensor must hold neither NaN nor ±∞; looked at where `values_are_at_hand`."""
    if not values_are_at_hand(tensor):
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
    check_tensor(name, tensor)
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: must be a floating-point tensor, got {tensor.dtype}")
