"""What must agree between the sections of a configuration, each mistake a line that names the field to change."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ddpm_core.schedules import Schedule

if TYPE_CHECKING:
    from pipelines.config import Config


def mistakes(config: Config) -> list[str]:
    """`field: what it must be`, for every field that contradicts another section's; mostly none."""
    return [
        *_workers(config),
        *_end_of_the_chain(config),
        *_variance(config),
        *_classes(config),
        *_encoder(config),
    ]


def mistakes_of_a_file(config: Config) -> list[str]:
    """What besides would only be found, or passed over in silence, when a sampler or a sweep starts."""
    found = []
    steps, num_timesteps = config.sampler.num_steps, config.schedule.num_timesteps
    if steps is not None and steps > num_timesteps:
        found.append(
            f"sampler.num_steps: must be at most schedule.num_timesteps {num_timesteps}, got {steps}; null visits "
            "all"
        )
    tune = config.tune
    if tune.grace_steps > tune.steps:
        found.append(
            f"tune.grace_steps: must be at most tune.steps {tune.steps}, got {tune.grace_steps}; no trial could be "
            "stopped early"
        )
    return found


def _workers(config: Config) -> list[str]:
    if config.workers.num <= config.train.micro_batches:
        return []
    return [
        f"workers.num: must be at most train.micro_batches {config.train.micro_batches}, "
        f"got {config.workers.num}; each worker takes whole micro-batches"
    ]


def _end_of_the_chain(config: Config) -> list[str]:
    try:
        schedule = Schedule.from_config(config.schedule)
    except ValueError as error:
        return [f"schedule: {error}"]
    # a signal that float32 has no number for is none
    has_signal = bool(torch.isfinite(1.0 / schedule.a[-1].float()))
    if has_signal or config.objective.prediction_type != "eps":
        return []
    return [
        "objective.prediction_type: must be 'v' or 'x_start' for a schedule that ends without signal "
        f"(schedule.kind {config.schedule.kind!r}, schedule.zero_terminal_snr "
        f"{str(config.schedule.zero_terminal_snr).lower()}), got 'eps', which says nothing of x_0 there"
    ]


def _variance(config: Config) -> list[str]:
    """A network either has channels for the variance, and everything uses them, or nothing does."""
    learned = config.model.learned_variance
    because = f"as model.learned_variance is {str(learned).lower()}"
    must_be = "'learned_range'" if learned else "'fixed_small' or 'fixed_large'"
    found = []
    for field, given in (
        ("objective.variance_type", config.objective.variance_type),
        ("bound.variance_type", config.bound.variance_type),
    ):
        if (given == "learned_range") != learned:
            why = because if learned else f"{because}: the network has no channels for a variance"
            found.append(f"{field}: must be {must_be}, {why}, got {given!r}")
    of_sampler = config.sampler.variance_type
    if of_sampler == "analytic":
        found.append(
            f"sampler.variance_type: must be {must_be}, got 'analytic', for which nothing here measures the "
            "network's error at every t"
        )
    elif (of_sampler == "learned_range") > learned:
        found.append(f"sampler.variance_type: must be {must_be}, {because}, got {of_sampler!r}")
    elif (of_sampler == "learned_range") < learned and config.sampler.kind == "ancestral":
        found.append(
            f"sampler.variance_type: must be {must_be} for the kind 'ancestral', {because}, got {of_sampler!r}"
        )
    return found


def _classes(config: Config) -> list[str]:
    num_classes, chosen = config.model.num_classes, config.sample
    if num_classes is None:
        without = "which model.num_classes null has no use for"
        found = []
        if chosen.labels:
            found.append(f"sample.labels: must be empty, got {list(chosen.labels)}, {without}")
        if chosen.guidance_scale != 1:
            found.append(f"sample.guidance_scale: must be 1, got {chosen.guidance_scale}, {without}")
        return found
    wrong = [label for label in chosen.labels if not 0 <= label <= num_classes]
    if not wrong:
        return []
    return [f"sample.labels: must lie in 0..{num_classes} ({num_classes} means no class), got {wrong[0]}"]


def _encoder(config: Config) -> list[str]:
    if config.sample.png_encoder == "pillow" or config.model.in_channels == 3:
        return []
    return [
        f"sample.png_encoder: must be pillow for images that are not RGB (model.in_channels "
        f"{config.model.in_channels}), got {config.sample.png_encoder!r}"
    ]
