"""What a run is trained on is configuration: it shows in the step, in the state, in bounds and in images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ddpm_core import rng
from ddpm_core.conditioning import NetworkConfig
from ddpm_core.objectives import ObjectiveConfig
from ddpm_core.predictions import convert_prediction
from ddpm_core.schedules import Schedule
from pipelines.checkpoints import CheckpointError, Checkpoints, State
from pipelines.config import Config
from pipelines.dataset import Dataset
from pipelines.errors import UserError
from pipelines.held_out import held_out_bound
from pipelines.sample_recipe import recipe_of
from pipelines.sampling import load_model, make_images
from pipelines.storage import open_storage
from pipelines.training import Learner, StepResult
from pipelines.world import SingleWorker, World, streams_of
from tests.support.data import dataset_of
from tests.support.runs import made_up_batches, tiny_config, together

CPU = torch.device("cpu")

# four timesteps, so that eight images a step soon give each of them its ten losses
BY_LOSS = tiny_config(
    "schedule.num_timesteps=4", "schedule.beta_end=0.7", "sampler.num_steps=4", "objective.prediction_type=v",
    "objective.weighting=min_snr", "objective.timestep_sampling=loss_second_moment",
)  # fmt: skip
BOUND = tiny_config(
    "schedule.num_timesteps=4",
    "schedule.beta_end=0.7",
    "sampler.num_steps=4",
    "objective.loss=vlb",
    "objective.variance_type=fixed_large",
)


def go(
    config: Config, learner: Learner, world: World, start: int, stop: int
) -> tuple[list[StepResult], State]:
    streams = streams_of(world.rank, world.size, config.train.micro_batches)
    results = [
        learner.step(step, made_up_batches(config, step, streams), world) for step in range(start, stop)
    ]
    return results, copied(learner.state(stop))


def copied(state: State) -> State:
    groups = {
        group: {name: t.clone() for name, t in tensors.items()} for group, tensors in state.groups.items()
    }
    return State(state.step, groups)


def equal(a: State, b: State, groups: Sequence[str]) -> bool:
    return all(torch.equal(a.groups[g][name], b.groups[g][name]) for g in groups for name in a.groups[g])


def filled(state: State) -> bool:
    return int(state.groups["loss_moments"]["counts"].min()) >= 10


def test_t_is_drawn_by_losses_that_all_workers_share() -> None:
    results, state = go(BY_LOSS, Learner(BY_LOSS, CPU), SingleWorker(CPU), 0, 12)
    assert filled(state)
    assert int(state.groups["loss_moments"]["counts"].sum()) == 12 * 8
    outcomes = together(3, lambda world: go(BY_LOSS, Learner(BY_LOSS, CPU), world, 0, 12))
    for theirs, other in outcomes:
        for name, table in other.groups["loss_moments"].items():
            torch.testing.assert_close(table, state.groups["loss_moments"][name], rtol=1e-4, atol=1e-6)
        assert [r.loss for r in theirs] == pytest.approx([r.loss for r in results], rel=1e-4)
        assert equal(other, outcomes[0][1], list(other.groups))


def test_the_table_holds_each_samples_own_loss_at_its_own_t() -> None:
    """After one step, against the losses of the fresh network, whose output is 0: v², weighted, of each image."""
    config = BY_LOSS
    learner = Learner(config, CPU)
    _, state = go(config, learner, SingleWorker(CPU), 0, 1)
    schedule = Schedule.from_config(config.schedule)
    a = schedule.alphas_cumprod
    weights = (a / (1 - a)).clamp(max=5.0) * (1 - a)  # min(SNR, 5) on x_0, whose error is √(1 − ᾱ) times v's
    kept: list[list[float]] = [[] for _ in range(4)]
    for batch in made_up_batches(config, 0):
        ts, _ = Learner(config, CPU).loss_moments.draw(config.seed, batch.index)  # type: ignore[union-attr]
        noise = rng.normal(config.seed, "noise", batch.index, (1, 8, 8))
        for t, x_start, one in zip(ts.tolist(), batch.x_start, noise, strict=True):
            v = a[t].sqrt() * one - (1 - a[t]).sqrt() * x_start
            kept[t].append(float(weights[t] * v.square().mean()))
    tensors = state.groups["loss_moments"]
    assert tensors["counts"].tolist() == [len(losses) for losses in kept]
    for row, losses in zip(tensors["losses"], kept, strict=True):
        assert row[: len(losses)].tolist() == pytest.approx(losses, rel=1e-5)


def test_loss_and_gradient_are_weighted_by_how_seldom_t_is_drawn() -> None:
    """The fresh network says 0, so that the loss is w·weight·v², and d/d(bias of its last layer) −2·w·weight·v."""
    config = BY_LOSS.model_copy(update={"optimizer": BY_LOSS.optimizer.model_copy(update={"grad_clip": 1e6})})
    learner = Learner(config, CPU)
    assert learner.loss_moments is not None
    learner.loss_moments.update(torch.arange(40) % 4, torch.tensor([8.0, 4.0, 2.0, 1.0]).repeat(10))
    a = Schedule.from_config(config.schedule).alphas_cumprod.float()
    weights = (a / (1 - a)).clamp(max=5.0) * (1 - a)
    losses, gradients, seen = [], [], []
    for batch in made_up_batches(config, 0):
        t, w = learner.loss_moments.draw(config.seed, batch.index)
        noise = rng.normal(config.seed, "noise", batch.index, (1, 8, 8))
        a_t = a[t].reshape(-1, 1, 1, 1)
        v = a_t.sqrt() * noise - (1 - a_t).sqrt() * batch.x_start
        losses += (w * weights[t] * v.square().mean((1, 2, 3))).tolist()
        gradients += (-2 * w * weights[t] * v.mean((1, 2, 3))).tolist()
        seen += w.tolist()
    [result], _ = go(config, learner, SingleWorker(CPU), 0, 1)
    assert result.loss == pytest.approx(sum(losses) / 8, rel=1e-5)
    gradient = dict(learner.model.named_parameters())["conv_out.bias"].grad
    assert gradient is not None
    assert float(gradient) == pytest.approx(sum(gradients) / 8, rel=1e-4)
    assert min(seen) < 0.5
    assert max(seen) > 1.5


def test_a_resumed_run_draws_on_from_the_losses_it_had() -> None:
    _, expected = go(BY_LOSS, Learner(BY_LOSS, CPU), SingleWorker(CPU), 0, 14)
    _, state = go(BY_LOSS, Learner(BY_LOSS, CPU), SingleWorker(CPU), 0, 12)
    assert filled(state)
    second = Learner(BY_LOSS, CPU)
    second.load(copied(state))
    _, resumed = go(BY_LOSS, second, SingleWorker(CPU), 12, 14)
    assert equal(resumed, expected, list(expected.groups))

    # without the table it would be another run
    _, stale = go(BY_LOSS, Learner(BY_LOSS, CPU), SingleWorker(CPU), 0, 1)
    third = Learner(BY_LOSS, CPU)
    third.load(copied(State(12, {**state.groups, "loss_moments": stale.groups["loss_moments"]})))
    _, other = go(BY_LOSS, third, SingleWorker(CPU), 12, 14)
    assert not equal(other, expected, ["weights"])
    with pytest.raises(CheckpointError):
        Learner(BY_LOSS, CPU).load(State(12, {g: t for g, t in state.groups.items() if g != "loss_moments"}))


def test_a_run_with_uniform_t_keeps_no_table() -> None:
    assert sorted(Learner(tiny_config(), CPU).state(0).groups) == ["ema", "optimizer", "weights"]


def test_the_bound_is_trained_on_with_the_datas_levels() -> None:
    results, state = go(BOUND, Learner(BOUND, CPU, 17), SingleWorker(CPU), 0, 3)
    assert all(0 < result.loss < 1e6 for result in results)
    # the reconstruction of another number of levels is another loss
    coarse, _ = go(BOUND, Learner(BOUND, CPU, 3), SingleWorker(CPU), 0, 3)
    assert [r.loss for r in coarse] != [r.loss for r in results]
    shared = together(2, lambda world: go(BOUND, Learner(BOUND, CPU, 17), world, 0, 3))
    assert [r.loss for r in shared[1][0]] == pytest.approx([r.loss for r in results], rel=1e-4)
    assert sorted(state.groups) == ["ema", "optimizer", "weights"]


def test_bound_and_images_take_the_output_for_what_it_was_trained_to_be(tmp_path: Path) -> None:
    """One function told as ε, as v and as x_0: one bound and one image; taken for another, another bound."""
    dataset_of(tmp_path / "data", [10, 20, 7])
    dataset = Dataset.load(str(tmp_path / "data"))
    schedule = Schedule.from_config(tiny_config().schedule)
    bounds, images = {}, {}
    for kind in ("eps", "v", "x_start"):
        config = tiny_config(f"objective.prediction_type={kind}", f"data.uri={tmp_path}/data")

        class Network(nn.Module):
            config = NetworkConfig(8, 1)
            said = kind

            def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
                return convert_prediction(schedule, x_t, t, 0.9 * x_t, "eps", self.said)  # type: ignore[arg-type]

        network = Network()
        bounds[kind] = held_out_bound(dataset, config, network, SingleWorker(CPU), 3).total
        learner = Learner(config, CPU)
        go(config, learner, SingleWorker(CPU), 0, 1)
        checkpoint = Checkpoints(open_storage(str(tmp_path / kind))).save(
            learner.state(1),
            {
                "seed": 0, "run": "tiny-1", "dataset": "d", "config": config.model_dump(mode="json"),
                "metrics": {}, "versions": {},
            },
        )  # fmt: skip
        made = recipe_of(config, checkpoint, 256)
        assert made.prediction_type == kind
        images[kind] = make_images(network, load_model(checkpoint, CPU)[1], made, [3], CPU)
        if kind != "eps":
            with pytest.raises(
                UserError, match=rf"^objective.prediction_type: eps, but .* was trained with {kind}"
            ):
                recipe_of(tiny_config(), checkpoint, 256)
            taken_for_eps = held_out_bound(dataset, tiny_config(), network, SingleWorker(CPU), 3).total
            assert abs(taken_for_eps - bounds["eps"]) > 0.1
    assert bounds["v"] == pytest.approx(bounds["eps"], rel=1e-4)
    assert bounds["x_start"] == pytest.approx(bounds["eps"], rel=1e-4)
    torch.testing.assert_close(images["v"], images["eps"], rtol=0, atol=1e-3)
    torch.testing.assert_close(images["x_start"], images["eps"], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.loss=hybrid", "objective.variance_type: must be 'learned_range' for the loss 'hybrid'"),
        ("objective.prediction_type=noise", "objective.prediction_type: "),
        ("objective.min_snr_gamma=0", "objective.min_snr_gamma: must be positive and finite, got 0.0"),
        ("objective.p2=1", "objective.p2: no such setting; did you mean 'p2_k'"),
        ("{objective.loss: vlb, objective.weighting: snr}", "objective.weighting: must be 'uniform'"),
        (
            "{objective.loss: vlb, objective.variance_type: learned_range}",
            "objective.variance_type: .* has no channels for a variance",
        ),
    ],
)
def test_a_wrong_objective_names_its_field(override: str, message: str) -> None:
    overrides = override.strip("{}").replace(": ", "=").split(", ")
    with pytest.raises(UserError, match=message):
        tiny_config(*overrides)


def test_only_what_is_not_the_default_enters_the_identity() -> None:
    assert "objective" not in tiny_config().training_identity("d")
    explicit = tiny_config("objective.prediction_type=eps", "objective.vlb_weight=1e-3")
    assert explicit.training_identity("d") == tiny_config().training_identity("d")
    assert tiny_config("objective.prediction_type=v").training_identity("d")["objective"] == {
        "prediction_type": "v"
    }
    assert ObjectiveConfig().identity() == {}
