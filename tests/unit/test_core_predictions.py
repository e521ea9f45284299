"""ε, x_0 and v, and each from each."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from ddpm_core import (
    LinearGaussianProcess,
    PredictionType,
    Schedule,
    ScheduleConfig,
    predict_eps,
    predict_v,
    predict_x_start,
    prediction_target,
    q_sample,
)
from ddpm_core.predictions import conversion_tables, convert_prediction, x_start_tables
from tests.support.oracles import GaussianData, symmetric_grid_at_every_t

LINEAR = Schedule.from_config(ScheduleConfig())
NO_SIGNAL = Schedule(torch.cat((torch.linspace(1e-4, 0.1, 50, dtype=torch.float64), torch.ones(1).double())))
_RISING = torch.linspace(0.01, 1.0, 60, dtype=torch.float64)
EXPLODING = LinearGaussianProcess(torch.zeros(60), torch.linspace(math.log(0.01), math.log(50.0), 60))
STRAIGHT = LinearGaussianProcess(torch.log1p(-_RISING), _RISING.log())  # (1 − s)·x_0 + s·ε, a = 0 at the end
PROCESSES = {"linear": LINEAR, "no signal": NO_SIGNAL, "exploding": EXPLODING, "straight": STRAIGHT}
TYPES: tuple[PredictionType, ...] = ("eps", "x_start", "v")
PAIRS = list(itertools.product(TYPES, TYPES))


def _ends(process: LinearGaussianProcess) -> Tensor:
    last = process.num_timesteps - 1
    return torch.tensor([0, 1, last // 2, last - 1, last])


def _batch(count: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x_start = torch.rand(count, 3, 4, 4, generator=generator, dtype=torch.float64) * 2 - 1
    return x_start.to(dtype), torch.randn(count, 3, 4, 4, generator=generator, dtype=torch.float64).to(dtype)


def _says(process: LinearGaussianProcess, source: PredictionType, target: PredictionType) -> bool:
    return target == source or source != "eps" or not process.ends_without_signal


def test_the_targets_are_their_definitions() -> None:
    x_start, noise = _batch(5)
    for process in PROCESSES.values():
        t = _ends(process)
        a, b = (table[t].reshape(5, 1, 1, 1) for table in (process.a, process.b))
        assert torch.equal(prediction_target(process, "eps", x_start, t, noise), noise)
        assert torch.equal(prediction_target(process, "x_start", x_start, t, noise), x_start)
        torch.testing.assert_close(
            prediction_target(process, "v", x_start, t, noise), a * noise - b * x_start, rtol=0, atol=0
        )


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_every_target_tells_every_other(name: str, source: PredictionType, target: PredictionType) -> None:
    """From x_t and the true ε, x_0 or v follow the other two, at t = 0, at T − 1 and between."""
    process = PROCESSES[name]
    x_start, noise = _batch(5)
    t = _ends(process)
    x_t = q_sample(process, x_start, t, noise)
    given = prediction_target(process, source, x_start, t, noise)
    if not _says(process, source, target):
        with pytest.raises(ValueError, match=r"^prediction_type: must be 'v' or 'x_start'"):
            convert_prediction(process, x_t, t, given, source, target)
        return
    got = convert_prediction(process, x_t, t, given, source, target)
    expected = prediction_target(process, target, x_start, t, noise)
    # the rounding of x_t, multiplied by the table that it meets
    on_x_t, on_output = conversion_tables(process, source, target)
    worst = float((on_x_t.abs() + on_output.abs())[t].max())
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-15 * worst * 50)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_any_output_comes_back_from_any_conversion(
    name: str, source: PredictionType, target: PredictionType
) -> None:
    """The tables there and back: 1 of the output and 0 of x_t, so for outputs that are nobody's target too."""
    process = PROCESSES[name]
    if not (_says(process, source, target) and _says(process, target, source)):
        return
    on_x_t, on_output = conversion_tables(process, source, target)
    back_x_t, back_output = conversion_tables(process, target, source)
    torch.testing.assert_close(on_output * back_output, torch.ones_like(on_output), rtol=1e-14, atol=0)
    scale = (back_output * on_x_t).abs() + back_x_t.abs() + 1.0
    assert float(((back_x_t + back_output * on_x_t) / scale).abs().max()) < 1e-14


