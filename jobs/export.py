"""`ddpm export`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from jobs import common, sample
from pipelines.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.checkpoints import Checkpoint
    from pipelines.config import Config

DESCRIPTION = """\
Write a checkpoint as a pipeline folder of diffusers.

It holds the averaged weights as safetensors, the noise schedule, and the sampler that the configuration names:
DDPMPipeline for ancestral and dpm_solver_pp_2m, DDIMPipeline for ddim.  Number and spacing of the steps and ddim's
eta are said when it is called.  The folder appears whole or not at all.
"""

EPILOG = """\
examples:
  ddpm export --config digits.yaml --out ./digits-pipeline
  ddpm export --config digits.yaml --checkpoint latest --out ./digits-pipeline
  ddpm export --config digits.yaml --sigma-rel 0.08 --out ./digits-pipeline

and then, in Python:
  from diffusers import DDIMPipeline
  DDIMPipeline.from_pretrained("./digits-pipeline")(batch_size=16).images
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    common.add_config_arguments(parser)
    parser.add_argument(
        "--checkpoint",
        metavar="WHICH",
        help="best, latest, a step number, or the URI of a checkpoint (default: sample.checkpoint)",
    )
    parser.add_argument(
        "--sigma-rel",
        type=float,
        metavar="X",
        help="instead of the run's average, one of this length, made of all its checkpoints' ema.power_sigma_rels",
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the folder to make; absent or empty")


def run(arguments: argparse.Namespace) -> int:
    common.use_local_stack()
    config = common.config_of(arguments)

    from ddpm_core.schedules import Schedule
    from pipelines.checkpoints import open_checkpoint
    from pipelines.diffusers_format import check_target, export_pipeline, sampling_of
    from pipelines.sample_recipe import trained_as

    folder = Path(arguments.out).expanduser()
    check_target(folder)  # before the work whose result it gets
    if arguments.checkpoint is not None:
        chosen = config.sample.model_copy(update={"checkpoint": arguments.checkpoint})
        config = config.model_copy(update={"sample": chosen})
    which = config.sample.checkpoint
    # whoever names a checkpoint whole needs no data set to find its run
    checkpoint = open_checkpoint(which if "/" in which else sample.locate(config)[0].checkpoint)
    trained = trained_as(config, checkpoint)
    sampling = sampling_of(config.sampler, trained.objective.prediction_type)
    made = "" if arguments.sigma_rel is None else f"σ_rel {arguments.sigma_rel} at "
    tensors = checkpoint.read("ema") if not made else _averaged(config, checkpoint, arguments.sigma_rel)
    export_pipeline(folder, trained.model, tensors, Schedule.from_config(trained.schedule), sampling)
    print(f"export: {made}{checkpoint.uri} → {folder}")
    return 0


def _averaged(config: Config, checkpoint: Checkpoint, sigma_rel: float) -> dict[str, Tensor]:
    from pipelines.posthoc import averaged_weights
    from pipelines.train import open_run

    if "/" in config.sample.checkpoint:
        raise UserError(
            f"--sigma-rel: needs the run's other checkpoints; give --checkpoint best, latest or a step, got "
            f"{config.sample.checkpoint}"
        )
    made = averaged_weights(open_run(config).storage, sigma_rel, checkpoint.step)
    print(f"the average's profile is {made.relative_error:.1%} off what was asked for")
    return made.tensors
