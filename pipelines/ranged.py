"""A shard of which only the samples that are wanted are read, by ranges of its bytes.

For shards that are larger than the memory for shards, and for a few samples of a large one. A whole shard is
checked by its SHA-256; here each sample is checked by the CRC32C that the index gives, the index as ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from pipelines.dataset import DataError
from pipelines.errors import one_line
from pipelines.retries import TryAgain, insist
from pipelines.shards import ShardIndex
from pipelines.storage import ObjectMissing, ObjectTooShort, Storage

# A request costs about as much as so many bytes, so that a smaller gap between two samples is read along with them.
GAP_BYTES = 64 * 2**10
# one request's, unless a single sample is larger
SPAN_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Span:
    """One request: bytes `start` to `stop`, which hold the wanted samples `first` to `last` (exclusive), counted in
    the order of their offsets.
    """

    start: int
    stop: int
    first: int
    last: int


def spans(
    offset: NDArray[np.int64], length: NDArray[np.int64], gap: int = GAP_BYTES, most: int = SPAN_BYTES
) -> list[Span]:
    """The requests for samples at these offsets, which ascend: neighbours that lie at most `gap` bytes apart share
    one, as long as it stays within `most` bytes.
    """
    found: list[Span] = []
    for number, (start, size) in enumerate(zip(offset.tolist(), length.tolist(), strict=True)):
        stop = start + size
        if found:
            last = found[-1]
            whole = max(stop, last.stop)
            if start - last.stop <= gap and whole - last.start <= most:
                found[-1] = Span(last.start, whole, last.first, number + 1)
                continue
        found.append(Span(start, stop, number, number + 1))
    return found


@dataclass(frozen=True, eq=False)
class RangedShard:
    """A shard whose index is here and whose tar is not. `where`: the tar's whole address, for messages."""

    storage: Storage
    key: str
    where: str
    index: ShardIndex

    @property
    def num_bytes(self) -> int:
        return self.index.num_bytes

    def read(self, rows: NDArray[np.int64], pool: Executor) -> list[bytes]:
        """The stored images at these rows, all different, in their order; requests run side by side in `pool`.

        A body that is too short or has another CRC32C is fetched again within the retry budget. Raises `DataError`
        naming the shard and the sample if it stays so, or if the shard is missing; `NoRanges` where the server
        gives no parts of objects; `StorageError` if it cannot be read.
        """
        by_offset = np.argsort(self.index.offset[rows], kind="stable")
        ordered = rows[by_offset]
        wanted = spans(self.index.offset[ordered], self.index.length[ordered])

        def fetch(span: Span) -> list[bytes]:
            return insist(self.where, lambda: self._once(span, ordered[span.first : span.last]), DataError)

        found: Iterator[list[bytes]] = map(fetch, wanted) if len(wanted) == 1 else pool.map(fetch, wanted)
        images = [b""] * len(rows)
        in_order = (image for piece in found for image in piece)
        for place, image in zip(by_offset.tolist(), in_order, strict=True):
            images[place] = image
        return images

    def _once(self, span: Span, rows: NDArray[np.int64]) -> list[bytes]:
        size = span.stop - span.start
        try:
            data = self.storage.get_range(self.key, span.start, size)
        except ObjectMissing:
            raise DataError(f"{self.where}: is missing from its data set") from None
        except ObjectTooShort as error:
            raise TryAgain(f"{self._sample(rows[-1])}: {one_line(error)}") from None
        if len(data) != size:
            raise TryAgain(f"{self._sample(rows[-1])}: {len(data)} of {size} bytes came")
        images = []
        for row in rows.tolist():
            start = int(self.index.offset[row]) - span.start
            image = data[start : start + int(self.index.length[row])]
            if google_crc32c.value(image) != self.index.crc32c[row]:
                raise TryAgain(f"{self._sample(row)}: its bytes do not have the CRC32C that the index gives")
            images.append(image)
        return images

    def _sample(self, row: int | np.int64) -> str:
        return f"sample {self.index.key[int(row)].as_py()!r}"
