"""Storage that fails: what is asked for comes whole in the end, or a typed error says what did not."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.retries import Budget
from pipelines.storage import FileStorage, ObjectMissing, Storage, StorageError, open_storage
from tests.support.s3 import HostileS3, use_endpoint

BODY = bytes(range(256)) * 20


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.retries.time.sleep", lambda s: None)


def one_line(attempt: Callable[[], object]) -> str:
    with pytest.raises(StorageError) as caught:
        attempt()
    message = str(caught.value)
    assert "\n" not in message
    return message


class Opened:
    """A hostile server and a storage on it."""

    def __init__(self, patch: pytest.MonkeyPatch, script: Callable[[str, str, int], str]) -> None:
        self.server = HostileS3(script)
        self._running = self.server.running()
        self._patch = patch

    def __enter__(self) -> tuple[HostileS3, Storage]:
        use_endpoint(self._patch, self._running.__enter__())
        return self.server, open_storage("s3://bucket/p")

    def __exit__(self, *error: object) -> None:
        self._running.__exit__(None, None, None)


@pytest.mark.parametrize("trouble", ["short", "drop", "503", "500"])
@pytest.mark.parametrize("times", [1, 3])
def test_a_read_that_goes_wrong_at_first_is_repeated(
    trouble: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Opened(monkeypatch, lambda method, path, n: trouble if n <= times else "") as (server, storage):
        server.objects["/bucket/p/x"] = BODY
        assert storage.get("x") == BODY
        assert len(server.requests) == times + 1


def test_a_body_that_is_always_cut_short_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with Opened(monkeypatch, lambda method, path, n: "short") as (server, storage):
        server.objects["/bucket/p/x"] = BODY
        message = one_line(lambda: storage.get("x"))
        assert message.startswith("s3://bucket/p/x: could not be read whole: ")
        assert f"(tried {Budget().tries} times in " in message
        assert len(server.requests) == Budget().tries


@pytest.mark.parametrize("trouble", ["503", "drop"])
def test_a_server_that_never_works_is_named_with_the_object(
    trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Opened(monkeypatch, lambda method, path, n: trouble) as (server, storage):
        for attempt in (lambda: storage.get("x"), lambda: storage.put("x", b""), lambda: storage.list()):
            message = one_line(attempt)
            assert message.startswith("s3://bucket/p")
            assert "the S3 server at http://127.0.0.1:" in message
        assert not isinstance(message, ObjectMissing)
        assert server.objects == {}


def test_a_range_that_the_server_ignores_is_not_taken_for_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    # this server answers 200 with the whole object, as some proxies do
    with Opened(monkeypatch, lambda method, path, n: "") as (server, storage):
        server.objects["/bucket/p/x"] = BODY
        assert "gives no parts of objects" in one_line(lambda: storage.get_range("x", 10, 20))
        assert len(server.requests) == 1


@pytest.mark.parametrize("wrong", ["shift", "clip"])
@pytest.mark.parametrize("kind", ["s3", "http"])
def test_another_part_than_was_asked_for_is_not_taken(
    kind: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Opened(monkeypatch, lambda method, path, n: "") as (server, storage):
        if kind == "http":
            storage = open_storage(f"{os.environ['AWS_ENDPOINT_URL']}/bucket/p")
        server.objects["/bucket/p/x"] = BODY
        server.ranges = True
        assert storage.get_range("x", 10, 20) == BODY[10:30]
        setattr(server, wrong, 1)
        message = one_line(lambda: storage.get_range("x", 10, 20))
        assert message.startswith(f"{storage.uri}/x: could not be read whole: ")
        assert ("another part" if wrong == "shift" else "19 of 20 bytes came") in message


@pytest.mark.parametrize("trouble", ["503", "drop"])
def test_a_write_that_goes_wrong_at_first_is_repeated(trouble: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Opened(monkeypatch, lambda method, path, n: trouble if n <= 2 else "") as (server, storage):
        storage.put("x", BODY)
        assert storage.put_if_absent("y", b"commit") is True
        assert server.objects == {"/bucket/p/x": BODY, "/bucket/p/y": b"commit"}


def test_the_winner_whose_answer_was_lost_is_told_that_it_won(monkeypatch: pytest.MonkeyPatch) -> None:
    with Opened(monkeypatch, lambda method, path, n: "lost" if n == 1 else "") as (server, storage):
        assert storage.put_if_absent("x", b"mine") is True
        assert server.objects == {"/bucket/p/x": b"mine"}


def test_the_loser_whose_request_was_repeated_is_told_that_it_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    with Opened(monkeypatch, lambda method, path, n: "drop" if n == 1 else "") as (server, storage):
        server.objects["/bucket/p/x"] = b"theirs"
        assert storage.put_if_absent("x", b"mine") is False
        assert server.objects == {"/bucket/p/x": b"theirs"}


def test_racing_writers_are_asked_to_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with Opened(monkeypatch, lambda method, path, n: "409" if n <= 2 else "") as (server, storage):
        assert storage.put_if_absent("x", b"mine") is True
    with Opened(monkeypatch, lambda method, path, n: "409") as (server, storage):
        assert "other writers kept racing" in one_line(lambda: storage.put_if_absent("x", b"mine"))
        assert server.objects == {}


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("call", "function"),
    [("put", "fsync"), ("put", "replace"), ("put_if_absent", "fsync"), ("put_if_absent", "link")],
)
def test_a_full_disk_leaves_nothing(
    call: str, function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    storage = FileStorage(tmp_path / "objects")
    storage.put("a/x", b"old")
    monkeypatch.setattr(os, function, full)
    key = "a/y" if call == "put_if_absent" else "a/x"
    message = one_line(lambda: getattr(storage, call)(key, b"new"))
    assert message == f"{tmp_path}/objects/{key}: No space left on device"
    assert left_behind(tmp_path) == ["x"]
    assert storage.get("a/x") == b"old"


@pytest.mark.parametrize("call", ["put", "put_if_absent"])
def test_an_interrupted_write_leaves_nothing(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        getattr(FileStorage(tmp_path), call)("x", b"new")
    assert left_behind(tmp_path) == []


_WRITER = """\
import resource, sys
from pathlib import Path
from pipelines.errors import UserError
from pipelines.storage import FileStorage
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
for call in ("put", "put_if_absent"):
    try:
        getattr(FileStorage(Path(sys.argv[1])), call)("x", bytes(6000))
    except UserError as error:
        print(error)