@pytest.mark.parametrize("name", ["linear", "exploding"])
def test_tables_are_the_formulas(name: str) -> None:
    process = PROCESSES[name]
    a, b = process.a, process.b
    total = a.square() + b.square()
    expected: dict[tuple[PredictionType, PredictionType], tuple[Tensor, Tensor]] = {
        ("eps", "x_start"): (1 / a, -b / a),
        ("v", "x_start"): (a / total, -b / total),
        ("x_start", "eps"): (1 / b, -a / b),
        ("v", "eps"): (b / total, a / total),
        ("eps", "v"): (-b / a, total / a),
        ("x_start", "v"): (a / b, -total / b),
    }
    for (source, target), tables in expected.items():
        for got, table in zip(conversion_tables(process, source, target), tables, strict=True):
            assert got.dtype == torch.float64
            torch.testing.assert_close(got, table, rtol=1e-14, atol=0)
    for source in TYPES:
        assert [table.unique().tolist() for table in conversion_tables(process, source, source)] == [
            [0.0],
            [1.0],
        ]
        for ours, theirs in zip(
            x_start_tables(process, source), conversion_tables(process, source, "x_start"), strict=True
        ):
            assert ours is theirs


def test_v_of_a_variance_preserving_process_is_a_rotation() -> None:
    """x_0 = a·x_t − b·v and ε = b·x_t + a·v (Salimans & Ho 2022, appendix D)."""
    x_t, v = _batch(3)
    t = torch.tensor([0, 400, 999])
    a, b = (table[t].reshape(3, 1, 1, 1) for table in (LINEAR.a, LINEAR.b))
    torch.testing.assert_close(predict_x_start(LINEAR, x_t, t, v, "v"), a * x_t - b * v)
    torch.testing.assert_close(predict_eps(LINEAR, x_t, t, v, "v"), b * x_t + a * v)


def test_the_named_functions_are_the_conversions() -> None:
    x_t, output = _batch(2)
    t = torch.tensor([7, 990])
    for source in TYPES:
        for function, target in ((predict_x_start, "x_start"), (predict_eps, "eps"), (predict_v, "v")):
            expected = convert_prediction(LINEAR, x_t, t, output, source, target)  # type: ignore[arg-type]
            assert torch.equal(function(LINEAR, x_t, t, output, source), expected)
    assert torch.equal(
        predict_x_start(LINEAR, x_t, t, output), predict_x_start(LINEAR, x_t, t, output, "eps")
    )
    assert torch.equal(predict_eps(LINEAR, x_t, t, output), predict_eps(LINEAR, x_t, t, output, "x_start"))
    assert torch.equal(predict_v(LINEAR, x_t, t, output), predict_v(LINEAR, x_t, t, output, "x_start"))


