"""Settings that a configuration gives and a run has no use for: each would change its identity and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from pipelines.config import Config

_FROM_ONE_TO_ANOTHER = (
    "linear", "linear_scaled", "scaled_linear", "quadratic", "constant", "warmup", "sigmoid_beta",
)  # fmt: skip


class Use(NamedTuple):
    """The settings `names` of a section matter where `by` (section.key) has one of `values`.

    Without values: where it is not null. `fits` are values that are right whatever `by` is.
    """

    section: str
    names: tuple[str, ...]
    by: str
    values: tuple[str, ...] = ()
    fits: tuple[str, ...] = ()


USES = (
    # constant is at beta_end, but beta_end may not be below beta_start
    Use("schedule", ("beta_start", "beta_end"), "schedule.kind", _FROM_ONE_TO_ANOTHER),
    Use("schedule", ("warmup_fraction",), "schedule.kind", ("warmup",)),
    Use("schedule", ("cosine_s",), "schedule.kind", ("cosine",)),
    Use("schedule", ("beta_max",), "schedule.kind", ("cosine", "sigmoid")),
    Use("schedule", ("sigmoid_start", "sigmoid_end", "sigmoid_tau"), "schedule.kind", ("sigmoid",)),
    Use("schedule", ("log_snr_max", "log_snr_min"), "schedule.kind", ("log_snr",)),
    Use("schedule", ("betas",), "schedule.kind", ("betas",)),
    Use("schedule", ("alphas_cumprod",), "schedule.kind", ("alphas_cumprod",)),
    Use("objective", ("min_snr_gamma",), "objective.weighting", ("min_snr",)),
    Use("objective", ("p2_gamma", "p2_k"), "objective.weighting", ("p2",)),
    Use("objective", ("vlb_weight",), "objective.loss", ("hybrid",)),
    Use("objective", ("variance_type",), "objective.loss", ("vlb", "hybrid")),
    Use("objective", ("label_dropout",), "model.num_classes"),
    Use("sampler", ("eta",), "sampler.kind", ("ddim",)),
    Use("sampler", ("variance_type",), "sampler.kind", ("ancestral",), fits=("learned_range",)),
    Use("sampler", ("karras_rho",), "sampler.spacing", ("karras",)),
)


class Unused(NamedTuple):
    """A setting (section, name) that has no effect as `by` is, and the mistake as a line."""

    section: str
    name: str
    by: str
    mistake: str


def unused_settings(config: Config) -> list[Unused]:
    """Every setting that is not at its default and that nothing reads."""
    found = []
    for use in USES:
        section, key = use.by.split(".")
        chosen = getattr(getattr(config, section), key)
        if chosen in use.values or (not use.values and chosen is not None):
            continue
        defaults = _defaults(getattr(config, use.section))
        for name in use.names:
            value = getattr(getattr(config, use.section), name)
            if value == defaults[name] or value in use.fits:
                continue
            needs = " or ".join(map(repr, use.values)) or "a value"
            found.append(
                Unused(
                    use.section,
                    name,
                    use.by,
                    f"{use.section}.{name}: has no effect as {use.by} is {_shown(chosen)} (it needs {needs}), got "
                    f"{_shown(value)}; leave it out",
                )
            )
    return found


def left_over(unused: Unused, overrides: Collection[str]) -> bool:
    """Whether a file's setting lost its use only because `by` was overridden: then it is no mistake.

    overrides: the fields given by --set.
    """
    return unused.by in overrides and not {unused.section, f"{unused.section}.{unused.name}"} & {*overrides}


def _defaults(section: Any) -> dict[str, Any]:
    return {option.name: option.default for option in dataclasses.fields(section)}


def _shown(value: object) -> str:
    return "null" if value is None else repr(list(value) if isinstance(value, tuple) else value)
