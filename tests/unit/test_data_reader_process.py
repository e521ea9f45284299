"""Reading in another process: the same steps, errors and lists, whatever becomes of either process."""

from __future__ import annotations

import dataclasses
import gc
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pipelines import reader_process
from pipelines.config_sections import DataConfig
from pipelines.dataset import DataError, Dataset
from pipelines.errors import UserError
from pipelines.images import encode_png
from pipelines.reader import MicroBatch, StreamBatches
from pipelines.reader_process import ProcessBatches, ReaderLost, Reading
from pipelines.shards import Sample, pack
from tests.support.data import put_dataset, random_images

COUNTS = [5, 9, 6]
SHAPE = (3, 8, 6)
BAD = {(0, 2), (1, 8)}


@pytest.fixture(autouse=True)
def nothing_is_left() -> Any:
    """Neither a process nor an open file."""
    gc.collect()
    before = open_files()
    yield
    gc.collect()
    assert not waited(lambda: not readers()), "a process that reads is left"
    assert open_files() <= before


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def readers() -> list[psutil.Process]:
    children = psutil.Process().children()
    return [child for child in children if any("reader_process" in part for part in child.cmdline())]


def waited(done: Callable[[], bool], seconds: float = 20) -> bool:
    """Whether it stayed untrue for so long."""
    until = time.monotonic() + seconds
    while not done():
        if time.monotonic() > until:
            return True
        time.sleep(0.02)
    return False


def made(folder: Path, bad: set[tuple[int, int]] = frozenset()) -> Dataset:  # type: ignore[assignment]
    images = random_images(sum(COUNTS), SHAPE)
    shards = []
    for shard, count in enumerate(COUNTS):
        files = [encode_png(images[sum(COUNTS[:shard]) + row]) for row in range(count)]
        shards.append(
            pack(
                Sample(f"{shard}-{row}", data[:-30] if (shard, row) in bad else data, row % 10)
                for row, data in enumerate(files)
            )
        )
    return put_dataset(folder, {"train": shards}, SHAPE)


def reading(dataset: Dataset, reader: str = "process", **options: Any) -> Reading:
    settings: dict[str, Any] = {
        "seed": 5,
        "num_streams": 4,
        "streams": (2, 0, 3),
        "micro_batch_size": 3,
        "stop_step": 12,
    } | options
    data = DataConfig(uri=dataset.uri, flip=True, reader=reader, **settings.pop("data", {}))
    return Reading(dataset, "train", data, **settings)


