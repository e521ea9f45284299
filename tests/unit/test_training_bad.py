"""Training past bad samples: they show in no loss and no statistic, and the run's share of them ends it."""

from __future__ import annotations

import logging
import pickle
import re
from contextlib import closing
from pathlib import Path

import pytest
import torch

from pipelines.bad_samples import too_many
from pipelines.checkpoints import Checkpoints
from pipelines.dataset import DataError
from pipelines.held_out import held_out_bound
from pipelines.images import encode_png
from pipelines.order import Order
from pipelines.reader import MicroBatch
from pipelines.reader_process import begin
from pipelines.shards import Sample, pack
from pipelines.tracking import History
from pipelines.train import Run, claim, open_run, train, what_to_read
from pipelines.training import Learner, StepResult, TrainingError
from pipelines.world import SingleWorker, World, streams_of
from tests.support.data import packed, put_dataset, random_images
from tests.support.runs import tiny_config, together

CPU = torch.device("cpu")
COUNTS = [5, 9, 6]
BAD = {(0, 2), (1, 8), (2, 0)}


def run_on(folder: Path, *overrides: str, bad: set[tuple[int, int]] = BAD) -> Run:
    """A run of 4 streams of 2 on 20 images in three shards, of which these are broken."""
    shards, images = [], random_images(sum(COUNTS))
    for shard, count in enumerate(COUNTS):
        samples = []
        for row in range(count):
            data = encode_png(images[sum(COUNTS[:shard]) + row])
            samples.append(Sample(f"{shard}-{row}", data[:-30] if (shard, row) in bad else data, row % 10))
        shards.append(pack(samples))
    put_dataset(folder / "data", {"train": shards, "test": [packed(images[:3])]}, (1, 8, 8))
    config = tiny_config(
        f"data.uri={folder}/data", f"storage={folder}/out", "data.on_bad_sample=skip", *overrides
    )
    return open_run(config)


def bad_by_step(run: Run, steps: int) -> list[int]:
    """How many draws of each step are bad, from the order alone."""
    settings = run.config.train
    order, size = Order(COUNTS, run.config.seed, settings.micro_batches), settings.batch_size // 4
    found = []
    for step in range(steps):
        places = [order.locate(stream, range(step * size, (step + 1) * size)) for stream in range(4)]
        found.append(
            sum(
                place in BAD
                for where in places
                for place in zip(where.shard.tolist(), where.sample.tolist(), strict=True)
            )
        )
    return found


def go(run: Run, world: World, steps: int) -> tuple[Learner, list[StepResult]]:
    learner = Learner(run.config, CPU)
    with closing(begin(what_to_read(run, world.rank, world.size, 0, for_gpu=False))) as batches:
        return learner, [learner.step(step, next(batches), world) for step in range(steps)]


# ---- what they must not touch


@pytest.mark.parametrize("size", [1, 2, 3])
def test_their_losses_are_no_loss_moments(tmp_path: Path, size: int) -> None:
    run = run_on(tmp_path, "objective.timestep_sampling=loss_second_moment")
    results = [go(run, SingleWorker(CPU), 9)] if size == 1 else together(size, lambda team: go(run, team, 9))
    counted = bad_by_step(run, 9)
    assert sum(counted) >= 8
    for learner, _ in results:
        assert learner.loss_moments is not None
        assert int(learner.loss_moments.tensors["counts"].sum()) == 9 * 8 - sum(counted)
        assert learner.skipped == sum(counted)


