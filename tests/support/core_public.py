"""Which public callables of ddpm_core take tensors, by their signatures, and why the others need no example."""

import collections.abc
import importlib
import inspect
import re
import typing
from pathlib import Path
from typing import Any

from torch import Tensor

import ddpm_core

NO_TENSORS: dict[str, tuple[str, ...]] = {
    "a type": ("Curve", "Decomposition", "EpsTheta", "PredictionType", "Unit", "VarianceType"),
    "a configuration of numbers and names": (
        *("DiTConfig", "HalfLife", "NetworkConfig", "ObjectiveConfig", "Profile", "SamplerConfig"),
        *("ScheduleConfig", "UNetConfig"),
    ),
    "a record of what was computed, in numbers": ("BoundEstimate", "Ledger", "ScheduleReport"),
    "a module or a configuration in, tested by hand": ("PowerEMA", "build_network"),
    "a function of a process and of numbers": (
        *("bound_from_curve", "loss_weights", "rescale_zero_terminal_snr", "sub_variance_preserving"),
        *("two_sided_shift", "visited_timesteps"),
    ),
    "a function of numbers": (
        *("combine_profiles", "ema_decay", "karras_log_snr", "rectified_flow", "respaced_timesteps"),
        *("snr_integral", "variance_exploding"),
    ),
    "names alone": ("unet_from_diffusers", "unet_to_diffusers"),
    "of snapshots, whose tensors combine_tensors adds": ("reconstruct",),
}

WITHOUT_EXAMPLE: dict[str, tuple[str, ...]] = {
    "a record of what was computed": (
        *("CurveBound", "PathTerms", "Prediction", "Snapshot", "TermsPerT", "TrajectoryStep"),
    ),
    "tensors by name, weights of a model whatever they are: tested by hand": (
        *("EMA.load", "LossMoments.load", "combine_tensors", "state_from_diffusers", "state_to_diffusers"),
    ),
    "a part of a network's forward, which has an example": (
        *("ConditionedNetwork.check", "ConditionedNetwork.embed"),
    ),
}


def takes_tensors(annotation: Any) -> bool:
    """Whether a parameter so annotated holds tensors; a function of tensors is none."""
    if annotation is Tensor:
        return True
    if typing.get_origin(annotation) is collections.abc.Callable:
        return False
    return any(takes_tensors(part) for part in typing.get_args(annotation))


def tensor_parameters(function: Any) -> tuple[str, ...]:
    """By the annotations, quoted or not; a parameter without one is an AssertionError."""
    if not (inspect.isclass(function) or inspect.isroutine(function)):
        return ()  # the name of a type
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    hints = _hints(function)
    missing = [p.name for p in parameters if p.name not in hints]
    assert not missing, f"{function}: {missing} have no annotation"
    return tuple(p.name for p in parameters if takes_tensors(hints[p.name]))


def _hints(function: Any) -> dict[str, Any]:
    if not inspect.isclass(function):
        return typing.get_type_hints(function)
    # a NamedTuple's are those of its fields
    return typing.get_type_hints(function) | typing.get_type_hints(function.__init__)


def named_beside() -> dict[str, Any]:
    """module.function for the functions that docs/mathematics.md names and `ddpm_core.__all__` does not lead to."""
    text = (Path(__file__).parents[2] / "docs/mathematics.md").read_text(encoding="utf-8")
    found = {}
    for module, name in sorted(set(re.findall(r"`ddpm_core\.(\w+)\.(\w+)`", text))):
        value = getattr(importlib.import_module(f"ddpm_core.{module}"), name)
        if inspect.isfunction(value) and name not in ddpm_core.__all__:
            found[f"{module}.{name}"] = value
    return found


def public_callables() -> dict[str, tuple[str, ...]]:
    """The tensor parameters of each function, class and method that has some.

    They are what `ddpm_core.__all__` leads to, and `named_beside`. A method stands under the class that defines it.
    """
    found = {name: tensor_parameters(function) for name, function in named_beside().items()}
    for name in ddpm_core.__all__:
        value = getattr(ddpm_core, name)
        found[name] = tensor_parameters(value)
        if not inspect.isclass(value):
            continue
        for method_name, method in inspect.getmembers(value, callable):
            is_ours = str(getattr(method, "__module__", "")).startswith("ddpm_core")
            if is_ours and (method_name == "__call__" or not method_name.startswith("_")):
                found[method.__qualname__] = tensor_parameters(method)
    return {name: parameters for name, parameters in found.items() if parameters}
