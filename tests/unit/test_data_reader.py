"""Reading shards and streams: nothing altered is accepted, every batch has its place, memory stays flat."""

from __future__ import annotations

import dataclasses
import gc
import io
import itertools
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from ddpm_core import rng
from pipelines import reader, shard_reader
from pipelines.buffers import Buffers
from pipelines.cache import WeightedLRU
from pipelines.dataset import DataError, Dataset
from pipelines.decode import decode_many
from pipelines.images import encode_png, to_model
from pipelines.order import Order
from pipelines.reader import MicroBatch, ShardReader, StreamBatches, fetch_verified
from pipelines.shards import PackedShard, Sample, pack, parse_index
from pipelines.stages import LoadedStage
from pipelines.storage import Memory, ObjectMissing, Storage, StorageError, new_memory
from pipelines.stored_order import read_split
from tests.support.data import WatchedStorage, dataset_of, image_bytes, packed, put_dataset, random_images
from tests.support.held import Held


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    gc.collect()
    for thread in [thread for thread in threading.enumerate() if thread.name == "ddpm-reader"]:
        thread.join(5)
        assert not thread.is_alive()


def watched(dataset: Dataset, on_get: Callable[[str, bytes, int], bytes] | None = None) -> WatchedStorage:
    return WatchedStorage(dataset.storage, on_get=on_get)


def through(dataset: Dataset, storage: WatchedStorage) -> Dataset:
    return dataclasses.replace(dataset, storage=storage)


def batches(dataset: Dataset, steps: int, **options: object) -> list[list[MicroBatch]]:
    settings = {"seed": 5, "num_streams": 4, "streams": range(4), "micro_batch_size": 3} | options
    with StreamBatches(dataset, "train", **settings) as stream:  # type: ignore[arg-type]
        return [next(stream) for _ in range(steps)]


def same(one: MicroBatch, two: MicroBatch) -> bool:
    return all(
        torch.equal(torch.as_tensor(getattr(one, field.name)), torch.as_tensor(getattr(two, field.name)))
        for field in dataclasses.fields(MicroBatch)
    )


# ---- whole reads


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7)])
def test_read_split_gives_every_sample_in_stored_order(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    dataset, images = dataset_of(tmp_path, [4, 0, 1, 5], shape)
    read = list(read_split(dataset, "train"))
    assert [key for key, _, _ in read] == [f"sample-{number:06d}" for number in range(10)]
    assert np.array_equal(np.stack([image for _, image, _ in read]), images)
    assert [label for _, _, label in read] == [number % 10 for number in [*range(4), 0, *range(5)]]


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (3, 6), (4, 5), (9, None), (0, 99), (10, None)])
def test_read_split_of_a_part_fetches_only_its_shards(tmp_path: Path, start: int, stop: int | None) -> None:
    dataset, images = dataset_of(tmp_path, [4, 0, 1, 5])
    storage = watched(dataset)
    read = [image for _, image, _ in read_split(through(dataset, storage), "train", start, stop)]
    assert np.array_equal(np.array(read).reshape(-1, 1, 8, 8), images[start:stop])
    owner = np.repeat([0, 2, 3], [4, 1, 5])[start:stop]
    assert {key for key in storage.gets if key.endswith(".tar")} == {
        f"train/shard-{number:06d}.tar" for number in owner
    }


def test_a_reader_takes_rows_in_any_order_and_keeps_what_fits(tmp_path: Path) -> None:
    dataset, images = dataset_of(tmp_path, [6, 6, 6])
    storage = watched(dataset)
    roomy = ShardReader(through(dataset, storage), "train")
    got, labels = roomy.read(1, [5, 0, 0, 3])
    assert np.array_equal(got, images[[11, 6, 6, 9]])
    assert labels.tolist() == [5, 0, 0, 3]
    roomy.read(0, [1])
    roomy.read(1, [1])
    assert storage.gets["train/shard-000001.tar"] == 1

    tight = ShardReader(through(dataset, storage := watched(dataset)), "train", 1, ranged_above=2**40)
    for shard in (0, 1, 1, 0):
        assert np.array_equal(tight.read(shard, [2])[0][0], images[6 * shard + 2])
    assert storage.gets["train/shard-000000.tar"] == 2
    assert storage.gets["train/shard-000001.tar"] == 1


