"""Memory that is used again as soon as nobody holds what was made in it.

Fresh memory of the size of a batch costs about as much as decoding a part of it: the system hands it over page by
page, each zeroed.
"""

from __future__ import annotations

import math
import weakref
from collections import deque

import numpy as np
import torch
from numpy.typing import NDArray

# pieces that wait to be used again; more are given back to the system
_SPARE = 8


class Buffers:
    """Makes tensors on the CPU, of uint8 or float32, whose content is undefined.

    With `pin` they are torch's own pinned memory, which torch keeps and gives out again itself: it alone knows
    when a copy to the GPU has ended. For any number of threads.
    """

    def __init__(self, *, pin: bool = False) -> None:
        self._pin = pin
        self._spare: deque[NDArray[np.uint8]] = deque(maxlen=_SPARE)

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        if self._pin:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        # the tensor holds this array, and this array alone holds the memory
        memory = self._memory(math.prod(shape) * dtype.itemsize)
        array = memory[:]
        weakref.finalize(array, self._spare.append, memory).atexit = False
        return torch.from_numpy(array).view(dtype).view(shape)

    def _memory(self, num_bytes: int) -> NDArray[np.uint8]:
        for _ in range(len(self._spare)):
            try:
                memory = self._spare.popleft()
            except IndexError:
                break
            if len(memory) == num_bytes:
                return memory
            self._spare.append(memory)
        return np.empty(num_bytes, dtype=np.uint8)
