"""A node's disk as a cache of a data set's objects, shared by all processes of the node.

OURS = FOLDER/ddpm-cache-UID, since FOLDER may hold anything, and be anybody's
OURS/ab/abcdef…        an object, named by its SHA-256; the time of its last use is its mtime
OURS/.new-…            one that is being written, locked by who writes it
OURS/.locks/000 … 3ff  held while an object is fetched, by the first 10 bits of its hash
OURS/.locks/evict      held while room is made

OURS is a folder of this user's that nobody else may enter; one of another's, or a link, is not used. Nothing but
files of these names is deleted, and no link is followed. Everything read from it is checked by SHA-256, so that
nothing in it has to be believed. The locks are the kernel's, which lets them go however a process dies; for one
that is stopped nobody waits without end. Whatever goes wrong with the disk, the object comes from its storage.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import math
import os
import re
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pipelines.errors import UserError, one_line
from pipelines.shard_reader import Fetch, fetch_verified
from pipelines.storage import Hashed, Memory, Storage, new_memory, read_hashed

log = logging.getLogger(__name__)

# Longer than fetching a shard takes. A process that holds a lock for longer may be stopped: the object is then
# fetched without it, a second time at worst.
LOCK_WAIT_S = 60.0
_POLL_S = 0.02
_JUST_MADE_S = 600.0
_NEW = ".new-"
_NEW_NAME = re.compile(r"\.new-[a-z0-9_]{8}")
_OBJECT_NAME = re.compile("[0-9a-f]{64}")
# of the disk of a folder that nobody chose
_KEPT_FREE = 0.1


def fetch_through(setting: str, max_bytes: int, storage: Storage) -> Fetch:
    """How to fetch a data set's objects. `setting`: "none"; a folder, in which the cache makes its own; or "auto",
    which is the system's temporary folder for data that are on another machine, and none for files; there a tenth
    of the disk stays free.

    Raises `UserError` on a relative folder.
    """
    if setting == "none" or (setting == "auto" and storage.uri.startswith("file:")):
        return fetch_verified
    try:
        folder = Path(tempfile.gettempdir()) if setting == "auto" else Path(setting).expanduser()
    except RuntimeError:  # no such user
        folder = Path(setting)
    if not folder.is_absolute() or "\0" in setting:
        raise UserError(f"data.disk_cache: must be auto, none or an absolute folder, got {setting!r}")
    return DiskCache(folder, max_bytes, keep_free=_KEPT_FREE if setting == "auto" else 0.0)


class DiskCache:
    """A `Fetch` that keeps up to `max_bytes` of objects in a folder of its own in `folder`, those used last; made
    when first needed.

    `keep_free`: the share of the disk that stays free; less is kept where others fill it. Objects that are just
    being written come on top. For any number of threads and processes.
    """

    def __init__(self, folder: Path, max_bytes: int, keep_free: float = 0.0) -> None:
        self._folder = folder / f"ddpm-cache-{os.getuid()}"
        self._max_bytes = max_bytes
        self._keep_free = keep_free
        self._stuck: set[str] = set()
        self._warned = threading.Event()

    def __call__(
        self, storage: Storage, key: str, expected_sha256: str, memory: Memory = new_memory
    ) -> memoryview:
        """The object's bytes, which have this SHA-256; errors as in `fetch_verified`."""
        # a name of another form could lead out of the folder
        if not (_OBJECT_NAME.fullmatch(expected_sha256) and self._is_ours()):
            return fetch_verified(storage, key, expected_sha256, memory)
        path = self._folder / expected_sha256[:2] / expected_sha256
        data = self._found(path, expected_sha256, memory)
        if data is not None:
            return data
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(self._lock(f"{int(expected_sha256[:3], 16) >> 2:03x}"))
            except OSError as error:
                self._warn(error)
            # whoever held the lock may have fetched it
            data = self._found(path, expected_sha256, memory)
            if data is None:
                data = fetch_verified(storage, key, expected_sha256, memory)
                self._keep(path, data)
            return data

    def _is_ours(self) -> bool:
        """Whether the folder is there, or could be made, and nobody else's: its name can be guessed."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                found = os.fstat(folder)
                if found.st_uid != os.getuid():
                    raise PermissionError(f"belongs to the user with the number {found.st_uid}")
                if found.st_mode & 0o077:
                    # not every file system has modes
                    with contextlib.suppress(PermissionError):
                        os.fchmod(folder, 0o700)
            finally:
                os.close(folder)
        except OSError as error:
            self._warn(PermissionError("is a link") if self._folder.is_symlink() else error)
            return False
        return True

    def _found(self, path: Path, expected: str, memory: Memory) -> memoryview | None:
        try:
            found = _read(path, memory)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn(error)
            return None
        if found.sha256 != expected:
            log.warning("%s: is damaged; fetching it again", path)
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                self._warn(error)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return found.data

    def _keep(self, path: Path, data: memoryview) -> None:
        try:
            # what can't be put in its place must not drop what is there
            if len(data) > self._max_bytes or path.is_dir():
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            if not self._disk_has_room(len(data)):
                return
            with tempfile.NamedTemporaryFile(dir=self._folder, prefix=_NEW, delete=False) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                try:
                    file.write(data)
                    file.flush()
                    with self._lock("evict"):
                        self._make_room(len(data))
                        Path(file.name).replace(path)
                except BaseException:
                    Path(file.name).unlink(missing_ok=True)
                    raise
        except OSError as error:
            self._warn(error)

    def _disk_has_room(self, num_bytes: int) -> bool:
        """Whether so many bytes more leave the disk as free as it must stay, or do once older objects are gone."""
        if not self._keep_free:
            return True
        with self._lock("evict"):
            disk = shutil.disk_usage(self._folder)
            missing = num_bytes + math.ceil(self._keep_free * disk.total) - disk.free
            if missing <= 0:
                return True
            kept = self._kept()
            if missing > sum(size for _, size, _ in kept):
                # as the other troubles of a disk: once a process
                self._warn(OSError(errno.ENOSPC, f"the disk is {1 - self._keep_free:.0%} full"))
                return False
            self._evict(kept, missing)
            return True

    def _kept(self) -> list[tuple[int, int, Path]]:
        """(time of its last use, size, path) of each object, those used longest ago first."""
        kept = []
        for file in self._folder.glob("??/*"):
            with contextlib.suppress(OSError):
                found = file.lstat()
                named = _OBJECT_NAME.fullmatch(file.name) and file.name.startswith(file.parent.name)
                if named and stat.S_ISREG(found.st_mode):
                    kept.append((found.st_mtime_ns, found.st_size, file))
        return sorted(kept)

    def _evict(self, kept: list[tuple[int, int, Path]], num_bytes: int) -> None:
        """Delete the first of these until they were so many bytes; `OSError` where they can't be deleted."""
        for _, size, file in kept:
            if num_bytes <= 0:
                return
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
                num_bytes -= size
        if num_bytes > 0:
            raise OSError(errno.ENOSPC, "what it holds can't be deleted")

    def _make_room(self, num_bytes: int) -> None:
        """Delete what was used longest ago until so many bytes more fit, and what killed processes left."""
        kept = self._kept()
        self._evict(kept, num_bytes + sum(size for _, size, _ in kept) - self._max_bytes)
        for file in self._folder.glob(f"{_NEW}*"):
            # one that is locked is being written; one that was just made is locked in a moment
            with contextlib.suppress(OSError):
                found = file.lstat()
                if not (_NEW_NAME.fullmatch(file.name) and stat.S_ISREG(found.st_mode)):
                    continue
                if found.st_size == 0 and time.time() - found.st_mtime < _JUST_MADE_S:
                    continue
                with _open(file) as left:
                    fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    log.info("removing %s, which a killed process left", file)
                    file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Raises `OSError` where the lock can't be had, be it that somebody holds it for too long."""
        locks = self._folder / ".locks"
        locks.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(locks / name, flags, 0o600), "rb", buffering=0) as file:
            # what was waited for in vain once is not waited for again
            patience = 0.0 if name in self._stuck else LOCK_WAIT_S
            until = time.monotonic() + patience
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= until:
                        self._stuck.add(name)
                        raise TimeoutError(
                            f".locks/{name} has been held for {LOCK_WAIT_S:g} s, perhaps by a stopped process"
                        ) from None
                time.sleep(_POLL_S)
            self._stuck.discard(name)
            yield

    def _warn(self, error: OSError) -> None:
        if not self._warned.is_set():
            self._warned.set()
            log.warning("data.disk_cache %s: %s; going on without it", self._folder, one_line(error))


def _open(path: Path) -> BinaryIO:
    """To read it: not what a link leads to, and without waiting for who writes into a pipe."""
    # only this `open` takes an opener
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK))


def _read(path: Path, memory: Memory) -> Hashed:
    with _open(path) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "is no file that can be kept here", str(path))
        return read_hashed(file, memory)
