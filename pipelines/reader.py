"""A run's micro-batches, step after step: located by the order, read ahead, decoded, mirrored, collated."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm_core import rng
from pipelines.bad_samples import BadSamples
from pipelines.buffers import Buffers
from pipelines.dataset import DataError, Dataset
from pipelines.handover import Handover
from pipelines.images import to_model
from pipelines.order import Order, Piece
from pipelines.shard_reader import (
    DEFAULT_CACHE_BYTES,
    Fetch,
    ShardReader,
    fetch_verified,
)
from pipelines.stages import LoadedStage, Stages
from pipelines.steps_ahead import MicroBatch, StepsAhead

__all__ = [
    "DEFAULT_CACHE_BYTES",
    "Fetch",
    "MicroBatch",
    "ShardReader",
    "StreamBatches",
    "fetch_verified",
]

_CLOSE_TIMEOUT_S = 30.0
# shards that are fetched ahead of need, of all streams together, but at least one a stream
_SHARDS_AHEAD = 3


class StreamBatches(StepsAhead):
    """The micro-batches of some streams, step after step, to `stop_step` or without end; read ahead by one thread.

    Step k of stream m takes its positions k·b … (k+1)·b − 1, so starting at `start_step` gives what reading
    from 0 would have given. No shard is fetched that is first needed at `stop_step` or later. With `flip` an image
    is mirrored left to right where the draw (seed, "flip", index) says so. Iterating yields one list a step, with a
    `MicroBatch` for each of `streams` in their order. An error of the reading thread is raised in the consumer. Use
    it in a `with`, or call `close()`.

    `as_bytes` gives the stored bytes instead of the model's numbers: a quarter of what goes to a GPU, where
    `to_model` then makes the same numbers of them. `channels_last` gives images whose channels lie innermost
    in memory, which is how they are decoded. `pin_memory` (by default where there is CUDA) makes copies to a
    GPU run on their own. `decode_threads`: see `ShardReader`.

    A sample that cannot be decoded ends the stream with its name; with `skip_bad` it has weight 0 instead, and
    `skipped` tells of it. `stages`: a user's own, which run on each decoded micro-batch in the reading thread; see
    `pipelines.stages`.

    Memory: the shards that the streams stand in and come to next (within `cache_bytes`; fewer are kept and
    fetched again if they do not fit), the memory of two more, in which the next ones will lie, and `prefetch` steps
    of decoded images.
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
        stop_step: int | None = None,
        flip: bool = False,
        prefetch: int = 4,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        fetch: Fetch = fetch_verified,
        decode_threads: int = 1,
        as_bytes: bool = False,
        channels_last: bool = False,
        pin_memory: bool | None = None,
        skip_bad: bool = False,
        stages: Sequence[LoadedStage] = (),
    ) -> None:
        for name, value, least in (
            ("micro_batch_size", micro_batch_size, 1),
            ("start_step", start_step, 0),
            ("prefetch", prefetch, 1),
            ("decode_threads", decode_threads, 1),
        ):
            if value < least:
                raise ValueError(f"{name}: must be at least {least}, got {value!r}")
        if any(not 0 <= stream < num_streams for stream in streams):
            raise ValueError(f"streams: must lie in 0..{num_streams - 1}, got {list(streams)!r}")
        if dataset.count(split) == 0:
            raise DataError(f"{dataset.uri}: its split {split!r} holds no sample")
        self.skipped = BadSamples(skip_bad)
        plan = _Plan(
            order=Order([shard.count for shard in dataset.shards(split)], seed, num_streams),
            reader=ShardReader(
                dataset,
                split,
                cache_bytes,
                # a stream stands in one shard, or crosses to the next; it comes back to neither in this epoch
                max_shards=2 * len(streams),
                fetch=fetch,
                decode_threads=decode_threads,
            ),
            bad=self.skipped,
            stages=Stages(stages, seed, len(dataset.classes)) if stages else None,
            shape=dataset.shape,
            levels=dataset.levels,
            streams=tuple(streams),
            micro_batch_size=micro_batch_size,
            stop_step=stop_step,
            flip=flip,
            as_bytes=as_bytes,
            channels_last=channels_last,
            buffers=Buffers(pin=torch.cuda.is_available() if pin_memory is None else pin_memory),
        )
        read = Handover[list[MicroBatch] | BaseException](prefetch)
        super().__init__(read, None if stop_step is None else stop_step - start_step)
        # the thread knows the handover alone: an iterator that is forgotten can still be collected
        self._thread = threading.Thread(
            target=_produce,
            args=(plan, start_step, read),
            name="ddpm-reader",
            daemon=True,
        )
        weakref.finalize(self, read.close)
        self._thread.start()

    def close(self) -> None:
        """Stop reading ahead and wait for the thread's end. May be called again."""
        super().close()
        self._thread.join(_CLOSE_TIMEOUT_S)


