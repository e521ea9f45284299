"""The slips that notes on diffusion models make: one test a slip, with the slip's number and the right one.

docs/mathematics.md tells each in words. Docstrings count t = 1, …, T as the papers do; the code counts from zero.
"""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ddpm_core import (
    ReverseProcess,
    SamplerConfig,
    Schedule,
    ScheduleConfig,
    predict_x_start,
    prior_term,
    q_posterior,
    q_sample,
    rng,
    sample,
    trajectory,
)
from ddpm_core.hierarchy import DiffusionChain, encode_path, log_joint, log_posterior, path_bound, path_terms
from ddpm_core.samplers import denoise_step
from tests.support.hierarchy import noise_directions
from tests.support.oracles import GaussianData, full, symmetric_grid

LINEAR = Schedule.from_config(ScheduleConfig())
SHORT = Schedule.from_config(ScheduleConfig(num_timesteps=12, beta_start=0.005, beta_end=0.7))
DATA = GaussianData(0.25)
ENTROPY = 0.5 * math.log(2 * math.pi * math.e * DATA.variance)


def _true_reversal(schedule: Schedule, data: GaussianData) -> DiffusionChain:
    """The chain whose decoder is q(x_{t−1}|x_t) of Gaussian data exactly."""
    mse = data.bayes_x_start_mse(schedule)
    reverse = ReverseProcess(schedule, variance_type="analytic", clip=False, x_start_mse=mse)
    return DiffusionChain(data.eps_theta(schedule), reverse)


def _unit_paths(count: int = 200) -> tuple[DiffusionChain, list[Tensor], Tensor]:
    """Data N(0, 1), for which q(x_T) = N(0, 1) too: ln p(x_0, …)/q(…|x_0) is ln p(x_0) on every path."""
    chain = _true_reversal(SHORT, GaussianData(1.0))
    index = torch.arange(count)
    x = rng.normal(0, "data", index, (1, 1, 1), dtype=torch.float64)
    path = encode_path(
        chain, x, lambda t, m: rng.normal(0, "p", index, (1, 1, 1), draw=t, dtype=torch.float64)
    )
    return chain, path, Normal(0.0, 1.0).log_prob(x).flatten()


def test_the_decoder_runs_from_z_t_to_z_t_minus_1() -> None:
    """Slip: p(z_t|z_{t−1}), the encoder's arrow. Run down from N(0, 1) it stays at variance 1 and meets no data."""
    chain = _true_reversal(LINEAR, DATA)
    right = slip = 1.0
    for t in reversed(range(LINEAR.num_timesteps)):
        at_one = chain.decode(t, torch.ones(1, 1, 1, 1, dtype=torch.float64))
        assert not isinstance(at_one.log_variance, float)
        right = float(at_one.mean) ** 2 * right + float(at_one.log_variance.exp())
        slip = float(LINEAR.alphas[t]) * slip + float(LINEAR.betas[t])
    assert right == pytest.approx(0.25, rel=1e-4)
    assert slip == pytest.approx(1.0)


def test_jensen_gives_a_bound_and_no_equality() -> None:
    """ln p(x) = ln E_q[p(x, z)/q(z|x)] ≥ E_q ln[p(x, z)/q(z|x)]. Slip: "=" in place of "≥".

    z ~ N(0, 1), x|z ~ N(z, 1), so p(x) = N(0, 2) and the posterior is N(x/2, ½); q = N(x/2, 1) is wider than it.
    """
    x, grid = 1.0, torch.linspace(-12, 13, 20_001, dtype=torch.float64)

    def numbers(variance: float) -> tuple[float, float, float]:
        q, posterior = Normal(x / 2, math.sqrt(variance)), Normal(x / 2, math.sqrt(0.5))
        density = q.log_prob(grid).exp()
        log_weight = (
            Normal(0.0, 1.0).log_prob(grid) + Normal(grid, 1.0).log_prob(torch.tensor(x)) - q.log_prob(grid)
        )
        log_of_mean = torch.trapezoid(density * log_weight.exp(), grid).log()
        mean_of_log = torch.trapezoid(density * log_weight, grid)
        return float(log_of_mean), float(mean_of_log), float(kl_divergence(q, posterior))

    likelihood = float(Normal(0.0, math.sqrt(2.0)).log_prob(torch.tensor(x)))
    log_of_mean, elbo, gap = numbers(1.0)
    assert log_of_mean == pytest.approx(likelihood, rel=1e-6)
    assert elbo == pytest.approx(likelihood - gap, rel=1e-6)
    assert gap == pytest.approx(0.1534, abs=1e-4)
    # equality holds for the true posterior alone
    assert numbers(0.5)[1] == pytest.approx(likelihood, rel=1e-6)


