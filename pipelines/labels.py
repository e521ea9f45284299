"""A table that gives each file its label."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import UserError, one_line

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
