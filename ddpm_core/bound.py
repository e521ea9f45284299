"""The variational bound on −ln p(x_0), in bits a dimension or nats (Ho et al. 2020, Eq. 5), and its estimate.

−ELBO = L_T (prior) + Σ_{t≥1} L_t (consistency: the KL of q(x_{t−1}|x_t, x_0) and p_θ(x_{t−1}|x_t)) + L_0
(reconstruction: a Gaussian integrated over the bin of each level, Eq. 13). t is zero-based, so L_0 is the
term at t == 0. `ddpm_core.two_sided` has the other decomposition of the same total, `ddpm_core.ledger` says what
each part of it is due to. A sampler with σ = 0 has no bound: its p_θ gives the data no probability.
"""

import math
from dataclasses import dataclass, replace
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
)
from ddpm_core._units import LN_2, Unit, in_unit
from ddpm_core.decoder import log_mass_of_level
from ddpm_core.predictions import PredictionType
from ddpm_core.process import LinearGaussianProcess, diffused
from ddpm_core.reverse import ReverseProcess
from ddpm_core.samplers import SamplerConfig
from ddpm_core.two_sided import measured_two_sided_term, two_sided_prior_term
from ddpm_core.types import EpsTheta

Decomposition: TypeAlias = Literal["kl", "two_sided"]
"""Which terms the bound is summed from: K_t (`bound_term`), or C_t (`ddpm_core.two_sided`)."""


def bound_term(
    eps_theta: EpsTheta,
    reverse: ReverseProcess,
    x_start: Tensor,
    t: Tensor,
    noise: Tensor,
    *,
    levels: int,
    unit: Unit = "bits_per_dim",
) -> Tensor:
    """One term of the bound for each sample, `[B]` in bits a dimension or nats, differentiable.

    t ≥ 1: KL(q(x_{t−1}|x_t, x_0) ‖ p_θ) = ½·[ln(σ²/β̃) + β̃/σ² − 1 + (c1²/σ²)·‖x̂_0 − x_0‖²/D] a dimension, of
    which there are D; c1 is the posterior's coefficient on x_0. t == 0: −ln P(x_0) of the decoder.
    x_start, noise `[B, C, H, W]`, x_start on one of `levels` levels in [−1, 1]; t int64 `[B]`.
    reverse.clip: clip x̂_0 to [−1, 1], as the samplers do: the bound of the model that is sampled, and the published
    practice. Without it, errors at the noisy end are multiplied by √(1/ᾱ − 1) (20,000 for the cosine schedule).
    Give False to train on this term, since a clipped x̂_0 has no gradient.
    float64 if x_start is, float32 otherwise. Raises ValueError naming the argument that is wrong (NaN and ±∞ are
    noticed on the CPU).
    """
    require_int("levels", levels, 2)
    check_batch("x_start", x_start)
    check_finite("x_start", x_start)
    check_alike("noise", noise, "x_start", x_start)
    return measured_bound_term(eps_theta, reverse, x_start, t, noise, levels=levels, unit=unit)[0]


def measured_bound_term(
    eps_theta: EpsTheta,
    reverse: ReverseProcess,
    x_start: Tensor,
    t: Tensor,
    noise: Tensor,
    *,
    levels: int,
    unit: Unit,
) -> tuple[Tensor, Tensor]:
    """`bound_term` and the squared error of x̂_0 a dimension, `[B]`, of x_start and noise that were checked."""
    process = reverse.process
    x_t = diffused(process, x_start, t, noise)
    output = eps_theta(x_t, t)
    error = reverse.x_start_error(output, x_start, t, noise)
    x_start = x_start.to(error.dtype)

    # float64 until the last step: the tables are, and a mismatch of variances may be a small difference
    log_variance = reverse.log_variance(output, x_t.double(), t)
    log_ratio = process.gather(process.posterior_log_variance_clipped, t, log_variance) - log_variance
    mismatch = 0.5 * (torch.expm1(log_ratio) - log_ratio)
    pull = process.gather(process.posterior_mean_coef1, t, log_variance) * torch.exp(-0.5 * log_variance)
    # multiplied before it is squared: where the SNR is large, pull² is no float32, and the error small
    miss = pull.to(error.dtype) * error
    terms = (mismatch.to(error.dtype) + 0.5 * miss.square()).flatten(1).mean(1)

    first = (t == 0).nonzero().squeeze(1)
    if first.numel():
        x_first = x_start[first]
        log_likelihood = log_mass_of_level(x_first, x_first + error[first], 0.5 * log_variance[first], levels)
        terms = terms.index_copy(0, first, -log_likelihood.flatten(1).mean(1))
    return in_unit(terms, unit, x_start.shape[1:].numel()), error.square().flatten(1).mean(1)


