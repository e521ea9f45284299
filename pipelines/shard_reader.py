"""Shards, fetched whole and ahead of need, verified once and sliced by their index; large ones read by ranges."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Container, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from google_crc32c import value as crc32c
from numpy.typing import NDArray

from pipelines.buffers import Buffers
from pipelines.cache import WeightedLRU
from pipelines.dataset import DataError, Dataset, Shard
from pipelines.decode import decode_many
from pipelines.errors import one_line, printable
from pipelines.ranged import RangedShard
from pipelines.shards import ShardIndex, parse_index
from pipelines.storage import Memory, NoRanges, ObjectMissing, Storage, new_memory

log = logging.getLogger(__name__)

DEFAULT_CACHE_BYTES = 256 * 2**20
_FETCH_ATTEMPTS = 3
# so many requests for ranges run side by side
_RANGES_AT_ONCE = 16
# the memory of so many shards waits for the next ones: that of one that a stream leaves for one that it comes to
SPARE_SHARDS = 2
# what the index of a shard weighs, roughly, a sample
_INDEX_ROW_BYTES = 64
# a tar of which the images are less than this share is kept as its images alone
_DENSE = 0.5

# servers that turned out to give no parts of objects; each is asked, and told of, once a process
_without_ranges: set[str] = set()


class Fetch(Protocol):
    def __call__(
        self, storage: Storage, key: str, expected_sha256: str, memory: Memory = new_memory
    ) -> memoryview:
        """The object's bytes, which have this SHA-256, in memory that `memory` gives."""
        ...


def fetch_verified(
    storage: Storage, key: str, expected_sha256: str, memory: Memory = new_memory
) -> memoryview:
    """The object's bytes, which have this SHA-256, in memory that `memory` gives.

    A body that has not is fetched again, three times in all. Raises `DataError` naming the object if it is
    missing or stays wrong; `StorageError` if the storage cannot be read.
    """
    for _ in range(_FETCH_ATTEMPTS):
        try:
            got = storage.get_hashed(key, memory)
        except ObjectMissing:
            raise DataError(f"{printable(f'{storage.uri}/{key}')}: is missing from its data set") from None
        if got.sha256 == expected_sha256:
            return got.data
    raise DataError(
        f"{printable(f'{storage.uri}/{key}')}: is damaged or was exchanged: its {len(got)} bytes have SHA-256 "
        f"{got.sha256[:16]}… and the data set names {expected_sha256[:16]}… (fetched {_FETCH_ATTEMPTS} times)"
    )


@dataclass(frozen=True)
class BadSample:
    """A sample whose image cannot be had. `object`: the address of its shard; `reason`: why, in a few words;
    `advice`: what to do about it.
    """

    shard: int
    row: int
    object: str
    key: str
    reason: str
    advice: str

    def __str__(self) -> str:
        return f"{self.object}: sample {self.key!r}: {self.reason}"

    def error(self) -> DataError:
        """The error of those who cannot do without it."""
        return DataError(f"{self}; {self.advice}")


@dataclass(frozen=True, eq=False)
class _LoadedShard:
    """The images' bytes: the tar as it is, or, of small images, where a tar is mostly headers and padding, their
    bytes alone, end to end. Image i stands at `start[i]`.
    """

    data: memoryview
    start: NDArray[np.int64]
    index: ShardIndex

    @property
    def num_bytes(self) -> int:
        return len(self.data) + self.start.nbytes + self.index.num_bytes

    def decode(self, rows: NDArray[np.int64], out: NDArray[np.uint8]) -> list[tuple[int, str]]:
        """The images of these rows into `out`, `[n, H, W, C]`. Returns the places of those that are bad, each with
        the reason.
        """
        start = self.start[rows]
        stop = start + self.index.length[rows]
        crcs = self.index.crc32c[rows]
        data, bad, files = self.data, [], {}
        for place, (first, last, crc) in enumerate(
            zip(start.tolist(), stop.tolist(), crcs.tolist(), strict=True)
        ):
            image = data[first:last].tobytes()
            if crc32c(image) == crc:
                files[place] = image
            else:
                bad.append((place, "its bytes do not have the CRC32C that the index gives"))
        return bad + decode_many(files, out)


