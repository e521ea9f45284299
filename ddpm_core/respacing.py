"""Which of the T timesteps a shorter chain visits.

`LinearGaussianProcess.at` makes the chain through them. All arithmetic is in integers, so that every device and
every version visits the same timesteps.
"""

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ddpm_core._checks import require, require_int

IndexSpacing: TypeAlias = Literal["linspace", "leading", "trailing", "quadratic"]
"""How timesteps are spaced by their numbers alone; `respaced_timesteps` says what each is."""


def respaced_timesteps(num_timesteps: int, num_steps: int, spacing: IndexSpacing = "linspace") -> Tensor:
    """The visited timesteps, int64 `[S]`, strictly increasing, with T = num_timesteps, S = num_steps, i = 0..S−1:

    "linspace": i·(T − 1)/(S − 1), both ends included; with S = 1 it is T − 1 alone.
    "trailing": (i + 1)·T/S − 1: T − 1 is included (Lin et al. 2023, arXiv:2305.08891, section 3.3).
    "leading": i·⌊T/S⌋: 0 is included, T − 1 is not unless S = T, though p(x_T) is the law of x_{T−1} alone.
    "quadratic": (T − 1)·(i/(S − 1))², but at least i: both ends included, finer near the data; S = 1 as for
    linspace. Halves round up.

    The names and values are those of diffusers' `timestep_spacing` (there in falling order), except that there
    halves round to even, linspace with S = 1 is 0, and trailing may come with one step more, −1, from rounded
    floats.
    Raises ValueError naming spacing, or num_steps if it is not in 1..T.
    """
    known = get_args(IndexSpacing)
    require(spacing in known, "spacing", "one of " + ", ".join(map(repr, known)), spacing)
    require_int("num_timesteps", num_timesteps, 1)
    check_num_steps(num_steps, num_timesteps)
    position = torch.arange(num_steps)
    if spacing == "leading":
        return position * (num_timesteps // num_steps)
    if spacing == "trailing":
        return _rounded((position + 1) * num_timesteps, num_steps) - 1
    if num_steps == 1:
        return torch.tensor([num_timesteps - 1])
    if spacing == "linspace":
        return _rounded(position * (num_timesteps - 1), num_steps - 1)
    # Near 0 squares lie closer than 1; from where i²/(S−1)² reaches i/(T−1) on they lie further apart.
    return torch.maximum(_rounded(position**2 * (num_timesteps - 1), (num_steps - 1) ** 2), position)


def check_num_steps(num_steps: int, num_timesteps: int) -> None:
    """Raises ValueError unless num_steps is in 1..num_timesteps."""
    require_int("num_steps", num_steps)
    must_be = f"in 1..{num_timesteps} (the schedule's num_timesteps)"
    require(1 <= num_steps <= num_timesteps, "num_steps", must_be, num_steps)


def _rounded(numerator: Tensor, denominator: int) -> Tensor:
    """numerator/denominator, halves up."""
    return (2 * numerator + denominator) // (2 * denominator)
