"""The sections of the configuration, but for those of ddpm_core, which stand beside the code they configure."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    field_validator,
    model_validator,
)

from ddpm_core.dit import DiTConfig
from ddpm_core.posthoc_ema import MAX_SIGMA_REL, MIN_SIGMA_REL
from ddpm_core.unet import UNetConfig
from pipelines.png import PngEncoder
from pipelines.precision import Precision

_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$")]
Positive = Annotated[int, Field(ge=1)]
Network = Annotated[
    Annotated[UNetConfig, Tag("unet")] | Annotated[DiTConfig, Tag("dit")],
    Discriminator(
        lambda value: value.get("kind", "unet") if isinstance(value, dict) else getattr(value, "kind", None)
    ),
]
"""Either network, told apart by `kind`, which need not be said of a U-Net."""


class Section(BaseModel):
    """A part of the configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class StageConfig(Section):
    """A user's own stage of the data: a callable by its dotted name, or with `args` a factory that returns it."""

    name: str
    args: dict[str, JsonValue] | None = None

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class DataConfig(Section):
    """The images to learn from."""

    uri: str
    """Prefix of a prepared data set: s3://BUCKET/PREFIX, file:///FOLDER or a folder."""
    flip: bool = False
    """Mirror half of the images left to right (never digits or text)."""
    cache_bytes: Annotated[int, Field(ge=2**20)] = 256 * 2**20
    """Memory for shards, a worker."""
    disk_cache: str = "auto"
    """A folder for a cache that the workers of a node share; none; or auto: under the system's temporary folder,
    and none where the data are files."""
    disk_cache_bytes: Positive = 10 * 2**30
    """What it may hold, a node."""
    decode_threads: Positive = 1
    """Threads that decode, a worker."""
    reader: Literal["thread", "process"] = "thread"
    """Where a worker reads while it trains: in a thread, or in a process of its own."""
    on_bad_sample: Literal["fail", "skip"] = "fail"
    """Whether a sample that cannot be decoded ends the run, or keeps its place with weight zero."""
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    """The share of skipped samples above which the run ends."""
    stages: tuple[StageConfig, ...] = ()
    """The user's own stages behind the decoder, by dotted name; of training alone."""

    @field_validator("disk_cache")
    @classmethod
    def _is_a_place(cls, value: str) -> str:
        if value not in ("auto", "none") and (not value.startswith(("/", "~")) or "\0" in value):
            raise ValueError(f"must be auto, none or an absolute folder, got {value!r}")
        return value

    @model_validator(mode="after")
    def _stages_can_be_named(self) -> DataConfig:
        for place, stage in enumerate(self.stages):
            if not _DOTTED.fullmatch(stage.name):
                raise ValueError(
                    f"stages[{place}]: must be the dotted name of a callable, such as mypackage.augment.crop, "
                    f"got {stage.name!r}"
                )
        return self


class PrepareConfig(Section):
    """How images become a data set (`ddpm prepare`)."""

    image_size: Positive | None = None
    """Height and width in pixels; none keeps the source's, which must then agree."""
    channels: Literal[1, 3] | None = None
    """1 for grey, 3 for colour; none takes 3 if any image has colour."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the images that is held out, by keyed hash."""
    samples_per_shard: Positive = 1000
    levels: Annotated[int, Field(ge=2, le=256)] | None = None
    """Values a channel, which is how many bins the bound's decoder has; none takes the source's own."""
    png_encoder: PngEncoder = "pillow"
    """Who writes images that do not keep their bytes; fpng is many times faster, and its files are larger."""


class OptimizerConfig(Section):
    """Adam, with linear warm-up and clipping of the gradient's norm."""

    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    adam_eps: Annotated[float, Field(gt=0)] = 1e-8
    warmup_steps: Annotated[int, Field(ge=0)] = 5000
    grad_clip: Annotated[float, Field(gt=0)] = 1.0


class EMAConfig(Section):
    """The moving average of the weights, which is what samples and bounds are made with."""

    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    warmup: bool = True
    """Average over a shorter past at the start: the decay is at most (1 + step) / (10 + step)."""
    half_life_images: Annotated[float, Field(gt=0)] | None = None
    """In place of decay and warmup: after so many images a weight's share has halved."""
    ramp_ratio: Annotated[float, Field(gt=0)] | None = None
    """Of half_life_images: it is at most this share of the images seen."""
    power_sigma_rels: tuple[float, ...] = ()
    """Lengths of power-function averages kept beside, from which any length can be made afterwards."""

    @model_validator(mode="after")
    def _one_length(self) -> EMAConfig:
        if self.half_life_images is None:
            if self.ramp_ratio is not None:
                raise ValueError(f"ramp_ratio: must be null without half_life_images, got {self.ramp_ratio}")
        else:
            # a configuration that was read from a checkpoint names every field, hence by value
            for name, default in (("decay", 0.9999), ("warmup", True)):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name}: must be left out beside half_life_images, got {getattr(self, name)}"
                    )
        for number, sigma_rel in enumerate(self.power_sigma_rels):
            if not MIN_SIGMA_REL <= sigma_rel <= MAX_SIGMA_REL or sigma_rel in self.power_sigma_rels[:number]:
                raise ValueError(
                    f"power_sigma_rels: must be different lengths between {MIN_SIGMA_REL} and "
                    f"{MAX_SIGMA_REL:.4f} (12**-0.5), got {sigma_rel}"
                )
        return self

    def identity(self) -> dict[str, Any]:
        """As plain values to hash; what came later counts only where it is not at its default."""
        later = ("half_life_images", "ramp_ratio", "power_sigma_rels")
        return self.model_dump(mode="json", exclude={name for name in later if not getattr(self, name)})


