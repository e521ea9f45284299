"""Tiny runs: a configuration whose network trains in milliseconds, its batches, and workers without a cluster."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from ddpm_core import rng
from pipelines.config import Config, parse_config
from pipelines.tracking import End, Row

TINY = """\
name: tiny
data: {uri: nowhere, flip: true}
schedule: {num_timesteps: 50, beta_end: 0.2}
model:
  image_size: 8
  in_channels: 1
  base_channels: 8
  channel_mults: [1]
  num_res_blocks: 1
  attention_resolutions: []
  dropout: 0.2
  num_groups: 4
optimizer: {learning_rate: 0.001, warmup_steps: 5}
ema: {decay: 0.9}
train: {batch_size: 8, micro_batches: 4, steps: 20, log_every: 2, eval_every: 10, checkpoint_every: 10}
bound: {num_strata: 2, num_images: 3}
sampler: {num_steps: 5}
sample: {count: 10, unit_size: 4, batch_size: 4}
"""


def tiny_config(*overrides: str) -> Config:
    return parse_config(TINY, overrides)


@dataclass(frozen=True)
class Batch:
    """A micro-batch of made-up images."""

    stream: int
    index: Tensor
    x_start: Tensor
    label: Tensor


def made_up_batches(config: Config, step: int, streams: Sequence[int] | None = None) -> list[Batch]:
    """The micro-batches of a step, each image a function of its index alone, as the reader's are."""
    num_streams = config.train.micro_batches
    size = config.train.batch_size // num_streams
    shape = (config.model.in_channels, config.model.image_size, config.model.image_size)
    batches = []
    for stream in range(num_streams) if streams is None else streams:
        index = (step * size + torch.arange(size)) * num_streams + stream
        x_start = rng.uniform(config.seed, "made-up image", index, shape) * 2 - 1
        batches.append(Batch(stream, index, x_start, index % 10))
    return batches


class Kept:
    """A tracker that keeps the pictures."""

    run_id = None

    def __init__(self) -> None:
        self.artifacts: dict[str, bytes] = {}

    def log(self, rows: Iterable[Row]) -> None:
        pass

    def artifact(self, path: str, data: bytes) -> None:
        self.artifacts[path] = data

    def finish(self, end: End) -> None:
        pass


@dataclass
class Team:
    """Workers as threads of this process that take turns: one computes, the others wait.

    Torch's generator belongs to the whole process, so that workers must not compute at the same time; a turn ends
    where a worker needs the others.
    """

    size: int
    turn: threading.Lock = field(default_factory=threading.Lock)
    box: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """What each worker gave, by rank."""
        self.box[rank] = value
        self._meet()
        values = [self.box[other] for other in range(self.size)]
        self._meet()
        return values

    def _meet(self) -> None:
        self.turn.release()
        try:
            self.barrier.wait(timeout=60)
        finally:
            self.turn.acquire()


@dataclass
class TeamWorker:
    """The `World` of one worker of a team."""

    team: Team
    rank: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    reports: list[dict[str, float | str]] = field(default_factory=list)

    @property
    def size(self) -> int:
        return self.team.size

    def all_reduce(self, tensor: Tensor) -> None:
        parts = self.team.exchange(self.rank, tensor.clone())
        tensor.copy_(torch.stack(parts).sum(0))

    def broadcast(self, value: Any) -> Any:
        return self.team.exchange(self.rank, value)[0]

    def report(self, metrics: dict[str, float | str]) -> None:
        self.reports.append(metrics)


Result = TypeVar("Result")


def together(size: int, work: Callable[[TeamWorker], Result]) -> list[Result]:
    """What `work` returns on each of `size` workers; the first one's exception is raised."""
    team = Team(size)
    results: dict[int, Result] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        with team.turn:
            try:
                results[rank] = work(TeamWorker(team, rank))
            except BaseException as error:  # noqa: BLE001  handed to the caller below
                errors.append(error)
                team.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(size)]
