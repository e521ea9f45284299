"""Schedules: the tables' relations, respacing, warnings, errors."""

import functools
import math

import pydantic
import pytest
import torch

from ddpm_core import ReverseProcess, Schedule, ScheduleConfig, VarianceType

LINEAR = Schedule.from_config(ScheduleConfig())
COSINE = Schedule.from_config(ScheduleConfig(kind="cosine"))


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_tables_agree_with_their_definitions(schedule: Schedule) -> None:
    a, b = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=0.0)
    close(a, schedule.alphas.cumprod(0))
    close(b[1:], a[:-1])
    assert float(b[0]) == 1.0
    close(schedule.sqrt_alphas_cumprod.square(), a)
    torch.testing.assert_close(schedule.one_minus_alphas_cumprod, 1 - a, rtol=1e-11, atol=0)
    close(schedule.sqrt_one_minus_alphas_cumprod.square(), schedule.one_minus_alphas_cumprod)
    close(schedule.sqrt_recip_alphas_cumprod, 1 / schedule.sqrt_alphas_cumprod)
    close(
        schedule.sqrt_recipm1_alphas_cumprod,
        schedule.sqrt_one_minus_alphas_cumprod / schedule.sqrt_alphas_cumprod,
    )
    torch.testing.assert_close(schedule.log_snr, torch.logit(a), rtol=1e-10, atol=1e-10)
    # E[x_{t−1}] given x_0 must be √ᾱ_{t−1}·x_0, and its variance 1 − ᾱ_{t−1}.
    mean = schedule.posterior_mean_coef1 + schedule.posterior_mean_coef2 * schedule.sqrt_alphas_cumprod
    close(mean, b.sqrt())
    variance = schedule.posterior_variance + schedule.posterior_mean_coef2.square() * (
        schedule.one_minus_alphas_cumprod
    )
    torch.testing.assert_close(variance, 1 - b, rtol=1e-10, atol=1e-16)


def test_the_first_step_keeps_its_digits() -> None:
    assert float(LINEAR.one_minus_alphas_cumprod[0]) == pytest.approx(1e-4, rel=1e-14, abs=0)
    betas = torch.tensor([1e-12, 2e-12], dtype=torch.float64)
    tiny = Schedule.from_betas(betas)
    assert tiny.one_minus_alphas_cumprod.tolist() == pytest.approx([1e-12, 3e-12], rel=1e-11, abs=0)


def _log_variance(schedule: Schedule, variance_type: VarianceType) -> torch.Tensor:
    return ReverseProcess(schedule, variance_type=variance_type).log_variance_table()


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_schedule_of_one_step(kind) -> None:
    schedule = Schedule.from_config(ScheduleConfig(kind=kind, num_timesteps=1))
    assert schedule.num_timesteps == 1
    tables = {name: table for name, table in vars(schedule).items() if isinstance(table, torch.Tensor)}
    assert len(tables) == len(vars(schedule)) - 1
    for name, table in tables.items():
        assert table.shape == (1,), name
        assert bool(table.isfinite().all()), name
    for variance_type in ("fixed_small", "fixed_large"):
        assert float(_log_variance(schedule, variance_type)) == pytest.approx(
            math.log(float(schedule.betas[0]))
        )


def test_model_log_variance() -> None:
    small, large = _log_variance(LINEAR, "fixed_small"), _log_variance(LINEAR, "fixed_large")
    torch.testing.assert_close(small[1:].exp(), LINEAR.posterior_variance[1:])
    torch.testing.assert_close(large[1:].exp(), LINEAR.betas[1:])
    assert float(small[0]) == float(large[0]) == float(small[1])
    with pytest.raises(ValueError, match=r"^variance_type: .*'learned_range'"):
        _log_variance(LINEAR, "learned_range")


def test_gather_casts_after_the_look_up() -> None:
    t = torch.arange(1000)
    like = torch.zeros(1000, 1, 1, 1, dtype=torch.bfloat16)
    got = LINEAR.gather(LINEAR.sqrt_one_minus_alphas_cumprod, t, like)
    assert got.shape == (1000, 1, 1, 1)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(
        got.flatten().double(), LINEAR.sqrt_one_minus_alphas_cumprod, rtol=2**-8, atol=0
    )


@pytest.mark.parametrize(
    "t",
    [
        torch.tensor([1000, 0]),
        torch.tensor([0, -1]),
        torch.tensor([0]),
        torch.tensor([0.0, 1.0]),
        torch.tensor([[0, 1]]),
        torch.tensor(3),
    ],
    ids=["too large", "negative", "wrong batch", "float", "two dimensions", "scalar"],
)
def test_gather_refuses_a_wrong_t(t: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"^t: "):
        LINEAR.gather(LINEAR.betas, t, torch.zeros(2, 1, 4, 4))


