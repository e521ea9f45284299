"""The `ddpm` command: finds the command's file, runs it, and turns mistakes into one line each."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from types import ModuleType

from jobs.interruptions import Interruptions
from pipelines.errors import UserError
from pipelines.logs import StderrHandler

COMMANDS = {
    "up": "start the local stack: a Ray head, an S3 server, an MLflow server",
    "down": "stop the local stack; its buckets are kept",
    "doctor": "say what is wrong with the environment",
    "prepare": "images → sharded WebDataset tars with an index, on S3 or disk",
    "verify": "prove that a data set, a run or a sample set is whole and what it claims to be",
    "train": "train a model on such a data set",
    "tune": "sweep T and the β range, ranked on held-out bits/dim",
    "sample": "mass-generate images from a checkpoint",
    "evaluate": "judge a set of samples, and the model's bits/dim",
    "export": "a checkpoint as a diffusers pipeline",
    "submit": "run one of these jobs on a remote Ray cluster",
    "status": "how a submitted job is doing",
    "logs": "what a submitted job printed",
    "stop": "stop a submitted job",
    "list": "the jobs submitted to a cluster",
    "demo": "the whole way on handwritten digits: up, prepare, train, tune, sample, evaluate",
}

DESCRIPTION = """\
Train, tune and mass-sample denoising diffusion models on a Ray cluster.

A run is a pure function of its configuration, its data and its seed.  Everything it leaves (data sets,
checkpoints, sample sets) is under storage.  Killed and started again, each command goes on where it was.
"""

EPILOG = """\
the usual way:
  ddpm up                                       a local stack to try things on
  ddpm prepare digits --config digits.yaml      images → data set
  ddpm submit train --config digits.yaml        train on the cluster
  ddpm sample --config digits.yaml              make images
  ddpm evaluate --config digits.yaml            judge them

every command: `ddpm COMMAND --help`.

environment:
  AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, …   S3, as boto3 reads it
  MLFLOW_TRACKING_URI                      where runs are tracked; unset: nowhere
  RAY_ADDRESS                              the Ray cluster, HOST:PORT
  DDPM_STATE                               folder of the local stack (default ./.ddpm)
While a local stack is up, what of these is not set comes from it.

exit code: 0 the work is whole, 1 it failed, 2 a mistake in the command or configuration, 130 interrupted.
"""


def parser() -> argparse.ArgumentParser:
    """The whole command line; commands are imported only when they run or print their help."""
    top = argparse.ArgumentParser(
        prog="ddpm",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    return top


def module_of(command: str) -> ModuleType:
    name = "manage" if command in ("status", "logs", "stop", "list") else command
    return importlib.import_module(f"jobs.{name}")


def command_parser(command: str) -> argparse.ArgumentParser:
    """The parser of one command, filled by its module."""
    module = module_of(command)
    found = argparse.ArgumentParser(
        prog=f"ddpm {command}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if hasattr(module, "add_command_arguments"):
        module.add_command_arguments(command, found)
    else:
        module.add_arguments(found)
    return found


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    # the top-level parser knows names and summaries only, so that help and mistakes cost no heavy import
    arguments, rest = parser().parse_known_args(argv[:1])
    rest = argv[1:]
    configure_logging()
    try:
        # what ends a job politely ends it like Ctrl-C: with its clean-up
        with Interruptions():
            command = arguments.command
            module, found = module_of(command), command_parser(command)
            options = module.parse(found, rest) if hasattr(module, "parse") else found.parse_args(rest)
            return int(module.run(options) or 0)
    except UserError as error:
        for mistake in str(error).splitlines():
            print(f"ddpm {arguments.command}: {mistake}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"ddpm {arguments.command}: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader of our output left (`ddpm logs … | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def configure_logging() -> None:
    """Our records as plain lines on standard error, other libraries' warnings with their names."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    for package in ("pipelines", "jobs", "infra"):
        logger = logging.getLogger(package)
        if not logger.handlers:
            handler = StderrHandler()
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
            logger.addHandler(handler)
            logger.propagate = False
        logger.setLevel(logging.INFO)


if __name__ == "__main__":
    sys.exit(main())
