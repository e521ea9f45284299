"""What a schedule says of itself: the report, and advice that is possible and enough."""

import re
from dataclasses import replace

import pytest
import torch

from ddpm_core import Schedule, ScheduleConfig

BETAS = (0.02,) * 30
ALPHAS_CUMPROD = tuple(0.98 ** (t + 1) for t in range(30))

TOO_SHORT = [
    ScheduleConfig(num_timesteps=200),
    ScheduleConfig(num_timesteps=1),
    ScheduleConfig("linear_scaled", 200, beta_end=0.005),
    ScheduleConfig("linear_scaled", 1, beta_start=1e-5, beta_end=1e-4),
    ScheduleConfig("linear_scaled", 3, beta_start=1e-4, beta_end=2e-3),
    ScheduleConfig("scaled_linear", 1000, beta_start=0.00085, beta_end=0.012),
    ScheduleConfig("scaled_linear", 10),
    ScheduleConfig("quadratic", 300),
    ScheduleConfig("constant", 100),
    ScheduleConfig("constant", 1, beta_end=0.9),
    ScheduleConfig("warmup", 100, warmup_fraction=0.9),
    ScheduleConfig("sigmoid_beta", 150),
    ScheduleConfig("cosine", 5, beta_max=0.3),
    ScheduleConfig("sigmoid", 5, beta_max=0.3),
    ScheduleConfig("log_snr", 100, log_snr_min=-2.0),
    ScheduleConfig("log_snr", 1),
    ScheduleConfig("betas", 30, betas=BETAS),
    ScheduleConfig("betas", 1, betas=(0.5,)),
    ScheduleConfig("betas", 1, betas=(1e-300,)),
    ScheduleConfig("alphas_cumprod", 30, alphas_cumprod=ALPHAS_CUMPROD),
]


def _pieces(config: ScheduleConfig) -> list[str]:
    (warning,) = Schedule.from_config(config).warnings()
    return warning.split("never saw; ")[1].split(", or ")


def _follow(config: ScheduleConfig, piece: str) -> ScheduleConfig:
    """The configuration of someone who does what the sentence says."""
    number = float((re.findall(r"-?\d[\d.e+-]*", piece) or ["nan"])[-1])
    if "multiply beta_start and beta_end" in piece:
        return replace(config, beta_start=config.beta_start * number, beta_end=config.beta_end * number)
    if "multiply beta_end" in piece:
        return replace(config, beta_end=config.beta_end * number)
    if "multiply the betas" in piece:
        return replace(config, betas=tuple(beta * number for beta in config.betas))
    if "raise num_timesteps" in piece:
        return replace(config, num_timesteps=int(number))
    if "raise beta_max" in piece:
        return replace(config, beta_max=number)
    if "lower log_snr_min" in piece:
        return replace(config, log_snr_min=number)
    longer = replace(config, kind="linear", num_timesteps=config.num_timesteps + 1)
    if "append a step of beta =" in piece:
        return replace(longer, kind="betas", betas=(*config.betas, number))
    if "append a step of alphas_cumprod =" in piece:
        return replace(longer, kind="alphas_cumprod", alphas_cumprod=(*config.alphas_cumprod, number))
    if "cosine schedule" in piece:
        return replace(config, kind="cosine")
    assert "zero_terminal_snr" in piece, piece
    return replace(config, zero_terminal_snr=True)


@pytest.mark.parametrize("config", TOO_SHORT, ids=lambda c: f"{c.kind}-{c.num_timesteps}")
def test_each_piece_of_advice_is_possible_and_silences_the_warning(config: ScheduleConfig) -> None:
    for piece in _pieces(config):
        changed = _follow(config, piece)
        assert changed != config
        assert Schedule.from_config(changed).warnings() == [], piece


