"""A picture of what a network under training draws."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import nn

from ddpm_core.samplers import SamplerConfig, sample
from ddpm_core.schedules import Schedule
from pipelines.conditioning import conditioned, fitted
from pipelines.config import Config
from pipelines.dataset import Dataset
from pipelines.grids import grid_png
from pipelines.images import to_uint8

log = logging.getLogger(__name__)

_IMAGES = 64
_STEPS = 25


def preview(
    config: Config, dataset: Dataset, model: nn.Module, schedule: Schedule, device: torch.device, step: int
) -> bytes | None:
    """Samples as one PNG, always from the same noise, the classes in turn; None, with a warning, where the sampler
    gives NaN. `step` names them in the warning.
    """
    classes = config.model.num_classes
    with torch.inference_mode():
        index = torch.arange(_IMAGES, device=device)
        x = sample(
            conditioned(model, schedule, None if classes is None else index % classes),
            schedule,
            _quick(config),
            seed=config.seed,
            index=index,
            shape=dataset.shape,
            prediction_type=config.objective.prediction_type,
            device=device,
        )
    if bool(x.isnan().any()):
        # a sampler that does not clip may run away from a network that is sound
        log.warning(
            "step %d: no picture of samples: the sampler gives numbers that are no numbers (NaN)", step
        )
        return None
    return grid_png(to_uint8(x.cpu(), dataset.levels).numpy())


def _quick(config: Config) -> SamplerConfig:
    """A sampler of few steps, since the other workers wait while rank 0 draws."""
    steps = min(_STEPS, config.schedule.num_timesteps)
    quick = replace(config.sampler, kind="ddim", num_steps=steps, eta=0.0, spacing="linspace")
    return fitted(quick, config.model)
