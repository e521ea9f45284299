"""The stack's snapshots, with its real S3 server and nothing else."""

from __future__ import annotations

import json
import tarfile
import time
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest

from infra.local import StackError, down, find, ports, problems, snapshot, up
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


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
