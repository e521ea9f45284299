"""What a run tells its tracking server, and the record that makes the server's copy a projection of storage.

Metrics are first of all rows of the run's own history, which is written beside its checkpoints.  The tracking
server gets the same rows as they come; what it already has (a resumed run computes the same rows again) is
not sent twice, and what it missed is sent when it answers again.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from pipelines.records import RecordError, parse_json
from pipelines.storage import ObjectMissing, Storage

TRACKING_RECORD = "mlflow.json"
TURN_RECORD = "tracker.json"

End = Literal["FINISHED", "FAILED", "KILLED"]
"""How a tracked run ended, in MLflow's words; killed: stopped by its user."""


@dataclass(frozen=True)
class Row:
    """Metrics measured after `step` steps."""

    step: int
    metrics: Mapping[str, float]


class Tracker(Protocol):
    """A run at a tracking server."""

    @property
    def run_id(self) -> str | None: ...

    def log(self, rows: Iterable[Row]) -> None:
        """Send rows, except those that the server has; never raises for a server that is away."""
        ...

    def artifact(self, path: str, data: bytes) -> None:
        """Keep a file with the run; a server that is away is warned about, not raised."""
        ...

    def finish(self, end: End) -> None: ...


class NoTracker:
    """Where no tracking server is configured."""

    run_id = None

    def log(self, rows: Iterable[Row]) -> None:
        pass

    def artifact(self, path: str, data: bytes) -> None:
        pass

    def finish(self, end: End) -> None:
        pass


@dataclass(frozen=True)
class RunDescription:
    """What a tracking server is told of a run when it begins."""

    experiment: str
    name: str
    params: Mapping[str, Any]
    """What the run is a function of; fixed for its life."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Where it runs; may change when it goes on elsewhere."""
    parent_run_id: str | None = None


class Turn:
    """Whose turn it is to tell the server of a run: that of the tracker which was opened last.

    Two trainers of one run, started twice or thought to be lost, compute the same rows, and the server would take
    both.  Each tracker writes itself into the run's storage when it is opened, and is silent once it finds another
    one there.
    """

    def __init__(self, run: Storage) -> None:
        self._run = run
        self._id = uuid.uuid4().hex
        mine = json.dumps({"tracker": self._id, "where": f"{socket.gethostname()}, process {os.getpid()}"})
        self.taken_over = not run.put_if_absent(TURN_RECORD, mine.encode())
        """Another tracker was opened before; it may have had a message on its way."""
        if self.taken_over:
            run.put(TURN_RECORD, mine.encode())

    def successor(self) -> str | None:
        """Where the tracker runs that has the turn now, or None while it is this one.

        Raises `StorageError`, and `RecordError` where the record can't be read.
        """
        try:
            tracker, where = (_word(self._run, TURN_RECORD, name) for name in ("tracker", "where"))
        except ObjectMissing:
            return None
        return None if tracker == self._id else where


class History:
    """The rows of a run in storage: one object a checkpoint interval, `history/step-000001000.json`."""

    def __init__(self, run: Storage) -> None:
        self._storage = run.child("history")

    def append(self, last_step: int, rows: list[Row]) -> None:
        """Write the rows up to `last_step`; the same interval written again replaces itself."""
        lines = [json.dumps({"step": row.step, **row.metrics}) for row in rows]
        self._storage.put(f"step-{last_step:09d}.jsonl", "\n".join(lines).encode())

    def rows(self, up_to: int | None = None) -> list[Row]:
        """All rows, by step, up to a step where one is given; the newest wins where intervals overlap.

        Raises `RecordError` naming an object that is not rows of metrics.
        """
        by_step: dict[int, dict[str, float]] = {}
        for info in self._storage.list("step-"):
            for row in parse_rows(self._storage.get(info.key), f"{self._storage.uri}/{info.key}"):
                if up_to is None or row.step <= up_to:
                    by_step.setdefault(row.step, {}).update(row.metrics)
        return [Row(step, by_step[step]) for step in sorted(by_step)]


def parse_rows(data: bytes, where: str) -> list[Row]:
    """The rows of metrics in an object, a line each; raises `RecordError` naming it where they are none."""
    rows = []
    for line in data.splitlines():
        values: Any = None
        with contextlib.suppress(RecordError):
            # a loss may be no number
            values = parse_json(line, where, finite=False)
        step = values.pop("step", None) if isinstance(values, dict) else None
        if type(step) is not int or not all(type(value) in (int, float) for value in values.values()):
            raise RecordError(f"{where}: is not rows of metrics in JSON, a line each; the object is damaged")
        rows.append(Row(step, values))
    return rows


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `section.key` → value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def open_tracker(uri: str | None, description: RunDescription, run: Storage) -> Tracker:
    """The tracker of a run: the MLflow run that it already has, or a new one; without a server none.

    The choice is recorded in the run's storage by a conditional PUT, so that a run has one MLflow run however
    often it is started.  Raises `UserError` where the server does not answer.
    """
    if not uri:
        return NoTracker()
    # mlflow takes seconds to import
    from pipelines.adapters.mlflow import open_mlflow_run

    return open_mlflow_run(uri, description, run)


@contextlib.contextmanager
def ended(tracker: Tracker) -> Iterator[None]:
    """Tell the tracking server how what is done here ended."""
    end: End = "FAILED"
    try:
        yield
        end = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        end = "KILLED"
        raise
    finally:
        tracker.finish(end)


def end_tracking(uri: str | None, run: Storage, end: End) -> None:
    """Tell the tracking server how a run ended whose process was stopped from outside.

    A worker that is being stopped may lose its neighbours first and say that it failed; whoever stopped it knows
    better.
    """
    if uri:
        from pipelines.adapters.mlflow import end_mlflow_run

        end_mlflow_run(uri, run, end)


def tracked_as(run: Storage) -> str | None:
    """The id of the MLflow run recorded in a run's storage, or None; raises `RecordError` if it can't be read."""
    try:
        return _word(run, TRACKING_RECORD, "run_id")
    except ObjectMissing:
        return None


def _word(run: Storage, key: str, name: str) -> str:
    """A field of a small record; raises `ObjectMissing`, and `RecordError` where it holds no such text."""
    where = f"{run.uri}/{key}"
    values = parse_json(run.get(key), where)
    word = values.get(name) if isinstance(values, dict) else None
    if not isinstance(word, str):
        raise RecordError(f"{where}: names no {name!r}; the object is damaged; delete it")
    return word
