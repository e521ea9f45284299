"""What an example of a public call is, and the networks and tensors that the examples share."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

import ddpm_core as core
from ddpm_core import LinearGaussianProcess

LEVELS = 9
BATCH = 3
SHAPE = (2, 4, 4)

Results = Literal["like", "wide", "float64", "integer"]

NETWORK_SAYS = "what a network said: its NaN is to be found in the result"
INNER_STEP = "an inner step of path_bound and path_terms, which look at the path"


@dataclass(frozen=True)
class Example:
    """call(**tensors) and what is said of it.

    batch: the batch dimension of each tensor that has one; out_batch that of each result (None: it has none).
    results: their dtype: "like" the first floating tensor, "wide" float64 for float64 and float32 otherwise.
    num_t: how many values t may have. nan: tensors whose NaN is no error, and why. inf: likewise ±∞ alone.
    whole: tensors that may be integers, and why. shapes: those of which another shape is no error, and why.
    loose: what a tolerance is multiplied by.
    """

    call: Callable[..., Any]
    tensors: Mapping[str, Tensor]
    batch: Mapping[str, int] = field(default_factory=dict)
    out_batch: tuple[int | None, ...] = (0,)
    results: Results | tuple[Results, ...] = "like"
    num_t: int | None = None
    nan: Mapping[str, str] = field(default_factory=dict)
    inf: Mapping[str, str] = field(default_factory=dict)
    whole: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, str] = field(default_factory=dict)
    loose: float = 1.0

    def run(self, **changed: Tensor) -> list[Tensor]:
        """The results in one flat list."""
        return flat(self.call(**{**self.tensors, **changed}))


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, int | float):
        return [torch.tensor(value, dtype=torch.float64)]
    return [tensor for part in value for tensor in flat(part)]


def network(x_t: Tensor, t: Tensor) -> Tensor:
    slope = (0.2 + 0.01 * t.to(x_t.dtype)).clamp(max=0.9).reshape(-1, *[1] * (x_t.dim() - 1))
    return slope * x_t + 0.1 * torch.tanh(x_t)


def wide_network(x_t: Tensor, t: Tensor) -> Tensor:
    return torch.cat((network(x_t, t), torch.tanh(x_t)), dim=1)


def labelled_network(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    return network(x_t, t) + 0.1 * labels.to(x_t.dtype).reshape(-1, *[1] * (x_t.dim() - 1))


def awake(net: nn.Module) -> nn.Module:
    """float64, in eval mode, with no weight left at zero."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return net.double().eval()


def in_dtype_of(net: nn.Module, *, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    is_number = isinstance(x_t, Tensor) and x_t.is_floating_point()
    dtype = x_t.dtype if is_number else torch.float64
    with torch.no_grad():
        return deepcopy(net).to(dtype)(x_t, t, labels)


class Given:
    """The tensors that examples share, for one process."""

    def __init__(self, process: LinearGaussianProcess) -> None:
        generator = torch.Generator().manual_seed(0)
        total = process.num_timesteps
        self.x = torch.randint(LEVELS, (BATCH, *SHAPE), generator=generator) * (2.0 / (LEVELS - 1)) - 1.0
        self.x = self.x.double()
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        self.noise, self.other = draw(BATCH, *SHAPE), draw(BATCH, *SHAPE)
        self.noises = draw(total, BATCH, *SHAPE)
        self.three = draw(3, BATCH, *SHAPE)
        self.t = torch.tensor([0, total // 2, total - 1])
        self.index = torch.tensor([5, 2**40, 7])
        self.labels = torch.tensor([1, 0, 3])
        self.mse = torch.linspace(0.1, 0.3, total, dtype=torch.float64)
        self.x_t = core.q_sample(process, self.x, self.t, self.noise)
        self.path = core.q_trajectory(process, self.x, self.noises)
