"""The KL form of the bound for every prediction, variance and process, in both units."""

import math

import pytest
import torch
from torch import Tensor

from ddpm_core import (
    BoundAccumulator,
    Decomposition,
    EpsTheta,
    LinearGaussianProcess,
    PredictionType,
    ReverseProcess,
    Schedule,
    ScheduleConfig,
    VarianceType,
    bound_term,
    prediction_target,
    prior_term,
    q_posterior,
    q_sample,
    two_sided_term,
)
from tests.support.oracles import (
    GaussianData,
    full,
    snr,
    straight,
    symmetric_grid,
    symmetric_grid_at_every_t,
    variance_exploding,
)

LINEAR = Schedule.from_config(ScheduleConfig())
COSINE = Schedule.from_config(ScheduleConfig(kind="cosine"))
SHORT = Schedule.from_config(ScheduleConfig(num_timesteps=20, beta_start=0.005, beta_end=0.7))
PROCESSES = [LINEAR, COSINE, SHORT, variance_exploding(), straight()]
NAMES = ["linear", "cosine", "short", "ve", "straight"]
PREDICTIONS: tuple[PredictionType, ...] = ("eps", "x_start", "v")
FIXED: tuple[VarianceType, ...] = ("fixed_small", "fixed_large", "analytic")
DATA = GaussianData(0.25)
LN_2 = math.log(2)


def _best(process: LinearGaussianProcess, prediction_type: PredictionType) -> EpsTheta:
    """E[ε|x_t], E[x_0|x_t] or E[v|x_t] = a·E[ε|x_t] − b·E[x_0|x_t] of Gaussian data."""
    eps, x_start = DATA.eps_theta(process), DATA.x_start_theta(process)
    if prediction_type != "v":
        return {"eps": eps, "x_start": x_start}[prediction_type]

    def v(x_t: Tensor, t: Tensor) -> Tensor:
        a, b = (table[t].reshape(-1, 1, 1, 1) for table in (process.a, process.b))
        return a * eps(x_t, t) - b * x_start(x_t, t)

    return v


CASES = [
    pytest.param(process, prediction, id=f"{name}-{prediction}")
    for process, name in zip(PROCESSES, NAMES, strict=True)
    for prediction in PREDICTIONS
    if not (process.ends_without_signal and prediction == "eps")
]


