"""Exponential moving average of a network's weights, its length a decay or a half-life in images."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddpm_core._checks import (
    check_finite,
    check_floating,
    check_tensor,
    require,
    require_int,
    require_number,
)


def ema_decay(decay: float, warmup: bool, step: int) -> float:
    """The decay at step (0 for the first update): min(decay, (1 + step)/(10 + step)) with warm-up.

    decay: 0 <= decay < 1. Raises ValueError naming the argument that is out of range.
    """
    _check_decay(decay)
    require_int("step", step, 0)
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


@dataclass(frozen=True)
class HalfLife:
    """An average's length as the number of images after which a weight's share has halved.

    Unlike a decay it means the same at every batch size. decay(step) = ½^(batch_size / h), where
    h = min(images, ramp_ratio · images seen before this step) and images seen = step · batch_size (Karras et
    al. 2022, arXiv:2206.00364, whose runs have images = 500 000 and ramp_ratio = 0.05); without a ramp_ratio
    h = images. With a ramp the first update's decay is 0: nothing of the random initialisation stays.
    Raises ValueError naming the field that is out of range.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 (read by pydantic, not a field)

    images: float
    batch_size: int
    ramp_ratio: float | None = None

    def __post_init__(self) -> None:
        require_number("images", self.images)
        require_number("ramp_ratio", self.ramp_ratio, none="None")
        require(self.images > 0 and math.isfinite(self.images), "images", "positive and finite", self.images)
        require_int("batch_size", self.batch_size, 1)
        ramp = self.ramp_ratio
        require(
            ramp is None or (ramp > 0 and math.isfinite(ramp)),
            "ramp_ratio",
            "positive and finite or None",
            ramp,
        )

    def decay(self, step: int) -> float:
        """The decay at step (0 for the first update). Raises ValueError for a negative step."""
        require_int("step", step, 0)
        half_life = self.images
        if self.ramp_ratio is not None:
            half_life = min(half_life, self.ramp_ratio * step * self.batch_size)
        return 0.5 ** (self.batch_size / half_life) if half_life > 0 else 0.0


class EMA:
    """ema ← d·ema + (1 − d)·weight after each optimiser step, in float32; starts as a copy of the weights.

    decay: 0 <= d < 1, or a HalfLife that gives d at each step. warmup (for a number alone) bounds d by
    (1 + step)/(10 + step).

    `tensors` maps the names of model.state_dict() to the averages, on the model's device. Parameters are
    averaged in float32 whatever the model's dtype; buffers are state, not weights, and are copied.
    """

    def __init__(self, model: nn.Module, decay: float | HalfLife, warmup: bool = False) -> None:
        if isinstance(decay, HalfLife):
            require(not warmup, "warmup", "False with a half-life, which has ramp_ratio for this", warmup)
        else:
            _check_decay(decay)
        self.decay = decay
        self.warmup = warmup
        self._parameter_names = tuple(name for name, _ in model.named_parameters())
        parameters = set(self._parameter_names)
        self.tensors: dict[str, Tensor] = {
            name: tensor.detach().to(torch.float32, copy=True)
            if name in parameters
            else tensor.detach().clone()
            for name, tensor in model.state_dict().items()
        }

    def decay_at(self, step: int) -> float:
        """The share of the old average that the update of step keeps."""
        if isinstance(self.decay, HalfLife):
            return self.decay.decay(step)
        return ema_decay(self.decay, self.warmup, step)

    def update(self, model: nn.Module, step: int) -> None:
        """Move the averages towards the model's weights. step counts updates from 0 and sets the decay."""
        self.move(model, 1.0 - self.decay_at(step))

    @torch.no_grad()
    def move(self, model: nn.Module, share: float) -> None:
        """ema ← (1 − share)·ema + share·weight, whatever the decay; 0 <= share <= 1."""
        source = model.state_dict()
        self._check_names(source)
        names = self._parameter_names
        averages = [self.tensors[name] for name in names]
        current = [source[name].detach().to(averages[i]) for i, name in enumerate(names)]
        torch._foreach_lerp_(averages, current, share)
        for name in self.tensors.keys() - set(names):
            self.tensors[name].copy_(source[name])

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Write the averages into the model, in the model's dtype."""
        target = model.state_dict()
        self._check_names(target)
        for name, tensor in self.tensors.items():
            target[name].copy_(tensor)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the `tensors` of a checkpoint.

        Raises ValueError if names or shapes differ, or if an average, other than a buffer's copy, is not finite.
        """
        self._check_names(tensors)
        for name, tensor in self.tensors.items():
            check_tensor(f"tensors[{name!r}]", tensors[name])
            if tensors[name].shape != tensor.shape:
                raise ValueError(
                    f"tensors[{name!r}]: must have the shape {list(tensor.shape)}, "
                    f"got {list(tensors[name].shape)}"
                )
        for name in self._parameter_names:
            check_floating(f"tensors[{name!r}]", tensors[name])
            check_finite(f"tensors[{name!r}]", tensors[name])
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])

    def _check_names(self, names: Iterable[str]) -> None:
        given = set(names)
        if given != self.tensors.keys():
            different = sorted(given ^ self.tensors.keys())
            raise ValueError(
                f"tensors: must have the names of the averaged model, got a difference in {different[:3]}"
            )


def _check_decay(decay: float) -> None:
    require_number("decay", decay)
    require(0 <= decay < 1, "decay", "at least 0 and below 1", decay)
