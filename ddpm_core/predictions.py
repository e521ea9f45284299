"""What a network may predict, and how each prediction tells the others.

ε (Ho et al. 2020), x_0, or v = a·ε − b·x_0 (Salimans & Ho 2022, arXiv:2202.00512). All three are linear in
(x_0, ε), so one pair of tables each says all: x̂_0 = on_x_t·x_t + on_output·output, and the error of x̂_0 is
on_output times the error of the output.
"""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ddpm_core._checks import check_floating, check_same_shape, require
from ddpm_core.process import LinearGaussianProcess

PredictionType: TypeAlias = Literal["eps", "x_start", "v"]
"""What the network's output means: ε, x_0, or v = a·ε − b·x_0."""

PREDICTION_TYPES = ("eps", "x_start", "v")


def check_prediction_type(prediction_type: str) -> None:
    """Raises ValueError unless prediction_type is one that this version knows."""
    require(
        prediction_type in PREDICTION_TYPES, "prediction_type", "'eps', 'x_start' or 'v'", prediction_type
    )


def x_start_tables(process: LinearGaussianProcess, prediction_type: PredictionType) -> tuple[Tensor, Tensor]:
    """(on_x_t, on_output), float64 `[T]` each: x̂_0 = on_x_t·x_t + on_output·output.

    ε: (1/a, −b/a). x_0: (0, 1). v: (a, −b)/(a² + b²).
    Raises ValueError naming prediction_type if it is "eps" and a = 0 at the last step, where ε says nothing of x_0.
    """
    check_prediction_type(prediction_type)
    a, b, total = process.a, process.b, process.total_variance
    if prediction_type == "x_start":
        return torch.zeros_like(a), torch.ones_like(a)
    if prediction_type == "v":
        return a / total, -b / total
    if process.ends_without_signal:
        raise ValueError(
            "prediction_type: must be 'v' or 'x_start' for a process that ends without signal (its last beta "
            "is 1), got 'eps', which says nothing of x_0 there"
        )
    return torch.exp(-process.log_a), -torch.exp(process.log_b - process.log_a)


def prediction_target(
    process: LinearGaussianProcess,
    prediction_type: PredictionType,
    x_start: Tensor,
    t: Tensor,
    noise: Tensor,
) -> Tensor:
    """What the network is to say of x_t = a·x_0 + b·ε: ε, x_0, or v = a·ε − b·x_0. Shapes as in `q_sample`."""
    check_prediction_type(prediction_type)
    check_same_shape("noise", noise, "x_start", x_start)
    if prediction_type == "eps":
        return noise
    if prediction_type == "x_start":
        return x_start
    return process.gather(process.a, t, x_start) * noise - process.gather(process.b, t, x_start) * x_start


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
    check_floating("x_t", x_t)
    check_same_shape("eps_pred" if prediction_type == "eps" else "output", output, "x_t", x_t)
    on_x_t, on_output = x_start_tables(process, prediction_type)
    return process.gather(on_x_t, t, x_t) * x_t + process.gather(on_output, t, x_t) * output.to(x_t.dtype)


def predict_eps(process: LinearGaussianProcess, x_t: Tensor, t: Tensor, pred_x_start: Tensor) -> Tensor:
    """ε = (x_t − a·x̂_0)/b, Eq. 4 solved for ε. Shapes as in `q_sample`."""
    check_floating("x_t", x_t)
    check_same_shape("pred_x_start", pred_x_start, "x_t", x_t)
    return (x_t - process.gather(process.a, t, x_t) * pred_x_start) / process.gather(process.b, t, x_t)


def predict_v(process: LinearGaussianProcess, x_t: Tensor, t: Tensor, pred_x_start: Tensor) -> Tensor:
    """v = a·ε − b·x̂_0 with the ε that fits x_t: (a·x_t − (a² + b²)·x̂_0)/b. Shapes as in `q_sample`."""
    check_floating("x_t", x_t)
    check_same_shape("pred_x_start", pred_x_start, "x_t", x_t)
    on_x_t = process.gather(process.a / process.b, t, x_t)
    return on_x_t * x_t - process.gather(process.total_variance / process.b, t, x_t) * pred_x_start