def test_unrolling_keeps_the_factor_on_the_older_noise() -> None:
    """x_t = √α_t·(√α_{t−1}·x_{t−2} + √(1−α_{t−1})·ε') + √(1−α_t)·ε: the older noise is scaled by √α_t too.

    Slip 1: the √α_t is lost, and the variances add up to Σβ. Slip 2: (1−α_{t−1})² where (1−α_{t−1}) belongs.
    """
    right = lost = squared = 0.0
    for alpha in LINEAR.alphas.tolist():
        right = alpha * right + (1 - alpha)
        lost = lost + (1 - alpha)
        squared = alpha * squared**2 + (1 - alpha)
    table = float(LINEAR.one_minus_alphas_cumprod[-1])
    assert right == pytest.approx(table, rel=1e-12)
    assert table == pytest.approx(0.99996, abs=1e-5)
    assert lost == pytest.approx(10.05, rel=1e-3)
    assert squared == pytest.approx(0.0204, abs=1e-4)


def test_merging_two_steps_adds_variances() -> None:
    """Two steps of the schedule against its respaced single step."""
    a1, a2 = SHORT.alphas[:2].tolist()
    two = Schedule(SHORT.betas[:2])
    one_step = two.at(torch.tensor([1]))
    assert float(one_step.step_variance[0]) == pytest.approx(a2 * (1 - a1) + (1 - a2), rel=1e-12)
    assert abs(a2 * (1 - a1) ** 2 + (1 - a2) - float(one_step.step_variance[0])) > 4e-3


def test_the_ratio_is_the_joint_over_the_posterior() -> None:
    """ELBO = E ln[p(x_T)·∏p_θ(x_{t−1}|x_t) / ∏q(x_t|x_{t−1})]. Slips: without p(x_T); upside down."""
    chain, path, log_likelihood = _unit_paths()
    joint, posterior = log_joint(chain, path), log_posterior(chain, path)
    torch.testing.assert_close(joint - posterior, log_likelihood, rtol=1e-9, atol=1e-9)
    without_prior = joint - chain.prior().log_density(path[-1]) - posterior
    assert float((without_prior - log_likelihood).mean()) == pytest.approx(1.42, abs=0.15)  # ½·ln(2πe)
    assert float((without_prior - log_likelihood).std()) > 0.5
    assert float((posterior - joint - log_likelihood).mean()) == pytest.approx(2.84, abs=0.3)


def test_the_three_terms_all_cost() -> None:
    """−ELBO = −E ln p(x_0|x_1) + Σ KL + KL_T, each KL(q ‖ p), all added.

    Slip: the divergences with the other sign, which "beats" the entropy of the data. Slip: KL(p ‖ q).
    """
    reverse = ReverseProcess(SHORT, variance_type="fixed_large", clip=False)
    consistency = float(DATA.consistency_terms(SHORT, "fixed_large")[1:].sum()) * math.log(2)
    x, _ = symmetric_grid(DATA)
    prior = float(prior_term(SHORT, x).mean()) * math.log(2)
    sigma_squared = float(reverse.log_variance_table()[0].exp())
    miss = float(DATA.bayes_x_start_mse(SHORT)[0])
    reconstruction = 0.5 * (math.log(2 * math.pi * sigma_squared) + miss / sigma_squared)
    assert reconstruction + consistency + prior > ENTROPY
    assert reconstruction - consistency - prior < ENTROPY - 3

    swapped = 0.0
    for t in range(1, SHORT.num_timesteps):
        ratio = float(SHORT.betas[t] / SHORT.posterior_variance[t])
        x_gap = float((SHORT.posterior_mean_coef1[t] ** 2) * DATA.bayes_x_start_mse(SHORT)[t])
        swapped += 0.5 * (ratio - 1 - math.log(ratio) + x_gap / float(SHORT.posterior_variance[t]))
    assert swapped - consistency > 0.3


