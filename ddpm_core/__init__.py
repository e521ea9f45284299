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
from ddpm_core.chains import karras_log_snr, log_snr_chain, nearest_timesteps, retimed
from ddpm_core.ema import EMA, ema_decay
from ddpm_core.guidance import guided
from ddpm_core.objectives import draw_timesteps, simple_loss
from ddpm_core.predictions import (
    PredictionType,
    predict_eps,
    predict_v,
    predict_x_start,
    prediction_target,
)
from ddpm_core.process import LinearGaussianProcess, q_posterior, q_sample
from ddpm_core.reverse import Prediction, ReverseProcess
from ddpm_core.samplers import (
    SamplerConfig,
    TrajectoryStep,
    denoise_step,
    sample,
    sampling_timesteps,
    trajectory,
    visited_timesteps,
)
from ddpm_core.schedules import Schedule, ScheduleConfig, respace
from ddpm_core.types import EpsTheta, VarianceType
from ddpm_core.unet import UNet, UNetConfig

__all__ = [
    "BoundAccumulator",
    "BoundEstimate",
    "EMA",
    "EpsTheta",
    "LinearGaussianProcess",
    "Prediction",
    "PredictionType",
    "ReverseProcess",
    "Schedule",
    "ScheduleConfig",
    "SamplerConfig",
    "TrajectoryStep",
    "UNet",
    "UNetConfig",
    "VarianceType",
    "bound_term",
    "denoise_step",
    "discretized_gaussian_log_likelihood",
    "draw_timesteps",
    "ema_decay",
    "guided",
    "karras_log_snr",
    "log_snr_chain",
    "nearest_timesteps",
    "predict_eps",
    "predict_v",
    "predict_x_start",
    "prediction_target",
    "prior_term",
    "q_posterior",
    "q_sample",
    "respace",
    "retimed",
    "sample",
    "sampling_timesteps",
    "simple_loss",
    "trajectory",
    "visited_timesteps",
]
