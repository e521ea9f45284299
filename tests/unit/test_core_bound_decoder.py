"""The decoder: a probability of each level, exact in both tails, with gradients that are derivatives."""

import math

import pytest
import torch
from torch import Tensor

from ddpm_core import discretized_gaussian_log_likelihood

LEVELS = (2, 3, 17, 256)
LOG_SCALES = (-20.0, -12.0, -9.0, -4.9, -1.0, 0.0, 2.0, 5.0, 9.5, 50.0)


def _levels(levels: int) -> Tensor:
    return torch.linspace(-1, 1, levels, dtype=torch.float64)


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("log_scale", LOG_SCALES)
@pytest.mark.parametrize("mean", [-40.0, -1.3, -1.0, -0.999, 0.0, 0.31, 1.0, 5.0])
def test_masses_sum_to_one(levels: int, log_scale: float, mean: float) -> None:
    got = discretized_gaussian_log_likelihood(_levels(levels), _scalar(mean), _scalar(log_scale), levels)
    assert bool(got.isfinite().all())
    assert bool((got <= 0).all())
    # an edge between two bins is known to the rounding of x, in units of σ
    assert float(got.exp().sum()) == pytest.approx(1.0, abs=1e-12 + 1e-16 * math.exp(-log_scale))


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("log_scale", LOG_SCALES)
def test_the_decoder_of_mirrored_data_is_mirrored(levels: int, log_scale: float) -> None:
    x, mean = _levels(levels), 0.37
    one = discretized_gaussian_log_likelihood(x, _scalar(mean), _scalar(log_scale), levels)
    other = discretized_gaussian_log_likelihood(-x, _scalar(-mean), _scalar(log_scale), levels)
    torch.testing.assert_close(one, other, rtol=1e-13, atol=0)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("log_scale", LOG_SCALES)
