"""Image files as a source: a folder or a prefix on S3; and what a zip of a folder has in common with it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

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
    ordered,
    state_of,
    warn_passed_over,
)
from pipelines.storage import Storage
from pipelines.verified import counted


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
    known = {name: str(size) for name, size in found.keys.items()}
    return collect(
        "folder", found.name, found.where, known, _FileReader(found.storage), labels, found.versions
    )


def collect(
    kind: str,
    name: str,
    where: str,
    files: Mapping[str, str],
    reader: Reader,
    labels: str | None,
    versions: Mapping[str, str] | None = None,
) -> Source:
    """The source made of these files: names relative to its root, each with what is known of its content, and with
    its version where that is not all.
    """
    where = printable(where)
    images = sorted(name for name in files if name.lower().endswith(SUFFIXES) and _stem(name))
    if not images:
        found = f"no image among its {counted(len(files), 'file')}" if files else "no file"
        raise UserError(f"source: {where} holds {found}: images end in {', '.join(SUFFIXES)}")
    others: dict[str, dict[str, str]] = {_stem(image): {} for image in images}
    passed_over = []
    for other in sorted(set(files) - set(images)):
        extension = PurePosixPath(other).suffix.lower()[1:]
        if not extension or _stem(other) not in others:
            passed_over.append(other)
        elif (first := others[_stem(other)].setdefault(extension, other)) != other:
            raise UserError(
                f"source: {where}: {printable(first)} and {printable(other)} would both be the member .{extension} "
                f"of the sample {key_of(other)!r}: rename one"
            )
    warn_passed_over(where, passed_over, "files that are not named like images")
    classes, numbers = labels_of(where, images, labels)
    entries = [
        Entry(
            key_of(image), label, f"{where}/{printable(image)}", (image, tuple(others[_stem(image)].items()))
        )
        for image, label in zip(images, numbers, strict=True)
    ]
    return Source(
        kind=kind,
        name=printable(name),
        levels=256,
        classes=classes,
        entries=ordered(where, entries),
        fingerprint=fingerprint(_listing(images, others, files, [*classes, *numbers] if labels else [])),
        reader=reader,
        state=state_of({name: versions[name] for name in _used(images, others)}) if versions else "",
    )


def _used(images: Iterable[str], others: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """The names of the files that are in samples, sample by sample."""
    for image in images:
        yield image
        yield from others[_stem(image)].values()


def _listing(
    images: list[str],
    others: Mapping[str, Mapping[str, str]],
    files: Mapping[str, str],
    labels: list[Any],
) -> Iterator[str]:
    for name in _used(images, others):
        yield f"{os.fsencode(name)!r} {files[name]}"
    for label in labels:
        yield f"label {label}"


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))
