"""The configuration: what is a mistake and how it is told, and what a run's identity depends on."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_core.dit import DiTConfig
from ddpm_core.unet import UNetConfig
from pipelines.config import Config, _from_yaml, digest, load_config, parse_config
from pipelines.errors import UserError
from pipelines.plan import network_bytes
from pipelines.telling import validated
from tests.support.runs import TINY, tiny_config

CONFIGS = Path(__file__).resolve().parents[2] / "jobs" / "configs"
SHIPPED = sorted(path.name for path in CONFIGS.glob("*.yaml"))


def problem(text: str, *overrides: str) -> str:
    """The one line that a wrong configuration costs."""
    with pytest.raises(UserError) as caught:
        parse_config(text, overrides, where="my.yaml")
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_configurations_load_by_name_and_by_path(name: str) -> None:
    config = load_config(name)
    assert config == load_config(CONFIGS / name)
    assert config.name == name.removesuffix(".yaml")


def test_cifar10_has_the_published_hyper_parameters() -> None:
    config = load_config("cifar10.yaml")
    assert (config.schedule.kind, config.schedule.num_timesteps) == ("linear", 1000)
    assert (config.schedule.beta_start, config.schedule.beta_end) == (1e-4, 0.02)
    assert (config.train.batch_size, config.train.steps, config.optimizer.learning_rate) == (
        128,
        800_000,
        2e-4,
    )
    assert (config.ema.decay, config.optimizer.grad_clip, config.optimizer.warmup_steps) == (
        0.9999,
        1.0,
        5000,
    )
    assert isinstance(config.model, UNetConfig)
    assert (config.model.dropout, config.data.flip, config.optimizer.adam_betas) == (0.1, True, (0.9, 0.999))


def test_what_improved_ddpm_changed() -> None:
    config, before = load_config("cifar10-improved.yaml"), load_config("cifar10.yaml")
    assert isinstance(config.model, UNetConfig)
    assert (config.schedule.kind, config.schedule.num_timesteps) == ("cosine", 4000)
    assert (config.objective.loss, config.objective.vlb_weight) == ("hybrid", 0.001)
    assert (config.model.num_heads, config.model.num_res_blocks, config.model.dropout) == (4, 3, 0.3)
    assert (config.data, config.prepare, config.train.batch_size) == (before.data, before.prepare, 128)
    text = (CONFIGS / "cifar10-improved.yaml").read_text()
    assert f"({network_bytes(config.model)[0]:,} parameters)" in text
    assert SHIPPED == ["cifar10-improved.yaml", "cifar10.yaml", "digits.yaml"]


def laptop_overrides() -> list[str]:
    """The settings of cifar10.yaml with a value for a laptop, as overrides with that value."""
    found, section = [], ""
    for line in (CONFIGS / "cifar10.yaml").read_text().splitlines():
        if named := re.fullmatch(r"(\w+):", line):
            section = f"{named[1]}."
        elif marked := re.fullmatch(r"( *)(\w+): \S+  # laptop: (\S+)", line):
            found.append(f"{section if marked[1] else ''}{marked[2]}={marked[3]}")
        else:
            assert line.startswith("#") or "laptop" not in line, line
    return found


def test_cifar10_on_a_laptop() -> None:
    overrides = laptop_overrides()
    config, published = load_config("cifar10.yaml", overrides), load_config("cifar10.yaml")
    assert (config.workers.num, config.workers.gpus) == (1, 0)
    assert not config.storage.startswith("s3://")
    assert not config.data.uri.startswith("s3://")
    # each is another value than the published one, and the README names exactly these
    assert all(load_config("cifar10.yaml", [one]) != published for one in overrides if "unit_size" not in one)
    readme = (CONFIGS.parents[1] / "README.md").read_text()
    told = readme.partition("These must change:")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"`([a-z_.]+)`", told)) == sorted(one.split("=")[0] for one in overrides)


def test_a_file_of_ones_own_wins_over_a_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "digits.yaml").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    assert load_config("digits.yaml").name == "tiny"


@pytest.mark.parametrize("path", ["missing.yaml", "elsewhere/digits.yaml"])
def test_a_missing_file(path: str) -> None:
    with pytest.raises(UserError, match=f"^{path}: no such configuration file$"):
        load_config(path)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(UserError, match=r"x\.yaml: .*UTF-8"):
        load_config(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trian.steps=3", "my.yaml: trian: no such setting; did you mean 'train'?"),
        ("train.step=3", "my.yaml: train.step: no such setting; did you mean 'steps'?"),
        (
            "schedule.beta_strat=0.1",
            "my.yaml: schedule.beta_strat: no such setting; did you mean 'beta_start'?",
        ),
        (
            "ema.x=1",
            "my.yaml: ema.x: no such setting; there are decay, warmup, half_life_images, ramp_ratio, "
            "power_sigma_rels",
        ),
        (
            "ema.half_life_images=9",
            "my.yaml: ema.decay: must be left out beside half_life_images, got 0.9",
        ),
        (
            "ema={half_life_images: 9, warmup: false}",
            "my.yaml: ema.warmup: must be left out beside half_life_images, got False",
        ),
        (
            "ema.half_life_images=0",
            "my.yaml: ema.half_life_images: input should be greater than 0, got 0",
        ),
        (
            "ema.ramp_ratio=0.05",
            "my.yaml: ema.ramp_ratio: must be null without half_life_images, got 0.05",
        ),
        (
            "ema.power_sigma_rels=[0.05, 0.3]",
            "my.yaml: ema.power_sigma_rels: must be different lengths between 1e-06 and 0.2887 (12**-0.5), got 0.3",
        ),
        (
            "ema.power_sigma_rels=[0.05, 0.05]",
            "my.yaml: ema.power_sigma_rels: must be different lengths between 1e-06 and 0.2887 (12**-0.5), "
            "got 0.05",
        ),
        (
            "train.steps=1.5",
            "my.yaml: train.steps: input should be a valid integer, got a number with a fractional part, got 1.5",
        ),
        (
            "train.steps=many",
            "my.yaml: train.steps: input should be a valid integer, unable to parse string as an integer, "
            "got 'many'",
        ),
        ("train.steps=0", "my.yaml: train.steps: input should be greater than or equal to 1, got 0"),
        ("train.micro_batches=3", "my.yaml: train.micro_batches: must divide batch_size 8, got 3"),
        ("sample.batch_size=3", "my.yaml: sample.batch_size: must divide unit_size 4, got 3"),
        (
            "prepare.png_encoder=zopfli",
            "my.yaml: prepare.png_encoder: input should be 'pillow' or 'fpng', got 'zopfli'",
        ),
        (
            "sample.png_encoder=fpng",
            "my.yaml: sample.png_encoder: must be pillow for images that are not RGB (model.in_channels 1), got "
            "'fpng'",
        ),
        (
            "workers.num=5",
            "my.yaml: workers.num: must be at most train.micro_batches 4, got 5; each worker takes whole "
            "micro-batches",
        ),
        (
            "schedule.beta_end=2",
            "my.yaml: schedule.beta_end: must be at least beta_start (0.0001) and below 1, got 2.0",
        ),
        ("model.base_channels=7", "my.yaml: model.base_channels: must be even and at least 4, got 7"),
        (
            "model.channel_mults=[1,a]",
            "my.yaml: model.channel_mults[1]: input should be a valid integer, unable to parse string as an "
            "integer, got 'a'",
        ),
        (
            "sampler.kind=euler",
            "my.yaml: sampler.kind: input should be 'ancestral', 'ddim', 'dpm_solver_pp_2m', "
            "'dpm_solver_pp_2m_sde' or 'heun', got 'euler'",
        ),
        ("sampler.eta=2", "my.yaml: sampler.eta: must be between 0 and 1, got 2.0"),
        (
            "tune.beta_start=[0.5, 0.1]",
            "my.yaml: tune.beta_start: must be a range [low, high] in (0, 1), got [0.5, 0.1]",
        ),
        (
            "tune.grace_steps=20001",
            "my.yaml: tune.grace_steps: must be at most tune.steps 20000, got 20001; "
            "no trial could be stopped early",
        ),
        (
            "sampler.num_steps=51",
            "my.yaml: sampler.num_steps: must be at most schedule.num_timesteps 50, got 51; null visits all",
        ),
        (
            "optimizer.learning_rate=.nan",
            "my.yaml: optimizer.learning_rate: input should be a finite number, got nan",
        ),
        (
            "optimizer.learning_rate=.inf",
            "my.yaml: optimizer.learning_rate: input should be a finite number, got inf",
        ),
        ("workers.cpus=.inf", "my.yaml: workers.cpus: input should be a finite number, got inf"),
        (
            "data.flip=maybe",
            "my.yaml: data.flip: input should be a valid boolean, unable to interpret input, got 'maybe'",
        ),
        (
            "name=No Spaces",
            "my.yaml: name: string should match pattern '^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$', got 'No Spaces'",
        ),
        ("train.steps=", "my.yaml: train.steps: input should be a valid integer, got nothing"),
        ("name=true", "my.yaml: name: input should be a valid string, got true"),
        ("data.reader=", "my.yaml: data.reader: input should be 'thread' or 'process', got nothing"),
        (
            "data.stages=augment.shift",
            "my.yaml: data.stages: must be a list, such as [augment.shift], got 'augment.shift'",
        ),
        (
            "data.stages=[{name: a.b, arg: 3}]",
            "my.yaml: data.stages[0].arg: no such setting; did you mean 'args'?",
        ),
        (
            "data.stages=[{name: a.b, name: c.d}]",
            "--set data.stages=[{name: a.b, name: c.d}]: name is there twice",
        ),
        (
            "storage=https://me:secret@host/x",
            "my.yaml: storage: must be s3://BUCKET/PREFIX or a folder, got 'https://host/x'",
        ),
        ("data=", "my.yaml: data: must hold settings, got nothing"),
        ("schedule=3", "my.yaml: schedule: must hold settings, got 3"),
        ("train.steps", "--set train.steps: must be section.key=value"),
        ("=3", "--set =3: must be section.key=value"),
        ("name.x=3", "--set name.x=3: name is a value, not a section"),
        ("seed=[1", "--set seed=[1: the value is not valid YAML"),
        # YAML reads this as a date, and there is none such
        ("name=2024-13-45", "--set name=2024-13-45: the value is not valid YAML"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_field(override: str, message: str) -> None:
    assert problem(TINY, override) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "my.yaml: must hold sections such as `data:` and `model:`, got NoneType"),
        ("- 1", "my.yaml: must hold sections such as `data:` and `model:`, got list"),
        (
            "name: a\ndata: [",
            "my.yaml line 2: not valid YAML: expected the node content, but found '<stream end>'",
        ),
        # the first section would go unread
        (f"{TINY}train:\n  steps: 3\n", "my.yaml line 19: not valid YAML: train is there twice"),
        ("name: a\nseed: 1\nseed: 1\n", "my.yaml line 3: not valid YAML: seed is there twice"),
    ],
)
def test_a_file_that_is_no_configuration(text: str, message: str) -> None:
    assert problem(text) == message


def test_keys_that_are_merged_are_no_second_ones() -> None:
    text = "a: &A {x: 1}\nb: {inner: &B {<<: *A, x: 2}}\nc: {<<: *B, y: 3}"
    assert _from_yaml(text) == {"a": {"x": 1}, "b": {"inner": {"x": 2}}, "c": {"x": 2, "y": 3}}


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        parse_config(text, overrides, where="my.yaml")
    return str(caught.value).splitlines()


def test_every_wrong_field_is_named_on_a_line_of_its_own() -> None:
    assert problems("name: x") == [
        "my.yaml: data: is required and missing",
        "my.yaml: model: is required and missing",
    ]
    assert problems(
        TINY, "train.steps=0", "schedule.beta_strat=1", "nonsense.x=1", "optimizer.adam_eps=-1"
    ) == [
        "my.yaml: schedule.beta_strat: no such setting; did you mean 'beta_start'?",
        "my.yaml: optimizer.adam_eps: input should be greater than 0, got -1",
        "my.yaml: train.steps: input should be greater than or equal to 1, got 0",
        "my.yaml: nonsense: no such setting; there are name, seed, data, prepare, schedule, model, objective, "
        "optimizer, ema, train, bound, sampler, sample, tune, workers, storage, tracking",
    ]
    # checks over several fields of a section, beside others
    assert problems(TINY, "train.micro_batches=3", "tune.beta_start=[2, 3]", "tune.beta_end=[0.5, 0.1]") == [
        "my.yaml: train.micro_batches: must divide batch_size 8, got 3",
        "my.yaml: tune.beta_start: must be a range [low, high] in (0, 1), got [2.0, 3.0]",
        "my.yaml: tune.beta_end: must be a range [low, high] in (0, 1), got [0.5, 0.1]",
    ]


def test_every_wrong_override_is_named() -> None:
    assert problems(TINY, "nonsense", "seed=[1", "train.steps=3") == [
        "--set nonsense: must be section.key=value",
        "--set seed=[1: the value is not valid YAML",
    ]


@pytest.mark.parametrize("text", ["name: x\x00y", "name: 2024-13-45", "name: !!python/object:os.system x"])
def test_what_yaml_itself_refuses_is_one_line(text: str) -> None:
    assert problem(text).startswith("my.yaml")


VLB = ("objective.loss=vlb", "objective.variance_type=learned_range")
HAS_CHANNELS = "as model.learned_variance is true"
NO_CHANNELS = "as model.learned_variance is false"


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (
            ("model.learned_variance=true",),
            [
                f"objective.variance_type: must be 'learned_range', {HAS_CHANNELS}, got 'fixed_small'",
                f"bound.variance_type: must be 'learned_range', {HAS_CHANNELS}, got 'fixed_small'",
            ],
        ),
        (
            (
                "model.learned_variance=true",
                *VLB,
                "bound.variance_type=learned_range",
                "sampler.kind=ancestral",
            ),
            [
                f"sampler.variance_type: must be 'learned_range' for the kind 'ancestral', {HAS_CHANNELS}, "
                "got 'fixed_large'"
            ],
        ),
        (
            (*VLB, "bound.variance_type=learned_range", "sampler.variance_type=learned_range"),
            [
                f"objective.variance_type: must be 'fixed_small' or 'fixed_large', {NO_CHANNELS}: the network has "
                "no channels for a variance, got 'learned_range'",
                f"bound.variance_type: must be 'fixed_small' or 'fixed_large', {NO_CHANNELS}: the network has "
                "no channels for a variance, got 'learned_range'",
                f"sampler.variance_type: must be 'fixed_small' or 'fixed_large', {NO_CHANNELS}, "
                "got 'learned_range'",
            ],
        ),
        (
            ("sampler.variance_type=analytic",),
            [
                "sampler.variance_type: must be 'fixed_small' or 'fixed_large', got 'analytic', for which nothing "
                "here measures the network's error at every t"
            ],
        ),
        (
            ("bound.variance_type=analytic",),
            [
                "bound.variance_type: input should be 'fixed_small', 'fixed_large' or 'learned_range', "
                "got 'analytic'"
            ],
        ),
        (
            ("schedule.zero_terminal_snr=true",),
            [
                "objective.prediction_type: must be 'v' or 'x_start' for a schedule that ends without signal "
                "(schedule.kind 'linear', schedule.zero_terminal_snr true), got 'eps', which says nothing of x_0 "
                "there"
            ],
        ),
        (
            ("schedule.kind=log_snr", "schedule.log_snr_min=-200"),
            [
                "objective.prediction_type: must be 'v' or 'x_start' for a schedule that ends without signal "
                "(schedule.kind 'log_snr', schedule.zero_terminal_snr false), got 'eps', which says nothing of x_0 "
                "there"
            ],
        ),
        (
            ("schedule.kind=inverse",),
            [
                "objective.prediction_type: must be 'v' or 'x_start' for a schedule that ends without signal "
                "(schedule.kind 'inverse', schedule.zero_terminal_snr false), got 'eps', which says nothing of x_0 "
                "there"
            ],
        ),
        (
            ("schedule.kind=betas",),
            ["schedule.betas: must be 50 numbers (num_timesteps), got '0'"],
        ),
        (
            ("schedule.kind=log_snr", "schedule.log_snr_max=1000"),
            [
                "schedule: betas: must lie between 0 and 1, both excluded (1 is allowed at the last step), got 0.0 "
                "at 0"
            ],
        ),
    ],
)
def test_sections_that_contradict_each_other(overrides: tuple[str, ...], messages: list[str]) -> None:
    found = problems(TINY, *overrides)
    assert len(found) == len(messages)
    for line, message in zip(found, messages, strict=True):
        assert line == f"my.yaml: {message}"


@pytest.mark.parametrize("end", ["schedule.zero_terminal_snr=true", "schedule.kind=inverse"])
@pytest.mark.parametrize("said", ["v", "x_start"])
def test_a_chain_may_end_without_signal_if_not_eps_is_predicted(end: str, said: str) -> None:
    assert tiny_config(end, f"objective.prediction_type={said}")


def test_an_empty_sweep_is_a_mistake() -> None:
    assert "tune.num_timesteps" in problem(TINY, "tune.num_timesteps=[]")


def test_overrides_reach_every_kind_of_value() -> None:
    config = tiny_config(
        "seed=7",
        "data.flip=false",
        "schedule.beta_end=2e-1",
        "model.channel_mults=[1, 1, 2]",
        "model.attention_resolutions=[]",
        "sampler.num_steps=null",
        "storage=s3://b/p=q",
        "prepare.levels=17",
    )
    assert (config.seed, config.data.flip, config.schedule.beta_end) == (7, False, 0.2)
    assert isinstance(config.model, UNetConfig)
    assert (config.model.channel_mults, config.model.attention_resolutions) == ((1, 1, 2), ())
    assert (config.sampler.num_steps, config.storage, config.prepare.levels) == (None, "s3://b/p=q", 17)


WHERE_AND_HOW_LONG = [
    "data.uri=s3://other/place", "data.cache_bytes=2097152", "data.disk_cache=none",
    "data.disk_cache_bytes=1000", "data.decode_threads=2", "data.reader=process",
    "data.on_bad_sample=skip", "data.max_bad_share=0.5", "storage=elsewhere", "workers.num=3",
    "workers.cpus=2", "workers.gpus=1", "workers.max_failures=9", "tracking.experiment=other", "train.steps=7",
    "train.log_every=3", "train.eval_every=3", "train.checkpoint_every=3", "train.keep_checkpoints=9",
    "bound.num_strata=5", "bound.num_images=9", "sampler.kind=ancestral", "sampler.num_steps=3", "sample.count=5",
    "sample.seed=3", "tune.num_trials=3", "tune.workers=2", "prepare.levels=5", "prepare.png_encoder=fpng",
    "model.gradient_checkpointing=true",
]  # fmt: skip
LEARNED = (
    "model.learned_variance=true & objective.loss=hybrid & objective.variance_type=learned_range & "
    "bound.variance_type=learned_range"
)
COSINE, SIGMOID, LOG_SNR = (f"schedule.kind={kind}" for kind in ("cosine", "sigmoid", "log_snr"))
WHAT = [
    "name=other", "seed=1", "data.flip=false", "schedule.kind=cosine", "schedule.num_timesteps=51",
    "schedule.beta_start=0.0002", "schedule.beta_end=0.3", f"{COSINE} & schedule.cosine_s=0.01",
    f"{COSINE} & schedule.beta_max=0.9", "schedule.kind=warmup",
    "schedule.kind=warmup & schedule.warmup_fraction=0.2",
    f"{SIGMOID} & schedule.sigmoid_start=-2", f"{SIGMOID} & schedule.sigmoid_end=2",
    f"{SIGMOID} & schedule.sigmoid_tau=2", f"{LOG_SNR} & schedule.log_snr_max=9",
    f"{LOG_SNR} & schedule.log_snr_min=-9",
    f"schedule.kind=betas & schedule.betas={[0.1] * 50}",
    f"schedule.kind=alphas_cumprod & schedule.alphas_cumprod={[0.9**number for number in range(1, 51)]}",
    "schedule.zero_terminal_snr=true & objective.prediction_type=x_start",
    "model.base_channels=12", "model.channel_mults=[1, 1]", "model.num_res_blocks=2",
    "model.attention_resolutions=[8]", "model.dropout=0.1", "model.num_groups=2", "model.image_size=16",
    "model.in_channels=3", "model.scale_shift_norm=true", "model.num_heads=2", "model.head_channels=4",
    LEARNED, "model.num_classes=10", "model.conditioning=log_snr",
    "optimizer.learning_rate=0.002", "optimizer.adam_betas=[0.9, 0.99]",
    "optimizer.adam_eps=1e-7", "optimizer.warmup_steps=6", "optimizer.grad_clip=2", "ema.decay=0.8",
    "ema.warmup=false", "ema={half_life_images: 1000}", "ema={half_life_images: 1000, ramp_ratio: 0.05}",
    "ema.power_sigma_rels=[0.05]", "train.batch_size=16", "train.micro_batches=2",
    "train.precision=bfloat16", "train.precision=float32", "train.compile=true",
    "data.stages=[a.b]", "data.stages=[{name: a.b, args: {}}]",
    "objective.prediction_type=v", "objective.loss=vlb",
    "objective.loss=vlb & objective.variance_type=fixed_large",
    "objective.weighting=snr", "objective.weighting=min_snr",
    "objective.weighting=min_snr & objective.min_snr_gamma=4",
    "objective.weighting=p2", "objective.weighting=p2 & objective.p2_gamma=2",
    "objective.weighting=p2 & objective.p2_k=2",
    f"{LEARNED} & objective.vlb_weight=0.01", "objective.timestep_sampling=loss_second_moment",
    "model.num_classes=10 & objective.label_dropout=0.2",
]  # fmt: skip


def test_what_follows_another_setting_unless_it_is_given() -> None:
    usual = tiny_config().tune
    assert (usual.steps, usual.eval_every, usual.grace_steps) == (20_000, 2000, 4000)
    short = tiny_config("tune.steps=1000").tune
    assert (short.eval_every, short.grace_steps) == (100, 200)
    shortest = tiny_config("tune.steps=1").tune
    assert (shortest.eval_every, shortest.grace_steps) == (1, 1)
    given = tiny_config("tune.steps=1000", "tune.eval_every=7", "tune.grace_steps=9").tune
    assert (given.eval_every, given.grace_steps) == (7, 9)
    text = TINY.replace("sampler: {num_steps: 5}\n", "")
    assert parse_config(text, ["schedule.num_timesteps=60"]).sampler.num_steps == 50
    assert parse_config(text, ["schedule.num_timesteps=49"]).sampler.num_steps is None


def test_where_and_how_long_do_not_change_the_run() -> None:
    base = tiny_config()
    assert [o for o in WHERE_AND_HOW_LONG if tiny_config(o).run_name("data") != base.run_name("data")] == []
    # each of them is a change, though
    assert [o for o in WHERE_AND_HOW_LONG if tiny_config(o) == base] == []


def test_every_part_of_what_changes_the_run_to_another_one() -> None:
    names = [tiny_config(*one.split(" & ")).run_name("data") for one in ("seed=0", *WHAT)]
    assert len(set(names)) == len(names)
    assert tiny_config().run_name("other data") not in names


DIT = (
    "model={kind: dit, image_size: 8, in_channels: 1, patch_size: 4, hidden_size: 8, depth: 1, num_heads: 2, "
    "mlp_ratio: 2}"
)
WHAT_OF_DIT = [
    "model.patch_size=2", "model.hidden_size=16", "model.depth=2", "model.num_heads=1", "model.mlp_ratio=3",
    "model.image_size=16", "model.in_channels=3", LEARNED, "model.num_classes=10",
    "model.conditioning=log_snr",
]  # fmt: skip


def test_a_model_is_a_unet_unless_it_says_otherwise() -> None:
    assert tiny_config().model == tiny_config("model.kind=unet").model
    assert isinstance(tiny_config().model, UNetConfig)
    assert tiny_config(DIT).model == DiTConfig(8, 1, 4, 8, 1, 2, 2.0)


def test_every_part_of_a_transformer_changes_the_run() -> None:
    names = [tiny_config(DIT, *one.split(" & ")).run_name("d") for one in ("seed=0", *WHAT_OF_DIT)]
    assert len({*names, tiny_config().run_name("d")}) == len(names) + 1
    told = {override.split(".")[1].split("=")[0] for override in WHAT_OF_DIT}
    assert {field.name for field in fields(DiTConfig)} == told | {"kind", "gradient_checkpointing"}
    same = tiny_config(DIT, "model.gradient_checkpointing=true")
    assert same.run_name("d") == names[0]
    assert parse_config(same.to_yaml()) == same


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.kind=resnet", "model.kind: must be 'unet' or 'dit', got 'resnet'"),
        ("model.kind=null", "model.kind: must be 'unet' or 'dit', got nothing"),
        ("model=3", "model: must hold settings, got 3"),
        ("model.dept=3", "model.dept: no such setting; did you mean 'depth'?"),
        ("model.patch_size=3", "model.image_size: must be a positive multiple of patch_size 3, got 8"),
        (
            "model.depth=deep",
            "model.depth: input should be a valid integer, unable to parse string as an integer, got 'deep'",
        ),
        ("model.base_channels=8", "model.base_channels: no such setting; it is one of model.kind unet"),
        ("model={kind: dit, in_channels: 1}", "model.image_size: is required and missing"),
    ],
)
def test_a_mistake_in_a_transformer_names_its_field(override: str, message: str) -> None:
    assert problem(TINY, DIT, override) == f"my.yaml: {message}"


def test_every_field_is_on_one_of_the_two_lists() -> None:
    """A new setting must be put into the identity, or be found not to belong there."""
    named = {part.split("=")[0] for one in (*WHERE_AND_HOW_LONG, *WHAT) for part in one.split(" & ")}
    # of another kind the whole section is another one: DIT, below
    named |= {"model.kind", "ema.half_life_images", "ema.ramp_ratio"}
    # of these only the part that a mass-generated set or a sweep is made with; they have identities of their own
    apart = ("sampler.", "sample.", "tune.", "prepare.", "bound.")
    missing = [
        field for field in _fields(tiny_config()) if field not in named and not field.startswith(apart)
    ]
    assert missing == []


def _fields(config: Config) -> list[str]:
    found = []
    for section, values in config.model_dump(mode="json").items():
        found += [f"{section}.{key}" for key in values] if isinstance(values, dict) else [section]
    return found


def test_a_run_name_keeps_its_value_over_versions_of_the_program() -> None:
    """A changed hash would make every run that exists look like another one: then raise FORMAT_VERSION."""
    assert tiny_config().run_name("0" * 64) == "tiny-799ece2685"


def test_numbers_that_are_equal_are_the_same_run() -> None:
    assert tiny_config("schedule.beta_end=2e-1", "model.dropout=0.20").run_name(
        "d"
    ) == tiny_config().run_name("d")
    assert tiny_config("optimizer.grad_clip=1").run_name("d") == tiny_config(
        "optimizer.grad_clip=1.0"
    ).run_name("d")


@pytest.mark.parametrize("name", SHIPPED)
def test_yaml_there_and_back(name: str) -> None:
    config = load_config(name)
    again = parse_config(config.to_yaml())
    assert again == config
    assert again.run_name("d") == config.run_name("d")


@settings(max_examples=50, deadline=None)
@given(
    rate=st.floats(1e-12, 1e3),
    beta=st.floats(1e-9, 0.9, exclude_max=True),
    seed=st.integers(-(2**70), 2**70),
    storage=st.text(st.characters(categories=("L", "N", "P", "S")), min_size=1, max_size=20),
)
def test_yaml_keeps_every_bit(rate: float, beta: float, seed: int, storage: str) -> None:
    values: dict[str, Any] = yaml.safe_load(TINY)
    values["optimizer"]["learning_rate"] = rate
    values["schedule"] |= {"beta_start": beta, "beta_end": 0.9}
    values |= {"seed": seed, "storage": storage}
    config = validated(Config, values, "x")
    again = parse_config(config.to_yaml())
    assert again == config
    assert again.run_name("d") == config.run_name("d")


def test_a_configuration_is_not_changed_by_accident() -> None:
    config = tiny_config()
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3  # type: ignore[misc]


def test_a_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": 1, "b": [1, 2]}) != digest({"a": 1, "b": [2, 1]})
