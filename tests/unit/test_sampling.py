"""Mass generation: image i is the same whoever makes it; a unit is whole or not there; a set is done once."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from ddpm_core.samplers import SamplerConfig
from pipelines import sample_set as sets
from pipelines import sampling
from pipelines.checkpoints import Checkpoint, CheckpointError, Checkpoints
from pipelines.config import Config
from pipelines.config_sections import SampleConfig
from pipelines.errors import UserError
from pipelines.images import to_uint8
from pipelines.sample_recipe import Recipe, checkpoint_config, num_units, pending_units, recipe_of, unit_range
from pipelines.sample_set import SampleSet, SampleSetError, Survey, sample_set
from pipelines.sampling import UnitMaker, load_model, make_images
from pipelines.shards import parse_index
from pipelines.storage import Storage, StorageError, open_storage
from pipelines.training import Learner
from pipelines.world import SingleWorker
from tests.support.data import WatchedStorage
from tests.support.runs import made_up_batches, tiny_config

CPU = torch.device("cpu")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return tiny_config(f"storage={tmp_path}/results")


@pytest.fixture
def checkpoint(config: Config, tmp_path: Path) -> Checkpoint:
    """Of a network that was never trained but whose output is not zero, as a fresh one's is."""
    learner = Learner(config, CPU)
    learner.step(0, made_up_batches(config, 0), SingleWorker(CPU))
    generator = torch.Generator().manual_seed(1)
    for name, tensor in learner.ema.tensors.items():
        if not tensor.any() or name == "conv_out.weight":
            tensor.normal_(0, 0.1, generator=generator)
    return Checkpoints(open_storage(str(tmp_path / "run"))).save(
        learner.state(1),
        {
            "seed": config.seed,
            "run": "tiny-1",
            "dataset": "d",
            "config": config.model_dump(mode="json"),
            "metrics": {},
            "versions": {},
        },
    )


def recipe(checkpoint: Checkpoint, config: Config, **sample: Any) -> Recipe:
    changed = config.model_copy(update={"sample": config.sample.model_copy(update=sample)})
    return recipe_of(changed, checkpoint, 256)


def images_of(checkpoint: Checkpoint, made: Recipe, index: list[int]) -> Tensor:
    model, schedule = load_model(checkpoint, CPU)
    return make_images(model, schedule, made, index, CPU)


@pytest.mark.parametrize(
    "sampler", [("kind=ddim",), ("kind=ddim", "eta=0.7"), ("kind=ancestral", "num_steps=8")]
)
def test_an_image_alone_equals_its_copy_in_the_set(checkpoint: Checkpoint, sampler: tuple[str, ...]) -> None:
    config = tiny_config(*(f"sampler.{setting}" for setting in sampler))
    made = recipe(checkpoint, config)
    whole = images_of(checkpoint, made, list(range(10)))
    assert whole.shape == (10, 1, 8, 8)
    assert float(whole.abs().max()) <= 1
    for number in (0, 5, 9):
        alone = images_of(checkpoint, made, [number])
        torch.testing.assert_close(alone[0], whole[number], rtol=0, atol=1e-5)
    # in another order, across batches
    torch.testing.assert_close(
        images_of(checkpoint, made, [9, 2, 7, 1, 4])[[3, 1]], whole[[1, 2]], rtol=0, atol=1e-5
    )
    # they are ten images and not one
    for a in range(10):
        for b in range(a):
            assert float((whole[a] - whole[b]).abs().max()) > 0.1


def test_the_network_matters_and_the_seed_does(checkpoint: Checkpoint, config: Config) -> None:
    made = recipe(checkpoint, config)
    image = images_of(checkpoint, made, [3])
    assert not torch.allclose(images_of(checkpoint, recipe(checkpoint, config, seed=1), [3]), image, atol=0.1)
    model, schedule = load_model(checkpoint, CPU)
    nn.init.zeros_(model.conv_out.weight)  # type: ignore[union-attr, arg-type]
    assert not torch.allclose(make_images(model, schedule, made, [3], CPU), image, atol=0.1)


