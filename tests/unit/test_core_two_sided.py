"""The two-sided form of the bound: against densities taken literally, and against the KL form term by term."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_core import (
    BoundAccumulator,
    EpsTheta,
    LinearGaussianProcess,
    PredictionType,
    ReverseProcess,
    Schedule,
    ScheduleConfig,
    VarianceType,
    bound_term,
    prior_term,
    two_sided_prior_term,
    two_sided_shift,
    two_sided_term,
)
from tests.support.oracles import GaussianData, atoms, full, straight, variance_exploding

LINEAR = Schedule.from_config(ScheduleConfig())
COSINE = Schedule.from_config(ScheduleConfig(kind="cosine"))
SHORT = Schedule.from_config(ScheduleConfig(num_timesteps=20, beta_start=0.005, beta_end=0.7))
LONG = Schedule.from_config(ScheduleConfig(num_timesteps=300, beta_start=4e-4, beta_end=0.06))
PROCESSES = [LINEAR, COSINE, SHORT, variance_exploding(), straight()]
NAMES = ["linear", "cosine", "short", "ve", "straight"]
DATA = GaussianData(0.25)


def _network(x_t: Tensor, t: Tensor) -> Tensor:
    return torch.sin(0.4 * x_t) + 0.001 * t.to(x_t.dtype).reshape(-1, 1, 1, 1)


def _learned_network(x_t: Tensor, t: Tensor) -> Tensor:
    return torch.cat((_network(x_t, t), torch.tanh(x_t)), dim=1)


def _draws(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(3, count, 1, 2, 2, generator=generator, dtype=torch.float64)
    return torch.randint(17, (count, 1, 2, 2), generator=generator).double() / 8 - 1, noise


def _path(
    process: LinearGaussianProcess, x_start: Tensor, t: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """x_{t−1}, x_t, x_{t+1} by q's own steps from x_0; x_{−1} is x_0."""
    a = torch.cat((process.a.new_ones(1), process.a))
    b = torch.cat((process.a.new_zeros(1), process.b))

    def at(table: Tensor) -> Tensor:
        return table[t].reshape(-1, 1, 1, 1)

    x_prev = at(a) * x_start + at(b) * noise[0]
    x_t = _step(process, x_prev, t, noise[1])
    return x_prev, x_t, _step(process, x_t, t + 1, noise[2])


def _step_law(process: LinearGaussianProcess, t: Tensor) -> tuple[Tensor, Tensor]:
    """scale and variance of q(x_t|x_{t−1}): x_t has the scale a and the spread b again."""
    a = torch.cat((process.a.new_ones(1), process.a))
    b = torch.cat((process.a.new_zeros(1), process.b))
    scale = a[1:] / a[:-1]
    variance = b[1:].square() - scale.square() * b[:-1].square()
    return scale[t].reshape(-1, 1, 1, 1), variance[t].reshape(-1, 1, 1, 1)


