"""Training objectives: L_simple (Algorithm 1), the bound, and both (Nichol & Dhariwal 2021, arXiv:2102.09672)."""

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ddpm_core import rng
from ddpm_core._checks import (
    check_alike,
    check_batch,
    check_finite,
    check_floating,
    check_index,
    check_same_shape,
    require,
    require_int,
    require_number,
)
from ddpm_core._identity import config_identity
from ddpm_core._memory import of_process
from ddpm_core.bound import measured_bound_term
from ddpm_core.predictions import (
    PredictionType,
    check_prediction_type,
    target_of,
    x_start_tables,
)
from ddpm_core.process import LinearGaussianProcess, diffused
from ddpm_core.reverse import ReverseProcess
from ddpm_core.types import EpsTheta

Loss: TypeAlias = Literal["simple", "vlb", "hybrid"]
Weighting: TypeAlias = Literal["uniform", "snr", "min_snr", "p2"]
TrainedVariance: TypeAlias = Literal["fixed_small", "fixed_large", "learned_range"]
TimestepSampling: TypeAlias = Literal["uniform", "loss_second_moment"]


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the network predicts and what it is trained on.

    loss: "simple" is the squared error of the output at each t, times `loss_weights`; "vlb" is the bound; "hybrid"
    is simple + vlb_weight·vlb, where the bound trains the variance alone (Nichol & Dhariwal, Eq. 16).
    weighting: which `loss_weights`, with min_snr_gamma for "min_snr" and p2_gamma, p2_k for "p2".
    variance_type: σ_t² in the bound. "learned_range" needs a network of twice the channels, and a loss that trains
    them; "hybrid" needs "learned_range".
    timestep_sampling: "uniform", or "loss_second_moment" (`ddpm_core.timesteps.LossMoments`).
    label_dropout: the share of labels that a network with classes is not told (`drop_labels`).
    Fields that the chosen loss and weighting do not name are ignored. Raises ValueError naming the field that is
    wrong.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 (read by pydantic, not a field)

    prediction_type: PredictionType = "eps"
    loss: Loss = "simple"
    weighting: Weighting = "uniform"
    min_snr_gamma: float = 5.0
    p2_gamma: float = 1.0
    p2_k: float = 1.0
    vlb_weight: float = 0.001
    variance_type: TrainedVariance = "fixed_small"
    timestep_sampling: TimestepSampling = "uniform"
    label_dropout: float = 0.1

    def __post_init__(self) -> None:
        check_prediction_type(self.prediction_type)
        _choice("loss", self.loss, "simple", "vlb", "hybrid")
        _choice("weighting", self.weighting, "uniform", "snr", "min_snr", "p2")
        _choice("variance_type", self.variance_type, "fixed_small", "fixed_large", "learned_range")
        _choice("timestep_sampling", self.timestep_sampling, "uniform", "loss_second_moment")
        for name in ("min_snr_gamma", "p2_k", "p2_gamma", "vlb_weight", "label_dropout"):
            require_number(name, getattr(self, name))
        for name in ("min_snr_gamma", "p2_k"):
            value = getattr(self, name)
            require(0 < value < math.inf, name, "positive and finite", value)
        for name in ("p2_gamma", "vlb_weight"):
            value = getattr(self, name)
            require(0 <= value < math.inf, name, "at least 0 and finite", value)
        require(0 <= self.label_dropout < 1, "label_dropout", "at least 0 and below 1", self.label_dropout)
        learned = self.variance_type == "learned_range"
        require(
            learned or self.loss != "hybrid",
            "variance_type",
            "'learned_range' for the loss 'hybrid'",
            self.variance_type,
        )
        require(
            not learned or self.loss != "simple",
            "variance_type",
            "'fixed_small' or 'fixed_large' for the loss 'simple', which trains no variance",
            self.variance_type,
        )
        require(
            self.weighting == "uniform" or self.loss != "vlb",
            "weighting",
            "'uniform' for the loss 'vlb', which has weights of its own",
            self.weighting,
        )

    def identity(self) -> dict[str, Any]:
        """The fields that are not at their defaults, as plain values to hash."""
        return config_identity(self)

    def reverse(self, process: LinearGaussianProcess) -> ReverseProcess:
        """The p_θ that is trained; x̂_0 is not clipped, since a clipped one has no gradient."""
        return ReverseProcess(process, self.prediction_type, self.variance_type, clip=False)


