"""Image files as a source: a folder or a prefix on S3; and what a zip of a folder has in common with it."""

from __future__ import annotations

import os
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, compress

import numpy as np

from pipelines.columns import Coded, Integers, Keys, Passed, Texts, mapped, narrow, pieces
from pipelines.duplicates import hashes_of
from pipelines.entries import Entries, checked
from pipelines.errors import UserError, printable
from pipelines.labels import labels_of
from pipelines.source_find import Found, read_object
from pipelines.sources import (
    SUFFIXES,
    Entry,
    Loaded,
    Reader,
    Source,
    fingerprint,
    key_of,
    split_suffix,
    warn_passed_over,
)
from pipelines.storage import Storage
from pipelines.verified import counted

# (extension in lower case, name) of each
Members = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _FileReader:
    storage: Storage

    def load(self, entry: Entry) -> Loaded:
        image, others = entry.place
        members = {suffix: read_object(self.storage, name, entry.name) for suffix, name in others}
        return Loaded(read_object(self.storage, image, entry.name), members)


def folder(found: Found, labels: str | None) -> Source:
    """The images of a folder or a prefix.

    Labels are those of the table, or the names of the sub-folders right below, sorted; images that lie in the
    folder itself have none. A file that shares its path but for the suffix with an image is a further member
    of that sample. Hidden files are passed over, and so, with a warning that counts them, are all others.
    """
    files = found.files
    return collect(
        "folder",
        found.name,
        found.where,
        files.keys,
        files.sizes,
        _FileReader(found.storage),
        labels,
        files.versions,
    )


def collect(
    kind: str,
    name: str,
    where: str,
    names: Texts,
    contents: Sequence[str] | Integers,
    reader: Reader,
    labels: str | None,
    versions: Texts | None = None,
) -> Source:
    """The source made of these files: their names relative to its root, sorted, each with what is known of its
    content, and with its version where that is not all.
    """
    where = printable(where)
    is_image = np.fromiter(map(_is_image, names), bool, len(names))
    images = names if is_image.all() else Texts.of(compress(names, is_image))
    if not len(images):
        found = f"no image among its {counted(len(names), 'file')}" if len(names) else "no file"
        raise UserError(f"source: {where} holds {found}: images end in {', '.join(SUFFIXES)}")
    members = _further(where, images, compress(names, ~is_image))
    classes, numbers = labels_of(where, images, labels)
    part = _Files(where, images, mapped(images, key_of), members)
    used = is_image.copy()

    def lines() -> Iterator[str]:
        """A line for each file that is in a sample, sample by sample."""
        for row, place in enumerate(pieces(np.flatnonzero(is_image))):
            image = images[row]
            yield f"{os.fsencode(image)!r} {contents[place]}"
            for _, other in part.others(row, image):
                at = bisect_left(names, other)
                used[at] = True
                yield f"{os.fsencode(other)!r} {contents[at]}"
        for label in chain(classes, pieces(numbers)) if labels else ():
            yield f"label {label}"

    digest = fingerprint(lines())
    state = "" if versions is None else _state(names, versions, used)
    return Source(
        kind=kind,
        name=printable(name),
        levels=256,
        classes=classes,
        entries=checked(where, Entries([part], numbers)),
        fingerprint=digest,
        reader=reader,
        state=state,
    )


def _state(names: Texts, versions: Texts, used: Integers) -> str:
    files = compress(zip(names, versions, strict=True), used)
    return fingerprint(f"{name!r} {version}" for name, version in files)


def _further(where: str, images: Texts, others: Iterable[str]) -> Coded[Members]:
    """The further members of each image, as `_Files` holds them, of the files that are no images."""
    rest = Texts.of(others)
    rows, passed_over = _matched(images, rest)

    def members() -> Iterator[Members]:
        at = 0
        for row, image in enumerate(images):
            found: dict[str, str] = {}
            while at < len(rows) and rows[at, 0] == row:
                other = rest[rows[at, 1]]
                extension = split_suffix(other)[1].lower()[1:]
                if (first := found.setdefault(extension, other)) != other:
                    raise UserError(
                        f"source: {where}: {printable(first)} and {printable(other)} would both be the member "
                        f".{extension} of the sample {key_of(other)!r}: rename one"
                    )
                at += 1
            yield tuple((extension, _ending(image, name)) for extension, name in found.items())

    made = Coded.of(members())
    warn_passed_over(where, passed_over, "file", "not named like an image")
    return made


def _matched(images: Texts, rest: Texts) -> tuple[Integers, Passed]:
    """Rows of images, each with one of `rest` that has its stem, in order; and what has that of no image."""
    hashes = hashes_of(map(_stem, images), len(images)) if len(rest) else np.zeros(0, np.int64)
    order = np.argsort(hashes)
    hashes = hashes[order]
    wanted = hashes_of(map(_stem, rest), len(rest))
    starts, stops = (narrow(np.searchsorted(hashes, wanted, side)) for side in ("left", "right"))
    of_images, of_rest, passed_over = array("Q"), array("Q"), Passed()
    for row, (other, start, stop) in enumerate(zip(rest, pieces(starts), pieces(stops), strict=True)):
        stem, suffix = split_suffix(other)
        found = [at for at in order[start:stop].tolist() if suffix and _stem(images[at]) == stem]
        of_images.extend(found)
        of_rest.extend([row] * len(found))
        if not found:
            passed_over.append(other)
    pairs = np.stack([narrow(of_images), narrow(of_rest)], axis=1)
    return pairs[np.argsort(pairs[:, 0], kind="stable")], passed_over


def _ending(image: str, name: str) -> str:
    """What stands in the name of a member in place of the image's suffix, or where that can't be said the name."""
    suffix = split_suffix(name)[1]
    return suffix if name == _without_suffix(image) + suffix else name


def _without_suffix(image: str) -> str:
    return image.removesuffix(split_suffix(image)[1])


@dataclass(frozen=True)
class _Files:
    """`members`: of each image the extensions of the further ones, each with what `_ending` says: most images of a
    source have the same.
    """

    where: str
    images: Texts
    keys: Keys
    members: Coded[Members]

    def entry(self, row: int, label: int) -> Entry:
        image = self.images[row]
        return Entry(
            self.keys[row], label, f"{self.where}/{printable(image)}", (image, self.others(row, image))
        )

    def groups(self) -> Iterator[tuple[str, int]]:
        yield "", len(self.images)

    def others(self, row: int, image: str) -> Members:
        """The further members of the image in this row."""
        stem = _without_suffix(image) if (members := self.members[row]) else ""
        # a name does not begin with a dot, which would hide it
        return tuple((kind, f"{stem}{end}" if end.startswith(".") else end) for kind, end in members)


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and bool(_stem(name))


def _stem(name: str) -> str:
    return split_suffix(name)[0]
