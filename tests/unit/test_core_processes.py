"""Other linear-Gaussian processes: their tables in many digits, their scale, and whether they end in noise."""

import math
from decimal import Decimal, localcontext

import pytest
import torch
from torch import Tensor

from ddpm_core import (
    LinearGaussianProcess,
    Schedule,
    ScheduleConfig,
    prior_term,
    q_sample,
)
from ddpm_core.processes import (
    ProcessKind,
    process_at,
    process_from_coefficients,
    process_from_log_snr,
    rectified_flow,
    sub_variance_preserving,
    variance_exploding,
)

KINDS: tuple[ProcessKind, ...] = (
    "variance_preserving",
    "variance_exploding",
    "sub_variance_preserving",
    "rectified_flow",
)
LOG_SNR = torch.linspace(6.0, -9.0, 16, dtype=torch.float64)
ENDED = torch.cat((LOG_SNR, LOG_SNR.new_full((1,), -math.inf)))


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_its_scale(kind: ProcessKind) -> None:
    process = process_at(kind, LOG_SNR)
    assert torch.equal(process.log_snr, LOG_SNR)
    torch.testing.assert_close(2 * (process.a / process.b).log(), LOG_SNR, rtol=1e-13, atol=1e-14)
    a, b = process.a, process.b
    relation = {
        "variance_preserving": a * a + b * b,
        "variance_exploding": a,
        "sub_variance_preserving": a * a + b,
        "rectified_flow": a + b,
    }[kind]
    torch.testing.assert_close(relation, torch.ones_like(relation), rtol=1e-14, atol=0)
    torch.testing.assert_close(process.total_variance, a * a + b * b, rtol=1e-13, atol=0)


def test_the_preserving_kind_is_the_schedule() -> None:
    schedule, process = Schedule.from_log_snr(LOG_SNR), process_at("variance_preserving", LOG_SNR)
    for name in ("a", "b", "snr_loss", "step_scale", "step_variance", "posterior_mean_coef2"):
        torch.testing.assert_close(getattr(process, name), getattr(schedule, name), rtol=1e-13, atol=0)


# ---- the tables


def _reference(a: list[Decimal], b: list[Decimal]) -> dict[str, list[float]]:
    """The tables from their definitions, in the digits of the context."""
    found: dict[str, list[float]] = {}
    a_prev, b_prev = Decimal(1), Decimal(0)
    for a_t, b_t in zip(a, b, strict=True):
        scale = a_t / a_prev
        variance = b_t**2 - (scale * b_prev) ** 2
        for name, value in {
            "a": a_t,
            "b": b_t,
            "total_variance": a_t**2 + b_t**2,
            "snr_loss": variance / b_t**2,
            "step_scale": scale,
            "step_variance": variance,
            "posterior_mean_coef1": a_prev * variance / b_t**2,
            "posterior_mean_coef2": scale * b_prev**2 / b_t**2,
            "posterior_variance": b_prev**2 * variance / b_t**2,
        }.items():
            found.setdefault(name, []).append(float(value))
        a_prev, b_prev = a_t, b_t
    return found


def _check_digits(
    process: LinearGaussianProcess, a: list[Decimal], b: list[Decimal], digits: float = 1e-12
) -> None:
    for name, expected in _reference(a, b).items():
        want = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(getattr(process, name), want, rtol=digits, atol=0)


def test_the_digits_of_4000_steps() -> None:
    num = 4000
    with localcontext() as context:
        context.prec = 40
        flow = [Decimal(t + 1) / num for t in range(num)]
        _check_digits(rectified_flow(num), [1 - s for s in flow], flow, 1e-14)
        low, high = Decimal("0.01").ln(), Decimal(50).ln()
        growth = ((high - low) / (num - 1)).exp()
        sigma = [Decimal("0.01") * growth**t for t in range(num)]
        _check_digits(variance_exploding(num), [Decimal(1)] * num, sigma)
        schedule = Schedule.from_config(ScheduleConfig("linear_scaled", num))
        survived, kept = Decimal(1), []
        for beta in schedule.betas.tolist():
            survived *= 1 - Decimal(beta)
            kept.append(survived)
        roots = [x.sqrt() for x in kept]
        _check_digits(schedule, roots, [(1 - x).sqrt() for x in kept], 1e-13)
        _check_digits(sub_variance_preserving(schedule), roots, [1 - x for x in kept])
        a, b = torch.tensor([[float(1 - s), float(s)] for s in flow], dtype=torch.float64).unbind(1)
        exact_a, exact_b = ([Decimal(x) for x in table.tolist()] for table in (a, b))
        _check_digits(process_from_coefficients(a, b), exact_a, exact_b)