"""


def test_a_real_limit_of_the_file_system(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WRITER, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{tmp_path}/x: File too large\n" * 2
    assert left_behind(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
@pytest.mark.parametrize("call", ["put", "put_if_absent"])
def test_a_read_only_folder(call: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(mode=0o555)
    assert "Permission denied" in one_line(lambda: getattr(FileStorage(tmp_path), call)("a/x", b""))
    assert left_behind(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everywhere")
def test_a_folder_that_cannot_be_listed_does_not_look_empty(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path)
    storage.put("a/x", b"")
    (tmp_path / "a").chmod(0)
    try:
        assert "Permission denied" in one_line(storage.list)
    finally:
        (tmp_path / "a").chmod(0o755)


def test_a_listing_that_fails_does_not_look_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = FileStorage(tmp_path)
    storage.put("a/x", b"")

    def broken(path: object) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(os, "scandir", broken)
    assert "Input/output error" in one_line(storage.list)


@pytest.mark.parametrize("call", ["put", "put_if_absent"])
def test_a_key_whose_place_is_taken(call: str, tmp_path: Path) -> None:
    storage = FileStorage(tmp_path)
    storage.put("file", b"")
    storage.put("folder/x", b"")
    one_line(lambda: getattr(storage, call)("file/below", b""))
    if call == "put":
        one_line(lambda: storage.put("folder", b""))
    assert left_behind(tmp_path) == ["file", "x"]


def test_an_object_deleted_while_the_folder_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = FileStorage(tmp_path)
    storage.put("x", b"")
    storage.put("y", b"")
    walk = os.walk

    def late(*args: Any, **options: Any) -> Iterator[Any]:
        for found in walk(*args, **options):
            (tmp_path / "x").unlink(missing_ok=True)
            yield found

    monkeypatch.setattr(os, "walk", late)
    assert [info.key for info in storage.list()] == ["y"]
