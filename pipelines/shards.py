"""One shard: a plain WebDataset tar, and the Parquet index that says where each sample's image lies in it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.images import extension_of
from pipelines.tar_writing import tar_of

INDEX_VERSION = 1
_VERSION_KEY = b"ddpm.index_version"
_TAR_SHA256_KEY = b"ddpm.tar_sha256"
_TAR_BYTES_KEY = b"ddpm.tar_num_bytes"
_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("label", pa.int64()),
        ("crc32c", pa.uint32()),
    ]
)
Encoding = Mapping[str, Any]
"""Options of `pyarrow.parquet.write_table`."""

ZSTD: Encoding = MappingProxyType({"compression": "zstd"})
# Those of indexes, the newest first; data sets with earlier ones are mended with these. Places and lengths are
# stored as differences, keys without what they share with the one before. Only keys are compressed: setting up a
# compressor for each column took most of the time that an index took to be written and read.
INDEX_ENCODINGS: tuple[Encoding, ...] = (
    MappingProxyType(
        {
            "compression": {
                "key": "zstd",
                **dict.fromkeys(("offset", "length", "label", "crc32c"), "none"),
            },
            "use_dictionary": ["label"],
            "column_encoding": {
                "key": "DELTA_BYTE_ARRAY",
                "offset": "DELTA_BINARY_PACKED",
                "length": "DELTA_BINARY_PACKED",
                "crc32c": "PLAIN",
            },
        }
    ),
    ZSTD,
)

Columns = Mapping[str, Sequence[str | int] | NDArray[np.int64] | NDArray[np.uint32]]


class Sample(NamedTuple):
    """`key`: the sample's name in the tar. `image`: PNG or JPEG bytes. `label`: class number, −1 for none.
    `members`: further ones by their extension, carried as they are.
    """

    key: str
    image: bytes
    label: int = -1
    members: Mapping[str, bytes] = MappingProxyType({})


@dataclass(frozen=True)
class PackedShard:
    """The two objects of a shard, ready to be put."""

    tar: bytes
    index: bytes
    count: int
    tar_sha256: str


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """One row a sample, in the tar's order: `offset` and `length` of the image's bytes within the tar,
    `label`, `crc32c` of the image's bytes (int64 each), `key` (an Arrow column). Then the whole tar's size
    and SHA-256.
    """

    key: pa.ChunkedArray
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    label: NDArray[np.int64]
    crc32c: NDArray[np.int64]
    tar_num_bytes: int
    tar_sha256: str

    @property
    def count(self) -> int:
        return len(self.offset)

    def part(self, rows: NDArray[np.int64]) -> ShardIndex:
        """The index with these rows alone, in this order."""
        columns = {name: getattr(self, name)[rows] for name in ("offset", "length", "label", "crc32c")}
        return replace(self, key=self.keys(rows), **columns)

    def keys(self, rows: NDArray[np.int64]) -> pa.ChunkedArray:
        """Those at these rows."""
        rows = np.ascontiguousarray(rows, np.int64)
        # `pa.array` imports pandas, see `_numbers`
        return self.key.take(pa.Array.from_buffers(pa.int64(), len(rows), [None, pa.py_buffer(rows)]))

    @property
    def num_bytes(self) -> int:
        """Memory that the index takes."""
        return int(self.key.nbytes) + 4 * self.offset.nbytes


def sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def crc32c(data: bytes) -> int:
    return int(google_crc32c.value(data))


def pack(samples: Iterable[Sample], encoding: Encoding = INDEX_ENCODINGS[0]) -> PackedShard:
    """The tar and the index of these samples; the same samples give the same bytes. `encoding`: the index's.

    A sample's members are `<key>.png` or `<key>.jpg`, `<key>.cls` (the class number in decimal) if it has a
    label, and the further ones, in the order of their extensions. Raises `ValueError` as `check_members`.
    """
    # no sample is kept: the interpreter's collector would look at thousands of living tuples again and again
    keys: list[str] = []
    images: list[bytes] = []
    labels: list[int] = []
    names: list[str] = []
    bodies: list[bytes] = []
    places: list[int] = []
    for key, data, label, further in samples:
        keys.append(key)
        images.append(data)
        labels.append(label)
        image = extension_of(data)
        if further:
            check_members(data, label, further)
            own = {image: data} if label < 0 else {image: data, "cls": b"%d" % label}
            members = sorted({**further, **own}.items())
            places.append(len(names) + [extension for extension, _ in members].index(image))
            names += [f"{key}.{extension}" for extension, _ in members]
            bodies += [body for _, body in members]
            continue
        if label >= 0:
            names.append(f"{key}.cls")
            bodies.append(b"%d" % label)
        places.append(len(names))
        names.append(f"{key}.{image}")
        bodies.append(data)
    tar, offsets = tar_of(names, bodies)
    tar_sha256 = sha256(tar)
    columns: Columns = {
        "key": keys,
        "offset": offsets[places],
        "length": np.fromiter(map(len, images), np.int64, len(images)),
        "label": labels,
        "crc32c": np.fromiter(map(google_crc32c.value, images), np.uint32, len(images)),
    }
    index = index_of(columns, tar_sha256, len(tar), encoding)
    return PackedShard(tar, index, len(keys), tar_sha256)


def index_of(
    columns: Columns, tar_sha256: str, tar_num_bytes: int, encoding: Encoding = INDEX_ENCODINGS[0]
) -> bytes:
    """The index with these columns (key, offset, length, label, crc32c) of a tar of this hash and size."""
    metadata = {
        _VERSION_KEY: str(INDEX_VERSION),
        _TAR_SHA256_KEY: tar_sha256,
        _TAR_BYTES_KEY: str(tar_num_bytes),
    }
    return to_parquet(pa.table(dict(columns), schema=_SCHEMA.with_metadata(metadata)), encoding)


def check_members(image: bytes, label: int, members: Mapping[str, bytes]) -> None:
    """Raise `ValueError` where a further member would take the place of the image or the label, or has an
    extension that no reader gives back.
    """
    own = (extension_of(image), *(("cls",) if label >= 0 else ()))
    for extension in members:
        if extension in own:
            what, option = ("label", "--label") if extension == "cls" else ("image", "--image")
            raise ValueError(
                f"its further member .{extension} would take the place of its {what}, which is stored as "
                f".{extension}: choose that one with {option} {extension}, or take it out of the source"
            )
        if not extension or extension[0] in "_." or "/" in extension or extension != extension.lower():
            raise ValueError(f"its further member {extension!r} has no extension that WebDataset reads")


def to_parquet(table: pa.Table, encoding: Encoding = ZSTD) -> bytes:
    """The table as one Parquet file in memory, to be put in one piece."""
    with pa.BufferOutputStream() as file:
        pq.write_table(table, file, **encoding)
        return file.getvalue().to_pybytes()


def parse_index(data: bytes | memoryview) -> ShardIndex:
    """The index in these bytes. Raises `ValueError` with the reason if it is none, or not one of this
    version.
    """
    table = read_parquet(data, _SCHEMA)
    metadata = table.schema.metadata or {}
    version = metadata.get(_VERSION_KEY, b"none").decode("ascii", "replace")
    if version != str(INDEX_VERSION):
        raise ValueError(
            f"a shard index of version {version}, and this program reads version {INDEX_VERSION}"
        )
    columns = {name: _numbers(table.column(name)) for name in ("offset", "length", "label", "crc32c")}
    digest, stated = (
        metadata.get(key, b"").decode("ascii", "replace") for key in (_TAR_SHA256_KEY, _TAR_BYTES_KEY)
    )
    if not (re.fullmatch("[0-9a-f]{64}", digest) and re.fullmatch("[0-9]{1,18}", stated)):
        raise ValueError("a shard index that does not say of which tar")
    num_bytes = int(stated)
    offset, length = columns["offset"], columns["length"]
    # not their sum, which may overflow
    if ((offset < 0) | (length < 0) | (length > num_bytes - np.maximum(offset, 0))).any():
        raise ValueError("a shard index that points outside its tar")
    return ShardIndex(
        key=table.column("key"),
        tar_num_bytes=num_bytes,
        tar_sha256=digest,
        **columns,
    )


def _numbers(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """A column without empty fields. Arrow's own ways import pandas, which takes half a second, in which an
    interruption is lost or leaves pandas broken.
    """
    dtype = {pa.int64(): np.int64, pa.uint32(): np.uint32}[column.type]
    parts = [
        np.frombuffer(chunk.buffers()[1], dtype)[chunk.offset : chunk.offset + len(chunk)].astype(np.int64)
        for chunk in column.chunks
        if len(chunk)
    ]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def read_parquet(data: bytes | memoryview, schema: pa.Schema) -> pa.Table:
    """The Parquet file in these bytes, which must hold just these columns; `ValueError` with the reason if
    not.
    """
    try:
        # on Arrow's threads, now and then the interpreter's exit aborts (apache/arrow issue 34314)
        table = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False).read(use_threads=False)
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"not a readable Parquet file ({' '.join(str(error).split())[:120]})") from None
    if not table.schema.equals(schema, check_metadata=False):
        raise ValueError(f"a Parquet file with the columns {table.schema.names}, not {schema.names}")
    if any(column.null_count for column in table.columns):
        raise ValueError("a Parquet file with empty fields")
    return table
