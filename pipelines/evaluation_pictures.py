"""The pictures that go with an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddpm_core.samplers import trajectory
from pipelines import plots
from pipelines.checkpoints import Checkpoint
from pipelines.dataset import Dataset
from pipelines.evaluate import Evaluation, Pixels
from pipelines.images import to_uint8
from pipelines.sample_recipe import Recipe
from pipelines.sample_set import SampleSet
from pipelines.sampling import load_model
from pipelines.storage import Storage
from pipelines.stored_order import read_rows
from pipelines.tracking import History


def draw(
    evaluation: Evaluation,
    dataset: Dataset,
    checkpoint: Checkpoint,
    recipe: Recipe,
    samples: SampleSet,
    run: Storage,
    folder: Path,
) -> list[Path]:
    """The pictures of a run and its samples, as PNG files in a folder."""
    model, schedule = load_model(checkpoint, torch.device("cpu"))
    made = [
        plots.schedule_figure(
            schedule.betas.numpy(),
            schedule.alphas_cumprod.numpy(),
            schedule.log_snr.numpy(),
            folder / "schedule.png",
        )
    ]
    rows = History(run).rows(up_to=None)
    losses = [(row.step, row.metrics["loss"]) for row in rows if "loss" in row.metrics]
    held_out = [
        (row.step, row.metrics["held_out/total"], row.metrics["held_out/total_stderr"])
        for row in rows
        if "held_out/total" in row.metrics
    ]
    if losses:
        made.append(
            plots.loss_figure(
                [step for step, _ in losses], [loss for _, loss in losses], held_out, folder / "loss.png"
            )
        )
    bound = evaluation.bound
    terms = {
        "reconstruction": bound.reconstruction,
        "consistency": bound.consistency,
        "prior": bound.prior,
    }
    errors = {
        "reconstruction": bound.reconstruction_stderr,
        "consistency": bound.consistency_stderr,
        "prior": bound.prior_stderr,
    }
    made.append(plots.bound_figure(bound.per_t, terms, folder / "bound.png", stderr=errors))
    generated = np.stack([image for _, image in samples.images(limit=100)])
    # a bad one would have ended the evaluation, or was told of by it
    real = np.stack([row.image for row in read_rows(dataset, "test", 0, 100, on_bad=lambda bad: None)])
    made.append(plots.generated_beside_real(generated, real, folder / "samples.png"))
    made.append(plots.trajectory_figure(_frames(model, schedule, recipe), folder / "trajectory.png"))
    rows_of_distances = [
        {"name": d.name, "frechet": d.frechet, "kernel": d.kernel, "count": d.count}
        for d in evaluation.distances
    ]
    made.append(plots.distances_figure(rows_of_distances, folder / "distances.png"))
    return made


def _frames(model: Any, schedule: Any, recipe: Recipe) -> list[tuple[int, Pixels, Pixels]]:
    """The way of image 0 from noise to image."""
    steps = trajectory(
        recipe.asked(model, schedule, [0], torch.device("cpu")),
        schedule,
        recipe.sampler,
        seed=recipe.settings.seed,
        index=torch.zeros(1, dtype=torch.int64),
        shape=recipe.shape,
        prediction_type=recipe.prediction_type,
    )
    with torch.inference_mode():
        return [
            (
                step.t,
                to_uint8(step.x_t[0], recipe.levels).numpy(),
                to_uint8(step.pred_x_start[0], recipe.levels).numpy(),
            )
            for step in steps
        ]
