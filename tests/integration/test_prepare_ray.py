"""Preparing on the real stack: Ray workers, S3; and what a kill leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import ray

from infra.local import Stack
from pipelines import prepare_ray
from pipelines.dataset import Dataset
from pipelines.errors import UserError
from pipelines.images import encode_png
from pipelines.prepare import prepare
from pipelines.prepare_ray import PreparingStopped, RayWorkers
from pipelines.shards import Sample, pack
from pipelines.sources import open_source
from pipelines.storage import StorageError, open_storage
from tests.support.data import random_images, write_image
from tests.support.jobs import ddpm, one_line_mistake, succeeded


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for number, pixels in enumerate(random_images(240, (1, 12, 16))):
        write_image(root / "abc"[number % 3] / f"{number:03d}.png", pixels[0])
    return root


@pytest.fixture(scope="module")
def cluster(stack: Stack) -> Iterator[None]:
    ray.init(address=stack.ray_address, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


def settings(uri: str) -> list[str]:
    chosen = {"data.uri": uri, "prepare.image_size": "8", "prepare.samples_per_shard": "10"}
    return ["--config", "digits.yaml", *(x for k, v in chosen.items() for x in ("--set", f"{k}={v}"))]


def contents(uri: str) -> dict[str, bytes]:
    storage = open_storage(uri)
    return {info.key: storage.get(info.key) for info in storage.list()}


def test_the_cluster_writes_the_bytes_that_one_process_writes(stack: Stack, photos: Path) -> None:
    here, there = "s3://ddpm/tests/prepare-here", "s3://ddpm/tests/prepare-there"
    alone = succeeded(ddpm("prepare", str(photos), *settings(here), "--local"))
    together = succeeded(ddpm("prepare", str(photos), *settings(there)))
    assert alone.split(";")[0] == together.split(";")[0]
    assert contents(here) == contents(there)
    assert len(Dataset.load(there).shards("train")) > 15


def test_a_driver_that_is_killed_leaves_finished_shards_that_are_not_made_again(
    stack: Stack, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "jobs", "prepare", str(photos), *settings(str(out))]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while len(list(out.glob("train/*.parquet"))) < 2:
            assert driver.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        driver.send_signal(signal.SIGKILL)
    finally:
        driver.kill()
        driver.wait()
    with pytest.raises(UserError, match="no finished data set"):
        Dataset.load(str(out))
    # what a worker has begun it may still finish
    time.sleep(2)
    indexes = {path: path.stat().st_mtime_ns for path in out.glob("*/*.parquet")}
    tars = {path.with_suffix("").with_suffix(".tar") for path in indexes}
    finished = indexes | {path: path.stat().st_mtime_ns for path in tars}
    succeeded(ddpm("prepare", str(photos), *settings(str(out))))
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    succeeded(ddpm("prepare", str(photos), *settings(str(tmp_path / "undisturbed")), "--local"))
    assert contents(str(out)) == contents(str(tmp_path / "undisturbed"))


@pytest.mark.usefixtures("cluster")
def test_a_bad_image_on_a_worker_is_one_line_and_leaves_nothing(photos: Path, tmp_path: Path) -> None:
    bad = tmp_path / "in"
    for number, pixels in enumerate(random_images(200)):
        write_image(bad / f"{number}.png", pixels[0])
    write_image(bad / "123.png", np.zeros((9, 9), np.uint8))
    with pytest.raises(UserError, match=r"123\.png: is 9×9 pixels") as error:
        prepare(str(bad), str(tmp_path / "out"), samples_per_shard=5, workers=RayWorkers(2))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_mistake_costs_one_line(stack: Stack, tmp_path: Path) -> None:
    for number, pixels in enumerate(random_images(40)):
        write_image(tmp_path / "in" / f"{number}.png", pixels[0])
    (tmp_path / "in/a.png").write_bytes(b"")
    result = ddpm("prepare", str(tmp_path / "in"), *settings(str(tmp_path / "out")))
    one_line_mistake(result, "a.png", "empty")


def _die_once(folder: Path, number: int) -> int:
    try:
        (folder / str(number)).touch(exist_ok=False)
    except FileExistsError:
        return number * number
    os.kill(os.getpid(), signal.SIGKILL)
    return -1


def _always_die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def _storage_fails(folder: Path, number: int) -> int:
    with (folder / "calls").open("a") as file:
        file.write(".")
    raise StorageError(f"object {number}: no answer")


@pytest.mark.usefixtures("cluster")
def test_a_task_is_done_again_when_its_process_dies_and_not_for_ever(tmp_path: Path) -> None:
    made = dict(RayWorkers(2)(partial(_die_once, tmp_path), range(3)))
    assert made == {0: 0, 1: 1, 2: 4}
    with pytest.raises(PreparingStopped, match="goes on from here"):
        list(RayWorkers(1)(_always_die, range(2)))
    with pytest.raises(StorageError, match=r"object 0: no answer"):
        list(RayWorkers(2)(partial(_storage_fails, tmp_path), [0]))
    assert (tmp_path / "calls").read_text() == "..."


@pytest.mark.usefixtures("cluster")
def test_what_tasks_give_back_does_not_stay_in_the_cluster() -> None:
    """What is in the cluster's shared memory can't be written to."""
    ((_, numbers),) = RayWorkers(0)(np.zeros, [10**6])
    assert numbers.flags.writeable
    assert numbers.nbytes == 8 * 10**6


@pytest.mark.usefixtures("cluster")
def test_tars_are_listed_by_the_cluster_as_here(tmp_path: Path) -> None:
    for tar in range(6):
        samples = [
            Sample(f"größe.{tar}/{n:04d}", encode_png(random_images(1)[0]), n % 3, {"txt": b"x" * n})
            for n in range(400)
        ]
        (tmp_path / f"{tar}.tar").write_bytes(pack(samples).tar)
    here, there = (open_source(str(tmp_path), workers=workers) for workers in (None, RayWorkers(0)))
    assert list(here.entries) == list(there.entries)
    assert len(there.entries) == 2400
    assert (here.fingerprint, here.state, here.classes) == (there.fingerprint, there.state, there.classes)


@pytest.mark.usefixtures("cluster")
def test_tasks_are_handed_out_as_others_get_done() -> None:
    taken = []

    def numbers() -> Iterator[int]:
        for number in range(10_000):
            taken.append(number)
            yield number

    results = RayWorkers(0)(abs, numbers())
    assert next(results)[1] >= 0
    room = int(ray.cluster_resources()["CPU"]) * prepare_ray._TASKS_A_CPU
    assert len(taken) <= room + 1
    results.close()
