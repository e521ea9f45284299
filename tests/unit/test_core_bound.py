"""The variational bound: every term in closed form."""

import math

import pytest
import torch
from torch import Tensor

from ddpm_core import (
    ReverseProcess,
    Schedule,
    ScheduleConfig,
    VarianceType,
    bound_term,
    discretized_gaussian_log_likelihood,
    prior_term,
)
from tests.support.oracles import GaussianData, full, symmetric_grid, symmetric_grid_at_every_t

LINEAR = Schedule.from_config(ScheduleConfig())
COSINE = Schedule.from_config(ScheduleConfig(kind="cosine"))
SHORT = Schedule.from_config(ScheduleConfig(num_timesteps=20, beta_start=0.005, beta_end=0.7))
DATA = GaussianData(0.25)
VARIANCE_TYPES: tuple[VarianceType, ...] = ("fixed_small", "fixed_large")


def _levels(levels: int) -> Tensor:
    return torch.linspace(-1, 1, levels, dtype=torch.float64)


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_consistency_terms_in_closed_form(schedule: Schedule, variance_type: VarianceType) -> None:
    x_start, noise, t = symmetric_grid_at_every_t(DATA, schedule)
    terms = bound_term(
        DATA.eps_theta(schedule),
        ReverseProcess(schedule, variance_type=variance_type, clip=False),
        x_start,
        t,
        noise,
        levels=17,
    )
    got = terms.reshape(1000, 4).mean(1)
    expected = DATA.consistency_terms(schedule, variance_type)
    torch.testing.assert_close(got[1:], expected[1:], rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_the_bound_is_the_entropy_plus_the_divergence_of_the_chains(variance_type: VarianceType) -> None:
    """E[−ELBO] = H(data) + KL(q(x_0, ..., x_T) ‖ p_θ(x_0, ..., x_T)), both joint Gaussians, taken whole."""
    num = SHORT.num_timesteps
    eps_star = DATA.eps_theta(SHORT)
    x_start, noise = symmetric_grid(DATA)
    levels = 2**16 + 1  # bins so narrow that a mass is the density times the bin's width
    sigma_squared = ReverseProcess(SHORT, variance_type=variance_type).log_variance_table().exp()
    terms = [
        bound_term(
            eps_star,
            ReverseProcess(SHORT, variance_type=variance_type, clip=False),
            x_start,
            full(t, x_start),
            noise,
            levels=levels,
        ).mean()
        for t in range(num)
    ]
    bound = float(sum(terms) + prior_term(SHORT, x_start).mean()) * math.log(2) + math.log(2 / (levels - 1))

    q = torch.zeros(num + 1, num + 1, dtype=torch.float64)
    p = torch.zeros_like(q)
    q[0, 0], p[num, num] = DATA.variance, 1.0
    for t in range(num):
        step = SHORT.alphas[t].sqrt()
        q[t + 1, : t + 1] = q[: t + 1, t + 1] = step * q[t, : t + 1]
        q[t + 1, t + 1] = SHORT.alphas[t] * q[t, t] + SHORT.betas[t]
    slopes = DATA.ancestral_slopes(SHORT)
    for t in reversed(range(num)):
        p[t, t + 1 :] = p[t + 1 :, t] = slopes[t] * p[t + 1, t + 1 :]
        p[t, t] = slopes[t] ** 2 * p[t + 1, t + 1] + sigma_squared[t]
    kl = 0.5 * (torch.linalg.solve(p, q).trace() - (num + 1) + torch.logdet(p) - torch.logdet(q))
    entropy = 0.5 * math.log(2 * math.pi * math.e * DATA.variance)
    assert bound == pytest.approx(float(kl) + entropy, rel=1e-6)
    assert float(kl) > 0.01


def test_prior_term_is_the_gaussian_divergence() -> None:
    x_start, _ = symmetric_grid(DATA)
    q = torch.distributions.Normal(
        SHORT.alphas_cumprod[-1].sqrt() * x_start.flatten(), (1 - SHORT.alphas_cumprod[-1]).sqrt()
    )
    p = torch.distributions.Normal(torch.zeros(4, dtype=torch.float64), 1.0)
    expected = torch.distributions.kl_divergence(q, p) / math.log(2)
    torch.testing.assert_close(prior_term(SHORT, x_start), expected)


def test_a_term_at_zero_is_the_decoder() -> None:
    x_start = _levels(17)[torch.arange(34) % 17].reshape(2, 1, 1, 17)
    noise = torch.randn(2, 1, 1, 17, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = bound_term(
        lambda x, t: 0.9 * x,
        ReverseProcess(SHORT, variance_type="fixed_small", clip=False),
        x_start,
        full(0, x_start),
        noise,
        levels=17,
    )
    a = SHORT.alphas[0]
    x_1 = a.sqrt() * x_start + (1 - a).sqrt() * noise
    pred_x_start = (x_1 - (1 - a).sqrt() * 0.9 * x_1) / a.sqrt()
    log_scale = 0.5 * SHORT.posterior_variance[1].log()
    nats = -discretized_gaussian_log_likelihood(x_start, pred_x_start, log_scale, 17).flatten(1).mean(1)
    torch.testing.assert_close(got, nats / math.log(2))


def test_terms_of_a_mixed_batch_are_those_of_each_sample() -> None:
    x_start = _levels(17)[torch.arange(51) % 17].reshape(3, 1, 1, 17).float()
    noise = torch.randn(3, 1, 1, 17, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([5, 0, 19])

    def terms(rows: slice) -> Tensor:
        return bound_term(
            _some_network,
            ReverseProcess(SHORT, variance_type="fixed_large"),
            x_start[rows],
            t[rows],
            noise[rows],
            levels=17,
        )

    together = terms(slice(None))
    assert together.dtype == torch.float32
    for row in range(3):
        torch.testing.assert_close(terms(slice(row, row + 1)), together[row : row + 1])


def test_clip_limits_pred_x_start() -> None:
    """A network that is far off: with clip, x̂_0 is ±1, and the term is that of x̂_0 = ±1."""
    x_start = torch.full((2, 1, 2, 2), 0.5, dtype=torch.float64)
    noise = torch.zeros_like(x_start)
    t = full(10, x_start)
    got = bound_term(
        lambda x, t: torch.full_like(x, -1e3),
        ReverseProcess(SHORT, variance_type="fixed_small", clip=True),
        x_start,
        t,
        noise,
        levels=17,
    )
    a, b = SHORT.alphas_cumprod[10], SHORT.alphas_cumprod[9]
    snr_difference = b / (1 - b) - a / (1 - a)
    expected = 0.5 * snr_difference * (1.0 - 0.5) ** 2 / math.log(2)
    torch.testing.assert_close(got, expected.expand(2))


def test_bound_term_is_differentiable() -> None:
    scale = torch.tensor(0.5, requires_grad=True)
    x_start = torch.full((2, 1, 2, 2), 1.0)
    bound_term(
        lambda x, t: scale * x,
        ReverseProcess(SHORT, variance_type="fixed_small", clip=False),
        x_start,
        torch.tensor([0, 7]),
        torch.ones_like(x_start),
        levels=17,
    ).sum().backward()
    assert scale.grad is not None
    assert bool(scale.grad.isfinite())
    assert float(scale.grad) != 0


def _some_network(x_t: Tensor, t: Tensor) -> Tensor:
    return 0.7 * x_t + 0.01 * t.to(x_t.dtype).reshape(-1, 1, 1, 1) * x_t.square()


def test_a_small_mismatch_of_variances_survives_float32() -> None:
    """Of a network without error only ½·(β̃/β − 1 − ln(β̃/β)) is left, 1e-11 of two logarithms of about −4."""
    x_start = torch.full((2, 1, 2, 2), 0.5)
    t = torch.tensor([500, 900])
    reverse = ReverseProcess(LINEAR, variance_type="fixed_large", clip=False)
    got = bound_term(
        lambda x_t, t: torch.ones_like(x_t), reverse, x_start, t, torch.ones_like(x_start), levels=5
    )
    log_ratio = 2.0 * (LINEAR.log_b[t - 1] - LINEAR.log_b[t])
    expected = 0.5 * (torch.expm1(log_ratio) - log_ratio) / math.log(2)
    assert float(expected[1]) < 1e-10
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=0)
