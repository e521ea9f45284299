"""Classifier-free guidance."""

import pytest
import torch
from torch import Tensor

from ddpm_core import (
    PredictionType,
    SamplerConfig,
    Schedule,
    ScheduleConfig,
    predict_eps,
    predict_x_start,
    sample,
)
from ddpm_core.guidance import guided
from ddpm_core.predictions import predict_v

SCHEDULE = Schedule.from_config(ScheduleConfig(num_timesteps=30, beta_start=0.005, beta_end=0.4))
NULL = 10
SHAPE = (2, 3, 4)


def _eps(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    shift = 0.1 * labels.to(x_t.dtype).reshape(-1, 1, 1, 1)
    return torch.sin(x_t + shift) + 0.01 * t.to(x_t.dtype).reshape(-1, 1, 1, 1) * shift


def _predicting(prediction_type: PredictionType):
    """The same network as `_eps`, saying x_0 or v."""

    def network(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        eps = _eps(x_t, t, labels)
        x_start = predict_x_start(SCHEDULE, x_t, t, eps)
        return {"eps": eps, "x_start": x_start, "v": predict_v(SCHEDULE, x_t, t, x_start)}[prediction_type]

    return network


def _learned(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    return torch.cat((_eps(x_t, t, labels), torch.tanh(x_t * labels.to(x_t.dtype).reshape(-1, 1, 1, 1))), 1)


def _batch(dtype: torch.dtype = torch.float64, size: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(size, *SHAPE, generator=generator, dtype=torch.float64).to(dtype)
    return x_t, torch.arange(size) * 9, torch.arange(size) + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("network", [_eps, _learned])
def test_scale_1_is_conditional_and_0_is_unconditional(network, size: int, dtype: torch.dtype) -> None:
    x_t, t, labels = _batch(dtype, size)
    channels = SHAPE[0]
    conditional, unconditional = network(x_t, t, labels), network(x_t, t, torch.full_like(labels, NULL))
    assert torch.equal(guided(network, labels, NULL, 1.0)(x_t, t), conditional)
    at_zero = guided(network, labels, NULL, 0.0)(x_t, t)
    assert at_zero.dtype == dtype
    assert torch.equal(at_zero[:, :channels], unconditional[:, :channels])
    assert torch.equal(at_zero[:, channels:], conditional[:, channels:])


def test_the_formula_and_the_learned_variance_of_the_conditional() -> None:
    x_t, t, labels = _batch()
    conditional, unconditional = _learned(x_t, t, labels), _learned(x_t, t, torch.full_like(labels, NULL))
    for scale in (-0.5, 0.3, 2.5, 7.0):
        got = guided(_learned, labels, NULL, scale)(x_t, t)
        expected = (1 - scale) * unconditional[:, :2] + scale * conditional[:, :2]
        torch.testing.assert_close(got[:, :2], expected)
        assert torch.equal(got[:, 2:], conditional[:, 2:])


def test_one_doubled_batch() -> None:
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def network(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        seen.append((x_t, t, labels))
        return x_t

    x_t, t, labels = _batch()
    guided(network, labels, NULL, 3.0)(x_t, t)
    assert len(seen) == 1
    assert torch.equal(seen[0][0], torch.cat((x_t, x_t)))
    assert seen[0][1].tolist() == [0, 9, 18, 0, 9, 18]
    assert seen[0][2].tolist() == [1, 2, 3, NULL, NULL, NULL]


@pytest.mark.parametrize("prediction_type", ["x_start", "v"])
def test_guidance_of_one_prediction_is_guidance_of_all(prediction_type: PredictionType) -> None:
    x_t, t, labels = _batch()
    eps = guided(_eps, labels, NULL, 4.0)(x_t, t)
    output = guided(_predicting(prediction_type), labels, NULL, 4.0)(x_t, t)
    x_start = predict_x_start(SCHEDULE, x_t, t, output, prediction_type)
    torch.testing.assert_close(predict_eps(SCHEDULE, x_t, t, x_start), eps, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["ancestral", "ddim", "dpm_solver_pp_2m", "dpm_solver_pp_2m_sde", "heun"])
def test_samplers_take_a_guided_network(kind) -> None:
    index, labels = torch.arange(3), torch.tensor([1, 2, 2])
    config = SamplerConfig(kind=kind, num_steps=6, threshold_quantile=0.9)
    images = {
        prediction_type: sample(
            guided(_predicting(prediction_type), labels, NULL, 3.0),
            SCHEDULE,
            config,
            seed=0,
            index=index,
            shape=SHAPE,
            prediction_type=prediction_type,
            dtype=torch.float64,
        )
        for prediction_type in ("eps", "v")
    }
    torch.testing.assert_close(images["eps"], images["v"], rtol=1e-7, atol=1e-7)
    assert float(images["v"].abs().max()) <= 1.0


def test_memory_formats() -> None:
    x_t, t, labels = _batch()
    expected = guided(_learned, labels, NULL, 2.0)(x_t, t)
    strided = x_t.repeat_interleave(2, dim=3)[..., ::2]
    for other in (x_t.to(memory_format=torch.channels_last), strided):
        torch.testing.assert_close(guided(_learned, labels, NULL, 2.0)(other, t), expected)


@pytest.mark.parametrize(
    ("name", "labels", "null_label", "scale"),
    [
        ("labels", torch.tensor([1.0]), NULL, 1.0),
        ("labels", torch.tensor([[1]]), NULL, 1.0),
        ("labels", torch.tensor([1, 2]), NULL, 1.0),
        ("null_label", torch.tensor([1, 2, 3]), 1.5, 1.0),
        ("scale", torch.tensor([1, 2, 3]), NULL, float("nan")),
        ("scale", torch.tensor([1, 2, 3]), NULL, float("inf")),
    ],
)
def test_errors_name_the_argument(name: str, labels: Tensor, null_label, scale: float) -> None:
    x_t, t, _ = _batch()
    with pytest.raises(ValueError, match=rf"^{name}: must "):
        guided(_eps, labels, null_label, scale)(x_t, t)
