"""The hierarchical view: one bound for learned hierarchies, VAEs and diffusion models."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from ddpm_core import ReverseProcess, Schedule, ScheduleConfig, rng
from ddpm_core.hierarchy import (
    DiffusionChain,
    DiscretizedGaussian,
    Gaussian,
    GaussianHierarchy,
    GaussianLayer,
    encode_path,
    generate_path,
    log_joint,
    log_posterior,
    path_bound,
    path_terms,
)
from tests.support.hierarchy import exact_mean, mean_total

SHORT = Schedule.from_config(ScheduleConfig(num_timesteps=12, beta_start=0.005, beta_end=0.7))
LN_2 = math.log(2.0)


def _normal(seed: int, *shape: int) -> Tensor:
    return rng.normal(seed, "test", torch.arange(shape[0]), shape[1:], dtype=torch.float64)


@dataclass(frozen=True)
class FullGaussian:
    """N(mean, covariance) with its own Cholesky factor, for encoders whose dimensions depend on one another."""

    mean: Tensor
    covariance: Tensor

    def log_density(self, value: Tensor) -> Tensor:
        return MultivariateNormal(self.mean, self.covariance).log_prob(value)

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + noise @ torch.linalg.cholesky(self.covariance).T


class LinearChain:
    """z_{t−1} = W_t·z_t + ε, ε ~ N(0, diag(variance_t)), z_{T−1} ~ N(0, I), encoded by its true reversal.

    Cov(z_{t−1}) = W·Cov(z_t)·Wᵀ + diag; z_t|z_{t−1} by conditioning the joint Gaussian of the two.
    """

    def __init__(self, dims: Sequence[int]) -> None:
        self.num_timesteps = len(dims) - 1
        self.weights = [_normal(t, dims[t], dims[t + 1]) for t in range(self.num_timesteps)]
        self.variances = [_normal(t + 50, dims[t]).square() + 0.1 for t in range(self.num_timesteps)]
        self.covariances = [torch.eye(dims[-1], dtype=torch.float64)]
        for w, v in zip(reversed(self.weights), reversed(self.variances), strict=True):
            self.covariances.insert(0, w @ self.covariances[0] @ w.T + torch.diag(v))

    def encode(self, t: int, z: Tensor) -> FullGaussian:
        below, above, w = self.covariances[t], self.covariances[t + 1], self.weights[t]
        gain = torch.linalg.solve(below, w @ above).T
        return FullGaussian(z @ gain.T, above - gain @ w @ above)

    def decode(self, t: int, z: Tensor) -> Gaussian:
        return Gaussian(z @ self.weights[t].T, self.variances[t].log())

    def prior(self) -> Gaussian:
        zero = torch.zeros(1, self.covariances[-1].shape[0], dtype=torch.float64)
        return Gaussian(zero, zero)

    def log_likelihood(self, x: Tensor) -> Tensor:
        return MultivariateNormal(torch.zeros_like(x[0]), self.covariances[0]).log_prob(x)


@pytest.mark.parametrize("dims", [(3, 2), (2, 3, 1), (4, 3, 2, 2), (1, 1, 1, 1, 1)])
def test_the_true_posterior_gives_the_exact_likelihood_on_every_path(dims: tuple[int, ...]) -> None:
    chain = LinearChain(dims)
    x = 2.0 * _normal(7, 64, dims[0])
    terms = path_bound(chain, x, seed=0, index=torch.arange(64))
    torch.testing.assert_close(-terms.total, chain.log_likelihood(x), rtol=1e-9, atol=1e-9)
    # the terms themselves are far from constant: it is their sum that has no variance
    assert float(terms.reconstruction.std()) > 0.1
    assert float(terms.prior.std()) > 0.1


def _hierarchy_at_its_posterior(dims: tuple[int, ...]) -> tuple[GaussianHierarchy, LinearChain]:
    """The same chain in the learnable class; its latents have one dimension, so that q is diagonal."""
    assert set(dims[1:]) == {1}
    linear, learnable = LinearChain(dims), GaussianHierarchy(dims).double()
    with torch.no_grad():
        for t in range(linear.num_timesteps):
            decoder, encoder = learnable.decoders[t], learnable.encoders[t]
            assert isinstance(decoder, GaussianLayer)
            assert isinstance(encoder, GaussianLayer)
            posterior = linear.encode(t, torch.eye(dims[t], dtype=torch.float64))
            for layer, weight, variance in (
                (decoder, linear.weights[t], linear.variances[t]),
                (encoder, posterior.mean.T, posterior.covariance[0]),
            ):
                assert isinstance(layer.mean, torch.nn.Linear)
                assert layer.log_variance is not None
                layer.mean.weight.copy_(weight)
                layer.mean.bias.zero_()
                layer.log_variance.copy_(variance.log())
    return learnable, linear


def test_the_learnable_class_at_its_posterior_is_exact_too() -> None:
    chain, linear = _hierarchy_at_its_posterior((3, 1, 1))
    x = _normal(8, 32, 3)
    terms = path_bound(chain, x, seed=1, index=torch.arange(32))
    torch.testing.assert_close(-terms.total, linear.log_likelihood(x), rtol=1e-9, atol=1e-9)


def test_away_from_the_posterior_the_gap_is_the_divergence() -> None:
    """E[−ELBO] + ln p(x) = KL(q(z_0, z_1|x) ‖ p(z_0, z_1|x)), both Gaussians over the latents taken whole."""
    chain, linear = _hierarchy_at_its_posterior((3, 1, 1))
    with torch.no_grad():
        for name, parameter in chain.encoders.named_parameters():
            parameter.add_(0.3 if "bias" in name else 0.2)
    x = _normal(9, 1, 3)
    with torch.no_grad():
        gap = mean_total(exact_mean(chain, x, (1, 1))) + float(linear.log_likelihood(x))

    with torch.no_grad():
        first = chain.encode(0, x)
        second = chain.encode(1, first.mean)
        slope = float(chain.encode(1, first.mean + 1.0).mean - second.mean)
        v0, v1 = float(first.log_variance.exp()), float(second.log_variance.exp())
    q_covariance = torch.tensor([[v0, slope * v0], [slope * v0, slope**2 * v0 + v1]], dtype=torch.float64)
    q = MultivariateNormal(torch.cat([first.mean[0], second.mean[0]]), q_covariance)

    w0, w1 = linear.weights
    latents = torch.stack([torch.cat([linear.covariances[1][0], w1[0]]), torch.cat([w1[0], torch.ones(1)])])
    to_x = torch.cat([w0 @ linear.covariances[1], w0 @ w1], dim=1)
    gain = torch.linalg.solve(linear.covariances[0], to_x).T
    p = MultivariateNormal((x @ gain.T)[0], latents - gain @ to_x)
    assert gap == pytest.approx(float(kl_divergence(q, p)), rel=1e-9)
    assert gap > 0.05


def test_one_latent_is_a_vae() -> None:
    """T = 1: E[reconstruction] = −E_q ln p(x|z), E[prior] = KL(q(z|x) ‖ N(0, I)), no consistency term."""
    torch.manual_seed(0)
    chain = GaussianHierarchy((3, 2)).double()
    x = _normal(10, 1, 3)
    terms = exact_mean(chain, x, (2,))
    assert terms.consistency.shape == (0,)
    q = chain.encode(0, x)
    variance = q.log_variance.exp()
    assert terms.prior.item() == pytest.approx(
        (0.5 * (variance + q.mean.square() - 1 - q.log_variance).sum()).item(), rel=1e-12
    )
    layer = chain.decoders[0]
    assert isinstance(layer, GaussianLayer)
    assert isinstance(layer.mean, torch.nn.Linear)
    assert layer.log_variance is not None
    # E‖x − W·z − c‖² a dimension: the mean's square error, and the spread of z through W
    miss = (x - layer.mean(q.mean)).square() + variance @ layer.mean.weight.square().T
    expected = 0.5 * (miss * torch.exp(-layer.log_variance) + layer.log_variance + math.log(2 * math.pi))
    assert terms.reconstruction.item() == pytest.approx(expected.sum().item(), rel=1e-12)


@pytest.mark.parametrize("hidden", [None, 8])
def test_training_a_hierarchy_brings_the_bound_down_to_the_entropy(hidden: int | None) -> None:
    torch.manual_seed(0)
    covariance = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
    factor = torch.linalg.cholesky(covariance)
    entropy = float(MultivariateNormal(torch.zeros(2), covariance).entropy())
    chain = GaussianHierarchy((2, 1, 1), hidden)
    optimiser = torch.optim.Adam(chain.parameters(), lr=0.02)
    batch = 128

    def bound(step: int, size: int) -> Tensor:
        index = torch.arange(size) + step * batch
        x = rng.normal(0, "data", index, (2,)) @ factor.T
        return path_bound(chain, x, seed=0, index=index).total

    before = bound(0, 4096).mean().item()
    for step in range(400):
        optimiser.zero_grad()
        bound(step, batch).mean().backward()
        optimiser.step()
    with torch.no_grad():
        after = bound(10_000, 50_000)
    stderr = float(after.std()) / math.sqrt(len(after))
    assert before > entropy + 0.5
    # the linear family holds the data's law; an MLP's has to find it
    limit = 0.03 if hidden is None else 0.1
    assert entropy - 5 * stderr < float(after.mean()) < entropy + limit


@pytest.mark.parametrize("hidden", [None, 3])
def test_gradients_of_the_path_bound(hidden: int | None) -> None:
    """Reparameterised: the derivative along a path is that of the number it gives, encoder included."""
    torch.manual_seed(1)
    chain = GaussianHierarchy((2, 3, 1), hidden).double()
    names = [name for name, _ in chain.named_parameters()]
    x = _normal(11, 2, 2)

    class Bound(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chain = chain

        def forward(self, x: Tensor) -> Tensor:
            return path_bound(self.chain, x, seed=3, index=torch.arange(2)).total

    def function(x: Tensor, *values: Tensor) -> Tensor:
        named = {f"chain.{name}": value for name, value in zip(names, values, strict=True)}
        return torch.func.functional_call(Bound(), named, (x,))

    values = [parameter.detach().clone().requires_grad_() for parameter in chain.parameters()]
    assert torch.autograd.gradcheck(function, (x.requires_grad_(), *values))


def test_the_total_is_log_posterior_minus_log_joint() -> None:
    torch.manual_seed(2)
    chain = GaussianHierarchy((3, 2, 2, 1), 4).double()
    x, index = _normal(12, 5, 3), torch.arange(5)
    terms = path_bound(chain, x, seed=4, index=index)
    path = encode_path(
        chain, x, lambda t, m: rng.normal(4, "path", index, (m.shape[1],), draw=t, dtype=m.dtype)
    )
    assert [z.shape[1] for z in path] == [3, 2, 2, 1]
    torch.testing.assert_close(terms.total, log_posterior(chain, path) - log_joint(chain, path))
    for got, expected in zip(path_terms(chain, path), terms, strict=True):
        torch.testing.assert_close(got, expected)
    bits = terms.bits_per_dim(3)
    torch.testing.assert_close(bits.total, terms.total / (3 * LN_2))
    assert bits.consistency.shape == (5, 2)


def test_generated_data_have_the_model_s_covariance() -> None:
    chain = LinearChain((2, 3, 1))
    count = 40_000
    path = generate_path(chain, (1,), seed=0, index=torch.arange(count), dtype=torch.float64)
    assert [z.shape[1] for z in path] == [2, 3, 1]
    for z, covariance in zip(path, chain.covariances, strict=True):
        got = z.T @ z / count
        spread = covariance.diagonal()
        stderr = ((spread[:, None] * spread + covariance.square()) / count).sqrt()
        assert float(((got - covariance) / stderr).abs().max()) < 5


@pytest.mark.parametrize("hidden", [None, 8])
def test_low_precision_rounds_the_weights_and_not_the_path(hidden: int | None) -> None:
    torch.manual_seed(3)
    chain = GaussianHierarchy((3, 2, 1), hidden)
    x, index = _normal(15, 4, 3).float(), torch.arange(4)
    expected = path_bound(chain, x, seed=0, index=index)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = path_bound(chain, x, seed=0, index=index)
    for got in (under_autocast, path_bound(chain.bfloat16(), x.bfloat16(), seed=0, index=index)):
        assert {term.dtype for term in got} == {torch.float32}
        torch.testing.assert_close(got.total, expected.total, rtol=0.02, atol=0.05)
        assert not torch.equal(got.total, expected.total)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("x", lambda: path_bound(_small(), torch.zeros(2, 2).long(), seed=0, index=torch.arange(2))),
        ("x", lambda: path_bound(_small(), torch.zeros(2, 2), seed=0, index=torch.arange(3))),
        ("x", lambda: path_bound(_small(), torch.tensor(0.0), seed=0, index=torch.arange(1))),
        ("z", lambda: path_bound(_small(), torch.zeros(2, 3), seed=0, index=torch.arange(2))),
        ("index", lambda: path_bound(_small(), torch.zeros(2, 2), seed=0, index=torch.zeros(2))),
        ("seed", lambda: path_bound(_small(), torch.zeros(2, 2), seed=0.5, index=torch.arange(2))),  # type: ignore[arg-type]
        ("path", lambda: path_terms(_small(), [torch.zeros(2, 2)])),
        ("path", lambda: log_joint(_small(), [torch.zeros(2, 2)] * 3)),
        ("path", lambda: log_posterior(_small(), [])),
        ("value", lambda: Gaussian(torch.zeros(2, 3), torch.zeros(2, 3)).log_density(torch.zeros(2, 2))),
        ("value", lambda: Gaussian(torch.zeros(()), torch.zeros(())).log_density(torch.zeros(2))),
        ("value", lambda: DiscretizedGaussian(torch.ones(2, 3), torch.ones(1), 5).log_density(torch.ones(3))),
        ("levels", lambda: DiffusionChain(lambda x, t: x, ReverseProcess(SHORT), levels=1)),
        ("dims", lambda: GaussianHierarchy((2,))),
        ("dims", lambda: GaussianHierarchy((2, 0))),
        ("hidden", lambda: GaussianHierarchy((2, 1), 0)),
        (
            "num_dims",
            lambda: path_bound(_small(), torch.zeros(1, 2), seed=0, index=torch.arange(1)).bits_per_dim(0),
        ),
    ],
)
def test_errors_name_the_argument(name: str, call) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: "):
        call()


def _small() -> GaussianHierarchy:
    return GaussianHierarchy((2, 1))
