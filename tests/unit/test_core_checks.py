"""The looks at arguments: what they cost, what they let pass, and whole numbers that are none."""

import gc
import math
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_core import (
    BoundAccumulator,
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
    bound_term,
    convert_prediction,
    discretized_gaussian_log_likelihood,
    guided,
    karras_log_snr,
    path_bound,
    predict_x_start,
    q_sample,
    rectified_flow,
    respaced_timesteps,
    rng,
    simple_loss,
    training_loss,
    two_sided_term,
    variance_exploding,
)
from ddpm_core._checks import check_finite
from ddpm_core.bound import stratify
from ddpm_core.chains import karras_timesteps
from ddpm_core.objectives import loss_weights
from ddpm_core.predictions import conversion_tables
from tests.support.core_example import network, wide_network

SHORT = Schedule.from_config(ScheduleConfig(num_timesteps=6, beta_start=0.02, beta_end=0.6))


def test_a_sum_that_overflows_is_no_infinity() -> None:
    check_finite("x", torch.full((2, 40_000), 60_000.0, dtype=torch.float16))
    check_finite("x", torch.full((3,), 3e38))
    check_finite("x", torch.tensor([]))
    for bad in (math.nan, math.inf, -math.inf):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            x = torch.full((2, 3), 60_000.0, dtype=dtype)
            x[1, 2] = bad
            with pytest.raises(ValueError, match=rf"^x: must be finite, got {bad} at \[1, 2\]$"):
                check_finite("x", x)
    # whose sum is no number, and which it is not either
    with pytest.raises(ValueError, match=r"^x: must be finite, got inf at \[0\]$"):
        check_finite("x", torch.tensor([math.inf, -math.inf]))


def test_the_look_is_one_pass_and_keeps_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    exact = Tensor.isfinite

    def counted(tensor: Tensor) -> Tensor:
        seen.append(tensor.numel())
        return exact(tensor)

    monkeypatch.setattr(Tensor, "isfinite", counted)
    check_finite("x", torch.ones(1000, requires_grad=True))
    assert seen == [1]


def test_an_accelerator_and_a_compiler_are_not_made_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    check_finite("x", torch.full((2,), math.nan, device="meta"))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    check_finite("x", torch.tensor([math.nan]))


def _looks(monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]) -> list[int]:
    """The addresses of what check_finite is asked for, in all modules."""
    seen: list[int] = []

    def look(name: str, tensor: Tensor) -> None:
        seen.append(tensor.data_ptr())

    for name, module in list(sys.modules.items()):
        if name.startswith("ddpm_core.") and hasattr(module, "check_finite"):
            monkeypatch.setattr(module, "check_finite", look)
    call()
    return seen


_X = torch.zeros(2, 1, 2, 2)
_NOISE = torch.ones(2, 1, 2, 2)
_T = torch.tensor([0, 4])
_REVERSE = ReverseProcess(SHORT, "v", clip=False)
_HYBRID = ObjectiveConfig(loss="hybrid", variance_type="learned_range")


