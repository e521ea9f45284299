"""Which files an address means: a folder, a prefix on S3, one file, or a pattern of many; and reading them."""

from __future__ import annotations

import os
import re
import stat
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Literal, Protocol
from urllib.parse import unquote_to_bytes, urlsplit

import numpy as np
from braceexpand import alphabet, braceexpand

from pipelines.columns import Integers, Passed, Texts, TextsBuilder, narrow, pieces
from pipelines.errors import UserError, one_line, printable
from pipelines.sources import KINDS, SUFFIXES, tell_hidden, warn_passed_over
from pipelines.storage import FileStorage, ObjectInfo, ObjectMissing, Storage, StorageError, open_storage

_OF_A_DATA_SET = re.compile(r"(^|/)(shards\.parquet|[^/]+\.index\.parquet|scans/[^/]+\.parquet)$")
_MAX_FILES_OF_A_PATTERN = 2**20
Kind = Literal["folder", "zip", "tar", "parquet"]
_SUFFIX_OF_KIND: dict[Kind, str] = {"tar": ".tar", "parquet": ".parquet"}
_RANGE = re.compile(r"(?:(-?\d+)\.\.(-?\d+)|([A-Za-z])\.\.([A-Za-z]))(?:\.\.-?(\d+))?")


class _Paths(FileStorage):
    """Files that a walk of a folder found, whose names may be any bytes and not the Unicode of an object's key."""

    def _path(self, key: str) -> Path:
        return self._root / key


@dataclass(frozen=True, eq=False)
class Files:
    """Files in the order of their keys, with what `ObjectInfo` says of each."""

    keys: Texts
    sizes: Integers
    versions: Texts

    @classmethod
    def of(cls, infos: Iterable[ObjectInfo]) -> Files:
        keys, sizes, versions = TextsBuilder(), array("Q"), TextsBuilder()
        for info in infos:
            keys.append(info.key)
            sizes.append(info.num_bytes)
            versions.append(info.version)
        files = cls(keys.build(), narrow(sizes), versions.build())
        order = files.keys.order()
        return files if order is None else files._take(order)

    def select(self, wanted: Callable[[str], object]) -> Files:
        """Those with such a key."""
        chosen = np.fromiter((bool(wanted(key)) for key in self.keys), bool, len(self.keys))
        return self if chosen.all() else self._take(np.flatnonzero(chosen))

    def _take(self, rows: Integers) -> Files:
        keys, versions = (
            Texts.of(column[row] for row in pieces(rows)) for column in (self.keys, self.versions)
        )
        return Files(keys, self.sizes[rows], versions)


@dataclass(frozen=True)
class Found:
    """What an address means: `files` below `storage`."""

    kind: Kind
    storage: Storage
    files: Files
    name: str
    where: str

    @cached_property
    def keys(self) -> dict[str, int]:
        """The files' keys, each with its size. As `versions` for a source of few files, with many samples each."""
        return dict(zip(self.files.keys, self.files.sizes.tolist(), strict=True))

    @cached_property
    def versions(self) -> dict[str, str]:
        """Of each file, what changes with its content (`ObjectInfo.version`)."""
        return dict(zip(self.files.keys, self.files.versions, strict=True))


def local_path(source: str) -> Path:
    """The path of a file or folder on this machine, given as such or as file://. Raises `UserError` on another
    address.
    """
    if not source:
        raise UserError(f"source: is empty: give {KINDS}")
    if source.startswith("pipe:"):
        raise UserError(f"source: {printable(source)}: a pipe: address would run a program, and is not taken")
    if "://" in source and not source.startswith("file://"):
        raise UserError(f"source: {printable(source)}: is not taken; give {KINDS}")
    if source.startswith("file://"):
        try:
            parts = urlsplit(source)
        except ValueError as error:
            raise UserError(f"source: {printable(source)}: {one_line(error)}") from None
        if parts.netloc not in ("", "localhost"):
            raise UserError(f"source: {source}: a file address is file:///PATH, and this one names a host")
        source = os.fsdecode(unquote_to_bytes(parts.path))
    try:
        return Path(source).expanduser()
    except RuntimeError as error:
        raise UserError(f"source: {printable(source)}: {one_line(error)}") from None


