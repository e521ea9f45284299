"""Samplers: the way from x_T to an image by the step rules of `ddpm_core.steps`, whole or respaced.

A generator drives the loop; the noise of image i is a function of (seed, i), so that an image does not depend on
the batch or the worker that makes it. Whatever a rule carries from step to step, the last x̂_0, stands in the loop.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from ddpm_core import rng, steps
from ddpm_core._checks import (
    check_alike,
    check_index,
    check_numbers,
    check_same_shape,
    require,
    require_float_dtype,
    require_int,
    require_number,
    require_sizes,
)
from ddpm_core._identity import config_identity
from ddpm_core.chains import karras_timesteps
from ddpm_core.predictions import PredictionType, x_start_tables
from ddpm_core.process import LinearGaussianProcess
from ddpm_core.respacing import respaced_timesteps
from ddpm_core.reverse import ReverseProcess, check_threshold_quantile, check_variance_type
from ddpm_core.steps import StepTables, advance
from ddpm_core.types import EpsTheta, VarianceType

SamplerKind: TypeAlias = Literal["ancestral", "ddim", "dpm_solver_pp_2m", "dpm_solver_pp_2m_sde", "heun"]
Spacing: TypeAlias = Literal["linspace", "leading", "trailing", "quadratic", "karras"]

SAMPLER_KINDS: tuple[SamplerKind, ...] = get_args(SamplerKind)
SPACINGS: tuple[Spacing, ...] = get_args(Spacing)


@dataclass(frozen=True)
class SamplerConfig:
    """Which sampler.

    kind: "ancestral" is Algorithm 2, "ddim" is Song et al. Eq. 12, "dpm_solver_pp_2m" is DPM-Solver++(2M),
    "dpm_solver_pp_2m_sde" its form with noise, "heun" the second-order rule of Karras et al. (spacing "karras" is
    theirs too), which asks the network twice a step, but once in the last: see `ddpm_core.steps`.
    num_steps: how many of the T timesteps are visited; None means all. spacing: which ones, see
    `visited_timesteps`; karras_rho is the ρ of "karras".
    eta: DDIM's noise, 0 (none) to 1 (that of ancestral fixed_small). variance_type: ancestral's σ_t². Both are
    ignored by the other kinds, but that "learned_range" says of any that the network's output has a second half.
    clip: limit x̂_0 to [−1, 1] in each step; threshold_quantile: dynamic thresholding in its place, see
    `ReverseProcess`.
    Raises ValueError naming the field that is out of range.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 (read by pydantic, not a field)

    kind: SamplerKind = "ddim"
    num_steps: int | None = 50
    eta: float = 0.0
    variance_type: VarianceType = "fixed_large"
    clip: bool = True
    spacing: Spacing = field(default="linspace", kw_only=True)
    karras_rho: float = field(default=7.0, kw_only=True)
    threshold_quantile: float | None = field(default=None, kw_only=True)

    def identity(self) -> dict[str, Any]:
        """What the sampler is, as plain values to hash."""
        return config_identity(self)

    def __post_init__(self) -> None:
        require(self.kind in SAMPLER_KINDS, "kind", _one_of(SAMPLER_KINDS), self.kind)
        require_int("num_steps", self.num_steps, 1, none="null")
        for name in ("eta", "karras_rho"):
            require_number(name, getattr(self, name))
        require(0 <= self.eta <= 1, "eta", "between 0 and 1", self.eta)
        check_variance_type(self.variance_type)
        require(self.spacing in SPACINGS, "spacing", _one_of(SPACINGS), self.spacing)
        require(0 < self.karras_rho < math.inf, "karras_rho", "positive and finite", self.karras_rho)
        check_threshold_quantile(self.threshold_quantile)


class TrajectoryStep(NamedTuple):
    """One visited timestep: t, the state x_t `[B, *shape]`, and x̂_0 as the network sees it from there."""

    t: int
    x_t: Tensor
    pred_x_start: Tensor


