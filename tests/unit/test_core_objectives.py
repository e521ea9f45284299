"""L_simple, the bound and both, their weights, and dropped labels."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ddpm_core import (
    LinearGaussianProcess,
    PredictionType,
    ReverseProcess,
    Schedule,
    ScheduleConfig,
    bound_term,
    q_sample,
    simple_loss,
)
from ddpm_core.objectives import (
    ObjectiveConfig,
    Weighting,
    drop_labels,
    loss_weights,
    training_loss,
)
from ddpm_core.predictions import convert_prediction
from tests.support.oracles import GaussianData, symmetric_grid_at_every_t

LINEAR = Schedule.from_config(ScheduleConfig())
SHORT = Schedule.from_config(ScheduleConfig(num_timesteps=20, beta_start=0.005, beta_end=0.7))
NO_SIGNAL = Schedule(torch.cat((torch.linspace(1e-4, 0.1, 50, dtype=torch.float64), torch.ones(1).double())))
_RISING = torch.linspace(0.01, 1.0, 60, dtype=torch.float64)
EXPLODING = LinearGaussianProcess(torch.zeros(60), torch.linspace(math.log(0.01), math.log(50.0), 60))
STRAIGHT = LinearGaussianProcess(torch.log1p(-_RISING), _RISING.log())
PROCESSES = {
    "linear": LINEAR,
    "short": SHORT,
    "no signal": NO_SIGNAL,
    "exploding": EXPLODING,
    "straight": STRAIGHT,
}
TYPES: tuple[PredictionType, ...] = ("eps", "x_start", "v")
WEIGHTINGS: tuple[Weighting, ...] = ("uniform", "snr", "min_snr", "p2")
HYBRID = ObjectiveConfig(loss="hybrid", variance_type="learned_range")
LEVELS = 17


def _images(batch: int, channels: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Images on 17 levels, both ends among them, and their noise."""
    generator = torch.Generator().manual_seed(1)
    shape = (batch, channels, 2, 2)
    x_start = torch.randint(LEVELS, shape, generator=generator) / 8.0 - 1.0
    return x_start.to(dtype), torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def _network(x_t: Tensor, t: Tensor) -> Tensor:
    return 0.6 * x_t + 0.01 * t.to(x_t.dtype).reshape(-1, 1, 1, 1) * x_t.square()


def _wide_network(x_t: Tensor, t: Tensor) -> Tensor:
    return torch.cat((_network(x_t, t), torch.tanh(x_t)), dim=1)


