"""A step is a function of (configuration, step, data): of the number of workers and of interruptions it is not."""

from __future__ import annotations

import gc
import logging
import math
import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpm_core import rng
from ddpm_core.unet import UNetConfig
from pipelines.checkpoints import CheckpointError, Checkpoints, State
from pipelines.config import Config, load_config
from pipelines.config_sections import OptimizerConfig
from pipelines.dataset import Dataset
from pipelines.errors import UserError
from pipelines.held_out import held_out_bound
from pipelines.plan import network_bytes, training_plan
from pipelines.reader import StreamBatches
from pipelines.storage import open_storage
from pipelines.tracking import History
from pipelines.train import Run, _evaluate, claim, open_run, train
from pipelines.training import Learner, StepResult, TrainingError, is_due, learning_rate
from pipelines.world import SingleWorker, World, streams_of
from tests.support.data import dataset_of, packed, put_dataset, random_images
from tests.support.runs import Batch, Kept, TeamWorker, made_up_batches, tiny_config, together

CPU = torch.device("cpu")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A run on 37 images in three shards, which is no multiple of the batch."""
    dataset_of(tmp_path / "data", [10, 20, 7])
    return tiny_config(f"data.uri={tmp_path}/data", f"storage={tmp_path}/results")


def batches_of(config: Config, streams: list[int], start: int, **options: bool) -> StreamBatches:
    settings = config.train
    return StreamBatches(
        Dataset.load(config.data.uri),
        "train",
        seed=config.seed,
        num_streams=settings.micro_batches,
        streams=streams,
        micro_batch_size=settings.batch_size // settings.micro_batches,
        start_step=start,
        flip=config.data.flip,
        **options,  # type: ignore[arg-type]
    )


def go(config: Config, learner: Learner, world: World, start: int, stop: int) -> list[StepResult]:
    """The steps from `start` to `stop` of a run on its data set."""
    streams = streams_of(world.rank, world.size, config.train.micro_batches)
    with closing(batches_of(config, streams, start)) as batches:
        return [learner.step(step, next(batches), world) for step in range(start, stop)]


def test_images_as_bytes_train_as_their_numbers_do(config: Config) -> None:
    results = []
    for as_bytes in (False, True):
        learner = Learner(config, CPU, 256)
        with closing(batches_of(config, [0, 1, 2, 3], 0, as_bytes=as_bytes)) as batches:
            results.append([learner.step(step, next(batches), SingleWorker(CPU)) for step in range(3)])
    assert results[0] == results[1]


def copied(state: State) -> State:
    groups = {
        group: {name: tensor.clone() for name, tensor in tensors.items()}
        for group, tensors in state.groups.items()
    }
    return State(state.step, groups)


def differences(a: State, b: State, *, rtol: float = 0.0, atol: float = 0.0) -> list[str]:
    """Names of the tensors that differ."""
    found = []
    assert a.groups.keys() == b.groups.keys()
    for group, tensors in a.groups.items():
        assert tensors.keys() == b.groups[group].keys()
        for name, tensor in tensors.items():
            if not torch.allclose(tensor, b.groups[group][name], rtol=rtol, atol=atol):
                found.append(f"{group}/{name}")
    return found


def weights_of(state: State) -> State:
    """The weights and their average that do something.

    Attention ignores a bias of its keys (it adds the same to every score), so that its gradient is nothing but
    rounding, which Adam makes as large as every other.
    """
    groups = {
        group: {name: t for name, t in state.groups[group].items() if not name.endswith("attention.key.bias")}
        for group in ("weights", "ema")
    }
    return State(state.step, groups)


@pytest.mark.parametrize(("size", "steps"), [(2, 20), (3, 5)])
def test_after_20_steps_several_workers_are_where_one_is(config: Config, size: int, steps: int) -> None:
    alone = Learner(config, CPU)
    expected = go(config, alone, SingleWorker(CPU), 0, steps)

    def work(world: TeamWorker) -> tuple[list[StepResult], State]:
        learner = Learner(config, CPU)
        return go(config, learner, world, 0, steps), learner.state(steps)

    outcomes = together(size, work)
    for results, state in outcomes:
        for ours, theirs in zip(results, expected, strict=True):
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
            assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
        # the same bits on every worker
        assert differences(state, outcomes[0][1]) == []
        assert outcomes[0][0] == results
        assert differences(weights_of(state), weights_of(alone.state(steps)), rtol=1e-4, atol=1e-6) == []
    # the run is long enough to tell: dropout and flips are on, and the weights have moved
    assert isinstance(config.model, UNetConfig)
    assert config.model.dropout > 0
    assert config.data.flip
    moved = differences(weights_of(alone.state(steps)), weights_of(Learner(config, CPU).state(0)), rtol=1e-2)
    assert len(moved) > 40


def test_a_mean_of_the_workers_means_would_be_seen(config: Config) -> None:
    """Three workers share four micro-batches 1, 1, 2: only a sum over samples gives each its weight."""

    class Averaging(TeamWorker):
        def all_reduce(self, tensor: Tensor) -> None:
            super().all_reduce(tensor)
            tensor /= self.size

    def work(world: TeamWorker) -> list[StepResult]:
        return go(config, Learner(config, CPU), Averaging(world.team, world.rank), 0, 3)

    expected = go(config, Learner(config, CPU), SingleWorker(CPU), 0, 3)
    assert together(3, work)[0][2].loss != pytest.approx(expected[2].loss, rel=1e-2)


@pytest.mark.parametrize(
    ("override", "seen"), [("model.dropout=0.0", True), ("data.flip=false", True), ("seed=1", True)]
)
def test_dropout_flips_and_seed_are_really_on(config: Config, override: str, seen: bool) -> None:
    changed = tiny_config(f"data.uri={config.data.uri}", override)
    results = [go(one, Learner(one, CPU), SingleWorker(CPU), 0, 4)[3].loss for one in (config, changed)]
    assert (results[0] != results[1]) == seen


def test_dropout_is_new_for_every_step_and_stream_and_the_same_for_each_again() -> None:
    config = tiny_config("train.batch_size=4")
    masks: dict[tuple[int, int], Tensor] = {}
    learner = Learner(config, CPU)
    [dropout, *_] = [module for module in learner.model.modules() if isinstance(module, nn.Dropout)]
    seen: list[Tensor] = []
    dropout.register_forward_hook(
        lambda module, inputs, output: seen.append((output == 0) & (inputs[0] != 0))
    )
    for step, streams in ((0, [0, 1]), (0, [2, 3]), (1, [3, 0])):
        seen.clear()
        learner.step(step, made_up_batches(config, step, streams), SingleWorker(CPU))
        masks |= {(step, stream): mask for stream, mask in zip(streams, seen, strict=True)}
    keys = list(masks)
    assert all(0 < float(mask.float().mean()) < 0.5 for mask in masks.values())
    assert not [(a, b) for a in keys for b in keys if a < b and torch.equal(masks[a], masks[b])]
    torch.rand(7)
    seen.clear()
    learner.step(1, made_up_batches(config, 1, [0]), SingleWorker(CPU))
    assert torch.equal(seen[0], masks[1, 0])


def test_a_resumed_run_equals_the_undisturbed_one_bit_for_bit(config: Config, tmp_path: Path) -> None:
    undisturbed = Learner(config, CPU)
    expected = go(config, undisturbed, SingleWorker(CPU), 0, 20)
    first = Learner(config, CPU)
    results = go(config, first, SingleWorker(CPU), 0, 10)
    checkpoints = Checkpoints(open_storage(str(tmp_path / "run")))
    commit = {"seed": 0, "run": "r", "dataset": "d", "config": {}, "metrics": {}, "versions": {}}
    checkpoints.save(first.state(10), commit)
    torch.manual_seed(12345)  # another process has another generator
    second = Learner(config, CPU)
    found = checkpoints.newest()
    assert found is not None
    second.load(found)
    assert differences(second.state(10), first.state(10)) == []
    results += go(config, second, SingleWorker(CPU), 10, 20)
    assert results == expected
    assert differences(second.state(20), undisturbed.state(20)) == []


def test_each_part_of_the_state_is_needed_for_that(config: Config) -> None:
    undisturbed = Learner(config, CPU)
    go(config, undisturbed, SingleWorker(CPU), 0, 2)
    stale = copied(undisturbed.state(2))
    go(config, undisturbed, SingleWorker(CPU), 2, 3)
    state = copied(undisturbed.state(3))
    go(config, undisturbed, SingleWorker(CPU), 3, 4)
    for group in ("weights", "ema", "optimizer"):
        second = Learner(config, CPU)
        second.load(State(3, {**state.groups, group: stale.groups[group]}))
        go(config, second, SingleWorker(CPU), 3, 4)
        assert differences(second.state(4), undisturbed.state(4)) != []


def test_a_state_may_cross_numbers_of_workers(config: Config) -> None:
    expected = go(config, Learner(config, CPU), SingleWorker(CPU), 0, 6)

    def begin(world: TeamWorker) -> State:
        learner = Learner(config, CPU)
        go(config, learner, world, 0, 4)
        return copied(learner.state(4))

    state = together(3, begin)[0]

    def go_on(world: TeamWorker) -> list[StepResult]:
        learner = Learner(config, CPU)
        learner.load(state)
        return go(config, learner, world, 4, 6)

    assert [r.loss for r in together(2, go_on)[1]] == pytest.approx([r.loss for r in expected[4:]], rel=1e-5)


def test_a_state_of_another_network_is_refused(config: Config) -> None:
    other = Learner(tiny_config("model.base_channels=12"), CPU)
    with pytest.raises(CheckpointError, match="step 3 holds another network than model describes"):
        Learner(config, CPU).load(other.state(3))
    fewer = Learner(config, CPU).state(3)
    fewer.groups["ema"].popitem()
    with pytest.raises(CheckpointError, match="another network"):
        Learner(config, CPU).load(fewer)


def test_an_optimiser_that_is_not_whole_is_refused(config: Config) -> None:
    """Going on without some of Adam's moments would be a run of its own, and nobody would be told."""
    learner = Learner(config, CPU)
    go(config, learner, SingleWorker(CPU), 0, 2)
    state = copied(learner.state(2))
    state.groups["optimizer"].pop("exp_avg/conv_in.weight")
    with pytest.raises(CheckpointError):
        Learner(config, CPU).load(state)
    without = State(2, {group: state.groups[group] for group in ("weights", "ema")})
    with pytest.raises(CheckpointError):
        Learner(config, CPU).load(without)


