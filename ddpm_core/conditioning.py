"""What a network is told beside x_t: how noisy it is, and of which class it is to be.

One embedding serves the U-Net and the diffusion transformer; `NetworkConfig` holds the options they share.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ddpm_core._checks import (
    check_floating,
    check_index,
    check_tensor,
    require,
    require_int,
    values_are_at_hand,
)
from ddpm_core._identity import config_identity

Conditioning: TypeAlias = Literal["timestep", "log_snr"]
"""What tells the network how noisy x_t is: t, int64 `[B]`, or log-SNR, floating-point `[B]`."""

_MAX_PERIOD = 10_000.0
_LOG_SNR_WIDTH = 4.0
_NOISE_LEVELS = 1000.0
_LABEL_STD = 0.02


@dataclass(frozen=True)
class NetworkConfig:
    """What every network has, whichever its kind.

    image_size, in_channels: the image `[in_channels, image_size, image_size]`.
    learned_variance: the output has 2·in_channels channels, the prediction and then v, which places ln σ_t²
    between ln β̃_t and ln β_t (Nichol & Dhariwal 2021, Eq. 15).
    num_classes: labels 0..num_classes−1, and the label num_classes for "no class", which classifier-free
    guidance needs (Ho & Salimans 2022, arXiv:2207.12598). None: no labels.
    conditioning: "timestep" gives the network t; "log_snr" gives it ln(ᾱ/(1 − ᾱ)), so that one network serves
    every schedule.
    gradient_checkpointing: keep the blocks' inputs alone for the backward pass and compute the rest again: the
    same gradients, less memory, about a third more time.
    Raises ValueError naming the field that is out of range.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 (read by pydantic, not a field)

    image_size: int
    in_channels: int
    learned_variance: bool = field(default=False, kw_only=True)
    num_classes: int | None = field(default=None, kw_only=True)
    conditioning: Conditioning = field(default="timestep", kw_only=True)
    gradient_checkpointing: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("image_size", "in_channels"):
            require_int(name, getattr(self, name), 1)
        require_int("num_classes", self.num_classes, 1, none="null")
        require(
            self.conditioning in ("timestep", "log_snr"),
            "conditioning",
            "'timestep' or 'log_snr'",
            self.conditioning,
        )

    @property
    def out_channels(self) -> int:
        """Channels of the network's output: 2·in_channels with a learned variance."""
        return 2 * self.in_channels if self.learned_variance else self.in_channels

    def identity(self) -> dict[str, Any]:
        """What the network is, as plain values to hash; gradient_checkpointing changes no result."""
        return config_identity(self, without=("gradient_checkpointing",))


