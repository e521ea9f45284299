"""A prepared data set: its commit record `dataset.json`, and the shards that `shards.parquet` lists.

PREFIX/train/shard-000000.tar, shard-000000.index.parquet, …     and the same under PREFIX/test/
PREFIX/shards.parquet     a row a shard
PREFIX/dataset.json       written last, once; it holds the hash of shards.parquet, which holds all others
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any
from urllib.parse import unquote

import pyarrow as pa
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    StringConstraints,
    ValidationError,
)

from pipelines.errors import UserError, one_line, printable
from pipelines.images import check_levels
from pipelines.shards import read_parquet, sha256, to_parquet
from pipelines.storage import ObjectMissing, Storage, StorageError, open_storage

log = logging.getLogger(__name__)

FORMAT = "ddpm-dataset"
VERSION = 1
RECORD_KEY = "dataset.json"
SHARDS_KEY = "shards.parquet"
SPLITS = ("train", "test")
# the field in which a record tells the hash of all others
_IDENTITY = "identity"
# Pillow decodes no larger image
_MAX_PIXELS = 178_956_970
_SHA256 = re.compile("[0-9a-f]{64}")


class DataError(UserError):
    """An object of a data set is missing, damaged, or not what the data set's record says it is."""


_MADE_AGAIN = "delete it, and the same `ddpm prepare` makes it again"


@dataclass(frozen=True)
class Shard:
    """One shard of a split: its two objects (keys below the data set's prefix), their hashes, and its size.

    A tar that stays where its owner put it has its whole URI as `key`. `num_bytes` and `sha256` are the tar's;
    `count` is its number of samples.
    """

    split: str
    key: str
    index_key: str
    count: int
    num_bytes: int
    sha256: str
    index_sha256: str


_SHARD_SCHEMA = pa.schema(
    [(f.name, pa.int64() if f.name in ("count", "num_bytes") else pa.string()) for f in fields(Shard)]
)


def has_control(name: str) -> bool:
    """Whether a name could do more to a terminal than stand in it; such a name is refused as a shard's."""
    return any(unicodedata.category(char) == "Cc" for char in name)


def shards_to_parquet(shards: Iterable[Shard]) -> bytes:
    rows = [vars(shard) for shard in shards]
    return to_parquet(pa.Table.from_pylist(rows, schema=_SHARD_SCHEMA))


def shards_from_parquet(data: bytes) -> list[Shard]:
    """Raises `ValueError` with the reason if these bytes are no list of shards."""
    shards = [Shard(**row) for row in read_parquet(data, _SHARD_SCHEMA).to_pylist()]
    for shard in shards:
        if shard.count < 0 or shard.num_bytes < 0:
            raise ValueError(
                f"a shard of {shard.count} samples and {shard.num_bytes} bytes: {printable(shard.key)}"
            )
        for name in (shard.split, shard.key, shard.index_key):
            if has_control(name):
                raise ValueError(f"a name with control characters: {printable(name)}")
        for name in (shard.sha256, shard.index_sha256):
            if not _SHA256.fullmatch(name):
                raise ValueError(
                    f"{printable(shard.key)}: {one_line(ValueError(printable(name)), 80)} is no SHA-256"
                )
    return shards


def canonical_json(record: Mapping[str, Any]) -> bytes:
    """One spelling for one content: keys sorted, no spaces, UTF-8."""
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def identity_of(record: Mapping[str, Any]) -> str:
    """SHA-256 of a record's content, whatever its spelling."""
    return hashlib.sha256(canonical_json(record)).hexdigest()