@pytest.mark.parametrize("log_snr", [[700.0, -700.0], [60.0, 59.999, 40.0, 1e-9, -40.0, -60.0]])
def test_the_digits_of_extreme_signal_to_noise_ratios(log_snr: list[float]) -> None:
    table = torch.tensor(log_snr, dtype=torch.float64)
    with localcontext() as context:
        # 1 − e^{−700} needs more than 304 digits
        context.prec = 700
        r = [(Decimal(x) / 2).exp() for x in log_snr]
        a_of = {
            "variance_preserving": [x / (1 + x * x).sqrt() for x in r],
            "variance_exploding": [Decimal(1)] * len(r),
            "sub_variance_preserving": [2 * x / (1 + (1 + 4 * x * x).sqrt()) for x in r],
            "rectified_flow": [x / (1 + x) for x in r],
        }
        for kind in KINDS:
            a = a_of[kind]
            _check_digits(process_at(kind, table), a, [x / y for x, y in zip(a, r, strict=True)], 2e-13)
        kept = a_of["variance_preserving"]
        _check_digits(
            Schedule.from_log_snr(table), kept, [x / y for x, y in zip(kept, r, strict=True)], 2e-13
        )


def test_a_shorter_chain_keeps_its_end_points() -> None:
    where = torch.tensor([2, 7, 15])
    for kind in KINDS:
        process = process_at(kind, LOG_SNR)
        short = process.at(where)
        for name in ("a", "b", "log_snr", "total_variance"):
            assert torch.equal(getattr(short, name), getattr(process, name)[where])


# ---- the end


def test_processes_that_end_in_noise_are_silent() -> None:
    for process in (
        variance_exploding(1000),
        variance_exploding(1),
        rectified_flow(1),
        rectified_flow(1000),
        sub_variance_preserving(Schedule.from_config(ScheduleConfig())),
        sub_variance_preserving(Schedule.from_config(ScheduleConfig(zero_terminal_snr=True))),
        *(process_at(kind, LOG_SNR) for kind in KINDS),
    ):
        assert process.warnings() == []
    assert rectified_flow(10).ends_without_signal
    assert not variance_exploding(10).ends_without_signal


def test_following_the_warning_silences_it() -> None:
    process = variance_exploding(1000, sigma_max=5.0)
    (warning,) = process.warnings()
    assert "b/a, 5 at the last step" in warning
    enough = float(warning.split("grow to ")[1].split(" ")[0])
    assert variance_exploding(1000, sigma_max=enough).warnings() == []
    for kind in KINDS:
        near = torch.tensor([5.0, 2 * math.log(1 / enough) + 2.0], dtype=torch.float64)
        assert len(process_at(kind, near).warnings()) == 1
        far = torch.tensor([5.0, 2 * math.log(1 / enough)], dtype=torch.float64)
        assert process_at(kind, far).warnings() == []


def test_the_prior_term_of_an_exploding_process_is_the_gaussian_divergence() -> None:
    process = variance_exploding(20, sigma_max=3.0)
    x = torch.tensor([[0.0], [0.4], [-1.0]], dtype=torch.float64)
    sigma = torch.tensor(3.0, dtype=torch.float64)
    q = torch.distributions.Normal(x.flatten(), sigma)
    p = torch.distributions.Normal(0 * sigma, (1 + sigma**2).sqrt())
    expected = torch.distributions.kl_divergence(q, p) / math.log(2)
    torch.testing.assert_close(prior_term(process, x), expected, rtol=1e-12, atol=0)


