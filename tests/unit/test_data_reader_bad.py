"""Bad samples: an error by default; passed over, each at its place, on every worker and resume; not too many."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from pipelines.dataset import DataError, Dataset
from pipelines.images import encode_png, to_model
from pipelines.order import Order
from pipelines.reader import MicroBatch, StreamBatches
from pipelines.shards import Sample, pack
from pipelines.training import Learner
from pipelines.world import SingleWorker
from tests.support.data import put_dataset, random_images
from tests.support.runs import tiny_config

COUNTS = [5, 9, 6]
BAD = {(0, 2), (1, 8), (2, 0)}
OPTIONS = {"seed": 5, "num_streams": 4, "micro_batch_size": 3, "flip": True}


def damaged_set(folder: Path, bad: set[tuple[int, int]] = BAD) -> Dataset:
    shards, images = [], random_images(sum(COUNTS))
    for shard, count in enumerate(COUNTS):
        samples = []
        for row in range(count):
            data = encode_png(images[sum(COUNTS[:shard]) + row])
            samples.append(Sample(f"{shard}-{row}", data[:-30] if (shard, row) in bad else data, row % 10))
        shards.append(pack(samples))
    return put_dataset(folder, {"train": shards}, (1, 8, 8))


def read(dataset: Dataset, steps: int, *, skip: bool, **options: object) -> list[list[MicroBatch]]:
    settings = OPTIONS | {"streams": range(4), "skip_bad": skip} | options
    with StreamBatches(dataset, "train", **settings) as batches:  # type: ignore[arg-type]
        return [next(batches) for _ in range(steps)]


def test_by_default_the_first_bad_sample_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"shard-00000\d\.tar: sample '\d-\d': a broken PNG") as error:
        read(damaged_set(tmp_path), 9, skip=False)
    assert "\n" not in str(error.value)


def test_a_bad_sample_keeps_its_place_with_weight_zero_on_every_worker_and_resume(tmp_path: Path) -> None:
    dataset, whole = damaged_set(tmp_path / "bad"), damaged_set(tmp_path / "whole", set())
    order, expected = Order(COUNTS, 5, 4), read(whole, 9, skip=False)
    alone = read(dataset, 9, skip=True)
    met = set()
    for parts, plain in zip(alone, expected, strict=True):
        for part, good in zip(parts, plain, strict=True):
            where = order.locate(part.stream, part.position.numpy())
            bad = [place in BAD for place in zip(where.shard.tolist(), where.sample.tolist(), strict=True)]
            met |= BAD & set(zip(where.shard.tolist(), where.sample.tolist(), strict=True))
            assert part.weight.tolist() == [0.0 if one else 1.0 for one in bad]
            kept = ~torch.tensor(bad)
            assert torch.equal(part.x_start[kept], good.x_start[kept])
            assert torch.equal(part.label, good.label)
            assert torch.equal(part.index, good.index)
            nothing = to_model(torch.zeros(1, 8, 8, dtype=torch.uint8))
            assert all(torch.equal(x, nothing) for x in part.x_start[~kept])
    assert met == BAD
    for start, options in ((0, {"streams": [2, 1]}), (4, {}), (0, {"decode_threads": 2})):
        for parts, before in zip(
            read(dataset, 5, skip=True, start_step=start, **options), alone[start:], strict=False
        ):
            for part in parts:
                same = before[part.stream]
                assert torch.equal(part.weight, same.weight)
                assert torch.equal(part.x_start, same.x_start)


def test_they_are_counted_and_each_is_listed_and_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = OPTIONS | {"streams": range(4), "skip_bad": True}
    with (
        caplog.at_level(logging.WARNING),
        StreamBatches(damaged_set(tmp_path), "train", **settings) as batches,  # type: ignore[arg-type]
    ):
        drawn = sum(int((part.weight == 0).sum()) for _ in range(20) for part in next(batches))
        assert drawn > 6  # 12 epochs of three
        assert drawn <= batches.skipped.count
    assert {(sample.shard, sample.row) for sample in batches.skipped.samples.values()} == BAD
    assert caplog.text.count("passing over") == 3
    assert "train/shard-000001.tar: sample '1-8': a broken PNG" in caplog.text


def test_a_bad_sample_weighs_nothing_in_the_gradient() -> None:
    config = tiny_config()
    size, side = config.train.batch_size // config.train.micro_batches, config.model.image_size
    shape = (size, config.model.in_channels, side, side)

    def gradient(fill: float, weight: float) -> torch.Tensor:
        learner = Learner(config, torch.device("cpu"))
        parts = []
        for stream in range(config.train.micro_batches):
            x = torch.linspace(-1, 1, shape[0])[:, None, None, None].expand(shape).clone()
            weights = torch.ones(shape[0])
            x[0], weights[0] = fill, weight
            index = torch.arange(shape[0]) * config.train.micro_batches + stream
            parts.append(MicroBatch(stream, index, index, x, index, weights))
        result = learner.step(0, parts, SingleWorker(torch.device("cpu")))
        return torch.tensor([result.loss, result.grad_norm])

    assert torch.equal(gradient(-1.0, 0.0), gradient(0.7, 0.0))
    assert not torch.equal(gradient(-1.0, 1.0), gradient(0.7, 1.0))
