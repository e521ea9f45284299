"""The workers of a run, as seen by one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class World(Protocol):
    """The workers of a run, as seen by one of them."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum over the workers, in place, the same bits on each."""
        ...

    def broadcast(self, value: Any) -> Any:
        """Rank 0's plain value, on every worker."""
        ...

    def report(self, metrics: dict[str, float | str]) -> None:
        """Tell the driver; every worker calls it at the same steps."""
        ...


@dataclass
class SingleWorker:
    """A run in this process alone."""

    device: torch.device
    on_report: Callable[[dict[str, float | str]], None] = lambda metrics: None
    rank: int = 0
    size: int = 1

    def all_reduce(self, tensor: Tensor) -> None:
        pass

    def broadcast(self, value: Any) -> Any:
        return value

    def report(self, metrics: dict[str, float | str]) -> None:
        self.on_report(metrics)


def streams_of(rank: int, world_size: int, num_streams: int) -> list[int]:
    """The micro-batches that a worker takes: a consecutive piece, so that a node needs few shards."""
    return list(range(rank * num_streams // world_size, (rank + 1) * num_streams // world_size))
