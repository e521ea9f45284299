"""The samples of a source as one table, of which an entry is made when it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol, overload

import numpy as np

from pipelines.columns import Integers, Joined, Keys
from pipelines.duplicates import repeated
from pipelines.errors import UserError


@dataclass(frozen=True, slots=True)
class Entry:
    """One image of a source: `key` it gets in the data set, `label` (−1 for none), `name` by which it is
    known, `place` by which its source's reader finds it, `group` what is read as a whole to get at it (nothing
    where it can be read alone).
    """

    key: str
    label: int
    name: str
    place: Any = None
    group: str = ""


class Part(Protocol):
    """Some samples of a source that are held together, such as those of one file."""

    @property
    def keys(self) -> Keys: ...

    def entry(self, row: int, label: int) -> Entry: ...

    def groups(self) -> Iterator[tuple[str, int]]:
        """The groups (`Entry.group`) in the order of the rows, each with the number of its rows."""
        ...


class Entries:
    """All samples of a source: those of its parts, one part behind the other, in the source's order.

    `labels`: of each sample, or nothing where none has one.
    """

    def __init__(self, parts: Iterable[Part], labels: Integers | None = None) -> None:
        self._parts = tuple(part for part in parts if len(part.keys))
        self._stops = np.array([0, *accumulate(len(part.keys) for part in self._parts)], np.int64)
        self._labels = labels
        assert labels is None or len(labels) == len(self)

    @property
    def keys(self) -> Joined:
        return Joined(part.keys for part in self._parts)

    def groups(self) -> Iterator[tuple[str, int]]:
        for part in self._parts:
            yield from part.groups()

    def with_labels(self, labels: Integers) -> Entries:
        return Entries(self._parts, labels)

    def take(self, rows: Integers | range) -> tuple[Entry, ...]:
        """The entries of these rows, in this order."""
        wanted = np.asarray(rows, np.int64)
        parts = np.searchsorted(self._stops, wanted, side="right") - 1
        inside = wanted - self._stops[parts]
        labels = np.full(len(wanted), -1) if self._labels is None else self._labels[wanted]
        found = zip(parts.tolist(), inside.tolist(), labels.tolist(), strict=True)
        return tuple(self._parts[part].entry(row, label) for part, row, label in found)

    def __len__(self) -> int:
        return int(self._stops[-1])

    @overload
    def __getitem__(self, chosen: int) -> Entry: ...

    @overload
    def __getitem__(self, chosen: slice) -> tuple[Entry, ...]: ...

    def __getitem__(self, chosen: int | slice) -> Entry | tuple[Entry, ...]:
        rows = range(len(self))[chosen]
        return self.take(rows) if isinstance(rows, range) else self.take(range(rows, rows + 1))[0]

    def __iter__(self) -> Iterator[Entry]:
        step = 1024
        for start in range(0, len(self), step):
            yield from self[start : start + step]


def checked(where: str, entries: Entries) -> Entries:
    """The entries; `UserError` if two share a key, or if there are none."""
    if not len(entries):
        raise UserError(f"source: {where} holds no image")
    if rows := min(repeated(entries.keys).items(), default=("", ()))[1]:
        one, two = (entries[row] for row in rows[:2])
        raise UserError(f"source: {one.name} and {two.name} would both be the sample {one.key!r}: rename one")
    return entries
