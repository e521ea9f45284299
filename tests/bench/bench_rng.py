"""The noise of a training step: against the step itself, torch.randn and the plain form, on one thread.

Figures are medians with quartiles. The step is forward, backward and Adam of one small batch, and the noise is
that batch's: at a larger batch both grow alike, and what is fixed in the noise's cost weighs less.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ddpm_core import UNet, UNetConfig, rng
from tests.bench.timing import in_turns
from tests.support import rng_reference

_IMAGE = (3, 32, 32)


def main(rounds: int = 20, step_rounds: int = 5, step_batch: int = 8) -> None:
    torch.set_num_threads(1)
    for batch in (128, 64, step_batch):
        index = torch.arange(batch)
        ours, peer, ratio = in_turns(_noise(index), _randn(batch), rounds)
        print(
            f"rng:    normal [{batch}, 3, 32, 32] {ours.text(1e3)} ms, torch.randn {peer.text(1e3)} ms: "
            f"{1 / ratio.median:.1f}× its time"
        )
        _, plain, ratio = in_turns(_noise(index), _plain(index), rounds)
        print(f"rng:    the plain form {plain.text(1e3)} ms: ours is {ratio.text()}× as fast")
    for base in (64, 128):
        step, parameters = _step(base, step_batch)
        ours, peer, ratio = in_turns(_noise(torch.arange(step_batch)), step, step_rounds)
        print(
            f"rng:    {100 / ratio.median:.3f} % of a training step of {parameters / 1e6:.1f} M parameters "
            f"at batch {step_batch} ({ours.text(1e3)} of {peer.text(1e3, 0)} ms)"
        )


def _noise(index: torch.Tensor) -> Callable[[], object]:
    return lambda: rng.normal(0, "noise", index, _IMAGE)


def _plain(index: torch.Tensor) -> Callable[[], object]:
    return lambda: rng_reference.normal(0, "noise", index, _IMAGE)


def _randn(batch: int) -> Callable[[], object]:
    return lambda: torch.randn(batch, *_IMAGE)


def _step(base_channels: int, batch: int) -> tuple[Callable[[], object], int]:
    """A training step, and how many parameters it trains."""
    net = UNet(UNetConfig(32, 3, base_channels=base_channels))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-6)
    x_t, noise = torch.randn(batch, *_IMAGE), torch.randn(batch, *_IMAGE)
    t = torch.randint(0, 1000, (batch,))

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        (net(x_t, t) - noise).square().mean().backward()
        optimizer.step()

    return step, sum(parameter.numel() for parameter in net.parameters())


if __name__ == "__main__":
    main()
