"""Tars written fast: the headers of all members at once, and one buffer.

The bytes are those of webdataset's TarWriter (format pax, owner bigdata, mode 0444, time 0), which data sets had
from the beginning, so that they keep their identity.
"""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain

import numpy as np
from numpy.typing import NDArray

_BLOCK_BYTES = tarfile.BLOCKSIZE
_NAME_BYTES = 100
_PLAIN_BYTES = 8**11
_SIZE = slice(124, 135)
_CHECKSUM = slice(148, 154)
_FILLINGS = tuple(map(bytes, range(_BLOCK_BYTES)))


def tar_of(names: Sequence[str], bodies: Sequence[bytes]) -> tuple[bytes, NDArray[np.int64]]:
    """The tar with these members, in this order, and where the body of each begins."""
    sizes = np.fromiter(map(len, bodies), np.int64, len(bodies))
    heads = _headers(names, sizes)
    filling = -sizes % _BLOCK_BYTES
    ends = np.cumsum(np.fromiter(map(len, heads), np.int64, len(heads)) + sizes + filling)
    num_bytes = int(ends[-1]) if len(ends) else 0
    fillings = map(_FILLINGS.__getitem__, filling.tolist())
    parts = chain.from_iterable(zip(heads, bodies, fillings, strict=True))
    # two empty blocks, and more up to whole records
    marker = bytes(2 * _BLOCK_BYTES + -(num_bytes + 2 * _BLOCK_BYTES) % tarfile.RECORDSIZE)
    return b"".join(chain(parts, (marker,))), ends - filling - sizes


def _headers(names: Sequence[str], sizes: NDArray[np.int64]) -> Sequence[bytes]:
    """The header of each: a block, or three where its name is not ASCII or too long, or it has 8 GiB."""
    longest = max(map(len, names), default=0)
    if longest > _NAME_BYTES or not all(map(str.isascii, names)) or sizes.max(initial=0) >= _PLAIN_BYTES:
        return [_header(name, size) for name, size in zip(names, sizes.tolist(), strict=True)]
    template = _template()
    letters = np.array(names, dtype=f"S{longest}")[:, None].view(np.uint8)
    digits = _octal(sizes, 11)
    # the sum of all bytes, where the sum's own field counts as eight blanks, of which one stands there
    rest = int(template.sum(dtype=np.uint32)) + 7 * ord(" ")
    sums = letters.sum(axis=1, dtype=np.uint32) + digits.sum(axis=1, dtype=np.uint32) + rest
    blocks = np.tile(template, (len(names), 1))
    blocks[:, : letters.shape[1]] = letters
    blocks[:, _SIZE] = digits
    blocks[:, _CHECKSUM] = _octal(sums, 6)
    return blocks.view(f"V{_BLOCK_BYTES}").ravel().tolist()


def _octal(values: NDArray[np.int64] | NDArray[np.uint32], digits: int) -> NDArray[np.uint8]:
    shifts = 3 * np.arange(digits - 1, -1, -1)
    return (((values[:, None] >> shifts) & 7) + ord("0")).astype(np.uint8)


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o444, 0
    info.uname = info.gname = "bigdata"
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


@lru_cache(maxsize=1)
def _template() -> NDArray[np.uint8]:
    """A header without a name, and without the digits of its size and its checksum."""
    block = np.frombuffer(_header("", 0), np.uint8).copy()
    block[_SIZE] = block[_CHECKSUM] = 0
    return block
