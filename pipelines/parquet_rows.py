"""Parquet files by their rows: which there are, with their names and labels, and in which row group each lies."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.columns import (
    Coded,
    CodedBuilder,
    Integers,
    Keys,
    Numbered,
    TextsBuilder,
    narrow,
    pieces,
)
from pipelines.entries import Entry
from pipelines.errors import UserError, one_line, printable
from pipelines.source_find import read_range
from pipelines.storage import Storage

KEY = "__key__"
_ROWS_AT_ONCE = 2**14


class _Ranges(io.RawIOBase):
    """An object of a storage as a file that PyArrow reads pieces of."""

    def __init__(self, storage: Storage, key: str, name: str, num_bytes: int) -> None:
        super().__init__()
        self._object = storage, key, name
        self._num_bytes = num_bytes
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._num_bytes)[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(self._num_bytes - self._at, 0)
        length = left if size is None or size < 0 else min(size, left)
        data = read_range(*self._object, self._at, length) if length else b""
        self._at += length
        return data


def open_file(storage: Storage, key: str, num_bytes: int) -> pq.ParquetFile:
    where = printable(f"{storage.uri}/{key}")
    try:
        return pq.ParquetFile(
            pa.PythonFile(_Ranges(storage, key, where, num_bytes), mode="r"), pre_buffer=False
        )
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"source: {where}: is no readable Parquet file ({one_line(error, 120)})") from None


@dataclass(frozen=True, eq=False)
class Footer:
    """What is needed of a file's footer, which itself is large: `rows` and `sizes` (in bytes) of its row groups."""

    key: str
    num_bytes: int
    rows: Integers
    sizes: Integers

    @classmethod
    def of(cls, key: str, num_bytes: int, footer: pq.FileMetaData) -> Footer:
        groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
        rows, sizes = ([group.num_rows for group in groups], [group.total_byte_size for group in groups])
        return cls(key, num_bytes, narrow(rows), narrow(sizes))

    @property
    def count(self) -> int:
        return int(self.rows.sum())


def small_columns(
    storage: Storage, where: str, footer: Footer, label: str | None, has_keys: bool
) -> tuple[Keys, Coded[Any]]:
    """The samples' names of a file, and their labels."""
    numbered = Numbered(f"{PurePosixPath(footer.key).with_suffix('')}/", footer.count, 8)
    small = [*([label] if label else []), *([KEY] if has_keys else [])]
    if not small:
        return numbered, Coded((None,), np.zeros(footer.count, np.uint8))
    names, labels = TextsBuilder(), CodedBuilder[Any]()
    file = open_file(storage, footer.key, footer.num_bytes)
    for group in range(len(footer.rows)):
        try:
            table = file.read_row_group(group, columns=small, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"source: {where}: {printable(footer.key)} can't be read ({one_line(error, 120)})"
            ) from None
        for piece in table.to_batches(max_chunksize=_ROWS_AT_ONCE):
            for value in piece[label].to_pylist() if label else [None] * len(piece):
                labels.append(value)
            for name in piece[KEY].to_pylist() if has_keys else ():
                if not isinstance(name, str) or not name:
                    raise UserError(
                        f"source: {where}: {printable(footer.key)}: column {KEY!r} has an empty field"
                    )
                names.append(name)
    return names.build() if has_keys else numbered, labels.build()


@dataclass(frozen=True, eq=False)
class Rows:
    """The samples of one file. `names`: as they are there; `keys`: as they are in the data set."""

    uri: str
    footer: Footer
    names: Keys
    keys: Keys

    def entry(self, row: int, label: int) -> Entry:
        key = self.footer.key
        group = bisect_right(self._stops, row)
        inside = row - (int(self._stops[group - 1]) if group else 0)
        return Entry(
            self.keys[row],
            label,
            printable(f"{self.uri}/{key} row {inside} of row group {group}"),
            (key, group, inside),
            self._group(group),
        )

    def groups(self) -> Iterator[tuple[str, int]]:
        for group, rows in enumerate(pieces(self.footer.rows)):
            yield self._group(group), rows

    def _group(self, number: int) -> str:
        # a file's name may be any bytes, and the plan hashes text
        return _text(f"{self.footer.key}/{number}")

    @cached_property
    def _stops(self) -> Integers:
        return narrow(np.cumsum(self.footer.rows, dtype=np.int64))


def _text(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def listing(parts: list[Rows], numbers: Integers) -> Iterator[str]:
    """The lines of a source's fingerprint: of each file what its footer says, of each sample name and class."""
    for part in parts:
        footer = part.footer
        yield f"{footer.key!r} {footer.count} {footer.sizes.tolist()}"
    names = chain.from_iterable(part.names for part in parts)
    for name, number in zip(names, pieces(numbers), strict=True):
        yield f"{name!r} {number}"
