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
from ddpm_core.ema import EMA, ema_decay
from ddpm_core.objectives import ObjectiveConfig, drop_labels, loss_weights, simple_loss, training_loss
from ddpm_core.predictions import (
    PredictionType,
    convert_prediction,
    predict_eps,
    predict_v,
    predict_x_start,
    prediction_target,
)
from ddpm_core.process import LinearGaussianProcess, q_posterior, q_sample
from ddpm_core.reverse import Prediction, ReverseProcess
from ddpm_core.samplers import SamplerConfig, TrajectoryStep, sample, sampling_timesteps, trajectory
from ddpm_core.schedules import Schedule, ScheduleConfig, respace
from ddpm_core.timesteps import LossMoments, draw_timesteps
from ddpm_core.types import EpsTheta, VarianceType
from ddpm_core.unet import UNet, UNetConfig

__all__ = [
    "BoundAccumulator",
    "BoundEstimate",
    "EMA",
    "EpsTheta",
    "LinearGaussianProcess",
    "LossMoments",
    "ObjectiveConfig",
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
    "convert_prediction",
    "discretized_gaussian_log_likelihood",
    "draw_timesteps",
    "drop_labels",
    "ema_decay",
    "loss_weights",
    "predict_eps",
    "predict_v",
    "predict_x_start",
    "prediction_target",
    "prior_term",
    "q_posterior",
    "q_sample",
    "respace",
    "sample",
    "sampling_timesteps",
    "simple_loss",
    "training_loss",
    "trajectory",
]