def test_respacing_keeps_alphas_cumprod() -> None:
    timesteps = torch.tensor([0, 10, 500, 999])
    short = LINEAR.at(timesteps)
    torch.testing.assert_close(short.alphas_cumprod, LINEAR.alphas_cumprod[timesteps], rtol=1e-12, atol=0)
    whole = LINEAR.at(torch.arange(1000))
    torch.testing.assert_close(whole.betas, LINEAR.betas, rtol=1e-11, atol=0)


@pytest.mark.parametrize("timesteps", [[], [3, 3], [5, 2], [0, 1000], [-1, 4]])
def test_respacing_refuses_what_is_no_chain(timesteps: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^t(imesteps)?: "):
        LINEAR.at(torch.tensor(timesteps, dtype=torch.int64))


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_no_warning_for_the_published_schedules(schedule: Schedule) -> None:
    assert schedule.warnings() == []


@pytest.mark.parametrize("num_timesteps", [1, 10, 100, 200, 500])
def test_warning_when_the_prior_is_not_reached(num_timesteps: int) -> None:
    (warning,) = Schedule.from_config(ScheduleConfig(num_timesteps=num_timesteps)).warnings()
    assert "not close to N(0, I)" in warning
    assert "num_timesteps" in warning


def test_following_the_warning_silences_it() -> None:
    (warning,) = Schedule.from_config(ScheduleConfig(num_timesteps=200)).warnings()
    factor = float(warning.split("by about ")[1].split(",")[0])
    config = ScheduleConfig(num_timesteps=200, beta_start=1e-4 * factor, beta_end=0.02 * factor)
    assert Schedule.from_config(config).warnings() == []
    longer = int(warning.split("num_timesteps to about ")[1].split(",")[0])
    assert Schedule.from_config(ScheduleConfig(num_timesteps=longer)).warnings() == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", "spline"),
        ("num_timesteps", 0),
        ("beta_start", 0.0),
        ("beta_start", float("nan")),
        ("beta_end", 1.0),
        ("beta_end", 1e-5),
        ("cosine_s", 0.0),
        ("beta_max", 1.0),
        ("warmup_fraction", 0.0),
        ("warmup_fraction", 1.5),
        ("sigmoid_start", float("nan")),
        ("sigmoid_end", -3.0),
        ("sigmoid_end", 1e4),
        ("sigmoid_tau", 0.0),
        ("log_snr_max", float("inf")),
        ("log_snr_min", 10.0),
        ("log_snr_min", -float("inf")),
    ],
)
def test_config_errors_name_the_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: must be .*, got {value!r}$"):
        ScheduleConfig(**{field: value})  # type: ignore[arg-type]


def test_config_in_pydantic_refuses_unknown_keys() -> None:
    adapter = pydantic.TypeAdapter(ScheduleConfig)
    assert adapter.validate_python({"kind": "cosine"}) == ScheduleConfig(kind="cosine")
    with pytest.raises(pydantic.ValidationError, match="beta_stop"):
        adapter.validate_python({"beta_stop": 0.1})
    assert set(adapter.dump_python(ScheduleConfig())) == {
        "kind",
        "num_timesteps",
        "beta_start",
        "beta_end",
        "cosine_s",
        "beta_max",
        "warmup_fraction",
        "sigmoid_start",
        "sigmoid_end",
        "sigmoid_tau",
        "log_snr_max",
        "log_snr_min",
        "betas",
        "alphas_cumprod",
        "zero_terminal_snr",
    }


@pytest.mark.parametrize(
    "betas",
    [[0.1, 0.0], [1.0, 0.1], [-0.1], [float("nan")], [[0.1]], []],
    ids=["zero", "one", "negative", "nan", "two dimensions", "empty"],
)
def test_from_betas_names_betas(betas: list) -> None:
    with pytest.raises(ValueError, match=r"^betas"):
        Schedule.from_betas(torch.tensor(betas, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"^betas: "):
        Schedule.from_betas(torch.tensor([1, 2]))


def test_to_the_same_device_is_the_same_object() -> None:
    assert LINEAR.to("cpu") is LINEAR
    meta = LINEAR.to("meta")
    assert meta.betas.device.type == meta.log_snr.device.type == "meta"
    assert LINEAR.betas.device.type == "cpu"