@pytest.mark.parametrize(
    "call",
    [
        lambda x, noise: q_sample(SHORT, x, _T, noise),
        lambda x, noise: simple_loss(network, SHORT, x, _T, noise),
        lambda x, noise: training_loss(network, SHORT, ObjectiveConfig(weighting="p2"), x, _T, noise),
        lambda x, noise: training_loss(network, SHORT, ObjectiveConfig(loss="vlb"), x, _T, noise, levels=3),
        lambda x, noise: training_loss(wide_network, SHORT, _HYBRID, x, _T, noise, levels=3),
        lambda x, noise: bound_term(network, _REVERSE, x, _T, noise, levels=3),
        lambda x, noise: predict_x_start(SHORT, x, _T, noise),
        lambda x, noise: discretized_gaussian_log_likelihood(x, noise, torch.zeros(1), 3),
    ],
)  # fmt: skip
def test_each_tensor_is_looked_at_once(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = _looks(monkeypatch, lambda: call(_X, _NOISE))
    assert seen.count(_X.data_ptr()) == 1
    assert seen.count(_NOISE.data_ptr()) == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda x: two_sided_term(network, _REVERSE, x, torch.tensor([0, 3]), torch.ones(3, *x.shape)),
        lambda x: path_bound(DiffusionChain(network, _REVERSE), x, seed=0, index=_T),
        lambda x: BoundAccumulator(_REVERSE, levels=3, num_strata=3, seed=0).add(network, x, _T),
        lambda x: BoundAccumulator(
            _REVERSE, levels=3, num_strata=3, seed=0, decomposition="two_sided"
        ).add(network, x, _T),
    ],
)  # fmt: skip
def test_images_are_looked_at_once(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _looks(monkeypatch, lambda: call(_X)).count(_X.data_ptr()) == 1


@pytest.mark.parametrize("loss", ["simple", "vlb", "hybrid"])
def test_a_network_s_nan_is_in_the_loss(loss: Any) -> None:
    """It is the training loop that looks for it, and says that training diverged."""
    variance: Any = "learned_range" if loss == "hybrid" else "fixed_small"
    net = wide_network if loss == "hybrid" else network
    objective = ObjectiveConfig(loss=loss, variance_type=variance)
    got = training_loss(lambda x, t: net(x, t) * math.nan, SHORT, objective, _X, _T, _NOISE, levels=3)
    assert bool(got.isnan().all())


NO_INTEGERS = (10.5, 10.0, True, "10", math.nan, torch.tensor(10))


@pytest.mark.parametrize("value", NO_INTEGERS, ids=repr)
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("num_timesteps", lambda v: ScheduleConfig(num_timesteps=v)),
        ("num_timesteps", lambda v: variance_exploding(v)),
        ("num_timesteps", lambda v: rectified_flow(v)),
        ("num_timesteps", lambda v: LossMoments(v)),
        ("num_timesteps", lambda v: respaced_timesteps(v, 5)),
        ("num_steps", lambda v: respaced_timesteps(20, v)),
        ("num_steps", lambda v: karras_timesteps(SHORT, v)),
        ("num_steps", lambda v: SamplerConfig(num_steps=v)),
        ("num_points", lambda v: karras_log_snr(1.0, 0.0, v)),
        ("num_strata", lambda v: BoundAccumulator(_REVERSE, levels=3, num_strata=v, seed=0)),
        ("num_strata", lambda v: stratify(SHORT, v)),
        ("levels", lambda v: BoundAccumulator(_REVERSE, levels=v, num_strata=2, seed=0)),
        ("levels", lambda v: bound_term(network, _REVERSE, _X, _T, _NOISE, levels=v)),
        ("levels", lambda v: bound_term(network, _REVERSE, _X, _T + 1, _NOISE, levels=v)),
        ("levels", lambda v: discretized_gaussian_log_likelihood(_X, _X, _X, v)),
        ("levels", lambda v: DiffusionChain(network, _REVERSE, levels=v)),
        (
            "levels",
            lambda v: training_loss(network, SHORT, ObjectiveConfig(loss="vlb"), _X, _T, _X, levels=v),
        ),
        ("dims", lambda v: GaussianHierarchy((v, 2))),
        ("hidden", lambda v: GaussianHierarchy((2, 2), v)),
        ("batch_size", lambda v: HalfLife(100.0, v)),
        ("step", lambda v: HalfLife(100.0, 5).decay(v)),
        ("step", lambda v: Profile(v, 1.0)),
        ("null_label", lambda v: guided(network, _T, v, 1.0)),  # type: ignore[arg-type]
        ("high", lambda v: rng.integers(0, "a", _T, v)),
        ("draw", lambda v: rng.normal(0, "a", _T, (2,), draw=v)),
        ("seed", lambda v: rng.normal(v, "a", _T, (2,))),
        ("image_size", lambda v: UNetConfig(v, 1)),
        ("in_channels", lambda v: UNetConfig(8, v)),
        ("num_classes", lambda v: UNetConfig(8, 1, num_classes=v)),
        ("base_channels", lambda v: UNetConfig(8, 1, v)),
        ("channel_mults", lambda v: UNetConfig(8, 1, 8, (1, v))),
        ("num_res_blocks", lambda v: UNetConfig(8, 1, 8, (1, 2), v)),
        ("attention_resolutions", lambda v: UNetConfig(8, 1, 8, (1, 2), 1, (v,))),
        ("num_groups", lambda v: UNetConfig(8, 1, 8, (1, 2), 1, (4,), num_groups=v)),
        ("num_heads", lambda v: UNetConfig(8, 1, 8, (1, 2), 1, (4,), num_heads=v)),
        ("head_channels", lambda v: UNetConfig(8, 1, 8, (1, 2), 1, (4,), num_groups=4, head_channels=v)),
        ("patch_size", lambda v: DiTConfig(8, 1, v)),
        ("hidden_size", lambda v: DiTConfig(8, 1, 2, v)),
        ("depth", lambda v: DiTConfig(8, 1, depth=v)),
        ("num_heads", lambda v: DiTConfig(8, 1, num_heads=v)),
    ],
)  # fmt: skip
def test_what_is_no_whole_number_is_named(name: str, call: Any, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: must be an int"):
        call(value)


def test_a_whole_number_of_numpy_is_one() -> None:
    numpy = pytest.importorskip("numpy")
    assert Schedule.from_config(ScheduleConfig(num_timesteps=numpy.int64(7))).num_timesteps == 7


@pytest.mark.parametrize(
    "follow",
    [
        lambda process: convert_prediction(process, _X, _T, _X, "v", "eps"),
        lambda process: training_loss(
            network, process, ObjectiveConfig(weighting="min_snr"), _X, _T, _NOISE
        ),
        lambda process: loss_weights(process, ObjectiveConfig(weighting="p2")),
    ],
)  # fmt: skip
def test_what_follows_from_a_process_goes_with_it(follow: Any) -> None:
    process = Schedule.from_config(ScheduleConfig(num_timesteps=6))
    follow(process)
    gone = weakref.ref(process)
    del process
    gc.collect()
    assert gone() is None


def test_what_follows_from_a_process_is_computed_once() -> None:
    first = conversion_tables(SHORT, "v", "eps")
    assert conversion_tables(SHORT, "v", "eps") is first
    assert conversion_tables(SHORT, "eps", "v") is not first