class TrainConfig(Section):
    """The batch, how long to train, and how often to look."""

    batch_size: Positive = 128
    micro_batches: Positive = 4
    """The global batch is always this many fixed parts; at most as many workers can share it."""
    steps: Positive = 800_000
    log_every: Positive = 50
    eval_every: Positive = 5000
    checkpoint_every: Positive = 5000
    keep_checkpoints: Positive = 3
    """The newest ones that stay; the best one always stays."""
    precision: Precision = "auto"
    """What the network computes in: auto is bfloat16 on a GPU that has it and float32 elsewhere."""
    compile: bool = False
    """Compile the network in each worker before the first step: minutes that only a long run pays back."""

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> TrainConfig:
        if self.batch_size % self.micro_batches:
            raise ValueError(
                f"micro_batches: must divide batch_size {self.batch_size}, got {self.micro_batches}"
            )
        return self


class BoundConfig(Section):
    """How the variational bound is estimated on held-out images."""

    variance_type: Literal["fixed_small", "fixed_large", "learned_range"] = "fixed_small"
    """learned_range for a model with learned_variance, and for that alone."""
    num_strata: Positive = 8
    """Timesteps drawn an image, one from each of this many equal parts of 1..T−1."""
    num_images: Positive = 1024
    """Held-out images used while training; all are used by `ddpm evaluate`."""


class SampleConfig(Section):
    """A mass-generated set of images."""

    count: Positive = 50_000
    unit_size: Positive = 1000
    """Images in one unit of work, which is one shard."""
    batch_size: Positive = 250
    """Images that go through the network at once; part of the set's identity."""
    seed: int = 0
    checkpoint: Annotated[str, Field(coerce_numbers_to_str=True)] = "best"
    """best (lowest held-out bits/dim), latest, a step number, or the URI of a checkpoint."""
    labels: tuple[int, ...] = ()
    """Of a model with classes: image i is of class labels[i mod length]; with none given of i mod num_classes."""
    guidance_scale: float = 1.0
    """Classifier-free guidance: 1 asks for the class, 0 for none, above 1 exaggerates it."""
    compile: bool = False
    """Compile the network first, which pays for many images; its rounding makes it another set."""
    png_encoder: PngEncoder = "pillow"
    """As of `prepare`; other bytes are another set."""

    @model_validator(mode="after")
    def _whole_batches(self) -> SampleConfig:
        if self.unit_size % self.batch_size:
            raise ValueError(f"batch_size: must divide unit_size {self.unit_size}, got {self.batch_size}")
        return self


class TuneConfig(Section):
    """A sweep over the noise schedule, ranked on held-out bits/dim."""

    num_timesteps: Annotated[tuple[Positive, ...], Field(min_length=1)] = (250, 500, 1000)
    """The values of T to try."""
    beta_start: tuple[float, float] = (1e-4, 5e-3)
    """Range of β_1 for T = 1000, drawn log-uniformly; scaled by 1000/T, so that the chain's end stays."""
    beta_end: tuple[float, float] = (0.01, 0.03)
    """Range of β_T, likewise."""
    num_trials: Positive = 12
    """The first one has the configuration's own schedule."""
    max_concurrent: Positive = 2
    workers: Positive = 1
    """Training workers of a trial."""
    steps: Positive = 20_000
    """Training steps of a trial that is not stopped early."""
    eval_every: Positive = 2000
    """A tenth of `steps` unless it is given."""
    grace_steps: Positive = 4000
    """No trial is stopped before this many steps; a fifth of `steps` unless it is given."""
    reduction_factor: Annotated[float, Field(gt=1)] = 3
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _follow_steps(cls, values: Any) -> Any:
        steps = values.get("steps") if isinstance(values, dict) else None
        if not isinstance(steps, int) or steps < 1:
            return values
        return {"eval_every": max(1, steps // 10), "grace_steps": max(1, steps // 5)} | values

    @field_validator("beta_start", "beta_end")
    @classmethod
    def _range(cls, value: tuple[float, float]) -> tuple[float, float]:
        low, high = value
        if not 0 < low <= high < 1:
            raise ValueError(f"must be a range [low, high] in (0, 1), got [{low}, {high}]")
        return value


class WorkersConfig(Section):
    """The workers of a job and what each takes of the cluster."""

    num: Positive = 1
    cpus: Annotated[float, Field(gt=0)] = 1
    gpus: Annotated[float, Field(ge=0)] = 0
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Worker failures after which the job gives up."""


class TrackingConfig(Section):
    """The MLflow experiment; its server is MLFLOW_TRACKING_URI, and with none nothing is tracked."""

    experiment: str = "ddpm"
