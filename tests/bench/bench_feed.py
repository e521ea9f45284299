"""A training step that reads its images, against the same step on images that lie in memory: what feeding costs.

`python -m tests.bench.bench_feed`. PNGs of 32×32 from local disk, shuffled; both take turns of many steps in one
run. The steps are those of `pipelines.training` on the machine's GPU, if it has one.

`--launches N`: instead a step of N tiny operations, each of which lets the interpreter's lock go and takes it
again, as a thread does that starts a GPU's kernels. That shows on any machine what another one that holds it costs.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable

import torch

from pipelines.config import Config, load_config
from pipelines.config_sections import DataConfig
from pipelines.precision import Autocast
from pipelines.reader_process import begin
from pipelines.reading import Reading
from pipelines.steps_ahead import MicroBatch
from pipelines.training import Learner
from pipelines.world import SingleWorker
from tests.bench.bench_data import make_files, put
from tests.bench.timing import quartiles

_SIDE, _COUNT, _PER_SHARD = 32, 65_536, 4096
# those that wait, and those that are made and handed over meanwhile
_READY = 10


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    large = device.type == "cuda"
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--batch", type=int, default=512 if large else 32)
    options.add_argument("--base-channels", type=int, default=64 if large else 32)
    options.add_argument("--steps", type=int, default=40, help="in a turn")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--decode-threads", type=int, default=1)
    options.add_argument("--launches", type=int, default=0, metavar="N")
    options.add_argument("--reader", choices=("thread", "process"), default="thread")
    given = options.parse_args()
    config = load_config(
        "cifar10.yaml",
        [
            f"train.batch_size={given.batch}",
            "train.micro_batches=4",
            "workers.num=1",
            f"model.base_channels={given.base_channels}",
        ],
    )
    step = _launching(given.launches) if given.launches else _training(config, device)
    with tempfile.TemporaryDirectory() as folder:
        dataset = put(f"file://{folder}", make_files(_SIDE), _COUNT, _PER_SHARD, _SIDE)
        data = DataConfig(
            uri=dataset.uri, flip=True, reader=given.reader, decode_threads=given.decode_threads
        )
        reading = Reading(
            dataset,
            "train",
            data,
            seed=0,
            num_streams=4,
            streams=(0, 1, 2, 3),
            micro_batch_size=given.batch // 4,
            for_gpu=large,
        )
        with begin(reading) as fed:
            ready = next(fed)
            read, resident = [], []
            for turn in range(given.rounds + 1):
                times = _seconds(step, fed, given.steps), _seconds(step, itertools.repeat(ready), given.steps)
                if turn:
                    read.append(times[0])
                    resident.append(times[1])
            alone = _seconds(lambda batch: None, fed, given.steps)
    where = torch.cuda.get_device_name() if large else "CPU"
    dtype = Autocast(config.train.precision, device).dtype
    images = given.batch * given.steps
    what = f"{given.launches:,} launches" if given.launches else f"{given.base_channels} channels, {dtype}"
    print(f"{where}, {what}, batch 4 × {given.batch // 4}, reader {given.reader}")
    print(f"  reading:   {images / statistics.median(read):,.0f} images/s")
    print(f"  in memory: {images / statistics.median(resident):,.0f} images/s")
    ratios = quartiles(a / b for a, b in zip(read, resident, strict=True))
    print(f"  time against that in memory: {ratios.text(digits=3)}×")
    print(f"  the reader alone: {images / alone:,.0f} images/s, {given.decode_threads} threads of decoding")


def _seconds(
    step: Callable[[list[MicroBatch]], object], batches: Iterable[list[MicroBatch]], count: int
) -> float:
    """Of so many steps, after as many as a reader may have ready when they begin."""
    given = iter(batches)
    for batch in itertools.islice(given, _READY):
        step(batch)
    began = time.perf_counter()
    for batch in itertools.islice(given, count):
        step(batch)
    return time.perf_counter() - began


def _training(config: Config, device: torch.device) -> Callable[[list[MicroBatch]], object]:
    learner, world = Learner(config, device, 256), SingleWorker(device)
    # reads the loss, and so waits for the GPU
    return lambda batch: learner.step(0, batch, world)


def _launching(launches: int) -> Callable[[list[MicroBatch]], object]:
    torch.set_num_threads(1)
    x = torch.zeros(64)

    def step(batch: list[MicroBatch]) -> None:
        for _ in range(launches):
            torch.add(x, x)

    return step


if __name__ == "__main__":
    main()
