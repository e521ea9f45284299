"""A training run from its data set to its last checkpoint, as one worker of it lives it."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from pipelines.bad_samples import too_many
from pipelines.checkpoints import Checkpoints, step_name
from pipelines.config import Config, digest
from pipelines.dataset import Dataset
from pipelines.errors import UserError
from pipelines.held_out import bound_metrics, held_out_bound
from pipelines.preview import preview
from pipelines.reader_process import begin
from pipelines.reading import Reading
from pipelines.records import read_record
from pipelines.steps_ahead import StepsAhead
from pipelines.storage import Storage, StorageError, open_storage
from pipelines.tracking import History, NoTracker, Row, RunDescription, Tracker, ended, open_tracker
from pipelines.training import Learner, TrainingError, diverged, is_due
from pipelines.verified import counted
from pipelines.world import World, streams_of

log = logging.getLogger(__name__)

RUN_RECORD = "run.json"
RUN_VERSION = 1


class RunRecord(BaseModel):
    """`run.json`: what a run is a function of."""

    model_config = ConfigDict(frozen=True)

    format_version: int = RUN_VERSION
    kind: str = "ddpm-run"
    name: str
    identity: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run's place: its data, its name, its storage."""

    config: Config
    dataset: Dataset
    name: str
    storage: Storage

    @property
    def identity(self) -> dict[str, Any]:
        return self.config.training_identity(self.dataset.identity)


def open_run(config: Config) -> Run:
    """Load the data set and check that the configuration fits it; nothing is written.

    Raises `UserError` naming each field that does not fit.
    """
    dataset = Dataset.load(config.data.uri)
    channels, height, width = dataset.shape
    size = config.model.image_size
    mistakes = []
    if height != width or size != height:
        mistakes.append(f"model.image_size: {size}, but the images of {config.data.uri} are {width}×{height}")
    if config.model.in_channels != channels:
        mistakes.append(
            f"model.in_channels: {config.model.in_channels}, but the images of {config.data.uri} "
            f"have {channels} channels"
        )
    mistakes += _wrong_classes(config, dataset)
    if mistakes:
        raise UserError("\n".join(mistakes))
    for split in ("train", "test"):
        if dataset.count(split) == 0:
            raise UserError(f"{config.data.uri}: its {split} split is empty")
    name = config.run_name(dataset.identity)
    return Run(config, dataset, name, open_storage(config.storage).child("runs", name))


def _wrong_classes(config: Config, dataset: Dataset) -> list[str]:
    told, there = config.model.num_classes, len(dataset.classes)
    if told is None or told == there:
        return []
    if not there:
        return [
            f"model.num_classes: {told}, but the images of {config.data.uri} have no classes; prepare them from a "
            "folder with a sub-folder a class"
        ]
    return [f"model.num_classes: {told}, but the images of {config.data.uri} are of {there} classes"]


def claim(run: Run) -> None:
    """Write the run's record if it has none; refuse a folder whose record is another run's."""
    record = RunRecord(name=run.name, identity=run.identity)
    if run.storage.put_if_absent(RUN_RECORD, record.model_dump_json(indent=2).encode()):
        return
    found = read_record(run.storage, RUN_RECORD, RunRecord, RUN_VERSION)
    if digest(found.identity) != digest(run.identity):
        raise UserError(f"{run.storage.uri}/{RUN_RECORD}: belongs to another run; choose another name")


def train(run: Run, world: World, *, parent_run_id: str | None = None) -> None:
    """Train to `train.steps`, going on from the newest checkpoint; every worker of the run calls this.

    Raises `TrainingError` where training diverged, on every worker alike.
    """
    config = run.config
    learner = Learner(config, world.device, run.dataset.levels)
    checkpoints = Checkpoints(run.storage)
    start = _resume(run, checkpoints, learner, world)
    tracker = _open_tracker(run, parent_run_id, start) if world.rank == 0 else NoTracker()
    with ended(tracker):
        # no worker fails at its first shard before the server knows that the run goes on
        world.broadcast(tracker.run_id)
        _loop(run, learner, world, tracker, checkpoints, start)


def _resume(run: Run, checkpoints: Checkpoints, learner: Learner, world: World) -> int:
    """The step to go on from; rank 0 chooses the checkpoint and every worker loads that one."""
    state = checkpoints.newest() if world.rank == 0 else None
    step = int(world.broadcast(state.step if state else 0))
    if step == 0:
        return 0
    state = state or checkpoints.open(step).read_all()
    learner.load(state)
    if world.rank == 0:
        log.info("going on from step %d", step)
    # a driver that starts again has not heard of what was measured before
    measured = checkpoints.open(step).commit.metrics
    if "held_out/total" in measured:
        world.report(_progress(step, measured))
    return step


def _progress(step: int, metrics: Mapping[str, float]) -> dict[str, float | str]:
    """What the driver of the run is told after an evaluation."""
    return {
        "step": step,
        "bits_per_dim": metrics["held_out/total"],
        "bits_per_dim_stderr": metrics["held_out/total_stderr"],
    }


def _open_tracker(run: Run, parent_run_id: str | None, start: int) -> Tracker:
    config = run.config
    description = RunDescription(
        experiment=config.tracking.experiment,
        name=run.name,
        params=run.identity,
        tags={
            "ddpm.storage": run.storage.uri,
            "ddpm.data": run.dataset.uri,
            "ddpm.dataset_identity": run.dataset.identity,
            "ddpm.workers": str(config.workers.num),
        },
        parent_run_id=parent_run_id,
    )
    tracker = open_tracker(os.environ.get("MLFLOW_TRACKING_URI"), description, run.storage)
    tracker.artifact("config.yaml", config.to_yaml().encode())
    tracker.log(History(run.storage).rows(up_to=start))
    return tracker