def poisoned(value: float) -> Callable[[list[Batch]], list[Batch]]:
    def change(batches: list[Batch]) -> list[Batch]:
        batches[-1].x_start[0, 0, 0, 0] = value
        return batches

    return change


# a number, so that it is let in, of which the network makes inf or nan
ENORMOUS = 3e38


@pytest.mark.parametrize("value", [ENORMOUS, -ENORMOUS])
def test_a_loss_that_is_no_number_touches_nothing(value: float) -> None:
    config = tiny_config()
    learner = Learner(config, CPU)
    for step in range(3):
        learner.step(step, made_up_batches(config, step), SingleWorker(CPU))
    before = copied(learner.state(3))
    with pytest.raises(TrainingError) as caught:
        learner.step(3, poisoned(value)(made_up_batches(config, 3)), SingleWorker(CPU))
    assert re.fullmatch(
        r"step 4: loss (nan|inf), gradient norm (nan|inf): training diverged; lower optimizer\.learning_rate "
        r"\(0\.001\) or lengthen optimizer\.warmup_steps \(5\)",
        str(caught.value),
    )
    assert differences(learner.state(3), before) == []
    # nor does it stay in the gradients
    learner.step(3, made_up_batches(config, 3), SingleWorker(CPU))
    assert all(bool(t.isfinite().all()) for t in learner.state(4).groups["weights"].values())


