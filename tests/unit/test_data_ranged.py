"""Shards read by ranges: the same samples in the same order, each checked, in bounded memory, with few requests."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import retries, shard_reader, stored_order
from pipelines.dataset import DataError, Dataset
from pipelines.images import encode_png
from pipelines.ranged import spans
from pipelines.reader import MicroBatch, StreamBatches
from pipelines.retries import Budget
from pipelines.shard_reader import ShardReader
from pipelines.shards import Sample, pack
from pipelines.storage import ObjectMissing, ObjectTooShort, StorageError
from pipelines.stored_order import read_split
from tests.support.data import WatchedStorage, dataset_of, put_dataset, random_images
from tests.support.held import Held
from tests.support.s3 import BUCKET, HostileS3, S3Server, use_server

TAR = "train/shard-000000.tar"


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "BUDGET", Budget(tries=4, first_pause_s=0.001))
    monkeypatch.setattr(shard_reader, "_without_ranges", set())


def watched(dataset: Dataset, **options: Any) -> tuple[Dataset, WatchedStorage]:
    storage = WatchedStorage(dataset.storage, **options)
    return dataclasses.replace(dataset, storage=storage), storage


def batches(dataset: Dataset, steps: int, cache_bytes: int, **options: Any) -> list[list[MicroBatch]]:
    given: dict[str, Any] = {
        "seed": 5,
        "num_streams": 4,
        "streams": range(4),
        "micro_batch_size": 3,
    } | options
    with StreamBatches(dataset, "train", cache_bytes=cache_bytes, **given) as stream:
        return [next(stream) for _ in range(steps)]


def same(one: list[list[MicroBatch]], two: list[list[MicroBatch]]) -> bool:
    return all(
        torch.equal(torch.as_tensor(getattr(a, field.name)), torch.as_tensor(getattr(b, field.name)))
        for parts, others in zip(one, two, strict=True)
        for a, b in zip(parts, others, strict=True)
        for field in dataclasses.fields(MicroBatch)
    )


# ---- which requests


@given(
    pieces=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 40)), min_size=1, max_size=20),
    gap=st.integers(0, 20),
    most=st.integers(1, 100),
)
def test_requests_cover_the_samples_and_no_two_could_be_one(
    pieces: list[tuple[int, int]], gap: int, most: int
) -> None:
    offset, length, end = [], [], 0
    for skipped, size in pieces:
        offset.append(end + skipped)
        length.append(size)
        end += skipped + size
    found = spans(np.array(offset), np.array(length), gap, most)
    assert [number for span in found for number in range(span.first, span.last)] == list(range(len(pieces)))
    for span in found:
        assert span.start == offset[span.first]
        assert span.stop == offset[span.last - 1] + length[span.last - 1]
        assert span.stop - span.start <= most or span.last - span.first == 1
        for a, b in zip(range(span.first, span.last), range(span.first + 1, span.last), strict=False):
            assert offset[b] - offset[a] - length[a] <= gap
    for one, two in itertools.pairwise(found):
        # the next sample alone would not have fitted either
        first = two.first
        joined = offset[first] + length[first] - one.start
        assert two.start - one.stop > gap or joined > most


def test_samples_that_overlap_share_a_request() -> None:
    (span,) = spans(np.array([0, 0, 5]), np.array([10, 10, 2]))
    assert (span.start, span.stop, span.first, span.last) == (0, 10, 0, 3)


# ---- the same samples


@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(lambda counts: sum(counts) > 0),
    num_streams=st.integers(1, 5),
    size=st.integers(1, 7),
    start=st.integers(0, 50),
    seed=st.integers(0, 2**31),
    at_most=st.integers(0, 20_000),
    members=st.booleans(),
    threads=st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_streams_by_ranges_are_the_streams_of_whole_shards(
    counts: list[int],
    num_streams: int,
    size: int,
    start: int,
    seed: int,
    at_most: int,
    members: bool,
    threads: int,
) -> None:
    """`at_most`: shards above are read by ranges, so that often some are and some are not."""
    shards, images = [], random_images(sum(counts), (3, 6, 5), seed)
    for shard, count in enumerate(counts):
        rows = [sum(counts[:shard]) + row for row in range(count)]
        further = {"txt": b"x" * 5000} if members else {}
        shards.append(pack(Sample(f"{row}", encode_png(images[row]), row % 10, further) for row in rows))
    options = {
        "seed": seed,
        "num_streams": num_streams,
        "streams": range(num_streams),
        "micro_batch_size": size,
        "start_step": start,
        "flip": True,
        "decode_threads": threads,
    }
    with tempfile.TemporaryDirectory() as folder:
        dataset = put_dataset(folder, {"train": shards}, (3, 6, 5))
        by_ranges, storage = watched(dataset)
        expected = batches(dataset, 4, 2**28, **options)
        assert same(batches(by_ranges, 4, at_most, **options), expected)
    large = {shard.key for shard in dataset.shards("train") if shard.num_bytes > at_most}
    assert not large & set(storage.gets)
    assert {key for key, _, _ in storage.ranges} <= large


@pytest.mark.parametrize(("start", "stop"), [(0, 3), (7, 9), (9, 12), (0, 17), (10, None), (5, 5)])
def test_a_part_of_a_split_is_the_same_either_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: int, stop: int | None
) -> None:
    dataset, images = dataset_of(tmp_path, [10, 7], (3, 6, 5))
    whole = list(read_split(dataset, "train", start, stop))
    for ranged_bytes, share, everything in ((0, 1.0, 2**40), (2**40, 0.25, 0)):
        monkeypatch.setattr(stored_order, "_RANGED_BYTES", ranged_bytes)
        monkeypatch.setattr(stored_order, "_RANGED_SHARE", share)
        monkeypatch.setattr(stored_order, "_RANGED_ROWS", 3)
        monkeypatch.setattr(stored_order, "DEFAULT_CACHE_BYTES", everything)
        by_ranges, storage = watched(dataset)
        read = list(read_split(by_ranges, "train", start, stop))
        assert [(key, label) for key, _, label in read] == [(key, label) for key, _, label in whole]
        assert all(np.array_equal(a, b) for (_, a, _), (_, b, _) in zip(read, whole, strict=True))
        assert np.array_equal(
            np.array([image for _, image, _ in read]).reshape(-1, 3, 6, 5), images[start:stop]
        )
        assert not [key for key in storage.gets if key.endswith(".tar")]


def test_a_few_samples_of_a_large_shard_cost_a_few_bytes(tmp_path: Path) -> None:
    dataset, _ = dataset_of(tmp_path, [400], (3, 32, 32))  # 1.6 MB
    (shard,) = dataset.shards("train")
    by_ranges, storage = watched(dataset)
    assert len(list(read_split(by_ranges, "train", 100, 110))) == 10
    ((_, _, length),) = storage.ranges
    assert length < shard.num_bytes / 30
    # most of it is asked for whole, and so is a shard that is small
    assert len(list(read_split(by_ranges, "train", 100, 210))) == 110
    assert storage.gets[TAR] == 1
    small, storage = watched(dataset_of(tmp_path / "small", [100], (3, 32, 32))[0])
    assert len(list(read_split(small, "train", 10, 11))) == 1
    assert (storage.gets[TAR], storage.ranges) == (1, [])


def test_requests_run_side_by_side(tmp_path: Path) -> None:
    dataset, images = dataset_of(tmp_path, [400], (3, 32, 32))
    together = threading.Barrier(3)

    def got(key: str, data: bytes, *_: int) -> bytes:
        together.wait(10)
        return data

    by_ranges, storage = watched(dataset, on_range=got)
    reader = ShardReader(by_ranges, "train", ranged_above=0)
    # far from each other
    assert np.array_equal(reader.read(0, [0, 200, 399])[0], images[[0, 200, 399]])
    assert len(storage.ranges) == 3


def test_a_sample_that_is_drawn_twice_is_fetched_once(tmp_path: Path) -> None:
    dataset, images = dataset_of(tmp_path, [9])
    by_ranges, storage = watched(dataset)
    reader = ShardReader(by_ranges, "train", ranged_above=0)
    got, labels = reader.read(0, [7, 2, 7, 7])
    assert np.array_equal(got, images[[7, 2, 7, 7]])
    assert labels.tolist() == [7, 2, 7, 7]
    assert len(storage.ranges) == 1


# ---- memory


def test_of_a_huge_shard_no_more_is_held_than_a_step_wants(tmp_path: Path) -> None:
    held = Held()
    dataset, _ = dataset_of(tmp_path, [2000], (3, 32, 32))
    (shard,) = dataset.shards("train")
    by_ranges, storage = watched(
        dataset,
        on_get=lambda key, data, time: held.out(data),
        on_range=lambda key, data, time: held.out(data),
    )
    assert shard.num_bytes > 7 * 2**20
    options = {"num_streams": 2, "streams": range(2), "micro_batch_size": 4}
    batches(by_ranges, 40, 2**20, **options)
    assert TAR not in storage.gets
    assert len(storage.ranges) > 80
    # at the most one micro-batch's four requests at once
    largest = 4 * max(length for _, _, length in storage.ranges)
    index = (tmp_path / shard.index_key).stat().st_size
    assert 0 < held.peak <= largest + index
    assert held.peak < shard.num_bytes / 4
    reader = ShardReader(by_ranges, "train", 2**20)
    reader.read(0, [1, 1000])
    assert reader.cached_bytes < 64 * shard.count


# ---- damage


def flip(data: bytes) -> bytes:
    return data[:9] + bytes([data[9] ^ 1]) + data[10:]


@pytest.mark.parametrize("damage", [flip, lambda data: data[:-1], lambda data: b"", lambda data: data + b"x"])
def test_what_arrives_wrong_is_fetched_again(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    dataset, images = dataset_of(tmp_path, [9])
    by_ranges, storage = watched(dataset, on_range=lambda key, data, time: damage(data) if time < 4 else data)
    got, _ = ShardReader(by_ranges, "train", ranged_above=0).read(0, [3])
    assert np.array_equal(got[0], images[3])
    assert len(storage.ranges) == 4


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip, "its bytes do not have the CRC32C that the index gives"),
        (lambda data: data[:-1], r"\d+ of \d+ bytes came"),
    ],
)
def test_what_stays_wrong_is_named_with_shard_and_sample(
    tmp_path: Path, damage: Callable[[bytes], bytes], reason: str, skip: bool
) -> None:
    """A damaged shard is no bad sample: read whole, it would be refused as well."""
    dataset, _ = dataset_of(tmp_path, [9])
    by_ranges, storage = watched(dataset, on_range=lambda key, data, time: damage(data))
    line = rf"{TAR}: sample 'sample-00000\d': {reason} \(tried 4 times in \d+ s\); `ddpm verify file://\S+`"
    with pytest.raises(DataError, match=line) as error:
        batches(by_ranges, 1, 0, skip_bad=skip)
    assert "\n" not in str(error.value)
    assert max(storage.ranges.count(one) for one in storage.ranges) == 4


def test_a_bad_image_that_is_whole_is_the_same_bad_sample(tmp_path: Path) -> None:
    images = random_images(6)
    files = [encode_png(image)[: -30 if row == 2 else None] for row, image in enumerate(images)]
    shard = pack(Sample(f"s-{row}", data, row) for row, data in enumerate(files))
    dataset = put_dataset(tmp_path, {"train": [shard]}, (1, 8, 8))
    whole = batches(dataset, 5, 2**28, skip_bad=True)
    assert same(batches(dataset, 5, 0, skip_bad=True), whole)
    assert any(not part.weight.all() for parts in whole for part in parts)
    with pytest.raises(DataError, match=rf"{TAR}: sample 's-2': a broken PNG"):
        batches(dataset, 5, 0)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ObjectMissing("x"), rf"{TAR}: is missing from its data set; `ddpm verify"),
        (ObjectTooShort("3 of 9 bytes"), rf"{TAR}: sample 'sample-00000\d': 3 of 9 bytes \(tried 4 times"),
        (StorageError("s3://b: denied"), "^s3://b: denied$"),
    ],
)
def test_what_the_storage_says_is_passed_on(tmp_path: Path, error: Exception, line: str) -> None:
    def refuse(key: str, data: bytes, time: int) -> bytes:
        raise error

    by_ranges, _ = watched(dataset_of(tmp_path, [9])[0], on_range=refuse)
    with pytest.raises(StorageError if line.startswith("^") else DataError, match=line):
        batches(by_ranges, 1, 0)


def test_a_shard_that_was_cut_short_on_disk_is_named(tmp_path: Path) -> None:
    dataset, _ = dataset_of(tmp_path, [9])
    (tmp_path / TAR).write_bytes((tmp_path / TAR).read_bytes()[:3000])
    with pytest.raises(
        DataError, match=rf"{TAR}: sample 'sample-00000\d': .*the object is too short \(tried 4 times"
    ):
        batches(dataset, 3, 0)


# ---- servers


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_a_server_that_gives_no_ranges_gives_whole_shards(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dataset, _ = dataset_of(tmp_path, [5, 9, 6])
    expected = batches(dataset, 6, 2**28)
    server = HostileS3()
    for path in tmp_path.rglob("*"):
        if path.is_file():
            server.objects[f"/bucket/p/{path.relative_to(tmp_path).as_posix()}"] = path.read_bytes()
    with server.running() as address, caplog.at_level(logging.WARNING):
        for name, value in (
            ("AWS_ENDPOINT_URL", address),
            ("AWS_ACCESS_KEY_ID", "x"),
            ("AWS_SECRET_ACCESS_KEY", "x"),
        ):
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        there = Dataset.load(f"{address}/bucket/p" if kind == "http" else "s3://bucket/p")
        assert same(batches(there, 6, 0), expected)
        monkeypatch.setattr(stored_order, "_RANGED_BYTES", 0)
        asked = len(server.requests)
        assert len(list(read_split(there, "train", 5, 7))) == 2
        # index and tar: that it gives no ranges is known
        assert len(server.requests) == asked + 2
        assert caplog.text.count("it ignores Range); shards are fetched whole") == 1
        caplog.clear()
        shard_reader._without_ranges.clear()
        server.ranges = True
        assert same(batches(there, 6, 0), expected)
        assert caplog.text == ""


def test_from_s3_by_ranges(moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    use_server(monkeypatch, moto)
    dataset, images = dataset_of(f"s3://{BUCKET}/ranged", [5, 300], (3, 16, 16))
    by_ranges, storage = watched(dataset)
    assert same(batches(by_ranges, 6, 0), batches(dataset, 6, 2**28))
    assert not [key for key in storage.gets if key.endswith(".tar")]
    reader = ShardReader(by_ranges, "train", ranged_above=0)
    rows = np.random.default_rng(0).permutation(300)
    assert np.array_equal(reader.read(1, rows)[0], images[5 + rows])
