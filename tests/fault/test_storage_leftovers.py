"""What is written to a folder: as readable as the umask says; what killed writers left goes, no living one's."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipelines import aside
from pipelines.storage import Storage, StorageError, open_storage

# stands in the middle of writing an object, and goes on when it is told to
WRITER = """
import os, sys
from pipelines.storage import open_storage
fsync = os.fsync
def wait(handle):
    fsync(handle)
    print("midway", flush=True)
    sys.stdin.readline()
os.fsync = wait
open_storage(sys.argv[1]).put(sys.argv[2], b"x" * 100_000)
print("done", flush=True)
"""


@contextmanager
def midway(folder: Path, key: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", WRITER, str(folder), key]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "midway\n"
            yield writer
        finally:
            writer.kill()


def another_process(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Storage:
    """As one that has not written there yet."""
    monkeypatch.setattr(aside, "_swept", set())
    return open_storage(str(folder))


def leftovers(folder: Path) -> list[Path]:
    return sorted(folder.rglob(".tmp-*"))


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600), (0o027, 0o640)])
def test_the_mode_is_what_the_umask_leaves(tmp_path: Path, umask: int, mode: int) -> None:
    storage = open_storage(str(tmp_path))
    before = os.umask(umask)
    try:
        storage.put("put", b"x")
        storage.put("put", b"again")
        storage.put_if_absent("absent", b"x")
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / key).stat().st_mode) for key in ("put", "absent")] == [mode, mode]


def test_what_killed_writers_left_goes_with_the_next_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        with midway(tmp_path, "train/x") as writer:
            # each removes what the one before it left
            assert [path.stat().st_size for path in leftovers(tmp_path)] == [100_000]
            writer.send_signal(signal.SIGKILL)
            writer.wait()
    storage = another_process(monkeypatch, tmp_path)
    storage.put("train/y", b"y")
    assert leftovers(tmp_path) == []
    assert [info.key for info in storage.list()] == ["train/y"]


@pytest.mark.parametrize("stopped", [False, True])
def test_what_a_living_writer_is_writing_stays(
    tmp_path: Path, stopped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with midway(tmp_path, "train/x") as writer:
        if stopped:
            writer.send_signal(signal.SIGSTOP)
        old = time.time() - 10 * 86_400
        for path in leftovers(tmp_path):
            os.utime(path, (old, old))
        storage = another_process(monkeypatch, tmp_path)
        storage.put("train/y", b"y")
        assert len(leftovers(tmp_path)) == 1
        writer.send_signal(signal.SIGCONT)
        assert writer.communicate("go on\n", timeout=60)[0] == "done\n"
    assert storage.get("train/x") == b"x" * 100_000
    assert leftovers(tmp_path) == []


def test_a_folder_is_looked_through_once_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[Path] = []
    sweep = aside.sweep

    def watched(folder: Path) -> None:
        looked.append(folder)
        sweep(folder)

    monkeypatch.setattr(aside, "sweep", watched)
    storage = another_process(monkeypatch, tmp_path)
    for key in ("a/x", "a/y", "b/x", "a/z"):
        storage.put(key, b"")
    assert looked == [tmp_path / "a", tmp_path / "b"]


OURS, THEIRS = f".tmp-{aside._kernel()}-", ".tmp-00000000-"
TAIL = "0123456789abcdef"


@pytest.mark.parametrize(
    ("name", "size", "days", "goes"),
    [
        (OURS + TAIL, 5, 0, True),
        # of this machine, and about to be locked; or killed before its first byte
        (OURS + TAIL, 0, 0, False),
        (OURS + TAIL, 0, 2, True),
        # of another machine, whose locks may not be seen here
        (THEIRS + TAIL, 5, 0, False),
        (THEIRS + TAIL, 5, 2, True),
        # somebody else's
        (".tmp-mine", 5, 2, False),
        (f"{OURS}{TAIL}.txt", 5, 2, False),
    ],
)
def test_which_files_are_of_the_dead(tmp_path: Path, name: str, size: int, days: int, goes: bool) -> None:
    path = tmp_path / name
    path.write_bytes(b"x" * size)
    then = time.time() - days * 86_400
    os.utime(path, (then, then))
    aside.sweep(tmp_path)
    assert path.exists() is not goes


def test_a_folder_or_a_link_of_such_a_name_stays(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(b"x")
    (tmp_path / f"{OURS}{TAIL}").symlink_to(precious)
    (tmp_path / f"{OURS}{TAIL[::-1]}").mkdir()
    os.mkfifo(tmp_path / f"{OURS}{TAIL[:8] * 2}")
    aside.sweep(tmp_path)
    assert len(leftovers(tmp_path)) == 3


def test_two_kernels_have_two_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = set()
    for boot in (b"one", b"two", b"one"):
        aside._kernel.cache_clear()
        monkeypatch.setattr(Path, "read_bytes", lambda path, boot=boot: boot)
        names.add(aside._kernel())
    monkeypatch.undo()
    aside._kernel.cache_clear()
    assert len(names) == 2


@pytest.mark.parametrize("call", ["put", "put_if_absent"])
def test_a_file_where_a_folder_should_be_is_no_object(tmp_path: Path, call: str) -> None:
    storage = open_storage(str(tmp_path))
    storage.put("a", b"a file")
    attempts: dict[str, Callable[[str, bytes], object]] = {
        "put": storage.put,
        "put_if_absent": storage.put_if_absent,
    }
    with pytest.raises(StorageError, match=r"a/b: (File exists|Not a directory)"):
        attempts[call]("a/b", b"")
