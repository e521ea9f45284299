"""Folders, zips and the digits as sources of images: keys, labels, and what is refused."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import zipfile
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipelines.columns import Texts
from pipelines.errors import UserError
from pipelines.images import decode_png, encode_png
from pipelines.shards import Sample, pack
from pipelines.source_files import collect
from pipelines.sources import _DigitReader, key_of, open_source, sample_key
from tests.support.data import image_bytes, random_images, write_image

IMAGE = random_images(1)[0][0]


def put(root: Path, *names: str) -> Path:
    for name in names:
        write_image(root / name, IMAGE)
    return root


def put_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def refusal(source: Path | str) -> str:
    with pytest.raises(UserError) as error:
        open_source(str(source))
    line = str(error.value)
    assert "\n" not in line
    return line


def test_the_digits_are_all_there_with_their_labels_and_levels() -> None:
    from sklearn.datasets import load_digits

    source = open_source("digits")
    bundle = load_digits()
    assert (len(source.entries), source.levels, source.classes) == (1797, 17, tuple("0123456789"))
    for number in (0, 5, 1796):
        entry = source.entries[number]
        stored = decode_png(source.read(entry), (1, 8, 8))[0]
        assert np.array_equal(np.rint(stored / 255 * 16), bundle.images[number])
        assert entry.label == bundle.target[number]


def test_labels_are_the_folders_right_below_in_the_order_of_their_names(tmp_path: Path) -> None:
    root = put(tmp_path / "pets", "dog/1.png", "dog/puppies/1.png", "cat/1.png", "Ape/x.png")
    source = open_source(str(root))
    assert source.name == "pets"
    assert source.classes == ("Ape", "cat", "dog")
    assert [(entry.key, entry.label) for entry in source.entries] == [
        ("Ape/x", 0), ("cat/1", 1), ("dog/1", 2), ("dog/puppies/1", 2),
    ]  # fmt: skip
    assert source.read(source.entries[1]) == (root / "cat/1.png").read_bytes()


def test_images_in_the_folder_itself_have_no_label(tmp_path: Path) -> None:
    source = open_source(str(put(tmp_path, "a.png", "b.png")))
    assert source.classes == ()
    assert [entry.label for entry in source.entries] == [-1, -1]


def test_images_beside_class_folders_are_refused(tmp_path: Path) -> None:
    assert "loose.png" in refusal(put(tmp_path, "cat/a.png", "loose.png"))


def test_a_missing_or_empty_folder_and_one_without_images_cost_one_line_each(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nowhere")
    assert "holds no file: images end in .png, " in refusal(tmp_path)
    (tmp_path / "notes.txt").write_text("no image")
    assert "holds no image among its 1 file: images end in" in refusal(tmp_path)
    (tmp_path / "more.txt").write_text("no image")
    assert "holds no image among its 2 files: images end in" in refusal(tmp_path)


def test_other_files_are_passed_over_and_counted_and_hidden_ones_are_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, "a.png", ".hidden/b.png")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        assert len(open_source(str(tmp_path)).entries) == 1
    assert not caplog.records
    (tmp_path / "notes.txt").write_text("x")
    with caplog.at_level(logging.WARNING):
        assert len(open_source(str(tmp_path)).entries) == 1
    assert "passed over 1 file not named like an image, such as notes.txt" in caplog.text
    assert "notes.txt" in caplog.text


def test_hidden_files_are_counted_in_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("pipelines"), "propagate", True)
    root = put(tmp_path / "in", "a.png", ".b.png", "deeper/.c.png", ".hidden/d.png", ".hidden/e.png")
    members = {"a.png": b"x", ".b.png": b"x", "__MACOSX/._a.png": b"x", "z/.hidden/f.png": b"x"}
    for source, name in ((root, ".b.png"), (put_zip(tmp_path / "a.zip", members), ".b.png")):
        caplog.clear()
        with caplog.at_level(logging.INFO, "pipelines"):
            assert len(open_source(str(source)).entries) == 1
        [line] = {record.getMessage() for record in caplog.records}
        # a hidden folder counts once: it is not entered
        assert line.startswith(
            f"{source}: 3 hidden, and not looked at (a name begins with '.' or __MACOSX), such as "
        )
        assert line.endswith(name)


def test_two_files_with_one_key_are_refused_naming_both(tmp_path: Path) -> None:
    line = refusal(put(tmp_path, "x/a.png", "x/a.jpg"))
    assert "x/a.png" in line
    assert "x/a.jpg" in line


def test_links_are_followed_and_a_circle_of_them_ends(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", "1.png")
    root = put(tmp_path / "root", "cat/1.png")
    (root / "dog").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "up").symlink_to(root)
    assert [entry.key for entry in open_source(str(root)).entries] == ["cat/1", "dog/1"]


def test_the_fingerprint_sees_names_and_sizes_but_not_the_place(tmp_path: Path) -> None:
    one, two = (open_source(str(put(tmp_path / name, "c/a.png"))) for name in ("one", "two"))
    assert one.fingerprint == two.fingerprint
    assert open_source(str(put(tmp_path / "one", "c/b.png"))).fingerprint != one.fingerprint
    write_image(tmp_path / "two/c/a.png", np.zeros((9, 9), np.uint8))
    assert open_source(str(tmp_path / "two")).fingerprint != one.fingerprint


HARD_NAMES = [
    "plain",
    "größe/猫 1",
    "name.with.dots",
    "a.b/c.d/e.f.g",
    "100%/50%25",
    "__meta__/x",
    "__meta__",
    "line\nbreak",
    "~",
    "x" * 200,
    "deep.er/" * 30 + "x",
    "猫" * 60,
    "a" * 60 + ".b/" + "c" * 60,
]


def test_every_reader_of_webdataset_gets_the_samples_of_hard_names_under_their_keys(tmp_path: Path) -> None:
    keys = [key_of(f"{name}.png") for name in HARD_NAMES]
    assert len(set(keys)) == len(keys)
    assert all(len(key.encode()) <= 96 for key in keys)
    (tmp_path / "hard.tar").write_bytes(pack(Sample(key, encode_png(IMAGE[None]), 3) for key in keys).tar)
    read = list(webdataset.WebDataset(str(tmp_path / "hard.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in read] == keys
    assert all(sample["cls"] == b"3" and sample["png"] == encode_png(IMAGE[None]) for sample in read)


def test_keys_are_readable_where_they_can_be() -> None:
    assert key_of("cats/größe 1.png") == "cats/größe 1"
    assert key_of("v1.2/a.b.png") == "v1.2/a%2Eb"


def test_keys_are_as_the_document_says() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+\.png)` \| `([^`]+)` \|$", text, re.MULTILINE)
    assert len(rows) == 4
    for file, key in rows:
        assert key_of(file) == key
        assert f"{unquote(key)}.png" == file
    long = "v1.2/" + "x" * 100
    assert sample_key(long) == f"v1_2/{'x' * 66}~{hashlib.blake2b(long.encode(), digest_size=12).hexdigest()}"


def test_a_file_name_that_is_no_text_gets_a_key_and_a_printable_name(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    raw = os.fsencode(tmp_path / "d") + b"/caf\xe9.png"
    try:
        Path(os.fsdecode(raw)).write_bytes(image_bytes(Image.fromarray(IMAGE)))
    except OSError:
        pytest.skip("this file system takes no such name")
    source = open_source(str(tmp_path))
    (entry,) = source.entries
    assert entry.key == "d/caf%E9"
    assert entry.name.encode().endswith(rb"caf\xe9.png")
    assert source.read(entry)


def test_a_zip_gives_what_its_folder_gives(tmp_path: Path) -> None:
    root = put(tmp_path / "pets", "dog/1.png", "cat/1.png", "cat/größe.png")
    members = {
        path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in sorted(root.rglob("*.png"))
    }
    extra = {"__MACOSX/pets/cat/._1.png": b"x", "pets/.DS_Store": b"x"}
    zipped = open_source(str(put_zip(tmp_path / "pets.zip", members | extra)))
    folder = open_source(str(root))
    assert [(e.key, e.label) for e in zipped.entries] == [(e.key, e.label) for e in folder.entries]
    assert zipped.classes == folder.classes
    assert [zipped.read(e) for e in zipped.entries] == [folder.read(e) for e in folder.entries]
    flat = {"cat/1.png": members["pets/cat/1.png"], "dog/1.png": members["pets/dog/1.png"]}
    assert open_source(str(put_zip(tmp_path / "flat.zip", flat))).classes == ("cat", "dog")


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "x/../../a.png"])
def test_a_zip_member_that_points_outside_is_refused(tmp_path: Path, name: str) -> None:
    assert name in refusal(put_zip(tmp_path / "bad.zip", {"ok.png": b"x", name: b"x"}))


def test_a_file_that_is_no_zip_or_one_cut_short_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.words").write_text("these are words")
    line = refusal(tmp_path / "a.words")
    assert (
        "is neither a folder nor a readable zip (File is not a zip file): give a folder of images or" in line
    )
    assert ".parquet, .npy or .npz file" in line
    whole = put_zip(tmp_path / "b.zip", {"a.png": encode_png(IMAGE[None])}).read_bytes()
    (tmp_path / "b.zip").write_bytes(whole[:-30])
    assert (
        "b.zip: can't be read as a zip (File is not a zip file): it may be cut; copy it here once more"
        in refusal(tmp_path / "b.zip")
    )


def test_an_altered_zip_member_is_named_when_it_is_read(tmp_path: Path) -> None:
    path = put_zip(tmp_path / "a.zip", {"a.png": encode_png(IMAGE[None]), "b.png": encode_png(IMAGE[None])})
    data = bytearray(path.read_bytes())
    data[40] ^= 0x10
    path.write_bytes(data)
    source = open_source(str(path))
    with pytest.raises(UserError, match=r"a\.zip/a\.png: cannot be unpacked"):
        source.read(source.entries[0])
    assert source.read(source.entries[1])


def test_a_zip_with_one_name_twice_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", b"1")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a.png", b"2")
    assert "two members named 'a.png'" in refusal(tmp_path / "a.zip")


def test_members_are_found_by_whatever_name_they_have_on_s3() -> None:
    names = ["a//b.png", "a//c.png", "a//c.x.txt", "a//d.png", "a//d.txt", "a/b.txt"]
    source = collect("folder", "x", "x", Texts.of(names), ["1"] * 6, _DigitReader(), None, Texts.of(names))
    assert {entry.key: entry.place for entry in source.entries} == {
        "a/b": ("a//b.png", (("txt", "a/b.txt"),)),
        "a/c": ("a//c.png", ()),
        "a/d": ("a//d.png", (("txt", "a//d.txt"),)),
    }
