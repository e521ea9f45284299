"""Reading one tar for `--index-only`, and keeping what was found until the data set is whole."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines.columns import Coded, Integers, Passed, Texts, TextsBuilder, narrow
from pipelines.errors import UserError, printable
from pipelines.images import stored_shape
from pipelines.prepare_shards import MAX_NAMED, Bad, OtherShape
from pipelines.preprocess import check_plain
from pipelines.shards import crc32c, read_parquet, sha256, to_parquet
from pipelines.source_find import read_object
from pipelines.source_tar import list_tar
from pipelines.storage import Storage

SCANS = "scans/"
_NUMBERS = {"offset": pa.int64(), "length": pa.int64(), "crc32c": pa.uint32()}
_SCHEMA = pa.schema(
    [("key", pa.string()), *_NUMBERS.items(), ("labelled", pa.bool_()), ("label", pa.string())]
)
_META = b"ddpm.scan"
_VERSION = 2
_ADVICE = "prepare without --index-only"


@dataclass(frozen=True, eq=False)
class Scanned:
    """What is known of one tar once it has been read. `columns`: offset, length and crc32c of the images. `labels`:
    as they are written, None for none. `bad`: the images that can't be taken, `MAX_NAMED` at most.
    """

    key: str
    num_bytes: int
    sha256: str
    keys: Texts
    columns: Mapping[str, Integers]
    labels: Coded[str | None]
    shape: tuple[int, int, int] | None
    passed_over: Passed
    bad: tuple[Bad, ...] = ()


def scan_tar(storage: Storage, task: tuple[str, int], *, image: str | None, label: str | None) -> Scanned:
    """Read one tar, whole: where its images lie, their checksums and labels, and their shape, which is one."""
    key, num_bytes = task
    where = printable(f"{storage.uri}/{key}")
    data = read_object(storage, key, where)
    if len(data) != num_bytes:
        raise UserError(f"source: {where}: had {num_bytes} bytes when it was listed, and now has {len(data)}")
    listed = list_tar(_InMemory(storage.uri, data), key, num_bytes, image, label)
    keys, columns = TextsBuilder(), {name: array("Q") for name in _NUMBERS}
    first: tuple[int, int, int] | None = None
    bad: list[Bad] = []
    for row, (key_in_tar, extension) in enumerate(zip(listed.names, listed.images, strict=True)):
        offset, size = next((at, size) for name, at, size in listed.members(row) if name == extension)
        body = data[offset : offset + size]
        name = f"source: {where}/{printable(key_in_tar)}"
        wrong: str | OtherShape | None = None
        try:
            check_plain(body)
            shape = stored_shape(body)
            if first is not None and shape != first:
                wrong = OtherShape(f"of shape {list(shape)}", f"of shape {list(first)}", _ADVICE)
            key_in_tar.encode()
        except ValueError as error:
            reason = "its key is no UTF-8 text" if isinstance(error, UnicodeEncodeError) else error
            wrong = f"{reason}: {_ADVICE}, or take it out of its tar if it is damaged"
        if wrong is not None:
            bad.append(Bad(name, wrong))
            if len(bad) == MAX_NAMED:
                break
            continue
        first = shape
        keys.append(key_in_tar)
        for column, value in zip(columns.values(), (offset, size, crc32c(body)), strict=True):
            column.append(value)
    return Scanned(
        key,
        num_bytes,
        sha256(data),
        keys.build(),
        {name: narrow(column) for name, column in columns.items()},
        listed.labels,
        first,
        listed.passed_over,
        tuple(bad),
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
            "key": list(scanned.keys),
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
            "passed_over": [scanned.passed_over.count, printable(scanned.passed_over.first)],
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
            Texts.of(table["key"].to_pylist()),
            {name: narrow(table[name].to_numpy()) for name in _NUMBERS},
            Coded.of(label if there else None for there, label in zip(labelled, labels, strict=True)),
            tuple(meta["shape"]) if meta["shape"] else None,
            Passed(*meta["passed_over"]),
        )
