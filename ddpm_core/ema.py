"""Exponential moving average of a network's weights."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ddpm_core._checks import require


def ema_decay(decay: float, warmup: bool, step: int) -> float:
    """The decay at step (0 for the first update): min(decay, (1 + step)/(10 + step)) with warm-up."""
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


class EMA:
    """ema ← d·ema + (1 − d)·weight after each optimiser step, in float32; starts as a copy of the weights.

    `tensors` maps the names of model.state_dict() to the averages, on the model's device. Parameters are
    averaged in float32 whatever the model's dtype; buffers are state, not weights, and are copied.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool = False) -> None:
        require(0 <= decay < 1, "decay", "at least 0 and below 1", decay)
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

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the averages towards the model's weights. step counts updates from 0 and sets the warm-up."""
        weight = 1.0 - ema_decay(self.decay, self.warmup, step)
        source = model.state_dict()
        self._check_names(source)
        names = self._parameter_names
        averages = [self.tensors[name] for name in names]
        current = [source[name].detach().to(averages[i]) for i, name in enumerate(names)]
        torch._foreach_lerp_(averages, current, weight)
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
        """Take over the `tensors` of a checkpoint. Raises ValueError if names or shapes differ."""
        self._check_names(tensors)
        for name, tensor in self.tensors.items():
            if tensors[name].shape != tensor.shape:
                raise ValueError(
                    f"tensors[{name!r}]: must have the shape {list(tensor.shape)}, "
                    f"got {list(tensors[name].shape)}"
                )
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])

    def _check_names(self, names: Iterable[str]) -> None:
        given = set(names)
        if given != self.tensors.keys():
            different = sorted(given ^ self.tensors.keys())
            raise ValueError(
                f"tensors: must have the names of the averaged model, got a difference in {different[:3]}"
            )
