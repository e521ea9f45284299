"""Checkpoints: safetensors and JSON under `checkpoints/step-000001000/`, with the commit record last.

The objects are written first, under names that carry the attempt; then `commit.json`, by one conditional PUT,
names them with size and SHA-256.  Readers start from commit records only, so a checkpoint is whole or not
there, and of two writers of one step the first wins.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import safetensors.torch
from pydantic import BaseModel, BeforeValidator, ConfigDict
from safetensors import SafetensorError
from torch import Tensor

from pipelines.errors import one_line
from pipelines.records import (
    ObjectRecord,
    RecordError,
    commit_first,
    put_recorded,
    read_checked,
    read_record,
)
from pipelines.storage import ObjectMissing, Storage, open_storage

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
COMMIT = "commit.json"
_STEP = re.compile(r"^step-(\d{9,})/commit\.json$")

Read = TypeVar("Read")


class CheckpointError(RecordError):
    """A checkpoint is missing, damaged, or of a format that this version does not read."""


# JSON has no word for what is no number, and pydantic writes null
Metric = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]


class Commit(BaseModel):
    """The commit record of a checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int
    kind: str = "ddpm-checkpoint"
    step: int
    seed: int
    run: str
    dataset: str
    """Identity of the data set."""
    objects: dict[str, ObjectRecord]
    config: dict[str, Any]
    """The resolved configuration that the step was taken under."""
    metrics: dict[str, Metric]
    versions: dict[str, str]

    @property
    def held_out(self) -> float | None:
        """Held-out bits/dim of the averaged weights, where it was measured at this step."""
        value = self.metrics.get("held_out/total", math.nan)
        return value if math.isfinite(value) else None


@dataclass(frozen=True)
class State:
    """What a run is at a step: named groups of tensors (weights, ema, optimizer and what else registers)."""

    step: int
    groups: dict[str, dict[str, Tensor]]


