"""`ddpm sample`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from jobs import common
from pipelines.errors import UserError

if TYPE_CHECKING:
    from pipelines.config import Config
    from pipelines.sample_recipe import Recipe
    from pipelines.sample_set import SampleSet

DESCRIPTION = """\
Make sample.count images with a checkpoint, as WebDataset shards with a Parquet index.

Image i depends on the checkpoint, the sampler, sample.seed and i alone, not on the worker or its neighbours.
The set goes to STORAGE/samples/NAME-ID/; the same command goes on with what is missing there, and makes again
what is damaged.  Of a set over 64 MiB it compares the sizes; --check reads all of it.
"""

EPILOG = """\
examples:
  ddpm sample --config digits.yaml
  ddpm sample --config digits.yaml --set sample.count=50000 --set sample.checkpoint=latest
  ddpm sample --config digits.yaml --local --set sample.count=250
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    common.add_config_arguments(parser)
    common.add_place_arguments(parser)
    parser.add_argument(
        "--check", action="store_true", help="compare all that is there with its SHA-256, however large it is"
    )


def run(arguments: argparse.Namespace) -> int:
    common.use_local_stack(arguments.address)
    config = common.config_of(arguments)

    from tqdm import tqdm

    from pipelines.sample_recipe import pending_units

    recipe, found = locate(config)
    survey = found.survey(recipe, thorough=arguments.check)
    for damage in survey.damage:
        print(f"damaged, and made again: {damage}")
    pending = pending_units(recipe, survey.whole)
    total = recipe.settings.count
    if survey.finished:
        print(f"samples {recipe.set_name()}: all {total} images are there already; {found.uri}")
        return 0
    print(f"samples {recipe.set_name()}: {recipe.checkpoint} → {found.uri}")
    to_make = sum(len(_numbers(recipe, unit)) for unit in pending)
    with tqdm(total=total, initial=total - to_make, unit="image", mininterval=1) as bar:
        for made in _make(arguments, config, recipe, found, pending):
            bar.update(made)
    record = found.finish(recipe)
    print(f"samples {recipe.set_name()}: {record.count} images in {len(record.units)} shards; {found.uri}")
    return 0


def locate(config: Config) -> tuple[Recipe, SampleSet]:
    """The recipe that a configuration names, and the place of its set."""
    from pipelines.checkpoints import open_checkpoint, select
    from pipelines.sample_recipe import recipe_of
    from pipelines.sample_set import sample_set
    from pipelines.train import open_run

    run = open_run(config)
    which = config.sample.checkpoint
    checkpoint = open_checkpoint(which) if "/" in which else select(run.storage, which)
    if checkpoint.commit.dataset != run.dataset.identity:
        raise UserError(
            f"sample.checkpoint: {checkpoint.uri} was trained on another data set than {run.dataset.uri}"
        )
    recipe = recipe_of(config, checkpoint, run.dataset.levels)
    return recipe, sample_set(config, recipe)


def _numbers(recipe: Recipe, unit: int) -> range:
    from pipelines.sample_recipe import unit_range

    return unit_range(recipe, unit)


def _make(
    arguments: argparse.Namespace, config: Config, recipe: Recipe, found: SampleSet, pending: list[int]
) -> Iterator[int]:
    if arguments.local:
        import torch

        from pipelines.sampling import UnitMaker

        maker = UnitMaker(recipe, found.uri, "cuda" if torch.cuda.is_available() else "cpu")
        yield from map(maker.make, pending)
        return
    with common.ray_cluster(arguments.address):
        from pipelines.sample_ray import make_units

        yield from make_units(recipe, found.uri, pending, config.workers)
