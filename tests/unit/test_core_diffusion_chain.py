"""The diffusion model as a hierarchical VAE with a fixed encoder: its path bound and its joint."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from ddpm_core import (
    LinearGaussianProcess,
    ReverseProcess,
    SamplerConfig,
    Schedule,
    ScheduleConfig,
    VarianceType,
    bound_term,
    discretized_gaussian_log_likelihood,
    paths,
    prior_term,
    rng,
    trajectory,
)
from ddpm_core.hierarchy import (
    DiffusionChain,
    DiscretizedGaussian,
    encode_path,
    generate_path,
    log_joint,
    log_posterior,
    path_bound,
)
from tests.support.hierarchy import exact_mean, mean_total
from tests.support.oracles import GaussianData, full, symmetric_grid

SHORT = Schedule.from_config(ScheduleConfig(num_timesteps=12, beta_start=0.005, beta_end=0.7))
DATA = GaussianData(0.25)
LN_2 = math.log(2.0)


def _mixed_covariances(
    data: GaussianData, schedule: Schedule, sigma_squared: Tensor
) -> tuple[Tensor, Tensor]:
    """Covariances of (x_0, x_1, …, x_T) under q, and under p_θ with the best ε_θ and variances sigma_squared."""
    num = schedule.num_timesteps
    q = torch.zeros(num + 1, num + 1, dtype=torch.float64)
    p = torch.zeros_like(q)
    q[0, 0], p[num, num] = data.variance, 1.0
    for t in range(num):
        q[t + 1, : t + 1] = q[: t + 1, t + 1] = schedule.alphas[t].sqrt() * q[t, : t + 1]
        q[t + 1, t + 1] = schedule.alphas[t] * q[t, t] + schedule.betas[t]
    slopes = data.ancestral_slopes(schedule)
    for t in reversed(range(num)):
        p[t, t + 1 :] = p[t + 1 :, t] = slopes[t] * p[t + 1, t + 1 :]
        p[t, t] = slopes[t] ** 2 * p[t + 1, t + 1] + sigma_squared[t]
    return q, p


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_a_diffusion_s_path_bound_in_closed_form(variance_type: VarianceType) -> None:
    """Gaussian data: the total is entropy + KL of the joint laws, and each term K_t + ½·ln(β̃_t/β_{t−1})."""
    reverse = ReverseProcess(SHORT, variance_type=variance_type, clip=False)
    chain = DiffusionChain(DATA.eps_theta(SHORT), reverse)
    x, _ = symmetric_grid(DATA)
    terms = exact_mean(chain, x, [1] * 12)

    q, p = _mixed_covariances(DATA, SHORT, reverse.log_variance_table().exp())
    zero = torch.zeros(13, dtype=torch.float64)
    kl = float(kl_divergence(MultivariateNormal(zero, q), MultivariateNormal(zero, p)))
    assert mean_total(terms) == pytest.approx(
        kl + 0.5 * math.log(2 * math.pi * math.e * DATA.variance), rel=1e-9
    )
    assert kl > 0.01

    shift = 0.5 * torch.log(SHORT.posterior_variance[1:] / SHORT.betas[:-1])
    expected = DATA.consistency_terms(SHORT, variance_type)[1:] * LN_2 + shift
    torch.testing.assert_close(terms.consistency, expected, rtol=1e-9, atol=1e-11)
    ratio = SHORT.betas[-1] / SHORT.one_minus_alphas_cumprod[-1]
    prior = float(prior_term(SHORT, x).mean()) * LN_2 - 0.5 * math.log(ratio)
    assert float(terms.prior) == pytest.approx(prior, rel=1e-9)


@pytest.mark.parametrize("num_timesteps", [1, 12])
@pytest.mark.parametrize("prediction_type", ["eps", "x_start", "v"])
def test_a_path_has_the_expectation_of_the_kl_form(num_timesteps: int, prediction_type) -> None:
    """For a network that is not the best one, clipped, with learned variances and 17 levels."""
    schedule = SHORT.at(torch.arange(num_timesteps))
    reverse = ReverseProcess(schedule, prediction_type, "learned_range", clip=True)
    chain = DiffusionChain(_network_with_variance, reverse, levels=17)
    count = 20_000
    index = torch.arange(count)
    x = rng.integers(0, "levels", index, 17).double().sub(8).div(8).reshape(-1, 1, 1, 1).repeat(1, 1, 2, 1)
    total = path_bound(chain, x, seed=0, index=index).bits_per_dim(2).total
    kl_form = prior_term(schedule, x)
    for t in range(num_timesteps):
        noise = rng.normal(1, "kl form", index, (1, 2, 1), draw=t, dtype=torch.float64)
        kl_form = kl_form + bound_term(_network_with_variance, reverse, x, full(t, x), noise, levels=17)
    difference = total - kl_form
    stderr = float(difference.std()) / math.sqrt(count)
    assert abs(float(difference.mean())) < 5 * stderr
    assert stderr < 0.02 * float(kl_form.mean())


def _network_with_variance(x_t: Tensor, t: Tensor) -> Tensor:
    at = t.to(x_t.dtype).reshape(-1, 1, 1, 1)
    prediction = 0.6 * torch.tanh(x_t) + 0.01 * at * x_t.flip(2)
    return torch.cat([prediction, torch.cos(x_t + at)], dim=1)


def test_at_equal_snr_every_process_gives_every_path_the_same_total() -> None:
    """x_t of a variance-exploding process is x_t/√ᾱ_t of the variance-preserving one; so are its densities."""
    exploding = LinearGaussianProcess(torch.zeros_like(SHORT.log_a), SHORT.log_b - SHORT.log_a)

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        return 0.8 * torch.sin(x_t) + 0.05 * x_t

    def rescaled(x_t: Tensor, t: Tensor) -> Tensor:
        return network(SHORT.gather(SHORT.a, t, x_t) * x_t, t)

    x, index = 0.5 * rng.normal(13, "test", torch.arange(6), (1, 2, 2), dtype=torch.float64), torch.arange(6)
    variance_types: tuple[VarianceType, ...] = ("fixed_small", "analytic")
    for variance_type in variance_types:
        mse = torch.linspace(0.01, 0.5, 12, dtype=torch.float64)
        pair = [
            path_bound(
                DiffusionChain(eps, ReverseProcess(process, "eps", variance_type, False, mse)),
                x,
                seed=0,
                index=index,
            ).total
            for eps, process in ((network, SHORT), (rescaled, exploding))
        ]
        torch.testing.assert_close(pair[1], pair[0], rtol=1e-10, atol=1e-10)


def test_generation_from_the_joint_is_algorithm_2() -> None:
    """The same noise gives the sampler's states; only the last step differs, where Algorithm 2 takes the mean."""
    reverse = ReverseProcess(SHORT, variance_type="fixed_large", clip=True)
    chain = DiffusionChain(_network, reverse)
    index = torch.tensor([0, 5, 10**12])
    path = generate_path(chain, (1, 2, 2), seed=9, index=index)
    config = SamplerConfig(kind="ancestral", num_steps=None, variance_type="fixed_large")
    steps = list(trajectory(_network, SHORT, config, seed=9, index=index, shape=(1, 2, 2)))
    for t, step in zip(reversed(range(12)), steps, strict=True):
        torch.testing.assert_close(path[t + 1], step.x_t, rtol=1e-6, atol=1e-6)
    sigma = math.exp(0.5 * float(reverse.log_variance_table()[0]))
    noise = rng.normal(9, "sample", index, (1, 2, 2), draw=1)
    torch.testing.assert_close(path[0], steps[-1].pred_x_start + sigma * noise, rtol=1e-5, atol=1e-5)