@pytest.mark.parametrize("size", [1, 2])
def test_the_loss_is_the_mean_over_the_good_ones(size: int) -> None:
    """A network that says nothing but zero has the loss ε², whatever the image."""
    config = tiny_config("data.on_bad_sample=skip", "train.micro_batches=2", "train.batch_size=6")

    def step(world: World, fill: float) -> float:
        learner = Learner(config, CPU)
        for parameter in learner.model.parameters():
            parameter.data.zero_()
        parts = []
        for stream in streams_of(world.rank, world.size, 2):
            index = torch.arange(3) * 2 + stream
            x = torch.full((3, 1, 8, 8), fill)
            # stream 0 has one bad sample, stream 1 has two
            parts.append(MicroBatch(stream, index, index, x, index, (index > 2 * stream).float()))
        return learner.step(0, parts, world).loss

    def loss(fill: float) -> float:
        return step(SingleWorker(CPU), fill) if size == 1 else together(2, lambda team: step(team, fill))[0]

    from ddpm_core import rng

    good = torch.tensor([2, 4, 3, 5])
    noise = rng.normal(config.seed, "noise", good, (1, 8, 8))
    # of stream 1 the indices are 1, 3, 5: those above 2 are good
    assert loss(0.3) == pytest.approx(float((noise**2).mean()), rel=1e-5)


# ---- the share


@pytest.mark.parametrize(
    ("bad", "seen", "over"), [(2, 8, False), (3, 8, True), (2, 20, False), (10, 100, False), (11, 100, True)]
)
def test_the_share_is_counted_over_an_epoch_at_least(bad: int, seen: int, over: bool) -> None:
    assert too_many(bad, seen, num_samples=20, max_share=0.1) == over


def ended(run: Run, size: int) -> tuple[str, list[int]]:
    """Why the run ends, on all workers alike, and its checkpoints."""
    claim(run)
    said: list[str] = []

    def work(world: World) -> None:
        try:
            train(run, world)
        except TrainingError as error:
            said.append(str(pickle.loads(pickle.dumps(error))))  # noqa: S301

    if size == 1:
        work(SingleWorker(CPU))
    else:
        together(size, work)
    assert len(said) == size
    assert len({re.sub(r"; one is [^;]*", "", line) for line in said}) == 1
    return re.sub(r"; one is [^;]*", "", said[0]), Checkpoints(run.storage).steps()


EVERY = ("train.checkpoint_every=1", "train.eval_every=100", "train.steps=40", "data.max_bad_share=0.16")


def expected_end(run: Run) -> int:
    """15% are bad, more than that where the draws came early."""
    total = 0
    for done, bad in enumerate(bad_by_step(run, 40), start=1):
        total += bad
        if total > 0.16 * max(8 * done, 20):
            return done
    raise AssertionError("never")


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_run_ends_at_the_same_step_on_any_number_of_workers(tmp_path: Path, size: int) -> None:
    run = run_on(tmp_path, *EVERY)
    step = expected_end(run)
    assert step > 2
    line, checkpoints = ended(run, size)
    counted = max(8 * step, sum(COUNTS))
    told = rf"step {step}: \d+ of {8 * step} train samples read are bad, which of {counted} \(an epoch at least\) "
    assert re.match(told + r"is a share of 0\.\d+, more than", line), line
    assert "data.max_bad_share 0.16; `ddpm verify file://" in line
    assert "\n" not in line
    assert checkpoints[-1] == step - 1


