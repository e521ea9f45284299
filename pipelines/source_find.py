"""Which files an address means: a folder, a prefix on S3, one file, or a pattern of many; and reading them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, Protocol
from urllib.parse import unquote, urlsplit

from braceexpand import braceexpand

from pipelines.errors import UserError, one_line, printable
from pipelines.sources import KINDS, SUFFIXES, warn_passed_over
from pipelines.storage import FileStorage, ObjectMissing, Storage, StorageError, open_storage

_MAX_FILES_OF_A_PATTERN = 2**20
_SUFFIX_OF_KIND = {"tar": ".tar", "parquet": ".parquet"}


class _Files(FileStorage):
    """Files that a walk of a folder found, whose names may be any bytes and not the Unicode of an object's key."""

    def _path(self, key: str) -> Path:
        return self._root / key


@dataclass(frozen=True)
class Found:
    """What an address means: `keys` below `storage`, each with its size."""

    kind: Literal["folder", "zip", "tar", "parquet"]
    storage: Storage
    keys: dict[str, int]
    name: str
    where: str


def find(source: str) -> Found:
    """The files of an address, and what kind of source they are. Raises `UserError` naming it."""
    where = printable(source)
    if source.startswith("s3://"):
        return _find_on_s3(source, where)
    path = Path(unquote(urlsplit(source).path) if source.startswith("file://") else source).expanduser()
    try:
        if path.is_dir():
            sizes = {name.relative_to(path).as_posix(): name.stat().st_size for name in _walk(path, ())}
            return _of_kind(_Files(path), sizes, path.resolve().name or "images", where)
    except OSError as error:
        at = printable(str(error.filename or path))
        raise UserError(f"source: {at}: {error.strerror or one_line(error)}") from None
    if not path.is_file() and "{" in source:
        names = _expand(str(path))
        if not all(Path(name).is_file() for name in names):
            missing = next(name for name in names if not Path(name).is_file())
            raise UserError(f"source: {where}: {printable(missing)} does not exist")
        root = os.path.commonpath([str(Path(name).absolute().parent) for name in names])
        sizes = {
            Path(name).absolute().relative_to(root).as_posix(): Path(name).stat().st_size for name in names
        }
        return _of_kind(_Files(Path(root)), sizes, Path(root).name, where)
    if not path.is_file():
        raise UserError(f"source: {where} does not exist: give {KINDS}")
    kind = _kind_of_file(path.name)
    keys = {path.name: path.stat().st_size}
    return Found(kind, _Files(path.absolute().parent), keys, path.stem, where)


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
        sizes = {key: _size(storage, key) for key in keys}
        return _of_kind(storage, sizes, PurePosixPath(keys[0]).stem, where)
    if len(names) > 1 or names[0].lower().endswith((".zip", ".tgz", ".gz")):
        raise UserError(f"source: {where}: on S3 a source is .tar or .parquet files, or a prefix")
    storage = open_storage(source)
    sizes = {info.key: info.num_bytes for info in storage.list()}
    shown = {key: size for key, size in sizes.items() if not _hidden(key)}
    return _of_kind(storage, shown, PurePosixPath(rest).name or bucket, where)


def _size(storage: Storage, key: str) -> int:
    for info in storage.list(key):
        if info.key == key:
            return info.num_bytes
    raise UserError(f"source: {printable(f'{storage.uri}/{key}')} does not exist")


def _hidden(key: str) -> bool:
    return key.endswith("/") or any(part.startswith(".") for part in key.split("/"))


def _expand(pattern: str) -> list[str]:
    try:
        names = list(itertools.islice(braceexpand(pattern), _MAX_FILES_OF_A_PATTERN + 1))
    except ValueError:
        raise UserError(f"source: {printable(pattern)}: its braces do not match") from None
    if len(names) > _MAX_FILES_OF_A_PATTERN:
        raise UserError(f"source: {printable(pattern)}: means more than {_MAX_FILES_OF_A_PATTERN} files")
    return names


def _of_kind(storage: Storage, sizes: dict[str, int], name: str, where: str) -> Found:
    if not any(key.lower().endswith(SUFFIXES) for key in sizes):
        for kind, suffix in _SUFFIX_OF_KIND.items():
            keys = {key: size for key, size in sorted(sizes.items()) if key.lower().endswith(suffix)}
            other = next((s for s in _SUFFIX_OF_KIND.values() if s != suffix), "")
            if keys and any(key.lower().endswith(other) for key in sizes):
                raise UserError(f"source: {where} holds .tar and .parquet files: give one kind")
            if keys:
                rest = sorted(set(sizes) - set(keys))
                warn_passed_over(where, rest, f"files that are not named like {suffix} files")
                return Found(kind, storage, keys, name, where)  # type: ignore[arg-type]
    return Found("folder", storage, sizes, name, where)


def _walk(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    """Every file below `folder`; links to folders are followed, except to one that the link lies in."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    with os.scandir(folder) as items:
        for item in sorted(items, key=lambda item: item.name):
            if item.name.startswith("."):
                continue
            if item.is_dir():
                yield from _walk(Path(item.path), (*above, here))
            else:
                yield Path(item.path)


class Ranged(Protocol):
    """As much of a `Storage` as reading a piece of an object takes."""

    @property
    def uri(self) -> str: ...

    def get_range(self, key: str, start: int, length: int) -> bytes: ...


def read_object(storage: Storage, key: str, name: str) -> bytes:
    """An object of a source; `UserError` naming it where it can't be read."""
    with _named(name):
        return storage.get(key)


def read_range(storage: Ranged, key: str, name: str, start: int, length: int) -> bytes:
    """A piece of an object of a source; `UserError` naming it where it can't be read."""
    with _named(name):
        return storage.get_range(key, start, length)


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except ObjectMissing:
        raise UserError(f"{name}: is missing, or can't be seen from where it was to be read") from None
    except StorageError as error:
        raise UserError(f"{name}: {one_line(error)}") from None
