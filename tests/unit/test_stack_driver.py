"""How the stack is started, found and stopped, with one small server as its only component."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from infra.local import (
    Stack,
    StackError,
    down,
    find,
    ports,
    problems,
    process,
    s3_server,
    snapshot,
    state,
    up,
)
from infra.local import stack as driver
from infra.local.s3_server import S3

# As much of an S3 server as a start asks for: buckets can be made and listed.
SERVER = """
import http.server, sys
buckets = []
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        names = "".join(f"<Bucket><Name>{name}</Name></Bucket>" for name in buckets)
        kind = "ListAllMyBucketsResult" if self.path == "/" else "ListBucketResult"
        body = f'<{kind} xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Buckets>{names}</Buckets></{kind}>'.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_PUT(self):
        buckets.append(self.path[1:])
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def serve(stack: Stack) -> list[str]:
    return [sys.executable, "-c", SERVER, str(stack.ports["s3"])]


SMALL = dataclasses.replace(S3, command=serve, stop_grace_s=0.5)


@pytest.fixture(autouse=True)
def only_one(monkeypatch):
    use(monkeypatch, SMALL)
    # another stack on this machine may be about to take the usual one
    monkeypatch.setitem(ports.USUAL_PORTS, "s3", ports.choose_any(()))


def use(monkeypatch, component) -> None:
    monkeypatch.setattr(driver, "COMPONENTS", (component,))
    monkeypatch.setattr(driver, "S3", component)


@pytest.fixture
def folder(tmp_path, only_one):
    """A state folder whose stack, if any is left, is stopped."""
    folder = tmp_path / "state of mine"
    yield folder
    down(folder, save=False, log=lambda line: None)


def pid_of(folder: Path, component: str = "s3") -> int:
    return int(json.loads((folder / "stack.json").read_text())["records"][component]["process"]["pid"])


def test_up_again_starts_nothing(folder):
    first = up(folder)
    pid = pid_of(folder)
    assert up(folder) == first == find(folder)
    assert pid_of(folder) == pid
    assert problems(folder) == []


def test_a_server_that_stopped_answering_is_replaced(folder, monkeypatch):
    monkeypatch.setattr(driver, "_SILENCE_S", 0.5)
    up(folder)
    monkeypatch.setattr(s3_server, "PROBE_TIMEOUT_S", 0.3)
    psutil.Process(pid_of(folder)).suspend()
    assert find(folder) is not None  # it exists, and that is all that this looks at
    assert any("S3 server" in line for line in problems(folder))
    before = pid_of(folder)
    again = up(folder)
    assert pid_of(folder) != before
    assert "ddpm" in snapshot.list_buckets(again.s3_endpoint)