def test_a_gradient_that_is_no_number_touches_nothing() -> None:
    config = tiny_config()
    learner = Learner(config, CPU)
    before = copied(learner.state(0))
    parameter = next(learner.model.parameters())
    parameter.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(TrainingError, match=r"step 1: loss [0-9.]+, gradient norm nan"):
        learner.step(0, made_up_batches(config, 0), SingleWorker(CPU))
    assert differences(learner.state(0), before) == []


def test_every_worker_meets_the_end_of_the_one_that_diverged() -> None:
    config = tiny_config()

    def work(world: TeamWorker) -> str:
        learner = Learner(config, CPU)
        streams = streams_of(world.rank, world.size, config.train.micro_batches)
        batches = made_up_batches(config, 0, streams)
        if world.rank == 1:
            poisoned(ENORMOUS)(batches)
        with pytest.raises(TrainingError) as caught:
            learner.step(0, batches, world)
        assert differences(learner.state(0), Learner(config, CPU).state(0)) == []
        return str(caught.value)

    messages = together(2, work)
    assert messages[0] == messages[1]


def test_the_gradient_is_clipped_by_its_norm_and_the_norm_is_told_unclipped() -> None:
    loose, tight = tiny_config("optimizer.grad_clip=1000"), tiny_config("optimizer.grad_clip=0.01")
    gradients = []
    for config in (loose, tight):
        learner = Learner(config, CPU)
        # the last layer starts at zero, and behind it there is no gradient yet
        nn.init.normal_(learner.model.conv_out.weight, generator=torch.Generator().manual_seed(0))  # type: ignore[union-attr, arg-type]
        result = learner.step(0, made_up_batches(config, 0), SingleWorker(CPU))
        gradient = torch.cat([p.grad.reshape(-1) for p in learner.model.parameters() if p.grad is not None])
        gradients.append((gradient, result.grad_norm))
    (free, free_norm), (clipped, clipped_norm) = gradients
    assert free_norm == clipped_norm == pytest.approx(float(free.norm()), rel=1e-5)
    assert free_norm > 1
    assert float(clipped.norm()) == pytest.approx(0.01, rel=1e-4)
    torch.testing.assert_close(clipped, free * (0.01 / free_norm), rtol=1e-4, atol=1e-9)


