"""Which timesteps a shorter chain visits: each convention against its formula in fractions, and the limits."""

import math
from fractions import Fraction
from typing import get_args

import pytest
import torch

from ddpm_core import SamplerConfig, Schedule, ScheduleConfig, visited_timesteps
from ddpm_core.respacing import IndexSpacing, respaced_timesteps

SPACINGS: tuple[IndexSpacing, ...] = get_args(IndexSpacing)
CASES = [
    (1000, 50),
    (1000, 7),
    (1000, 1000),
    (1000, 999),
    (1000, 1),
    (4000, 250),
    (13, 5),
    (10, 9),
    (1, 1),
    (2, 2),
]


def _half_up(x: Fraction) -> int:
    return math.floor(x + Fraction(1, 2))


def _expected(total: int, steps: int, spacing: IndexSpacing) -> list[int]:
    if spacing == "leading":
        return [i * (total // steps) for i in range(steps)]
    if spacing == "trailing":
        return [_half_up(Fraction((i + 1) * total, steps)) - 1 for i in range(steps)]
    if steps == 1:
        return [total - 1]
    if spacing == "linspace":
        return [_half_up(Fraction(i * (total - 1), steps - 1)) for i in range(steps)]
    return [max(i, _half_up((total - 1) * Fraction(i, steps - 1) ** 2)) for i in range(steps)]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("total", "steps"), CASES)
def test_each_spacing_is_its_formula(total: int, steps: int, spacing: IndexSpacing) -> None:
    got = respaced_timesteps(total, steps, spacing)
    assert got.dtype == torch.int64
    assert got.tolist() == _expected(total, steps, spacing)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_number_of_steps_makes_a_chain(spacing: IndexSpacing) -> None:
    for total in (1, 2, 3, 17, 100):
        for steps in range(1, total + 1):
            got = respaced_timesteps(total, steps, spacing).tolist()
            assert len(got) == steps
            assert got == sorted(set(got))
            assert got[0] >= 0
            assert got[-1] <= total - 1
            assert spacing == "leading" or got[-1] == total - 1
            assert spacing == "trailing" or steps == 1 or got[0] == 0
        assert respaced_timesteps(total, total, spacing).tolist() == list(range(total))


def test_known_values() -> None:
    """10 of 1000, as Lin et al. 2023 list them."""
    assert respaced_timesteps(1000, 10, "leading").tolist() == list(range(0, 1000, 100))
    assert respaced_timesteps(1000, 10, "trailing").tolist() == list(range(99, 1000, 100))
    assert respaced_timesteps(1000, 10).tolist() == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    assert respaced_timesteps(1000, 4, "quadratic").tolist() == [0, 111, 444, 999]
    # halves round up: 4.5 and 13.5; 2.5 − 1
    assert respaced_timesteps(10, 3).tolist() == [0, 5, 9]
    assert respaced_timesteps(28, 3).tolist() == [0, 14, 27]
    assert respaced_timesteps(5, 2, "trailing").tolist() == [2, 4]


def test_linspace_is_what_sample_sets_were_made_with() -> None:
    for total, steps in CASES:
        process = Schedule.from_config(ScheduleConfig(num_timesteps=total, beta_end=0.01))
        got = visited_timesteps(process, SamplerConfig(num_steps=steps))
        assert torch.equal(got, respaced_timesteps(total, steps))


@pytest.mark.parametrize("num_steps", [0, -1, 11])
def test_num_steps_out_of_range(num_steps: int) -> None:
    for spacing in SPACINGS:
        with pytest.raises(ValueError, match=rf"^num_steps: must be in 1\.\.10 .*, got {num_steps}$"):
            respaced_timesteps(10, num_steps, spacing)


def test_an_unknown_spacing() -> None:
    with pytest.raises(ValueError, match=r"^spacing: must be one of 'linspace', .*, got 'even'$"):
        respaced_timesteps(10, 5, "even")  # type: ignore[arg-type]