# ---- low precision and errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_noise_and_signal_in_other_dtypes(dtype: torch.dtype) -> None:
    for process in (
        variance_exploding(100),
        rectified_flow(100),
        process_at("sub_variance_preserving", LOG_SNR),
    ):
        t = torch.arange(process.num_timesteps)
        one = torch.ones(process.num_timesteps, 1, dtype=dtype)
        noise, signal = q_sample(process, 0 * one, t, one), q_sample(process, one, t, 0 * one)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(noise.flatten().double(), process.b, rtol=eps, atol=0)
        torch.testing.assert_close(signal.flatten().double(), process.a, rtol=eps, atol=0)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("log_a", lambda: LinearGaussianProcess(LOG_SNR.long(), LOG_SNR)),
        ("log_a", lambda: LinearGaussianProcess(torch.tensor([-math.inf, 0.0]), torch.zeros(2))),
        ("log_b", lambda: LinearGaussianProcess(LOG_SNR, LOG_SNR[:3])),
        ("log_b", lambda: LinearGaussianProcess(LOG_SNR, LOG_SNR * math.nan)),
        ("log_snr", lambda: LinearGaussianProcess(LOG_SNR, -LOG_SNR, log_snr=LOG_SNR[:3])),
        ("snr_loss", lambda: LinearGaussianProcess(LOG_SNR, -LOG_SNR, snr_loss=LOG_SNR[:3])),
        ("total_variance", lambda: LinearGaussianProcess(LOG_SNR, -LOG_SNR, total_variance=LOG_SNR[:3])),
        ("num_timesteps", lambda: variance_exploding(0)),
        ("sigma_min", lambda: variance_exploding(5, sigma_min=0.0)),
        ("sigma_max", lambda: variance_exploding(5, sigma_max=0.01)),
        ("sigma_max", lambda: variance_exploding(5, sigma_max=math.nan)),
        ("num_timesteps", lambda: rectified_flow(0)),
        ("kind", lambda: process_at("other", LOG_SNR)),  # type: ignore[arg-type]
        ("log_snr", lambda: process_at("variance_exploding", ENDED)),
        ("log_snr", lambda: process_at("rectified_flow", LOG_SNR.flip(0))),
        ("log_snr", lambda: process_from_log_snr(torch.tensor([2, 1]))),
        ("log_scale", lambda: process_from_log_snr(LOG_SNR, LOG_SNR[:3])),
        ("log_scale", lambda: process_from_log_snr(LOG_SNR, LOG_SNR * math.nan)),
        ("a", lambda: process_from_coefficients(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 2.0]))),
        ("a", lambda: process_from_coefficients(torch.tensor([math.nan]), torch.tensor([1.0]))),
        ("b", lambda: process_from_coefficients(torch.tensor([0.5]), torch.tensor([0.0]))),
        ("b", lambda: process_from_coefficients(torch.tensor([0.5]), torch.tensor([math.inf]))),
        ("a", lambda: process_from_coefficients(torch.tensor([1]), torch.tensor([1.0]))),
        ("log_snr", lambda: process_from_coefficients(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 1.0]))),
    ],
)
def test_errors_name_the_argument(name: str, call) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: must "):
        call()


@pytest.mark.parametrize("r", ["0.0101", "0.009", "0.0099", "1e-6"])
def test_the_digits_of_the_prior_term(r: str) -> None:
    """For x_0 = 0 it is ½·(−ln(1 − r) − r)/ln 2, r = a²/(a² + b²), here in fifty decimal digits."""
    with localcontext() as context:
        context.prec = 50
        log_odds = float((Decimal(r) / (1 - Decimal(r))).ln())
        odds = Decimal(log_odds).exp()
        share = odds / (1 + odds)
        expected = float((-(1 - share).ln() - share) / (2 * Decimal(2).ln()))
    process = process_from_log_snr(torch.tensor([3.0, log_odds], dtype=torch.float64))
    got = float(process.prior_bits_per_dim(torch.zeros(1, 1, dtype=torch.float64)))
    assert got == pytest.approx(expected, rel=1e-12 if float(r) > 0.01 else 2e-14, abs=0)


def test_tables_do_not_alias_what_they_were_made_from() -> None:
    log_snr = torch.tensor([2.0, 0.0, -3.0], dtype=torch.float64)
    log_a, log_b = 0.5 * torch.nn.functional.logsigmoid(torch.stack((log_snr, -log_snr)))
    loss, total = -torch.expm1(log_snr.diff(prepend=log_snr.new_full((1,), math.inf))), torch.ones(3).double()
    given = {"log_snr": log_snr, "snr_loss": loss, "total_variance": total}
    process = LinearGaussianProcess(log_a, log_b, **given)
    before = {name: value.clone() for name, value in vars(process).items() if isinstance(value, Tensor)}
    for tensor in (log_a, log_b, *given.values()):
        tensor.fill_(7.0)
    for name, value in before.items():
        assert torch.equal(getattr(process, name), value), name
