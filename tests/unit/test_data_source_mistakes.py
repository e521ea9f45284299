"""What a source could lose or take for another without a word, and addresses that no source lies at."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from braceexpand import braceexpand

from pipelines import source_tar, source_zip
from pipelines.columns import Coded
from pipelines.errors import UserError
from pipelines.images import encode_png
from pipelines.labels import number_labels
from pipelines.prepare import prepare
from pipelines.source_find import _count
from pipelines.sources import open_source
from tests.support.data import random_images
from tests.unit.test_data_source_tar import tar_of
from tests.unit.test_data_workers import Elsewhere

IMAGES = random_images(20)
PNGS = [encode_png(image) for image in IMAGES]


def refusal(source: Path | str, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        open_source(str(source), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def put(root: Path, members: dict[str, bytes]) -> Path:
    for name, data in members.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def put_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


# ---- members


def test_two_files_that_would_be_one_member_are_refused_naming_both(tmp_path: Path) -> None:
    members = {"d/x.png": PNGS[0], "d/x.txt": b"lower", "d/x.TXT": b"upper"}
    for source in (put(tmp_path / "in", members), put_zip(tmp_path / "a.zip", members | {"y.png": PNGS[1]})):
        line = refusal(source)
        assert "d/x.TXT and d/x.txt would both be the member .txt of the sample 'd/x'" in line


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("mask", "Mask"), "arrays 'mask' and 'Mask' would both be the member 'mask.npy'"),
        (("_mask",), "array '_mask' would be the member '_mask.npy', and WebDataset passes over"),
        (("a/b",), "array 'a/b' would be the member"),
    ],
)
def test_arrays_that_would_be_no_member_of_their_own_are_named(
    tmp_path: Path, names: tuple[str, ...], said: str
) -> None:
    np.savez(tmp_path / "a.npz", images=IMAGES[:, 0], **dict.fromkeys(names, IMAGES))  # type: ignore[arg-type]
    assert said in refusal(tmp_path / "a.npz")


def test_the_index_of_pandas_is_left_out_and_a_hidden_column_named(tmp_path: Path) -> None:
    rows = {"image": PNGS, "n": list(range(20)), "__index_level_0__": list(range(20))}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"))
    assert source.reader.load(source.entries[3]).members == {"n.json": b"3"}
    for column in ("_score", "__key", "Überschrift"):
        pq.write_table(pa.table({"image": PNGS, column: list(range(20))}), tmp_path / "b.parquet")
        line = refusal(tmp_path / "b.parquet")
        assert f"column {column!r} would be the member '_" in line
        assert "rename it" in line


def test_a_member_that_would_take_the_images_place_is_named_with_what_to_do(tmp_path: Path) -> None:
    colour = [encode_png(image) for image in random_images(20, (3, 16, 16))]
    members = {f"{n}.{kind}": colour[n] for n in range(20) for kind in ("jpg", "png")}
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    with pytest.raises(UserError, match=r"choose that one with --image png, or take it out of the source"):
        prepare(str(tmp_path / "a.tar"), str(tmp_path / "out"), image="jpg", image_size=8)


# ---- labels


def numbered(*labels: str | int | None) -> tuple[tuple[str, ...], list[int]]:
    columns = [Coded.of(labels[:1]), Coded.of(labels[1:])]
    classes, numbers = number_labels("x", columns, name_of=lambda n: f"image {n}")
    return classes, numbers.tolist()


def test_one_number_in_two_spellings_is_no_class() -> None:
    with pytest.raises(UserError, match=r"image 1 has the label 7, and image 3 007, .* the class 7"):
        numbered("1", "7", "2", "007")
    assert numbered("007", "001", "007")[1] == [7, 1, 7]
    assert numbered(3, "3")[1] == [3, 3]
    # names of classes may be what they like
    assert numbered("7", "007", "seven")[0] == ("007", "7", "seven")


# ---- addresses


def test_file_addresses_name_arrays_and_zips_too(tmp_path: Path) -> None:
    folder = tmp_path / "with space é"
    folder.mkdir()
    np.save(folder / "x.npy", IMAGES[:, 0])
    put_zip(folder / "x.zip", {"a.png": PNGS[0]})
    for name, count in (("x.npy", 20), ("x.zip", 1)):
        assert len(open_source((folder / name).as_uri()).entries) == count
    assert "names a host" in refusal("file://host/x.npy")


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("s3://[x/y", "s3://[x/y: Invalid IPv6 URL"),
        ("s3://[x/y.tar", "s3://[x/: Invalid IPv6 URL"),
        ("file://[x/y", "source: file://[x/y: Invalid IPv6 URL"),
        ("file:///a%00b", "source: file:///a%00b does not exist"),
        ("~nobody-of-this-name/x", "source: ~nobody-of-this-name/x: "),
    ],
)
def test_what_is_no_address_is_named(source: str, line: str) -> None:
    assert refusal(source).startswith(line)


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.zip", "x.NPY"])
def test_arrays_and_zips_are_not_read_from_s3(name: str) -> None:
    assert f"source: s3://bucket/{name}: on S3 a source is" in refusal(f"s3://bucket/{name}")


@pytest.mark.parametrize(
    "pattern",
    [
        "nope-{0..99999999999}.tar",
        "{x,nope-{0..99999999999}}.tar",
        "{0..99999}{0..99999}.tar",
        "{a..z}{a..z}{a..z}{a..z}{a..z}{a..z}{a..z}{a..z}{a..z}{a..z}{a..z}.tar",
        "{" + "{a,b}" * 60 + ",x}.tar",
        "s3://bucket/{0..99999999999}.tar",
    ],
)
def test_a_pattern_of_too_many_files_is_refused_before_it_is_expanded(
    monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    monkeypatch.setattr("pipelines.source_find.braceexpand", lambda _: pytest.fail("it was expanded"))
    assert "means more than 1048576 files" in refusal(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        "a", "{0..9}", "{9..0..3}", "{-2..2}", "{a..e..2}", "{D..b}", "{a,b{1..3},}", "{{1..2},x}{7..9}",
        "{a}", r"\{1..9\}{1..2}", "x,y{,z}", "{1..2}{a,{b,c}d}", "{1..x}",
    ],
)  # fmt: skip
def test_files_are_counted_as_they_are_expanded(pattern: str) -> None:
    assert _count(pattern) == len(list(braceexpand(pattern)))


@pytest.mark.parametrize("pattern", ["a{0..2.tar", "a{0..2}}.tar", "{" * 5000 + "}" * 5000])
def test_braces_that_do_not_match_cost_a_line(pattern: str) -> None:
    assert "its braces do not match" in refusal(pattern)


# ---- files that are none, or have odd names


def test_a_pipe_in_a_folder_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    root = put(tmp_path / "in", {"a.png": PNGS[0]})
    (root / "b.png").symlink_to(root / "a.png")
    assert len(open_source(str(root)).entries) == 2
    os.mkfifo(root / "z.png")
    assert f"{root}/z.png: is a pipe, a socket or a device" in refusal(root)
    os.mkfifo(tmp_path / "x.npy")
    assert "no regular file" in refusal(tmp_path / "x.npy")


def test_files_whose_names_are_no_text_are_prepared(tmp_path: Path) -> None:
    odd = os.fsdecode(b"\xff")
    table = io.BytesIO()
    pq.write_table(pa.table({"image": PNGS}), table)
    try:
        put(tmp_path / f"p{odd}", {f"{odd}.parquet": table.getvalue()})
    except OSError:
        pytest.skip("this file system takes no such name")
    put(tmp_path / f"t{odd}", {f"{odd}.tar": tar_of({f"{n}.png": PNGS[n] for n in range(20)})})
    for number, name in enumerate((f"p{odd}", f"p{odd}/{odd}.parquet", f"t{odd}", f"t{odd}/{odd}.tar")):
        dataset = prepare(str(tmp_path / name), str(tmp_path / f"out-{number}"), test_fraction=0.3)
        assert dataset.count("train") + dataset.count("test") == 20


# ---- limits


def test_a_zips_member_of_no_images_size_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(put_zip(tmp_path / "a.zip", {"a.png": PNGS[0]})))
    monkeypatch.setattr(source_zip, "_MAX_MEMBER_BYTES", len(PNGS[0]))
    assert source.read(source.entries[0]) == PNGS[0]
    monkeypatch.setattr(source_zip, "_MAX_MEMBER_BYTES", len(PNGS[0]) - 1)
    with pytest.raises(UserError, match=rf"a.zip/a.png: .*claims {len(PNGS[0])} bytes, which is no image"):
        source.read(source.entries[0])


def test_a_tars_member_of_no_images_size_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of({"a.png": PNGS[0]}))
    monkeypatch.setattr(source_tar, "_MAX_IMAGE_BYTES", len(PNGS[0]))
    assert len(open_source(str(tmp_path / "a.tar")).entries) == 1
    monkeypatch.setattr(source_tar, "_MAX_IMAGE_BYTES", len(PNGS[0]) - 1)
    assert f"'a' has an image of {len(PNGS[0])} bytes, which is none" in refusal(tmp_path / "a.tar")


# ---- workers, and changes in place


def test_workers_read_through_tars_to_the_same_source(tmp_path: Path) -> None:
    for number in range(5):
        members = {f"{number}-{n}.png": PNGS[n] for n in range(4)}
        put(tmp_path / "in", {f"{number}.tar": tar_of(members)})
    workers = Elsewhere(4)
    here, there = open_source(str(tmp_path / "in")), open_source(str(tmp_path / "in"), workers=workers)
    assert workers.largest > 0
    assert list(here.entries) == list(there.entries)
    assert [entry.key for entry in there.entries] == [f"{n}-{k}" for n in range(5) for k in range(4)]
    assert (here.fingerprint, here.state) == (there.fingerprint, there.state)


def test_a_file_written_anew_is_seen_by_the_state_and_not_by_the_fingerprint(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": PNGS}), tmp_path / "a.parquet")
    put(tmp_path / "in", {"a.png": PNGS[0], "a.txt": b"x", "notes.md": b"x"})
    put(tmp_path, {"a.tar": tar_of({"a.png": PNGS[0]})})
    np.save(tmp_path / "x.npy", IMAGES[:, 0])
    for name, changed in (("in", "in/a.png"), ("in", "in/a.txt"), ("a.parquet",) * 2, ("a.tar",) * 2):
        before = open_source(str(tmp_path / name))
        assert open_source(str(tmp_path / name)).state == before.state != ""
        os.utime(tmp_path / changed, ns=(1, 1))
        after = open_source(str(tmp_path / name))
        assert after.state != before.state
        assert after.fingerprint == before.fingerprint
    before = open_source(str(tmp_path / "in"))
    os.utime(tmp_path / "in/notes.md", ns=(1, 1))
    assert open_source(str(tmp_path / "in")).state == before.state, "it is in no sample"
    put_zip(tmp_path / "a.zip", {"a.png": PNGS[0]})
    for name in ("digits", str(tmp_path / "a.zip"), str(tmp_path / "x.npy")):
        assert open_source(name).state == "", "its fingerprint is of the content"
