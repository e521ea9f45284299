"""The state folder: what was started is on record before it starts, so that a later command finds it."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from infra.local.errors import StackError
from infra.local.layout import Stack
from infra.local.ports import USUAL_PORTS
from infra.local.process import ProcessId

_FORMAT = 1


@dataclass(frozen=True)
class Record:
    """One server on record."""

    process: ProcessId
    healthy: bool  # it has answered well once
    log_offset: int  # where this start's part of its log begins


@dataclass(frozen=True)
class State:
    """The content of `stack.json`."""

    stack_id: str  # random; every process of the stack carries it in its environment
    num_cpus: int
    ray_temp_dir: str = ""
    ports: Mapping[str, int] = field(default_factory=dict)
    records: Mapping[str, Record] = field(default_factory=dict)
    buckets_whole: bool = False  # the S3 server has all that the last snapshot held

    @classmethod
    def new(cls, num_cpus: int) -> State:
        return cls(stack_id=secrets.token_hex(16), num_cpus=num_cpus, ports=dict(USUAL_PORTS))

    def complete(self, names: Iterable[str]) -> bool:
        """True if each of the servers has answered once, and the buckets are there."""
        records = [self.records.get(name) for name in names]
        return self.buckets_whole and all(record is not None and record.healthy for record in records)

    def with_record(self, name: str, record: Record | None) -> State:
        others = {key: value for key, value in self.records.items() if key != name}
        return replace(self, records=others if record is None else {**others, name: record})

    def with_ports(self, ports: Mapping[str, int]) -> State:
        return replace(self, ports={**self.ports, **ports})

    def stack(self, state_dir: Path) -> Stack:
        return Stack(state_dir, self.stack_id, dict(self.ports), Path(self.ray_temp_dir), self.num_cpus)


def prepare(state_dir: Path) -> Path:
    """Make the folder; its absolute path.  Raises `StackError` if it can't be used."""
    folder = Path(state_dir).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (folder / "logs").mkdir(exist_ok=True)
        ignore = folder / ".gitignore"
        if not ignore.exists():
            ignore.write_text("*\n")
    except OSError as error:
        raise StackError(f"state folder {folder}: cannot be made or written ({error.strerror})") from None
    return folder


def read(state_dir: Path) -> State | None:
    """What is on record, or None.  Raises `StackError` on a file that this version can't read."""
    path = state_dir / "stack.json"
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise StackError(f"state folder {state_dir}: is not a folder") from None
    except (OSError, ValueError) as error:
        raise StackError(f"{path}: cannot be read ({error})") from None
    return _decode(found, path)


def _decode(found: Any, path: Path) -> State:
    try:
        if found["format"] != _FORMAT:
            raise StackError(
                f"{path}: format {found['format']!r}, this version reads {_FORMAT}; "
                "stop that stack with the version that started it"
            )
        records = {
            name: Record(ProcessId(**value["process"]), value["healthy"], value["log_offset"])
            for name, value in found["records"].items()
        }
        return State(
            stack_id=found["stack_id"],
            num_cpus=found["num_cpus"],
            ray_temp_dir=found["ray_temp_dir"],
            ports=found["ports"],
            records=records,
            buckets_whole=found["buckets_whole"],
        )
    except (KeyError, TypeError, AttributeError):
        raise StackError(f"{path}: is damaged; remove it once the stack's processes are gone") from None


def write(state_dir: Path, state: State) -> None:
    """Put the state on record, atomically."""
    path = state_dir / "stack.json"
    unfinished = path.with_suffix(".tmp")
    try:
        unfinished.write_text(json.dumps({"format": _FORMAT, **asdict(state)}, indent=1) + "\n")
        unfinished.replace(path)
    except OSError as error:
        raise StackError(f"{path}: cannot be written ({error.strerror})") from None


def remove(state_dir: Path) -> None:
    (state_dir / "stack.json").unlink(missing_ok=True)


@contextmanager
def locked(state_dir: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Hold the folder against another `up` or `down`; waits for one that runs."""
    descriptor = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"waiting for another command that starts or stops the stack in {state_dir}")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
