"""Every named schedule: its equation, its digits, its end, low precision, and the advice that it gives."""

import itertools
import math
from decimal import Decimal, localcontext
from typing import get_args

import pydantic
import pytest
import torch

from ddpm_core import PredictionType, ReverseProcess, Schedule, ScheduleConfig, q_sample
from ddpm_core.betas import BETAS, ScheduleKind
from ddpm_core.schedules import rescale_zero_terminal_snr

T = 40
GIVEN_BETAS = tuple(0.01 + 0.015 * t for t in range(T))
GIVEN_ALPHAS_CUMPROD = tuple(math.exp(-12.0 * ((t + 1) / T) ** 2) for t in range(T))


def _config(kind: ScheduleKind, num_timesteps: int = T, **fields) -> ScheduleConfig:
    if kind == "betas":
        fields |= {"betas": tuple(0.4 * beta for beta in GIVEN_BETAS)}
    if kind == "alphas_cumprod":
        fields |= {"alphas_cumprod": GIVEN_ALPHAS_CUMPROD}
    return ScheduleConfig(kind, num_timesteps, **fields)


KINDS: tuple[ScheduleKind, ...] = get_args(ScheduleKind)


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def _betas_of(alphas_cumprod: list[float], most: float = 1.0) -> list[float]:
    """From ᾱ_0 = 1 on, T + 1 values in and T out."""
    return [min(1.0 - after / before, most) for before, after in itertools.pairwise(alphas_cumprod)]


def _expected(kind: str) -> list[float]:
    low, high, shares = 1e-4, 0.02, [t / (T - 1) for t in range(T)]
    ends = [t / T for t in range(T + 1)]
    if kind == "linear":
        return [low + (high - low) * x for x in shares]
    if kind == "linear_scaled":
        return [25 * (low + (high - low) * x) for x in shares]
    if kind == "scaled_linear":
        return [(math.sqrt(low) + (math.sqrt(high) - math.sqrt(low)) * x) ** 2 for x in shares]
    if kind == "quadratic":
        return [low + (high - low) * x * x for x in shares]
    if kind == "constant":
        return [high] * T
    if kind == "warmup":
        return [low, low + (high - low) / 3, low + 2 * (high - low) / 3, *[high] * (T - 3)]
    if kind == "inverse":
        return [1 / (T - t) for t in range(T)]
    if kind == "cosine":
        curve = [math.cos(math.pi / 2 * (x + 0.008) / 1.008) ** 2 for x in ends]
        return _betas_of([f / curve[0] for f in curve], 0.999)
    if kind == "sigmoid":
        curve = [_sigmoid(3) - _sigmoid(-3 + 6 * x) for x in ends]
        return _betas_of([f / curve[0] for f in curve], 0.999)
    if kind == "sigmoid_beta":
        return [low + (high - low) * _sigmoid(-6 + 12 * x) for x in shares]
    if kind == "log_snr":
        return _betas_of([1.0, *(_sigmoid(10 - 20 * x) for x in shares)])
    if kind == "betas":
        return [0.4 * beta for beta in GIVEN_BETAS]
    assert kind == "alphas_cumprod"
    return _betas_of([1.0, *GIVEN_ALPHAS_CUMPROD])


@pytest.mark.parametrize("kind", KINDS)
def test_the_equation_of_each_kind(kind: ScheduleKind) -> None:
    schedule = Schedule.from_config(_config(kind))
    assert schedule.betas.dtype == torch.float64
    assert schedule.betas.tolist() == pytest.approx(_expected(kind), rel=1e-10, abs=0)
    survived = 1.0
    for t, beta in enumerate(_expected(kind)):
        survived *= 1.0 - beta
        assert float(schedule.alphas_cumprod[t]) == pytest.approx(survived, rel=1e-9, abs=0)


def test_every_kind_has_one_function() -> None:
    assert tuple(BETAS) == KINDS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_timesteps", [1, 4000])
