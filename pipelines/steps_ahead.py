"""The steps of a run as their consumer sees them, wherever they are read: in a thread, or in another process."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import torch

from pipelines.bad_samples import BadSamples
from pipelines.dataset import DataError


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """One stream's part of a global batch, of b samples.

    `position` int64 `[b]`: places in the stream. `index` int64 `[b]` = position·num_streams + stream: the
    key of everything random about this draw, unique over the run. `x_start` float32 `[b, C, H, W]` in [−1,
    1], or the stored bytes, uint8, where those were asked for. `label` int64 `[b]`, −1 for none. `weight`
    float32 `[b]`: 1, or 0 for a bad sample that is passed over, whose image is all zero bytes.
    """

    stream: int
    position: torch.Tensor
    index: torch.Tensor
    x_start: torch.Tensor
    label: torch.Tensor
    weight: torch.Tensor


class Source(Protocol):
    def get(self) -> list[MicroBatch] | BaseException:
        """Wait for the next step, or for the error that ends them. Raises `StopIteration` where it was closed."""
        ...

    def close(self) -> None: ...


class StepsAhead:
    """An iterator over the steps that a source reads ahead: a list of micro-batches each. An error of the source is
    raised at its step, and again at every later call. Use it in a `with`, or call `close()`.
    """

    skipped: BadSamples
    """The bad samples that were passed over."""

    def __init__(self, source: Source, num_steps: int | None) -> None:
        """num_steps: None for no end."""
        self._source = source
        self._left = math.inf if num_steps is None else num_steps
        self._error: BaseException | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> list[MicroBatch]:
        if self._error is not None:
            raise self._error
        if self._left <= 0:
            raise StopIteration
        item: list[MicroBatch] | BaseException | None = None
        try:
            item = self._source.get()
            if isinstance(item, BaseException):
                raise item
            self._left -= 1
        except BaseException as error:
            if error is item:
                self._error = error
            elif not isinstance(error, StopIteration):
                # whether a step was taken out when a signal came in between is not known
                self._error = DataError("reading was interrupted: read again from a step")
            raise
        return item

    def close(self) -> None:
        """Stop reading ahead. May be called again."""
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