class ShardReader:
    """Reads samples of one split by (shard, row).

    A shard is fetched whole, once, and kept while it fits: up to `cache_bytes` in all, and up to `max_shards`
    shards where that is given; one shard is always kept. `fetch_ahead` fetches up to `parallel` shards at a time
    in threads, within the same memory. With `decode_threads` above 1 as many threads decode; the images are the
    same. `fetch` is where a cache of a node's disk goes in between. For one thread; `close()` ends its own.

    Of a shard with more than `ranged_above` bytes (`cache_bytes`, unless that is given) only the index is kept,
    and the samples are fetched as they are read, by ranges; where a server gives none, it is fetched whole.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        *,
        max_shards: int | None = None,
        ranged_above: int | None = None,
        parallel: int = 4,
        decode_threads: int = 1,
        fetch: Fetch = fetch_verified,
    ) -> None:
        self._dataset = dataset
        self._shards = dataset.shards(split)
        self._fetch = fetch
        self._memory = Buffers(spare=SPARE_SHARDS).bytes
        self._cache_bytes = cache_bytes
        self._ranged_above = cache_bytes if ranged_above is None else ranged_above
        self._loaded: WeightedLRU[int, _LoadedShard | RangedShard] = WeightedLRU(cache_bytes, max_shards)
        self._under_way: dict[int, Future[_LoadedShard | RangedShard]] = {}
        # threads start with the first task
        self._fetchers = ThreadPoolExecutor(parallel, "ddpm-fetch")
        self._rangers = ThreadPoolExecutor(_RANGES_AT_ONCE, "ddpm-range")
        self._decode_threads = decode_threads
        self._decoders = ThreadPoolExecutor(decode_threads, "ddpm-decode")

    @property
    def cached_bytes(self) -> int:
        return self._loaded.num_bytes

    def close(self) -> None:
        """Begin no further fetch. Fetches that are under way end by themselves."""
        for pool in (self._fetchers, self._rangers, self._decoders):
            pool.shutdown(wait=False, cancel_futures=True)

    def read(
        self, shard: int, rows: Sequence[int] | NDArray[np.int64]
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The images (uint8 `[n, C, H, W]`) and labels (int64 `[n]`, −1 for none) at these rows of a shard.

        Raises `DataError` naming the shard, and the sample's key where it is one sample's fault.
        """
        channels, height, width = self._dataset.shape
        images = np.empty((len(rows), height, width, channels), dtype=np.uint8)
        wanted = np.asarray(rows, dtype=np.int64)
        labels, bad = self.read_into(shard, wanted, images)
        if bad:
            raise bad[0].error()
        return images.transpose(0, 3, 1, 2), labels

    def read_into(
        self, shard: int, rows: NDArray[np.int64], out: NDArray[np.uint8]
    ) -> tuple[NDArray[np.int64], list[BadSample]]:
        """Decode these rows of a shard into `out`, uint8 `[n, H, W, C]`.

        Returns the labels of all, and the bad samples, `out` being zero at their places. Raises `DataError` naming
        the shard where the shard itself is bad.
        """
        loaded, at = self._at_hand(shard, rows)
        bad = []
        for place, reason in self._decode(loaded, at, out):
            out[place] = 0
            key = loaded.index.key[int(at[place])].as_py()
            where = self._dataset.uri_of(self._shards[shard])
            bad.append(
                BadSample(shard, int(rows[place]), where, key, reason, self._dataset.what_to_run(deep=True))
            )
        return loaded.index.label[at], bad

    def _at_hand(self, shard: int, rows: NDArray[np.int64]) -> tuple[_LoadedShard, NDArray[np.int64]]:
        """A shard that holds these rows, and which of its own rows they are."""
        held = self._get(shard)
        if isinstance(held, _LoadedShard):
            return held, rows
        different, at = np.unique(rows, return_inverse=True)
        try:
            with self._advising():
                images = held.read(different, self._rangers)
        except NoRanges as error:
            server = _server(self._dataset.uri_of(self._shards[shard]))
            if server not in _without_ranges:
                log.warning("%s; shards are fetched whole, whatever data.cache_bytes says", one_line(error))
                _without_ranges.add(server)
            self._loaded.drop(shard)
            return self._at_hand(shard, rows)
        return _end_to_end(images, held.index.part(different)), at

    def _decode(
        self, loaded: _LoadedShard, rows: NDArray[np.int64], out: NDArray[np.uint8]
    ) -> list[tuple[int, str]]:
        size = -(-len(rows) // self._decode_threads)
        if size == len(rows):
            return loaded.decode(rows, out)
        pieces = [
            (
                first,
                self._decoders.submit(loaded.decode, rows[first : first + size], out[first : first + size]),
            )
            for first in range(0, len(rows), size)
        ]
        return [(first + place, reason) for first, piece in pieces for place, reason in piece.result()]

    def keys_of(self, shard: int, rows: NDArray[np.int64]) -> list[str]:
        """The keys of the samples at these rows of a shard."""
        return list(self._get(shard).index.keys(rows).to_pylist())

    def retain(self, shards: Container[int]) -> None:
        """Forget all shards that are here but these."""
        self._loaded.retain(shards)

    def fetch_ahead(self, shards: Iterable[int], in_use: int) -> None:
        """Begin to fetch those of these shards that are not here yet, the soonest needed first, as far as
        `cache_bytes` reach. Room is made of shards that are here, except the `in_use` that were read last.
        """
        for shard in shards:
            if shard in self._loaded or shard in self._under_way:
                continue
            coming = sum(self._expected_bytes(self._shards[other]) for other in self._under_way)
            room = self._cache_bytes - coming - self._expected_bytes(self._shards[shard])
            if not self._loaded.shrink(room, in_use):
                return
            self._under_way[shard] = self._fetchers.submit(self._load, self._shards[shard])

    def _by_ranges(self, shard: Shard) -> bool:
        return (
            shard.num_bytes > self._ranged_above
            and _server(self._dataset.uri_of(shard)) not in _without_ranges
        )

    def _expected_bytes(self, shard: Shard) -> int:
        return shard.count * _INDEX_ROW_BYTES if self._by_ranges(shard) else shard.num_bytes

    def _get(self, shard: int) -> _LoadedShard | RangedShard:
        return self._loaded.get(shard, lambda: self._arrived(shard), lambda loaded: loaded.num_bytes)

    def _arrived(self, shard: int) -> _LoadedShard | RangedShard:
        future = self._under_way.pop(shard, None)
        if future is None or future.cancel():
            return self._load(self._shards[shard])
        return future.result()

    @contextlib.contextmanager
    def _advising(self) -> Iterator[None]:
        """Say to errors what to do about them."""
        try:
            yield
        except DataError as error:
            raise DataError(f"{error}; {self._dataset.what_to_run()}") from None

    def _load(self, shard: Shard) -> _LoadedShard | RangedShard:
        with self._advising():
            return self._fetched(shard)

    def _fetched(self, shard: Shard) -> _LoadedShard | RangedShard:
        storage = self._dataset.storage
        raw_index = self._fetch(storage, shard.index_key, shard.index_sha256)
        try:
            index = parse_index(raw_index)
            if (index.count, index.tar_sha256, index.tar_num_bytes) != (
                shard.count,
                shard.sha256,
                shard.num_bytes,
            ):
                raise ValueError("an index of another tar than the data set names")
        except ValueError as error:
            raise DataError(f"{self._dataset.uri_of_index(shard)}: {error}") from None
        if self._by_ranges(shard):
            return RangedShard(*self._dataset.tar_of(shard), self._dataset.uri_of(shard), index)
        tar = self._fetch(*self._dataset.tar_of(shard), shard.sha256, self._memory)
        if index.length.sum() >= _DENSE * len(tar):
            return _LoadedShard(tar, index.offset, index)
        spans = zip(index.offset.tolist(), index.length.tolist(), strict=True)
        return _end_to_end((tar[offset : offset + length] for offset, length in spans), index)


def _server(uri: str) -> str:
    scheme, _, rest = uri.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}"


def _end_to_end(images: Iterable[bytes | memoryview], index: ShardIndex) -> _LoadedShard:
    return _LoadedShard(memoryview(b"".join(images)), np.cumsum(index.length) - index.length, index)
