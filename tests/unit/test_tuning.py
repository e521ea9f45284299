"""The sweep as plain values: its space, its ranking, its record."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_core.schedules import Schedule, ScheduleConfig
from jobs import tune
from pipelines import tracking, tune_ray
from pipelines.config import Config, load_config
from pipelines.errors import UserError
from pipelines.storage import open_storage
from pipelines.tuning import (
    Trial,
    check_space,
    own_point,
    ranked,
    read_sweep,
    sweep_identity,
    sweep_storage,
    trial_config,
    trial_schedule,
    write_sweep,
)
from tests.support.data import dataset_of
from tests.support.runs import tiny_config


def trial(bits: float | None, **changes: Any) -> Trial:
    values: dict[str, Any] = {
        "num_timesteps": 500,
        "beta_start": 1e-3,
        "beta_end": 0.04,
        "status": "completed" if bits is not None else "failed",
        "step": 300,
        "bits_per_dim": bits,
        "stderr": None if bits is None else 0.1,
        "run": "file:///runs/x",
        "error": None if bits is not None else "it broke",
    }
    return Trial(**{**values, **changes})


@settings(max_examples=60, deadline=None)
@given(
    start=st.floats(1e-5, 5e-3),
    end=st.floats(5e-3, 0.05),
    num_timesteps=st.sampled_from([250, 500, 2000, 4000]),
)
def test_the_chains_end_does_not_depend_on_its_length(start: float, end: float, num_timesteps: int) -> None:
    point = {"beta_start": start, "beta_end": end}
    long = Schedule.from_config(trial_schedule({"num_timesteps": 1000, **point}))
    other = Schedule.from_config(trial_schedule({"num_timesteps": num_timesteps, **point}))
    assert float(other.betas.sum()) == pytest.approx(float(long.betas.sum()), rel=1e-9)
    # ln ᾱ_T = Σ ln(1 − β) differs from −Σβ by half the sum of squares, which grows as T falls
    difference = float(other.log_snr[-1] - long.log_snr[-1])
    squares = 0.5 * float(other.betas.square().sum() - long.betas.square().sum())
    assert difference == pytest.approx(-squares, abs=0.15 * abs(squares) + 0.3)


def test_unscaled_betas_would_be_seen() -> None:
    ends = [
        float(Schedule.from_config(ScheduleConfig("linear", num_timesteps, 1e-4, 0.02)).log_snr[-1])
        for num_timesteps in (250, 1000)
    ]
    assert ends[0] - ends[1] > 5


@pytest.mark.parametrize(
    "schedule",
    [
        ScheduleConfig("linear", 1000, 1e-4, 0.02),
        ScheduleConfig("linear", 300, 3e-4, 0.07),
        load_config("digits.yaml").schedule,
    ],
)
def test_the_own_schedule_is_a_point_of_the_space(schedule: ScheduleConfig) -> None:
    point = own_point(schedule)
    assert point is not None
    again = trial_schedule(point)
    assert (again.kind, again.num_timesteps) == ("linear", schedule.num_timesteps)
    assert again.beta_start == pytest.approx(schedule.beta_start, rel=1e-12)
    assert again.beta_end == pytest.approx(schedule.beta_end, rel=1e-12)


def test_a_cosine_schedule_is_no_point_of_the_space() -> None:
    assert own_point(ScheduleConfig("cosine")) is None
    # no trial of the sweep is rescaled
    assert own_point(ScheduleConfig(zero_terminal_snr=True)) is None


def test_the_shipped_space_is_whole() -> None:
    for name in ("digits.yaml", "cifar10.yaml"):
        check_space(load_config(name))


def test_a_beta_of_one_or_more_is_refused_by_name() -> None:
    config = tiny_config("tune.num_timesteps=[1000, 20]")
    with pytest.raises(UserError, match=r"^tune\.beta_end: 0\.03 scaled to T = 20 is 1\.5: ") as caught:
        check_space(config)
    assert "\n" not in str(caught.value)


def test_every_point_of_a_space_that_passes_is_a_schedule() -> None:
    """Ranges that overlap have points where β falls, which is no schedule; a trial would die of one."""
    for low, high in itertools.product(
        ((1e-4, 5e-3), (1e-4, 0.02), (0.02, 0.02)), ((0.01, 0.03), (0.03, 0.03))
    ):
        config = tiny_config(f"tune.beta_start={list(low)}", f"tune.beta_end={list(high)}")
        if low[1] > high[0]:
            with pytest.raises(
                UserError, match=r"^tune\.beta_end: 0\.01 .*must be at least beta_start \(0\.0"
            ):
                check_space(config)
            continue
        check_space(config)
        for start, end in itertools.product(low, high):
            trial_schedule({"num_timesteps": 1000, "beta_start": start, "beta_end": end})


def test_an_end_that_is_not_noise_is_warned_about() -> None:
    config = tiny_config(
        "tune.num_timesteps=[1000]", "tune.beta_start=[1e-5, 1e-5]", "tune.beta_end=[1e-4, 0.02]"
    )
    warnings = check_space(config)
    assert len(warnings) >= 1
    assert warnings[0].startswith("T = 1000, β_T = 0.0001·1000/T: x_T is not close to N(0, I)")
    assert check_space(tiny_config("tune.num_timesteps=[1000]", "tune.beta_end=[0.02, 0.03]")) == []


def test_a_trial_is_the_base_with_another_schedule_shorter_below_the_sweep(tmp_path: Path) -> None:
    base = tiny_config(
        "tune.steps=40",
        "tune.grace_steps=40",
        "tune.eval_every=20",
        "tune.workers=9",
        "sampler.num_steps=20",
        "seed=3",
    )
    storage = open_storage(str(tmp_path / "sweep"))
    config = trial_config(base, storage, {"num_timesteps": 10, "beta_start": 1e-3, "beta_end": 9e-3})
    assert (config.schedule.kind, config.schedule.num_timesteps) == ("linear", 10)
    assert (config.schedule.beta_start, config.schedule.beta_end) == pytest.approx((0.1, 0.9))
    assert config.storage == storage.uri
    assert (config.train.steps, config.train.eval_every, config.train.checkpoint_every) == (40, 20, 20)
    assert config.workers.num == base.train.micro_batches
    # the sampler has no more steps than the chain
    assert config.sampler.num_steps == 10
    assert (config.seed, config.model, config.optimizer, config.data) == (
        3,
        base.model,
        base.optimizer,
        base.data,
    )
    # it crosses to a worker as text
    assert Config.model_validate(config.model_dump(mode="json")) == config
    whole = trial_config(
        tiny_config("sampler.num_steps=null"),
        storage,
        {"num_timesteps": 10, "beta_start": 1e-3, "beta_end": 9e-3},
    )
    assert whole.sampler.num_steps is None


def test_the_best_is_first_and_what_has_no_result_is_last() -> None:
    trials = [
        trial(None),
        trial(3.0),
        trial(math.nan),
        trial(2.5),
        trial(math.inf),
        trial(2.7, status="stopped"),
    ]
    order = [one.bits_per_dim for one in ranked(trials)]
    assert order[:3] == [2.5, 2.7, 3.0]
    assert min(trials, key=lambda one: one.rank).bits_per_dim == 2.5


def test_of_equals_the_longer_chain_is_first() -> None:
    first = ranked([trial(2.0, num_timesteps=250), trial(2.0, num_timesteps=1000)])[0]
    assert first.num_timesteps == 1000


def test_what_is_plotted() -> None:
    found = trial(2.5).plotted()
    schedule = Schedule.from_config(ScheduleConfig("linear", 500, 1e-3, 0.04))
    assert found["log_snr_end"] == pytest.approx(float(schedule.log_snr[-1]))
    assert found["log_snr_start"] == pytest.approx(float(schedule.log_snr[0]))
    assert (found["bits_per_dim"], found["stderr"], found["status"]) == (2.5, 0.1, "completed")
    failed = trial(None).plotted()
    assert math.isnan(failed["bits_per_dim"])
    assert math.isnan(failed["stderr"])


def test_a_sweep_there_and_back(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    assert read_sweep(storage) is None
    identity = {"seed": 0, "tune": {"steps": 3}}
    trials = [trial(3.0), trial(None), trial(2.0, status="stopped")]
    written = write_sweep(storage, identity, trials)
    assert read_sweep(storage) == written
    assert written.trials == [trials[2], trials[0], trials[1]]
    assert written.identity == identity
    # the first one stands
    assert write_sweep(storage, identity, [trial(1.0)]) == written
    assert [info.key for info in storage.list()] == ["sweep.json"]
    assert json.loads(storage.get("sweep.json"))["format_version"] == 1


def test_a_sweep_with_results_that_are_no_numbers_is_json(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    write_sweep(storage, {}, [trial(math.nan), trial(2.0, stderr=math.nan)])
    json.loads(storage.get("sweep.json"), parse_constant=lambda name: pytest.fail(name))
    found = read_sweep(storage)
    assert found is not None
    assert found.trials[0].bits_per_dim == 2.0


@pytest.mark.parametrize("data", [b'{"format_version": 2}', b"{", b"[]", b'{"format_version": 1}'])
def test_a_record_that_cannot_be_read_is_one_line(tmp_path: Path, data: bytes) -> None:
    storage = open_storage(str(tmp_path))
    storage.put("sweep.json", data)
    with pytest.raises(UserError, match=r"sweep\.json") as caught:
        read_sweep(storage)
    assert "\n" not in str(caught.value)


def test_the_tracking_server_is_told_how_each_trial_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a failed one: its workers may have been lost without a word."""
    statuses = ("completed", "stopped", "failed")
    trials = [trial(1.0, status=status, run=f"file:///runs/{status}") for status in statuses]
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(tune_ray, "run_sweep", lambda *_: trials)
    told: list[tuple[str, str]] = []
    monkeypatch.setattr(tracking, "end_tracking", lambda _, run, end: told.append((run.uri, end)))
    dataset, _ = dataset_of(tmp_path, [1])
    with pytest.raises(UserError, match="1 of 3 trials failed"):
        tune._sweep(tiny_config(), dataset, open_storage(str(tmp_path)))
    assert told == [
        ("file:///runs/completed", "FINISHED"),
        ("file:///runs/stopped", "FINISHED"),
        ("file:///runs/failed", "FAILED"),
    ]


def test_what_makes_a_sweep_another_one() -> None:
    base = tiny_config()
    name = sweep_storage(base, "data").uri
    for change in (
        "seed=1", "tune.seed=1", "tune.num_trials=13", "tune.steps=20001", "tune.num_timesteps=[100]",
        "tune.beta_start=[0.001, 0.002]", "bound.num_strata=3", "bound.num_images=4", "model.base_channels=12",
        "optimizer.learning_rate=0.1", "schedule.beta_end=0.3", "train.batch_size=16",
    ):  # fmt: skip
        assert sweep_storage(tiny_config(change), "data").uri != name, change
    for change in (
        "tune.max_concurrent=5",
        "tune.workers=2",
        "workers.num=2",
        "train.steps=5",
        "sample.count=3",
    ):
        assert sweep_storage(tiny_config(change), "data").uri == name, change
    assert sweep_storage(base, "other data").uri != name
    assert sweep_identity(base, "data")["dataset"] == "data"
