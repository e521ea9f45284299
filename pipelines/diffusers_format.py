"""A network with its schedule as a pipeline folder of diffusers, and back.

The folder holds model_index.json, unet/config.json, unet/diffusion_pytorch_model.safetensors and
scheduler/scheduler_config.json, which `DDPMPipeline.from_pretrained` or `DDIMPipeline.from_pretrained` reads.
Only safetensors are read: a .bin is a pickle, and a pickle runs what its author liked.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ddpm_core.diffusers_weights import (
    CLASS_NAME,
    state_from_diffusers,
    state_to_diffusers,
    unet_from_diffusers,
    unet_to_diffusers,
)
from ddpm_core.predictions import PredictionType
from ddpm_core.samplers import SamplerConfig
from ddpm_core.schedules import Schedule, ScheduleConfig
from ddpm_core.unet import UNetConfig
from pipelines.config_sections import Network
from pipelines.errors import UserError, one_line

Kind = Literal["ancestral", "ddim", "dpm_solver_pp_2m", "dpm_solver_pp_2m_sde"]
Prediction = Literal["epsilon", "sample", "v_prediction"]
Variance = Literal["fixed_small", "fixed_large", "learned_range"]

# of the oldest diffusers that has all the keys; newer ones fill in what came later
_VERSION = "0.36.0"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_PICKLE = "diffusion_pytorch_model.bin"
_KINDS: dict[Kind, tuple[str, str]] = {
    "ancestral": ("DDPMPipeline", "DDPMScheduler"),
    "ddim": ("DDIMPipeline", "DDIMScheduler"),
    # the pipeline that takes any scheduler as it is
    "dpm_solver_pp_2m": ("DDPMPipeline", "DPMSolverMultistepScheduler"),
    "dpm_solver_pp_2m_sde": ("DDPMPipeline", "DPMSolverMultistepScheduler"),
}
_ALGORITHMS: dict[Kind, str] = {"dpm_solver_pp_2m": "dpmsolver++", "dpm_solver_pp_2m_sde": "sde-dpmsolver++"}
_SOLVER = {
    "solver_order": 2,
    "solver_type": "midpoint",
    "final_sigmas_type": "zero",
    "euler_at_final": False,
    "use_karras_sigmas": False,
}
_PREDICTIONS: dict[PredictionType, Prediction] = {"eps": "epsilon", "x_start": "sample", "v": "v_prediction"}
_NO_LIMIT = 1e9
# all visit timestep T−1; DDIMScheduler takes every step for T // num_steps long, as only trailing ones are
_SPACING: dict[Kind, str] = {
    "ancestral": "linspace",
    "ddim": "trailing",
    "dpm_solver_pp_2m": "trailing",
    "dpm_solver_pp_2m_sde": "trailing",
}


@dataclass(frozen=True)
class Sampling:
    """How a pipeline makes images: which sampler, what the network predicts, σ_t², whether x̂_0 is clipped.

    variance is the ancestral sampler's; "learned_range" needs a network with learned_variance. threshold_quantile:
    dynamic thresholding in place of clipping, which `import_pipeline` does not read.
    """

    kind: Kind = "ddim"
    prediction: Prediction = "epsilon"
    variance: Variance = "fixed_large"
    clip: bool = True
    threshold_quantile: float | None = None


def sampling_of(sampler: SamplerConfig, prediction_type: PredictionType) -> Sampling:
    """Our sampler as a scheduler of diffusers; which timesteps are visited is said when images are made.

    Raises `UserError` naming the field that diffusers has no counterpart for.
    """
    if sampler.kind == "heun":
        raise UserError(f"sampler.kind: must be {', '.join(map(repr, _KINDS))} to be exported, got 'heun'")
    if sampler.variance_type == "analytic":
        raise UserError("sampler.variance_type: must be another one to be exported, got 'analytic'")
    thresholds = sampler.threshold_quantile is not None
    if sampler.kind in _ALGORITHMS and sampler.clip and not thresholds:
        raise UserError(
            f"sampler.clip: must be false to export {sampler.kind}, which diffusers does not clip, got True"
        )
    return Sampling(
        sampler.kind,
        _PREDICTIONS[prediction_type],
        sampler.variance_type if sampler.kind == "ancestral" else "fixed_large",
        sampler.clip and not thresholds,
        sampler.threshold_quantile,
    )


@dataclass(frozen=True)
class ImportedPipeline:
    """A pipeline folder as ours: the network's configuration and weights, the schedule, how to sample."""

    config: UNetConfig
    tensors: dict[str, Tensor]
    schedule: Schedule
    sampling: Sampling


