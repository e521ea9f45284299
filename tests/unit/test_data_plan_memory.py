"""What `ddpm prepare` holds of a source while it plans, counted by the interpreter and not timed."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import tars
from pipelines.prepare_plan import plan_shards
from pipelines.sources import open_source
from tests.bench.plan_memory import put_folder, put_parquet, put_tars

SAMPLES = 20_000


@contextmanager
def counted(seen: dict[str, float]) -> Iterator[None]:
    """Bytes a sample that were allocated in the block and are there still, and at the most."""
    gc.collect()
    tracemalloc.start()
    try:
        yield
        gc.collect()
        seen["end"], seen["peak"] = (found / SAMPLES for found in tracemalloc.get_traced_memory())
    finally:
        tracemalloc.stop()


def put_keyed_parquet(root: Path, count: int) -> None:
    keys = [f"some/folder/key-{number:012d}" for number in range(count)]
    table = pa.table({"image": [b"image"] * count, "label": ["owl", "bee"] * (count // 2), "__key__": keys})
    pq.write_table(table, root / "a.parquet", row_group_size=1000)


@pytest.mark.parametrize(
    ("put", "end", "peak"),
    [
        (put_tars, 70, 110),
        (put_parquet, 20, 60),
        (put_keyed_parquet, 50, 100),
        (put_folder, 300, 800),
    ],
)
def test_a_plan_takes_few_bytes_a_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, put: Callable[[Path, int], None], end: float, peak: float
) -> None:
    put(tmp_path, SAMPLES)
    # what is read ahead of a tar is no more for more samples
    monkeypatch.setattr(tars, "_CHUNK_BYTES", 4096)
    # what is imported and cached is no sample
    plan_shards(open_source(str(tmp_path)).entries, 0, 0.1)
    seen: dict[str, float] = {}
    with counted(seen):
        plan = plan_shards(open_source(str(tmp_path)).entries, 0, 0.1)
    assert sum(samples for samples, _ in plan.counts.values()) == SAMPLES
    print(put.__name__, seen)
    assert seen["end"] < end
    assert seen["peak"] < peak
