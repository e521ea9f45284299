"""Temporary folders: a killed process's goes, a living one's stays."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipelines.scratch import scratch_folder

_LIVE = """\
import sys, tempfile
tempfile.tempdir = sys.argv[1]
from pipelines.scratch import scratch_folder
with scratch_folder(sys.argv[2]) as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@contextmanager
def living(folder: Path, purpose: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that lives in a scratch folder until its input ends."""
    command = [sys.executable, "-c", _LIVE, str(folder), purpose]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, Path(process.stdout.readline().strip())
        finally:
            process.kill()


def test_it_is_there_and_then_gone(folder: Path) -> None:
    with scratch_folder("ray-train") as name:
        assert Path(name).parent == folder
        assert Path(name).name.startswith("ddpm-ray-train-")
        (Path(name) / "deep" / "er").mkdir(parents=True)
    assert list(folder.iterdir()) == []
    with pytest.raises(KeyboardInterrupt), scratch_folder("ray-train"):
        raise KeyboardInterrupt
    assert list(folder.iterdir()) == []


def test_what_a_killed_process_left_goes_with_the_next_one(folder: Path) -> None:
    with living(folder, "ray-train") as (process, left):
        (left / "controller_snapshot.json").write_text("{}")
        process.kill()
        process.wait()
        assert left.is_dir()
        with scratch_folder("ray-train"):
            assert not left.exists()


def test_a_living_processs_folder_stays(folder: Path) -> None:
    with living(folder, "ray-train") as (process, theirs), scratch_folder("ray-train") as ours:
        assert theirs.is_dir()
        # and so does another one of this very process
        with scratch_folder("ray-train"):
            assert Path(ours).is_dir()
            assert theirs.is_dir()
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0
        assert not theirs.exists()


def test_what_is_of_another_purpose_or_not_ours_stays(folder: Path) -> None:
    others = [folder / name for name in ("ddpm-ray-tune-x", "ddpm-ray-abc", "somebody")]
    for other in others:
        other.mkdir()
        (other / "in-use.lock").touch()
    # made just now, by a process that has not come to its lock yet
    (folder / "ddpm-ray-train-new").mkdir()
    with scratch_folder("ray-train"):
        assert all(other.is_dir() for other in others)
        assert (folder / "ddpm-ray-train-new").is_dir()