def test_the_cache_is_bounded_in_bytes_and_items_and_drops_what_was_used_longest_ago() -> None:
    cache: WeightedLRU[str, int] = WeightedLRU(10, max_items=3)
    for key, weight in (("a", 4), ("b", 4), ("a", 4), ("c", 4)):
        cache.get(key, lambda weight=weight: weight, lambda value: value)  # type: ignore[misc]
    assert (len(cache), cache.num_bytes) == (2, 8)
    made: list[str] = []
    for key in ("a", "b"):
        cache.get(key, lambda key=key: made.append(key) or 1, lambda value: value)  # type: ignore[misc, func-returns-value]
    assert made == ["b"]
    cache.get("huge", lambda: 100, lambda value: value)
    assert (len(cache), cache.num_bytes) == (1, 100)
    for key in "vwxyz":
        cache.get(key, lambda: 0, lambda value: value)
    assert len(cache) == 3


# ---- damage


def truncate(data: bytes) -> bytes:
    return data[:-1024]


def flip(data: bytes) -> bytes:
    return data[:600] + bytes([data[600] ^ 1]) + data[601:]


@pytest.mark.parametrize(
    "damage", [truncate, flip, lambda data: b"", lambda data: data + b"\0" * 512, lambda data: data[:512]]
)
@pytest.mark.parametrize("suffix", ["tar", "index.parquet"])
def test_an_altered_object_is_fetched_three_times_and_then_named(
    tmp_path: Path, damage: Callable[[bytes], bytes], suffix: str
) -> None:
    dataset, _ = dataset_of(tmp_path, [4, 4])
    bad = f"train/shard-000001.{suffix}"
    (tmp_path / bad).write_bytes(damage((tmp_path / bad).read_bytes()))
    storage = watched(dataset)
    advice = f"`ddpm verify {dataset.uri}` names all that is damaged, and what to do"
    told = f"{bad}: is damaged or was exchanged: its {(tmp_path / bad).stat().st_size} bytes .*; {advice}"
    with pytest.raises(DataError, match=told) as error:
        list(read_split(through(dataset, storage), "train"))
    assert "\n" not in str(error.value)
    assert storage.gets[bad] == 3
    # what is whole is still read
    assert len(list(read_split(dataset, "train", 0, 4))) == 4


@pytest.mark.parametrize("suffix", ["tar", "index.parquet"])
def test_a_body_that_arrives_wrong_is_fetched_again(tmp_path: Path, suffix: str) -> None:
    dataset, images = dataset_of(tmp_path, [4, 4])

    def first_two_flipped(key: str, data: bytes, time: int) -> bytes:
        return flip(data) if key.endswith(f"1.{suffix}") and time < 3 else data

    storage = watched(dataset, first_two_flipped)
    read = [image for _, image, _ in read_split(through(dataset, storage), "train")]
    assert np.array_equal(np.stack(read), images)
    assert storage.gets[f"train/shard-000001.{suffix}"] == 3


@pytest.mark.parametrize("suffix", ["tar", "index.parquet"])
def test_a_missing_object_is_named(tmp_path: Path, suffix: str) -> None:
    dataset, _ = dataset_of(tmp_path, [4, 4])
    (tmp_path / f"train/shard-000001.{suffix}").unlink()
    with pytest.raises(
        DataError, match=rf"train/shard-000001.{suffix}: is missing.*; `ddpm verify {dataset.uri}`"
    ):
        list(read_split(dataset, "train"))


def test_swapped_shards_are_named(tmp_path: Path) -> None:
    dataset, _ = dataset_of(tmp_path, [4, 4])
    for suffix in ("tar", "index.parquet"):
        one, two = (tmp_path / f"train/shard-00000{number}.{suffix}" for number in (0, 1))
        first, second = one.read_bytes(), two.read_bytes()
        one.write_bytes(second)
        two.write_bytes(first)
    with pytest.raises(DataError, match=r"train/shard-000000\..* is damaged or was exchanged"):
        list(read_split(dataset, "train"))


