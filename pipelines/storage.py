"""Objects under a prefix, on S3, on a disk, or (to be read) on the web, behind one small interface.

What the rest of the project relies on, and what the kinds that can be written to give:

- `put` is atomic: a reader sees the whole object or none of it.
- `put_if_absent` has exactly one winner.  It is how commit records are written.
- There is no rename and no append.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol
from urllib.parse import unquote, urlsplit

from pipelines import aside
from pipelines.errors import UserError, one_line, printable, without_password


class StorageError(UserError):
    """The storage could not be reached, refused the request, or is full."""


class ObjectMissing(StorageError):
    """No such object; the message is its URI."""


class ObjectTooShort(StorageError):
    """The object ends before the range that was asked for does."""


class NoRanges(StorageError):
    """The server gives no parts of objects: it answers a request for a range with the whole."""


@dataclass(frozen=True)
class ObjectInfo:
    """`version`: changes with the object's content: its ETag, or a file's time of change."""

    key: str
    num_bytes: int
    version: str = field(default="", compare=False)


Memory = Callable[[int], memoryview]
"""Gives so many writable bytes, whose content is undefined."""

# of a file so many bytes are hashed while they are still in a core's cache
_PIECE_BYTES = 2**18


def new_memory(num_bytes: int) -> memoryview:
    """A `Memory` of which no part was used before."""
    return memoryview(bytearray(num_bytes))


@dataclass(frozen=True)
class Hashed:
    """An object's bytes, and their SHA-256 in hexadecimal."""

    data: memoryview
    sha256: str

    def __len__(self) -> int:
        return len(self.data)


class Storage(Protocol):
    """Objects below one prefix.  Keys are relative to it, with `/` between their parts."""

    @property
    def uri(self) -> str: ...

    def child(self, *parts: str) -> Storage:
        """The storage of a prefix below this one."""
        ...

    def get(self, key: str) -> bytes:
        """The whole object; raises `ObjectMissing`."""
        ...

    def get_hashed(self, key: str, memory: Memory = new_memory) -> Hashed:
        """As `get`, in memory that `memory` gives, with the SHA-256 of what was read, for callers who know what it
        must be; nothing else is checked.
        """
        ...

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Exactly `length` bytes from `start`; raises `ObjectMissing`, `ObjectTooShort` where it ends earlier, or
        `NoRanges` where only whole objects are to be had.
        """
        ...

    def put(self, key: str, data: bytes) -> None:
        """Write or replace the object, at once for every reader."""
        ...

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write the object if there is none; of several callers exactly one is told True."""
        ...

    def exists(self, key: str) -> bool: ...

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """All objects whose key starts with `prefix`, sorted by key."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Delete these objects; one that is not there is no error."""
        ...


# what WebDataset runs as a command
_COMMAND = "pipe:"


def open_storage(uri: str) -> Storage:
    """The storage at `s3://bucket/prefix`, `file:///folder`, a plain folder path, or `https://host/prefix`.

    The last one (and `http://`) can be read by key, and refuses to list or write.
    Raises `UserError` on another scheme or a missing bucket name.  Nothing is contacted or created yet.
    """
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise UserError(f"{printable(without_password(uri))}: {one_line(error)}") from None
    if parts.scheme == "s3":
        if not parts.netloc:
            raise UserError(f"{uri}: an S3 address is s3://BUCKET/PREFIX, and this one names no bucket")
        # boto3 takes a while to import and a run on disk does not need it
        from pipelines.adapters.s3 import S3Storage

        # the whole of it: to S3, ? and # are letters like any other
        bucket, _, prefix = uri.partition("://")[2].partition("/")
        return S3Storage(bucket, prefix.strip("/"))
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise UserError(f"{uri}: a file address is file:///FOLDER, and this one names a host")
        return FileStorage(Path(unquote(parts.path)))
    if parts.scheme in ("https", "http"):
        from pipelines.adapters.https import HttpStorage

        return HttpStorage(uri)
    if parts.scheme and ("://" in uri or uri.startswith(_COMMAND)):
        raise UserError(
            f"{uri}: storage is s3://BUCKET/PREFIX, file:///FOLDER or a folder (or https://HOST/PREFIX, to read "
            f"from), not {parts.scheme}:{'//' if '://' in uri else ''}"
        )
    if not uri:
        raise UserError("an empty storage address: give s3://BUCKET/PREFIX, file:///FOLDER or a folder")
    return FileStorage(Path(uri))


def absolute(uri: str) -> str:
    """`uri` itself, or the full path of a relative folder, which means the same from every working directory."""
    if "://" in uri or not uri or uri.startswith(_COMMAND):
        return uri
    return str(Path(uri).expanduser().absolute())


def checked_key(key: str) -> str:
    """`key` itself, or a `UserError` if it could leave its prefix."""
    if not key or key.startswith("/") or any(part in ("", ".", "..") for part in key.split("/")):
        raise UserError(
            f"{key!r} is no object key: it may not be empty, absolute, or contain '.' or '..' as a part"
        )
    try:
        key.encode()
    except UnicodeEncodeError:
        key = key.encode(errors="replace").decode()
        raise UserError(f"{key!r} is no object key: it is not Unicode") from None
    if "\0" in key:
        raise UserError(f"{key!r} is no object key: it may not contain a zero byte")
    return key


