"""Randomness as a function: every number is computed from (seed, purpose, index, draw), none from a stream.

The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), a
bijection of a 128-bit counter under a 64-bit key. The key is a hash of (seed, purpose); the counter is
(block, draw, index low word, index high word), where block counts fours of numbers inside one sample. So
the numbers of a sample depend on nothing but its own index: not on the batch that it is in, not on the
worker, not on what was drawn before. A shorter shape gives a prefix of a longer one (in row-major order).

Everything runs on `index.device` with int64 operations, so that the 32-bit words, `uniform` and `integers` are
the same everywhere. The normal deviates go through float32 logarithms, sines and cosines, so that two devices
may differ in their last bits.
"""

import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ddpm_core._checks import (
    check_index,
    check_seed,
    require,
    require_float_dtype,
    require_int,
    require_sizes,
)

_MASK = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_TWO_POW_MINUS_32 = 2.0**-32
# Five buffers of this many int64 fit a core's cache, and an operation on one takes longer than its dispatch.
_BLOCKS_AT_ONCE = 2**15

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Philox4x32-10 of a counter.

    counter: four int64 tensors that broadcast together, each holding 32-bit words (0 <= word < 2**32).
    key: two 32-bit words. Returns four int64 tensors of 32-bit words, of the broadcast shape; the counter is
    left as it was.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    # After three rounds every word depends on the whole counter; until then the tensors may be smaller.
    for _ in range(3):
        p0, p1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c2 = ((p1 >> 32) ^ c1 ^ k0) & _MASK, ((p0 >> 32) ^ c3 ^ k1) & _MASK
        c1, c3 = p1, p0
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    c0, c1, c2, c3 = (word.contiguous() for word in torch.broadcast_tensors(c0, c1, c2, c3))
    spare = torch.empty_like(c0)
    for _ in range(_ROUNDS - 3):
        # A product of two 32-bit words needs 64 unsigned bits; int64 wraps and keeps all of them. c1 and c3 hold
        # whole products: what is above their low words, and the copies of the sign bit that the arithmetic
        # shift brings, fall to the one mask after the exclusive ors. Five buffers take turns, because fresh
        # memory for every operation costs more than the operation.
        p1 = torch.mul(c2, _MULTIPLIER_1, out=spare)
        p0 = c0.mul_(_MULTIPLIER_0)
        next0 = (
            c1.bitwise_xor_(torch.bitwise_right_shift(p1, 32, out=c2)).bitwise_xor_(k0).bitwise_and_(_MASK)
        )
        next2 = (
            c3.bitwise_xor_(torch.bitwise_right_shift(p0, 32, out=c2)).bitwise_xor_(k1).bitwise_and_(_MASK)
        )
        c0, c1, c2, c3, spare = next0, p1, next2, p0, c2
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    return c0, c1.bitwise_and_(_MASK), c2, c3.bitwise_and_(_MASK)


