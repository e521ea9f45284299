"""Samples that cannot be decoded: an error, or counted, listed and passed over up to a share of the data."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from pipelines.dataset import DataError
from pipelines.shard_reader import BadSample

log = logging.getLogger(__name__)

# of more, only the number is kept
_LISTED = 1000


class BadSamples:
    """What one worker met of a split's bad samples. `max_share`: None where the first one is an error; else the
    share of all that was read, counted over at least `part` samples (an epoch's, for this worker), above which
    they are one.

    `count`: draws of bad samples so far, each draw of the same sample counting. `samples`: the different ones, the
    first 1,000. Written by the reading thread, which is ahead of what was handed over.
    """

    def __init__(self, uri: str, split: str, max_share: float | None, part: int) -> None:
        self._uri = uri
        self._split = split
        self._max_share = max_share
        self._part = part
        self._seen = 0
        self.count = 0
        self.samples: dict[tuple[int, int], BadSample] = {}

    def add(self, samples: Iterable[BadSample]) -> None:
        """Raises `DataError` naming the first one where none may be passed over."""
        for sample in samples:
            if self._max_share is None:
                raise DataError(str(sample))
            self.count += 1
            place = (sample.shard, sample.row)
            if place not in self.samples and len(self.samples) < _LISTED:
                self.samples[place] = sample
                log.warning("passing over %s", sample)

    def read(self, count: int) -> None:
        """Tell of this many more samples read, good and bad. Raises `DataError` where too many were bad."""
        self._seen += count
        if self._max_share is None or self.count <= self._max_share * max(self._seen, self._part):
            return
        first = next(iter(self.samples.values()))
        raise DataError(
            f"{self._uri}: {self.count} of {self._seen} {self._split} samples read are bad, more than "
            f"data.max_bad_share {self._max_share}; the first is {first}"
        )
