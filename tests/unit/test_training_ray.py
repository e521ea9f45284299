"""What a run on a cluster decides without one."""

from __future__ import annotations

import logging

import pytest

from pipelines.config_sections import WorkersConfig
from pipelines.dataset import DataError
from pipelines.train_ray import _not_ours, lacks


@pytest.mark.parametrize(
    ("workers", "there", "told"),
    [
        (WorkersConfig(num=2, cpus=1), {"CPU": 2.0, "memory": 1e9}, None),
        (WorkersConfig(num=4, cpus=0.5, gpus=0.25), {"CPU": 2.0, "GPU": 1.0}, None),
        (
            WorkersConfig(num=3, cpus=1),
            {"CPU": 2.0},
            "workers.num 3 of workers.cpus 1; the cluster has 2 CPU in all",
        ),
        (
            WorkersConfig(gpus=1),
            {"CPU": 2.0},
            "workers.num 1 of workers.gpus 1; the cluster has 0 GPU in all",
        ),
        (
            WorkersConfig(num=3, gpus=0.5),
            {"CPU": 8.0, "GPU": 1.0},
            "workers.num 3 of workers.gpus 0.5; the cluster has 1 GPU in all",
        ),
    ],
)
def test_what_a_cluster_has_no_room_for_is_told(
    workers: WorkersConfig, there: dict[str, float], told: str | None
) -> None:
    assert lacks(workers, there) == told


@pytest.mark.parametrize(("error", "told"), [(DataError("a mistake"), False), (ZeroDivisionError(), True)])
def test_ray_tells_the_tracebacks_of_bugs_alone(
    error: Exception, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("a logger of Ray's")
    logger.addFilter(_not_ours)
    try:
        raise error
    except Exception:  # noqa: BLE001
        logger.error("Error in training function: …")
    assert bool(caplog.messages) == told
