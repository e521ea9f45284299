"""Reading a data set: whole shards, verified once and sliced by their index; a run's micro-batches."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm_core import rng
from pipelines.cache import WeightedLRU
from pipelines.dataset import DataError, Dataset, Shard
from pipelines.images import decode_image, to_model
from pipelines.order import Order
from pipelines.shards import ShardIndex, crc32c, parse_index, sha256
from pipelines.storage import ObjectMissing, Storage

DEFAULT_CACHE_BYTES = 256 * 2**20
_FETCH_ATTEMPTS = 3
_CLOSE_TIMEOUT_S = 30.0

# (storage, key, SHA-256) -> bytes that have this hash
Fetch = Callable[[Storage, str, str], bytes]


def fetch_verified(storage: Storage, key: str, expected_sha256: str) -> bytes:
    """The object's bytes, which have this SHA-256.

    A body that has not is fetched again, three times in all. Raises `DataError` naming the object if it is
    missing or stays wrong; `StorageError` if the storage cannot be read.
    """
    for _ in range(_FETCH_ATTEMPTS):
        try:
            data = storage.get(key)
        except ObjectMissing:
            raise DataError(
                f"{storage.uri}/{key}: is missing from its data set: restore it, or prepare the set again"
            ) from None
        found = sha256(data)
        if found == expected_sha256:
            return data
    raise DataError(
        f"{storage.uri}/{key}: is damaged or was exchanged: its {len(data)} bytes have SHA-256 {found[:16]}… "
        f"and the data set names {expected_sha256[:16]}… (fetched {_FETCH_ATTEMPTS} times)"
    )


@dataclass(frozen=True, eq=False)
class _LoadedShard:
    """The images' bytes alone, end to end: of small images, a tar is mostly headers and padding."""

    blob: bytes
    ends: NDArray[np.int64]
    index: ShardIndex

    @property
    def num_bytes(self) -> int:
        return len(self.blob) + self.ends.nbytes + self.index.num_bytes

    def image(self, row: int) -> bytes:
        end = int(self.ends[row])
        return self.blob[end - int(self.index.length[row]) : end]


class ShardReader:
    """Reads samples of one split by (shard, row).

    A shard is fetched whole, once, and kept while it fits: up to `cache_bytes` in all, and up to `max_shards`
    shards where that is given; one shard is always kept. `fetch` is where a cache of a node's disk goes in
    between. For one thread.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        *,
        max_shards: int | None = None,
        fetch: Fetch = fetch_verified,
    ) -> None:
        self._dataset = dataset
        self._shards = dataset.shards(split)
        self._fetch = fetch
        self._loaded: WeightedLRU[int, _LoadedShard] = WeightedLRU(cache_bytes, max_shards)

    @property
    def cached_bytes(self) -> int:
        return self._loaded.num_bytes

    def read(
        self, shard: int, rows: Sequence[int] | NDArray[np.int64]
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The images (uint8 `[n, C, H, W]`) and labels (int64 `[n]`, −1 for none) at these rows of a shard.

        Raises `DataError` naming the shard, and the sample's key where it is one sample's fault.
        """
        loaded = self._get(shard)
        images = np.empty((len(rows), *self._dataset.shape), dtype=np.uint8)
        for place, row in enumerate(rows):
            images[place] = self._decode(shard, loaded, int(row))
        return images, loaded.index.label[np.asarray(rows, dtype=np.int64)]

    def keys(self, shard: int) -> list[str]:
        """The keys of a shard's samples, in the stored order."""
        return list(self._get(shard).index.key.to_pylist())

    def _decode(self, shard: int, loaded: _LoadedShard, row: int) -> NDArray[np.uint8]:
        data = loaded.image(row)
        try:
            if crc32c(data) != loaded.index.crc32c[row]:
                raise ValueError("its bytes do not have the CRC32C that the index gives")
            return decode_image(data, self._dataset.shape)
        except ValueError as error:
            where = self._dataset.uri_of(self._shards[shard])
            raise DataError(f"{where}: sample {loaded.index.key[row].as_py()!r}: {error}") from None

    def _get(self, shard: int) -> _LoadedShard:
        return self._loaded.get(
            shard, lambda: self._load(self._shards[shard]), lambda loaded: loaded.num_bytes
        )

    def _load(self, shard: Shard) -> _LoadedShard:
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
            raise DataError(f"{storage.uri}/{shard.index_key}: {error}") from None
        tar = memoryview(self._fetch(*self._dataset.tar_of(shard), shard.sha256))
        spans = zip(index.offset.tolist(), index.length.tolist(), strict=True)
        blob = b"".join(tar[offset : offset + length] for offset, length in spans)
        return _LoadedShard(blob, np.cumsum(index.length), index)


def read_split(
    dataset: Dataset, split: str, start: int = 0, stop: int | None = None
) -> Iterator[tuple[str, NDArray[np.uint8], int]]:
    """Samples `start` to `stop` of a split in stored order, as (key, uint8 `[C, H, W]`, label or −1).

    One shard is held at a time, and shards before `start` are not fetched.
    """
    if start < 0 or (stop is not None and stop < start):
        raise ValueError(f"start, stop: must be 0 <= start <= stop, got {start!r}, {stop!r}")
    reader = ShardReader(dataset, split, cache_bytes=0)
    first = 0
    for number, shard in enumerate(dataset.shards(split)):
        last = first + shard.count
        rows = range(max(start, first) - first, (last if stop is None else min(stop, last)) - first)
        if len(rows):
            keys = reader.keys(number)
            for row in rows:
                images, labels = reader.read(number, [row])
                yield keys[row], images[0], int(labels[0])
        first = last


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """One stream's part of a global batch, of b samples.

    `position` int64 `[b]`: places in the stream. `index` int64 `[b]` = position·num_streams + stream: the
    key of everything random about this draw, unique over the run. `x_start` float32 `[b, C, H, W]` in [−1,
    1]. `label` int64 `[b]`, −1 for none.
    """

    stream: int
    position: torch.Tensor
    index: torch.Tensor
    x_start: torch.Tensor
    label: torch.Tensor


