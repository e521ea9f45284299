"""Mass generation on a Ray cluster: one actor a worker, fed unit by unit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from ray.util import ActorPool

from pipelines.config import WorkersConfig
from pipelines.errors import UserError, one_line
from pipelines.sampling import Recipe, UnitMaker


class _Worker:
    def __init__(self, recipe: Recipe, set_uri: str) -> None:
        self._maker = UnitMaker(recipe, set_uri, "cuda" if torch.cuda.is_available() else "cpu")

    def make(self, unit: int) -> int:
        return self._maker.make(unit)


def make_units(recipe: Recipe, set_uri: str, units: Sequence[int], workers: WorkersConfig) -> Iterator[int]:
    """Make these units on the connected cluster; yields the number of images of each as it is committed.

    A lost actor is restarted `workers.max_failures` times and its unit made again.  Raises `UserError` when
    that is not enough; what is committed stays.
    """
    actor: Any = ray.remote(_Worker).options(
        num_cpus=workers.cpus,
        num_gpus=workers.gpus,
        max_restarts=workers.max_failures,
        max_task_retries=workers.max_failures,
    )
    pool = ActorPool([actor.remote(recipe, set_uri) for _ in range(min(workers.num, len(units)))])
    try:
        yield from pool.map_unordered(lambda worker, unit: worker.make.remote(unit), list(units))
    except RayError as error:
        cause = getattr(error, "cause", None)
        reason = cause if isinstance(cause, UserError) else error
        raise UserError(f"sampling stopped: {one_line(reason)}; the same command goes on from here") from None
