"""Processes, images and networks on which the objectives are tested."""

import math

import torch
from torch import Tensor

from ddpm_core import LinearGaussianProcess, ObjectiveConfig, PredictionType, Schedule, ScheduleConfig
from ddpm_core.objectives import Weighting

LINEAR = Schedule.from_config(ScheduleConfig())
SHORT = Schedule.from_config(ScheduleConfig(num_timesteps=20, beta_start=0.005, beta_end=0.7))
NO_SIGNAL = Schedule(torch.cat((torch.linspace(1e-4, 0.1, 50, dtype=torch.float64), torch.ones(1).double())))
_RISING = torch.linspace(0.01, 1.0, 60, dtype=torch.float64)
EXPLODING = LinearGaussianProcess(torch.zeros(60), torch.linspace(math.log(0.01), math.log(50.0), 60))
STRAIGHT = LinearGaussianProcess(torch.log1p(-_RISING), _RISING.log())
PROCESSES = {
    "linear": LINEAR,
    "short": SHORT,
    "no signal": NO_SIGNAL,
    "exploding": EXPLODING,
    "straight": STRAIGHT,
}
TYPES: tuple[PredictionType, ...] = ("eps", "x_start", "v")
WEIGHTINGS: tuple[Weighting, ...] = ("uniform", "snr", "min_snr", "p2")
HYBRID = ObjectiveConfig(loss="hybrid", variance_type="learned_range")
LEVELS = 17


def images(batch: int, channels: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Images on 17 levels, both ends among them, and their noise."""
    generator = torch.Generator().manual_seed(1)
    shape = (batch, channels, 2, 2)
    x_start = torch.randint(LEVELS, shape, generator=generator) / 8.0 - 1.0
    return x_start.to(dtype), torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def some_network(x_t: Tensor, t: Tensor) -> Tensor:
    return 0.6 * x_t + 0.01 * t.to(x_t.dtype).reshape(-1, 1, 1, 1) * x_t.square()


def wide_network(x_t: Tensor, t: Tensor) -> Tensor:
    return torch.cat((some_network(x_t, t), torch.tanh(x_t)), dim=1)


def ends(process: LinearGaussianProcess) -> Tensor:
    last = process.num_timesteps - 1
    return torch.tensor([0, 1, last // 2, last - 1, last])


def trains(process: LinearGaussianProcess, prediction_type: PredictionType) -> bool:
    return prediction_type != "eps" or not process.ends_without_signal
