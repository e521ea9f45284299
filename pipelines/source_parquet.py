"""Parquet files with image bytes as a source, as Hugging Face's `datasets` writes them."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.cache import WeightedLRU
from pipelines.errors import UserError, one_line, printable
from pipelines.source_find import Found, read_range
from pipelines.sources import Entry, Loaded, Source, fingerprint, number_labels, ordered, sample_key, state_of
from pipelines.storage import Storage

logger = logging.getLogger(__name__)

_IMAGE = "image"
_LABEL = "label"
_KEY = "__key__"
_CAPTIONS = ("caption", "text", "txt")
_INDEX_OF_PANDAS = re.compile(r"__index_level_\d+__")
_CACHE_BYTES = 256 * 2**20
_LARGE_GROUP_BYTES = 2**30


class _Ranges(io.RawIOBase):
    """An object of a storage as a file that PyArrow reads pieces of."""

    def __init__(self, storage: Storage, key: str, name: str, num_bytes: int) -> None:
        super().__init__()
        self._object = storage, key, name
        self._num_bytes = num_bytes
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._num_bytes)[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(self._num_bytes - self._at, 0)
        length = left if size is None or size < 0 else min(size, left)
        data = read_range(*self._object, self._at, length) if length else b""
        self._at += length
        return data


def _open(storage: Storage, key: str, num_bytes: int) -> pq.ParquetFile:
    where = printable(f"{storage.uri}/{key}")
    try:
        return pq.ParquetFile(
            pa.PythonFile(_Ranges(storage, key, where, num_bytes), mode="r"), pre_buffer=False
        )
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"source: {where}: is no readable Parquet file ({one_line(error, 120)})") from None


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
            return _open(self.storage, key, self.sizes[key]).read_row_group(
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
    storage, sizes, where = found.storage, found.keys, found.where
    keys = list(sizes)
    files = [_open(storage, key, num_bytes) for key, num_bytes in sizes.items()]
    schema = files[0].schema_arrow
    for key, file in zip(keys, files, strict=True):
        if not file.schema_arrow.equals(schema):
            raise UserError(
                f"source: {where}: {printable(key)} has other columns than {printable(keys[0])}: "
                f"{', '.join(map(str, file.schema_arrow.names))}"
            )
    image, label = _columns(where, schema, image, label)
    used = {image, _KEY, *([label] if label else [])}
    _warn_of_large_groups(where, files)
    reader = _ParquetReader(storage, dict(sizes), image, _extensions(where, schema, used))
    labels: list[Any] = []
    places: list[tuple[str, int, int]] = []
    sample_keys: list[str] = []
    for key, file in zip(keys, files, strict=True):
        small = [column for column in (label, _KEY) if column in schema.names]
        row = 0
        for group in range(file.metadata.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            try:
                table = file.read_row_group(group, columns=small, use_threads=False)
            except (pa.ArrowException, OSError) as error:
                raise UserError(
                    f"source: {where}: {printable(key)} can't be read ({one_line(error, 120)})"
                ) from None
            labels += table[label].to_pylist() if label else [None] * count
            stem = str(PurePosixPath(key).with_suffix(""))
            own = (
                table[_KEY].to_pylist() if _KEY in small else [f"{stem}/{row + n:08d}" for n in range(count)]
            )
            if any(not isinstance(one, str) or not one for one in own):
                raise UserError(f"source: {where}: {printable(key)}: column {_KEY!r} has an empty field")
            sample_keys += own
            places += [(key, group, number) for number in range(count)]
            row += count
    root = storage.uri

    def name_of(number: int) -> str:
        key, group, row = places[number]
        return printable(f"{root}/{key} row {row} of row group {group}")

    classes, numbers = number_labels(where, labels, _class_names(schema, label), name_of)
    entries = [
        Entry(
            sample_key(sample),
            number,
            name_of(place),
            places[place],
            # a file's name may be any bytes, and the plan hashes text
            _text(f"{places[place][0]}/{places[place][1]}"),
        )
        for place, (sample, number) in enumerate(zip(sample_keys, numbers, strict=True))
    ]
    return Source(
        kind="parquet",
        name=printable(found.name),
        levels=256,
        classes=classes,
        entries=ordered(where, entries),
        fingerprint=fingerprint(_listing(keys, files, sample_keys, numbers)),
        reader=reader,
        state=state_of(found.versions),
    )


def _text(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _warn_of_large_groups(where: str, files: list[pq.ParquetFile]) -> None:
    groups = [file.metadata.row_group(n) for file in files for n in range(file.metadata.num_row_groups)]
    largest = max((group.total_byte_size for group in groups), default=0)
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


def _listing(
    keys: list[str], files: list[pq.ParquetFile], sample_keys: list[str], numbers: list[int]
) -> Iterator[str]:
    for key, file in zip(keys, files, strict=True):
        meta = file.metadata
        sizes = [meta.row_group(group).total_byte_size for group in range(meta.num_row_groups)]
        yield f"{key!r} {meta.num_rows} {sizes}"
    for sample, number in zip(sample_keys, numbers, strict=True):
        yield f"{sample!r} {number}"