def export_pipeline(
    folder: str | Path,
    config: Network,
    tensors: Mapping[str, Tensor],
    schedule: Schedule,
    sampling: Sampling,
) -> None:
    """Write the pipeline to folder, whole or not at all; folder must be absent or empty.

    Raises `UserError` naming the folder, the model's field that diffusers lacks, or the tensor that is wrong.
    """
    target = Path(folder)
    check_target(target)
    if not isinstance(config, UNetConfig):
        raise UserError(f"model.kind: must be 'unet' to be exported (as {CLASS_NAME}), got {config.kind!r}")
    if config.num_classes is not None:
        raise UserError(
            f"model.num_classes: must be null to be exported, got {config.num_classes}; the pipelines of diffusers "
            f"ask a {CLASS_NAME} for no class"
        )
    if (sampling.variance == "learned_range") != config.learned_variance and sampling.kind == "ancestral":
        raise UserError(
            f"variance: {sampling.variance}, but model.learned_variance is {str(config.learned_variance).lower()}"
        )
    pipeline_class, scheduler_class = _KINDS[sampling.kind]
    if sampling.kind != "ancestral" and config.learned_variance:
        raise UserError(
            f"model.learned_variance: {scheduler_class} has no place for it; export with kind ancestral"
        )
    if sampling.kind in _ALGORITHMS and schedule.ends_without_signal:
        raise UserError(
            f"sampler.kind: {sampling.kind} can't be exported with a schedule that ends without signal (zero "
            f"terminal SNR), for which {scheduler_class} has no number; ancestral and ddim can"
        )
    try:
        unet = unet_to_diffusers(config)
    except ValueError as error:
        raise UserError(f"model.{one_line(error)}") from None
    state = _told("weights", lambda: state_to_diffusers(config, tensors))
    index = {"scheduler": ["diffusers", scheduler_class], "unet": ["diffusers", CLASS_NAME]}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # beside the target, so that the rename stays in one file system
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise UserError(f"{target}: {one_line(error)}") from None
    try:
        (scratch / "unet").mkdir()
        (scratch / "scheduler").mkdir()
        _write_json(scratch / "model_index.json", pipeline_class, index)
        _write_json(scratch / "unet" / "config.json", CLASS_NAME, unet)
        _write_json(
            scratch / "scheduler" / "scheduler_config.json", scheduler_class, _scheduler(schedule, sampling)
        )
        # "format" is what diffusers looks for
        safetensors.torch.save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()},
            scratch / "unet" / _WEIGHTS,
            metadata={"format": "pt"},
        )
        scratch.chmod(0o755)
        scratch.rename(target)
    except OSError as error:
        raise UserError(f"{target}: {one_line(error)}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_target(folder: Path) -> None:
    """Raise `UserError` unless folder is absent or empty and can be made."""
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder}: exists and is not empty; name another folder")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; name another folder")
    parent = folder.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{folder}: can't be made, since {parent} can't be written to")


def import_pipeline(folder: str | Path) -> ImportedPipeline:
    """Read a DDPM or DDIM pipeline of a UNet2DModel that diffusers, or `export_pipeline`, wrote.

    Which timesteps are visited (timestep_spacing, steps_offset) is the sampler's choice here and is not read.
    Raises `UserError` naming the file, and in it the key that is missing, of the wrong form, or not ours.
    """
    place = Path(folder)
    index = _read_json(place / "model_index.json")
    unet_class = index.get("unet")
    if not isinstance(unet_class, list) or unet_class[-1] != CLASS_NAME:
        raise UserError(f"{place / 'model_index.json'}: unet: must be a {CLASS_NAME}, got {unet_class!r}")
    where = place / "unet" / "config.json"
    values = _read_json(where)
    config = _told(str(where), lambda: unet_from_diffusers(values))
    weights = place / "unet" / _WEIGHTS
    tensors = _told(str(weights), lambda: state_from_diffusers(config, _read_tensors(weights)))
    where = place / "scheduler" / "scheduler_config.json"
    schedule, sampling = _from_scheduler(_read_json(where), where)
    if (sampling.variance == "learned_range") != config.learned_variance:
        raise UserError(
            f"{where}: variance_type: {sampling.variance}, but the network has {config.out_channels} output "
            f"channels for {config.in_channels}"
        )
    return ImportedPipeline(config, tensors, schedule, sampling)


