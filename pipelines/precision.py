"""The number format that a network computes in while it trains, and the order of its tensors in memory.

Weights, losses, sums and averages stay float32.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Literal, TypeAlias

import torch

log = logging.getLogger(__name__)

Precision: TypeAlias = Literal["auto", "float32", "bfloat16"]


class Autocast:
    """The context in which a network is asked.

    auto: bfloat16 on a GPU that has it, float32 elsewhere; never bfloat16 on a CPU, where it is 15 to 100 times
    slower unless the CPU has units for it. Asked for by name it is used anywhere, with a warning on such a CPU.
    """

    def __init__(self, precision: Precision, device: torch.device) -> None:
        if precision == "auto":
            wanted = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            wanted = precision == "bfloat16"
            if wanted and device.type == "cpu" and not cpu_has_bfloat16():
                log.warning(
                    "train.precision: bfloat16, and this CPU has no units for it: expect 15 to 100 times the time"
                )
        self.dtype = torch.bfloat16 if wanted else torch.float32
        self._device_type = device.type

    def __call__(self) -> contextlib.AbstractContextManager[object]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self._device_type, dtype=self.dtype)


def memory_format(device: torch.device, *, compiled: bool) -> torch.memory_format:
    """That in which a network's layers are fastest; it changes rounding, not results.

    Convolutions want their channels innermost, but a GPU's normalisation has no kernel for that, and copies: on an
    H100 forwards and backwards of the 35.7M network took 61 ms, and 51 with the channels outermost. A compiled
    network has kernels of its own.
    """
    return torch.channels_last if compiled or device.type == "cpu" else torch.contiguous_format


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX-512 BF16 or AMX); False where torch can't tell."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, lambda: False)()) for name in checks)