def test_a_resumed_run_ends_at_that_step_as_well(tmp_path: Path) -> None:
    whole = run_on(tmp_path / "whole", *EVERY)
    step = expected_end(whole)
    halves = run_on(tmp_path / "halves", *EVERY)
    claim(halves)
    stop = halves.config.model_copy(
        update={"train": halves.config.train.model_copy(update={"steps": step // 2})}
    )
    train(Run(stop, halves.dataset, halves.name, halves.storage), SingleWorker(CPU))
    assert Checkpoints(halves.storage).newest().groups["skipped"]["count"] > 0  # type: ignore[union-attr]
    line, _ = ended(halves, 2)
    assert line.startswith(f"step {step}: ")


def test_a_run_that_did_not_skip_before_goes_on_and_counts_from_there(tmp_path: Path) -> None:
    """Whether bad samples are passed over is no part of a run's identity."""
    run = run_on(tmp_path, "data.max_bad_share=1", "train.steps=4", "train.log_every=1", bad=set())
    strict = run.config.model_copy(
        update={
            "data": run.config.data.model_copy(update={"on_bad_sample": "fail"}),
            "train": run.config.train.model_copy(update={"steps": 2}),
        }
    )
    claim(run)
    train(Run(strict, run.dataset, run.name, run.storage), SingleWorker(CPU))
    train(run, SingleWorker(CPU))
    assert Checkpoints(run.storage).steps() == [2, 4]


def test_the_log_counts_what_all_workers_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pipelines")
    run = run_on(tmp_path, "data.max_bad_share=1", "train.steps=6", "train.log_every=6")
    claim(run)
    together(2, lambda world: train(run, world))
    (row,) = [row for row in History(run.storage).rows() if "loss" in row.metrics]
    assert row.metrics["skipped_samples"] == sum(bad_by_step(run, 6)) > 0
    (told,) = [line for line in caplog.messages if line.startswith("step 6/6")]
    assert told.endswith(f" images/s  {sum(bad_by_step(run, 6))} bad samples passed over")


# ---- held-out ones


def held_out_run(folder: Path, bad: set[int], *overrides: str) -> Run:
    """A run whose held-out images are six, of which these are broken."""
    images = random_images(9)
    samples = [Sample(str(number), encode_png(images[number])) for number in range(6)]
    broken = [
        sample._replace(image=sample.image[:-30]) if number in bad else sample
        for number, sample in enumerate(samples)
    ]
    put_dataset(folder / "data", {"train": [packed(images)], "test": [pack(broken)]}, (1, 8, 8))
    return open_run(tiny_config(f"data.uri={folder}/data", f"storage={folder}/out", *overrides))


SKIP = ("data.on_bad_sample=skip", "data.max_bad_share=0.5")


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_bad_held_out_images_are_left_out_of_the_bound(tmp_path: Path, workers: int) -> None:
    run = held_out_run(tmp_path, {1, 4}, *SKIP)
    model = Learner(run.config, CPU).averaged()
    [expected] = {
        (found.num_images, found.total)
        for found in [held_out_bound(run.dataset, run.config, model, SingleWorker(CPU), None)]
    }
    assert expected[0] == 4
    found = together(workers, lambda world: held_out_bound(run.dataset, run.config, model, world, None))
    assert all(one.num_images == 4 for one in found)
    assert all(one.total == pytest.approx(expected[1], rel=1e-12) for one in found)


def test_the_share_is_one_of_all_held_out_images_however_few_are_asked_for(tmp_path: Path) -> None:
    run = held_out_run(tmp_path, {1}, "data.on_bad_sample=skip", "data.max_bad_share=0.17")
    model = Learner(run.config, CPU).averaged()
    assert held_out_bound(run.dataset, run.config, model, SingleWorker(CPU), 2).num_images == 1
    run = held_out_run(tmp_path / "more", {0, 1}, "data.on_bad_sample=skip", "data.max_bad_share=0.17")
    with pytest.raises(
        DataError, match=r"2 of 3 held-out images are bad, more than data\.max_bad_share 0\.17"
    ):
        held_out_bound(run.dataset, run.config, model, SingleWorker(CPU), 3)


@pytest.mark.parametrize(
    ("bad", "overrides", "line"),
    [
        ({1}, (), "sample '1': "),
        (
            {1, 4},
            ("data.on_bad_sample=skip",),
            "2 of 6 held-out images are bad, more than data.max_bad_share 0.01",
        ),
        (
            set(range(6)),
            ("data.on_bad_sample=skip", "data.max_bad_share=1"),
            "6 of 6 held-out images are bad, which leaves none; ",
        ),
    ],
)
def test_too_many_of_them_end_the_run(
    tmp_path: Path, bad: set[int], overrides: tuple[str, ...], line: str
) -> None:
    run = held_out_run(tmp_path, bad, *overrides)
    model = Learner(run.config, CPU).averaged()
    with pytest.raises(DataError, match=re.escape(line)):
        held_out_bound(run.dataset, run.config, model, SingleWorker(CPU), None)
