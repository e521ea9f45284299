"""The reverse process p_θ(x_{t−1}|x_t): what a network's output says of it.

A network alone is a function of (x_t, t). Which of ε, x_0 and v it predicts, and where the variance comes from,
stands here once, for the bound and for the samplers.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_core._checks import check_batch, check_floating, check_same_shape, require, require_number
from ddpm_core.predictions import (
    PredictionType,
    converted,
    target_of,
    x_start_tables,
)
from ddpm_core.process import LinearGaussianProcess, posterior_mean
from ddpm_core.types import VarianceType

VARIANCE_TYPES = ("fixed_small", "fixed_large", "learned_range", "analytic")


class Prediction(NamedTuple):
    """What a network's output says of one x_t: x̂_0 (clipped if asked) and the ε that fits it, each like x_t."""

    x_start: Tensor
    eps: Tensor


@dataclass(frozen=True)
class ReverseProcess:
    """p_θ(x_{t−1}|x_t) = N(μ̃_t(x_t, x̂_0), σ_t²·I) of a process and of the meaning of its network's output.

    variance_type: σ² = β̃_t for "fixed_small", β_t (the variance of q's own step) for "fixed_large";
    "learned_range" has ln σ² = f·ln β_t + (1 − f)·ln β̃_t with f = (v + 1)/2 (Nichol & Dhariwal 2021, Eq. 15), v
    being the second half of the output's channels; "analytic" has σ² = β̃ + c1²·m(t), which is the best there is for
    the network (Bao et al. 2022, arXiv:2201.06503), m its mean squared error of x_0 a dimension, x_start_mse
    float64 `[T]`. At t == 0, where β̃ = 0, β̃ and fixed_large take index 1's β̃.
    clip: limit x̂_0 to [−1, 1]. threshold_quantile: instead of that limit each image's x̂_0 to ±s and divide it by s,
    s = max(1, that quantile of its |x̂_0|) (dynamic thresholding, Saharia et al. 2022, arXiv:2205.11487).
    Raises ValueError naming the field that is wrong. The methods check shapes and t, but let a NaN in what the
    network said pass, so that whoever runs it finds the NaN in the result.
    """

    process: LinearGaussianProcess
    prediction_type: PredictionType = "eps"
    variance_type: VarianceType = "fixed_small"
    clip: bool = True
    x_start_mse: Tensor | None = None
    threshold_quantile: float | None = None

    def __post_init__(self) -> None:
        x_start_tables(self.process, self.prediction_type)
        check_variance_type(self.variance_type)
        check_threshold_quantile(self.threshold_quantile)
        if self.variance_type == "analytic":
            mse = self.x_start_mse
            if mse is None:
                raise ValueError("x_start_mse: must be given for the variance type 'analytic'")
            check_floating("x_start_mse", mse)
            check_same_shape("x_start_mse", mse, "the process's tables", self.process.log_a)
            ok = (mse > 0) & mse.isfinite()
            if not bool(ok.all()):
                raise ValueError(
                    f"x_start_mse: must be positive and finite at every t, got {float(mse[~ok][0])}"
                )

    def to(self, device: torch.device | str) -> "ReverseProcess":
        """The same with its process's tables on device."""
        process = self.process.to(device)
        return self if process is self.process else replace(self, process=process)

    @property
    def limits(self) -> bool:
        """Whether `limit` changes anything."""
        return self.clip or self.threshold_quantile is not None

    def limit(self, x_start: Tensor) -> Tensor:
        """x̂_0 `[B, ...]` clipped or thresholded to [−1, 1] as the fields say, or as it is."""
        if self.threshold_quantile is not None:
            return dynamic_threshold(x_start, self.threshold_quantile)
        return x_start.clamp(-1.0, 1.0) if self.clip else x_start

    def split(self, output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        """The output's prediction, and its v if the variance is learned. Raises ValueError for another shape."""
        return self._split(output, x_t, "x_t")

    def _split(self, output: Tensor, like: Tensor, like_name: str) -> tuple[Tensor, Tensor | None]:
        check_floating(like_name, like)
        check_floating("eps_theta's output", output)
        if self.variance_type != "learned_range":
            check_same_shape("eps_theta's output", output, like_name, like)
            return output, None
        if output.dim() != like.dim() or output.dim() < 2 or output.shape[1] != 2 * like.shape[1]:
            raise ValueError(
                f"eps_theta's output: must have twice the channels of {like_name} {list(like.shape)} for the "
                f"variance type 'learned_range', got {list(output.shape)}"
            )
        prediction, v = output.chunk(2, dim=1)
        check_same_shape("eps_theta's output", prediction, like_name, like)
        return prediction, v

    def predict(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """x̂_0 and ε̂ of the network's output at x_t `[B, C, H, W]`, t int64 `[B]`."""
        prediction, _ = self.split(output, x_t)
        x_start = converted(self.process, x_t, t, prediction, self.prediction_type, "x_start")
        if self.limits:
            x_start = self.limit(x_start)
        elif self.prediction_type == "eps":
            return Prediction(x_start, prediction)
        return Prediction(x_start, converted(self.process, x_t, t, x_start, "x_start", "eps"))

    def transition(self, output: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean `[B, C, H, W]` and ln σ² (`[B, 1, 1, 1]`, or like x_t if learned) of p_θ(x_{t−1}|x_t)."""
        x_start = self.predict(output, x_t, t).x_start
        return posterior_mean(self.process, x_start, x_t, t), self.log_variance(output, x_t, t)

    def log_variance_table(self) -> Tensor:
        """ln σ_t², float64 `[T]`. Raises ValueError for "learned_range", which has no table."""
        process = self.process
        if self.variance_type == "fixed_small":
            return process.posterior_log_variance_clipped
        if self.variance_type == "fixed_large":
            return torch.cat((process.posterior_log_variance_clipped[:1], process.step_variance[1:].log()))
        if self.variance_type == "analytic":
            assert self.x_start_mse is not None
            error = self.x_start_mse.to(process.log_a)
            return (process.posterior_variance + process.posterior_mean_coef1.square() * error).log()
        raise ValueError("variance_type: must have a table, got 'learned_range', which depends on x_t")

    def log_variance(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """ln σ² of p_θ(x_{t−1}|x_t): `[B, 1, 1, 1]`, or like x_t if learned; float64 if x_t is, else float32."""
        _, v = self.split(output, x_t)
        like = x_t if x_t.dtype == torch.float64 else x_t.float()
        if v is None:
            return self.process.gather(self.log_variance_table(), t, like)
        low = self.process.gather(self.process.posterior_log_variance_clipped, t, like)
        high = self.process.gather(self.process.step_variance.log(), t, like)
        return low + 0.5 * (v.to(like.dtype) + 1.0) * (high - low)

    def x_start_error(self, output: Tensor, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x̂_0 − x_0 for the output at x_t = a·x_0 + b·ε; float64 if x_start is, float32 otherwise.

        From the error of the output, not from two images: their difference would cancel near t = 0.
        """
        prediction, _ = self._split(output, x_start, "x_start")
        dtype = torch.float64 if x_start.dtype == torch.float64 else torch.float32
        check_floating("noise", noise)
        check_same_shape("noise", noise, "x_start", x_start)
        x_start, noise = x_start.to(dtype), noise.to(dtype)
        target = target_of(self.process, self.prediction_type, x_start, t, noise)
        _, on_output = x_start_tables(self.process, self.prediction_type)
        error = self.process.gather(on_output, t, x_start) * (prediction.to(dtype) - target)
        return self.limit(x_start + error) - x_start if self.limits else error


def dynamic_threshold(x_start: Tensor, quantile: float) -> Tensor:
    """x_0 `[B, ...]` limited to ±s and divided by s, s = max(1, the quantile of |x_0|) of each image.

    Saharia et al. 2022, section 2.3. quantile in (0, 1], linear between the order statistics; 1 is the largest.
    Returns values in [−1, 1], like x_start. Raises ValueError naming the argument that is wrong.
    """
    check_batch("x_start", x_start)
    if x_start.shape[1:].numel() == 0:
        raise ValueError(f"x_start: must have a number or more in each image, got {list(x_start.shape)}")
    require_number("quantile", quantile)
    require(0 < quantile <= 1, "quantile", "above 0 and at most 1", quantile)
    # torch.quantile knows float32 and float64 only, and less than 2^24 numbers a call: hence the order statistics
    sizes, _ = x_start.abs().flatten(1).sort(dim=1)
    sizes = sizes if sizes.dtype == torch.float64 else sizes.float()
    place = quantile * (sizes.shape[1] - 1)
    low = int(place)
    high = min(low + 1, sizes.shape[1] - 1)
    limit = torch.lerp(sizes[:, low], sizes[:, high], place - low).clamp(min=1.0)
    limit = limit.to(x_start.dtype).reshape(-1, *[1] * (x_start.dim() - 1))
    return torch.minimum(torch.maximum(x_start, -limit), limit) / limit


def check_threshold_quantile(quantile: float | None) -> None:
    """Raises ValueError unless quantile is None or in (0, 1]."""
    require_number("threshold_quantile", quantile, none="null")
    require(
        quantile is None or 0 < quantile <= 1,
        "threshold_quantile",
        "above 0 and at most 1, or null",
        quantile,
    )


def check_variance_type(variance_type: str) -> None:
    """Raises ValueError unless variance_type is one that this version knows."""
    names = ", ".join(repr(name) for name in VARIANCE_TYPES[:-1]) + f" or {VARIANCE_TYPES[-1]!r}"
    require(variance_type in VARIANCE_TYPES, "variance_type", names, variance_type)
