"""Reading the digits as float batches of 32: our reader against webdataset's own pipeline, from local disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset as wds

from pipelines.dataset import Dataset
from pipelines.prepare import prepare
from pipelines.reader import StreamBatches
from tests.bench.timing import interleaved

_BATCH = 32
_STEPS = 45


def main(rounds: int = 5) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dataset = prepare("digits", folder, test_fraction=0.2, samples_per_shard=200)
        ours, peer, ratio = interleaved(
            lambda: _read_ours(dataset), lambda: _read_webdataset(Path(folder)), rounds
        )
    images = _BATCH * _STEPS
    print(
        f"loader: {images / ours:,.0f} images/s; webdataset {wds.__version__} {images / peer:,.0f} images/s"
    )
    print(f"loader: {ratio:.1f}× webdataset's speed")


def _read_ours(dataset: Dataset) -> None:
    with StreamBatches(
        dataset,
        "train",
        seed=0,
        num_streams=1,
        streams=[0],
        micro_batch_size=_BATCH,
        start_step=0,
        flip=False,
    ) as batches:
        for _ in range(_STEPS):
            (part,) = next(batches)
            assert part.x_start.shape == (_BATCH, 1, 8, 8)


def _read_webdataset(folder: Path) -> None:
    shards = sorted(str(path) for path in (folder / "train").glob("*.tar"))
    pipeline = wds.WebDataset(shards, shardshuffle=len(shards), seed=0).decode("pill").to_tuple("png", "cls")
    batches = _float_batches(iter(pipeline))
    for _ in range(_STEPS):
        assert next(batches).shape == (_BATCH, 1, 8, 8)


def _float_batches(samples: Iterator[tuple[object, object]]) -> Iterator[torch.Tensor]:
    held: list[np.ndarray] = []
    for picture, _ in samples:
        held.append(np.asarray(picture)[None])
        if len(held) == _BATCH:
            yield torch.from_numpy(np.stack(held)).float() / 127.5 - 1
            held = []


if __name__ == "__main__":
    main()