def test_the_products_have_t_factors_each() -> None:
    """T encoders, T decoders and one prior. Slip: ∏ from t = 2 loses q(x_1|x_0), E ln of which is −½·ln(2πe·β_1).

    The sum of the KL terms has T − 1: at t = 1 the posterior is a point (β̃_1 = 0), and its KL would be infinite.
    """
    chain, path, log_likelihood = _unit_paths()
    terms = path_terms(chain, path)
    assert terms.consistency.shape[1] == SHORT.num_timesteps - 1
    from_two = log_joint(chain, path) - (
        log_posterior(chain, path) - chain.encode(0, path[0]).log_density(path[1])
    )
    lost = -0.5 * math.log(2 * math.pi * math.e * float(SHORT.betas[0]))
    assert float((from_two - log_likelihood).mean()) == pytest.approx(lost, abs=0.2)
    assert lost == pytest.approx(1.23, abs=0.01)
    _, variance, _ = q_posterior(SHORT, path[0], path[1], full(0, path[0]))
    assert float(variance.abs().max()) == 0.0


def test_the_prior_term_is_near_zero_in_the_kl_form_only() -> None:
    """KL(q(x_T|x_0) ‖ p) is 1e-5 bits. Two-sided, E ln[q(x_T|x_{T−1})/p(x_T)] is ½·ln(1/β_T), 2.8 bits."""
    x, _ = symmetric_grid(DATA)
    kl_form = float(prior_term(LINEAR, x).mean())
    directions, weights = noise_directions(2)
    start = torch.full((5, 1), 0.5, dtype=torch.float64)
    before = q_sample(LINEAR, start, full(998, start), directions[:, :1])
    chain = _true_reversal(LINEAR, DATA)
    step = chain.encode(999, before)
    last = step.sample(directions[:, 1:])
    two_sided = torch.dot(weights, step.log_density(last) - chain.prior().log_density(last)) / math.log(2)
    assert kl_form == pytest.approx(7.2787e-6, rel=1e-4)
    assert float(two_sided) == pytest.approx(2.8219, abs=1e-3)
    shift = 0.5 * math.log2(float(LINEAR.one_minus_alphas_cumprod[-1] / LINEAR.betas[-1]))
    assert float(two_sided) - kl_form == pytest.approx(shift, rel=1e-9)


def test_algorithm_1_takes_alpha_bar() -> None:
    """x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε, and a larger t means less of x_0. Slip: α_t, which is near 1 at every t."""
    ones = torch.ones(3, 1, dtype=torch.float64)
    t = torch.tensor([0, 499, 999])
    signal = q_sample(LINEAR, ones, t, torch.zeros_like(ones)).flatten()
    torch.testing.assert_close(signal, LINEAR.alphas.cumprod(0).sqrt()[t])
    assert signal.tolist() == pytest.approx([0.99995, 0.2806, 0.00635], rel=1e-2)
    assert bool((LINEAR.a.diff() < 0).all())
    slip = LINEAR.alphas[t].sqrt()
    assert slip.tolist() == pytest.approx([0.99995, 0.995, 0.98995], rel=1e-3)
    # what would be left of the data where sampling starts from pure noise, as an SNR
    assert float(LINEAR.log_snr[-1].exp()) < 1e-4
    assert float(LINEAR.alphas[-1] / LINEAR.betas[-1]) == pytest.approx(49.0)