def remade(shard: PackedShard, **changes: list[int]) -> PackedShard:
    """The shard with columns of its index replaced, as a faulty writer would leave it."""
    table = pq.read_table(pa.BufferReader(shard.index))
    for name, values in changes.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(
            place, table.schema.field(place), pa.array(values, table.schema.field(place).type)
        )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return dataclasses.replace(shard, index=sink.getvalue().to_pybytes())


def test_a_sample_whose_crc_is_not_the_indexs_is_named(tmp_path: Path) -> None:
    whole = packed(random_images(3))
    crcs = parse_index(whole.index).crc32c.tolist()
    bad = remade(whole, crc32c=[crcs[0], crcs[1] ^ 1, crcs[2]])
    dataset = put_dataset(tmp_path, {"train": [bad]}, (1, 8, 8))
    with pytest.raises(DataError, match=r"shard-000000.tar: sample 'sample-000001': .*CRC32C"):
        list(read_split(dataset, "train"))


@pytest.mark.parametrize("offsets", [[-1, 0, 0], [0, 0, 2**40]])
def test_an_index_that_points_outside_its_tar_is_named(tmp_path: Path, offsets: list[int]) -> None:
    bad = remade(packed(random_images(3)), offset=offsets)
    dataset = put_dataset(tmp_path, {"train": [bad]}, (1, 8, 8))
    with pytest.raises(DataError, match=r"shard-000000.index.parquet: .* outside its tar"):
        list(read_split(dataset, "train"))


def test_the_index_of_another_tar_is_named(tmp_path: Path) -> None:
    one, two = packed(random_images(3)), packed(random_images(3, seed=1))
    mixed = PackedShard(tar=one.tar, index=two.index, count=3, tar_sha256=one.tar_sha256)
    dataset = put_dataset(tmp_path, {"train": [mixed]}, (1, 8, 8))
    with pytest.raises(DataError, match=r"shard-000000.index.parquet: an index of another tar"):
        list(read_split(dataset, "train"))


def test_an_index_of_another_version_is_refused_with_both_named(tmp_path: Path) -> None:
    whole = packed(random_images(3))
    table = pq.read_table(pa.BufferReader(whole.index))
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({b"ddpm.index_version": b"9"}), sink)
    newer = dataclasses.replace(whole, index=sink.getvalue().to_pybytes())
    dataset = put_dataset(tmp_path, {"train": [newer]}, (1, 8, 8))
    with pytest.raises(DataError, match="version 9, and this program reads version 1"):
        list(read_split(dataset, "train"))


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (encode_png(random_images(1, (1, 9, 8))[0]), "shape"),
        (encode_png(random_images(1, (3, 8, 8))[0]), "shape"),
        (image_bytes(Image.new("P", (8, 8))), "colour type 3"),
        (image_bytes(Image.new("L", (8, 9)), "JPEG"), "shape"),
        (image_bytes(Image.new("CMYK", (8, 8)), "JPEG"), "JPEG of mode CMYK"),
        (image_bytes(Image.new("L", (8, 8)), "JPEG")[:-40], "broken JPEG"),
        (image_bytes(Image.new("L", (8, 8)), "BMP"), "no PNG"),
        (image_bytes(Image.new("L", (8, 8)))[:-25], "broken PNG"),
        (b"", "no PNG"),
    ],
)
def test_a_stored_image_that_is_not_what_the_record_says_is_named(
    tmp_path: Path, image: bytes, reason: str
) -> None:
    shard = pack([Sample("good", encode_png(random_images(1)[0])), Sample("größe/bad", image)])
    dataset = put_dataset(tmp_path, {"train": [shard]}, (1, 8, 8))
    line = (
        rf"shard-000000.tar: sample 'größe/bad': .*{reason}.*; `ddpm verify {dataset.uri} --deep` names all"
    )
    with pytest.raises(DataError, match=line):
        list(read_split(dataset, "train"))


# ---- streams