def _ends(process: LinearGaussianProcess) -> Tensor:
    last = process.num_timesteps - 1
    return torch.tensor([0, 1, last // 2, last - 1, last])


def _trains(process: LinearGaussianProcess, prediction_type: PredictionType) -> bool:
    return prediction_type != "eps" or not process.ends_without_signal


# L_simple


def test_the_default_is_simple_loss_to_the_bit() -> None:
    for dtype in (torch.float32, torch.float64):
        x_start, noise = _images(5, dtype=dtype)
        got = training_loss(_network, LINEAR, ObjectiveConfig(), x_start, _ends(LINEAR), noise)
        assert torch.equal(got, simple_loss(_network, LINEAR, x_start, _ends(LINEAR), noise))


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("prediction_type", TYPES)
def test_simple_is_the_mean_squared_error_of_the_output(name: str, prediction_type: PredictionType) -> None:
    process = PROCESSES[name]
    objective = ObjectiveConfig(prediction_type=prediction_type)
    x_start, noise = _images(5)
    t = _ends(process)
    if not _trains(process, prediction_type):
        with pytest.raises(ValueError, match=r"^prediction_type: must be 'v' or 'x_start'"):
            training_loss(_network, process, objective, x_start, t, noise)
        with pytest.raises(ValueError, match=r"^prediction_type: must be 'v' or 'x_start'"):
            loss_weights(process, objective)
        return
    a, b = (table[t].reshape(5, 1, 1, 1) for table in (process.a, process.b))
    target = {"eps": noise, "x_start": x_start, "v": a * noise - b * x_start}[prediction_type]
    output = _network(a * x_start + b * noise, t)
    expected = (output - target).square().mean((1, 2, 3))
    torch.testing.assert_close(
        training_loss(_network, process, objective, x_start, t, noise), expected, rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("weighting", ["snr", "min_snr", "p2"])
def test_equivalent_outputs_have_equal_losses(name: str, weighting: Weighting) -> None:
    """A weight is one of x̂_0's error, so that one x̂_0 costs the same, whatever the network says to tell it."""
    process = PROCESSES[name]
    x_start, noise = _images(5)
    t = _ends(process)

    def loss(prediction_type: PredictionType) -> Tensor:
        def network(x_t: Tensor, t: Tensor) -> Tensor:
            return convert_prediction(process, x_t, t, _network(x_t, t), "v", prediction_type)

        objective = ObjectiveConfig(prediction_type=prediction_type, weighting=weighting)
        return training_loss(network, process, objective, x_start, t, noise)

    expected = loss("v")
    assert bool((expected[:-1] > 0).all())
    for prediction_type in TYPES:
        if _trains(process, prediction_type):
            torch.testing.assert_close(loss(prediction_type), expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("prediction_type", TYPES)
def test_weights_are_their_definitions(name: str, prediction_type: PredictionType) -> None:
    process = PROCESSES[name]
    if not _trains(process, prediction_type):
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


# the bound and the hybrid


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
    x_start, noise = _images(5)
    t = _ends(SHORT)
    hybrid = dataclasses.replace(HYBRID, prediction_type=prediction_type, weighting="min_snr", vlb_weight=0.3)
    got = training_loss(_wide_network, SHORT, hybrid, x_start, t, noise, levels=LEVELS)
    simple = ObjectiveConfig(prediction_type=prediction_type, weighting="min_snr")
    vlb = ObjectiveConfig(prediction_type=prediction_type, loss="vlb", variance_type="learned_range")
    expected = training_loss(_network, SHORT, simple, x_start, t, noise)
    expected = expected + 0.3 * training_loss(_wide_network, SHORT, vlb, x_start, t, noise, levels=LEVELS)
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
    x_start, noise = _images(5)
    t = _ends(SHORT)
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
        return _network(x_t, t) if loss == "simple" else _wide_network(x_t, t)

    x_start, noise = _images(2)
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
    x_start, noise = _images(3, channels=1)
    t = torch.tensor([0, 9, 19])
    output = _network(q_sample(SHORT, x_start, t, noise), t)
    if objective.variance_type == "learned_range":
        output = torch.cat((output, 0.3 * x_start), dim=1)

    def loss(output: Tensor) -> Tensor:
        return training_loss(lambda x, t: output, SHORT, objective, x_start, t, noise, levels=LEVELS)

    assert torch.autograd.gradcheck(loss, (output.requires_grad_(),), rtol=1e-5)


def test_gradient_of_the_hybrid_with_respect_to_v() -> None:
    x_start, noise = _images(3, channels=1)
    t = torch.tensor([0, 9, 19])
    prediction = _network(q_sample(SHORT, x_start, t, noise), t)
    hybrid = dataclasses.replace(HYBRID, vlb_weight=1.0)

    def loss(v: Tensor) -> Tensor:
        output = torch.cat((prediction, v), dim=1)
        return training_loss(lambda x, t: output, SHORT, hybrid, x_start, t, noise, levels=LEVELS)

    assert torch.autograd.gradcheck(loss, (0.3 * x_start.clone().requires_grad_(),), rtol=1e-5)


def _every_objective() -> list[ObjectiveConfig]:
    return [*OBJECTIVES, *(dataclasses.replace(HYBRID, prediction_type=p) for p in TYPES)]


@pytest.mark.parametrize(
    "objective", _every_objective(), ids=lambda o: f"{o.prediction_type}-{o.loss}-{o.weighting}"
)
def test_dtypes_layouts_and_a_batch_of_one(objective: ObjectiveConfig) -> None:
    network = _wide_network if objective.variance_type == "learned_range" else _network
    x_start, noise = _images(4)
    t = torch.tensor([0, 1, 9, 19])

    def loss(x_start: Tensor, noise: Tensor, t: Tensor = t) -> Tensor:
        return training_loss(network, SHORT, objective, x_start, t, noise, levels=LEVELS)

    exact = loss(x_start, noise)
    assert exact.dtype == torch.float64
    assert exact.shape == (4,)
    for dtype, rtol in ((torch.float32, 1e-3), (torch.bfloat16, 0.5)):
        got = loss(x_start.to(dtype), noise.to(dtype))
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), exact, rtol=rtol, atol=rtol)
    last = loss(*(tensor.to(memory_format=torch.channels_last) for tensor in (x_start, noise)))
    torch.testing.assert_close(last, exact, rtol=1e-12, atol=0)
    strided = loss(*(torch.stack((tensor, tensor), -1)[..., 0] for tensor in (x_start, noise)))
    torch.testing.assert_close(strided, exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss(x_start[2:3], noise[2:3], t[2:3]), exact[2:3], rtol=1e-12, atol=0)


@pytest.mark.parametrize("num_timesteps", [1, 4000])
@pytest.mark.parametrize(
    "objective", _every_objective(), ids=lambda o: f"{o.prediction_type}-{o.loss}-{o.weighting}"
)
def test_chains_of_any_length(objective: ObjectiveConfig, num_timesteps: int) -> None:
    process = Schedule.from_config(ScheduleConfig(kind="cosine", num_timesteps=num_timesteps))
    network = _wide_network if objective.variance_type == "learned_range" else _network
    x_start, noise = _images(2)
    t = torch.tensor([0, num_timesteps - 1])
    got = training_loss(network, process, objective, x_start, t, noise, levels=LEVELS)
    assert bool(got.isfinite().all())


def test_a_network_in_another_dtype_does_not_change_that_of_the_loss() -> None:
    x_start, noise = _images(4, dtype=torch.float32)
    t = torch.tensor([0, 1, 9, 19])
    for objective in (ObjectiveConfig(), ObjectiveConfig(weighting="p2"), ObjectiveConfig(loss="vlb")):
        got = training_loss(
            lambda x, t: _network(x, t).double(), SHORT, objective, x_start, t, noise, levels=LEVELS
        )
        assert got.dtype == torch.float32


def test_an_output_under_autocast_is_not_rounded_further() -> None:
    x_start, noise = _images(4, dtype=torch.float32)
    t = torch.tensor([0, 1, 9, 19])

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        return _wide_network(x_t, t).bfloat16()

    for objective in (HYBRID, ObjectiveConfig(loss="vlb", variance_type="learned_range")):
        got = training_loss(network, SHORT, objective, x_start, t, noise, levels=LEVELS)
        exact = training_loss(
            lambda x, t: network(x.float(), t).double(),
            SHORT, objective, x_start.double(), t, noise.double(), levels=LEVELS,
        )  # fmt: skip
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-5)


# dropped labels


def test_dropped_labels_are_keyed_and_as_many_as_asked_for() -> None:
    index = torch.arange(20_000)
    labels = index % 10
    got = drop_labels(labels, 10, 0.1, 3, index)
    dropped = got == 10
    assert torch.equal(got[~dropped], labels[~dropped])
    assert abs(int(dropped.sum()) - 2000) < 5 * math.sqrt(20_000 * 0.1 * 0.9)
    assert torch.equal(drop_labels(labels[70:80], 10, 0.1, 3, index[70:80]), got[70:80])
    assert torch.equal(drop_labels(labels.flip(0), 10, 0.1, 3, index.flip(0)), got.flip(0))
    assert not torch.equal(drop_labels(labels, 10, 0.1, 4, index), got)
    # the more are dropped, the more; none of them comes back
    assert bool((drop_labels(labels, 10, 0.3, 3, index)[dropped] == 10).all())


def test_no_label_or_every_label_is_dropped() -> None:
    index = torch.arange(1000)
    labels = index % 10
    assert torch.equal(drop_labels(labels, 10, 0.0, 0, index), labels)
    assert drop_labels(labels, 10, 1.0, 0, index).unique().tolist() == [10]
    assert drop_labels(labels[:1], 10, 1.0, 0, index[:1]).tolist() == [10]
    assert drop_labels(labels[:0], 10, 0.5, 0, index[:0]).tolist() == []
    assert labels.unique().tolist() == list(range(10))


# errors


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("prediction_type", {"prediction_type": "noise"}),
        ("loss", {"loss": "l1"}),
        ("weighting", {"weighting": "sigmoid"}),
        ("variance_type", {"variance_type": "analytic"}),
        ("variance_type", {"loss": "hybrid"}),
        ("variance_type", {"loss": "hybrid", "variance_type": "fixed_large"}),
        ("variance_type", {"variance_type": "learned_range"}),
        ("weighting", {"loss": "vlb", "weighting": "snr"}),
        ("timestep_sampling", {"timestep_sampling": "importance"}),
        ("min_snr_gamma", {"min_snr_gamma": 0.0}),
        ("min_snr_gamma", {"min_snr_gamma": math.nan}),
        ("min_snr_gamma", {"min_snr_gamma": math.inf}),
        ("p2_k", {"p2_k": 0.0}),
        ("p2_k", {"p2_k": math.nan}),
        ("p2_gamma", {"p2_gamma": -0.5}),
        ("p2_gamma", {"p2_gamma": math.inf}),
        ("vlb_weight", {"vlb_weight": -1e-3}),
        ("vlb_weight", {"vlb_weight": math.nan}),
    ],
)
def test_a_wrong_configuration_names_its_field(name: str, fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: must be .*, got "):
        ObjectiveConfig(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("levels", lambda x, t: training_loss(_wide_network, SHORT, HYBRID, x, t, x)),
        ("levels", lambda x, t: training_loss(_network, SHORT, ObjectiveConfig(loss="vlb"), x, t, x)),
        (
            "levels",
            lambda x, t: training_loss(_network, SHORT, ObjectiveConfig(loss="vlb"), x, 0 * t, x, levels=1),
        ),
        ("eps_theta's output", lambda x, t: training_loss(_network, SHORT, HYBRID, x, t, x, levels=9)),
        ("eps_theta's output", lambda x, t: training_loss(_wide_network, SHORT, ObjectiveConfig(), x, t, x)),
        ("noise", lambda x, t: training_loss(_network, SHORT, ObjectiveConfig(), x, t, x[:1])),
        ("x_start", lambda x, t: training_loss(_network, SHORT, ObjectiveConfig(), x.long(), t, x)),
        ("t", lambda x, t: training_loss(_network, SHORT, ObjectiveConfig(), x, t + 20, x)),
        ("t", lambda x, t: training_loss(_network, SHORT, ObjectiveConfig(), x, t - 8, x)),
        ("t", lambda x, t: training_loss(_network, SHORT, ObjectiveConfig(), x, t.double(), x)),
        ("labels", lambda x, t: drop_labels(t.int(), 10, 0.1, 0, t)),
        ("labels", lambda x, t: drop_labels(t[:1], 10, 0.1, 0, t)),
        ("index", lambda x, t: drop_labels(t, 10, 0.1, 0, t.double())),
        ("probability", lambda x, t: drop_labels(t, 10, 1.1, 0, t)),
        ("probability", lambda x, t: drop_labels(t, 10, math.nan, 0, t)),
        ("seed", lambda x, t: drop_labels(t, 10, 0.1, 0.5, t)),  # type: ignore[arg-type]
    ],
)
def test_errors_name_the_argument(name: str, call) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: must "):
        call(torch.zeros(2, 1, 4, 4), torch.tensor([3, 7]))


