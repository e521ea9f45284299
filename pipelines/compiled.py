"""A network compiled for inference, with its weights as constants."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from pipelines.errors import UserError, one_line


def compile_frozen(model: nn.Module, example: Callable[[], object]) -> None:
    """Compile the model in place, for inputs as in example(), which calls it once; this takes tens of seconds.

    Its outputs differ from the uncompiled network's by rounding. Raises `UserError` where the machine can't, for
    want of a C++ compiler, say.
    """
    model.compile(options={"freezing": True})
    try:
        with torch.inference_mode():
            example()
    except Exception as error:  # noqa: BLE001  the compilers' errors have no common base
        raise UserError(
            f"sample.compile: the network can't be compiled here ({one_line(error, 200)}); set it to false"
        ) from None