def test_a_micro_batch_is_what_the_order_says(tmp_path: Path) -> None:
    dataset, images = dataset_of(tmp_path, [5, 0, 9, 2])
    order, starts = Order([5, 0, 9, 2], 5, 4), np.array([0, 5, 5, 14])
    for step, parts in enumerate(batches(dataset, 9)):
        assert [part.stream for part in parts] == [0, 1, 2, 3]
        for part in parts:
            assert part.position.tolist() == [3 * step, 3 * step + 1, 3 * step + 2]
            assert part.index.tolist() == [position * 4 + part.stream for position in part.position.tolist()]
            where = order.locate(part.stream, part.position.numpy())
            assert torch.equal(part.x_start, to_model(images[starts[where.shard] + where.sample]))
            assert part.label.tolist() == (where.sample % 10).tolist()
            assert part.x_start.dtype == torch.float32
            assert part.label.dtype == part.index.dtype == torch.int64


def test_two_workers_read_what_one_reads(tmp_path: Path) -> None:
    dataset, _ = dataset_of(tmp_path, [5, 9, 2])
    alone = batches(dataset, 6, flip=True)
    halves = [batches(dataset, 6, flip=True, streams=streams) for streams in ([2, 0], [1, 3])]
    for step in range(6):
        together = {part.stream: part for half in halves for part in half[step]}
        assert sorted(together) == [0, 1, 2, 3]
        assert all(same(part, together[part.stream]) for part in alone[step])


def test_started_anywhere_it_reads_what_it_would_have_read_from_zero(tmp_path: Path) -> None:
    dataset, _ = dataset_of(tmp_path, [5, 9, 2])
    whole = batches(dataset, 12, flip=True)
    for start in (0, 1, 7, 11):
        for parts, expected in zip(
            batches(dataset, 12 - start, start_step=start, flip=True), whole[start:], strict=True
        ):
            assert all(same(one, two) for one, two in zip(parts, expected, strict=True))
    (far,) = batches(dataset, 1, start_step=10**8)
    assert far[0].position.tolist() == [3 * 10**8 + place for place in range(3)]


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7)])
@pytest.mark.parametrize("levels", [256, 17])
def test_however_it_is_handed_over_and_by_however_many_threads_the_batch_is_the_same(
    tmp_path: Path, shape: tuple[int, int, int], levels: int
) -> None:
    dataset, _ = dataset_of(tmp_path, [5, 9, 2], shape)
    dataset = dataclasses.replace(dataset, levels=levels)
    expected = batches(dataset, 6, flip=True)
    assert all(part.x_start.is_contiguous() for parts in expected for part in parts)
    for options in ({"decode_threads": 3}, {"channels_last": True}, {"as_bytes": True}):
        for parts, plain in zip(batches(dataset, 6, flip=True, **options), expected, strict=True):
            for one, two in zip(parts, plain, strict=True):
                if "as_bytes" in options:
                    assert one.x_start.dtype == torch.uint8
                    assert torch.equal(to_model(one.x_start, levels), two.x_start)
                else:
                    assert same(one, two)
                if "channels_last" in options:
                    assert one.x_start.is_contiguous(memory_format=torch.channels_last)
    (both,) = batches(dataset, 1, as_bytes=True, channels_last=True)
    assert both[0].x_start.is_contiguous(memory_format=torch.channels_last)
    assert all(part.weight.tolist() == [1, 1, 1] for part in both)


def test_shards_that_are_needed_come_side_by_side(tmp_path: Path) -> None:
    """Those of the first step of all streams, and those that a stream comes to."""
    together = threading.Barrier(2)

    def fetch(storage: Storage, key: str, expected_sha256: str, memory: Memory = new_memory) -> memoryview:
        if key.endswith(".tar"):
            # breaks for all where one waits in vain
            together.wait(10)
        return fetch_verified(storage, key, expected_sha256, memory)

    dataset, images = dataset_of(tmp_path, [4, 4])
    reader = ShardReader(dataset, "train", fetch=fetch)
    reader.fetch_ahead([0, 1], 0)
    assert np.array_equal(reader.read(1, [2])[0], images[[6]])
    reader.close()
    (parts,) = batches(dataset, 1, num_streams=2, streams=range(2), fetch=fetch, stop_step=1)
    assert [len(part.index) for part in parts] == [3, 3]


