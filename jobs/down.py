"""`ddpm down`."""

from __future__ import annotations

import argparse

from infra.local import StackError, down
from jobs import common
from pipelines.errors import UserError

DESCRIPTION = """\
Stop the local stack and every process that it started.  The buckets are saved to ./.ddpm (or DDPM_STATE), and
the next `ddpm up` restores them; MLflow's database stays there too.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument(
        "--discard",
        action="store_true",
        help="give up the buckets instead of saving them; with no earlier save of them, MLflow's database as well",
    )


def run(arguments: argparse.Namespace) -> int:
    try:
        if not down(common.state_dir(), save=not arguments.discard):
            print(f"no local stack to stop in {common.state_dir()}")
    except StackError as error:
        raise UserError(str(error)) from None
    return 0
