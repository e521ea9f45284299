"""Which sample goes into which shard: a function of keys and options alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.columns import Integers, Joined, narrow
from pipelines.dataset import SPLITS
from pipelines.entries import Entries
from pipelines.errors import UserError
from pipelines.prepare_shards import ShardPlan

DEFAULT_SAMPLES_PER_SHARD = 1024
# of groups that are read as a whole, so many shards' worth are mixed; each is read for as many shards
_SHARDS_A_WINDOW = 8
# rows that are looked through at a time
_PIECE = 2**20


@dataclass(frozen=True, eq=False)
class Plan:
    """The shards of a data set, each of which is made when it is asked for. `order`: the rows of the samples, train
    before test; `counts`: how many samples and how many shards a split has.
    """

    entries: Entries
    order: Integers
    counts: dict[str, tuple[int, int]]

    def __len__(self) -> int:
        return sum(shards for _, shards in self.counts.values())

    def __getitem__(self, number: int) -> ShardPlan:
        number, first = range(len(self))[number], 0
        for split, (samples, shards) in self.counts.items():
            if number < shards:
                start, stop = (first + n * samples // shards for n in (number, number + 1))
                key, index_key = _keys(split, number)
                return ShardPlan(split, key, index_key, self.entries.take(self.order[start:stop]))
            number, first = number - shards, first + samples
        raise AssertionError(number)

    def __iter__(self) -> Iterator[ShardPlan]:
        return map(self.__getitem__, range(len(self)))

    def objects(self) -> Iterator[tuple[str, str]]:
        """The keys of each shard's tar and index."""
        for split, (_, shards) in self.counts.items():
            for number in range(shards):
                yield _keys(split, number)


def _keys(split: str, number: int) -> tuple[str, str]:
    stem = f"{split}/shard-{number:06d}"
    return f"{stem}.tar", f"{stem}.index.parquet"


def plan_shards(
    entries: Entries,
    seed: int,
    test_fraction: float,
    shard_count: int | None = None,
    samples_per_shard: int | None = None,
) -> Plan:
    """Which sample goes where. A sample's split is decided by its own key alone, so that it stays when
    others come and go; within a split samples lie in the order of a second hash, which mixes the classes
    over the shards. Where samples come in groups that are read as a whole, groups are taken in the order of a
    hash, as many as make some shards, and their samples are mixed: every shard then reads few of the groups.

    Raises `UserError` if a split would be empty, or would have more shards than samples.
    """
    keys, total = entries.keys, len(entries)
    # as integers, since a float has not all of these numbers
    held_out = _hashes(keys, seed, "split") < np.uint64(math.ceil(test_fraction * 2**64))
    num_test = int(np.count_nonzero(held_out))
    sizes = {split: num_test if split == "test" else total - num_test for split in SPLITS}
    for split, samples in sizes.items():
        if not samples:
            raise UserError(
                f"prepare.test_fraction: {test_fraction} of {total} images leaves the {split} split empty: "
                "change it, or give more images"
            )
    num_train = sizes["train"]
    if shard_count is not None and shard_count > num_train:
        raise UserError(f"shard_count: {shard_count} shards are more than the {num_train} train samples")
    size = -(-num_train // shard_count) if shard_count else samples_per_shard or DEFAULT_SAMPLES_PER_SHARD
    windows = _windows(entries, held_out, seed, size * _SHARDS_A_WINDOW)
    order = _order(keys, windows, _hashes(keys, seed, "shard"))
    counts = {
        split: (samples, shard_count if shard_count and split == "train" else -(-samples // size))
        for split, samples in sizes.items()
    }
    return Plan(entries, order, counts)


def _order(keys: Joined, windows: Integers, hashes: NDArray[np.uint64]) -> Integers:
    """The rows by (window, hash, key)."""
    order = narrow(np.lexsort((hashes, windows)))
    ties: list[int] = []
    for start in range(0, len(order), _PIECE):
        rows = order[start : start + _PIECE + 1]
        same = (hashes[rows[1:]] == hashes[rows[:-1]]) & (windows[rows[1:]] == windows[rows[:-1]])
        ties += (start + np.flatnonzero(same)).tolist()
    while ties:
        first = last = ties.pop()
        while ties and ties[-1] == first - 1:
            first = ties.pop()
        rows = order[first : last + 2]
        order[first : last + 2] = sorted(rows.tolist(), key=keys.__getitem__)
    return order


def _windows(entries: Entries, held_out: NDArray[np.bool_], seed: int, least: int) -> Integers:
    """The window of each row, those of the train split before those of the test split. A window is of groups with
    at least so many samples of the split, the last one perhaps of fewer.
    """
    names: dict[str, int] = {}
    runs = [(names.setdefault(name, len(names)), rows) for name, rows in entries.groups() if rows]
    of_run, lengths = (np.array(column, np.int64) for column in zip(*runs, strict=True))
    starts = np.cumsum(lengths) - lengths
    ranked = sorted(names, key=lambda name: (keyed_hash(seed, "group", name), name))
    windows, window = np.empty((2, len(names)), np.int64), 0
    for split, chosen in enumerate((~held_out, held_out)):
        counts = np.zeros(len(names), np.int64)
        np.add.at(counts, of_run, np.add.reduceat(chosen, starts, dtype=np.int64))
        filled = 0
        for code in map(names.__getitem__, ranked):
            windows[split, code] = window
            filled += int(counts[code])
            if filled >= least:
                window, filled = window + 1, 0
        window += 1
    train, test = (np.repeat(narrow(windows)[split][of_run], lengths) for split in (0, 1))
    np.copyto(train, test, where=held_out)
    return train


def _hashes(keys: Joined, seed: int, purpose: str) -> NDArray[np.uint64]:
    return np.fromiter((keyed_hash(seed, purpose, key) for key in keys), np.uint64, len(keys))


def keyed_hash(seed: int, purpose: str, key: str) -> int:
    """64 bits that depend on (seed, purpose, key) alone: BLAKE2b."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
