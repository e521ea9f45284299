"""Whether a sample set is whole and what its record says: every unit, every image exactly once, every object."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from pipelines.config import digest
from pipelines.errors import printable
from pipelines.images import stored_shape
from pipelines.records import RecordError, read_checked
from pipelines.sample_set import RECORD, SampleSet, SampleSetError, SetRecord, UnitCommit, unit_key
from pipelines.shards import ShardIndex, parse_index
from pipelines.storage import ObjectMissing, Storage
from pipelines.verified import Problem, Progress, Verified, problem_of
from pipelines.verify_shards import Contents, check_index, check_samples

# units that are fetched and looked at side by side
_UNITS_AT_ONCE = 4


def verify_samples(storage: Storage, *, deep: bool = False, progress: Progress | None = None) -> Verified:
    """Check a sample set: its record against its recipe and its name, each unit's commit record against it, that
    the units hold every image once, each shard's and index's SHA-256, and the index against the tar image by image,
    with its CRC32C and its label. With `deep` every image is decoded as well.

    Of a set that is not finished, which is a problem of its own, the units that are committed are checked alike,
    but for their labels, which the record would say; all images must then have the shape of the first. A unit that
    was made again meanwhile is a note.
    `progress(done, total)` counts images. What is wrong is returned, not raised; raises `StorageError` where the
    storage can't be read.
    """
    found, where = SampleSet(storage), f"{storage.uri}/{RECORD}"
    there = {info.key: info.num_bytes for info in storage.list()}
    problems: list[Problem] = []
    committed = _committed(found, problems)
    record: SetRecord | None = None
    try:
        record = found.record()
    except SampleSetError as error:
        damaged = RECORD in there
        problems.insert(
            0,
            problem_of(error, where)
            if damaged
            else Problem(where, None, f"is missing: {len(committed)} units are there; `ddpm sample` goes on"),
        )
    if record is None:
        units = [committed[number] for number in sorted(committed)]
    else:
        units = record.units
        problems += _check_record(storage, record)
        problems += _check_commits(found, record, committed)
    notes: list[str] = []
    if record is None and units:
        notes.append(f"whether the images have the labels that were asked for is not known without {RECORD}")
    shape = record.shape if record is not None else _first_shape(found, units) if deep else None
    total, done = sum(max(0, unit.stop - unit.start) for unit in units), 0
    with ThreadPoolExecutor(_UNITS_AT_ONCE) as pool:
        checks = pool.map(lambda unit: list(_check_unit(storage, record, shape, unit, deep)), units)
        for unit, wrong in zip(units, checks, strict=True):
            if wrong and _now(found, unit.unit) not in (None, committed.get(unit.unit)):
                notes.append(f"unit {unit.unit}: was made again meanwhile; verify it once more")
            else:
                problems += wrong
            done += max(0, unit.stop - unit.start)
            if progress is not None:
                progress(done, total)
    looked = {
        "shards": len(units),
        "samples": total,
        "num_bytes": sum(one.num_bytes for unit in units for one in (unit.shard, unit.index)),
    }
    identity = "" if record is None else digest(record.recipe)
    notes += _left(there, units, committed)
    return Verified("sample set", storage.uri, identity, looked, tuple(problems), tuple(notes))


def _now(found: SampleSet, number: int) -> UnitCommit | None:
    """A unit's commit record as it is by now: `ddpm sample` makes a damaged unit again."""
    try:
        return found.unit(number)
    except (SampleSetError, ObjectMissing):
        return None


def _first_shape(found: SampleSet, units: Sequence[UnitCommit]) -> tuple[int, int, int] | None:
    """The shape of the first image that can be read; None without one."""
    for unit in units:
        try:
            index = parse_index(read_checked(found.storage, unit.index, SampleSetError))
            tar = read_checked(found.storage, unit.shard, SampleSetError)
        except (RecordError, ValueError):
            continue
        for offset, length in zip(index.offset.tolist(), index.length.tolist(), strict=True):
            with contextlib.suppress(ValueError):
                return stored_shape(tar[offset : offset + length])
    return None


def _committed(found: SampleSet, problems: list[Problem]) -> dict[int, UnitCommit]:
    """The units that have a commit record which can be read; of the others a problem is noted."""
    units = {}
    for number in found.committed():
        where = f"{found.uri}/{unit_key(number)}"
        try:
            unit = found.unit(number)
        except (SampleSetError, ObjectMissing) as error:
            problems.append(problem_of(error, where))
            continue
        if unit.unit != number:
            problems.append(Problem(where, None, f"is the record of unit {unit.unit}"))
        units[number] = unit
    return units


