"""The forward process q (Ho et al. 2020, section 2), for every linear-Gaussian way from data to noise.

x_t = a_t·x_0 + b_t·ε, Markov, with a falling signal-to-noise ratio a²/b². The variance-preserving process of Ho
et al. is a = √ᾱ, b = √(1 − ᾱ): `ddpm_core.schedules.Schedule`. Whatever scale a process has, everything that the
bound says of it depends on the log-SNR alone (Kingma et al. 2021, arXiv:2107.00630).
"""

import math
from typing import Self

import torch
from torch import Tensor

from ddpm_core._checks import (
    check_alike,
    check_batch,
    check_finite,
    check_floating,
    check_index,
    check_numbers,
    check_same_shape,
    check_timesteps,
    require,
)

PRIOR_WARNING_BITS_PER_DIM = 1e-3

_ENOUGH_NOISE = 40.0
"""b/a at the last step for a prior term of 4.5e-4 bits/dim at |x_0| = 1, with room below the limit."""


class LinearGaussianProcess:
    """The tables of q, each a float64 tensor `[T]`; t is zero-based, and t = −1 means the data (a = 1, b = 0).

    log_a, log_b, a, b: x_t = a·x_0 + b·ε; ln a is −∞ where a = 0, which only the last step may have.
    log_snr = 2·(ln a − ln b), strictly falling.
    total_variance = a² + b²: the variance of x_t for data of variance 1; its last value is that of p(x_T).
    snr_loss = 1 − SNR_t/SNR_{t−1}, the share of the signal-to-noise ratio that step t destroys; 1 at index 0.
    step_scale, step_variance: q(x_t|x_{t−1}) = N(step_scale·x_{t−1}, step_variance·I).
    posterior_mean_coef1 (on x_0), posterior_mean_coef2 (on x_t), posterior_variance (exactly 0 at index 0):
    q(x_{t−1}|x_t, x_0), Eq. 6 and 7.
    posterior_log_variance_clipped: ln of it, with index 1's value at index 0, there in units of x_0 (the one step's
    own variance if T = 1).

    Do not change a table in place. `to` gives a copy on another device.
    """

    def __init__(
        self,
        log_a: Tensor,
        log_b: Tensor,
        *,
        log_snr: Tensor | None = None,
        snr_loss: Tensor | None = None,
        total_variance: Tensor | None = None,
    ) -> None:
        """log_a, log_b: floating-point `[T]`, finite but for a last ln a of −∞.

        log_snr, snr_loss and total_variance: these tables where the caller knows them with more digits than ln a
        and ln b give: falling strictly and finite but for a last −∞, in (0, 1], and positive and finite. Raises
        ValueError naming the argument that is wrong.
        """
        _check_tables(log_a, log_b)
        for name, table in (
            ("log_snr", log_snr),
            ("snr_loss", snr_loss),
            ("total_variance", total_variance),
        ):
            if table is not None:
                check_floating(name, table)
                check_same_shape(name, table, "log_a", log_a)
        _check_given(snr_loss, total_variance)
        self.log_a, self.log_b = _own(log_a), _own(log_b)
        self.log_snr = 2.0 * (self.log_a - self.log_b) if log_snr is None else _own(log_snr)
        _check_falling(self.log_snr)
        self.a, self.b = self.log_a.exp(), self.log_b.exp()
        # −expm1 keeps the digits of a small loss
        losses = -torch.expm1(self.log_snr - shifted(self.log_snr, math.inf))
        # a loss above 1 could only be rounding, and the first step's is 1: the data have no noise to lose to
        self.snr_loss = (losses if snr_loss is None else _own(snr_loss)).clamp(max=1.0)
        self.snr_loss[0] = 1.0
        totals = self.a.square() + self.b.square()
        self.total_variance = totals if total_variance is None else _own(total_variance)

        variance, variance_prev = self.b.square(), shifted(self.b, 0.0).square()
        self.step_scale = torch.exp(self.log_a - shifted(self.log_a, 0.0))
        self.step_variance = variance * self.snr_loss
        self.posterior_mean_coef1 = shifted(self.a, 1.0) * self.snr_loss
        self.posterior_mean_coef2 = self.step_scale * variance_prev / variance
        self.posterior_variance = variance_prev * self.snr_loss
        # the decoder of x_0 needs a width where the posterior has none
        clipped = self.posterior_variance.clone()
        first = self.posterior_variance[1] if self.num_timesteps > 1 else self.step_variance[0]
        clipped[0] = first / self.total_variance[0]
        self.posterior_log_variance_clipped = clipped.log()

    @property
    def num_timesteps(self) -> int:
        return self.log_a.shape[0]

    @property
    def ends_without_signal(self) -> bool:
        """Whether a = 0 at the last step (zero terminal SNR): x_T is noise alone, and ε says nothing of x_0."""
        return bool(self.log_a[-1] == -math.inf)

    def __repr__(self) -> str:
        last = float(self.log_snr[-1])
        return f"{type(self).__name__}(num_timesteps={self.num_timesteps}, last log_snr={last:.3g})"

    def to(self, device: torch.device | str) -> Self:
        """The same process with its tables on device (self, if they are there already)."""
        if self.log_a.to(device).device == self.log_a.device:
            return self
        other = object.__new__(type(self))
        # The tables are copied, not computed again, so that every device holds the same bits.
        for name, value in self.__dict__.items():
            other.__dict__[name] = value.to(device) if isinstance(value, Tensor) else value
        return other

    def at(self, timesteps: Tensor) -> "LinearGaussianProcess":
        """The shorter chain through some timesteps; q(x_t|x_0) is kept.

        timesteps: int64 `[S]`, strictly increasing, in 0..T−1. Raises ValueError naming timesteps.
        """
        check_subset(timesteps, self.num_timesteps)
        where = timesteps.to(self.log_a.device)
        return LinearGaussianProcess(
            self.log_a[where],
            self.log_b[where],
            log_snr=self.log_snr[where],
            total_variance=self.total_variance[where],
        )

    def gather(self, table: Tensor, t: Tensor, like: Tensor) -> Tensor:
        """table[t] shaped `[B, 1, ..., 1]` to broadcast over like, in like's dtype and on its device.

        The cast comes after the look-up and after every root and difference: a table in bf16 would give zero
        noise at the first timesteps. With CUDA tensors call `to(device)` once, or each look-up waits for the
        device. Raises ValueError naming t if it is not int64 `[B]` in 0..T−1.
        """
        check_same_shape("table", table, "the process's tables", self.log_a)
        check_timesteps(t, self.num_timesteps, like)
        values = table[t.to(table.device)].to(like.dtype).to(like.device)
        return values.reshape(-1, *[1] * (like.dim() - 1))

    def prior_bits_per_dim(self, x_start: Tensor) -> Tensor:
        """KL(q(x_T|x_0) ‖ p(x_T)), `[B]` in bits a dimension, the bound's L_T (Eq. 5); p(x_T) = N(0, (a² + b²)·I).

        ½ · (−ln(1 − r) − r + r·x_0²) / ln 2 with r = a²/(a² + b²) at the last step (ᾱ_T of a variance-preserving
        process), averaged over the dimensions of x_start `[B, ...]`. float64 in, float64 out; float32 otherwise.
        Raises ValueError naming x_start.
        """
        check_batch("x_start", x_start)
        check_finite("x_start", x_start)
        dtype = torch.float64 if x_start.dtype == torch.float64 else torch.float32
        mean_square = x_start.to(dtype).square().flatten(1).mean(1)
        last = float(torch.sigmoid(self.log_snr[-1]))
        return (_log_excess(float(self.log_snr[-1])) + last * mean_square) / (2.0 * math.log(2.0))

    @property
    def worst_prior_bits_per_dim(self) -> float:
        """`prior_bits_per_dim` for |x_0| = 1 in every dimension, the most that images in [−1, 1] can have."""
        return float(self.prior_bits_per_dim(torch.ones(1, 1, dtype=torch.float64)))

    def warnings(self) -> list[str]:
        """What a user should know before training with this process: plain sentences, mostly none."""
        bits = self.worst_prior_bits_per_dim
        if bits <= PRIOR_WARNING_BITS_PER_DIM:
            return []
        ratio = float(torch.exp(self.log_b[-1] - self.log_a[-1]))
        return [
            f"x_T is not close to its prior N(0, a² + b²): the log-SNR ends at {float(self.log_snr[-1]):.3g} "
            f"(prior term up to {bits:.2g} bits/dim, should be below {PRIOR_WARNING_BITS_PER_DIM:g}), so sampling "
            f"starts from noise that training never saw; let b/a, {ratio:.3g} at the last step, grow to "
            f"{_ENOUGH_NOISE:g} or more"
        ]


