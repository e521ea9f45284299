"""A least-recently-used cache that is bounded by what its values weigh, not by how many they are."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class WeightedLRU(Generic[K, V]):
    """Keeps values up to `max_bytes` in all, and up to `max_items` of them; the newest one always stays.

    For one thread.
    """

    def __init__(self, max_bytes: int, max_items: int | None = None) -> None:
        self._max_bytes = max_bytes
        self._max_items = max_items
        self._items: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, key: object) -> bool:
        return key in self._items

    def shrink(self, max_bytes: int, keep: int) -> bool:
        """Drop the values used longest ago until the rest weigh at most `max_bytes`, but not the last `keep`.

        Returns whether they do.
        """
        while self.num_bytes > max_bytes and len(self._items) > keep:
            self._drop_oldest()
        return self.num_bytes <= max_bytes

    def retain(self, keys: Container[K]) -> None:
        """Drop all values but those of these keys."""
        for key in [key for key in self._items if key not in keys]:
            self.num_bytes -= self._items.pop(key)[1]

    def get(self, key: K, make: Callable[[], V], weigh: Callable[[V], int]) -> V:
        """The value kept for `key`, or the one that `make()` gives now, weighing `weigh(value)` bytes."""
        if key in self._items:
            self._items.move_to_end(key)
            return self._items[key][0]
        value = make()
        weight = weigh(value)
        self._items[key] = (value, weight)
        self.num_bytes += weight
        while len(self._items) > 1 and self._over():
            self._drop_oldest()
        return value

    def drop(self, key: K) -> None:
        """Drop the value of this key, if there is one."""
        if key in self._items:
            self.num_bytes -= self._items.pop(key)[1]

    def _drop_oldest(self) -> None:
        _, (_, weight) = self._items.popitem(last=False)
        self.num_bytes -= weight

    def _over(self) -> bool:
        too_many = self._max_items is not None and len(self._items) > self._max_items
        return too_many or self.num_bytes > self._max_bytes
