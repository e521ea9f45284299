"""Processes of the stack: started in a session of their own, known again by id, stopped with all they started.

A process is ours if it has the recorded id and start time, or if it carries the stack's mark in its environment.
The mark is inherited, so it also finds what lost its parent (a worker whose Ray head was killed); a process id
that was given to another program has neither.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

STACK_MARK = "DDPM_STACK_ID"
COMPONENT_MARK = "DDPM_STACK_COMPONENT"

_MAX_LOG_BYTES = 20_000_000
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_TELLING = re.compile(r"error|exception|fail|denied|refused|in use|not found|cannot|no such", re.IGNORECASE)

# Popen objects of servers that outlive this program: kept so that their end can be collected, and so that
# none is finalised with a warning that it still runs
_started: list[subprocess.Popen[bytes]] = []


@dataclass(frozen=True)
class ProcessId:
    """A process id that can't be mistaken for a later process with the same number."""

    pid: int
    create_time: float  # seconds since the epoch, as psutil tells it


def start(argv: Sequence[str], *, env: Mapping[str, str], cwd: Path, log: Path) -> ProcessId:
    """Start a server whose output is appended to `log`; Ctrl-C in this terminal does not reach it."""
    if log.exists() and log.stat().st_size > _MAX_LOG_BYTES:
        log.replace(log.with_suffix(".old.log"))
    with log.open("ab") as output:
        output.write(f"--- started {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
        output.flush()
        child = subprocess.Popen(
            list(argv),
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    _started.append(child)
    try:
        return ProcessId(child.pid, psutil.Process(child.pid).create_time())
    except psutil.NoSuchProcess:
        return ProcessId(child.pid, 0.0)


def running(identity: ProcessId, stack_id: str) -> psutil.Process | None:
    """The process if it still runs and is ours."""
    for child in _started:
        child.poll()
    try:
        process = psutil.Process(identity.pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        # a second of tolerance: the start time is told relative to a clock that may be set
        if abs(process.create_time() - identity.create_time) < 1:
            return process
        return process if process.environ().get(STACK_MARK) == stack_id else None
    except psutil.Error:
        return None


def family(stack_id: str, *, component: str | None = None) -> list[psutil.Process]:
    """Every live process that carries the stack's mark (and the component's), and whatever these started."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            environ = process.environ()
        except (psutil.Error, OSError):
            continue
        if environ.get(STACK_MARK) == stack_id and component in (None, environ.get(COMPONENT_MARK)):
            found[process.pid] = process
            for descendant in _descendants(process):
                found[descendant.pid] = descendant
    # a job of the stack may be what is stopping it
    found.pop(os.getpid(), None)
    return [process for process in found.values() if _alive(process)]


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.Error:
        return []


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def stop(stack_id: str, *, component: str, first: ProcessId | None, grace_s: float) -> list[psutil.Process]:
    """Stop a component: SIGTERM to its first process, `grace_s` for all to end, SIGKILL to what remains.

    Returns what could not be ended.
    """
    members = {process.pid: process for process in family(stack_id, component=component)}
    parent = running(first, stack_id) if first else None
    if parent is not None:
        members.update({process.pid: process for process in (parent, *_descendants(parent))})
        _signal(parent, "terminate")
        _wait(members.values(), grace_s)
    for _ in range(5):
        # again and again: a process may have started another between the look and the signal
        members.update({process.pid: process for process in family(stack_id, component=component)})
        remaining = [process for process in members.values() if _alive(process)]
        if not remaining:
            return []
        for process in remaining:
            _signal(process, "kill")
        _wait(remaining, 5.0)
    return [process for process in members.values() if _alive(process)]


def _signal(process: psutil.Process, what: str) -> None:
    # psutil refuses to signal a process whose id was given to another one
    with suppress(psutil.Error):
        getattr(process, what)()


def _wait(processes: Iterable[psutil.Process], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    left = list(processes)
    while left and time.monotonic() < deadline:
        for child in _started:
            child.poll()
        left = [process for process in left if _alive(process)]
        time.sleep(0.05)


def listening_ports(process: psutil.Process) -> set[int]:
    """TCP ports on which the process or one of its descendants listens."""
    found: set[int] = set()
    for member in (process, *_descendants(process)):
        try:
            connections = member.net_connections(kind="tcp")
        except psutil.Error:
            continue
        found.update(c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN)
    return found


def telling_line(log: Path, offset: int) -> str:
    """The last line of the log from `offset` on that speaks of an error, else the last line; "" if none."""
    try:
        with log.open("rb") as file:
            file.seek(max(offset, log.stat().st_size - 65536))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    lines = [_ANSI.sub("", line).strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("--- started")]
    for line in reversed(lines):
        if _TELLING.search(line):
            return line[:300]
    return lines[-1][:300] if lines else ""
