"""The order in which samples are read, as a pure function of (counts, seed, stream, position).

Epochs of N samples are laid end to end. Each is one line: the shards in an order keyed by (seed, epoch), and
inside each shard its samples in an order keyed by (seed, epoch, shard). M streams cut every epoch's line into
M consecutive pieces at sample granularity, so that a reader of a few streams touches few shards. After e
epochs stream m has read C_m(e) = ⌊(e·N + m)/M⌋ samples, and Σ_m C_m(e) = e·N by Hermite's identity: pieces
differ by one sample at most, and no stream ever runs ahead.

How even the shuffle is: within an epoch a sample may stand at any place of its shard's stretch of the line,
and the shard at any place among the shards. From one epoch to the next a sample moves as far as in uniform
shuffling (0.97 to 1.03 of a third of the epoch, measured on 1,000 shards). What differs is that two samples of
one shard stay within a shard's length of each other: in batches of 80 from 100 shards of 50, pairs from one shard
are 50 times as many as in uniform shuffling with 1 stream, 3.8 times with 20, and next to none with 80. That is why
`prepare` mixes the classes over the shards. The tests in tests/property/test_order_scale.py measure this.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pipelines.cache import WeightedLRU

Int64Array = NDArray[np.int64]
Whole = TypeVar("Whole", int, Int64Array)

# shard orders of the epochs in use, and sample orders of the shards in use
_CACHE_BYTES = 64 * 2**20
_MAX_PLACE = 2**62


@dataclass(frozen=True, eq=False)
class Locations:
    """Where samples stand: `epoch`, `shard` (index in the split) and `sample` (row in the shard's index),
    each int64 `[n]`.
    """

    epoch: Int64Array
    shard: Int64Array
    sample: Int64Array


@dataclass(frozen=True, eq=False)
class Piece:
    """Consecutive samples of a stream that stand in one shard: `rows` in the shard's index, int64 `[n]`."""

    epoch: int
    shard: int
    rows: Int64Array


def permutation(length: int, seed: int, purpose: str, *index: int) -> Int64Array:
    """A permutation of 0..length−1 that depends on (seed, purpose, index) alone.

    The ranks of `length` raw words of a Philox generator keyed by BLAKE2b: NumPy promises that raw words stay
    the same from version to version, which it does not of `Generator.permutation`.
    """
    name = "/".join(str(part) for part in (seed, purpose, *index))
    key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "little")
    words = np.random.Philox(key=key).random_raw(length)
    return np.argsort(np.asarray(words), kind="stable")


