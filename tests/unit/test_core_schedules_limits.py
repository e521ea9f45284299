"""Every kind of schedule at the limits of its fields: a sound process, or a refusal that names a field."""

from dataclasses import fields, replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from ddpm_core import (
    ReverseProcess,
    Schedule,
    ScheduleConfig,
    convert_prediction,
    q_posterior,
    q_sample,
    q_step,
)
from ddpm_core.betas import ScheduleKind

KINDS: tuple[ScheduleKind, ...] = get_args(ScheduleKind)
FIELDS = {field.name for field in fields(ScheduleConfig)}
LAST_BELOW_1 = 1.0 - 2.0**-53
TINY = 1e-15

LIMITS: dict[ScheduleKind, list[dict[str, Any]]] = {
    **{
        kind: [
            {"beta_start": TINY, "beta_end": TINY},
            {"beta_start": TINY, "beta_end": LAST_BELOW_1},
            {"beta_start": 0.999, "beta_end": LAST_BELOW_1},
            {"beta_start": 5e-324, "beta_end": 0.5},
        ]
        for kind in ("linear", "scaled_linear", "quadratic", "constant", "warmup", "sigmoid_beta")
    },
    "linear_scaled": [{"beta_start": TINY, "beta_end": TINY}, {"beta_start": TINY, "beta_end": 0.002}],
    "inverse": [{}],
    "cosine": [{"cosine_s": 1e-12}, {"cosine_s": 1e6}, {"beta_max": 1e-12}, {"beta_max": LAST_BELOW_1}],
    "sigmoid": [
        {"sigmoid_start": -700.0, "sigmoid_end": 700.0},
        {"sigmoid_start": 699.0, "sigmoid_end": 700.0},
        {"sigmoid_start": -1e-9, "sigmoid_end": 1e-9},
        {"sigmoid_tau": 1e-2},
        {"sigmoid_tau": 1e9},
    ],
    "log_snr": [
        {"log_snr_max": 700.0, "log_snr_min": -700.0},
        {"log_snr_max": 36.0, "log_snr_min": 35.0},
        {"log_snr_max": -600.0, "log_snr_min": -700.0},
        {"log_snr_max": 1e-9, "log_snr_min": -1e-9},
    ],
    "betas": [{"betas": (TINY,)}, {"betas": (LAST_BELOW_1,)}, {"betas": (1e-4,)}],
    "alphas_cumprod": [{"alphas_cumprod": (LAST_BELOW_1,)}, {"alphas_cumprod": (5e-324,)}],
}
LIMITS["warmup"] += [{"warmup_fraction": 1e-9}, {"warmup_fraction": 1.0}]
CASES = [(kind, case) for kind in KINDS for case in LIMITS[kind]]


def _config(kind: ScheduleKind, case: dict[str, Any], num_timesteps: int) -> ScheduleConfig:
    """A given table stands for one extreme number, which a tame table of T − 1 precedes, or follows near ᾱ = 1."""
    if kind in ("betas", "alphas_cumprod"):
        (extreme,) = case[kind]
        tame = torch.linspace(0.01, 0.02, num_timesteps - 1, dtype=torch.float64)
        tame = (1.0 - tame).cumprod(0) if kind == "alphas_cumprod" else tame
        first = kind == "alphas_cumprod" and extreme > 0.5
        case = {kind: (extreme, *tame.tolist()) if first else (*tame.tolist(), extreme)}
    return ScheduleConfig(kind, num_timesteps, **case)


def _is_sound(schedule: Schedule) -> None:
    last = schedule.num_timesteps - 1
    for name, table in vars(schedule).items():
        if isinstance(table, Tensor):
            assert not bool(table.isnan().any()), name
            # 1/a and what holds it, where the signal is no number
            endless = schedule.a.reciprocal().isinf() & torch.tensor("recip" in name)
            if "log" in name:
                endless[-1] = schedule.ends_without_signal
            assert bool((table.isfinite() | endless).all()), name
    assert bool(((schedule.betas > 0) & (schedule.betas <= 1)).all())
    assert bool((schedule.log_snr.diff() < 0).all())
    assert bool((schedule.posterior_variance[1:] > 0).all())
    x = torch.tensor([[0.5], [-1.0]], dtype=torch.float64)
    t = torch.tensor([0, last])
    x_t = q_sample(schedule, x, t, -x)
    made = [x_t, q_step(schedule, x, t, -x), *q_posterior(schedule, x, x_t, t)]
    made.append(convert_prediction(schedule, x_t, t, x, "v", "x_start"))
    if bool(schedule.a[-1] > 0):
        mean, log_variance = ReverseProcess(schedule).transition(x, x_t, t)
        made += [mean, log_variance]
    for result in made:
        assert bool(result.isfinite().all())


@pytest.mark.parametrize("num_timesteps", [1, 2, 50, 4000])
@pytest.mark.parametrize(("kind", "case"), CASES)
def test_a_sound_process_or_a_field_that_is_named(
    kind: ScheduleKind, case: dict[str, Any], num_timesteps: int
) -> None:
    made, refusals = [], []
    for zero_terminal_snr in (False, True):
        try:
            config = _config(kind, case, num_timesteps)
            config = replace(config, zero_terminal_snr=zero_terminal_snr)
            made.append(Schedule.from_config(config))
        except ValueError as error:
            refusals.append(str(error))
    for schedule in made:
        _is_sound(schedule)
    for refusal in refusals:
        assert refusal.split(":")[0] in FIELDS


def test_one_step_of_linear_scaled_may_erase_everything() -> None:
    config = ScheduleConfig("linear_scaled", 1, beta_start=0.001, beta_end=0.001)
    assert Schedule.from_config(config).betas.tolist() == [1.0]
    with pytest.raises(ValueError, match=r"^beta_start: must be below 0\.002"):
        replace(config, num_timesteps=2, beta_start=0.002, beta_end=0.002)


def test_a_logit_beyond_float64_is_refused() -> None:
    for tau in (1.0, 2.0):
        for name, logit in (("sigmoid_start", -700.5 * tau), ("sigmoid_end", 700.5 * tau)):
            with pytest.raises(ValueError, match=rf"^{name}: must be within ±700"):
                replace(ScheduleConfig("sigmoid"), sigmoid_tau=tau, **{name: logit})  # type: ignore[arg-type]


@pytest.mark.parametrize("last", [1.0 + 2.0**-52, 1.5, float("inf")])
def test_the_last_beta_may_be_1_and_no_more(last: float) -> None:
    with pytest.raises(ValueError, match=r"^betas: must lie between 0 and 1.*got .* at 1$"):
        Schedule.from_betas(torch.tensor([0.5, last], dtype=torch.float64))


def test_most_limits_are_no_refusals() -> None:
    made = 0
    for kind, case in CASES:
        try:
            Schedule.from_config(_config(kind, case, 50))
        except ValueError:
            continue
        made += 1
    assert made > 0.7 * len(CASES)
