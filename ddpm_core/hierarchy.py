"""The hierarchical view: a Markovian hierarchical VAE, of which the diffusion model is one.

Data z_{−1} = x and latents z_0, …, z_{T−1}, each with a dimension of its own. The encoder is the Markov chain
∏_t q(z_t|z_{t−1}), the model p(z_{T−1})·∏_t p(z_{t−1}|z_t) (Kingma et al. 2016, arXiv:1606.04934; for the
diffusion model Sohl-Dickstein et al. 2015, arXiv:1503.03585). t is zero-based as everywhere: step t joins z_{t−1}
and z_t, and t == 0 joins the data and the first latent. A VAE is T = 1. A diffusion model is the case in which the
encoder is fixed, linear, Gaussian, and of unchanged dimension: `DiffusionChain`. `path_bound` computes the bound of
all of them.

Along one path drawn from the encoder,
    −ELBO = −ln p(x|z_0) + Σ_{t≥1} ln[q(z_{t−1}|z_{t−2}) / p(z_{t−1}|z_t)] + ln[q(z_{T−1}|z_{T−2}) / p(z_{T−1})]
in expectation: reconstruction, consistency, prior. A term of the sum may be negative; their total's expectation is
never below −E ln p(x), and where the decoder is the encoder's true reversal every path gives −ln p(x) itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from ddpm_core import rng
from ddpm_core._checks import (
    check_batch,
    check_floating,
    check_index,
    check_numbers,
    require,
    require_int,
    require_sizes,
)
from ddpm_core._units import LN_2
from ddpm_core.decoder import gaussian_log_density, log_mass_of_level
from ddpm_core.reverse import ReverseProcess
from ddpm_core.types import EpsTheta

PathNoise: TypeAlias = Callable[[int, Tensor], Tensor]
"""(t, mean of q(z_t|z_{t−1})) to the standard normal deviates of step t, of the mean's shape."""


