"""The stack's driver and its snapshots, with the S3 server as the only component: it starts in two seconds."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from urllib.parse import quote

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
from infra.local.loopback import RequestFailed, request
from infra.local.s3_server import S3

KEYS = (
    "plain",
    "a/b/c.tar",
    "a b+c",
    "%2F and %41",
    "é/ü 漢 😀",
    "a//b",
    "/leading",
    "trailing/",
    "a/../b",
    "..",
    "q?x=1&y=2#z",
    "tab\tand\x01control",
    "<&>\"'",
    "back\\slash",
    "x" * 900,
)


@pytest.fixture
def only_s3(monkeypatch):
    monkeypatch.setattr(driver, "COMPONENTS", (S3,))
    # another stack on this machine may be about to take the usual one
    monkeypatch.setitem(ports.USUAL_PORTS, "s3", ports.choose_any(()))


@pytest.fixture
def folder(tmp_path, only_s3):
    """A state folder whose stack, if any is left, is stopped."""
    folder = tmp_path / "state of mine"
    yield folder
    down(folder, save=False, log=lambda line: None)


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    """One S3 server for the tests that only need objects."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "COMPONENTS", (S3,))
        folder = tmp_path_factory.mktemp("s3")
        yield up(folder).s3_endpoint
        down(folder, save=False)


def put(endpoint: str, bucket: str, key: str, body: bytes, **headers: str) -> None:
    signed = {"content-type": "application/x-test", **headers, **snapshot._SIGNED}
    with request("PUT", f"{endpoint}/{bucket}/{quote(key, safe='')}", body=body, headers=signed):
        pass


def get(endpoint: str, bucket: str, key: str) -> tuple[bytes, dict[str, str]]:
    with request("GET", f"{endpoint}/{bucket}/{quote(key, safe='')}", headers=snapshot._SIGNED) as response:
        return response.read(), {name.lower(): value for name, value in response.headers.items()}


def pid_of(folder: Path, component: str = "s3") -> int:
    return int(json.loads((folder / "stack.json").read_text())["records"][component]["process"]["pid"])


def test_every_object_survives_with_any_key(endpoint, tmp_path):
    snapshot.make_buckets(endpoint, ["from-here", "empty-bucket"])
    for key in KEYS:
        put(endpoint, "from-here", key, b"body of " + key.encode(), **{"x-amz-meta-note": "kept"})
    put(endpoint, "from-here", "empty object", b"")
    path = tmp_path / "saved.tar"
    before = set(snapshot.list_keys(endpoint, "from-here"))
    assert before == {*KEYS, "empty object"}
    assert snapshot.save(endpoint, path) == len(before)

    for key in before:
        with request("DELETE", f"{endpoint}/from-here/{quote(key, safe='')}", headers=snapshot._SIGNED):
            pass
    for bucket in ("from-here", "empty-bucket"):
        with request("DELETE", f"{endpoint}/{bucket}", headers=snapshot._SIGNED):
            pass

    assert snapshot.restore(endpoint, path) == len(before)
    assert {"from-here", "empty-bucket"} <= set(snapshot.list_buckets(endpoint))
    assert set(snapshot.list_keys(endpoint, "from-here")) == before
    for key in KEYS:
        body, headers = get(endpoint, "from-here", key)
        assert body == b"body of " + key.encode()
        assert headers["content-type"] == "application/x-test"
        assert headers["x-amz-meta-note"] == "kept"
    assert get(endpoint, "from-here", "empty object")[0] == b""


def test_listing_goes_over_pages(endpoint):
    snapshot.make_buckets(endpoint, ["paged"])
    keys = {f"k{i:02d}" for i in range(7)}
    for key in keys:
        put(endpoint, "paged", key, b"x")
    assert set(snapshot.list_keys(endpoint, "paged", page_size=3)) == keys


