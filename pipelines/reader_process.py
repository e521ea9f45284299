"""Reading in a process of its own, beside the one that trains.

A thread that decodes small images holds the interpreter's lock most of the time. That costs nothing while a CPU
multiplies matrices; a thread that starts a GPU's kernels one by one waits for the lock at each of them. Another
process leaves this one's lock alone; each step's images come through memory that the two share.

The order is a pure function of the step, so that a reading process that is lost is started again where it was.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import weakref
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from pipelines.bad_samples import BadSamples
from pipelines.buffers import Buffers
from pipelines.errors import UserError, one_line
from pipelines.reader_child import AHEAD, Step, Task, slots
from pipelines.reading import Reading
from pipelines.steps_ahead import MicroBatch, StepsAhead

log = logging.getLogger(__name__)

_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from pipelines.reader_child import main; main(*map(int, sys.argv[2:]))"
)
# steps that are ready
PREFETCH = 4
_CLOSE_TIMEOUT_S = 3.0
# how often to look after one that says nothing
_LOOK_S = 5.0
# so often, with fewer than so many steps since it was lost the last time
_STARTED_AGAIN = 3
_STEPS_OF_PEACE = 100


class ReaderLost(UserError):
    """The process that reads ended again and again; it may be another matter on another machine."""

    exit_code = 1


def steps_in_memory(reading: Reading) -> int:
    """How many steps' images there are at most while `begin` reads: ready, being made, and in use."""
    return PREFETCH + 2 + (AHEAD + 1 if reading.data.reader == "process" else 0)


def begin(reading: Reading, *, prefetch: int = PREFETCH) -> StepsAhead:
    """Read as `data.reader` says, `prefetch` steps ahead; by a process some more.

    Raises `UserError` where this machine has no such processes.
    """
    if reading.data.reader == "process":
        return ProcessBatches(reading, prefetch=prefetch)
    return reading.in_thread(prefetch=prefetch, pin_memory=reading.for_gpu)


class ProcessBatches(StepsAhead):
    """What `reading.in_thread()` gives, read by another process.

    Its errors are raised here, what it logs is logged here when the next step is asked for, and it ends with this
    process, however that ends. Where it is lost, or stopped, another is started, which goes on at the next step;
    when that happens again and again `ReaderLost` is raised. Memory: a second interpreter (some 300 MB), what
    `StreamBatches` takes, and the images of `prefetch` steps.
    """

    def __init__(self, reading: Reading, *, prefetch: int = PREFETCH) -> None:
        self.skipped = BadSamples(reading.data.on_bad_sample == "skip")
        try:
            source = _Process(reading, prefetch, self.skipped)
        except (OSError, AttributeError) as error:  # a system that knows no memory without a file, say
            raise UserError(
                f"data.reader: no other process can read here ({one_line(error)}); set it to thread"
            ) from None
        super().__init__(source, reading.num_steps)


class _Process:
    """The `Source` of steps that another process reads."""

    def __init__(self, reading: Reading, num_slots: int, skipped: BadSamples) -> None:
        self._reading = reading
        self._skipped = skipped
        self._step = reading.start_step
        self._times_lost = self._lost_at = 0
        self._closed = False
        # not in a file of /dev/shm, of which a container may have little
        self._memory = os.memfd_create("ddpm-batches")
        weakref.finalize(self, os.close, self._memory)
        os.ftruncate(self._memory, num_slots * reading.step_bytes)
        self._slots = slots(self._memory, reading, num_slots, writable=False)
        self._buffers = Buffers(pin=reading.for_gpu)
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            handles = (theirs.fileno(), self._memory)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, json.dumps(_path()), *map(str, handles)],
                pass_fds=handles,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
                stdin=subprocess.DEVNULL,
                # an interruption in a terminal is this process's alone
                start_new_session=True,
            )
            self._connection = Connection(ours.detach())
        self._end = weakref.finalize(self, _end, self._process, self._connection)
        levels = {name: logging.getLogger(name).getEffectiveLevel() for name in ("root", "pipelines")}
        self._tell(Task(replace(self._reading, start_step=self._step), len(self._slots), levels))
        for slot in range(len(self._slots)):
            self._tell(slot)

    def get(self) -> list[MicroBatch] | BaseException:
        while not self._closed:
            try:
                told = self._hear()
            except (EOFError, OSError):
                if not self._closed and (lost := self._lost()) is not None:
                    return lost
                continue
            if isinstance(told, logging.LogRecord):
                logging.getLogger(told.name).handle(told)
            elif isinstance(told, Step):
                return self._taken(told)
            else:
                assert isinstance(told, BaseException)
                return told
        raise StopIteration

    def _hear(self) -> Any:
        """Raises `EOFError` or `OSError` where nothing more is to come."""
        while not self._connection.poll(_LOOK_S):
            # one that has ended may have left its end of the connection to another process
            if self._process.poll() is not None or _is_stopped(self._process.pid):
                self._process.kill()
                raise EOFError
        return self._connection.recv()

    def _lost(self) -> ReaderLost | None:
        """Start another one, unless that was done too often."""
        self._end()
        if self._step >= self._lost_at + _STEPS_OF_PEACE:
            self._times_lost = 0
        self._times_lost, self._lost_at = self._times_lost + 1, self._step
        why = _why(self._process.returncode)
        if self._times_lost > _STARTED_AGAIN:
            return ReaderLost(
                f"{self._reading.dataset.uri}: the process that reads it ended {self._times_lost} times, at last "
                f"at step {self._step} ({why}): look at the machine's memory and, if there are any, at data.stages"
            )
        log.warning("the process that reads ended (%s); another goes on at step %d", why, self._step)
        try:
            self._start()
        except OSError as error:  # no memory for it, say
            return ReaderLost(
                f"{self._reading.dataset.uri}: the process that reads it ended ({why}), and another can't be "
                f"started ({one_line(error)})"
            )
        return None

    def _taken(self, step: Step) -> list[MicroBatch]:
        """Copied, since what a GPU's copy reads, or a consumer keeps, must not be written to."""
        images = self._buffers.tensor(*self._reading.layout)
        np.copyto(images.numpy(), self._slots[step.slot])
        self._tell(step.slot)
        self._step += 1
        self._skipped.count += sum(int(np.count_nonzero(part.weight == 0)) for part in step.parts)
        self._skipped.note(step.bad)
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

    def _tell(self, thing: object) -> None:
        """If it is lost, waiting for the next step finds that out."""
        with contextlib.suppress(OSError):
            self._connection.send(thing)

    def close(self) -> None:
        self._closed = True
        self._end()


def _path() -> list[str]:
    """Where this process finds modules; an empty entry is the working directory."""
    return [entry or str(Path.cwd()) for entry in sys.path if isinstance(entry, str)]


def _is_stopped(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        return False


def _why(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"by signal {-code}, {signal.Signals(-code).name}"


def _end(process: subprocess.Popen[bytes], connection: Connection) -> None:
    connection.close()
    try:
        # it ends at once, unless it is stopped
        process.wait(_CLOSE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
