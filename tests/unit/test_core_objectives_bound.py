"""The bound as an objective, both objectives together, and the gradients of all."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ddpm_core import (
    PredictionType,
    ReverseProcess,
    bound_term,
    q_sample,
)
from ddpm_core.objectives import ObjectiveConfig, training_loss
from ddpm_core.predictions import convert_prediction
from tests.support.objectives import (
    HYBRID,
    LEVELS,
    LINEAR,
    SHORT,
    TYPES,
    WEIGHTINGS,
    ends,
    images,
    some_network,
    wide_network,
)
from tests.support.oracles import GaussianData, symmetric_grid_at_every_t


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_the_mean_of_vlb_over_t_is_the_bound_without_its_prior(variance_type: str) -> None:
    data = GaussianData(0.25)
    x_start, noise, t = symmetric_grid_at_every_t(data, LINEAR)
    objective = ObjectiveConfig(loss="vlb", variance_type=variance_type)  # type: ignore[arg-type]
    got = training_loss(data.eps_theta(LINEAR), LINEAR, objective, x_start, t, noise, levels=5)
    per_t = got.reshape(-1, 4).mean(1)
    expected = data.consistency_terms(LINEAR, variance_type)
    torch.testing.assert_close(per_t[1:] / 1000, expected[1:], rtol=1e-8, atol=1e-13)
    reverse = ReverseProcess(LINEAR, "eps", variance_type, clip=False)  # type: ignore[arg-type]
    decoder = bound_term(data.eps_theta(LINEAR), reverse, x_start[:4], t[:4], noise[:4], levels=5)
    assert float(got.mean()) == pytest.approx(float(expected[1:].sum() + decoder.mean()), rel=1e-9)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_hybrid_is_simple_and_the_bound(prediction_type: PredictionType) -> None:
    x_start, noise = images(5)
    t = ends(SHORT)
    hybrid = dataclasses.replace(HYBRID, prediction_type=prediction_type, weighting="min_snr", vlb_weight=0.3)
    got = training_loss(wide_network, SHORT, hybrid, x_start, t, noise, levels=LEVELS)
    simple = ObjectiveConfig(prediction_type=prediction_type, weighting="min_snr")
    vlb = ObjectiveConfig(prediction_type=prediction_type, loss="vlb", variance_type="learned_range")
    expected = training_loss(some_network, SHORT, simple, x_start, t, noise)
    expected = expected + 0.3 * training_loss(wide_network, SHORT, vlb, x_start, t, noise, levels=LEVELS)
    torch.testing.assert_close(got, expected)
    # λ is the paper's, on T·L_t in bits/dim
    assert HYBRID.vlb_weight == 0.001


@pytest.mark.parametrize("prediction_type", TYPES)
def test_the_bound_is_trained_where_pred_x_start_leaves_the_range(prediction_type: PredictionType) -> None:
    """½·(SNR_{t−1} − SNR_t)·(x̂_0 − x_0)²/ln 2, T times, of x̂_0 = 3 and not of a clipped 1; it has a gradient."""
    x_start, noise = torch.full((1, 1, 1, 1), 0.5).double(), torch.ones(1, 1, 1, 1).double()
    t = torch.tensor([10])
    x_t = q_sample(SHORT, x_start, t, noise)
    output = convert_prediction(SHORT, x_t, t, torch.full_like(x_t, 3.0), "x_start", prediction_type)
    objective = ObjectiveConfig(prediction_type=prediction_type, loss="vlb")
    output.requires_grad_()
    got = training_loss(lambda x, t: output, SHORT, objective, x_start, t, noise, levels=LEVELS)
    snr = SHORT.alphas_cumprod / (1 - SHORT.alphas_cumprod)
    assert float(got.detach()) == pytest.approx(
        20 * 0.5 * float(snr[9] - snr[10]) * 2.5**2 / math.log(2), rel=1e-9
    )
    got.sum().backward()
    assert output.grad is not None
    assert float(output.grad.abs()) > 1


class _TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.mean = nn.Parameter(torch.randn(2, generator=generator, dtype=torch.float64))
        self.v = nn.Parameter(torch.randn(2, generator=generator, dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return torch.cat((self.mean[0] * x_t + self.mean[1], torch.tanh(self.v[0] * x_t + self.v[1])), dim=1)


def _gradients(loss: Callable[[nn.Module], Tensor]) -> tuple[Tensor, Tensor]:
    network = _TwoHeads()
    loss(network).sum().backward()
    gradients = [parameter.grad for parameter in (network.mean, network.v)]
    return tuple(torch.zeros(2).double() if g is None else g for g in gradients)  # type: ignore[return-value]


@pytest.mark.parametrize("prediction_type", TYPES)
def test_hybrid_trains_the_mean_by_simple_and_the_variance_by_the_bound(
    prediction_type: PredictionType,
) -> None:
    x_start, noise = images(5)
    t = ends(SHORT)
    hybrid = dataclasses.replace(HYBRID, prediction_type=prediction_type, vlb_weight=0.7)
    vlb = ObjectiveConfig(prediction_type=prediction_type, loss="vlb", variance_type="learned_range")
    simple = ObjectiveConfig(prediction_type=prediction_type)
    mean, v = _gradients(
        lambda network: training_loss(network, SHORT, hybrid, x_start, t, noise, levels=LEVELS)
    )
    simple_mean, simple_v = _gradients(
        lambda network: training_loss(lambda x, t: network(x, t)[:, :2], SHORT, simple, x_start, t, noise)
    )
    vlb_mean, vlb_v = _gradients(
        lambda network: training_loss(network, SHORT, vlb, x_start, t, noise, levels=LEVELS)
    )
    torch.testing.assert_close(mean, simple_mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(v, 0.7 * vlb_v, rtol=1e-12, atol=0)
    assert simple_v.tolist() == [0.0, 0.0]
    assert float(vlb_mean.abs().min()) > 1e-3  # which the hybrid must not have
    assert float(v.abs().min()) > 1e-6


@pytest.mark.parametrize("loss", ["simple", "vlb", "hybrid"])
def test_the_network_is_evaluated_once(loss: str) -> None:
    objective = ObjectiveConfig(
        loss=loss,  # type: ignore[arg-type]
        variance_type="fixed_small" if loss == "simple" else "learned_range",
    )
    seen: list[Tensor] = []

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append(x_t)
        return some_network(x_t, t) if loss == "simple" else wide_network(x_t, t)

    x_start, noise = images(2)
    t = torch.tensor([0, 9])
    training_loss(network, SHORT, objective, x_start, t, noise, levels=LEVELS)
    assert len(seen) == 1
    assert torch.equal(seen[0], q_sample(SHORT, x_start, t, noise))


OBJECTIVES = [
    *(ObjectiveConfig(prediction_type=p, weighting=w) for p in TYPES for w in WEIGHTINGS),
    *(ObjectiveConfig(prediction_type=p, loss="vlb") for p in TYPES),
    *(ObjectiveConfig(prediction_type=p, loss="vlb", variance_type="learned_range") for p in TYPES),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{o.prediction_type}-{o.loss}-{o.weighting}")
def test_gradients_of_every_loss(objective: ObjectiveConfig) -> None:
    """With respect to the output. (The hybrid's is no derivative of its value, by design.)"""
    x_start, noise = images(3, channels=1)
    t = torch.tensor([0, 9, 19])
    output = some_network(q_sample(SHORT, x_start, t, noise), t)
    if objective.variance_type == "learned_range":
        output = torch.cat((output, 0.3 * x_start), dim=1)

    def loss(output: Tensor) -> Tensor:
        return training_loss(lambda x, t: output, SHORT, objective, x_start, t, noise, levels=LEVELS)

    assert torch.autograd.gradcheck(loss, (output.requires_grad_(),), rtol=1e-5)


def test_gradient_of_the_hybrid_with_respect_to_v() -> None:
    x_start, noise = images(3, channels=1)
    t = torch.tensor([0, 9, 19])
    prediction = some_network(q_sample(SHORT, x_start, t, noise), t)
    hybrid = dataclasses.replace(HYBRID, vlb_weight=1.0)

    def loss(v: Tensor) -> Tensor:
        output = torch.cat((prediction, v), dim=1)
        return training_loss(lambda x, t: output, SHORT, hybrid, x_start, t, noise, levels=LEVELS)

    assert torch.autograd.gradcheck(loss, (0.3 * x_start.clone().requires_grad_(),), rtol=1e-5)