def with_identity(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as it is stored."""
    return {**record, _IDENTITY: identity_of(record)}


@dataclass(frozen=True)
class Dataset:
    """`identity`: SHA-256 of the record's content, the same wherever the data set lies. `shape`: (C, H, W)
    of every image. `levels`: values a channel. `classes`: their names, in the order of the labels (empty if
    there are no labels). `splits`: the shards of "train" and of "test". `record`: all of dataset.json.
    """

    storage: Storage = field(compare=False, repr=False)
    identity: str
    shape: tuple[int, int, int]
    levels: int
    classes: tuple[str, ...]
    splits: dict[str, tuple[Shard, ...]] = field(compare=False, repr=False)
    record: dict[str, Any] = field(compare=False, repr=False)

    @staticmethod
    def load(uri: str) -> Dataset:
        """The data set at this prefix, its record and its list of shards checked; no shard is read.

        Raises `DataError` if there is none, if it has another format version, or if the record and the list
        do not belong together; `StorageError` if the storage cannot be read.
        """
        return load_from(open_storage(uri))

    @property
    def name(self) -> str:
        return str(self.record["name"])

    @property
    def uri(self) -> str:
        return self.storage.uri

    def shards(self, split: str) -> tuple[Shard, ...]:
        """Raises `DataError` if the data set has no such split."""
        if split not in self.splits:
            raise DataError(
                f"{self.uri}: has no split {split!r}, only {printable(', '.join(sorted(self.splits)))}"
            )
        return self.splits[split]

    def tar_of(self, shard: Shard) -> tuple[Storage, str]:
        """Where a shard's tar lies: below the data set's prefix, or elsewhere. Raises `DataError` if that is no
        address.
        """
        if "://" not in shard.key:
            return self.storage, shard.key
        folder, _, name = shard.key.rpartition("/")
        try:
            storage = open_storage(folder)
        except UserError as error:
            raise DataError(f"{self.uri}/{SHARDS_KEY}: {one_line(error)}") from None
        return storage, name if folder.startswith("s3:") else unquote(name)

    def uri_of(self, shard: Shard) -> str:
        """The whole address of a shard's tar, as it may be shown."""
        return printable(shard.key if "://" in shard.key else f"{self.uri}/{shard.key}")

    def uri_of_index(self, shard: Shard) -> str:
        """The whole address of a shard's index, as it may be shown."""
        return printable(f"{self.uri}/{shard.index_key}")

    def what_to_run(self, *, deep: bool = False) -> str:
        """For whom it turned out to be damaged: the command that names the damage and says what to do about it
        (`pipelines.verify_dataset`, which sees all of it).
        """
        command = f"ddpm verify {printable(self.uri)}{' --deep' if deep else ''}"
        return f"`{command}` names all that is damaged, and what to do"

    def missing(self) -> list[str]:
        """The objects that are missing, and the tars of another size, by one listing a folder; a phrase each. Of
        tars that stay elsewhere nothing is said. Raises `StorageError` where nothing can be listed.

        A change of bytes is not seen; `ddpm verify` reads them.
        """

        @functools.cache
        def sizes(folder: str) -> dict[str, int]:
            return {info.key: info.num_bytes for info in self.storage.list(f"{folder}/" if folder else "")}

        def size_of(key: str) -> int | None:
            return sizes(key.rpartition("/")[0]).get(key)

        found = []
        for shard in (shard for shards in self.splits.values() for shard in shards):
            if "://" not in shard.key and size_of(shard.key) != shard.num_bytes:
                found.append(f"{self.uri_of(shard)} is missing or not {shard.num_bytes} bytes long")
            if size_of(shard.index_key) is None:
                found.append(f"{self.uri_of_index(shard)} is missing")
        return found

    def check_all_there(self) -> None:
        """Raise `DataError` where `missing` finds something; who may read, but not list, goes on."""
        try:
            missing = self.missing()
        except StorageError as error:
            log.info("what is missing of the data set will show when it is read: %s", one_line(error, 200))
            return
        if missing:
            more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise DataError(f"{missing[0]}{more}: {self.what_to_run()}")

    def count(self, split: str) -> int:
        """How many samples the split holds."""
        return sum(shard.count for shard in self.shards(split))


class _Split(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    count: NonNegativeInt
    shards: NonNegativeInt | None = None


class _Record(BaseModel):
    """What is read of `dataset.json`: no number for a text, no 8.9 or true for a number."""

    model_config = ConfigDict(strict=True, extra="forbid")

    format: str
    version: int
    name: str
    shape: Annotated[list[PositiveInt], Field(min_length=3, max_length=3)]
    levels: int
    classes: list[str]
    splits: dict[str, _Split]
    preparation: dict[str, Any] = {}
    shards_sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


def load_from(storage: Storage) -> Dataset:
    """`Dataset.load` for a storage that is open already."""
    where = f"{storage.uri}/{RECORD_KEY}"
    try:
        raw = storage.get(RECORD_KEY)
    except ObjectMissing:
        raise DataError(
            f"{storage.uri}: there is no finished data set here (no {RECORD_KEY}): "
            f"make one with `ddpm prepare SOURCE --out {storage.uri}`"
        ) from None
    try:
        record = json.loads(raw, parse_constant=_refuse_constant)
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        # records of earlier versions tell none
        told = record.pop(_IDENTITY) if _IDENTITY in record else identity_of(record)
        identity = identity_of(record)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: is not the record of a data set ({one_line(error, 120)}); {_MADE_AGAIN}"
        ) from None
    version = record.get("version")
    if type(version) is not int or version != VERSION:
        raise DataError(
            f"{where}: has format version {_shown(version)}, and this program reads version {VERSION}"
        )
    if told != identity:
        raise DataError(
            f"{where}: is damaged (its content is not that of its field {_IDENTITY}); {_MADE_AGAIN}"
        )
    try:
        about = _Record.model_validate(record)
        check_levels(about.levels)
        channels, height, width = about.shape
        if channels not in (1, 3) or height * width > _MAX_PIXELS:
            raise ValueError(f"shape: must be [1 or 3, height, width], got {_shown(about.shape)}")
    except ValidationError as invalid:
        problem = invalid.errors()[0]
        place = (
            one_line(ValueError(printable(".".join(map(str, problem["loc"])))), 60)
            if any(problem["loc"])
            else "''"
        )
        raise DataError(
            f"{where}: is damaged (field {place}: {problem['msg']}, got {_shown(problem['input'])}); {_MADE_AGAIN}"
        ) from None
    except ValueError as error:
        raise DataError(f"{where}: is damaged (field {one_line(error, 120)}); {_MADE_AGAIN}") from None
    return Dataset(
        storage=storage,
        identity=identity,
        shape=(channels, height, width),
        levels=about.levels,
        classes=tuple(about.classes),
        splits=_load_shards(storage, about),
        record=record,
    )


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _shown(value: Any) -> str:
    try:
        return one_line(ValueError(repr(value)), 40)
    except (ValueError, RecursionError):  # a number of too many digits, or lists in lists
        return "what is too long to be shown"


def _load_shards(storage: Storage, record: _Record) -> dict[str, tuple[Shard, ...]]:
    where = f"{storage.uri}/{SHARDS_KEY}"
    try:
        raw = storage.get(SHARDS_KEY)
    except ObjectMissing:
        raise DataError(
            f"{where}: is missing, though {RECORD_KEY} names it: prepare the data set again"
        ) from None
    found, expected = sha256(raw), record.shards_sha256
    if found != expected:
        raise DataError(
            f"{where}: has SHA-256 {found[:16]}…, and {RECORD_KEY} names {expected[:16]}…: "
            "one of the two is damaged or another data set's; restore it, or delete both, and the same "
            "`ddpm prepare` makes them again"
        )
    try:
        shards = shards_from_parquet(raw)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None
    splits: dict[str, tuple[Shard, ...]] = {
        split: tuple(shard for shard in shards if shard.split == split)
        for split in dict.fromkeys([*record.splits, *(shard.split for shard in shards)])
    }
    for split, listed in splits.items():
        said = record.splits.get(split, _Split(count=0, shards=0))
        for what, there, named in (
            ("samples", sum(shard.count for shard in listed), said.count),
            ("shards", len(listed), said.shards),
        ):
            if named is not None and there != named:
                raise DataError(
                    f"{where}: lists {there} {printable(split)} {what}, and {RECORD_KEY} says {named}"
                )
    return splits
