"""The U-Net of Ho et al. 2020, appendix B, sized by configuration.

The CIFAR-10 configuration of the paper (image_size=32, in_channels=3, the other fields at their defaults) has
35,746,307 parameters.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_core._checks import check_index, require

_NORM_EPS = 1e-6
_MAX_PERIOD = 10_000.0


@dataclass(frozen=True)
class UNetConfig:
    """The network's size.

    Level i works at resolution image_size / 2**i with base_channels · channel_mults[i] channels and has
    num_res_blocks residual blocks on the way down, one more on the way up. Self-attention follows each of
    them at the resolutions in attention_resolutions, and stands in the middle always.
    Raises ValueError naming the field that is out of range.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 (read by pydantic, not a field)

    image_size: int
    in_channels: int
    base_channels: int = 128
    channel_mults: tuple[int, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.1
    num_groups: int = 32

    def __post_init__(self) -> None:
        require(self.in_channels >= 1, "in_channels", "at least 1", self.in_channels)
        mults = self.channel_mults
        require(len(mults) >= 1 and min(mults) >= 1, "channel_mults", "one or more positive integers", mults)
        divisor = 2 ** (len(mults) - 1)
        require(
            self.image_size >= 1 and self.image_size % divisor == 0,
            "image_size",
            f"a positive multiple of {divisor} (channel_mults has {len(mults)} levels)",
            self.image_size,
        )
        require(
            self.base_channels >= 4 and self.base_channels % 2 == 0,
            "base_channels",
            "even and at least 4",
            self.base_channels,
        )
        require(self.num_res_blocks >= 1, "num_res_blocks", "at least 1", self.num_res_blocks)
        unknown = [r for r in self.attention_resolutions if r not in self.resolutions]
        require(
            not unknown,
            "attention_resolutions",
            f"among the network's resolutions {self.resolutions}",
            self.attention_resolutions,
        )
        require(0 <= self.dropout < 1, "dropout", "at least 0 and below 1", self.dropout)
        channels = [self.base_channels * m for m in mults]
        require(
            self.num_groups >= 1 and all(c % self.num_groups == 0 for c in channels),
            "num_groups",
            f"a divisor of every level's channels {channels}",
            self.num_groups,
        )

    @property
    def resolutions(self) -> tuple[int, ...]:
        return tuple(self.image_size // 2**level for level in range(len(self.channel_mults)))


class UNet(nn.Module):
    """ε_θ(x_t, t). The output is exactly zero at initialisation, since the last convolution starts at zero.

    The weights are drawn with torch's global generator: torch.manual_seed before construction fixes them.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        base, groups, dropout = config.base_channels, config.num_groups, config.dropout
        time_channels = 4 * base
        attends = [r in config.attention_resolutions for r in config.resolutions]
        widths = [base * mult for mult in config.channel_mults]
        last = len(widths) - 1

        def block(in_channels: int, out_channels: int, attention: bool) -> _Block:
            return _Block(in_channels, out_channels, time_channels, dropout, groups, attention)

        self.time_dense_0 = nn.Linear(base, time_channels)
        self.time_dense_1 = nn.Linear(time_channels, time_channels)
        self.conv_in = nn.Conv2d(config.in_channels, base, 3, padding=1)

        channels = base
        skips = [base]
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            blocks = []
            for _ in range(config.num_res_blocks):
                blocks.append(block(channels, width, attends[level]))
                channels = width
                skips.append(channels)
            if level != last:
                skips.append(channels)
            self.down.append(_DownLevel(blocks, None if level == last else _Downsample(channels)))

        self.middle = nn.ModuleList((block(channels, channels, True), block(channels, channels, False)))

        self.up = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            blocks = []
            for _ in range(config.num_res_blocks + 1):
                blocks.append(block(channels + skips.pop(), width, attends[level]))
                channels = width
            self.up.append(_UpLevel(blocks, _Upsample(channels) if level else None))

        self.norm_out = nn.GroupNorm(groups, channels, eps=_NORM_EPS)
        self.conv_out = nn.Conv2d(channels, config.in_channels, 3, padding=1)
        _initialise(self)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """x_t `[B, C, S, S]`, t int64 `[B]` to ε_θ `[B, C, S, S]`. Raises ValueError for other shapes."""
        self._check(x_t, t)
        temb = timestep_embedding(t, self.config.base_channels).to(self.time_dense_0.weight.dtype)
        temb = F.silu(self.time_dense_1(F.silu(self.time_dense_0(temb))))

        h = self.conv_in(x_t)
        skips = [h]
        for level in self.down:
            h, states = level(h, temb)
            skips += states
        for block in self.middle:
            h = block(h, temb)
        for level in self.up:
            h = level(h, temb, skips)
        return self.conv_out(F.silu(self.norm_out(h)))

    def _check(self, x_t: Tensor, t: Tensor) -> None:
        size = self.config.image_size
        expected = (self.config.in_channels, size, size)
        if x_t.dim() != 4 or tuple(x_t.shape[1:]) != expected:
            raise ValueError(
                f"x_t: must have the shape [B, {', '.join(map(str, expected))}], got {list(x_t.shape)}"
            )
        check_index(t, "t")
        if t.shape[0] != x_t.shape[0]:
            raise ValueError(f"t: must have one entry a sample, got {t.shape[0]} for {x_t.shape[0]} samples")


def timestep_embedding(t: Tensor, channels: int) -> Tensor:
    """t `[B]` to float32 `[B, channels]`: [sin(t·f_i), cos(t·f_i)], f_i = 10000^(−i/(channels/2 − 1))."""
    half = channels // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.to(torch.float32)[:, None] * torch.exp(steps * (-math.log(_MAX_PERIOD) / (half - 1)))[None, :]
    return torch.cat((angles.sin(), angles.cos()), dim=1)


class _DownLevel(nn.Module):
    """The blocks of one resolution, and the way to the next lower one. Returns every state as a skip."""

    def __init__(self, blocks: "list[_Block]", downsample: "_Downsample | None") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, h: Tensor, temb: Tensor) -> tuple[Tensor, list[Tensor]]:
        states = []
        for block in self.blocks:
            h = block(h, temb)
            states.append(h)
        if self.downsample is not None:
            h = self.downsample(h)
            states.append(h)
        return h, states


class _UpLevel(nn.Module):
    """The blocks of one resolution, each joined by the last skip (taken from the list), and the way up."""

    def __init__(self, blocks: "list[_Block]", upsample: "_Upsample | None") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.upsample = upsample

    def forward(self, h: Tensor, temb: Tensor, skips: list[Tensor]) -> Tensor:
        for block in self.blocks:
            h = block(torch.cat((h, skips.pop()), dim=1), temb)
        return h if self.upsample is None else self.upsample(h)


class _Block(nn.Module):
    """A residual block, then self-attention where the resolution has it."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_channels: int,
        dropout: float,
        groups: int,
        attention: bool,
    ) -> None:
        super().__init__()
        self.residual = _Residual(in_channels, out_channels, time_channels, dropout, groups)
        self.attention = _Attention(out_channels, groups) if attention else None

    def forward(self, h: Tensor, temb: Tensor) -> Tensor:
        h = self.residual(h, temb)
        return h if self.attention is None else self.attention(h)


class _Residual(nn.Module):
    """temb arrives after its SiLU, which all blocks share."""

    def __init__(
        self, in_channels: int, out_channels: int, time_channels: int, dropout: float, groups: int
    ) -> None:
        super().__init__()
        self.norm_0 = nn.GroupNorm(groups, in_channels, eps=_NORM_EPS)
        self.conv_0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_dense = nn.Linear(time_channels, out_channels)
        self.norm_1 = nn.GroupNorm(groups, out_channels, eps=_NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv_1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv_0(F.silu(self.norm_0(x)))
        h = h + self.time_dense(temb)[:, :, None, None]
        h = self.conv_1(self.dropout(F.silu(self.norm_1(h))))
        return h + (x if self.shortcut is None else self.shortcut(x))


class _Attention(nn.Module):
    """Self-attention with one head over the positions of the image."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=_NORM_EPS)
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).flatten(2).transpose(1, 2)
        query, key, value = (dense(h).unsqueeze(1) for dense in (self.query, self.key, self.value))
        h = F.scaled_dot_product_attention(query, key, value).squeeze(1)
        return x + self.out(h).transpose(1, 2).reshape(x.shape)


class _Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        # "SAME" padding in the paper's framework: an even size at stride 2 pads on the right and below only.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _initialise(net: UNet) -> None:
    """Uniform, variance 2/(fan_in + fan_out); zero for biases and the last layer of each residual branch."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in net.modules():
        if isinstance(module, _Residual):
            nn.init.zeros_(module.conv_1.weight)
        elif isinstance(module, _Attention):
            nn.init.zeros_(module.out.weight)
    nn.init.zeros_(net.conv_out.weight)
