"""What a worker of a run reads, as plain values."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pipelines.config_sections import DataConfig
from pipelines.dataset import Dataset
from pipelines.disk_cache import fetch_through
from pipelines.reader import StreamBatches
from pipelines.stages import load_stages


@dataclass(frozen=True)
class Reading:
    """`for_gpu`: images as bytes, with the channels innermost in memory, so that what is left to do with them is
    done on the GPU; else as the model's numbers. Other fields: see `StreamBatches`.
    """

    dataset: Dataset
    split: str
    data: DataConfig
    seed: int
    num_streams: int
    streams: tuple[int, ...]
    micro_batch_size: int
    start_step: int = 0
    stop_step: int | None = None
    for_gpu: bool = False

    def in_thread(self, *, prefetch: int, pin_memory: bool) -> StreamBatches:
        data = self.data
        return StreamBatches(
            self.dataset,
            self.split,
            seed=self.seed,
            num_streams=self.num_streams,
            streams=self.streams,
            micro_batch_size=self.micro_batch_size,
            start_step=self.start_step,
            stop_step=self.stop_step,
            flip=data.flip,
            prefetch=prefetch,
            cache_bytes=data.cache_bytes,
            fetch=fetch_through(data.disk_cache, data.disk_cache_bytes, self.dataset.storage),
            decode_threads=data.decode_threads,
            as_bytes=self.for_gpu,
            channels_last=self.for_gpu,
            pin_memory=pin_memory,
            skip_bad=data.on_bad_sample == "skip",
            stages=load_stages(data.stages),
        )

    @property
    def num_steps(self) -> int | None:
        return None if self.stop_step is None else self.stop_step - self.start_step

    @property
    def step_bytes(self) -> int:
        """Of a step's images."""
        shape, dtype = self.layout
        return math.prod(shape) * dtype.itemsize

    @property
    def layout(self) -> tuple[tuple[int, ...], torch.dtype]:
        """Of a step's images as they lie in memory, those of all streams one after the other."""
        channels, height, width = self.dataset.shape
        count = len(self.streams) * self.micro_batch_size
        if self.for_gpu:
            return (count, height, width, channels), torch.uint8
        return (count, channels, height, width), torch.float32
