"""Reading in a process of its own, beside the one that trains.

A thread that decodes small images holds the interpreter's lock most of the time. That costs nothing while a CPU
multiplies matrices; a thread that starts a GPU's kernels waits for the lock at each of them, and loses more time
than the reading takes. So where a GPU trains, another process reads, and this one takes each step's images from
memory that the two share.

The order is a pure function of the step, so that a reading process that is lost is started again where it was.
"""

from __future__ import annotations

import logging
import logging.handlers
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.bad_samples import BadSamples
from pipelines.buffers import Buffers
from pipelines.config_sections import DataConfig
from pipelines.dataset import Dataset
from pipelines.disk_cache import fetch_through
from pipelines.errors import UserError
from pipelines.reader import StreamBatches
from pipelines.shard_reader import BadSample
from pipelines.stages import load_stages
from pipelines.steps_ahead import MicroBatch, StepsAhead

log = logging.getLogger(__name__)

_PROGRAM = "import sys; from pipelines.reader_process import main; main(*map(int, sys.argv[1:]))"
_OURS = "pipelines"
_CLOSE_TIMEOUT_S = 10.0
# so often one after the other, without a step in between
_STARTED_AGAIN = 3
# steps that the reading process has ready beside those in the memory that the two share
_AHEAD = 2


class ReaderLost(UserError):
    """The process that reads ended again and again; it may be another matter on another machine."""

    exit_code = 1


@dataclass(frozen=True)
class Reading:
    """What a worker of a run reads; plain values, which another process takes.

    `for_gpu`: images as bytes, with the channels innermost in memory, the form in which most of what is left to do
    can be done on a GPU; else as the model's numbers. Other fields: see `StreamBatches`.
    """

    dataset: Dataset
    split: str
    data: DataConfig
    seed: int
    num_streams: int
    streams: tuple[int, ...]
    micro_batch_size: int
    start_step: int = 0
    stop_step: int | None = None
    for_gpu: bool = False

    def begin(self, *, prefetch: int = 4) -> StepsAhead:
        """Read as `data.reader` says; up to `prefetch` steps lie ready."""
        if self.data.reader == "process" or (self.data.reader == "auto" and self.for_gpu):
            return ProcessBatches(self, prefetch=prefetch)
        return self.in_thread(prefetch=prefetch, pin_memory=self.for_gpu)

    def in_thread(self, *, prefetch: int, pin_memory: bool) -> StreamBatches:
        data = self.data
        return StreamBatches(
            self.dataset,
            self.split,
            seed=self.seed,
            num_streams=self.num_streams,
            streams=self.streams,
            micro_batch_size=self.micro_batch_size,
            start_step=self.start_step,
            stop_step=self.stop_step,
            flip=data.flip,
            prefetch=prefetch,
            cache_bytes=data.cache_bytes,
            fetch=fetch_through(data.disk_cache, data.disk_cache_bytes, self.dataset.storage),
            decode_threads=data.decode_threads,
            as_bytes=self.for_gpu,
            channels_last=self.for_gpu,
            pin_memory=pin_memory,
            skip_bad=data.on_bad_sample == "skip",
            stages=load_stages(data.stages),
        )

    @property
    def num_steps(self) -> int | None:
        return None if self.stop_step is None else self.stop_step - self.start_step

    @property
    def layout(self) -> tuple[tuple[int, ...], torch.dtype]:
        """Of a step's images as they lie in memory, those of all streams one after the other."""
        channels, height, width = self.dataset.shape
        count = len(self.streams) * self.micro_batch_size
        if self.for_gpu:
            return (count, height, width, channels), torch.uint8
        return (count, channels, height, width), torch.float32


class ProcessBatches(StepsAhead):
    """What `reading.in_thread()` gives, read by another process.

    Its errors are raised here, what it logs is logged here, and it ends with this one, however that ends. Where it
    is lost another is started, which goes on at the next step; when that happens again and again `ReaderLost` is
    raised. Memory: beside what `StreamBatches` takes, `prefetch` steps of images, and a second interpreter.
    """

    def __init__(self, reading: Reading, *, prefetch: int = 4) -> None:
        self.skipped = BadSamples(reading.data.on_bad_sample == "skip")
        super().__init__(_Process(reading, prefetch, self.skipped), reading.num_steps)


@dataclass(frozen=True, eq=False)
class _Part:
    """A `MicroBatch` without its images."""

    stream: int
    position: NDArray[np.int64]
    index: NDArray[np.int64]
    label: NDArray[np.int64]
    weight: NDArray[np.float32]


class _Step(NamedTuple):
    """A step whose images lie in a slot of the shared memory, and the bad samples met since the last one."""

    slot: int
    parts: list[_Part]
    num_bad: int
    bad: list[BadSample]


class _Order(NamedTuple):
    """What the reading process is told at its start."""

    reading: Reading
    num_slots: int
    log_level: int


