"""The bound on held-out images is of the chain that it says: term by term against the sampler's own step."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ddpm_core import rng
from ddpm_core.networks import as_eps_theta, build_network
from ddpm_core.samplers import denoise_step, visited_timesteps
from ddpm_core.schedules import Schedule
from pipelines.conditioning import fitted
from pipelines.config import Config
from pipelines.dataset import Dataset
from pipelines.held_out import held_out_bound, model_chain, sampler_chain
from pipelines.images import to_model
from pipelines.stored_order import read_split
from pipelines.world import SingleWorker
from tests.support.data import dataset_of
from tests.support.runs import tiny_config

WORKER = SingleWorker(torch.device("cpu"))
LEARNED = (
    "model.learned_variance=true", "objective.loss=hybrid", "objective.variance_type=learned_range",
    "bound.variance_type=learned_range",
)  # fmt: skip
SAMPLERS = {
    "ancestral, β": ("sampler.kind=ancestral",),
    "ancestral, β̃, as it is": (
        "sampler.kind=ancestral", "sampler.variance_type=fixed_small", "sampler.clip=false",
    ),
    "ddim with eta 1": ("sampler.eta=1",),
    "ddim with eta 1, quadratic": ("sampler.eta=1", "sampler.spacing=quadratic"),
    "thresholded": ("sampler.eta=1", "sampler.threshold_quantile=0.9"),
    "leading": ("sampler.kind=ancestral", "sampler.spacing=leading"),
    "on log-SNR": ("sampler.kind=ancestral", "model.conditioning=log_snr"),
    "v": ("sampler.kind=ancestral", "objective.prediction_type=v"),
    "all T": ("sampler.kind=ancestral", "sampler.num_steps=null"),
    "a learned variance left aside": (*LEARNED, "sampler.eta=1"),
}  # fmt: skip


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return dataset_of(tmp_path / "data", [6])[0]


def network(config: Config) -> nn.Module:
    """Of random weights, its output not zero."""
    torch.manual_seed(0)
    model = build_network(config.model).eval().requires_grad_(False)
    for tensor in model.parameters():
        if not tensor.any():
            tensor.normal_(0, 0.2)
    return model


def every_t(*overrides: str) -> Config:
    return tiny_config("bound.num_strata=1000", "train.batch_size=4", *overrides)


def kl(mean_q: Tensor, var_q: float, mean_p: Tensor, var_p: float) -> Tensor:
    """Of two normals, nats a dimension, for each image."""
    miss = (mean_q - mean_p).square().flatten(1).mean(1)
    return 0.5 * (math.log(var_p / var_q) + var_q / var_p - 1 + miss / var_p)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_bound_is_of_the_chain_that_is_sampled(name: str, dataset: Dataset) -> None:
    config = every_t(*SAMPLERS[name])
    model = network(config)
    chain = sampler_chain(config)
    found = held_out_bound(dataset, config, model, WORKER, None, chain)

    schedule = Schedule.from_config(config.schedule)
    sampler = fitted(config.sampler, config.model)
    times = visited_timesteps(schedule, sampler).tolist()
    assert chain.reverse.process.num_timesteps == len(times)
    alphas = [float(schedule.alphas_cumprod[t]) for t in times]
    images = torch.stack([torch.from_numpy(image.copy()) for _, image, _ in read_split(dataset, "test")])
    x_start, index = to_model(images, dataset.levels), torch.arange(len(images))
    ask = as_eps_theta(model, schedule, None)
    for place in range(1, len(times)):
        noise = rng.normal(config.seed, "bound", index, dataset.shape, draw=place)
        now, before = alphas[place], alphas[place - 1]
        x_t = now**0.5 * x_start + (1 - now) ** 0.5 * noise
        output = ask(x_t, torch.full_like(index, times[place]))
        if chain.first_half:
            output = output[:, :1]
        # what the sampler does without its noise is the mean of p_θ
        mean, _ = denoise_step(chain.reverse, sampler, x_t, torch.full_like(index, place), output, None)
        beta = 1 - now / before
        small = (1 - before) / (1 - now) * beta
        large = config.sampler.kind == "ancestral" and config.sampler.variance_type == "fixed_large"
        posterior = (before**0.5 * beta * x_start + (now / before) ** 0.5 * (1 - before) * x_t) / (1 - now)
        expected = kl(posterior, small, mean, beta if large else small).mean() / math.log(2)
        assert found.per_t[place] == pytest.approx(float(expected), rel=2e-3, abs=1e-5), place
    end = alphas[-1]
    second = (x_start.square().flatten(1).mean() * end).item()
    prior = 0.5 * (second + (1 - end) - 1 - math.log(1 - end)) / math.log(2)
    assert found.prior == pytest.approx(prior, rel=1e-4)
    assert found.total == pytest.approx(sum(found.per_t) + found.prior, rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ((), "eta"),
        (("sampler.eta=0.5",), "eta"),
        (("sampler.kind=heun",), "kind"),
        (("sampler.kind=dpm_solver_pp_2m",), "kind"),
    ],
)
def test_a_sampler_without_a_bound_is_named(overrides: tuple[str, ...], told: str) -> None:
    with pytest.raises(ValueError, match=f"^{told}: "):
        sampler_chain(tiny_config(*overrides))


def test_the_models_own_chain_does_not_depend_on_the_sampler(dataset: Dataset) -> None:
    bounds = []
    for overrides in ((), ("sampler.kind=ancestral", "sampler.clip=false"), ("sampler.eta=1",)):
        config = every_t(*overrides)
        bounds.append(held_out_bound(dataset, config, network(config), WORKER, None))
        assert model_chain(config).told() == "all 50 timesteps, variance fixed_small, x̂_0 clipped"
    assert bounds[0] == bounds[1] == bounds[2]
    # and is the sampler's where that is the same chain
    same = every_t("sampler.eta=1", "sampler.num_steps=null")
    assert sampler_chain(same).told() == model_chain(same).told()
    assert held_out_bound(dataset, same, network(same), WORKER, None, sampler_chain(same)) == bounds[0]


def test_guidance_is_part_of_the_chain(dataset: Dataset) -> None:
    base = ("model.num_classes=10", "sampler.kind=ancestral")
    totals = []
    for overrides in ((), ("sample.guidance_scale=3",)):
        config = every_t(*base, *overrides)
        chain = sampler_chain(config)
        assert ("guidance 3" in chain.told()) == bool(overrides)
        totals.append(held_out_bound(dataset, config, network(config), WORKER, None, chain).total)
    assert totals[0] != totals[1]


def test_the_bound_of_images_of_no_class_asks_for_none(dataset: Dataset) -> None:
    def bound(*overrides: str) -> tuple[str, float]:
        config = every_t("model.num_classes=10", "sampler.kind=ancestral", *overrides)
        chain = sampler_chain(config)
        return chain.told(), held_out_bound(dataset, config, network(config), WORKER, None, chain).total

    told, total = bound("sample.labels=[10]")
    assert told.endswith("x̂_0 clipped, asked for no class")
    # guided by 0 the network is asked with the classes and what it says of them counts for nothing
    assert total == pytest.approx(bound("sample.guidance_scale=0")[1], rel=1e-5)
    assert bound("sample.labels=[10, 10]", "sample.guidance_scale=3") == (told, total)
    for others in ((), ("sample.labels=[3]",), ("sample.labels=[3, 10]",)):
        told_of_others, of_others = bound(*others)
        assert "no class" not in told_of_others
        assert of_others != pytest.approx(total, rel=1e-4)


def test_a_chain_says_which_it_is() -> None:
    def told(*overrides: str) -> str:
        return sampler_chain(tiny_config("sampler.kind=ancestral", *overrides)).told()

    assert told() == "5 timesteps, variance fixed_large, x̂_0 clipped"
    assert (
        told("sampler.clip=false", "sampler.num_steps=null")
        == "all 50 timesteps, variance fixed_large, x̂_0 as it is"
    )
    assert told("sampler.threshold_quantile=0.995").endswith("x̂_0 thresholded at its quantile 0.995")
