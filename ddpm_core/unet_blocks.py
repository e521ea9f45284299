"""The parts of the U-Net: residual blocks, self-attention, and the ways between resolutions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_NORM_EPS = 1e-6
_MANY_POSITIONS_A_CHANNEL = 16
_LARGE = 16
"""The image size from which fewer products outweigh more traffic on the way up."""
_PHASES = ((0, 0), (0, 1), (1, 0), (1, 1))
# of the output's rows 2i and 2i+1, which of the kernel's three rows meet the first and the second row of x
_TAP_SUMS = (((1.0, 0.0, 0.0), (0.0, 1.0, 1.0)), ((1.0, 1.0, 0.0), (0.0, 0.0, 1.0)))

Run = Callable[..., Tensor]
"""run(block, *states) is block(*states), perhaps with gradient checkpointing."""


@dataclass(frozen=True)
class BlockOptions:
    """What all blocks of one network share."""

    time_channels: int
    dropout: float
    groups: int
    scale_shift: bool


def laid_out(h: Tensor) -> Tensor:
    """h in the memory format in which the CPU's convolutions of its size are fastest.

    That is channels-last where the positions are many beside the channels: it takes up to 40 % less time. Where
    they are few, the weights outweigh the activations, and they would have to be laid out anew as well.
    """
    if h.device.type != "cpu":
        return h
    many = h.shape[0] * h.shape[2] * h.shape[3] >= _MANY_POSITIONS_A_CHANNEL * h.shape[1]
    return h.contiguous(memory_format=torch.channels_last if many else torch.contiguous_format)


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
        # sums go into what a convolution has just made, which nobody else reads: it saves a pass over memory
        if self.scale_shift:
            scale, shift = change.chunk(2, dim=1)
            h = (self.norm_1(h) * (1.0 + scale)).add_(shift)
        else:
            h = self.norm_1(h.add_(change))
        h = self.conv_1(self.dropout(F.silu(h)))
        return h.add_(x if self.shortcut is None else _pointwise(self.shortcut, x))


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
        return laid_out(self.conv(F.pad(x, (0, 1, 0, 1))))


class Upsample(nn.Module):
    """Every pixel doubled in both directions, then a convolution of 3 × 3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.shape[2] >= _LARGE:
            return laid_out(_doubled_conv(x, self.conv))
        return laid_out(self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))


def _doubled_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """conv of x with its pixels doubled, in 16 products a pixel where 36 stand in the definition.

    Of the three rows under the kernel two show the same row of x: rows (i−1, i) for the output's row 2i and
    (i, i+1) for 2i+1, and so with the columns. So each of the four kinds of output pixel is a convolution of
    2 × 2 whose weights are sums of conv's; they are computed as one, over S + 1 positions.
    """
    assert conv.bias is not None
    size, channels = x.shape[2], conv.out_channels
    sums = torch.tensor(_TAP_SUMS, dtype=conv.weight.dtype, device=x.device)
    mixing = torch.einsum("pak,qbl->klpqab", sums, sums).reshape(9, 16)
    weight = (conv.weight.flatten(2) @ mixing).unflatten(2, (4, 2, 2)).permute(2, 0, 1, 3, 4).flatten(0, 1)
    parts = F.conv2d(x, weight, conv.bias.repeat(4), padding=1)
    return _Interleave.apply(parts.permute(0, 2, 3, 1).unflatten(3, (2, 2, channels)), size)


class _Interleave(torch.autograd.Function):
    """Parts `[B, S + 1, S + 1, 2, 2, C]` of the rows and columns 2i, 2i+1 to `[B, C, 2S, 2S]`, channels last.

    The parts of the rows 2i begin at i, those of 2i+1 at i + 1, and so with the columns. A function of its own
    since torch's gradient of so many slices is several times slower.
    """

    @staticmethod
    def forward(ctx: Any, parts: Tensor, size: int) -> Tensor:
        out = parts.new_empty(parts.shape[0], size, 2, size, 2, parts.shape[5])
        for p, q in _PHASES:
            out[:, :, p, :, q] = parts[:, p : p + size, q : q + size, p, q]
        return out.view(parts.shape[0], 2 * size, 2 * size, -1).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        batch, channels, size = gradient.shape[0], gradient.shape[1], gradient.shape[2] // 2
        split = gradient.permute(0, 2, 3, 1).reshape(batch, size, 2, size, 2, channels)
        parts = gradient.new_zeros(batch, size + 1, size + 1, 2, 2, channels)
        for p, q in _PHASES:
            parts[:, p : p + size, q : q + size, p, q] = split[:, :, p, :, q]
        return parts, None


def _pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv, of 1 × 1, of x."""
    if x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last):
        # a matrix product, which torch does not see by itself
        return F.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)
    return conv(x)
