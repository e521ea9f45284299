"""Columns of a value a sample, held as bytes and not as Python objects: a source may have 10⁹ of them."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Integers = NDArray[Any]
Value = TypeVar("Value")
# values that are made into Python objects at a time
_PIECE = 2**12


class Keys(Protocol):
    """Texts by their row, each made when it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> str: ...

    def __iter__(self) -> Iterator[str]: ...


def narrow(values: array[int] | Integers | Sequence[int]) -> Integers:
    """These integers in the smallest type that holds all of them."""
    found = np.asarray(values)
    if found.size == 0:
        return np.zeros(0, np.uint8)
    low, high = int(found.min()), int(found.max())
    kinds = (np.int8, np.int16, np.int32) if low < 0 else (np.uint8, np.uint16, np.uint32)
    fitting = (kind for kind in kinds if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max)
    return found.astype(next(fitting, np.int64 if low < 0 else np.uint64))


def pieces(values: NDArray[Any]) -> Iterator[Any]:
    """The values as Python's, of which there are few at a time."""
    for start in range(0, len(values), _PIECE):
        yield from values[start : start + _PIECE].tolist()


class TextsBuilder:
    """Collects `Texts`."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._stops = array("Q")

    def append(self, text: str) -> None:
        # a name that is not UTF-8 arrives with lone surrogates
        self._data += text.encode("utf-8", "surrogatepass")
        self._stops.append(len(self._data))

    def build(self) -> Texts:
        return Texts(bytes(self._data), narrow(self._stops))


@dataclass(frozen=True, eq=False)
class Texts:
    """Texts one behind the other in `data` (UTF-8); `stops`: where each of them ends."""

    data: bytes
    stops: Integers

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        builder = TextsBuilder()
        for text in texts:
            builder.append(text)
        return builder.build()

    def __len__(self) -> int:
        return len(self.stops)

    def __getitem__(self, row: int) -> str:
        start = int(self.stops[row - 1]) if row else 0
        return self.data[start : int(self.stops[row])].decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        start = 0
        for stop in pieces(self.stops):
            yield self.data[start:stop].decode("utf-8", "surrogatepass")
            start = stop

    def order(self) -> Integers | None:
        """The rows in the order of their texts, or nothing where they lie in it."""
        if all(one <= two for one, two in pairwise(self)):
            return None
        offsets = np.concatenate([[0], self.stops.astype(np.int64)])
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(self.data)]
        # the order of UTF-8's bytes is that of the texts
        return pc.sort_indices(
            pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(self), buffers)
        ).to_numpy()


@dataclass(frozen=True)
class Numbered:
    """The texts `prefix` + number for the first `count` numbers, with zeros in front to `width` digits."""

    prefix: str
    count: int
    width: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> str:
        return f"{self.prefix}{row:0{self.width}d}"

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(self.count))


def mapped(texts: Keys, change: Callable[[str], str]) -> Keys:
    """`change` of each text; the very column where it changes none."""
    if all(change(text) == text for text in texts):
        return texts
    return Texts.of(map(change, texts))


class Joined:
    """Columns of texts one behind the other."""

    def __init__(self, columns: Iterable[Keys]) -> None:
        self._columns = tuple(columns)
        self._stops = np.array([*accumulate(map(len, self._columns))], np.int64)

    def __len__(self) -> int:
        return int(self._stops[-1]) if len(self._stops) else 0

    def __getitem__(self, row: int) -> str:
        column = int(np.searchsorted(self._stops, row, side="right"))
        return self._columns[column][row - (int(self._stops[column - 1]) if column else 0)]

    def __iter__(self) -> Iterator[str]:
        for column in self._columns:
            yield from column


class CodedBuilder(Generic[Value]):
    """Collects a `Coded`."""

    def __init__(self) -> None:
        self._codes = array("I")
        self._known: dict[Value, int] = {}

    def append(self, value: Value) -> None:
        self._codes.append(self._known.setdefault(value, len(self._known)))

    def build(self) -> Coded[Value]:
        return Coded(tuple(self._known), narrow(self._codes))


@dataclass(frozen=True, eq=False)
class Coded(Generic[Value]):
    """A column of few different values: each of them once, and of every row which it is."""

    values: tuple[Value, ...]
    codes: Integers

    @classmethod
    def of(cls, rows: Iterable[Value]) -> Coded[Value]:
        builder = CodedBuilder[Value]()
        for value in rows:
            builder.append(value)
        return builder.build()

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, row: int) -> Value:
        return self.values[self.codes[row]]

    def __iter__(self) -> Iterator[Value]:
        return map(self.values.__getitem__, pieces(self.codes))


@dataclass
class Passed:
    """How many names were passed over, and the first of them in their order."""

    count: int = 0
    first: str = ""

    def append(self, name: str) -> None:
        self.add(1, name)

    def add(self, count: int, first: str) -> None:
        if count and (not self.count or first < self.first):
            self.first = first
        self.count += count
