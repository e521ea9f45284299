"""An average of a run's weights of any length, made after training.

It is a weighted sum of the power-function averages in the run's checkpoints. The more of them a run keeps
(`train.keep_checkpoints`), the nearer it comes to the average tracked directly.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ddpm_core.posthoc_ema import Profile, combine_profiles, combine_tensors, gamma_from_sigma_rel
from pipelines.checkpoints import Checkpoint, Checkpoints
from pipelines.config import Config
from pipelines.errors import UserError
from pipelines.storage import Storage
from pipelines.telling import validated
from pipelines.training import power_group


@dataclass(frozen=True)
class Averaged:
    """Averaged weights by the names of the network's state, and how far their profile is from the one asked for.

    relative_error: see `ddpm_core.posthoc_ema.Combination`.
    """

    tensors: dict[str, Tensor]
    relative_error: float


def averaged_weights(run: Storage, sigma_rel: float, step: int) -> Averaged:
    """The average of length sigma_rel after `step` steps, from the checkpoints of a run up to that one.

    Snapshots are read one at a time, and only those that count. Raises `UserError` where the run keeps none, or for
    a sigma_rel or step out of range.
    """
    checkpoints = Checkpoints(run)
    kept: list[tuple[Profile, Checkpoint, str]] = []
    for number in checkpoints.steps():
        checkpoint = checkpoints.open(number)
        where = f"{checkpoint.uri}/commit.json: config"
        lengths = validated(Config, checkpoint.commit.config, where).ema.power_sigma_rels
        kept += [
            (Profile(number, gamma_from_sigma_rel(rel)), checkpoint, power_group(rel)) for rel in lengths
        ]
    if not kept:
        raise UserError(
            f"{run.uri}: its checkpoints hold no power-function averages; train with ema.power_sigma_rels, "
            "such as [0.05, 0.1]"
        )
    try:
        target = Profile(step, gamma_from_sigma_rel(sigma_rel))
        made = combine_profiles([profile for profile, _, _ in kept], target)
    except ValueError as error:
        raise UserError(str(error)) from None
    pairs = zip(made.weights, kept, strict=True)
    tensors = combine_tensors(
        (weight, checkpoint.read(group)) for weight, (_, checkpoint, group) in pairs if weight != 0
    )
    return Averaged(tensors, made.relative_error)