def test_what_an_interrupted_up_started_is_taken_over_by_the_next(folder, monkeypatch):
    def interrupted(self: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(driver._Starter, "_wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            up(folder)
    pid = pid_of(folder)
    assert find(folder) is None
    assert "ddpm" in snapshot.list_buckets(up(folder).s3_endpoint)
    assert pid_of(folder) == pid


def test_down_cleans_what_an_interrupted_up_started(folder, monkeypatch):
    def interrupted(self: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(driver._Starter, "_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        up(folder)
    stack_id = json.loads((folder / "stack.json").read_text())["stack_id"]
    assert process.family(stack_id)
    assert down(folder)
    assert process.family(stack_id) == []


DATABASE = {"mlflow.db", "mlflow.db-wal"}


@pytest.mark.parametrize(
    ("save", "snapshot_before", "left"),
    [(True, False, DATABASE), (False, False, set()), (False, True, DATABASE)],
)
def test_mlflows_database_goes_with_buckets_that_are_given_up(folder, save, snapshot_before, left):
    """But for one that belongs to the runs of an earlier snapshot, too, which the next `up` restores."""
    up(folder)
    if snapshot_before:
        (folder / "s3-snapshot.tar").touch()
    for name in (*DATABASE, "mine.db"):
        (folder / name).touch()
    assert down(folder, save=save)
    assert {path.name for path in folder.glob("*.db*")} == left | {"mine.db"}


def test_ctrl_c_in_the_terminal_leaves_the_stack(tmp_path):
    """A terminal sends SIGINT to its whole foreground group; the servers are not in it."""
    code = f"""
import signal, time
from pathlib import Path
# a shell that starts the tests in the background has them ignore it
signal.signal(signal.SIGINT, signal.default_int_handler)
from infra.local import stack as driver, up
from tests.unit.test_stack_driver import SMALL
driver.COMPONENTS, driver.S3 = (SMALL,), SMALL
up(Path({str(tmp_path)!r}))
print("up", flush=True)
time.sleep(60)
"""
    command = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert command.stdout is not None
        assert any(line.strip() == "up" for line in command.stdout)
        os.killpg(command.pid, signal.SIGINT)
        command.wait(20)
        recorded = process.ProcessId(
            **json.loads((tmp_path / "stack.json").read_text())["records"]["s3"]["process"]
        )
        assert process.running(recorded, "")
    finally:
        command.kill()
        down(tmp_path, save=False)


def test_a_taken_port_is_left_to_its_owner(folder, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as owner:
        taken = owner.getsockname()[1]
        monkeypatch.setitem(ports.USUAL_PORTS, "s3", taken)
        said: list[str] = []
        started = up(folder, log=said.append)
    assert started.ports["s3"] != taken
    assert f"port {taken} is taken: S3 server uses {started.ports['s3']} (s3)" in said


def test_a_port_that_somebody_took_meanwhile_costs_one_more_try(folder, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as owner:
        taken = owner.getsockname()[1]
        monkeypatch.setattr(ports, "choose", lambda preferred, other: taken)
        started = up(folder)
        assert started.ports["s3"] != taken
        assert "ddpm" in snapshot.list_buckets(started.s3_endpoint)


def test_anothers_answer_on_our_port_does_not_count(folder, tmp_path, monkeypatch):
    others = up(tmp_path / "others").ports["s3"]
    monkeypatch.setattr(ports, "choose", lambda preferred, other: others)
    try:
        assert up(folder).ports["s3"] != others
    finally:
        down(tmp_path / "others")


def test_a_server_that_ends_is_one_line_with_its_log(folder, monkeypatch):
    broken = dataclasses.replace(
        SMALL,
        command=lambda stack: [
            sys.executable,
            "-c",
            "print('x'); raise SystemExit('cannot open the database')",
        ],
    )
    use(monkeypatch, broken)
    with pytest.raises(StackError) as raised:
        up(folder)
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith("S3 server: ended before it was ready")
    assert str(folder / "logs" / "s3.log") in message
    assert message.endswith("cannot open the database")
    assert find(folder) is None


def test_a_passing_failure_costs_one_more_try(folder, monkeypatch):
    tries: list[Stack] = []

    def command(stack: Stack) -> list[str]:
        tries.append(stack)
        return (
            serve(stack) if len(tries) > 1 else [sys.executable, "-c", "raise SystemExit('timed out, sorry')"]
        )

    fickle = dataclasses.replace(SMALL, command=command, passing_failures=("timed out",))
    use(monkeypatch, fickle)
    said: list[str] = []
    assert "ddpm" in snapshot.list_buckets(up(folder, log=said.append).s3_endpoint)
    assert tries[0].ports == tries[1].ports
    assert [line for line in said if "timed out, sorry; trying once more" in line]


def test_a_recycled_process_id_is_not_killed(folder):
    """After a reboot the record names processes that are somebody else's now."""
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        state.prepare(folder)
        recorded = state.Record(process.ProcessId(bystander.pid, 1.0), healthy=True, log_offset=0)
        stale = dataclasses.replace(state.State.new(3), records={"s3": recorded}, buckets_whole=True)
        state.write(folder, stale)
        assert find(folder) is None
        assert "ddpm" in snapshot.list_buckets(up(folder).s3_endpoint)
        down(folder)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_two_ups_at_once_start_one_stack(folder):
    found: list[Stack] = []
    threads = [threading.Thread(target=lambda: found.append(up(folder))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert len(process.family(found[0].stack_id)) == 1


def test_without_a_stack_down_does_nothing_and_doctor_says_so(tmp_path):
    assert down(tmp_path / "none") is False
    assert find(tmp_path / "none") is None
    assert "ddpm up" in problems(tmp_path / "none")[0]
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "cannot be read"),
        ('{"format": 99}', "format 99"),
        ('{"format": 1}', "is damaged"),
        ("[]", "is damaged"),
    ],
)
def test_an_unreadable_record_is_one_line(tmp_path, content, complaint):
    (tmp_path / "stack.json").write_text(content)
    for command in (up, down, find, problems):
        with pytest.raises(StackError, match=complaint) as raised:
            command(tmp_path)
        assert str(tmp_path / "stack.json") in str(raised.value)
        assert "\n" not in str(raised.value)


def test_a_state_folder_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StackError, match=r"state folder .*file"):
        up(tmp_path / "file")


def test_zero_cpus_are_refused(tmp_path):
    with pytest.raises(StackError, match=r"num_cpus.*0"):
        up(tmp_path, num_cpus=0)
