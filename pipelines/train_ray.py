"""A training run on a Ray cluster.

Ray places the workers, restarts them and carries metrics; it holds no model state.  Where a run goes on from
is decided by its own commit records, so a lost worker, a lost driver and a new cluster are one case.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import ray
import ray.exceptions
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from torch import Tensor

from pipelines.config import parse_config
from pipelines.config_sections import WorkersConfig
from pipelines.dataset import DataError
from pipelines.errors import UserError, one_line
from pipelines.logs import configure_worker_logging
from pipelines.reader_process import ReaderLost
from pipelines.scratch import scratch_folder
from pipelines.storage import StorageError
from pipelines.train import Run, open_run, train
from pipelines.training import TrainingError

log = logging.getLogger(__name__)

_COLLECTIVE_TIMEOUT_S = 300
_VERDICT_TIMEOUT_S = 30


class RunFailed(UserError):
    """Workers were lost more often than `workers.max_failures` allows."""

    exit_code = 1


class RayWorker:
    """The `World` of a Ray Train worker: torch.distributed for tensors, Ray for reports."""

    def __init__(self) -> None:
        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.size = context.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()

    def all_reduce(self, tensor: Tensor) -> None:
        if self.size > 1:
            dist.all_reduce(tensor)

    def broadcast(self, value: Any) -> Any:
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def report(self, metrics: dict[str, float | str]) -> None:
        ray.train.report(metrics)


@ray.remote(num_cpus=0, max_restarts=-1)
class _Verdict:
    """Why a run can't go on, whoever of its workers found out: what every further attempt would meet again."""

    def __init__(self) -> None:
        self._why: str | None = None

    def pass_it(self, why: str) -> None:
        self._why = self._why or why

    def why(self) -> str | None:
        return self._why


def _known(verdict: Any) -> str | None:
    """Why the run can't go on; None where that is not known, or its keeper is lost: then it is found out again."""
    try:
        return cast("str | None", ray.get(verdict.why.remote(), timeout=_VERDICT_TIMEOUT_S))
    except ray.exceptions.RayError:
        return None


def _not_ours(record: logging.LogRecord) -> bool:
    return not isinstance(sys.exc_info()[1], UserError)


def _worker(arguments: dict[str, Any]) -> str | None:
    """Train; returns why training can't go on, if it can't."""
    configure_worker_logging()
    # Ray logs whatever ends a worker with its traceback, while it handles it; our own errors are told in a line
    logging.getLogger("ray.train.v2._internal.util").addFilter(_not_ours)
    verdict = arguments["verdict"]
    if why := _known(verdict):
        # found out in an attempt before this one
        return why
    try:
        return _train(arguments)
    except (StorageError, ReaderLost) as error:
        # may pass
        log.warning("a worker stops: %s", one_line(error, 1000))
        raise
    except UserError as error:
        # The others don't meet it, and wait: an error is what ends them. Ray tries again, and that ends at once.
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(verdict.pass_it.remote(str(error)), timeout=_VERDICT_TIMEOUT_S)
        raise


def _train(arguments: dict[str, Any]) -> str | None:
    config = parse_config(arguments["config"])
    world = RayWorker()
    run = open_run(config)
    if run.name != arguments["run"]:
        raise UserError(
            f"{run.dataset.uri}: a worker finds another data set there than the driver; "
            "do both use the same S3 server (AWS_ENDPOINT_URL)?"
        )
    try:
        train(run, world, parent_run_id=arguments["parent_run_id"])
    except TrainingError as error:
        # every worker meets it at the same step; as an exception, Ray would have it done again
        return str(error)
    return None


def fit(run: Run, *, callbacks: Sequence[Any] = (), parent_run_id: str | None = None) -> None:
    """Train on the connected Ray cluster until `train.steps`; survives `workers.max_failures` lost workers.

    Raises `UserError` where the run can't go on.
    """
    config, workers = run.config, run.config.workers
    verdict = _Verdict.remote()  # type: ignore[attr-defined]  # what the decorator adds
    with scratch_folder("ray-train") as scratch:
        trainer = TorchTrainer(
            _worker,
            train_loop_config={
                "config": config.to_yaml(),
                "run": run.name,
                "parent_run_id": parent_run_id,
                "verdict": verdict,
            },
            torch_config=TorchConfig(timeout_s=_COLLECTIVE_TIMEOUT_S),
            scaling_config=ScalingConfig(
                num_workers=workers.num,
                use_gpu=workers.gpus > 0,
                resources_per_worker={
                    "CPU": workers.cpus,
                    **({"GPU": workers.gpus} if workers.gpus > 0 else {}),
                },
            ),
            run_config=RunConfig(
                # a name of its own, since Ray would restore another attempt's state by name
                name=f"{config.name}-{uuid.uuid4().hex[:8]}",
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=workers.max_failures),
                callbacks=list(callbacks),
                logging_config=LoggingConfig(log_level="WARNING"),
            ),
        )
        if lacking := lacks(workers, ray.cluster_resources()):
            # Ray waits for it without end; an autoscaler may bring it
            log.warning("no place yet for %s", lacking)
        try:
            with _interruptible():
                result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            if why := _known(verdict):
                raise DataError(why) from None
            cause = error.__cause__ or error
            raise RunFailed(f"training failed: {_root_cause(error) or one_line(cause)}") from error
    if why := _known(verdict):
        raise DataError(why)
    if result.return_value:
        raise TrainingError(str(result.return_value))


def lacks(workers: WorkersConfig, there: Mapping[str, float]) -> str | None:
    """What of a job's workers a cluster with these resources has no room for, even when nothing else runs there."""
    for name, setting, each in (("CPU", "cpus", workers.cpus), ("GPU", "gpus", workers.gpus)):
        if workers.num * each > there.get(name, 0):
            return (
                f"workers.num {workers.num} of workers.{setting} {each:g}; the cluster has {there.get(name, 0):g} "
                f"{name} in all"
            )
    return None


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """An interruption is a KeyboardInterrupt here as elsewhere.

    While it trains, Ray answers Ctrl-C in a way of its own: it exits, with code 0 as if all were done, and goes on
    doing so afterwards.
    """
    # a trial of a sweep runs in another thread, to which no signal comes
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        if not main:
            raise
        raise KeyboardInterrupt from None
    finally:
        if main:
            signal.signal(signal.SIGINT, before)


def _root_cause(error: BaseException) -> str | None:
    """The message of the worker's own exception, if one of them is ours."""
    for failure in getattr(error, "worker_failures", {}).values():
        cause = getattr(failure, "cause", None) or failure
        if isinstance(cause, UserError):
            # whole, since what to do stands at the end
            return one_line(cause, 1000)
        text = str(failure)
        for line in reversed(text.strip().splitlines()):
            if "Error: " in line:
                return one_line(Exception(line.strip()))
    return None