def find(source: str) -> Found:
    """The files of an address, and what kind of source they are. Raises `UserError` naming it."""
    where = printable(source)
    if source.startswith("s3://"):
        return _find_on_s3(source, where)
    path = local_path(source)
    try:
        # a pattern may be longer than a file's name
        return (
            _find_many(path, where)
            if "{" in source and not os.path.lexists(path)
            else _find_here(path, where)
        )
    except OSError as error:
        at = printable(str(error.filename or path))
        raise UserError(f"source: {at}: {error.strerror or one_line(error)}") from None


def _find_here(path: Path, where: str) -> Found:
    if path.is_dir():
        hidden = Passed()
        found = _of_kind(
            _Paths(path), _walk(str(path), "", (), hidden), path.resolve().name or "images", where
        )
        tell_hidden(where, hidden)
        return found
    if not path.is_file():
        pattern = "; of patterns only {000..031} and {a,b} are known" if set("*?[") & set(where) else ""
        raise UserError(f"source: {where} does not exist: give {KINDS}{pattern}")
    path = path.absolute()
    files = Files.of([_info_of(str(path), path.name)])
    return Found(_kind_of_file(path.name), _Paths(path.parent), files, path.stem, where)


def _find_many(path: Path, where: str) -> Found:
    names = _expand(str(path))
    if missing := next((name for name in names if not Path(name).is_file()), None):
        raise UserError(f"source: {where}: {printable(missing)} does not exist")
    root = Path(os.path.commonpath([str(Path(name).absolute().parent) for name in names]))
    paths = dict.fromkeys(Path(name).absolute() for name in names)
    infos = (_info_of(str(path), path.relative_to(root).as_posix()) for path in paths)
    return _of_kind(_Paths(root), infos, root.name, where)


def _info_of(path: str, key: str, status: os.stat_result | None = None) -> ObjectInfo:
    status = status or os.stat(path)  # noqa: PTH116  a folder may have 10⁸ files
    if not stat.S_ISREG(status.st_mode):
        raise UserError(
            f"source: {printable(str(Path(path)))}: is a pipe, a socket or a device, and no file that can be read "
            "again: take it out of the folder"
        )
    return ObjectInfo(key, status.st_size, str(status.st_mtime_ns))


def _kind_of_file(name: str) -> Literal["zip", "tar", "parquet"]:
    lower = name.lower()
    if lower.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        raise UserError(f"source: {printable(name)} is compressed: unpack it to a plain .tar first")
    if lower.endswith(".tar"):
        return "tar"
    return "parquet" if lower.endswith(".parquet") else "zip"


def _find_on_s3(source: str, where: str) -> Found:
    bucket, _, rest = source.removeprefix("s3://").partition("/")
    names = _expand(rest) if "{" in rest else [rest]
    if names[0].lower().endswith((".tar", ".parquet")):
        prefix = os.path.commonpath([name.rpartition("/")[0] for name in names])
        storage = open_storage(f"s3://{bucket}/{prefix}")
        keys = [name.removeprefix(prefix).lstrip("/") for name in names]
        named = (_info(storage, key) for key in dict.fromkeys(keys))
        return _of_kind(storage, named, PurePosixPath(keys[0]).stem, where)
    if len(names) > 1 or names[0].lower().endswith((".zip", ".tgz", ".gz", ".npy", ".npz")):
        raise UserError(f"source: {where}: on S3 a source is .tar or .parquet files, or a prefix")
    storage = open_storage(source)
    hidden = Passed()
    infos = _shown(storage.list(), hidden)
    found = _of_kind(storage, infos, PurePosixPath(rest).name or bucket, where)
    tell_hidden(where, hidden)
    return found


def _shown(infos: Iterable[ObjectInfo], hidden: Passed) -> Iterator[ObjectInfo]:
    """Those that are files and not hidden; the hidden ones go to `hidden`."""
    for info in infos:
        if info.key.endswith("/"):
            continue
        if _hidden(info.key):
            hidden.append(info.key)
        else:
            yield info


def _info(storage: Storage, key: str) -> ObjectInfo:
    for info in storage.list(key):
        if info.key == key:
            return info
    raise UserError(f"source: {printable(f'{storage.uri}/{key}')} does not exist")


def _hidden(key: str) -> bool:
    return any(part.startswith(".") for part in key.split("/"))


def _expand(pattern: str) -> list[str]:
    try:
        if _count(pattern) > _MAX_FILES_OF_A_PATTERN:
            raise UserError(f"source: {printable(pattern)}: means more than {_MAX_FILES_OF_A_PATTERN} files")
        return list(braceexpand(pattern))
    except (ValueError, RecursionError):
        raise UserError(f"source: {printable(pattern)}: its braces do not match") from None


