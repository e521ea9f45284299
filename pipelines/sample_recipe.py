"""What a sample set is a function of, and how it is cut into units of consecutive images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ddpm_core.predictions import PredictionType
from ddpm_core.samplers import SamplerConfig
from ddpm_core.schedules import Schedule
from ddpm_core.types import EpsTheta
from pipelines.checkpoints import Checkpoint
from pipelines.conditioning import conditioned, fitted
from pipelines.config import Config, digest
from pipelines.config_sections import SampleConfig
from pipelines.errors import UserError
from pipelines.telling import validated
from pipelines.unused_settings import unused_settings

FORMAT_VERSION = 1

_WITHOUT_EFFECT = ("gradient_checkpointing",)
"""Settings of a model that change nothing of its output."""


@dataclass(frozen=True)
class Recipe:
    """What a sample set is a function of."""

    name: str
    checkpoint: str
    """URI of the checkpoint."""
    checkpoint_identity: str
    sampler: SamplerConfig
    settings: SampleConfig
    shape: tuple[int, int, int]
    levels: int
    prediction_type: PredictionType = "eps"
    """What the checkpoint's network predicts, which its identity implies."""
    num_classes: int | None = None
    """How many classes it knows, which its identity implies too."""

    def identity(self) -> dict[str, Any]:
        labels = self.labels
        conditional = (
            {"labels": list(labels), "guidance_scale": self.settings.guidance_scale} if labels else {}
        )
        compiled = {"compile": True} if self.settings.compile else {}
        encoder = self.settings.png_encoder
        encoded = {} if encoder == "pillow" else {"png_encoder": encoder}
        return (
            conditional
            | compiled
            | encoded
            | {
                "format_version": FORMAT_VERSION,
                "checkpoint": self.checkpoint_identity,
                "sampler": self.sampler.identity(),
                "seed": self.settings.seed,
                "count": self.settings.count,
                "unit_size": self.settings.unit_size,
                "batch_size": self.settings.batch_size,
                "shape": list(self.shape),
                "levels": self.levels,
            }
        )

    @property
    def labels(self) -> tuple[int, ...]:
        """What the network is told of images 0, 1, …, over and over; empty where it has no classes."""
        return () if self.num_classes is None else self.settings.labels or tuple(range(self.num_classes))

    def label(self, number: int) -> int:
        """The class that an image is of, −1 for none."""
        told = self.labels[number % len(self.labels)] if self.labels else self.num_classes
        return -1 if told is None or told == self.num_classes else told

    def asked(
        self, model: nn.Module, schedule: Schedule, index: Sequence[int], device: torch.device
    ) -> EpsTheta:
        """The network as these images ask it."""
        labels = self.labels
        told = torch.tensor([labels[i % len(labels)] for i in index], device=device) if labels else None
        return conditioned(model, schedule, told, self.settings.guidance_scale)

    def set_name(self) -> str:
        return f"{self.name}-{digest(self.identity())[:10]}"


def trained_as(config: Config, checkpoint: Checkpoint) -> Config:
    """The configuration that a checkpoint was trained with, whose model is that of `config`.

    Raises `UserError` naming each field in which `config` describes another model.
    """
    trained = checkpoint_config(checkpoint)
    mistakes = []
    # what nothing reads may differ: an older version took it, and a file may not hold it any more
    unread = {(unused.section, unused.name) for unused in unused_settings(trained)}
    for section in ("schedule", "model", "objective"):
        ours, theirs = asdict(getattr(config, section)), asdict(getattr(trained, section))
        # networks and schedules of different kinds have different settings, and the kind says it all
        keys = ["kind"] if ours.get("kind") != theirs.get("kind") else list(ours)
        mistakes += [
            f"{section}.{key}: {ours[key]}, but the checkpoint {checkpoint.uri} was trained with {theirs[key]}"
            for key in keys
            if ours[key] != theirs[key] and key not in _WITHOUT_EFFECT and (section, key) not in unread
        ]
    if mistakes:
        raise UserError("\n".join(mistakes))
    return trained


def recipe_of(config: Config, checkpoint: Checkpoint, levels: int) -> Recipe:
    """The recipe of the samples of a checkpoint; the model's part comes from the checkpoint.

    levels: of its data set, which a checkpoint does not say. Raises `UserError` like `trained_as`.
    """
    trained = trained_as(config, checkpoint)
    size, channels = trained.model.image_size, trained.model.in_channels
    return Recipe(
        config.name,
        checkpoint.uri,
        checkpoint.identity,
        fitted(config.sampler, trained.model),
        config.sample,
        (channels, size, size),
        levels,
        trained.objective.prediction_type,
        trained.model.num_classes,
    )


def checkpoint_config(checkpoint: Checkpoint) -> Config:
    """The configuration that a checkpoint was trained with."""
    return validated(Config, checkpoint.commit.config, f"{checkpoint.uri}/commit.json: config")


def unit_range(recipe: Recipe, unit: int) -> range:
    """The images of a unit."""
    size = recipe.settings.unit_size
    return range(unit * size, min((unit + 1) * size, recipe.settings.count))


def num_units(recipe: Recipe) -> int:
    return -(-recipe.settings.count // recipe.settings.unit_size)


def pending_units(recipe: Recipe, committed: Iterable[int]) -> list[int]:
    """The units still to make."""
    done = set(committed)
    return [unit for unit in range(num_units(recipe)) if unit not in done]
