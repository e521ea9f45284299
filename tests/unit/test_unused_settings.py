"""A setting that nothing reads costs a line; the table of what is read where is compared with what is computed."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import pytest
import torch

from ddpm_core.betas import ScheduleConfig, ScheduleKind
from ddpm_core.objectives import ObjectiveConfig, loss_weights
from ddpm_core.samplers import SAMPLER_KINDS, SamplerConfig, sample
from ddpm_core.schedules import Schedule
from pipelines.config import parse_config
from pipelines.errors import UserError
from pipelines.unused_settings import USES, Use
from tests.support.runs import TINY, tiny_config

T = 20
GIVEN = {"betas": (0.1,) * T, "alphas_cumprod": tuple(0.9**number for number in range(1, T + 1))}
OTHER: dict[str, Any] = {
    "beta_start": 2e-4, "beta_end": 0.3, "cosine_s": 0.05, "beta_max": 0.3, "warmup_fraction": 0.6,
    "sigmoid_start": -2.0, "sigmoid_end": 2.0, "sigmoid_tau": 0.7, "log_snr_max": 9.0, "log_snr_min": -9.0,
    "betas": (0.2,) * T, "alphas_cumprod": tuple(0.8**number for number in range(1, T + 1)),
}  # fmt: skip


def problems(*overrides: str, text: str = TINY) -> list[str]:
    with pytest.raises(UserError) as caught:
        parse_config(text, overrides, where="my.yaml")
    return str(caught.value).splitlines()


def uses_of(section: str) -> dict[str, Use]:
    return {name: use for use in USES if use.section == section for name in use.names}


@pytest.mark.parametrize("kind", get_args(ScheduleKind))
def test_of_a_schedule_just_what_changes_its_betas_has_a_use(kind: ScheduleKind) -> None:
    # beta_max cuts nothing off where T is so large; linear_scaled wants beta_end below T/1000
    own: dict[str, Any] = {
        "kind": kind, "num_timesteps": T, **({kind: GIVEN[kind]} if kind in GIVEN else {}),
        **({"beta_start": 1e-4, "beta_end": 0.01} if kind == "linear_scaled" else {}),
    }  # fmt: skip
    other = OTHER | ({"beta_end": 0.015} if kind == "linear_scaled" else {})
    before = Schedule.from_config(ScheduleConfig(**own)).betas
    names = {field.name for field in dataclasses.fields(ScheduleConfig)} - {"kind", "num_timesteps"}
    for name in sorted(names - {"zero_terminal_snr"}):
        changed = Schedule.from_config(ScheduleConfig(**{**own, name: other[name]})).betas
        # β_1 of the constant schedule is not read, but a smaller β_T needs it
        reads = not torch.equal(changed, before) or (kind, name) == ("constant", "beta_start")
        assert (kind in uses_of("schedule")[name].values) == reads, name


@pytest.mark.parametrize("weighting", ["uniform", "snr", "min_snr", "p2"])
def test_of_an_objective_just_what_changes_its_weights_has_a_use(weighting: Any) -> None:
    schedule = Schedule.from_config(ScheduleConfig(num_timesteps=T, beta_end=0.3))
    before = loss_weights(schedule, ObjectiveConfig(weighting=weighting))
    for name in ("min_snr_gamma", "p2_gamma", "p2_k"):
        change: dict[str, Any] = {name: 2.5}
        changed = loss_weights(schedule, ObjectiveConfig(weighting=weighting, **change))
        assert (weighting in uses_of("objective")[name].values) == (not torch.equal(changed, before)), name


@pytest.mark.parametrize("spacing", ["linspace", "karras"])
@pytest.mark.parametrize("kind", SAMPLER_KINDS)
def test_of_a_sampler_just_what_changes_its_images_has_a_use(kind: Any, spacing: Any) -> None:
    schedule = Schedule.from_config(ScheduleConfig(num_timesteps=T, beta_end=0.3))

    def made(**changes: Any) -> torch.Tensor:
        config = SamplerConfig(kind, 5, **{"spacing": spacing, **changes})
        return sample(lambda x, t: 0.3 * x, schedule, config, seed=0, index=torch.arange(2), shape=(1, 2, 2))

    changes = {"eta": 0.8, "variance_type": "fixed_small", "karras_rho": 1.0}
    for name, value in changes.items():
        use = uses_of("sampler")[name]
        chosen = kind if use.by == "sampler.kind" else spacing
        assert (chosen in use.values) == (not torch.equal(made(), made(**{name: value}))), name


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ("schedule.cosine_s=0.01",),
            "schedule.cosine_s: has no effect as schedule.kind is 'linear' (it needs 'cosine'), got 0.01",
        ),
        (
            ("schedule.beta_max=0.9",),
            "schedule.beta_max: has no effect as schedule.kind is 'linear' (it needs 'cosine' or 'sigmoid'), got "
            "0.9",
        ),
        (
            ("schedule.betas=[0.1]",),
            "schedule.betas: has no effect as schedule.kind is 'linear' (it needs 'betas'), got [0.1]",
        ),
        (
            ("objective.variance_type=fixed_large",),
            "objective.variance_type: has no effect as objective.loss is 'simple' (it needs 'vlb' or 'hybrid'), "
            "got 'fixed_large'",
        ),
        (
            ("objective.label_dropout=0.2",),
            "objective.label_dropout: has no effect as model.num_classes is null (it needs a value), got 0.2",
        ),
        (
            ("sampler.kind=heun", "sampler.eta=1"),
            "sampler.eta: has no effect as sampler.kind is 'heun' (it needs 'ddim'), got 1.0",
        ),
        (
            ("sampler.variance_type=fixed_small",),
            "sampler.variance_type: has no effect as sampler.kind is 'ddim' (it needs 'ancestral'), got "
            "'fixed_small'",
        ),
        (
            ("sampler.karras_rho=3",),
            "sampler.karras_rho: has no effect as sampler.spacing is 'linspace' (it needs 'karras'), got 3.0",
        ),
    ],
)
def test_a_setting_without_effect_is_one_line(overrides: tuple[str, ...], line: str) -> None:
    assert problems(*overrides) == [f"my.yaml: {line}; leave it out"]


def test_each_is_named_also_those_of_the_file() -> None:
    text = TINY.replace("beta_end: 0.2", "beta_end: 0.2, kind: cosine, sigmoid_tau: 2")
    assert [line.split(": ")[1] for line in problems("objective.p2_k=2", text=text)] == [
        "schedule.beta_end",
        "schedule.sigmoid_tau",
        "objective.p2_k",
    ]


def test_what_is_said_at_its_default_is_no_mistake() -> None:
    said = (
        "schedule.cosine_s=0.008",
        "objective.p2_k=1",
        "sampler.variance_type=fixed_large",
        "schedule.betas=[]",
    )
    assert tiny_config(*said) == tiny_config()
    # a network's second half makes it right for every sampler
    learned = ("model.learned_variance=true", "objective.loss=hybrid", "objective.variance_type=learned_range",
               "bound.variance_type=learned_range", "sampler.variance_type=learned_range")  # fmt: skip
    assert tiny_config(*learned).sampler.kind == "ddim"


def test_what_lost_its_use_by_an_override_is_as_if_it_were_not_there() -> None:
    # the file says beta_end
    short = TINY.replace(", beta_end: 0.2", ", kind: cosine")
    assert tiny_config("schedule.kind=cosine") == parse_config(short)
    text = TINY.replace("num_steps: 5", "num_steps: 5, eta: 1")
    assert parse_config(text, ["sampler.kind=heun"]) == tiny_config("sampler.kind=heun")
    # not if the override says it as well
    assert len(problems("sampler.kind=heun", "sampler.eta=1", text=text)) == 1
    assert len(problems("schedule={num_timesteps: 50, beta_end: 0.3}", "schedule.kind=cosine")) == 1
