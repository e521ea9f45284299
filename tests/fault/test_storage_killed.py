"""Writers that are killed, writers at the same time, and a disk that is full: an object is whole or not there."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.storage import Storage, StorageError, open_storage
from tests.support.s3 import BUCKET, SERVERS, use_server

ROOT = Path(__file__).resolve().parents[2]
SIZE = 3_000_000

# objects of one repeated byte, so that a mixture of two shows
_WRITER = """\
import sys
from pipelines.storage import open_storage
storage = open_storage(sys.argv[1])
storage.put("object", bytes(int(sys.argv[2])))
print("ready", flush=True)
for number in range(10**9):
    data = bytes([number % 251]) * int(sys.argv[2])
    storage.put("object", data)
    storage.put_if_absent(f"record-{number:06d}", data)
"""


@pytest.fixture(params=["file", *SERVERS])
def storage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Storage:
    if request.param == "file":
        return open_storage(str(tmp_path / "objects"))
    use_server(monkeypatch, request.getfixturevalue(request.param))
    return open_storage(f"s3://{BUCKET}/{request.node.name}")


def is_whole(data: bytes) -> bool:
    return len(data) == SIZE and data == data[:1] * SIZE


def test_a_killed_writer_leaves_whole_objects(storage: Storage) -> None:
    draw = random.Random(0)
    records = 0
    for _ in range(4):
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, storage.uri, str(SIZE)], cwd=ROOT, stdout=subprocess.PIPE
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        # somewhere in the middle of a write, of which there are many
        time.sleep(0.1 + draw.random() * 0.3)
        writer.send_signal(signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL
        writer.stdout.close()
        listed = storage.list()
        assert [info for info in listed if info.num_bytes != SIZE] == []
        assert all(is_whole(storage.get(info.key)) for info in listed)
        assert [info.key for info in listed if not info.key.startswith("record-")] == ["object"]
        records = max(records, len(listed) - 1)
    assert records > 0
    # what it left does not stand in the way of the next one
    storage.put("object", b"new")
    assert storage.get("object") == b"new"
    storage.delete([info.key for info in listed])
    assert storage.list() == []


def test_of_two_writers_at_once_a_reader_sees_one(storage: Storage) -> None:
    storage.put("object", b"a" * SIZE)
    stop = threading.Event()
    failed: list[BaseException] = []

    def write(data: bytes) -> None:
        try:
            while not stop.is_set():
                storage.put("object", data)
        except BaseException as error:
            failed.append(error)
            raise

    writers = [threading.Thread(target=write, args=(letter * SIZE,)) for letter in (b"a", b"b")]
    for writer in writers:
        writer.start()
    seen: set[bytes] = set()
    deadline = time.monotonic() + 60
    while len(seen) < 2 and time.monotonic() < deadline:
        for _ in range(10):
            data = storage.get("object")
            assert is_whole(data)
            seen.add(data[:1])
    stop.set()
    for writer in writers:
        writer.join()
    assert failed == []
    assert seen == {b"a", b"b"}
    assert [info.key for info in storage.list()] == ["object"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("only the superuser can mount a small file system, and not in every container")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("call", ["put", "put_if_absent"])
def test_a_disk_that_is_really_full(small_disk: Path, call: str) -> None:
    storage = open_storage(str(small_disk))
    storage.put("old", b"x" * 600_000)
    key = "old" if call == "put" else "record"
    with pytest.raises(StorageError) as caught:
        getattr(storage, call)(key, b"y" * 600_000)
    assert str(caught.value) == f"{small_disk}/{key}: No space left on device"
    assert storage.get("old") == b"x" * 600_000
    assert [path.name for path in small_disk.iterdir()] == ["old"]
    # it holds again what there is room for
    getattr(storage, call)("fits", b"z" * 300_000)
    assert storage.get("fits") == b"z" * 300_000
