"""The one configuration of every job: what a run is, and where it runs, apart.

*What* (data, schedule, model, objective, optimiser, EMA, batch, seed) is hashed and is the run's identity.
*Where* (workers, storage, tracking) and *how long* (steps, how often to evaluate) are not: the same run may
go on with more workers, on another cluster, for longer.  Endpoints and credentials are never here; they come
from the environment alone.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import field_validator, model_validator

from ddpm_core.objectives import ObjectiveConfig
from ddpm_core.samplers import SamplerConfig
from ddpm_core.schedules import ScheduleConfig
from pipelines import config_checks
from pipelines.config_sections import (
    BoundConfig,
    DataConfig,
    EMAConfig,
    Name,
    Network,
    OptimizerConfig,
    PrepareConfig,
    SampleConfig,
    Section,
    TrackingConfig,
    TrainConfig,
    TuneConfig,
    WorkersConfig,
)
from pipelines.errors import UserError, one_line, without_password
from pipelines.telling import validated
from pipelines.unused_settings import left_over, unused_settings

FORMAT_VERSION = 1


class Config(Section):
    """Everything a job needs to know."""

    name: Name
    seed: int = 0
    data: DataConfig
    prepare: PrepareConfig = PrepareConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    model: Network
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EMAConfig = EMAConfig()
    train: TrainConfig = TrainConfig()
    bound: BoundConfig = BoundConfig()
    sampler: SamplerConfig = SamplerConfig()
    sample: SampleConfig = SampleConfig()
    tune: TuneConfig = TuneConfig()
    workers: WorkersConfig = WorkersConfig()
    storage: str = "results"
    """Where runs/ and samples/ are written: s3://BUCKET/PREFIX, file:///FOLDER or a folder."""
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("storage")
    @classmethod
    def _can_be_written_to(cls, value: str) -> str:
        if value.lower().startswith(("http://", "https://")):
            raise ValueError(f"must be s3://BUCKET/PREFIX or a folder, got {without_password(value)!r}")
        return value

    @model_validator(mode="after")
    def _sections_agree(self) -> Config:
        found = config_checks.mistakes(self)
        if found:
            raise ValueError("\n".join(found))
        return self

    def training_identity(self, dataset_identity: str) -> dict[str, Any]:
        """What a training run is a function of, as plain values."""
        # a run with the objective that was the only one once keeps its name
        objective = self.objective.identity()
        return {
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "seed": self.seed,
            "dataset": dataset_identity,
            "flip": self.data.flip,
            "schedule": self.schedule.identity(),
            "model": self.model.identity(),
            "optimizer": self.optimizer.model_dump(mode="json"),
            "ema": self.ema.identity(),
            "batch_size": self.train.batch_size,
            "micro_batches": self.train.micro_batches,
            **({"objective": objective} if objective else {}),
            **({} if self.train.precision == "auto" else {"precision": self.train.precision}),
            **({"compile": True} if self.train.compile else {}),
            **({"stages": self.data.model_dump(mode="json")["stages"]} if self.data.stages else {}),
        }

    def run_name(self, dataset_identity: str) -> str:
        """`<name>-<id>`: the folder of the run under `runs/`."""
        return f"{self.name}-{digest(self.training_identity(dataset_identity))[:10]}"

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def digest(value: Any) -> str:
    """SHA-256 of plain values, independent of the order of keys."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The configuration in a YAML file with `section.key=value` overrides, checked whole.

    A path that is no file is looked up among the ready configurations that ship with the project, so
    `digits.yaml` works from anywhere.  Raises `UserError` with a line that names the field for each mistake.
    """
    file = Path(path)
    if not file.is_file():
        shipped = Path(__file__).resolve().parent.parent / "jobs" / "configs" / file.name
        if file.name != str(path) or not shipped.is_file():
            raise UserError(f"{path}: no such configuration file")
        file = shipped
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {one_line(error)}") from None
    return parse_config(text, overrides, where=str(path))


def parse_config(
    text: str, overrides: list[str] | tuple[str, ...] = (), *, where: str = "configuration"
) -> Config:
    """As `load_config`, from the YAML text itself; `where` names it in errors.

    A setting that has no effect beside the others is a mistake, unless it only lost its effect by an override: a
    file's `schedule.beta_end` is passed over where `--set` makes the schedule another kind.
    """
    try:
        values = _from_yaml(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or one_line(error)
        raise UserError(f"{where}{line}: not valid YAML: {reason}") from None
    if not isinstance(values, dict):
        raise UserError(
            f"{where}: must hold sections such as `data:` and `model:`, got {type(values).__name__}"
        )
    mistakes = []
    for override in overrides:
        try:
            _apply(values, override)
        except UserError as error:
            mistakes.append(str(error))
    if mistakes:
        raise UserError("\n".join(mistakes))
    config = validated(Config, values, where)
    num_timesteps = config.schedule.num_timesteps
    if "num_steps" not in (values.get("sampler") or {}) and (config.sampler.num_steps or 0) > num_timesteps:
        # so many are only what is usual
        values["sampler"] = {**(values.get("sampler") or {}), "num_steps": None}
        config = validated(Config, values, where)
    given = {override.partition("=")[0] for override in overrides}
    unused = unused_settings(config)
    if dropped := [one for one in unused if left_over(one, given)]:
        for one in dropped:
            del values[one.section][one.name]
        config = validated(Config, values, where)
    # not when a checkpoint's configuration is read: a run that is there already is what it is
    mistakes = [one.mistake for one in unused if one not in dropped] + config_checks.mistakes_of_a_file(
        config
    )
    if mistakes:
        raise UserError("\n".join(f"{where}: {mistake}" for mistake in mistakes))
    return config


class _Loader(yaml.SafeLoader):
    """Of a key that is there twice YAML's own takes the last, and drops a section with it."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # as it is written: merged keys come later
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"{key.value} is there twice", problem_mark=key.start_mark
                    )
                seen.add((key.tag, key.value))
        return node


def _from_yaml(text: str) -> Any:
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _apply(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f"--set {override}: must be section.key=value")
    try:
        value = _from_yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        twice = error.problem if isinstance(error, yaml.constructor.ConstructorError) else None
        raise UserError(f"--set {override}: {twice or 'the value is not valid YAML'}") from None
    *sections, key = path.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"--set {override}: {section} is a value, not a section")
        values = inner
    values[key] = value
