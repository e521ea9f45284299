"""What `ddpm prepare` holds of a source while it plans, counted by the interpreter and not timed."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines import tars
from pipelines.index_only import index_tars
from pipelines.prepare_plan import Plan, plan_shards
from pipelines.sources import open_source
from tests.bench import plan_memory
from tests.bench.plan_memory import (
    put_folder,
    put_images_in_tars,
    put_keyed_parquet,
    put_parquet,
    put_tars,
)

SAMPLES = 20_000


def peak_bytes(work: Callable[[], Any]) -> tuple[Any, int]:
    tracemalloc.start()
    try:
        return work(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("put", "bound"),
    # of these, names of 30 letters and as many bytes again for duplicates and the order; a file's twice
    [(put_tars, 100), (put_parquet, 45), (put_keyed_parquet, 95), (put_folder, 190)],
)
def test_a_plan_takes_few_bytes_a_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, put: Callable[[Path, int], None], bound: int
) -> None:
    # what is held of the tars that are being read is no more for more samples
    monkeypatch.setattr(tars, "_CHUNK_BYTES", 4096)
    monkeypatch.setattr(plan_memory, "_SAMPLES_A_TAR", 500)
    for name, count in (("few", 100), ("many", SAMPLES)):
        (tmp_path / name).mkdir()
        put(tmp_path / name, count)

    def plan_of(name: str) -> Plan:
        return plan_shards(open_source(str(tmp_path / name)).entries, 0, 0.1)

    plan_of("few")  # what is imported and cached is no sample
    plan, peak = peak_bytes(lambda: plan_of("many"))
    assert sum(samples for samples, _ in plan.counts.values()) == SAMPLES
    assert peak / SAMPLES < bound


def test_index_only_takes_few_bytes_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "_CHUNK_BYTES", 4096)
    monkeypatch.setattr(plan_memory, "_SAMPLES_A_TAR", 500)
    (tmp_path / "in").mkdir()
    put_images_in_tars(tmp_path / "in", 6000)
    source = f"{tmp_path}/in/a-{{00000..00003}}.tar"
    index_tars(source, str(tmp_path / "first"))
    few = peak_bytes(lambda: index_tars(source, str(tmp_path / "few")))[1]
    dataset, many = peak_bytes(lambda: index_tars(str(tmp_path / "in"), str(tmp_path / "many")))
    assert dataset.count("train") + dataset.count("test") == 6000
    # one tar is read after the other, whole
    assert (many - few) / (6000 - 4 * 500) < 75
