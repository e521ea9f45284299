from __future__ import annotations

import os
import sys
import time

import psutil
import pytest

from infra.local import process
from infra.local.process import ProcessId

SLEEP = [sys.executable, "-c", "import time; time.sleep(120)"]
# a child that leads a session of its own, and a parent that can be killed alone
PARENT = [
    sys.executable,
    "-c",
    f"import subprocess, time; subprocess.Popen({SLEEP!r}, start_new_session=True); print('ready', flush=True); "
    "time.sleep(120)",
]

DEAF = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print('ready', flush=True)
time.sleep(120)
"""
LISTENER = [
    sys.executable,
    "-c",
    "import socket, time; s = socket.create_server(('127.0.0.1', 0)); "
    "print(s.getsockname()[1], 'ready', flush=True); time.sleep(120)",
]


@pytest.fixture
def server(tmp_path):
    """Starts marked processes; whatever of them is left at the end is killed."""
    stack_id = f"test-{os.getpid()}-{time.monotonic_ns()}"
    log = tmp_path / "server.log"

    class Server:
        def __init__(self) -> None:
            self.stack_id = stack_id
            self.log = log

        def start(self, argv, **marks):
            env = {**os.environ, process.STACK_MARK: stack_id, process.COMPONENT_MARK: "one", **marks}
            return process.start(argv, env=env, cwd=tmp_path, log=log)

        def wait_for(self, text):
            deadline = time.monotonic() + 20
            while text not in log.read_text():
                assert time.monotonic() < deadline
                time.sleep(0.02)

    yield Server()
    for left in process.family(stack_id):
        left.kill()


def test_a_started_process_is_known_again(server):
    started = server.start(SLEEP)
    found = process.running(started, server.stack_id)
    assert found is not None
    assert found.pid == started.pid


def test_it_leads_a_session_of_its_own(server):
    assert os.getsid(server.start(SLEEP).pid) != os.getsid(0)


def test_another_process_with_the_same_number_is_not_ours(server):
    other = psutil.Process(os.getpid())
    assert process.running(ProcessId(other.pid, other.create_time() - 100), server.stack_id) is None


def test_the_mark_identifies_it_when_the_clock_was_set(server):
    started = server.start(SLEEP)
    assert process.running(ProcessId(started.pid, started.create_time - 3600), server.stack_id)


def test_stop_spares_another_process_with_the_recorded_number(server):
    bystander = server.start(SLEEP, **{process.STACK_MARK: server.stack_id + "-other"})
    recorded = ProcessId(bystander.pid, bystander.create_time - 100)
    assert process.stop(server.stack_id, component="one", first=recorded, grace_s=1) == []
    assert psutil.pid_exists(bystander.pid)
    process.stop(server.stack_id + "-other", component="one", first=bystander, grace_s=1)


def test_stop_ends_descendants_in_other_sessions(server):
    started = server.start(PARENT)
    server.wait_for("ready")
    assert len(process.family(server.stack_id)) == 2
    assert process.stop(server.stack_id, component="one", first=started, grace_s=1) == []
    assert process.family(server.stack_id) == []


def test_stop_ends_orphans_of_a_killed_parent(server):
    started = server.start(PARENT)
    server.wait_for("ready")
    psutil.Process(started.pid).kill()
    assert process.stop(server.stack_id, component="one", first=started, grace_s=1) == []
    assert process.family(server.stack_id) == []


def test_stop_kills_what_ignores_a_polite_signal(server):
    started = server.start([sys.executable, "-c", DEAF])
    server.wait_for("ready")
    assert process.stop(server.stack_id, component="one", first=started, grace_s=0.2) == []
    assert process.running(started, server.stack_id) is None


def test_stop_leaves_the_other_components(server):
    one = server.start(SLEEP)
    two = server.start(SLEEP, **{process.COMPONENT_MARK: "two"})
    process.stop(server.stack_id, component="one", first=one, grace_s=1)
    assert [found.pid for found in process.family(server.stack_id)] == [two.pid]


def test_a_dead_child_is_not_running(server):
    started = server.start([sys.executable, "-c", ""])
    psutil.Process(started.pid).wait(20)
    assert process.running(started, server.stack_id) is None


def test_listening_ports_are_those_of_the_whole_family(server):
    started = server.start([sys.executable, "-c", f"import subprocess; subprocess.run({LISTENER!r})"])
    server.wait_for("ready")
    port = int(server.log.read_text().splitlines()[-1].split()[0])
    found = process.running(started, server.stack_id)
    assert found is not None
    assert process.listening_ports(found) == {port}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("starting\nOSError: Address already in use\nbye\n", "OSError: Address already in use"),
        ("starting\nall well\n", "all well"),
        ("\x1b[31mbad: cannot bind\x1b[0m\n\n", "bad: cannot bind"),
        ("--- started 2026-01-01 00:00:00\n", ""),
        ("", ""),
    ],
)
def test_the_telling_line_of_a_log(tmp_path, text, line):
    log = tmp_path / "x.log"
    log.write_text("ERROR of an earlier start\n" + text)
    assert process.telling_line(log, len("ERROR of an earlier start\n")) == line
