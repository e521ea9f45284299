"""Mass generation: image i = g(checkpoint, sampler, seed, i), whichever worker makes it, however often.

A set is cut into units of consecutive images.  A unit is one WebDataset shard with its Parquet index, written
under names that carry the attempt, and then a commit record by one conditional PUT.  What is committed is
done; `samples.json` is the record of the whole and comes last.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from ddpm_core.networks import build_network
from ddpm_core.predictions import PredictionType
from ddpm_core.samplers import SamplerConfig, sample
from ddpm_core.schedules import Schedule
from ddpm_core.types import EpsTheta
from pipelines.checkpoints import Checkpoint, open_checkpoint
from pipelines.compiled import compile_frozen
from pipelines.conditioning import conditioned, fitted
from pipelines.config import Config, SampleConfig, digest
from pipelines.errors import UserError
from pipelines.images import decode_png, encode_png, to_uint8
from pipelines.records import (
    ObjectRecord,
    RecordError,
    commit_first,
    discard,
    put_recorded,
    read_checked,
    read_record,
)
from pipelines.shards import Sample, pack, parse_index
from pipelines.storage import ObjectMissing, Storage, open_storage
from pipelines.telling import validated

FORMAT_VERSION = 1
RECORD = "samples.json"

_READ_IN_A_MOMENT_BYTES = 64 * 2**20
_WITHOUT_EFFECT = ("gradient_checkpointing",)
"""Settings of a model that change nothing of its output."""


class SampleSetError(RecordError):
    """A sample set's record or object is missing, damaged, or of a format that this version does not read."""


class UnitCommit(BaseModel):
    """The commit record of one unit: images `start` to `stop` of the set."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int
    unit: int
    start: int
    stop: int
    shard: ObjectRecord
    index: ObjectRecord


class SetRecord(BaseModel):
    """`samples.json`: everything that is needed to make the set again, and what it consists of."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int
    kind: str = "ddpm-samples"
    recipe: dict[str, Any]
    checkpoint: str
    count: int
    shape: tuple[int, int, int]
    levels: int
    units: list[UnitCommit]


@dataclass(frozen=True)
class Recipe:
    """What a sample set is a function of."""

    name: str
    checkpoint: str
    """URI of the checkpoint."""
    checkpoint_identity: str
    sampler: SamplerConfig
    settings: SampleConfig
    shape: tuple[int, int, int]
    levels: int
    prediction_type: PredictionType = "eps"
    """What the checkpoint's network predicts, which its identity implies."""
    num_classes: int | None = None
    """How many classes it knows, which its identity implies too."""

    def identity(self) -> dict[str, Any]:
        labels = self.labels
        conditional = (
            {"labels": list(labels), "guidance_scale": self.settings.guidance_scale} if labels else {}
        )
        compiled = {"compile": True} if self.settings.compile else {}
        return (
            conditional
            | compiled
            | {
                "format_version": FORMAT_VERSION,
                "checkpoint": self.checkpoint_identity,
                "sampler": self.sampler.identity(),
                "seed": self.settings.seed,
                "count": self.settings.count,
                "unit_size": self.settings.unit_size,
                "batch_size": self.settings.batch_size,
                "shape": list(self.shape),
                "levels": self.levels,
            }
        )

    @property
    def labels(self) -> tuple[int, ...]:
        """What the network is told of images 0, 1, …, over and over; empty where it has no classes."""
        return () if self.num_classes is None else self.settings.labels or tuple(range(self.num_classes))

    def label(self, number: int) -> int:
        """The class that an image is of, −1 for none."""
        told = self.labels[number % len(self.labels)] if self.labels else self.num_classes
        return -1 if told is None or told == self.num_classes else told

    def asked(
        self, model: nn.Module, schedule: Schedule, index: Sequence[int], device: torch.device
    ) -> EpsTheta:
        """The network as these images ask it."""
        labels = self.labels
        told = torch.tensor([labels[i % len(labels)] for i in index], device=device) if labels else None
        return conditioned(model, schedule, told, self.settings.guidance_scale)

    def set_name(self) -> str:
        return f"{self.name}-{digest(self.identity())[:10]}"


def recipe_of(config: Config, checkpoint: Checkpoint, levels: int) -> Recipe:
    """The recipe of the samples of a checkpoint; the model's part comes from the checkpoint.

    Raises `UserError` naming each field in which the configuration describes another model.
    """
    trained = checkpoint_config(checkpoint)
    mistakes = []
    for section in ("schedule", "model", "objective"):
        ours, theirs = asdict(getattr(config, section)), asdict(getattr(trained, section))
        # networks and schedules of different kinds have different settings, and the kind says it all
        keys = ["kind"] if ours.get("kind") != theirs.get("kind") else list(ours)
        mistakes += [
            f"{section}.{key}: {ours[key]}, but the checkpoint {checkpoint.uri} was trained with {theirs[key]}"
            for key in keys
            if ours[key] != theirs[key] and key not in _WITHOUT_EFFECT
        ]
    if mistakes:
        raise UserError("\n".join(mistakes))
    size, channels = trained.model.image_size, trained.model.in_channels
    return Recipe(
        config.name,
        checkpoint.uri,
        checkpoint.identity,
        fitted(config.sampler, trained.model),
        config.sample,
        (channels, size, size),
        levels,
        trained.objective.prediction_type,
        trained.model.num_classes,
    )