@pytest.mark.parametrize(("process", "prediction_type"), CASES)
@pytest.mark.parametrize("variance_type", FIXED)
def test_every_prediction_of_the_best_network_has_the_terms_in_closed_form(
    process: LinearGaussianProcess, prediction_type: PredictionType, variance_type: VarianceType
) -> None:
    x_start, noise, t = symmetric_grid_at_every_t(DATA, process)
    reverse = ReverseProcess(
        process, prediction_type, variance_type, clip=False, x_start_mse=DATA.bayes_x_start_mse(process)
    )
    terms = bound_term(_best(process, prediction_type), reverse, x_start, t, noise, levels=17)
    got = terms.reshape(-1, 4).mean(1)[1:]
    torch.testing.assert_close(got, DATA.consistency_terms(process, variance_type)[1:], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(("process", "prediction_type"), CASES)
@pytest.mark.parametrize("v", [-1.0, -0.3, 0.6, 1.0])
def test_a_learned_variance_in_closed_form(
    process: LinearGaussianProcess, prediction_type: PredictionType, v: float
) -> None:
    """σ² = β̃·(β/β̃)^((v+1)/2), β that of q's step: ½·[ln r − 1 + (1 + x)/r] with r = σ²/β̃."""
    best = _best(process, prediction_type)

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        return torch.cat((best(x_t, t), torch.full_like(x_t, v)), dim=1)

    x_start, noise, t = symmetric_grid_at_every_t(DATA, process)
    reverse = ReverseProcess(process, prediction_type, "learned_range", clip=False)
    got = bound_term(network, reverse, x_start, t, noise, levels=17).reshape(-1, 4).mean(1)[1:]
    x = -snr(process).diff() * DATA.bayes_x_start_mse(process)[1:]
    ratio = (process.b[1:] / process.b[:-1]) ** (v + 1)
    expected = 0.5 * (ratio.log() - 1 + (1 + x) / ratio) / LN_2
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(("process", "prediction_type"), CASES)
@pytest.mark.parametrize("variance_type", [*FIXED, "learned_range"])
def test_a_term_is_the_divergence_of_the_two_normal_laws(
    process: LinearGaussianProcess, prediction_type: PredictionType, variance_type: VarianceType, clip: bool
) -> None:
    """KL(q(x_{t−1}|x_t, x_0) ‖ p_θ) by torch.distributions, with a network that is far off, at each pixel."""
    generator = torch.Generator().manual_seed(0)
    x_start = torch.randint(17, (5, 2, 2, 2), generator=generator).double() / 8 - 1
    noise = torch.randn(x_start.shape, generator=generator, dtype=torch.float64)
    last = process.num_timesteps - 1
    t = torch.tensor([1, 2, last // 2, last - 1, last])

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        prediction = torch.sin(0.5 * x_t)
        return torch.cat((prediction, torch.cos(x_t)), 1) if variance_type == "learned_range" else prediction

    mse = 0.02 + 0.1 * torch.sigmoid(-process.log_snr)
    reverse = ReverseProcess(process, prediction_type, variance_type, clip, x_start_mse=mse)
    x_t = q_sample(process, x_start, t, noise)
    q_mean, q_variance, _ = q_posterior(process, x_start, x_t, t)
    p_mean, p_log_variance = reverse.transition(network(x_t, t), x_t, t)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(q_mean, q_variance.sqrt()),
        torch.distributions.Normal(p_mean, (0.5 * p_log_variance).exp()),
    )
    got = bound_term(network, reverse, x_start, t, noise, levels=17, unit="nats")
    torch.testing.assert_close(got, expected.flatten(1).sum(1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("variance_type", [*FIXED, "learned_range"])
def test_the_variance_at_the_first_step(variance_type: VarianceType) -> None:
    """β̃ = 0 there: fixed forms and the learned one's lower limit take index 1's; analytic has c1²·m(0) = m(0)."""
    mse = torch.linspace(0.01, 0.2, 20, dtype=torch.float64)
    reverse = ReverseProcess(SHORT, "x_start", variance_type, clip=False, x_start_mse=mse)
    second = float(SHORT.betas[1] * SHORT.betas[0] / (1 - SHORT.alphas[0] * SHORT.alphas[1]))
    variance = {"analytic": 0.01, "learned_range": second**0.7 * float(SHORT.betas[0]) ** 0.3}.get(
        variance_type, second
    )

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        center = 0.9 * x_t
        return torch.cat((center, 0 * x_t - 0.4), 1) if variance_type == "learned_range" else center

    x_start = torch.tensor([-0.5, 0.0, 0.125, 0.5], dtype=torch.float64).reshape(1, 1, 2, 2)
    noise = torch.randn(x_start.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = bound_term(network, reverse, x_start, full(0, x_start), noise, levels=17, unit="nats")
    law = torch.distributions.Normal(0.9 * q_sample(SHORT, x_start, full(0, x_start), noise), variance**0.5)
    mass = law.cdf(x_start + 1 / 16) - law.cdf(x_start - 1 / 16)
    torch.testing.assert_close(got, -mass.log().sum().reshape(1), rtol=1e-9, atol=0)


def test_units() -> None:
    x_start, noise = symmetric_grid(DATA)
    x_start, noise = x_start.expand(4, 3, 2, 2), noise.expand(4, 3, 2, 2)
    t = torch.tensor([0, 1, 7, 19])
    bits = bound_term(DATA.eps_theta(SHORT), ReverseProcess(SHORT), x_start, t, noise, levels=17)
    nats = bound_term(DATA.eps_theta(SHORT), ReverseProcess(SHORT), x_start, t, noise, levels=17, unit="nats")
    torch.testing.assert_close(nats, bits * 12 * LN_2)
    torch.testing.assert_close(
        prior_term(SHORT, x_start, unit="nats"), SHORT.prior_bits_per_dim(x_start) * 12 * LN_2
    )
    with pytest.raises(ValueError, match=r"^unit: must be 'bits_per_dim' or 'nats', got 'bytes'"):
        prior_term(SHORT, x_start, unit="bytes")  # type: ignore[arg-type]


def _accumulated(index: Tensor, num_strata: int = 19) -> BoundAccumulator:
    accumulator = BoundAccumulator(ReverseProcess(SHORT), levels=17, num_strata=num_strata, seed=0)
    images = (
        torch.randint(17, (len(index), 1, 2, 2), generator=torch.Generator().manual_seed(2)).double() / 8 - 1
    )
    accumulator.add(lambda x, t: 0.6 * x, images, index)
    return accumulator


def test_an_estimate_in_nats() -> None:
    bits = _accumulated(torch.arange(30)).result()
    nats = bits.in_nats(4)
    factor = 4 * LN_2
    for name, value in vars(bits).items():
        if isinstance(value, float):
            assert getattr(nats, name) == pytest.approx(factor * value, rel=1e-12), name
    assert nats.num_images == 30
    assert nats.per_t == pytest.approx([factor * term for term in bits.per_t])


def test_what_is_measured_at_each_t() -> None:
    """Mean, standard error and error of x̂_0 at each t, against the images one at a time."""
    together = _accumulated(torch.arange(8)).per_t()
    images = torch.randint(17, (8, 1, 2, 2), generator=torch.Generator().manual_seed(2)).double() / 8 - 1
    terms, errors = [], []
    for i in range(8):
        single = BoundAccumulator(ReverseProcess(SHORT), levels=17, num_strata=19, seed=0)
        single.add(lambda x, t: 0.6 * x, images[i : i + 1], torch.tensor([i]))
        terms.append(single.per_t().term)
        errors.append(single.per_t().x_start_mse)
        assert bool(single.per_t().stderr.isnan().all())
    values = torch.stack(terms)
    torch.testing.assert_close(together.term, values.mean(0))
    torch.testing.assert_close(together.stderr, values.std(0) / math.sqrt(8), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(together.x_start_mse, torch.stack(errors).mean(0))
    assert together.num_draws.tolist() == [8] * 20
    assert together.term.tolist() == _accumulated(torch.arange(8)).result().per_t


def test_the_measured_error_is_the_bayes_error_of_the_best_network() -> None:
    accumulator = BoundAccumulator(ReverseProcess(SHORT, clip=False), levels=5, num_strata=19, seed=3)
    index = torch.arange(10_000)
    sign = (index % 2 * 2 - 1).double().reshape(-1, 1, 1, 1)
    accumulator.add(DATA.eps_theta(SHORT), (sign * 0.5).expand(-1, 1, 1, 2), index)
    got = accumulator.per_t().x_start_mse
    torch.testing.assert_close(got, DATA.bayes_x_start_mse(SHORT), rtol=0.06, atol=0)
    some = _accumulated(torch.arange(3), num_strata=2).per_t()
    assert bool((some.x_start_mse.isnan() == (some.num_draws == 0)).all())
    assert int(some.num_draws[1:].sum()) == 6


@pytest.mark.parametrize("decomposition", ["kl", "two_sided"])
def test_an_accumulator_reads_a_learned_variance(decomposition: Decomposition) -> None:
    """v = −1 is fixed_small at every t, the first included."""
    images = torch.randint(17, (20, 2, 2, 2), generator=torch.Generator().manual_seed(2)).double() / 8 - 1
    estimates = []
    for variance_type in ("fixed_small", "learned_range"):

        def network(x_t: Tensor, t: Tensor, learned: bool = variance_type == "learned_range") -> Tensor:
            return torch.cat((0.5 * x_t, torch.full_like(x_t, -1.0)), 1) if learned else 0.5 * x_t

        accumulator = BoundAccumulator(
            ReverseProcess(SHORT, "x_start", variance_type),
            levels=17,
            num_strata=5,
            seed=0,
            decomposition=decomposition,
        )
        accumulator.add(network, images, torch.arange(20))
        estimates.append(accumulator.result())
    small, learned = estimates
    assert learned.total == pytest.approx(small.total, rel=1e-12)
    assert learned.total_stderr == pytest.approx(small.total_stderr, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_and_any_memory_layout(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    x_start = (torch.randint(17, (6, 4, 4, 4), generator=generator).double() / 8 - 1)[::2, :, :, ::2]
    noise = torch.randn(x_start.shape, generator=generator, dtype=torch.float64).to(dtype).double()
    t = torch.tensor([0, 3, 19])
    exact = bound_term(lambda x, t: 0.5 * x, ReverseProcess(SHORT), x_start, t, noise, levels=17)
    for layout in (torch.contiguous_format, torch.channels_last):
        x, n = (v.to(dtype).contiguous(memory_format=layout) for v in (x_start, noise))
        got = bound_term(lambda x, t: 0.5 * x, ReverseProcess(SHORT), x, t, n, levels=17)
        assert got.dtype == torch.float32
        rtol = 1e-4 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(got.double(), exact, rtol=rtol, atol=1e-5)
        one = bound_term(lambda x, t: 0.5 * x, ReverseProcess(SHORT), x[1:2], t[1:2], n[1:2], levels=17)
        torch.testing.assert_close(one, got[1:2])


@pytest.mark.parametrize("variance_type", [*FIXED, "learned_range"])
def test_the_gradient_is_the_derivative(variance_type: VarianceType) -> None:
    x_start, noise, t = symmetric_grid_at_every_t(DATA, SHORT)
    x_start, noise, t = x_start[::4], noise[::4], t[::4]
    mse = DATA.bayes_x_start_mse(SHORT)
    reverse = ReverseProcess(SHORT, "v", variance_type, clip=False, x_start_mse=mse)
    channels = 2 if variance_type == "learned_range" else 1
    target = prediction_target(SHORT, "v", x_start, t, noise)
    start = torch.cat((target + 0.1, 0.3 * noise), 1)[:, :channels].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda output: bound_term(lambda x, t: output, reverse, x_start, t, noise, levels=17), (start,)
    )


@pytest.mark.parametrize("betas", [[1e-8, 1e-8], [1e-4, 0.999], [0.5, 1.0]])
def test_betas_at_their_limits(betas: list[float]) -> None:
    process = Schedule.from_betas(torch.tensor(betas, dtype=torch.float64))
    x_start, noise = symmetric_grid(DATA)
    for t in (0, 1):
        term = bound_term(
            lambda x, t: 0.5 * x, ReverseProcess(process, "v"), x_start, full(t, x_start), noise, levels=5
        )
        assert bool(term.isfinite().all())


@pytest.mark.parametrize("prediction_type", ["eps", "x_start", "v"])
def test_float32_holds_terms_whose_weights_it_does_not(prediction_type: PredictionType) -> None:
    """At log-SNR 100 the weight of x̂_0's squared error is e^100, which is no float32."""
    process = Schedule.from_config(ScheduleConfig("log_snr", 12, log_snr_max=100.0, log_snr_min=-20.0))
    t = torch.arange(12)

    def terms(dtype: torch.dtype) -> Tensor:
        x_start = torch.linspace(-1, 1, 17, dtype=dtype)[torch.arange(48) % 17].reshape(12, 1, 2, 2)
        noise = torch.linspace(-2, 2, 48, dtype=dtype).reshape(12, 1, 2, 2)
        target = prediction_target(process, prediction_type, x_start, t, noise)
        reverse = ReverseProcess(process, prediction_type, clip=False)
        return bound_term(lambda x, t: target + 2.0**-10, reverse, x_start, t, noise, levels=17)

    exact = terms(torch.float64)
    assert float(exact[1]) > (1e30 if prediction_type == "x_start" else 1e-9)
    torch.testing.assert_close(terms(torch.float32).double(), exact, rtol=0.01, atol=1e-6)


def test_a_long_chain_is_whole() -> None:
    process = Schedule.from_config(ScheduleConfig(num_timesteps=4000, beta_start=0.25e-4, beta_end=0.005))
    x_start, noise, t = symmetric_grid_at_every_t(DATA, process)
    terms = bound_term(
        DATA.eps_theta(process), ReverseProcess(process, clip=False), x_start, t, noise, levels=17
    )
    got = terms.reshape(-1, 4).mean(1)[1:]
    torch.testing.assert_close(got, DATA.consistency_terms(process, "fixed_small")[1:], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("variance_type", ["fixed_small", "analytic"])
@pytest.mark.parametrize("schedule", [LINEAR, COSINE, SHORT], ids=["linear", "cosine", "short"])
def test_at_equal_snr_every_process_has_the_same_bound(
    schedule: Schedule, variance_type: VarianceType
) -> None:
    """x_t/a_t is all that a network needs. σ² = β of q's step depends on the scale, and is left out."""
    straight_way = -torch.log1p(torch.exp(schedule.log_b - schedule.log_a))
    others = [
        LinearGaussianProcess(log_a, log_a + (schedule.log_b - schedule.log_a), snr_loss=schedule.snr_loss)
        for log_a in (torch.zeros_like(schedule.log_a), straight_way)
    ]
    x_start, noise, t = symmetric_grid_at_every_t(DATA, schedule)
    mse = DATA.bayes_x_start_mse(schedule)

    def bound(process: LinearGaussianProcess) -> tuple[Tensor, Tensor, Tensor]:
        def network(x_t: Tensor, t: Tensor) -> Tensor:
            signal = x_t / process.a[t].reshape(-1, 1, 1, 1)
            return 0.9 * signal / (1 + schedule.log_snr[t].neg().exp().reshape(-1, 1, 1, 1))

        reverse = ReverseProcess(process, "x_start", variance_type, clip=False, x_start_mse=mse)
        inner = t < process.num_timesteps - 1
        triple = torch.stack((noise, noise.roll(1, 0), noise.roll(2, 0)))[:, inner]
        return (
            bound_term(network, reverse, x_start, t, noise, levels=17),
            two_sided_term(network, reverse, x_start[inner], t[inner], triple),
            prior_term(process, x_start),
        )

    expected = bound(schedule)
    for process in others:
        for got, one in zip(bound(process), expected, strict=True):
            torch.testing.assert_close(got, one, rtol=1e-12, atol=1e-12)
