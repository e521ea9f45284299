"""A zip of image files as a source."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pipelines.columns import Passed, Texts
from pipelines.errors import UserError, one_line, printable
from pipelines.source_files import collect
from pipelines.sources import KINDS, Entry, Loaded, Source, tell_hidden

_MAX_MEMBER_BYTES = 2**30


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
        if path.suffix.lower() == ".zip":
            raise UserError(
                f"source: {printable(str(path))}: can't be read as a zip ({one_line(error, 120)}): it may be cut; "
                "copy it here once more"
            ) from None
        raise UserError(
            f"source: {printable(str(path))} is neither a folder nor a readable zip ({one_line(error, 120)}): give "
            f"{KINDS}"
        ) from None
    hidden = Passed()
    members = _members(path, archive, hidden)
    tell_hidden(printable(str(path)), hidden)
    # most zips hold one folder with everything in it, which is no class
    tops = {name.partition("/")[0] for name in members}
    prefix = f"{tops.pop()}/" if len(tops) == 1 and all("/" in name for name in members) else ""
    known = sorted(
        (name.removeprefix(prefix), f"{info.file_size}/{info.CRC:08x}") for name, info in members.items()
    )
    names = Texts.of(name for name, _ in known)
    reader = _ZipReader(path.absolute(), prefix, archive)
    return collect("zip", path.stem, str(path), names, [content for _, content in known], reader, labels)


def _members(path: Path, archive: zipfile.ZipFile, hidden: Passed) -> dict[str, zipfile.ZipInfo]:
    """The files in a zip by their names; hidden ones and those that macOS adds go to `hidden`."""
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = printable(info.filename)
        parts = PurePosixPath(info.filename).parts
        if not parts or parts[0] == "/" or ".." in parts:
            raise UserError(f"source: {path}: its member {name!r} points outside the zip")
        if info.is_dir():
            continue
        if parts[0] == "__MACOSX" or any(part.startswith(".") for part in parts):
            hidden.append(info.filename)
            continue
        if info.filename in members:
            raise UserError(f"source: {path}: holds two members named {name!r}")
        members[info.filename] = info
    return members