@pytest.mark.parametrize("prediction_type", TYPES)
def test_the_best_outputs_for_gaussian_data_are_each_other(prediction_type: PredictionType) -> None:
    """E[ε|x_t], E[x_0|x_t] and E[v|x_t] = a·E[ε|x_t] − b·E[x_0|x_t], each from its own moments."""
    data = GaussianData(0.25)
    x_start, noise, t = symmetric_grid_at_every_t(data, LINEAR)
    x_t = q_sample(LINEAR, x_start, t, noise)
    signal = LINEAR.alphas_cumprod[t].sqrt().reshape(-1, 1, 1, 1)
    variance = data.marginal_variance(LINEAR)[t].reshape(-1, 1, 1, 1)
    eps = data.eps_theta(LINEAR)(x_t, t)
    x_best = signal * data.variance / variance * x_t  # Cov(x_0, x_t)/Var(x_t)
    best = {"eps": eps, "x_start": x_best, "v": signal * eps - (1 - signal.square()).sqrt() * x_best}
    for target in TYPES:
        got = convert_prediction(LINEAR, x_t, t, best[prediction_type], prediction_type, target)
        torch.testing.assert_close(got, best[target], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize(("source", "target"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_rounds_the_result_alone(
    name: str, source: PredictionType, target: PredictionType, dtype: torch.dtype
) -> None:
    """Against float64 of the same numbers: one rounding of the result, and float32's of the two parts."""
    process = PROCESSES[name]
    if not _says(process, source, target):
        return
    t = _ends(process)
    x_t, output = _batch(5, dtype)
    got = convert_prediction(process, x_t, t, output, source, target)
    assert got.dtype == dtype
    expected = convert_prediction(process, x_t.double(), t, output.double(), source, target)
    on_x_t, on_output = (
        table[t].abs().reshape(5, 1, 1, 1) for table in conversion_tables(process, source, target)
    )
    parts = on_x_t * x_t.double().abs() + on_output * output.double().abs()
    info = torch.finfo(dtype)
    allowed = info.eps * expected.abs() + info.smallest_normal * info.eps + 2.0**-22 * parts
    fits = expected.abs() < info.max
    assert int(fits.sum()) >= fits.numel() // 2
    assert bool(((got.double() - expected).abs() <= allowed)[fits].all())


def test_layouts_and_a_batch_of_one() -> None:
    x_t, output = _batch(4, torch.float32)
    t = torch.tensor([0, 5, 500, 999])
    for source, target in PAIRS:
        expected = convert_prediction(LINEAR, x_t, t, output, source, target)
        last = x_t.to(memory_format=torch.channels_last), output.to(memory_format=torch.channels_last)
        assert torch.equal(convert_prediction(LINEAR, last[0], t, last[1], source, target), expected)
        strided = torch.stack((x_t, x_t), -1)[..., 0], output.transpose(2, 3).contiguous().transpose(2, 3)
        assert not strided[0].is_contiguous()
        assert torch.equal(convert_prediction(LINEAR, strided[0], t, strided[1], source, target), expected)
        one = convert_prediction(LINEAR, x_t[2:3], t[2:3], output[2:3], source, target)
        assert torch.equal(one, expected[2:3])


@pytest.mark.parametrize("num_timesteps", [1, 4000])
def test_chains_of_any_length(num_timesteps: int) -> None:
    process = Schedule.from_config(ScheduleConfig(kind="cosine", num_timesteps=num_timesteps))
    x_start, noise = _batch(2)
    t = torch.tensor([0, num_timesteps - 1])
    x_t = q_sample(process, x_start, t, noise)
    v = prediction_target(process, "v", x_start, t, noise)
    torch.testing.assert_close(predict_eps(process, x_t, t, v, "v"), noise)
    torch.testing.assert_close(predict_x_start(process, x_t, t, v, "v"), x_start)


def test_tables_first_asked_for_in_inference_serve_training() -> None:
    process = Schedule.from_config(ScheduleConfig(num_timesteps=30))
    with torch.inference_mode():
        tables = conversion_tables(process, "v", "x_start")
    assert not any(table.is_inference() for table in tables)
    assert conversion_tables(process, "v", "x_start")[0] is tables[0]


def test_gradients_pass_to_the_output_and_to_x_t() -> None:
    x_t, output = (tensor[:, :1, :2, :2].clone().requires_grad_() for tensor in _batch(3))
    t = torch.tensor([0, 300, 999])
    for source, target in PAIRS:
        if source == target:
            continue
        assert torch.autograd.gradcheck(
            lambda x, o, s=source, g=target: convert_prediction(LINEAR, x, t, o, s, g),
            (x_t, output),
            rtol=1e-4,
        )


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("prediction_type", lambda x, t: predict_x_start(LINEAR, x, t, x, "noise")),  # type: ignore[arg-type]
        ("prediction_type", lambda x, t: prediction_target(LINEAR, "noise", x, t, x)),  # type: ignore[arg-type]
        ("prediction_type", lambda x, t: predict_x_start(NO_SIGNAL, x, t, x, "eps")),
        ("prediction_type", lambda x, t: predict_v(STRAIGHT, x, t, x, "eps")),
        ("target", lambda x, t: convert_prediction(LINEAR, x, t, x, "eps", "x_0")),  # type: ignore[arg-type]
        ("noise", lambda x, t: prediction_target(LINEAR, "v", x, t, x[:1])),
        ("output", lambda x, t: predict_x_start(LINEAR, x, t, x[:1], "v")),
        ("output", lambda x, t: predict_v(LINEAR, x, t, x[:1])),
        ("output", lambda x, t: predict_v(LINEAR, x, t, x[:, :2], "eps")),
        ("x_t", lambda x, t: predict_eps(LINEAR, x.long(), t, x)),
        ("t", lambda x, t: predict_eps(LINEAR, x, t + 999, x)),
        ("t", lambda x, t: predict_eps(LINEAR, x, t - 1, x)),
        ("t", lambda x, t: predict_eps(LINEAR, x, t.double(), x)),
        ("t", lambda x, t: predict_eps(LINEAR, x, t[:1], x)),
    ],
)
def test_errors_name_the_argument(name: str, call) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: must "):
        call(torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]))