class Checkpoint:
    """A committed checkpoint in storage."""

    def __init__(self, storage: Storage, commit: Commit) -> None:
        self._storage = storage
        self.commit = commit

    @property
    def uri(self) -> str:
        return self._storage.uri

    @property
    def step(self) -> int:
        return self.commit.step

    @property
    def identity(self) -> str:
        """SHA-256 over the hashes of its weights: what samples made from it depend on."""
        parts = [f"{name}:{record.sha256}" for name, record in sorted(self.commit.objects.items())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def read(self, group: str) -> dict[str, Tensor]:
        """The tensors of one group, checked by size and SHA-256; raises `CheckpointError`."""
        record = self.commit.objects.get(group)
        if record is None:
            raise CheckpointError(f"{self.uri}: holds no {group!r}, only {', '.join(self.commit.objects)}")
        data = read_checked(self._storage, record, CheckpointError)
        return _tensors(data, f"{self.uri}/{record.key}")

    def read_all(self) -> State:
        return State(self.step, {group: self.read(group) for group in self.commit.objects})

    def check(self) -> Checkpoint:
        """Itself, every object of it checked by size and SHA-256, one at a time; raises `CheckpointError`."""
        for record in self.commit.objects.values():
            read_checked(self._storage, record, CheckpointError)
        return self


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, run: Storage) -> None:
        self._storage = run.child("checkpoints")

    def steps(self) -> list[int]:
        """Steps with a commit record, rising."""
        found = (_STEP.match(info.key) for info in self._storage.list("step-"))
        return sorted(int(match[1]) for match in found if match)

    def open(self, step: int) -> Checkpoint:
        return open_checkpoint(self._storage.child(step_name(step)))

    def save(self, state: State, record: dict[str, Any]) -> Checkpoint:
        """Write the state and commit it; `record` holds the commit's other fields.

        Returns the checkpoint that stands at this step: this one, or the one of another attempt that was
        committed first, whose run is the same function of the same configuration.
        """
        storage = self._storage.child(step_name(state.step))
        attempt = uuid.uuid4().hex[:12]
        parts = (
            (f"{group}-{attempt}.safetensors", _to_bytes(tensors)) for group, tensors in state.groups.items()
        )
        objects = dict(zip(state.groups, put_recorded(storage, parts), strict=True))
        commit = Commit(format_version=FORMAT_VERSION, step=state.step, objects=objects, **record)
        standing = commit_first(storage, COMMIT, commit, objects.values(), lambda: _readable(storage))
        if standing is None:
            return Checkpoint(storage, commit)
        log.warning("%s was committed by another attempt first; that one stands", storage.uri)
        return standing

    def newest(self) -> State | None:
        """The newest state that can be read whole, or None; a damaged one is passed over with a warning."""
        return self._newest(Checkpoint.read_all)

    def newest_whole(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, or None, likewise; holds no more than one object in memory."""
        return self._newest(Checkpoint.check)

    def _newest(self, read: Callable[[Checkpoint], Read]) -> Read | None:
        for step in reversed(self.steps()):
            try:
                return read(self.open(step))
            except CheckpointError as error:
                log.warning("passed over a damaged checkpoint: %s", error)
        return None

    def commits(self) -> list[Commit]:
        """The commit records, by rising step."""
        return [self.open(step).commit for step in self.steps()]

    def prune(self, keep: int) -> None:
        """Delete all but the `keep` newest checkpoints and the best one.

        The commit record goes first, so that a reader never meets a commit without its objects.  What killed
        attempts left beside a commit goes as well; what lies where there is no commit may be about to get one.
        A commit record that can't be read stays, with a warning, and with all that lies beside it.
        """
        commits: list[Commit] = []
        for step in self.steps():
            try:
                commits.append(self.open(step).commit)
            except CheckpointError as error:
                log.warning("left a damaged checkpoint where it is: %s", error)
        if not commits:
            return
        kept = kept_steps([(commit.step, measured(commit, commits[-1])) for commit in commits], keep)
        doomed = [commit.step for commit in commits if commit.step not in kept]
        self._storage.delete(f"{step_name(step)}/{COMMIT}" for step in doomed)
        named = {
            f"{step_name(commit.step)}/{record.key}"
            for commit in commits
            if commit.step in kept
            for record in commit.objects.values()
        }
        named |= {f"{step_name(step)}/{COMMIT}" for step in kept}
        committed = {step_name(commit.step) for commit in commits}
        self._storage.delete(
            info.key
            for info in self._storage.list("step-")
            if info.key not in named and info.key.split("/")[0] in committed
        )


def measured(commit: Commit, newest: Commit) -> float | None:
    """The held-out bits/dim of a commit if it was measured as the newest one's, with which it may be compared."""
    return commit.held_out if commit.config.get("bound") == newest.config.get("bound") else None


def kept_steps(commits: list[tuple[int, float | None]], keep: int) -> set[int]:
    """The steps to keep of (step, held-out bits/dim): the `keep` newest and the best."""
    newest = sorted(step for step, _ in commits)[-keep:]
    measured = [(value, step) for step, value in commits if value is not None]
    return {*newest, *([min(measured)[1]] if measured else [])}


def select(run: Storage, which: str) -> Checkpoint:
    """The checkpoint named by `which`: best, latest, or a step number.

    Raises `CheckpointError` where the run has none.
    """
    checkpoints = Checkpoints(run)
    steps = checkpoints.steps()
    if not steps:
        raise CheckpointError(f"{run.uri}: no committed checkpoint here; train first (ddpm train)")
    if which == "latest":
        return checkpoints.open(steps[-1])
    if which == "best":
        commits = checkpoints.commits()
        ranked = [
            (value, commit.step) for commit in commits if (value := measured(commit, commits[-1])) is not None
        ]
        return checkpoints.open(min(ranked)[1] if ranked else steps[-1])
    if which.isdecimal() and int(which) in steps:
        return checkpoints.open(int(which))
    raise CheckpointError(
        f"checkpoint {which!r}: {run.uri} has steps {', '.join(map(str, steps))}; "
        "give one of them, best, latest or a URI"
    )


def open_checkpoint(storage: Storage | str) -> Checkpoint:
    """The checkpoint at a prefix; raises `CheckpointError` where there is none of this format."""
    if isinstance(storage, str):
        storage = open_storage(storage)
    where = f"{storage.uri}/{COMMIT}"
    try:
        commit = read_record(storage, COMMIT, Commit, FORMAT_VERSION, CheckpointError)
    except ObjectMissing:
        raise CheckpointError(f"{storage.uri}: no committed checkpoint here ({COMMIT} is missing)") from None
    if commit.kind != "ddpm-checkpoint":
        raise CheckpointError(f"{where}: is a {commit.kind!r}, not a checkpoint")
    return Checkpoint(storage, commit)


def step_name(step: int) -> str:
    return f"step-{step:09d}"


def _readable(storage: Storage) -> Checkpoint | None:
    """The checkpoint that stands at this prefix if all of it can be read."""
    try:
        checkpoint = open_checkpoint(storage)
        checkpoint.read_all()
    except CheckpointError:
        return None
    return checkpoint


def _to_bytes(tensors: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})


def _tensors(data: bytes, where: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    # the others: a header that is well formed and names a dtype or a size that there is not
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{where}: is not safetensors: {one_line(error)}") from None
