"""Networks compiled in place: for inference with their weights as constants, or for training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from pipelines.errors import UserError, one_line


def compile_frozen(model: nn.Module, example: Callable[[], object]) -> None:
    """Compile the model in place, for inputs as in example(), which calls it once; this takes tens of seconds.

    Its weights are then constants, whatever becomes of the model's. Its outputs differ from the uncompiled one's
    by rounding. Call it in `torch.inference_mode()`. Raises `UserError` where the machine can't compile, for want
    of a C++ compiler, say.
    """
    # given to compile(), the option comes too late for the tracing, which must know that weights are constants
    with torch.inference_mode(), torch._inductor.config.patch(freezing=True):
        _compile(model, example, "sample.compile")


def compile_training(model: nn.Module, example: Callable[[], object]) -> None:
    """Compile the model in place, forwards and backwards, for inputs as in example(), which does both once.

    Its outputs and gradients differ from the uncompiled network's by rounding. Raises `UserError` as above.
    """
    _compile(model, example, "train.compile")


def _compile(model: nn.Module, example: Callable[[], object], setting: str) -> None:
    model.compile(dynamic=False)
    try:
        example()
    except Exception as error:  # noqa: BLE001  the compilers' errors have no common base
        raise UserError(
            f"{setting}: the network can't be compiled here ({one_line(error, 200)}); set it to false"
        ) from None
