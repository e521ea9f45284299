"""What is in a data set twice, where one of the two may be held out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


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