def _network(x_t: Tensor, t: Tensor) -> Tensor:
    return 0.7 * x_t + 0.01 * t.to(x_t.dtype).reshape(-1, 1, 1, 1) * x_t.square().clamp(max=4.0)


def test_a_discretised_sample_has_the_decoder_s_masses() -> None:
    levels, count = 5, 100_000
    values = torch.linspace(-1, 1, levels, dtype=torch.float64)
    log_variance = torch.tensor(2 * math.log(0.6), dtype=torch.float64)
    decoder = DiscretizedGaussian(torch.tensor(0.4, dtype=torch.float64), log_variance, levels)
    drawn = decoder.sample(rng.normal(14, "test", torch.arange(count), (), dtype=torch.float64))
    masses = discretized_gaussian_log_likelihood(values, decoder.mean, 0.5 * log_variance, levels).exp()
    frequencies = torch.stack([(drawn - value).abs().lt(1e-12).double().mean() for value in values])
    assert float(((frequencies - masses) / (masses * (1 - masses) / count).sqrt()).abs().max()) < 5
    assert float(frequencies.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("clip", [True, False])
def test_inputs_of_every_kind(clip: bool) -> None:
    reverse = ReverseProcess(SHORT, clip=clip)
    chain = DiffusionChain(_network, reverse, levels=17)
    x = (torch.arange(3 * 2 * 4 * 4) % 17 - 8).float().div(8).reshape(3, 2, 4, 4)
    index = torch.arange(3)
    expected = path_bound(chain, x, seed=0, index=index)
    assert expected.total.dtype == torch.float32
    strided = x.transpose(0, 3).contiguous().transpose(0, 3)
    for same in (strided, x.to(memory_format=torch.channels_last), x.to(torch.bfloat16)):
        got = path_bound(chain, same, seed=0, index=index)
        torch.testing.assert_close(got.total, expected.total, rtol=1e-5, atol=1e-3)
    alone = path_bound(chain, x[1:2], seed=0, index=index[1:2])
    torch.testing.assert_close(alone.total, expected.total[1:2], rtol=1e-5, atol=1e-3)


def test_a_long_chain_is_finite_and_gives_the_bound_in_single_precision() -> None:
    """T = 4000 with the best ε_θ of Gaussian data: a path's total is near the entropy, whatever its length."""
    long = Schedule.from_config(ScheduleConfig(num_timesteps=4000, beta_start=2.5e-5, beta_end=5e-3))
    chain = DiffusionChain(DATA.eps_theta(long), ReverseProcess(long, clip=False))
    index = torch.arange(64)
    x = 0.5 * rng.normal(0, "data", index, (1, 1, 1))
    total = path_bound(chain, x, seed=0, index=index).total
    entropy = 0.5 * math.log(2 * math.pi * math.e * DATA.variance)
    assert abs(float(total.mean()) - entropy) < 5 * float(total.std()) / 8
    assert float(total.std()) < 3


def test_zero_terminal_snr_has_a_path_bound() -> None:
    schedule = Schedule(torch.tensor([0.1, 0.5, 1.0]))
    chain = DiffusionChain(lambda x, t: 0.5 * x, ReverseProcess(schedule, "v"))
    terms = path_bound(chain, torch.zeros(2, 1, 1, 1), seed=0, index=torch.arange(2))
    assert bool(terms.total.isfinite().all())
    torch.testing.assert_close(terms.prior, torch.zeros(2), rtol=0, atol=1e-6)


def test_the_joint_and_the_posterior_are_those_of_the_path() -> None:
    """ln q(x_1, …|x_0) and ln p_θ(x_0, x_1, …) of one path, by the hierarchy and by `ddpm_core.paths`."""
    reverse = ReverseProcess(SHORT, variance_type="fixed_large", clip=True)
    chain = DiffusionChain(_network, reverse)
    index = torch.arange(3)
    x = 0.5 * rng.normal(16, "test", index, (1, 2, 2), dtype=torch.float64)
    path = encode_path(chain, x, lambda t, m: rng.normal(17, "test", index, (1, 2, 2), draw=t, dtype=m.dtype))
    states = torch.stack(path[1:])
    torch.testing.assert_close(log_posterior(chain, path), paths.log_q_forward(SHORT, x, states))
    torch.testing.assert_close(log_joint(chain, path), paths.log_p_path(_network, reverse, x, states))
