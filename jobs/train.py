"""`ddpm train`."""

from __future__ import annotations

import argparse
import os

from jobs import common

DESCRIPTION = """\
Train the model of a configuration on its data set (Algorithm 1), with the moving average of its weights.

Checkpoints go to STORAGE/runs/NAME-ID/checkpoints/, where ID is a hash of everything the result depends on.
The same command goes on from the newest of them, on any number of workers; more train.steps train further.
Loss, gradient norm, learning rate, images/s, held-out bits/dim with its terms and a grid of samples go to
MLFLOW_TRACKING_URI, if that is set.
"""

EPILOG = """\
examples:
  ddpm train --config digits.yaml --dry-run
  ddpm train --config digits.yaml --set train.steps=2000 --set workers.num=4
  ddpm train --config digits.yaml --local --set storage=./results
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    common.add_config_arguments(parser)
    common.add_place_arguments(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="print data, steps, memory and output prefix, and do nothing"
    )


def run(arguments: argparse.Namespace) -> int:
    common.use_local_stack(arguments.address)
    config = common.config_of(arguments)

    from ddpm_core.schedules import Schedule
    from pipelines.checkpoints import Checkpoints
    from pipelines.plan import training_plan
    from pipelines.stages import load_stages
    from pipelines.tracking import End, end_tracking
    from pipelines.train import claim, open_run

    load_stages(config.data.stages)
    run = open_run(config)
    schedule = Schedule.from_config(config.schedule)
    if arguments.dry_run:
        run.dataset.check_all_there()
        print(training_plan(run))
        # the plan has the warnings; what else is odd about the betas is worth a look before a run, and no fault
        said = schedule.warnings()
        for note in schedule.validate().warnings:
            if note not in said:
                print(f"note       {note}")
        return 0
    for warning in schedule.warnings():
        print(f"warning: {warning}")
    steps = Checkpoints(run.storage).steps()
    done = steps[-1] if steps else 0
    looked_at = done >= config.train.steps
    if looked_at:
        # before it is called done: a checkpoint's name says nothing of its objects, and if they are damaged,
        # this is the command that trains the steps again
        whole = Checkpoints(run.storage).newest_whole()
        done = whole.step if whole else 0
    if done >= config.train.steps:
        print(f"run {run.name}: trained {done} steps already; {run.storage.uri}")
        return 0
    # before hours of work that could not come to its end
    run.dataset.check_all_there()
    _check_tracking()
    start = f", from the checkpoint of step {done}" if done else ""
    # a worker reads it whole, and tells of the one that it goes on from
    unless = "" if looked_at or not done else " unless it is damaged"
    print(f"run {run.name}: to step {config.train.steps}{start}{unless}; {run.storage.uri}")
    if arguments.local:
        import torch

        from pipelines.train import train
        from pipelines.world import SingleWorker

        claim(run)
        train(run, SingleWorker(torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    else:
        with common.ray_cluster(arguments.address):
            from pipelines.train_ray import fit

            claim(run)
            end: End = "FAILED"
            try:
                fit(run)
                end = "FINISHED"
            except KeyboardInterrupt:
                end = "KILLED"
                raise
            finally:
                # workers that were stopped, or lost without a word, can't say so
                if end != "FINISHED":
                    end_tracking(os.environ.get("MLFLOW_TRACKING_URI"), run.storage, end)
    last = Checkpoints(run.storage).open(config.train.steps)
    bound = last.commit.held_out
    measured = "" if bound is None else f"held out {bound:.4f} bits/dim; "
    print(f"run {run.name}: trained {last.step} steps; {measured}{last.uri}")
    return 0


def _check_tracking() -> None:
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        from pipelines.adapters.mlflow import check_server

        check_server(uri)
