"""Training objectives (Algorithm 1)."""

import torch
from torch import Tensor

from ddpm_core import rng
from ddpm_core._checks import check_same_shape
from ddpm_core.process import LinearGaussianProcess, q_sample
from ddpm_core.types import EpsTheta


def simple_loss(
    eps_theta: EpsTheta, process: LinearGaussianProcess, x_start: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """L_simple (Eq. 14) for each sample: ‖ε − ε_θ(√ᾱ_t·x_0 + √(1−ᾱ_t)·ε, t)‖², averaged over the dimensions.

    x_start, noise `[B, C, H, W]`; t int64 `[B]` in 0..T−1. Returns `[B]`, float32 (float64 if x_start is), so
    that a network under autocast does not round the loss.

    Its Bayes floor moves with the schedule: do not compare its values between schedules.
    """
    x_t = q_sample(process, x_start, t, noise)
    eps_pred = eps_theta(x_t, t)
    check_same_shape("eps_theta's output", eps_pred, "x_t", x_t)
    dtype = torch.float64 if x_start.dtype == torch.float64 else torch.float32
    return (noise.to(dtype) - eps_pred.to(dtype)).square().flatten(1).mean(1)


def draw_timesteps(process: LinearGaussianProcess, seed: int, index: Tensor) -> Tensor:
    """t ~ Uniform{0, ..., T−1}, int64 `[B]`, a function of (seed, index) alone (Algorithm 1, line 3)."""
    return rng.integers(seed, "timestep", index, process.num_timesteps)
