"""Any network of ddpm_core can be trained, judged and sampled from, whatever it is told beside x_t."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from ddpm_core.dit import DiT
from ddpm_core.networks import as_eps_theta
from ddpm_core.samplers import sample
from ddpm_core.unet import UNet
from pipelines.checkpoints import Checkpoint, Checkpoints
from pipelines.config import Config
from pipelines.errors import UserError
from pipelines.held_out import held_out_bound
from pipelines.plan import network_bytes, training_plan
from pipelines.sample_recipe import recipe_of
from pipelines.sampling import load_model, make_images
from pipelines.storage import open_storage
from pipelines.train import _evaluate, open_run, train
from pipelines.training import Learner
from pipelines.world import SingleWorker
from tests.support.data import dataset_of
from tests.support.runs import Kept, made_up_batches, tiny_config

CPU = torch.device("cpu")
DIT = (
    "model={kind: dit, image_size: 8, in_channels: 1, patch_size: 4, hidden_size: 8, depth: 1, num_heads: 2}"
)
LEARNED = (
    "model.learned_variance=true", "objective.loss=hybrid", "objective.variance_type=learned_range",
    "bound.variance_type=learned_range",
)  # fmt: skip
SILENT = ("schedule.zero_terminal_snr=true", "objective.prediction_type=v")
NETWORKS = {
    "unet": (),
    "unet on log-SNR": ("model.conditioning=log_snr",),
    "dit": (DIT,),
    "dit on log-SNR": (DIT, "model.conditioning=log_snr"),
}
OBJECTIVES = {
    "learned variance": LEARNED,
    "learned by ancestral": (*LEARNED, "sampler.kind=ancestral", "sampler.variance_type=learned_range"),
    "learned by Heun": (*LEARNED, "sampler.kind=heun"),
    "learned by losses": (*LEARNED, "objective.timestep_sampling=loss_second_moment"),
    "no signal": SILENT,
    "no signal, weighted": (*SILENT, "objective.weighting=min_snr"),
    "no signal, on log-SNR": (*SILENT, "model.conditioning=log_snr"),
    "no signal, bound": (*SILENT, "objective.loss=vlb", "objective.variance_type=fixed_large"),
    "no signal, learned": (
        *SILENT,
        *LEARNED,
        "sampler.kind=ancestral",
        "sampler.variance_type=learned_range",
    ),
    "no signal, 2M": (*SILENT, "sampler.kind=dpm_solver_pp_2m"),
    "no signal, Karras": (*SILENT, "sampler.kind=heun", "sampler.spacing=karras"),
}


@pytest.fixture
def data(tmp_path: Path) -> str:
    dataset_of(tmp_path / "data", [10, 20, 7])
    return f"data.uri={tmp_path}/data"


def trained(config: Config) -> Checkpoint:
    run = open_run(config)
    train(run, SingleWorker(CPU))
    return Checkpoints(run.storage).open(config.train.steps)


@pytest.mark.parametrize("options", [*NETWORKS.values(), *OBJECTIVES.values()], ids=[*NETWORKS, *OBJECTIVES])
def test_it_is_trained_resumed_judged_and_sampled(
    options: tuple[str, ...], data: str, tmp_path: Path
) -> None:
    short = ("train.steps=3", "train.checkpoint_every=2", "train.eval_every=3", data)
    config = tiny_config(*options, f"storage={tmp_path}/whole", *short)
    checkpoint = trained(config)
    assert checkpoint.commit.held_out is not None
    # the same from a step on the way
    halved = config.model_copy(update={"storage": f"{tmp_path}/halves"})
    trained(halved.model_copy(update={"train": config.train.model_copy(update={"steps": 2})}))
    again = trained(halved)
    for name, tensor in checkpoint.read("ema").items():
        assert torch.equal(again.read("ema")[name], tensor)
    model, schedule = load_model(checkpoint, CPU)
    assert isinstance(model, DiT if DIT in options else UNet)
    recipe = recipe_of(config, checkpoint, 256)
    images = make_images(model, schedule, recipe, [0, 5], CPU)
    learned = config.model.learned_variance
    expected = sample(
        as_eps_theta(model, schedule),
        schedule,
        replace(config.sampler, variance_type="learned_range") if learned else config.sampler,
        seed=0,
        index=torch.tensor([5]),
        shape=(1, 8, 8),
        prediction_type=config.objective.prediction_type,
    )
    assert float(images.abs().max()) <= 1
    torch.testing.assert_close(images[1:], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", OBJECTIVES.values(), ids=OBJECTIVES)
def test_previews_are_drawn_of_every_objective(options: tuple[str, ...], data: str) -> None:
    run = open_run(tiny_config(*options, data))
    learner, tracker = Learner(run.config, CPU, run.dataset.levels), Kept()
    metrics = _evaluate(run, learner, SingleWorker(CPU), tracker, 3)
    assert all(math.isfinite(value) for value in metrics.values())
    assert list(tracker.artifacts) == ["samples/step-000000003.png"]


def test_the_variance_is_trained_and_the_bound_sees_it(data: str) -> None:
    """Hybrid moves v, and with another v the held-out bound is another one, though the prediction is the same."""
    config = tiny_config(*LEARNED, data)
    learner = Learner(config, CPU, 256)
    before = dict(learner.model.state_dict())["conv_out.weight"].clone()
    learner.step(0, made_up_batches(config, 0), SingleWorker(CPU))
    after = dict(learner.model.state_dict())["conv_out.weight"]
    assert after.shape[0] == 2
    assert bool((after[1] != before[1]).any())
    dataset, model = open_run(config).dataset, learner.averaged()
    bounds = []
    for v in (-1.0, 0.0, 1.0):
        dict(model.named_parameters())["conv_out.bias"][1] = v
        bounds.append(held_out_bound(dataset, config, model, SingleWorker(CPU), 3).total)
    assert len({round(bound, 3) for bound in bounds}) == 3


@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
def test_the_plan_counts_it(options: tuple[str, ...], data: str) -> None:
    config = tiny_config(*options, data)
    parameters, activations = network_bytes(config.model)
    assert parameters == sum(p.numel() for p in Learner(config, CPU).model.parameters())
    assert activations > 1000
    assert f"{parameters:,} parameters" in training_plan(open_run(config))


@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
def test_checkpointing_gives_the_same_weights(options: tuple[str, ...]) -> None:
    def after(*more: str) -> dict[str, torch.Tensor]:
        config = tiny_config(*options, *more)
        learner = Learner(config, CPU)
        # the last layer starts at zero and would hold all gradients back
        last = learner.model.conv_out if DIT not in options else learner.model.dense_out
        nn.init.normal_(last.weight, generator=torch.Generator().manual_seed(0))  # type: ignore[union-attr, arg-type]
        learner.step(0, made_up_batches(config, 0), SingleWorker(CPU))
        return dict(learner.model.state_dict())

    plain, checkpointed = after(), after("model.gradient_checkpointing=true")
    for name, tensor in plain.items():
        torch.testing.assert_close(checkpointed[name], tensor, rtol=0, atol=1e-6)
    kept = network_bytes(tiny_config(*options, "model.gradient_checkpointing=true").model)[1]
    assert kept < network_bytes(tiny_config(*options).model)[1]


def test_another_kind_of_network_is_refused_in_a_line(tmp_path: Path) -> None:
    config = tiny_config(DIT)
    learner = Learner(config, CPU)
    checkpoint = Checkpoints(open_storage(str(tmp_path))).save(
        learner.state(1),
        {
            "seed": 0, "run": "tiny-1", "dataset": "d", "config": config.model_dump(mode="json"), "metrics": {},
            "versions": {},
        },
    )  # fmt: skip
    with pytest.raises(UserError, match=r"^model.kind: unet, but the checkpoint .* was trained with dit$"):
        recipe_of(tiny_config(), checkpoint, 256)
    with pytest.raises(UserError, match=r"^model.depth: 2, but the checkpoint .* was trained with 1$"):
        recipe_of(tiny_config(DIT, "model.depth=2"), checkpoint, 256)
    # what changes nothing of its output may differ
    assert recipe_of(tiny_config(DIT, "model.gradient_checkpointing=true"), checkpoint, 256)
