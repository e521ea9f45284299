"""The lines of PNG files as Pillow filters them, many at once, by vector instructions.

A PNG's line is stored as the differences to a prediction from the pixels to the left (a), above (b) and above to
the left (c), of which each line names one: PNG specification, third edition, section 9. Pillow tries four of the
five and takes the one whose differences, as signed bytes, have the least sum of magnitudes; of equals the first of
none, up, left, Paeth.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

# in the order in which Pillow tries them: none, up, left, Paeth
_TYPES = np.array([0, 2, 1, 4], np.uint8)
# bytes of lines that are looked at together, with a dozen copies of which they stay in a core's cache
_BYTES_TOGETHER = 2**16


def filtered(lines: Bytes, height: int, step: int) -> Bytes:
    """The filtered lines, uint8 `[R, 1 + B]`, each behind the byte that names its filter.

    `lines`: uint8 `[R, B]`, of images of this height one below the other; `step`: bytes a pixel.
    """
    count, size = lines.shape
    stored = np.empty((count, 1 + size), np.uint8)
    together = max(_BYTES_TOGETHER // size, 1)
    for first in range(0, count, together):
        last = min(first + together, count)
        # each line behind one black pixel, so that the left neighbours of all bytes are those `step` before
        here, above = np.zeros((2, last - first, step + size), np.uint8)
        here[:, step:] = lines[first:last]
        above[1:, step:] = lines[first : last - 1]
        if first:
            above[0, step:] = lines[first - 1]
        above[-first % height :: height] = 0
        types, differences = _least(here, above, step)
        stored[first:last, 0], stored[first:last, 1:] = types, differences[:, step:]
    return stored


def _least(here: Bytes, above: Bytes, step: int) -> tuple[Bytes, Bytes]:
    """The filter of each line, and the line filtered by it (its first pixel, which is none, aside)."""
    x, b = here.ravel()[step:], above.ravel()[step:]
    a, c = here.ravel()[:-step], above.ravel()[:-step]
    found = np.empty((len(_TYPES), here.size), np.uint8)
    found[0] = here.ravel()
    for differences, prediction in zip(found[1:], (b, a, _paeth(a, b, c)), strict=True):
        np.subtract(x, prediction, out=differences[step:])
    found = found.reshape(-1, *here.shape)
    magnitudes = np.minimum(found, np.negative(found))
    chosen = magnitudes[..., step:].sum(axis=-1, dtype=np.uint32).argmin(axis=0)
    return _TYPES[chosen], found[chosen, np.arange(len(here))]


def _paeth(a: Bytes, b: Bytes, c: Bytes) -> Bytes:
    """Of a, b and c the one that is nearest to a + b − c; of equals the first."""
    to_a, to_b = _distance(b, c), _distance(a, c)
    # |a + b − 2c| is the two distances' sum where c is no value between a and b: more than either, which is all
    # that counts and what a byte can hold. Else it is their difference.
    to_c = _distance(to_a, to_b)
    to_c |= _mask((b >= c) == (a >= c))
    from_a = _mask((to_a <= to_b) & (to_a <= to_c))
    from_b = _mask(to_b <= to_c)
    return (a & from_a) | (((b & from_b) | (c & ~from_b)) & ~from_a)


def _distance(one: Bytes, other: Bytes) -> Bytes:
    return np.maximum(one, other) - np.minimum(one, other)


def _mask(where: NDArray[np.bool_]) -> Bytes:
    """255 where true, else 0."""
    return np.negative(where.view(np.uint8))
