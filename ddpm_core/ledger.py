"""The ledger: what every bit of a bound is due to. One curve m(log-SNR) gives the bound of every schedule.

With σ² = β̃ the term of a step is ½·ΔSNR_t·m(t), ΔSNR_t = SNR_{t−1} − SNR_t and m the squared error of x̂_0 a
dimension: a sum under a curve over the SNR, whose limit for ever finer steps is the area ½∫ m dSNR (Kingma et al.
2021, arXiv:2107.00630). If m is the Bayes error, that area is what the clean end of the chain tells of x_0 beyond
what the noisy end does (Guo, Shamai & Verdú 2005), which no network can save.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_core._checks import check_finite, check_floating, check_same_shape, require, require_number
from ddpm_core._units import LN_2
from ddpm_core.curve import Curve, MeasuredCurve, snr_integral
from ddpm_core.process import LinearGaussianProcess
from ddpm_core.reverse import ReverseProcess
from ddpm_core.types import VarianceType


@dataclass(frozen=True)
class Ledger:
    """The parts of a bound in bits a dimension. The first seven sum to `total`.

    prior: KL(q(x_T|x_0) ‖ p). decoder: −log₂ P(x_0|x_1).
    continuous_time: ½∫ m dSNR between the ends of the chain, with the Bayes error where it is known. Then it is
    information of the data, and irreducible; otherwise it holds the network's error too.
    network_error: ½·Σ ΔSNR_t·(m_θ(t) − m*(t)), m* the Bayes error; None where that is unknown.
    finite_step: ½·Σ ΔSNR_t·m − ½∫ m dSNR, m as in continuous_time: what steps of finite size cost with σ² = β̃.
    The sum takes m at the lower SNR of each step, so that this is ≥ 0 where m falls with the SNR, as the Bayes
    error does; a measured m that rises somewhere may make it negative.
    variance_optimum: ½·Σ [ln(1 + ΔSNR_t·m_θ) − ΔSNR_t·m_θ] ≤ 0: what the best variance of each step, β̃ + c1²·m_θ,
    wins back of that.
    variance_choice: how far the variance in use stays behind that best one; ≥ 0 if it is a number for each t. A
    learned one may be better, since it may differ between pixels and images, and then this is negative.

    Where the entropy of the data is known: entropy, prior_mismatch = KL(q(x_T) ‖ p) and decoder_excess, how far the
    decoder's term exceeds H(x_0|x_1), are prior + decoder + continuous_time divided otherwise; None elsewhere.
    """

    prior: float
    decoder: float
    continuous_time: float
    finite_step: float
    network_error: float | None
    variance_optimum: float
    variance_choice: float
    entropy: float | None = None
    prior_mismatch: float | None = None
    decoder_excess: float | None = None

    @property
    def total(self) -> float:
        """The bound in bits a dimension."""
        steps = self.continuous_time + self.finite_step + (self.network_error or 0.0)
        return self.prior + self.decoder + steps + self.variance_optimum + self.variance_choice


class CurveBound(NamedTuple):
    """A bound in bits a dimension; consistency is float64 `[T]`, 0 at t == 0, where the decoder stands."""

    reconstruction: float
    consistency: Tensor
    prior: float

    @property
    def total(self) -> float:
        return self.reconstruction + float(self.consistency.sum()) + self.prior


def consistency_terms(reverse: ReverseProcess, x_start_mse: Tensor) -> Tensor:
    """E[K_t] from the error of x̂_0 alone, float64 `[T]` in bits a dimension, 0 at t == 0 (the decoder's place).

    K_t = ½·[ln(σ²/β̃) + (β̃/σ²)·(1 + ΔSNR_t·m(t)) − 1]; that is ½·ΔSNR_t·m for σ² = β̃ and ½·ln(1 + ΔSNR_t·m) for
    the best σ² (reverse with "analytic" and the same m). x_start_mse: m(t) a dimension, `[T]`; index 0 is not read.
    Raises ValueError for "learned_range", whose variance is no function of t.
    """
    gain = _step_gains(reverse.process, x_start_mse)
    process = reverse.process
    log_ratio = (process.posterior_log_variance_clipped - reverse.log_variance_table().to(process.log_a))[1:]
    nats = 0.5 * (torch.expm1(log_ratio) - log_ratio + log_ratio.exp() * gain)
    return torch.cat((nats.new_zeros(1), nats)) / LN_2


def bound_from_curve(
    process: LinearGaussianProcess,
    curve: Curve,
    *,
    decoder: float,
    mean_square: float,
    variance_type: VarianceType = "fixed_small",
) -> CurveBound:
    """The bound that a network with the error m(log-SNR) has with any process, without running it again.

    decoder: the decoder's term at the process's first step in bits a dimension, which is no function of m alone.
    mean_square: E[x_0²] a dimension, for the prior term. "analytic" takes the curve's own m.
    Raises ValueError for "learned_range", or a mean_square below 0.
    """
    require_number("decoder", decoder)
    require_number("mean_square", mean_square)
    require(0 <= mean_square < math.inf, "mean_square", "at least 0 and finite", mean_square)
    error = curve(process.log_snr)
    # x̂_0 is what the curve speaks of; asking for ε would refuse processes that end without signal
    reverse = ReverseProcess(process, "x_start", variance_type, clip=False, x_start_mse=error)
    x_start = torch.full((1, 1), math.sqrt(mean_square), dtype=torch.float64)
    prior = float(process.prior_bits_per_dim(x_start))
    return CurveBound(decoder, consistency_terms(reverse, error), prior)


def bound_ledger(
    reverse: ReverseProcess,
    x_start_mse: Tensor,
    *,
    prior: float,
    decoder: float,
    bayes: Curve | None = None,
    consistency: Tensor | None = None,
    entropy: float | None = None,
) -> Ledger:
    """Divide a bound into its parts.

    reverse: the process and its variance. x_start_mse: m_θ(t), the squared error of x̂_0 a dimension, `[T]`
    (`BoundAccumulator.per_t`; fill what was not measured by a `MeasuredCurve`). prior, decoder: these terms in bits
    a dimension. bayes: the Bayes error m*(log-SNR), where it is known; without it the integral is that of the
    MeasuredCurve through x_start_mse, and needs it positive at t ≥ 1 (otherwise 0 will do there). consistency: the
    terms K_t as measured, `[T]` in bits a dimension; without it they follow from x_start_mse, and "learned_range"
    needs them. Index 0 of either is not read, but where it is measured the curve passes through it. entropy: H(x_0)
    in bits a dimension, differential if the decoder is a density; needs bayes.
    Raises ValueError naming the argument that is wrong.
    """
    process = reverse.process
    gain = _step_gains(process, x_start_mse)
    if consistency is None:
        consistency = consistency_terms(reverse, x_start_mse)
    check_floating("consistency", consistency)
    check_same_shape("consistency", consistency, "the process's tables", process.log_a)
    check_finite("consistency", consistency[1:])
    if bayes is None and entropy is not None:
        raise ValueError("entropy: must come with bayes, the Bayes error, got none")

    best_gain = gain if bayes is None else _step_gains(process, bayes(process.log_snr))
    curve = _measured(process, x_start_mse) if bayes is None else bayes
    first, last = float(process.log_snr[0]), float(process.log_snr[-1])
    area = 0.5 * snr_integral(curve, last, first) / LN_2
    best_sum = 0.5 * float(best_gain.sum()) / LN_2
    total_sum = 0.5 * float(gain.sum()) / LN_2
    optimum = 0.5 * float(torch.log1p(gain).sum()) / LN_2
    parts = Ledger(
        prior=prior,
        decoder=decoder,
        continuous_time=area,
        finite_step=best_sum - area,
        network_error=None if bayes is None else total_sum - best_sum,
        variance_optimum=optimum - total_sum,
        variance_choice=float(consistency[1:].sum()) - optimum,
    )
    if entropy is None:
        return parts
    # what x_T still tells of x_0; the rest of the prior term is the distance of x_T's law from p
    information = 0.5 * snr_integral(curve, -math.inf, last) / LN_2
    return replace(
        parts,
        entropy=entropy,
        prior_mismatch=prior - information,
        decoder_excess=decoder - (entropy - information - area),
    )


def _measured(process: LinearGaussianProcess, x_start_mse: Tensor) -> MeasuredCurve:
    """The curve through m(t); what is not positive at t == 0, where no step ends, is left out."""
    error = x_start_mse.detach().to(process.log_a).clone()
    if process.num_timesteps > 1 and not float(error[0]) > 0:
        error[0] = math.nan
    return MeasuredCurve(process.log_snr, error)


def _step_gains(process: LinearGaussianProcess, x_start_mse: Tensor) -> Tensor:
    """ΔSNR_t·m(t) for t ≥ 1, float64 `[T − 1]`."""
    check_floating("x_start_mse", x_start_mse)
    check_same_shape("x_start_mse", x_start_mse, "the process's tables", process.log_a)
    error = x_start_mse.to(process.log_a)[1:]
    bad = ~(error.isfinite() & (error >= 0))
    if bool(bad.any()):
        at = int(bad.nonzero()[0]) + 1
        raise ValueError(
            f"x_start_mse: must be finite and at least 0, got {float(error[at - 1])} at t = {at}"
        )
    # from the loss, not from two SNRs: they are close where steps are small
    return process.log_snr[:-1].exp() * process.snr_loss[1:] * error
