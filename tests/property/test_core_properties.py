"""What must hold for every schedule, timestep and index."""

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
    respace,
    rng,
    sampling_timesteps,
)

PROFILE = settings(max_examples=40, deadline=None)


@st.composite
def schedules(draw: st.DrawFn, max_timesteps: int = 60) -> Schedule:
    num_timesteps = draw(st.integers(1, max_timesteps))
    if draw(st.booleans()):
        return Schedule.from_config(ScheduleConfig(kind="cosine", num_timesteps=num_timesteps))
    start = draw(st.floats(1e-5, 0.1))
    end = draw(st.floats(start, 0.9))
    return Schedule.from_config(ScheduleConfig(num_timesteps=num_timesteps, beta_start=start, beta_end=end))


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
    timesteps = sampling_timesteps(schedule.num_timesteps, num_steps)
    assert timesteps.tolist() == sorted(set(timesteps.tolist()))
    assert int(timesteps[-1]) == schedule.num_timesteps - 1
    once = respace(schedule, timesteps)
    # β = 1 − ᾱ is kept to half a unit of its last place, 1.1e-16, which a tiny ᾱ feels
    torch.testing.assert_close(
        once.alphas_cumprod, schedule.alphas_cumprod[timesteps], rtol=1e-10, atol=2.3e-16
    )
    fewer = sampling_timesteps(num_steps, data.draw(st.integers(1, num_steps)))
    torch.testing.assert_close(
        respace(once, fewer).betas, respace(schedule, timesteps[fewer]).betas, rtol=1e-9, atol=1e-12
    )


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
