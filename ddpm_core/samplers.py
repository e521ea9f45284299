"""Samplers: Algorithm 2 of Ho et al. 2020, and DDIM (Song et al. 2021, arXiv:2010.02502), whole or respaced.

One pure function computes one step; a generator drives the loop; the noise of image i is a function of
(seed, i), so that an image does not depend on the batch or the worker that makes it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ddpm_core import rng
from ddpm_core._checks import check_index, check_same_shape, require
from ddpm_core.predictions import PredictionType
from ddpm_core.process import LinearGaussianProcess, q_posterior, shifted
from ddpm_core.reverse import ReverseProcess, check_variance_type
from ddpm_core.types import EpsTheta, VarianceType


@dataclass(frozen=True)
class SamplerConfig:
    """Which sampler.

    kind: "ancestral" is Algorithm 2, "ddim" is Song et al. Eq. 12. num_steps: how many of the T timesteps are
    visited; None means all. eta: DDIM's noise, 0 (none) to 1 (that of ancestral fixed_small).
    variance_type: ancestral's σ_t². clip: limit x̂_0 to [−1, 1] in each step. eta and variance_type are ignored
    by the other kind.
    Raises ValueError naming the field that is out of range.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 (read by pydantic, not a field)

    kind: Literal["ancestral", "ddim"] = "ddim"
    num_steps: int | None = 50
    eta: float = 0.0
    variance_type: VarianceType = "fixed_large"
    clip: bool = True

    def __post_init__(self) -> None:
        require(self.kind in ("ancestral", "ddim"), "kind", "'ancestral' or 'ddim'", self.kind)
        require(
            self.num_steps is None or self.num_steps >= 1, "num_steps", "at least 1 or null", self.num_steps
        )
        require(0 <= self.eta <= 1, "eta", "between 0 and 1", self.eta)
        check_variance_type(self.variance_type)


class TrajectoryStep(NamedTuple):
    """One visited timestep: t, the state x_t `[B, C, H, W]`, and x̂_0 as the network sees it from there."""

    t: int
    x_t: Tensor
    pred_x_start: Tensor


def sampling_timesteps(num_timesteps: int, num_steps: int | None) -> Tensor:
    """The visited timesteps, int64 `[num_steps]`, increasing: evenly spaced from 0 to T−1, both included.

    T−1 is included because x_T ~ N(0, I) is the state at T−1 and at no other timestep, and 0 because the
    image's finest detail is decided there. With one step it is T−1 alone.
    Raises ValueError if num_steps is not in 1..T.
    """
    steps = num_timesteps if num_steps is None else num_steps
    require(
        1 <= steps <= num_timesteps,
        "num_steps",
        f"in 1..{num_timesteps} (the schedule's num_timesteps)",
        num_steps,
    )
    if steps == 1:
        return torch.tensor([num_timesteps - 1])
    # Integer arithmetic for round(i·(T−1)/(S−1)): linspace in floating point may differ between devices.
    position = torch.arange(steps)
    return (2 * position * (num_timesteps - 1) + steps - 1) // (2 * (steps - 1))