class ConditionedNetwork(nn.Module):
    """A network of x_t, a noise level and perhaps a label: its embedding of the latter two, and its checks."""

    def __init__(self, config: NetworkConfig, frequency_channels: int, width: int) -> None:
        super().__init__()
        self.config = config
        self._frequency_channels = frequency_channels
        self.time_dense_0 = nn.Linear(frequency_channels, width)
        self.time_dense_1 = nn.Linear(width, width)
        if config.num_classes is not None:
            self.label_embedding = nn.Embedding(config.num_classes + 1, width)
            nn.init.normal_(self.label_embedding.weight, std=_LABEL_STD)

    def embed(self, t: Tensor, labels: Tensor | None) -> Tensor:
        """`[B, width]`, after the SiLU that all blocks share, in the dtype of the weights.

        SiLU(W₁·SiLU(W₀·s(t)) + label's row), s being `timestep_embedding` or `log_snr_embedding`.
        """
        embedding = timestep_embedding if self.config.conditioning == "timestep" else log_snr_embedding
        signal = embedding(t, self._frequency_channels).to(self.time_dense_0.weight.dtype)
        hidden = self.time_dense_1(F.silu(self.time_dense_0(signal)))
        if self.config.num_classes is not None:
            null = torch.full_like(t, self.config.num_classes, dtype=torch.int64)
            hidden = hidden + self.label_embedding(null if labels is None else labels)
        return F.silu(hidden)

    def run(self, block: Callable[..., Tensor], *states: Any) -> Tensor:
        """block(*states), computed again in the backward pass if the configuration asks for that."""
        if self.config.gradient_checkpointing and torch.is_grad_enabled():
            # the random state is restored, so that dropout drops the same units both times
            return checkpoint(block, *states, use_reentrant=False, preserve_rng_state=True)
        return block(*states)

    def check(self, x_t: Tensor, t: Tensor, labels: Tensor | None) -> None:
        """Raises ValueError naming the argument whose shape, dtype or range is wrong.

        Whether x_t is finite is not asked: within a sampler's loop a NaN in x_t is what the network itself said.
        """
        check_floating("x_t", x_t)
        config = self.config
        expected = (config.in_channels, config.image_size, config.image_size)
        if x_t.dim() != 4 or tuple(x_t.shape[1:]) != expected:
            raise ValueError(
                f"x_t: must have the shape [B, {', '.join(map(str, expected))}], got {list(x_t.shape)}"
            )
        dtype = self.time_dense_0.weight.dtype
        if x_t.dtype != dtype and not torch.is_autocast_enabled(x_t.device.type):
            raise ValueError(f"x_t: must have the weights' dtype {dtype}, got {x_t.dtype}")
        if config.conditioning == "timestep":
            check_index(t, "t")
        else:
            _check_log_snr(t)
        name = "t" if config.conditioning == "timestep" else "log_snr"
        _check_batch(name, t, x_t)
        if labels is not None:
            self._check_labels(labels, x_t)

    def _check_labels(self, labels: Tensor, x_t: Tensor) -> None:
        num_classes = self.config.num_classes
        if num_classes is None:
            raise ValueError("labels: must be None, since the network has no num_classes")
        check_index(labels, "labels")
        _check_batch("labels", labels, x_t)
        # elsewhere the look-up has a check of its own
        if labels.numel() and values_are_at_hand(labels):
            low, high = (int(value) for value in torch.aminmax(labels))
            if low < 0 or high > num_classes:
                wrong = low if low < 0 else high
                raise ValueError(
                    f"labels: must lie in 0..{num_classes} ({num_classes} means none), got {wrong}"
                )


def timestep_embedding(t: Tensor, channels: int) -> Tensor:
    """t `[B]` to float32 `[B, channels]`: [sin(t·f_i), cos(t·f_i)], f_i = 10000^(−i/(channels/2 − 1)).

    Raises ValueError naming t if it is no tensor `[B]`, and channels unless it is even and at least 4.
    """
    check_tensor("t", t)
    if t.dim() != 1:
        raise ValueError(f"t: must have the shape [B], got {list(t.shape)}")
    require(
        isinstance(channels, int) and channels >= 4 and channels % 2 == 0,
        "channels",
        "even and at least 4",
        channels,
    )
    half = channels // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.to(torch.float32)[:, None] * torch.exp(steps * (-math.log(_MAX_PERIOD) / (half - 1)))[None, :]
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def log_snr_embedding(log_snr: Tensor, channels: int) -> Tensor:
    """λ = ln(ᾱ/(1 − ᾱ)) `[B]`, ±∞ included, to float32 `[B, channels]`: timestep_embedding of τ(λ).

    τ = 1000·sigmoid(−λ/4) rises with the noise from 0 (λ = ∞, no noise) to 1000 (λ = −∞, noise alone), as t
    does over a thousand steps, so that the frequencies made for t serve it. It is bounded, hence defined at both
    ends, and strictly monotone, hence loses nothing. Divided by 4, λ still moves τ by 17 a unit at |λ| = 10,
    where the paper's linear schedule ends, and by 1.7 at |λ| = 20, where the cosine one does; that
    schedule's own time, (2/π)·atan(e^(−λ/2)), would move by 0.015 there on the same scale, which the highest
    frequency, 1, does not see.
    """
    return timestep_embedding(
        _NOISE_LEVELS * torch.sigmoid(log_snr.to(torch.float32) / -_LOG_SNR_WIDTH), channels
    )


def _check_batch(name: str, values: Tensor, x_t: Tensor) -> None:
    if values.shape[0] != x_t.shape[0]:
        raise ValueError(
            f"{name}: must have one entry a sample, got {values.shape[0]} for a batch {list(x_t.shape)}"
        )


def _check_log_snr(log_snr: Tensor) -> None:
    check_floating("log_snr", log_snr)
    if log_snr.dim() != 1:
        raise ValueError(f"log_snr: must have the shape [B], got {list(log_snr.shape)}")
    if values_are_at_hand(log_snr) and bool(log_snr.isnan().any()):
        raise ValueError("log_snr: must be a number or ±inf, got nan")