def loss_weights(process: LinearGaussianProcess, objective: ObjectiveConfig) -> Tensor:
    """The weight of the output's squared error in L_simple at each t, float64 `[T]`.

    "uniform" is 1. The others are weights w of x̂_0's squared error, and the output's is w·k², k being the error of
    x̂_0 for an output that is off by 1 (`x_start_tables`): "snr" w = SNR, which is 1 on ε; "min_snr" w = min(SNR,
    min_snr_gamma) (Hang et al. 2023, arXiv:2303.09556); "p2" w = SNR/(p2_k + SNR)^p2_gamma, which is
    1/(p2_k + SNR)^p2_gamma on ε (Choi et al. 2022, arXiv:2204.00227). SNR = a²/b².

    All are finite, but that on x_start "snr", and "p2" with p2_gamma < 1, overflow where the log-SNR is above 709
    (in a float32 loss 88). Where a = 0 (zero terminal SNR) those three are 0, so that the last step is not trained:
    prefer "uniform" on v there. Raises ValueError naming prediction_type if it is "eps" then.
    """
    _, on_output = x_start_tables(process, objective.prediction_type)
    log_snr = process.log_snr
    if objective.weighting == "uniform":
        return torch.ones_like(log_snr)
    log_weight = log_snr
    if objective.weighting == "min_snr":
        log_weight = log_snr.clamp(max=math.log(objective.min_snr_gamma))
    elif objective.weighting == "p2":
        log_k = torch.full_like(log_snr, math.log(objective.p2_k))
        log_weight = log_snr - objective.p2_gamma * torch.logaddexp(log_k, log_snr)
    # in logarithms SNR may be as large or small as it likes, and 0·∞ does not arise
    return torch.exp(log_weight + 2.0 * on_output.abs().log())


def simple_loss(
    eps_theta: EpsTheta,
    process: LinearGaussianProcess,
    x_start: Tensor,
    t: Tensor,
    noise: Tensor,
    prediction_type: PredictionType = "eps",
) -> Tensor:
    """L_simple (Eq. 14) for each sample: ‖ε − ε_θ(√ᾱ_t·x_0 + √(1−ᾱ_t)·ε, t)‖², averaged over the dimensions.

    x_start, noise `[B, C, H, W]`; t int64 `[B]` in 0..T−1. Returns `[B]`, float32 (float64 if x_start is), so
    that a network under autocast does not round the loss. prediction_type: "x_start" and "v" put
    `prediction_target` in the place of ε.

    Its Bayes floor moves with the schedule: do not compare its values between schedules.
    Raises ValueError naming the argument that is wrong (NaN and ±∞ are noticed on the CPU), and prediction_type if
    it is "eps" for a process that ends without signal.
    """
    x_start_tables(process, prediction_type)
    _check_images(x_start, noise)
    return _simple_loss(eps_theta, process, x_start, t, noise, prediction_type)


def _simple_loss(
    eps_theta: EpsTheta,
    process: LinearGaussianProcess,
    x_start: Tensor,
    t: Tensor,
    noise: Tensor,
    prediction_type: PredictionType,
) -> Tensor:
    x_t = diffused(process, x_start, t, noise)
    prediction = eps_theta(x_t, t)
    check_floating("eps_theta's output", prediction)
    check_same_shape("eps_theta's output", prediction, "x_t", x_t)
    dtype = torch.float64 if x_start.dtype == torch.float64 else torch.float32
    target = target_of(process, prediction_type, x_start.to(dtype), t, noise.to(dtype))
    return (target - prediction.to(dtype)).square().flatten(1).mean(1)