def q_sample(process: LinearGaussianProcess, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t = a_t·x_0 + b_t·ε; for a `Schedule` √ᾱ_t·x_0 + √(1 − ᾱ_t)·ε (Eq. 4).

    x_start, noise `[B, ...]`; t int64 `[B]`, zero-based. Returns `[B, ...]` in the dtype of x_start.
    Raises ValueError naming the argument whose shape, dtype or range is wrong, or which is not finite (noticed on
    the CPU alone, where a look does not wait for the device).
    """
    check_numbers("x_start", x_start)
    check_alike("noise", noise, "x_start", x_start)
    return diffused(process, x_start, t, noise)


def diffused(process: LinearGaussianProcess, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """`q_sample` for callers that have checked x_start and noise, or made them."""
    signal, spread = process.gather(process.a, t, x_start), process.gather(process.b, t, x_start)
    return signal * x_start + spread * noise.to(x_start.dtype)


def q_posterior(
    process: LinearGaussianProcess, x_start: Tensor, x_t: Tensor, t: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """q(x_{t−1} | x_t, x_0): mean μ̃_t `[B, ...]`, variance β̃_t and its logarithm `[B, 1, ...]` (Eq. 6, 7).

    At t == 0 the mean is x_0 and the variance 0; the logarithm is clipped there to index 1's.
    x_start, x_t `[B, ...]`; t int64 `[B]`. In the dtype of x_start. Raises ValueError as `q_sample` does.
    """
    check_numbers("x_start", x_start)
    check_alike("x_t", x_t, "x_start", x_start)
    variance = process.gather(process.posterior_variance, t, x_start)
    log_variance = process.gather(process.posterior_log_variance_clipped, t, x_start)
    return posterior_mean(process, x_start, x_t, t), variance, log_variance


def posterior_mean(process: LinearGaussianProcess, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The mean of `q_posterior`, for callers that have checked x_start and x_t, or made them."""
    return (
        process.gather(process.posterior_mean_coef1, t, x_start) * x_start
        + process.gather(process.posterior_mean_coef2, t, x_start) * x_t
    )


def _own(table: Tensor) -> Tensor:
    return table.detach().to(torch.float64).clone()


def shifted(table: Tensor, first: float) -> Tensor:
    """The table of t − 1: `first` stands for the data."""
    return torch.cat((table.new_full((1,), first), table[:-1]))


def check_subset(timesteps: Tensor, num_timesteps: int) -> None:
    """Raises ValueError unless timesteps is int64 `[S]`, S ≥ 1, strictly increasing in 0..num_timesteps − 1."""
    check_index(timesteps, "timesteps")
    if timesteps.numel() == 0 or bool((timesteps.diff() <= 0).any()):
        raise ValueError("timesteps: must be strictly increasing and not empty")
    for end in (int(timesteps[0]), int(timesteps[-1])):
        require(0 <= end < num_timesteps, "timesteps", f"in 0..{num_timesteps - 1}", end)


def _check_tables(log_a: Tensor, log_b: Tensor) -> None:
    for name, table in (("log_a", log_a), ("log_b", log_b)):
        check_floating(name, table)
        if table.dim() != 1 or table.shape[0] < 1:
            raise ValueError(f"{name}: must have the shape [T] with T >= 1, got {list(table.shape)}")
    check_same_shape("log_b", log_b, "log_a", log_a)
    finite = log_a.isfinite()
    finite[-1] |= log_a[-1] == -math.inf
    for name, ok in (("log_a", finite), ("log_b", log_b.isfinite())):
        if not bool(ok.all()):
            raise ValueError(f"{name}: must be finite, got a value that is not at {int((~ok).nonzero()[0])}")


def _check_falling(log_snr: Tensor) -> None:
    falls = log_snr.diff() < 0
    if not bool(falls.all()):
        at = int((~falls).nonzero()[0]) + 1
        raise ValueError(
            f"log_snr: must fall strictly, got {float(log_snr[at - 1])} then {float(log_snr[at])} at {at}"
        )
    if not bool(log_snr[:1].isfinite() | (log_snr[:1] == -math.inf)):
        raise ValueError(f"log_snr: must be finite but for a last -inf, got {float(log_snr[0])} at 0")


def _check_given(snr_loss: Tensor | None, total_variance: Tensor | None) -> None:
    for name, table, most in (("snr_loss", snr_loss, 1.0), ("total_variance", total_variance, math.inf)):
        if table is None:
            continue
        ok = (table > 0) & table.isfinite() & (table <= most + 1e-9)
        if not bool(ok.all()):
            at = int((~ok).nonzero()[0])
            must_be = "in (0, 1]" if most == 1.0 else "positive and finite"
            raise ValueError(f"{name}: must be {must_be}, got {float(table[at])} at {at}")


def _log_excess(log_snr: float) -> float:
    """−ln(1 − r) − r with r = sigmoid(log_snr), without the cancellation at small r and the overflow near r = 1."""
    # e^{−|λ|} is r/(1 − r) or (1 − r)/r, and at most 1
    odds = math.exp(-abs(log_snr))
    r = odds / (1.0 + odds) if log_snr < 0 else 1.0 / (1.0 + odds)
    if r < 1e-2:
        return sum(r**k / k for k in range(2, 11))
    return max(log_snr, 0.0) + math.log1p(odds) - r