class Order:
    """`counts`: samples in each shard of a split, in the split's order (zero is allowed). `num_streams`: M.

    Raises `ValueError` if there is no sample at all or no stream.
    """

    def __init__(self, counts: Sequence[int] | Int64Array, seed: int, num_streams: int) -> None:
        self._counts = np.asarray(counts, dtype=np.int64).reshape(-1)
        if (self._counts < 0).any():
            raise ValueError("counts: a shard cannot hold fewer than 0 samples")
        self.num_samples = int(self._counts.sum())
        if self.num_samples == 0:
            raise ValueError("counts: there is no sample to order")
        if num_streams < 1:
            raise ValueError(f"num_streams: must be at least 1, got {num_streams!r}")
        self.seed = seed
        self.num_streams = num_streams
        self._lines: WeightedLRU[int, tuple[Int64Array, Int64Array]] = WeightedLRU(_CACHE_BYTES)
        self._samples: WeightedLRU[tuple[int, int], Int64Array] = WeightedLRU(_CACHE_BYTES)

    def locate(self, stream: int, positions: Int64Array | Sequence[int]) -> Locations:
        """Where the samples at these positions of a stream stand.

        Position p of stream m lies in epoch e = ⌊((p+1)·M − 1 − m)/N⌋ at p − C_m(e) of that epoch's piece.
        The cost does not grow with p. Raises `ValueError` on a stream or a position that does not exist.
        """
        p = np.asarray(positions, dtype=np.int64).reshape(-1)
        m, big_m, n = stream, self.num_streams, self.num_samples
        if not 0 <= m < big_m:
            raise ValueError(f"stream: must be 0..{big_m - 1}, got {stream!r}")
        if p.size and (p.min() < 0 or int(p.max()) * big_m + big_m + n > _MAX_PLACE):
            raise ValueError(f"positions: must be 0..{(_MAX_PLACE - n) // big_m - 1}")
        epoch = self._epoch(m, p)
        place = self._start(m, epoch) + p - self._begun(m, epoch)
        shard = np.empty_like(p)
        row = np.empty_like(p)
        for e in np.unique(epoch):
            here = epoch == e
            shards, ends = self._line(int(e))
            # side="right" passes over empty shards, whose end is their neighbour's
            rank = np.searchsorted(ends, place[here], side="right")
            shard[here] = shards[rank]
            row[here] = place[here] - (ends[rank] - self._counts[shards[rank]])
        sample = np.empty_like(p)
        for e, s in {(int(a), int(b)) for a, b in zip(epoch, shard, strict=True)}:
            here = (epoch == e) & (shard == s)
            sample[here] = self._order_within(e, s)[row[here]]
        return Locations(epoch, shard, sample)

    def pieces(self, stream: int, start: int, stop: int) -> Iterator[Piece]:
        """Where the samples at positions `start` to `stop` of a stream stand, in their order; as `locate`, at a
        cost that grows with the number of shards between them alone.
        """
        for epoch, shard, first, last in self._spans(stream, start, stop):
            yield Piece(epoch, shard, self._order_within(epoch, shard)[first:last])

    def shards_ahead(self, stream: int, position: int, limit: int, stop: int | None = None) -> list[int]:
        """The next `limit` shards that a stream reads from this position on, each once, in that order; fewer where
        there are fewer up to position `stop`, or in the rest of this epoch and the next one.
        """
        found = dict[int, None]()
        last = self._begun(stream, self._epoch(stream, position) + 2)
        for _, shard, _, _ in self._spans(stream, position, last if stop is None else min(last, stop)):
            found[shard] = None
            if len(found) == limit:
                break
        return list(found)

    def _spans(self, stream: int, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """(epoch, shard, first, last) of each stretch of one shard that a stream reads between two positions: the
        places `first` to `last` in the shard's order of that epoch.
        """
        if not (0 <= stream < self.num_streams and start >= 0):
            raise ValueError(
                f"stream, start: must be 0..{self.num_streams - 1}, >= 0, got {stream!r}, {start!r}"
            )
        while start < stop:
            epoch = self._epoch(stream, start)
            shards, ends = self._line(epoch)
            place = self._start(stream, epoch) + start - self._begun(stream, epoch)
            # side="right" passes over empty shards, whose end is their neighbour's
            rank = int(np.searchsorted(ends, place, side="right"))
            shard, end = int(shards[rank]), int(ends[rank])
            count = min(end - place, self._begun(stream, epoch + 1) - start, stop - start)
            first = place - end + int(self._counts[shard])
            yield epoch, shard, first, first + count
            start += count

    def _begun(self, m: int, epoch: Whole) -> Whole:
        """C_m(epoch): the position at which stream m begins this epoch."""
        return (epoch * self.num_samples + m) // self.num_streams

    def _epoch(self, m: int, position: Whole) -> Whole:
        return ((position + 1) * self.num_streams - 1 - m) // self.num_samples

    def _start(self, m: int, epoch: Whole) -> Whole:
        """Where stream m's piece begins on the epoch's line: Σ_{j<m} (C_j(e+1) − C_j(e)), in closed form."""
        return self._total(m, (epoch + 1) * self.num_samples) - self._total(m, epoch * self.num_samples)

    def _total(self, m: int, a: Whole) -> Whole:
        """Σ_{j<m} ⌊(a+j)/M⌋: with a = q·M + r, those j with r + j ≥ M count one more than q."""
        quotient, rest = a // self.num_streams, a % self.num_streams
        over = rest + m - self.num_streams
        return m * quotient + over * (over > 0)

    def _line(self, epoch: int) -> tuple[Int64Array, Int64Array]:
        """The shards in this epoch's order, and where each ends on the line."""

        def make() -> tuple[Int64Array, Int64Array]:
            shards = permutation(len(self._counts), self.seed, "shards", epoch)
            return shards, np.cumsum(self._counts[shards])

        return self._lines.get(epoch, make, lambda line: line[0].nbytes + line[1].nbytes)

    def _order_within(self, epoch: int, shard: int) -> Int64Array:
        return self._samples.get(
            (epoch, shard),
            lambda: permutation(int(self._counts[shard]), self.seed, "samples", epoch, shard),
            lambda order: order.nbytes,
        )