def test_a_step_is_adam_on_the_mean_over_the_global_batch() -> None:
    """Against torch's own Adam and plain means, without micro-batches, at a network without dropout."""
    overrides = ("model.dropout=0", "optimizer.grad_clip=1000", "optimizer.warmup_steps=0")
    config = tiny_config(*overrides)
    learner = Learner(config, CPU)
    reference = Learner(config, CPU)
    optimizer = torch.optim.Adam(reference.model.parameters(), lr=0.001)
    ema = {name: tensor.clone() for name, tensor in reference.model.state_dict().items()}
    for step in range(3):
        parts = made_up_batches(config, step)
        result = learner.step(step, parts, SingleWorker(CPU))
        index, x_start = torch.cat([p.index for p in parts]), torch.cat([p.x_start for p in parts])
        t = rng.integers(config.seed, "timestep", index, 50)
        noise = rng.normal(config.seed, "noise", index, (1, 8, 8))
        abar = reference.schedule.alphas_cumprod[t].float().reshape(-1, 1, 1, 1)
        eps = reference.model(abar.sqrt() * x_start + (1 - abar).sqrt() * noise, t)
        loss = (noise - eps).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay = min(0.9, (1 + step) / (10 + step))
        new = reference.model.state_dict()
        ema = {name: decay * old + (1 - decay) * new[name] for name, old in ema.items()}
        assert result.loss == pytest.approx(float(loss.detach()), rel=1e-5)
    groups = learner.state(3).groups
    for name, tensor in reference.model.state_dict().items():
        torch.testing.assert_close(groups["weights"][name], tensor, rtol=1e-3, atol=2e-5)
        torch.testing.assert_close(groups["ema"][name], ema[name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("warmup", "step", "expected"),
    [(5, 0, 0.2), (5, 1, 0.4), (5, 4, 1.0), (5, 5, 1.0), (5, 10**6, 1.0), (0, 0, 1.0), (1, 0, 1.0)],
)
def test_warm_up(warmup: int, step: int, expected: float) -> None:
    settings = OptimizerConfig(learning_rate=2e-4, warmup_steps=warmup)
    assert learning_rate(settings, step) == pytest.approx(2e-4 * expected, rel=1e-12)


def test_the_warm_up_is_what_adam_gets() -> None:
    config = tiny_config("optimizer.warmup_steps=4")
    learner = Learner(config, CPU)
    rates = []
    for step in range(6):
        result = learner.step(step, made_up_batches(config, step), SingleWorker(CPU))
        assert learner.optimizer.param_groups[0]["lr"] == result.learning_rate
        rates.append(result.learning_rate)
    assert rates == pytest.approx([0.00025, 0.0005, 0.00075, 0.001, 0.001, 0.001])


@pytest.mark.parametrize("num_streams", [1, 2, 3, 7, 8])
def test_the_workers_streams_are_all_streams_once(num_streams: int) -> None:
    for size in range(1, num_streams + 1):
        shares = [streams_of(rank, size, num_streams) for rank in range(size)]
        assert [stream for share in shares for stream in share] == list(range(num_streams))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_is_due() -> None:
    assert [step for step in range(1, 12) if is_due(step, 4, 11)] == [4, 8, 11]
    assert [step for step in range(1, 5) if is_due(step, 100, 4)] == [4]


def test_the_averaged_network_is_a_copy_for_evaluation() -> None:
    config = tiny_config()
    learner = Learner(config, CPU)
    for step in range(2):
        learner.step(step, made_up_batches(config, step), SingleWorker(CPU))
    averaged = learner.averaged()
    assert not averaged.training
    assert not any(parameter.requires_grad for parameter in averaged.parameters())
    for name, tensor in averaged.state_dict().items():
        assert torch.equal(tensor, learner.ema.tensors[name])
        assert tensor.data_ptr() != learner.ema.tensors[name].data_ptr()


def test_the_cifar10_network_takes_a_step() -> None:
    config = load_config("cifar10.yaml", ["train.batch_size=1", "train.micro_batches=1", "workers.num=1"])
    learner = Learner(config, CPU)
    assert sum(parameter.numel() for parameter in learner.model.parameters()) == 35_746_307
    before = {
        name: p.detach().clone() for name, p in learner.model.named_parameters() if name.startswith("conv_")
    }
    result = learner.step(0, made_up_batches(config, 0), SingleWorker(CPU))
    # the untrained network predicts no noise at all, so the loss is the noise's own power
    assert result.loss == pytest.approx(1.0, abs=0.1)
    assert result.learning_rate == pytest.approx(2e-4 / 5000)
    after = dict(learner.model.named_parameters())
    assert not torch.equal(before["conv_out.weight"], after["conv_out.weight"])


# --- the whole run ---


@pytest.fixture
def short(config: Config, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Two checkpoints in eight steps, without a tracking server."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return with_train(config, micro_batches=2, steps=8, eval_every=4, checkpoint_every=4)


def with_train(config: Config, **changes: Any) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update=changes)})


