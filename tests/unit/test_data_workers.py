"""Preparing with workers, here without a cluster: what they are given, and that how they are does not show."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import prepare as module
from pipelines.errors import UserError
from pipelines.images import encode_png
from pipelines.prepare import prepare
from pipelines.prepare_plan import plan_shards
from pipelines.shards import Sample, pack
from pipelines.sources import Entry, open_source
from pipelines.storage import Storage, StorageError, open_storage
from tests.support.data import WatchedStorage, entries_of, random_images, write_image

cloudpickle = pytest.importorskip("ray.cloudpickle")
IMAGES = random_images(60, (1, 10, 8))


class Elsewhere:
    """Workers whose tasks cross a process border, done `at_once` at a time, and of those the last first."""

    def __init__(self, at_once: int) -> None:
        self.at_once = at_once
        self.largest = 0

    def __call__(
        self, work: Callable[[Any], Any], tasks: Iterable[Any]
    ) -> Generator[tuple[Any, Any], None, None]:
        there = cloudpickle.loads(cloudpickle.dumps(work))
        waiting = []
        for task in tasks:
            sent = cloudpickle.dumps(task)
            self.largest = max(self.largest, len(sent))
            waiting.append((task, cloudpickle.loads(sent)))
            if len(waiting) == self.at_once:
                while waiting:
                    own, copy = waiting.pop()
                    yield own, there(copy)
        while waiting:
            own, copy = waiting.pop()
            yield own, there(copy)


def files(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def put_source(kind: str, root: Path) -> str:
    root.mkdir()
    names = [f"{'ab'[n % 2]}/{n:02d}" for n in range(len(IMAGES))]
    pngs = [encode_png(image) for image in IMAGES]
    if kind == "folder":
        for name, image in zip(names, IMAGES, strict=True):
            write_image(root / f"{name}.png", image[0])
            (root / f"{name}.txt").write_text(f"caption of {name}")
        return str(root)
    path = root / f"source.{kind}"
    if kind == "zip":
        with ZipFile(path, "w") as archive:
            for name, png in zip(names, pngs, strict=True):
                archive.writestr(f"{name}.png", png)
    elif kind == "tar":
        path.write_bytes(pack(Sample(n, p, 1, {"txt": b"t"}) for n, p in zip(names, pngs, strict=True)).tar)
    elif kind == "parquet":
        pq.write_table(pa.table({"image": pngs, "caption": names}), path, row_group_size=7)
    elif kind == "npz":
        with BytesIO() as file:
            np.savez(file, images=IMAGES[:, 0], labels=np.arange(60) % 4)
            path.write_bytes(file.getvalue())
    return str(path)


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "parquet", "npz", "digits"])
def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path, kind: str) -> None:
    source = "digits" if kind == "digits" else put_source(kind, tmp_path / "in")
    options: dict[str, Any] = {"image_size": 6, "samples_per_shard": 200 if kind == "digits" else 9}
    told: list[tuple[int, int]] = []
    alone = prepare(source, str(tmp_path / "alone"), **options)
    for at_once in (1, 4):
        workers = Elsewhere(at_once)
        out = tmp_path / str(at_once)
        assert (
            prepare(source, str(out), workers=workers, progress=lambda *x: told.append(x), **options) == alone
        )
        assert files(out) == files(tmp_path / "alone")
    total = alone.count("train") + alone.count("test")
    assert told[-1] == (total, total)
    assert [done for done, _ in told[len(told) // 2 :]] == sorted(done for done, _ in told[len(told) // 2 :])


@pytest.mark.parametrize("colour_at", [None, 0, 5, 299])
def test_colour_is_found_wherever_it_is(tmp_path: Path, colour_at: int | None) -> None:
    for number, image in enumerate(random_images(300, (1, 4, 4))):
        pixels = np.stack([image[0]] * 3, axis=-1) if number == colour_at else image[0]
        write_image(tmp_path / "in" / f"{number:03d}.png", pixels)
    made = prepare(str(tmp_path / "in"), str(tmp_path / "out"), workers=Elsewhere(3))
    assert made.shape == (1 if colour_at is None else 3, 4, 4)


def test_a_shard_is_put_once_and_a_second_driver_puts_none_of_the_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = put_source("folder", tmp_path / "in"), tmp_path / "out"
    opened: list[WatchedStorage] = []

    def opener(uri: str) -> Storage:
        opened.append(WatchedStorage(open_storage(uri)))
        return opened[-1]

    class Here(Elsewhere):
        """Without a process border, so that puts can be counted; killed after so many."""

        def __call__(self, work: Any, tasks: Any) -> Generator[tuple[Any, Any], None, None]:
            for number, task in enumerate(list(tasks)[::-1]):
                if number == self.at_once:
                    raise KeyboardInterrupt
                yield task, work(task)

    monkeypatch.setattr(module, "open_storage", opener)
    with pytest.raises(KeyboardInterrupt):
        prepare(source, str(out), samples_per_shard=5, channels=1, workers=Here(4))
    first = [key for key in opened[0].puts if "/" in key]
    assert len(first) == 8
    prepare(source, str(out), samples_per_shard=5, channels=1, workers=Here(1000))
    second = [key for key in opened[1].puts if "/" in key]
    assert not set(first) & set(second)
    shards = len(list(out.glob("*/*")))
    assert sorted([*first, *second]) == sorted(set(first) | set(second))
    assert len(first) + len(second) == shards
    # the record is the last that is put
    assert opened[1].puts[-2:] == ["shards.parquet", "dataset.json"]


def test_shards_that_only_their_worker_can_see_are_no_data_set(tmp_path: Path) -> None:
    source, out = put_source("folder", tmp_path / "in"), tmp_path / "out"

    class OtherMachine(Elsewhere):
        def __call__(self, work: Any, tasks: Any) -> Generator[tuple[Any, Any], None, None]:
            yield from super().__call__(work, tasks)
            for tar in out.glob("train/*.tar"):
                tar.unlink()

    with pytest.raises(StorageError, match=r"shard-000000\.tar: was written and is not to be seen"):
        prepare(source, str(out), channels=1, workers=OtherMachine(2))
    assert not (out / "dataset.json").exists()


def test_what_a_task_is_given_does_not_grow_with_the_source() -> None:
    entries = [
        Entry(f"key-{n:07d}", n % 10, f"where/key-{n:07d}.png", (f"{n}.png", ())) for n in range(50_000)
    ]
    plans = plan_shards(entries_of(entries), 0, 0.1)
    assert sum(len(plan.entries) for plan in plans) == 50_000
    assert max(len(cloudpickle.dumps(plan)) for plan in plans) < 200_000


def test_a_source_that_a_worker_can_not_see_is_named(tmp_path: Path) -> None:
    source = put_source("folder", tmp_path / "in")

    class Blind(Elsewhere):
        def __call__(self, work: Any, tasks: Any) -> Generator[tuple[Any, Any], None, None]:
            for path in (tmp_path / "in/b").glob("*.png"):
                path.unlink()
            yield from super().__call__(work, tasks)

    with pytest.raises(UserError, match=r"b/\d\d\.png: is missing, or can't be seen"):
        prepare(source, str(tmp_path / "out"), channels=1, workers=Blind(2))


def test_every_reader_opens_its_source_anew_in_another_process(tmp_path: Path) -> None:
    for kind in ("zip", "npz", "parquet"):
        source = open_source(put_source(kind, tmp_path / kind))
        loaded = source.reader.load(source.entries[0])
        sent = cloudpickle.dumps(source.reader)
        assert len(sent) < 2000
        again = cloudpickle.loads(sent).load(source.entries[0])
        assert np.array_equal(again.image, loaded.image)
        assert again.members == loaded.members
