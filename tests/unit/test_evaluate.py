"""The judgement of a sample set: equally many images on each side, a report that is JSON, mistakes in one line."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddpm_core.bound import BoundEstimate
from jobs.evaluate import table
from pipelines import evaluate as module
from pipelines.checkpoints import Checkpoint, Checkpoints
from pipelines.config import Config
from pipelines.dataset import Dataset
from pipelines.distances import moments
from pipelines.errors import UserError
from pipelines.evaluate import Evaluation, evaluate, too_few, too_weak
from pipelines.evaluation_pictures import draw
from pipelines.evaluation_record import (
    Finished,
    commit_evaluation,
    evaluation_identity,
    evaluation_storage,
    find_evaluation,
)
from pipelines.features import train_classifier
from pipelines.held_out import Chain, held_out_bound
from pipelines.images import encode_png
from pipelines.sample_recipe import Recipe, recipe_of
from pipelines.sample_set import SampleSet, sample_set
from pipelines.shards import Sample, pack
from pipelines.storage import open_storage
from pipelines.stored_order import read_split
from pipelines.tracking import History, Row
from pipelines.training import Learner
from pipelines.world import SingleWorker
from tests.support.data import packed, put_dataset, random_images
from tests.support.runs import made_up_batches, tiny_config

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, and a classifier that learns little."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    trained = functools.partial(train_classifier, num_steps=20)
    monkeypatch.setattr(module, "train_classifier", trained)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    images = random_images(64)
    return put_dataset(
        tmp_path / "data", {"train": [packed(images[:40])], "test": [packed(images[40:52], 40)]}, (1, 8, 8)
    )


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return tiny_config(f"data.uri={tmp_path}/data", f"storage={tmp_path}/results", "bound.num_images=1")


@pytest.fixture
def checkpoint(config: Config, tmp_path: Path) -> Checkpoint:
    learner = Learner(config, CPU)
    learner.step(0, made_up_batches(config, 0), SingleWorker(CPU))
    record = {
        "seed": 0,
        "run": "r",
        "dataset": "d",
        "config": config.model_dump(mode="json"),
        "metrics": {},
        "versions": {},
    }
    return Checkpoints(open_storage(str(tmp_path / "run"))).save(learner.state(1), record)


def samples_of(
    config: Config, checkpoint: Checkpoint, images: np.ndarray | None = None
) -> tuple[Recipe, SampleSet]:
    """A finished set of these images, or of random ones."""
    recipe = recipe_of(config, checkpoint, 256)
    found = sample_set(config, recipe)
    made = torch.from_numpy(random_images(10, seed=5) if images is None else images)
    for unit, start in enumerate(range(0, recipe.settings.count, 4)):
        found.write_unit(recipe, unit, made[start : min(start + 4, recipe.settings.count)])
    found.finish(recipe)
    return recipe, found


def test_a_judgement(config: Config, dataset: Dataset, checkpoint: Checkpoint, tmp_path: Path) -> None:
    recipe, samples = samples_of(config, checkpoint)
    found = evaluate(config, dataset, checkpoint, samples)
    assert [distance.name for distance in found.distances] == ["samples", "real", "noise"]
    # as many as the smallest of the three has: ten samples, twelve held-out images, forty training images
    assert [distance.count for distance in found.distances] == [10, 10, 10]
    for distance in found.distances:
        assert distance.frechet >= 0
        assert 0.1 <= distance.confidence <= 1
        assert all(math.isfinite(value) for value in (distance.frechet, distance.kernel))
    assert list(found.class_shares) == [str(number) for number in range(10)]
    assert sum(found.class_shares.values()) == pytest.approx(1)
    assert found.num_samples == 10
    # all held-out images, whatever the setting for training says
    assert found.bound.num_images == 12
    assert found.bound.total == pytest.approx(
        found.bound.reconstruction + found.bound.consistency + found.bound.prior
    )
    assert (found.checkpoint, found.step, found.samples) == (checkpoint.uri, 1, samples.uri)
    assert 0 <= found.classifier_accuracy <= 1
    _report_is_json(found)
    _pictures_are_there(found, dataset, checkpoint, recipe, samples, tmp_path)


@pytest.mark.parametrize(
    ("sampler", "of", "calls"),
    [
        (("kind=ancestral",), "5 timesteps, variance fixed_large, x̂_0 clipped", 2),
        (("eta=1", "num_steps=null"), "all 50 timesteps, variance fixed_small, x̂_0 clipped", 1),
        (("kind=heun",), "sampler.kind: must be ", 1),
        (("eta=0.5",), "sampler.eta: must be ", 1),
    ],
)
def test_bits_per_dim_of_the_model_and_of_what_is_sampled(
    config: Config,
    dataset: Dataset,
    checkpoint: Checkpoint,
    sampler: tuple[str, ...],
    of: str,
    calls: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Chain] = []

    def counted(*arguments: Any) -> BoundEstimate:
        asked.append(arguments[-1])
        return held_out_bound(*arguments)

    monkeypatch.setattr(module, "held_out_bound", counted)
    own = tiny_config(f"storage={config.storage}", *(f"sampler.{setting}" for setting in sampler))
    _, samples = samples_of(own, checkpoint)
    found = evaluate(own, dataset, checkpoint, samples)
    assert len(asked) == calls
    assert found.bound_of == "all 50 timesteps, variance fixed_small, x̂_0 clipped"
    assert found.sampler_bound_of.startswith(of)
    assert "\n" not in found.sampler_bound_of
    if of.startswith("sampler."):
        assert found.sampler_bound is None
    else:
        assert found.sampler_bound is not None
        assert (found.sampler_bound == found.bound) == (calls == 1)
        assert len(found.sampler_bound.per_t) == (5 if calls == 2 else 50)
    _report_is_json(found)
    said = table(found.to_json())
    assert "of the model (all 50 timesteps, variance fixed_small, x̂_0 clipped), on 12 held-out images" in said
    assert f"of what is sampled: none; {of}" in said or f"of what is sampled ({of})" in said


def test_too_few_images_are_told_in_the_report_and_the_table(
    config: Config, dataset: Dataset, checkpoint: Checkpoint
) -> None:
    _, samples = samples_of(config, checkpoint)
    report = evaluate(config, dataset, checkpoint, samples).to_json()
    warning, *weak = report["warnings"]
    assert all("their classifier is right on" in line for line in weak)
    assert warning == (
        "the distances mean little: there are 10 samples (raise sample.count), 12 held-out images (raise "
        "prepare.test_fraction), and 32 features need at least 33 images a side, below which the covariances in "
        "Fréchet have no full rank"
    )
    assert f"\nwarning: {warning}\n" in table(report)
    # a report of an earlier version
    del report["warnings"]
    assert "warning" not in table(report)


@pytest.mark.parametrize("count", [2, 32, 33, 100])
def test_too_few_is_where_the_covariance_has_no_full_rank(count: int) -> None:
    features = np.random.default_rng(0).normal(size=(count, 32))
    full = np.linalg.matrix_rank(moments(features)[1]) == 32
    assert bool(too_few(100, 100, count, 32)) != full
    assert bool(too_few(100, count, 100, 32)) == bool(too_few(count, 100, 100, 32)) != full


def _report_is_json(found: Evaluation) -> None:
    report = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert report["format_version"] == 2
    assert (report["sampler_bound"] is None) == (found.sampler_bound is None)
    assert report["distances"][0] == dataclasses.asdict(found.distances[0])
    # twelve images with two draws each do not reach all of 49 timesteps
    per_t = report["bound"]["per_t"]
    assert len(per_t) == 50
    assert None in per_t
    assert per_t[0] == pytest.approx(found.bound.reconstruction)


def _pictures_are_there(
    found: Evaluation,
    dataset: Dataset,
    checkpoint: Checkpoint,
    recipe: Recipe,
    samples: SampleSet,
    folder: Path,
) -> None:
    run = open_storage(str(folder / "run"))
    History(run).append(4, [Row(2, {"loss": 0.5}), Row(4, {"loss": 0.4})])
    History(run).append(5, [Row(5, {"held_out/total": 3.0, "held_out/total_stderr": 0.1})])
    pictures = draw(found, dataset, checkpoint, recipe, samples, run, folder)
    names = [picture.name for picture in pictures]
    assert names == [
        "schedule.png",
        "loss.png",
        "bound.png",
        "samples.png",
        "trajectory.png",
        "distances.png",
    ]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_the_better_samples_are_nearer(config: Config, dataset: Dataset, checkpoint: Checkpoint) -> None:
    """Held-out images themselves as samples, and black ones: the order must be right, and the row the right one."""
    images = [image for _, image, _ in read_split(dataset, "test")]
    own = tiny_config(f"storage={config.storage}", "sample.count=12", "sample.seed=1")
    _, same = samples_of(own, checkpoint, np.stack(images))
    black_config = tiny_config(f"storage={config.storage}", "sample.count=12", "sample.seed=2")
    _, black = samples_of(black_config, checkpoint, np.zeros((12, 1, 8, 8), np.uint8))
    best = evaluate(config, dataset, checkpoint, same).distances
    worst = evaluate(config, dataset, checkpoint, black).distances
    assert best[0].frechet == pytest.approx(0, abs=1e-4)
    assert worst[0].frechet > 10 * best[0].frechet + 1e-3
    # what does not depend on the samples is the same in both
    assert best[1:] == worst[1:]


def test_one_class_of_samples_is_seen_in_the_shares(
    config: Config, dataset: Dataset, checkpoint: Checkpoint
) -> None:
    _, samples = samples_of(config, checkpoint, np.full((10, 1, 8, 8), 200, np.uint8))
    shares = evaluate(config, dataset, checkpoint, samples).class_shares
    assert sorted(shares.values()) == [0.0] * 9 + [1.0]


def one_line(attempt: object) -> str:
    with pytest.raises(UserError) as caught:
        attempt()  # type: ignore[operator]
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_data_without_classes(config: Config, dataset: Dataset, checkpoint: Checkpoint) -> None:
    _, samples = samples_of(config, checkpoint)
    bare = dataclasses.replace(dataset, classes=())
    message = one_line(lambda: evaluate(config, bare, checkpoint, samples))
    assert message == (
        f"{dataset.uri}: has no classes, and the distances need a classifier; "
        "prepare it from a folder with a sub-folder a class"
    )


def test_data_without_labels(config: Config, checkpoint: Checkpoint, tmp_path: Path) -> None:
    _, samples = samples_of(config, checkpoint)
    shard = pack(Sample(f"x{number}", encode_png(image)) for number, image in enumerate(random_images(5)))
    bare = put_dataset(tmp_path / "bare", {"train": [shard], "test": [shard]}, (1, 8, 8))
    assert one_line(lambda: evaluate(config, bare, checkpoint, samples)) == (
        f"{bare.uri}: its train split has no labelled image"
    )


def test_samples_of_another_shape(config: Config, checkpoint: Checkpoint, tmp_path: Path) -> None:
    _, samples = samples_of(config, checkpoint)
    shard = packed(random_images(12, (1, 16, 16)))
    large = put_dataset(tmp_path / "large", {"train": [shard], "test": [shard]}, (1, 16, 16))
    assert "images of shape (1, 8, 8), the data set's have (1, 16, 16)" in one_line(
        lambda: evaluate(config, large, checkpoint, samples)
    )


def test_a_set_that_is_not_finished(config: Config, dataset: Dataset, checkpoint: Checkpoint) -> None:
    found = sample_set(config, recipe_of(config, checkpoint, 256))
    assert "no finished sample set here" in one_line(lambda: evaluate(config, dataset, checkpoint, found))


def test_a_single_sample_is_too_few(config: Config, dataset: Dataset, checkpoint: Checkpoint) -> None:
    one = tiny_config(f"storage={config.storage}", "sample.count=1")
    _, samples = samples_of(one, checkpoint)
    assert "at least 2" in one_line(lambda: evaluate(config, dataset, checkpoint, samples))


def test_a_standard_error_that_is_no_number_is_null(
    config: Config, dataset: Dataset, checkpoint: Checkpoint
) -> None:
    _, samples = samples_of(config, checkpoint)
    found = evaluate(config, dataset, checkpoint, samples)
    bound = dataclasses.replace(found.bound, total_stderr=math.nan)
    report = dataclasses.replace(found, bound=bound).to_json()
    assert json.loads(json.dumps(report, allow_nan=False))["bound"]["total_stderr"] is None


# --- done once ---

PICTURES = {"a.png": b"one", "b.png": b"two"}


def test_a_finished_evaluation_is_found(tmp_path: Path) -> None:
    place = open_storage(str(tmp_path))
    assert find_evaluation(place) is None
    first = commit_evaluation(place, {"seed": 0}, {"step": 1}, PICTURES)
    assert first == find_evaluation(place) == Finished({"step": 1}, PICTURES)
    # the first one stands, and the other leaves nothing
    before = [info.key for info in place.list()]
    assert commit_evaluation(place, {"seed": 0}, {"step": 2}, PICTURES) == first
    assert [info.key for info in place.list()] == before


@pytest.mark.parametrize("what", ["evaluation.json", "a-"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_evaluation_is_made_again(
    tmp_path: Path,
    what: str,
    damage: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("pipelines"), "propagate", True)
    place = open_storage(str(tmp_path))
    commit_evaluation(place, {}, {"step": 1}, PICTURES)
    [key] = [info.key for info in place.list(what)]
    if damage == "gone":
        place.delete([key])
    else:
        place.put(key, place.get(key)[:-1])
    with caplog.at_level(logging.WARNING, "pipelines"):
        assert find_evaluation(place) is None
    assert (key in caplog.text) == ((what, damage) != ("evaluation.json", "gone"))
    again = commit_evaluation(place, {}, {"step": 2}, PICTURES)
    assert find_evaluation(place) == again == Finished({"step": 2}, PICTURES)


def test_what_makes_an_evaluation_another_one(
    config: Config, dataset: Dataset, checkpoint: Checkpoint
) -> None:
    def place(*overrides: str, data: Dataset = dataset) -> str:
        own = (f"data.uri={config.data.uri}", f"storage={config.storage}")
        one = tiny_config(*own, *overrides)
        return evaluation_storage(one, evaluation_identity(one, data, recipe_of(one, checkpoint, 256))).uri

    changes = ("seed=1", "bound.num_strata=5", "bound.variance_type=fixed_large", "sample.seed=1")
    places = [place(), *map(place, changes), place(data=dataclasses.replace(dataset, identity="other"))]
    assert len(set(places)) == len(places)
    for same in ("workers.num=2", "train.steps=99", "bound.num_images=2", "tracking.experiment=other"):
        assert place(same) == places[0]


@pytest.mark.parametrize(
    ("accuracy", "counts", "warned"),
    [(0.4, [5, 4, 3], True), (0.7, [5, 4, 3], True), (0.71, [5, 4, 3], False), (0.985, [18] * 10, False)],
)
def test_a_classifier_that_hardly_beats_guessing_is_told(
    accuracy: float, counts: list[int], warned: bool
) -> None:
    found = too_weak(accuracy, np.repeat(np.arange(len(counts)), counts))
    assert bool(found) == warned
    if warned:
        assert f"right on {accuracy:.1%} of the held-out images" in found[0]
        assert "each time on 41.7%" in found[0]