def losses(run: Run) -> list[tuple[int, float]]:
    return [(row.step, row.metrics["loss"]) for row in History(run.storage).rows() if "loss" in row.metrics]


def trained(config: Config, world: World | None = None) -> Run:
    run = open_run(config)
    claim(run)
    train(run, world or SingleWorker(CPU))
    return run


def test_a_run_from_data_to_checkpoint(short: Config) -> None:
    reports: list[dict[str, float | str]] = []
    run = trained(short, SingleWorker(CPU, reports.append))
    assert Checkpoints(run.storage).steps() == [4, 8]
    commit = Checkpoints(run.storage).open(8).commit
    assert commit.dataset == run.dataset.identity
    assert commit.run == run.name
    assert Config.model_validate(commit.config) == short
    assert [step for step, _ in losses(run)] == [2, 4, 6, 8]
    assert [report["step"] for report in reports] == [4, 8]
    assert reports[-1]["bits_per_dim"] == commit.held_out == commit.metrics["held_out/total"]
    parts = [commit.metrics[f"held_out/{part}"] for part in ("reconstruction", "consistency", "prior")]
    assert commit.held_out == pytest.approx(sum(parts))
    assert all(type(value) in (int, float) for report in reports for value in report.values())
    rows = {row.step: row.metrics for row in History(run.storage).rows()}
    assert rows[2].keys() == {"loss", "grad_norm", "learning_rate", "images_per_s"}
    assert rows[8]["held_out/total"] == commit.held_out
    # all that a run leaves
    assert {info.key.split("/")[0] for info in run.storage.list()} == {"checkpoints", "history", "run.json"}


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on_as_if_nothing_had_been(short: Config, tmp_path: Path) -> None:
    config = with_train(short, steps=10)
    undisturbed = trained(config.model_copy(update={"storage": str(tmp_path / "undisturbed")}))
    save = Checkpoints.save
    for when in ("after the commit at 4", "before the commit at 8"):

        def kill(metrics: dict[str, float | str], when: str = when) -> None:
            if metrics["step"] == 4 and when == "after the commit at 4":
                raise Killed

        def save_or_die(self: Checkpoints, state: State, record: dict[str, Any], when: str = when) -> Any:
            if state.step == 8 and when == "before the commit at 8":
                raise Killed
            return save(self, state, record)

        interrupted = config.model_copy(update={"storage": str(tmp_path / when)})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Checkpoints, "save", save_or_die)
            with pytest.raises(Killed):
                trained(interrupted, SingleWorker(CPU, kill))
        reports: list[dict[str, float | str]] = []
        run = trained(interrupted, SingleWorker(CPU, reports.append))
        # a new driver hears of what was measured before it
        assert [report["step"] for report in reports] == [4, 8, 10]
        assert losses(run) == losses(undisturbed)
        for step in (4, 8, 10):
            ours, theirs = (Checkpoints(r.storage).open(step) for r in (run, undisturbed))
            assert ours.identity == theirs.identity
            assert ours.commit.held_out == theirs.commit.held_out


