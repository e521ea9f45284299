"""A sweep on a Ray cluster, by Ray Tune: each trial is a training run of its own."""

from __future__ import annotations

import logging
import math
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from pipelines.config import Config, parse_config
from pipelines.errors import UserError, one_line
from pipelines.scratch import scratch_folder
from pipelines.storage import Storage, open_storage
from pipelines.train import claim, open_run
from pipelines.training import TrainingError
from pipelines.tuning import Trial, own_point, trial_config, trial_schedule

log = logging.getLogger(__name__)


def _trial(params: dict[str, Any], base: str, storage_uri: str, parent_run_id: str | None) -> None:
    """One trial: the driver of a training run, which goes on from its own checkpoints if there are any."""
    from pipelines.train_ray import fit

    config = trial_config(parse_config(base), open_storage(storage_uri), params)
    run = open_run(config)
    claim(run)
    try:
        fit(run, callbacks=[TuneReportCallback()], parent_run_id=parent_run_id)
    except TrainingError as error:
        # a result like another: this schedule does not train
        tune.report({"step": 0, "bits_per_dim": math.inf, "diverged": str(error)})
    except UserError as error:
        # raised, Ray would tell it with tracebacks
        tune.report({"step": 0, "bits_per_dim": math.inf, "failed": str(error)})


def run_sweep(config: Config, storage: Storage, parent_run_id: str | None) -> list[Trial]:
    """Run the trials on the connected cluster, and say how each ended."""
    settings = config.tune
    own = own_point(config.schedule)
    with scratch_folder("ray-tune") as scratch:
        tuner = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(
                    _trial, base=config.to_yaml(), storage_uri=storage.uri, parent_run_id=parent_run_id
                ),
                # a driver only waits for its workers, and Tune asks for more than nothing
                {"CPU": 0.01},
            ),
            param_space={
                "num_timesteps": tune.choice(list(settings.num_timesteps)),
                "beta_start": tune.loguniform(*settings.beta_start),
                "beta_end": tune.loguniform(*settings.beta_end),
            },
            tune_config=tune.TuneConfig(
                num_samples=settings.num_trials,
                search_alg=BasicVariantGenerator(
                    points_to_evaluate=[own] if own else None,
                    # trials' workers are outside of Tune's accounting of the cluster
                    max_concurrent=settings.max_concurrent,
                    random_state=settings.seed,
                ),
                scheduler=ASHAScheduler(
                    time_attr="step",
                    metric="bits_per_dim",
                    mode="min",
                    max_t=settings.steps,
                    grace_period=settings.grace_steps,
                    reduction_factor=settings.reduction_factor,
                ),
            ),
            run_config=tune.RunConfig(storage_path=scratch, name=config.name, verbose=0),
        )
        results = tuner.fit()
    return [_outcome(config, storage, result) for result in results]


def _outcome(config: Config, storage: Storage, result: Any) -> Trial:
    params, metrics = result.config, result.metrics or {}
    schedule = trial_schedule(params)
    step = int(metrics.get("step", 0))
    diverged = metrics.get("diverged")
    told = diverged or metrics.get("failed")
    error = one_line(result.error) if result.error else told
    if error:
        status = "failed"
    else:
        status = "completed" if step >= config.tune.steps else "stopped"
    return Trial(
        num_timesteps=schedule.num_timesteps,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        status=status,
        step=step,
        bits_per_dim=None if told else metrics.get("bits_per_dim"),
        stderr=None if told else metrics.get("bits_per_dim_stderr"),
        run=open_run(trial_config(config, storage, params)).storage.uri,
        error=error,
        diverged=diverged is not None,
    )
