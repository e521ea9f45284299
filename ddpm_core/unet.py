"""The U-Net of Ho et al. 2020, appendix B, sized by configuration, with the options of Nichol & Dhariwal 2021.

The CIFAR-10 configuration of the paper (image_size=32, in_channels=3, the other fields at their defaults) has
35,746,307 parameters.
"""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_core._checks import require, require_int, require_number, require_sizes
from ddpm_core.conditioning import ConditionedNetwork, NetworkConfig
from ddpm_core.conditioning import timestep_embedding as timestep_embedding
from ddpm_core.unet_blocks import (
    Attention,
    Block,
    BlockOptions,
    DownLevel,
    Downsample,
    Residual,
    UpLevel,
    Upsample,
    laid_out,
)

_NORM_EPS = 1e-6


@dataclass(frozen=True)
class UNetConfig(NetworkConfig):
    """The network's size, beside the options of `NetworkConfig`.

    Level i works at resolution image_size / 2**i with base_channels · channel_mults[i] channels and has
    num_res_blocks residual blocks on the way down, one more on the way up. Self-attention follows each of
    them at the resolutions in attention_resolutions, and stands in the middle always. It has num_heads heads,
    or as many as head_channels gives, each with that many channels.
    scale_shift_norm: the noise level scales and shifts behind the second norm of a residual block, where by
    default it shifts before it.
    kind: what tells this configuration from another network's where both are plain values.
    Raises ValueError naming the field that is out of range.
    """

    base_channels: int = 128
    channel_mults: tuple[int, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.1
    num_groups: int = 32
    scale_shift_norm: bool = field(default=False, kw_only=True)
    num_heads: int = field(default=1, kw_only=True)
    head_channels: int | None = field(default=None, kw_only=True)
    kind: Literal["unet"] = field(default="unet", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.kind == "unet", "kind", "'unet'", self.kind)
        mults = self.channel_mults
        for name in ("base_channels", "num_res_blocks", "num_groups", "num_heads"):
            require_int(name, getattr(self, name), 1)
        for name, values in (("channel_mults", mults), ("attention_resolutions", self.attention_resolutions)):
            require_sizes(name, values)
        require_number("dropout", self.dropout)
        require_int("head_channels", self.head_channels, 1, none="null")
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
        unknown = [r for r in self.attention_resolutions if r not in self.resolutions]
        require(
            not unknown,
            "attention_resolutions",
            f"among the network's resolutions {self.resolutions}",
            self.attention_resolutions,
        )
        require(0 <= self.dropout < 1, "dropout", "at least 0 and below 1", self.dropout)
        require(
            all(c % self.num_groups == 0 for c in self.widths),
            "num_groups",
            f"a divisor of every level's channels {list(self.widths)}",
            self.num_groups,
        )
        self._check_heads()

    def _check_heads(self) -> None:
        widths = self.attention_widths
        require(
            all(width % self.num_heads == 0 for width in widths),
            "num_heads",
            f"a divisor of the channels where attention stands {list(widths)}",
            self.num_heads,
        )
        if self.head_channels is None:
            return
        require(
            all(width % self.head_channels == 0 for width in widths),
            "head_channels",
            f"null or a divisor of the channels where attention stands {list(widths)}",
            self.head_channels,
        )
        require(self.num_heads == 1, "num_heads", "1 (its default) beside head_channels", self.num_heads)

    @property
    def resolutions(self) -> tuple[int, ...]:
        """The levels' sizes, falling."""
        return tuple(self.image_size // 2**level for level in range(len(self.channel_mults)))

    @property
    def widths(self) -> tuple[int, ...]:
        """The levels' channels."""
        return tuple(self.base_channels * mult for mult in self.channel_mults)

    @property
    def attention_widths(self) -> tuple[int, ...]:
        """The channels wherever self-attention stands, rising and each once."""
        levels = zip(self.resolutions, self.widths, strict=True)
        found = {width for resolution, width in levels if resolution in self.attention_resolutions}
        return tuple(sorted({*found, self.widths[-1]}))

    def heads(self, width: int) -> int:
        """How many heads self-attention over `width` channels has."""
        return self.num_heads if self.head_channels is None else width // self.head_channels


class UNet(ConditionedNetwork):
    """The prediction from x_t (ε in the paper), and v behind it with a learned variance.

    The output is exactly zero at initialisation, since the last convolution starts at zero. The weights are
    drawn with torch's global generator: torch.manual_seed before construction fixes them.
    """

    config: UNetConfig

    def __init__(self, config: UNetConfig) -> None:
        base, groups = config.base_channels, config.num_groups
        super().__init__(config, base, 4 * base)
        attends = [r in config.attention_resolutions for r in config.resolutions]
        widths = config.widths
        last = len(widths) - 1
        options = BlockOptions(4 * base, config.dropout, groups, config.scale_shift_norm)

        def block(in_channels: int, out_channels: int, attention: bool) -> Block:
            return Block(in_channels, out_channels, config.heads(out_channels) if attention else 0, options)

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
            self.down.append(DownLevel(blocks, None if level == last else Downsample(channels)))

        self.middle = nn.ModuleList((block(channels, channels, True), block(channels, channels, False)))

        self.up = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            blocks = []
            for _ in range(config.num_res_blocks + 1):
                blocks.append(block(channels + skips.pop(), width, attends[level]))
                channels = width
            self.up.append(UpLevel(blocks, Upsample(channels) if level else None))

        self.norm_out = nn.GroupNorm(groups, channels, eps=_NORM_EPS)
        self.conv_out = nn.Conv2d(channels, config.out_channels, 3, padding=1)
        _initialise(self)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """x_t `[B, C, S, S]` and its noise level to `[B, out_channels, S, S]`, whatever x_t's memory format.

        t: int64 `[B]`, zero-based; with conditioning "log_snr" the floating-point log-SNR `[B]`, ±inf included.
        labels: int64 `[B]` in 0..num_classes, num_classes meaning no class; None means no class for all.
        Raises ValueError naming the argument whose shape, dtype or range is wrong; a NaN in x_t passes.
        """
        self.check(x_t, t, labels)
        temb = self.embed(t, labels)
        h = laid_out(self.conv_in(x_t))
        skips = [h]
        for level in self.down:
            h, states = level(h, temb, self.run)
            skips += states
        for block in self.middle:
            h = self.run(block, h, temb)
        for level in self.up:
            h = level(h, temb, skips, self.run)
        out = self.conv_out(F.silu(self.norm_out(h)))
        return out.contiguous() if x_t.is_contiguous() else out


def _initialise(net: UNet) -> None:
    """Uniform, variance 2/(fan_in + fan_out); zero for biases and the last layer of each residual branch."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in net.modules():
        if isinstance(module, Residual):
            nn.init.zeros_(module.conv_1.weight)
        elif isinstance(module, Attention):
            nn.init.zeros_(module.out.weight)
    nn.init.zeros_(net.conv_out.weight)