def test_as_many_threads_decode_as_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(3)

    def decode(files: Mapping[int, bytes], out: NDArray[np.uint8]) -> list[tuple[int, str]]:
        together.wait(10)
        return decode_many(files, out)

    monkeypatch.setattr(shard_reader, "decode_many", decode)
    dataset, images = dataset_of(tmp_path, [9])
    reader = ShardReader(dataset, "train", decode_threads=3)
    assert np.array_equal(reader.read(0, range(7))[0], images[:7])
    reader.close()


def test_jpegs_are_read_as_pillow_reads_them(tmp_path: Path) -> None:
    pictures = [Image.fromarray(image.transpose(1, 2, 0)) for image in random_images(5, (3, 9, 7))]
    files = [image_bytes(picture, "JPEG") for picture in pictures]
    shard = pack(Sample(f"{number}", file) for number, file in enumerate(files))
    dataset = put_dataset(tmp_path, {"train": [shard]}, (3, 9, 7))
    for file, (_, image, _) in zip(files, read_split(dataset, "train"), strict=True):
        assert np.array_equal(image.transpose(1, 2, 0), np.asarray(Image.open(io.BytesIO(file))))


def test_a_flip_depends_on_the_draw_alone(tmp_path: Path) -> None:
    dataset, _ = dataset_of(tmp_path, [6, 6])
    flipped, turned = 0, 0
    for plain, maybe in zip(batches(dataset, 20), batches(dataset, 20, flip=True), strict=True):
        for one, two in zip(plain, maybe, strict=True):
            draws = rng.integers(5, "flip", one.index, 2)
            for row, draw in enumerate(draws.tolist()):
                expected = one.x_start[row].flip(-1) if draw else one.x_start[row]
                assert torch.equal(two.x_start[row], expected)
                flipped, turned = flipped + draw, turned + 1
    assert 0.35 < flipped / turned < 0.65


def test_fewer_samples_than_streams_and_batches_longer_than_an_epoch_work(tmp_path: Path) -> None:
    dataset, images = dataset_of(tmp_path, [1, 0, 2])
    parts = batches(dataset, 2, num_streams=7, streams=range(7), micro_batch_size=5)
    seen = torch.cat([part.x_start for step in parts for part in step])
    assert len(seen) == 70
    counts = [sum(torch.equal(x, to_model(image)) for x in seen) for image in images]
    assert sum(counts) == 70
    assert max(counts) - min(counts) <= 7


def test_each_shard_is_fetched_once_by_a_pass_over_the_data(tmp_path: Path) -> None:
    dataset, _ = dataset_of(tmp_path, [8] * 24)
    storage = watched(dataset)
    # 192 samples in 4 streams of 6 shards: 16 steps of 3 are one epoch, and the reader looks two steps and a shard
    # a stream ahead
    batches(through(dataset, storage), 6, prefetch=1)
    fetched = {key: times for key, times in storage.gets.items() if key.endswith(".tar")}
    assert fetched
    assert set(fetched.values()) == {1}


def test_an_error_of_the_reading_thread_reaches_the_consumer_and_stays(tmp_path: Path) -> None:
    dataset, _ = dataset_of(tmp_path, [6, 6])

    def gone(key: str, data: bytes, time: int) -> bytes:
        if key == "train/shard-000001.tar":
            raise StorageError("s3://bucket: does not answer")
        return data

    with StreamBatches(
        through(dataset, watched(dataset, gone)),
        "train",
        seed=0,
        num_streams=1,
        streams=[0],
        micro_batch_size=2,
    ) as stream:
        with pytest.raises(StorageError, match="does not answer"):
            list(itertools.islice(stream, 20))
        with pytest.raises(StorageError, match="does not answer"):
            next(stream)


def test_a_missing_shard_ends_a_stream_with_its_name(tmp_path: Path) -> None:
    dataset, _ = dataset_of(tmp_path, [6])
    storage = watched(dataset, lambda key, data, time: (_ for _ in ()).throw(ObjectMissing(key)))
    with pytest.raises(DataError, match=r"shard-000000.index.parquet: is missing"):
        batches(through(dataset, storage), 1)