class _Process:
    """The `Source` of steps that another process reads."""

    def __init__(self, reading: Reading, num_slots: int, skipped: BadSamples) -> None:
        self._reading = reading
        self._skipped = skipped
        self._step = reading.start_step
        self._times_lost = 0
        self._closed = False
        # not in a file of /dev/shm, of which a container may have little
        self._memory = os.memfd_create("ddpm-batches")
        weakref.finalize(self, os.close, self._memory)
        self._slots = _slots(self._memory, reading, num_slots)
        self._buffers = Buffers(pin=reading.for_gpu)
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            handles = (theirs.fileno(), self._memory)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, *map(str, handles)],
                pass_fds=handles,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                # an interruption in a terminal is this process's alone
                start_new_session=True,
            )
        self._connection = Connection(ours.detach())
        self._end = weakref.finalize(self, _end, self._process, self._connection)
        level = logging.getLogger(_OURS).getEffectiveLevel()
        order = _Order(replace(self._reading, start_step=self._step), len(self._slots), level)
        self._send(order, *range(len(self._slots)))

    def get(self) -> list[MicroBatch] | BaseException:
        while not self._closed:
            try:
                told = self._connection.recv()
            except (EOFError, ConnectionError):
                if (lost := self._lost()) is not None:
                    return lost
                continue
            if isinstance(told, logging.LogRecord):
                logging.getLogger(told.name).handle(told)
            elif isinstance(told, _Step):
                return self._taken(told)
            else:
                assert isinstance(told, BaseException)
                return told
        raise StopIteration

    def _lost(self) -> ReaderLost | None:
        """Start another one, unless that was done too often."""
        self._end()
        self._times_lost += 1
        why = _why(self._process.returncode)
        if self._times_lost > _STARTED_AGAIN:
            return ReaderLost(
                f"{self._reading.dataset.uri}: the process that reads it ended {self._times_lost} times at step "
                f"{self._step} ({why}); with data.reader=thread none is needed"
            )
        log.warning("the process that reads ended (%s); another goes on at step %d", why, self._step)
        self._start()
        return None

    def _taken(self, step: _Step) -> list[MicroBatch]:
        """Copied, since what a GPU's copy reads, or a consumer keeps, must not be written to."""
        images = self._buffers.tensor(*self._reading.layout)
        np.copyto(images.numpy(), self._slots[step.slot])
        self._send(step.slot)
        self._step += 1
        self._times_lost = 0
        self._skipped.met(step.num_bad, step.bad)
        if self._reading.for_gpu:
            images = images.permute(0, 3, 1, 2)
        return [
            MicroBatch(
                part.stream,
                torch.from_numpy(part.position),
                torch.from_numpy(part.index),
                x_start,
                torch.from_numpy(part.label),
                torch.from_numpy(part.weight),
            )
            for part, x_start in zip(step.parts, images.split(self._reading.micro_batch_size), strict=True)
        ]

    def _send(self, *things: object) -> None:
        """If it is lost, asking it for the next step finds that out."""
        try:
            for thing in things:
                self._connection.send(thing)
        except ConnectionError:
            pass

    def close(self) -> None:
        self._closed = True
        self._end()


def _slots(memory: int, reading: Reading, num_slots: int) -> NDArray[Any]:
    shape, dtype = reading.layout
    numbers = np.dtype(str(dtype).removeprefix("torch."))
    num_bytes = num_slots * int(np.prod(shape)) * numbers.itemsize
    os.ftruncate(memory, num_bytes)
    return np.frombuffer(mmap.mmap(memory, num_bytes), numbers).reshape(num_slots, *shape)


def _environment() -> Mapping[str, str]:
    """This process's, with the modules that it finds, and without a GPU."""
    path = os.pathsep.join(filter(None, sys.path))
    return {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}


def _why(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"by signal {-code}, {signal.Signals(-code).name}"


def _end(process: subprocess.Popen[bytes], connection: Connection) -> None:
    connection.close()
    try:
        process.wait(_CLOSE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class _Gone(Exception):
    """The process that trains wants no more, or is no more."""


class _Parent(logging.handlers.QueueHandler):
    """The process that trains, as the reading one sees it; a log record that is emitted goes there, too."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(None)  # type: ignore[arg-type]  # `enqueue` knows where
        self._connection = connection
        self._lock = threading.Lock()

    def tell(self, thing: object) -> None:
        try:
            with self._lock:
                self._connection.send(thing)
        except ConnectionError:
            raise _Gone from None

    def hear(self) -> Any:
        try:
            return self._connection.recv()
        except (EOFError, ConnectionError):
            raise _Gone from None

    def enqueue(self, record: logging.LogRecord) -> None:
        self.tell(record)


def main(connection: int, memory: int) -> None:
    """The reading process. `connection`, `memory`: what it inherits."""
    parent = _Parent(Connection(connection))
    torch.set_num_threads(1)
    try:
        order: _Order = parent.hear()
        logger = logging.getLogger(_OURS)
        logger.addHandler(parent)
        logger.setLevel(order.log_level)
        logger.propagate = False
        _read(order.reading, _slots(memory, order.reading, order.num_slots), parent)
    except _Gone:
        pass
    except BaseException as error:  # noqa: BLE001  whatever it is, the consumer must hear of it
        parent.tell(_portable(error))


def _read(reading: Reading, slots: NDArray[Any], parent: _Parent) -> None:
    listed = 0
    with reading.in_thread(prefetch=_AHEAD, pin_memory=False) as steps:
        for parts in steps:
            slot = parent.hear()
            for room, part in zip(np.split(slots[slot], len(parts)), parts, strict=True):
                x_start = part.x_start.permute(0, 2, 3, 1) if reading.for_gpu else part.x_start
                np.copyto(room, x_start.numpy())
            bad = list(steps.skipped.samples.values())[listed:]
            listed += len(bad)
            parent.tell(_Step(slot, [_without_images(part) for part in parts], steps.skipped.count, bad))


def _without_images(part: MicroBatch) -> _Part:
    numbers = (part.position, part.index, part.label, part.weight)
    return _Part(part.stream, *(tensor.numpy() for tensor in numbers))


def _portable(error: BaseException) -> BaseException:
    """The error as it crosses to the other process: a bug's as the text that shows where it was raised, since not
    every exception can be sent.
    """
    if isinstance(error, UserError):
        return error
    return RuntimeError(
        f"{type(error).__name__}: {error}\nin the process that reads:\n{traceback.format_exc()}"
    )
