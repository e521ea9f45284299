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


class Buffers:
    """Makes tensors on the CPU, of uint8 or float32, and plain memory, whose content is undefined.

    Up to `spare` pieces wait to be used again; more are given back to the system. With `pin` the tensors are
    torch's own pinned memory, which torch keeps and gives out again itself: it alone knows when a copy to the GPU
    has ended. For any number of threads.
    """

    def __init__(self, *, spare: int = 8, pin: bool = False) -> None:
        self._pin = pin
        self._spare: deque[NDArray[np.uint8]] = deque(maxlen=spare)

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        if self._pin:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        return torch.from_numpy(self._array(math.prod(shape) * dtype.itemsize)).view(dtype).view(shape)

    def bytes(self, num_bytes: int) -> memoryview:
        """Memory that is used again when the last view of it, or of a part of it, is gone. A part of `view.obj`, an
        array, is no such view.
        """
        return self._array(num_bytes).data

    def _array(self, num_bytes: int) -> NDArray[np.uint8]:
        memory = self._memory(_rounded(num_bytes))
        # what is made of this array holds it, and it alone holds the memory
        array = memory[:num_bytes]
        weakref.finalize(array, self._spare.append, memory).atexit = False
        return array

    def _memory(self, num_bytes: int) -> NDArray[np.uint8]:
        for _ in range(len(self._spare)):
            try:
                # the last one, of which most may still be in the CPU's caches
                memory = self._spare.pop()
            except IndexError:
                break
            if len(memory) == num_bytes:
                return memory
            self._spare.appendleft(memory)
        return np.empty(num_bytes, dtype=np.uint8)


def _rounded(num_bytes: int) -> int:
    """The next multiple of a sixteenth of its power of two, so that sizes that differ little, as those of shards
    do, are one. The system gives no memory for what is never written to.
    """
    step = max(1, 1 << num_bytes.bit_length() >> 5)
    return -(-num_bytes // step) * step