def test_the_network_meets_one_size_of_batch_only(checkpoint: Checkpoint, config: Config) -> None:
    model, schedule = load_model(checkpoint, CPU)
    sizes: set[int] = set()
    model.register_forward_pre_hook(lambda _, arguments: sizes.add(len(arguments[0])))
    for index in ([0], [0, 1, 2], list(range(10))):
        made = make_images(model, schedule, recipe(checkpoint, config), index, CPU)
        assert len(made) == len(index)
    assert sizes == {4}


def test_the_averaged_weights_make_the_images(checkpoint: Checkpoint) -> None:
    model, _ = load_model(checkpoint, CPU)
    ema, weights = checkpoint.read("ema"), checkpoint.read("weights")
    state = model.state_dict()
    assert all(torch.equal(state[name], ema[name]) for name in ema)
    assert any(not torch.equal(ema[name], weights[name]) for name in ema)
    assert not model.training


@settings(max_examples=300, deadline=None)
@given(count=st.integers(1, 5000), batch=st.integers(1, 40), batches=st.integers(1, 40), data=st.data())
def test_every_image_lies_in_exactly_one_unit(
    count: int, batch: int, batches: int, data: st.DataObject
) -> None:
    made = Recipe(
        "x", "c", "i", SamplerConfig(), SampleConfig(count=count, unit_size=batch * batches, batch_size=batch),
        (1, 8, 8), 256,
    )  # fmt: skip
    units = [unit_range(made, unit) for unit in range(num_units(made))]
    assert [number for unit in units for number in unit] == list(range(count))
    assert all(0 < len(unit) <= batch * batches for unit in units)
    done = data.draw(st.sets(st.integers(0, len(units) - 1)))
    pending = pending_units(made, done)
    assert sorted([*pending, *done]) == list(range(len(units)))
    assert pending_units(made, range(len(units))) == []


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs a C++ compiler")
def test_a_compiled_network_is_compiled_once_for_all_units(
    checkpoint: Checkpoint, config: Config, tmp_path: Path
) -> None:
    """Whatever kinds of tensors a sampler goes on with."""
    made = recipe(checkpoint, config, compile=True)
    plain = recipe(checkpoint, config)
    maker = UnitMaker(made, str(tmp_path / "set"), "cpu")
    torch._dynamo.utils.counters.clear()
    with torch.inference_mode():
        images = [
            make_images(maker._model, maker._schedule, made, numbers, CPU) for numbers in ((0, 1), (4, 5, 6))
        ]
        model, schedule = load_model(checkpoint, CPU)
        expected = [make_images(model, schedule, plain, numbers, CPU) for numbers in ((0, 1), (4, 5, 6))]
    for one, other in zip(images, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


def made_set(config: Config, checkpoint: Checkpoint) -> tuple[Recipe, SampleSet]:
    made = recipe(checkpoint, config)
    found = sample_set(config, made)
    maker = UnitMaker(made, found.uri, "cpu")
    for unit in pending_units(made, found.committed()):
        maker.make(unit)
    found.finish(made)
    return made, found


def test_a_set_is_made_found_finished_and_read(config: Config, checkpoint: Checkpoint) -> None:
    made = recipe(checkpoint, config)
    found = sample_set(config, made)
    assert found.uri == f"{open_storage(config.storage).uri}/samples/{made.set_name()}"
    assert not found.storage.exists(sets.RECORD)
    assert found.committed() == []
    with pytest.raises(UserError, match="no finished sample set here; make it with `ddpm sample`"):
        found.record()
    maker = UnitMaker(made, found.uri, "cpu")
    assert [maker.make(unit) for unit in (2, 0)] == [2, 4]
    assert found.committed() == [0, 2]
    assert pending_units(made, found.committed()) == [1]
    with pytest.raises(UserError):
        found.finish(made)
    assert not found.storage.exists(sets.RECORD)
    maker.make(1)
    record = found.finish(made)
    assert found.storage.exists(sets.RECORD)
    assert (record.count, record.shape, record.levels, record.checkpoint) == (
        10,
        (1, 8, 8),
        256,
        checkpoint.uri,
    )
    assert [(unit.start, unit.stop) for unit in record.units] == [(0, 4), (4, 8), (8, 10)]
    expected = to_uint8(images_of(checkpoint, made, list(range(10))), 256).numpy()
    images = list(found.images())
    assert [number for number, _ in images] == list(range(10))
    for number, image in images:
        np.testing.assert_array_equal(image, expected[number])
    assert [number for number, _ in found.images(limit=5)] == list(range(5))
    # a second end changes nothing
    before = [(info.key, found.storage.get(info.key)) for info in found.storage.list()]
    found.finish(made)
    assert [(info.key, found.storage.get(info.key)) for info in found.storage.list()] == before


def test_the_record_tells_all_that_the_set_depends_on(config: Config, checkpoint: Checkpoint) -> None:
    made, found = made_set(config, checkpoint)
    told = json.loads(found.storage.get("samples.json"))
    assert told["recipe"] == made.identity()
    assert told["recipe"]["checkpoint"] == checkpoint.identity
    assert told["recipe"]["sampler"]["num_steps"] == 5


CHANGES: list[tuple[str, ...]] = [
    ("sample.seed=1",),
    ("sample.count=11",),
    ("sample.unit_size=8",),
    ("sample.batch_size=2",),
    ("sample.unit_size=6", "sample.batch_size=2"),
    ("sampler.num_steps=4",),
    ("sampler.kind=ancestral",),
    ("sampler.eta=0.5",),
    ("sampler.clip=false",),
]


def test_what_makes_a_set_another_one(config: Config, checkpoint: Checkpoint) -> None:
    names = [recipe_of(tiny_config(*change), checkpoint, 256).set_name() for change in [(), *CHANGES]]
    names.append(recipe_of(config, checkpoint, 17).set_name())
    assert len(set(names)) == len(names)
    # where it is made, and under which name its checkpoint was asked for, does not
    for change in (
        "workers.num=2",
        "storage=elsewhere",
        "train.steps=99",
        "sample.checkpoint=latest",
        "seed=3",
    ):
        assert recipe_of(tiny_config(change), checkpoint, 256).set_name() == names[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "schedule.num_timesteps=60",
            "schedule.num_timesteps: 60, but the checkpoint {} was trained with 50",
        ),
        ("schedule.beta_end=0.3", "schedule.beta_end: 0.3, but the checkpoint {} was trained with 0.2"),
        ("schedule.kind=cosine", "schedule.kind: cosine, but the checkpoint {} was trained with linear"),
        ("model.base_channels=12", "model.base_channels: 12, but the checkpoint {} was trained with 8"),
        (
            "model.channel_mults=[1, 1]",
            "model.channel_mults: (1, 1), but the checkpoint {} was trained with (1,)",
        ),
    ],
)
def test_a_configuration_of_another_model_is_refused(
    checkpoint: Checkpoint, override: str, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        recipe_of(tiny_config(override), checkpoint, 256)
    assert str(caught.value) == message.format(checkpoint.uri)


def test_what_a_checkpoint_of_an_older_version_holds_and_nothing_reads_is_passed_over(tmp_path: Path) -> None:
    """A cosine schedule has no use for beta_end, and no configuration may give it one any more."""
    config = tiny_config("schedule={kind: cosine, num_timesteps: 50}")
    learner = Learner(config, CPU)
    stored = config.model_dump(mode="json")
    stored["schedule"]["beta_end"] = 0.03
    about: dict[str, Any] = {
        "seed": 0,
        "run": "tiny-1",
        "dataset": "d",
        "config": stored,
        "metrics": {},
        "versions": {},
    }
    checkpoint = Checkpoints(open_storage(str(tmp_path / "run"))).save(learner.state(1), about)
    assert recipe_of(config, checkpoint, 256).checkpoint == checkpoint.uri
    stored["schedule"]["cosine_s"] = 0.02
    checkpoint = Checkpoints(open_storage(str(tmp_path / "other"))).save(learner.state(1), about)
    with pytest.raises(UserError, match=r"^schedule\.cosine_s: 0\.008, but the checkpoint .* with 0\.02$"):
        recipe_of(config, checkpoint, 256)


def test_each_field_of_another_model_is_named(checkpoint: Checkpoint) -> None:
    with pytest.raises(UserError) as caught:
        recipe_of(tiny_config("schedule.num_timesteps=60", "model.base_channels=12"), checkpoint, 256)
    assert str(caught.value).splitlines() == [
        f"schedule.num_timesteps: 60, but the checkpoint {checkpoint.uri} was trained with 50",
        f"model.base_channels: 12, but the checkpoint {checkpoint.uri} was trained with 8",
    ]


def test_a_checkpoint_whose_configuration_is_of_another_version(checkpoint: Checkpoint) -> None:
    changed = {**checkpoint.commit.config, "surprise": 1}
    other = Checkpoint(checkpoint._storage, checkpoint.commit.model_copy(update={"config": changed}))
    with pytest.raises(UserError, match=r"commit\.json: config: surprise: no such setting"):
        checkpoint_config(other)


def test_a_checkpoint_that_was_replaced_meanwhile(config: Config, checkpoint: Checkpoint) -> None:
    made = recipe(checkpoint, config)
    folder = open_storage(checkpoint.uri)
    folder.delete(["commit.json"])
    run = open_storage(checkpoint.uri.rpartition("/checkpoints/")[0])
    other = Learner(tiny_config("seed=5"), CPU).state(1)
    Checkpoints(run).save(
        other,
        {
            "seed": 0,
            "run": "r",
            "dataset": "d",
            "config": checkpoint.commit.config,
            "metrics": {},
            "versions": {},
        },
    )
    with pytest.raises(UserError, match="was replaced by another checkpoint meanwhile"):
        UnitMaker(made, "unused", "cpu")


# --- units ---


def test_a_checkpoint_of_weights_that_are_no_numbers_is_named(
    checkpoint: Checkpoint, config: Config, tmp_path: Path
) -> None:
    learner = Learner(config, CPU)
    for tensor in learner.ema.tensors.values():
        tensor.fill_(float("nan"))
    record = checkpoint.commit.model_dump(include={"seed", "run", "dataset", "config", "metrics", "versions"})
    broken = Checkpoints(open_storage(str(tmp_path / "run"))).save(learner.state(2), record)
    with pytest.raises(UserError, match=f"^{broken.uri}: its averaged weights .* hold NaN or ±∞"):
        UnitMaker(recipe(broken, config), str(tmp_path / "set"), "cpu")


def test_a_network_that_gives_no_numbers_is_named_and_nothing_is_written(
    checkpoint: Checkpoint, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = UnitMaker(recipe(checkpoint, config), str(tmp_path / "set"), "cpu")

    def one_is_none(*_: Any, index: Tensor, shape: tuple[int, ...], **__: Any) -> Tensor:
        x = torch.zeros(len(index), *shape)
        x[1, 0, 3, 3] = float("nan")
        return x

    monkeypatch.setattr(sampling, "sample", one_is_none)
    with pytest.raises(UserError, match=f"^{checkpoint.uri}: its network gives numbers that are no numbers"):
        maker.make(1)
    assert open_storage(str(tmp_path / "set")).list() == []


def pixels(value: int, count: int = 4) -> Tensor:
    return torch.full((count, 1, 8, 8), value, dtype=torch.uint8)


@pytest.fixture
def place(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "set"))


def test_another_encoder_makes_another_set_of_the_same_pixels(tmp_path: Path, config: Config) -> None:
    draw = np.random.default_rng(0)
    images = torch.from_numpy(draw.integers(0, 256, (4, 3, 8, 8), dtype=np.uint8))
    names = set()
    for encoder in ("pillow", "fpng"):
        settings = config.sample.model_copy(update={"png_encoder": encoder, "count": 4})
        made = Recipe("tiny", "c", "i", config.sampler, settings, (3, 8, 8), 256)
        # sets from before there was a choice keep their names
        assert made.identity().get("png_encoder") == (None if encoder == "pillow" else "fpng")
        names.add(made.set_name())
        found = SampleSet(open_storage(str(tmp_path / encoder)))
        commit = found.write_unit(made, 0, images)
        assert (b"fdEC" in found.storage.get(commit.shard.key)) == (encoder == "fpng")
        found.finish(made)
        assert np.array_equal(np.stack([image for _, image in found.images()]), images.numpy())
    assert len(names) == 2


@pytest.fixture
def ten(config: Config) -> Recipe:
    return Recipe("tiny", "c", "i", config.sampler, config.sample, (1, 8, 8), 256)


def test_of_two_makers_of_a_unit_the_first_one_stands(place: Storage, ten: Recipe) -> None:
    first = SampleSet(place).write_unit(ten, 1, pixels(1))
    before = [info.key for info in place.list()]
    assert len(before) == 3
    second = SampleSet(place).write_unit(ten, 1, pixels(2))
    assert second == first == SampleSet(place).unit(1)
    assert [info.key for info in place.list()] == before


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("stop_at", [0, 1, 2])
@pytest.mark.parametrize("cleans_up", [False, True])
def test_stopped_in_the_middle_a_unit_is_whole_or_not_there(
    place: Storage, ten: Recipe, stop_at: int, after: bool, cleans_up: bool
) -> None:
    """Killed (nothing more is done) or interrupted (the clean-up runs), before or after the n-th write."""

    class Stopping(WatchedStorage):
        writes = 0
        stopped = False

        def write(self, call: Any) -> Any:
            self.writes += 1
            stops = self.writes == stop_at + 1
            if stops and not after:
                self.stopped = True
                raise Stopped
            result = call()
            if stops:
                self.stopped = True
                raise Stopped
            return result

        def put(self, key: str, data: bytes) -> None:
            self.write(lambda: self.inner.put(key, data))

        def put_if_absent(self, key: str, data: bytes) -> bool:
            return bool(self.write(lambda: self.inner.put_if_absent(key, data)))

        def delete(self, keys: Any) -> None:
            if self.stopped and not cleans_up:
                raise Stopped
            self.inner.delete(keys)

    with pytest.raises(Stopped):
        SampleSet(Stopping(place)).write_unit(ten, 0, pixels(1))
    committed = after and stop_at == 2
    found = SampleSet(place)
    assert found.committed() == ([0] if committed else [])
    # the next maker's unit, or the one that stands, is whole
    found.write_unit(ten, 0, pixels(2))
    found.write_unit(ten, 1, pixels(3))
    found.write_unit(ten, 2, pixels(4, 2))
    found.finish(ten)
    assert {int(image.max()) for _, image in found.images()} == {1 if committed else 2, 3, 4}


def test_a_commit_that_appears_while_we_write_wins(place: Storage, ten: Recipe) -> None:
    class Overtaken(WatchedStorage):
        def put_if_absent(self, key: str, data: bytes) -> bool:
            SampleSet(place).write_unit(ten, 0, pixels(1))
            return super().put_if_absent(key, data)

    standing = SampleSet(Overtaken(place)).write_unit(ten, 0, pixels(2))
    assert standing == SampleSet(place).unit(0)
    assert len(place.list()) == 3


@pytest.mark.parametrize("part", ["tar", "index.parquet"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damage_is_named_when_the_set_is_read(place: Storage, ten: Recipe, part: str, damage: str) -> None:
    found = finished(place, ten)
    [key] = [i.key for i in place.list("shard-000001") if i.key.endswith(part)]
    hurt(place, key, damage)
    with pytest.raises(SampleSetError, match=key) as caught:
        list(found.images())
    assert not isinstance(caught.value, CheckpointError)


def finished(place: Storage, ten: Recipe) -> SampleSet:
    found = SampleSet(place)
    for unit, count in ((0, 4), (1, 4), (2, 2)):
        found.write_unit(ten, unit, pixels(unit, count))
    found.finish(ten)
    return found


def hurt(place: Storage, key: str, damage: str) -> None:
    data = place.get(key)
    if damage == "gone":
        place.delete([key])
    else:
        place.put(key, data[:-1] if damage == "cut" else data[:600] + bytes([data[600] ^ 1]) + data[601:])


def test_a_set_that_is_whole_is_found_so_and_nothing_of_a_large_one_is_read(
    place: Storage, ten: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(place, ten)
    watched = WatchedStorage(place)
    assert SampleSet(watched).survey(ten) == Survey([0, 1, 2], [], finished=True)
    assert sum(watched.gets.values()) == 1 + 6
    monkeypatch.setattr(sets, "_READ_IN_A_MOMENT_BYTES", 100)
    watched = WatchedStorage(place)
    assert SampleSet(watched).survey(ten) == Survey([0, 1, 2], [], finished=True)
    assert watched.gets == {"samples.json": 1}


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize("part", ["tar", "index.parquet"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_unit_is_found_and_made_again(
    place: Storage,
    ten: Recipe,
    part: str,
    damage: str,
    complete: bool,
    large: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = finished(place, ten)
    if not complete:
        place.delete(["samples.json", "units/unit-000002.json"])
    if large:
        monkeypatch.setattr(sets, "_READ_IN_A_MOMENT_BYTES", 100)
    before = found.unit(1)
    [key] = [i.key for i in place.list("shard-000001") if i.key.endswith(part)]
    hurt(place, key, damage)
    if large and damage == "flip":
        assert found.survey(ten).damage == []
    survey = found.survey(ten, thorough=large and damage == "flip")
    assert survey.whole == ([0, 2] if complete else [0])
    assert not survey.finished
    assert len(survey.damage) == 1
    assert key in survey.damage[0]
    for unit in pending_units(ten, survey.whole):
        found.write_unit(ten, unit, pixels(unit, 2 if unit == 2 else 4))
    found.finish(ten)
    assert found.survey(ten, thorough=True) == Survey([0, 1, 2], [], finished=True)
    assert [int(image.max()) for _, image in found.images()] == [0] * 4 + [1] * 4 + [2] * 2
    # the same images, in another object, and of the damaged unit nothing is left
    assert found.unit(1).shard.sha256 == before.shard.sha256
    assert found.unit(1).shard.key != before.shard.key
    assert len(place.list("shard-000001")) == 2


@pytest.mark.parametrize("key", ["samples.json", "units/unit-000001.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_record_is_made_again(place: Storage, ten: Recipe, key: str, damage: str) -> None:
    found = finished(place, ten)
    if key != "samples.json":
        place.delete(["samples.json"])
    hurt(place, key, damage)
    survey = found.survey(ten)
    assert not survey.finished
    assert len(survey.damage) == (damage == "cut")
    assert all(f"{key}: is not JSON" in line for line in survey.damage)
    for unit in pending_units(ten, survey.whole):
        found.write_unit(ten, unit, pixels(unit))
    found.finish(ten)
    assert found.survey(ten) == Survey([0, 1, 2], [], finished=True)
    assert len(list(found.images())) == 10


def test_killed_between_a_unit_made_again_and_the_record_of_the_set(place: Storage, ten: Recipe) -> None:
    found = finished(place, ten)
    hurt(place, found.unit(1).shard.key, "cut")
    found.write_unit(ten, 1, pixels(1))
    # the record still names the damaged one
    survey = found.survey(ten)
    assert (survey.whole, survey.finished) == ([0, 2], False)
    for unit in pending_units(ten, survey.whole):
        found.write_unit(ten, unit, pixels(unit))
    found.finish(ten)
    assert found.survey(ten) == Survey([0, 1, 2], [], finished=True)
    assert len(list(found.images())) == 10
    assert len(place.list("shard-")) == 6


def test_a_unit_commit_that_is_lost_from_a_finished_set_is_made_again(place: Storage, ten: Recipe) -> None:
    found = finished(place, ten)
    place.delete(["units/unit-000001.json"])
    survey = found.survey(ten)
    assert (survey.whole, survey.finished) == ([0, 2], False)
    found.write_unit(ten, 1, pixels(1))
    found.finish(ten)
    assert found.survey(ten).finished


def test_a_server_that_is_away_is_no_damage(
    place: Storage, ten: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(place, ten)

    def away(key: str, data: bytes, time: int) -> bytes:
        raise StorageError("away")

    before = {info.key: place.get(info.key) for info in place.list()}
    with pytest.raises(StorageError, match="away"):
        SampleSet(WatchedStorage(place, on_get=away)).survey(ten)
    with pytest.raises(StorageError, match="away"):
        SampleSet(WatchedStorage(place, on_get=away)).write_unit(ten, 1, pixels(7))
    after = {info.key: place.get(info.key) for info in place.list()}
    assert before.items() <= after.items()


def test_the_reader_says_how_to_mend_what_is_damaged(place: Storage, ten: Recipe) -> None:
    found = finished(place, ten)
    key = found.unit(1).shard.key
    hurt(place, key, "flip")
    with pytest.raises(
        SampleSetError, match=rf"{key}: its SHA-256 .*; `ddpm sample --check` makes it again$"
    ):
        list(found.images())


def test_another_version_of_the_format_is_refused(place: Storage, ten: Recipe) -> None:
    place.put("samples.json", b'{"format_version": 2}')
    with pytest.raises(UserError, match=r"samples\.json: has format version 2, this program reads 1"):
        SampleSet(place).record()


def test_listing_units_takes_no_foreign_object_for_one(place: Storage, ten: Recipe) -> None:
    SampleSet(place).write_unit(ten, 2, pixels(0, 2))
    for key in ("units/unit-x.json", "units/unit-000001.json.tmp", "units/other-000001.json"):
        place.put(key, b"")
    assert SampleSet(place).committed() == [2]


def test_webdataset_reads_the_shards(config: Config, checkpoint: Checkpoint) -> None:
    import webdataset as wds

    _, found = made_set(config, checkpoint)
    expected = dict(found.images())
    record = found.record()
    root = Path(found.uri.removeprefix("file://"))
    urls = [str(root / unit.shard.key) for unit in record.units]
    read: dict[int, NDArray[np.uint8]] = {}
    for sample in wds.WebDataset(urls, shardshuffle=False):
        read[int(sample["__key__"])] = np.asarray(Image.open(io.BytesIO(sample["png"])))[None]
    assert sorted(read) == list(range(10))
    assert all(np.array_equal(read[number], expected[number]) for number in read)


def test_the_index_says_where_each_image_lies(config: Config, checkpoint: Checkpoint) -> None:
    _, found = made_set(config, checkpoint)
    unit = found.record().units[1]
    index = parse_index(found.storage.get(unit.index.key))
    assert index.key.to_pylist() == [f"{number:09d}" for number in range(4, 8)]
    assert index.label.tolist() == [-1] * 4
    tar = found.storage.get(unit.shard.key)
    for start, length in zip(index.offset, index.length, strict=True):
        assert tar[start : start + length].startswith(b"\x89PNG")


def test_levels_reach_the_pixels(checkpoint: Checkpoint, config: Config) -> None:
    made = recipe_of(config, checkpoint, 17)
    found = sample_set(config, made)
    UnitMaker(made, found.uri, "cpu").make(2)
    commit = found.unit(2)
    index, tar = parse_index(found.storage.get(commit.index.key)), found.storage.get(commit.shard.key)
    start, length = int(index.offset[0]), int(index.length[0])
    values = set(np.asarray(Image.open(io.BytesIO(tar[start : start + length]))).reshape(-1).tolist())
    assert values <= {round(level * 255 / 16) for level in range(17)}
    assert len(values) > 3
