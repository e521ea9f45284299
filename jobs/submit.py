"""`ddpm submit`."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from typing import NoReturn

from jobs import common, submission
from pipelines.errors import UserError

JOBS = ("prepare", "train", "tune", "sample", "evaluate")

DESCRIPTION = """\
Run a job on a Ray cluster through its Jobs API.  The configuration, this program's own code and the packages that
data.stages names travel along (unless they are installed: then the cluster must have them installed, too);
endpoints and credentials do not: the cluster has its own.  Behind JOB stands what `ddpm JOB` takes (see its
--help), but for --local; files and folders are named as the cluster sees them.

Submitting is safe to repeat: while the same job of the same run is under way, it is attached to, and after
that the next attempt goes on from the last commit: at once, if the one attached to had other settings.  Ctrl-C
leaves the job running.
"""

EPILOG = """\
examples:
  ddpm submit train --config digits.yaml
  ddpm submit prepare s3://bucket/raw --config my.yaml --image img --label fine_label
  ddpm submit train --config my.yaml --set workers.num=16 --address http://head:8265 --no-wait
  ddpm submit sample --config my.yaml --set sample.count=50000

beside it: ddpm list, ddpm status ID, ddpm logs ID --follow, ddpm stop ID.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument("job", choices=JOBS, metavar="JOB", help=", ".join(JOBS))
    common.add_config_arguments(parser)
    common.add_dashboard_argument(parser)
    parser.add_argument("--no-wait", action="store_true", help="submit and return; do not follow its log")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """The command line of `ddpm submit`.

    `argv` of the result is the part that is the job's own, checked by the job's parser: so whatever a job takes
    travels to it.
    """
    arguments, own_argv = parser.parse_known_args(argv)
    arguments.argv = own_argv
    own = _Own(arguments.job)
    own.module.add_arguments(own)
    # the configuration travels by itself, and the job finds the cluster that it runs on
    chosen = own.parse_args([*arguments.argv, "--config", arguments.config])
    if getattr(chosen, "local", False):
        raise UserError(f"submit {arguments.job}: takes no --local: the job runs on the cluster")
    if getattr(chosen, "out", None):
        from pipelines.storage import absolute

        # a folder means one of this process, as in the configuration
        arguments.argv = [*_without(arguments.argv, "--out"), "--out", absolute(chosen.out)]
    return arguments


def _without(argv: Sequence[str], option: str) -> list[str]:
    """The words without an option and its value."""
    words = iter(argv)
    left = []
    for word in words:
        if word == option:
            next(words, None)
        elif not word.startswith(f"{option}="):
            left.append(word)
    return left


class _Own(argparse.ArgumentParser):
    """The parser of a job, whose mistakes are ours."""

    def __init__(self, job: str) -> None:
        super().__init__(prog=f"ddpm submit {job}", add_help=False, allow_abbrev=False)
        self.module = importlib.import_module(f"jobs.{job}")
        self._job = job

    def error(self, message: str) -> NoReturn:
        raise UserError(f"submit {self._job}: {message}; see `ddpm {self._job} --help`")


def run(arguments: argparse.Namespace) -> int:
    common.use_local_stack(arguments.address)
    config = common.config_of(arguments)
    from pipelines.config import digest
    from pipelines.stages import check_travelling, code_of

    stages = config.data.stages if arguments.job in ("train", "tune") else ()
    for note in check_travelling(stages):
        print(f"note: {note}")
    # not in the name is where and how long it runs: while a run trains, nobody else may train it
    where = {"workers": True, "tracking": True}
    if arguments.job == "train":
        where["train"] = {"steps", "log_every", "eval_every", "checkpoint_every", "keep_checkpoints"}  # type: ignore[assignment]
    identity = digest(config.model_dump(mode="json", exclude=where))[:10]

    def submit() -> submission.Submission:
        return submission.submit(
            arguments.job,
            arguments.argv,
            config.to_yaml(),
            address=arguments.address,
            run=f"{config.name}-{identity}",
            wait=not arguments.no_wait,
            code=code_of(stages),
        )

    outcome = submit()
    if arguments.no_wait:
        if not outcome.as_asked:
            raise UserError(
                f"{outcome.job.submission_id}: is under way with other settings; submit again when it has ended, "
                f"or stop it first (ddpm stop {outcome.job.submission_id})"
            )
        return 0
    while not (outcome.as_asked or outcome.detached) and outcome.job.status == "SUCCEEDED":
        # more steps, say, or other workers: it goes on from where that job ended
        print(f"{outcome.job.submission_id} had other settings; now with those of this call")
        outcome = submit()
    if outcome.detached:
        return 130
    job = outcome.job
    if job.status != "SUCCEEDED":
        raise submission_failed(job)
    print(f"{job.submission_id} succeeded")
    return 0


class JobFailed(UserError):
    """A submitted job ended otherwise than well; its message is its own last line."""

    exit_code = 1


def submission_failed(job: submission.JobStatus) -> JobFailed:
    return JobFailed(
        f"{job.submission_id} {job.status.lower()}: {job.message}; `ddpm logs {job.submission_id}`"
    )
