"""The diffusion transformer of Peebles & Xie 2023 (arXiv:2212.09748) with adaLN-Zero blocks.

At its paper's largest size (latents of 4 × 32 × 32, patches of 2, 1152 channels, 28 blocks of 16 heads,
1000 classes, learned variance) it has 674,834,720 parameters.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_core._checks import require, require_int, require_number
from ddpm_core.conditioning import ConditionedNetwork, NetworkConfig

_NORM_EPS = 1e-6
_FREQUENCY_CHANNELS = 256
_CONDITION_STD = 0.02


@dataclass(frozen=True)
class DiTConfig(NetworkConfig):
    """The transformer's size, beside the options of `NetworkConfig`.

    The image is cut into (image_size / patch_size)² patches, each a token of hidden_size channels; depth blocks
    follow, with num_heads heads and a hidden layer of mlp_ratio · hidden_size.
    kind: what tells this configuration from another network's where both are plain values.
    Raises ValueError naming the field that is out of range.
    """

    patch_size: int = 2
    hidden_size: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    kind: Literal["dit"] = "dit"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.kind == "dit", "kind", "'dit'", self.kind)
        for name in ("patch_size", "hidden_size", "depth", "num_heads"):
            require_int(name, getattr(self, name), 1)
        require(
            self.image_size % self.patch_size == 0,
            "image_size",
            f"a positive multiple of patch_size {self.patch_size}",
            self.image_size,
        )
        # a quarter of the channels each for sine and cosine of either coordinate
        require(
            self.hidden_size % 4 == 0,
            "hidden_size",
            "a positive multiple of 4",
            self.hidden_size,
        )
        require(
            self.hidden_size % self.num_heads == 0,
            "num_heads",
            f"a divisor of hidden_size {self.hidden_size}",
            self.num_heads,
        )
        require_number("mlp_ratio", self.mlp_ratio)
        require(
            0 < self.mlp_ratio < float("inf") and int(self.mlp_ratio * self.hidden_size) >= 1,
            "mlp_ratio",
            "positive, finite and enough for one hidden unit",
            self.mlp_ratio,
        )

    @property
    def grid_size(self) -> int:
        """Patches along each side of the image."""
        return self.image_size // self.patch_size


class DiT(ConditionedNetwork):
    """The prediction from x_t (ε in the paper), and v behind it with a learned variance.

    The output is exactly zero at initialisation, and every block passes its input on. The weights are drawn with
    torch's global generator: torch.manual_seed before construction fixes them.
    """

    config: DiTConfig
    positions: Tensor

    def __init__(self, config: DiTConfig) -> None:
        width, patch = config.hidden_size, config.patch_size
        super().__init__(config, _FREQUENCY_CHANNELS, width)
        self.patch_dense = nn.Linear(config.in_channels * patch**2, width)
        # fixed, hence no part of the state
        self.register_buffer("positions", grid_positions(config.grid_size, width), persistent=False)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.modulation_out = nn.Linear(width, 2 * width)
        self.dense_out = nn.Linear(width, config.out_channels * patch**2)
        _initialise(self)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """x_t `[B, C, S, S]` and its noise level to `[B, out_channels, S, S]`, whatever x_t's memory format.

        t: int64 `[B]`, zero-based; with conditioning "log_snr" the floating-point log-SNR `[B]`, ±inf included.
        labels: int64 `[B]` in 0..num_classes, num_classes meaning no class; None means no class for all.
        Raises ValueError naming the argument whose shape, dtype or range is wrong.
        """
        self.check(x_t, t, labels)
        condition = self.embed(t, labels)
        h = self.patch_dense(to_patches(x_t, self.config.patch_size)) + self.positions
        for block in self.blocks:
            h = self.run(block, h, condition)
        shift, scale = self.modulation_out(condition)[:, None].chunk(2, dim=2)
        return from_patches(self.dense_out(_modulated(h, shift, scale)), self.config.patch_size)


def to_patches(x: Tensor, patch_size: int) -> Tensor:
    """x `[B, C, S, S]` to `[B, (S/p)², C·p²]`: patches row by row, in each the channels slowest."""
    rows = x.shape[2] // patch_size
    parts = x.reshape(x.shape[0], x.shape[1], rows, patch_size, rows, patch_size)
    return parts.permute(0, 2, 4, 1, 3, 5).reshape(x.shape[0], rows**2, x.shape[1] * patch_size**2)


def from_patches(patches: Tensor, patch_size: int) -> Tensor:
    """The inverse of `to_patches`."""
    rows = round(patches.shape[1] ** 0.5)
    parts = patches.reshape(patches.shape[0], rows, rows, -1, patch_size, patch_size)
    size = rows * patch_size
    return parts.permute(0, 3, 1, 4, 2, 5).reshape(patches.shape[0], -1, size, size)


def grid_positions(grid_size: int, channels: int) -> Tensor:
    """float32 `[grid_size², channels]`: sines and cosines of a patch's column, then of its row.

    Each coordinate p has [sin(p·f_i), cos(p·f_i)] over channels/2, f_i = 10000^(−i/(channels/4)).
    """
    quarter = channels // 4
    frequencies = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequencies[None, :]
    one = torch.cat((angles.sin(), angles.cos()), dim=1).to(torch.float32)
    columns = one[None, :, :].expand(grid_size, -1, -1)
    rows = one[:, None, :].expand(-1, grid_size, -1)
    return torch.cat((columns, rows), dim=2).flatten(0, 1)


class _Block(nn.Module):
    """Self-attention and a perceptron, each behind a norm that the condition scales and shifts, and gated by it."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width, hidden = config.hidden_size, int(config.mlp_ratio * config.hidden_size)
        self.num_heads = config.num_heads
        self.modulation = nn.Linear(width, 6 * width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_in = nn.Linear(width, hidden)
        self.mlp_out = nn.Linear(hidden, width)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        """h `[B, N, D]`; condition `[B, D]`, after its SiLU."""
        shift_0, scale_0, gate_0, shift_1, scale_1, gate_1 = self.modulation(condition)[:, None].chunk(
            6, dim=2
        )
        h = torch.addcmul(h, gate_0, self._attention(_modulated(h, shift_0, scale_0)))
        mlp = self.mlp_out(F.gelu(self.mlp_in(_modulated(h, shift_1, scale_1)), approximate="tanh"))
        return torch.addcmul(h, gate_1, mlp)

    def _attention(self, h: Tensor) -> Tensor:
        joint = self.query_key_value(h).unflatten(2, (3, self.num_heads, -1))
        query, key, value = joint.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.attention_out(mixed.transpose(1, 2).flatten(2))


def _modulated(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(h)·(1 + scale) + shift."""
    return torch.addcmul(shift, F.layer_norm(h, h.shape[-1:], eps=_NORM_EPS), 1.0 + scale)


def _initialise(net: DiT) -> None:
    """Uniform, variance 2/(fan_in + fan_out); N(0, 0.02²) for the noise level's layers; zero for biases, for
    what modulates and gates, and for the last layer."""
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for dense in (net.time_dense_0, net.time_dense_1):
        nn.init.normal_(dense.weight, std=_CONDITION_STD)
    for module in net.modules():
        if isinstance(module, _Block):
            nn.init.zeros_(module.modulation.weight)
    nn.init.zeros_(net.modulation_out.weight)
    nn.init.zeros_(net.dense_out.weight)