def prior_term(process: LinearGaussianProcess, x_start: Tensor, *, unit: Unit = "bits_per_dim") -> Tensor:
    """L_T = KL(q(x_T|x_0) ‖ p(x_T)), `[B]`: LinearGaussianProcess.prior_bits_per_dim in the unit asked for.

    Raises ValueError naming x_start if it is not floating-point `[B, ...]`.
    """
    return in_unit(process.prior_bits_per_dim(x_start) * LN_2, unit, x_start.shape[1:].numel())


def reverse_of_sampler(
    process: LinearGaussianProcess,
    config: SamplerConfig,
    *,
    prediction_type: PredictionType = "eps",
    x_start_mse: Tensor | None = None,
) -> ReverseProcess:
    """The p_θ that a sampler draws from, whose bound is then the bound of what is sampled.

    process: the chain that the sampler visits, respaced already. x_start_mse: for the variance type "analytic".
    That is "ancestral" with its variance_type, and "ddim" with eta = 1, which is ancestral with fixed_small.
    Raises ValueError naming the field of any other sampler. With σ = 0 (ddim with eta = 0, dpm_solver_pp_2m, heun)
    p_θ is a point, which gives almost no data a probability: there is no bound. The step of dpm_solver_pp_2m_sde
    depends on the x̂_0 of the step before as well, so that its states are no Markov chain p_θ(x_{t−1}|x_t). ddim
    with 0 < eta < 1 is one, with the variance η²·β̃_t; but its mean is not the posterior's μ̃_t(x_t, x̂_0), which is
    the only one that a `ReverseProcess` has: it holds more of ε̂, in place of the noise that is left out.
    """
    if config.kind == "ancestral":
        variance_type = config.variance_type
    elif config.kind == "ddim":
        require(
            config.eta == 1,
            "eta",
            f"1 to have a bound ({_SIGMA_IS_ZERO if config.eta == 0 else _OTHER_MEAN})",
            config.eta,
        )
        variance_type = "fixed_small"
    else:
        why = _NO_BOUND[config.kind]
        raise ValueError(
            f"kind: must be 'ancestral', or 'ddim' with eta = 1, to have a bound ({why}), got {config.kind!r}"
        )
    return ReverseProcess(
        process, prediction_type, variance_type, config.clip, x_start_mse, config.threshold_quantile
    )


_SIGMA_IS_ZERO = "steps without noise give almost no image a probability"
_OTHER_MEAN = "between 0 and 1 the mean of a step is not the posterior's, which the bound is for"
_NO_BOUND: dict[str, str] = {
    "dpm_solver_pp_2m": _SIGMA_IS_ZERO,
    "heun": _SIGMA_IS_ZERO,
    "dpm_solver_pp_2m_sde": "a step that depends on an earlier prediction too is no p_theta(x_{t-1}|x_t)",
}