def _check_record(storage: Storage, record: SetRecord) -> Iterator[Problem]:
    """The record of the whole: that it is what its recipe makes, under the name of that, and of whole units."""
    where = f"{storage.uri}/{RECORD}"
    if record.kind != "ddpm-samples":
        yield Problem(where, None, f"is a {record.kind!r}, not a sample set")
    for name, value in (
        ("count", record.count),
        ("shape", list(record.shape)),
        ("levels", record.levels),
    ):
        if record.recipe.get(name) != value:
            yield Problem(
                where, None, f"{name}: {value}, and its recipe says {record.recipe.get(name)!r:.40}"
            )
    own = digest(record.recipe)[:10]
    called = re.search(r"-([0-9a-f]{10})$", storage.uri)
    # of digits alone it is rather the date of a copy: one hash in a hundred is
    if called and called[1] != own and not called[1].isdecimal():
        yield Problem(
            where, None, f"its recipe is that of a set named …-{own}, and this one is …-{called[1]}"
        )
    at = 0
    for place, unit in enumerate(record.units):
        if unit.unit != place:
            yield Problem(where, None, f"lists unit {unit.unit} where {place} belongs")
        if unit.start != at or unit.stop <= unit.start:
            yield Problem(
                where,
                None,
                f"unit {unit.unit} holds images {unit.start} to {unit.stop - 1}, and {at} is the next",
            )
        at = unit.stop
    if at != record.count:
        yield Problem(where, None, f"its units end before image {at}, and it has {record.count} images")


def _check_commits(
    found: SampleSet, record: SetRecord, committed: dict[int, UnitCommit]
) -> Iterator[Problem]:
    listed = set(found.committed())
    for unit in record.units:
        where = f"{found.uri}/{unit_key(unit.unit)}"
        if unit.unit not in listed:
            yield Problem(where, None, f"is missing, though {RECORD} names the unit")
        elif committed.get(unit.unit, unit) != unit and _now(found, unit.unit) != unit:
            yield Problem(where, None, f"names other objects or images than {RECORD}")
    for number in sorted(listed - {unit.unit for unit in record.units}):
        yield Problem(f"{found.uri}/{unit_key(number)}", None, f"is no unit of {RECORD}")


def _check_unit(
    storage: Storage,
    record: SetRecord | None,
    shape: tuple[int, int, int] | None,
    unit: UnitCommit,
    deep: bool,
) -> Iterator[Problem]:
    """One unit's objects, and what is in them."""
    tar = index = None
    where, where_index = (f"{storage.uri}/{one.key}" for one in (unit.shard, unit.index))
    try:
        tar = read_checked(storage, unit.shard, SampleSetError)
    except RecordError as error:
        yield problem_of(error, where)
    try:
        index = parse_index(read_checked(storage, unit.index, SampleSetError))
    except (RecordError, ValueError) as error:
        yield problem_of(error, where_index)
    if index is not None:
        count, shard = unit.stop - unit.start, unit.shard
        yield from check_index(where_index, index, count, shard.num_bytes, shard.sha256, "its unit's record")
        yield from _check_rows(where_index, unit, index, _labels(record))
    if tar is not None:
        # no shape: not one image could be read, which each of them shows by its CRC32C or when it is decoded
        yield from check_samples(where, tar, index, Contents(shape or (0, 0, 0), None), deep)


def _check_rows(
    where: str, unit: UnitCommit, index: ShardIndex, labels: Sequence[int] | None
) -> Iterator[Problem]:
    """Each image's number in the index of a unit, and its label where those asked for are known."""
    for row, (key, label) in enumerate(zip(index.key.to_pylist(), index.label.tolist(), strict=True)):
        number = unit.start + row
        if key != f"{number:09d}":
            yield Problem(where, printable(key), f"stands where image {number:09d} belongs")
            # the others are then off by as many
            return
        if labels is None:
            continue
        asked = labels[number % len(labels)] if labels else -1
        # the label that means of no class, one more than the last, is written as none
        if label != asked and not (label == -1 and asked == max(labels)):
            yield Problem(where, key, f"has the label {label}, and its recipe says {asked}")


def _labels(record: SetRecord | None) -> Sequence[int] | None:
    if record is None:
        return None
    labels = record.recipe.get("labels", [])
    return labels if isinstance(labels, list) and all(isinstance(label, int) for label in labels) else []


def _left(
    there: dict[str, int], units: Sequence[UnitCommit], committed: dict[int, UnitCommit]
) -> Iterator[str]:
    named = {one.key for unit in (*units, *committed.values()) for one in (unit.shard, unit.index)}
    left = [key for key in there if key.startswith("shard-") and key not in named]
    if left:
        size = sum(there[key] for key in left)
        yield (
            f"{len(left)} objects ({size} bytes) that no unit names, left by attempts that were killed, or of one "
            f"at work: {left[0]} …"
        )
