"""A short training run, whole: initialisation, t, ε, the network, the loss, Adam and the EMA together."""

import pytest
import torch

from ddpm_core import EMA, Schedule, ScheduleConfig, UNet, UNetConfig, draw_timesteps, rng, simple_loss

LOSSES = [
    1.028677,
    0.881544,
    0.912878,
    0.845930,
    0.822753,
    0.659573,
    0.698438,
    0.547502,
    0.523073,
    0.495723,
    0.376644,
    0.388903,
]
EMA_NORM = 42.71147


def test_loss_curve() -> None:
    torch.manual_seed(0)
    net = UNet(
        UNetConfig(
            8,
            1,
            base_channels=16,
            channel_mults=(1, 2),
            num_res_blocks=1,
            attention_resolutions=(4,),
            dropout=0.0,
            num_groups=8,
        )
    )
    schedule = Schedule.from_config(ScheduleConfig(kind="cosine"))
    ema = EMA(net, decay=0.9, warmup=True)
    optimiser = torch.optim.Adam(net.parameters(), lr=2e-3)
    losses = []
    for step in range(12):
        index = torch.arange(16) + 16 * step
        x_start = rng.uniform(0, "image", index % 32, (1, 1, 1)).expand(16, 1, 8, 8) * 2 - 1
        noise = rng.normal(0, "noise", index, (1, 8, 8))
        loss = simple_loss(net, schedule, x_start, draw_timesteps(schedule, 0, index), noise).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        ema.update(net, step)
        losses.append(float(loss.detach()))
    assert losses == pytest.approx(LOSSES, rel=1e-3)
    norm = torch.stack([tensor.norm() for tensor in ema.tensors.values()]).norm()
    assert float(norm) == pytest.approx(EMA_NORM, rel=1e-4)
