"""Whether a run, or one checkpoint of it, is whole and what its records say."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ddpm_core.networks import build_network
from pipelines.checkpoints import (
    COMMIT,
    Checkpoint,
    CheckpointError,
    Checkpoints,
    open_checkpoint,
    step_name,
)
from pipelines.config import Config, digest
from pipelines.errors import UserError
from pipelines.records import RecordError, read_record
from pipelines.storage import ObjectInfo, ObjectMissing, Storage
from pipelines.telling import validated
from pipelines.tracking import parse_rows
from pipelines.train import RUN_RECORD, RUN_VERSION, RunRecord
from pipelines.training import power_group
from pipelines.verified import Problem, Progress, Verified, problem_of

_SHA256 = re.compile(r"[0-9a-f]{64}")


def verify_run(storage: Storage, *, deep: bool = False, progress: Progress | None = None) -> Verified:
    """Check a run: its record against its name, and each checkpoint as `verify_checkpoint`, which must also be of
    this run, its data set and its seed, and have its history beside it.

    What killed attempts left is a note, and so is a checkpoint that the run, which may be at work, deleted or wrote
    again meanwhile. `progress(done, total)` counts objects. What is wrong is returned, not
    raised; raises `StorageError` where the storage can't be read.
    """
    where = f"{storage.uri}/{RUN_RECORD}"
    problems: list[Problem] = []
    record: RunRecord | None = None
    try:
        record = read_record(storage, RUN_RECORD, RunRecord, RUN_VERSION, CheckpointError)
    except ObjectMissing:
        problems.append(Problem(where, None, "is missing, though there are checkpoints"))
    except CheckpointError as error:
        problems.append(problem_of(error, where))
    else:
        problems += _check_record(storage, where, record)
    there = storage.list("checkpoints/")
    checkpoints: list[Checkpoint] = []
    listed = Checkpoints(storage).steps()
    # after the steps, since a run at work writes the rows of a step before it commits it
    history = {info.key for info in storage.list("history/")}
    changed: dict[int, str] = {}
    for step in listed:
        place = storage.child("checkpoints", step_name(step))
        try:
            checkpoints.append(open_checkpoint(place))
        except CheckpointError as error:
            if what := _changed(place, None):
                changed[step] = what
            else:
                problems.append(problem_of(error, f"{place.uri}/{COMMIT}"))
    count = _counted(checkpoints, progress)
    for checkpoint in checkpoints:
        wrong = [*_check_checkpoint(checkpoint, deep, count), *_check_belongs(checkpoint, record)]
        folder = checkpoint.uri.rpartition("/")[2]
        if wrong and (what := _changed(storage.child("checkpoints", folder), checkpoint)):
            changed[int(folder.removeprefix("step-"))] = what
        else:
            problems += wrong
    for step in listed:
        problems += _check_history(storage, history, step)
    looked = {"checkpoints": len(listed), **_looked(checkpoints)}
    name = storage.uri.rpartition("/")[2] if record is None else record.name
    gone = tuple(f"checkpoints/{step_name(step)}/" for step in changed)
    notes = [
        *(f"{step_name(step)}: {what}" for step, what in sorted(changed.items())),
        *_left_behind([info for info in there if not info.key.startswith(gone)], checkpoints, listed),
        *([] if listed else ["no checkpoint is there yet"]),
    ]
    return Verified("run", storage.uri, name, looked, tuple(problems), tuple(notes))


def verify_checkpoint(storage: Storage, *, deep: bool = False, progress: Progress | None = None) -> Verified:
    """Check one checkpoint: its commit record (version, step, the run that its configuration makes), and each
    object's size, SHA-256 and tensors, whose names and shapes must be the network's. With `deep` every number of
    them must be finite.
    """
    where = f"{storage.uri}/{COMMIT}"
    try:
        checkpoint = open_checkpoint(storage)
    except CheckpointError as error:
        problem = problem_of(error, where)
        return Verified("checkpoint", storage.uri, "", {"objects": 0, "num_bytes": 0}, (problem,))
    problems = list(_check_checkpoint(checkpoint, deep, _counted([checkpoint], progress)))
    named = {COMMIT, *(one.key for one in checkpoint.commit.objects.values())}
    left = [info for info in storage.list() if info.key not in named]
    return Verified(
        "checkpoint",
        storage.uri,
        checkpoint.identity,
        _looked([checkpoint]),
        tuple(problems),
        tuple(_left(storage.uri.rpartition("/")[2], left)),
    )


def _changed(place: Storage, found: Checkpoint | None) -> str | None:
    """What has become of a checkpoint meanwhile, of which something was wrong; None if it is as it was found.

    found: as it was opened; None if it could not be.
    """
    if not place.exists(COMMIT):
        return "was deleted meanwhile, as a run at work does"
    try:
        now = open_checkpoint(place)
    except CheckpointError:
        return None
    if found is not None and now.commit == found.commit:
        return None
    return "was written again meanwhile, as a run at work does; verify it once more"


def _looked(checkpoints: list[Checkpoint]) -> dict[str, int]:
    objects = [one for checkpoint in checkpoints for one in checkpoint.commit.objects.values()]
    return {"objects": len(objects), "num_bytes": sum(one.num_bytes for one in objects)}


def _counted(checkpoints: list[Checkpoint], progress: Progress | None) -> Callable[[], None]:
    total, done = _looked(checkpoints)["objects"], 0

    def count() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return count


def _check_record(storage: Storage, where: str, record: RunRecord) -> Iterator[Problem]:
    if record.kind != "ddpm-run":
        yield Problem(where, None, f"is a {record.kind!r}, not a run")
    own = f"{record.identity.get('name')}-{digest(record.identity)[:10]}"
    if record.name != own:
        yield Problem(where, None, f"has the name {record.name!r}, and its identity is that of {own!r:.60}")
    called = storage.uri.rpartition("/")[2]
    # a copy may be called otherwise, and end with a date
    as_a_run = re.escape(str(record.identity.get("name"))) + "-[0-9a-f]{10}"
    if re.fullmatch(as_a_run, called) and called != record.name:
        yield Problem(where, None, f"is the record of {record.name!r:.60}, and lies in {called!r}")


def _check_belongs(checkpoint: Checkpoint, record: RunRecord | None) -> Iterator[Problem]:
    if record is None:
        return
    commit = checkpoint.commit
    for name, value, of_run in (
        ("run", commit.run, record.name),
        ("dataset", commit.dataset, record.identity.get("dataset")),
        ("seed", commit.seed, record.identity.get("seed")),
    ):
        if value != of_run:
            yield Problem(
                f"{checkpoint.uri}/{COMMIT}",
                None,
                f"{name}: {value!r:.80}, and {RUN_RECORD} says {of_run!r:.80}",
            )


def _check_checkpoint(checkpoint: Checkpoint, deep: bool, count: Callable[[], None]) -> Iterator[Problem]:
    where, commit = f"{checkpoint.uri}/{COMMIT}", checkpoint.commit
    folder = re.search(r"/step-([0-9]{9,})$", checkpoint.uri)
    if folder and int(folder[1]) != commit.step:
        yield Problem(where, None, f"is of step {commit.step}, and lies in {folder[0][1:]}")
    if not _SHA256.fullmatch(commit.dataset):
        yield Problem(
            where, None, f"dataset: must be a data set's identity (SHA-256), got {commit.dataset!r:.80}"
        )
    config: Config | None = None
    try:
        config = validated(Config, commit.config, "config")
    except UserError as error:
        yield problem_of(error, where)
    else:
        yield from _check_config(where, checkpoint, config)
    shapes = {} if config is None else _shapes(config)
    for group, record in commit.objects.items():
        where_object = f"{checkpoint.uri}/{record.key}"
        try:
            tensors = checkpoint.read(group)
        except CheckpointError as error:
            yield problem_of(error, where_object)
        else:
            if reason := _wrong_tensors(tensors, shapes.get(group), deep):
                yield Problem(where_object, None, reason)
        count()


def _check_config(where: str, checkpoint: Checkpoint, config: Config) -> Iterator[Problem]:
    commit = checkpoint.commit
    own = config.run_name(commit.dataset)
    if own != commit.run:
        yield Problem(where, None, f"its configuration makes the run {own!r}, and it says {commit.run!r:.60}")
    if not 1 <= commit.step <= config.train.steps:
        yield Problem(
            where, None, f"is of step {commit.step}, and its configuration trains {config.train.steps}"
        )
    for group in _groups(config):
        if group not in commit.objects:
            yield Problem(where, None, f"names no {group!r}, which a run of its configuration has")


def _groups(config: Config) -> list[str]:
    averages = [power_group(length) for length in config.ema.power_sigma_rels]
    moments = ["loss_moments"] if config.objective.timestep_sampling == "loss_second_moment" else []
    return ["weights", "ema", "optimizer", *moments, *averages]


def _shapes(config: Config) -> dict[str, dict[str, tuple[int, ...]]]:
    """The tensors that weights, averages and Adam's moments must have; traced, so that nothing is allocated."""
    with torch.device("meta"):
        network = build_network(config.model)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    moments: dict[str, tuple[int, ...]] = {}
    for name, parameter in network.named_parameters():
        shape = tuple(parameter.shape)
        moments |= {f"step/{name}": (), f"exp_avg/{name}": shape, f"exp_avg_sq/{name}": shape}
    groups = {group: shapes for group in _groups(config) if group.startswith(("weights", "ema"))}
    return {**groups, "optimizer": moments}


