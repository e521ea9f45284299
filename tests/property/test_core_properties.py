"""What must hold for every schedule, timestep and index."""

from dataclasses import replace
from typing import get_args

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_core import (
    BoundAccumulator,
    ReverseProcess,
    Schedule,
    ScheduleConfig,
    discretized_gaussian_log_likelihood,
    predict_eps,
    predict_x_start,
    q_posterior,
    q_sample,
    respaced_timesteps,
    rng,
)
from ddpm_core.betas import ScheduleKind
from ddpm_core.paths import log_q_backward, log_q_forward
from ddpm_core.processes import process_from_log_snr
from ddpm_core.schedules import rescale_zero_terminal_snr

PROFILE = settings(max_examples=40, deadline=None)


@st.composite
def schedules(draw: st.DrawFn, max_timesteps: int = 60) -> Schedule:
    """Of every kind that ends with some signal, so that ε can be predicted."""
    num = draw(st.integers(1, max_timesteps))
    kind = draw(st.sampled_from([name for name in get_args(ScheduleKind) if name != "inverse"]))
    start = draw(st.floats(1e-5, 0.1))
    config = ScheduleConfig(num_timesteps=num, beta_start=start, beta_end=draw(st.floats(start, 0.9)))
    if kind == "linear_scaled":
        scale = num / 1000
        config = replace(config, beta_start=start * scale, beta_end=config.beta_end * scale)
    betas = Schedule.from_config(config).betas if kind in ("betas", "alphas_cumprod") else torch.ones(0)
    return Schedule.from_config(
        replace(
            config,
            kind=kind,
            warmup_fraction=draw(st.floats(0.01, 1.0)),
            sigmoid_tau=draw(st.floats(0.3, 1.5)),
            log_snr_max=draw(st.floats(1.0, 20.0)),
            log_snr_min=draw(st.floats(-20.0, 0.0)),
            betas=tuple(betas.tolist()),
            alphas_cumprod=tuple((1.0 - betas).cumprod(0).tolist()),
        )
    )


@PROFILE
@given(schedules())
def test_tables_are_ordered(schedule: Schedule) -> None:
    a = schedule.alphas_cumprod
    assert bool(((a > 0) & (a < 1)).all())
    assert bool((a.diff() < 0).all())
    assert bool((schedule.log_snr.diff() < 0).all())
    # β̃ lies between 0 and β, and the posterior's mean between its two sources.
    assert bool((schedule.posterior_variance <= schedule.betas).all())
    assert bool((schedule.posterior_mean_coef1 > 0).all())
    assert bool((schedule.posterior_mean_coef2 >= 0).all())


@PROFILE
@given(schedules(), st.data())
def test_respacing_twice_is_respacing_once(schedule: Schedule, data: st.DataObject) -> None:
    num_steps = data.draw(st.integers(1, schedule.num_timesteps))
    timesteps = respaced_timesteps(schedule.num_timesteps, num_steps)
    assert timesteps.tolist() == sorted(set(timesteps.tolist()))
    assert int(timesteps[-1]) == schedule.num_timesteps - 1
    once = schedule.at(timesteps)
    # β = 1 − ᾱ is kept to half a unit of its last place, 1.1e-16, which a tiny ᾱ feels
    torch.testing.assert_close(
        once.alphas_cumprod, schedule.alphas_cumprod[timesteps], rtol=1e-10, atol=2.3e-16
    )
    fewer = respaced_timesteps(num_steps, data.draw(st.integers(1, num_steps)))
    torch.testing.assert_close(
        once.at(fewer).betas, schedule.at(timesteps[fewer]).betas, rtol=1e-9, atol=1e-12
    )


@PROFILE
@given(schedules())
def test_every_warning_comes_with_advice(schedule: Schedule) -> None:
    for warning in schedule.warnings():
        assert "never saw; " in warning
        assert not warning.endswith("; ")


@PROFILE
@given(schedules())
def test_zero_terminal_snr_keeps_the_first_step_and_the_order(schedule: Schedule) -> None:
    if schedule.num_timesteps == 1:
        return
    ended = rescale_zero_terminal_snr(schedule)
    assert ended.ends_without_signal
    torch.testing.assert_close(ended.betas[0], schedule.betas[0], rtol=1e-12, atol=0)
    assert bool((ended.log_snr.diff() < 0).all())
    assert bool((ended.log_snr <= schedule.log_snr + 1e-12).all())


