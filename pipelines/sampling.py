"""Mass generation: image i = g(checkpoint, sampler, seed, i), whichever worker makes it, however often."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ddpm_core.networks import build_network
from ddpm_core.samplers import sample
from ddpm_core.schedules import Schedule
from pipelines.checkpoints import Checkpoint, open_checkpoint
from pipelines.compiled import compile_frozen
from pipelines.errors import UserError
from pipelines.images import to_uint8
from pipelines.png import check_encoder
from pipelines.sample_recipe import Recipe, checkpoint_config, unit_range
from pipelines.sample_set import SampleSet
from pipelines.storage import open_storage


def load_model(checkpoint: Checkpoint, device: torch.device) -> tuple[nn.Module, Schedule]:
    """The averaged network of a checkpoint, for evaluation, and its noise schedule."""
    config = checkpoint_config(checkpoint)
    model = build_network(config.model)
    model.load_state_dict(checkpoint.read("ema"))
    return model.to(device).eval().requires_grad_(False), Schedule.from_config(config.schedule).to(device)


def make_images(
    model: nn.Module, schedule: Schedule, recipe: Recipe, index: Sequence[int], device: torch.device
) -> Tensor:
    """Images float32 [n, C, H, W] of these numbers.

    They go through the network in batches that are always `batch_size` large, filled up by repeating the
    last number: a network's rounding depends on the size of its batch.
    """
    size = recipe.settings.batch_size
    made = []
    with torch.inference_mode():
        for start in range(0, len(index), size):
            part = list(index[start : start + size])
            padded = part + [part[-1]] * (size - len(part))
            x = sample(
                recipe.asked(model, schedule, padded, device),
                schedule,
                recipe.sampler,
                seed=recipe.settings.seed,
                index=torch.tensor(padded, dtype=torch.int64, device=device),
                shape=recipe.shape,
                prediction_type=recipe.prediction_type,
                device=device,
            )
            made.append(x[: len(part)].cpu())
    return torch.cat(made)


class UnitMaker:
    """Makes units of one set: what a sampling worker is, in this process or as a Ray actor."""

    def __init__(self, recipe: Recipe, set_uri: str, device: str) -> None:
        self._recipe = recipe
        self._set = SampleSet(open_storage(set_uri))
        self._device = torch.device(device)
        # before an hour of work, not behind it
        check_encoder(recipe.settings.png_encoder, recipe.shape[0], "sample.png_encoder")
        checkpoint = open_checkpoint(recipe.checkpoint)
        if checkpoint.identity != recipe.checkpoint_identity:
            raise UserError(f"{recipe.checkpoint}: was replaced by another checkpoint meanwhile")
        self._model, self._schedule = load_model(checkpoint, self._device)
        for name, tensor in self._model.named_parameters():
            if not bool(tensor.isfinite().all()):
                raise UserError(
                    f"{recipe.checkpoint}: its averaged weights {name!r} hold NaN or ±∞, of which no image comes; "
                    "set sample.checkpoint to another one"
                )
        if recipe.settings.compile:
            self._compile()

    def _compile(self) -> None:
        batch = list(range(self._recipe.settings.batch_size))
        ask = self._recipe.asked(self._model, self._schedule, batch, self._device)
        x = torch.zeros(len(batch), *self._recipe.shape, device=self._device)
        t = torch.zeros(len(batch), dtype=torch.int64, device=self._device)
        compile_frozen(self._model, lambda: ask(x, t))

    def make(self, unit: int) -> int:
        """Make and commit a unit; returns how many images it holds.

        Raises `UserError` where the network gives NaN, which is no image.
        """
        numbers = unit_range(self._recipe, unit)
        x = make_images(self._model, self._schedule, self._recipe, numbers, self._device)
        if bool(x.isnan().any()):
            raise UserError(
                f"{self._recipe.checkpoint}: its network gives numbers that are no numbers (NaN) in unit {unit}; "
                "set sample.checkpoint to another one, or take another sampler"
            )
        self._set.write_unit(self._recipe, unit, to_uint8(x, self._recipe.levels))
        return len(numbers)
