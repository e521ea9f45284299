"""The samples of a split in stored order, for those who want each once: evaluation and pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.dataset import Dataset, Shard
from pipelines.shard_reader import DEFAULT_CACHE_BYTES, BadSample, ShardReader

# of a shard this large or larger, a quarter of the samples or fewer is read by ranges, so many samples at a time
_RANGED_BYTES = 2**20
_RANGED_SHARE = 0.25
_RANGED_ROWS = 32


def read_split(
    dataset: Dataset, split: str, start: int = 0, stop: int | None = None
) -> Iterator[tuple[str, NDArray[np.uint8], int]]:
    """Samples `start` to `stop` of a split in stored order, as (key, uint8 `[C, H, W]`, label or −1).

    Shards before `start` are not fetched. One shard is held at a time, and two where one follows the other; of one
    larger than `DEFAULT_CACHE_BYTES`, or of which less than a quarter is wanted, only some samples, by ranges.
    """
    for row in read_rows(dataset, split, start, stop, on_bad=_raise_first):
        yield row.key, row.image, row.label


@dataclass(frozen=True, eq=False)
class Row:
    """A sample of a split: its number in stored order, key, image uint8 `[C, H, W]`, and label (−1 for none)."""

    number: int
    key: str
    image: NDArray[np.uint8]
    label: int


def read_rows(
    dataset: Dataset,
    split: str,
    start: int = 0,
    stop: int | None = None,
    *,
    on_bad: Callable[[Sequence[BadSample]], None],
) -> Iterator[Row]:
    """As `read_split`, without the bad samples, which are given to `on_bad`."""
    if start < 0 or (stop is not None and stop < start):
        raise ValueError(f"start, stop: must be 0 <= start <= stop, got {start!r}, {stop!r}")
    whole = ShardReader(dataset, split, cache_bytes=0, ranged_above=2**63)
    ranged = ShardReader(dataset, split, cache_bytes=0, ranged_above=0)
    channels, height, width = dataset.shape
    first = 0
    for number, shard in enumerate(dataset.shards(split)):
        last = first + shard.count
        rows = range(max(start, first) - first, (last if stop is None else min(stop, last)) - first)
        reader, at_once = (ranged, _RANGED_ROWS) if _read_by_ranges(shard, len(rows)) else (whole, 1)
        for begin in range(0, len(rows), at_once):
            some = np.asarray(rows[begin : begin + at_once], dtype=np.int64)
            images = np.empty((len(some), height, width, channels), dtype=np.uint8)
            labels, bad = reader.read_into(number, some, images)
            on_bad(bad)
            keys = reader.keys_of(number, some)
            skipped = {sample.row for sample in bad}
            for row, key, image, label in zip(some.tolist(), keys, images, labels.tolist(), strict=True):
                if row not in skipped:
                    yield Row(first + row, key, image.transpose(2, 0, 1), label)
        first = last


def _raise_first(bad: Sequence[BadSample]) -> None:
    for sample in bad:
        raise sample.error()


def _read_by_ranges(shard: Shard, num_rows: int) -> bool:
    few = shard.num_bytes >= _RANGED_BYTES and num_rows <= _RANGED_SHARE * shard.count
    return few or shard.num_bytes > DEFAULT_CACHE_BYTES