def _loop(
    run: Run, learner: Learner, world: World, tracker: Tracker, checkpoints: Checkpoints, start: int
) -> None:
    settings = run.config.train
    history = History(run.storage)
    rows: list[Row] = []
    clock = _Clock(settings.batch_size)
    reading = what_to_read(run, world.rank, world.size, start, for_gpu=world.device.type == "cuda")
    with contextlib.closing(begin(reading)) as batches:
        for step in range(start, settings.steps):
            result = learner.step(step, next(batches), world)
            done = step + 1
            _check_bad_share(run, learner, batches, done)
            clock.tick()
            if is_due(done, settings.log_every, settings.steps):
                row = Row(
                    done,
                    {
                        "loss": result.loss,
                        "grad_norm": result.grad_norm,
                        "learning_rate": result.learning_rate,
                        "images_per_s": clock.images_per_s(),
                        **({"skipped_samples": learner.skipped} if learner.skipped else {}),
                    },
                )
                rows.append(row)
                tracker.log([row])
                if world.rank == 0:
                    log.info(
                        "step %d/%d  loss %.4f  grad norm %.3f  %.0f images/s%s",
                        done,
                        settings.steps,
                        result.loss,
                        result.grad_norm,
                        row.metrics["images_per_s"],
                        f"  {counted(learner.skipped, 'bad sample')} passed over" if learner.skipped else "",
                    )
            evaluated: dict[str, float] = {}
            if is_due(done, settings.eval_every, settings.steps):
                clock.pause()
                evaluated = _evaluate(run, learner, world, tracker, done)
                rows.append(Row(done, evaluated))
                tracker.log([rows[-1]])
                clock.resume()
            if is_due(done, settings.checkpoint_every, settings.steps):
                clock.pause()
                if world.rank == 0:
                    history.append(done, rows)
                    _save(run, learner, checkpoints, done, {"loss": result.loss, **evaluated})
                rows = []
                clock.resume()
            if evaluated:
                world.report(_progress(done, evaluated))


def what_to_read(run: Run, rank: int, world_size: int, start: int, *, for_gpu: bool) -> Reading:
    settings = run.config.train
    return Reading(
        run.dataset,
        "train",
        run.config.data,
        seed=run.config.seed,
        num_streams=settings.micro_batches,
        streams=tuple(streams_of(rank, world_size, settings.micro_batches)),
        micro_batch_size=settings.batch_size // settings.micro_batches,
        start_step=start,
        stop_step=settings.steps,
        for_gpu=for_gpu,
    )


def _check_bad_share(run: Run, learner: Learner, batches: StepsAhead, done: int) -> None:
    """Raise `TrainingError`, on every worker at the same step, where too much of what was trained on is bad."""
    bad, share, seen = learner.skipped or 0, run.config.data.max_bad_share, done * run.config.train.batch_size
    epoch = run.dataset.count("train")
    if not too_many(bad, seen, epoch, share):
        return
    # the bad samples may all be other workers'
    example = next((f"; one is {sample}" for sample in batches.skipped.samples.values()), "")
    raise TrainingError(
        f"step {done}: {bad} of {seen} train samples read are bad, which of {max(seen, epoch)} (an epoch at least) "
        f"is a share of {bad / max(seen, epoch):.3g}, more than data.max_bad_share {share}{example}; "
        f"{run.dataset.what_to_run(deep=True)}"
    )


class _Clock:
    """Images per second since it was last asked, without the time spent on evaluation and checkpoints."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._steps = 0
        self._spent_s = 0.0
        self._since = time.perf_counter()

    def tick(self) -> None:
        self._steps += 1

    def pause(self) -> None:
        self._spent_s += time.perf_counter() - self._since

    def resume(self) -> None:
        self._since = time.perf_counter()

    def images_per_s(self) -> float:
        self.pause()
        rate = self._steps * self._batch_size / max(self._spent_s, 1e-9)
        self._steps, self._spent_s = 0, 0.0
        self.resume()
        return rate


def _evaluate(run: Run, learner: Learner, world: World, tracker: Tracker, step: int) -> dict[str, float]:
    """The bound on held-out images, and on rank 0 a picture of samples for the tracker.

    Raises `TrainingError` where the averaged network gives NaN, on every worker alike.
    """
    config = run.config
    model = learner.averaged()
    estimate = held_out_bound(run.dataset, config, model, world, config.bound.num_images)
    if math.isnan(estimate.total):
        raise diverged(step, f"held-out bound {estimate.total} bits/dim", config.optimizer)
    if world.rank == 0:
        log.info("step %d  held out: %.4f ± %.4f bits/dim", step, estimate.total, estimate.total_stderr)
        if not isinstance(tracker, NoTracker):
            picture = preview(config, run.dataset, model, learner.schedule, world.device, step)
            if picture is not None:
                tracker.artifact(f"samples/{step_name(step)}.png", picture)
    return bound_metrics(estimate)


def _save(run: Run, learner: Learner, checkpoints: Checkpoints, step: int, metrics: dict[str, float]) -> None:
    saved = checkpoints.save(
        learner.state(step),
        {
            "seed": run.config.seed,
            "run": run.name,
            "dataset": run.dataset.identity,
            "config": run.config.model_dump(mode="json"),
            "metrics": metrics,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        },
    )
    try:
        checkpoints.prune(run.config.train.keep_checkpoints)
    except StorageError as error:
        log.warning("old checkpoints stay: %s", error)
    log.info("step %d  checkpoint committed: %s", step, saved.uri)
