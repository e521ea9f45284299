"""Preparing on a Ray cluster: the tasks of `pipelines.prepare`, as many at once as the cluster has room for."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from pipelines.errors import UserError, one_line
from pipelines.prepare_shards import Result, Task
from pipelines.storage import StorageError

log = logging.getLogger(__name__)

_PATIENCE_S = 60
# a task that waits beside each that runs keeps a worker from standing still between two
_TASKS_A_CPU = 2


class PreparingStopped(UserError):
    """The cluster could not make every shard; those that are made stay."""

    exit_code = 1


# what this process works on, with the files that it has open; only the newest
_work: dict[str, Callable[[Any], Any]] = {}


def _do(shared: Sequence[Any], task: Any) -> Any:
    (reference,) = shared
    if reference.hex() not in _work:
        _work.clear()
        _work[reference.hex()] = ray.get(reference)
    return _work[reference.hex()](task)


class RayWorkers:
    """`pipelines.prepare_shards.Workers` on the connected cluster.

    A task that is lost with its process, or that can't reach the storage, is done again up to
    `max_failures` times; every other error ends the whole. Tasks are handed out as others get done, so
    that neither the driver nor the cluster holds more of them than are under way.
    """

    def __init__(self, max_failures: int) -> None:
        self._max_failures = max_failures

    def __call__(
        self, work: Callable[[Task], Result], tasks: Iterable[Task]
    ) -> Generator[tuple[Task, Result], None, None]:
        do = ray.remote(_do).options(
            num_cpus=1,
            max_retries=self._max_failures,
            retry_exceptions=[StorageError],
        )
        # in a list, or every task would get a copy of its own
        shared = [ray.put(work)]
        left = iter(tasks)
        running: dict[Any, Task] = {}

        def fill() -> None:
            room = max(int(ray.cluster_resources().get("CPU", 1)), 1) * _TASKS_A_CPU
            while len(running) < room and (task := next(left, None)) is not None:
                running[do.remote(shared, task)] = task

        try:
            fill()
            while running:
                done, _ = ray.wait(list(running), timeout=_PATIENCE_S)
                if not done:
                    log.warning(
                        "nothing done in %d s; of the cluster's %g CPUs %g are free",
                        _PATIENCE_S,
                        ray.cluster_resources().get("CPU", 0),
                        ray.available_resources().get("CPU", 0),
                    )
                for answer in done:
                    # its arrays would hold their place in the cluster's shared memory for as long as they live
                    result = copy.deepcopy(ray.get(answer))
                    yield running.pop(answer), result
                fill()
        except RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, UserError):
                raise cause from None
            raise PreparingStopped(
                f"preparing stopped: {one_line(error)}; the same command goes on from here"
            ) from None
        finally:
            # what is under way might write after the caller has cleaned up
            for answer in running:
                ray.cancel(answer, force=False)
            if running:
                ray.wait(list(running), num_returns=len(running), timeout=_PATIENCE_S)
