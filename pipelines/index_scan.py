"""Reading one tar for `--index-only`, and keeping what was found until the data set is whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines.errors import UserError, printable
from pipelines.images import stored_shape
from pipelines.prepare_shards import MAX_NAMED, Bad, OtherShape
from pipelines.preprocess import check_plain
from pipelines.shards import crc32c, read_parquet, sha256, to_parquet
from pipelines.source_find import read_object
from pipelines.source_tar import list_tar
from pipelines.storage import Storage

SCANS = "scans/"
_COLUMNS = {"key": pa.string(), "offset": pa.int64(), "length": pa.int64(), "crc32c": pa.uint32()}
_SCHEMA = pa.schema([*_COLUMNS.items(), ("labelled", pa.bool_()), ("label", pa.string())])
_META = b"ddpm.scan"
_VERSION = 1
_ADVICE = "prepare without --index-only"


@dataclass(frozen=True)
class Scanned:
    """What is known of one tar once it has been read. `labels`: as they are written, None for none. `bad`: the
    images that can't be taken, `MAX_NAMED` at most.
    """

    key: str
    num_bytes: int
    sha256: str
    columns: Mapping[str, list[str | int]]
    labels: tuple[str | None, ...]
    shape: tuple[int, int, int] | None
    passed_over: tuple[str, ...]
    bad: tuple[Bad, ...] = ()


def scan_tar(storage: Storage, task: tuple[str, int], *, image: str | None, label: str | None) -> Scanned:
    """Read one tar, whole: where its images lie, their checksums and labels, and their shape, which is one."""
    key, num_bytes = task
    where = printable(f"{storage.uri}/{key}")
    data = read_object(storage, key, where)
    if len(data) != num_bytes:
        raise UserError(f"source: {where}: had {num_bytes} bytes when it was listed, and now has {len(data)}")
    listed = list_tar(_InMemory(storage.uri, data), key, num_bytes, image, label)
    columns: dict[str, list[str | int]] = {name: [] for name in ("key", "offset", "length", "crc32c")}
    first: tuple[int, int, int] | None = None
    bad: list[Bad] = []
    for sample, extension in zip(listed.samples, listed.images, strict=True):
        offset, size = next((at, size) for name, at, size in sample.members if name == extension)
        body = data[offset : offset + size]
        name = f"source: {where}/{printable(sample.key)}"
        wrong: str | OtherShape | None = None
        try:
            check_plain(body)
            shape = stored_shape(body)
            if first is not None and shape != first:
                wrong = OtherShape(f"of shape {list(shape)}", f"of shape {list(first)}", _ADVICE)
            sample.key.encode()
        except ValueError as error:
            reason = "its key is no UTF-8 text" if isinstance(error, UnicodeEncodeError) else error
            wrong = f"{reason}: {_ADVICE}"
        if wrong is not None:
            bad.append(Bad(name, wrong))
            if len(bad) == MAX_NAMED:
                break
            continue
        first = shape
        row: tuple[str | int, ...] = (sample.key, offset, size, crc32c(body))
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
    return Scanned(
        key, num_bytes, sha256(data), columns, listed.labels, first, listed.passed_over, tuple(bad)
    )


@dataclass(frozen=True)
class _InMemory:
    """As much of a storage as listing one tar takes, over bytes that are here already."""

    uri: str
    data: bytes

    def get_range(self, key: str, start: int, length: int) -> bytes:
        return self.data[start : start + length]


@dataclass(frozen=True)
class Scans:
    """Scans as objects of a data set that is not whole yet: whoever comes after a kill reads no tar a second time.

    One is taken for its tar if name, size and version (`pipelines.storage.ObjectInfo.version`) are the same, and
    the members that were looked for.
    """

    storage: Storage
    image: str | None
    label: str | None

    def key_of(self, key: str) -> str:
        """The key of the object that holds the scan of this tar."""
        name = json.dumps([key, self.image, self.label])
        return f"{SCANS}{hashlib.blake2b(name.encode(), digest_size=16).hexdigest()}.parquet"

    def put(self, scanned: Scanned, version: str) -> None:
        columns: dict[str, Any] = {
            **scanned.columns,
            "labelled": [label is not None for label in scanned.labels],
            "label": [label or "" for label in scanned.labels],
        }
        meta = {
            "version": _VERSION,
            "tar_version": version,
            "num_bytes": scanned.num_bytes,
            "sha256": scanned.sha256,
            "shape": scanned.shape,
            "passed_over": [printable(name) for name in scanned.passed_over],
        }
        schema = _SCHEMA.with_metadata({_META: json.dumps(meta)})
        self.storage.put(self.key_of(scanned.key), to_parquet(pa.table(columns, schema=schema)))

    def get(self, key: str, num_bytes: int, version: str) -> Scanned | None:
        """What is kept of this tar, or None where it has to be read (again)."""
        try:
            table = read_parquet(self.storage.get(self.key_of(key)), _SCHEMA)
            meta = json.loads((table.schema.metadata or {})[_META])
            same = (meta["version"], meta["num_bytes"], meta["tar_version"]) == (_VERSION, num_bytes, version)
        except (KeyError, TypeError, ValueError):
            return None
        if not same or not version:
            return None
        labelled, labels = table["labelled"].to_pylist(), table["label"].to_pylist()
        return Scanned(
            key,
            num_bytes,
            meta["sha256"],
            {name: table[name].to_pylist() for name in _COLUMNS},
            tuple(label if there else None for there, label in zip(labelled, labels, strict=True)),
            tuple(meta["shape"]) if meta["shape"] else None,
            tuple(meta["passed_over"]),
        )