def test_the_last_step_adds_no_noise() -> None:
    """Algorithm 2, line 3: z = 0 at t = 1, so that the image is x̂_0. Slip: σ_1·z on top of it."""
    index, eps_star = torch.arange(4), DATA.eps_theta(SHORT)
    reverse = ReverseProcess(SHORT, variance_type="fixed_large", clip=False)
    config = SamplerConfig(kind="ancestral", num_steps=None, variance_type="fixed_large", clip=False)
    keys = {"seed": 0, "index": index, "shape": (1, 1, 1), "dtype": torch.float64}
    *_, last = trajectory(eps_star, SHORT, config, **keys)  # type: ignore[arg-type]
    t = full(0, last.x_t)
    output = eps_star(last.x_t, t)
    pred_x_start = predict_x_start(SHORT, last.x_t, t, output)
    torch.testing.assert_close(sample(eps_star, SHORT, config, **keys), pred_x_start)  # type: ignore[arg-type]
    # whatever noise the last step is offered
    offered, _ = denoise_step(reverse, config, last.x_t, t, output, torch.ones_like(last.x_t))
    torch.testing.assert_close(offered, pred_x_start)
    sigma = float(reverse.log_variance_table()[0].mul(0.5).exp())
    assert sigma == pytest.approx(0.0684, abs=1e-3)  # the grain that the slip leaves on every image


def test_sigma_is_a_standard_deviation() -> None:
    """x_{t−1} = μ + σ_t·z with σ_t² = β̃_t or β_t. Slip: β_t·z. The variance of what comes out, data having 0.25."""
    variances = {}
    for name in ("standard deviation", "variance"):
        variance = 1.0
        reverse = ReverseProcess(LINEAR, variance_type="fixed_large", clip=False)
        one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        for t in reversed(range(LINEAR.num_timesteps)):
            at = full(t, one)
            mean, log_variance = reverse.transition(DATA.eps_theta(LINEAR)(one, at), one, at)
            sigma_squared = float(log_variance.exp()) if t else 0.0
            added = sigma_squared if name == "standard deviation" else sigma_squared**2
            variance = float(mean) ** 2 * variance + added
        variances[name] = variance
    assert variances["standard deviation"] == pytest.approx(0.25, rel=0.02)
    assert variances["variance"] < 0.005


def test_denoising_is_not_image_minus_noise() -> None:
    """x̂_0 = (x_t − √(1−ᾱ_t)·ε)/√ᾱ_t gives x_0 back. Slip: x_t − ε."""
    x = torch.linspace(-1, 1, 9, dtype=torch.float64).reshape(1, 1, 3, 3)
    noise = rng.normal(0, "noise", torch.arange(1), (1, 3, 3), dtype=torch.float64)
    t = full(500, x)
    x_t = q_sample(LINEAR, x, t, noise)
    right = predict_x_start(LINEAR, x_t, t, noise)
    torch.testing.assert_close(right, x, rtol=1e-12, atol=1e-12)
    assert float((x_t - noise - x).abs().max()) > 0.5


def test_the_estimate_is_monte_carlo_and_no_markov_chain_monte_carlo() -> None:
    """Every path is drawn afresh from q: no burn-in, no correlation from one draw to the next, error ∝ 1/√n.

    For contrast, the states of one trajectory are a Markov chain, and neighbours in it are nearly equal.
    """
    count = 4096
    index = torch.arange(count)
    chain = DiffusionChain(
        DATA.eps_theta(SHORT), ReverseProcess(SHORT, variance_type="fixed_large", clip=False)
    )
    x = torch.full((count, 1, 1, 1), 0.5, dtype=torch.float64)
    total = path_bound(chain, x, seed=0, index=index).total
    centred = total - total.mean()
    assert abs(float((centred[1:] * centred[:-1]).mean() / centred.square().mean())) < 5 / math.sqrt(count)
    of_groups = total.reshape(64, 64).mean(1)
    assert float(total.var() / of_groups.var()) == pytest.approx(64, rel=0.6)
    # the first draw is as good as the last, and any may be drawn alone
    alone = path_bound(chain, x[:1], seed=0, index=index[77:78]).total
    torch.testing.assert_close(alone, total[77:78])
    a, b = LINEAR.a[500:502].tolist(), LINEAR.b[500:502].tolist()
    step = float(LINEAR.step_scale[501])
    correlation = (
        step
        * (a[0] ** 2 * 0.25 + b[0] ** 2)
        / math.sqrt((a[0] ** 2 * 0.25 + b[0] ** 2) * (a[1] ** 2 * 0.25 + b[1] ** 2))
    )
    assert correlation > 0.99


