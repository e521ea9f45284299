"""Jobs on a real Ray cluster, submitted as to a remote one."""

from __future__ import annotations

import os
import shlex

import pytest

from jobs import submission
from pipelines.errors import UserError
from tests.support.jobs import ddpm, succeeded

PROGRAMS = {
    "greet": """
import importlib, os, sys
import ddpm_core, infra.local, pipelines.errors
print("hello", *sys.argv[1:])
print("endpoint", os.environ["AWS_ENDPOINT_URL"])
print("here", os.path.dirname(os.path.dirname(ddpm_core.__file__)) == os.getcwd())
print("config", open("config.yaml").read())
""",
    "break": """
print("so far so good")
raise ValueError("data.prefix: nothing there")
""",
    "wait": """
import signal, sys, time
def stop(*_):
    print("saving", flush=True)
    time.sleep(4)
    print("saved", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
for i in range(600):
    print("tick", i, flush=True)
    time.sleep(0.5)
""",
}


@pytest.fixture
def programs(monkeypatch):
    """The job's name names a small program instead of one of ours."""

    def entrypoint(job, argv):
        return shlex.join(["python", "-c", PROGRAMS[job], *argv])

    monkeypatch.setattr(submission, "entrypoint", entrypoint)


class Ears:
    """Keeps what a call says and what the job's log was."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.log = ""

    def write(self, text: str) -> None:
        self.log += text


@pytest.fixture
def ears():
    return Ears()


def submit(stack, ears, job, run, argv=(), **options):
    return submission.submit(
        job,
        argv,
        "seed: 7",
        address=stack.dashboard_url,
        run=run,
        say=ears.said.append,
        write=ears.write,
        **options,
    )


def test_a_job_runs_with_our_code_and_the_clusters_endpoints(stack, programs, ears):
    done = submit(stack, ears, "greet", "first", ["a b", "$HOME"])
    assert (done.job.submission_id, done.job.status) == ("greet-first-1", "SUCCEEDED")
    assert (done.attached, done.detached) == (False, False)
    assert (done.job.job, done.job.run) == ("greet", "first")
    assert ears.log.count("hello a b $HOME\n") == 1
    assert f"endpoint {stack.s3_endpoint}\nhere True\n" in ears.log
    assert "config seed: 7\n" in ears.log

    again = submit(stack, ears, "greet", "first")
    assert (again.job.submission_id, again.attached) == ("greet-first-2", False)
    told: list[str] = []
    submission.logs("greet-first-2", address=stack.dashboard_url, write=told.append)
    assert "hello\n" in "".join(told)


def test_our_own_commands_run_there(stack, ears):
    done = submit(stack, ears, "train", "help", ["--help"])
    assert done.job.status == "SUCCEEDED", ears.log
    assert "usage: ddpm train" in ears.log


def test_a_job_that_fails_says_why_in_one_line(stack, programs, ears):
    done = submit(stack, ears, "break", "first")
    assert done.job.status == "FAILED"
    assert done.job.message == "exit code 1: ValueError: data.prefix: nothing there"
    assert "so far so good\n" in ears.log
    assert submission.status("break-first-1", address=stack.dashboard_url) == done.job


def test_a_job_under_way_is_attached_to_left_and_stopped(stack, programs, ears):
    first = submit(stack, ears, "wait", "first", wait=False)
    assert (first.job.submission_id, first.attached) == ("wait-first-1", False)

    def interrupt(text: str) -> None:
        ears.write(text)
        if "tick 1" in ears.log:
            raise KeyboardInterrupt

    second = submission.submit(
        "wait", [], "", address=stack.dashboard_url, run="first", say=ears.said.append, write=interrupt
    )
    assert (second.job.submission_id, second.attached, second.detached) == ("wait-first-1", True, True)
    assert second.job.status == "RUNNING"
    assert any("ddpm logs wait-first-1" in line for line in ears.said)
    assert any("ddpm stop wait-first-1" in line for line in ears.said)

    # SIGTERM, and more time to save its state than Ray's usual 3 s
    stopped = submission.stop("wait-first-1", address=stack.dashboard_url)
    assert stopped.status == "STOPPED"
    told: list[str] = []
    submission.logs("wait-first-1", address=stack.dashboard_url, follow=True, write=told.append)
    assert "".join(told).rstrip().endswith("saving\nsaved")
    assert submission.stop("wait-first-1", address=stack.dashboard_url) == stopped

    listed = submission.list_jobs(address=stack.dashboard_url)
    assert [job.status for job in listed if job.submission_id == "wait-first-1"] == ["STOPPED"]


def test_of_two_that_submit_at_once_the_second_attaches(stack, programs, ears, monkeypatch):
    submit(stack, ears, "greet", "raced")
    look = submission._list
    looks = []

    def late(client):
        looks.append(client)
        return look(client) if len(looks) > 1 else []  # the first look was before the other's submission

    monkeypatch.setattr(submission, "_list", late)
    second = submit(stack, ears, "greet", "raced")
    assert (second.job.submission_id, second.attached) == ("greet-raced-1", True)


def test_the_address_wins_over_the_environment(stack, programs, ears, monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert submission.list_jobs(address=stack.dashboard_url) is not None


def test_the_stack_is_known_by_an_address_without_http(stack):
    """Its token is used then, which nothing else in the environment gives."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "DDPM_"))
    }
    environment["DDPM_STATE"] = str(stack.state_dir)
    address = stack.dashboard_url.removeprefix("http://")
    succeeded(ddpm("list", "--address", address, env=environment))


@pytest.mark.parametrize("call", [submission.status, submission.stop, submission.logs])
def test_a_job_that_nobody_knows(stack, call):
    with pytest.raises(UserError, match="'nobody'") as raised:
        call("nobody", address=stack.dashboard_url)
    assert stack.dashboard_url in str(raised.value)


def test_a_wrong_token(stack, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    with pytest.raises(UserError, match="refuses the token"):
        submission.list_jobs(address=stack.dashboard_url)


@pytest.mark.parametrize("server", ["s3_endpoint", "mlflow_uri", "ray_address"])
def test_the_wrong_server_of_the_stack(stack, server):
    with pytest.raises(UserError, match="no Ray dashboard"):
        submission.list_jobs(address=getattr(stack, server))
