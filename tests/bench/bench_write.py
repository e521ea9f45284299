"""Writing images into shards: ours, with either encoder, against webdataset's ShardWriter; and `ddpm prepare`.

`make bench-write`. The images are 32×32 pieces of the two photographs that come with scikit-learn, each with a
class. What the rows name takes turns in this one run; a figure is the median of its turns. "A core" is a second of
this process's CPU time, all its threads included; the clock is printed beside it and has the disk in it: ours waits
until each shard is on it (fsync), ShardWriter does not. ShardWriter gets what its users give it, images of Pillow
or arrays, and the faster of the two is the peer. Ours also computes what it stores beside: SHA-256 of the tar,
CRC32C, size and place of every image, as Parquet.

`--prepare` times the whole of `ddpm prepare` (JPEG 256×256, to 64×64 PNG) in one process and with one and two
workers on a Ray cluster of so many CPUs, which takes some minutes.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds
from numpy.typing import NDArray
from PIL import Image

from pipelines.png import ENCODERS, PngEncoder, encode_pngs
from pipelines.shards import Sample, pack, parse_index, sha256
from pipelines.storage import Storage, open_storage
from pipelines.tar_writing import tar_of
from tests.bench.timing import Quartiles, quartiles

COUNT, PER_SHARD, SIDE = 8192, 1024, 32
Way = Callable[[], object]


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--prepare", action="store_true", help="time `ddpm prepare` instead")
    options.add_argument("--images", type=int, default=6000, help="of --prepare")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.prepare:
            prepare_curve(Path(folder), given.images, min(given.rounds, 3))
        else:
            compare(Path(folder), given.rounds)


def pieces(side: int) -> NDArray[np.uint8]:
    """The two photographs cut into squares, uint8 `[N, 3, H, W]`."""
    from sklearn.datasets import load_sample_images

    found = [
        photo[top : top + side, left : left + side].transpose(2, 0, 1)
        for photo in load_sample_images().images
        for top in range(0, photo.shape[0] - side + 1, side)
        for left in range(0, photo.shape[1] - side + 1, side)
    ]
    return np.stack(found)


def compare(folder: Path, rounds: int) -> None:
    few = pieces(SIDE)
    # Each way writes the same pictures again and again, which then lie in the CPU's caches, as those just made do;
    # as networks make images, and as decoders give them and the peer wants them, with the channels innermost.
    made = few[np.arange(PER_SHARD) % len(few)]
    rows = np.ascontiguousarray(made.transpose(0, 2, 3, 1))
    images, arrays = rows.transpose(0, 3, 1, 2), list(rows)
    pictures = [Image.fromarray(array) for array in arrays]
    files = {encoder: encode_pngs(images, encoder) for encoder in ENCODERS}
    peers: dict[str, Way] = {
        "ShardWriter, Pillow images": lambda: _shard_writer(folder / "wds", pictures),
        "ShardWriter, arrays": lambda: _shard_writer(folder / "wds", arrays),
    }
    ours: dict[str, Way] = {
        f"ours, {encoder}": lambda encoder=encoder: _ours(folder / "ours", images, encoder)  # type: ignore[misc]
        for encoder in ENCODERS
    }
    ours["ours, fpng, channels first"] = lambda: _ours(folder / "ours", made, "fpng")
    names = [f"{number:09d}.png" for number in range(PER_SHARD)]
    floors: dict[str, Way] = {
        "Image.save alone": lambda: [_save(pictures[n % len(pictures)]) for n in range(COUNT)],
        **{
            f"encoding alone, {encoder}": lambda encoder=encoder: _encode(images, encoder)  # type: ignore[misc]
            for encoder in ENCODERS
        },
        "SHA-256 alone, fpng's tars": lambda: [sha256(tar) for _ in range(COUNT // PER_SHARD)],
        "tars alone, fpng's files": lambda: [tar_of(names, files["fpng"]) for _ in range(COUNT // PER_SHARD)],
    }
    tar = _packed(images, 0, "fpng").tar
    _check(folder, images, peers["ShardWriter, arrays"], ours)
    cpu, clock = _in_turns({**peers, **ours, **floors}, rounds)
    print(f"{COUNT:,} images of {SIDE}×{SIDE}, RGB, shards of {PER_SHARD:,}; {rounds} turns")
    print(f"  {'':28}{'samples/s a core':>18}{'µs each':>9}{'samples/s by the clock':>25}")
    for name in cpu:
        a, b = (statistics.median(times[name]) for times in (cpu, clock))
        print(f"  {name:28}{COUNT / a:18,.0f}{a / COUNT * 1e6:9.1f}{COUNT / b:25,.0f}")
    peer = min(peers, key=lambda name: statistics.median(cpu[name]))
    print(f"against webdataset {wds.__version__} ({peer}), median (quartiles)")
    for name in ours:
        ratios = (_ratio(times[peer], times[name]).text(digits=1) for times in (cpu, clock))
        print("  {:28}{}× a core, {}× by the clock".format(name, *ratios))
    mean = {encoder: statistics.mean(map(len, files[encoder])) for encoder in ENCODERS}
    print(
        f"bytes of a file: Pillow {mean['pillow']:,.0f}, fpng {mean['fpng']:,.0f}, "
        f"which is {mean['fpng'] / mean['pillow'] - 1:+.0%}"
    )


def _in_turns(ways: Mapping[str, Way], rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of CPU and by the clock, over turns after one that is not counted."""
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    clock: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            began, spent = time.perf_counter(), time.process_time()
            way()
            if turn:
                cpu[name].append(time.process_time() - spent)
                clock[name].append(time.perf_counter() - began)
    return cpu, clock