def stratify(process: LinearGaussianProcess, num_strata: int) -> Tensor:
    """Edges int64 `[num_strata + 1]` of strata edge_i ≤ t < edge_{i+1} that cut 1..T−1, none empty.

    Any cut gives an unbiased estimate. This one shares out evenly the mean of two weights: a uniform one,
    and the consistency terms of Gaussian data with variance ¼, ½·(SNR_{t−1} − SNR_t)·¼/(1 + ¼·SNR_t). The
    terms of images too grow by orders of magnitude towards t = 0, and a stratum adds as much noise as they
    differ within it.
    Raises ValueError if num_strata is not in 1..T−1.
    """
    num_terms = process.num_timesteps - 1
    require_int("num_strata", num_strata)
    require(1 <= num_strata <= num_terms, "num_strata", f"in 1..{num_terms} (T − 1)", num_strata)
    snr = process.log_snr.cpu().exp()
    proxy = (snr[:-1] - snr[1:]) / (4.0 + snr[1:])
    share = (proxy / proxy.sum() + 1.0 / num_terms) / 2.0
    wanted = torch.arange(1, num_strata, dtype=torch.float64) / num_strata
    edges = [1]
    for number, edge in enumerate((1 + torch.searchsorted(share.cumsum(0), wanted)).tolist(), start=1):
        room_left = process.num_timesteps - (num_strata - number)
        edges.append(min(max(edge, edges[-1] + 1), room_left))
    return torch.tensor([*edges, process.num_timesteps])


_PARTS = ("reconstruction", "consistency", "prior", "total")


@dataclass(frozen=True)
class BoundEstimate:
    """The bound in bits a dimension: three terms and their sum, each with its standard error.

    The standard errors come from the images' own totals, so that they hold both the spread between images
    and the random choice of t and ε; nan for fewer than two images. per_t: the mean term at each t (index 0
    is the decoder's), nan where no t was drawn.
    """

    reconstruction: float
    consistency: float
    prior: float
    total: float
    reconstruction_stderr: float
    consistency_stderr: float
    prior_stderr: float
    total_stderr: float
    num_images: int
    per_t: list[float]

    def in_nats(self, num_dims: int) -> "BoundEstimate":
        """The same in nats an image of num_dims dimensions (C·H·W)."""
        factor = LN_2 * num_dims
        sizes: dict[str, Any] = {
            name: value * factor for name, value in vars(self).items() if isinstance(value, float)
        }
        return replace(self, **sizes, per_t=[term * factor for term in self.per_t])


@dataclass(frozen=True)
class TermsPerT:
    """What was measured at each t, float64 `[T]` each; nan where nothing was, and stderr nan below two draws.

    term: the mean term in bits a dimension (index 0 the decoder's), stderr its standard error. x_start_mse: m(t),
    the mean squared error of x̂_0 a dimension (clipped where the bound is), which the variance type "analytic" and
    the ledger ask for. num_draws: how often t was drawn.
    """

    term: Tensor
    stderr: Tensor
    x_start_mse: Tensor
    num_draws: Tensor