def test_every_kind_at_few_and_at_many_steps(kind: ScheduleKind, num_timesteps: int) -> None:
    few = {"beta_start": 1e-5, "beta_end": 1e-3} if num_timesteps == 1 else {}
    config = _config(kind, num_timesteps if kind not in ("betas", "alphas_cumprod") else T, **few)
    schedule = Schedule.from_config(config)
    assert schedule.num_timesteps == config.num_timesteps
    assert bool((schedule.betas > 0).all())
    assert bool((schedule.betas[:-1] < 1).all())
    assert schedule.ends_without_signal == (kind == "inverse")
    prediction_type: PredictionType = "v" if kind == "inverse" else "eps"
    for variance_type in ("fixed_small", "fixed_large"):
        table = ReverseProcess(schedule, prediction_type, variance_type).log_variance_table()
        assert bool(table.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_noise_arrives_in_low_precision(kind: ScheduleKind, dtype: torch.dtype) -> None:
    schedule = Schedule.from_config(_config(kind, T if kind in ("betas", "alphas_cumprod") else 4000))
    num = schedule.num_timesteps
    t = torch.arange(num)
    x_start = torch.linspace(-1, 1, 33, dtype=dtype).expand(num, 33)
    spread = schedule.gather(schedule.sqrt_one_minus_alphas_cumprod, t, x_start)
    assert bool((spread > 0).all())
    noisy = q_sample(schedule, x_start, t, torch.ones_like(x_start))
    assert noisy.dtype == dtype
    clean = q_sample(schedule, x_start, t, torch.zeros_like(x_start))
    # x_0 = 0 hides nothing; next to larger values noise below half a unit of their last place rounds away
    assert bool((noisy != clean)[:, 16].all())
    assert bool((noisy != clean).any(1).all())


def test_the_digits_of_the_curves() -> None:
    """β of the cosine and the sigmoid at T = 4000 in 40 digits; 1 − ᾱ_t/ᾱ_{t−1} in float64 has 5 to 12 of them."""
    with localcontext() as context:
        context.prec = 40
        num = 4000

        def logistic(u: Decimal) -> Decimal:
            return 1 / (1 + (-u).exp())

        betas = Schedule.from_config(ScheduleConfig("sigmoid", num)).betas
        for t in (0, 1, 7, 2000, 3998):
            before, after = (logistic(-3 + 6 * Decimal(t + step) / num) for step in (0, 1))
            expected = (after - before) / (logistic(Decimal(3)) - before)
            assert float(betas[t]) == pytest.approx(float(expected), rel=2e-12, abs=0)
        # Σ over all steps of ln(1 − β) is ln ᾱ; the product of 4000 factors in 40 digits
        schedule = Schedule.from_config(ScheduleConfig("cosine", num))
        survived = Decimal(1)
        for t, beta in enumerate(schedule.betas.tolist()):
            survived *= 1 - Decimal(beta)
            if t in (0, 1, 10, 2000, 3999):
                assert float(schedule.alphas_cumprod[t]) == pytest.approx(float(survived), rel=1e-13, abs=0)
                left = float(1 - survived)
                assert float(schedule.one_minus_alphas_cumprod[t]) == pytest.approx(left, rel=1e-14, abs=0)
                ratio = float((survived / (1 - survived)).ln())
                assert float(schedule.log_snr[t]) == pytest.approx(ratio, rel=1e-13, abs=0)


# ---- given tables


def test_given_alphas_cumprod_are_kept() -> None:
    table = torch.tensor(GIVEN_ALPHAS_CUMPROD, dtype=torch.float64)
    schedule = Schedule.from_alphas_cumprod(table)
    torch.testing.assert_close(schedule.alphas_cumprod, table, rtol=4e-15, atol=0)
    # exact: 1 − ᾱ of the float64 that was given
    with localcontext() as context:
        context.prec = 40
        left = [float(1 - Decimal(value)) for value in table.tolist()]
    assert schedule.one_minus_alphas_cumprod.tolist() == pytest.approx(left, rel=1e-14, abs=0)
    again = Schedule.from_alphas_cumprod(Schedule.from_config(ScheduleConfig()).alphas_cumprod)
    torch.testing.assert_close(again.betas, Schedule.from_config(ScheduleConfig()).betas, rtol=1e-11, atol=0)
    ends = Schedule.from_alphas_cumprod(torch.tensor([0.5, 0.0]))
    assert ends.ends_without_signal
    assert ends.betas.tolist() == [0.5, 1.0]


def test_a_given_log_snr_is_kept_at_both_extremes() -> None:
    table = torch.tensor([300.0, 40.0, 20.0, 0.0, -40.0, -300.0], dtype=torch.float64)
    schedule = Schedule.from_log_snr(table)
    torch.testing.assert_close(schedule.log_snr, table, rtol=1e-14, atol=1e-15)
    with localcontext() as context:
        context.prec = 200
        snr = [Decimal(value).exp() for value in table.tolist()]
        kept = [float(x / (1 + x)) for x in snr]
        left = [float(1 / (1 + x)) for x in snr]
        before = [Decimal(1), *(x / (1 + x) for x in snr)]
        alphas = [float(after / b) for b, after in itertools.pairwise(before)]
        betas = [float(1 - after / b) for b, after in itertools.pairwise(before)]
    assert schedule.alphas_cumprod.tolist() == pytest.approx(kept, rel=1e-13, abs=0)
    assert schedule.one_minus_alphas_cumprod.tolist() == pytest.approx(left, rel=1e-13, abs=0)
    assert schedule.alphas.tolist() == pytest.approx(alphas, rel=1e-13, abs=0)
    assert schedule.betas.tolist() == pytest.approx(betas, rel=1e-13, abs=0)
    # two steps over ratios of 4e-18 and 1e-113 keep β below 1, as an ε-schedule needs
    assert bool((schedule.betas < 1).all())
    end = Schedule.from_log_snr(torch.tensor([2.0, -math.inf], dtype=torch.float64))
    assert end.ends_without_signal
    assert float(end.alphas_cumprod[0]) == pytest.approx(_sigmoid(2.0))


def test_respacing_keeps_every_digit_of_alphas_cumprod() -> None:
    schedule = Schedule.from_log_snr(torch.linspace(30, -60, 50, dtype=torch.float64))
    where = torch.tensor([3, 20, 49])
    short = schedule.at(where)
    for name in ("alphas_cumprod", "one_minus_alphas_cumprod", "log_snr"):
        assert torch.equal(getattr(short, name), getattr(schedule, name)[where]), name


@pytest.mark.parametrize(
    ("make", "name", "table"),
    [
        (Schedule.from_alphas_cumprod, "alphas_cumprod", [0.5, 0.5]),
        (Schedule.from_alphas_cumprod, "alphas_cumprod", [1.0, 0.5]),
        (Schedule.from_alphas_cumprod, "alphas_cumprod", [0.5, 0.0, 0.0]),
        (Schedule.from_alphas_cumprod, "alphas_cumprod", [0.5, -0.1]),
        (Schedule.from_alphas_cumprod, "alphas_cumprod", [math.nan]),
        (Schedule.from_alphas_cumprod, "alphas_cumprod", []),
        (Schedule.from_alphas_cumprod, "alphas_cumprod", [[0.5]]),
        (Schedule.from_log_snr, "log_snr", [1.0, 1.0]),
        (Schedule.from_log_snr, "log_snr", [math.inf, 1.0]),
        (Schedule.from_log_snr, "log_snr", [1.0, -math.inf, -math.inf]),
        (Schedule.from_log_snr, "log_snr", [1.0, math.nan]),
        (Schedule.from_log_snr, "log_snr", []),
    ],
)
def test_given_tables_that_are_no_schedule(make, name: str, table: list) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: must "):
        make(torch.tensor(table, dtype=torch.float64))
    with pytest.raises(ValueError, match=rf"^{name}: must be a floating-point"):
        make(torch.tensor([3, 1]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "betas"}, "betas: must be 40 numbers"),
        ({"kind": "betas", "betas": (0.1,) * 39}, "betas: must be 40 numbers .*, got '39'"),
        ({"kind": "betas", "betas": (0.1,) * 39 + (math.nan,)}, "betas: must lie between .* at 39"),
        ({"kind": "betas", "betas": (1.0,) * 40}, "betas: must lie between .* at 0"),
        ({"kind": "alphas_cumprod", "alphas_cumprod": (0.5,) * 40}, "alphas_cumprod: must fall .* at 1"),
        ({"kind": "linear_scaled", "num_timesteps": 10}, "beta_end: must be at most 0.01 .*, got 0.02"),
        (
            {"kind": "linear_scaled", "num_timesteps": 20, "beta_start": 0.02},
            "beta_start: must be below 0.02",
        ),
        ({"zero_terminal_snr": True, "num_timesteps": 1}, "num_timesteps: must be at least 2"),
    ],
)
def test_numbers_that_make_no_schedule_of_that_kind(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{message}"):
        ScheduleConfig(**{"num_timesteps": T, **fields})


@pytest.mark.parametrize(
    "betas", [[0.5, 1e-20], [0.1, 1 - 1e-12, 1e-17], [1e-5, 1e-22]], ids=["half", "late", "early"]
)
def test_a_beta_that_float64_cannot_see(betas: list[float]) -> None:
    at = len(betas) - 1
    with pytest.raises(ValueError, match=rf"^betas: must be large enough .*, got {betas[at]} at {at}$"):
        Schedule.from_betas(torch.tensor(betas, dtype=torch.float64))


def test_betas_at_both_limits() -> None:
    tiny = Schedule.from_betas(torch.tensor([1e-300, 1e-300], dtype=torch.float64))
    assert tiny.one_minus_alphas_cumprod.tolist() == pytest.approx([1e-300, 2e-300], rel=1e-14, abs=0)
    most = Schedule.from_betas(torch.full((3,), 1 - 2**-53, dtype=torch.float64))
    steps = [-53 * math.log(2) * number for number in (1, 2, 3)]
    assert most.log_alphas_cumprod.tolist() == pytest.approx(steps, rel=1e-14, abs=0)
    assert most.betas.tolist() == [1 - 2**-53] * 3


def test_tables_of_different_lengths() -> None:
    with pytest.raises(
        ValueError, match=r"^log_alphas_cumprod: must have the shape of betas, \[2\], got \[3\]$"
    ):
        Schedule(torch.tensor([0.1, 0.2]), log_alphas_cumprod=torch.zeros(3))


def test_fields_of_other_kinds_are_ignored() -> None:
    plain = Schedule.from_config(ScheduleConfig(num_timesteps=T))
    other = ScheduleConfig(num_timesteps=T, betas=(0.3,), log_snr_min=-3.0, sigmoid_tau=2.0)
    assert torch.equal(Schedule.from_config(other).betas, plain.betas)


def test_linear_scaled_may_end_at_one() -> None:
    schedule = Schedule.from_config(ScheduleConfig("linear_scaled", 20))
    assert float(schedule.betas[-1]) == 1.0
    with pytest.raises(ValueError, match=r"^prediction_type: must be 'v' or 'x_start'"):
        ReverseProcess(schedule)


def test_a_list_in_a_file_becomes_a_hashable_configuration() -> None:
    adapter = pydantic.TypeAdapter(ScheduleConfig)
    config = adapter.validate_python({"kind": "betas", "num_timesteps": 2, "betas": [0.1, 0.2]})
    assert config == ScheduleConfig("betas", 2, betas=(0.1, 0.2))
    assert len({config, ScheduleConfig("betas", 2, betas=(0.1, 0.2))}) == 1


# ---- zero terminal SNR


@pytest.mark.parametrize("kind", KINDS)
def test_rescaling_to_zero_terminal_snr(kind: ScheduleKind) -> None:
    schedule = Schedule.from_config(_config(kind))
    ended = rescale_zero_terminal_snr(schedule)
    root = schedule.alphas_cumprod.sqrt()
    moved = (root - root[-1]) * root[0] / (root[0] - root[-1])
    torch.testing.assert_close(ended.sqrt_alphas_cumprod, moved, rtol=1e-10, atol=1e-15)
    assert ended.betas[0] == pytest.approx(float(schedule.betas[0]), rel=1e-13, abs=0)
    assert float(ended.betas[-1]) == 1.0
    assert float(ended.alphas_cumprod[-1]) == 0.0
    assert ended.ends_without_signal
    assert ended.warnings() == []
    assert float(ended.prior_bits_per_dim(torch.ones(1, 1, dtype=torch.float64))) == 0.0
    assert rescale_zero_terminal_snr(ended) is ended
    by_flag = Schedule.from_config(_config(kind, zero_terminal_snr=True))
    assert torch.equal(by_flag.betas, ended.betas)
    with pytest.raises(ValueError, match=r"^prediction_type: "):
        ReverseProcess(ended, "eps")


def test_rescaling_keeps_the_digits_near_the_data() -> None:
    schedule = Schedule.from_config(ScheduleConfig("linear_scaled", 4000))
    ended = rescale_zero_terminal_snr(schedule)
    with localcontext() as context:
        context.prec = 50
        root, survived = [], Decimal(1)
        for beta in schedule.betas.tolist():
            survived *= 1 - Decimal(beta)
            root.append(survived.sqrt())
        for t in (0, 1, 5, 100, 2000, 3998):
            kept = ((root[t] - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
            assert float(ended.one_minus_alphas_cumprod[t]) == pytest.approx(
                float(1 - kept), rel=1e-12, abs=0
            )
            assert float(ended.alphas_cumprod[t]) == pytest.approx(float(kept), rel=1e-11, abs=0)


def test_one_step_cannot_be_rescaled_unless_it_ends_already() -> None:
    with pytest.raises(ValueError, match=r"^num_timesteps: must be at least 2 for zero_terminal_snr, got 1"):
        rescale_zero_terminal_snr(Schedule.from_betas(torch.tensor([0.5])))
    one = Schedule.from_betas(torch.tensor([1.0]))
    assert rescale_zero_terminal_snr(one) is one


def test_the_warm_up_ends_at_the_nearest_step() -> None:
    """0.5·7 = 3.5 steps are 4, and 0.3·7 = 2.1 are 2."""
    for fraction, rise in ((0.5, [0.25, 0.5, 0.75, 1.0]), (0.3, [0.25, 1.0])):
        config = ScheduleConfig("warmup", 7, beta_start=0.2, beta_end=0.8, warmup_fraction=fraction)
        betas = [0.2 + 0.6 * (value - 0.25) / 0.75 for value in rise] + [0.8] * (7 - len(rise))
        assert Schedule.from_config(config).betas.tolist() == pytest.approx(betas, rel=1e-12)
