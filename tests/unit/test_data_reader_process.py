"""Reading in another process: the same steps, errors and lists, whatever becomes of either process."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import os
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

from pipelines import reader_child, reader_process
from pipelines.config_sections import DataConfig
from pipelines.dataset import DataError, Dataset
from pipelines.disk_cache import DiskCache
from pipelines.errors import UserError
from pipelines.images import encode_png
from pipelines.reader import MicroBatch
from pipelines.reader_process import ProcessBatches, ReaderLost, begin
from pipelines.reading import Reading
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
    return [child for child in children if any("reader_child" in part for part in child.cmdline())]


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
    with begin(reading(dataset, for_gpu=for_gpu), prefetch=2) as other:
        assert isinstance(other, ProcessBatches)
        got = [next(other) for _ in range(3)]
        (child,) = readers()
        # an interruption is the other process's
        assert os.getsid(child.pid) == child.pid
        child.send_signal(signal.SIGINT)
        got += [next(other) for _ in range(2)]
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
    with begin(reading(dataset, start_step=7)) as other:
        assert all(same(*pair) for pair in zip(list(other), expected, strict=True))


def test_bad_samples_are_passed_over_counted_listed_and_told_of_here(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset, data = made(tmp_path, BAD), {"on_bad_sample": "skip"}
    with (
        caplog.at_level(logging.WARNING),
        begin(reading(dataset, "thread", data=data, stop_step=None)) as here,
        begin(reading(dataset, data=data, stop_step=None)) as there,
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
        with begin(reading(dataset, reader, stop_step=None)) as steps:
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
        crossed = reader_child._portable(error)
    assert "ZeroDivisionError: by nothing" in str(crossed)
    assert "in wrong" in str(crossed)
    mistake = UserError("data.uri: nowhere")
    assert reader_child._portable(mistake) is mistake


def test_one_that_ends_again_and_again_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_process, "_PROGRAM", "raise SystemExit(3)")
    with (
        begin(reading(made(tmp_path))) as steps,
        pytest.raises(ReaderLost, match=r"4 times, at last at step 0 \(exit code 3\)"),
    ):
        next(steps)


def test_its_end_is_waited_for_and_a_forgotten_one_ends_too(tmp_path: Path) -> None:
    dataset = made(tmp_path)
    steps = begin(reading(dataset, stop_step=None))
    next(steps)
    steps.close()
    assert not readers()
    with pytest.raises(StopIteration):
        next(steps)
    steps.close()
    forgotten = begin(reading(dataset, stop_step=None))
    next(forgotten)
    assert len(readers()) == 1
    # and `nothing_is_left` looks


def test_it_ends_with_the_process_that_trains_however_that_ends(tmp_path: Path) -> None:
    made(tmp_path)
    script = (
        "import sys, time, psutil; from tests.unit.test_data_reader_process import begin, reading, Dataset\n"
        f"steps = begin(reading(Dataset.load({str(tmp_path)!r}), stop_step=None)); next(steps)\n"
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
        begin(reading(dataset, data={"stages": ["my_stage_for_a_process.negate"]})) as there,
        begin(reading(dataset, "thread")) as here,
    ):
        for ours, theirs in zip(there, here, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert torch.equal(a.x_start, -b.x_start)
                assert a.label.unique().tolist() == [7]
    assert "my_stage_for_a_process" not in sys.modules


def test_one_that_is_killed_in_the_midst_of_a_message_is_started_again(tmp_path: Path) -> None:
    """Steps of 128 KiB beside their images: more than the connection holds."""
    dataset = made(tmp_path)
    asked: dict[str, Any] = {"micro_batch_size": 1500, "stop_step": 6}
    with reading(dataset, **asked).in_thread(prefetch=2, pin_memory=False) as steps:
        expected = list(steps)
    with begin(reading(dataset, **asked)) as other:
        got = [next(other)]
        (child,) = readers()
        # it waits in the midst of one
        assert not waited(lambda: child.status() == psutil.STATUS_SLEEPING and child.cpu_percent(0.3) < 5)
        child.kill()
        got += list(other)
    assert all(same(*pair) for pair in zip(got, expected, strict=True))


def test_one_that_is_stopped_is_ended_and_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reader_process, "_LOOK_S", 0.2)
    monkeypatch.setattr(reader_process, "_CLOSE_TIMEOUT_S", 0.2)
    dataset = made(tmp_path)
    with begin(reading(dataset)) as other:
        first = next(other)
        (child,) = readers()
        child.suspend()
        assert len([first, *other]) == 12
        assert not child.is_running()
    assert "by signal 9" in caplog.text


def test_one_that_is_stopped_is_not_waited_for_at_the_end(tmp_path: Path) -> None:
    steps = begin(reading(made(tmp_path)))
    next(steps)
    (child,) = readers()
    child.suspend()
    assert not waited(lambda: child.status() == psutil.STATUS_STOPPED)
    steps.close()
    assert steps._source._process.returncode == -signal.SIGKILL  # type: ignore[attr-defined]


def test_one_that_cannot_be_started_again_costs_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*given: object, **named: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    with begin(reading(made(tmp_path), stop_step=None)) as other:
        next(other)
        monkeypatch.setattr(subprocess, "Popen", refused)
        readers()[0].kill()
        for _ in range(2):  # it is told again, as every error is
            with pytest.raises(
                ReaderLost, match=r"\(by signal 9, SIGKILL\), and another can't be started"
            ) as error:
                list(other)
        assert "\n" not in str(error.value)


def test_one_that_is_lost_now_and_then_is_always_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_process, "_STARTED_AGAIN", 1)
    # with one step in the memory that they share the second loss is found out 3 to 5 steps behind the first
    for peace, enough in ((3, True), (6, False)):
        monkeypatch.setattr(reader_process, "_STEPS_OF_PEACE", peace)
        with begin(reading(made(tmp_path / str(peace)), stop_step=None), prefetch=1) as other:
            for _ in range(2):
                for _ in range(4):
                    next(other)
                readers()[0].kill()
            with contextlib.nullcontext() if enough else pytest.raises(ReaderLost):
                for _ in range(3):
                    next(other)


def test_it_finds_the_modules_that_this_process_finds_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever they lie, and whatever lies in the working directory."""
    modules = tmp_path / "a:b"
    modules.mkdir()
    (modules / "my_stage_elsewhere.py").write_text("def keep(samples):\n    yield from samples\n")
    (tmp_path / "queue.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(modules), Path("no-text-and-so-ignored")])
    with begin(reading(made(tmp_path / "data"), data={"stages": ["my_stage_elsewhere.keep"]})) as steps:
        assert len(list(steps)) == 12


def test_it_ends_also_in_the_midst_of_a_stage_and_of_what_that_started(tmp_path: Path) -> None:
    (tmp_path / "my_slow_stage.py").write_text(
        "import subprocess, time\n"
        "def wait(samples):\n"
        "    subprocess.Popen(['sleep', '60'], close_fds=False)\n"
        "    time.sleep(600)\n"
        "    yield from samples\n"
    )
    dataset = made(tmp_path / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        steps = begin(reading(dataset, data={"stages": ["my_slow_stage.wait"]}))
        (child,) = readers()
        assert not waited(lambda: bool(child.children()))
        (sleeper,) = child.children()
    steps.close()
    # and was not waited for and killed
    assert steps._source._process.returncode == 0  # type: ignore[attr-defined]
    assert sleeper.is_running()
    sleeper.kill()


def test_what_stages_log_is_logged_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "my_telling_stage.py").write_text(
        "import logging, torch\n"
        "def tell(samples):\n"
        "    logging.getLogger('my.own').info('a batch of %d', len(list(samples := list(samples))))\n"
        "    logging.getLogger('my.own').debug('too much')\n"
        "    logging.getLogger('my.own').info('%d thread', torch.get_num_threads())\n"
        "    yield from samples\n"
    )
    monkeypatch.chdir(tmp_path)
    stages = {"stages": ["my_telling_stage.tell"]}
    with (
        caplog.at_level(logging.INFO),
        begin(reading(made(tmp_path / "data"), data=stages, stop_step=2)) as steps,
    ):
        list(steps)
    told = [record.getMessage() for record in caplog.records if record.name == "my.own"]
    # beside a worker that computes with as many as it is given
    assert set(told) == {"a batch of 3", "1 thread"}


def test_a_machine_without_such_memory_costs_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(name: str) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.memfd_create", refused)
    with pytest.raises(UserError, match=r"data\.reader: no other process can read here .*; set it to thread"):
        begin(reading(made(tmp_path)))


def test_a_thread_reads_as_the_configuration_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("pipelines.reading.StreamBatches", lambda *a, **named: given.update(named))
    data = {
        "cache_bytes": 2**21,
        "decode_threads": 3,
        "disk_cache": str(tmp_path),
        "disk_cache_bytes": 77,
        "on_bad_sample": "skip",
    }
    begin(reading(made(tmp_path), "thread", data=data, for_gpu=True))
    assert isinstance(given.pop("fetch"), DiskCache)
    expected = {
        "cache_bytes": 2**21,
        "decode_threads": 3,
        "flip": True,
        "skip_bad": True,
        "as_bytes": True,
        "channels_last": True,
        "pin_memory": True,
        "stop_step": 12,
    }
    assert {name: given[name] for name in expected} == expected
