"""What is in a data set twice, where one of the two may be held out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from pipelines.columns import Keys, pieces

# 64 bits of a text, of which this process alone knows the secret: equal ones mean nothing yet
_hash = hash


def same_content(items: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Of (name, hash of the content): the names of the first and of each further one with a hash, in order."""
    first: dict[str, str] = {}
    for name, digest in items:
        if digest in first:
            yield first[digest], name
        else:
            first[digest] = name


def twice(keys: Iterable[str]) -> list[str]:
    """The keys that occur more than once, each once, in the order in which they do so."""
    seen: set[str] = set()
    found: dict[str, None] = {}
    for key in keys:
        if key in seen:
            found[key] = None
        seen.add(key)
    return list(found)


def hashes_of(values: Iterable[object], count: int) -> NDArray[np.int64]:
    """A hash of each of so many values, the same for equal ones, in this process alone."""
    return np.fromiter(map(_hash, values), np.int64, count)


def repeated(keys: Keys) -> dict[str, list[int]]:
    """The keys that occur more than once, each with its rows. Takes 16 bytes a key while it looks."""
    hashes = hashes_of(keys, len(keys))
    ordered = np.sort(hashes)
    again = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    del ordered
    found: dict[str, list[int]] = {}
    if len(again):
        for row in pieces(np.flatnonzero(np.isin(hashes, again))):
            found.setdefault(keys[row], []).append(row)
    return {key: rows for key, rows in found.items() if len(rows) > 1}