def test_closing_ends_the_thread_and_the_iteration(tmp_path: Path) -> None:
    dataset, _ = dataset_of(tmp_path, [6])
    stream = StreamBatches(dataset, "train", seed=0, num_streams=2, streams=[0, 1], micro_batch_size=2)
    next(stream)
    stream.close()
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "ddpm-reader"]
    with pytest.raises(StopIteration):
        next(stream)


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 3), (2, 4), (1, 6)])
def test_it_ends_where_it_is_to_stop_and_fetches_nothing_for_later(
    tmp_path: Path, start: int, stop: int
) -> None:
    dataset, _ = dataset_of(tmp_path, [4] * 6)
    options: dict[str, Any] = {"num_streams": 1, "streams": [0], "micro_batch_size": 4}
    endless = batches(dataset, stop, **options)[start:]
    fetched: list[str] = []

    def note(key: str, data: bytes, time: int) -> bytes:
        fetched.append(key)
        return data

    with StreamBatches(
        through(dataset, watched(dataset, note)), "train", seed=5, start_step=start, stop_step=stop, **options
    ) as stream:
        read = list(stream)
        assert list(stream) == []
    assert len(read) == stop - start
    assert all(same(*pair) for a, b in zip(read, endless, strict=True) for pair in zip(a, b, strict=True))
    # a shard a step
    assert len([key for key in fetched if key.endswith(".tar")]) == stop - start


@pytest.mark.parametrize(
    ("counts", "batch", "steps"), [([10] * 4, 128, 6), ([10] * 20, 64, 3), ([50] * 8, 64, 6)]
)
@pytest.mark.parametrize("with_stage", [False, True])
def test_no_shard_is_fetched_twice_for_one_batch(
    tmp_path: Path, counts: list[int], batch: int, steps: int, with_stage: bool
) -> None:
    dataset, _ = dataset_of(tmp_path, counts)
    fetched: list[str] = []

    def note(key: str, data: bytes, time: int) -> bytes:
        fetched.append(key)
        return data

    stages = (LoadedStage("data.stages[0]: as it is", lambda samples: samples),) if with_stage else ()
    batches(
        through(dataset, watched(dataset, note)),
        steps,
        num_streams=1,
        streams=[0],
        micro_batch_size=batch,
        stop_step=steps,
        stages=stages,
    )
    order, touched = Order(counts, 5, 1), 0
    for step in range(steps):
        touched += len(set(order.locate(0, range(step * batch, (step + 1) * batch)).shard.tolist()))
    assert len([key for key in fetched if key.endswith(".tar")]) <= touched


def test_who_goes_on_after_an_interrupt_is_told_and_does_not_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, _ = dataset_of(tmp_path, [6])
    with StreamBatches(
        dataset, "train", seed=0, num_streams=1, streams=[0], micro_batch_size=2, stop_step=3
    ) as stream:
        next(stream)
        take = stream._source.get

        def interrupted() -> object:
            take()
            raise KeyboardInterrupt

        monkeypatch.setattr(stream._source, "get", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
        monkeypatch.undo()
        for _ in range(2):
            with pytest.raises(DataError, match="reading was interrupted: read again from a step"):
                next(stream)


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_there_is_nothing_where_it_stops_before_it_starts(tmp_path: Path, stop: int) -> None:
    dataset, _ = dataset_of(tmp_path, [6])
    with StreamBatches(
        dataset,
        "train",
        seed=0,
        num_streams=1,
        streams=[0],
        micro_batch_size=2,
        start_step=3,
        stop_step=stop,
    ) as stream:
        assert list(stream) == []


def test_an_iterator_that_is_forgotten_ends_its_thread(tmp_path: Path) -> None:
    dataset, _ = dataset_of(tmp_path, [6])
    stream = StreamBatches(dataset, "train", seed=0, num_streams=2, streams=[0, 1], micro_batch_size=2)
    next(stream)
    del stream  # the fixture sees to it that no thread is left


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"micro_batch_size": 0}, "micro_batch_size: must be at least 1, got 0"),
        ({"start_step": -1}, "start_step: must be at least 0, got -1"),
        ({"prefetch": 0}, "prefetch: must be at least 1, got 0"),
        ({"streams": [4]}, r"streams: must lie in 0\.\.3, got \[4\]"),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, options: dict[str, object], line: str) -> None:
    dataset, _ = dataset_of(tmp_path, [6])
    with pytest.raises(ValueError, match=line):
        batches(dataset, 1, **options)


