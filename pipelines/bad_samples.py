"""Samples that cannot be decoded: an error, or counted, listed and passed over up to a share of the data."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from pipelines.shard_reader import BadSample

log = logging.getLogger(__name__)

# of more, only the number is kept
_LISTED = 1000


class BadSamples:
    """What one worker's reader met of a split's bad samples. `skip`: whether it passes over them; if not, the first
    one is an error.

    `count`: draws of bad samples so far, each draw of the same sample counting. `samples`: the different ones, the
    first 1,000. Written by the reading thread, which is ahead of what was handed over: what a run counts against
    its `max_bad_share` is what was trained on, see `too_many`.
    """

    def __init__(self, skip: bool) -> None:
        self._skip = skip
        self.count = 0
        self.samples: dict[tuple[int, int], BadSample] = {}

    def add(self, samples: Iterable[BadSample]) -> None:
        """Raises `DataError` naming the first one where none may be passed over."""
        for sample in samples:
            if not self._skip:
                raise sample.error()
            self.count += 1
            self.note((sample,))

    def note(self, samples: Iterable[BadSample]) -> None:
        """List those that are not listed yet, and tell of them."""
        for sample in samples:
            place = (sample.shard, sample.row)
            if place not in self.samples and len(self.samples) < _LISTED:
                self.samples[place] = sample
                log.warning("passing over %s", sample)


def too_many(bad: int, seen: int, num_samples: int, max_share: float) -> bool:
    """Whether a run ends: of the `seen` samples that all its workers drew since its first step, `bad` were bad, and
    that is more than `max_share` of them, counted over one epoch (`num_samples`) at least.

    All four are the same on every worker, on any number of them and after every resume; so is the step at which
    this becomes true.
    """
    return bad > max_share * max(seen, num_samples)