def test_a_finished_run_goes_further_when_asked(short: Config) -> None:
    run = trained(short)
    before = [info.key for info in run.storage.list()]
    trained(short)
    assert [info.key for info in run.storage.list()] == before
    again = trained(with_train(short, steps=9))
    assert again.storage.uri == run.storage.uri
    assert Checkpoints(run.storage).steps() == [4, 8, 9]


def test_two_workers_leave_the_run_of_one(short: Config, tmp_path: Path) -> None:
    alone = trained(short.model_copy(update={"storage": str(tmp_path / "alone")}))
    reports = together(2, lambda world: (trained(short, world), world.reports)[1])
    run = open_run(short)
    assert [step for step, _ in losses(run)] == [step for step, _ in losses(alone)]
    assert [loss for _, loss in losses(run)] == pytest.approx([loss for _, loss in losses(alone)], rel=1e-5)
    ours, theirs = (Checkpoints(r.storage).open(8).commit.held_out for r in (run, alone))
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert reports[0] == reports[1]
    assert len(Checkpoints(run.storage).open(8).commit.objects) == 3


def test_workers_share_the_images_of_the_bound(short: Config) -> None:
    run = open_run(short)
    model = Learner(short, CPU).averaged()
    alone = held_out_bound(run.dataset, short, model, SingleWorker(CPU), None)
    for size in (2, 4):
        shared = together(size, lambda world: held_out_bound(run.dataset, short, model, world, None))
        # of four workers one has no image
        assert [bound.num_images for bound in shared] == [3] * size
        assert len({bound.total for bound in shared}) == 1
        assert shared[0].total == pytest.approx(alone.total, rel=1e-6)
        assert shared[0].total_stderr == pytest.approx(alone.total_stderr, rel=1e-4)
    assert held_out_bound(run.dataset, short, model, SingleWorker(CPU), 2).num_images == 2


def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(short: Config) -> None:
    run = trained(short)
    expected = Checkpoints(run.storage).open(8).identity
    folder = run.storage.child("checkpoints/step-000000008")
    [key] = [info.key for info in folder.list() if info.key.startswith("ema")]
    folder.put(key, b"damaged")
    reports: list[dict[str, float | str]] = []
    trained(short, SingleWorker(CPU, reports.append))
    assert [report["step"] for report in reports] == [4, 8]
    again = Checkpoints(run.storage).open(8)
    assert again.identity == expected
    again.read_all()


def test_one_held_out_image_is_enough_for_a_run(short: Config) -> None:
    """Its standard error is no number, and the commit record must stay readable."""
    one = short.model_copy(update={"bound": short.bound.model_copy(update={"num_images": 1})})
    run = trained(with_train(one, steps=4))
    commit = Checkpoints(run.storage).open(4).commit
    assert commit.held_out is not None
    assert math.isnan(commit.metrics["held_out/total_stderr"])
    assert Checkpoints(trained(with_train(one, steps=5)).storage).steps() == [4, 5]


