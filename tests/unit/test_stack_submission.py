"""What `jobs.submission` decides without a cluster, and what an address that is none costs."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from dataclasses import dataclass, field

import pytest

from jobs import cluster_address, job_log, submission
from jobs.cluster_address import connectable
from jobs.submission import JobStatus, Plan, brief, plan, stage
from pipelines.errors import UserError


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    names = ("DDPM_DASHBOARD", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
    for name in (*names, "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


def known(submission_id: str, status: str) -> JobStatus:
    return JobStatus(submission_id, "train", "digits-1a", status, "")


def test_the_first_attempt():
    assert plan("train", "digits-1a", []) == Plan("train-digits-1a-1", attach=False)


@pytest.mark.parametrize("status", ["PENDING", "RUNNING"])
def test_a_job_under_way_is_attached_to(status):
    earlier = [known("train-digits-1a-1", "FAILED"), known("train-digits-1a-2", status)]
    assert plan("train", "digits-1a", earlier) == Plan("train-digits-1a-2", attach=True)


@pytest.mark.parametrize("status", ["SUCCEEDED", "FAILED", "STOPPED"])
def test_after_the_end_comes_the_next_attempt(status):
    earlier = [known(f"train-digits-1a-{n}", status) for n in (10, 9, 1)]
    assert plan("train", "digits-1a", earlier) == Plan("train-digits-1a-11", attach=False)


def test_other_jobs_and_runs_do_not_count():
    earlier = [
        known("train-digits-1a-2-5", "RUNNING"),
        known("sample-digits-1a-3", "RUNNING"),
        known("train-digits-1b-4", "RUNNING"),
        known("raysubmit_x", "RUNNING"),
        known("train-digits-1a-", "RUNNING"),
    ]
    assert plan("train", "digits-1a", earlier) == Plan("train-digits-1a-1", attach=False)


def test_the_reason_of_a_failed_job_is_its_own_last_line():
    message = (
        "Job entrypoint command failed with exit code 2, last available logs (truncated to 20,000 chars):\n"
        "starting\n\x1b[31mddpm train: schedule.beta_end: must be above beta_start, got 0\x1b[0m\n"
        "(Worker pid=12) bye\n\n"
    )
    assert brief(message, 2) == "exit code 2: ddpm train: schedule.beta_end: must be above beta_start, got 0"


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("Job finished successfully.", "Job finished successfully."),
        ("two\nlines", "two lines"),
        ("", ""),
        ("failed, last available logs (…):\n\n", "exit code 1: no output"),
        ("failed, last available logs (…):\n(W pid=1) only this\n", "exit code 1: (W pid=1) only this"),
    ],
)
def test_every_message_is_one_line(message, said):
    assert brief(message, 1) == said


def test_a_log_told_from_its_start_again_is_written_once():
    written: list[str] = []
    once = job_log._Once(written.append)
    for chunks in (["ab", "cd"], ["a", "bcde"], ["abcdef"], []):
        once.rewind()
        for chunk in chunks:
            once.write(chunk)
    assert "".join(written) == "abcdef"


def test_the_code_travels_without_tests_and_caches(tmp_path):
    stage(tmp_path, "a: 1\n")
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert {"config.yaml", "ddpm_core/__init__.py", "pipelines/errors.py", "jobs/cli.py"} <= names
    assert "infra/local/stack.py" in names
    assert not [name for name in names if "__pycache__" in name or "tests" in name.split("/")]
    assert (tmp_path / "config.yaml").read_text() == "a: 1\n"


def test_arguments_reach_the_job_as_they_are():
    command = submission.entrypoint("train", ["--set", "run.name=it's $HOME; rm"])
    assert command == "python -m jobs train --config config.yaml --set 'run.name=it'\"'\"'s $HOME; rm'"


def test_secrets_do_not_travel():
    with pytest.raises(AssertionError):
        submission.submit("train", [], "", run="x", env_vars={"AWS_SECRET_ACCESS_KEY": "x"})


@pytest.mark.parametrize("run", ["", "a b", "a/b", "-x", "ä"])
def test_a_run_name_that_can_name_no_job(run):
    with pytest.raises(UserError, match="run name"):
        submission.submit("train", [], "", run=run, address="http://127.0.0.1:1")


def complaint(address: str | None) -> str:
    with pytest.raises(UserError) as raised:
        connectable(address)
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_no_address_at_all():
    assert "ddpm up" in complaint(None)


@pytest.mark.parametrize(
    "address",
    ["ray://host:10001", "ftp://host", "http://", "http://host:99999", "http://[::1", "http://host:0"],
)
def test_an_address_that_is_none(address):
    assert address in complaint(address)


def test_nothing_listens():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    assert "does not answer (nothing listens there)" in complaint(f"http://127.0.0.1:{port}")


def test_no_such_host():
    assert "no host of that name" in complaint("http://no-such-host.invalid:8265")


def test_something_listens_and_says_nothing(monkeypatch):
    monkeypatch.setattr(cluster_address, "_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert "no HTTP answer" in complaint(f"127.0.0.1:{silent.getsockname()[1]}")


def test_a_name_server_that_says_nothing(monkeypatch):
    monkeypatch.setattr(cluster_address, "_TIMEOUT_S", -0.7)
    monkeypatch.setattr(cluster_address, "_probe", lambda cluster: time.sleep(3))
    assert "timed out" in complaint("http://127.0.0.1:1")


@dataclass
class Answer:
    address: str
    status: int = 200
    body: bytes = b""
    location: str = ""
    tokens: list[str | None] = field(default_factory=list)


@pytest.fixture
def server():
    """An HTTP server whose answers the test sets; it keeps the requests' tokens."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer.tokens.append(self.headers.get("Authorization"))
            self.send_response(answer.status)
            if answer.location:
                self.send_header("Location", answer.location)
            self.end_headers()
            self.wfile.write(answer.body)

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        answer = Answer(f"http://127.0.0.1:{running.server_port}")
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield answer
        running.shutdown()


@pytest.mark.parametrize("body", [b"<html>", b"{}", b'["ray_version"', b"\xff\xfe"])
def test_an_answer_that_is_not_rays(server, body):
    server.body = body
    assert "no Ray dashboard" in complaint(server.address)


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "wants a token"), (403, "refuses the token"), (404, "HTTP 404"), (500, "HTTP 500")],
)
def test_a_refusal_says_what_to_do(server, status, words):
    server.status = status
    assert words in complaint(server.address)


def test_the_token_does_not_follow_a_redirect(server, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    server.status, server.location = 302, f"{server.address}/login"
    assert "no Ray dashboard" in complaint(server.address)
    assert server.tokens == ["Bearer secret"]


def test_a_dashboard_is_reached_with_the_token_of_the_file(server, monkeypatch, tmp_path):
    (tmp_path / "token").write_text("from-file\n")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    server.body = b'{"ray_version": "2.60.0"}'
    cluster = connectable(server.address + "/")
    assert cluster.url == server.address
    assert server.tokens == ["Bearer from-file"]
    assert "from-file" not in repr(cluster)


def test_a_token_file_that_is_missing(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/no/such/file")
    assert "RAY_AUTH_TOKEN_PATH=/no/such/file" in complaint("http://127.0.0.1:1")
