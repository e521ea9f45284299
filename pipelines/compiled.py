"""Networks compiled in place: for inference with their weights as constants, or for training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.errors import UserError, one_line


def compile_frozen(model: nn.Module, example: Callable[[], object]) -> None:
    """Compile the model in place, for inputs as in example(), which calls it once; this takes tens of seconds.

    Its weights are then constants, whatever becomes of the model's. Its outputs differ from the uncompiled one's
    by rounding. Call it in `torch.inference_mode()`. Raises `UserError` where the machine can't compile, for want
    of a C++ compiler, say.
    """
    compiled = torch.compile(model.forward, dynamic=False)

    def forward(*arguments: Any, **named: Any) -> Any:
        return compiled(*map(_plain, arguments), **{name: _plain(value) for name, value in named.items()})

    model.forward = forward
    # given to compile(), the option comes too late for the tracing, which must know that weights are constants
    with torch.inference_mode(), torch._inductor.config.patch(freezing=True):
        _try(example, "sample.compile")


def _plain(argument: Any) -> Any:
    """For a tensor of another layout in memory, or one not made in inference mode, all would be compiled anew, and
    not with constants: a sampler begins with noise of one kind and goes on with outputs of another.
    """
    if not isinstance(argument, Tensor):
        return argument
    argument = argument.contiguous()
    return argument if argument.is_inference() == torch.is_inference_mode_enabled() else argument.clone()


def compile_training(model: nn.Module, example: Callable[[], object]) -> None:
    """Compile the model in place, forwards and backwards, for inputs as in example(), which does both once.

    Its outputs and gradients differ from the uncompiled network's by rounding. Raises `UserError` as above.
    """
    model.compile(dynamic=False)
    _try(example, "train.compile")


def _try(example: Callable[[], object], setting: str) -> None:
    try:
        example()
    except Exception as error:  # noqa: BLE001  the compilers' errors have no common base
        raise UserError(
            f"{setting}: the network can't be compiled here ({one_line(error, 200)}); set it to false"
        ) from None
