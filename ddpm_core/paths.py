"""Whole paths x_0, x_1, ..., x_T of the forward process, and their log-densities in both directions.

A path is one tensor `[T, B, ...]`: path[t] is x_t in the zero-based sense, the data diffused by t + 1 steps.
The data x_0 stand apart as x_start `[B, ...]`; where a formula has x_{t−1} at t == 0, that is x_start.
"""

import torch
from torch import Tensor

from ddpm_core._checks import check_alike, check_finite, check_floating, check_numbers
from ddpm_core.decoder import gaussian_log_density
from ddpm_core.process import LinearGaussianProcess
from ddpm_core.reverse import ReverseProcess
from ddpm_core.types import EpsTheta


def q_step(process: LinearGaussianProcess, x_prev: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """One step of q: √(1 − β_t)·x_{t−1} + √β_t·ε for a `Schedule` (Eq. 2).

    In general x_t = step_scale·x_{t−1} + √step_variance·ε.

    x_prev, noise `[B, ...]`; t int64 `[B]`, zero-based: at t == 0 x_prev is the data. Returns `[B, ...]` in the
    dtype of x_prev. Raises ValueError naming the argument whose shape, dtype or range is wrong.
    """
    check_numbers("x_prev", x_prev)
    check_alike("noise", noise, "x_prev", x_prev)
    kept = process.gather(process.step_scale, t, x_prev)
    spread = process.gather(process.step_variance.sqrt(), t, x_prev)
    return kept * x_prev + spread * noise.to(x_prev.dtype)


def q_sample_all(process: LinearGaussianProcess, x_start: Tensor, noise: Tensor) -> Tensor:
    """x_t = a_t·x_0 + b_t·ε_t for every t at once (Eq. 4): `[T, B, ...]` in the dtype of x_start `[B, ...]`.

    noise `[T, B, ...]`. Each x_t has its own law q(x_t|x_0), but they are no path of the chain: `q_trajectory`
    makes one. Raises ValueError naming the argument whose shape or dtype is wrong.
    """
    check_numbers("x_start", x_start)
    _check_path("noise", noise, process, x_start)
    noise = noise.to(x_start.dtype)
    return _along(process.a, noise) * x_start + _along(process.b, noise) * noise


def q_trajectory(process: LinearGaussianProcess, x_start: Tensor, noises: Tensor) -> Tensor:
    """A path of the Markov chain, `[T, B, ...]`: `q_step` at every t, from x_start `[B, ...]` and noises `[T,
    B, ...]`.

    The steps are taken in float32 at least, since the rounding of T narrow steps would add up; the path comes
    in the dtype of x_start. Raises ValueError naming the argument whose shape or dtype is wrong.
    """
    check_numbers("x_start", x_start)
    _check_path("noises", noises, process, x_start)
    x_t = _wide(x_start)
    noises = noises.to(x_t.dtype)
    kept, spread = _along(process.step_scale, noises), _along(process.step_variance.sqrt(), noises)
    path = []
    for t in range(process.num_timesteps):
        x_t = kept[t] * x_t + spread[t] * noises[t]
        path.append(x_t)
    return torch.stack(path).to(x_start.dtype)


def log_q_forward(process: LinearGaussianProcess, x_start: Tensor, path: Tensor) -> Tensor:
    """ln q(x_1, ..., x_T|x_0) = Σ_t ln q(x_t|x_{t−1}), `[B]` in nats, summed over the dimensions.

    Add ln q(x_0) for the law of the whole path. x_start `[B, ...]`, path `[T, B, ...]`; computed in float64 if
    x_start is, float32 otherwise. Raises ValueError naming the argument whose shape or dtype is wrong.
    """
    x_start, path = _path_of(process, x_start, path)
    before = torch.cat((x_start[None], path[:-1]))
    mean = _along(process.step_scale, path) * before
    return _log_normal(path, mean, _along(process.step_variance.log(), path))


def log_q_backward(process: LinearGaussianProcess, x_start: Tensor, path: Tensor) -> Tensor:
    """The same law taken backwards: ln q(x_T|x_0) + Σ_{t≥1} ln q(x_{t−1}|x_t, x_0), `[B]` in nats.

    Equal to `log_q_forward` on every path. The sum ends at t == 1, whose x_{t−1} is path[0]: at t == 0 the
    factor is q(x_0|x_1, x_0), all mass at x_0, which is given. Arguments as in `log_q_forward`.
    """
    x_start, path = _path_of(process, x_start, path)
    last = _log_normal(
        path[-1:], _along(process.a[-1:], path) * x_start, _along(2.0 * process.log_b[-1:], path)
    )
    after, before = path[1:], path[:-1]
    mean = (
        _along(process.posterior_mean_coef1[1:], after) * x_start
        + _along(process.posterior_mean_coef2[1:], after) * after
    )
    log_variance = _along(process.posterior_variance[1:].log(), after)
    return last + _log_normal(before, mean, log_variance)


@torch.no_grad()
def log_p_path(eps_theta: EpsTheta, reverse: ReverseProcess, x_start: Tensor, path: Tensor) -> Tensor:
    """ln p_θ(x_0, ..., x_T) = ln p(x_T) + Σ_t ln p_θ(x_{t−1}|x_t), `[B]` in nats; p(x_T) = N(0, (a² + b²)·I).

    At t == 0 the factor is the density of x_0 under the last step's Gaussian, not the mass of a level, which is
    what `bound_term` has there. E_q[`log_q_forward` − `log_p_path`] is the bound with that density as the decoder.
    eps_theta is run at every t. Arguments as in `log_q_forward`; no gradients are kept.
    """
    process = reverse.process
    seen = path
    x_start, path = _path_of(process, x_start, path)
    log_total = process.total_variance[-1:].log()
    total = _log_normal(path[-1:], torch.zeros_like(path[-1:]), _along(log_total, path))
    for t in reversed(range(process.num_timesteps)):
        at = torch.full((x_start.shape[0],), t, dtype=torch.int64, device=path.device)
        output = eps_theta(seen[t], at).to(path.dtype)
        mean, log_variance = reverse.transition(output, path[t], at)
        before = path[t - 1] if t else x_start
        total = total + _log_normal(before[None], mean[None], log_variance[None])
    return total


def _log_normal(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Σ ln N(x; mean, e^{log_variance}) over a path's steps and dimensions: `[B]` of `[S, B, ...]`.

    log_variance broadcasts over x.
    """
    density = gaussian_log_density(x, mean, log_variance)
    return density.sum((0, *range(2, density.dim())))


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _along(table: Tensor, path: Tensor) -> Tensor:
    """A table `[T]` that broadcasts over a path `[T, B, ...]`, cast after every root and difference."""
    return table.to(path.dtype).to(path.device).reshape(-1, *[1] * (path.dim() - 1))


def _path_of(process: LinearGaussianProcess, x_start: Tensor, path: Tensor) -> tuple[Tensor, Tensor]:
    check_numbers("x_start", x_start)
    _check_path("path", path, process, x_start)
    x_start = _wide(x_start)
    return x_start, path.to(x_start.dtype)


def _check_path(name: str, path: Tensor, process: LinearGaussianProcess, x_start: Tensor) -> None:
    check_floating(name, path)
    must_be = [process.num_timesteps, *x_start.shape]
    if x_start.dim() < 1 or list(path.shape) != must_be:
        raise ValueError(
            f"{name}: must have the shape [T, *x_start.shape], {must_be}, got {list(path.shape)}"
        )
    check_finite(name, path)
