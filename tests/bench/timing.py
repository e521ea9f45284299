"""Measuring two things fairly: in turns, and by the median of the ratios of neighbouring turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple


class Quartiles(NamedTuple):
    low: float
    median: float
    high: float

    def text(self, scale: float = 1.0, digits: int = 2) -> str:
        low, median, high = (f"{value * scale:.{digits}f}" for value in self)
        return f"{median} ({low}–{high})"


def quartiles(values: Iterable[float]) -> Quartiles:
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))


def in_turns(
    ours: Callable[[], object], peer: Callable[[], object], rounds: int
) -> tuple[Quartiles, Quartiles, Quartiles]:
    """Seconds of each, and peer/ours, over `rounds` (at least 2) turns after one that is not counted."""
    ours()
    peer()
    pairs = [(_seconds(ours), _seconds(peer)) for _ in range(rounds)]
    return (
        quartiles(a for a, _ in pairs),
        quartiles(b for _, b in pairs),
        quartiles(b / a for a, b in pairs),
    )


def interleaved(
    ours: Callable[[], object], peer: Callable[[], object], rounds: int
) -> tuple[float, float, float]:
    """The medians of `in_turns`."""
    a, b, ratio = in_turns(ours, peer, rounds)
    return a.median, b.median, ratio.median


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