class BoundAccumulator:
    """Sums an unbiased estimate of the bound over images.

    For each image: the term at t == 0, the prior term, and one t from each of num_strata strata of 1..T−1
    (see `stratify`), weighted by the stratum's length. num_strata above T−1 counts as T−1: every t is
    evaluated. What is drawn for an image depends on (seed, "bound", index) alone, so that the result is the
    same, but for rounding, however the images are divided into batches and over workers. Costs
    num_strata + 1 network evaluations an image.

    decomposition "two_sided": the sum of C_{t−1} in place of that of K_t, and the prior term that belongs to it.
    Both ask the network at t and stand at t, so that they can be compared; the total has the same expectation.
    """

    def __init__(
        self,
        reverse: ReverseProcess,
        *,
        levels: int,
        num_strata: int,
        seed: int,
        decomposition: Decomposition = "kl",
    ) -> None:
        require_int("levels", levels, 2)
        require_int("num_strata", num_strata, 1)
        require(decomposition in ("kl", "two_sided"), "decomposition", "'kl' or 'two_sided'", decomposition)
        self._two_sided = decomposition == "two_sided"
        self._reverse = reverse
        self._levels = levels
        self._seed = seed
        process = reverse.process
        num_strata = min(num_strata, process.num_timesteps - 1)
        self._edges: list[int] = stratify(process, num_strata).tolist() if num_strata else [1]
        # Count; sums and sums of squares of (reconstruction, consistency, prior, total); then for each t the number
        # of draws and the sums of the term, of its square and of the squared error of x̂_0.
        self._state = torch.zeros(9 + 4 * process.num_timesteps, dtype=torch.float64)

    @torch.no_grad()
    def add(self, eps_theta: EpsTheta, x_start: Tensor, index: Tensor) -> None:
        """Add images x_start `[B, C, H, W]` on levels in [−1, 1] with their numbers index int64 `[B]`.

        Each image is to be added once in all. Run the network in eval mode. Raises ValueError naming the argument
        that is wrong; NaN and ±∞ in x_start are noticed on the CPU.
        """
        check_index(index)
        check_floating("x_start", x_start)
        if x_start.dim() < 2 or x_start.shape[0] != index.shape[0]:
            raise ValueError(
                f"x_start: must hold one image an index ({index.shape[0]}), got {list(x_start.shape)}"
            )
        # first, since it looks whether x_start is finite, which nothing after it does again
        prior_of = two_sided_prior_term if self._two_sided else prior_term
        prior = prior_of(self._reverse.process, x_start).double().cpu()
        reconstruction = self._evaluate(eps_theta, x_start, index, torch.zeros_like(index), draw=0)
        consistency = torch.zeros_like(reconstruction)
        for stratum, (start, stop) in enumerate(zip(self._edges, self._edges[1:], strict=False)):
            t = start + rng.integers(self._seed, "bound timestep", index, stop - start, draw=stratum)
            term = self._evaluate(eps_theta, x_start, index, t, draw=stratum + 1)
            consistency += (stop - start) * term
        per_image = torch.stack((reconstruction, consistency, prior, reconstruction + consistency + prior))
        self._state[0] += index.shape[0]
        self._state[1:5] += per_image.sum(1)
        self._state[5:9] += per_image.square().sum(1)

    def state(self) -> Tensor:
        """All that was added, float64 `[9 + 4·T]` on the CPU. The states of several workers may be summed."""
        return self._state.clone()

    def load_state(self, state: Tensor) -> None:
        """Replace what was added by a (summed) state. Raises ValueError if its length is not 9 + 4·T."""
        check_floating("state", state)
        check_same_shape("state", state, "this accumulator's state", self._state)
        self._state = state.detach().to("cpu", torch.float64, copy=True)

    def result(self) -> BoundEstimate:
        """The estimate over the images added. Raises ValueError if there are none."""
        count = int(self._state[0])
        if count == 0:
            raise ValueError("state: must hold at least one image, got none")
        mean = self._state[1:5] / count
        spread = (self._state[5:9] / count - mean.square()).clamp(min=0.0)
        stderr = (spread / (count - 1)).sqrt() if count > 1 else torch.full_like(mean, math.nan)
        parts: dict[str, Any] = {}
        for name, value, error in zip(_PARTS, mean.tolist(), stderr.tolist(), strict=True):
            parts |= {name: value, f"{name}_stderr": error}
        return BoundEstimate(**parts, num_images=count, per_t=self.per_t().term.tolist())

    def per_t(self) -> TermsPerT:
        """What was measured at each t."""
        draws, terms, squares, errors = self._state[9:].chunk(4)
        term = terms / draws
        spread = (squares / draws - term.square()).clamp(min=0.0)
        # 0/0 for one draw
        stderr = (spread / (draws - 1)).sqrt()
        return TermsPerT(term, stderr, errors / draws, draws.clone())

    def _evaluate(self, eps_theta: EpsTheta, x_start: Tensor, index: Tensor, t: Tensor, draw: int) -> Tensor:
        two_sided = self._two_sided and draw > 0
        shape = (3, *x_start.shape[1:]) if two_sided else tuple(x_start.shape[1:])
        noise = rng.normal(self._seed, "bound", index, shape, draw=draw, dtype=x_start.dtype).to(
            x_start.device
        )
        reverse, at = self._reverse.to(x_start.device), t.to(x_start.device)
        if two_sided:
            term, error = measured_two_sided_term(
                eps_theta, reverse, x_start, at - 1, noise.transpose(0, 1), unit="bits_per_dim"
            )
        else:
            term, error = measured_bound_term(
                eps_theta, reverse, x_start, at, noise, levels=self._levels, unit="bits_per_dim"
            )
        term, error = term.double().cpu(), error.double().cpu()
        measured = torch.stack((torch.ones_like(term), term, term.square(), error))
        self._state[9:].reshape(4, -1).index_add_(1, t.cpu(), measured)
        return term
