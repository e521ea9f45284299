"""Existing WebDataset tars: how they become a source, and that no damage to one loses a sample silently."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset

from pipelines import source_tar
from pipelines.errors import UserError
from pipelines.images import encode_png
from pipelines.prepare import prepare
from pipelines.source_find import read_range
from pipelines.sources import open_source
from pipelines.tars import Member, TarError, samples, walk
from tests.support.data import random_images

PNGS = [encode_png(image) for image in random_images(12)]


def tar_of(members: dict[str, bytes] | list[tarfile.TarInfo], **options: Any) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **options) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member, io.BytesIO(bytes(member.size)))
            else:
                info = tarfile.TarInfo(member)
                info.size = len(members[member])  # type: ignore[call-overload]
                archive.addfile(info, io.BytesIO(members[member]))  # type: ignore[call-overload]
    return file.getvalue()


def captioned(count: int = 12, first: int = 0) -> dict[str, bytes]:
    """Samples as others write them: an image, a class, a caption, a JSON and a mask each."""
    members = {}
    for number in range(first, first + count):
        members[f"d/{number:03d}.cls"] = str(number % 3).encode()
        members[f"d/{number:03d}.png"] = PNGS[number % len(PNGS)]
        members[f"d/{number:03d}.txt"] = f"bild nr. {number} größe".encode()
        members[f"d/{number:03d}.json"] = b"{}"
        members[f"d/{number:03d}.seg.png"] = PNGS[0]
    return members


def members_of(data: bytes) -> list[Member]:
    return list(walk(lambda start, length: data[start : start + length], len(data)))


def refusal(source: Path | str, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        open_source(str(source), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_tar_gives_what_tarfile_gives_whatever_its_format() -> None:
    names = ["a.png", "./b.png", "ü/" + "c" * 150 + ".png", "d" * 300 + ".png", "e/f/g.h.png", "empty.txt"]
    members = {name: bytes([number]) * number * 300 for number, name in enumerate(names)}
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        data = tar_of(
            members, format=kind, pax_headers={"comment": "x"} if kind == tarfile.PAX_FORMAT else None
        )
        found = members_of(data)
        assert [member.name for member in found] == [name.removeprefix("./") for name in names]
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            assert [(m.offset, m.size) for m in found] == [(i.offset_data, i.size) for i in archive]


def test_labels_captions_and_further_members_come_along(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(2):
        (tmp_path / f"in/{number}.tar").write_bytes(tar_of(captioned(6, 6 * number)))
    source = open_source(str(tmp_path / "in"))
    assert (source.kind, source.name, source.classes) == ("tar", "in", ("0", "1", "2"))
    assert [(entry.key, entry.label) for entry in source.entries] == [
        (f"d/{number:03d}", number % 3) for number in range(12)
    ]
    dataset = prepare(str(tmp_path / "in"), str(tmp_path / "out"), test_fraction=0.3, shard_count=2)
    seen = {}
    for tar in (tmp_path / "out").glob("*/*.tar"):
        for sample in webdataset.WebDataset(str(tar), shardshuffle=False):
            seen[sample["__key__"]] = {k: v for k, v in sample.items() if not k.startswith("__")}
    expected = captioned()
    assert seen == {
        f"d/{number:03d}": {
            extension: expected[f"d/{number:03d}.{extension}"]
            for extension in ("cls", "png", "txt", "json", "seg.png")
        }
        for number in range(12)
    }
    assert dataset.count("train") + dataset.count("test") == 12


def test_a_data_set_of_ours_is_a_source_like_any_other(tmp_path: Path) -> None:
    first = prepare("digits", str(tmp_path / "digits"), shard_count=2)
    tars = tmp_path / "digits/train"
    source = open_source(f"{tars}/shard-{{000000..000001}}.tar")
    assert len(source.entries) == first.count("train")
    assert source.classes == first.classes
    original = {entry.key: entry for entry in open_source("digits").entries}
    for entry in source.entries[::100]:
        assert entry.label == original[entry.key].label


def test_the_label_can_be_another_member_and_a_text(tmp_path: Path) -> None:
    members = {}
    for number, name in enumerate(("owl", "bee", "owl")):
        members[f"{number}.jpg"], members[f"{number}.depth.png"] = PNGS[number], PNGS[0]
        members[f"{number}.species.txt"] = f"{name}\n".encode()
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    source = open_source(str(tmp_path / "a.tar"), label="species.txt")
    assert source.classes == ("bee", "owl")
    assert [entry.label for entry in source.entries] == [1, 0, 1]
    loaded = source.reader.load(source.entries[0])
    assert (loaded.image, loaded.members) == (PNGS[0], {"depth.png": PNGS[0]})
    assert (
        "depth.png"
        not in source.reader.load(open_source(str(tmp_path / "a.tar"), image="depth.png").entries[0]).members
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [("../a.png", "points outside"), ("/etc/a.png", "points outside"), ("x/../../a.png", "points outside")],
)
def test_a_name_that_points_outside_is_refused(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of({"0.png": PNGS[0], name: PNGS[1]}))
    line = refusal(tmp_path / "a.tar")
    assert repr(name) in line
    assert said in line
    assert "a.tar" in line


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.BLKTYPE, "a device"),
        (tarfile.FIFOTYPE, "a pipe"),
        (tarfile.GNUTYPE_SPARSE, "a sparse file"),
        (b"Q", "of an unknown type"),
    ],
)
def test_what_is_no_regular_file_is_refused_naming_it(tmp_path: Path, kind: bytes, said: str) -> None:
    odd = tarfile.TarInfo("odd/1.png")
    odd.type, odd.linkname = kind, "/etc/passwd"
    (tmp_path / "a.tar").write_bytes(tar_of([odd]))
    assert f"member 'odd/1.png' is {said}" in refusal(tmp_path / "a.tar")


def test_wherever_a_tar_is_cut_it_is_refused() -> None:
    data = tar_of(captioned(2))
    ends = [member.offset + -(-member.size // 512) * 512 for member in members_of(data)]
    # after the marker of two empty blocks there is only padding
    assert len(members_of(data[: ends[-1] + 1024])) == len(ends)
    for cut in (
        0,
        1,
        511,
        512,
        700,
        1023,
        *ends,
        *(end + 100 for end in ends),
        ends[-1] + 512,
        ends[-1] + 1023,
    ):
        with pytest.raises(TarError, match="cut short"):
            members_of(data[:cut])
    inside = members_of(data)[1]
    with pytest.raises(TarError, match=rf"member '{inside.name}' of {inside.size} bytes .* does not fit"):
        members_of(data[: inside.offset + 10])


def test_a_flipped_bit_of_a_header_is_refused_wherever_it_counts() -> None:
    data = tar_of(captioned(2))
    whole = members_of(data)
    refused = 0
    for position in range(whole[2].offset - 512, whole[2].offset):
        for bit in (0, 4):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            try:
                assert members_of(bytes(flipped)) == whole
            except TarError:
                refused += 1
    # what a reader does not look at is the end of the checksum's own field
    assert refused >= 2 * 512 - 8


def test_samples_that_end_early_are_refused_where_others_lose_them(tmp_path: Path) -> None:
    data = tar_of(captioned(4))
    third = next(member for member in members_of(data) if member.name == "d/002.cls")
    spoiled = bytearray(data)
    spoiled[third.offset - 512] ^= 1
    (tmp_path / "a.tar").write_bytes(spoiled)
    assert len(list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))) < 4
    assert f"header at byte {third.offset - 512} is damaged" in refusal(tmp_path / "a.tar")
    joined = tar_of(captioned(2)) + tar_of(captioned(2, 2))
    (tmp_path / "b.tar").write_bytes(joined)
    assert len(list(webdataset.WebDataset(str(tmp_path / "b.tar"), shardshuffle=False))) == 2
    assert "behind its end-of-archive marker" in refusal(tmp_path / "b.tar")


@pytest.mark.parametrize(
    ("members", "options", "said"),
    [
        ({"0.png": b"x", "1.txt": b"x"}, {}, "sample '1' has no image, only txt"),
        ({"0.png": b"x", "0.jpg": b"x"}, {}, "sample '0' has 2 images (png, jpg): say which with --image"),
        ({"0.png": b"x"}, {"image": "jpg"}, "sample '0' has no member .jpg, only png"),
        ({"0.png": b"x", "0.PNG": b"x"}, {}, "two members named '0.png'"),
        (
            {"0.png": b"x", "1.png": b"x", "0.txt": b"x"},
            {},
            "sample '0' do not stand together: to WebDataset",
        ),
        ({"0.png": b"x", "0.cls": b"1", "1.png": b"x"}, {}, "1 of 2 images have no label, such as"),
        ({"0.png": b"x", "0.cls": b"-2", "1.png": b"x", "1.cls": b"1"}, {}, ""),
        ({"0.png": b"x", "0.cls": b"\xff"}, {}, "label that is no text"),
        ({"0.png": b"x", "0.cls": b"99999999"}, {}, "has the label 99999999"),
        ({"0.png": b"x"}, {"labels": "x.csv"}, "--labels x.csv: means nothing to a source of kind tar"),
        ({"README": b"x"}, {}, "holds no image"),
    ],
)
def test_what_is_no_whole_sample_is_named(
    tmp_path: Path, members: dict[str, bytes], options: dict[str, str], said: str
) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    if said:
        assert said in refusal(tmp_path / "a.tar", **options)
    else:  # numbers and texts together are texts
        assert open_source(str(tmp_path / "a.tar")).classes == ("-2", "1")


def test_two_tars_with_one_key_are_refused_naming_both(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.tar").write_bytes(tar_of({"0.png": PNGS[0]}))
    line = refusal(tmp_path)
    assert "a.tar/0" in line
    assert "b.tar/0" in line


def test_hidden_and_meta_members_are_passed_over_with_a_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = {"0.png": PNGS[0], "._0.png": b"x", "__meta__/x.png": b"x", "README": b"x"}
    (tmp_path / "a.tar").write_bytes(tar_of(names))
    assert [entry.key for entry in open_source(str(tmp_path / "a.tar")).entries] == ["0"]
    assert "passed over 3 members" in caplog.text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda members: members.update({"0.png": b""}), "a.tar/0: it is empty"),
        (lambda members: members.update({"0.png": b"words"}), "a.tar/0: not an image"),
        (lambda members: members.update({"0._x": b""}), "a.tar/0: its further member '_x'"),
        (lambda members: members.update({"0.cls": b"", "0.jpg": b"x"}), "say which with --image"),
    ],
)
def test_a_bad_sample_of_a_tar_is_named_and_nothing_stays(
    tmp_path: Path, change: Callable[[dict[str, bytes]], None], said: str
) -> None:
    members = {f"{number}.png": PNGS[number] for number in range(12)}
    change(members)
    (tmp_path / "a.tar").write_bytes(tar_of(dict(sorted(members.items()))))
    with pytest.raises(UserError, match=r"a\.tar") as error:
        prepare(str(tmp_path / "a.tar"), str(tmp_path / "out"), test_fraction=0.3)
    assert said in str(error.value)
    assert not list((tmp_path / "out").rglob("*.*"))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("pipe:cat x.tar", "would run a program"),
        ("https://host/x.tar", "is not taken"),
        ("x-{0..99999999}.tar", "more than"),
        ("x-{0..3}.tar", "x-0.tar does not exist"),
        ("x.tar", "does not exist"),
        ("x-*.tar", "; of patterns only {000..031} and {a,b} are known"),
    ],
)
def test_an_address_that_is_not_taken_costs_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refusal(source)


def test_a_compressed_tar_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    assert "unpack it" in refusal(tmp_path / "a.tar.gz")
    (tmp_path / "a.tar").write_bytes(b"\x1f\x8b" + bytes(2000))
    assert "header at byte 0 is damaged" in refusal(tmp_path / "a.tar")


def test_samples_are_grouped_as_webdataset_groups_them(tmp_path: Path) -> None:
    names = ["a/x.b/c.png", "a/x.b/c.seg.PNG", "a/x.b/d.tar.gz.png", "ü.png"]
    data = tar_of(dict.fromkeys(names, b"1"))
    (tmp_path / "a.tar").write_bytes(data)
    passed: list[str] = []
    ours = {s.key: {e for e, _, _ in s.members} for s in samples(members_of(data), passed)}
    theirs = {
        s["__key__"]: {name for name in s if not name.startswith("__")}
        for s in webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)
    }
    assert ours == theirs
    assert not passed


@pytest.mark.parametrize(("num_bytes", "reads"), [(3 * 2**20, 2), (2**10, 1)])
def test_large_gaps_between_the_members_of_a_sample_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_bytes: int, reads: int
) -> None:
    # webdataset passes over what lies in between
    members = {"0.png": PNGS[0], "__between__": bytes(num_bytes), "0.txt": b"hello"}
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    source = open_source(str(tmp_path / "a.tar"))
    lengths: list[int] = []

    def counted(storage: Any, key: str, name: str, start: int, length: int) -> bytes:
        lengths.append(length)
        return read_range(storage, key, name, start, length)

    monkeypatch.setattr(source_tar, "read_range", counted)
    loaded = source.reader.load(source.entries[0])
    assert (loaded.image, loaded.members) == (PNGS[0], {"txt": b"hello"})
    assert len(lengths) == reads
    assert sum(lengths) < 2**20
