"""The labels of image files: by a table that gives each file its label, or by their folders."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import UserError, one_line, printable
from pipelines.sources import number_labels

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


def labels_of(where: str, images: list[str], table: str | None) -> tuple[tuple[str, ...], list[int]]:
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
        return number_labels(
            where, [known[image] for image in images], name_of=lambda n: printable(images[n])
        )
    tops = Counter(image.partition("/")[0] if "/" in image else "" for image in images)
    if "" in tops and len(tops) > 1:
        loose = next(image for image in images if "/" not in image)
        raise UserError(
            f"source: {where}: {tops['']} images such as {printable(loose)} lie beside the class folders and "
            "would have no label: move them into a folder, or put all images into one"
        )
    # not by number_labels: a folder's name is a name, also where it looks like a number
    classes = sorted(name for name in tops if name)
    numbers = {name: number for number, name in enumerate(classes)}
    return tuple(printable(name) for name in classes), [
        numbers.get(image.partition("/")[0], -1) for image in images
    ]
