"""Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598)."""

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from ddpm_core._checks import check_index, require, require_int, require_number
from ddpm_core.types import EpsTheta

ConditionalNetwork: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""ε_θ(x_t, t, label): an `EpsTheta` with a third argument, int64 `[B]`."""


def guided(network: ConditionalNetwork, labels: Tensor, null_label: int, scale: float) -> EpsTheta:
    """ε_θ(x_t, t) = ε(x_t, t, ∅) + scale·(ε(x_t, t, label) − ε(x_t, t, ∅)), from one batch of 2·B.

    labels: int64 `[B]`, those of the batch that will be asked for. null_label: the label ∅ for "no class" (the
    network's num_classes). scale: 1 is the conditional network, 0 the unconditional one, above 1 exaggerates; it is
    1 + w for the w of the paper. The two are exact at 0 and 1.
    It may predict ε, x_0 or v: at one x_t each is an affine function of another, and the weights sum to 1, so that
    guidance of one is guidance of all (before x̂_0 is clipped). Where the output has twice the channels of x_t, the
    second half (a learned variance) is the conditional's.
    Raises ValueError naming the argument whose shape, dtype or range is wrong.
    """
    check_index(labels, "labels")
    require_int("null_label", null_label)
    require_number("scale", scale)
    require(math.isfinite(scale), "scale", "finite", scale)
    both_labels = torch.cat((labels, torch.full_like(labels, null_label)))

    def eps_theta(x_t: Tensor, t: Tensor) -> Tensor:
        if x_t.shape[0] != labels.shape[0]:
            raise ValueError(
                f"labels: must have one entry a sample, got {labels.shape[0]} for a batch {list(x_t.shape)}"
            )
        output = network(torch.cat((x_t, x_t)), torch.cat((t, t)), both_labels)
        conditional, unconditional = output.chunk(2)
        channels = x_t.shape[1]
        # lerp, unlike the sum above, gives back its ends to the bit
        prediction = torch.lerp(unconditional[:, :channels], conditional[:, :channels], scale)
        return torch.cat((prediction, conditional[:, channels:]), dim=1)

    return eps_theta