def test_gradients_are_derivatives(levels: int, log_scale: float) -> None:
    """For every kind of bin (both open ends, the middle) and means at it, beside it and far outside the range.

    The mean is given in units of the larger of σ and the bin, or its step would be beyond the curvature.
    """
    half_bin = 1 / (levels - 1)
    unit = max(math.exp(log_scale), half_bin)
    at = torch.tensor([0, levels // 3, levels - 1])
    x = _levels(levels)[at][:, None].expand(3, 7)
    u = torch.tensor([-9.0, -2.0, -0.4, 0.03, 0.7, 2.0, 9.0], dtype=torch.float64).expand(3, 7)

    # far out the value is of order (u·unit/σ)²: what is compared is of order 1
    small = min(1.0, math.exp(2 * log_scale) / unit**2)

    def scaled(u: Tensor, scale: Tensor) -> Tensor:
        value = discretized_gaussian_log_likelihood(x, x + unit * u, scale, levels)
        return value * small

    scale = torch.full_like(u, log_scale)
    assert torch.autograd.gradcheck(
        scaled, (u.clone().requires_grad_(), scale.requires_grad_()), eps=1e-6, atol=1e-6, rtol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("log_scale", LOG_SCALES)
def test_gradients_are_finite_everywhere(dtype: torch.dtype, levels: int, log_scale: float) -> None:
    x = _levels(levels).to(dtype)[:, None].expand(levels, 9)
    mean = torch.tensor([-30.0, -1.5, -1.0, -0.3, 0.0, 1 / 255, 1.0, 1.5, 30.0], dtype=dtype).requires_grad_()
    scale = torch.tensor(log_scale, dtype=dtype, requires_grad=True)
    value = discretized_gaussian_log_likelihood(x, mean, scale, levels)
    value.sum().backward()
    assert mean.grad is not None
    assert scale.grad is not None
    assert bool(value.isfinite().all() & mean.grad.isfinite().all() & scale.grad.isfinite())


def test_the_inner_mass_goes_to_the_density_and_to_one() -> None:
    """σ far above the bin: density times width. σ → 0 with the mean inside the bin: ln P → 0."""
    x = torch.zeros(1, dtype=torch.float64)
    got = float(discretized_gaussian_log_likelihood(x, _scalar(20.0), _scalar(5.0), 257))
    sigma = math.exp(5.0)
    expected = -0.5 * (20 / sigma) ** 2 - math.log(sigma * math.sqrt(2 * math.pi)) + math.log(2 / 256)
    assert got == pytest.approx(expected, abs=1e-8)
    assert float(discretized_gaussian_log_likelihood(x, _scalar(0.001), _scalar(-20.0), 257)) == 0.0


@pytest.mark.parametrize("log_scale", [7.9, 8.4, 9.0, 12.0, 20.0, 33.0, 34.0, 50.0, 400.0, 800.0])
def test_a_bin_far_narrower_than_sigma_keeps_its_digits(log_scale: float) -> None:
    """ln P = ln(2h) − ln σ − ½·ln 2π − z²/2 − (h/σ)²/6 and higher orders."""
    x = _levels(257)[1:-1]
    got = discretized_gaussian_log_likelihood(x, _scalar(0.3), _scalar(log_scale), 257)
    z_square = ((x - 0.3) * math.exp(-log_scale)).square()
    h_square = (math.exp(-log_scale) / 256) ** 2
    expected = math.log(2 / 256) - log_scale - 0.5 * math.log(2 * math.pi) - 0.5 * z_square - h_square / 6
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_a_narrow_bin_far_out_is_the_integral_over_it() -> None:
    """σ = e^9 and the mean 4·10^10·σ away: the density falls by a factor e^38 within a bin of 10^−9·σ and less."""
    x, scale, half_bin = torch.zeros(1, dtype=torch.float64), 9.0, 1 / 256
    for mean in (1e12, 4e14, -4e14):
        got = float(discretized_gaussian_log_likelihood(x, _scalar(mean), _scalar(scale), 257))
        z, h = abs(mean) / math.exp(scale), half_bin / math.exp(scale)
        y = z * h
        log_sinhc = y + math.log(-math.expm1(-2 * y) / (2 * y))
        expected = -0.5 * z * z - 0.5 * math.log(2 * math.pi) + math.log(2 * h) + log_sinhc
        assert got == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("log_scale", [-400.0, -360.0, -340.0, -100.0, 20.0, 50.0])
@pytest.mark.parametrize("levels", LEVELS)
def test_the_narrowest_and_the_widest_decoder(levels: int, log_scale: float) -> None:
    """The mean in the bin: ln P and its gradients are numbers for every σ, and 0 where σ is far below the bin."""
    x = _levels(levels)
    mean = (x + 0.3 / levels).requires_grad_()
    scale = torch.full_like(x, log_scale).requires_grad_()
    value = discretized_gaussian_log_likelihood(x, mean, scale, levels)
    on_mean, on_scale = torch.autograd.grad(value.sum(), (mean, scale))
    assert bool((value.isfinite() & on_mean.isfinite() & on_scale.isfinite()).all())
    if log_scale < 0:
        assert bool(((value == 0) & (on_mean == 0) & (on_scale == 0)).all())
    elif levels > 2:
        torch.testing.assert_close(on_scale[1:-1], torch.full_like(x[1:-1], -1.0), rtol=1e-9, atol=0)


def test_the_narrowest_decoder_beside_the_bin() -> None:
    """ln P = −d²/(2σ²) to leading order, d the way to the bin, and infinite only where that is no float64."""
    x, mean = _levels(17)[3:4], _levels(17)[3:4] + 1 / 16 + 0.25
    for log_scale, expected in ((-100.0, 0.25**2 * 0.5 * math.exp(200.0)), (-400.0, math.inf)):
        place = mean.clone().requires_grad_()
        value = discretized_gaussian_log_likelihood(x, place, _scalar(log_scale), 17)
        (slope,) = torch.autograd.grad(value.sum(), place)
        assert -float(value.detach()) == pytest.approx(expected, rel=1e-9)
        assert float(slope) < 0


def test_masses_are_integrals_of_the_density() -> None:
    x, mean, sigma = _levels(17), 0.17, 0.2
    grid = torch.linspace(-1 / 16, 1 / 16, 2_001, dtype=torch.float64)
    density = torch.exp(-0.5 * ((x[1:-1, None] + grid - mean) / sigma) ** 2) / (
        sigma * math.sqrt(2 * math.pi)
    )
    integral = torch.trapezoid(density, grid, dim=1)
    got = discretized_gaussian_log_likelihood(
        x, torch.tensor(mean, dtype=torch.float64), torch.tensor(math.log(sigma), dtype=torch.float64), 17
    )
    torch.testing.assert_close(got[1:-1].exp(), integral, rtol=1e-6, atol=1e-12)


def test_keeps_digits_far_out_in_the_tail() -> None:
    """At 50 σ, ln(Φ(b) − Φ(a)) with a = −50.5, b = −49.5 is ln φ(49.5)/49.5 and a small correction."""
    sigma = 2 / 16
    got = discretized_gaussian_log_likelihood(
        torch.tensor([0.0], dtype=torch.float64),
        torch.tensor([50 * sigma], dtype=torch.float64),
        torch.tensor(math.log(sigma), dtype=torch.float64),
        17,
    )
    mills = 1 / 49.5 - 1 / 49.5**3 + 3 / 49.5**5 - 15 / 49.5**7
    expected = -0.5 * 49.5**2 - 0.5 * math.log(2 * math.pi) + math.log(mills)
    assert float(got) == pytest.approx(expected, rel=1e-12)


def test_a_mean_beyond_an_open_end_costs_nothing_there() -> None:
    for end in (-1.0, 1.0):
        got = discretized_gaussian_log_likelihood(_scalar(end), _scalar(40 * end), _scalar(-20.0), 256)
        assert float(got) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("levels", LEVELS)
def test_low_precision_names_the_same_levels(dtype: torch.dtype, levels: int) -> None:
    """The error x − mean is what counts, and rounding a level moves no bin to another one."""
    x = _levels(levels).to(dtype)
    got = discretized_gaussian_log_likelihood(x, x + 0.25, torch.tensor(-1.0, dtype=dtype), levels)
    assert got.dtype == dtype
    exact = discretized_gaussian_log_likelihood(x.double(), (x + 0.25).double(), _scalar(-1.0), levels)
    torch.testing.assert_close(got, exact.to(dtype))


def test_any_memory_layout_gives_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    x = _levels(17)[torch.randint(17, (1, 4, 3, 5), generator=generator)]
    mean, scale = x + 0.1, torch.randn(x.shape, generator=generator, dtype=torch.float64)
    expected = discretized_gaussian_log_likelihood(x, mean, scale, 17)
    for order in ((0, 2, 3, 1), (3, 1, 0, 2)):
        back = [order.index(i) for i in range(4)]
        strided, m, s = (v.permute(order).contiguous().permute(back) for v in (x, mean, scale))
        torch.testing.assert_close(discretized_gaussian_log_likelihood(strided, m, s, 17), expected)


def test_errors_name_the_argument() -> None:
    x = torch.zeros(1)
    with pytest.raises(ValueError, match=r"^levels: must be at least 2, got 1"):
        discretized_gaussian_log_likelihood(x, x, x, 1)
    with pytest.raises(ValueError, match=r"^x: must be a floating-point tensor"):
        discretized_gaussian_log_likelihood(x.long(), x, x, 2)
    for bad in (math.inf, -math.inf, math.nan):
        with pytest.raises(ValueError, match=r"^log_scale: must be finite"):
            discretized_gaussian_log_likelihood(x, x, torch.tensor(bad), 2)
