"""Jobs on a Ray cluster: submit one (or attach to the one that runs already), watch it, stop it.

A job is known by what it does and to which run: submitting `train` of a run again attaches to the job that is
under way, and starts the next attempt if the last one ended.  So submitting is safe to repeat.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.cluster_address import Cluster, connectable
from jobs.job_log import Write, follow, patiently
from pipelines.errors import UserError, one_line

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

PACKAGES = ("ddpm_core", "pipelines", "jobs", "infra")
TERMINAL = ("SUCCEEDED", "FAILED", "STOPPED")

# a job that is stopped gets this long to commit its state before it is killed
STOP_WAIT_S = 30
_POLL_S = 1.0
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SECRET = re.compile(r"SECRET|TOKEN|PASSWORD|CREDENTIAL|ACCESS_KEY", re.IGNORECASE)
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_CHATTY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)


@dataclass(frozen=True)
class JobStatus:
    """A submitted job as its cluster tells it."""

    submission_id: str
    job: str  # train, sample, …; "" if it was not submitted by this program
    run: str
    status: str  # PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED
    message: str  # one line
    start_time_s: float | None = None  # seconds since the epoch
    end_time_s: float | None = None
    settings: str = ""  # hash of its configuration and arguments; "" if it was not submitted by this program

    @property
    def terminal(self) -> bool:
        return self.status in TERMINAL


@dataclass(frozen=True)
class Submission:
    """What became of a call of `submit`."""

    job: JobStatus
    attached: bool  # the job was under way already
    detached: bool  # Ctrl-C ended the watching; the job goes on
    as_asked: bool = True  # the job attached to has the configuration and arguments of this call


@dataclass(frozen=True)
class Plan:
    """Attach to `submission_id`, or start a job under it."""

    submission_id: str
    attach: bool


def plan(job: str, run: str, earlier: Iterable[JobStatus]) -> Plan:
    """What submitting `job` of `run` means, given the jobs that the cluster knows; pure.

    The newest attempt is attached to if it has not ended; otherwise the next attempt's number is taken.
    """
    prefix = f"{job}-{run}-"
    attempts = {}
    for known in earlier:
        number = known.submission_id.removeprefix(prefix)
        if known.submission_id.startswith(prefix) and number.isdecimal():
            attempts[int(number)] = known
    newest = max(attempts, default=0)
    if newest and not attempts[newest].terminal:
        return Plan(f"{prefix}{newest}", attach=True)
    return Plan(f"{prefix}{newest + 1}", attach=False)


def submit(
    job: str,
    argv: Sequence[str],
    config_text: str,
    *,
    address: str | None = None,
    run: str,
    wait: bool = True,
    env_vars: Mapping[str, str] | None = None,
    say: Callable[[str], object] = print,
    write: Write | None = None,
    code: Mapping[str, Path] | None = None,
) -> Submission:
    """Run `python -m jobs JOB --config config.yaml ARGV…` on the cluster whose dashboard is at `address`.

    This program's own code travels along, with `config_text` as config.yaml; endpoints and credentials do not:
    the cluster has its own.  `code`, further packages and modules by their names, travels too.  `env_vars` are set
    for the job and its workers.  While waiting, the job's log goes to `write` (standard output by default) as it
    comes; Ctrl-C leaves the job running and returns.

    Raises `UserError` if there is no such cluster, it refuses, or `run` can't be part of a job's name.
    """
    for value, name in ((job, "job"), (run, "run name")):
        if not _SAFE_NAME.fullmatch(value):
            raise UserError(
                f"{name} {value!r}: must be letters, digits, '.', '_' and '-' to name a job on a cluster"
            )
    env_vars = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **(env_vars or {})}
    assert not any(_SECRET.search(name) for name in env_vars), "secrets don't travel with a job"

    settings = hashlib.sha256("\0".join([config_text, *argv]).encode()).hexdigest()[:16]

    cluster = connectable(address)
    with _client(cluster) as client:

        def outcome(known: JobStatus, *, detached: bool) -> Submission:
            return Submission(known, planned.attach, detached, as_asked=known.settings == settings)

        planned = plan(job, run, patiently(cluster.url, lambda: _list(client)))
        if not planned.attach:
            labels = {"ddpm_job": job, "ddpm_run": run, "ddpm_settings": settings}
            planned = _start(client, cluster, planned, job, argv, config_text, env_vars, labels, code or {})
        name = planned.submission_id
        say(f"{name} is under way already: attached to it" if planned.attach else f"submitted {name}")
        say(f"  dashboard: {cluster.url}")
        if not wait:
            return outcome(_status(client, name, cluster), detached=False)
        try:
            _follow(client, name, cluster, write or _write_stdout)
        except KeyboardInterrupt:
            say(f"\ndetached: {name} goes on running")
            say(f"  its log:  ddpm logs {name} --follow")
            say(f"  stop it:  ddpm stop {name}")
            return outcome(_status(client, name, cluster), detached=True)
        return outcome(_settled(client, name, cluster), detached=False)


def status(submission_id: str, *, address: str | None = None) -> JobStatus:
    """How a job is doing; raises `UserError` if the cluster does not know it."""
    cluster = connectable(address)
    with _client(cluster) as client:
        return _status(client, submission_id, cluster)


def list_jobs(*, address: str | None = None) -> list[JobStatus]:
    """The jobs that the cluster knows, oldest first."""
    cluster = connectable(address)
    with _client(cluster) as client:
        listed = patiently(cluster.url, lambda: _list(client))
        return sorted(listed, key=lambda known: known.start_time_s or 0.0)


def logs(
    submission_id: str, *, address: str | None = None, follow: bool = False, write: Write | None = None
) -> JobStatus:
    """Write what a job has printed, and with `follow` what it prints until it ends."""
    cluster = connectable(address)
    with _client(cluster) as client:
        known = _status(client, submission_id, cluster)
        if follow:
            _follow(client, submission_id, cluster, write or _write_stdout)
            return _settled(client, submission_id, cluster)
        (write or _write_stdout)(patiently(cluster.url, lambda: client.get_job_logs(submission_id)))
        return known


def stop(submission_id: str, *, address: str | None = None, wait: bool = True) -> JobStatus:
    """Stop a job: it gets SIGTERM, and SIGKILL if it has not ended `STOP_WAIT_S` later; one that ended stays so."""
    cluster = connectable(address)
    with _client(cluster) as client:
        known = _status(client, submission_id, cluster)
        if known.terminal:
            return known
        patiently(cluster.url, lambda: client.stop_job(submission_id))
        return _settled(client, submission_id, cluster) if wait else _status(client, submission_id, cluster)


def _start(
    client: JobSubmissionClient,
    cluster: Cluster,
    planned: Plan,
    job: str,
    argv: Sequence[str],
    config_text: str,
    env_vars: Mapping[str, str],
    labels: dict[str, str],
    code: Mapping[str, Path],
) -> Plan:
    """Start the planned job, or attach to it if somebody was faster."""
    with tempfile.TemporaryDirectory(prefix="ddpm-job-") as folder:
        stage(Path(folder), config_text, code)
        try:
            client.submit_job(
                entrypoint=entrypoint(job, argv),
                submission_id=planned.submission_id,
                runtime_env={"working_dir": folder, "env_vars": dict(env_vars)},
                metadata=labels,
            )
        except RuntimeError as error:
            listed = patiently(cluster.url, lambda: _list(client))
            if not any(known.submission_id == planned.submission_id for known in listed):
                raise UserError(
                    f"{planned.submission_id}: the cluster refused it ({one_line(error)})"
                ) from None
            return Plan(planned.submission_id, attach=True)
    return planned


def entrypoint(job: str, argv: Sequence[str]) -> str:
    """The command that runs a job in a staged folder; `python` is the cluster's own."""
    return shlex.join(["python", "-m", "jobs", job, "--config", "config.yaml", *argv])