def _step(process: LinearGaussianProcess, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    scale, variance = _step_law(process, t)
    return scale * x + variance.sqrt() * noise


def _literally(
    eps_theta: EpsTheta, reverse: ReverseProcess, t: Tensor, states: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """ln q(x_t|x_{t−1}) − ln p_θ(x_t|x_{t+1}) in nats, from the two densities."""
    x_prev, x_t, x_next = states
    scale, variance = _step_law(reverse.process, t)
    log_q = torch.distributions.Normal(scale * x_prev, variance.sqrt()).log_prob(x_t)
    mean, log_variance = reverse.transition(eps_theta(x_next, t + 1), x_next, t + 1)
    log_p = torch.distributions.Normal(mean, (0.5 * log_variance).exp()).log_prob(x_t)
    return (log_q - log_p).flatten(1).sum(1)


@pytest.mark.parametrize(
    ("process", "prediction_type"),
    [
        pytest.param(process, prediction, id=f"{name}-{prediction}")
        for process, name in zip(PROCESSES, NAMES, strict=True)
        for prediction in ("eps", "v", "x_start")
        if not (process.ends_without_signal and prediction == "eps")
    ],
)
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range", "analytic"])
@pytest.mark.parametrize("clip", [False, True])
def test_a_term_is_the_ratio_of_the_two_densities(
    process: LinearGaussianProcess, prediction_type: PredictionType, variance_type: VarianceType, clip: bool
) -> None:
    mse = 0.01 + 0.2 * torch.sigmoid(-process.log_snr)
    reverse = ReverseProcess(process, prediction_type, variance_type, clip, x_start_mse=mse)
    network = _learned_network if variance_type == "learned_range" else _network
    last = process.num_timesteps - 2
    t = torch.tensor([0, 1, 2, last // 2, last - 1, last])
    x_start, noise = _draws(6)
    got = two_sided_term(network, reverse, x_start, t, noise, unit="nats")
    expected = _literally(network, reverse, t, _path(process, x_start, t, noise))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
def test_the_shift_is_the_ratio_of_variances_and_sums_to_nothing(process: LinearGaussianProcess) -> None:
    """½·ln(β̃_{t+1}/β_t), and for the prior ½·ln(b_T²/β_T), from precisions that add."""
    shift = two_sided_shift(process)
    t = torch.arange(process.num_timesteps)
    scale, variance = (v.flatten() for v in _step_law(process, t))
    before = process.b.square()
    beta_tilde = 1 / (1 / before[:-1] + scale[1:].square() / variance[1:])
    torch.testing.assert_close(shift[:-1], 0.5 * (beta_tilde / variance[:-1]).log(), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(shift[-1], 0.5 * (before[-1] / variance[-1]).log(), rtol=1e-8, atol=1e-9)
    assert abs(float(shift.sum())) < 1e-11


def test_the_total_shift_is_that_of_the_paper_s_symbols() -> None:
    """ΣC − ΣK = ½·ln(β_T/(1 − ᾱ_T)) a dimension, and the prior terms shift oppositely."""
    expected = 0.5 * math.log(0.02 / (1 - 4.0358297653756754e-05))
    assert float(two_sided_shift(LINEAR)[:-1].sum()) == pytest.approx(expected, rel=1e-9)
    x_start, _ = _draws(3)
    nats = two_sided_prior_term(LINEAR, x_start, unit="nats") - prior_term(LINEAR, x_start, unit="nats")
    assert nats.tolist() == pytest.approx([-4 * expected] * 3, rel=1e-9)


@pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
def test_the_prior_term_is_its_expectation(process: LinearGaussianProcess) -> None:
    """−½·ln(2πe·β_T) of the step and the cross-entropy of x_T | x_0 with p = N(0, a² + b²)."""
    x_start, _ = _draws(5)
    a, b = float(process.a[-1]), float(process.b[-1])
    _, variance = _step_law(process, torch.tensor([process.num_timesteps - 1]))
    step = -0.5 * math.log(2 * math.pi * math.e * float(variance))
    second = (a * x_start).square() + b**2
    cross = 0.5 * math.log(2 * math.pi * (a**2 + b**2)) + 0.5 * second / (a**2 + b**2)
    expected = (step + cross).flatten(1).sum(1)
    torch.testing.assert_close(
        two_sided_prior_term(process, x_start, unit="nats"), expected, rtol=1e-9, atol=1e-9
    )
    bits = two_sided_prior_term(process, x_start)
    torch.testing.assert_close(bits, expected / 4 / math.log(2), rtol=1e-9, atol=1e-9)


def _both(network: EpsTheta, reverse: ReverseProcess, draws: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means of C_t − K_{t+1} and its standard errors, and the variances of single draws of C and K, `[T − 1]`."""
    num = reverse.process.num_timesteps - 1
    t = torch.arange(num).repeat_interleave(draws)
    x_start, noise = _draws(num * draws)
    c = two_sided_term(network, reverse, x_start, t, noise, unit="nats").reshape(num, draws)
    _, other = _draws(num * draws, seed=1)
    k = bound_term(network, reverse, x_start, t + 1, other[0], levels=17, unit="nats").reshape(num, draws)
    difference = c - k  # the same images in both, so that their spread does not count twice
    return difference.mean(1), difference.std(1) / math.sqrt(draws), c.var(1), k.var(1)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("process", [LONG, variance_exploding(250)], ids=["vp", "ve"])
def test_every_term_and_the_total_differ_by_the_constants(
    process: LinearGaussianProcess, variance_type: VarianceType
) -> None:
    reverse = ReverseProcess(process, variance_type=variance_type)
    mean, stderr, var_c, var_k = _both(_network, reverse, 400)
    shift = 4 * two_sided_shift(process)[:-1]
    z = (mean - shift) / stderr
    assert float(z.abs().max()) < 5
    assert 0.7 < float(z.square().mean()) < 1.3
    total = float((mean - shift).sum() / stderr.square().sum().sqrt())
    assert abs(total) < 5
    ratio = float(var_c.sum() / var_k.sum())
    print(
        f"{len(z)} terms: max |z| {float(z.abs().max()):.2f}, z of the total {total:.2f}, "
        f"variance of C over that of K {ratio:.3g} summed, {float((var_c / var_k).median()):.3g} in the median"
    )
    assert float((var_c / var_k).median()) > 3
    assert ratio > 1


def test_both_accumulators_have_one_total() -> None:
    """And at each t the terms of the same pair of states differ by the constant."""
    data = atoms([-1.0, -0.5, 0.25, 1.0], [0.1, 0.4, 0.3, 0.2])
    images = data.sample(4000 * 4, 0).reshape(4000, 1, 2, 2)
    estimates, terms = [], []
    for decomposition in ("kl", "two_sided"):
        accumulator = BoundAccumulator(
            ReverseProcess(SHORT), levels=17, num_strata=19, seed=0, decomposition=decomposition
        )
        accumulator.add(data.eps_theta(SHORT), images, torch.arange(4000))
        estimates.append(accumulator.result())
        terms.append(accumulator.per_t())
    kl, two = estimates
    assert abs(two.total - kl.total) < 5 * math.hypot(two.total_stderr, kl.total_stderr)
    assert two.reconstruction == kl.reconstruction
    assert two.total_stderr > kl.total_stderr
    assert two.prior > 0.1 > kl.prior  # bits/dim: the two-sided prior term is not near 0
    shift = two_sided_shift(SHORT)[:-1] / math.log(2)
    z = (terms[1].term - terms[0].term)[1:] - shift
    z /= (terms[1].stderr.square() + terms[0].stderr.square()).sqrt()[1:]
    assert float(z.abs().max()) < 5
    torch.testing.assert_close(terms[1].x_start_mse, terms[0].x_start_mse, rtol=0.2, atol=1e-3)


def test_few_strata_estimate_the_same_two_sided_bound() -> None:
    data = atoms([-1.0, -0.5, 0.25, 1.0], [0.1, 0.4, 0.3, 0.2])
    images = data.sample(4000 * 4, 0).reshape(4000, 1, 2, 2)
    all_of_it, estimate = (
        BoundAccumulator(
            ReverseProcess(SHORT), levels=17, num_strata=num_strata, seed=seed, decomposition="two_sided"
        )
        for num_strata, seed in ((19, 0), (3, 1))
    )
    for accumulator in (all_of_it, estimate):
        accumulator.add(data.eps_theta(SHORT), images, torch.arange(4000))
    ours, theirs = estimate.result(), all_of_it.result()
    stderr = math.hypot(ours.consistency_stderr, theirs.consistency_stderr)
    assert abs(ours.consistency - theirs.consistency) < 5 * stderr
    assert stderr < 0.1 * theirs.consistency


def test_a_single_term_may_be_negative() -> None:
    x_start, noise = _draws(100)
    t = full(9, x_start)
    assert float(two_sided_term(_network, ReverseProcess(SHORT), x_start, t, noise).min()) < 0
    assert float(bound_term(_network, ReverseProcess(SHORT), x_start, t + 1, noise[0], levels=17).min()) > 0


def test_taking_x_t_apart_from_x_next_is_wrong_by_hundreds_of_bits() -> None:
    """Some lecture notes draw x_t and x_{t+1} each given x_{t−1}: they then lie apart by three steps' variance."""
    reverse = ReverseProcess(LINEAR, clip=False)
    network = DATA.eps_theta(LINEAR)
    t = torch.arange(999).repeat_interleave(40)
    x_start, noise = _draws(len(t))
    x_prev, x_t, x_next = _path(LINEAR, x_start, t, noise)
    generator = torch.Generator().manual_seed(9)
    other = _step(LINEAR, x_prev, t, torch.randn(x_t.shape, generator=generator, dtype=torch.float64))

    right, wrong = (
        _literally(network, reverse, t, (x_prev, middle, x_next)) / (40 * 4 * math.log(2))
        for middle in (x_t, other)
    )
    print(
        f"sum of C_t, bits/dim: {right.sum():.2f} from the joint, {wrong.sum():.1f} with x_t apart from x_(t+1)"
    )
    ours = two_sided_term(network, reverse, x_start, t, noise).sum() / 40
    assert float(ours) == pytest.approx(float(right.sum()), abs=1e-6)
    # what is lost is the covariance of x_t and μ_θ(x_{t+1}) given x_{t−1}, over β̃_{t+1}: nearly 1 nat a dimension
    covariance = DATA.ancestral_slopes(LINEAR)[1:] * LINEAR.alphas[1:].sqrt() * LINEAR.betas[:-1]
    expected = float((covariance / LINEAR.posterior_variance[1:]).sum()) / math.log(2)
    excess = wrong - right
    stderr = float(excess.reshape(999, 40).var(1).sum() * 40) ** 0.5
    assert abs(float(excess.sum()) - expected) < 5 * stderr
    assert stderr < 0.01 * expected
    assert float(excess.sum()) > 1000


def test_a_term_is_differentiable_and_has_the_dtype_of_the_images() -> None:
    x_start, noise = _draws(3)
    t = torch.tensor([0, 7, 18])
    exact = two_sided_term(_network, ReverseProcess(SHORT), x_start, t, noise)
    for dtype in (torch.float32, torch.bfloat16):
        got = two_sided_term(_network, ReverseProcess(SHORT), x_start.to(dtype), t, noise.to(dtype))
        assert got.dtype == torch.float32
        assert bool(got.isfinite().all())
    got = two_sided_term(_network, ReverseProcess(SHORT), x_start.float(), t, noise.float())
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-4)
    strided = x_start.expand(3, 3, 2, 2).to(memory_format=torch.channels_last)[:, :, :, ::2]
    noises = noise.expand(3, 3, 3, 2, 2)[..., ::2]
    dense = two_sided_term(_network, ReverseProcess(SHORT), strided.contiguous(), t, noises.contiguous())
    torch.testing.assert_close(two_sided_term(_network, ReverseProcess(SHORT), strided, t, noises), dense)
    one = two_sided_term(_network, ReverseProcess(SHORT), x_start[1:2], t[1:2], noise[:, 1:2])
    torch.testing.assert_close(one, exact[1:2])

    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    reverse = ReverseProcess(SHORT, clip=False)
    assert torch.autograd.gradcheck(
        lambda s: two_sided_term(lambda x, t: s * x, reverse, x_start, t, noise), (scale,)
    )


def test_the_longest_and_the_shortest_chain() -> None:
    long = Schedule.from_config(ScheduleConfig(num_timesteps=4000, beta_start=0.25e-4, beta_end=0.005))
    x_start, noise = _draws(2)
    got = two_sided_term(_network, ReverseProcess(long), x_start, torch.tensor([0, 3998]), noise)
    assert bool(got.isfinite().all())
    one = Schedule.from_betas(torch.tensor([0.4], dtype=torch.float64))
    assert two_sided_shift(one).tolist() == [0.0]
    torch.testing.assert_close(two_sided_prior_term(one, x_start), prior_term(one, x_start))
    with pytest.raises(ValueError, match=r"^t: "):
        two_sided_term(_network, ReverseProcess(one), x_start, torch.tensor([0, 0]), noise)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("t", lambda x, n: two_sided_term(_network, ReverseProcess(SHORT), x, full(19, x), n)),
        ("t", lambda x, n: two_sided_term(_network, ReverseProcess(SHORT), x, full(-1, x), n)),
        ("t", lambda x, n: two_sided_term(_network, ReverseProcess(SHORT), x, full(1, x).double(), n)),
        ("noise", lambda x, n: two_sided_term(_network, ReverseProcess(SHORT), x, full(1, x), n[:2])),
        ("noise", lambda x, n: two_sided_term(_network, ReverseProcess(SHORT), x, full(1, x), n[0])),
        ("x_start", lambda x, n: two_sided_term(_network, ReverseProcess(SHORT), x.long(), full(1, x), n)),
        ("x_start", lambda x, n: two_sided_prior_term(SHORT, x.long())),
        (
            "eps_theta's output",
            lambda x, n: two_sided_term(lambda x, t: x[:1], ReverseProcess(SHORT), x, full(1, x), n),
        ),
        (
            "unit",
            lambda x, n: two_sided_term(_network, ReverseProcess(SHORT), x, full(1, x), n, unit="bits"),  # type: ignore[arg-type]
        ),
        (
            "decomposition",
            lambda x, n: BoundAccumulator(
                ReverseProcess(SHORT),
                levels=17,
                num_strata=2,
                seed=0,
                decomposition="both",  # type: ignore[arg-type]
            ),
        ),
    ],
)
def test_errors_name_the_argument(name: str, call: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: "):
        call(*_draws(2))
