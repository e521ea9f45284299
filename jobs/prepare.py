"""`ddpm prepare`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from jobs import common
from pipelines.errors import UserError

if TYPE_CHECKING:
    from pipelines.config import Config
    from pipelines.prepare_shards import Workers

DESCRIPTION = """\
Turn images into a data set: sharded WebDataset tars with a Parquet index, on S3 or disk, a part held out.

SOURCE is a folder of images (its sub-folders are the classes) or a .zip of one; Parquet files with image
bytes, as Hugging Face writes them; WebDataset tars; a NumPy array (.npy, .npz); or `digits`, the 1,797
handwritten digits that ship with scikit-learn.  Many files are a folder, s3://BUCKET/PREFIX, or a pattern
such as 'a-{000..031}.tar'.  Captions and whatever else a sample has are carried along.  Images are cut to
their centred square and resized to prepare.image_size; one that fits as it is keeps its bytes.

Where a Ray cluster is named (--address, RAY_ADDRESS, a local stack), its CPUs share the work, and must see
SOURCE and the data set's place; else this process does it alone.  Run again, it finishes what is missing, or
finds the work done.
"""

EPILOG = """\
examples:
  ddpm prepare digits --config digits.yaml
  ddpm prepare ./photos --config my.yaml --set prepare.image_size=64
  ddpm prepare ./photos --config my.yaml --out s3://bucket/photos-64 --labels classes.csv
  ddpm prepare 's3://bucket/cc/{00000..00331}.tar' --config my.yaml --index-only
  ddpm prepare s3://bucket/raw-parquet --config my.yaml --image img --label fine_label
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument("source", metavar="SOURCE", help="a folder, a file, s3://…, or digits")
    common.add_config_arguments(parser)
    common.add_place_arguments(parser)
    parser.add_argument("--out", metavar="URI", help="where to (default: data.uri of the configuration)")
    parser.add_argument(
        "--index-only",
        action="store_true",
        help="of WebDataset tars: write indexes and the record, and leave the tars where they are",
    )
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help="for a folder or .zip: a .csv or .parquet table with the columns file, label; for a .npy: another",
    )
    parser.add_argument(
        "--image",
        metavar="NAME",
        help="which column, array or tar extension is the image (default: the usual)",
    )
    parser.add_argument(
        "--label",
        metavar="NAME",
        help="which column, array or tar extension is the label (default: the usual)",
    )


def run(arguments: argparse.Namespace) -> int:
    common.use_local_stack(arguments.address)
    config = common.config_of(arguments)

    from tqdm import tqdm

    from pipelines.index_only import index_tars
    from pipelines.prepare import prepare
    from pipelines.storage import absolute

    settings = config.prepare
    if arguments.index_only and arguments.labels is not None:
        raise UserError(f"--labels {arguments.labels}: --index-only takes labels from the tars alone")
    if arguments.out == "":
        raise UserError("--out: is empty: give s3://BUCKET/PREFIX or a folder, or leave it out for data.uri")
    out = absolute(arguments.out) if arguments.out else config.data.uri
    with (
        _workers(arguments, config) as workers,
        tqdm(unit="tar" if arguments.index_only else "image", mininterval=1, disable=None) as bar,
    ):

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        chosen: dict[str, Any] = {
            "image_size": settings.image_size,
            "channels": settings.channels,
            "levels": settings.levels,
            "test_fraction": settings.test_fraction,
            "seed": config.seed,
            "image": arguments.image,
            "label": arguments.label,
            "progress": progress,
            "workers": workers,
        }
        if arguments.index_only:
            dataset = index_tars(arguments.source, out, **chosen)
        else:
            dataset = prepare(
                arguments.source,
                out,
                samples_per_shard=settings.samples_per_shard,
                png_encoder=settings.png_encoder,
                labels=arguments.labels,
                **chosen,
            )
    shape = "×".join(map(str, dataset.shape))
    counts = ", ".join(
        f"{dataset.count(split)} {split} images in {len(shards)} shards"
        for split, shards in dataset.splits.items()
    )
    print(f"data set {dataset.identity[:10]}: {counts}; {shape}, {dataset.levels} levels; {dataset.uri}")
    return 0


@contextmanager
def _workers(arguments: argparse.Namespace, config: Config) -> Iterator[Workers | None]:
    """The cluster's, where one is named."""
    if arguments.local or not (arguments.address or os.environ.get("RAY_ADDRESS")):
        yield None
        return
    with common.ray_cluster(arguments.address):
        from pipelines.prepare_ray import RayWorkers

        yield RayWorkers(config.workers.max_failures)