@dataclass(frozen=True, eq=False)
class _Plan:
    order: Order
    reader: ShardReader
    bad: BadSamples
    stages: Stages | None
    shape: tuple[int, int, int]
    levels: int
    streams: tuple[int, ...]
    micro_batch_size: int
    stop_step: int | None
    flip: bool
    as_bytes: bool
    channels_last: bool
    buffers: Buffers
    standing: dict[int, int] = field(default_factory=dict)
    """The shard that each stream was last seen in."""

    def begin(self, step: int) -> None:
        """Begin to fetch the shards that the first step needs, side by side."""
        position = step * self.micro_batch_size
        shards = (self._ahead(stream, position, 1)[0] for stream in self.streams)
        self.reader.fetch_ahead(list(dict.fromkeys(shards)), len(self.streams))

    def batch(self, stream: int, step: int) -> MicroBatch:
        first = step * self.micro_batch_size
        position = np.arange(first, first + self.micro_batch_size, dtype=np.int64)
        index = position * self.order.num_streams + stream
        pieces = list(self.order.pieces(stream, first, first + self.micro_batch_size))
        channels, height, width = self.shape
        images = self.buffers.tensor((self.micro_batch_size, height, width, channels))
        keys = None if self.stages is None else [""] * self.micro_batch_size
        label, weight = self._gather(pieces, images.numpy(), keys)
        if self.stages is not None and keys is not None:
            self.stages.apply(keys, index, images.numpy(), label, weight)
        self._look_ahead(stream, first + self.micro_batch_size - 1, pieces[-1].shard)
        if self.flip:
            mirrored = rng.integers(self.order.seed, "flip", torch.from_numpy(index), 2).bool()
            images[mirrored] = images[mirrored].flip(-2)
        return MicroBatch(
            stream,
            torch.from_numpy(position),
            torch.from_numpy(index),
            self._collated(images),
            torch.from_numpy(label),
            torch.from_numpy(weight),
        )

    def _collated(self, images: torch.Tensor) -> torch.Tensor:
        """`[b, H, W, C]` bytes as asked for: `[b, C, H, W]`, which is the same memory, or put in order."""
        if not self.channels_last:
            # before bytes become numbers, which are four times as many bytes
            batch, height, width, channels = images.shape
            ordered = self.buffers.tensor((batch, channels, height, width))
            np.copyto(ordered.numpy(), images.numpy().transpose(0, 3, 1, 2))
            images = ordered
        if not self.as_bytes:
            images = to_model(images, self.levels, self.buffers.tensor(tuple(images.shape), torch.float32))
        return images.permute(0, 3, 1, 2) if self.channels_last else images

    def _gather(
        self, pieces: Sequence[Piece], images: NDArray[np.uint8], keys: list[str] | None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The samples into `images`, in their order. Returns their labels and weights; their keys go into `keys`,
        where it is a list.
        """
        label = np.empty(len(images), dtype=np.int64)
        weight = np.ones(len(images), dtype=np.float32)
        first = np.cumsum([0, *(len(piece.rows) for piece in pieces)]).tolist()
        turn = {piece.shard: number for number, piece in reversed(list(enumerate(pieces)))}
        # pieces of one shard, which epochs put apart, in one go: it may be gone when others have been read
        for start, piece in sorted(
            zip(first, pieces, strict=False), key=lambda placed: turn[placed[1].shard]
        ):
            here = slice(start, start + len(piece.rows))
            label[here], bad = self.reader.read_into(piece.shard, piece.rows, images[here])
            if bad:
                weight[here][np.isin(piece.rows, [sample.row for sample in bad])] = 0
                self.bad.add(bad)
            if keys is not None:
                keys[here] = self.reader.keys_of(piece.shard, piece.rows)
        return label, weight

    def _ahead(self, stream: int, position: int, limit: int) -> list[int]:
        stop = None if self.stop_step is None else self.stop_step * self.micro_batch_size
        return self.order.shards_ahead(stream, position, limit, stop)

    def _look_ahead(self, stream: int, position: int, shard: int) -> None:
        """Where a stream has come to another shard, begin to fetch those that it comes to next."""
        if self.standing.get(stream) == shard:
            return
        self.standing[stream] = shard
        depth = max(1, _SHARDS_AHEAD // len(self.streams))
        coming = self._ahead(stream, position, depth + 1)[1:]
        # what no stream stands in or comes to next is not read again for long
        self.reader.retain({*self.standing.values(), *coming})
        self.reader.fetch_ahead(coming, len(self.streams))


def _produce(plan: _Plan, step: int, out: Handover[list[MicroBatch] | BaseException]) -> None:
    try:
        _read_steps(plan, step, out)
    finally:
        out.flush()
        plan.reader.close()


def _read_steps(plan: _Plan, step: int, out: Handover[list[MicroBatch] | BaseException]) -> None:
    begun = False
    while not out.closed and (plan.stop_step is None or step < plan.stop_step):
        item: list[MicroBatch] | BaseException
        try:
            if not begun:
                plan.begin(step)
                begun = True
            item = [plan.batch(stream, step) for stream in plan.streams]
        except BaseException as error:  # noqa: BLE001  whatever it is, the consumer must hear of it
            item = error
        if not out.put(item) or isinstance(item, BaseException):
            return
        step += 1