def training_loss(
    network: EpsTheta,
    process: LinearGaussianProcess,
    objective: ObjectiveConfig,
    x_start: Tensor,
    t: Tensor,
    noise: Tensor,
    *,
    levels: int | None = None,
) -> Tensor:
    """The loss of each sample, `[B]`, whose mean over uniform t is to fall (Algorithm 1, line 5).

    "simple": loss_weights_t·`simple_loss`.
    "vlb": T·L_t in bits a dimension (`bound_term`), whose mean over t is the bound without its prior term, which
    has no parameters. "hybrid": simple + vlb_weight·vlb, with no gradient of vlb to the prediction.
    The network is evaluated once. With t drawn by p_t, multiply by 1/(T·p_t) (`draw_by_probability`).

    x_start, noise `[B, C, H, W]`; t int64 `[B]`; network(x_t, t) like x_t, or with twice its channels for
    "learned_range". levels: how many values a channel has, on which x_start lies; the bound's decoder needs it.
    float64 if x_start is, else float32. Raises ValueError naming the argument that is wrong; NaN and ±∞ in x_start
    and noise are noticed on the CPU. A NaN that the network says makes the loss NaN.
    """
    reverse = objective.reverse(process)
    _check_images(x_start, noise)
    if objective.loss == "vlb":
        return _bound_loss(network, reverse, x_start, t, noise, levels)
    if objective.loss == "simple":
        return _weighted_simple_loss(network, process, objective, x_start, t, noise)
    x_t = diffused(process, x_start, t, noise)
    prediction, v = reverse.split(network(x_t, t), x_t)
    stopped = prediction.detach() if v is None else torch.cat((prediction.detach(), v), dim=1)
    simple = _weighted_simple_loss(lambda x, t: prediction, process, objective, x_start, t, noise)
    bound = _bound_loss(lambda x, t: stopped, reverse, x_start, t, noise, levels)
    return simple + objective.vlb_weight * bound


def drop_labels(labels: Tensor, null_label: int, probability: float, seed: int, index: Tensor) -> Tensor:
    """Labels of which each is replaced by null_label with the given probability, keyed by (seed, index).

    For classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598): one network learns with and without labels.
    labels, index: int64 `[B]`; probability in [0, 1]. Returns a new tensor on labels' device.
    Raises ValueError naming the argument that is wrong.
    """
    check_index(labels, "labels")
    check_index(index)
    check_same_shape("labels", labels, "index", index)
    require_int("null_label", null_label)
    require_number("probability", probability)
    require(0 <= probability <= 1, "probability", "between 0 and 1", probability)
    dropped = rng.uniform(seed, "label dropout", index, dtype=torch.float64) < probability
    return labels.masked_fill(dropped.to(labels.device), null_label)


def _weighted_simple_loss(
    network: EpsTheta,
    process: LinearGaussianProcess,
    objective: ObjectiveConfig,
    x_start: Tensor,
    t: Tensor,
    noise: Tensor,
) -> Tensor:
    loss = _simple_loss(network, process, x_start, t, noise, objective.prediction_type)
    if objective.weighting == "uniform":
        return loss
    return process.gather(_weights(process, objective), t, loss) * loss


def _bound_loss(
    network: EpsTheta,
    reverse: ReverseProcess,
    x_start: Tensor,
    t: Tensor,
    noise: Tensor,
    levels: int | None,
) -> Tensor:
    """T·L_t in bits a dimension, `[B]`."""
    if levels is None:
        raise ValueError("levels: must be given for a loss that holds the bound, got None")
    require_int("levels", levels, 2)
    term, _ = measured_bound_term(network, reverse, x_start, t, noise, levels=levels, unit="bits_per_dim")
    return reverse.process.num_timesteps * term


def _check_images(x_start: Tensor, noise: Tensor) -> None:
    check_batch("x_start", x_start)
    check_finite("x_start", x_start)
    check_alike("noise", noise, "x_start", x_start)


@of_process  # neither changes, and a training step asks every time
def _weights(process: LinearGaussianProcess, objective: ObjectiveConfig) -> Tensor:
    with torch.inference_mode(False):
        return loss_weights(process, objective)


def _choice(name: str, value: str, *choices: str) -> None:
    names = ", ".join(repr(choice) for choice in choices[:-1]) + f" or {choices[-1]!r}"
    require(value in choices, name, names, value)