@PROFILE
@given(schedules(), st.floats(-8, 8), st.integers(0, 2**31))
def test_a_scale_moves_both_path_laws_by_the_same(schedule: Schedule, scale: float, seed: int) -> None:
    """In other units the density of a path changes by T·D·scale, and both factorisations still agree."""
    num = schedule.num_timesteps
    process = process_from_log_snr(schedule.log_snr, torch.full_like(schedule.log_snr, scale))
    x_start = rng.normal(seed, "x", torch.arange(2), (3,), dtype=torch.float64)
    path = rng.normal(seed, "path", torch.arange(2 * num), (3,), dtype=torch.float64).reshape(num, 2, 3)
    expected = log_q_forward(schedule, x_start, path) - num * 3 * scale
    moved = path * process.total_variance.sqrt().reshape(-1, 1, 1)
    torch.testing.assert_close(log_q_forward(process, x_start, moved), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(log_q_backward(process, x_start, moved), expected, rtol=1e-9, atol=1e-9)


@PROFILE
@given(schedules(), st.integers(0, 2**31), st.data())
def test_the_forward_process_is_inverted(schedule: Schedule, seed: int, data: st.DataObject) -> None:
    t = torch.tensor([data.draw(st.integers(0, schedule.num_timesteps - 1)) for _ in range(3)])
    index = torch.arange(3)
    x_start = rng.uniform(seed, "x", index, (2, 3), dtype=torch.float64) * 2 - 1
    noise = rng.normal(seed, "noise", index, (2, 3), dtype=torch.float64)
    x_t = q_sample(schedule, x_start, t, noise)
    scale = float(schedule.sqrt_recip_alphas_cumprod[t].max())
    torch.testing.assert_close(
        predict_x_start(schedule, x_t, t, noise), x_start, rtol=1e-9, atol=1e-13 * scale
    )
    torch.testing.assert_close(predict_eps(schedule, x_t, t, x_start), noise, rtol=1e-7, atol=1e-7)
    mean, variance, log_variance = q_posterior(schedule, x_start, x_t, t)
    assert mean.shape == x_t.shape
    assert bool((variance[t > 0] > 0).all())
    torch.testing.assert_close(log_variance[t > 0].exp(), variance[t > 0])


@PROFILE
@given(st.integers(2, 300), st.floats(-3, 3), st.floats(-10, 3))
def test_decoder_masses_sum_to_one(levels: int, mean: float, log_scale: float) -> None:
    x = torch.linspace(-1, 1, levels, dtype=torch.float64)
    got = discretized_gaussian_log_likelihood(
        x, torch.full_like(x, mean), torch.tensor(log_scale, dtype=torch.float64), levels
    )
    assert bool((got <= 1e-12).all())
    assert abs(float(got.exp().sum()) - 1.0) < 1e-11


@PROFILE
@given(
    st.integers(-(2**70), 2**70),
    st.text(max_size=20),
    st.lists(st.integers(0, 2**62), min_size=1, max_size=6),
    st.integers(0, 2**32 - 1),
    st.integers(0, 9),
    st.randoms(use_true_random=False),
)
def test_random_numbers_ignore_the_batch(seed, purpose, keys, draw, size, random) -> None:
    index = torch.tensor(keys)
    values = rng.normal(seed, purpose, index, (size,), draw=draw)
    order = list(range(len(keys)))
    random.shuffle(order)
    some = order[: random.randint(1, len(order))]
    assert torch.equal(rng.normal(seed, purpose, index[some], (size,), draw=draw), values[some])
    assert bool(values.isfinite().all())


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-12, 0.999))
def test_the_first_step_loses_all_of_what_the_data_have(beta: float) -> None:
    """β_0/(1 − ᾱ_0) is 1, and not the next number above it, whose complement has no root."""
    schedule = Schedule.from_betas(torch.tensor([beta, 0.5], dtype=torch.float64))
    assert float(schedule.snr_loss[0]) == 1.0
    assert bool((schedule.snr_loss <= 1).all())


@settings(max_examples=15, deadline=None)
@given(schedules(max_timesteps=12), st.integers(1, 15), st.integers(1, 4), st.randoms(use_true_random=False))
def test_the_bound_ignores_the_division_of_images(schedule, num_strata, num_workers, random) -> None:
    def accumulator() -> BoundAccumulator:
        return BoundAccumulator(
            ReverseProcess(schedule, variance_type="fixed_large"), levels=5, num_strata=num_strata, seed=1
        )

    images = torch.linspace(-1, 1, 5, dtype=torch.float64)[torch.arange(9 * 4) % 5].reshape(9, 1, 2, 2)
    index = torch.arange(9) * 10**9
    whole = accumulator()
    whole.add(lambda x, t: 0.5 * x, images, index)
    owner = torch.tensor([random.randrange(num_workers) for _ in range(9)])
    state = torch.zeros_like(whole.state())
    for worker in range(num_workers):
        part = accumulator()
        part.add(lambda x, t: 0.5 * x, images[owner == worker], index[owner == worker])
        state += part.state()
    torch.testing.assert_close(state, whole.state(), rtol=1e-10, atol=1e-12)
