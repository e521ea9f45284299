"""What to change in a schedule that does not end in noise: only changes that were tried and found to be enough."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from ddpm_core.betas import ScheduleConfig
from ddpm_core.process import PRIOR_WARNING_BITS_PER_DIM, LinearGaussianProcess

Build = Callable[[ScheduleConfig], LinearGaussianProcess]

_GOAL = 10.1
"""−ln ᾱ at the last step of the paper's own schedule."""

_MOST_TIMESTEPS = 10**5


class Remedy(NamedTuple):
    """A change in words, and the configuration that has it."""

    text: str
    config: ScheduleConfig


def remedies(config: ScheduleConfig, build: Build) -> list[Remedy]:
    """The changes of a configuration, each one alone, after which x_T is close to N(0, I). Small ones first.

    Σβ is about −ln ᾱ_T, so both β and T go up in proportion to what is missing. build makes a schedule of a
    configuration and may raise ValueError.
    """
    found = []
    for remedy in _candidates(config, build):
        try:
            enough = _is_enough(remedy.config, build)
        except ValueError:
            continue
        if enough:
            found.append(remedy)
    return found


def _candidates(config: ScheduleConfig, build: Build) -> Iterator[Remedy]:
    depth = _depth(config, build)
    assert depth is not None, "the configuration is that of a schedule"
    # what is printed is what is tried
    factor = float(f"{_GOAL / depth:.2g}")
    kind = config.kind
    if kind in ("linear", "linear_scaled", "scaled_linear", "quadratic", "warmup", "sigmoid_beta"):
        yield from _changed(
            f"multiply beta_start and beta_end by about {factor:g}",
            config,
            beta_start=config.beta_start * factor,
            beta_end=config.beta_end * factor,
        )
    if kind == "constant":
        yield from _changed(
            f"multiply beta_end by about {factor:g}", config, beta_end=config.beta_end * factor
        )
    if kind == "betas":
        scaled = tuple(beta * factor for beta in config.betas)
        yield from _changed(f"multiply the betas by about {factor:g}", config, betas=scaled)
        beta = float(f"{-math.expm1(depth - _GOAL):.6g}")
        yield from _changed(
            f"append a step of beta = {beta:g}",
            config,
            num_timesteps=config.num_timesteps + 1,
            betas=(*config.betas, beta),
        )
    if kind == "alphas_cumprod":
        last = float(f"{math.exp(-_GOAL):.2g}")
        yield from _changed(
            f"append a step of alphas_cumprod = {last:g}",
            config,
            num_timesteps=config.num_timesteps + 1,
            alphas_cumprod=(*config.alphas_cumprod, last),
        )
    if kind in ("cosine", "sigmoid"):
        yield from _changed("raise beta_max to 0.999", config, beta_max=0.999)
    if kind == "log_snr":
        yield from _changed(f"lower log_snr_min to {-_GOAL:g}", config, log_snr_min=-_GOAL)
    if kind not in ("betas", "alphas_cumprod"):
        num_timesteps = _longer(config, build)
        yield from _changed(
            f"raise num_timesteps to about {num_timesteps}", config, num_timesteps=num_timesteps
        )
    if kind != "cosine":
        yield from _changed("use the cosine schedule", config, kind="cosine")
    yield from _changed(
        "rescale to zero terminal SNR (zero_terminal_snr; then predict v or x_start)",
        config,
        zero_terminal_snr=True,
    )


def _changed(text: str, config: ScheduleConfig, **fields: object) -> Iterator[Remedy]:
    """The remedy, or none where the fields make no configuration."""
    try:
        yield Remedy(text, replace(config, **fields))  # type: ignore[arg-type]
    except ValueError:
        return


def _longer(config: ScheduleConfig, build: Build) -> int:
    """A num_timesteps that is enough, if there is one."""
    num_timesteps = config.num_timesteps
    for _ in range(3):
        depth = _depth(replace(config, num_timesteps=num_timesteps), build)
        if depth is None or not depth:
            break
        num_timesteps = max(math.ceil(min(num_timesteps * _GOAL / depth, _MOST_TIMESTEPS)), 2)
    while num_timesteps // 2 > config.num_timesteps:
        if not _is_enough(replace(config, num_timesteps=num_timesteps // 2), build):
            break
        num_timesteps //= 2
    return num_timesteps


def _depth(config: ScheduleConfig, build: Build) -> float | None:
    """−ln ᾱ at the last step; None where the configuration makes no schedule."""
    try:
        return -2.0 * float(build(config).log_a[-1])
    except ValueError:
        return None


def _is_enough(config: ScheduleConfig, build: Build) -> bool:
    return build(config).worst_prior_bits_per_dim <= PRIOR_WARNING_BITS_PER_DIM
