"""Cases in which everything is known in closed form, derived apart from the code under test.

Gaussian data N(0, s²) in each dimension: the best ε_θ is linear in x_t, so the bound's terms and the moments of
every sampler's output follow exactly. Gaussian mixtures, and atoms, their limit of variance 0: the best x̂_0 is a
weighted mean of the components', and what has no closed form is a sum over nodes of a smooth function. A process
enters through its a and b alone (x_t = a·x_0 + b·ε); nothing else is read from it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_core import EpsTheta, LinearGaussianProcess

Network = Callable[[Tensor, Tensor], Tensor]


def snr(process: LinearGaussianProcess) -> Tensor:
    """a²/b²."""
    return (process.a / process.b).square()


def before(table: Tensor, data: float) -> Tensor:
    """The table at t − 1, `data` at t = −1."""
    return torch.cat((table.new_full((1,), data), table[:-1]))


@dataclass(frozen=True)
class GaussianData:
    """Data N(0, variance) in each dimension. Tables are float64 `[T]`; t = −1 means the data themselves."""

    variance: float

    def marginal_variance(self, process: LinearGaussianProcess) -> Tensor:
        """Var(x_t) = a²·s² + b²."""
        return process.a.square() * self.variance + process.b.square()

    def eps_theta(self, process: LinearGaussianProcess) -> EpsTheta:
        """ε*(x_t, t) = E[ε | x_t] = b·x_t / Var(x_t)."""
        return _linear(process.b / self.marginal_variance(process))

    def x_start_theta(self, process: LinearGaussianProcess) -> EpsTheta:
        """E[x_0 | x_t] = a·s²·x_t / Var(x_t)."""
        return _linear(process.a * self.variance / self.marginal_variance(process))

    def bayes_eps_mse(self, process: LinearGaussianProcess) -> Tensor:
        """Var(ε | x_t) = a²·s² / Var(x_t), the floor of L_simple at each t."""
        return process.a.square() * self.variance / self.marginal_variance(process)

    def bayes_x_start_mse(self, process: LinearGaussianProcess) -> Tensor:
        """m(t) = Var(x_0 | x_t) = s²·b² / Var(x_t)."""
        return self.variance * process.b.square() / self.marginal_variance(process)

    def bayes_curve(self, log_snr: Tensor) -> Tensor:
        """m as a function of the log-SNR: s² / (1 + s²·SNR)."""
        return self.variance / (1.0 + self.variance * log_snr.exp())

    def consistency_terms(self, process: LinearGaussianProcess, variance_type: str) -> Tensor:
        """E[L_t] in bits a dimension for ε*, in the signal-to-noise form; `[T]`, nan at t == 0.

        x = (SNR_{t−1} − SNR_t)·m(t): ½·x for β̃, ½·[ln(β/β̃) − 1 + (β̃/β)·(1 + x)] for β (that of q's step), and
        ½·ln(1 + x) for the best variance.
        """
        ratios = snr(process)
        x = (ratios[:-1] - ratios[1:]) * self.bayes_x_start_mse(process)[1:]
        if variance_type == "fixed_large":
            ratio = (process.b[1:] / process.b[:-1]).square()  # β/β̃
            x = ratio.log() - 1.0 + (1.0 + x) / ratio
        elif variance_type == "analytic":
            x = x.log1p()
        return torch.cat((torch.tensor([math.nan], dtype=torch.float64), 0.5 * x / math.log(2.0)))

    def ancestral_slopes(self, process: LinearGaussianProcess) -> Tensor:
        """E[x_{t−1} | x_t] = slope·x_t: Cov(x_{t−1}, x_t)/Var(x_t) = (a_t/a_{t−1})·Var(x_{t−1})/Var(x_t)."""
        after = self.marginal_variance(process)
        return process.a / before(process.a, 1.0) * before(after, self.variance) / after

    def ddim_slopes(self, process: LinearGaussianProcess) -> Tensor:
        """x_{t−1} = slope·x_t for η = 0: (a_{t−1}·a_t·s² + b_{t−1}·b_t) / Var(x_t)."""
        signal = process.a * before(process.a, 1.0) * self.variance
        return (signal + process.b * before(process.b, 0.0)) / self.marginal_variance(process)


@dataclass(frozen=True)
class GaussianMixture:
    """Data Σ_k weights_k·N(means_k, variances_k·I) in D dimensions; a variance of 0 makes a component an atom.

    weights `[K]` sum to 1, means `[K, D]`, variances `[K]`, all float64. A batch `[B, ...]` is read as blocks of D
    numbers, each a sample of its own: with D = 1 every pixel is one.
    """

    weights: Tensor
    means: Tensor
    variances: Tensor

    @property
    def mean_square(self) -> float:
        """E[x_0²] a dimension."""
        return float((self.weights * (self.means.square().mean(1) + self.variances)).sum())

    def components(self, a: Tensor, b: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of x = a·x_0 + b·ε, `[N, D]` (a, b `[N]`): ln of each component's share of the density `[N, K]`, and the
        mean `[N, K, D]` and variance a dimension `[N, K]` of x_0 given x and the component."""
        a, b = a[:, None], b[:, None]
        variance = a.square() * self.variances + b.square()
        offset = x[:, None, :] - a[..., None] * self.means
        log_density = (
            -0.5 * offset.square().sum(2) / variance - 0.5 * x.shape[1] * (2 * math.pi * variance).log()
        )
        gain = a * self.variances / variance
        return (
            self.weights.log() + log_density,
            self.means + gain[..., None] * offset,
            b.square() * self.variances / variance,
        )

    def log_density(self, process: LinearGaussianProcess, t: int, x: Tensor) -> Tensor:
        """ln q(x_t), `[N]` for x `[N, D]`."""
        a, b = (table[t].expand(x.shape[0]) for table in (process.a, process.b))
        return self.components(a, b, x)[0].logsumexp(1)

    def x_start_theta(self, process: LinearGaussianProcess) -> Network:
        """E[x_0 | x_t], the weights a softmax."""

        def posterior_mean(x_t: Tensor, t: Tensor) -> Tensor:
            blocks = x_t.double().reshape(-1, self.means.shape[1])
            a, b = (
                table[t].repeat_interleave(blocks.shape[0] // t.shape[0]) for table in (process.a, process.b)
            )
            log_share, means, _ = self.components(a, b, blocks)
            mean = (log_share.softmax(1)[..., None] * means).sum(1)
            return mean.reshape(x_t.shape).to(x_t.dtype)

        return posterior_mean

    def eps_theta(self, process: LinearGaussianProcess) -> Network:
        """E[ε | x_t] = (x_t − a·E[x_0|x_t])/b."""
        posterior_mean = self.x_start_theta(process)

        def eps_star(x_t: Tensor, t: Tensor) -> Tensor:
            a, b = (table[t].reshape(-1, *[1] * (x_t.dim() - 1)) for table in (process.a, process.b))
            return ((x_t.double() - a * posterior_mean(x_t.double(), t)) / b).to(x_t.dtype)

        return eps_star

    def bayes_curve(self, log_snr: Tensor) -> Tensor:
        """m as a function of the log-SNR for D = 1: E Var(x_0|x), by the sum over nodes of each component.

        The variance is that within the components and that between them; E[x_0²] − E[x̂_0²] would cancel.
        """
        assert self.means.shape[1] == 1, "by quadrature in one dimension"
        z, weight = normal_nodes(241, 9.0)
        a, b = (torch.sigmoid(sign * log_snr.double()).sqrt()[:, None, None] for sign in (1.0, -1.0))
        x = a * self.means + (a.square() * self.variances[:, None] + b.square()).sqrt() * z  # [L, K, nodes]
        spread_a, spread_b = a.expand_as(x).flatten(), b.expand_as(x).flatten()
        log_share, means, variances = self.components(spread_a, spread_b, x.flatten()[:, None])
        share, means = log_share.softmax(1), means[..., 0]
        mean = (share * means).sum(1, keepdim=True)
        inner = (share * (variances + (means - mean).square())).sum(1).reshape(x.shape)
        return (inner @ weight) @ self.weights

    def bayes_x_start_mse(self, process: LinearGaussianProcess) -> Tensor:
        """m(t) = E Var(x_0|x_t), `[T]`, for D = 1."""
        return self.bayes_curve(2.0 * (process.a / process.b).log())

    def sample(self, count: int, seed: int) -> Tensor:
        """x_0, float64 `[count, D]`."""
        generator = torch.Generator().manual_seed(seed)
        which = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[which] + self.variances[which].sqrt()[:, None] * noise


def atoms(values: list[float], weights: list[float]) -> GaussianMixture:
    """A mixture of points on the line. On the levels of a decoder they are data that it can tell in bits."""
    means = torch.tensor(values, dtype=torch.float64)[:, None]
    return GaussianMixture(
        torch.tensor(weights, dtype=torch.float64), means, torch.zeros(len(values)).double()
    )


def entropy_bits(data: GaussianMixture) -> float:
    """H(x_0) of atoms in bits: −Σ w·log₂ w."""
    assert not bool(data.variances.any()), "atoms alone have a discrete entropy"
    return float(-(data.weights * data.weights.log2()).sum())


def normal_nodes(count: int, reach: float) -> tuple[Tensor, Tensor]:
    """Nodes and weights of E f(z), z ~ N(0, 1): the trapezoidal rule on ±reach, which for smooth f is exact but for
    e^(−reach²/2) and e^(−2(π/spacing)²)."""
    z = torch.linspace(-reach, reach, count, dtype=torch.float64)
    return z, torch.exp(-0.5 * z.square()) * (2 * reach / (count - 1) / math.sqrt(2 * math.pi))


def _linear(slope: Tensor) -> EpsTheta:
    def network(x_t: Tensor, t: Tensor) -> Tensor:
        return slope[t].to(x_t.dtype).reshape(-1, *[1] * (x_t.dim() - 1)) * x_t

    return network


def symmetric_grid(data: GaussianData) -> tuple[Tensor, Tensor]:
    """x_0 = ±s with ε = ±1: four pairs, float64 `[4, 1, 1, 1]`, with the exact first two moments of both.

    The mean of any quadratic form over these pairs is its exact expectation.
    """
    s = math.sqrt(data.variance)
    x_start = torch.tensor([s, s, -s, -s], dtype=torch.float64).reshape(4, 1, 1, 1)
    noise = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64).reshape(4, 1, 1, 1)
    return x_start, noise


def symmetric_grid_at_every_t(
    data: GaussianData, process: LinearGaussianProcess
) -> tuple[Tensor, Tensor, Tensor]:
    """x_0, ε `[4·T, 1, 1, 1]` and t `[4·T]`: `symmetric_grid` at t = 0, then at t = 1, ..."""
    x_start, noise = (tensor.repeat(process.num_timesteps, 1, 1, 1) for tensor in symmetric_grid(data))
    return x_start, noise, torch.arange(process.num_timesteps).repeat_interleave(4)


def variance_exploding(
    num_timesteps: int = 12, first: float = 0.02, last: float = 30.0
) -> LinearGaussianProcess:
    """a = 1, b from first to last in equal ratios."""
    log_b = torch.linspace(math.log(first), math.log(last), num_timesteps, dtype=torch.float64)
    return LinearGaussianProcess(torch.zeros_like(log_b), log_b)


def straight(num_timesteps: int = 12) -> LinearGaussianProcess:
    """Rectified flow's interpolation a = 1 − s, b = s up to s = 1, where no signal is left."""
    s = torch.linspace(0.02, 1.0, num_timesteps, dtype=torch.float64)
    return LinearGaussianProcess(torch.log1p(-s), s.log())


def full(t: int, batch: Tensor) -> Tensor:
    """t for every sample of the batch."""
    return torch.full((batch.shape[0],), t, dtype=torch.int64)