def stage(folder: Path, config_text: str, code: Mapping[str, Path] | None = None) -> None:
    """Put this program's packages, wherever they are installed, the user's `code` and the configuration into
    `folder`.
    """
    for name, path in (code or {}).items():
        if name in PACKAGES:
            continue
        if path.is_dir():
            shutil.copytree(path, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*"))
        else:
            shutil.copyfile(path, folder / f"{name}.py")
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations
        shutil.copytree(
            spec.submodule_search_locations[0],
            folder / package,
            ignore=shutil.ignore_patterns("__pycache__", "*.pyc", "tests", ".*"),
        )
    (folder / "config.yaml").write_text(config_text)


@contextmanager
def _client(cluster: Cluster) -> Iterator[JobSubmissionClient]:
    """Ray's client for a cluster that has just answered; its failures become `UserError`s."""
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for chatty in _CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING)

    # Ray lets these two win over the address that it is given
    hidden = {name: os.environ.pop(name, None) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")}
    try:
        # only the constructor reads them
        client = patiently(cluster.url, lambda: JobSubmissionClient(cluster.url, headers=cluster.headers()))
    finally:
        os.environ.update({name: value for name, value in hidden.items() if value is not None})
    try:
        yield client
    except AuthenticationError as error:
        raise UserError(f"{cluster.url}: {one_line(error)}") from None
    except BrokenPipeError:
        # the reader of our own output left
        raise
    except OSError as error:  # requests' exceptions are OSErrors
        raise UserError(f"{cluster.url}: does not answer any more ({one_line(error)})") from None


def _list(client: JobSubmissionClient) -> list[JobStatus]:
    # a driver that connected by itself (`ray.init`) is listed too, without a submission's name
    return [_job_status(details) for details in client.list_jobs() if details.submission_id]


def _status(client: JobSubmissionClient, submission_id: str, cluster: Cluster) -> JobStatus:
    def ask() -> JobStatus:
        try:
            return _job_status(client.get_job_info(submission_id))
        except RuntimeError as error:
            if "status code 404" in str(error) or "does not exist" in str(error):
                raise UserError(
                    f"job {submission_id!r}: not known to the cluster at {cluster.url}; `ddpm list` shows its jobs"
                ) from None
            raise

    return patiently(cluster.url, ask)


def _job_status(details: Any) -> JobStatus:
    metadata = details.metadata or {}
    return JobStatus(
        submission_id=details.submission_id,
        job=metadata.get("ddpm_job", ""),
        run=metadata.get("ddpm_run", ""),
        status=str(getattr(details.status, "value", details.status)),
        message=brief(details.message or "", details.driver_exit_code),
        start_time_s=details.start_time / 1000 if details.start_time else None,
        end_time_s=details.end_time / 1000 if details.end_time else None,
        settings=metadata.get("ddpm_settings", ""),
    )


def brief(message: str, exit_code: int | None) -> str:
    """One line out of Ray's message on a job: of a failed one, its exit code and the last line that it printed."""
    _, _, log = message.partition("last available logs")
    if not log:
        return one_line(RuntimeError(message)) if message else ""
    lines = [_ANSI.sub("", line).strip() for line in log.splitlines()[1:]]
    # lines of workers are marked "(name pid=…)"; what the job itself said last is the better reason
    own = [line for line in lines if line and not re.match(r"\(\S+ pid=\d+", line)]
    said = next(iter(reversed(own)), "") or next((line for line in reversed(lines) if line), "no output")
    return one_line(RuntimeError(f"exit code {exit_code}: {said}" if exit_code is not None else said))


def _settled(client: JobSubmissionClient, submission_id: str, cluster: Cluster) -> JobStatus:
    """The job's status once it has ended."""
    while not (known := _status(client, submission_id, cluster)).terminal:
        time.sleep(_POLL_S)
    return known


def _follow(client: JobSubmissionClient, submission_id: str, cluster: Cluster, write: Write) -> None:
    follow(
        client, submission_id, cluster.url, write, lambda: _status(client, submission_id, cluster).terminal
    )


def _write_stdout(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