def _scheduler(schedule: Schedule, sampling: Sampling) -> dict[str, Any]:
    values: dict[str, Any] = {
        "num_train_timesteps": schedule.num_timesteps,
        "beta_start": float(schedule.betas[0]),
        "beta_end": float(schedule.betas[-1]),
        "prediction_type": sampling.prediction,
        "thresholding": sampling.threshold_quantile is not None,
        "rescale_betas_zero_snr": False,
        "steps_offset": 0,
        "timestep_spacing": _SPACING[sampling.kind],
    }
    if sampling.threshold_quantile is not None:
        values |= {
            "dynamic_thresholding_ratio": sampling.threshold_quantile,
            "sample_max_value": _NO_LIMIT,
        }
    if sampling.kind in _ALGORITHMS:
        values |= {**_SOLVER, "algorithm_type": _ALGORITHMS[sampling.kind]}
    else:
        values |= {"clip_sample": sampling.clip, "clip_sample_range": 1.0}
    if sampling.kind == "ancestral":
        values["variance_type"] = sampling.variance
    elif sampling.kind == "ddim":
        values["set_alpha_to_one"] = True
    betas = schedule.betas.cpu()
    for name, table in _named(float(betas[0]), float(betas[-1]), len(betas)).items():
        if torch.allclose(table, betas, rtol=1e-9, atol=0.0):
            return values | {"beta_schedule": name, "trained_betas": None}
    return values | {"beta_schedule": "linear", "trained_betas": betas.tolist()}


def _named(beta_start: float, beta_end: float, num_timesteps: int) -> dict[str, Tensor]:
    """The schedules that diffusers has a name for, in float64."""

    def line(start: float, end: float) -> Tensor:
        return torch.linspace(start, end, num_timesteps, dtype=torch.float64)

    cosine = Schedule.from_config(ScheduleConfig(kind="cosine", num_timesteps=num_timesteps))
    return {
        "linear": line(beta_start, beta_end),
        "scaled_linear": line(beta_start**0.5, beta_end**0.5).square(),
        "squaredcos_cap_v2": cosine.betas,
    }


def _from_scheduler(values: Mapping[str, Any], where: Path) -> tuple[Schedule, Sampling]:
    def need(name: str, default: Any, *accepted: Any) -> Any:
        value = values.get(name, default)
        if value not in accepted:
            raise UserError(f"{where}: {name}: must be {' or '.join(map(repr, accepted))}, got {value!r}")
        return value

    classes = {scheduler: kind for kind, (_, scheduler) in _KINDS.items()}
    kind: Kind = classes[need("_class_name", None, *classes)]
    if kind in _ALGORITHMS:
        algorithms = {algorithm: solver for solver, algorithm in _ALGORITHMS.items()}
        kind = algorithms[need("algorithm_type", "dpmsolver++", *algorithms)]
        for name, value in _SOLVER.items():
            need(name, value, value)
    need("thresholding", False, False)
    need("rescale_betas_zero_snr", False, False)
    clip = kind not in _ALGORITHMS and need("clip_sample", True, True, False)
    if clip:
        need("clip_sample_range", 1.0, 1.0)
    prediction = need("prediction_type", "epsilon", *get_args(Prediction))
    variance: Variance = "fixed_large"
    if kind == "ancestral":
        # _log is the same variance taken by way of its logarithm
        accepted = (*get_args(Variance), "fixed_small_log", "fixed_large_log")
        variance = need("variance_type", "fixed_small", *accepted).removesuffix("_log")
    elif kind == "ddim":
        need("set_alpha_to_one", True, True)
    return _betas(values, where, need), Sampling(kind, prediction, variance, clip)


def _betas(values: Mapping[str, Any], where: Path, need: Callable[..., Any]) -> Schedule:
    trained = values.get("trained_betas")
    try:
        if trained is not None:
            return Schedule.from_betas(torch.tensor(trained, dtype=torch.float64))
        start, end = values.get("beta_start", 1e-4), values.get("beta_end", 0.02)
        tables = _named(float(start), float(end), int(values.get("num_train_timesteps", 1000)))
        return Schedule.from_betas(tables[need("beta_schedule", "linear", *tables)])
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{where}: {one_line(error)}") from None


def _read_tensors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        pickled = file.with_name(_PICKLE)
        if pickled.exists():
            raise UserError(
                f"{pickled}: is a pickle, which may run any code; save the pipeline with "
                "safe_serialization=True, as safetensors"
            )
        raise UserError(f"{file}: no such file")
    try:
        return safetensors.torch.load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: is not safetensors: {one_line(error)}") from None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{file}: is not JSON") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: must hold keys and values, got {type(values).__name__}")
    return values


def _write_json(file: Path, class_name: str, values: Mapping[str, Any]) -> None:
    record = {"_class_name": class_name, "_diffusers_version": _VERSION, **values}
    file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


Value = TypeVar("Value")


def _told(where: str, work: Callable[[], Value]) -> Value:
    """What work returns; its ValueError becomes the user's, with where before it."""
    try:
        return work()
    except ValueError as error:
        raise UserError(f"{where}: {one_line(error)}") from None
