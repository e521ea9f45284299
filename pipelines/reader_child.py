"""The program of a process that reads, and what it and the process that trains tell each other.

It ends with the process that trains, at once and in the midst of whatever it does: all that it writes, in the cache
on disk, stands that.
"""

from __future__ import annotations

import logging
import logging.handlers
import mmap
import os
import select
import signal
import threading
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines import bad_samples
from pipelines.errors import UserError
from pipelines.reading import Reading
from pipelines.shard_reader import BadSample
from pipelines.steps_ahead import MicroBatch

# steps that it has ready beside those in the memory that the two share
AHEAD = 2


class Task(NamedTuple):
    """What it is told first; then it is told each slot that is free. `levels`: of loggers, by their names."""

    reading: Reading
    num_slots: int
    levels: dict[str, int]


@dataclass(frozen=True, eq=False)
class Part:
    """A `MicroBatch` without its images."""

    stream: int
    position: NDArray[np.int64]
    index: NDArray[np.int64]
    label: NDArray[np.int64]
    weight: NDArray[np.float32]


class Step(NamedTuple):
    """A step whose images lie in a slot, and the bad samples that were newly met."""

    slot: int
    parts: list[Part]
    bad: list[BadSample]


def slots(memory: int, reading: Reading, num_slots: int, *, writable: bool) -> NDArray[Any]:
    """The shared memory, one step's images a slot."""
    shape, dtype = reading.layout
    numbers = np.dtype(str(dtype).removeprefix("torch."))
    access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
    shared = mmap.mmap(memory, num_slots * reading.step_bytes, access=access)
    return np.frombuffer(shared, numbers).reshape(num_slots, *shape)


class _Parent(logging.handlers.QueueHandler):
    """The process that trains, to which log records go, too. Without it there is nothing to do any more."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(None)  # type: ignore[arg-type]  # `enqueue` knows where
        self._connection = connection
        self._lock = threading.Lock()
        threading.Thread(target=self._end_with_it, name="ddpm-parent", daemon=True).start()

    def _end_with_it(self) -> None:
        poll = select.poll()
        poll.register(self._connection.fileno(), select.POLLRDHUP)
        poll.poll()
        os._exit(0)

    def tell(self, thing: object) -> None:
        try:
            with self._lock:
                self._connection.send(thing)
        except OSError:
            os._exit(0)

    def hear(self) -> Any:
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            os._exit(0)

    def enqueue(self, record: logging.LogRecord) -> None:
        self.tell(record)


def main(connection: int, memory: int) -> None:
    """`connection`, `memory`: the files that it inherits."""
    # who interrupts the whole group means the process that trains
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for inherited in (connection, memory):
        # what a user's stage starts must not keep them open
        os.set_inheritable(inherited, False)
    parent = _Parent(Connection(connection))
    torch.set_num_threads(1)
    task: Task = parent.hear()
    logging.getLogger().addHandler(parent)
    for name, level in task.levels.items():
        logging.getLogger(name).setLevel(level)
    # the other process tells of them, since it knows what was told before
    bad_samples.log.disabled = True
    try:
        _read(task.reading, slots(memory, task.reading, task.num_slots, writable=True), parent)
    except BaseException as error:  # noqa: BLE001  whatever it is, the consumer must hear of it
        parent.tell(_portable(error))


def _read(reading: Reading, room: NDArray[Any], parent: _Parent) -> None:
    listed = 0
    with reading.in_thread(prefetch=AHEAD, pin_memory=False) as steps:
        for parts in steps:
            slot = parent.hear()
            for place, part in zip(np.split(room[slot], len(parts)), parts, strict=True):
                x_start = part.x_start.permute(0, 2, 3, 1) if reading.for_gpu else part.x_start
                np.copyto(place, x_start.numpy())
            bad = list(steps.skipped.samples.values())[listed:]
            listed += len(bad)
            parent.tell(Step(slot, [_without_images(part) for part in parts], bad))


def _without_images(part: MicroBatch) -> Part:
    numbers = (part.position, part.index, part.label, part.weight)
    return Part(part.stream, *(tensor.numpy() for tensor in numbers))


def _portable(error: BaseException) -> BaseException:
    """The error as it crosses to the other process: a bug's as the text that shows where it was raised, since not
    every exception can be sent.
    """
    if isinstance(error, UserError):
        return error
    return RuntimeError(
        f"{type(error).__name__}: {error}\nin the process that reads:\n{traceback.format_exc()}"
    )