class StreamBatches:
    """The micro-batches of some streams, step after step, without end; read ahead by one thread.

    Step k of stream m takes its positions k·b … (k+1)·b − 1, so starting at `start_step` gives what reading
    from 0 would have given. With `flip` an image is mirrored left to right where the draw (seed, "flip",
    index) says so. Iterating yields one list a step, with a `MicroBatch` for each of `streams` in their
    order. An error of the reading thread is raised in the consumer. Use it in a `with`, or call `close()`.

    Memory: the shards that the streams stand in (within `cache_bytes`; fewer are kept and fetched again if
    they do not fit), and `prefetch` steps of decoded images.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        *,
        seed: int,
        num_streams: int,
        streams: Sequence[int],
        micro_batch_size: int,
        start_step: int = 0,
        flip: bool = False,
        prefetch: int = 2,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        fetch: Fetch = fetch_verified,
    ) -> None:
        for name, value, least in (
            ("micro_batch_size", micro_batch_size, 1),
            ("start_step", start_step, 0),
            ("prefetch", prefetch, 1),
        ):
            if value < least:
                raise ValueError(f"{name}: must be at least {least}, got {value!r}")
        if any(not 0 <= stream < num_streams for stream in streams):
            raise ValueError(f"streams: must lie in 0..{num_streams - 1}, got {list(streams)!r}")
        if dataset.count(split) == 0:
            raise DataError(f"{dataset.uri}: its split {split!r} holds no sample")
        plan = _Plan(
            order=Order([shard.count for shard in dataset.shards(split)], seed, num_streams),
            # a stream stands in one shard, or crosses to the next; it comes back to neither in this epoch
            reader=ShardReader(dataset, split, cache_bytes, max_shards=2 * len(streams), fetch=fetch),
            levels=dataset.levels,
            streams=tuple(streams),
            micro_batch_size=micro_batch_size,
            flip=flip,
        )
        self._queue: queue.Queue[list[MicroBatch] | BaseException] = queue.Queue(maxsize=prefetch)
        self._stopped = threading.Event()
        self._error: BaseException | None = None
        # the thread knows the queue and the event alone: an iterator that is forgotten can still be collected
        self._thread = threading.Thread(
            target=_produce,
            args=(plan, start_step, self._queue, self._stopped),
            name="ddpm-reader",
            daemon=True,
        )
        weakref.finalize(self, self._stopped.set)
        self._thread.start()

    def __iter__(self) -> StreamBatches:
        return self

    def __next__(self) -> list[MicroBatch]:
        if self._error is not None:
            raise self._error
        if self._stopped.is_set():
            raise StopIteration
        item = self._next_item()
        if isinstance(item, BaseException):
            self._error = item
            raise item
        return item

    def _next_item(self) -> list[MicroBatch] | BaseException:
        while True:
            try:
                return self._queue.get(timeout=1.0)
            except queue.Empty:
                # closed by another thread while this one waited
                if self._stopped.is_set():
                    raise StopIteration from None

    def close(self) -> None:
        """Stop reading ahead and wait for the thread's end. May be called again."""
        self._stopped.set()
        self._thread.join(_CLOSE_TIMEOUT_S)

    def __enter__(self) -> StreamBatches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, eq=False)
class _Plan:
    order: Order
    reader: ShardReader
    levels: int
    streams: tuple[int, ...]
    micro_batch_size: int
    flip: bool

    def batch(self, stream: int, step: int) -> MicroBatch:
        first = step * self.micro_batch_size
        position = np.arange(first, first + self.micro_batch_size, dtype=np.int64)
        where = self.order.locate(stream, position)
        images, labels = self._gather(where.shard, where.sample)
        index = torch.from_numpy(position * self.order.num_streams + stream)
        x_start = to_model(images, self.levels)
        if self.flip:
            mirrored = rng.integers(self.order.seed, "flip", index, 2).bool()
            x_start = torch.where(mirrored[:, None, None, None], x_start.flip(-1), x_start)
        return MicroBatch(stream, torch.from_numpy(position), index, x_start, torch.from_numpy(labels))

    def _gather(
        self, shard: NDArray[np.int64], row: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The samples in the order asked for, each shard visited once, in the order in which it first
        occurs.
        """
        images: NDArray[np.uint8] | None = None
        labels = np.empty(len(row), dtype=np.int64)
        for number in dict.fromkeys(shard.tolist()):
            here = shard == number
            some, labels[here] = self.reader.read(number, row[here])
            if images is None:
                images = np.empty((len(row), *some.shape[1:]), dtype=np.uint8)
            images[here] = some
        assert images is not None
        return images, labels


def _produce(
    plan: _Plan, step: int, out: queue.Queue[list[MicroBatch] | BaseException], stopped: threading.Event
) -> None:
    while not stopped.is_set():
        item: list[MicroBatch] | BaseException
        try:
            item = [plan.batch(stream, step) for stream in plan.streams]
        except BaseException as error:  # noqa: BLE001  whatever it is, the consumer must hear of it
            item = error
        while not stopped.is_set():
            try:
                out.put(item, timeout=0.1)
                break
            except queue.Full:
                continue
        if isinstance(item, BaseException):
            return
        step += 1
