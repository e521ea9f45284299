"""The variational bound on −log₂ p(x_0) in bits a dimension (Ho et al. 2020, Eq. 5), and its estimate.

−ELBO = L_T (prior) + Σ_{t≥1} L_t (consistency: the KL of q(x_{t−1}|x_t, x_0) and p_θ(x_{t−1}|x_t)) + L_0
(reconstruction: a Gaussian integrated over the bin of each level, Eq. 13). t is zero-based, so L_0 is the
term at t == 0. A sampler with σ = 0 has no bound: its p_θ gives the data no probability.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_core import rng
from ddpm_core._checks import check_floating, check_index, check_same_shape, require
from ddpm_core.process import LinearGaussianProcess, q_sample
from ddpm_core.reverse import ReverseProcess
from ddpm_core.types import EpsTheta

_LN_2 = math.log(2.0)


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor, levels: int) -> Tensor:
    """ln P(level of x) in nats, elementwise, under a Gaussian integrated over the level's bin (Eq. 13).

    The levels lie at −1 + 2·l/(levels − 1); a bin reaches 1/(levels − 1) to each side, and the outer two
    are open, so that the probabilities of all levels sum to 1. x holds levels; mean and log_scale (ln σ)
    broadcast to x. Computed in float64 from the smaller tail, so that values and gradients are finite far
    from the mean; returned in x's dtype. Raises ValueError for σ = 0.
    """
    check_floating("x", x)
    require(levels >= 2, "levels", "at least 2", levels)
    if log_scale.device.type == "cpu" and not bool(log_scale.detach().isfinite().all()):
        raise ValueError("log_scale: must be finite, got a sigma of 0 or inf, for which there is no bound")
    half_bin = 1.0 / (levels - 1)
    offset = x.double() - mean.double()
    inverse_scale = torch.exp(-log_scale.double())
    low, high = (offset - half_bin) * inverse_scale, (offset + half_bin) * inverse_scale

    # Φ(high) − Φ(low) = Φ(−low) − Φ(−high): the pair further to the left keeps its digits.
    flip = low + high > 0
    left, right = torch.where(flip, -high, low), torch.where(flip, -low, high)
    log_right = torch.special.log_ndtr(right)
    inner = log_right + _log1mexp(torch.special.log_ndtr(left) - log_right)

    lowest, highest = x < -1.0 + half_bin, x > 1.0 - half_bin
    outer = torch.special.log_ndtr(torch.where(lowest, high, -low))
    return torch.where(lowest | highest, outer, inner).to(x.dtype)


def bound_term(
    eps_theta: EpsTheta,
    reverse: ReverseProcess,
    x_start: Tensor,
    t: Tensor,
    noise: Tensor,
    *,
    levels: int,
) -> Tensor:
    """One term of the bound for each sample, `[B]` in bits a dimension, differentiable.

    t ≥ 1: KL(q(x_{t−1}|x_t, x_0) ‖ p_θ) = ½·[ln(σ²/β̃) + β̃/σ² − 1 + (c1²/σ²)·‖x̂_0 − x_0‖²], c1 the posterior's
    coefficient on x_0. t == 0: −ln P(x_0) of the decoder.
    x_start, noise `[B, C, H, W]`, x_start on one of `levels` levels in [−1, 1]; t int64 `[B]`.
    reverse.clip: clip x̂_0 to [−1, 1], as the samplers do: the bound of the model that is sampled, and the published
    practice. Without it, errors at the noisy end are multiplied by √(1/ᾱ − 1) (20,000 for the cosine schedule).
    Give False to train on this term, since a clipped x̂_0 has no gradient.
    float64 if x_start is, float32 otherwise. Raises ValueError naming the argument that is wrong.
    """
    check_floating("x_start", x_start)
    process = reverse.process
    x_t = q_sample(process, x_start, t, noise)
    output = eps_theta(x_t, t)
    error = reverse.x_start_error(output, x_start, t, noise)
    x_start = x_start.to(error.dtype)

    # float64 until the last step: the tables are, and a mismatch of variances may be a small difference
    log_variance = reverse.log_variance(output, x_t.double(), t)
    log_ratio = process.gather(process.posterior_log_variance_clipped, t, log_variance) - log_variance
    mismatch = 0.5 * (torch.expm1(log_ratio) - log_ratio)
    weight = (
        0.5
        * process.gather(process.posterior_mean_coef1.square(), t, log_variance)
        * torch.exp(-log_variance)
    )
    terms = (mismatch.to(error.dtype) + weight.to(error.dtype) * error.square()).flatten(1).mean(1)

    first = (t == 0).nonzero().squeeze(1)
    if first.numel():
        x_first = x_start[first]
        log_likelihood = discretized_gaussian_log_likelihood(
            x_first, x_first + error[first], 0.5 * log_variance[first], levels
        )
        terms = terms.index_copy(0, first, -log_likelihood.flatten(1).mean(1))
    return terms / _LN_2


def prior_term(process: LinearGaussianProcess, x_start: Tensor) -> Tensor:
    """L_T = KL(q(x_T|x_0) ‖ p(x_T)), `[B]` in bits a dimension: LinearGaussianProcess.prior_bits_per_dim."""
    return process.prior_bits_per_dim(x_start)


def stratify(process: LinearGaussianProcess, num_strata: int) -> Tensor:
    """Edges int64 `[num_strata + 1]` of strata edge_i ≤ t < edge_{i+1} that cut 1..T−1, none empty.

    Any cut gives an unbiased estimate. This one shares out evenly the mean of two weights: a uniform one,
    and the consistency terms of Gaussian data with variance ¼, ½·(SNR_{t−1} − SNR_t)·¼/(1 + ¼·SNR_t). The
    terms of images too grow by orders of magnitude towards t = 0, and a stratum adds as much noise as they
    differ within it.
    Raises ValueError if num_strata is not in 1..T−1.
    """
    num_terms = process.num_timesteps - 1
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


class BoundAccumulator:
    """Sums an unbiased estimate of the bound over images.

    For each image: the term at t == 0, the prior term, and one t from each of num_strata strata of 1..T−1
    (see `stratify`), weighted by the stratum's length. num_strata above T−1 counts as T−1: every t is
    evaluated. What is drawn for an image depends on (seed, "bound", index) alone, so that the result is the
    same, but for rounding, however the images are divided into batches and over workers. Costs
    num_strata + 1 network evaluations an image.
    """

    def __init__(self, reverse: ReverseProcess, *, levels: int, num_strata: int, seed: int) -> None:
        require(levels >= 2, "levels", "at least 2", levels)
        require(num_strata >= 1, "num_strata", "at least 1", num_strata)
        self._reverse = reverse
        self._levels = levels
        self._seed = seed
        process = reverse.process
        num_strata = min(num_strata, process.num_timesteps - 1)
        self._edges: list[int] = stratify(process, num_strata).tolist() if num_strata else [1]
        # Count; sums and sums of squares of (reconstruction, consistency, prior, total); per t: sum, count.
        self._state = torch.zeros(9 + 2 * process.num_timesteps, dtype=torch.float64)

    @torch.no_grad()
    def add(self, eps_theta: EpsTheta, x_start: Tensor, index: Tensor) -> None:
        """Add images x_start `[B, C, H, W]` on levels in [−1, 1] with their numbers index int64 `[B]`.

        Each image is to be added once in all. Run the network in eval mode.
        """
        check_index(index)
        if x_start.dim() < 2 or x_start.shape[0] != index.shape[0]:
            raise ValueError(
                f"x_start: must hold one image an index ({index.shape[0]}), got {list(x_start.shape)}"
            )
        reconstruction = self._evaluate(eps_theta, x_start, index, torch.zeros_like(index), draw=0)
        consistency = torch.zeros_like(reconstruction)
        for stratum, (start, stop) in enumerate(zip(self._edges, self._edges[1:], strict=False)):
            t = start + rng.integers(self._seed, "bound timestep", index, stop - start, draw=stratum)
            term = self._evaluate(eps_theta, x_start, index, t, draw=stratum + 1)
            consistency += (stop - start) * term
        prior = prior_term(self._reverse.process, x_start).double().cpu()
        per_image = torch.stack((reconstruction, consistency, prior, reconstruction + consistency + prior))
        self._state[0] += index.shape[0]
        self._state[1:5] += per_image.sum(1)
        self._state[5:9] += per_image.square().sum(1)

    def state(self) -> Tensor:
        """All that was added, float64 `[9 + 2·T]` on the CPU. The states of several workers may be summed."""
        return self._state.clone()

    def load_state(self, state: Tensor) -> None:
        """Replace what was added by a (summed) state. Raises ValueError if its length is not 9 + 2·T."""
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
        sums, counts = self._state[9:].chunk(2)
        reconstruction, consistency, prior, total = mean.tolist()
        reconstruction_stderr, consistency_stderr, prior_stderr, total_stderr = stderr.tolist()
        return BoundEstimate(
            reconstruction=reconstruction,
            consistency=consistency,
            prior=prior,
            total=total,
            reconstruction_stderr=reconstruction_stderr,
            consistency_stderr=consistency_stderr,
            prior_stderr=prior_stderr,
            total_stderr=total_stderr,
            num_images=count,
            per_t=(sums / counts).tolist(),
        )

    def _evaluate(self, eps_theta: EpsTheta, x_start: Tensor, index: Tensor, t: Tensor, draw: int) -> Tensor:
        noise = rng.normal(
            self._seed, "bound", index, tuple(x_start.shape[1:]), draw=draw, dtype=x_start.dtype
        ).to(x_start.device)
        term = bound_term(
            eps_theta,
            self._reverse.to(x_start.device),
            x_start,
            t.to(x_start.device),
            noise,
            levels=self._levels,
        )
        term = term.double().cpu()
        sums, counts = self._state[9:].chunk(2)
        sums.index_add_(0, t.cpu(), term)
        counts.index_add_(0, t.cpu(), torch.ones_like(term))
        return term


def _log1mexp(d: Tensor) -> Tensor:
    """ln(1 − e^d) for d < 0, accurate at both ends; each branch sees only arguments at which it is finite."""
    near = d > -_LN_2
    from_near = torch.log(-torch.expm1(torch.where(near, d, -1.0)))
    from_far = torch.log1p(-torch.exp(torch.where(near, -1.0, d)))
    return torch.where(near, from_near, from_far)
