"""L_simple and the weights of its error."""

import pytest
import torch
from torch import Tensor

from ddpm_core import LinearGaussianProcess, PredictionType, simple_loss
from ddpm_core.objectives import ObjectiveConfig, Weighting, loss_weights, training_loss
from ddpm_core.predictions import convert_prediction
from tests.support.objectives import (
    LINEAR,
    NO_SIGNAL,
    PROCESSES,
    STRAIGHT,
    TYPES,
    WEIGHTINGS,
    ends,
    images,
    some_network,
    trains,
)
from tests.support.oracles import GaussianData, symmetric_grid_at_every_t


def test_the_default_is_simple_loss_to_the_bit() -> None:
    for dtype in (torch.float32, torch.float64):
        x_start, noise = images(5, dtype=dtype)
        got = training_loss(some_network, LINEAR, ObjectiveConfig(), x_start, ends(LINEAR), noise)
        assert torch.equal(got, simple_loss(some_network, LINEAR, x_start, ends(LINEAR), noise))


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("prediction_type", TYPES)
def test_simple_is_the_mean_squared_error_of_the_output(name: str, prediction_type: PredictionType) -> None:
    process = PROCESSES[name]
    objective = ObjectiveConfig(prediction_type=prediction_type)
    x_start, noise = images(5)
    t = ends(process)
    if not trains(process, prediction_type):
        with pytest.raises(ValueError, match=r"^prediction_type: must be 'v' or 'x_start'"):
            training_loss(some_network, process, objective, x_start, t, noise)
        with pytest.raises(ValueError, match=r"^prediction_type: must be 'v' or 'x_start'"):
            loss_weights(process, objective)
        return
    a, b = (table[t].reshape(5, 1, 1, 1) for table in (process.a, process.b))
    target = {"eps": noise, "x_start": x_start, "v": a * noise - b * x_start}[prediction_type]
    output = some_network(a * x_start + b * noise, t)
    expected = (output - target).square().mean((1, 2, 3))
    torch.testing.assert_close(
        training_loss(some_network, process, objective, x_start, t, noise), expected, rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("weighting", ["snr", "min_snr", "p2"])
def test_equivalent_outputs_have_equal_losses(name: str, weighting: Weighting) -> None:
    """A weight is one of x̂_0's error, so that one x̂_0 costs the same, whatever the network says to tell it."""
    process = PROCESSES[name]
    x_start, noise = images(5)
    t = ends(process)

    def loss(prediction_type: PredictionType) -> Tensor:
        def network(x_t: Tensor, t: Tensor) -> Tensor:
            return convert_prediction(process, x_t, t, some_network(x_t, t), "v", prediction_type)

        objective = ObjectiveConfig(prediction_type=prediction_type, weighting=weighting)
        return training_loss(network, process, objective, x_start, t, noise)

    expected = loss("v")
    assert bool((expected[:-1] > 0).all())
    for prediction_type in TYPES:
        if trains(process, prediction_type):
            torch.testing.assert_close(loss(prediction_type), expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("prediction_type", TYPES)
def test_weights_are_their_definitions(name: str, prediction_type: PredictionType) -> None:
    process = PROCESSES[name]
    if not trains(process, prediction_type):
        return
    a, b = process.a, process.b
    snr = (a / b).square()
    on_x_start = {
        "snr": snr,
        "min_snr": snr.clamp(max=2.0),
        "p2": snr / (0.5 + snr) ** 1.5,
    }
    k = {"eps": b / a, "x_start": torch.ones_like(a), "v": b / (a.square() + b.square())}[prediction_type]
    for weighting in WEIGHTINGS:
        objective = ObjectiveConfig(
            prediction_type=prediction_type, weighting=weighting, min_snr_gamma=2.0, p2_gamma=1.5, p2_k=0.5
        )
        got = loss_weights(process, objective)
        assert got.dtype == torch.float64
        assert got.shape == a.shape
        assert bool(got.isfinite().all())
        expected = torch.ones_like(a) if weighting == "uniform" else on_x_start[weighting] * k.square()
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=0)


def test_weights_in_the_papers_own_forms() -> None:
    """SNR is 1 on ε; min-SNR is min(1, γ/SNR) on ε and min(SNR, γ)/(SNR + 1) on v; P2 is 1/(k + SNR)^γ on ε."""
    snr = LINEAR.alphas_cumprod / (1 - LINEAR.alphas_cumprod)

    def weights(prediction_type: PredictionType, weighting: Weighting) -> Tensor:
        return loss_weights(LINEAR, ObjectiveConfig(prediction_type=prediction_type, weighting=weighting))

    close = torch.testing.assert_close
    close(weights("eps", "snr"), torch.ones_like(snr), rtol=1e-12, atol=0)
    close(weights("eps", "min_snr"), (5 / snr).clamp(max=1.0), rtol=1e-10, atol=0)
    close(weights("v", "min_snr"), snr.clamp(max=5.0) / (snr + 1), rtol=1e-10, atol=0)
    close(weights("x_start", "min_snr"), snr.clamp(max=5.0), rtol=1e-10, atol=0)
    close(weights("eps", "p2"), 1 / (1 + snr), rtol=1e-10, atol=0)
    close(weights("v", "snr"), LINEAR.alphas_cumprod, rtol=1e-12, atol=0)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("prediction_type", ["x_start", "v"])
def test_no_weight_breaks_without_signal(prediction_type: PredictionType, weighting: Weighting) -> None:
    for process in (NO_SIGNAL, STRAIGHT):
        got = loss_weights(process, ObjectiveConfig(prediction_type=prediction_type, weighting=weighting))
        assert bool(got.isfinite().all())
        assert float(got[-1]) == (1.0 if weighting == "uniform" else 0.0)


def test_weights_stay_finite_where_the_snr_overflows() -> None:
    """SNR = e^1200, 1 and e^−600: the first is no float64, and P2's weight on ε is 1/(1 + SNR) → 0, ½, 1."""
    process = LinearGaussianProcess(torch.zeros(3), torch.tensor([-600.0, 0.0, 300.0], dtype=torch.float64))
    for weighting, expected in (("snr", [1.0] * 3), ("min_snr", [0.0, 1.0, 1.0]), ("p2", [0.0, 0.5, 1.0])):
        got = loss_weights(process, ObjectiveConfig(weighting=weighting))  # type: ignore[arg-type]
        assert got.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_the_floor_for_gaussian_data(prediction_type: PredictionType) -> None:
    """The best output leaves the conditional variance: ᾱs²/V of ε, (1−ᾱ)s²/V of x_0, s²/V of v, V = ᾱs² + 1 − ᾱ."""
    data = GaussianData(0.25)
    x_start, noise, t = symmetric_grid_at_every_t(data, LINEAR)

    def best(x_t: Tensor, t: Tensor) -> Tensor:
        return convert_prediction(LINEAR, x_t, t, data.eps_theta(LINEAR)(x_t, t), "eps", prediction_type)

    a, variance = LINEAR.alphas_cumprod, data.marginal_variance(LINEAR)
    floor = {
        "eps": a * data.variance / variance,
        "x_start": (1 - a) * data.variance / variance,
        "v": data.variance / variance,
    }[prediction_type]
    for weighting in WEIGHTINGS:
        objective = ObjectiveConfig(prediction_type=prediction_type, weighting=weighting)
        got = training_loss(best, LINEAR, objective, x_start, t, noise).reshape(-1, 4).mean(1)
        torch.testing.assert_close(got, loss_weights(LINEAR, objective) * floor, rtol=1e-8, atol=1e-15)

        def off(x_t: Tensor, t: Tensor) -> Tensor:
            return 1.01 * best(x_t, t)

        assert float(training_loss(off, LINEAR, objective, x_start, t, noise).sum()) > float(got.sum() * 4)
