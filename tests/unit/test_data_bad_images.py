"""Bad images of a source: all of them named at once, as far as twenty, and nothing of the attempt left."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jobs.cli import main
from pipelines import prepare_shards
from pipelines.errors import UserError
from pipelines.index_only import index_tars
from pipelines.prepare import prepare
from pipelines.prepare_plan import plan_shards
from pipelines.shards import PackedShard, Sample, pack
from pipelines.sources import open_source
from tests.support.data import image_bytes, random_images, write_image
from tests.unit.test_data_workers import Elsewhere

COUNT = 60


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for number, pixels in enumerate(random_images(COUNT)):
        write_image(root / f"{number:02d}.png", pixels[0])
    return root


def spoil(root: Path, numbers: range | tuple[int, ...], ways: int = 3) -> list[str]:
    """Each in another way; returns the beginning of the line that names it."""
    for place, number in enumerate(numbers):
        path = root / f"{number:02d}.png"
        if place % ways == 0:
            path.write_text("words")
        elif place % ways == 1:
            path.write_bytes(path.read_bytes()[:-20])
        else:
            write_image(path, np.zeros((9, 8), np.uint8))
    return [f"{root}/{number:02d}.png: " for number in sorted(numbers)]


def lines(source: Path, out: Path, **options: object) -> list[str]:
    with pytest.raises(UserError) as error:
        prepare(str(source), str(out), samples_per_shard=7, **options)  # type: ignore[arg-type]
    assert error.value.exit_code == 2
    return str(error.value).split("\n")


@pytest.mark.parametrize("at_once", [None, 1, 3])
@pytest.mark.parametrize("numbers", [(3, 11, 12, 47, 59), (0, 1)])
def test_every_bad_image_is_named_with_its_reason(
    photos: Path, tmp_path: Path, numbers: tuple[int, ...], at_once: int | None
) -> None:
    names = spoil(photos, numbers)
    workers = None if at_once is None else Elsewhere(at_once)
    told = lines(photos, tmp_path / "out", workers=workers)
    assert len(told) == len(names) + 1
    for line, name in zip(told, names, strict=False):
        assert line.startswith(name)
        assert any(reason in line for reason in ("not an image", "cannot be decoded", "8×9 pixels"))
    assert told[-1] == f"{len(names)} of {COUNT} images can't be taken"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("at_once", [None, 3])
@pytest.mark.parametrize("number", [19, 20, 40, COUNT])
def test_after_twenty_the_search_ends(photos: Path, tmp_path: Path, number: int, at_once: int | None) -> None:
    names = spoil(photos, range(number), ways=2)
    looked: list[int] = [0]
    told = lines(
        photos,
        tmp_path / "out",
        workers=None if at_once is None else Elsewhere(at_once),
        progress=lambda done, total: looked.append(done),
    )
    named = told[:-1]
    assert len(named) == min(number, 20)
    assert len(set(named)) == len(named)
    assert all(any(line.startswith(name) for name in names) for line in named)
    if number < 20:
        assert told[-1] == f"{number} of {COUNT} images can't be taken"
    else:
        assert told[-1] == "20 images can't be taken, where the search ended: there may be more"
    assert (max(looked) < COUNT) == (number > 20)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("at_once", [None, 3])
def test_those_of_other_sizes_are_one_line(photos: Path, tmp_path: Path, at_once: int | None) -> None:
    workers = None if at_once is None else Elsewhere(at_once)
    for number in (3, 30, 47):
        write_image(photos / f"{number:02d}.png", np.zeros((9, 16 if number == 30 else 5), np.uint8))
    (photos / "20.png").write_text("words")
    told = lines(photos, tmp_path / "out", workers=workers)
    assert told == [
        f"{photos}/03.png and 2 more are not 8×8 pixels like the first image, but 5×9 pixels (2), 16×9 pixels (1): "
        "set prepare.image_size to make them one size",
        f"{photos}/20.png: not an image that Pillow can read as PNG, JPEG, BMP, WEBP, GIF, TIFF or PPM",
        f"4 of {COUNT} images can't be taken",
    ]


def test_of_many_sizes_the_most_frequent_are_told(photos: Path, tmp_path: Path) -> None:
    for number in range(30):
        write_image(photos / f"{number:02d}.png", np.zeros((9, 10 + number), np.uint8))
    plans = plan_shards(open_source(str(photos)).entries, 0, 0.1, None, 7)
    write_image(photos / f"{plans[0].entries[0].key}.png", np.zeros((8, 8), np.uint8))
    first, last = lines(photos, tmp_path / "out")
    assert first.count("pixels (1)") == 5
    assert " and 19 more are not 8×8 pixels like the first image, but " in first
    assert re.search(r"\) and 15 more: set prepare\.image_size to make them one size$", first)
    assert last.startswith("20 images can't be taken, where the search ended")


def test_once_one_is_bad_no_further_shard_is_written(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = []

    def counted(*given: Any) -> PackedShard:
        packed.append(1)
        return pack(*given)

    monkeypatch.setattr(prepare_shards, "pack", counted)
    plans = plan_shards(open_source(str(photos)).entries, 0, 0.1, None, 7)
    # in the third shard
    spoil(photos, (int(plans[2].entries[3].key),))
    lines(photos, tmp_path / "out")
    assert len(plans) > 5
    assert len(packed) == 2


def test_the_command_line_gives_each_a_line(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = spoil(photos, (3, 40))
    code = main(
        ["prepare", str(photos), "--config", "digits.yaml", "--out", str(tmp_path / "out"), "--local"]
    )
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ddpm prepare: ")]
    assert code == 2
    assert [line.startswith(f"ddpm prepare: {name}") for line, name in zip(told, names, strict=False)] == [
        True
    ] * 2
    assert told[2] == f"ddpm prepare: 2 of {COUNT} images can't be taken"
    assert len(told) == 3


def test_folders_that_were_there_before_stay_and_those_made_for_it_go(photos: Path, tmp_path: Path) -> None:
    spoil(photos, (3,))
    (tmp_path / "mine").mkdir()
    lines(photos, tmp_path / "mine")
    assert list((tmp_path / "mine").iterdir()) == []
    lines(photos, tmp_path / "mine" / "new" / "deep")
    assert list((tmp_path / "mine").iterdir()) == []


def test_those_of_tars_that_stay_where_they_are(tmp_path: Path) -> None:
    tars = tmp_path / "tars"
    tars.mkdir()
    good = [image_bytes_of(pixels) for pixels in random_images(30)]
    for tar in range(3):
        files = [b"words" if tar > 0 and row in (2, 5) else good[10 * tar + row] for row in range(10)]
        shard = pack(Sample(f"{tar}-{row}", file) for row, file in enumerate(files))
        (tars / f"{tar}.tar").write_bytes(shard.tar)
    for workers in (None, Elsewhere(2)):
        with pytest.raises(UserError) as error:
            index_tars(str(tars), str(tmp_path / "out"), workers=workers)
        told = str(error.value).split("\n")
        assert len(told) == 5
        for line, key in zip(told, ("1.tar/1-2", "1.tar/1-5", "2.tar/2-2", "2.tar/2-5"), strict=False):
            assert f"{key}: not an image" in line
        assert told[-1] == "4 of 30 images can't be taken"
        assert not (tmp_path / "out").exists()


def test_of_tars_that_stay_those_of_other_shapes_are_a_line_a_tar(tmp_path: Path) -> None:
    tars = tmp_path / "tars"
    tars.mkdir()
    for tar in range(2):
        small, large = (image_bytes_of(random_images(1, (1, size, size))[0]) for size in (8, 9))
        shard = pack(Sample(f"{tar}-{row}", small if row == 0 else large) for row in range(4))
        (tars / f"{tar}.tar").write_bytes(shard.tar)
    with pytest.raises(UserError) as error:
        index_tars(str(tars), str(tmp_path / "out"))
    assert str(error.value).split("\n") == [
        f"source: {tars.as_uri()}/0.tar/0-1 and 5 more are not of shape [1, 8, 8] like the first image, but "
        "of shape [1, 9, 9] (6): prepare without --index-only",
        "6 of 8 images can't be taken",
    ]


def image_bytes_of(pixels: np.ndarray) -> bytes:
    return image_bytes(Image.fromarray(pixels[0]))


def test_want_of_memory_is_no_image_s_fault_and_costs_nothing(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resize, calls = Image.Image.resize, 0

    def short_of_memory(picture: Image.Image, *arguments: Any, **options: Any) -> Image.Image:
        nonlocal calls
        calls += 1
        if calls > 30:
            raise MemoryError
        return resize(picture, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "resize", short_of_memory)
        with pytest.raises(MemoryError):
            prepare(str(photos), str(tmp_path / "out"), image_size=4, samples_per_shard=5)
    assert list((tmp_path / "out").rglob("*.tar"))
    assert prepare(str(photos), str(tmp_path / "out"), image_size=4, samples_per_shard=5).count("train")


def test_bad_images_of_a_finished_set_take_none_of_its_shards(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(str(photos), str(out), samples_per_shard=5)
    lost = out / "train/shard-000000.tar"
    lost.unlink()
    left = {path for path in out.rglob("*") if path.is_file()}
    for path in photos.rglob("*.png"):
        times, size = path.stat().st_mtime_ns, path.stat().st_size
        path.write_bytes(b"x" * size)
        os.utime(path, ns=(times, times))
    with pytest.raises(UserError, match="not an image"):
        prepare(str(photos), str(out), samples_per_shard=5)
    assert {path for path in out.rglob("*") if path.is_file()} == left
