"""Every public callable of ddpm_core that takes tensors: a tensor that is wrong is named in a ValueError."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_core import Schedule, ScheduleConfig
from tests.support.core_examples import examples

SHORT = Schedule.from_config(ScheduleConfig(num_timesteps=6, beta_start=0.02, beta_end=0.6))
EXAMPLES = examples(SHORT)

ARGUMENTS = [(name, key) for name, example in EXAMPLES.items() for key in example.tensors]
FLOATING = [(name, key) for name, key in ARGUMENTS if EXAMPLES[name].tensors[key].is_floating_point()]
WHOLE = [(name, key) for name, key in ARGUMENTS if not EXAMPLES[name].tensors[key].is_floating_point()]
TIMED = [(name, key) for name, key in WHOLE if key == "t"]

PATHS = [(name, "path") for name in ("path_terms", "hierarchy.log_joint", "hierarchy.log_posterior")]


def _is_named(key: str, message: str) -> bool:
    """At the front, or as the other one of two that do not fit: "noise: must have the shape of x_start"."""
    if key == "output" and message.startswith("eps_theta's output: "):
        return True
    return re.search(rf"(?<![\w'])\*?{re.escape(key)}\b", message) is not None


def _refused(name: str, key: str, change: Callable[[Tensor], Tensor]) -> str:
    example = EXAMPLES[name]
    with pytest.raises(ValueError) as refusal:
        example.run(**{key: change(example.tensors[key])})
    return str(refusal.value)


def _with(value: float) -> Callable[[Tensor], Tensor]:
    def spoil(tensor: Tensor) -> Tensor:
        spoilt = tensor.clone()
        spoilt.view(-1)[spoilt.numel() // 2] = value
        return spoilt

    return spoil


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("name", "key"), FLOATING)
def test_what_is_not_finite_is_refused(name: str, key: str, value: float) -> None:
    example = EXAMPLES[name]
    passes = key in example.nan or (math.isinf(value) and key in example.inf)
    if passes:
        example.run(**{key: _with(value)(example.tensors[key].contiguous())})
        return
    assert _refused(name, key, lambda tensor: _with(value)(tensor.contiguous())).startswith(f"{key}: must ")


@pytest.mark.parametrize(("name", "key"), FLOATING)
def test_integers_where_numbers_are_needed(name: str, key: str) -> None:
    example = EXAMPLES[name]
    if key in example.whole:
        example.run(**{key: example.tensors[key].long()})
        return
    message = _refused(name, key, Tensor.long)
    assert _is_named(key, message)
    assert "floating-point" in message


@pytest.mark.parametrize("wrong", [[1.0], 3, "x"], ids=repr)
@pytest.mark.parametrize(("name", "key"), ARGUMENTS)
def test_what_is_no_tensor(name: str, key: str, wrong: Any) -> None:
    # a path is a list of states
    given: Any = [wrong] * (SHORT.num_timesteps + 1) if (name, key) in PATHS else wrong
    with pytest.raises(ValueError) as refusal:
        EXAMPLES[name].run(**{key: given})
    message = str(refusal.value)
    own = "eps_theta's output" if key == "output" and message.startswith("eps_theta") else key
    assert message == f"{own}: must be a tensor, got {type(wrong).__name__}"


@pytest.mark.parametrize(("name", "key"), ARGUMENTS)
def test_shapes(name: str, key: str) -> None:
    """No dimension at all; and one row less, unless it is the batch of the only tensor that has one."""
    example = EXAMPLES[name]
    if key in example.shapes:
        return
    changes: list[Callable[[Tensor], Tensor]] = [lambda tensor: tensor.reshape(-1)[0]]
    if key in example.batch and len(example.batch) > 1:
        changes.append(lambda tensor: tensor.narrow(example.batch[key], 0, 2))
    for change in changes:
        message = _refused(name, key, change)
        own = "eps_theta's output" if key == "output" and message.startswith("eps_theta") else key
        if message.startswith(f"{own}: must "):
            continue
        # of two that do not fit either may be named first; the message then names the other too, or its shape
        first, _, rest = message.partition(": must ")
        assert first in example.tensors or first == "eps_theta's output", message
        shape = list(change(example.tensors[key]).shape)
        assert len(example.tensors) > 1, message
        assert _is_named(key, rest) or str(shape) in rest, message


@pytest.mark.parametrize(("name", "key"), WHOLE)
@pytest.mark.parametrize("dtype", [torch.int32, torch.float64, torch.bool], ids=str)
def test_integers_are_int64(name: str, key: str, dtype: torch.dtype) -> None:
    message = _refused(name, key, lambda tensor: tensor.to(dtype))
    assert message.startswith(f"{key}: must be int64, got {dtype}")


@pytest.mark.parametrize(("name", "key"), TIMED)
def test_t_out_of_range(name: str, key: str) -> None:
    num_t = EXAMPLES[name].num_t
    if num_t is None:  # the network's t, any that is told
        assert name in ("UNet.forward", "DiT.forward")
        return
    for wrong in (-1, num_t, 10**9):
        message = _refused(name, key, lambda t, wrong=wrong: torch.full_like(t, wrong))  # type: ignore[misc]
        assert message == f"t: must lie in 0..{num_t - 1}, got {wrong}"
