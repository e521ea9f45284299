"""Arguments of the wrong type, and values that mean nothing: a ValueError names the argument, not another error."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ddpm_core import (
    EMA,
    DiffusionChain,
    DiTConfig,
    GaussianHierarchy,
    HalfLife,
    LossMoments,
    ObjectiveConfig,
    Profile,
    ReverseProcess,
    SamplerConfig,
    Schedule,
    ScheduleConfig,
    UNetConfig,
    bound_from_curve,
    bound_term,
    drop_labels,
    ema_decay,
    guided,
    karras_log_snr,
    path_terms,
    q_sample,
    rng,
    sample,
    simple_loss,
    snr_integral,
    training_loss,
    trajectory,
    variance_exploding,
)
from ddpm_core.conditioning import log_snr_embedding, timestep_embedding
from ddpm_core.posthoc_ema import gamma_from_sigma_rel, sigma_rel_from_gamma
from ddpm_core.reverse import dynamic_threshold
from ddpm_core.steps import Step, advance, ddim_tables
from ddpm_core.timesteps import draw_by_probability, second_moment_probabilities
from tests.support.core_example import labelled_network, network

SHORT = Schedule.from_config(ScheduleConfig(num_timesteps=6, beta_start=0.02, beta_end=0.6))
REVERSE = ReverseProcess(SHORT, "v", clip=False)
X, NOISE, T = torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4), torch.tensor([0, 5])
INDEX = torch.tensor([3, 4])
TABLE = torch.full((6, 10), 0.1, dtype=torch.float64)


def _sampled(**changed: Any) -> Any:
    given = {"seed": 0, "index": INDEX, "shape": (1, 4, 4), **changed}
    return sample(network, SHORT, SamplerConfig(num_steps=2), **given)


def _moments(**changed: Any) -> LossMoments:
    moments = LossMoments(6)
    moments.load({"losses": TABLE, "counts": torch.full((6,), 10), **changed})
    return moments


def _average(**changed: Any) -> EMA:
    average = EMA(nn.Linear(1, 1), 0.9)
    average.load({"weight": torch.ones(1, 1), "bias": torch.ones(1), **changed})
    return average


def _as_integers(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return x_t.long()


MEANINGLESS: list[tuple[str, Callable[[], object]]] = [
    ("dtype", lambda: _sampled(dtype=torch.int64)),
    ("dtype", lambda: _sampled(dtype="float32")),
    ("dtype", lambda: rng.normal(0, "p", INDEX, (2,), dtype=torch.int64)),
    ("shape", lambda: _sampled(shape=())),
    ("shape", lambda: _sampled(shape=(1, 0, 4))),
    ("shape", lambda: _sampled(shape=(1, 4.0, 4))),
    ("shape", lambda: _sampled(shape=4)),
    ("shape", lambda: rng.normal(0, "p", INDEX, (-2,))),
    ("shape", lambda: rng.uniform(0, "p", INDEX, (2.0,))),  # type: ignore[arg-type]
    ("decay", lambda: ema_decay(math.nan, True, 1)),
    ("decay", lambda: ema_decay(1.0, False, 1)),
    ("step", lambda: ema_decay(0.9, True, -1)),
    ("step", lambda: ema_decay(0.9, False, 1.5)),  # type: ignore[arg-type]
    ("losses", lambda: _moments(losses=TABLE * math.nan)),
    ("counts", lambda: _moments(counts=torch.full((6,), -1))),
    ("tensors['weight']", lambda: _average(weight=torch.full((1, 1), math.nan))),
    ("tensors['bias']", lambda: _average(bias=torch.full((1,), math.inf))),
    ("tensors['bias']", lambda: _average(bias=torch.ones(1, dtype=torch.int64))),
    ("curve", lambda: snr_integral(lambda level: level * math.nan, -1.0, 1.0)),
    ("curve", lambda: snr_integral(lambda level: level[:3], -1.0, 1.0)),
    ("mean_square", lambda: bound_from_curve(SHORT, torch.exp, decoder=1.0, mean_square=math.inf)),
    ("eps_theta's output", lambda: simple_loss(_as_integers, SHORT, X, T, NOISE)),
    ("eps_theta's output", lambda: training_loss(_as_integers, SHORT, ObjectiveConfig(), X, T, NOISE)),
    ("eps_theta's output", lambda: bound_term(_as_integers, REVERSE, X, T, NOISE, levels=9)),
    ("channels", lambda: timestep_embedding(T, 7)),
    ("channels", lambda: timestep_embedding(T, 2)),
    ("channels", lambda: log_snr_embedding(torch.zeros(2), 7)),
    ("x_start", lambda: dynamic_threshold(X[:, :, :0], 0.9)),
    ("channel_mults", lambda: UNetConfig(8, 1, channel_mults=2)),  # type: ignore[arg-type]
    ("dims", lambda: GaussianHierarchy(3)),  # type: ignore[arg-type]
    ("path", lambda: path_terms(DiffusionChain(network, REVERSE), 3)),  # type: ignore[arg-type]
    ("null_label", lambda: drop_labels(INDEX, 4.5, 0.5, 0, INDEX)),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(
    ("name", "call"), MEANINGLESS, ids=lambda case: case if isinstance(case, str) else ""
)
def test_what_means_nothing_is_named(name: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError) as refusal:
        call()
    assert str(refusal.value).startswith(f"{name}: must ")


def test_what_a_sampler_is_asked_for_is_what_it_gives() -> None:
    for shape in ((1, 4, 4), (7,), [2, 3]):
        assert _sampled(shape=shape).shape == (2, *shape)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert _sampled(dtype=dtype).dtype == dtype


def test_losses_below_0_are_losses() -> None:
    moments = LossMoments(6)
    moments.update(T, torch.tensor([-1.0, 2.0]))
    assert float(moments.tensors["losses"][0, 0]) == -1.0


def test_a_refused_load_changes_nothing() -> None:
    average, moments = _average(), _moments()
    with pytest.raises(ValueError, match="bias"):
        average.load({"weight": torch.zeros(1, 1), "bias": torch.full((1,), math.nan)})
    assert float(average.tensors["weight"]) == 1.0
    with pytest.raises(ValueError, match="counts"):
        moments.load({"losses": 2 * TABLE, "counts": torch.full((6,), -1)})
    assert torch.equal(moments.tensors["losses"], TABLE)


def test_a_buffer_may_hold_infinity() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))
            self.register_buffer("mask", torch.tensor([0.0, -math.inf]))

    average = EMA(Masked(), 0.9)
    average.load(average.tensors)
    assert float(average.tensors["mask"][1]) == -math.inf


Case = tuple[str, Callable[[Any], object]]

NO_TENSORS = [[[1.0]], None, 3, 1.5, X.numpy(), "x"]
TENSORS: list[Case] = [
    ("x_start", lambda wrong: q_sample(SHORT, wrong, T, NOISE)),
    ("t", lambda wrong: q_sample(SHORT, X, wrong, NOISE)),
    ("noise", lambda wrong: q_sample(SHORT, X, T, wrong)),
    ("x_start", lambda wrong: simple_loss(network, SHORT, wrong, T, NOISE)),
    ("t", lambda wrong: simple_loss(network, SHORT, X, wrong, NOISE)),
    ("noise", lambda wrong: training_loss(network, SHORT, ObjectiveConfig(), X, T, wrong)),
    ("eps_theta's output", lambda wrong: simple_loss(lambda x_t, t: wrong, SHORT, X, T, NOISE)),
    ("eps_theta's output", lambda wrong: bound_term(lambda x, t: wrong, REVERSE, X, T, NOISE, levels=9)),
    ("betas", Schedule.from_betas),
    ("alphas_cumprod", Schedule.from_alphas_cumprod),
    ("log_snr", Schedule.from_log_snr),
    ("timesteps", SHORT.at),
    ("index", lambda wrong: _sampled(index=wrong)),
    ("index", lambda wrong: rng.integers(0, "p", wrong, 5)),
    ("labels", lambda wrong: guided(labelled_network, wrong, 4, 2.0)),
    ("t", lambda wrong: timestep_embedding(wrong, 8)),
    ("x_start", lambda wrong: dynamic_threshold(wrong, 0.9)),
    ("x_t", lambda wrong: advance(Step(1.0, 1.0, 0.0, 0.0), wrong, X)),
    ("pred_x_start", lambda wrong: advance(Step(1.0, 1.0, 0.0, 0.0), X, wrong)),
    ("probabilities", lambda wrong: draw_by_probability(wrong, 0, INDEX)),
    ("loss", lambda wrong: LossMoments(6).update(T, wrong)),
    ("t", lambda wrong: LossMoments(6).update(wrong, torch.ones(2))),
    ("losses", lambda wrong: _moments(losses=wrong)),
    ("tensors['bias']", lambda wrong: _average(bias=wrong)),
    ("curve", lambda wrong: snr_integral(lambda level: wrong, -1.0, 1.0)),
]


@pytest.mark.parametrize("wrong", NO_TENSORS, ids=lambda wrong: type(wrong).__name__)
@pytest.mark.parametrize(("name", "call"), TENSORS, ids=lambda case: case if isinstance(case, str) else "")
def test_what_is_no_tensor_is_named(name: str, call: Callable[[Any], object], wrong: Any) -> None:
    with pytest.raises(ValueError) as refusal:
        call(wrong)
    assert str(refusal.value) == f"{name}: must be a tensor, got {type(wrong).__name__}"


def _fields(
    config: Callable[..., Any], *names: str, **fixed: Any
) -> list[tuple[str, Callable[[Any], object]]]:
    def made(name: str) -> Callable[[Any], object]:
        return lambda wrong: config(**{**fixed, name: wrong})

    return [(name, made(name)) for name in names]


NUMBERS: list[Case] = [
    *_fields(SamplerConfig, "eta", "karras_rho"),
    *_fields(
        ScheduleConfig,
        *(
            "beta_start",
            "beta_end",
            "cosine_s",
            "beta_max",
            "warmup_fraction",
            "sigmoid_start",
            "sigmoid_end",
        ),
        *("sigmoid_tau", "log_snr_max", "log_snr_min"),
    ),
    *_fields(ObjectiveConfig, "min_snr_gamma", "p2_gamma", "p2_k", "vlb_weight", "label_dropout"),
    *_fields(UNetConfig, "dropout", image_size=16, in_channels=1),
    *_fields(DiTConfig, "mlp_ratio", image_size=8, in_channels=1),
    *_fields(HalfLife, "images", batch_size=2),
    *_fields(Profile, "gamma", step=2),
    ("scale", lambda wrong: guided(labelled_network, INDEX, 4, wrong)),
    ("sigma_min", lambda wrong: variance_exploding(5, sigma_min=wrong)),
    ("sigma_max", lambda wrong: variance_exploding(5, sigma_max=wrong)),
    ("rho", lambda wrong: karras_log_snr(1.0, -1.0, 3, wrong)),
    ("smallest", lambda wrong: karras_log_snr(1.0, wrong, 3)),
    ("probability", lambda wrong: drop_labels(INDEX, 4, wrong, 0, INDEX)),
    ("quantile", lambda wrong: dynamic_threshold(X, wrong)),
    ("eta", lambda wrong: ddim_tables(SHORT, wrong)),
    ("decay", lambda wrong: EMA(nn.Linear(1, 1), wrong)),
    ("low", lambda wrong: snr_integral(torch.exp, wrong, 1.0)),
    ("mean_square", lambda wrong: bound_from_curve(SHORT, torch.exp, decoder=1.0, mean_square=wrong)),
    ("uniform_share", lambda wrong: second_moment_probabilities(TABLE, torch.full((6,), 10), wrong)),
    ("gamma", sigma_rel_from_gamma),
    ("sigma_rel", gamma_from_sigma_rel),
]


@pytest.mark.parametrize("wrong", ["1", None, (1.0,), True], ids=repr)
@pytest.mark.parametrize(("name", "call"), NUMBERS, ids=lambda case: case if isinstance(case, str) else "")
def test_what_is_no_number_is_named(name: str, call: Callable[[Any], object], wrong: Any) -> None:
    with pytest.raises(ValueError) as refusal:
        call(wrong)
    assert str(refusal.value) == f"{name}: must be a number, got {wrong!r}"


@pytest.mark.parametrize("wrong", ["1", (1.0,), True], ids=repr)
def test_nor_is_it_where_none_will_do(wrong: Any) -> None:
    for name, none, call in (
        ("threshold_quantile", "null", lambda: SamplerConfig(threshold_quantile=wrong)),
        ("threshold_quantile", "null", lambda: ReverseProcess(SHORT, threshold_quantile=wrong)),
        ("ramp_ratio", "None", lambda: HalfLife(100, 2, wrong)),
    ):
        with pytest.raises(ValueError) as refusal:
            call()
        assert str(refusal.value) == f"{name}: must be a number or {none}, got {wrong!r}"


def test_whole_numbers_and_those_of_numpy_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    assert SamplerConfig(eta=1).eta == 1
    assert SamplerConfig(eta=numpy.float32(0.5)).eta == 0.5
    assert HalfLife(100, 2, None).decay(3) == 0.5**0.02
    assert (
        len(list(trajectory(network, SHORT, SamplerConfig(num_steps=2), seed=0, index=INDEX, shape=(1,))))
        == 2
    )
