"""A sample set in storage: one commit a unit, and the record of the whole.

A unit is one WebDataset shard with its Parquet index, written under names that carry the attempt, and then a
commit record by one conditional PUT.  What is committed is done; `samples.json` is the record of the whole and
comes last.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from pipelines.config import Config
from pipelines.images import decode_png
from pipelines.png import encode_pngs
from pipelines.records import (
    ObjectRecord,
    RecordError,
    commit_first,
    discard,
    put_recorded,
    read_checked,
    read_record,
)
from pipelines.sample_recipe import FORMAT_VERSION, Recipe, num_units, unit_range
from pipelines.shards import Sample, pack, parse_index
from pipelines.storage import ObjectMissing, Storage, open_storage

RECORD = "samples.json"

_READ_IN_A_MOMENT_BYTES = 64 * 2**20


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
        files = encode_pngs(images.numpy(), recipe.settings.png_encoder)
        packed = pack(
            Sample(f"{number:09d}", image, recipe.label(number))
            for number, image in zip(numbers, files, strict=True)
        )
        stem = f"shard-{unit:06d}-{uuid.uuid4().hex[:12]}"
        parts = ((f"{stem}.tar", packed.tar), (f"{stem}.index.parquet", packed.index))
        shard, index = put_recorded(self.storage, parts, {f"{stem}.tar": packed.tar_sha256})
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
