"""Records and the objects that they name: all or none, the first whole one stands, damage is named."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from pipelines.records import (
    ObjectRecord,
    RecordError,
    commit_first,
    parse_json,
    put_recorded,
    read_checked,
    read_record,
)
from pipelines.storage import ObjectMissing, Storage, StorageError, open_storage


class Note(BaseModel):
    format_version: int
    part: ObjectRecord


class OwnError(RecordError):
    pass


@pytest.fixture
def place(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path))


def keys(place: Storage) -> list[str]:
    return [info.key for info in place.list()]


def written(place: Storage, key: str, data: bytes) -> Note:
    [part] = put_recorded(place, [(key, data)])
    return Note(format_version=1, part=part)


def standing(place: Storage) -> Note | None:
    """The note that stands, if all of it can be read."""
    try:
        note = read_record(place, "note.json", Note, 1)
        read_checked(place, note.part)
    except RecordError:
        return None
    return note


def committed(place: Storage, key: str, data: bytes) -> Note:
    note = written(place, key, data)
    return commit_first(place, "note.json", note, [note.part], lambda: standing(place)) or note


def test_the_first_whole_record_stands_and_the_losers_objects_go(place: Storage) -> None:
    first = committed(place, "a", b"one")
    assert committed(place, "b", b"two") == first == standing(place)
    assert keys(place) == ["a", "note.json"]
    assert read_checked(place, first.part) == b"one"


@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "record"])
def test_a_damaged_one_is_replaced(place: Storage, damage: str) -> None:
    committed(place, "a", b"one")
    if damage == "gone":
        place.delete(["a"])
    elif damage == "record":
        place.put("note.json", b"{")
    else:
        place.put("a", {"cut": b"on", "flip": b"onf"}[damage])
    second = committed(place, "b", b"two")
    assert standing(place) == second
    assert read_checked(place, second.part) == b"two"


def test_a_server_that_is_away_says_nothing_about_damage(place: Storage) -> None:
    first = committed(place, "a", b"one")
    note = written(place, "b", b"two")

    def away() -> Note | None:
        raise StorageError("away")

    with pytest.raises(StorageError, match="away"):
        commit_first(place, "note.json", note, [note.part], away)
    assert standing(place) == first


def test_all_objects_or_none(place: Storage) -> None:
    def parts() -> Iterator[tuple[str, bytes]]:
        yield "a", b"one"
        yield "b", b"two"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        put_recorded(place, parts())
    assert keys(place) == []


def test_what_cannot_be_cleaned_up_does_not_hide_the_reason(
    place: Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(key: str, data: bytes) -> None:
        raise StorageError("full")

    def away(keys: Iterator[str]) -> None:
        raise StorageError("away")

    monkeypatch.setattr(logging.getLogger("pipelines"), "propagate", True)
    monkeypatch.setattr(place, "put", full)
    monkeypatch.setattr(place, "delete", away)
    with caplog.at_level(logging.WARNING, "pipelines"), pytest.raises(StorageError, match="full"):
        put_recorded(place, [("a", b"one")])
    assert "left uncommitted objects behind: away" in caplog.text


def test_errors_are_the_callers_and_name_the_object(place: Storage) -> None:
    note = committed(place, "a", b"one")
    place.put("a", b"onf")
    with pytest.raises(OwnError, match=r"/a: its SHA-256 differs from its commit record's$"):
        read_checked(place, note.part, OwnError)
    place.put("note.json", b'{"format_version": 2}')
    with pytest.raises(OwnError, match=r"/note\.json: has format version 2, this program reads 1$"):
        read_record(place, "note.json", Note, 1, OwnError)
    place.put("note.json", b'{"format_version": 1}')
    with pytest.raises(OwnError, match=r"/note\.json: part: "):
        read_record(place, "note.json", Note, 1, OwnError)
    with pytest.raises(ObjectMissing):
        read_record(place, "none.json", Note, 1, OwnError)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "1" * 5000, "\xff"], ids=range(4))
def test_what_is_no_json_is_named(place: Storage, text: str) -> None:
    place.put("note.json", text.encode("latin-1"))
    with pytest.raises(OwnError, match=r"/note\.json: is not JSON; the object is damaged"):
        read_record(place, "note.json", Note, 1, OwnError)


@pytest.mark.parametrize("version", ["true", "1.0", "2", "null", '"1"'])
def test_a_version_that_is_not_the_number_is_refused(place: Storage, version: str) -> None:
    part = '{"key": "a", "num_bytes": 1, "sha256": ""}'
    place.put("note.json", f'{{"format_version": {version}, "part": {part}}}'.encode())
    with pytest.raises(OwnError, match=r"has format version .*, this program reads 1"):
        read_record(place, "note.json", Note, 1, OwnError)


HOSTILE = {
    "[" * 100_000: "is not JSON",
    "[" * 400 + "]" * 400: "is nested more than 50 levels deep",
    '{"a":' * 60 + "1" + "}" * 60: "is nested more than 50 levels deep",
    '{"a": [1e999]}': "holds a number that is not finite",
    '{"a": NaN}': "holds a number that is not finite",
    "9" * 5000: "is not JSON",
    "": "is not JSON",
}


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_json_that_would_fell_whoever_reads_on_is_named(place: Storage, text: str) -> None:
    with pytest.raises(OwnError, match=f"^x: {HOSTILE[text]}"):
        parse_json(text.encode(), "x", OwnError)
    place.put("note.json", text.encode())
    with pytest.raises(RecordError, match=f"^{place.uri}/note.json: {HOSTILE[text]}"):
        read_record(place, "note.json", Note, 1)


def test_json_of_a_handful_of_levels_passes() -> None:
    text = b"[" * 50 + b"]" * 50
    assert json.dumps(parse_json(text, "x")).encode() == text
    assert str(parse_json(b'{"loss": [NaN, 1]}', "x", finite=False)) == "{'loss': [nan, 1]}"
