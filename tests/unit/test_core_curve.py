"""The curve m(log-SNR) and its integral over the SNR, against integrals in closed form."""

import math
from typing import Any

import pytest
import torch

from ddpm_core import MeasuredCurve, snr_integral
from tests.support.oracles import GaussianData

DATA = GaussianData(0.25)


def test_a_measured_curve_integrates_powers_of_the_snr_exactly() -> None:
    log_snr = torch.tensor([2.0, -1.0, 0.0, math.nan, 5.0], dtype=torch.float64)
    for power in (-2.0, -1.0, -0.3, 0.0, 1.0):
        curve = MeasuredCurve(log_snr, 0.7 * torch.exp(power * log_snr))
        for low, high in ((-1.0, 5.0), (-0.5, 1.3), (2.0, 2.0), (0.0, 2.0)):
            grown = power + 1
            exact = high - low if grown == 0 else (math.exp(grown * high) - math.exp(grown * low)) / grown
            assert curve.integral(low, high) == pytest.approx(0.7 * exact, rel=1e-12, abs=1e-14)
        at = torch.tensor([-1.0, -0.3, 4.0], dtype=torch.float64)
        torch.testing.assert_close(curve(at), 0.7 * torch.exp(power * at), rtol=1e-12, atol=0)


def test_a_measured_curve_is_constant_beyond_its_ends() -> None:
    curve = MeasuredCurve(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.25]))
    at = torch.tensor([-math.inf, -3.0, 0.0, 1.0, 8.0], dtype=torch.float64)
    torch.testing.assert_close(curve(at).tolist(), [0.5, 0.5, 0.5, 0.25, 0.25])
    assert curve.integral(-math.inf, 0.0) == pytest.approx(0.5)
    assert curve.integral(-math.inf, -2.0) == pytest.approx(0.5 * math.exp(-2))
    assert curve.integral(1.0, 3.0) == pytest.approx(0.25 * (math.exp(3) - math.exp(1)))
    one = MeasuredCurve(torch.tensor([0.3]), torch.tensor([0.5], dtype=torch.bfloat16))
    assert snr_integral(one, -math.inf, 2.0) == pytest.approx(0.5 * math.exp(2), rel=1e-12)


def test_the_two_integrals_agree() -> None:
    """A fine table of the Gaussian curve, and quadrature of the function, against ½·ln."""
    log_snr = torch.linspace(-12, 10, 4001, dtype=torch.float64)
    table = MeasuredCurve(log_snr, DATA.bayes_curve(log_snr))
    for low, high in ((-9.0, 8.0), (-0.1, 0.1), (1.0, 9.5), (-11.0, -10.0)):
        expected = math.log((1 + 0.25 * math.exp(high)) / (1 + 0.25 * math.exp(low)))
        assert snr_integral(DATA.bayes_curve, low, high) == pytest.approx(expected, rel=1e-11)
        assert snr_integral(table, low, high) == pytest.approx(expected, rel=1e-5)
    for curve in (DATA.bayes_curve, table):
        assert snr_integral(curve, -math.inf, -math.inf) == snr_integral(curve, 1.5, 1.5) == 0.0
    expected = math.log1p(0.25 * math.exp(3))
    assert snr_integral(DATA.bayes_curve, -math.inf, 3.0) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("low", lambda m: snr_integral(DATA.bayes_curve, 1.0, 0.0)),
        ("low", lambda m: snr_integral(MeasuredCurve(m, m), math.nan, 0.0)),
        ("high", lambda m: snr_integral(DATA.bayes_curve, 0.0, math.inf)),
        ("x_start_mse", lambda m: MeasuredCurve(m, m * math.nan)),
        ("x_start_mse", lambda m: MeasuredCurve(m, 0 * m)),
        ("x_start_mse", lambda m: MeasuredCurve(m, m[1:])),
        ("log_snr", lambda m: MeasuredCurve(0 * m, m)),
        ("log_snr", lambda m: MeasuredCurve(m.long(), m)),
    ],
)
def test_errors_name_the_argument(name: str, call: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: "):
        call(torch.linspace(0.1, 1.0, 20, dtype=torch.float64))
