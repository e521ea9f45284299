"""The plain form of ddpm_core.rng, one operation after another: what the fast form must give, bit for bit.

Runs that are resumed, and sample sets that are made again, depend on these values.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, ((p0 >> 32) & _MASK) ^ c3 ^ k1
        c1, c3 = p1 & _MASK, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def words(seed: int, purpose: str, index: Tensor, count: int, draw: int) -> Tensor:
    """int64 `[B, ceil(count / 4), 4]`"""
    digest = hashlib.blake2b(f"{seed};{purpose}".encode(), digest_size=8, person=b"ddpm-rng").digest()
    key = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
    block = torch.arange((count + 3) // 4)[None, :]
    row = index[:, None]
    counter = block, torch.full_like(block, draw), row & _MASK, (row >> 32) & _MASK
    return torch.stack(torch.broadcast_tensors(*philox4x32(counter, key)), dim=-1)


def normal(seed: int, purpose: str, index: Tensor, shape: tuple[int, ...], *, draw: int = 0) -> Tensor:
    """float32, because an int64 tensor plus a Python float is a float32 tensor."""
    w = words(seed, purpose, index, math.prod(shape), draw)
    radius = torch.sqrt(-2.0 * torch.log((w[..., 0::2] + 0.5) * 2.0**-32))
    angle = (w[..., 1::2] + 0.5) * (2.0 * math.pi * 2.0**-32)
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return _trim(pairs, index, shape)


def uniform(
    seed: int, purpose: str, index: Tensor, shape: tuple[int, ...], *, draw: int = 0, bits: int = 24
) -> Tensor:
    """Multiples of 2**-bits: 24 in float32, 32 in float64."""
    w = _trim(words(seed, purpose, index, math.prod(shape), draw), index, shape)
    return (w >> (32 - bits)).to(torch.float32 if bits == 24 else torch.float64) * 2.0**-bits


def integers(seed: int, purpose: str, index: Tensor, high: int, *, draw: int = 0) -> Tensor:
    w = words(seed, purpose, index, 4, draw)[:, 0, :]
    return ((w[:, 0] << 31) | (w[:, 1] >> 1)) % high


def _trim(values: Tensor, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    return values.flatten(1)[:, : math.prod(shape)].reshape(index.shape[0], *shape)
