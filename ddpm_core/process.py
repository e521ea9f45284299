"""The forward process q and the relations between x_0, x_t and ε (Ho et al. 2020, section 2)."""

from torch import Tensor

from ddpm_core._checks import check_floating, check_same_shape
from ddpm_core.schedules import Schedule


def q_sample(schedule: Schedule, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · ε (Eq. 4).

    x_start, noise `[B, ...]`; t int64 `[B]`, zero-based. Returns `[B, ...]` in the dtype of x_start.
    Raises ValueError naming the argument whose shape, dtype or range is wrong.
    """
    check_floating("x_start", x_start)
    check_same_shape("noise", noise, "x_start", x_start)
    signal = schedule.gather(schedule.sqrt_alphas_cumprod, t, x_start)
    spread = schedule.gather(schedule.sqrt_one_minus_alphas_cumprod, t, x_start)
    return signal * x_start + spread * noise.to(x_start.dtype)


def q_posterior(schedule: Schedule, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q(x_{t−1} | x_t, x_0): mean μ̃_t `[B, ...]`, variance β̃_t and its logarithm `[B, 1, ...]` (Eq. 6, 7).

    At t == 0 the mean is x_0 and the variance 0; the logarithm is clipped there to index 1's.
    """
    check_floating("x_start", x_start)
    check_same_shape("x_t", x_t, "x_start", x_start)
    mean = (
        schedule.gather(schedule.posterior_mean_coef1, t, x_start) * x_start
        + schedule.gather(schedule.posterior_mean_coef2, t, x_start) * x_t
    )
    variance = schedule.gather(schedule.posterior_variance, t, x_start)
    log_variance = schedule.gather(schedule.posterior_log_variance_clipped, t, x_start)
    return mean, variance, log_variance


def predict_x_start(schedule: Schedule, x_t: Tensor, t: Tensor, eps_pred: Tensor) -> Tensor:
    """x̂_0 = (x_t − √(1 − ᾱ_t) · ε_θ) / √ᾱ_t, Eq. 4 solved for x_0. Not clipped. Shapes as in q_sample."""
    check_floating("x_t", x_t)
    check_same_shape("eps_pred", eps_pred, "x_t", x_t)
    scale = schedule.gather(schedule.sqrt_recip_alphas_cumprod, t, x_t)
    spread = schedule.gather(schedule.sqrt_recipm1_alphas_cumprod, t, x_t)
    return scale * x_t - spread * eps_pred.to(x_t.dtype)


def predict_eps(schedule: Schedule, x_t: Tensor, t: Tensor, pred_x_start: Tensor) -> Tensor:
    """ε = (x_t − √ᾱ_t · x̂_0) / √(1 − ᾱ_t), Eq. 4 solved for ε. Shapes as in q_sample."""
    check_floating("x_t", x_t)
    check_same_shape("pred_x_start", pred_x_start, "x_t", x_t)
    signal = schedule.gather(schedule.sqrt_alphas_cumprod, t, x_t)
    spread = schedule.gather(schedule.sqrt_one_minus_alphas_cumprod, t, x_t)
    return (x_t - signal * pred_x_start) / spread