def read_hashed(file: BinaryIO, memory: Memory = new_memory) -> Hashed:
    """What an open file holds, as much as it held when this began, or less where it has been cut, hashed."""
    room = memory(os.fstat(file.fileno()).st_size)
    digest, end = hashlib.sha256(), 0
    while count := file.readinto(room[end : end + _PIECE_BYTES]):  # type: ignore[attr-defined]  # BinaryIO lacks it
        digest.update(room[end : end + count])
        end += count
    return Hashed(room[:end], digest.hexdigest())


# a folder, or something below a file, is no object
_NO_OBJECT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class FileStorage:
    """A folder.  Atomic by rename within the folder's file system, exclusive by hard link."""

    def __init__(self, root: Path) -> None:
        """Raises `UserError` on a path that holds a zero byte or names an unknown user's home."""
        if "\0" in str(root):
            raise UserError(f"{printable(str(root))}: a folder's name may not contain a zero byte")
        try:
            self._root = root.expanduser().absolute()
        except RuntimeError as error:
            raise UserError(f"{printable(str(root))}: {one_line(error)}") from None
        # down to the root, the folders that were not there before this object wrote
        self._made: set[Path] = set()

    @property
    def uri(self) -> str:
        return self._root.as_uri()

    def child(self, *parts: str) -> FileStorage:
        return FileStorage(self._root.joinpath(*(checked_key(part) for part in parts)))

    def _path(self, key: str) -> Path:
        return self._root / checked_key(key)

    def _error(self, key: str, error: OSError) -> StorageError:
        return StorageError(f"{self._path(key)}: {error.strerror or one_line(error)}")

    def get(self, key: str) -> bytes:
        with self._reading(key) as file:
            return file.read()

    def get_hashed(self, key: str, memory: Memory = new_memory) -> Hashed:
        with self._reading(key) as file:
            return read_hashed(file, memory)

    @contextlib.contextmanager
    def _reading(self, key: str) -> Iterator[BinaryIO]:
        try:
            with self._path(key).open("rb") as file:
                yield file
        except _NO_OBJECT:
            raise ObjectMissing(str(self._path(key))) from None
        except OSError as error:
            raise self._error(key, error) from None

    def get_range(self, key: str, start: int, length: int) -> bytes:
        with self._reading(key) as file:
            file.seek(start)
            data = file.read(length)
        if len(data) != length:
            raise ObjectTooShort(
                f"{self._path(key)}: {len(data)} of {length} bytes at {start}: the object is too short"
            )
        return data

    def put(self, key: str, data: bytes) -> None:
        path = self._path(key)
        try:
            self._note_missing_folders()
            with aside.written(path.parent, data) as written:
                written.replace(path)
        except OSError as error:
            raise self._error(key, error) from None

    def put_if_absent(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        try:
            self._note_missing_folders()
            with aside.written(path.parent, data) as written:
                try:
                    os.link(written, path)
                except FileExistsError:
                    return False
        except OSError as error:
            raise self._error(key, error) from None
        return True

    def _note_missing_folders(self) -> None:
        if not self._root.exists():
            self._made |= {folder for folder in (self._root, *self._root.parents) if not folder.exists()}

    def exists(self, key: str) -> bool:
        try:
            return self._path(key).is_file()
        except OSError as error:
            raise self._error(key, error) from None

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        # a prefix need not end at a folder, but all that starts with it lies below its last whole folder
        folder = self._root / checked_key(parent) if (parent := prefix.rpartition("/")[0]) else self._root

        def unreadable(error: OSError) -> None:
            # what can't be listed must not look empty; what is not there, or not any more, is
            if not isinstance(error, _NO_OBJECT):
                raise StorageError(f"{error.filename}: {error.strerror}")

        found = []
        for where, _, names in os.walk(folder, onerror=unreadable):
            for name in names:
                path = Path(where) / name
                key = path.relative_to(self._root).as_posix()
                if key.startswith(prefix) and not name.startswith(aside.PREFIX):
                    try:
                        status = path.stat()
                    except FileNotFoundError:  # deleted meanwhile
                        continue
                    except OSError as error:
                        raise self._error(key, error) from None
                    found.append(ObjectInfo(key, status.st_size, str(status.st_mtime_ns)))
        return sorted(found, key=lambda info: info.key)

    def delete(self, keys: Iterable[str]) -> None:
        """As of every storage; folders that this empties go too, but for one that was there before."""
        for key in keys:
            path = self._path(key)
            try:
                path.unlink(missing_ok=True)
            except NotADirectoryError:
                continue
            except OSError as error:
                raise self._error(key, error) from None
            for folder in path.parents:
                if (
                    not (folder.is_relative_to(self._root) and folder != self._root)
                    and folder not in self._made
                ):
                    break
                try:
                    folder.rmdir()
                except FileNotFoundError:
                    continue
                except OSError:  # not empty
                    break