def normal(
    seed: int,
    purpose: str,
    index: Tensor,
    shape: tuple[int, ...],
    *,
    draw: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal deviates `[B, *shape]` by the Box–Muller transform, |value| < 6.8.

    seed: any int. purpose: a name for this use; two purposes are independent. index: int64 `[B]`, one key a
    sample. draw: 0 <= draw < 2**32, tells apart several draws for one sample (a sampler's steps, say).
    The values are computed in float32, whatever torch's default dtype, and then converted to dtype: float64
    holds float32 numbers, so that all dtypes agree. On index.device.
    Raises ValueError naming the argument that is wrong, such as a dtype that is not floating-point.
    """
    require_float_dtype(dtype)
    values = _empty(index, shape, torch.float32)
    for rows, words in _words(seed, purpose, index, values.shape[1], draw):
        for k in (0, 2):
            radius = _centred(words[k], _TWO_POW_MINUS_32).log_().mul_(-2.0).sqrt_()
            angle = _centred(words[k + 1], 2.0 * math.pi * _TWO_POW_MINUS_32)
            torch.mul(radius, angle.cos(), out=values[rows, :, k])
            torch.mul(radius, angle.sin_(), out=values[rows, :, k + 1])
    return _trim(values, shape).to(dtype)


def uniform(
    seed: int,
    purpose: str,
    index: Tensor,
    shape: tuple[int, ...] = (),
    *,
    draw: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform deviates `[B, *shape]` in [0, 1): multiples of 2**-24 in float32, of 2**-32 in float64.

    Arguments as in `normal`. Raises ValueError for a dtype that would round values up to 1.
    """
    require(dtype in (torch.float32, torch.float64), "dtype", "torch.float32 or torch.float64", dtype)
    bits = 24 if dtype == torch.float32 else 32
    values = _empty(index, shape, dtype)
    for rows, words in _words(seed, purpose, index, values.shape[1], draw):
        for k, word in enumerate(words):
            values[rows, :, k] = word.bitwise_right_shift_(32 - bits)
    return _trim(values.mul_(2.0**-bits), shape)


def integers(seed: int, purpose: str, index: Tensor, high: int, *, draw: int = 0) -> Tensor:
    """Integers int64 `[B]` in [0, high), uniform to within a relative high / 2**63.

    high: 1 <= high <= 2**31. Other arguments as in `normal`.
    """
    require_int("high", high)
    require(1 <= high <= 2**31, "high", "in 1..2**31", high)
    check_index(index)
    values = torch.empty_like(index)
    for rows, (high_word, low_word, _, _) in _words(seed, purpose, index, 1, draw):
        values[rows] = ((high_word << 31) | (low_word >> 1))[:, 0]
    return values.remainder_(high)


def derive_seed(seed: int, purpose: str, *index: int) -> int:
    """A 63-bit seed for torch.manual_seed or torch.Generator, from (seed, purpose, index...) by BLAKE2b."""
    return int.from_bytes(_digest(seed, purpose, *index), "little") >> 1


def _digest(seed: int, purpose: str, *index: int) -> bytes:
    check_seed(seed)
    # The purpose comes last: it is the only part that may hold any character, so no two tuples share a text.
    text = ",".join(str(int(i)) for i in (seed, *index)) + ";" + purpose
    return hashlib.blake2b(text.encode(), digest_size=8, person=b"ddpm-rng").digest()


def _words(
    seed: int, purpose: str, index: Tensor, num_blocks: int, draw: int
) -> Iterator[tuple[slice, Words]]:
    """Pieces of the batch: which rows, and their 32-bit words, four int64 `[rows, num_blocks]`.

    On an accelerator there is one piece, because there each operation's launch is what costs.
    """
    check_index(index)
    require_int("draw", draw)
    require(0 <= draw <= _MASK, "draw", "in 0..2**32-1", draw)
    digest = _digest(seed, purpose)
    key = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
    block = torch.arange(num_blocks, dtype=torch.int64, device=index.device)[None, :]
    draws = torch.full((1, 1), draw, dtype=torch.int64, device=index.device)
    on_cpu = index.device.type == "cpu"
    rows_at_once = max(1, _BLOCKS_AT_ONCE // max(1, num_blocks)) if on_cpu else max(1, index.shape[0])
    for start in range(0, index.shape[0], rows_at_once):
        rows = slice(start, start + rows_at_once)
        row = index[rows, None]
        yield rows, philox4x32((block, draws, row & _MASK, (row >> 32) & _MASK), key)


def _centred(word: Tensor, scale: float) -> Tensor:
    """(word + ½)·scale in float32, in fresh memory, since its callers overwrite it."""
    return word.to(torch.float32).add_(0.5).mul_(scale)


def _empty(index: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Room for whole blocks of four, `[B, blocks, 4]`."""
    check_index(index)
    require_sizes("shape", shape, 0)
    return torch.empty(index.shape[0], (math.prod(shape) + 3) // 4, 4, dtype=dtype, device=index.device)


def _trim(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    return values.flatten(1)[:, : math.prod(shape)].reshape(values.shape[0], *shape)
