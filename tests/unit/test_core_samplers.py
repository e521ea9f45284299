"""Samplers: one step against formulas, whole chains against the moments of the linear recursion."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from ddpm_core import (
    ReverseProcess,
    SamplerConfig,
    Schedule,
    ScheduleConfig,
    predict_x_start,
    q_posterior,
    respaced_timesteps,
    rng,
    sample,
)
from ddpm_core.samplers import denoise_step
from tests.support.oracles import GaussianData

LINEAR = Schedule.from_config(ScheduleConfig())
COSINE = Schedule.from_config(ScheduleConfig(kind="cosine"))
COSINE_100 = Schedule.from_config(ScheduleConfig(kind="cosine", num_timesteps=100))
SHORT = Schedule.from_config(ScheduleConfig(num_timesteps=20, beta_start=0.005, beta_end=0.7))
DATA = GaussianData(0.25)
SHAPE = (1, 2, 3)
ANCESTRAL_SMALL = SamplerConfig(kind="ancestral", num_steps=None, variance_type="fixed_small", clip=False)
ANCESTRAL_LARGE = SamplerConfig(kind="ancestral", num_steps=None, variance_type="fixed_large", clip=False)
DDIM = SamplerConfig(kind="ddim", num_steps=None, eta=0.0, clip=False)
DDIM_ETA_1 = SamplerConfig(kind="ddim", num_steps=None, eta=1.0, clip=False)


def _some_network(x_t: Tensor, t: Tensor) -> Tensor:
    return torch.sin(3 * x_t) + 0.3 * x_t + 0.001 * t.to(x_t.dtype).reshape(-1, 1, 1, 1)


def _reverse(schedule: Schedule, config: SamplerConfig) -> ReverseProcess:
    return ReverseProcess(schedule, variance_type=config.variance_type, clip=config.clip)


def _slope_and_spread(schedule: Schedule, config: SamplerConfig) -> tuple[Tensor, Tensor]:
    """x_{t−1} = slope·x_t + spread·z at every t for the best network, read from denoise_step itself."""
    num = schedule.num_timesteps
    one = torch.ones(num, 1, 1, 1, dtype=torch.float64)
    t = torch.arange(num)
    eps_star = DATA.eps_theta(schedule)
    slope, _ = denoise_step(_reverse(schedule, config), config, one, t, eps_star(one, t), None)
    spread, _ = denoise_step(_reverse(schedule, config), config, 0 * one, t, 0 * one, one)
    return slope.flatten(), spread.flatten()


@pytest.mark.parametrize("schedule", [LINEAR, COSINE, SHORT], ids=["linear", "cosine", "short"])
@pytest.mark.parametrize("config", [ANCESTRAL_SMALL, ANCESTRAL_LARGE], ids=["small", "large"])
def test_an_ancestral_step_for_gaussian_data(schedule: Schedule, config: SamplerConfig) -> None:
    slope, spread = _slope_and_spread(schedule, config)
    torch.testing.assert_close(slope, DATA.ancestral_slopes(schedule), rtol=1e-8, atol=0)
    a = schedule.alphas.cumprod(0)
    before = torch.cat((a.new_ones(1), a[:-1]))
    variance = schedule.betas.clone()
    if config.variance_type == "fixed_small":
        variance *= (1 - before) / (1 - a)
    variance[0] = 0.0  # Algorithm 2: z = 0 in the last step
    torch.testing.assert_close(spread.square(), variance, rtol=1e-9, atol=1e-16)


@pytest.mark.parametrize("schedule", [LINEAR, COSINE, SHORT], ids=["linear", "cosine", "short"])
def test_a_ddim_step_for_gaussian_data(schedule: Schedule) -> None:
    slope, spread = _slope_and_spread(schedule, DDIM)
    torch.testing.assert_close(slope, DATA.ddim_slopes(schedule), rtol=1e-8, atol=0)
    assert bool((spread == 0).all())


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_a_ddim_step_is_equation_12(eta: float) -> None:
    config = SamplerConfig(kind="ddim", num_steps=None, eta=eta, clip=False)
    generator = torch.Generator().manual_seed(0)
    x_t, eps, z = (torch.randn(4, *SHAPE, generator=generator, dtype=torch.float64) for _ in range(3))
    t = torch.tensor([1, 10, 500, 999])
    a = LINEAR.alphas.cumprod(0)
    a, b = a[t].reshape(4, 1, 1, 1), a[t - 1].reshape(4, 1, 1, 1)
    sigma = eta * ((1 - b) / (1 - a)).sqrt() * (1 - a / b).sqrt()
    x_0 = (x_t - (1 - a).sqrt() * eps) / a.sqrt()
    expected = b.sqrt() * x_0 + (1 - b - sigma**2).sqrt() * eps + sigma * z
    got, pred_x_start = denoise_step(_reverse(LINEAR, config), config, x_t, t, eps, z)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(pred_x_start, x_0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("schedule", [SHORT, COSINE_100], ids=["linear", "cosine"])
def test_ddim_with_eta_1_is_ancestral_fixed_small(schedule: Schedule, clip: bool) -> None:
    index = torch.arange(3)
    images = [
        sample(
            _some_network,
            schedule,
            SamplerConfig(kind=kind, num_steps=None, eta=1.0, variance_type="fixed_small", clip=clip),
            seed=0,
            index=index,
            shape=SHAPE,
            dtype=torch.float64,
        )
        for kind in ("ancestral", "ddim")
    ]
    torch.testing.assert_close(images[0], images[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        ANCESTRAL_SMALL,
        ANCESTRAL_LARGE,
        DDIM,
        DDIM_ETA_1,
        SamplerConfig(kind="ddim", num_steps=7, eta=0.5, clip=False),
        SamplerConfig(kind="ancestral", num_steps=7, variance_type="fixed_small", clip=False),
        SamplerConfig(kind="ancestral", num_steps=7, variance_type="fixed_large", clip=False),
    ],
    ids=lambda c: f"{c.kind}-{c.num_steps}-{c.eta}-{c.variance_type}",
)
def test_output_moments_are_those_of_the_recursion(config: SamplerConfig) -> None:
    """The chain is linear in the noise: its output's variance is the recursion's, and pixels are independent."""
    chain = SHORT.at(respaced_timesteps(20, config.num_steps or 20))
    if config.kind == "ancestral" or config.eta in (0.0, 1.0):
        slopes = DATA.ddim_slopes(chain) if config.eta == 0 and config.kind == "ddim" else None
        slopes = DATA.ancestral_slopes(chain) if slopes is None else slopes
        beta_tilde = chain.betas * (1 - chain.alphas_cumprod_prev) / (1 - chain.alphas_cumprod)
        large = config.kind == "ancestral" and config.variance_type == "fixed_large"
        spreads = chain.betas.clone() if large else beta_tilde
        spreads = spreads * (config.eta**2 if config.kind == "ddim" else 1.0)
        spreads[0] = 0.0
    else:
        slopes, deviations = _slope_and_spread(chain, config)
        spreads = deviations.square()
    variance = 1.0
    for t in reversed(range(chain.num_timesteps)):
        variance = float(slopes[t] ** 2 * variance + spreads[t])

    index = torch.arange(400)
    images = sample(
        DATA.eps_theta(SHORT), SHORT, config, seed=3, index=index, shape=(1, 20, 20), dtype=torch.float64
    )
    count = images.numel()
    assert abs(float(images.mean())) < 5 * math.sqrt(variance / count)
    assert abs(float(images.square().mean()) - variance) < 5 * variance * math.sqrt(2 / count)


def test_the_whole_chain_is_its_recursion_exactly() -> None:
    """Every noise is known by its key, so that the output can be composed by hand."""
    index = torch.tensor([4, 1000])
    got = sample(
        DATA.eps_theta(SHORT), SHORT, ANCESTRAL_LARGE, seed=9, index=index, shape=SHAPE, dtype=torch.float64
    )
    slopes = DATA.ancestral_slopes(SHORT)
    x = rng.normal(9, "sample", index, SHAPE, draw=0, dtype=torch.float64)
    for t in reversed(range(20)):
        x = slopes[t] * x
        if t:
            x = x + SHORT.betas[t].sqrt() * rng.normal(9, "sample", index, SHAPE, draw=t + 1, dtype=x.dtype)
    torch.testing.assert_close(got, x, rtol=1e-9, atol=1e-12)


def test_fixed_large_is_right_for_unit_variance_and_fixed_small_falls_short() -> None:
    """Ho et al., section 3.2: β is the best variance for x_0 ~ N(0, I), so that this chain ends at variance 1."""
    unit = GaussianData(1.0)
    variances = {}
    for name, spreads in (("large", LINEAR.betas), ("small", LINEAR.posterior_variance)):
        variance = 1.0
        for t in reversed(range(1000)):
            variance = float(unit.ancestral_slopes(LINEAR)[t] ** 2 * variance + (spreads[t] if t else 0.0))
        variances[name] = variance
    assert variances["large"] == pytest.approx(1.0, abs=2e-4)
    assert variances["small"] < variances["large"]


def test_ddim_converges_to_the_probability_flow_at_first_order() -> None:
    """For Gaussian data the flow keeps x_t/√Var(x_t): the image is x_T·√(s²/Var(x_T))."""
    index = torch.tensor([0])
    exact = math.sqrt(DATA.variance / float(DATA.marginal_variance(COSINE)[-1]))
    errors = []
    for num_steps in (25, 50, 100):
        config = SamplerConfig(num_steps=num_steps, clip=False)
        image = sample(
            DATA.eps_theta(COSINE), COSINE, config, seed=0, index=index, shape=SHAPE, dtype=torch.float64
        )
        start = rng.normal(0, "sample", index, SHAPE, dtype=torch.float64)
        errors.append(abs(float((image / start).mean()) - exact))
    for coarse, fine in itertools.pairwise(errors):
        assert 1.7 < coarse / fine < 2.4


def test_an_ancestral_mean_is_the_posterior_mean_at_the_clipped_pred_x_start() -> None:
    generator = torch.Generator().manual_seed(0)
    x_t, eps = (2 * torch.randn(3, *SHAPE, generator=generator) for _ in range(2))
    t = torch.tensor([0, 30, 999])
    config = SamplerConfig(kind="ancestral")
    got, pred_x_start = denoise_step(_reverse(LINEAR, config), config, x_t, t, eps, None)
    clipped = predict_x_start(LINEAR, x_t, t, eps).clamp(-1, 1)
    assert torch.equal(pred_x_start, clipped)
    assert torch.equal(got, q_posterior(LINEAR, clipped, x_t, t)[0])
