"""The bound in its two-sided form: each term compares one step of q with the opposite step of p_θ.

−ELBO = E[−ln p_θ(x_0|x_1)] + Σ_t C_t + E ln[q(x_T|x_{T−1})/p(x_T)],
C_t = E ln[q(x_t|x_{t−1}) / p_θ(x_t|x_{t+1})] with (x_{t−1}, x_t, x_{t+1}) from the joint q(·|x_0).

It has the same total as the KL form (`ddpm_core.bound`) and other terms: C_t is K_{t+1} and a constant
(`two_sided_shift`), and its estimate has a far larger variance, for the entropies of q are sampled and not known.
All three states come from one path. x_t given x_{t−1} alone, apart from x_{t+1}, is another distribution, and
wrong by about a nat a dimension in every step.
"""

import torch
from torch import Tensor

from ddpm_core._checks import check_batch, check_finite, check_floating, check_timesteps
from ddpm_core._units import LN_2, Unit, in_unit
from ddpm_core.process import LinearGaussianProcess, diffused
from ddpm_core.reverse import ReverseProcess
from ddpm_core.types import EpsTheta


def two_sided_term(
    eps_theta: EpsTheta,
    reverse: ReverseProcess,
    x_start: Tensor,
    t: Tensor,
    noise: Tensor,
    *,
    unit: Unit = "bits_per_dim",
) -> Tensor:
    """One draw of C_t for each sample, `[B]`: ln[q(x_t|x_{t−1}) / p_θ(x_t|x_{t+1})]. It may be negative.

    x_start `[B, ...]`; noise `[3, B, ...]`: the standard normal deviates of q(x_{t−1}|x_0), q(x_t|x_{t−1}) and
    q(x_{t+1}|x_t), in this order. t int64 `[B]` in 0..T−2, the state between the two: the network is asked at
    t + 1, and at t == 0 x_{t−1} is x_0 itself. float64 if x_start is, float32 otherwise. Differentiable.
    Raises ValueError naming the argument that is wrong (NaN and ±∞ are noticed on the CPU).
    """
    check_batch("x_start", x_start)
    check_finite("x_start", x_start)
    check_floating("noise", noise)
    if noise.shape != (3, *x_start.shape):
        raise ValueError(
            f"noise: must have the shape [3, *x_start.shape], {[3, *x_start.shape]}, got {list(noise.shape)}"
        )
    check_finite("noise", noise)
    return measured_two_sided_term(eps_theta, reverse, x_start, t, noise, unit=unit)[0]


def measured_two_sided_term(
    eps_theta: EpsTheta, reverse: ReverseProcess, x_start: Tensor, t: Tensor, noise: Tensor, *, unit: Unit
) -> tuple[Tensor, Tensor]:
    """`two_sided_term`, and the squared error of x̂_0 at t + 1 a dimension, `[B]`; for callers that have checked
    x_start and noise."""
    process = reverse.process
    check_timesteps(t, process.num_timesteps - 1, x_start)
    loss = process.snr_loss
    dtype = torch.float64 if x_start.dtype == torch.float64 else torch.float32
    before, middle, after = noise.to(dtype)
    like = middle

    # All in the coordinates of standard normal deviates: x_t = a·x_0 + b·at_t and x_{t+1} = a·x_0 + b·at_next. The
    # share of x_{t−1}'s variance that is in x_t is 1 − loss. x_t differs from the mean of q(x_t|x_{t+1}, x_0) by
    # √β̃·rest, where (at_next, rest) is (at_t, after) turned. So no two images are subtracted.
    kept, added = process.gather((1.0 - loss).sqrt(), t, like), process.gather(loss.sqrt(), t, like)
    at_t = kept * before + added * middle
    next_t = t + 1
    kept, added = process.gather((1.0 - loss).sqrt(), next_t, like), process.gather(loss.sqrt(), next_t, like)
    at_next, rest = kept * at_t + added * after, added * at_t - kept * after

    x_next = diffused(process, x_start, next_t, at_next.to(x_start.dtype))
    output = eps_theta(x_next, next_t)
    error = reverse.x_start_error(output, x_start, next_t, at_next)
    log_variance = reverse.log_variance(output, x_next.double(), next_t)
    half_log_ratio = 0.5 * (
        process.gather(process.posterior_variance.log(), next_t, log_variance) - log_variance
    )
    pull = process.gather(process.posterior_mean_coef1, next_t, log_variance) * torch.exp(-0.5 * log_variance)
    miss = torch.exp(half_log_ratio).to(dtype) * rest - pull.to(dtype) * error
    shift = process.gather(two_sided_shift(process), t, log_variance)
    nats = 0.5 * (miss.square() - middle.square()) + (shift - half_log_ratio).to(dtype)
    mse = error.square().flatten(1).mean(1)
    return in_unit(nats.flatten(1).mean(1), unit, x_start.shape[1:].numel()), mse


def two_sided_prior_term(
    process: LinearGaussianProcess, x_start: Tensor, *, unit: Unit = "bits_per_dim"
) -> Tensor:
    """E ln[q(x_T|x_{T−1}) / p(x_T)] given x_0, `[B]`, in closed form. Not near 0: L_T − ½·ln(β_T/(1 − ᾱ_T)).

    x_start `[B, ...]`. float64 if x_start is, float32 otherwise. Raises ValueError naming x_start.
    """
    nats = process.prior_bits_per_dim(x_start) * LN_2 + float(two_sided_shift(process)[-1])
    return in_unit(nats, unit, x_start.shape[1:].numel())


def two_sided_shift(process: LinearGaussianProcess) -> Tensor:
    """How far the two-sided terms exceed those of the KL form, float64 `[T]` in nats a dimension; they sum to 0.

    At t < T−1: C_t − K_{t+1} = ½·ln(β̃_{t+1}/β_t), β_t being the variance of q's step; the last: the prior terms'
    difference, ½·ln((1 − ᾱ_T)/β_T). For every linear-Gaussian process that is ½·ln(loss_{t+1}/loss_t), where loss_t
    = 1 − SNR_t/SNR_{t−1}, which is 1 at the first step, and after the last step counts as 1.
    """
    log_loss = process.snr_loss.log()
    return 0.5 * (torch.cat((log_loss[1:], log_loss.new_zeros(1))) - log_loss)
