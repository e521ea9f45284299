"""`ddpm up`."""

from __future__ import annotations

import argparse

from infra.local import StackError, up
from jobs import common
from pipelines.errors import UserError

DESCRIPTION = """\
Start the local stack: a Ray head with its dashboard, an S3 server, and an MLflow server.

Each takes another port if its usual one is taken, and writes its log to ./.ddpm/logs (or DDPM_STATE).  What
runs already is left alone; what died is started again.  The S3 server is moto, an emulator that keeps its
objects in memory: `ddpm down` saves them and the next `ddpm up` brings them back.

All of it listens on 127.0.0.1; while a job trains, torch's rendezvous port listens on every interface.  The
cluster demands a token (kept in .ddpm, readable by you alone): who has it can run code as you.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument(
        "--num-cpus", type=int, metavar="N", help="CPUs that Ray may hand out (default: the cores, and one)"
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.num_cpus is not None and arguments.num_cpus < 1:
        raise UserError(f"--num-cpus {arguments.num_cpus}: must be at least 1")
    try:
        up(common.state_dir(), num_cpus=arguments.num_cpus)
    except StackError as error:
        raise UserError(str(error)) from None
    return 0