def checkpoint_config(checkpoint: Checkpoint) -> Config:
    """The configuration that a checkpoint was trained with."""
    return validated(Config, checkpoint.commit.config, f"{checkpoint.uri}/commit.json: config")


def load_model(checkpoint: Checkpoint, device: torch.device) -> tuple[nn.Module, Schedule]:
    """The averaged network of a checkpoint, for evaluation, and its noise schedule."""
    config = checkpoint_config(checkpoint)
    model = build_network(config.model)
    model.load_state_dict(checkpoint.read("ema"))
    return model.to(device).eval().requires_grad_(False), Schedule.from_config(config.schedule).to(device)


def make_images(
    model: nn.Module, schedule: Schedule, recipe: Recipe, index: Sequence[int], device: torch.device
) -> Tensor:
    """Images float32 [n, C, H, W] of these numbers.

    They go through the network in batches that are always `batch_size` large, filled up by repeating the
    last number: a network's rounding depends on the size of its batch.
    """
    size = recipe.settings.batch_size
    made = []
    with torch.inference_mode():
        for start in range(0, len(index), size):
            part = list(index[start : start + size])
            padded = part + [part[-1]] * (size - len(part))
            x = sample(
                recipe.asked(model, schedule, padded, device),
                schedule,
                recipe.sampler,
                seed=recipe.settings.seed,
                index=torch.tensor(padded, dtype=torch.int64, device=device),
                shape=recipe.shape,
                prediction_type=recipe.prediction_type,
                device=device,
            )
            made.append(x[: len(part)].cpu())
    return torch.cat(made)


def unit_range(recipe: Recipe, unit: int) -> range:
    """The images of a unit."""
    size = recipe.settings.unit_size
    return range(unit * size, min((unit + 1) * size, recipe.settings.count))


