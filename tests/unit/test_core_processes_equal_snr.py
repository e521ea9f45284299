"""Linear-Gaussian processes in use: equal bounds and images at equal SNR, and sampling end to end.

Data N(0, ¼) in each dimension, for which the best network and the moments of every image are known.
"""

import math

import pytest
import torch
from torch import Tensor

from ddpm_core import (
    LinearGaussianProcess,
    PredictionType,
    ReverseProcess,
    SamplerConfig,
    Schedule,
    ScheduleConfig,
    VarianceType,
    bound_term,
    prior_term,
    rng,
    sample,
)
from ddpm_core.processes import (
    ProcessKind,
    process_at,
    process_from_log_snr,
    rectified_flow,
    sub_variance_preserving,
    variance_exploding,
)
from tests.support.oracles import full

KINDS: tuple[ProcessKind, ...] = (
    "variance_preserving",
    "variance_exploding",
    "sub_variance_preserving",
    "rectified_flow",
)
LOG_SNR = torch.linspace(6.0, -9.0, 16, dtype=torch.float64)
ENDED = torch.cat((LOG_SNR, LOG_SNR.new_full((1,), -math.inf)))
S2 = 0.25


def _best(process: LinearGaussianProcess, prediction_type: PredictionType):
    """E[output | x_t] for data N(0, S2): Cov(output, x_t)/Var(x_t)·x_t."""
    a, b = process.a, process.b
    covariance = {"eps": b, "x_start": a * S2, "v": a * b - b * a * S2}[prediction_type]
    slope = covariance / (a * a * S2 + b * b)
    return lambda x_t, t: slope[t].to(x_t).reshape(-1, *[1] * (x_t.dim() - 1)) * x_t


def _x_start_mse(process: LinearGaussianProcess) -> Tensor:
    """Var(x_0 | x_t)."""
    a2, b2 = process.a.square(), process.b.square()
    return S2 * b2 / (a2 * S2 + b2)


def _bound(
    process: LinearGaussianProcess, prediction_type: PredictionType, variance_type: VarianceType
) -> Tensor:
    """Every term (mean over x_0 = ±½, ε = ±1) in bits: t = 0..T−1, then the prior term."""
    mse = _x_start_mse(process) if variance_type == "analytic" else None
    reverse = ReverseProcess(process, prediction_type, variance_type, False, mse)
    x_start = torch.tensor([0.5, 0.5, -0.5, -0.5], dtype=torch.float64).reshape(4, 1, 1, 1)
    noise = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64).reshape(4, 1, 1, 1)
    best = _best(process, prediction_type)
    terms = [
        bound_term(best, reverse, x_start, full(t, x_start), noise, levels=17).mean()
        for t in range(process.num_timesteps)
    ]
    return torch.stack([*terms, prior_term(process, x_start).mean()])


# ---- equal SNR


@pytest.mark.parametrize("variance_type", ["fixed_small", "analytic"])
@pytest.mark.parametrize("prediction_type", ["eps", "x_start", "v"])
def test_equal_snr_gives_equal_bounds(prediction_type: PredictionType, variance_type: VarianceType) -> None:
    expected = _bound(Schedule.from_log_snr(LOG_SNR), "eps", variance_type)
    assert bool((expected > 0).all())
    for kind in KINDS:
        got = _bound(process_at(kind, LOG_SNR), prediction_type, variance_type)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
        assert float(got.sum()) == pytest.approx(float(expected.sum()), rel=1e-12, abs=0)
    scale = torch.linspace(-30.0, 40.0, 16, dtype=torch.float64).sin() * 5
    got = _bound(process_from_log_snr(LOG_SNR, scale), prediction_type, variance_type)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("variance_type", ["fixed_small", "analytic"])
@pytest.mark.parametrize("prediction_type", ["x_start", "v"])
def test_equal_snr_gives_equal_bounds_without_a_last_signal(
    prediction_type: PredictionType, variance_type: VarianceType
) -> None:
    expected = _bound(Schedule.from_log_snr(ENDED), "x_start", variance_type)
    assert float(expected[-1]) == 0.0
    for kind in KINDS:
        if kind != "variance_exploding":
            got = _bound(process_at(kind, ENDED), prediction_type, variance_type)
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_equal_snr_gives_the_bound_of_the_closed_form() -> None:
    """½·ΔSNR·m for β̃ and ½·ln(1 + ΔSNR·m) for the analytic variance, which depend on the log-SNR alone."""
    snr = LOG_SNR.exp()
    gain = (snr[:-1] - snr[1:]) * S2 / (snr[1:] * S2 + 1)
    # over x_0 = ±s and ε = ±1 the error's mean square is its expectation m, for the KL's quadratic form
    small = _bound(process_at("rectified_flow", LOG_SNR), "v", "fixed_small")
    torch.testing.assert_close(small[1:-1], 0.5 * gain / math.log(2), rtol=1e-11, atol=0)
    analytic = _bound(process_at("variance_exploding", LOG_SNR), "v", "analytic")
    torch.testing.assert_close(analytic[1:-1], 0.5 * gain.log1p() / math.log(2), rtol=1e-11, atol=0)