def denoise_step(
    reverse: ReverseProcess,
    config: SamplerConfig,
    x_t: Tensor,
    t: Tensor,
    output: Tensor,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One step t → t−1 of the given (perhaps respaced) chain. Returns (x_{t−1}, x̂_0), each like x_t.

    ancestral: x_{t−1} = μ̃_t(x_t, x̂_0) + σ_t·z (Algorithm 2, line 4), σ_t of `reverse`.
    ddim: x_{t−1} = a_{t−1}·x̂_0 + √(b²_{t−1} − σ²)·ε̂ + σ·z with σ² = η²·β̃_t, where ε̂ is taken from the
    clipped x̂_0, so that the two always fit x_t.
    At t == 0 no noise is added and x_{t−1} is x̂_0. t int64 `[B]`; noise z like x_t, None for z = 0.
    """
    process = reverse.process
    pred_x_start, eps = reverse.predict(output, x_t, t)
    if config.kind == "ancestral":
        mean, _, _ = q_posterior(process, pred_x_start, x_t, t)
        sigma = (0.5 * reverse.log_variance(output, x_t, t)).exp().to(x_t.dtype)
    else:
        # b²_{t−1} − σ² = b²_{t−1}·(1 − η²·(1 − SNR_t/SNR_{t−1})), which cannot round below zero
        direction = shifted(process.b, 0.0) * (1.0 - config.eta**2 * process.snr_loss).clamp(min=0.0).sqrt()
        mean = process.gather(shifted(process.a, 1.0), t, x_t) * pred_x_start
        mean = mean + process.gather(direction, t, x_t) * eps
        sigma = process.gather(config.eta * process.posterior_variance.sqrt(), t, x_t)
    if noise is None:
        return mean, pred_x_start
    check_same_shape("noise", noise, "x_t", x_t)
    above_zero = (t > 0).to(x_t).reshape(-1, *[1] * (x_t.dim() - 1))
    return mean + above_zero * sigma * noise, pred_x_start


def trajectory(
    eps_theta: EpsTheta,
    process: LinearGaussianProcess,
    config: SamplerConfig,
    *,
    seed: int,
    index: Tensor,
    shape: tuple[int, int, int],
    prediction_type: PredictionType = "eps",
    x_start_mse: Tensor | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Iterator[TrajectoryStep]:
    """The way from noise to image: a TrajectoryStep for each visited timestep, from T−1 down.

    The last one's pred_x_start is the image, since the last step adds no noise and its mean is x̂_0.
    prediction_type: what the network predicts. x_start_mse: float64 `[T]`, for the variance type "analytic".
    index: int64 `[B]`, the images' numbers, which with seed decide all noise: x_T by draw 0, the noise of the
    step that leaves timestep t by draw t + 1. shape: (C, H, W). device: where states live (index.device if
    None). Noise is computed on index.device. Run the network in eval mode; no gradients are kept.
    """
    check_index(index)
    device = index.device if device is None else torch.device(device)
    timesteps = sampling_timesteps(process.num_timesteps, config.num_steps)
    is_whole = len(timesteps) == process.num_timesteps
    chain = (process if is_whole else process.at(timesteps)).to(device)
    reverse = ReverseProcess(
        chain,
        prediction_type,
        config.variance_type,
        config.clip,
        None if x_start_mse is None else x_start_mse[timesteps.to(x_start_mse.device)],
    )
    is_noisy = config.kind == "ancestral" or config.eta > 0

    def draw(number: int) -> Tensor:
        return rng.normal(seed, "sample", index, shape, draw=number, dtype=dtype).to(device)

    x_t = draw(0) * float(chain.total_variance[-1]) ** 0.5
    for position in reversed(range(len(timesteps))):
        timestep = int(timesteps[position])
        with torch.no_grad():
            output = eps_theta(x_t, torch.full(index.shape, timestep, dtype=torch.int64, device=device))
            noise = draw(timestep + 1) if is_noisy and position else None
            t = torch.full(index.shape, position, dtype=torch.int64, device=device)
            x_prev, pred_x_start = denoise_step(reverse, config, x_t, t, output, noise)
        yield TrajectoryStep(timestep, x_t, pred_x_start)
        x_t = x_prev


def sample(
    eps_theta: EpsTheta,
    process: LinearGaussianProcess,
    config: SamplerConfig,
    *,
    seed: int,
    index: Tensor,
    shape: tuple[int, int, int],
    prediction_type: PredictionType = "eps",
    x_start_mse: Tensor | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Images x_0 `[B, C, H, W]`, in [−1, 1] if config.clip. Arguments as in `trajectory`."""
    steps = trajectory(
        eps_theta,
        process,
        config,
        seed=seed,
        index=index,
        shape=shape,
        prediction_type=prediction_type,
        x_start_mse=x_start_mse,
        device=device,
        dtype=dtype,
    )
    image = None
    for step in steps:
        image = step.pred_x_start
    assert image is not None, "a trajectory has one step or more"
    return image
