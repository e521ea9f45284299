"""A file that is written aside, under a name of its own, until it is whole; and what killed writers left of such.

FOLDER/.tmp-KERNEL-RANDOM, locked by its writer for as long as that lives and needs it. KERNEL says on which running
kernel: there the lock is sure, which the kernel lets go however a process dies. Where machines share a folder not
every file system shows the locks of one to another, so that a file of another machine must be old as well.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger(__name__)

PREFIX = ".tmp-"
_NAME = re.compile(r"\.tmp-([0-9a-f]{8})-[0-9a-f]{16}")
_OLD_S = 86_400.0
_ATTEMPTS = 5

# folders that this process has looked through: whoever is killed from now on is followed by another process
_swept: set[Path] = set()
_sweeping = threading.Lock()


@contextlib.contextmanager
def written(folder: Path, data: bytes) -> Iterator[Path]:
    """A file in `folder`, which is made if need be, that holds `data`, on the disk; it is there until the end of
    the block, unless it was renamed. Its mode is what the umask leaves.

    The first file of a process in a folder removes what killed writers left there.
    """
    _sweep_once(folder)
    path = folder / f"{PREFIX}{_kernel()}-{secrets.token_hex(8)}"
    try:
        with _created(path) as file:
            # before its first byte: `sweep` takes an empty file for one that is about to be locked
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            yield path
    finally:
        path.unlink(missing_ok=True)


def _created(path: Path) -> BinaryIO:
    for _ in range(_ATTEMPTS - 1):
        path.parent.mkdir(parents=True, exist_ok=True)
        # somebody who deletes what lay there may take the folder for one that is not needed
        with contextlib.suppress(FileNotFoundError):
            return path.open("xb")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("xb")


def sweep(folder: Path) -> None:
    """Remove the files of writers that are surely dead."""
    for path in folder.glob(f"{PREFIX}*"):
        name = _NAME.fullmatch(path.name)
        # gone meanwhile, another user's, or locked
        with contextlib.suppress(OSError):
            if name is None or not stat.S_ISREG(path.lstat().st_mode):
                continue
            with path.open("r+b") as file:
                found = os.fstat(file.fileno())
                sure = name[1] == _kernel() and found.st_size > 0
                if not sure and time.time() - found.st_mtime < _OLD_S:
                    continue
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
                log.info("removed %s, which a killed process left", path)


def _sweep_once(folder: Path) -> None:
    with _sweeping:
        if folder in _swept:
            return
        _swept.add(folder)
    sweep(folder)


@cache
def _kernel() -> str:
    """Eight hex digits, the same for all processes and containers of a machine until it starts again."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        boot = secrets.token_bytes(16)
    return hashlib.sha256(boot).hexdigest()[:8]
