"""The variational bound on held-out images, and which p_θ it is of.

A network alone has no likelihood: the bound belongs to the chain p_θ that says what its output means, which
timesteps are visited, and with which variance.  Two chains matter.  That of the *model* visits all T timesteps with
`bound.variance_type` and x̂_0 clipped, and is the same whatever sampler is set: checkpoints, trials and runs are
compared on it.  That of the *sampler* is what images are drawn from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from ddpm_core.bound import BoundAccumulator, BoundEstimate, reverse_of_sampler
from ddpm_core.reverse import ReverseProcess
from ddpm_core.samplers import visited_timesteps
from ddpm_core.schedules import Schedule
from ddpm_core.types import EpsTheta
from pipelines.bad_samples import BadSamples
from pipelines.conditioning import conditioned, fitted, network_labels
from pipelines.config import Config
from pipelines.dataset import DataError, Dataset
from pipelines.images import to_model
from pipelines.stored_order import read_rows
from pipelines.world import World

_BATCH = 128


@dataclass(frozen=True)
class Chain:
    """A p_θ on some of the T timesteps: `timesteps` int64 [S], rising, or None for all of them.

    first_half: the chain has no use for the second half of the network's output, a learned variance.
    without_class: a network of classes is asked for none, whichever class an image is of.
    """

    reverse: ReverseProcess
    timesteps: Tensor | None = None
    guidance_scale: float = 1.0
    first_half: bool = False
    without_class: bool = False

    def asked(self, eps_theta: EpsTheta) -> EpsTheta:
        """The network as the chain's own t, 0..S−1, ask it."""

        def at(x_t: Tensor, t: Tensor) -> Tensor:
            output = eps_theta(x_t, t if self.timesteps is None else self.timesteps.to(t.device)[t])
            return output[:, : x_t.shape[1]] if self.first_half else output

        return at

    def told(self) -> str:
        """Which p_θ this is, for a person."""
        reverse, steps = self.reverse, self.reverse.process.num_timesteps
        visited = f"all {steps}" if self.timesteps is None else str(steps)
        limit = "x̂_0 clipped" if reverse.clip else "x̂_0 as it is"
        if reverse.threshold_quantile is not None:
            limit = f"x̂_0 thresholded at its quantile {reverse.threshold_quantile:g}"
        guided = "" if self.guidance_scale == 1 else f", guidance {self.guidance_scale:g}"
        asked = ", asked for no class" if self.without_class else ""
        return f"{visited} timesteps, variance {reverse.variance_type}, {limit}{guided}{asked}"


def model_chain(config: Config) -> Chain:
    """The chain that models are compared on."""
    schedule = Schedule.from_config(config.schedule)
    prediction_type = config.objective.prediction_type
    return Chain(ReverseProcess(schedule, prediction_type, config.bound.variance_type))


def sampler_chain(config: Config) -> Chain:
    """The chain that `sampler` draws from, guided as `sample.guidance_scale` says.

    Where every one of `sample.labels` means no class, an image's own class is not asked for, and there is nothing
    to guide away from.
    Raises ValueError naming the field of a sampler whose images have no likelihood by a bound of this kind.
    """
    schedule = Schedule.from_config(config.schedule)
    sampler = fitted(config.sampler, config.model)
    timesteps = visited_timesteps(schedule, sampler)
    whole = len(timesteps) == schedule.num_timesteps
    reverse = reverse_of_sampler(
        schedule if whole else schedule.at(timesteps),
        sampler,
        prediction_type=config.objective.prediction_type,
    )
    classes = config.model.num_classes
    without_class = classes is not None and set(config.sample.labels) == {classes}
    return Chain(
        reverse,
        None if whole else timesteps,
        1.0 if without_class else config.sample.guidance_scale,
        first_half=config.model.learned_variance and reverse.variance_type != "learned_range",
        without_class=without_class,
    )


def held_out_bound(
    dataset: Dataset,
    config: Config,
    model: nn.Module,
    world: World,
    num_images: int | None,
    chain: Chain | None = None,
) -> BoundEstimate:
    """The bound of a chain on held-out images, bits/dim; the workers share the images and the result.

    chain: the model's own if none is given. Bad images are passed over where `data.on_bad_sample` says so; a
    `DataError` on every worker if they are more than `data.max_bad_share` of all held-out images, or all that were
    asked for.
    """
    chain = chain or model_chain(config)
    total = dataset.count("test")
    total = total if num_images is None else min(total, num_images)
    # the network is told of its noise level by the whole schedule, whichever steps of it the chain takes
    schedule = Schedule.from_config(config.schedule).to(world.device)
    classes = config.model.num_classes
    accumulator = BoundAccumulator(
        chain.reverse.to(world.device),
        levels=dataset.levels,
        num_strata=config.bound.num_strata,
        seed=config.seed,
    )
    start, stop = world.rank * total // world.size, (world.rank + 1) * total // world.size
    with torch.inference_mode():
        bad = BadSamples(config.data.on_bad_sample == "skip")
        for index, images, label in _held_out(dataset, start, stop, bad):
            x_start = to_model(images, dataset.levels).to(world.device)
            if chain.without_class:
                label = torch.full_like(label, -1)
            labels = None if classes is None else network_labels(label.to(world.device), classes)
            network = conditioned(model, schedule, labels, chain.guidance_scale)
            accumulator.add(chain.asked(network), x_start, index.to(world.device))
    own = accumulator.state()
    state = torch.cat([own, torch.tensor([bad.count], dtype=own.dtype)]).to(world.device)
    world.all_reduce(state)
    num_bad = round(float(state[-1]))
    share = config.data.max_bad_share
    # a few of many are asked for, and may hold the only bad one
    too_many = num_bad > share * dataset.count("test")
    if too_many or num_bad == total > 0:
        why = f"more than data.max_bad_share {share}" if too_many else "which leaves none"
        raise DataError(
            f"{dataset.uri}: {num_bad} of {total} held-out images are bad, {why}; {dataset.what_to_run(deep=True)}"
        )
    accumulator.load_state(state[:-1].cpu())
    return accumulator.result()


def _held_out(
    dataset: Dataset, start: int, stop: int, bad: BadSamples
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Numbers, images and labels of the held-out images that are good, `_BATCH` at a time."""
    rows = read_rows(dataset, "test", start, stop, on_bad=bad.add)
    while batch := list(islice(rows, _BATCH)):
        images = torch.from_numpy(np.stack([row.image for row in batch]))
        yield torch.tensor([row.number for row in batch]), images, torch.tensor([row.label for row in batch])


def bound_metrics(estimate: BoundEstimate) -> dict[str, float]:
    """The bound as metrics, bits/dim with standard errors."""
    return {
        "held_out/total": estimate.total,
        "held_out/total_stderr": estimate.total_stderr,
        "held_out/reconstruction": estimate.reconstruction,
        "held_out/consistency": estimate.consistency,
        "held_out/prior": estimate.prior,
    }
