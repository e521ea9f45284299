"""`ddpm status`, `logs`, `stop` and `list`: the jobs that a cluster has been given."""

from __future__ import annotations

import argparse
import time

from jobs import common, submission

_DESCRIPTIONS = {
    "status": "Say how a submitted job is doing.  Exit code 0 unless it failed.",
    "logs": "Print what a submitted job has printed, and with --follow what it prints until it ends.",
    "stop": "Stop a submitted job.  What it committed stays; submitting it again goes on from there.",
    "list": "List the jobs that a cluster has been given, oldest first.",
}


def add_command_arguments(command: str, parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTIONS[command]
    if command != "list":
        parser.add_argument(
            "id", metavar="ID", help="the job's name, as `ddpm submit` and `ddpm list` print it"
        )
    if command == "logs":
        parser.add_argument("--follow", action="store_true", help="stay until the job ends")
    common.add_dashboard_argument(parser)
    parser.set_defaults(command=command)


def run(arguments: argparse.Namespace) -> int:
    common.use_local_stack(arguments.address)
    if arguments.command == "list":
        for job in submission.list_jobs(address=arguments.address):
            print(_line(job))
        return 0
    if arguments.command == "logs":
        job = submission.logs(arguments.id, address=arguments.address, follow=arguments.follow)
        return 1 if arguments.follow and job.status == "FAILED" else 0
    if arguments.command == "stop":
        job = submission.stop(arguments.id, address=arguments.address)
    else:
        job = submission.status(arguments.id, address=arguments.address)
    print(_line(job))
    return 1 if job.status == "FAILED" else 0


def _line(job: submission.JobStatus) -> str:
    start = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.start_time_s)) if job.start_time_s else "—"
    return f"{job.submission_id:<36} {job.status:<10} {start:<20} {job.message}".rstrip()