def visited_timesteps(process: LinearGaussianProcess, config: SamplerConfig) -> Tensor:
    """The timesteps of process that a sampler visits, int64 `[num_steps]`, increasing.

    "linspace": evenly from 0 to T−1, both included, as x_T ~ N(0, I) is the state at T−1 alone, and the finest
    detail is decided at 0. "leading": every (T//S)-th from 0. "trailing": every (T/S)-th down from T−1.
    "quadratic": evenly in √t. "karras": evenly in σ^{1/ρ}, `ddpm_core.chains.karras_timesteps`. Where T−1 is not
    among them (leading), the noise of x_T is taken for the state at the last one.
    Raises ValueError if config.num_steps is above T.
    """
    num_timesteps = process.num_timesteps
    num_steps = num_timesteps if config.num_steps is None else config.num_steps
    if config.spacing == "karras":
        return karras_timesteps(process, num_steps, config.karras_rho)
    return respaced_timesteps(num_timesteps, num_steps, config.spacing)


def step_tables(reverse: ReverseProcess, config: SamplerConfig) -> StepTables:
    """The step rule of config.kind on the (perhaps respaced) chain of reverse."""
    process = reverse.process
    if config.kind == "ancestral":
        return steps.ancestral_tables(reverse)
    if config.kind == "ddim":
        return steps.ddim_tables(process, config.eta)
    if config.kind == "dpm_solver_pp_2m":
        return steps.dpm_solver_pp_2m_tables(process)
    if config.kind == "dpm_solver_pp_2m_sde":
        return steps.dpm_solver_pp_2m_sde_tables(process)
    return steps.heun_tables(process)


