"""Denoising diffusion probabilistic models (Ho et al. 2020, arXiv:2006.11239): the mathematics.

No I/O, no logging, no environment; imports torch and the standard library alone.
"""

from ddpm_core._units import Unit
from ddpm_core.bound import (
    BoundAccumulator,
    BoundEstimate,
    Decomposition,
    TermsPerT,
    bound_term,
    prior_term,
    reverse_of_sampler,
)
from ddpm_core.chains import karras_log_snr, nearest_timesteps, retimed
from ddpm_core.conditioning import NetworkConfig
from ddpm_core.curve import Curve, MeasuredCurve, snr_integral
from ddpm_core.decoder import discretized_gaussian_log_likelihood
from ddpm_core.diffusers_weights import (
    state_from_diffusers,
    state_to_diffusers,
    unet_from_diffusers,
    unet_to_diffusers,
)
from ddpm_core.dit import DiT, DiTConfig
from ddpm_core.ema import EMA, HalfLife, ema_decay
from ddpm_core.guidance import guided
from ddpm_core.hierarchy import (
    DiffusionChain,
    GaussianHierarchy,
    PathTerms,
    generate_path,
    path_bound,
    path_terms,
)
from ddpm_core.ledger import CurveBound, Ledger, bound_from_curve, bound_ledger, consistency_terms
from ddpm_core.networks import as_eps_theta, build_network
from ddpm_core.objectives import (
    ObjectiveConfig,
    drop_labels,
    loss_weights,
    simple_loss,
    training_loss,
)
from ddpm_core.paths import (
    log_p_path,
    log_q_backward,
    log_q_forward,
    q_sample_all,
    q_step,
    q_trajectory,
)
from ddpm_core.posthoc_ema import PowerEMA, Profile, Snapshot, combine_profiles, combine_tensors, reconstruct
from ddpm_core.predictions import (
    PredictionType,
    convert_prediction,
    predict_eps,
    predict_v,
    predict_x_start,
    prediction_target,
)
from ddpm_core.process import LinearGaussianProcess, q_posterior, q_sample
from ddpm_core.processes import (
    process_at,
    process_from_coefficients,
    process_from_log_snr,
    rectified_flow,
    sub_variance_preserving,
    variance_exploding,
)
from ddpm_core.respacing import respaced_timesteps
from ddpm_core.reverse import Prediction, ReverseProcess
from ddpm_core.samplers import (
    SamplerConfig,
    TrajectoryStep,
    denoise_step,
    sample,
    trajectory,
    visited_timesteps,
)
from ddpm_core.schedules import (
    Schedule,
    ScheduleConfig,
    ScheduleReport,
    rescale_zero_terminal_snr,
)
from ddpm_core.timesteps import LossMoments, draw_timesteps
from ddpm_core.two_sided import two_sided_prior_term, two_sided_shift, two_sided_term
from ddpm_core.types import EpsTheta, VarianceType
from ddpm_core.unet import UNet, UNetConfig

__all__ = [
    "BoundAccumulator",
    "BoundEstimate",
    "Curve",
    "CurveBound",
    "Decomposition",
    "DiT",
    "DiTConfig",
    "DiffusionChain",
    "EMA",
    "EpsTheta",
    "GaussianHierarchy",
    "HalfLife",
    "Ledger",
    "LinearGaussianProcess",
    "LossMoments",
    "MeasuredCurve",
    "ObjectiveConfig",
    "PathTerms",
    "PowerEMA",
    "Prediction",
    "PredictionType",
    "Profile",
    "ReverseProcess",
    "SamplerConfig",
    "NetworkConfig",
    "Schedule",
    "ScheduleConfig",
    "ScheduleReport",
    "Snapshot",
    "TermsPerT",
    "TrajectoryStep",
    "UNet",
    "UNetConfig",
    "Unit",
    "VarianceType",
    "as_eps_theta",
    "bound_from_curve",
    "bound_ledger",
    "bound_term",
    "build_network",
    "combine_profiles",
    "combine_tensors",
    "consistency_terms",
    "convert_prediction",
    "denoise_step",
    "discretized_gaussian_log_likelihood",
    "draw_timesteps",
    "drop_labels",
    "ema_decay",
    "generate_path",
    "guided",
    "log_p_path",
    "log_q_backward",
    "log_q_forward",
    "loss_weights",
    "path_bound",
    "path_terms",
    "karras_log_snr",
    "nearest_timesteps",
    "predict_eps",
    "predict_v",
    "predict_x_start",
    "prediction_target",
    "prior_term",
    "process_at",
    "process_from_coefficients",
    "process_from_log_snr",
    "q_posterior",
    "q_sample",
    "q_sample_all",
    "q_step",
    "q_trajectory",
    "reconstruct",
    "rectified_flow",
    "rescale_zero_terminal_snr",
    "respaced_timesteps",
    "reverse_of_sampler",
    "retimed",
    "sample",
    "simple_loss",
    "snr_integral",
    "state_from_diffusers",
    "state_to_diffusers",
    "sub_variance_preserving",
    "training_loss",
    "trajectory",
    "two_sided_prior_term",
    "two_sided_shift",
    "two_sided_term",
    "unet_from_diffusers",
    "unet_to_diffusers",
    "variance_exploding",
    "visited_timesteps",
]