def test_a_run_that_diverges_keeps_its_checkpoints(short: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Learner.step

    def diverge(self: Learner, number: int, *rest: Any) -> StepResult:
        if number == 5:
            nn.init.constant_(next(self.model.parameters()), math.nan)
        return step(self, number, *rest)

    monkeypatch.setattr(Learner, "step", diverge)
    with pytest.raises(TrainingError, match=r"^step 6: loss nan"):
        trained(short)
    run = open_run(short)
    assert Checkpoints(run.storage).steps() == [4]
    assert Checkpoints(run.storage).open(4).read_all().step == 4


def test_a_run_whose_average_gives_nan_ends_at_its_evaluation(
    short: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last step before an evaluation may be the one that breaks the weights, its own loss being finite."""
    step = Learner.step

    def break_afterwards(self: Learner, number: int, *rest: Any) -> StepResult:
        result = step(self, number, *rest)
        if number == 7:
            for tensor in self.ema.tensors.values():
                tensor.fill_(math.nan)
        return result

    monkeypatch.setattr(Learner, "step", break_afterwards)
    with pytest.raises(
        TrainingError, match=r"^step 8: held-out bound nan bits/dim: training diverged; lower opt"
    ):
        trained(short)
    assert Checkpoints(open_run(short).storage).steps() == [4]


def test_a_preview_that_holds_nan_is_left_out_with_a_warning(
    short: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A sampler may run away where the network is sound."""
    monkeypatch.setattr(logging.getLogger("pipelines"), "propagate", True)
    monkeypatch.setattr("pipelines.preview.sample", lambda *_, **__: torch.full((64, 1, 8, 8), math.nan))
    run, tracker = open_run(short), Kept()
    with caplog.at_level(logging.WARNING, "pipelines"):
        found = _evaluate(run, Learner(short, CPU), SingleWorker(CPU), tracker, 4)
    assert math.isfinite(found["held_out/total"])
    assert tracker.artifacts == {}
    assert "step 4: no picture of samples: the sampler gives numbers that are no numbers (NaN)" in caplog.text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.image_size=16", "model.image_size: 16, but the images of .*/data are 8×8"),
        ("model.in_channels=3", "model.in_channels: 3, but the images of .*/data have 1 channels"),
        ("data.uri=nowhere", "there is no finished data set here"),
    ],
)
def test_a_configuration_that_does_not_fit_the_data_writes_nothing(
    config: Config, override: str, message: str, tmp_path: Path
) -> None:
    overrides = [f"data.uri={config.data.uri}", f"storage={config.storage}", "model.attention_resolutions=[]"]
    with pytest.raises(UserError, match=message):
        open_run(tiny_config(*overrides, override))
    assert not (tmp_path / "results").exists()


def test_each_field_that_does_not_fit_the_data_is_named(config: Config) -> None:
    other = tiny_config(f"data.uri={config.data.uri}", "model.image_size=16", "model.in_channels=3")
    with pytest.raises(UserError) as caught:
        open_run(other)
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == [
        "model.image_size",
        "model.in_channels",
    ]


def test_an_empty_split_is_named(tmp_path: Path) -> None:
    shard = packed(random_images(3))
    put_dataset(tmp_path / "data", {"train": [shard], "test": []}, (1, 8, 8))
    with pytest.raises(UserError, match="its test split is empty"):
        open_run(tiny_config(f"data.uri={tmp_path}/data"))


def test_a_folder_of_another_run_is_refused(config: Config) -> None:
    run = open_run(config)
    claim(run)
    claim(run)
    run.storage.put("run.json", b'{"format_version": 1, "name": "x", "identity": {"seed": 99}}')
    with pytest.raises(UserError, match=r"run\.json: belongs to another run"):
        claim(run)
    hostile = b'{"format_version": 1, "name": "x", "identity": %s}'
    for identity, told in (
        (b'{"a":' * 900 + b"1" + b"}" * 900, "is nested more than"),
        (b'{"seed": NaN}', "holds a number that is not finite"),
        (b'{"seed": 1e999}', "holds a number that is not finite"),
        (b"[3]", "identity: Input should be a valid dictionary"),
        (b"null", "identity: Input should be a valid dictionary"),
    ):
        run.storage.put("run.json", hostile % identity)
        with pytest.raises(UserError, match=rf"^{run.storage.uri}/run\.json: {told}"):
            claim(run)
    run.storage.put("run.json", b'{"format_version": 1, "na')
    with pytest.raises(UserError, match=r"run\.json: is not JSON; the object is damaged$"):
        claim(run)


def test_the_plan_names_data_steps_memory_and_output(config: Config) -> None:
    run = open_run(config)
    plan = training_plan(run)
    fields = dict(line.split(maxsplit=1) for line in plan.splitlines())
    assert list(fields)[:9] == [
        "run", "data", "schedule", "model", "steps", "batch", "memory", "output", "warning",
    ][: len(fields)]  # fmt: skip
    parameters = sum(parameter.numel() for parameter in Learner(config, CPU).model.parameters())
    assert fields["run"] == run.name
    assert "37 training and 3 held-out images, 1×8×8, 256 levels" in fields["data"]
    assert fields["data"].endswith("in 3 shards")
    assert fields["model"] == f"{parameters:,} parameters"
    assert fields["steps"] == f"0 done, 20 to go; {20 * 8 / 37:.1f} epochs in all"
    assert fields["batch"] == "8 = 4 micro-batches of 2, over 1 workers"
    assert re.fullmatch(
        r"a worker: about \d+ MiB of state, \d+ MiB of activations, up to 256 MiB of shards, 0 MiB of images",
        fields["memory"],
    )
    assert fields["output"] == run.storage.uri
    # and it does nothing
    assert run.storage.list() == []