def _count(pattern: str) -> int:
    """How many names a pattern means, without making them: `braceexpand` holds every range in memory."""
    total = 1
    for group in _pieces(pattern)[1]:
        commas = _pieces(group)[0]
        if match := _RANGE.fullmatch(group):
            ends = (match[1], match[2]) if match[1] else (alphabet.index(match[3]), alphabet.index(match[4]))
            total *= abs(int(ends[1]) - int(ends[0])) // max(int(match[5] or 1), 1) + 1
        else:
            total *= sum(map(_count, commas)) if len(commas) > 1 else _count(group)
    return total


def _pieces(pattern: str) -> tuple[list[str], list[str]]:
    """What lies between the commas outside of all braces; and the insides of the outermost braces."""
    parts, groups = [], []
    depth = start = opened = at = 0
    while at < len(pattern):
        letter = pattern[at]
        if letter == "\\":
            at += 1
        elif letter == "{":
            opened, depth = (at + 1, 1) if depth == 0 else (opened, depth + 1)
        elif letter == "}":
            depth -= 1
            if depth == 0:
                groups.append(pattern[opened:at])
        elif letter == "," and depth == 0:
            parts.append(pattern[start:at])
            start = at + 1
        at += 1
    return [*parts, pattern[start:]], groups


def _ends_in(suffix: str) -> Callable[[str], bool]:
    return lambda key: key.lower().endswith(suffix)


def _of_kind(storage: Storage, infos: Iterable[ObjectInfo], name: str, where: str) -> Found:
    files = Files.of(infos)
    if any(key.lower().endswith(".tar") for key in files.keys):
        # beside tars: what a data set of them consists of, as --index-only puts it
        files = files.select(lambda key: not _OF_A_DATA_SET.search(key))
    if not any(key.lower().endswith(SUFFIXES) for key in files.keys):
        for kind, suffix in _SUFFIX_OF_KIND.items():
            chosen = files.select(_ends_in(suffix))
            other = next((s for s in _SUFFIX_OF_KIND.values() if s != suffix), "")
            if len(chosen.keys) and any(key.lower().endswith(other) for key in files.keys):
                raise UserError(f"source: {where} holds .tar and .parquet files: give one kind")
            if len(chosen.keys):
                rest = Passed()
                for key in files.keys:
                    if not key.lower().endswith(suffix):
                        rest.append(key)
                warn_passed_over(where, rest, "file", f"not named like a {suffix} file")
                return Found(kind, storage, chosen, name, where)
    return Found("folder", storage, files, name, where)


def _walk(folder: str, key: str, above: tuple[tuple[int, int], ...], hidden: Passed) -> Iterator[ObjectInfo]:
    """Every file below `folder`, which has this key with its slash; links to folders are followed, except to one
    that the link lies in. Hidden files and folders, which are not entered, go to `hidden`.
    """
    status = os.stat(folder)  # noqa: PTH116
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    for name in sorted(os.listdir(folder)):  # noqa: PTH208
        path = os.path.join(folder, name)  # noqa: PTH118
        if name.startswith("."):
            hidden.append(path)
            continue
        status = os.stat(path)  # noqa: PTH116
        if stat.S_ISDIR(status.st_mode):
            yield from _walk(path, f"{key}{name}/", (*above, here), hidden)
        else:
            yield _info_of(path, key + name, status)


class Ranged(Protocol):
    """As much of a `Storage` as reading a piece of an object takes."""

    @property
    def uri(self) -> str: ...

    def get_range(self, key: str, start: int, length: int) -> bytes: ...


def read_object(storage: Storage, key: str, name: str) -> bytes:
    """An object of a source; `UserError` naming it where there is none, `StorageError` where it can't be read."""
    with _named(name):
        return storage.get(key)


def read_range(storage: Ranged, key: str, name: str, start: int, length: int) -> bytes:
    """A piece of an object of a source; errors as of `read_object`."""
    with _named(name):
        return storage.get_range(key, start, length)


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except ObjectMissing:
        raise UserError(f"{name}: is missing, or can't be seen from where it was to be read") from None
    except StorageError as error:
        # which stays what it is: Ray tries again, and what is prepared already stays
        raise StorageError(f"{name}: {one_line(error)}") from None
