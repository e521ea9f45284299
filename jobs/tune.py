"""`ddpm tune`."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from jobs import common

if TYPE_CHECKING:
    from pipelines.config import Config
    from pipelines.dataset import Dataset
    from pipelines.storage import Storage
    from pipelines.tuning import Sweep, Trial

DESCRIPTION = """\
Sweep T and the β range with Ray Tune: short training runs, the bad ones stopped early (ASHA), ranked on
held-out bits/dim, which means the same for every schedule (the training loss does not).

β is drawn for T = 1000 and scaled by 1000/T.  The first trial has the configuration's own schedule.  The
sweep goes to STORAGE/sweeps/NAME-ID/ and to MLflow, a nested run a trial.  Run again, a finished sweep is
found done, and the trials of one that was stopped go on from their checkpoints.
"""

EPILOG = """\
examples:
  ddpm tune --config digits.yaml
  ddpm tune --config my.yaml --set tune.num_trials=40 --set 'tune.num_timesteps=[500, 1000, 4000]'
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    common.add_config_arguments(parser)
    parser.add_argument(
        "--address", metavar="HOST:PORT", help="the Ray cluster (default: RAY_ADDRESS, or the local stack)"
    )
    parser.add_argument("--out", metavar="FOLDER", help="also put sweep.json and sweep.png here")


def run(arguments: argparse.Namespace) -> int:
    common.use_local_stack(arguments.address)
    config = common.config_of(arguments)

    from pipelines.stages import load_stages
    from pipelines.train import open_run
    from pipelines.tuning import check_space, read_sweep, sweep_storage

    if arguments.out:
        common.output_folder(arguments.out)
    load_stages(config.data.stages)
    dataset = open_run(config).dataset
    storage = sweep_storage(config, dataset.identity)
    sweep = read_sweep(storage)
    if sweep is not None:
        print(f"sweep of {len(sweep.trials)} trials: done already; {storage.uri}")
    else:
        for warning in check_space(config):
            print(f"warning: {warning}")
        print(f"sweep of {config.tune.num_trials} trials: {storage.uri}")
        with common.ray_cluster(arguments.address, has_local=False):
            sweep = _sweep(config, dataset, storage)
    _report(sweep, storage, arguments.out)
    return 0


def _sweep(config: Config, dataset: Dataset, storage: Storage) -> Sweep:
    """Run the trials and commit their record, with a tracked run of the sweep's own around theirs."""
    from pipelines.storage import open_storage
    from pipelines.tracking import End, Row, RunDescription, end_tracking, ended, open_tracker
    from pipelines.tune_ray import run_sweep
    from pipelines.tuning import require_whole, sweep_identity, write_sweep

    uri = os.environ.get("MLFLOW_TRACKING_URI")
    identity = sweep_identity(config, dataset.identity)
    name = f"sweep {storage.uri.rpartition('/')[2]}"
    tracker = open_tracker(uri, RunDescription(config.tracking.experiment, name, identity), storage)
    with ended(tracker):
        trials = run_sweep(config, storage, tracker.run_id)
        for trial in trials:
            # Tune stops a trial by killing it, and a worker may be lost, so the trial can't say so itself
            end: End = "FAILED" if trial.status == "failed" else "FINISHED"
            end_tracking(uri, open_storage(trial.run), end)
        require_whole(trials)
        picture = _picture(trials)
        storage.put("sweep.png", picture)
        # last: who finds the record finds the picture
        sweep = write_sweep(storage, identity, trials)
        tracker.artifact("sweep.png", picture)
        best = sweep.trials[0]
        if best.bits_per_dim is not None:
            tracker.log([Row(best.step, {"held_out/total": best.bits_per_dim})])
    return sweep


def _picture(trials: list[Trial]) -> bytes:
    from pipelines.plots import sweep_figure

    with tempfile.TemporaryDirectory(prefix="ddpm-sweep-") as scratch:
        return sweep_figure([trial.plotted() for trial in trials], Path(scratch) / "sweep.png").read_bytes()


def _report(sweep: Sweep, storage: Storage, out: str | None) -> None:
    if out:
        folder = common.output_folder(out)
        for name in ("sweep.json", "sweep.png"):
            (folder / name).write_bytes(storage.get(name))
    print(f"{'T':>6} {'β_1':>10} {'β_T':>10} {'steps':>7} {'bits/dim':>16}")
    for trial in sweep.trials:
        value = "—" if trial.bits_per_dim is None else f"{trial.bits_per_dim:.4f}"
        if trial.stderr is not None:
            value += f" ± {trial.stderr:.4f}"
        note = {"completed": "", "stopped": "  stopped early", "failed": f"  {trial.error}"}
        print(
            f"{trial.num_timesteps:>6} {trial.beta_start:>10.3g} {trial.beta_end:>10.3g} {trial.step:>7} "
            f"{value:>16}{note[trial.status]}"
        )
    print(f"best: T = {sweep.trials[0].num_timesteps}; {storage.uri}/sweep.png")
