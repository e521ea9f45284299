"""What a training run would do and need, computed without doing it."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_core.networks import build_network
from ddpm_core.schedules import Schedule
from pipelines.checkpoints import Checkpoints
from pipelines.config_sections import Network
from pipelines.reader_process import steps_in_memory
from pipelines.shard_reader import SPARE_SHARDS
from pipelines.train import Run, what_to_read

# float32
_BYTES_A_PARAMETER = 4
_MIB = 2**20


def training_plan(run: Run) -> str:
    """Data, steps, memory and output prefix, as text for a person."""
    config, settings, dataset = run.config, run.config.train, run.dataset
    train_images, test_images = dataset.count("train"), dataset.count("test")
    parameters, activations = network_bytes(config.model)
    micro_batch = settings.batch_size // settings.micro_batches
    # weights, gradient, Adam's two moments, EMA
    copies = 5 + len(config.ema.power_sigma_rels)
    state = parameters * copies * _BYTES_A_PARAMETER
    largest = max(shard.num_bytes for shard in dataset.shards("train"))
    shards = config.data.cache_bytes + SPARE_SHARDS * min(largest, config.data.cache_bytes)
    workers = config.workers
    # the last worker takes as many micro-batches as any
    reading = what_to_read(run, workers.num - 1, workers.num, 0, for_gpu=workers.gpus > 0)
    images = steps_in_memory(reading) * reading.step_bytes
    reader = ", some 300 MiB for the process that reads" if config.data.reader == "process" else ""
    steps = Checkpoints(run.storage).steps()
    done = steps[-1] if steps else 0
    schedule = Schedule.from_config(config.schedule)
    lines = [
        f"run        {run.name}",
        f"data       {dataset.uri}: {train_images} training and {test_images} held-out images, "
        f"{'×'.join(map(str, dataset.shape))}, {dataset.levels} levels, "
        f"{sum(s.num_bytes for s in dataset.shards('train')) / _MIB:.1f} MiB in "
        f"{len(dataset.shards('train'))} shards",
        f"schedule   {config.schedule.kind}, T = {schedule.num_timesteps}, "
        f"log-SNR {float(schedule.log_snr[0]):.2f} … {float(schedule.log_snr[-1]):.2f}",
        f"model      {parameters:,} parameters",
        f"steps      {done} done, {max(0, settings.steps - done)} to go; "
        f"{settings.steps * settings.batch_size / train_images:.1f} epochs in all",
        f"batch      {settings.batch_size} = {settings.micro_batches} micro-batches of {micro_batch}, "
        f"over {workers.num} workers",
        f"memory     a worker: about {state / _MIB:.0f} MiB of state, "
        f"{activations * micro_batch / _MIB:.0f} MiB of activations, "
        f"up to {shards / _MIB:.0f} MiB of shards, {images / _MIB:.0f} MiB of images{reader}",
        f"output     {run.storage.uri}",
    ]
    if config.data.stages:
        lines.insert(2, f"stages     {', '.join(stage.name for stage in config.data.stages)}")
    return "\n".join([*lines, *(f"warning    {warning}" for warning in schedule.warnings())])


def network_bytes(config: Network) -> tuple[int, int]:
    """Number of parameters, and bytes that one image's forward pass keeps for the backward pass.

    Traced on the meta device: shapes only, nothing is computed or allocated.
    """
    with torch.device("meta"):
        model = build_network(config)
    kept: dict[int, tuple[Tensor, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        # the tensor is held so that its storage's address is not given to another
        kept.setdefault(key, (tensor, tensor.untyped_storage().nbytes()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x = torch.zeros(1, config.in_channels, config.image_size, config.image_size, device="meta")
        noise_level = torch.int64 if config.conditioning == "timestep" else torch.float32
        model(x, torch.zeros(1, dtype=noise_level, device="meta"))
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    activations = sum(num_bytes for key, (_, num_bytes) in kept.items() if key not in weights)
    return sum(parameter.numel() for parameter in model.parameters()), activations
