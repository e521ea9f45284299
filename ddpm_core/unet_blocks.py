"""The parts of the U-Net: residual blocks, self-attention, and the ways between resolutions."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_NORM_EPS = 1e-6

Run = Callable[..., Tensor]
"""run(block, *states) is block(*states), perhaps with gradient checkpointing."""


@dataclass(frozen=True)
class BlockOptions:
    """What all blocks of one network share."""

    time_channels: int
    dropout: float
    groups: int
    scale_shift: bool


class DownLevel(nn.Module):
    """The blocks of one resolution, and the way to the next lower one. Returns every state as a skip."""

    def __init__(self, blocks: "list[Block]", downsample: "Downsample | None") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, h: Tensor, temb: Tensor, run: Run) -> tuple[Tensor, list[Tensor]]:
        states = []
        for block in self.blocks:
            h = run(block, h, temb)
            states.append(h)
        if self.downsample is not None:
            h = self.downsample(h)
            states.append(h)
        return h, states


class UpLevel(nn.Module):
    """The blocks of one resolution, each joined by the last skip (taken from the list), and the way up."""

    def __init__(self, blocks: "list[Block]", upsample: "Upsample | None") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.upsample = upsample

    def forward(self, h: Tensor, temb: Tensor, skips: list[Tensor], run: Run) -> Tensor:
        for block in self.blocks:
            h = run(block, h, temb, skips.pop())
        return h if self.upsample is None else self.upsample(h)


class Block(nn.Module):
    """A residual block, then self-attention with num_heads heads (0: none)."""

    def __init__(self, in_channels: int, out_channels: int, num_heads: int, options: BlockOptions) -> None:
        super().__init__()
        self.residual = Residual(in_channels, out_channels, options)
        self.attention = Attention(out_channels, num_heads, options.groups) if num_heads else None

    def forward(self, h: Tensor, temb: Tensor, skip: Tensor | None = None) -> Tensor:
        """h, skip `[B, ·, S, S]`, joined along the channels; temb `[B, time_channels]`, after its SiLU."""
        # joined here, so that gradient checkpointing keeps the two parts alone
        h = self.residual(h if skip is None else torch.cat((h, skip), dim=1), temb)
        return h if self.attention is None else self.attention(h)


class Residual(nn.Module):
    """conv(SiLU(norm(x))) twice, added to x; the noise level comes in between.

    It shifts the channels before the second norm (Ho et al. 2020), or with scale_shift scales and shifts them
    behind it, norm(h)·(1 + scale) + shift (Nichol & Dhariwal 2021, section 3.4 of the appendix).
    """

    def __init__(self, in_channels: int, out_channels: int, options: BlockOptions) -> None:
        super().__init__()
        self.scale_shift = options.scale_shift
        self.norm_0 = nn.GroupNorm(options.groups, in_channels, eps=_NORM_EPS)
        self.conv_0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_dense = nn.Linear(options.time_channels, out_channels * (2 if self.scale_shift else 1))
        self.norm_1 = nn.GroupNorm(options.groups, out_channels, eps=_NORM_EPS)
        self.dropout = nn.Dropout(options.dropout)
        self.conv_1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv_0(F.silu(self.norm_0(x)))
        change = self.time_dense(temb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = change.chunk(2, dim=1)
            h = self.norm_1(h) * (1.0 + scale) + shift
        else:
            h = self.norm_1(h + change)
        h = self.conv_1(self.dropout(F.silu(h)))
        return h + (x if self.shortcut is None else self.shortcut(x))


class Attention(nn.Module):
    """Self-attention over the positions of the image, added to x. Each head has channels/num_heads channels."""

    def __init__(self, channels: int, num_heads: int, groups: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.GroupNorm(groups, channels, eps=_NORM_EPS)
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).flatten(2).transpose(1, 2)
        query, key, value = (
            dense(h).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for dense in (self.query, self.key, self.value)
        )
        h = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return x + self.out(h).transpose(1, 2).reshape(x.shape)


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        # "SAME" padding in the paper's framework: an even size at stride 2 pads on the right and below only.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
