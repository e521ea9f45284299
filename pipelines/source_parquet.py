"""Parquet files with image bytes as a source, as Hugging Face's `datasets` writes them."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipelines.cache import WeightedLRU
from pipelines.columns import (
    Coded,
    mapped,
)
from pipelines.entries import Entries, checked
from pipelines.errors import UserError, one_line, printable
from pipelines.labels import number_labels
from pipelines.parquet_rows import KEY, Footer, Rows, listing, open_file, small_columns
from pipelines.source_find import Found
from pipelines.sources import Entry, Loaded, Source, fingerprint, sample_key, state_of
from pipelines.storage import Storage

logger = logging.getLogger(__name__)

_IMAGE = "image"
_LABEL = "label"
_CAPTIONS = ("caption", "text", "txt")
_INDEX_OF_PANDAS = re.compile(r"__index_level_\d+__")
_CACHE_BYTES = 256 * 2**20
_LARGE_GROUP_BYTES = 2**30


@dataclass
class _ParquetReader:
    """`image`: the column of the images. `others`: columns that are carried, with their members' extensions."""

    storage: Storage
    sizes: Mapping[str, int]
    image: str
    others: tuple[tuple[str, str], ...]
    _groups: WeightedLRU[Any, pa.Table] | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_groups": None}

    def load(self, entry: Entry) -> Loaded:
        key, group, row = entry.place
        if self._groups is None:
            self._groups = WeightedLRU(_CACHE_BYTES)
        table = self._groups.get((key, group), lambda: self._read(key, group), lambda table: table.nbytes)
        value = table[self.image][row].as_py()
        image = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(image, bytes):
            path = value.get("path") if isinstance(value, dict) else None
            inside = f"only the path {printable(str(path))}" if path else "nothing"
            raise UserError(f"{entry.name}: column {self.image!r} holds {inside}, and no image's bytes")
        members = {}
        for column, extension in self.others:
            carried = table[column][row].as_py()
            if carried is not None:
                members[extension] = _member(carried)
        return Loaded(image, members)

    def _read(self, key: str, group: int) -> pa.Table:
        where = printable(f"{self.storage.uri}/{key}")
        columns = [self.image, *(column for column, _ in self.others)]
        try:
            return open_file(self.storage, key, self.sizes[key]).read_row_group(
                group, columns=columns, use_threads=False
            )
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{where}: row group {group} can't be read ({one_line(error, 120)})") from None


def _member(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode()
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=_plain).encode()


def _plain(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else str(value)


def open_parquet(found: Found, image: str | None, label: str | None) -> Source:
    """The rows of these files.

    The image is in the column `image` (bytes, or a struct with a field `bytes`), the label in `label` (a number
    or text; Hugging Face's names of the classes are taken from the schema), the sample's key in `__key__`, or it
    is made of the file's name and the row's number. Every other column is carried: text as the member NAME.txt
    (a column caption or text: as txt), bytes as NAME.bin, else NAME.json; an empty field is left out, and so is the
    index that pandas adds.
    """
    storage, where = found.storage, found.where
    files = []
    schema: pa.Schema = None
    for key, num_bytes in found.keys.items():
        file = open_file(storage, key, num_bytes)
        schema = file.schema_arrow if schema is None else schema
        if not file.schema_arrow.equals(schema):
            raise UserError(
                f"source: {where}: {printable(key)} has other columns than {printable(next(iter(found.keys)))}: "
                f"{', '.join(map(str, file.schema_arrow.names))}"
            )
        files.append(Footer.of(key, num_bytes, file.metadata))
    image, label = _columns(where, schema, image, label)
    used = {image, KEY, *([label] if label else [])}
    _warn_of_large_groups(where, files)
    reader = _ParquetReader(storage, dict(found.keys), image, _extensions(where, schema, used))
    parts = []
    labels: list[Coded[Any]] = []
    for footer in files:
        names, own_labels = small_columns(storage, where, footer, label, KEY in schema.names)
        parts.append(Rows(storage.uri, footer, names, mapped(names, sample_key)))
        labels.append(own_labels)
    entries = Entries(parts)
    classes, numbers = number_labels(
        where, labels, _class_names(schema, label), lambda row: entries[row].name
    )
    return Source(
        kind="parquet",
        name=printable(found.name),
        levels=256,
        classes=classes,
        entries=checked(where, entries.with_labels(numbers)),
        fingerprint=fingerprint(listing(parts, numbers)),
        reader=reader,
        state=state_of(found.versions),
    )


def _warn_of_large_groups(where: str, files: list[Footer]) -> None:
    largest = max((int(file.sizes.max()) for file in files if len(file.sizes)), default=0)
    if largest > _LARGE_GROUP_BYTES:
        logger.warning(
            "%s: has row groups of up to %.1f GiB, each of which is read whole for the shards that draw from it: "
            "smaller ones (row_group_size) take less memory and time",
            where,
            largest / 2**30,
        )


def _columns(where: str, schema: pa.Schema, image: str | None, label: str | None) -> tuple[str, str | None]:
    for option, asked in (("--image", image), ("--label", label)):
        if asked is not None and asked not in schema.names:
            raise UserError(f"{option} {asked}: {where} has the columns {', '.join(schema.names)}")
    if image is None and _IMAGE not in schema.names:
        raise UserError(
            f"source: {where}: has the columns {', '.join(schema.names)}: say with --image NAME which holds the "
            "images"
        )
    image = image or _IMAGE
    kind = schema.field(image).type
    if pa.types.is_struct(kind):
        kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise UserError(
            f"source: {where}: column {image!r} must be binary or a struct with the field bytes, not {kind}"
        )
    label = label or (_LABEL if _LABEL in schema.names else None)
    if label is not None:
        kind = schema.field(label).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UserError(f"source: {where}: column {label!r} must be integers or text, not {kind}")
    return image, label


def _extensions(where: str, schema: pa.Schema, used: set[str]) -> tuple[tuple[str, str], ...]:
    """The columns that are carried, each with its member's extension."""
    rest = [
        column for column in schema.names if column not in used and not _INDEX_OF_PANDAS.fullmatch(column)
    ]
    caption = next((name for name in _CAPTIONS if name in rest), None)
    found: dict[str, str] = {}
    for column in rest:
        kind = schema.field(column).type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            suffix = "txt"
        else:
            suffix = "bin" if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) else "json"
        stem = re.sub(r"[^a-z0-9_-]", "_", column.lower())
        extension = "txt" if column == caption and suffix == "txt" else f"{stem}.{suffix}"
        if extension.startswith("_"):
            raise UserError(
                f"source: {where}: column {column!r} would be the member {extension!r}, and WebDataset passes over "
                "names that begin with '_': rename it"
            )
        if extension in found:
            raise UserError(
                f"source: {where}: columns {found[extension]!r} and {column!r} would both be the member "
                f"{extension!r}: rename one"
            )
        found[extension] = column
    return tuple((column, extension) for extension, column in found.items())


def _class_names(schema: pa.Schema, label: str | None) -> list[str] | None:
    """The names of the classes that Hugging Face's `datasets` leaves in the schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None
