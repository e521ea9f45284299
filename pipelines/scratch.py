"""Temporary folders that do not outlive their process by much, even when it is killed."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

_LOCK = "in-use.lock"


@contextlib.contextmanager
def scratch_folder(purpose: str) -> Iterator[str]:
    """A temporary folder `ddpm-PURPOSE-…`, gone at the end; what killed processes left of this purpose goes now.

    A process holds a lock on a file in its folder for as long as it lives, which the kernel lets go however it
    dies.  So a folder is deleted only if nobody lives in it, wherever its process ran: process ids are given
    again, and mean something else in another container.
    """
    _sweep(purpose)
    folder = Path(tempfile.mkdtemp(prefix=_prefix(purpose)))
    try:
        with _held(folder):
            yield str(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _prefix(purpose: str) -> str:
    return f"ddpm-{purpose}-"


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    # locked before it gets its name: a lock file that can be seen has been locked by its owner
    unnamed = folder / f".{_LOCK}"
    with unnamed.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unnamed.rename(folder / _LOCK)
        yield


def _sweep(purpose: str) -> None:
    """Delete the folders of this purpose whose lock nobody holds."""
    for lock in Path(tempfile.gettempdir()).glob(f"{_prefix(purpose)}*/{_LOCK}"):
        # somebody else's folder, or one that is just being deleted
        with contextlib.suppress(OSError), lock.open("r+") as file:
            if os.fstat(file.fileno()).st_uid != os.getuid():
                continue
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            log.info("removing %s, which a killed process left", lock.parent)
            shutil.rmtree(lock.parent, ignore_errors=True)