def _losses(x_start: Tensor, noise: Tensor) -> list[Callable[[], Tensor]]:
    """Every way to ask for a loss."""
    t = torch.tensor([3, 7])

    def of(network: Callable[[Tensor, Tensor], Tensor], objective: ObjectiveConfig) -> Tensor:
        return training_loss(network, SHORT, objective, x_start, t, noise, levels=LEVELS)

    return [
        lambda: simple_loss(_network, SHORT, x_start, t, noise),
        lambda: of(_network, ObjectiveConfig()),
        lambda: of(_network, ObjectiveConfig(loss="vlb")),
        lambda: of(_wide_network, HYBRID),
    ]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["x_start", "noise"])
def test_what_is_not_finite_is_refused_by_name_and_place(name: str, bad: float) -> None:
    tensors = {"x_start": torch.zeros(2, 1, 4, 4), "noise": torch.zeros(2, 1, 4, 4)}
    tensors[name][1, 0, 2, 3] = bad
    for loss in _losses(**tensors):
        with pytest.raises(ValueError, match=rf"^{name}: must be finite, got {bad} at \[1, 0, 2, 3\]"):
            loss()


def test_images_without_a_dimension_are_refused_by_name() -> None:
    for loss in _losses(torch.zeros(2), torch.zeros(2)):
        with pytest.raises(ValueError, match=r"^x_start: must have the shape \[B, ...\], got \[2\]"):
            loss()


def test_simple_loss_refuses_eps_without_signal() -> None:
    x_start, noise = _images(5)
    with pytest.raises(ValueError, match=r"^prediction_type: must be 'v' or 'x_start'"):
        simple_loss(_network, NO_SIGNAL, x_start, _ends(NO_SIGNAL), noise)
    for prediction_type in ("x_start", "v"):
        got = simple_loss(_network, NO_SIGNAL, x_start, _ends(NO_SIGNAL), noise, prediction_type)
        assert bool(got.isfinite().all())
