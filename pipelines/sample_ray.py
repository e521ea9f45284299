"""Mass generation on a Ray cluster: one actor a worker, fed unit by unit."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import torch
from ray.exceptions import RayError

from pipelines.config_sections import WorkersConfig
from pipelines.errors import UserError, one_line
from pipelines.sample_recipe import Recipe
from pipelines.sampling import UnitMaker

log = logging.getLogger(__name__)

_PATIENCE_S = 60


class SamplingStopped(UserError):
    """The cluster could not make every unit; what is committed stays."""

    exit_code = 1


class _Worker:
    def __init__(self, recipe: Recipe, set_uri: str) -> None:
        self._maker = UnitMaker(recipe, set_uri, "cuda" if torch.cuda.is_available() else "cpu")

    def ready(self) -> int:
        """An answer says that the cluster has found a place for this worker; it has made no image."""
        return 0

    def make(self, unit: int) -> int:
        return self._maker.make(unit)


def make_units(recipe: Recipe, set_uri: str, units: Sequence[int], workers: WorkersConfig) -> Iterator[int]:
    """Make these units on the connected cluster; yields the number of images of each as it is committed.

    A unit is given only to a worker that has answered, so the work gets done by as many as the cluster has room
    for.  A lost actor is restarted `workers.max_failures` times and its unit made again.  Raises
    `SamplingStopped` when that is not enough.
    """
    actor: Any = ray.remote(_Worker).options(
        num_cpus=workers.cpus,
        num_gpus=workers.gpus,
        max_restarts=workers.max_failures,
        max_task_retries=workers.max_failures,
    )
    waiting = deque(units)
    pool = [actor.remote(recipe, set_uri) for _ in range(min(workers.num, len(units)))]
    asked = {worker.ready.remote(): worker for worker in pool}
    unmade = len(units)
    heard = False
    try:
        while unmade:
            done, _ = ray.wait(list(asked), timeout=_PATIENCE_S)
            if not done and not heard:
                log.warning(
                    "no place yet for a worker of workers.cpus %g and workers.gpus %g; the cluster has %s",
                    workers.cpus,
                    workers.gpus,
                    {
                        name: value
                        for name, value in ray.cluster_resources().items()
                        if name in ("CPU", "GPU")
                    },
                )
            for answer in done:
                heard = True
                worker = asked.pop(answer)
                made = ray.get(answer)
                if made:
                    unmade -= 1
                    yield made
                if waiting:
                    asked[worker.make.remote(waiting.popleft())] = worker
    except RayError as error:
        cause = getattr(error, "cause", None)
        reason = cause if isinstance(cause, UserError) else error
        raise SamplingStopped(
            f"sampling stopped: {one_line(reason)}; the same command goes on from here"
        ) from None
    finally:
        for worker in pool:
            ray.kill(worker)
