"""Values of the schedules and the posterior computed elsewhere in float64, to 1e-9 relative."""

import math

import pytest
import torch

from ddpm_core import Schedule, ScheduleConfig, rng

LINEAR_1000 = ScheduleConfig()
LINEAR_4000 = ScheduleConfig(num_timesteps=4000, beta_start=0.25e-4, beta_end=0.005)
LINEAR_SCALED_4000 = ScheduleConfig("linear_scaled", 4000)
SCALED_LINEAR_1000 = ScheduleConfig("scaled_linear", beta_start=0.00085, beta_end=0.012)
COSINE_1000 = ScheduleConfig(kind="cosine")
COSINE_4000 = ScheduleConfig(kind="cosine", num_timesteps=4000)


@pytest.mark.parametrize(
    ("config", "first", "middle", "last", "last_log_snr"),
    [
        (LINEAR_1000, 0.9999, 0.077796658365, 4.0358297653756754e-05, -10.117673),
        (LINEAR_4000, 0.999975, 0.0787464752, 4.2466522758e-5, -10.066752),
        (LINEAR_SCALED_4000, 0.999975, 0.0787464752, 4.2466522758e-5, -10.066752),
        (SCALED_LINEAR_1000, 0.99915, 0.276332683823, 0.00466009851308, -5.364048),
        (COSINE_1000, 0.999958715775, 0.492285172449, 2.42876690703e-9, -19.835882),
        (COSINE_4000, 0.999990134181, 0.493453979674, 1.51798046885e-10, -22.608470),
    ],
)
def test_alphas_cumprod(
    config: ScheduleConfig, first: float, middle: float, last: float, last_log_snr: float
) -> None:
    schedule = Schedule.from_config(config)
    table = schedule.alphas_cumprod
    assert table.dtype == torch.float64
    assert float(table[0]) == pytest.approx(first, rel=1e-9, abs=0)
    assert float(table[config.num_timesteps // 2]) == pytest.approx(middle, rel=1e-9, abs=0)
    assert float(table[-1]) == pytest.approx(last, rel=1e-9, abs=0)
    assert float(schedule.log_snr[-1]) == pytest.approx(last_log_snr, abs=5e-7)


def test_scaled_linear_given_as_betas() -> None:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    schedule = Schedule.from_betas(betas)
    assert float(schedule.alphas_cumprod[0]) == pytest.approx(0.99915, rel=1e-9, abs=0)
    assert float(schedule.alphas_cumprod[500]) == pytest.approx(0.276332683823, rel=1e-9, abs=0)
    assert float(schedule.alphas_cumprod[-1]) == pytest.approx(0.00466009851308, rel=1e-9, abs=0)
    assert float(schedule.log_snr[-1]) == pytest.approx(-5.364048, abs=5e-7)


def test_cosine_betas() -> None:
    betas = Schedule.from_config(COSINE_1000).betas
    assert float(betas[0]) == pytest.approx(4.128422482e-5, rel=1e-9, abs=0)
    assert int((betas == 0.999).sum()) == 1
    assert float(betas[-1]) == 0.999


@pytest.mark.parametrize(("num_timesteps", "last"), [(100, 0.36356), (200, 0.13218), (500, 0.0063527)])
def test_a_fixed_beta_range_with_few_steps(num_timesteps: int, last: float) -> None:
    schedule = Schedule.from_config(ScheduleConfig(num_timesteps=num_timesteps))
    assert float(schedule.alphas_cumprod[-1]) == pytest.approx(last, rel=3e-5, abs=0)


def test_rescaling_the_range_breaks_the_other_way() -> None:
    assert float(Schedule.from_config(ScheduleConfig("linear_scaled", 20)).betas[-1]) == 1.0
    with pytest.raises(ValueError, match=r"^beta_end: must be at most 0.01 .*, got 0.02$"):
        ScheduleConfig("linear_scaled", 10)


def test_zero_noise_of_a_product_in_bfloat16() -> None:
    """What the tables are kept in float64 for: ᾱ cast to bf16 leaves no noise at ten timesteps, gather at none."""
    schedule = Schedule.from_config(LINEAR_1000)
    assert int((1 - schedule.alphas_cumprod.to(torch.bfloat16) == 0).sum()) == 10
    like = torch.zeros(1000, 1, dtype=torch.bfloat16)
    gathered = schedule.gather(schedule.sqrt_one_minus_alphas_cumprod, torch.arange(1000), like)
    assert int((gathered == 0).sum()) == 0


def test_posterior() -> None:
    schedule = Schedule.from_config(LINEAR_1000)
    for t, coef1, coef2, variance in [
        (1, 0.54529149951, 0.454708498991, 5.4531876613e-5),
        (500, 0.00305805707563, 0.994104350757, 0.0100513357789),
    ]:
        assert float(schedule.posterior_mean_coef1[t]) == pytest.approx(coef1, rel=1e-9, abs=0)
        assert float(schedule.posterior_mean_coef2[t]) == pytest.approx(coef2, rel=1e-9, abs=0)
        assert float(schedule.posterior_variance[t]) == pytest.approx(variance, rel=1e-9, abs=0)
    assert float(schedule.posterior_variance[487]) == pytest.approx(0.00979157, rel=1e-6, abs=0)
    assert float(schedule.posterior_variance[0]) == 0.0
    for t in (0, 1):
        assert float(schedule.posterior_log_variance_clipped[t]) == pytest.approx(
            -9.8167251353, rel=1e-9, abs=0
        )


@pytest.mark.parametrize(
    ("num_timesteps", "x", "bits"), [(1000, 0.5, 7.2787e-6), (1000, 1.0, 2.9113e-5), (100, 0.5, 0.129264)]
)
def test_prior_term(num_timesteps: int, x: float, bits: float) -> None:
    schedule = Schedule.from_config(ScheduleConfig(num_timesteps=num_timesteps))
    got = schedule.prior_bits_per_dim(torch.full((2, 3, 4, 4), x, dtype=torch.float64))
    assert got.tolist() == pytest.approx([bits] * 2, rel=1e-4, abs=0)


def test_prior_term_does_not_cancel_at_the_cosine_end_point() -> None:
    last = 2.42876690703e-9
    schedule = Schedule.from_config(COSINE_1000)
    got = schedule.prior_bits_per_dim(torch.zeros(1, 1, dtype=torch.float64))
    assert float(got) == pytest.approx(last**2 / 4 / math.log(2), rel=1e-8, abs=0)


def test_random_numbers_do_not_change_between_versions() -> None:
    """Runs are functions of their seed: whoever changes these values breaks the repetition of every old run."""
    index = torch.tensor([0, 1, 2**40 + 3])
    normal = rng.normal(7, "noise", index, (2,), dtype=torch.float64)
    assert normal.flatten().tolist() == pytest.approx(GOLDEN_NORMAL, abs=1e-12)
    assert rng.uniform(7, "flip", index).tolist() == GOLDEN_UNIFORM
    assert rng.integers(7, "timestep", index, 1000).tolist() == GOLDEN_INTEGERS
    assert rng.derive_seed(7, "dropout", 12, 3) == GOLDEN_SEED


GOLDEN_NORMAL = [
    0.7219353914260864,
    -0.9212231636047363,
    -0.35786938667297363,
    -0.0013684435980394483,
    0.039005644619464874,
    -0.2818056344985962,
]
GOLDEN_UNIFORM = [0.8185933232307434, 0.012582480907440186, 0.7301169037818909]
GOLDEN_INTEGERS = [97, 172, 434]
GOLDEN_SEED = 7582758754677348610
