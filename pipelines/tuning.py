"""A sweep over T and the β range, as plain values: what is tried, how it is ranked, what is recorded.

Trials are ranked on held-out bits/dim of the bound, which means the same for every schedule.  L_simple does
not: its floor moves with the schedule.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ddpm_core.schedules import Schedule, ScheduleConfig
from pipelines.config import Config, digest
from pipelines.errors import UserError
from pipelines.records import read_record
from pipelines.storage import ObjectMissing, Storage, open_storage

FORMAT_VERSION = 1
RECORD = "sweep.json"
_REFERENCE_T = 1000


class Trial(BaseModel):
    """One trial and how it ended."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_timesteps: int
    beta_start: float
    beta_end: float
    """Of the schedule itself, not scaled to T = 1000."""
    status: Literal["completed", "stopped", "failed"]
    """Stopped: early, by the sweep."""
    step: int
    bits_per_dim: float | None
    stderr: float | None
    run: str
    """URI of the trial's run."""
    error: str | None = None
    diverged: bool = False
    """It failed by itself, and would again."""

    def plotted(self) -> dict[str, Any]:
        """The trial as `pipelines.plots.sweep_figure` takes it."""
        schedule = Schedule.from_config(
            ScheduleConfig("linear", self.num_timesteps, self.beta_start, self.beta_end)
        )
        measured = self.bits_per_dim is not None
        return {
            "num_timesteps": self.num_timesteps,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "log_snr_start": float(schedule.log_snr[0]),
            "log_snr_end": float(schedule.log_snr[-1]),
            "status": self.status,
            "step": self.step,
            "bits_per_dim": self.bits_per_dim if measured else math.nan,
            "stderr": math.nan if self.stderr is None else self.stderr,
        }

    @property
    def rank(self) -> float:
        value = self.bits_per_dim
        return value if value is not None and math.isfinite(value) else math.inf


class Sweep(BaseModel):
    """`sweep.json`: the trials of a sweep, best first."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int
    kind: str = "ddpm-sweep"
    identity: dict[str, Any]
    trials: list[Trial]


def sweep_identity(config: Config, dataset_identity: str) -> dict[str, Any]:
    """What the trials of a sweep are a function of."""
    settings = config.tune.model_dump(mode="json", exclude={"max_concurrent", "workers"})
    return {"tune": settings, "bound": config.bound.model_dump(mode="json")} | config.training_identity(
        dataset_identity
    )


def sweep_storage(config: Config, dataset_identity: str) -> Storage:
    """The place of a sweep: STORAGE/sweeps/NAME-ID/; its trials' runs lie below it."""
    name = f"{config.name}-{digest(sweep_identity(config, dataset_identity))[:10]}"
    return open_storage(config.storage).child("sweeps", name)


def trial_schedule(params: Mapping[str, Any]) -> ScheduleConfig:
    """The linear schedule of a trial: β drawn for T = 1000 and scaled by 1000/T.

    Σβ, and with it the end of the chain, then does not depend on T; without scaling, small T would start
    sampling from a prior that the forward process never reaches.  Raises ValueError where a β leaves (0, 1).
    """
    scale = _REFERENCE_T / params["num_timesteps"]
    return ScheduleConfig(
        kind="linear",
        num_timesteps=params["num_timesteps"],
        beta_start=params["beta_start"] * scale,
        beta_end=params["beta_end"] * scale,
    )


def own_point(schedule: ScheduleConfig) -> dict[str, Any] | None:
    """The point of the sweep's space that is this very schedule; none where it is not a linear one."""
    if schedule.kind != "linear" or schedule.zero_terminal_snr:
        return None
    scale = schedule.num_timesteps / _REFERENCE_T
    return {
        "num_timesteps": schedule.num_timesteps,
        "beta_start": schedule.beta_start * scale,
        "beta_end": schedule.beta_end * scale,
    }


def check_space(config: Config) -> list[str]:
    """Warnings about the corners of the sweep's space; raises `UserError` for one that is no schedule."""
    warnings = []
    for num_timesteps in config.tune.num_timesteps:
        for end in config.tune.beta_end:
            point = {"num_timesteps": num_timesteps, "beta_start": config.tune.beta_start[0], "beta_end": end}
            try:
                schedule = Schedule.from_config(trial_schedule(point))
                # the steepest corner too: β may not fall
                trial_schedule({**point, "beta_start": config.tune.beta_start[1]})
            except ValueError as error:
                raise UserError(
                    f"tune.beta_end: {end} scaled to T = {num_timesteps} is "
                    f"{end * _REFERENCE_T / num_timesteps:.3g}: {error}"
                ) from None
            warnings += [f"T = {num_timesteps}, β_T = {end}·1000/T: {text}" for text in schedule.warnings()]
    return warnings


def trial_config(config: Config, storage: Storage, params: Mapping[str, Any]) -> Config:
    """The configuration of a trial's run: the base with another schedule, shorter, below the sweep."""
    tune = config.tune
    return config.model_copy(
        update={
            "schedule": trial_schedule(params),
            "storage": storage.uri,
            "train": config.train.model_copy(
                update={
                    "steps": tune.steps,
                    "eval_every": tune.eval_every,
                    "checkpoint_every": tune.eval_every,
                    "keep_checkpoints": 1,
                }
            ),
            "sampler": dataclasses.replace(
                config.sampler,
                num_steps=None
                if config.sampler.num_steps is None
                else min(config.sampler.num_steps, params["num_timesteps"]),
            ),
            "workers": config.workers.model_copy(
                update={"num": min(tune.workers, config.train.micro_batches)}
            ),
        }
    )


def ranked(trials: Iterable[Trial]) -> list[Trial]:
    """Best first; the ones that failed last."""
    return sorted(trials, key=lambda trial: (trial.rank, -trial.num_timesteps))


class SweepError(UserError):
    """Trials failed for a reason that lies outside them, so the sweep is not whole."""

    exit_code = 1


def require_whole(trials: Iterable[Trial]) -> None:
    """Raise `SweepError` unless every trial ended by its own merits and at least one has a result."""
    trials = list(trials)
    broken = [trial for trial in trials if trial.status == "failed" and not trial.diverged]
    if broken:
        reasons = "; ".join(sorted({trial.error or "no reason given" for trial in broken}))
        raise SweepError(
            f"{len(broken)} of {len(trials)} trials failed: {reasons}; the same command goes on from here"
        )
    if all(trial.bits_per_dim is None for trial in trials):
        raise SweepError("every trial diverged; lower optimizer.learning_rate")


def read_sweep(storage: Storage) -> Sweep | None:
    """The record of a finished sweep, or None."""
    try:
        return read_record(storage, RECORD, Sweep, FORMAT_VERSION)
    except ObjectMissing:
        return None


def write_sweep(storage: Storage, identity: dict[str, Any], trials: Iterable[Trial]) -> Sweep:
    """Commit the record of a finished sweep; the first one stands."""
    sweep = Sweep(format_version=FORMAT_VERSION, identity=identity, trials=ranked(trials))
    storage.put_if_absent(RECORD, sweep.model_dump_json(indent=2).encode())
    found = read_sweep(storage)
    assert found is not None
    return found
