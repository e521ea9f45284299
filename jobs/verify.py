"""`ddpm verify`."""

from __future__ import annotations

import argparse
import json

from jobs import common

DESCRIPTION = """\
Prove that a data set is whole and what its record says it is.

Every shard is read: its size and SHA-256, its index against its tar, the checksum and label of every sample.
With --deep every image is decoded too.  Each thing that is wrong is a line on standard output.
"""

EPILOG = """\
examples:
  ddpm verify s3://bucket/photos-64
  ddpm verify ./digits --deep
  ddpm verify s3://bucket/photos-64 --json | jq .problems

exit code: 0 the data set is whole, 1 something is wrong with it, 2 there is no data set or a mistake.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument("dataset", metavar="DATASET", help="s3://BUCKET/PREFIX, file:///FOLDER or a folder")
    parser.add_argument("--deep", action="store_true", help="decode every image")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    common.use_local_stack()

    from tqdm import tqdm

    from pipelines.dataset import Dataset
    from pipelines.verify import summary, verify

    dataset = Dataset.load(arguments.dataset)
    with tqdm(unit="image", mininterval=1, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        verified = verify(dataset, deep=arguments.deep, progress=progress)
    if arguments.json:
        print(json.dumps(summary(dataset, verified, arguments.deep), indent=2, ensure_ascii=False))
    else:
        for problem in verified.problems:
            print(problem)
        looked = f"{verified.samples} samples in {verified.shards} shards, {verified.num_bytes} bytes"
        depth = "every image decoded" if arguments.deep else "no image decoded (--deep does)"
        outcome = f"{len(verified.problems)} problems" if verified.problems else "whole"
        print(f"data set {dataset.identity[:10]}: {outcome}; {looked}, {depth}; {dataset.uri}")
    return 1 if verified.problems else 0
