"""Randomness as a function: every number is computed from (seed, purpose, index, draw), none from a stream.

The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), a
bijection of a 128-bit counter under a 64-bit key. The key is a hash of (seed, purpose); the counter is
(block, draw, index low word, index high word), where block counts fours of numbers inside one sample. So
the numbers of a sample depend on nothing but its own index: not on the batch that it is in, not on the
worker, not on what was drawn before. A shorter shape gives a prefix of a longer one (in row-major order).

Everything runs on `index.device` with int64 operations, so that the 32-bit words are the same everywhere. The
normal deviates go through float64 on the way, so that two devices differ seldom and then in the last bit.
"""

import hashlib
import math

import torch
from torch import Tensor

from ddpm_core._checks import check_index, check_seed, require

_MASK = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_TWO_POW_MINUS_32 = 2.0**-32

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Philox4x32-10 of a counter.

    counter: four int64 tensors that broadcast together, each holding 32-bit words (0 <= word < 2**32).
    key: two 32-bit words. Returns four int64 tensors of 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # A product of two 32-bit words needs 64 unsigned bits; int64 wraps, keeps all of them, and the mask
        # after the arithmetic shift removes the copies of the sign bit.
        p0, p1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c2 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, ((p0 >> 32) & _MASK) ^ c3 ^ k1
        c1, c3 = p1 & _MASK, p0 & _MASK
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    return c0, c1, c2, c3


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
    The values are computed in float64 and then rounded to dtype. On index.device.
    """
    words = _words(seed, purpose, index, math.prod(shape), draw)
    radius = torch.sqrt(-2.0 * torch.log((words[..., 0::2] + 0.5) * _TWO_POW_MINUS_32))
    angle = (words[..., 1::2] + 0.5) * (2.0 * math.pi * _TWO_POW_MINUS_32)
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return _trim(pairs, index, shape).to(dtype)


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
    words = _trim(_words(seed, purpose, index, math.prod(shape), draw), index, shape)
    if dtype == torch.float32:
        return (words >> 8).to(dtype) * 2.0**-24
    if dtype == torch.float64:
        return words.to(dtype) * _TWO_POW_MINUS_32
    raise ValueError(f"dtype: must be torch.float32 or torch.float64, got {dtype}")


def integers(seed: int, purpose: str, index: Tensor, high: int, *, draw: int = 0) -> Tensor:
    """Integers int64 `[B]` in [0, high), uniform to within a relative high / 2**63.

    high: 1 <= high <= 2**31. Other arguments as in `normal`.
    """
    require(1 <= high <= 2**31, "high", "in 1..2**31", high)
    words = _words(seed, purpose, index, 4, draw)[:, 0, :]
    return ((words[:, 0] << 31) | (words[:, 1] >> 1)) % high


def derive_seed(seed: int, purpose: str, *index: int) -> int:
    """A 63-bit seed for torch.manual_seed or torch.Generator, from (seed, purpose, index...) by BLAKE2b."""
    return int.from_bytes(_digest(seed, purpose, *index), "little") >> 1


def _digest(seed: int, purpose: str, *index: int) -> bytes:
    check_seed(seed)
    # The purpose comes last: it is the only part that may hold any character, so no two tuples share a text.
    text = ",".join(str(int(i)) for i in (seed, *index)) + ";" + purpose
    return hashlib.blake2b(text.encode(), digest_size=8, person=b"ddpm-rng").digest()


def _words(seed: int, purpose: str, index: Tensor, count: int, draw: int) -> Tensor:
    """32-bit words `[B, ceil(count / 4), 4]` as int64."""
    check_index(index)
    require(0 <= draw <= _MASK, "draw", "in 0..2**32-1", draw)
    digest = _digest(seed, purpose)
    key = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
    block = torch.arange((count + 3) // 4, dtype=torch.int64, device=index.device)[None, :]
    row = index[:, None]
    counter = block, torch.full_like(block, draw), row & _MASK, (row >> 32) & _MASK
    words = torch.broadcast_tensors(*philox4x32(counter, key))
    return torch.stack(words, dim=-1)


def _trim(values: Tensor, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    return values.flatten(1)[:, : math.prod(shape)].reshape(index.shape[0], *shape)
