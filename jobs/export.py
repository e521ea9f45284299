"""`ddpm export`."""

from __future__ import annotations

import argparse
from pathlib import Path

from jobs import common, sample

DESCRIPTION = """\
Write a checkpoint as a pipeline folder of diffusers.

It holds the averaged weights as safetensors, the noise schedule, and the sampler that the configuration names:
DDPMPipeline for ancestral, DDIMPipeline for ddim.  The folder appears whole or not at all.
"""

EPILOG = """\
examples:
  ddpm export --config digits.yaml --out ./digits-pipeline
  ddpm export --config digits.yaml --checkpoint latest --out ./digits-pipeline

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
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the folder to make; absent or empty")


def run(arguments: argparse.Namespace) -> int:
    common.use_local_stack()
    config = common.config_of(arguments)

    from ddpm_core.schedules import Schedule
    from pipelines.checkpoints import open_checkpoint
    from pipelines.diffusers_format import Sampling, check_target, export_pipeline
    from pipelines.sampling import checkpoint_config

    folder = Path(arguments.out).expanduser()
    check_target(folder)  # before the work whose result it gets
    if arguments.checkpoint is not None:
        chosen = config.sample.model_copy(update={"checkpoint": arguments.checkpoint})
        config = config.model_copy(update={"sample": chosen})
    recipe, _ = sample.locate(config)
    checkpoint = open_checkpoint(recipe.checkpoint)
    trained = checkpoint_config(checkpoint)
    sampler = config.sampler
    export_pipeline(
        folder,
        trained.model,
        checkpoint.read("ema"),
        Schedule.from_config(trained.schedule),
        Sampling(kind=sampler.kind, variance=sampler.variance_type, clip=sampler.clip),
    )
    print(f"export: {checkpoint.uri} → {folder}")
    return 0
