"""Parquet files and NumPy arrays as sources, and tables of labels."""

from __future__ import annotations

import io
import json
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from pipelines import source_parquet
from pipelines.columns import Coded
from pipelines.errors import UserError
from pipelines.images import decode_png, encode_png
from pipelines.labels import number_labels
from pipelines.prepare import prepare
from pipelines.prepare_plan import plan_shards
from pipelines.source_parquet import _ParquetReader
from pipelines.sources import open_source
from tests.support.data import random_images, write_image

IMAGES = random_images(20)
PNGS = [encode_png(image) for image in IMAGES]


def refusal(source: Path | str, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        open_source(str(source), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def hugging_face(count: int = 20, **columns: list[Any]) -> pa.Table:
    """A table as `datasets` writes it: images as structs, names of classes in the schema's metadata."""
    names = ["bee", "owl", "übel"]
    info = {
        "info": {"features": {"label": {"names": names, "_type": "ClassLabel"}, "image": {"_type": "Image"}}}
    }
    table = pa.table(
        {
            "image": pa.array(
                [{"bytes": PNGS[n % 20], "path": f"{n}.png"} for n in range(count)],
                pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
            ),
            "label": pa.array([n % 2 for n in range(count)], pa.int64()),
            **{name: pa.array(values) for name, values in columns.items()},
        }
    )
    return table.replace_schema_metadata({b"huggingface": json.dumps(info).encode()})


def test_hugging_faces_layout_comes_with_labels_names_and_other_columns(tmp_path: Path) -> None:
    (tmp_path / "in/data").mkdir(parents=True)
    (tmp_path / "in/README.md").write_text("a card")
    table = hugging_face(
        caption=[f"größe {n}" if n else None for n in range(20)],
        width=list(range(20)),
        Tags=[[str(n)] for n in range(20)],
        raw=[b"\0%d" % n for n in range(20)],
        alt=[f"alt {n}" for n in range(20)],
    )
    pq.write_table(table[:14], tmp_path / "in/data/train-00000-of-00002.parquet", row_group_size=5)
    pq.write_table(table[14:], tmp_path / "in/data/train-00001-of-00002.parquet", row_group_size=5)
    source = open_source(str(tmp_path / "in"))
    assert (source.kind, source.classes) == ("parquet", ("bee", "owl", "übel"))
    assert source.entries[7].key == "data/train-00000-of-00002/00000007"
    assert [entry.label for entry in source.entries] == [n % 2 for n in range(20)]
    assert [source.read(entry) for entry in source.entries] == PNGS
    prepare(str(tmp_path / "in"), str(tmp_path / "out"), test_fraction=0.3, shard_count=2)
    seen = {}
    for tar in (tmp_path / "out").glob("*/*.tar"):
        for sample in webdataset.WebDataset(str(tar), shardshuffle=False):
            seen[sample["__key__"]] = {k: v for k, v in sample.items() if not k.startswith("__")}
    for number, entry in enumerate(source.entries):
        sample = seen.pop(entry.key)
        assert sample.pop("txt", b"") == (f"größe {number}".encode() if number else b"")
        assert sample == {
            "png": PNGS[number],
            "cls": str(number % 2).encode(),
            "width.json": str(number).encode(),
            "tags.json": f'["{number}"]'.encode(),
            "raw.bin": b"\0%d" % number,
            "alt.txt": f"alt {number}".encode(),
        }
    assert not seen


def test_plain_bytes_other_column_names_and_keys_of_their_own(tmp_path: Path) -> None:
    table = pa.table(
        {"img": PNGS, "kind": [f"k{n % 3}" for n in range(20)], "__key__": [f"a.b/{n}.x" for n in range(20)]}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"), image="img", label="kind")
    assert source.classes == ("k0", "k1", "k2")
    entry = next(entry for entry in source.entries if entry.key == "a.b/7%2Ex")
    assert source.read(entry) == PNGS[7]
    assert entry.label == 1
    assert source.reader.load(entry).members == {}
    assert "say with --image NAME" in refusal(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("columns", "options", "said"),
    [
        ({"image": ["text"]}, {}, "column 'image' must be binary"),
        ({"image": [PNGS[0]], "label": [1.5]}, {}, "column 'label' must be integers or text, not double"),
        ({"image": [PNGS[0]]}, {"label": "x"}, "--label x:"),
        ({"image": [PNGS[0]]}, {"image": "x"}, "--image x:"),
        ({"image": PNGS[:2], "label": [1, None]}, {}, "1 of 2 images have no label, such as"),
        ({"image": PNGS[:2], "label": [1, -7]}, {}, "has the label -7, which is no class"),
        ({"image": PNGS[:2], "__key__": ["a", "a"]}, {}, "would both be the sample 'a'"),
        ({"image": PNGS[:2], "__key__": ["a", None]}, {}, "empty field"),
        ({"image": PNGS[:1], "A b": [1], "a_b": [1]}, {}, "would both be the member 'a_b.json'"),
        ({"image": pa.array([], pa.binary())}, {}, "holds no image"),
    ],
)
def test_a_table_that_is_no_source_is_refused_naming_what(
    tmp_path: Path, columns: dict[str, Any], options: dict[str, str], said: str
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert said in refusal(tmp_path / "a.parquet", **options)


def test_rows_without_bytes_are_named_when_they_are_read(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    values = [{"bytes": None, "path": "/etc/passwd"}, None]
    pq.write_table(pa.table({"image": pa.array(values, kind)}), tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"))
    with pytest.raises(UserError, match=r"a.parquet row 0 of row group 0: .* only the path /etc/passwd"):
        source.read(source.entries[0])
    with pytest.raises(UserError, match=r"a.parquet row 1 .* nothing"):
        source.read(source.entries[1])


def test_a_broken_or_odd_parquet_file_is_named(tmp_path: Path) -> None:
    pq.write_table(hugging_face(), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[:-9])
    assert "b.parquet: is no readable Parquet file" in refusal(tmp_path / "b.parquet")
    assert "b.parquet" in refusal(tmp_path)
    pq.write_table(pa.table({"image": PNGS}), tmp_path / "b.parquet")
    assert "has other columns than" in refusal(tmp_path)
    (tmp_path / "c.tar").write_bytes(b"x")
    assert "give one kind" in refusal(tmp_path)


def test_a_label_beyond_the_names_of_the_classes_is_named(tmp_path: Path) -> None:
    table = hugging_face()
    pq.write_table(table.set_column(1, "label", pa.array([3] * 20)), tmp_path / "a.parquet")
    assert "has the label 3: the source names 3 classes" in refusal(tmp_path / "a.parquet")
    pq.write_table(table.set_column(1, "label", pa.array([-1] * 20)), tmp_path / "a.parquet")
    assert {entry.label for entry in open_source(str(tmp_path / "a.parquet")).entries} == {-1}


def test_a_shard_reads_few_row_groups_and_each_of_them_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 row groups of 50, shards of 10: a window of 8 shards is of two row groups or so."""
    count = 1000
    table = pa.table(
        {"image": [PNGS[n % 20] for n in range(count)], "label": [n // 100 for n in range(count)]}
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=50)
    entries = open_source(str(tmp_path / "a.parquet")).entries
    plans = plan_shards(entries, 0, 0.1, samples_per_shard=10)
    assert sum(len(plan.entries) for plan in plans) == count
    train = [plan for plan in plans if plan.split == "train"]
    readers = Counter(group for plan in train for group in {entry.group for entry in plan.entries})
    # mixed over all shards, a row group of 45 would be read by about 36
    assert max(readers.values()) <= 12
    # the table is sorted by label, and most shards are not
    assert sum(len({entry.label for entry in plan.entries}) > 1 for plan in train) > 0.7 * len(train)
    read: list[tuple[str, int]] = []
    original = _ParquetReader._read

    def counting(self: _ParquetReader, key: str, group: int) -> pa.Table:
        read.append((key, group))
        return original(self, key, group)

    monkeypatch.setattr(_ParquetReader, "_read", counting)
    monkeypatch.setattr(source_parquet, "_CACHE_BYTES", 0)
    prepare(str(tmp_path / "a.parquet"), str(tmp_path / "out"), samples_per_shard=50)
    per_shard = sum(
        len({entry.group for entry in plan.entries})
        for plan in plan_shards(entries, 0, 0.1, samples_per_shard=50)
    )
    # beside them the look for colour, once through, and the first image's shape
    assert len(read) <= per_shard + 20 + 1


# ---- NumPy


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (8, 6, 3)])
def test_an_array_gives_its_images_in_order(tmp_path: Path, shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (12, *shape), dtype=np.uint8)
    np.save(tmp_path / "a.npy", pixels)
    np.save(tmp_path / "y.npy", np.arange(12) % 3)
    source = open_source(str(tmp_path / "a.npy"), labels=str(tmp_path / "y.npy"))
    assert (source.kind, source.name, source.classes) == ("numpy", "a", ("0", "1", "2"))
    assert source.entries[11].key == "image-11"
    for number, entry in enumerate(source.entries):
        chw = pixels[number][None] if len(shape) == 2 else pixels[number].transpose(2, 0, 1)
        assert np.array_equal(decode_png(source.read(entry), chw.shape), chw)
        assert entry.label == number % 3
    assert open_source(str(tmp_path / "a.npy")).classes == ()


def test_an_npz_carries_labels_and_further_arrays(tmp_path: Path) -> None:
    others: dict[str, Any] = {"Embedding": np.random.default_rng(0).normal(size=(20, 4)), "n": np.arange(20)}
    np.savez(tmp_path / "a.npz", images=IMAGES[:, 0], labels=np.array(["b", "a"] * 10), **others)
    source = open_source(str(tmp_path / "a.npz"))
    assert source.classes == ("a", "b")
    loaded = source.reader.load(source.entries[3])
    assert set(loaded.members) == {"embedding.npy", "n.npy"}
    row = np.load(io.BytesIO(loaded.members["embedding.npy"]), allow_pickle=False)
    assert np.array_equal(row, others["Embedding"][3])
    np.savez(tmp_path / "b.npz", pictures=IMAGES[:, 0], y=np.arange(20))
    source = open_source(str(tmp_path / "b.npz"), image="pictures")
    assert [entry.label for entry in source.entries] == list(range(20))
    before = open_source(str(tmp_path / "b.npz"), image="pictures").fingerprint
    np.savez(tmp_path / "b.npz", pictures=255 - IMAGES[:, 0], y=np.arange(20))
    assert open_source(str(tmp_path / "b.npz"), image="pictures").fingerprint != before


@pytest.mark.parametrize(
    ("arrays", "options", "said"),
    [
        (
            {"images": np.zeros((3, 4, 4))},
            {},
            "must be uint8 [N, H, W] or [N, H, W, 1 or 3], got float64 [3, 4, 4]: of numbers from 0 to 1 "
            "(255 * array).round().astype('uint8') makes such",
        ),
        (
            {"images": np.zeros((3, 1, 8, 8), np.uint8)},
            {},
            "got uint8 [3, 1, 8, 8]: put the channels last, array.transpose(0, 2, 3, 1)",
        ),
        ({"images": np.zeros((3, 8), np.uint8)}, {}, "got uint8 [3, 8]"),
        ({"images": np.zeros((0, 8, 8), np.uint8)}, {}, "holds no image"),
        (
            {"images": np.zeros((3, 8, 8), np.uint8), "y": np.zeros(2, int)},
            {},
            "a.npz: array 'y': must be integers or texts [3], one for each image, got int64 [2]",
        ),
        ({"images": np.zeros((3, 8, 8), np.uint8), "z": np.zeros(2, int)}, {}, "array 'z' has the shape [2]"),
        ({"pictures": np.zeros((3, 8, 8), np.uint8)}, {}, "say with --image NAME"),
        ({"images": np.zeros((3, 8, 8), np.uint8)}, {"label": "y"}, "--label y:"),
    ],
)
def test_arrays_that_are_no_images_are_named(
    tmp_path: Path, arrays: dict[str, Any], options: dict[str, str], said: str
) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    assert said in refusal(tmp_path / "a.npz", **options)


def test_labels_of_another_length_are_named_by_their_own_file(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 8, 8), np.uint8))
    np.save(tmp_path / "labels.npy", np.zeros(2, int))
    said = refusal(tmp_path / "a.npy", labels=str(tmp_path / "labels.npy"))
    assert said.startswith(
        f"--labels {tmp_path}/labels.npy: must be integers or texts [3], one for each image"
    )


def test_no_array_is_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert "can't be read as NumPy arrays (it holds Python objects, which are not read" in refusal(
        tmp_path / "a.npy"
    )
    for name in ("junk.npy", "junk.npz"):
        for data in (b"words, many of them", b"", b"\x80\x04K\x01."):
            (tmp_path / name).write_bytes(data)
            assert "(it does not begin like a .npy or .npz file)" in refusal(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "c.npz", "w") as archive:
        archive.writestr("images", b"words")
    assert "(its member 'images' is no array)" in refusal(tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", images=np.array([None]))
    assert "it holds Python objects" in refusal(tmp_path / "d.npz")
    (tmp_path / "b.npz").write_bytes(b"PK\3\4 words")
    assert "can't be read as NumPy arrays" in refusal(tmp_path / "b.npz")
    assert "No such file" in refusal(tmp_path / "none.npy")


# ---- tables of labels


def put_folder(root: Path, *names: str) -> Path:
    for name in names:
        write_image(root / name, IMAGES[0][0])
    return root


def test_labels_come_from_a_table(tmp_path: Path) -> None:
    root = put_folder(tmp_path / "in", "x/1.png", "2.png", "größe.png")
    (tmp_path / "l.csv").write_text(
        "file,label,more\nx/1.png,owl,1\n2.png,bee,\n./größe.png,owl,\n", "utf-8-sig"
    )
    source = open_source(str(root), labels=str(tmp_path / "l.csv"))
    assert source.classes == ("bee", "owl")
    assert {entry.key: entry.label for entry in source.entries} == {"2": 0, "größe": 1, "x/1": 1}
    pq.write_table(
        pa.table({"label": [4, 0, 4], "file": ["x/1.png", "2.png", "größe.png"]}), tmp_path / "l.parquet"
    )
    numbered = open_source(str(root), labels=str(tmp_path / "l.parquet"))
    assert numbered.classes == ("0", "1", "2", "3", "4")
    assert {entry.key: entry.label for entry in numbered.entries} == {"2": 0, "größe": 4, "x/1": 4}
    assert numbered.fingerprint != source.fingerprint


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("file,label\n1.png,a\n", "has no row for 1 of 2 images, such as 2.png"),
        ("file,label\n1.png,a\n2.png,b\n3.png,c\n", "1 of its rows name no image of"),
        ("file,label\n1.png,a\n1.png,b\n2.png,c\n", "row 2 names 1.png a second time"),
        ("file,label\n1.png,\n2.png,\n", "gives no image a label: fill in its column label, or leave it out"),
        ("file,label\n1.png,a\n2.png,\n", "1 of 2 images have no label, such as 2.png"),
        ("name,label\n1.png,a\n", "and not file"),
        ("", "and not file, label"),
        ("file,label\n1.png\n", "has no row for 1 of 2"),
    ],
)
def test_a_table_that_does_not_fit_is_named(tmp_path: Path, text: str, said: str) -> None:
    root = put_folder(tmp_path / "in", "1.png", "2.png")
    (tmp_path / "l.csv").write_text(text)
    assert said in refusal(root, labels=str(tmp_path / "l.csv"))


def test_numbers_among_names_are_told_since_they_do_not_stay_numbers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = (
        "the label 5 is a number, and dog is none (of up to 9 digits): all are names, which are numbered in "
    )
    classes, numbers = number_labels("a", [Coded.of(["5", "dog", "5"])])
    assert (classes, numbers.tolist()) == (("5", "dog"), [0, 1, 0])
    assert told in caplog.text
    caplog.clear()
    number_labels("a", [Coded.of(["5", "7"])])
    number_labels("a", [Coded.of(["cat", "dog"])])
    assert not caplog.records


def test_a_table_that_is_not_there_or_is_none_is_named(tmp_path: Path) -> None:
    root = put_folder(tmp_path / "in", "1.png")
    assert "No such file" in refusal(root, labels=str(tmp_path / "l.csv"))
    (tmp_path / "l.parquet").write_bytes(b"words")
    assert "can't be read as a table" in refusal(root, labels=str(tmp_path / "l.parquet"))


def test_files_beside_an_image_are_its_members(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = put_folder(tmp_path / "in", *(f"{n}.png" for n in range(8)))
    for number in range(8):
        (root / f"{number}.txt").write_text(f"nr {number}")
    (root / "3.JSON").write_text("{}")
    prepare(str(root), str(tmp_path / "out"), test_fraction=0.3)
    seen = {}
    for tar in (tmp_path / "out").glob("*/*.tar"):
        for sample in webdataset.WebDataset(str(tar), shardshuffle=False):
            seen[sample["__key__"]] = (sample["txt"], sample.get("json"))
    assert seen == {str(n): (f"nr {n}".encode(), b"{}" if n == 3 else None) for n in range(8)}
    assert not caplog.records
    before = open_source(str(root)).fingerprint
    (root / "3.JSON").write_text("{1}")
    assert open_source(str(root)).fingerprint != before