def _wrong_tensors(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]] | None, deep: bool
) -> str | None:
    if shapes is not None:
        for name in sorted({*tensors, *shapes}):
            found = tuple(tensors[name].shape) if name in tensors else None
            if found != shapes.get(name):
                there = "no such tensor" if found is None else f"the shape {list(found)}"
                wanted = f"{list(shapes[name])}" if name in shapes else "none"
                return f"{name!r:.80}: has {there}, and the network of its configuration {wanted}"
    if deep:
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                return f"{name!r:.80}: has numbers that are not finite"
    return None


def _check_history(storage: Storage, there: set[str], step: int) -> Iterator[Problem]:
    """The rows of metrics that were written before a checkpoint was committed."""
    key = f"history/{step_name(step)}.jsonl"
    where = f"{storage.uri}/{key}"
    if key not in there:
        yield Problem(where, None, f"is missing, though step {step} was committed after it")
        return
    try:
        rows = parse_rows(storage.get(key), where)
    except RecordError as error:
        yield problem_of(error, where)
        return
    if any(not 1 <= row.step <= step for row in rows):
        yield Problem(where, None, f"has rows of other steps than 1 to {step}")


def _left_behind(there: list[ObjectInfo], checkpoints: list[Checkpoint], listed: list[int]) -> Iterator[str]:
    """A line for each folder with objects that no commit record names."""
    named = {
        f"checkpoints/{step_name(checkpoint.step)}/{one.key}"
        for checkpoint in checkpoints
        for one in checkpoint.commit.objects.values()
    }
    named |= {f"checkpoints/{step_name(step)}/{COMMIT}" for step in listed}
    left = defaultdict(list)
    for info in there:
        if info.key not in named:
            left[info.key.split("/")[1]].append(info)
    for folder, objects in left.items():
        yield from _left(folder, objects)


def _left(folder: str, objects: list[ObjectInfo]) -> Iterator[str]:
    if objects:
        size = sum(info.num_bytes for info in objects)
        name = objects[0].key.rpartition("/")[2]
        yield (
            f"{folder}: {len(objects)} objects ({size} bytes) that no commit record names, left by attempts that "
            f"were killed, or of one at work: {name} …"
        )