def num_units(recipe: Recipe) -> int:
    return -(-recipe.settings.count // recipe.settings.unit_size)


def pending_units(recipe: Recipe, committed: Iterable[int]) -> list[int]:
    """The units still to make."""
    done = set(committed)
    return [unit for unit in range(num_units(recipe)) if unit not in done]


@dataclass(frozen=True)
class Survey:
    """What of a sample set is there."""

    whole: list[int]
    """The committed units that are undamaged, as far as was looked."""
    damage: list[str]
    """What is wrong, a line each."""
    finished: bool
    """Every unit is whole, and the record of the set names them."""


class SampleSet:
    """A sample set in storage, finished or not."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    @property
    def uri(self) -> str:
        return self.storage.uri

    def committed(self) -> list[int]:
        """The units with a commit record."""
        names = (info.key.rpartition("/")[2] for info in self.storage.list("units/unit-"))
        return sorted(int(name[5:-5]) for name in names if name.endswith(".json") and name[5:-5].isdecimal())

    def write_unit(self, recipe: Recipe, unit: int, images: Tensor) -> UnitCommit:
        """Write and commit a unit's images, uint8 [n, C, H, W]; the first commit of a unit stands.

        Unless it is damaged: then this one takes its place.
        """
        numbers = unit_range(recipe, unit)
        assert len(numbers) == len(images)
        packed = pack(
            Sample(f"{number:09d}", encode_png(image), recipe.label(number))
            for number, image in zip(numbers, images, strict=True)
        )
        stem = f"shard-{unit:06d}-{uuid.uuid4().hex[:12]}"
        parts = ((f"{stem}.tar", packed.tar), (f"{stem}.index.parquet", packed.index))
        shard, index = put_recorded(self.storage, parts)
        commit = UnitCommit(
            format_version=FORMAT_VERSION,
            unit=unit,
            start=numbers.start,
            stop=numbers.stop,
            shard=shard,
            index=index,
        )
        replaced: list[ObjectRecord] = []
        standing = commit_first(
            self.storage, unit_key(unit), commit, (shard, index), lambda: self._whole_unit(unit, replaced)
        )
        discard(self.storage, replaced)
        return standing or commit

    def _whole_unit(self, unit: int, damaged: list[ObjectRecord]) -> UnitCommit | None:
        """The unit that stands if all of it can be read; if not, its objects are added to `damaged`."""
        try:
            found = self.unit(unit)
        except (SampleSetError, ObjectMissing):
            return None
        objects = (found.shard, found.index)
        try:
            for record in objects:
                read_checked(self.storage, record, SampleSetError)
        except SampleSetError:
            damaged.extend(objects)
            return None
        return found

    def unit(self, unit: int) -> UnitCommit:
        return read_record(self.storage, unit_key(unit), UnitCommit, FORMAT_VERSION, SampleSetError)

    def finish(self, recipe: Recipe) -> SetRecord:
        """Write the record of the whole, once every unit is committed."""
        record = SetRecord(
            format_version=FORMAT_VERSION,
            recipe=recipe.identity(),
            checkpoint=recipe.checkpoint,
            count=recipe.settings.count,
            shape=recipe.shape,
            levels=recipe.levels,
            units=[self.unit(unit) for unit in range(num_units(recipe))],
        )
        # a record that names other units is from before one of them was made again
        commit_first(self.storage, RECORD, record, (), lambda: self._record_of(record.units))
        return self.record()

    def _record_of(self, units: list[UnitCommit]) -> SetRecord | None:
        """The record that stands if it names these units."""
        try:
            found = self.record()
        except SampleSetError:
            return None
        return found if found.units == units else None

    def survey(self, recipe: Recipe, *, thorough: bool = False) -> Survey:
        """What of the set is there.

        Sizes are compared with one listing.  Objects are read and compared by SHA-256 if `thorough`, or if they
        are so few that this takes a moment.
        """
        sizes = {info.key: info.num_bytes for info in self.storage.list()}
        committed = [unit for unit in range(num_units(recipe)) if unit_key(unit) in sizes]
        damage: list[str] = []
        try:
            named = {unit.unit: unit for unit in self.record().units} if RECORD in sizes else {}
        except SampleSetError as error:
            named = {}
            damage.append(str(error))
        thorough = thorough or sum(sizes.values()) <= _READ_IN_A_MOMENT_BYTES
        whole = []
        for unit in committed:
            try:
                # one read for all units of a finished set, and of an unfinished one a read each
                commit = named.get(unit) or self.unit(unit)
                for record in (commit.shard, commit.index):
                    self._check(record, sizes, thorough)
            except SampleSetError as error:
                damage.append(str(error))
            else:
                whole.append(unit)
        return Survey(whole, damage, finished=len(named) == len(whole) == num_units(recipe))

    def _check(self, record: ObjectRecord, sizes: Mapping[str, int], thorough: bool) -> None:
        if thorough or sizes.get(record.key) != record.num_bytes:
            read_checked(self.storage, record, SampleSetError)

    def is_finished(self) -> bool:
        return self.storage.exists(RECORD)

    def record(self) -> SetRecord:
        """Raises `SampleSetError` where the set is not finished."""
        try:
            return read_record(self.storage, RECORD, SetRecord, FORMAT_VERSION, SampleSetError)
        except ObjectMissing:
            raise SampleSetError(
                f"{self.uri}: no finished sample set here; make it with `ddpm sample`"
            ) from None

    def images(self, limit: int | None = None) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """(number, uint8 [C, H, W]) of the set's images by rising number, every shard checked by SHA-256."""
        record = self.record()
        for unit in record.units:
            index = parse_index(self._read(unit.index))
            tar = self._read(unit.shard)
            for row, number in enumerate(range(unit.start, unit.stop)):
                if limit is not None and number >= limit:
                    return
                start, length = int(index.offset[row]), int(index.length[row])
                yield number, decode_png(tar[start : start + length], record.shape)

    def _read(self, record: ObjectRecord) -> bytes:
        try:
            return read_checked(self.storage, record, SampleSetError)
        except SampleSetError as error:
            raise SampleSetError(f"{error}; `ddpm sample --check` makes it again") from None


def sample_set(config: Config, recipe: Recipe) -> SampleSet:
    """The place of a recipe's set: STORAGE/samples/NAME-ID/."""
    return SampleSet(open_storage(config.storage).child("samples", recipe.set_name()))


def unit_key(unit: int) -> str:
    return f"units/unit-{unit:06d}.json"


class UnitMaker:
    """Makes units of one set: what a sampling worker is, in this process or as a Ray actor."""

    def __init__(self, recipe: Recipe, set_uri: str, device: str) -> None:
        self._recipe = recipe
        self._set = SampleSet(open_storage(set_uri))
        self._device = torch.device(device)
        checkpoint = open_checkpoint(recipe.checkpoint)
        if checkpoint.identity != recipe.checkpoint_identity:
            raise UserError(f"{recipe.checkpoint}: was replaced by another checkpoint meanwhile")
        self._model, self._schedule = load_model(checkpoint, self._device)
        if recipe.settings.compile:
            self._compile()

    def _compile(self) -> None:
        batch = list(range(self._recipe.settings.batch_size))
        ask = self._recipe.asked(self._model, self._schedule, batch, self._device)
        x = torch.zeros(len(batch), *self._recipe.shape, device=self._device)
        t = torch.zeros(len(batch), dtype=torch.int64, device=self._device)
        compile_frozen(self._model, lambda: ask(x, t))

    def make(self, unit: int) -> int:
        """Make and commit a unit; returns how many images it holds."""
        numbers = unit_range(self._recipe, unit)
        x = make_images(self._model, self._schedule, self._recipe, numbers, self._device)
        self._set.write_unit(self._recipe, unit, to_uint8(x, self._recipe.levels))
        return len(numbers)
