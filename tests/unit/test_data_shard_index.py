"""A shard's index that is not what it must be: refused with a reason, whatever stands in it."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.dataset import DataError
from pipelines.shard_reader import ShardReader
from pipelines.shards import INDEX_ENCODINGS, PackedShard, index_of, parse_index, to_parquet
from tests.support.data import packed, put_dataset, random_images

DIGEST, SIZE, VERSION = b"ddpm.tar_sha256", b"ddpm.tar_num_bytes", b"ddpm.index_version"


@pytest.fixture
def shard() -> PackedShard:
    return packed(random_images(4))


def changed(index: bytes, metadata: dict[bytes, bytes | None], **columns: pa.Array) -> bytes:
    """The index with other metadata (None: without it) and other columns."""
    table = pq.read_table(io.BytesIO(index))
    for name, column in columns.items():
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), column)
    new = {**table.schema.metadata, **metadata}
    return to_parquet(
        table.replace_schema_metadata({key: value for key, value in new.items() if value is not None})
    )


@pytest.mark.parametrize(
    "metadata",
    [
        {DIGEST: None},
        {SIZE: None},
        {DIGEST: b"\xff" * 64},
        {DIGEST: b"abc"},
        {SIZE: b"many"},
        {SIZE: b"-1"},
        {SIZE: b"9" * 5000},
        {VERSION: None},
        {VERSION: b"\xff"},
    ],
)
def test_what_it_must_say_of_itself(
    shard: PackedShard, metadata: dict[bytes, bytes | None], tmp_path: Path
) -> None:
    index = changed(shard.index, metadata)
    with pytest.raises(ValueError, match=r"a shard index (that does not say of which tar|of version)"):
        parse_index(index)
    wrong = replace(shard, index=index)
    dataset = put_dataset(tmp_path, {"train": [wrong], "test": [shard]}, (1, 8, 8))
    with pytest.raises(DataError, match=r"train/shard-000000\.index\.parquet: a shard index"):
        ShardReader(dataset, "train").read(0, [0])


@pytest.mark.parametrize(
    ("offset", "length"),
    [(-1, 5), (512, -1), (512, 10**6), (2**62, 2**62), (2**63 - 1, 2**63 - 1), (-(2**63), 2**63 - 1)],
)
def test_images_outside_the_tar(shard: PackedShard, offset: int, length: int) -> None:
    found = parse_index(shard.index)
    offsets, lengths = found.offset.tolist(), found.length.tolist()
    offsets[2], lengths[2] = offset, length
    index = changed(shard.index, {}, offset=pa.array(offsets), length=pa.array(lengths))
    with pytest.raises(ValueError, match="points outside its tar"):
        parse_index(index)


def test_keys_that_are_no_text(shard: PackedShard) -> None:
    keys = pa.Array.from_buffers(
        pa.string(), 4, [*pa.array(["a", "b", "c", "d"]).buffers()[:2], pa.py_buffer(b"ab\xffd")]
    )
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        parse_index(changed(shard.index, {}, key=keys))


def test_an_index_of_nothing() -> None:
    empty = packed(random_images(0))
    assert parse_index(empty.index).count == 0


@pytest.mark.parametrize(
    "key",
    [
        lambda number: f"{number:09d}",
        lambda number: f"n{number // 50:08d}/n{number // 50:08d}_{number * 7919 % 30_000}",
        lambda number: hashlib.sha256(b"%d" % number).hexdigest(),
        lambda number: f"{number * 7919 % 1000}/{'a long middle that all of them share' * 3}/{number}",
    ],
)
def test_no_keys_make_it_larger_than_it_was(key: Callable[[int], str]) -> None:
    draw = np.random.default_rng(0)
    columns: dict[str, Any] = {
        "key": [key(number) for number in range(4096)],
        "offset": np.cumsum(draw.integers(1000, 3000, 4096)),
        "length": draw.integers(900, 2000, 4096),
        "label": np.arange(4096),
        "crc32c": draw.integers(0, 2**32, 4096),
    }
    new, before = (len(index_of(columns, "a" * 64, 2**50, encoding)) for encoding in INDEX_ENCODINGS)
    assert new < 1.1 * before


def test_its_numbers_are_not_compressed(shard: PackedShard) -> None:
    columns = pq.ParquetFile(io.BytesIO(shard.index)).metadata.row_group(0)
    found = {columns.column(at).path_in_schema: columns.column(at).compression for at in range(5)}
    assert found == {"key": "ZSTD"} | dict.fromkeys(("offset", "length", "label", "crc32c"), "UNCOMPRESSED")


def test_any_row_comes_back_and_a_usual_one_takes_few_bytes() -> None:
    draw = np.random.default_rng(0)
    usual: dict[str, Any] = {
        "key": [f"{number:09d}" for number in range(4096)],
        "offset": np.cumsum(draw.integers(1000, 3000, 4096)),
        "length": draw.integers(900, 2000, 4096),
        "label": draw.integers(0, 10, 4096),
        "crc32c": draw.integers(0, 2**32, 4096),
    }
    odd: dict[str, Any] = {
        "key": ["", "größe", "x" * 70_000, "größe", "\0"],
        "offset": [2**59, 0, 7, 2**58, 0],
        "length": [0, 2**57, 1, 0, 0],
        "label": [-(2**63), 2**63 - 1, -1, 0, 0],
        "crc32c": [0, 2**32 - 1, 1, 0, 0],
    }
    for columns in (usual, odd):
        data = index_of(columns, "a" * 64, 2**59)
        index = parse_index(data)
        assert index.key.to_pylist() == list(columns["key"])
        for name in ("offset", "length", "label", "crc32c"):
            assert getattr(index, name).tolist() == list(columns[name])
        if columns is usual:
            assert len(data) < 11 * 4096  # of which 4 are the checksum, that nothing can make smaller