class Conditional(Protocol):
    """A distribution for each sample of a batch, which a chain's encoders, decoders and prior return."""

    @property
    def mean(self) -> Tensor: ...

    def log_density(self, value: Tensor) -> Tensor: ...

    def sample(self, noise: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Gaussian:
    """N(mean, exp(log_variance)), independent in each dimension; mean and log_variance broadcast to the values."""

    mean: Tensor
    log_variance: Tensor

    def log_density(self, value: Tensor) -> Tensor:
        """ln N(value; mean, variance) of each sample `[B]`, in nats, summed over the dimensions."""
        _check_value(value, self.mean)
        return gaussian_log_density(value, self.mean, self.log_variance).flatten(1).sum(1)

    def sample(self, noise: Tensor) -> Tensor:
        """mean + σ·noise: reparameterised, so that gradients pass to mean and log_variance."""
        return self.mean + torch.exp(0.5 * self.log_variance) * noise


@dataclass(frozen=True)
class DiscretizedGaussian:
    """A Gaussian rounded to the nearest of `levels` levels in [−1, 1] (Eq. 13)."""

    mean: Tensor
    log_variance: Tensor
    levels: int

    def log_density(self, value: Tensor) -> Tensor:
        """ln P(value) of each sample `[B]`, in nats; value holds levels."""
        _check_value(value, self.mean)
        terms = log_mass_of_level(value, self.mean, 0.5 * self.log_variance, self.levels)
        return terms.flatten(1).sum(1)

    def sample(self, noise: Tensor) -> Tensor:
        """The level nearest to mean + σ·noise, which has the masses of Eq. 13. No gradient passes the rounding."""
        spread = torch.exp(0.5 * self.log_variance)
        position = (self.mean + spread * noise + 1.0) * (0.5 * (self.levels - 1))
        return position.round().clamp(0, self.levels - 1) * (2.0 / (self.levels - 1)) - 1.0


class Chain(Protocol):
    """A Markovian hierarchical VAE. t is an int in 0..num_timesteps − 1."""

    @property
    def num_timesteps(self) -> int:
        """T, the number of latents."""
        ...

    def encode(self, t: int, z: Tensor) -> Conditional:
        """q(z_t|z_{t−1} = z); z is the data at t == 0."""
        ...

    def decode(self, t: int, z: Tensor) -> Conditional:
        """p(z_{t−1}|z_t = z); the distribution of the data at t == 0."""
        ...

    def prior(self) -> Conditional:
        """p(z_{T−1}), broadcasting to `[B, ...]`."""
        ...


class PathTerms(NamedTuple):
    """−ELBO along one path a sample, in nats summed over the dimensions: an unbiased estimate of each term.

    reconstruction `[B]`: −ln p(x|z_0). consistency `[B, T − 1]`: ln q(z_{t−1}|z_{t−2}) − ln p(z_{t−1}|z_t) for
    t = 1, …, T − 1. prior `[B]`: ln q(z_{T−1}|z_{T−2}) − ln p(z_{T−1}). Single values may be negative.
    """

    reconstruction: Tensor
    consistency: Tensor
    prior: Tensor

    @property
    def total(self) -> Tensor:
        """−ELBO `[B]`: the three terms together, ln q(z_0, …|x) − ln p(x, z_0, …)."""
        return self.reconstruction + self.consistency.sum(1) + self.prior

    def bits_per_dim(self, num_dims: int) -> "PathTerms":
        """The same in bits a dimension of the data; num_dims: how many numbers x has."""
        require_int("num_dims", num_dims, 1)
        return PathTerms(*(term / (num_dims * LN_2) for term in self))


def path_bound(chain: Chain, x: Tensor, *, seed: int, index: Tensor) -> PathTerms:
    """−ELBO of each sample in its three terms, from one path that the encoder draws; differentiable.

    x `[B, ...]`, floating-point; index int64 `[B]`: the samples' numbers, which with seed decide the path. Give
    another seed for another path. Computed in float64 if x is, in float32 otherwise, since a path in bf16 would
    round away the first steps of a diffusion. One evaluation of each encoder and of each decoder.
    Raises ValueError naming the argument that is wrong.
    """
    path, encoders = _encode(chain, x, _noise_of(x, seed, index))
    log_q = [encoder.log_density(z) for encoder, z in zip(encoders, path[1:], strict=True)]
    return _terms(chain, path, log_q)


def encode_path(chain: Chain, x: Tensor, noise: PathNoise) -> list[Tensor]:
    """[x, z_0, …, z_{T−1}] with z_t = mean + σ·noise(t, mean) of q(z_t|z_{t−1}). x as in `path_bound`."""
    return _encode(chain, x, noise)[0]


def path_terms(chain: Chain, path: Sequence[Tensor]) -> PathTerms:
    """The three terms of −ELBO along a given path [x, z_0, …, z_{T−1}], as in `path_bound`.

    Raises ValueError naming path.
    """
    path = _checked(chain, path)
    return _terms(chain, path, _log_q(chain, path))


def log_posterior(chain: Chain, path: Sequence[Tensor]) -> Tensor:
    """ln q(z_0, …, z_{T−1}|x) = Σ_t ln q(z_t|z_{t−1}), `[B]` in nats, of a path [x, z_0, …, z_{T−1}]."""
    path = _checked(chain, path)
    return torch.stack(_log_q(chain, path)).sum(0)


def log_joint(chain: Chain, path: Sequence[Tensor]) -> Tensor:
    """ln p(x, z_0, …, z_{T−1}) = ln p(z_{T−1}) + Σ_t ln p(z_{t−1}|z_t), `[B]` in nats, of a path [x, z_0, …]."""
    path = _checked(chain, path)
    log_prior, log_p = _log_p(chain, path)
    return log_prior + torch.stack(log_p).sum(0)


def generate_path(
    chain: Chain,
    shape: tuple[int, ...],
    *,
    seed: int,
    index: Tensor,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """A path [x, z_0, …, z_{T−1}] from the model: z_{T−1} from the prior, then down by the decoders.

    shape: of z_{T−1}, without the batch. index: int64 `[B]`. Noise is keyed as in `ddpm_core.samplers`: draw 0 for
    the prior, draw t + 1 for the step that leaves z_t. So the latents of a `DiffusionChain` are the states that
    ancestral sampling visits; x differs from its image only in that Algorithm 2 takes the mean at the last step.
    """
    prior = chain.prior()
    z = prior.sample(rng.normal(seed, "sample", index, shape, dtype=dtype).to(prior.mean.device))
    path = [z]
    for t in reversed(range(chain.num_timesteps)):
        decoder = chain.decode(t, z)
        noise = rng.normal(seed, "sample", index, tuple(decoder.mean.shape[1:]), draw=t + 1, dtype=dtype)
        z = decoder.sample(noise.to(decoder.mean.device))
        path.append(z)
    return path[::-1]


@dataclass(frozen=True)
class DiffusionChain:
    """A diffusion model as a hierarchical VAE: q's own steps as the encoder, p_θ(x_{t−1}|x_t) as the decoder.

    reverse: the process and the meaning of the network's output; a clipped x̂_0 has no gradient. levels: the data
    lie on so many levels in [−1, 1] and the last decoder is Eq. 13's; None for continuous data and a Gaussian.
    Its path bound has the expectation of `ddpm_core.bound.bound_term` summed over t plus `prior_term`, in nats.
    """

    eps_theta: EpsTheta
    reverse: ReverseProcess
    levels: int | None = None

    def __post_init__(self) -> None:
        require_int("levels", self.levels, 2, none="None")

    @property
    def num_timesteps(self) -> int:
        return self.reverse.process.num_timesteps

    def encode(self, t: int, z: Tensor) -> Gaussian:
        """q(x_t|x_{t−1}) = N(√α_t·x_{t−1}, β_t·I) for a `Schedule` (Eq. 2)."""
        check_batch("z", z)
        process, at = self.reverse.process, _every(t, z)
        mean = process.gather(process.step_scale, at, z) * z
        return Gaussian(mean, process.gather(process.step_variance.log(), at, z))

    def decode(self, t: int, z: Tensor) -> Gaussian | DiscretizedGaussian:
        """p_θ(x_{t−1}|x_t) (Eq. 1), with the decoder of the data at t == 0."""
        check_batch("z", z)
        at = _every(t, z)
        mean, log_variance = self.reverse.transition(self.eps_theta(z, at), z, at)
        if t == 0 and self.levels is not None:
            return DiscretizedGaussian(mean, log_variance, self.levels)
        return Gaussian(mean, log_variance)

    def prior(self) -> Gaussian:
        """p(x_T) = N(0, (a² + b²)·I) at the last step; N(0, I) for a `Schedule`."""
        log_variance = self.reverse.process.total_variance[-1].log()
        return Gaussian(torch.zeros_like(log_variance), log_variance)


class GaussianLayer(nn.Module):
    """z `[B, num_in]` to a Gaussian over `[B, num_out]`.

    hidden None: an affine mean and one learned log-variance a dimension, the linear-Gaussian family. Otherwise both
    come from an MLP with one layer of so many tanh units. The Gaussian has z's dtype whatever the weights have.
    """

    def __init__(self, num_in: int, num_out: int, hidden: int | None = None) -> None:
        super().__init__()
        for name, value in (("num_in", num_in), ("num_out", num_out)):
            require_int(name, value, 1)
        require_int("hidden", hidden, 1, none="None")
        self.num_in = num_in
        if hidden is None:
            self.mean: nn.Module = nn.Linear(num_in, num_out)
            self.log_variance: nn.Parameter | None = nn.Parameter(torch.zeros(num_out))
        else:
            self.mean = nn.Sequential(nn.Linear(num_in, hidden), nn.Tanh(), nn.Linear(hidden, 2 * num_out))
            self.log_variance = None

    def forward(self, z: Tensor) -> Gaussian:
        check_floating("z", z)
        if z.dim() != 2 or z.shape[1] != self.num_in:
            raise ValueError(f"z: must have the shape [B, {self.num_in}], got {list(z.shape)}")
        output = self.mean(z.to(next(self.mean.parameters()).dtype)).to(z.dtype)
        if self.log_variance is not None:
            return Gaussian(output, self.log_variance.to(z.dtype).expand_as(output))
        mean, log_variance = output.chunk(2, dim=1)
        return Gaussian(mean, log_variance)


class GaussianHierarchy(nn.Module):
    """A hierarchical VAE with a learned encoder and decoder: a `GaussianLayer` each way between neighbours.

    dims: (dimension of x, of z_0, …, of z_{T−1}). The prior is N(0, I). Weights are drawn with torch's global
    generator.
    """

    def __init__(self, dims: Sequence[int], hidden: int | None = None) -> None:
        super().__init__()
        require_sizes("dims", dims, 1)
        require(len(dims) >= 2, "dims", "the data's dimension and one or more latents'", tuple(dims))
        pairs = list(pairwise(dims))
        self.encoders = nn.ModuleList(GaussianLayer(below, above, hidden) for below, above in pairs)
        self.decoders = nn.ModuleList(GaussianLayer(above, below, hidden) for below, above in pairs)
        self.register_buffer("prior_log_variance", torch.zeros(1, dims[-1]))

    @property
    def num_timesteps(self) -> int:
        return len(self.encoders)

    def encode(self, t: int, z: Tensor) -> Gaussian:
        """q(z_t|z_{t−1} = z), z `[B, dims[t]]`."""
        return self.encoders[t](z)

    def decode(self, t: int, z: Tensor) -> Gaussian:
        """p(z_{t−1}|z_t = z), z `[B, dims[t + 1]]`."""
        return self.decoders[t](z)

    def prior(self) -> Gaussian:
        """p(z_{T−1}) = N(0, I)."""
        log_variance = self.get_buffer("prior_log_variance")
        return Gaussian(torch.zeros_like(log_variance), log_variance)


def _encode(chain: Chain, x: Tensor, noise: PathNoise) -> tuple[list[Tensor], list[Conditional]]:
    check_numbers("x", x)
    path = [_wide(x)]
    encoders: list[Conditional] = []
    for t in range(chain.num_timesteps):
        encoder = chain.encode(t, path[-1])
        encoders.append(encoder)
        path.append(encoder.sample(noise(t, encoder.mean)))
    return path, encoders


def _noise_of(x: Tensor, seed: int, index: Tensor) -> PathNoise:
    check_index(index)
    check_floating("x", x)
    if x.dim() < 2 or x.shape[0] != index.shape[0]:
        raise ValueError(f"x: must hold one sample an index ({index.shape[0]}), got {list(x.shape)}")

    def noise(t: int, mean: Tensor) -> Tensor:
        shape = tuple(mean.shape[1:])
        return rng.normal(seed, "path", index, shape, draw=t, dtype=mean.dtype).to(mean.device)

    return noise


def _log_q(chain: Chain, path: Sequence[Tensor]) -> list[Tensor]:
    return [chain.encode(t, path[t]).log_density(path[t + 1]) for t in range(chain.num_timesteps)]


def _log_p(chain: Chain, path: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    log_p = [chain.decode(t, path[t + 1]).log_density(path[t]) for t in range(chain.num_timesteps)]
    return chain.prior().log_density(path[-1]), log_p


def _terms(chain: Chain, path: Sequence[Tensor], log_q: list[Tensor]) -> PathTerms:
    log_prior, log_p = _log_p(chain, path)
    consistency = [q - p for q, p in zip(log_q[:-1], log_p[1:], strict=True)]
    return PathTerms(
        -log_p[0],
        torch.stack(consistency, dim=1) if consistency else log_prior.new_zeros(log_prior.shape[0], 0),
        log_q[-1] - log_prior,
    )


def _checked(chain: Chain, path: Sequence[Tensor]) -> list[Tensor]:
    """The path in float32 at least."""
    require(isinstance(path, Sequence | Tensor), "path", "a list of states", path)
    require(len(path) == chain.num_timesteps + 1, "path", f"{chain.num_timesteps + 1} states", len(path))
    for state in path:
        check_numbers("path", state)
    return [_wide(state) for state in path]


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _every(t: int, z: Tensor) -> Tensor:
    return torch.full((z.shape[0],), t, dtype=torch.int64, device=z.device)


def _check_value(value: Tensor, mean: Tensor) -> None:
    # the mean may be one for all samples, or, as a prior's, one for all dimensions
    sizes = zip(reversed(mean.shape), reversed(value.shape), strict=False)
    if value.dim() < max(mean.dim(), 2) or any(have not in (1, want) for have, want in sizes):
        raise ValueError(f"value: must have the mean's shape {list(mean.shape)}, got {list(value.shape)}")