def test_a_snapshot_that_fails_leaves_the_old_one(endpoint, tmp_path, monkeypatch):
    path = tmp_path / "saved.tar"
    path.write_bytes(b"the old one")
    snapshot.make_buckets(endpoint, ["one"])
    put(endpoint, "one", "key", b"x")

    def refuse(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshot, "_save_object", refuse)
    with pytest.raises(StackError, match="No space left on device") as raised:
        snapshot.save(endpoint, path)
    assert "\n" not in str(raised.value)
    assert path.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("where", ["inside an object", "between two objects"])
def test_a_cut_snapshot_is_named(endpoint, tmp_path, where):
    path = tmp_path / "saved.tar"
    snapshot.make_buckets(endpoint, ["one"])
    put(endpoint, "one", "key", b"x" * 5000)
    snapshot.save(endpoint, path)
    with tarfile.open(path) as tar:
        [found] = [member for member in tar if member.name == "one/key"]
    cut = found.offset_data + (100 if where == "inside an object" else 5120)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(StackError, match=r"saved\.tar away"):
        snapshot.restore(endpoint, path)


def test_buckets_come_back_after_down(folder):
    first = up(folder)
    assert set(snapshot.list_buckets(first.s3_endpoint)) == {"ddpm", "mlflow"}
    put(first.s3_endpoint, "ddpm", "runs/x/commit.json", b"{}")
    assert down(folder)
    assert find(folder) is None
    assert not (folder / "stack.json").exists()
    with pytest.raises(RequestFailed):
        snapshot.list_buckets(first.s3_endpoint)

    second = up(folder)
    assert get(second.s3_endpoint, "ddpm", "runs/x/commit.json")[0] == b"{}"


def test_up_again_starts_nothing(folder):
    first = up(folder)
    pid = pid_of(folder)
    assert up(folder) == first == find(folder)
    assert pid_of(folder) == pid
    assert problems(folder) == []


def test_a_killed_s3_server_comes_back_with_the_snapshot_on_its_port(folder):
    up(folder)
    put(up(folder).s3_endpoint, "ddpm", "kept", b"1")
    down(folder)
    first = up(folder)
    psutil.Process(pid_of(folder)).kill()
    wait_until(lambda: find(folder) is None)
    assert any("S3 server" in line and "s3.log" in line for line in problems(folder))

    said: list[str] = []
    second = up(folder, log=said.append)
    assert second.s3_endpoint == first.s3_endpoint
    assert get(second.s3_endpoint, "ddpm", "kept")[0] == b"1"
    assert any("since the last snapshot is lost" in line for line in said)


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


def test_a_half_restored_server_does_not_replace_the_snapshot(folder, monkeypatch):
    put(up(folder).s3_endpoint, "ddpm", "kept", b"1")
    down(folder)

    def interrupted(*arguments: object) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "restore", interrupted)
        with pytest.raises(KeyboardInterrupt):
            up(folder)
    assert find(folder) is None
    assert down(folder)
    assert get(up(folder).s3_endpoint, "ddpm", "kept")[0] == b"1"


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


def test_ctrl_c_in_the_terminal_leaves_the_stack(tmp_path):
    """A terminal sends SIGINT to its whole foreground group; the servers are not in it."""
    code = f"""
import time
from pathlib import Path
from infra.local import stack as driver, up
from infra.local.s3_server import S3
driver.COMPONENTS = (S3,)
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
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(driver, "COMPONENTS", (S3,))
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


def test_anothers_answer_on_our_port_does_not_count(folder, monkeypatch, endpoint):
    port = int(endpoint.rpartition(":")[2])
    monkeypatch.setattr(ports, "choose", lambda preferred, other: port)
    assert up(folder).ports["s3"] != port


def test_a_server_that_ends_is_one_line_with_its_log(folder, monkeypatch):
    broken = dataclasses.replace(
        S3,
        command=lambda stack: [
            sys.executable,
            "-c",
            "print('x'); raise SystemExit('cannot open the database')",
        ],
    )
    monkeypatch.setattr(driver, "COMPONENTS", (broken,))
    with pytest.raises(StackError) as raised:
        up(folder)
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith("S3 server: ended before it was ready")
    assert str(folder / "logs" / "s3.log") in message
    assert message.endswith("cannot open the database")
    assert find(folder) is None


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


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