def same(one: list[MicroBatch], two: list[MicroBatch]) -> bool:
    def equal(a: MicroBatch, b: MicroBatch) -> bool:
        values = [
            (getattr(a, field.name), getattr(b, field.name)) for field in dataclasses.fields(MicroBatch)
        ]
        assert a.x_start.stride() == b.x_start.stride()
        return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in values[1:]) and a.stream == b.stream

    return len(one) == len(two) and all(equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("for_gpu", [False, True])
def test_the_steps_are_those_of_a_thread_whenever_it_is_killed(
    tmp_path: Path, for_gpu: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # pinning is a matter of CUDA's; test_gpu.py has it
    monkeypatch.setattr(reader_process, "Buffers", lambda pin: unpinned())
    dataset = made(tmp_path)
    with reading(dataset, for_gpu=for_gpu).in_thread(prefetch=2, pin_memory=False) as steps:
        expected = list(steps)
    with reading(dataset, for_gpu=for_gpu).begin(prefetch=2) as other:
        assert isinstance(other, ProcessBatches)
        got = [next(other) for _ in range(5)]
        (child,) = readers()
        assert child.environ()["CUDA_VISIBLE_DEVICES"] == ""
        child.send_signal(signal.SIGKILL)
        got += list(other)
        assert list(other) == []
    assert len(got) == len(expected) == 12
    assert all(same(*pair) for pair in zip(got, expected, strict=True))
    (told,) = caplog.messages
    assert "by signal 9, SIGKILL" in told
    assert "another goes on at step" in told


def unpinned() -> Any:
    from pipelines.buffers import Buffers

    return Buffers()


def test_it_goes_on_from_any_step(tmp_path: Path) -> None:
    dataset = made(tmp_path)
    with reading(dataset).in_thread(prefetch=2, pin_memory=False) as steps:
        expected = list(steps)[7:]
    with reading(dataset, start_step=7).begin() as other:
        assert all(same(*pair) for pair in zip(list(other), expected, strict=True))


def test_bad_samples_are_passed_over_counted_listed_and_told_of_here(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset, data = made(tmp_path, BAD), {"on_bad_sample": "skip"}
    with (
        caplog.at_level(logging.WARNING),
        reading(dataset, "thread", data=data, stop_step=None).begin() as here,
        reading(dataset, data=data, stop_step=None).begin() as there,
    ):
        drawn = 0
        for _ in range(12):
            ours, theirs = next(there), next(here)
            assert same(ours, theirs)
            drawn += sum(int((part.weight == 0).sum()) for part in ours)
        assert 0 < drawn <= there.skipped.count
        assert there.skipped.samples == here.skipped.samples
    assert {(sample.shard, sample.row) for sample in there.skipped.samples.values()} == BAD
    # once by the thread and once by the process
    assert caplog.text.count("passing over") == 2 * len(BAD)


def test_an_error_is_the_one_that_a_thread_raises_and_stays(tmp_path: Path) -> None:
    dataset = made(tmp_path, {(2, 0)})
    told = []
    for reader in ("thread", "process"):
        with reading(dataset, reader, stop_step=None).begin() as steps:
            with pytest.raises(DataError) as error:
                list(steps)
            with pytest.raises(DataError):
                next(steps)
            told.append(str(error.value))
    assert told[0] == told[1]
    assert "sample '2-0': a broken PNG" in told[0]


def test_errors_that_are_bugs_say_where_they_were_raised() -> None:
    def wrong() -> None:
        raise ZeroDivisionError("by nothing")

    with pytest.raises(ZeroDivisionError) as raised:
        wrong()
    try:
        raise raised.value
    except ZeroDivisionError as error:
        crossed = reader_process._portable(error)
    assert "ZeroDivisionError: by nothing" in str(crossed)
    assert "in wrong" in str(crossed)
    mistake = UserError("data.uri: nowhere")
    assert reader_process._portable(mistake) is mistake


def test_one_that_ends_again_and_again_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_process, "_PROGRAM", "raise SystemExit(3)")
    with (
        reading(made(tmp_path)).begin() as steps,
        pytest.raises(ReaderLost, match=r"4 times at step 0 \(exit code 3\)"),
    ):
        next(steps)


def test_its_end_is_waited_for_and_a_forgotten_one_ends_too(tmp_path: Path) -> None:
    dataset = made(tmp_path)
    steps = reading(dataset, stop_step=None).begin()
    next(steps)
    steps.close()
    assert not readers()
    with pytest.raises(StopIteration):
        next(steps)
    steps.close()
    forgotten = reading(dataset, stop_step=None).begin()
    next(forgotten)
    assert len(readers()) == 1
    # and `nothing_is_left` looks


def test_it_ends_with_the_process_that_trains_however_that_ends(tmp_path: Path) -> None:
    made(tmp_path)
    script = (
        "import sys, time, psutil; from tests.unit.test_data_reader_process import reading, Dataset\n"
        f"steps = reading(Dataset.load({str(tmp_path)!r}), stop_step=None).begin(); next(steps)\n"
        "print(psutil.Process().children()[0].pid, flush=True); time.sleep(600)"
    )
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE, text=True
    ) as trains:
        assert trains.stdout is not None
        reads = psutil.Process(int(trains.stdout.readline()))
        assert reads.is_running()
        trains.kill()
    assert not waited(lambda: not reads.is_running() or reads.status() == psutil.STATUS_ZOMBIE)


def test_stages_of_the_working_directory_run_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = made(tmp_path / "data")
    (tmp_path / "my_stage_for_a_process.py").write_text(
        "import os\n"
        "def negate(samples):\n"
        "    for sample in samples:\n"
        "        yield sample | {'image': 255 - sample['image'], 'label': int(os.environ['A_LABEL'])}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("A_LABEL", "7")
    with (
        reading(dataset, data={"stages": ["my_stage_for_a_process.negate"]}).begin() as there,
        reading(dataset, "thread").begin() as here,
    ):
        for ours, theirs in zip(there, here, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert torch.equal(a.x_start, -b.x_start)
                assert a.label.unique().tolist() == [7]
    assert "my_stage_for_a_process" not in sys.modules


def test_by_itself_it_is_for_a_gpu_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = made(tmp_path)
    begun = []
    monkeypatch.setattr(reader_process, "ProcessBatches", lambda reading, prefetch: begun.append(reading))
    with reading(dataset, "auto").begin() as steps:
        assert isinstance(steps, StreamBatches)
    assert not begun
    reading(dataset, "auto", for_gpu=True).begin()
    assert len(begun) == 1
