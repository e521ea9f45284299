"""What a network may predict, and how each prediction tells the others.

ε (Ho et al. 2020), x_0, or v = a·ε − b·x_0 (Salimans & Ho 2022, arXiv:2202.00512). They and x_t = a·x_0 + b·ε are
linear in (x_0, ε), so that x_t and any one tell the others by two tables: target = on_x_t·x_t + on_output·output.
The error of the target is then on_output times the error of the output.
"""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ddpm_core._checks import check_alike, check_numbers, check_timesteps, require
from ddpm_core._memory import of_process
from ddpm_core.process import LinearGaussianProcess

PredictionType: TypeAlias = Literal["eps", "x_start", "v"]
"""What the network's output means: ε, x_0, or v = a·ε − b·x_0."""

PREDICTION_TYPES = ("eps", "x_start", "v")


def check_prediction_type(prediction_type: str, name: str = "prediction_type") -> None:
    """Raises ValueError unless prediction_type is one that this version knows."""
    require(prediction_type in PREDICTION_TYPES, name, "'eps', 'x_start' or 'v'", prediction_type)


@of_process  # a process never changes, and asking for its last step waits for an accelerator
def conversion_tables(
    process: LinearGaussianProcess, source: PredictionType, target: PredictionType
) -> tuple[Tensor, Tensor]:
    """(on_x_t, on_output), float64 `[T]` each: target = on_x_t·x_t + on_output·source, with S = a² + b².

    to x_0: from ε (1/a, −b/a), from v (a, −b)/S. To ε: from x_0 (1/b, −a/b), from v (b, a)/S. To v: from ε
    (−b/a, S/a), from x_0 (a/b, −S/b). To itself (0, 1). Do not change the tables in place: they are shared.
    Raises ValueError naming prediction_type if the source is "eps", the target is not, and a is 0 at the last step,
    or so small that 1/a is no number: there ε says nothing of x_0.
    """
    check_prediction_type(source)
    check_prediction_type(target, "target")
    if source == "eps" and target != "eps" and bool(process.a.reciprocal().isinf().any()):
        raise ValueError(
            "prediction_type: must be 'v' or 'x_start' for a process that ends without signal (its last beta "
            "is 1, or a = √ᾱ is no number to divide by), got 'eps', which says nothing of x_0 there"
        )
    with torch.inference_mode(False):  # shared with a training step, whoever asks first
        if source == target:
            return torch.zeros_like(process.a), torch.ones_like(process.a)
        # Cramer's rule for target = on_x_t·x_t + on_output·source in the coordinates (x_0, ε)
        seen, given, wanted = (
            (process.a, process.b),
            _coordinates(process, source),
            _coordinates(process, target),
        )
        total = _determinant(seen, given)
        return _determinant(wanted, given) / total, _determinant(seen, wanted) / total


def x_start_tables(process: LinearGaussianProcess, prediction_type: PredictionType) -> tuple[Tensor, Tensor]:
    """(on_x_t, on_output), float64 `[T]` each: x̂_0 = on_x_t·x_t + on_output·output; see `conversion_tables`."""
    return conversion_tables(process, prediction_type, "x_start")


def prediction_target(
    process: LinearGaussianProcess,
    prediction_type: PredictionType,
    x_start: Tensor,
    t: Tensor,
    noise: Tensor,
) -> Tensor:
    """What the network is to say of x_t = a·x_0 + b·ε: ε, x_0, or v = a·ε − b·x_0. Shapes as in `q_sample`."""
    check_prediction_type(prediction_type)
    check_numbers("x_start", x_start)
    check_alike("noise", noise, "x_start", x_start)
    # t is asked for whatever the type, so that a wrong one is found at once
    check_timesteps(t, process.num_timesteps, x_start)
    return target_of(process, prediction_type, x_start, t, noise)


def target_of(
    process: LinearGaussianProcess,
    prediction_type: PredictionType,
    x_start: Tensor,
    t: Tensor,
    noise: Tensor,
) -> Tensor:
    """`prediction_target` for callers that have checked x_start and noise."""
    if prediction_type == "eps":
        return noise
    if prediction_type == "x_start":
        return x_start
    return process.gather(process.a, t, x_start) * noise - process.gather(process.b, t, x_start) * x_start


def convert_prediction(
    process: LinearGaussianProcess,
    x_t: Tensor,
    t: Tensor,
    output: Tensor,
    source: PredictionType,
    target: PredictionType,
) -> Tensor:
    """What a prediction of `source` at x_t says of `target`, e.g. ε of v: see `conversion_tables`.

    x_t, output `[B, ...]`; t int64 `[B]`. Computed in float32 (float64 if x_t is), since the two parts nearly
    cancel where the signal or the noise is small; returned in x_t's dtype. Raises ValueError naming the argument
    that is wrong.
    """
    check_numbers("x_t", x_t)
    check_alike("output", output, "x_t", x_t)
    return converted(process, x_t, t, output, source, target)


def converted(
    process: LinearGaussianProcess,
    x_t: Tensor,
    t: Tensor,
    output: Tensor,
    source: PredictionType,
    target: PredictionType,
) -> Tensor:
    """`convert_prediction` for callers that have checked x_t, or made it, and let a network's NaN pass."""
    on_x_t, on_output = conversion_tables(process, source, target)
    wide = x_t if x_t.dtype == torch.float64 else x_t.float()
    seen, said = process.gather(on_x_t, t, wide), process.gather(on_output, t, wide)
    return (seen * wide + said * output.to(wide.dtype)).to(x_t.dtype)


def predict_x_start(
    process: LinearGaussianProcess,
    x_t: Tensor,
    t: Tensor,
    output: Tensor,
    prediction_type: PredictionType = "eps",
) -> Tensor:
    """x̂_0 from a network's output; for ε (x_t − b·ε_θ)/a, Eq. 4 solved for x_0. Not clipped.

    x_t, output `[B, ...]`; t int64 `[B]`. Raises ValueError naming the argument that is wrong.
    """
    return convert_prediction(process, x_t, t, output, prediction_type, "x_start")


def predict_eps(
    process: LinearGaussianProcess,
    x_t: Tensor,
    t: Tensor,
    output: Tensor,
    prediction_type: PredictionType = "x_start",
) -> Tensor:
    """ε̂ from x̂_0, (x_t − a·x̂_0)/b, Eq. 4 solved for ε; or from a network's output. As `predict_x_start`."""
    return convert_prediction(process, x_t, t, output, prediction_type, "eps")


def predict_v(
    process: LinearGaussianProcess,
    x_t: Tensor,
    t: Tensor,
    output: Tensor,
    prediction_type: PredictionType = "x_start",
) -> Tensor:
    """v from x̂_0, a·ε̂ − b·x̂_0 with the ε̂ that fits x_t; or from a network's output. As `predict_x_start`."""
    return convert_prediction(process, x_t, t, output, prediction_type, "v")


Coordinates: TypeAlias = tuple[Tensor, Tensor]


def _coordinates(process: LinearGaussianProcess, prediction_type: PredictionType) -> Coordinates:
    """(on_x_0, on_ε) of what is predicted, `[T]` each."""
    zero, one = torch.zeros_like(process.a), torch.ones_like(process.a)
    return {"eps": (zero, one), "x_start": (one, zero), "v": (-process.b, process.a)}[prediction_type]


def _determinant(p: Coordinates, q: Coordinates) -> Tensor:
    return p[0] * q[1] - p[1] * q[0]
