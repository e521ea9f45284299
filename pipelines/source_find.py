"""Which files an address means: a folder, a prefix on S3, one file, or a pattern of many; and reading them."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, Protocol
from urllib.parse import unquote_to_bytes, urlsplit

from braceexpand import alphabet, braceexpand

from pipelines.errors import UserError, one_line, printable
from pipelines.sources import KINDS, SUFFIXES, tell_hidden, warn_passed_over
from pipelines.storage import FileStorage, ObjectInfo, ObjectMissing, Storage, StorageError, open_storage

_OF_A_DATA_SET = re.compile(r"(^|/)(shards\.parquet|[^/]+\.index\.parquet|scans/[^/]+\.parquet)$")
_MAX_FILES_OF_A_PATTERN = 2**20
Kind = Literal["folder", "zip", "tar", "parquet"]
_SUFFIX_OF_KIND: dict[Kind, str] = {"tar": ".tar", "parquet": ".parquet"}
_RANGE = re.compile(r"(?:(-?\d+)\.\.(-?\d+)|([A-Za-z])\.\.([A-Za-z]))(?:\.\.-?(\d+))?")


class _Files(FileStorage):
    """Files that a walk of a folder found, whose names may be any bytes and not the Unicode of an object's key."""

    def _path(self, key: str) -> Path:
        return self._root / key


@dataclass(frozen=True)
class Found:
    """What an address means: `keys` below `storage`, each with its size; `versions`: of each, what changes with its
    content (`ObjectInfo.version`).
    """

    kind: Kind
    storage: Storage
    keys: dict[str, int]
    versions: dict[str, str]
    name: str
    where: str


def local_path(source: str) -> Path:
    """The path of a file or folder on this machine, given as such or as file://."""
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
        hidden: list[str] = []
        infos = _stats(path, _walk(path, (), hidden))
        tell_hidden(where, hidden)
        return _of_kind(_Files(path), infos, path.resolve().name or "images", where)
    if not path.is_file():
        raise UserError(f"source: {where} does not exist: give {KINDS}")
    path = path.absolute()
    return _found(
        _kind_of_file(path.name), _Files(path.parent), _stats(path.parent, [path]), path.stem, where
    )


def _find_many(path: Path, where: str) -> Found:
    names = _expand(str(path))
    if missing := next((name for name in names if not Path(name).is_file()), None):
        raise UserError(f"source: {where}: {printable(missing)} does not exist")
    root = Path(os.path.commonpath([str(Path(name).absolute().parent) for name in names]))
    return _of_kind(_Files(root), _stats(root, (Path(name).absolute() for name in names)), root.name, where)


def _stats(root: Path, paths: Iterable[Path]) -> dict[str, ObjectInfo]:
    infos = {}
    for path in paths:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(
                f"source: {printable(str(path))}: is a pipe, a socket or a device, and no file that can be read "
                "again: take it out of the folder"
            )
        key = path.relative_to(root).as_posix()
        infos[key] = ObjectInfo(key, status.st_size, str(status.st_mtime_ns))
    return infos


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
        infos = {key: _info(storage, key) for key in keys}
        return _of_kind(storage, infos, PurePosixPath(keys[0]).stem, where)
    if len(names) > 1 or names[0].lower().endswith((".zip", ".tgz", ".gz", ".npy", ".npz")):
        raise UserError(f"source: {where}: on S3 a source is .tar or .parquet files, or a prefix")
    storage = open_storage(source)
    listed = [info for info in storage.list() if not info.key.endswith("/")]
    infos = {info.key: info for info in listed if not _hidden(info.key)}
    tell_hidden(where, [info.key for info in listed if info.key not in infos])
    return _of_kind(storage, infos, PurePosixPath(rest).name or bucket, where)


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


def _of_kind(storage: Storage, infos: dict[str, ObjectInfo], name: str, where: str) -> Found:
    if any(key.lower().endswith(".tar") for key in infos):
        # beside tars: what a data set of them consists of, as --index-only puts it
        infos = {key: info for key, info in infos.items() if not _OF_A_DATA_SET.search(key)}
    if not any(key.lower().endswith(SUFFIXES) for key in infos):
        for kind, suffix in _SUFFIX_OF_KIND.items():
            chosen = {key: info for key, info in sorted(infos.items()) if key.lower().endswith(suffix)}
            other = next((s for s in _SUFFIX_OF_KIND.values() if s != suffix), "")
            if chosen and any(key.lower().endswith(other) for key in infos):
                raise UserError(f"source: {where} holds .tar and .parquet files: give one kind")
            if chosen:
                rest = sorted(set(infos) - set(chosen))
                warn_passed_over(where, rest, f"files that are not named like {suffix} files")
                return _found(kind, storage, chosen, name, where)
    return _found("folder", storage, infos, name, where)


def _found(kind: Kind, storage: Storage, infos: dict[str, ObjectInfo], name: str, where: str) -> Found:
    sizes = {key: info.num_bytes for key, info in infos.items()}
    return Found(kind, storage, sizes, {key: info.version for key, info in infos.items()}, name, where)


def _walk(folder: Path, above: tuple[tuple[int, int], ...], hidden: list[str]) -> Iterator[Path]:
    """Every file below `folder`; links to folders are followed, except to one that the link lies in. Hidden files
    and folders, which are not entered, go to `hidden`.
    """
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    with os.scandir(folder) as items:
        for item in sorted(items, key=lambda item: item.name):
            if item.name.startswith("."):
                hidden.append(item.path)
                continue
            if item.is_dir():
                yield from _walk(Path(item.path), (*above, here), hidden)
            else:
                yield Path(item.path)


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