def _ratio(peer: list[float], ours: list[float]) -> Quartiles:
    return quartiles(a / b for a, b in zip(peer, ours, strict=True))


def _shard_writer(folder: Path, images: list[Any]) -> None:
    folder.mkdir(exist_ok=True)
    with wds.ShardWriter(f"{folder}/shard-%06d.tar", maxcount=PER_SHARD, verbose=0) as writer:
        for number in range(COUNT):
            writer.write(
                {"__key__": f"{number:09d}", "png": images[number % len(images)], "cls": number % 10}
            )


def _ours(folder: Path, images: NDArray[np.uint8], encoder: PngEncoder) -> None:
    storage = open_storage(str(folder / encoder))
    for first in range(0, COUNT, PER_SHARD):
        _put(storage, images, first, encoder)


def _put(storage: Storage, images: NDArray[np.uint8], first: int, encoder: PngEncoder) -> None:
    """A shard, of which nothing is in memory any more when the next one is made, as in our programs."""
    packed = _packed(images, first, encoder)
    stem = f"shard-{first // PER_SHARD:06d}"
    storage.put(f"{stem}.tar", packed.tar)
    storage.put(f"{stem}.index.parquet", packed.index)


def _packed(images: NDArray[np.uint8], first: int, encoder: PngEncoder) -> Any:
    files = encode_pngs(images, encoder)
    return pack(Sample(f"{number:09d}", file, number % 10) for number, file in enumerate(files, first))


def _encode(images: NDArray[np.uint8], encoder: PngEncoder) -> None:
    for _ in range(0, COUNT, PER_SHARD):
        encode_pngs(images, encoder)


def _save(picture: Image.Image) -> bytes:
    with io.BytesIO() as file:
        picture.save(file, format="PNG")
        return file.getvalue()


def _check(folder: Path, images: NDArray[np.uint8], peer: Way, ours: Mapping[str, Way]) -> None:
    """By webdataset itself: ours hold the peer's samples, with its very bytes or with its pixels."""

    def samples(where: Path) -> Iterator[dict[str, Any]]:
        for tar in sorted(where.glob("*.tar")):
            yield from wds.WebDataset(str(tar), shardshuffle=False)

    peer()
    for encoder, way in zip(ENCODERS, ours.values(), strict=False):
        way()
        seen = 0
        for a, b in zip(samples(folder / "wds"), samples(folder / "ours" / encoder), strict=True):
            assert (a["__key__"], a["cls"]) == (b["__key__"], b["cls"])
            pixels = np.asarray(Image.open(io.BytesIO(b["png"]))).transpose(2, 0, 1)
            assert np.array_equal(pixels, images[int(b["__key__"]) % len(images)])
            assert encoder != "pillow" or a["png"] == b["png"]
            seen += 1
        assert seen == COUNT
        index = parse_index((folder / "ours" / encoder / "shard-000000.index.parquet").read_bytes())
        assert index.count == PER_SHARD


def prepare_curve(folder: Path, count: int, rounds: int) -> None:
    """Images a second of `ddpm prepare`: in one process, and with one and two workers."""
    import ray

    from pipelines.prepare import prepare
    from pipelines.prepare_ray import RayWorkers

    source = folder / "photos"
    source.mkdir()
    for number, image in enumerate(_jpegs(count)):
        (source / f"{number:06d}.jpg").write_bytes(image)
    times: dict[str, list[float]] = {"one process": [], "1 worker": [], "2 workers": []}

    def timed(name: str, turn: int, workers: Any) -> None:
        began = time.perf_counter()
        prepare(str(source), f"{folder}/{name}-{turn}", image_size=64, samples_per_shard=200, workers=workers)
        times[name].append(time.perf_counter() - began)

    for turn in range(rounds):
        timed("one process", turn, None)
        for cpus in (1, 2):
            ray.init(address="local", num_cpus=cpus, log_to_driver=False, include_dashboard=False)
            try:
                # so that the workers have started and imported
                list(RayWorkers(0)(_warm, range(4 * cpus)))
                timed("1 worker" if cpus == 1 else "2 workers", turn, RayWorkers(0))
            finally:
                ray.shutdown()
    print(f"`ddpm prepare` of {count:,} JPEG 256×256 to 64×64, shards of 200; {rounds} turns, by the clock")
    for name, found in times.items():
        print(f"  {name:14}{count / statistics.median(found):10,.0f} images/s")
    print(f"  2 workers over 1: {_ratio(times['1 worker'], times['2 workers']).text()}×")
    print(f"  1 worker over one process: {_ratio(times['one process'], times['1 worker']).text()}×")


def _warm(number: int) -> int:
    import pipelines.prepare_shards  # noqa: F401

    time.sleep(0.5)
    return number


def _jpegs(count: int) -> Iterator[bytes]:
    from sklearn.datasets import load_sample_images

    draw = np.random.default_rng(0)
    photos = load_sample_images().images
    for number in range(count):
        photo = photos[number % 2]
        top, left = (int(draw.integers(0, size - 255)) for size in photo.shape[:2])
        with io.BytesIO() as file:
            Image.fromarray(photo[top : top + 256, left : left + 256]).save(file, "JPEG", quality=90)
            yield file.getvalue()


if __name__ == "__main__":
    main()
