"""Objectives: dtypes, layouts and chains of every kind, and what is refused."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ddpm_core import Schedule, ScheduleConfig, simple_loss
from ddpm_core.objectives import ObjectiveConfig, drop_labels, training_loss
from tests.support.objectives import (
    HYBRID,
    LEVELS,
    NO_SIGNAL,
    SHORT,
    TYPES,
    WEIGHTINGS,
    ends,
    images,
    some_network,
    wide_network,
)

OBJECTIVES = [
    *(ObjectiveConfig(prediction_type=p, weighting=w) for p in TYPES for w in WEIGHTINGS),
    *(ObjectiveConfig(prediction_type=p, loss="vlb") for p in TYPES),
    *(ObjectiveConfig(prediction_type=p, loss="vlb", variance_type="learned_range") for p in TYPES),
]


def _every_objective() -> list[ObjectiveConfig]:
    return [*OBJECTIVES, *(dataclasses.replace(HYBRID, prediction_type=p) for p in TYPES)]


@pytest.mark.parametrize(
    "objective", _every_objective(), ids=lambda o: f"{o.prediction_type}-{o.loss}-{o.weighting}"
)
def test_dtypes_layouts_and_a_batch_of_one(objective: ObjectiveConfig) -> None:
    network = wide_network if objective.variance_type == "learned_range" else some_network
    x_start, noise = images(4)
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
    network = wide_network if objective.variance_type == "learned_range" else some_network
    x_start, noise = images(2)
    t = torch.tensor([0, num_timesteps - 1])
    got = training_loss(network, process, objective, x_start, t, noise, levels=LEVELS)
    assert bool(got.isfinite().all())


def test_a_network_in_another_dtype_does_not_change_that_of_the_loss() -> None:
    x_start, noise = images(4, dtype=torch.float32)
    t = torch.tensor([0, 1, 9, 19])
    for objective in (ObjectiveConfig(), ObjectiveConfig(weighting="p2"), ObjectiveConfig(loss="vlb")):
        got = training_loss(
            lambda x, t: some_network(x, t).double(), SHORT, objective, x_start, t, noise, levels=LEVELS
        )
        assert got.dtype == torch.float32


def test_an_output_under_autocast_is_not_rounded_further() -> None:
    x_start, noise = images(4, dtype=torch.float32)
    t = torch.tensor([0, 1, 9, 19])

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        return wide_network(x_t, t).bfloat16()

    for objective in (HYBRID, ObjectiveConfig(loss="vlb", variance_type="learned_range")):
        got = training_loss(network, SHORT, objective, x_start, t, noise, levels=LEVELS)
        exact = training_loss(
            lambda x, t: network(x.float(), t).double(),
            SHORT, objective, x_start.double(), t, noise.double(), levels=LEVELS,
        )  # fmt: skip
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-5)


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
        ("levels", lambda x, t: training_loss(wide_network, SHORT, HYBRID, x, t, x)),
        ("levels", lambda x, t: training_loss(some_network, SHORT, ObjectiveConfig(loss="vlb"), x, t, x)),
        (
            "levels",
            lambda x, t: training_loss(
                some_network, SHORT, ObjectiveConfig(loss="vlb"), x, 0 * t, x, levels=1
            ),
        ),
        ("eps_theta's output", lambda x, t: training_loss(some_network, SHORT, HYBRID, x, t, x, levels=9)),
        ("eps_theta's output", lambda x, t: training_loss(wide_network, SHORT, ObjectiveConfig(), x, t, x)),
        ("noise", lambda x, t: training_loss(some_network, SHORT, ObjectiveConfig(), x, t, x[:1])),
        ("x_start", lambda x, t: training_loss(some_network, SHORT, ObjectiveConfig(), x.long(), t, x)),
        ("t", lambda x, t: training_loss(some_network, SHORT, ObjectiveConfig(), x, t + 20, x)),
        ("t", lambda x, t: training_loss(some_network, SHORT, ObjectiveConfig(), x, t - 8, x)),
        ("t", lambda x, t: training_loss(some_network, SHORT, ObjectiveConfig(), x, t.double(), x)),
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
        lambda: simple_loss(some_network, SHORT, x_start, t, noise),
        lambda: of(some_network, ObjectiveConfig()),
        lambda: of(some_network, ObjectiveConfig(loss="vlb")),
        lambda: of(wide_network, HYBRID),
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
    x_start, noise = images(5)
    with pytest.raises(ValueError, match=r"^prediction_type: must be 'v' or 'x_start'"):
        simple_loss(some_network, NO_SIGNAL, x_start, ends(NO_SIGNAL), noise)
    for prediction_type in ("x_start", "v"):
        got = simple_loss(some_network, NO_SIGNAL, x_start, ends(NO_SIGNAL), noise, prediction_type)
        assert bool(got.isfinite().all())
