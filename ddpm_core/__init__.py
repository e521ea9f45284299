"""Denoising diffusion probabilistic models (Ho et al. 2020, arXiv:2006.11239): the mathematics.

No I/O, no logging, no environment; imports torch and the standard library alone.
"""

from ddpm_core.bound import (
    BoundAccumulator,
    BoundEstimate,
    bound_term,
    discretized_gaussian_log_likelihood,
    prior_term,
)
from ddpm_core.conditioning import NetworkConfig
from ddpm_core.dit import DiT, DiTConfig
from ddpm_core.ema import EMA, ema_decay
from ddpm_core.networks import as_eps_theta, build_network
from ddpm_core.objectives import draw_timesteps, simple_loss
from ddpm_core.process import predict_eps, predict_x_start, q_posterior, q_sample
from ddpm_core.samplers import SamplerConfig, TrajectoryStep, sample, sampling_timesteps, trajectory
from ddpm_core.schedules import Schedule, ScheduleConfig, respace
from ddpm_core.types import EpsTheta, VarianceType
from ddpm_core.unet import UNet, UNetConfig

__all__ = [
    "BoundAccumulator",
    "BoundEstimate",
    "DiT",
    "DiTConfig",
    "EMA",
    "EpsTheta",
    "NetworkConfig",
    "Schedule",
    "ScheduleConfig",
    "SamplerConfig",
    "TrajectoryStep",
    "UNet",
    "UNetConfig",
    "VarianceType",
    "as_eps_theta",
    "bound_term",
    "build_network",
    "discretized_gaussian_log_likelihood",
    "draw_timesteps",
    "ema_decay",
    "predict_eps",
    "predict_x_start",
    "prior_term",
    "q_posterior",
    "q_sample",
    "respace",
    "sample",
    "sampling_timesteps",
    "simple_loss",
    "trajectory",
]
