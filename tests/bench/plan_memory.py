"""Memory a sample that `ddpm prepare` takes in its driver: python -m tests.bench.plan_memory [SAMPLES]

Each kind of source in a process of its own: tiny samples with a label and names of 30 letters, listed and planned,
no image made; with --index-only the tars are read and indexed. Printed is what a process with SAMPLES (800,000) of
them has at its peak more than one with a quarter of that, over the difference in samples: what a process takes for
its programs and its buffers, whatever it reads, counts for nothing.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

_SAMPLES = 800_000
_SAMPLES_A_TAR = 5_000


def put_tars(root: Path, count: int, image: bytes = b"image") -> None:
    for number in range(-(-count // _SAMPLES_A_TAR)):
        with tarfile.open(root / f"a-{number:05d}.tar", "w") as tar:
            for sample in range(min(_SAMPLES_A_TAR, count - number * _SAMPLES_A_TAR)):
                for extension, body in (("png", image), ("cls", b"7")):
                    info = tarfile.TarInfo(f"folder/key-{number:05d}-{sample:013d}.{extension}")
                    info.size = len(body)
                    tar.addfile(info, io.BytesIO(body))


def put_images_in_tars(root: Path, count: int) -> None:
    import numpy as np

    from pipelines.images import encode_png

    put_tars(root, count, encode_png(np.zeros((1, 2, 2), np.uint8)))


def put_folder(root: Path, count: int) -> None:
    for number in range(10):
        (root / f"class-{number}").mkdir()
        for sample in range(count // 10):
            (root / f"class-{number}" / f"some-image-{sample:011d}.png").touch()


def put_parquet(root: Path, count: int) -> None:
    table = pa.table({"image": [b"image"] * count, "label": [7] * count})
    pq.write_table(table, root / "a.parquet", row_group_size=1000)


def put_keyed_parquet(root: Path, count: int) -> None:
    keys = [f"some/folder/key-{number:014d}" for number in range(count)]
    table = pa.table({"image": [b"image"] * count, "label": ["owl", "bee"] * (count // 2), "__key__": keys})
    pq.write_table(table, root / "a.parquet", row_group_size=1000)


def _plan(root: str) -> object:
    from pipelines.prepare_plan import plan_shards
    from pipelines.sources import open_source

    return plan_shards(open_source(root).entries, 0, 0.1)


def _index(root: str) -> object:
    from pipelines.index_only import index_tars

    with tempfile.TemporaryDirectory() as out:
        return index_tars(root, out)


_KINDS: dict[str, tuple[Callable[[Path, int], None], Callable[[str], object]]] = {
    "tar": (put_tars, _plan),
    "parquet": (put_parquet, _plan),
    "parquet with keys": (put_keyed_parquet, _plan),
    "folder": (put_folder, _plan),
    "tar, --index-only": (put_images_in_tars, _index),
}


def _measure(kind: str, root: str) -> None:
    _KINDS[kind][1](root)
    # not getrusage, whose peak is also that of the process that started this one
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(int(status["VmHWM"].split()[0]) * 1024)


def _peak_bytes(kind: str, count: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        _KINDS[kind][0](Path(folder), count)
        command = [sys.executable, "-m", "tests.bench.plan_memory", kind, folder]
        return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    if len(sys.argv) == 3:
        _measure(sys.argv[1], sys.argv[2])
        return
    count = int(sys.argv[1]) if len(sys.argv) == 2 else _SAMPLES
    for kind in _KINDS:
        growth = _peak_bytes(kind, count) - _peak_bytes(kind, count // 4)
        print(f"{kind}: {growth / (count - count // 4):.0f} bytes a sample", flush=True)


if __name__ == "__main__":
    main()
