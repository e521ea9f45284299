"""Passing things from one thread to another in their order, a bounded number ahead."""

from __future__ import annotations

from queue import SimpleQueue
from typing import Final, Generic, TypeVar

Item = TypeVar("Item")


class _End:
    """What a consumer finds that waits while all is closed."""


_END: Final = _End()


class Handover(Generic[Item]):
    """A queue of at most `size` things for one producer and one consumer, which either of them, or a third, closes.

    It is `queue.Queue` with one lock a wait in place of conditions: a thread that is woken need not wait at once
    for the lock that its waker still holds, which costs several switches of threads each time.
    """

    def __init__(self, size: int) -> None:
        self._things: SimpleQueue[Item | _End] = SimpleQueue()
        self._places: SimpleQueue[None] = SimpleQueue()
        for _ in range(size):
            self._places.put(None)
        self.closed = False

    def put(self, item: Item) -> bool:
        """Wait for a place and pass it on; False where all is closed."""
        if not self.closed:
            self._places.get()
        if not self.closed:
            self._things.put(item)
        return not self.closed

    def get(self) -> Item:
        """Wait for the next one. Raises `StopIteration` where all is closed."""
        try:
            item = _END if self.closed else self._things.get()
        finally:
            # also where a signal comes in between: one more ahead is better than a producer that waits for ever
            self._places.put(None)
        if isinstance(item, _End):
            raise StopIteration
        return item

    def close(self) -> None:
        """Let neither of the two wait any more."""
        self.closed = True
        self._places.put(None)
        self._things.put(_END)
