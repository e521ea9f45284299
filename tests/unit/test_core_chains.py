"""Chains in continuous time, and Karras' spacing."""

import math

import pytest
import torch
from torch import Tensor

from ddpm_core import SamplerConfig, Schedule, ScheduleConfig, sample
from ddpm_core.chains import karras_log_snr, karras_timesteps, nearest_timesteps, retimed
from ddpm_core.processes import process_from_log_snr
from ddpm_core.samplers import SAMPLER_KINDS, visited_timesteps

LINEAR = Schedule.from_config(ScheduleConfig())
COSINE = Schedule.from_config(ScheduleConfig(kind="cosine"))
SHORT = Schedule.from_config(ScheduleConfig(num_timesteps=20, beta_start=0.005, beta_end=0.7))
SILENT = Schedule(torch.cat((SHORT.betas[:-1], torch.ones(1, dtype=torch.float64))))  # zero terminal SNR
SHAPE = (2, 3, 4)


def _some_network(x_t: Tensor, t: Tensor) -> Tensor:
    return torch.sin(3 * x_t) + 0.3 * x_t + 0.001 * t.to(x_t.dtype).reshape(-1, 1, 1, 1)


def test_karras_log_snr_is_equation_5() -> None:
    low, high, count, rho = 0.002, 80.0, 18, 7.0
    got = torch.exp(-0.5 * karras_log_snr(-2 * math.log(low), -2 * math.log(high), count, rho))
    i = torch.arange(count, dtype=torch.float64)
    expected = (high ** (1 / rho) + i / (count - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    torch.testing.assert_close(got, expected.flip(0), rtol=1e-10, atol=0)
    assert karras_log_snr(3.0, -4.0, 1).tolist() == [-4.0]
    assert karras_log_snr(3.0, -4.0, 9)[[0, -1]].tolist() == pytest.approx([3.0, -4.0], abs=1e-12)


@pytest.mark.parametrize(
    "schedule", [LINEAR, COSINE, SHORT, SILENT], ids=["linear", "cosine", "short", "silent"]
)
@pytest.mark.parametrize("num_steps", [1, 2, 5, 18, 20])
def test_karras_timesteps(schedule: Schedule, num_steps: int) -> None:
    got = karras_timesteps(schedule, num_steps)
    assert got.dtype == torch.int64
    assert got.shape == (num_steps,)
    assert bool((got.diff() > 0).all())
    assert int(got[-1]) == schedule.num_timesteps - 1
    if num_steps > 1 + int(schedule is SILENT):
        assert int(got[0]) == 0
    if schedule.num_timesteps == num_steps:
        assert got.tolist() == list(range(num_steps))
    if schedule.num_timesteps == 1000 and num_steps > 1:
        points = karras_log_snr(float(schedule.log_snr[0]), float(schedule.log_snr[-1]), num_steps)
        nearest = (schedule.log_snr[:, None] - points).abs().argmin(0)
        # σ up to 20,000 leaves the last timesteps of the cosine schedule to several points each
        if len(nearest.unique()) == num_steps:
            assert got.tolist() == nearest.tolist()
        assert len(nearest.unique()) == num_steps or schedule is COSINE


def test_karras_timesteps_are_different_where_points_are_close() -> None:
    for rho in (0.5, 1.0, 7.0, 50.0):
        for count in (200, 999, 1000):
            got = karras_timesteps(LINEAR, count, rho)
            assert bool((got.diff() > 0).all())
            assert (int(got[0]), int(got[-1])) == (0, 999)


def test_nearest_timesteps() -> None:
    log_snr = torch.cat((SILENT.log_snr, SILENT.log_snr[:-1] + 1e-6, torch.tensor([99.0, -99.0, -math.inf])))
    at_each = list(range(20))
    assert nearest_timesteps(SILENT, log_snr).tolist() == at_each + at_each[:-1] + [0, 18, 19]
    assert nearest_timesteps(SHORT, torch.tensor([-99.0], dtype=torch.float64)).tolist() == [19]
    assert nearest_timesteps(Schedule(torch.tensor([0.5])), torch.tensor([1.0, -3.0])).tolist() == [0, 0]


def test_a_continuous_chain_through_a_schedule_s_points_is_the_schedule() -> None:
    """A network of t, asked at the nearest, and one of the log-SNR give the images of the schedule itself."""
    points = LINEAR.log_snr[visited_timesteps(LINEAR, SamplerConfig(num_steps=8))]
    chain = process_from_log_snr(points)
    torch.testing.assert_close(chain.a.square() + chain.b.square(), torch.ones(8, dtype=torch.float64))

    def by_log_snr(x_t: Tensor, log_snr: Tensor) -> Tensor:
        assert log_snr.is_floating_point()
        return _some_network(x_t, nearest_timesteps(LINEAR, log_snr))

    for kind in SAMPLER_KINDS:
        expected = sample(
            _some_network,
            LINEAR,
            SamplerConfig(kind=kind, num_steps=8),
            seed=0,
            index=torch.arange(2),
            shape=SHAPE,
            dtype=torch.float64,
        )
        for network in (
            retimed(_some_network, nearest_timesteps(LINEAR, points)),
            retimed(by_log_snr, chain.log_snr),
        ):
            got = sample(
                network,
                chain,
                SamplerConfig(kind=kind, num_steps=None),
                seed=0,
                index=torch.arange(2),
                shape=SHAPE,
                dtype=torch.float64,
            )
            if kind in ("ddim", "dpm_solver_pp_2m", "heun"):  # no noise after x_T: the same draws
                torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
            assert got.shape == expected.shape


def test_errors_name_the_argument() -> None:
    for name, largest, smallest, num_points, rho in [
        ("largest", -5.0, -4.0, 3, 7.0),
        ("smallest", 3.0, -math.inf, 3, 7.0),
        ("num_points", 3.0, -4.0, 0, 7.0),
        ("rho", 3.0, -4.0, 3, math.nan),
    ]:
        with pytest.raises(ValueError, match=rf"^{name}: must be "):
            karras_log_snr(largest, smallest, num_points, rho)
    with pytest.raises(ValueError, match=r"^log_snr: must be finite .* and fall strictly"):
        process_from_log_snr(torch.tensor([1.0, 1.0]))
    with pytest.raises(ValueError, match=r"^log_snr: must be a floating-point"):
        process_from_log_snr(torch.tensor([2, 1]))
