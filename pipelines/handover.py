"""Passing things from one thread to another in their order, a bounded number ahead."""

from __future__ import annotations

from collections import deque
from queue import SimpleQueue
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Handover(Generic[Item]):
    """A queue of at most `size` things for one producer and one consumer, which either of them, or a third, closes.

    A consumer that finds nothing sleeps until the next thing is there. One that soon finds nothing again, and so is
    the faster of the two, sleeps until two are there, then four, up to all places: it loses nothing by sleeping
    less often, and each time that a thread is woken costs as much as decoding a dozen small images. The slower of
    the two, which waits but now and then, is woken at once. `flush` wakes a consumer with less, when no more come.
    A producer is woken at each place.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._things: deque[Item] = deque()
        self._places: SimpleQueue[None] = SimpleQueue()
        for _ in range(size):
            self._places.put(None)
        # so many wake a consumer, and so many it had since it slept last
        self._enough = 1
        self._had = 2
        self._sleeping = False
        self._wake: SimpleQueue[None] = SimpleQueue()
        self.closed = False

    def put(self, item: Item) -> bool:
        """Wait for a place and pass it on; False where all is closed."""
        if not self.closed:
            self._places.get()
        if not self.closed:
            self._things.append(item)
            if len(self._things) >= self._enough or self._places.empty():
                self.flush()
        return not self.closed

    def flush(self) -> None:
        """Let the consumer have at once what was put."""
        if self._sleeping:
            self._sleeping = False
            self._wake.put(None)

    def get(self) -> Item:
        """Wait for the next one. Raises `StopIteration` where all is closed."""
        try:
            if not self._things:
                self._enough = min(2 * self._enough, self._size) if self._had < 2 * self._enough else 1
                self._had = 0
            while not self.closed:
                if self._things:
                    self._had += 1
                    return self._things.popleft()
                self._sleeping = True
                # the producer may have looked for a sleeper just before
                if not self._things and not self.closed:
                    self._wake.get()
        finally:
            # also where a signal comes in between: one more ahead is better than a producer that waits for ever
            self._places.put(None)
        raise StopIteration

    def close(self) -> None:
        """Let neither of the two wait any more."""
        self.closed = True
        self._places.put(None)
        self._wake.put(None)
