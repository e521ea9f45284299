"""Loading a data set's record: what it refuses, and what its identity depends on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.dataset import DataError, Dataset, shards_from_parquet, shards_to_parquet
from pipelines.shards import sha256
from tests.support.data import dataset_of
from tests.support.data import edit_record as edit


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    dataset_of(tmp_path / "set", [4, 3])
    return tmp_path / "set"


def refusal(prefix: Path) -> str:
    with pytest.raises(DataError) as error:
        Dataset.load(str(prefix))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_identity_is_of_the_content_and_not_of_the_place_or_the_spelling(
    prefix: Path, tmp_path: Path
) -> None:
    first = Dataset.load(str(prefix))
    assert len(first.identity) == 64
    shutil.copytree(prefix, tmp_path / "elsewhere")
    record = json.loads((prefix / "dataset.json").read_text())
    (tmp_path / "elsewhere/dataset.json").write_text(json.dumps(dict(reversed(record.items())), indent=7))
    assert Dataset.load(f"file://{tmp_path}/elsewhere").identity == first.identity
    edit(prefix, lambda record: record.update(name="another"))
    assert Dataset.load(str(prefix)).identity != first.identity


def test_where_there_is_none_the_way_to_make_one_is_told(tmp_path: Path) -> None:
    line = refusal(tmp_path / "nothing")
    assert str(tmp_path / "nothing") in line
    assert "ddpm prepare" in line


@pytest.mark.parametrize("version", [0, 2, "1", None, True, 1.0])
def test_an_unknown_version_is_refused_with_both_named(prefix: Path, version: Any) -> None:
    edit(prefix, lambda record: record.update(version=version))
    line = refusal(prefix)
    assert f"version {version!r}" in line
    assert "reads version 1" in line


DEEP = '{"format": "ddpm-dataset", "version": 1, "preparation": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"format": "another"}', '{"version": 1}', "\xff", "[" * 100_000, DEEP],
    ids=range(9),
)
def test_what_is_no_record_is_refused(prefix: Path, text: str) -> None:
    (prefix / "dataset.json").write_bytes(text.encode("latin-1"))
    assert "dataset.json: is not the record of a data set" in refusal(prefix)


@pytest.mark.parametrize("field", ["shape", "levels", "classes", "splits", "shards_sha256", "name"])
def test_a_record_that_lacks_a_field_names_it(prefix: Path, field: str) -> None:
    edit(prefix, lambda record: record.pop(field))
    assert field in refusal(prefix)


def test_a_record_with_impossible_values_is_refused(prefix: Path) -> None:
    edit(prefix, lambda record: record.update(levels=1))
    assert "levels: must be 2..256, got 1" in refusal(prefix)
    edit(prefix, lambda record: record.update(levels=256, shape=[8, 8]))
    assert "is damaged" in refusal(prefix)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1" * 5000])
@pytest.mark.parametrize("field", ["levels", "name", "anything"])
def test_numbers_that_are_none_are_refused(prefix: Path, field: str, number: str) -> None:
    edit(prefix, lambda record: record.update({field: "here"}))
    text = (prefix / "dataset.json").read_text().replace('"here"', number)
    (prefix / "dataset.json").write_text(text)
    assert f"{prefix.as_uri()}/dataset.json: is not the record of a data set" in refusal(prefix)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shape", [3, -8, 8]),
        ("shape", [3, 0, 8]),
        ("shape", [3, 8.9, 8]),
        ("shape", [3, 8.0, 8]),
        ("shape", [True, 8, 8]),
        ("shape", [2, 8, 8]),
        ("shape", [3, 10**6, 10**6]),
        ("shape", [1, 8, 8, 8]),
        ("shape", "188"),
        ("levels", 256.0),
        ("levels", True),
        ("levels", "256"),
        ("levels", 10**300),
        ("classes", "abc"),
        ("classes", [1, 2]),
        ("classes", {"a": 1}),
        ("name", None),
        ("name", 7),
        ("splits", []),
        ("splits", {"train": 7}),
        ("splits", {"train": {"count": None}}),
        ("splits", {"train": {"count": 7.0}}),
        ("splits", {"train": {"count": -7}}),
        ("splits", {"train\n" * 1000: {"count": -7}}),
        ("shards_sha256", 0),
        ("shards_sha256", "a\nb" * 20),
        ("preparation", []),
    ],
)
def test_a_field_that_is_not_what_it_must_be_is_named(prefix: Path, field: str, value: Any) -> None:
    edit(prefix, lambda record: record.update({field: value}))
    line = refusal(prefix)
    assert line.startswith(f"{prefix.as_uri()}/dataset.json: is damaged (field {field}")
    assert len(line) < len(str(prefix)) + 250


@pytest.mark.parametrize("field", ["count", "num_bytes"])
def test_a_shard_of_less_than_nothing_is_refused(prefix: Path, field: str) -> None:
    dataset = Dataset.load(str(prefix))
    first, second = dataset.splits["train"]
    for shard, number in ((first, 1004), (second, -997)):
        object.__setattr__(shard, field, number)
    listing = shards_to_parquet([first, second, *dataset.splits["test"]])
    (prefix / "shards.parquet").write_bytes(listing)
    edit(prefix, lambda record: record.update(shards_sha256=sha256(listing)))
    edit(prefix, lambda record: record["splits"]["train"].update(count=7))
    assert f"{prefix.as_uri()}/shards.parquet: a shard of " in refusal(prefix)


@pytest.mark.parametrize(
    ("field", "value", "line"),
    [
        ("key", "a\x1b[31m\nb.tar", "a name with control characters: a\\x1b[31m\\nb.tar"),
        ("index_key", "a\x9b31m", "a name with control characters: a\\x9b31m"),
        ("split", "train\r", "a name with control characters: train\\r"),
        ("sha256", "/etc/passwd", "train/shard-000000.tar: /etc/passwd is no SHA-256"),
        ("index_sha256", "\x1b" * 64, "train/shard-000000.tar: \\x1b"),
    ],
)
def test_names_and_hashes_that_are_none_are_refused(prefix: Path, field: str, value: str, line: str) -> None:
    dataset = Dataset.load(str(prefix))
    first, second = dataset.splits["train"]
    changed: dict[str, Any] = {field: value}
    listing = shards_to_parquet([replace(first, **changed), second])
    (prefix / "shards.parquet").write_bytes(listing)
    edit(prefix, lambda record: record.update(shards_sha256=sha256(listing)))
    told = refusal(prefix)
    assert told.startswith(f"{prefix.as_uri()}/shards.parquet: {line}")
    assert told.isprintable()


def test_the_list_of_shards_must_be_the_one_the_record_names(prefix: Path, tmp_path: Path) -> None:
    whole = (prefix / "shards.parquet").read_bytes()
    dataset_of(tmp_path / "other", [4, 3], seed=1)
    for wrong in (
        whole[:-1],
        bytes([whole[0] ^ 1]) + whole[1:],
        (tmp_path / "other/shards.parquet").read_bytes(),
    ):
        (prefix / "shards.parquet").write_bytes(wrong)
        line = refusal(prefix)
        assert "shards.parquet" in line
        assert "SHA-256" in line
    (prefix / "shards.parquet").unlink()
    assert "shards.parquet: is missing" in refusal(prefix)


def test_counts_that_disagree_are_refused(prefix: Path) -> None:
    edit(prefix, lambda record: record["splits"]["train"].update(count=8))
    assert "lists 7 train samples, and dataset.json says 8" in refusal(prefix)
    edit(prefix, lambda record: record["splits"]["train"].update(count=7, shards=3))
    assert "lists 2 train shards, and dataset.json says 3" in refusal(prefix)
    edit(prefix, lambda record: record["splits"]["train"].pop("shards"))
    assert Dataset.load(str(prefix)).count("train") == 7
    # of which nobody would hear again
    edit(prefix, lambda record: record["splits"].pop("test"))
    assert "lists 3 test samples, and dataset.json says 0" in refusal(prefix)


def test_a_record_that_tells_its_identity_is_of_it(prefix: Path) -> None:
    dataset = Dataset.load(str(prefix))
    stored = json.loads((prefix / "dataset.json").read_text())
    assert stored == {**dataset.record, "identity": dataset.identity}
    for change in (
        lambda record: record.update(classes=["cow", *record["classes"][1:]]),
        lambda record: record.update(levels=17),
        lambda record: record.update(identity=None),
        lambda record: record.update(identity="0" * 64),
    ):
        record = json.loads(json.dumps(stored))
        change(record)
        (prefix / "dataset.json").write_text(json.dumps(record))
        assert "dataset.json: is damaged (its content is not that of its field identity)" in refusal(prefix)
    # as earlier versions wrote it
    edit(prefix, lambda record: None)
    assert Dataset.load(str(prefix)).identity == dataset.identity


def test_a_field_that_no_record_has_is_refused(prefix: Path) -> None:
    edit(prefix, lambda record: record.update(identitz="0" * 64))
    assert "is damaged (field identitz: Extra inputs are not permitted" in refusal(prefix)
    edit(prefix, lambda record: (record.pop("identitz"), record.update({"": 1})))
    assert "is damaged (field '': Extra inputs are not permitted" in refusal(prefix)


def test_a_split_that_is_not_there_is_named(prefix: Path) -> None:
    with pytest.raises(DataError, match="no split 'val', only test, train"):
        Dataset.load(str(prefix)).count("val")


def test_the_list_of_shards_keeps_every_field(prefix: Path) -> None:
    shards = [*Dataset.load(str(prefix)).splits["train"]]
    assert shards_from_parquet(shards_to_parquet(shards)) == shards
    with pytest.raises(ValueError, match="Parquet"):
        shards_from_parquet(b"no")
