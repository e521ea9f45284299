"""`ddpm prepare`."""

from __future__ import annotations

import argparse

from jobs import common

DESCRIPTION = """\
Turn images into a data set: sharded WebDataset tars with a Parquet index, on S3 or disk, a part held out.

SOURCE is a folder of images (its sub-folders are the classes) or a .zip of one; Parquet files with image
bytes, as Hugging Face writes them; WebDataset tars; a NumPy array (.npy, .npz); or `digits`, the 1,797
handwritten digits that ship with scikit-learn.  Many files are a folder, s3://BUCKET/PREFIX, or a pattern
such as 'a-{000..031}.tar'.  Captions and whatever else a sample has are carried along.  Images are cut to
their centred square and resized to prepare.image_size; one that fits as it is keeps its bytes.  Run again,
it finishes what is missing, or finds the work done.
"""

EPILOG = """\
examples:
  ddpm prepare digits --config digits.yaml
  ddpm prepare ./photos --config my.yaml --set prepare.image_size=64
  ddpm prepare ./photos --config my.yaml --out s3://bucket/photos-64 --labels classes.csv
  ddpm prepare s3://bucket/raw-parquet --config my.yaml --image img --label fine_label
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument("source", metavar="SOURCE", help="a folder, a file, s3://…, or digits")
    common.add_config_arguments(parser)
    parser.add_argument("--out", metavar="URI", help="where to (default: data.uri of the configuration)")
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
    common.use_local_stack()
    config = common.config_of(arguments)

    from tqdm import tqdm

    from pipelines.prepare import prepare

    settings = config.prepare
    out = arguments.out or config.data.uri
    with tqdm(unit="image", mininterval=1, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        dataset = prepare(
            arguments.source,
            out,
            image_size=settings.image_size,
            levels=settings.levels,
            test_fraction=settings.test_fraction,
            samples_per_shard=settings.samples_per_shard,
            seed=config.seed,
            labels=arguments.labels,
            image=arguments.image,
            label=arguments.label,
            progress=progress,
        )
    shape = "×".join(map(str, dataset.shape))
    counts = ", ".join(
        f"{dataset.count(split)} {split} images in {len(shards)} shards"
        for split, shards in dataset.splits.items()
    )
    print(f"data set {dataset.identity[:10]}: {counts}; {shape}, {dataset.levels} levels; {dataset.uri}")
    return 0
