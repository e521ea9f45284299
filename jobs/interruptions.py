"""Ctrl-C and SIGTERM as KeyboardInterrupt, but not in the midst of an import.

Torch swallows what is raised while it imports NumPy, and leaves NumPy half imported.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from queue import SimpleQueue
from types import FrameType, TracebackType
from typing import Self

_LATER_S = 0.05
# an import may also hang, or be a user's module that does something else
_PATIENCE_S = 5.0


class Interruptions:
    """While a program runs in it, SIGTERM raises KeyboardInterrupt as SIGINT does, either of them once no import is
    under way, or after five seconds. One that is still put off at the end is raised there.
    """

    def __init__(self) -> None:
        self._since: float | None = None
        self._ended = False
        # its `put` may be called from a signal's handler
        self._put_off: SimpleQueue[int] = SimpleQueue()

    def __enter__(self) -> Self:
        threading.Thread(target=self._send_again, name="ddpm-interruptions", daemon=True).start()
        self._before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        signal.signal(signal.SIGTERM, self.handle)
        # not where a shell has it ignored, for what runs in the background
        if self._before[signal.SIGINT] is signal.default_int_handler:
            signal.signal(signal.SIGINT, self.handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended = True
        self._put_off.put(0)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None and self._since is not None:
            raise KeyboardInterrupt

    def handle(self, signum: int, frame: FrameType | None) -> None:
        if self._ended:
            return
        now = time.monotonic()
        if _is_importing(frame) and now - (self._since or now) < _PATIENCE_S:
            self._since = self._since or now
            self._put_off.put(signum)
        else:
            self._since = None
            raise KeyboardInterrupt

    def _send_again(self) -> None:
        while signum := self._put_off.get():
            time.sleep(_LATER_S)
            if self._since is not None and not self._ended:
                os.kill(os.getpid(), signum)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None
