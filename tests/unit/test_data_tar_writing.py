"""Tars byte for byte as webdataset's TarWriter writes them, by which data sets keep their identity."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
from webdataset.writer import TarWriter

from pipelines import tar_writing
from pipelines.shards import Sample, pack, parse_index
from pipelines.tar_writing import tar_of

NAMES = {
    "plain": lambda draw: f"{draw.randrange(10**9):09d}",
    "folders": lambda draw: "/".join(draw.choice("abc") * draw.randrange(1, 30) for _ in range(3)),
    "not ASCII": lambda draw: "größe/" + draw.choice("ÄÖ€") * draw.randrange(1, 9),
    "as long as it may be": lambda draw: "x" * 96,
    "longer": lambda draw: "d" * draw.randrange(97, 200),
}


def by_webdataset(samples: list[Sample]) -> bytes:
    file = io.BytesIO()
    with TarWriter(file, encoder=False, mtime=0) as writer:
        for sample in samples:
            members = {
                **sample.members,
                "jpg" if sample.image.startswith(b"\xff\xd8\xff") else "png": sample.image,
            }
            if sample.label >= 0:
                members["cls"] = str(sample.label).encode()
            writer.write({"__key__": sample.key, **members})
    return file.getvalue()


def some(kind: str, count: int, seed: int) -> list[Sample]:
    draw = random.Random(seed)
    images = [b"\xff\xd8\xff" + draw.randbytes(size) for size in (0, 508, 509, 510, 2000)]
    images += [draw.randbytes(size) for size in (511, 512, 513, 70_000)]
    further: tuple[dict[str, bytes], ...] = ({}, {}, {"txt": b"words"}, {"a.json": b"", "zz": b"z" * 600})
    return [
        Sample(
            f"{NAMES[kind](draw)}{number}",
            draw.choice(images),
            draw.choice((-1, 0, 7, 12345)),
            draw.choice(further),
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("count", [0, 1, 2, 60])
@pytest.mark.parametrize("kind", NAMES)
def test_a_shard_is_the_tar_that_webdataset_writes(kind: str, count: int) -> None:
    samples = some(kind, count, seed=count)
    packed = pack(iter(samples))
    assert packed.tar == by_webdataset(samples)
    index = parse_index(packed.index)
    assert index.key.to_pylist() == [sample.key for sample in samples]
    for sample, offset, length in zip(samples, index.offset.tolist(), index.length.tolist(), strict=True):
        assert packed.tar[offset : offset + length] == sample.image
    assert (packed.count, packed.tar_sha256) == (count, index.tar_sha256)


def test_one_odd_name_among_plain_ones_changes_no_other() -> None:
    samples = [*some("plain", 20, 0), *some("longer", 1, 1), *some("not ASCII", 1, 2), *some("plain", 3, 3)]
    assert pack(samples).tar == by_webdataset(samples)


def test_a_size_that_needs_an_extended_header_gets_one() -> None:
    small, huge = (
        b"".join(tar_writing._headers(["a.png"], np.array([size], dtype=np.int64)))
        for size in (8**11 - 1, 8**11)
    )
    assert len(small) == 512
    assert len(huge) == 3 * 512
    assert b"size=8589934592\n" in huge
    assert tar_of([], [])[0] == bytes(10240)
