"""Reading images as decoded batches of 64: our reader against other loaders and against decoding alone.

`make bench-data`. The images (gradients with seeded noise) and an S3 server are made here. What the rows name takes
turns in this one run; a figure is the median of its turns. "A core" is a second of CPU time of this process and of
those that it started and that ended, all threads included, which does not see what else the machine does; the clock
is printed beside it. Ray Data works in processes of its own, so that only its time by the clock is known.

Ours reads ahead and decodes in threads of its own, and webdataset in the one that asks, so that by the clock ours
has two cores where there are two; "a core" counts both alike.

webdataset knows no S3. Its own ways there are commands: curl, to which it gives a shard's signed https:// address,
and any other by `pipe:`. Besides, it is given a function of ours that reads each object whole by boto3.

mosaicml-streaming takes part where it can be imported; `tests/bench/peer_streaming.py` says how.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import resource
import secrets
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import psutil
import pyspng
import pytest
import simplejpeg
import torch
import webdataset as wds
from numpy.typing import NDArray
from PIL import Image

from pipelines.dataset import Dataset
from pipelines.decode import decode_many
from pipelines.images import encode_png
from pipelines.reader import StreamBatches
from pipelines.shards import Sample, pack
from tests.bench import peer_streaming
from tests.support.data import put_dataset
from tests.support.s3 import BUCKET, running, use_server

BATCH = 64
DIFFERENT = 256
# side, samples, samples a shard: shards of 16 MiB and of 9.8 MiB; so many samples that a beginning, when nothing is
# fetched yet and all memory is new, is no large part
KINDS = {"PNG 32×32": (32, 65_536, 4096), "JPEG 256×256": (256, 8192, 512)}
LIBRARY = {32: "pyspng", 256: "simplejpeg"}
Images = Iterator[NDArray[np.uint8] | torch.Tensor]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument(
        "--s3",
        choices=("ceph", "moto"),
        default="ceph" if shutil.which("radosgw") else "moto",
        help="the server: Ceph's gateway, where it is installed, or moto, an emulator, which keeps no connection",
    )
    options.add_argument("--no-ray", action="store_true", help="leave Ray Data out")
    options.add_argument(
        "--memory", type=int, default=100_000, help="samples of the epoch whose memory is shown"
    )
    options.add_argument("--only", choices=("memory",), help="show the memory alone, without the speeds")
    given = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if given.only is None:
            compare_kinds(folder, given.s3, given.rounds, with_ray=not given.no_ray)
        side = KINDS["PNG 32×32"][0]
        show_memory(put(f"file://{folder}/many", make_files(side), given.memory, 1000, side))


def compare_kinds(folder: str, s3: str, rounds: int, *, with_ray: bool) -> None:
    print(f"S3 by {s3}")
    with (
        running(s3, Path(folder)) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        use_server(patch, server)
        token = Path(folder) / "ray-token"
        token.write_text(secrets.token_hex(32))
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        for kind, (side, count, per_shard) in KINDS.items():
            files = make_files(side)
            sets = {
                "disk": put(f"file://{folder}/{side}", files, count, per_shard, side),
                "S3": put(f"s3://{BUCKET}/{side}", files, count, per_shard, side),
            }
            compare(kind, files, count, sets, rounds, with_ray=with_ray)


def make_files(side: int) -> list[bytes]:
    """PNG for 32 pixels a side, JPEG of quality 90 for more."""
    draw = np.random.default_rng(0)
    y, x = np.mgrid[0:side, 0:side] / side
    files = []
    for _ in range(DIFFERENT if side == 32 else DIFFERENT // 4):
        slope, mean = draw.uniform(-100, 100, (2, 3, 1, 1)), draw.uniform(80, 170, (3, 1, 1))
        image = mean + slope[0] * x + slope[1] * y + draw.normal(0, 8, (3, side, side))
        pixels = image.clip(0, 255).astype(np.uint8)
        if side == 32:
            files.append(encode_png(pixels))
        else:
            with io.BytesIO() as file:
                Image.fromarray(pixels.transpose(1, 2, 0)).save(file, "JPEG", quality=90)
                files.append(file.getvalue())
    return files


def put(uri: str, files: list[bytes], count: int, per_shard: int, side: int) -> Dataset:
    shards = (
        pack(
            Sample(f"{number:07d}", files[number % len(files)], number % 10)
            for number in range(first, min(first + per_shard, count))
        )
        for first in range(0, count, per_shard)
    )
    return put_dataset(uri, {"train": list(shards)}, (3, side, side))


def compare(
    kind: str, files: list[bytes], count: int, sets: dict[str, Dataset], rounds: int, *, with_ray: bool
) -> None:
    side = KINDS[kind][0]
    # the bytes of each sample in a place of their own, as a loader finds them: not those still in the CPU's cache
    apart = [bytes(bytearray(files[number % len(files)])) for number in range(count)]
    ways: dict[str, Callable[[], Images]] = {
        "decode alone": lambda: _decode_alone(apart, side),
        f"{LIBRARY[side]} alone": lambda: _library_alone(apart, side),
        "Pillow alone": lambda: _pillow_alone(apart),
    }
    for place, dataset in sets.items():
        ways |= {
            f"raw bytes, {place}": lambda dataset=dataset: _raw(dataset),  # type: ignore[misc]
            f"ours, {place}": lambda dataset=dataset: _ours(dataset, count),  # type: ignore[misc]
            f"webdataset, {place}": lambda dataset=dataset: _webdataset(dataset),  # type: ignore[misc]
        }
    peers: dict[str, Collection[str]] = {"webdataset": sets.keys()}
    if shutil.which("curl"):
        peers["webdataset by curl"] = ["S3"]
        ways["webdataset by curl, S3"] = lambda: _webdataset(sets["S3"], curl=True)
    if streaming := peer_streaming.load():
        peers["mosaicml-streaming"] = sets.keys()
        for place, dataset in sets.items():
            copy = dataset.uri.removeprefix("file://") + "-mds"
            peer_streaming.write(streaming, copy, files, count)
            ways[f"mosaicml-streaming, {place}"] = lambda copy=copy: peer_streaming.batches(  # type: ignore[misc]
                streaming, copy, BATCH
            )
    else:
        print("\nmosaicml-streaming is not here: tests/bench/peer_streaming.py says how it takes part")
    _check_pixels(ways["ours, disk"](), files)
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    clock: dict[str, list[float]] = {name: [] for name in ways}
    by_ray: dict[str, list[float]] = {place: [] for place in sets if with_ray}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            began, spent = time.perf_counter(), _spent_s()
            for _ in way():
                pass
            if turn:  # the first one warms up
                cpu[name].append((_spent_s() - spent) / count)
                clock[name].append((time.perf_counter() - began) / count)
        if turn and with_ray:
            for place, seconds in ray_data(count, sets).items():
                by_ray[place].append(seconds)
    print(
        f"\n{kind}, {len(files[0]):,} bytes, {count:,} samples, {rounds} turns, webdataset {wds.__version__}"
    )
    print(f"  {'':24}{'samples/s a core':>18}{'samples/s by the clock':>25}")
    for name in ways:
        a, b = (1 / statistics.median(times[name]) for times in (cpu, clock))
        print(f"  {name:24}{a:18,.0f}{b:25,.0f}")

    for place, times in by_ray.items():
        print(f"  {f'Ray Data, {place}, one core':24}{'':18}{1 / statistics.median(times):25,.0f}")

    def ratio(one: str, two: str) -> str:
        pairs = [
            statistics.median(a / b for a, b in zip(times[one], times[two], strict=True))
            for times in (cpu, clock)
        ]
        return f"{pairs[0]:.2f} a core, {pairs[1]:.2f} by the clock"

    for peer, places in peers.items():
        for place in places:
            print(f"  ours against {peer}, {place}: {ratio(f'{peer}, {place}', f'ours, {place}')}")
    for place, times in by_ray.items():
        faster = statistics.median(a / b for a, b in zip(times, clock[f"ours, {place}"], strict=True))
        print(f"  ours against Ray Data, {place}: {faster:.2f} by the clock")
    for place in sets:
        for floor in ("decode alone", f"{LIBRARY[side]} alone"):
            print(f"  time against {floor}, {place}: {ratio(f'ours, {place}', floor)}")
    print(f"  time from S3 against disk: {ratio('ours, S3', 'ours, disk')}")


def _spent_s() -> float:
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


def _decode_alone(files: list[bytes], side: int) -> Images:
    images = np.empty((BATCH, side, side, 3), np.uint8)
    for first in range(0, len(files), BATCH):
        batch = {place: files[first + place] for place in range(BATCH)}
        assert not decode_many(batch, images)
        yield images


def _library_alone(files: list[bytes], side: int) -> Images:
    """One call of the library an image, and nothing else."""
    load = pyspng.load if side == 32 else simplejpeg.decode_jpeg
    images = np.empty((BATCH, side, side, 3), np.uint8)
    for first in range(0, len(files), BATCH):
        for place in range(BATCH):
            images[place] = load(files[first + place])
        yield images


def _pillow_alone(files: list[bytes]) -> Images:
    for first in range(0, len(files), BATCH):
        some = (files[first + place] for place in range(BATCH))
        yield np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in some])


def _raw(dataset: Dataset) -> Images:
    for shard in dataset.shards("train"):
        yield np.frombuffer(dataset.storage.get(shard.key), np.uint8)


def _ours(dataset: Dataset, count: int) -> Images:
    with StreamBatches(
        dataset,
        "train",
        seed=0,
        num_streams=1,
        streams=[0],
        micro_batch_size=BATCH,
        stop_step=count // BATCH,
        as_bytes=True,
        channels_last=True,
    ) as batches:
        for batch in batches:
            yield batch[0].x_start


@functools.cache
def _client() -> Any:
    return boto3.client("s3")


def _webdataset(dataset: Dataset, *, curl: bool = False) -> Images:
    """From S3 as webdataset itself can, by `curl`, or by boto3, each object read whole, which is the fastest."""

    def opened(url: str, mode: str = "rb", bufsize: int = 0) -> Any:
        bucket, _, key = url.removeprefix("s3://").partition("/")
        return io.BytesIO(client.get_object(Bucket=bucket, Key=key)["Body"].read())

    def signed(url: str) -> str:
        bucket, _, key = url.removeprefix("s3://").partition("/")
        return str(client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": key}))

    client = _client()
    wds.gopen_schemes["s3"] = opened
    urls = [f"{dataset.uri}/{shard.key}".removeprefix("file://") for shard in dataset.shards("train")]
    if curl:
        urls = list(map(signed, urls))
    samples = wds.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(1000).decode("rgb8")
    for images, _ in samples.to_tuple("png;jpg", "cls").batched(BATCH):
        yield images


def _check_pixels(batches: Images, files: list[bytes]) -> None:
    expected = {np.asarray(Image.open(io.BytesIO(data))).tobytes() for data in files}
    for images in batches:
        rows = torch.as_tensor(images).permute(0, 2, 3, 1).contiguous().numpy()
        assert all(row.tobytes() in expected for row in rows), "pixels that are not Pillow's"


def ray_data(count: int, sets: dict[str, Dataset]) -> dict[str, float]:
    """Seconds a sample by the clock, from each place, on a cluster of one core that is there for this alone."""
    import ray

    def read(tars: list[str]) -> int:
        batches = ray.data.read_webdataset(tars).iter_batches(batch_size=BATCH)
        return sum(len(rows["__key__"]) for rows in batches)

    found = {}
    with contextlib.redirect_stderr(io.StringIO()):
        ray.init(address="local", num_cpus=1, log_to_driver=False, include_dashboard=False)
        try:
            ray.data.DataContext.get_current().enable_progress_bars = False
            for place, dataset in sets.items():
                uris = (f"{dataset.uri}/{shard.key}" for shard in dataset.shards("train"))
                tars = [uri.removeprefix("file://") for uri in uris]
                # its processes start with the first
                read(tars[:1])
                began = time.perf_counter()
                assert read(tars) == count
                found[place] = (time.perf_counter() - began) / count
        finally:
            ray.shutdown()
    return found


def show_memory(dataset: Dataset) -> None:
    """Memory of this process over an epoch: flat means that the last quarter is no higher than the second."""
    process, count = psutil.Process(), dataset.count("train")
    before = process.memory_info().rss
    used = []
    for step, _ in enumerate(_ours(dataset, count)):
        if step % 10 == 0:
            used.append(process.memory_info().rss)
    quarter = len(used) // 4
    peaks = [max(used[part * quarter : (part + 1) * quarter]) / 2**20 for part in range(4)]
    print(
        f"\nmemory over an epoch of {count:,} PNG 32×32: {before / 2**20:.0f} MiB before, then at most, by quarters"
    )
    print("  " + ", ".join(f"{peak:.0f}" for peak in peaks) + " MiB")


if __name__ == "__main__":
    main()