def test_a_split_without_samples_is_named(tmp_path: Path) -> None:
    dataset = put_dataset(tmp_path, {"train": [packed(random_images(0))]}, (1, 8, 8))
    with pytest.raises(DataError, match="split 'train' holds no sample"):
        batches(dataset, 1)
    assert list(read_split(dataset, "train")) == []


STREAMS, PREFETCH, FETCHERS = 2, 2, 4


def held_over_an_epoch(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int, int]:
    """The most shards, pieces of memory for such, and micro-batches, that were held at any time, by whatever part
    of the reader.
    """
    shards, memories, parts = Held(), Held(), Held()
    known: set[int] = set()

    class CountedBuffers(Buffers):
        def _array(self, num_bytes: int) -> NDArray[np.uint8]:
            array = super()._array(num_bytes)
            shards.add(1)
            weakref.finalize(array, shards.add, -1)
            return array

        def _memory(self, num_bytes: int) -> NDArray[np.uint8]:
            memory = super()._memory(num_bytes)
            if id(memory) not in known:
                known.add(id(memory))
                memories.add(1)
                weakref.finalize(memory, known.discard, id(memory))
                weakref.finalize(memory, memories.add, -1)
            return memory

    class Counted(MicroBatch):
        def __init__(self, *values: Any) -> None:
            super().__init__(*values)
            parts.add(1)
            weakref.finalize(self, parts.add, -1)

    monkeypatch.setattr(reader, "MicroBatch", Counted)
    monkeypatch.setattr(shard_reader, "Buffers", CountedBuffers)
    options = {"seed": 0, "num_streams": STREAMS, "streams": range(STREAMS), "micro_batch_size": 3}
    with StreamBatches(dataset, "train", prefetch=PREFETCH, **options) as stream:  # type: ignore[arg-type]
        for _ in range(dataset.count("train") // 6):
            next(stream)
    return shards.peak, memories.peak, parts.peak


def test_however_many_the_data_are_only_so_many_shards_and_batches_are_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What threads hold at a time is a matter of their timing, but no timing makes it more than this."""
    # images that make up most of their tar, which is then kept as it is; all tars of one size
    images = random_images(6, (3, 64, 64))
    assert len({len(encode_png(image)) // 512 for image in images}) == 1
    shards = [packed(images, 6 * number) for number in range(80)]
    dataset = put_dataset(tmp_path, {"train": shards}, (3, 64, 64))
    # those that the streams stand in and come to, and one that makes room for itself; those on their way; those
    # that a thread has fetched and not let go of yet
    most_shards = (2 * STREAMS + 1) + STREAMS + FETCHERS
    # those that wait; that which the thread has put there last, makes now, and the consumer has
    most_batches = (PREFETCH + 3) * STREAMS
    held_shards, held_memory, held_batches = held_over_an_epoch(dataset, monkeypatch)
    assert 2 * STREAMS <= held_shards <= most_shards
    # and what waits for the next shards
    assert held_memory <= most_shards + shard_reader.SPARE_SHARDS
    assert held_batches <= most_batches
    # a reader that keeps what it has read would be seen
    monkeypatch.setattr(WeightedLRU, "_over", lambda self: False)
    monkeypatch.setattr(WeightedLRU, "retain", lambda self, keys: None)
    assert held_over_an_epoch(dataset, monkeypatch)[0] >= 75


def test_reading_imports_no_pandas(tmp_path: Path) -> None:
    """That takes half a second, in which an interruption is lost."""
    dataset_of(tmp_path, [6, 3])
    script = (
        "import sys; from pipelines.dataset import Dataset; from pipelines.reader import StreamBatches\n"
        "from pipelines.stored_order import read_split\n"
        f"dataset = Dataset.load({str(tmp_path)!r}); list(read_split(dataset, 'test'))\n"
        "with StreamBatches(dataset, 'train', seed=0, num_streams=1, streams=[0], micro_batch_size=4) as steps:\n"
        "    next(steps)\n"
        "sys.exit('pandas' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
