"""Which public callables of ddpm_core take tensors, by their signatures, and why the others need no example."""

import collections.abc
import inspect
import typing
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
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return ()
    return tuple(p.name for p in parameters if takes_tensors(p.annotation))


def public_callables() -> dict[str, tuple[str, ...]]:
    """The tensor parameters of each function, class and method that `ddpm_core.__all__` leads to and that has some.

    A method stands under the class that defines it.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name in ddpm_core.__all__:
        value = getattr(ddpm_core, name)
        if not inspect.isclass(value):
            found[name] = tensor_parameters(value)
            continue
        found[name] = tensor_parameters(value)
        for method_name, method in inspect.getmembers(value, callable):
            is_ours = str(getattr(method, "__module__", "")).startswith("ddpm_core")
            if is_ours and (method_name == "__call__" or not method_name.startswith("_")):
                found[method.__qualname__] = tensor_parameters(method)
    return {name: parameters for name, parameters in found.items() if parameters}