def test_what_is_impossible_is_not_advised() -> None:
    assert not any("multiply" in piece for piece in _pieces(ScheduleConfig(num_timesteps=20)))
    assert any("multiply" in piece for piece in _pieces(ScheduleConfig(num_timesteps=200)))
    log_snr = _pieces(ScheduleConfig("log_snr", 100, log_snr_min=-2.0))
    assert log_snr[0] == "lower log_snr_min to -10.1"
    # a longer chain with the same end points ends where it did
    assert not any("num_timesteps" in piece for piece in log_snr)
    assert not any("zero_terminal_snr" in piece for piece in _pieces(ScheduleConfig(num_timesteps=1)))


def test_a_schedule_without_a_configuration_is_advised_about_its_betas() -> None:
    schedule = Schedule.from_betas(torch.full((30,), 0.02, dtype=torch.float64))
    assert schedule.config is None
    (warning,) = schedule.warnings()
    factor = float(warning.split("multiply the betas by about ")[1].split(",")[0])
    assert Schedule.from_betas(schedule.betas * factor).warnings() == []
    assert schedule.to("meta").config is None
    config = ScheduleConfig(num_timesteps=30)
    assert Schedule.from_config(config).to("meta").config == config
    assert Schedule.from_config(config).at(torch.tensor([3, 29])).config is None


def test_the_report_of_the_published_schedules() -> None:
    for config in (ScheduleConfig(), ScheduleConfig("cosine"), ScheduleConfig("linear_scaled", 4000)):
        report = Schedule.from_config(config).validate()
        assert report.betas_rise
        assert report.alphas_cumprod_falls
        assert report.noise_is_positive
        assert not report.ends_without_signal
        assert report.warnings == ()
    report = Schedule.from_config(ScheduleConfig()).validate()
    assert report.prior_bits_per_dim == pytest.approx(2.9113e-5, rel=1e-4, abs=0)


def test_falling_betas_are_valid_and_said() -> None:
    schedule = Schedule.from_betas(torch.tensor([0.1, 0.2, 0.15, 0.9999], dtype=torch.float64))
    report = schedule.validate()
    assert not report.betas_rise
    assert any(text.startswith("betas fall at 2, from 0.2 to 0.15") for text in report.warnings)
    assert Schedule.from_config(ScheduleConfig("constant", 600)).validate().betas_rise
    # the first step leaves the data for log_snr_max at once
    assert not Schedule.from_config(ScheduleConfig("log_snr", 100)).validate().betas_rise
    # the rounding of a given ᾱ is no fall
    steady = Schedule.from_alphas_cumprod(
        torch.tensor([0.99 ** (t + 1) for t in range(900)], dtype=torch.float64)
    )
    assert steady.validate().betas_rise


def test_what_a_cast_destroys_is_said() -> None:
    schedule = Schedule.from_config(ScheduleConfig())
    report = schedule.validate(torch.bfloat16)
    assert not report.alphas_cumprod_falls
    assert report.noise_is_positive
    (warning,) = report.warnings
    table = schedule.alphas_cumprod.to(torch.bfloat16)
    at = int(warning.split("does not fall at ")[1].split(":")[0])
    assert table[at] == table[at - 1]
    assert bool((table[1:at] < table[: at - 1]).all())
    sharp = Schedule.from_config(ScheduleConfig("log_snr", 1000, log_snr_max=60.0))
    report = sharp.validate(torch.float16)
    assert not report.noise_is_positive
    assert any("cast to torch.float16 is zero at 0" in text for text in report.warnings)
    assert sharp.validate(torch.bfloat16).noise_is_positive
    with pytest.raises(ValueError, match=r"^dtype: must be a floating-point dtype, got torch.int64"):
        schedule.validate(torch.int64)


def test_a_schedule_that_ends_without_signal_says_so_in_its_report() -> None:
    report = Schedule.from_config(ScheduleConfig("inverse", 50)).validate()
    assert report.ends_without_signal
    assert report.prior_bits_per_dim == 0.0
    assert report.warnings == ()
