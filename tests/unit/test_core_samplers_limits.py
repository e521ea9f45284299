"""Limits of x̂_0 and of the variance: dynamic thresholding, clipping, rounding."""

import pytest
import torch
from torch import Tensor

from ddpm_core import ReverseProcess, Schedule, ScheduleConfig
from ddpm_core.reverse import dynamic_threshold

LINEAR = Schedule.from_config(ScheduleConfig())
SHAPE = (2, 3, 4)


def _some_network(x_t: Tensor, t: Tensor) -> Tensor:
    return torch.sin(3 * x_t) + 0.3 * x_t + 0.001 * t.to(x_t.dtype).reshape(-1, 1, 1, 1)


def test_dynamic_threshold() -> None:
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64) * torch.tensor([0.1, 1.0, 3.0, 10.0]).reshape(
        -1, 1, 1, 1
    )
    for quantile in (0.3, 0.9, 0.995, 1.0):
        s = torch.quantile(x.abs().flatten(1), quantile, dim=1).clamp(min=1).reshape(-1, 1, 1, 1)
        expected = torch.clamp(x, -s, s) / s
        torch.testing.assert_close(dynamic_threshold(x, quantile), expected)
        torch.testing.assert_close(dynamic_threshold(x[2:3], quantile), expected[2:3])
        channels_last = x.to(memory_format=torch.channels_last)
        torch.testing.assert_close(dynamic_threshold(channels_last, quantile), expected)
        low = dynamic_threshold(x.bfloat16(), quantile)
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(low.double(), expected, rtol=0.02, atol=0.02)
    assert torch.equal(dynamic_threshold(x[:1] / 10, 0.9), x[:1] / 10)
    with pytest.raises(ValueError, match=r"^quantile: must be above 0 and at most 1, got 1.5$"):
        dynamic_threshold(x, 1.5)
    with pytest.raises(ValueError, match=r"^x_start: must be a floating-point"):
        dynamic_threshold(torch.ones(1, 2, dtype=torch.int64), 0.5)


def test_the_bound_s_error_is_limited_like_the_prediction() -> None:
    reverse = ReverseProcess(LINEAR, threshold_quantile=0.7, clip=False)
    x_start, noise = (torch.randn(3, *SHAPE, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([10, 400, 999])
    x_t = LINEAR.gather(LINEAR.a, t, x_start) * x_start + LINEAR.gather(LINEAR.b, t, x_start) * noise
    output = _some_network(x_t, t)
    predicted, eps = reverse.predict(output, x_t, t)
    torch.testing.assert_close(
        reverse.x_start_error(output, x_start, t, noise), predicted - x_start, rtol=1e-6, atol=1e-9
    )
    assert float(predicted.abs().max()) <= 1
    fits = LINEAR.gather(LINEAR.a, t, x_t) * predicted + LINEAR.gather(LINEAR.b, t, x_t) * eps
    torch.testing.assert_close(fits, x_t)


@pytest.mark.parametrize("variance_type", ["fixed_large", "learned_range"])
def test_the_variance_is_not_rounded_to_the_dtype_of_the_state(variance_type) -> None:
    reverse = ReverseProcess(LINEAR, variance_type=variance_type)
    x_t, t = torch.full((3, 1, 2, 2), 0.5).bfloat16(), torch.tensor([1, 500, 999])
    output = torch.zeros(3, 2 if variance_type == "learned_range" else 1, 2, 2).bfloat16()
    got = reverse.log_variance(output, x_t, t)
    assert got.dtype == torch.float32
    exact = reverse.log_variance(output.double(), x_t.double(), t)
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=0)


def test_a_threshold_in_low_precision_is_rounded_once() -> None:
    x = (3 * torch.randn(500, 37, generator=torch.Generator().manual_seed(0))).bfloat16()
    for quantile in (0.3, 0.777, 0.995):
        s = torch.quantile(x.double().abs(), quantile, dim=1).clamp(min=1).bfloat16()[:, None]
        assert torch.equal(dynamic_threshold(x, quantile), torch.clamp(x, -s, s) / s)


def test_the_analytic_variance_refuses_an_error_of_zero() -> None:
    for at in (0, 5):
        mse = torch.ones(1000, dtype=torch.float64)
        mse[at] = 0.0
        with pytest.raises(
            ValueError, match=r"^x_start_mse: must be positive and finite at every t, got 0.0"
        ):
            ReverseProcess(LINEAR, variance_type="analytic", x_start_mse=mse)