def denoise_step(
    reverse: ReverseProcess,
    config: SamplerConfig,
    x_t: Tensor,
    t: Tensor,
    output: Tensor,
    noise: Tensor | None,
    other: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step t → t−1 of the given (perhaps respaced) chain. Returns (x_{t−1}, x̂_0), each like x_t.

    The rule is config.kind's, see `ddpm_core.steps`; the variance, clipping and thresholding are those of reverse.
    t int64 `[B]`; output the network's at x_t; noise z like x_t, None for z = 0. other: for 2M the x̂_0 of the
    step before; for Heun None to reach the point of its second estimate, then x̂_0 there. None makes a step of
    first order.
    At t == 0 no noise is added and x_{t−1} is x̂_0.
    Raises ValueError naming the argument whose shape, dtype or range is wrong, or which is not finite (noticed on
    the CPU).
    """
    check_numbers("x_t", x_t)
    check_numbers("output", output)
    for name, tensor in (("noise", noise), ("other", other)):
        if tensor is not None:
            check_alike(name, tensor, "x_t", x_t)
    pred_x_start = reverse.predict(output, x_t, t).x_start
    step = step_tables(reverse, config).gather(reverse.process, t, x_t)
    if noise is not None and config.kind == "ancestral" and reverse.variance_type == "learned_range":
        above_zero = (t > 0).to(x_t).reshape(-1, *[1] * (x_t.dim() - 1))
        step = step._replace(sigma=above_zero * _learned_sigma(reverse, output, x_t, t))
    return advance(step, x_t, pred_x_start, other, noise), pred_x_start


def trajectory(
    eps_theta: EpsTheta,
    process: LinearGaussianProcess,
    config: SamplerConfig,
    *,
    seed: int,
    index: Tensor,
    shape: tuple[int, ...],
    prediction_type: PredictionType = "eps",
    x_start_mse: Tensor | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Iterator[TrajectoryStep]:
    """The way from noise to image: a TrajectoryStep for each visited timestep, from the last one down.

    The last one's pred_x_start is the image, since the last step adds no noise and its mean is x̂_0.
    prediction_type: what the network predicts. x_start_mse: float64 `[T]`, for the variance type "analytic".
    index: int64 `[B]`, the images' numbers, which with seed decide all noise: x_T by draw 0, the noise of the
    step that leaves timestep t by draw t + 1. shape: that of one sample without its batch, (C, H, W) of an image or
    (D,) of a vector: one size or more, each at least 1; states are `[B, *shape]`. dtype: floating-point. device:
    where states live (index.device if None). Noise is computed on index.device. Run the network in eval mode; no
    gradients are kept.
    For a network or noise levels in continuous time see `ddpm_core.chains`.
    Raises ValueError naming the argument that is wrong, when the first step is asked for. Whether a state is finite
    is not asked: what the network says passes into the image.
    """
    check_index(index)
    require_sizes("shape", shape, 1)
    require(len(shape) > 0, "shape", "one size or more", shape)
    require_float_dtype(dtype)
    device = index.device if device is None else torch.device(device)
    timesteps = visited_timesteps(process, config)
    is_whole = len(timesteps) == process.num_timesteps
    # the steps' coefficients are numbers on the CPU, so that no look-up waits for the device
    chain = (process if is_whole else process.at(timesteps)).to("cpu")
    has_variance = config.kind == "ancestral" or config.variance_type == "learned_range"
    variance_type: VarianceType = config.variance_type if has_variance else "fixed_small"
    if x_start_mse is not None and variance_type == "analytic":
        check_same_shape("x_start_mse", x_start_mse, "the process's tables", process.log_a)
        x_start_mse = x_start_mse[timesteps.to(x_start_mse.device)]
    reverse = ReverseProcess(
        chain, prediction_type, variance_type, config.clip, x_start_mse, config.threshold_quantile
    )
    rule = step_tables(reverse, config).steps()
    x_start_rule = [table.tolist() for table in x_start_tables(chain, prediction_type)]
    is_learned = config.kind == "ancestral" and config.variance_type == "learned_range"
    reverse = reverse.to(device)

    def draw(number: int) -> Tensor:
        return rng.normal(seed, "sample", index, shape, draw=number, dtype=dtype).to(device)

    def everywhere(number: int) -> Tensor:
        return torch.full(index.shape, number, dtype=torch.int64, device=device)

    def evaluate(position: int, x_t: Tensor) -> tuple[Tensor, Tensor]:
        output = eps_theta(x_t, everywhere(int(timesteps[position])))
        prediction, _ = reverse.split(output, x_t)
        on_x_t, on_output = (table[position] for table in x_start_rule)
        # wide, as in `convert_prediction`: the two parts nearly cancel where the signal is small
        wide = x_t if x_t.dtype == torch.float64 else x_t.float()
        pred_x_start = reverse.limit(on_x_t * wide + on_output * prediction.to(wide.dtype))
        return output, pred_x_start.to(x_t.dtype)

    def leave(
        position: int, x_t: Tensor, output: Tensor, pred_x_start: Tensor, before: Tensor | None
    ) -> Tensor:
        step, other = rule[position], before
        if config.kind == "heun" and step.on_other:
            _, other = evaluate(position - 1, advance(step, x_t, pred_x_start))
        if is_learned:
            step = step._replace(sigma=_learned_sigma(reverse, output, x_t, everywhere(position)))
        noise = draw(int(timesteps[position]) + 1) if is_learned or step.sigma else None
        return advance(step, x_t, pred_x_start, other if step.on_other else None, noise)

    before: Tensor | None = None
    x_t = draw(0) * float(chain.total_variance[-1]) ** 0.5
    for position in reversed(range(len(timesteps))):
        with torch.no_grad():
            output, pred_x_start = evaluate(position, x_t)
        yield TrajectoryStep(int(timesteps[position]), x_t, pred_x_start)
        if position:
            with torch.no_grad():
                x_t = leave(position, x_t, output, pred_x_start, before)
            before = pred_x_start


def sample(
    eps_theta: EpsTheta,
    process: LinearGaussianProcess,
    config: SamplerConfig,
    *,
    seed: int,
    index: Tensor,
    shape: tuple[int, ...],
    prediction_type: PredictionType = "eps",
    x_start_mse: Tensor | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Images x_0 `[B, *shape]`, in [−1, 1] if clipped or thresholded. Arguments as in `trajectory`."""
    visited = trajectory(
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
    for step in visited:
        image = step.pred_x_start
    assert image is not None, "a trajectory has one step or more"
    return image


def _learned_sigma(reverse: ReverseProcess, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    return (0.5 * reverse.log_variance(output, x_t, t)).exp().to(x_t.dtype)


def _one_of(names: tuple[str, ...]) -> str:
    return ", ".join(repr(name) for name in names[:-1]) + f" or {names[-1]!r}"
