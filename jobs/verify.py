"""`ddpm verify`."""

from __future__ import annotations

import argparse
import json

from jobs import common

DESCRIPTION = """\
Prove that a data set, a run, a checkpoint or a sample set is whole and what its records say it is.

What lies at the address is told by its commit record.  Of a data set or a sample set every shard is read: its
SHA-256, its index against its tar, the checksum and label of every sample; of a sample set also that every image is
there once.  Of a run every object of every checkpoint: its size and SHA-256, its tensors against the network, and
that the configuration makes this run.  With --deep every image is decoded, and every weight must be finite.
Each thing that is wrong is a line on standard output; what killed attempts left is a note.  Where a tar or an index
is not the one of the record, one of its samples stands for all that are wrong alike; --json names each.
"""

EPILOG = """\
examples:
  ddpm verify s3://bucket/photos-64
  ddpm verify ./digits --deep
  ddpm verify s3://bucket/runs/digits-0123456789
  ddpm verify s3://bucket/runs/digits-0123456789/checkpoints/step-000001500
  ddpm verify s3://bucket/samples/digits-0123456789 --json | jq .problems

exit code: 0 it is whole, 1 something is wrong with it, 2 there is none (or a data set whose record can't be
read) or a mistake.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument("address", metavar="ADDRESS", help="s3://BUCKET/PREFIX, file:///FOLDER or a folder")
    parser.add_argument("--deep", action="store_true", help="decode every image, look at every number")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    common.use_local_stack()

    from tqdm import tqdm

    from pipelines.verified import counted
    from pipelines.verify import verify

    with tqdm(mininterval=1, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        found = verify(arguments.address, deep=arguments.deep, progress=progress)
    if arguments.json:
        print(json.dumps(found.summary(arguments.deep), indent=2, ensure_ascii=False))
    else:
        for problem in found.problems:
            print(problem)
        for note in found.notes:
            print(f"note: {note}")
        looked = ", ".join(
            counted(number, _WORDS.get(name, name[:-1])) for name, number in found.looked.items()
        )
        what, done = ("number", "looked at") if found.kind in ("run", "checkpoint") else ("image", "decoded")
        rest = " that could be read" if found.problems else ""
        depth = f"every {what}{rest} {done}" if arguments.deep else f"no {what} {done} (--deep does)"
        outcome = counted(len(found.problems), "problem") if found.problems else "whole"
        called = found.identity[:10] if found.kind in ("data set", "checkpoint") else _name(found.uri)
        print(f"{found.kind} {called}: {outcome}; {looked}, {depth}; {found.uri}")
        if found.advice:
            print(f"what to do: {found.advice}")
    return 1 if found.problems else 0


_WORDS = {"num_bytes": "byte"}


def _name(uri: str) -> str:
    return uri.rpartition("/")[2]
