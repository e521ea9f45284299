"""Networks by configuration, as ε_θ(x_t, t) for samplers and bounds, and what tells them the noise level."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpm_core.conditioning import log_snr_embedding, timestep_embedding
from ddpm_core.dit import DiT, DiTConfig
from ddpm_core.networks import as_eps_theta, build_network
from ddpm_core.samplers import SamplerConfig, sample
from ddpm_core.schedules import Schedule, ScheduleConfig
from ddpm_core.unet import UNet, UNetConfig

UNET = UNetConfig(8, 1, 8, (1,), 1, (), 0.0, 4)
DIT = DiTConfig(8, 1, 4, 8, 1, 2)
SCHEDULE = Schedule.from_config(ScheduleConfig(num_timesteps=50, beta_end=0.2))


def made(config: Any) -> UNet | DiT:
    net = build_network(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return net


def test_build_network() -> None:
    assert isinstance(build_network(UNET), UNet)
    assert isinstance(build_network(DIT), DiT)
    assert build_network(DIT).config == DIT
    with pytest.raises(ValueError, match=r"^config: must be a UNetConfig or a DiTConfig, got 3"):
        build_network(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [UNET, DIT])
@pytest.mark.parametrize("wrapped", [False, True])
def test_each_conditioning_is_given_its_noise_level(config: Any, wrapped: bool) -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *arguments: Tensor) -> Tensor:
            return torch.as_tensor(self.module(*arguments))

    x_t, t, labels = torch.randn(3, 1, 8, 8), torch.tensor([0, 20, 49]), torch.tensor([0, 2, 1])
    for conditioning in ("timestep", "log_snr"):
        net = made(replace(config, conditioning=conditioning, num_classes=2))
        level = t if conditioning == "timestep" else SCHEDULE.log_snr[t].float()
        called = Wrapper(net) if wrapped else net
        assert torch.equal(as_eps_theta(called, SCHEDULE)(x_t, t), net(x_t, level))
        assert torch.equal(as_eps_theta(called, SCHEDULE, labels)(x_t, t), net(x_t, level, labels))
        again = as_eps_theta(called, SCHEDULE, labels)
        assert torch.equal(again(x_t, t), again(x_t, t))


def test_log_snr_makes_a_network_independent_of_the_schedule_s_steps() -> None:
    """Two schedules that pass through one noise level: the network sees the same there."""
    net = made(replace(UNET, conditioning="log_snr"))
    every = Schedule.from_betas(1 - (1 - SCHEDULE.betas[::2]) * (1 - SCHEDULE.betas[1::2]))
    x_t = torch.randn(2, 1, 8, 8)
    one = as_eps_theta(net, SCHEDULE)(x_t, torch.tensor([1, 49]))
    other = as_eps_theta(net, every)(x_t, torch.tensor([0, 24]))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_sampler_need_not_know() -> None:
    net = made(replace(DIT, conditioning="log_snr"))
    images = sample(
        as_eps_theta(net, SCHEDULE),
        SCHEDULE,
        SamplerConfig(num_steps=5),
        seed=0,
        index=torch.arange(2),
        shape=(1, 8, 8),
    )
    assert images.shape == (2, 1, 8, 8)
    assert bool(images.isfinite().all())


def test_a_learned_variance_is_passed_on() -> None:
    net = made(replace(UNET, learned_variance=True))
    out = as_eps_theta(net, SCHEDULE)(torch.randn(2, 1, 8, 8), torch.tensor([3, 4]))
    assert out.shape == (2, 2, 8, 8)


def test_errors_name_the_argument() -> None:
    net = made(replace(UNET, conditioning="log_snr"))
    x_t = torch.zeros(2, 1, 8, 8)
    for t in (torch.tensor([0, 50]), torch.tensor([0, -1]), torch.tensor([0]), torch.tensor([0.0, 1.0])):
        with pytest.raises(ValueError, match=r"^t: must "):
            as_eps_theta(net, SCHEDULE)(x_t, t)
    with pytest.raises(ValueError, match=r"^network: must have the config .* got Identity with None"):
        as_eps_theta(nn.Identity(), SCHEDULE)
    with pytest.raises(ValueError, match=r"^labels: must be None"):
        as_eps_theta(net, SCHEDULE, torch.tensor([0, 1]))(x_t, torch.tensor([0, 1]))


def test_log_snr_embedding_at_its_ends_and_its_middle() -> None:
    ends = torch.tensor([torch.inf, 0.0, -torch.inf])
    got = log_snr_embedding(ends, 16)
    torch.testing.assert_close(got, timestep_embedding(torch.tensor([0.0, 500.0, 1000.0]), 16))
    assert log_snr_embedding(ends.double(), 16).dtype == torch.float32


def test_log_snr_embedding_tells_noise_levels_apart_wherever_schedules_go() -> None:
    """Neighbouring steps of real schedules stay as far apart as those of the timestep's own embedding do."""
    for kind in ("linear", "cosine"):
        schedule = Schedule.from_config(ScheduleConfig(kind=kind))
        embedded = log_snr_embedding(schedule.log_snr, 128).double()
        steps = (embedded[1:] - embedded[:-1]).norm(dim=1)
        by_t = timestep_embedding(torch.arange(1000), 128).double()
        reference = (by_t[1:] - by_t[:-1]).norm(dim=1)
        assert float(steps.min()) > 0.1 * float(reference.min())
    # one unit of log-SNR is seen over the whole range of common schedules
    levels = log_snr_embedding(torch.arange(-20.0, 21.0), 128)
    assert float((levels[1:] - levels[:-1]).norm(dim=1).min()) > 1.0


def test_log_snr_embedding_is_continuous() -> None:
    levels = torch.linspace(-30, 30, 6001, dtype=torch.float64)
    embedded = log_snr_embedding(levels, 32).double()
    assert float((embedded[1:] - embedded[:-1]).abs().max()) < 0.7
