"""Image files as a source: a folder, a prefix on S3, or a zip."""

from __future__ import annotations

import os
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pipelines.errors import UserError, one_line, printable
from pipelines.labels import read_labels
from pipelines.source_find import Found, read_object
from pipelines.sources import (
    SUFFIXES,
    Entry,
    Loaded,
    Reader,
    Source,
    fingerprint,
    key_of,
    number_labels,
    ordered,
    warn_passed_over,
)
from pipelines.storage import Storage

_MAX_MEMBER_BYTES = 2**30


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
    return _collect("folder", found.name, found.where, known, _FileReader(found.storage), labels)


@dataclass
class _ZipReader:
    """`prefix`: the folder that holds everything in the zip, or nothing."""

    path: Path
    prefix: str
    _archive: zipfile.ZipFile | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "prefix": self.prefix, "_archive": None}

    def load(self, entry: Entry) -> Loaded:
        image, others = entry.place
        return Loaded(self._read(image), {suffix: self._read(name) for suffix, name in others})

    def _read(self, name: str) -> bytes:
        where = f"{printable(str(self.path))}/{printable(self.prefix + name)}"
        try:
            if self._archive is None:
                self._archive = zipfile.ZipFile(self.path)
            info = self._archive.getinfo(self.prefix + name)
            if info.file_size > _MAX_MEMBER_BYTES:
                raise ValueError(f"claims {info.file_size} bytes, which is no image")
            return self._archive.read(info)
        except Exception as error:  # noqa: BLE001  each compression method raises errors of its own
            raise UserError(f"{where}: cannot be unpacked ({one_line(error, 120)})") from None


def open_zip(path: Path, labels: str | None) -> Source:
    """The images of a zipped folder, as of the folder itself."""
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(
            f"source: {printable(str(path))} is neither a folder nor a readable zip ({one_line(error, 120)})"
        ) from None
    members = _members(path, archive)
    # most zips hold one folder with everything in it, which is no class
    tops = {name.partition("/")[0] for name in members}
    prefix = f"{tops.pop()}/" if len(tops) == 1 and all("/" in name for name in members) else ""
    known = {name.removeprefix(prefix): f"{info.file_size}/{info.CRC:08x}" for name, info in members.items()}
    return _collect("zip", path.stem, str(path), known, _ZipReader(path.absolute(), prefix, archive), labels)


def _members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The files in a zip by their names, without hidden ones and those that macOS adds."""
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = printable(info.filename)
        parts = PurePosixPath(info.filename).parts
        if not parts or parts[0] == "/" or ".." in parts:
            raise UserError(f"source: {path}: its member {name!r} points outside the zip")
        if info.is_dir() or parts[0] == "__MACOSX" or any(part.startswith(".") for part in parts):
            continue
        if info.filename in members:
            raise UserError(f"source: {path}: holds two members named {name!r}")
        members[info.filename] = info
    return members


def _collect(
    kind: str, name: str, where: str, files: Mapping[str, str], reader: Reader, labels: str | None
) -> Source:
    """The source made of these files: names relative to its root, each with what is known of its content."""
    where = printable(where)
    images = sorted(name for name in files if name.lower().endswith(SUFFIXES) and _stem(name))
    if not images:
        found = f"{len(files)} other files" if files else "nothing"
        raise UserError(f"source: {where} holds no image, but {found}: images end in {', '.join(SUFFIXES)}")
    others: dict[str, list[tuple[str, str]]] = {_stem(image): [] for image in images}
    passed_over = []
    for other in sorted(set(files) - set(images)):
        extension = PurePosixPath(other).suffix.lower()[1:]
        if extension and _stem(other) in others:
            others[_stem(other)].append((extension, other))
        else:
            passed_over.append(other)
    warn_passed_over(where, passed_over, "files that are not named like images")
    classes, numbers = _labels(where, images, labels)
    entries = [
        Entry(key_of(image), label, f"{where}/{printable(image)}", (image, tuple(others[_stem(image)])))
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
    )


def _listing(
    images: list[str],
    others: Mapping[str, list[tuple[str, str]]],
    files: Mapping[str, str],
    labels: list[Any],
) -> Iterator[str]:
    for image in images:
        for name in (image, *(other for _, other in others[_stem(image)])):
            yield f"{os.fsencode(name)!r} {files[name]}"
    for label in labels:
        yield f"label {label}"


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _labels(where: str, images: list[str], table: str | None) -> tuple[tuple[str, ...], list[int]]:
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
