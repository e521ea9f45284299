"""Bytes that a test hands out and counts for as long as anybody holds them: exact, whatever threads do when."""

from __future__ import annotations

import threading


class Held:
    """`now`: bytes handed out that are still held. `peak`: the most there were at any time."""

    def __init__(self) -> None:
        # the interpreter may run a finaliser in the middle of `add`
        self._lock = threading.RLock()
        self.now = 0
        self.peak = 0

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self.now += num_bytes
            self.peak = max(self.peak, self.now)

    def out(self, data: bytes) -> bytes:
        """The same bytes, counted until the last reference to them is gone."""
        counted = _Counted(data)
        counted.held = self
        self.add(len(data))
        return counted


class _Counted(bytes):
    held: Held | None = None

    def __del__(self) -> None:
        if self.held is not None:
            self.held.add(-len(self))
