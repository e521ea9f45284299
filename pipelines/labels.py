"""Labels and the classes that they mean; and those of image files, by a table or by their folders."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.columns import Coded, Integers, Keys, narrow
from pipelines.errors import UserError, one_line, printable
from pipelines.verified import counted

Label = str | int | None

log = logging.getLogger(__name__)

_ABSENT = (None, -1, "-1")
_MAX_CLASSES = 2**20
COLUMNS = ("file", "label")


def read_labels(path: str) -> dict[str, str | int | None]:
    """The label of each file, from a CSV (UTF-8, with a line of names) or Parquet table with the columns
    `file` and `label`; further columns are not read.

    Raises `UserError` naming the table, and the line where one row is at fault.
    """
    where = f"--labels {path}"
    try:
        rows = _parquet(path) if path.lower().endswith(".parquet") else _csv(path)
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or one_line(error, 120)
        raise UserError(f"{where}: can't be read as a table of files and labels ({reason})") from None
    labels: dict[str, str | int | None] = {}
    for number, (file, label) in enumerate(rows, 1):
        if not isinstance(file, str) or not isinstance(label, str | int | None):
            raise UserError(
                f"{where}: row {number} gives {label!r} to {file!r}: a label is a text or a number"
            )
        name = file.removeprefix("./")
        if name in labels:
            raise UserError(f"{where}: row {number} names {name} a second time")
        labels[name] = label if label != "" else None
    return labels


def _csv(path: str) -> list[tuple[Any, Any]]:
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        _check_columns(list(reader.fieldnames or []))
        return [(row["file"], row["label"]) for row in reader]


def _parquet(path: str) -> list[tuple[Any, Any]]:
    with pq.ParquetFile(path, pre_buffer=False) as file:
        _check_columns(file.schema_arrow.names)
        table = file.read(columns=list(COLUMNS), use_threads=False)
    return list(zip(table["file"].to_pylist(), table["label"].to_pylist(), strict=True))


def _check_columns(names: list[str]) -> None:
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise ValueError(f"it has the columns {', '.join(names) or 'none'}, and not {', '.join(missing)}")


def number_labels(
    where: str,
    labels: Sequence[Coded[Any]],
    names: Sequence[str] | None = None,
    name_of: Callable[[int], str] = str,
) -> tuple[tuple[str, ...], Integers]:
    """The classes of these labels (columns one behind the other), and each label as the number of its class (−1
    where there is no label).

    Numbers (also as text) stay as they are, and their classes are `names` or "0", "1", …; texts are numbered
    in their order. `name_of(place)` says which one is at fault. Raises `UserError` if only some have a label
    (None, or the number −1), if a number has no class, or if one number is written in two ways.
    """
    total = sum(map(len, labels))
    absent = sum(_count(column, lambda label: label in _ABSENT) for column in labels)
    if absent == total:
        return (), np.full(total, -1, np.int8)
    if absent:
        first = name_of(_first(labels, lambda label: label in _ABSENT))
        raise UserError(
            f"source: {where}: {absent} of {total} images have no label, such as {first}: give all of them one, "
            "or none"
        )
    texts = {str(label) for column in labels for label in column.values}
    if not all(text.isascii() and text.isdigit() and len(text) < 10 for text in texts):
        if any(map(_no_class, (label for column in labels for label in column.values))):
            wrong = _first(labels, _no_class)
            raise UserError(
                f"source: {where}: {name_of(wrong)} has the label {_at(labels, wrong)}, which is no class"
            )
        classes = sorted(texts)
        if some := [name for name in classes if name.isascii() and name.isdigit()]:
            other = next(name for name in classes if name not in some)
            log.warning(
                "source: %s: the label %s is a number, and %s is none (of up to 9 digits): all are names, "
                "which are numbered in their order",
                where,
                some[0],
                printable(other),
            )
        numbers = {name: number for number, name in enumerate(classes)}
        return tuple(printable(name) for name in classes), _numbered(labels, numbers)
    values = {text: int(text) for text in texts}
    if len(set(values.values())) < len(texts):
        _refuse_spellings(where, labels, name_of)
    largest = max(values.values())
    if largest >= (_MAX_CLASSES if names is None else len(names)):
        known_classes = (
            f"the source names {len(names)} classes" if names is not None else "is no class's number"
        )
        at = name_of(_first(labels, lambda label: values[str(label)] == largest))
        raise UserError(f"source: {where}: {at} has the label {largest}: {known_classes}")
    return tuple(printable(name) for name in names or map(str, range(largest + 1))), _numbered(labels, values)


def _refuse_spellings(where: str, labels: Sequence[Coded[Any]], name_of: Callable[[int], str]) -> None:
    """Name the first place where a number is written otherwise than before."""
    first: dict[str, int] = {}
    start = 0
    for column in labels:
        codes, rows = np.unique(column.codes, return_index=True)
        for code, row in zip(codes.tolist(), rows.tolist(), strict=True):
            first.setdefault(str(column.values[code]), start + row)
        start += len(column)
    spelt: dict[int, str] = {}
    for text in sorted(first, key=first.__getitem__):
        if (other := spelt.setdefault(int(text), text)) != text:
            raise UserError(
                f"source: {where}: {name_of(first[other])} has the label {other}, and {name_of(first[text])} "
                f"{text}, which would both be the class {int(text)}: write it one way"
            )


def _no_class(label: Label) -> bool:
    return isinstance(label, int) and not 0 <= label < _MAX_CLASSES


def _matching(column: Coded[Any], matches: Callable[[Label], bool]) -> Integers:
    return np.array([matches(label) for label in column.values], bool)[column.codes]


def _count(column: Coded[Any], matches: Callable[[Label], bool]) -> int:
    codes = [code for code, label in enumerate(column.values) if matches(label)]
    return sum(int(np.count_nonzero(column.codes == code)) for code in codes)


def _first(labels: Sequence[Coded[Any]], matches: Callable[[Label], bool]) -> int:
    """The first place with such a label, which there is."""
    start = 0
    for column in labels:
        if any(map(matches, column.values)):
            return start + int(np.argmax(_matching(column, matches)))
        start += len(column)
    raise AssertionError


def _at(labels: Sequence[Coded[Any]], place: int) -> str:
    for column in labels:
        if place < len(column):
            return str(column[place])
        place -= len(column)
    raise AssertionError


def _numbered(labels: Sequence[Coded[Any]], numbers: dict[str, int]) -> Integers:
    kind = narrow([max(numbers.values())]).dtype
    result = np.empty(sum(map(len, labels)), kind)
    start = 0
    for column in labels:
        of_value = np.array([numbers[str(label)] for label in column.values], kind)
        result[start : start + len(column)] = of_value[column.codes]
        start += len(column)
    return result


def labels_of(where: str, images: Keys, table: str | None) -> tuple[tuple[str, ...], Integers]:
    """The classes of these files, and of each the number of its class; by the table, or by the folders."""
    if table is not None:
        known = read_labels(table)
        unlisted = [image for image in images if image not in known]
        if unlisted:
            raise UserError(
                f"--labels {table}: has no row for {len(unlisted)} of {len(images)} images, such as "
                f"{printable(unlisted[0])}"
            )
        absent = sorted(known.keys() - set(images))
        if absent:
            raise UserError(
                f"--labels {table}: {len(absent)} of its rows name no image of {where}, such as {absent[0]}"
            )
        classes, numbers = number_labels(
            where, [Coded.of(known[image] for image in images)], name_of=lambda n: printable(images[n])
        )
        if not classes:
            raise UserError(
                f"--labels {table}: gives no image a label: fill in its column label, or leave it out"
            )
        return classes, numbers
    tops = Coded.of(image.partition("/")[0] if "/" in image else "" for image in images)
    if "" in tops.values and len(tops.values) > 1:
        loose = tops.codes == tops.values.index("")
        number, first = counted(int(loose.sum()), "image"), printable(images[int(np.argmax(loose))])
        raise UserError(
            f"source: {where}: {number} beside the class folders would have no label, such as {first}: move them "
            "into a folder, or put all images into one"
        )
    # not by number_labels: a folder's name is a name, also where it looks like a number
    names = sorted(name for name in tops.values if name)
    number_of = {name: number for number, name in enumerate(names)}
    of_value = narrow([number_of.get(name, -1) for name in tops.values])
    return tuple(printable(name) for name in names), of_value[tops.codes]
