"""`ddpm prepare --index-only`: foreign tars stay as they are, and are read as a data set all the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.dataset import DataError, Dataset
from pipelines.errors import UserError
from pipelines.images import encode_png
from pipelines.index_only import index_tars
from pipelines.preprocess import EXIF_ORIENTATION
from pipelines.reader import StreamBatches
from pipelines.stored_order import read_split
from pipelines.verify_dataset import verify_dataset as verify
from tests.support.data import image_bytes, random_images
from tests.unit.test_data_source_tar import tar_of
from tests.unit.test_data_workers import Elsewhere

IMAGES = random_images(24)


def put_tars(folder: Path, count: int = 4, labels: str = "ab") -> Path:
    """24 images in so many tars, as others write them."""
    folder.mkdir(parents=True)
    for number in range(count):
        members = {}
        for n in range(number, len(IMAGES), count):
            members[f"./größe/{n:03d}.txt"] = b"caption"
            members[f"./größe/{n:03d}.PNG"] = encode_png(IMAGES[n])
            if labels:
                members[f"./größe/{n:03d}.cls"] = f"{labels[n % len(labels)]}\n".encode()
        (folder / f"größe {number}.tar").write_bytes(tar_of(members))
    return folder


def images_of(dataset: Dataset) -> dict[str, tuple[bytes, int]]:
    return {
        key: (image.tobytes(), label)
        for split in dataset.splits
        for key, image, label in read_split(dataset, split)
    }


EXPECTED = {f"größe/{n:03d}": (image.tobytes(), n % 2) for n, image in enumerate(IMAGES)}


def refusal(source: Path | str, out: Path, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        index_tars(str(source), str(out), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_tars_elsewhere_are_read_and_not_touched(tmp_path: Path) -> None:
    tars = put_tars(tmp_path / "their tars")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tars.iterdir()}
    dataset = index_tars(str(tars), str(tmp_path / "out"))
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tars.iterdir()} == before
    assert not list((tmp_path / "out").rglob("*.tar"))
    assert dataset.classes == ("a", "b")
    assert dataset.shape == (1, 8, 8)
    assert images_of(dataset) == EXPECTED
    keys = [shard.key for split in dataset.splits for shard in dataset.shards(split)]
    assert sorted(keys) == sorted(path.as_uri() for path in tars.iterdir())
    assert dataset.shards("train")
    assert dataset.shards("test")
    assert verify(dataset, deep=True).problems == ()
    with StreamBatches(
        dataset, "train", seed=0, num_streams=2, streams=[0, 1], micro_batch_size=3
    ) as batches:
        assert next(batches)[0].x_start.shape == (3, 1, 8, 8)


def test_tars_below_the_data_set_move_with_it(tmp_path: Path) -> None:
    put_tars(tmp_path / "set/raw")
    dataset = index_tars(str(tmp_path / "set/raw"), str(tmp_path / "set"))
    assert {shard.key for shard in dataset.shards("train")} < {f"raw/größe {n}.tar" for n in range(4)}
    dataset.check_all_there()
    shutil.move(tmp_path / "set", tmp_path / "moved")
    moved = Dataset.load(str(tmp_path / "moved"))
    assert moved.identity == dataset.identity
    assert images_of(moved) == EXPECTED
    lost = moved.shards("train")[0]
    (tmp_path / "moved" / lost.key).unlink()
    assert moved.missing() == [f"{moved.uri_of(lost)} is missing or not {lost.num_bytes} bytes long"]


def test_indexes_of_another_pyarrow_are_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tars, out = str(put_tars(tmp_path / "in")), str(tmp_path / "out")

    def killed(*given: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.index_only.commit", killed)
        with pytest.raises(KeyboardInterrupt):
            index_tars(tars, out)
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.index_only._LIBRARIES", "PyArrow 1.0")
        with pytest.raises(
            UserError, match=r"was begun with PyArrow .*, and here are PyArrow 1\.0, which may"
        ):
            index_tars(tars, out)
    assert verify(index_tars(tars, out)).problems == ()


def test_workers_and_a_second_call_give_the_same(tmp_path: Path) -> None:
    tars = put_tars(tmp_path / "in")
    one = index_tars(str(tars), str(tmp_path / "one"))
    told: list[tuple[int, int]] = []
    two = index_tars(
        str(tars), str(tmp_path / "two"), workers=Elsewhere(3), progress=lambda *x: told.append(x)
    )
    assert one == two
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*")}
    assert index_tars(str(tars), str(tmp_path / "one")) == one
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*")} == times
    assert "prepare.test_fraction (0.1 there, 0.5 asked for)" in refusal(
        tars, tmp_path / "one", test_fraction=0.5
    )


def test_a_tar_that_changes_later_is_named_by_reader_and_verify(tmp_path: Path) -> None:
    tars = put_tars(tmp_path / "in")
    dataset = index_tars(str(tars), str(tmp_path / "out"))
    held_out = dataset.shards("test")[0].key.rpartition("/")[2]
    other = next(path for path in sorted(tars.iterdir()) if path.as_uri().rpartition("/")[2] != held_out)
    data = bytearray(other.read_bytes())
    data[700] ^= 1
    other.write_bytes(data)
    with pytest.raises(DataError, match="is damaged or was exchanged"):
        images_of(dataset)
    assert any(other.as_uri() in str(problem) for problem in verify(dataset).problems)
    other.unlink()
    with pytest.raises(DataError, match="is missing"):
        images_of(dataset)
    assert f"{other.as_uri()}: is missing" in map(str, verify(dataset).problems)


def test_labels_that_are_numbers_or_another_member_or_none(tmp_path: Path) -> None:
    numbers = index_tars(str(put_tars(tmp_path / "n", labels="31")), str(tmp_path / "n-out"))
    assert numbers.classes == ("0", "1", "2", "3")
    assert {label for _, label in images_of(numbers).values()} == {1, 3}
    assert verify(numbers).problems == ()
    none = index_tars(str(put_tars(tmp_path / "o", labels="")), str(tmp_path / "o-out"))
    assert none.classes == ()
    assert verify(none).problems == ()
    texts = index_tars(str(tmp_path / "n"), str(tmp_path / "t-out"), label="txt")
    assert texts.classes == ("caption",)
    assert verify(texts).problems == ()


GREY = Image.new("L", (8, 8))


def turned() -> bytes:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    return image_bytes(Image.new("L", (8, 8)), "JPEG", exif=exif.tobytes())


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (b"", "it is empty"),
        (image_bytes(Image.new("L", (8, 9))), "is of shape [1, 9, 8] and the first image of shape [1, 8, 8]"),
        (image_bytes(Image.new("RGB", (8, 8))), "is of shape [3, 8, 8]"),
        (image_bytes(Image.new("P", (8, 8))), "colour type 3"),
        (image_bytes(Image.new("I;16", (8, 8))), "more than 8 bits"),
        (image_bytes(Image.new("RGBA", (8, 8))), "colour type 6"),
        (image_bytes(Image.new("L", (8, 8)), "PNG", transparency=0), "transparent"),
        (image_bytes(Image.new("L", (8, 8)), "BMP"), "no PNG"),
        (image_bytes(Image.new("CMYK", (8, 8)), "JPEG"), "mode CMYK"),
        (turned(), "turned by its EXIF orientation"),
        (
            image_bytes(
                Image.new("L", (8, 8)), "PNG", save_all=True, append_images=[Image.new("L", (8, 8), 9)]
            ),
            "animated",
        ),
    ],
)
def test_an_image_that_would_not_be_read_rightly_is_named(tmp_path: Path, image: bytes, said: str) -> None:
    tars = put_tars(tmp_path / "in", 2, labels="")
    good = encode_png(IMAGES[0])
    (tars / "z.tar").write_bytes(tar_of({"a.png": good, "größe/bad.png": image, "c.png": good}))
    line = refusal(tars, tmp_path / "out")
    assert "z.tar/größe/bad: " in line
    assert said in line
    assert not (tmp_path / "out/dataset.json").exists()


def test_sources_that_are_no_set_of_tars_are_refused(tmp_path: Path) -> None:
    assert "needs two at least" in refusal(put_tars(tmp_path / "one", 1), tmp_path / "out")
    tars = put_tars(tmp_path / "in")
    assert "of shape [1, 8, 8], not [1, 16, 16]" in refusal(tars, tmp_path / "out", image_size=16)
    assert "prepare.levels: must be 2..256, got 1" in refusal(tars, tmp_path / "out", levels=1)
    np.save(tmp_path / "x.npy", IMAGES)
    assert refusal(tmp_path / "x.npy", tmp_path / "out").endswith("x.npy: --index-only is for .tar files")
    assert refusal("digits", tmp_path / "out") == "source: digits: --index-only is for .tar files"
    assert "would run a program" in refusal("pipe:cat /tmp/x.tar", tmp_path / "out")
    assert "http://host/{0..3}.tar: is not taken" in refusal("http://host/{0..3}.tar", tmp_path / "out")
    odd = put_tars(tmp_path / "odd")
    (odd / "größe 2.tar").rename(odd / "a\x1b\nb.tar")
    assert "odd/a\\x1b\\nb.tar: its name has control characters" in refusal(odd, tmp_path / "out")
    cut = tars / "größe 2.tar"
    cut.write_bytes(cut.read_bytes()[:-9000])
    said = refusal(tars, tmp_path / "out2")
    assert "größe 2.tar: it is cut short" in said
    assert "copy it here once more, or leave it out" in said