@pytest.mark.parametrize(
    ("overrides", "memory"),
    [
        # half of 16,384 images of 8×8 numbers is 2 MiB a step
        ((), "12 MiB of images"),
        (("data.reader=process",), "18 MiB of images, some 300 MiB for the process that reads"),
        (("workers.gpus=1",), "3 MiB of images"),
        (("workers.num=3",), "12 MiB of images"),
    ],
)
def test_the_plan_counts_the_images_that_are_read_ahead(
    config: Config, overrides: tuple[str, ...], memory: str
) -> None:
    where = (f"data.uri={config.data.uri}", f"storage={config.storage}")
    sizes = ("train.batch_size=16384", "train.micro_batches=4", "workers.num=2")
    plan = training_plan(open_run(tiny_config(*where, *sizes, *overrides)))
    assert re.search(rf"MiB of shards, {memory}$", plan, re.MULTILINE)


def test_the_plan_counts_what_is_done_and_warns(short: Config) -> None:
    run = trained(with_train(short, steps=4))
    assert "4 done, 4 to go" in training_plan(open_run(short))
    assert "4 done, 0 to go" in training_plan(run)
    abrupt = tiny_config(
        f"data.uri={short.data.uri}",
        "schedule.num_timesteps=3",
        "schedule.beta_end=0.001",
        "sampler.num_steps=3",
    )
    assert "warning    x_T is not close to N(0, I)" in training_plan(open_run(abrupt))


def test_activations_are_those_that_the_backward_pass_keeps() -> None:
    config = tiny_config("model.dropout=0")
    parameters, activations = network_bytes(config.model)
    model = Learner(config, CPU).model
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64))
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    real = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)
    assert out.shape == (1, 1, 8, 8)
    assert parameters == sum(parameter.numel() for parameter in model.parameters())
    # what stands for "about" in the plan
    assert activations == pytest.approx(real, rel=0.25)
    assert real > 10_000


# --- memory ---


def held(config: Config, numbers: list[int]) -> list[tuple[int, int]]:
    """How many objects Python keeps track of after so many steps of a learner, and the bytes of those that are
    tensors. What a reader holds, another test counts.
    """
    learner, world = Learner(config, CPU), SingleWorker(CPU)
    found = []
    for step in range(numbers[-1]):
        learner.step(step, made_up_batches(config, step), world)
        if step + 1 in numbers:
            gc.collect()
            there = gc.get_objects()
            tensors = [one for one in there if issubclass(type(one), Tensor)]
            found.append((len(there), sum(map(num_bytes, tensors))))
    return found


def num_bytes(tensor: Tensor) -> int:
    """0 for what a transform that has ended left behind, of which nothing can be asked."""
    try:
        return tensor.nbytes
    except RuntimeError:
        return 0


def test_a_learner_holds_after_many_steps_what_it_held_after_few(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("data.on_bad_sample=skip", "objective.timestep_sampling=loss_second_moment")
    (few, few_bytes), (many, many_bytes) = held(config, [10, 60])
    assert many_bytes == few_bytes > 10_000
    assert many - few < 50  # not one a step
    kept: list[list[list[int]]] = []
    step = Learner.step

    def remembers(self: Learner, number: int, *rest: Any) -> StepResult:
        kept.append([[number], [number]])
        return step(self, number, *rest)

    monkeypatch.setattr(Learner, "step", remembers)
    (few, _), (many, _) = held(config, [10, 60])
    assert many - few >= 50


def test_the_log_of_a_run_is_for_people(
    short: Config, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("pipelines"), "propagate", True)
    with caplog.at_level(logging.INFO, "pipelines"):
        run = trained(with_train(short, steps=4))
    assert re.search(r"step 4/4  loss \d\.\d{4}  grad norm \d+\.\d{3}  \d+ images/s", caplog.text)
    assert re.search(r"step 4  held out: \d+\.\d{4} ± \d+\.\d{4} bits/dim", caplog.text)
    assert f"step 4  checkpoint committed: {run.storage.uri}/checkpoints/step-000000004" in caplog.text
