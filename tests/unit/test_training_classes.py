"""A network with classes: what it is told in training, in the bound, in previews and of each image of a set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpm_core import rng
from ddpm_core.samplers import sample
from pipelines.checkpoints import Checkpoint, Checkpoints
from pipelines.config import Config
from pipelines.errors import UserError
from pipelines.evaluation_pictures import _frames
from pipelines.held_out import held_out_bound
from pipelines.images import encode_png, to_uint8
from pipelines.sample_recipe import Recipe, recipe_of
from pipelines.sample_set import sample_set
from pipelines.sampling import UnitMaker, load_model, make_images
from pipelines.shards import Sample, pack, parse_index
from pipelines.storage import open_storage
from pipelines.train import _evaluate, open_run
from pipelines.training import Learner
from pipelines.world import SingleWorker
from tests.support.data import dataset_of, edit_record, put_dataset, random_images
from tests.support.runs import Batch, Kept, made_up_batches, tiny_config, together

CPU = torch.device("cpu")
CLASSES = "model.num_classes=10"
NONE_LEFT_OUT = "objective.label_dropout=0"


def heard(model: nn.Module) -> list[Tensor]:
    """What the network is told of classes, a tensor a call."""
    told: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, arguments: told.append(arguments[2].clone()))
    return told


def told_in_steps(config: Config, steps: int) -> dict[int, int]:
    learner = Learner(config, CPU)
    found: dict[int, int] = {}
    for step in range(steps):
        told = heard(learner.model)
        batches = made_up_batches(config, step)
        learner.step(step, batches, SingleWorker(CPU))
        for batch, labels in zip(batches, told, strict=False):
            found |= dict(zip(batch.index.tolist(), labels.tolist(), strict=True))
        learner.model._forward_pre_hooks.clear()
    return found


def test_training_tells_the_classes_and_leaves_some_out() -> None:
    found = told_in_steps(tiny_config(CLASSES, "objective.label_dropout=0.3"), 20)
    assert {label for index, label in found.items() if label != index % 10} == {10}
    left_out = [index for index, label in found.items() if label == 10]
    expected = rng.uniform(0, "label dropout", torch.arange(160), dtype=torch.float64) < 0.3
    assert sorted(left_out) == expected.nonzero().flatten().tolist()
    assert 30 < len(left_out) < 70
    whole = told_in_steps(tiny_config(CLASSES, NONE_LEFT_OUT), 2)
    assert all(label == index % 10 for index, label in whole.items())


def test_the_class_reaches_the_weights_the_same_on_any_number_of_workers() -> None:
    config = tiny_config(CLASSES, NONE_LEFT_OUT)

    def after(config: Config, shift: int = 0, workers: int = 1) -> dict[str, Tensor]:
        def work(world: Any) -> dict[str, Tensor]:
            learner = Learner(config, CPU)
            generator = torch.Generator().manual_seed(0)
            for parameter in learner.model.parameters():
                if not parameter.any():
                    # a fresh network's branches are closed, and would hold all gradients back
                    nn.init.normal_(parameter, std=0.1, generator=generator)
            streams = range(world.rank * 4 // workers, (world.rank + 1) * 4 // workers)
            batches = [
                Batch(b.stream, b.index, b.x_start, (b.label + shift) % 10)
                for b in made_up_batches(config, 0, list(streams))
            ]
            learner.step(0, batches, world)
            return dict(learner.model.state_dict())

        return together(workers, work)[0]

    base = after(config)
    for name, tensor in after(config, workers=2).items():
        torch.testing.assert_close(tensor, base[name], rtol=1e-4, atol=1e-6)
    other = after(config, shift=1)
    assert not torch.equal(other["label_embedding.weight"], base["label_embedding.weight"])


def test_the_bound_is_that_of_each_image_in_its_own_class(tmp_path: Path) -> None:
    dataset_of(tmp_path / "data", [20])
    config = tiny_config(CLASSES, f"data.uri={tmp_path}/data")
    run = open_run(config)
    model = Learner(config, CPU).averaged()
    told = heard(model)
    held_out_bound(run.dataset, config, model, SingleWorker(CPU), 3)
    # three held-out images of the classes 0, 1 and 2; the decoder's term and two strata
    assert [labels.tolist() for labels in told] == [[0, 1, 2]] * 3


def test_a_preview_shows_the_classes_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset_of(tmp_path / "data", [20])
    run = open_run(tiny_config(CLASSES, f"data.uri={tmp_path}/data"))
    learner, tracker = Learner(run.config, CPU), Kept()
    model = learner.averaged()
    told = heard(model)
    monkeypatch.setattr(learner, "averaged", lambda: model)
    _evaluate(run, learner, SingleWorker(CPU), tracker, 1)
    assert len(tracker.artifacts) == 1
    assert told[-1].tolist() == [number % 10 for number in range(64)]


def test_an_image_without_a_label_is_of_no_class(tmp_path: Path) -> None:
    images = random_images(4)
    shard = pack(Sample(f"s{i}", encode_png(image), i - 1) for i, image in enumerate(images))
    put_dataset(tmp_path / "data", {"train": [shard], "test": [shard]}, (1, 8, 8))
    config = tiny_config(CLASSES, f"data.uri={tmp_path}/data")
    model = Learner(config, CPU).averaged()
    told = heard(model)
    held_out_bound(open_run(config).dataset, config, model, SingleWorker(CPU), None)
    assert told[0].tolist() == [10, 0, 1, 2]
    learner = Learner(config, CPU)
    told = heard(learner.model)
    [batch, *rest] = made_up_batches(config, 0)
    without = Batch(batch.stream, batch.index, batch.x_start, torch.full_like(batch.label, -1))
    learner.step(0, [without, *rest], SingleWorker(CPU))
    assert told[0].tolist() == [10, 10]


@pytest.mark.parametrize(
    ("num_classes", "classes", "message"),
    [
        (7, 10, "model.num_classes: 7, but the images of {uri} are of 10 classes"),
        (
            10,
            0,
            "model.num_classes: 10, but the images of {uri} have no classes; prepare them from a folder with a "
            "sub-folder a class",
        ),
    ],
)
def test_other_classes_than_the_datas_are_a_mistake(
    num_classes: int, classes: int, message: str, tmp_path: Path
) -> None:
    uri = str(tmp_path / "data")
    dataset_of(uri, [20])
    edit_record(uri, lambda record: record.update(classes=record["classes"][:classes]))
    with pytest.raises(UserError) as caught:
        open_run(tiny_config(f"model.num_classes={num_classes}", f"data.uri={uri}"))
    assert str(caught.value) == message.format(uri=uri)


# --- sample sets ---


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return tiny_config(CLASSES, f"storage={tmp_path}/results", "sampler.num_steps=4")


@pytest.fixture
def checkpoint(config: Config, tmp_path: Path) -> Checkpoint:
    """Of a network that was never trained but hears its label."""
    learner = Learner(config, CPU)
    learner.step(0, made_up_batches(config, 0), SingleWorker(CPU))
    generator = torch.Generator().manual_seed(1)
    for name, tensor in learner.ema.tensors.items():
        if name != "time_dense_1.bias":
            tensor.normal_(0, 0.2, generator=generator)
    record = {
        "seed": 0, "run": "tiny-1", "dataset": "d", "config": config.model_dump(mode="json"), "metrics": {},
        "versions": {},
    }  # fmt: skip
    return Checkpoints(open_storage(str(tmp_path / "run"))).save(learner.state(1), record)


def with_sample(config: Config, **changes: Any) -> Config:
    return config.model_copy(update={"sample": config.sample.model_copy(update=changes)})


def images_of(checkpoint: Checkpoint, config: Config, index: list[int]) -> Tensor:
    model, schedule = load_model(checkpoint, CPU)
    return make_images(model, schedule, recipe_of(config, checkpoint, 256), index, CPU)


def test_image_i_is_of_class_i_and_guidance_is_the_library_s(checkpoint: Checkpoint, config: Config) -> None:
    model, schedule = load_model(checkpoint, CPU)

    def by_hand(index: int, label: int, scale: float) -> Tensor:
        def eps_theta(x_t: Tensor, t: Tensor) -> Tensor:
            with_label = model(x_t, t, torch.full_like(t, label))
            without = model(x_t, t, torch.full_like(t, 10))
            return torch.as_tensor(without + scale * (with_label - without))

        return sample(
            eps_theta, schedule, config.sampler, seed=0, index=torch.tensor([index]), shape=(1, 8, 8)
        )

    plain = images_of(checkpoint, config, [3, 13])
    torch.testing.assert_close(plain[:1], by_hand(3, 3, 1.0), rtol=0, atol=1e-4)
    torch.testing.assert_close(plain[1:], by_hand(13, 3, 1.0), rtol=0, atol=1e-4)
    strong = images_of(checkpoint, with_sample(config, guidance_scale=4.0), [3])
    torch.testing.assert_close(strong, by_hand(3, 3, 4.0), rtol=0, atol=1e-3)
    assert float((strong - plain[:1]).abs().max()) > 0.01
    chosen = images_of(checkpoint, with_sample(config, labels=(5, 10)), [2, 3])
    torch.testing.assert_close(chosen[:1], by_hand(2, 5, 1.0), rtol=0, atol=1e-4)
    torch.testing.assert_close(chosen[1:], by_hand(3, 10, 1.0), rtol=0, atol=1e-4)


def test_classes_and_guidance_are_part_of_what_a_set_is(checkpoint: Checkpoint, config: Config) -> None:
    def name(**changes: Any) -> str:
        return recipe_of(with_sample(config, **changes), checkpoint, 256).set_name()

    assert name(labels=tuple(range(10))) == name()
    assert (
        len({name(), name(labels=(1,)), name(guidance_scale=2.0), name(labels=(1,), guidance_scale=2.0)}) == 4
    )
    identity = recipe_of(config, checkpoint, 256).identity()
    assert (identity["labels"], identity["guidance_scale"]) == (list(range(10)), 1.0)


def test_the_index_and_the_shard_of_a_set_hold_each_images_class(
    checkpoint: Checkpoint, config: Config
) -> None:
    chosen = with_sample(config, labels=(7, 10, 2))
    recipe = recipe_of(chosen, checkpoint, 256)
    found = sample_set(chosen, recipe)
    maker = UnitMaker(recipe, found.uri, "cpu")
    for unit in range(3):
        maker.make(unit)
    labels = [
        label
        for unit in found.finish(recipe).units
        for label in parse_index(found.storage.get(unit.index.key)).label.tolist()
    ]
    assert labels == [7, -1, 2, 7, -1, 2, 7, -1, 2, 7]


def test_a_trajectory_is_that_of_the_image(checkpoint: Checkpoint, config: Config) -> None:
    chosen = with_sample(config, labels=(4, 7), guidance_scale=3.0)
    model, schedule = load_model(checkpoint, CPU)
    frames = _frames(model, schedule, recipe_of(chosen, checkpoint, 256))
    image = to_uint8(images_of(checkpoint, chosen, [0])[0], 256).numpy()
    assert abs(frames[-1][2].astype(int) - image).max() <= 1


def test_a_set_of_a_network_without_classes_is_what_it_was() -> None:
    learner_config = tiny_config()
    assert learner_config.model.num_classes is None
    recipe = Recipe("n", "c", "i", learner_config.sampler, learner_config.sample, (1, 8, 8), 256)
    assert sorted(recipe.identity()) == [
        "batch_size", "checkpoint", "count", "format_version", "levels", "sampler", "seed", "shape", "unit_size",
    ]  # fmt: skip
    assert recipe.label(3) == -1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((CLASSES, "sample.labels=[3, 11]"), "sample.labels: must lie in 0..10 (10 means no class), got 11"),
        ((CLASSES, "sample.labels=[-1]"), "sample.labels: must lie in 0..10 (10 means no class), got -1"),
        (
            ("sample.labels=[1]",),
            "sample.labels: must be empty, got [1], which model.num_classes null has no use for",
        ),
        (
            ("sample.guidance_scale=2",),
            "sample.guidance_scale: must be 1, got 2.0, which model.num_classes null has no use for",
        ),
        (("objective.label_dropout=1",), "objective.label_dropout: must be at least 0 and below 1, got 1.0"),
        (("model.num_classes=0",), "model.num_classes: must be at least 1 or null, got 0"),
    ],
)
def test_a_mistake_about_classes_names_its_field(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError) as caught:
        tiny_config(*overrides)
    assert str(caught.value) == f"configuration: {message}"
