"""A training step of the digits' network against its floor: forward, backward and Adam on the same batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipelines.config import Config, load_config
from pipelines.precision import Autocast
from pipelines.training import Learner
from pipelines.world import SingleWorker
from tests.bench.timing import Quartiles, in_turns


@dataclass(frozen=True)
class _Part:
    stream: int
    index: torch.Tensor
    x_start: torch.Tensor
    label: torch.Tensor


def main() -> None:
    torch.set_num_threads(1)
    ours, floor, ratio = loop_and_floor(load_config("digits.yaml"), 20, torch.device("cpu"))
    print(f"step:   {ours.text(1e3, 1)} ms; forward, backward, Adam and EMA alone {floor.text(1e3, 1)} ms")
    print(
        f"step:   {1 / ratio.median:.3f}× the floor's time (t, ε, x_t, loss and clipping are what is over 1)"
    )


def loop_and_floor(
    config: Config, rounds: int, device: torch.device
) -> tuple[Quartiles, Quartiles, Quartiles]:
    """Seconds of a step of the training loop and of the bare step that it cannot do without, and their ratio."""
    size = config.train.batch_size // config.train.micro_batches
    shape = (size, config.model.in_channels, config.model.image_size, config.model.image_size)
    parts = [
        _Part(
            m,
            torch.arange(m, size * 4, 4)[:size],
            _pinned(torch.rand(shape) * 2 - 1, device),
            torch.full((size,), -1),
        )
        for m in range(config.train.micro_batches)
    ]
    world = SingleWorker(device)
    learner, bare = Learner(config, device), Learner(config, device)
    t = torch.randint(0, config.schedule.num_timesteps, (size,), device=device)
    x, noise = torch.randn(2, *shape, device=device)
    autocast = Autocast(config.train.precision, device)

    def floor() -> None:
        bare.optimizer.zero_grad(set_to_none=False)
        for _ in parts:
            with autocast():
                eps = bare.model(x, t)
            (eps - noise).square().mean().backward()
        bare.optimizer.step()
        bare.ema.update(bare.model, 0)
        if device.type == "cuda":
            # as the loop does, which reads the loss
            torch.cuda.synchronize()

    return in_turns(lambda: learner.step(0, parts, world), floor, rounds)


def _pinned(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """As the reader hands them over."""
    return images.pin_memory() if device.type == "cuda" else images


if __name__ == "__main__":
    main()