def test_the_end_is_noise_only_if_the_sum_of_betas_diverges() -> None:
    """ᾱ_T = ∏(1 − β_t) → 0 exactly if Σβ_t = ∞. Slip: "β_t in (0, 1) and T → ∞ are enough".

    β_t = 1/(t+1)²: ᾱ_T = (T+2)/(2·(T+1)), half the signal power for ever. β_t = 1/(t+1): ᾱ_T = 1/(T+1).
    """
    for num in (100, 4000):
        t = torch.arange(1, num + 1, dtype=torch.float64)
        converging, diverging = Schedule(1 / (t + 1) ** 2), Schedule(1 / (t + 1))
        assert float(converging.alphas_cumprod[-1]) == pytest.approx((num + 2) / (2 * (num + 1)), rel=1e-10)
        assert float(diverging.alphas_cumprod[-1]) == pytest.approx(1 / (num + 1), rel=1e-10)
        assert converging.warnings()
    assert float(prior_term(converging, torch.ones(1, 1, dtype=torch.float64))) == pytest.approx(
        0.5, abs=1e-3
    )
    assert not diverging.warnings()


def test_neighbours_given_the_one_before_are_not_independent() -> None:
    """C_t = E ln[q(x_t|x_{t−1})/p_θ(x_t|x_{t+1})] over the joint. Slip: x_t and x_{t+1} drawn apart given x_{t−1}.

    Linear schedule, T = 1000, fixed_small, the best ε_θ for Gaussian data of variance ¼; all t at once, exactly,
    since every term is quadratic in the noises. The slip loses Cov(x_t, x_{t+1}|x_{t−1}) = √α_{t+1}·β_t, which
    p_θ's mean, slope·x_{t+1}, multiplies by slope/σ²: 1,428 bits a dimension in all.
    """
    t = torch.arange(1, LINEAR.num_timesteps - 1)  # zero-based: x_{t−1}, x_t, x_{t+1} all noisy
    directions, weights = noise_directions(5)
    start, before, step, other_step, after = directions.T[..., None]

    def forward(x: Tensor, at: Tensor, noise: Tensor) -> Tensor:
        return LINEAR.step_scale[at] * x + LINEAR.step_variance[at].sqrt() * noise

    x_before = LINEAR.a[t - 1] * 0.5 * start + LINEAR.b[t - 1] * before
    x_t = forward(x_before, t, step)
    reverse = ReverseProcess(LINEAR, clip=False)

    def total(x_after: Tensor) -> float:
        flat, at = x_after.reshape(-1, 1, 1, 1), (t + 1).repeat(len(directions))
        mean, log_variance = reverse.transition(DATA.eps_theta(LINEAR)(flat, at), flat, at)
        decoder = Normal(mean.reshape(x_t.shape), (0.5 * log_variance).exp().reshape(x_t.shape))
        encoder = Normal(LINEAR.step_scale[t] * x_before, LINEAR.step_variance[t].sqrt())
        terms = encoder.log_prob(x_t) - decoder.log_prob(x_t)
        return float((weights @ terms).sum()) / math.log(2)

    right = total(forward(x_t, t + 1, after))
    slip = total(forward(forward(x_before, t, other_step), t + 1, after))
    kl_form = DATA.consistency_terms(LINEAR, "fixed_small")[2:].sum()
    shift = 0.5 * torch.log2(LINEAR.posterior_variance[2:] / LINEAR.betas[1:-1]).sum()
    assert right == pytest.approx(float(kl_form + shift), rel=1e-6)
    slope = DATA.ancestral_slopes(LINEAR)[2:]
    lost = slope * LINEAR.alphas[2:].sqrt() * LINEAR.betas[1:-1] / LINEAR.posterior_variance[2:]
    assert slip - right == pytest.approx(float(lost.sum()) / math.log(2), rel=1e-9)
    assert slip - right == pytest.approx(1428.3, abs=0.1)
