"""Which averages of the weights a run keeps, and which can be made of them afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddpm_core.ema import HalfLife
from ddpm_core.posthoc_ema import gamma_from_sigma_rel, profile_weights
from pipelines.checkpoints import CheckpointError, Checkpoints, State
from pipelines.config import Config
from pipelines.errors import UserError
from pipelines.plan import training_plan
from pipelines.posthoc import averaged_weights
from pipelines.train import Run, open_run, train
from pipelines.training import Learner
from pipelines.world import SingleWorker
from tests.support.data import dataset_of
from tests.support.runs import made_up_batches, tiny_config

CPU = torch.device("cpu")
POWERS = "ema.power_sigma_rels=[0.05, 0.1]"


def weights_after_each(learner: Learner, steps: int) -> list[dict[str, Tensor]]:
    """The weights before the first step and after each."""
    found = [{name: tensor.clone() for name, tensor in learner.model.state_dict().items()}]
    for step in range(steps):
        learner.step(step, made_up_batches(learner.config, step), SingleWorker(CPU))
        found.append({name: tensor.clone() for name, tensor in learner.model.state_dict().items()})
    return found


@pytest.mark.parametrize("ramp", [None, 0.5])
def test_a_half_life_counts_images(ramp: float | None) -> None:
    config = tiny_config(f"ema={{half_life_images: 24, ramp_ratio: {'null' if ramp is None else ramp}}}")
    learner = Learner(config, CPU)
    seen = weights_after_each(learner, 5)
    average = seen[0]["conv_out.weight"]
    for step, weights in enumerate(seen[1:]):
        # batches of 8: three steps halve a share, sooner while the ramp rises
        half_life = 24 if ramp is None else min(24, ramp * step * 8)
        kept = 0.5 ** (8 / half_life) if half_life else 0.0
        assert kept == HalfLife(24, 8, ramp).decay(step)
        average = kept * average + (1 - kept) * weights["conv_out.weight"]
    torch.testing.assert_close(learner.ema.tensors["conv_out.weight"], average)


def test_powers_are_kept_beside_and_change_nothing_else() -> None:
    plain, learner = Learner(tiny_config(), CPU), Learner(tiny_config(POWERS), CPU)
    weights_after_each(plain, 6)
    seen = weights_after_each(learner, 6)
    groups, before = learner.state(6).groups, plain.state(6).groups
    assert sorted(set(groups) - set(before)) == ["ema-0.05", "ema-0.1"]
    for group in before:
        assert all(torch.equal(groups[group][name], tensor) for name, tensor in before[group].items())
    for sigma_rel in (0.05, 0.1):
        shares = profile_weights(gamma_from_sigma_rel(sigma_rel), 6)
        expected = sum(
            float(share) * weights["conv_out.weight"].double()
            for share, weights in zip(shares, seen[1:], strict=True)
        )
        torch.testing.assert_close(groups[f"ema-{sigma_rel}"]["conv_out.weight"].double(), expected)


def test_powers_are_resumed() -> None:
    config = tiny_config(POWERS)
    whole, half = Learner(config, CPU), Learner(config, CPU)
    weights_after_each(whole, 6)
    weights_after_each(half, 3)
    state = half.state(3)
    again = Learner(config, CPU)
    again.load(
        State(3, {g: {n: t.clone() for n, t in tensors.items()} for g, tensors in state.groups.items()})
    )
    for step in range(3, 6):
        again.step(step, made_up_batches(config, step), SingleWorker(CPU))
    for group, tensors in whole.state(6).groups.items():
        assert all(torch.equal(again.state(6).groups[group][name], t) for name, t in tensors.items())
    with pytest.raises(CheckpointError):
        Learner(config, CPU).load(State(3, {g: t for g, t in state.groups.items() if g != "ema-0.1"}))


def trained(config: Config) -> Run:
    run = open_run(config)
    train(run, SingleWorker(CPU))
    return run


@pytest.fixture
def config(tmp_path: Path) -> Config:
    dataset_of(tmp_path / "data", [10, 20, 7])
    return tiny_config(
        POWERS, f"data.uri={tmp_path}/data", f"storage={tmp_path}/results", "train.steps=16",
        "train.checkpoint_every=1", "train.eval_every=16", "train.keep_checkpoints=16",
    )  # fmt: skip


def test_any_length_is_made_from_the_checkpoints(config: Config) -> None:
    run = trained(config)
    checkpoints = Checkpoints(run.storage)
    weights = [checkpoints.open(step).read("weights")["conv_out.weight"].double() for step in range(1, 17)]

    def by_hand(sigma_rel: float, step: int) -> Tensor:
        shares = profile_weights(gamma_from_sigma_rel(sigma_rel), step)
        return torch.stack([float(s) * w for s, w in zip(shares, weights, strict=False)]).sum(0)

    scale = float((weights[-1] - weights[0]).norm())
    for sigma_rel, step in ((0.05, 16), (0.07, 16), (0.2, 16), (0.1, 9), (0.08, 9)):
        made = averaged_weights(run.storage, sigma_rel, step)
        error = float((made.tensors["conv_out.weight"].double() - by_hand(sigma_rel, step)).norm())
        assert error < 0.02 * scale
        assert made.relative_error < 0.1
    # one that was tracked comes out as it is
    [tracked] = [checkpoints.open(16).read("ema-0.05")["conv_out.weight"]]
    made = averaged_weights(run.storage, 0.05, 16)
    assert torch.equal(made.tensors["conv_out.weight"], tracked)
    assert made.relative_error < 1e-6
    # and other lengths are other weights
    other = averaged_weights(run.storage, 0.2, 16).tensors["conv_out.weight"]
    assert float((other - tracked).norm()) > 0.05 * scale
    with pytest.raises(UserError, match=r"^sigma_rel: must be in 1e-6..12\*\*-0.5, got 0.5$"):
        averaged_weights(run.storage, 0.5, 16)
    with pytest.raises(UserError, match=r"^step: must be at most 16, the last snapshot's, got 17$"):
        averaged_weights(run.storage, 0.05, 17)


def test_a_run_without_powers_is_told_how_to_get_them(config: Config) -> None:
    without = config.model_copy(
        update={
            "ema": config.ema.model_copy(update={"power_sigma_rels": ()}),
            "train": config.train.model_copy(update={"steps": 1}),
        }
    )
    run = trained(without)
    with pytest.raises(UserError, match=r"hold no power-function averages; train with ema.power_sigma_rels"):
        averaged_weights(run.storage, 0.05, 1)
    assert run.name != open_run(config).name


def test_the_plan_counts_their_memory(config: Config) -> None:
    more = config.model_copy(update={"model": tiny_config("model.base_channels=128").model})
    few = more.model_copy(update={"ema": tiny_config().ema})
    state = [
        int(training_plan(open_run(one)).partition("about ")[2].partition(" MiB")[0]) for one in (few, more)
    ]
    assert state[1] == pytest.approx(state[0] * 7 / 5, rel=0.1)
