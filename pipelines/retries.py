"""Trying again what failed for a passing reason: how often, how long, and with which pauses in between."""

from __future__ import annotations

import hashlib
import io
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from pipelines.errors import UserError
from pipelines.storage import Hashed, Memory

Result = TypeVar("Result")
Data = TypeVar("Data", bytes, Hashed)


class TryAgain(Exception):
    """Raised by an attempt that failed for a passing reason; the message is the reason."""


@dataclass(frozen=True)
class Budget:
    """What one operation may cost: `tries` attempts in all, and no new one later than `seconds` after the first.

    The pause before attempt n + 1 is drawn from the upper half of `first_pause_s`·2ⁿ⁻¹, which is cut at
    `longest_pause_s`: many readers that a server turned away together don't come back together. At these defaults
    the pauses add up to 11..23 s, in which a server can be started again.
    """

    tries: int = 10
    seconds: float = 120.0
    first_pause_s: float = 0.05
    longest_pause_s: float = 10.0

    def pause(self, tried: int, elapsed_s: float, draw: float) -> float | None:
        """Seconds to wait after `tried` failures, with `draw` uniform in [0, 1); None: give up."""
        # the exponent is bounded, since a float is
        longest = min(self.longest_pause_s, self.first_pause_s * 2.0 ** min(tried - 1, 60))
        pause = longest * (1 + draw) / 2
        return None if tried >= self.tries or elapsed_s + pause > self.seconds else pause


BUDGET = Budget()


@dataclass(frozen=True)
class Pace:
    """How fast a body must come at least: `num_bytes` in every `window_s`, whatever came before.

    At these defaults a shard of 64 MiB may take 4.5 hours, and a server that sends a byte a second is given up
    after half a minute, as one that sends nothing is.
    """

    num_bytes: int = 30 * 4096
    window_s: float = 30.0


PACE = Pace()
# larger pieces are memory that is new every time
_MOST_AT_ONCE = 2**18
# a server may say what it likes of the length of what it sends
_MOST_TRUSTED = 2**26


# returns what there is, at most as many bytes as asked for, none at the end
Read1 = Callable[[int], bytes]


def read_steadily(read1: Read1, expected: int = 0, pace: Pace | None = None) -> bytes:
    """All that `read1` gives.

    `expected`: how many bytes these probably are, so that memory need not grow, and be copied, piece by piece.
    Raises `TryAgain` where they come more slowly than `pace`. A timeout on each read is no limit: it begins again
    with every byte.
    """
    body = io.BytesIO()
    if 0 < expected <= _MOST_TRUSTED:
        # makes it as long at once; what was not written at the end is cut off
        body.seek(expected - 1)
        body.write(b"\0")
        body.seek(0)
    for data in _steadily(read1, pace or PACE):
        body.write(data)
    body.truncate()
    return body.getvalue()


def read_steadily_hashed(memory: Memory, read1: Read1, expected: int = 0, pace: Pace | None = None) -> Hashed:
    """As `read_steadily`, in memory that `memory` gives, with the SHA-256.

    Each piece is hashed as it comes, from a core's cache, and while the sender is at the next one.
    """
    digest = hashlib.sha256()
    if expected <= 0:
        # nobody says how long it is, and pieces of growing sizes are no memory that can be used again
        data = read_steadily(read1, pace=pace)
        digest.update(data)
        room = memory(len(data))
        room[:] = data
        return Hashed(room, digest.hexdigest())
    room = memory(min(expected, _MOST_TRUSTED))
    end = 0
    for data in _steadily(read1, pace or PACE):
        digest.update(data)
        start, end = end, end + len(data)
        if end > len(room):
            larger = memory(max(end, min(2 * len(room), expected)))
            larger[:start] = room[:start]
            room = larger
        room[start:end] = data
    return Hashed(room[:end], digest.hexdigest())


def _steadily(read1: Read1, pace: Pace) -> Iterator[bytes]:
    since, came = time.monotonic(), 0
    while data := read1(_MOST_AT_ONCE):
        yield data
        came += len(data)
        if came >= pace.num_bytes:
            since, came = time.monotonic(), 0
        elif (elapsed := time.monotonic() - since) > pace.window_s:
            raise TryAgain(f"could not be read whole: it comes too slowly, {came} bytes in {elapsed:.0f} s")


def insist(
    what: str, attempt: Callable[[], Result], error: type[UserError], budget: Budget | None = None
) -> Result:
    """What `attempt()` returns, called again after each `TryAgain` while the budget lasts.

    Then raises `error` with a line that names `what`, the last reason, and what was spent. Every other error of
    the attempt passes at once.
    """
    budget = budget or BUDGET
    start = time.monotonic()
    tried = 0
    while True:
        tried += 1
        try:
            return attempt()
        except TryAgain as again:
            elapsed = time.monotonic() - start
            pause = budget.pause(tried, elapsed, random.random())
            if pause is None:
                times = "once" if tried == 1 else f"{tried} times"
                raise error(f"{what}: {again} (tried {times} in {elapsed:.0f} s)") from None
        time.sleep(pause)