def test_fixed_large_is_not_free_of_the_scale() -> None:
    preserving, exploding = (_bound(process_at(kind, LOG_SNR), "eps", "fixed_large") for kind in KINDS[:2])
    assert float((preserving - exploding).abs().max()) > 0.01


# ---- sampling end to end

SAMPLED: dict[str, tuple[LinearGaussianProcess, PredictionType]] = {
    "exploding eps": (variance_exploding(12), "eps"),
    "exploding x_start": (variance_exploding(12), "x_start"),
    "sub-preserving eps": (sub_variance_preserving(Schedule.from_log_snr(LOG_SNR)), "eps"),
    "sub-preserving v": (sub_variance_preserving(Schedule.from_log_snr(ENDED)), "v"),
    "rectified flow v": (rectified_flow(12), "v"),
    "rectified flow x_start": (rectified_flow(12), "x_start"),
    "preserving v": (Schedule.from_log_snr(ENDED), "v"),
    "inverse v": (Schedule.from_config(ScheduleConfig("inverse", 12)), "v"),
}
SHAPE = (1, 2, 2)


def _marginals(process: LinearGaussianProcess) -> tuple[Tensor, Tensor]:
    """Var(x_{t−1}) and Var(x_t) of q for data N(0, S2)."""
    after = process.a.square() * S2 + process.b.square()
    return torch.cat((after.new_tensor([S2]), after[:-1])), after


@pytest.mark.parametrize(("process", "prediction_type"), SAMPLED.values(), ids=SAMPLED.keys())
@pytest.mark.parametrize("kind", ["ancestral", "ddim"])
def test_sampling_end_to_end(
    process: LinearGaussianProcess, prediction_type: PredictionType, kind: str
) -> None:
    """The image is linear in the noise that (seed, index) decides; the weights are known in closed form.

    ancestral with the analytic variance: q(x_{t−1}|x_t), the conditional of two jointly Gaussian variables. ddim:
    a_{t−1}·E[x_0|x_t] + b_{t−1}·E[ε|x_t].
    """
    config = SamplerConfig(kind=kind, num_steps=None, variance_type="analytic", clip=False)  # type: ignore[arg-type]
    index = torch.arange(5)
    images = sample(
        _best(process, prediction_type),
        process,
        config,
        seed=3,
        index=index,
        shape=SHAPE,
        prediction_type=prediction_type,
        x_start_mse=_x_start_mse(process),
        dtype=torch.float64,
    )
    before, after = _marginals(process)
    a = torch.cat((torch.ones(1, dtype=torch.float64), process.a))
    b = torch.cat((torch.zeros(1, dtype=torch.float64), process.b))
    if kind == "ancestral":
        # Cov(x_{t−1}, x_t) = (a_t/a_{t−1})·Var(x_{t−1})
        covariance = process.a / a[:-1] * before
        slope = covariance / after
        spread = (before - covariance * slope).sqrt()
    else:
        slope = (a[:-1] * process.a * S2 + b[:-1] * process.b) / after
        spread = torch.zeros_like(slope)

    def draw(number: int) -> Tensor:
        return rng.normal(3, "sample", index, SHAPE, draw=number, dtype=torch.float64)

    start = float((process.a[-1].square() + process.b[-1].square()).sqrt())
    expected, variance = start * draw(0), start**2
    for t in reversed(range(process.num_timesteps)):
        # the last step gives the mean of x_0
        noise = spread[t] * draw(t + 1) if t else 0.0
        expected = slope[t] * expected + noise
        variance = float(slope[t]) ** 2 * variance + (float(spread[t]) ** 2 if t else 0.0)
    torch.testing.assert_close(images, expected, rtol=1e-9, atol=1e-11)

    # and that variance is the data's, less what the last mean leaves out, times the error of the prior
    if kind == "ancestral":
        left_out = float(_x_start_mse(process)[0])
        assert variance == pytest.approx(
            S2 - left_out, rel=1e-12 if process.ends_without_signal else 1e-3, abs=0
        )


@pytest.mark.parametrize("kind", KINDS)
def test_equal_snr_gives_equal_images(kind: ProcessKind) -> None:
    """The same seed and the same x̂_0 at each SNR: the chains are one chain in other units."""
    images = []
    for process in (process_at("variance_preserving", LOG_SNR), process_at(kind, LOG_SNR)):
        image = sample(
            _best(process, "x_start"),
            process,
            SamplerConfig(kind="ancestral", num_steps=9, variance_type="fixed_small", clip=True),
            seed=1,
            index=torch.arange(3),
            shape=SHAPE,
            prediction_type="x_start",
            dtype=torch.float64,
        )
        images.append(image)
    torch.testing.assert_close(images[0], images[1], rtol=1e-11, atol=1e-12)
