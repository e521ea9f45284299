"""Memory a sample that `ddpm prepare` takes in its driver: python -m tests.bench.plan_memory [SAMPLES]

Each kind of source in a process of its own: 200,000 tiny samples with a label and names of 30 letters, listed and
planned, no image read. Printed is what the process grew by, at its end and at its peak, over that number.
"""

from __future__ import annotations

import gc
import io
import resource
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

_SAMPLES = 200_000
_FILES = 20


def put_tars(root: Path, count: int) -> None:
    for number in range(_FILES):
        with tarfile.open(root / f"a-{number:05d}.tar", "w") as tar:
            for sample in range(count // _FILES):
                for extension, body in (("png", b"image"), ("cls", b"7")):
                    info = tarfile.TarInfo(f"some/folder/key-{number:02d}-{sample:09d}.{extension}")
                    info.size = len(body)
                    tar.addfile(info, io.BytesIO(body))


def put_folder(root: Path, count: int) -> None:
    for number in range(10):
        (root / f"class-{number}").mkdir()
        for sample in range(count // 10):
            (root / f"class-{number}" / f"some-image-{sample:09d}.png").touch()


def put_parquet(root: Path, count: int) -> None:
    table = pa.table({"image": [b"image"] * count, "label": [7] * count})
    pq.write_table(table, root / "a.parquet", row_group_size=1000)


_KINDS = {"tar": put_tars, "folder": put_folder, "parquet": put_parquet}


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _measure(root: str, count: int) -> None:
    from pipelines import source_files, source_parquet, source_tar  # noqa: F401  imports are no samples
    from pipelines.prepare_plan import plan_shards
    from pipelines.sources import open_source

    gc.collect()
    before = _resident_bytes()
    plans = plan_shards(open_source(root).entries, 0, 0.1)
    gc.collect()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = sum(len(plan.entries) for plan in plans)
    print(
        f"{(_resident_bytes() - before) / found:.0f} bytes a sample, {(peak - before) / found:.0f} at the peak"
    )
    assert found == count


def main() -> None:
    if len(sys.argv) == 3:
        _measure(sys.argv[1], int(sys.argv[2]))
        return
    count = int(sys.argv[1]) if len(sys.argv) == 2 else _SAMPLES
    for kind, make in _KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), count)
            print(kind, end=": ", flush=True)
            subprocess.run([sys.executable, "-m", "tests.bench.plan_memory", folder, str(count)], check=True)


if __name__ == "__main__":
    main()
