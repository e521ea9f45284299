"""One training step as a pure function of (configuration, step, data), on any number of workers.

The global batch is always M fixed micro-batches.  Micro-batch m reads stream m; t and ε are keyed by the
position of each sample, dropout by (seed, step, m).  A worker takes whole micro-batches, and the gradient is
the sum over all samples divided by the global batch, so the number of workers does not show in the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ddpm_core import rng
from ddpm_core.ema import EMA, HalfLife
from ddpm_core.networks import as_eps_theta, build_network
from ddpm_core.objectives import drop_labels, training_loss
from ddpm_core.posthoc_ema import PowerEMA
from ddpm_core.schedules import Schedule
from ddpm_core.timesteps import LossMoments, draw_timesteps
from pipelines.checkpoints import CheckpointError, State
from pipelines.compiled import compile_training
from pipelines.conditioning import network_labels
from pipelines.config import Config
from pipelines.config_sections import OptimizerConfig
from pipelines.errors import UserError, one_line
from pipelines.images import to_model
from pipelines.precision import Autocast, memory_format
from pipelines.world import World


class TrainingError(UserError):
    """Training can't go on from here, and doing the same again would end the same."""

    exit_code = 1


def diverged(step: int, what: str, optimizer: OptimizerConfig) -> TrainingError:
    """The error of a run in which `what` is no finite number any more after `step` steps."""
    return TrainingError(
        f"step {step}: {what}: training diverged; lower optimizer.learning_rate ({optimizer.learning_rate}) or "
        f"lengthen optimizer.warmup_steps ({optimizer.warmup_steps})"
    )


class Samples(Protocol):
    """A micro-batch, as `pipelines.reader.MicroBatch` holds it."""

    @property
    def stream(self) -> int: ...

    @property
    def index(self) -> Tensor:
        """int64 [b]: the key of everything random about each sample of this draw."""
        ...

    @property
    def x_start(self) -> Tensor:
        """float32 [b, C, H, W] in [−1, 1], or the bytes that stand for it."""
        ...

    @property
    def label(self) -> Tensor:
        """int64 [b]: the class of each, −1 for none."""
        ...


@dataclass(frozen=True, eq=False)
class _Blank:
    stream: int
    index: Tensor
    x_start: Tensor
    label: Tensor


@dataclass(frozen=True)
class StepResult:
    loss: float
    """Mean over the global batch of the objective's loss, by default ‖ε − ε_θ‖² per dimension (Eq. 14); bad samples
    that were passed over are left out of it.
    """
    grad_norm: float
    """Before clipping."""
    learning_rate: float


class Learner:
    """The mutable state of a run: weights, optimiser, EMA, and the losses by t if they decide the draws of t."""

    def __init__(self, config: Config, device: torch.device, levels: int | None = None) -> None:
        """levels: the data's, which images as bytes and the objectives "vlb" and "hybrid" need."""
        self.config = config
        self.device = device
        self.levels = levels
        self.schedule = Schedule.from_config(config.schedule).to(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.derive_seed(config.seed, "weights"))
            model = build_network(config.model)
        layout = memory_format(device, compiled=config.train.compile)
        self.model: nn.Module = model.train().to(device, memory_format=layout)  # type: ignore[call-overload]
        self.ema = _average(self.model, config)
        rels = config.ema.power_sigma_rels
        self.power_ema = PowerEMA(self.model, rels) if rels else None
        adam = config.optimizer
        self.optimizer = torch.optim.Adam(
            self.model.parameters(),
            lr=adam.learning_rate,
            betas=adam.adam_betas,
            eps=adam.adam_eps,
            fused=True,
        )
        self._parameters = dict(self.model.named_parameters())
        self._generator = _default_generator(device)
        self._autocast = Autocast(config.train.precision, device)
        by_loss = config.objective.timestep_sampling == "loss_second_moment"
        self.loss_moments = LossMoments(config.schedule.num_timesteps) if by_loss else None
        # draws of bad samples since the run's first step, by all workers; None where none are passed over
        self.skipped = 0 if config.data.on_bad_sample == "skip" else None
        if config.train.compile:
            compile_training(self.model, self._example)
            self.optimizer.zero_grad()

    def _example(self) -> None:
        """Forwards and backwards for a micro-batch of zeros."""
        model, size = self.config.model, self.config.train.batch_size // self.config.train.micro_batches
        shape = (size, model.in_channels, model.image_size, model.image_size)
        index = torch.zeros(size, dtype=torch.int64)
        part = _Blank(0, index, torch.zeros(shape), torch.full_like(index, -1))
        t, noise = index.to(self.device), torch.zeros(shape, device=self.device)
        self._backward(0, part, t, None, noise, torch.zeros(2, 0, device=self.device))

    def step(self, step: int, micro_batches: Sequence[Samples], world: World) -> StepResult:
        """Algorithm 1 for the global batch of `step` (zero-based), of which these micro-batches are our part.

        Raises `TrainingError` where the loss or gradient is not finite; the weights are then untouched.
        """
        config = self.config
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        num_bad = sum(num_skipped(part) for part in micro_batches)
        self.optimizer.zero_grad(set_to_none=False)
        # t and loss of every sample of the global batch at its place, for the loss moments; t = −1 of bad ones
        drawn = torch.zeros(2, config.train.batch_size if self.loss_moments else 0, device=self.device)
        for part, t, weights, noise in self._draws(micro_batches):
            loss_sum += self._backward(step, part, t, weights, noise, drawn)
        loss, grad_norm, drawn, num_bad = self._reduce(loss_sum, drawn, num_bad, world)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise diverged(step + 1, f"loss {loss}, gradient norm {grad_norm}", config.optimizer)
        rate = learning_rate(config.optimizer, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        scale = min(1.0, config.optimizer.grad_clip / (grad_norm + 1e-6))
        if scale < 1:
            torch._foreach_mul_(self._gradients(), scale)
        self.optimizer.step()
        self.ema.update(self.model, step)
        if self.power_ema:
            self.power_ema.update(self.model, step)
        if self.loss_moments:
            good = drawn[:, drawn[0] >= 0]
            self.loss_moments.update(good[0].long(), good[1])
        if self.skipped is not None:
            self.skipped += num_bad
        return StepResult(loss, grad_norm, rate)

    def _draws(self, parts: Sequence[Samples]) -> Iterator[tuple[Samples, Tensor, Tensor | None, Tensor]]:
        """Each part with its t, the weights of the losses (None for 1) and ε.

        Drawn for all parts at once, since a draw costs about the same for many samples as for few.
        """
        if not parts:
            return
        seed, index = self.config.seed, torch.cat([part.index for part in parts]).to(self.device)
        sizes = [len(part.index) for part in parts]
        weights: Sequence[Tensor | None] = [None] * len(parts)
        if self.loss_moments:
            t, weight = self.loss_moments.draw(seed, index)
            weights = weight.split(sizes)
        else:
            t = draw_timesteps(self.schedule, seed, index)
        noise = rng.normal(seed, "noise", index, tuple(parts[0].x_start.shape[1:]))
        yield from zip(parts, t.split(sizes), weights, noise.split(sizes), strict=True)

    def _backward(
        self, step: int, part: Samples, t: Tensor, weights: Tensor | None, noise: Tensor, drawn: Tensor
    ) -> Tensor:
        config = self.config
        x_start = part.x_start.to(self.device, non_blocking=True)
        if x_start.dtype == torch.uint8:
            assert self.levels is not None
            x_start = to_model(x_start, self.levels).contiguous()
        self._generator.manual_seed(rng.derive_seed(config.seed, "dropout", step, part.stream))
        exact = as_eps_theta(self.model, self.schedule, self._labels(part))

        def network(x_t: Tensor, t: Tensor) -> Tensor:
            with self._autocast():
                return exact(x_t, t)

        losses = training_loss(
            network, self.schedule, config.objective, x_start, t, noise, levels=self.levels
        )
        # a factor of 1 changes nothing, and what goes to a GPU here waits for the forward pass to end
        sample_weights = part.weight if num_skipped(part) else None  # type: ignore[attr-defined]
        if weights is not None:
            place = slice(part.stream * len(t), (part.stream + 1) * len(t))
            seen = t if sample_weights is None else t.where(sample_weights.to(t.device) > 0, -1)
            drawn[:, place] = torch.stack((seen.to(losses.dtype), losses.detach()))
            losses = losses * weights.to(losses.dtype)
        if sample_weights is not None:
            # zero for a bad sample that was passed over
            losses = losses * sample_weights.to(losses)
        (losses.sum() / config.train.batch_size).backward()
        return losses.detach().double().sum()

    def _labels(self, part: Samples) -> Tensor | None:
        """The classes as the network learns them, some of them left out so that it learns to do without."""
        config, num_classes = self.config, self.config.model.num_classes
        if num_classes is None:
            return None
        labels = network_labels(part.label.to(self.device), num_classes)
        index = part.index.to(self.device)
        return drop_labels(labels, num_classes, config.objective.label_dropout, config.seed, index)

    def _reduce(
        self, loss_sum: Tensor, drawn: Tensor, num_bad: int, world: World
    ) -> tuple[float, float, Tensor, int]:
        """Sum gradients, losses and numbers of bad samples over the workers: one flat all-reduce, the same bits on
        every resume.

        A sample's t and loss meet zeros from the other workers, so that they stay what they are.
        """
        gradients = self._gradients()
        if world.size > 1:
            # the loss travels in two floats, so that it keeps more than float32's digits
            high = loss_sum.float()
            low = (loss_sum - high.double()).float()
            # where none are passed over the buffer has no place for them, so that it is what it always was: its
            # length decides how some backends round
            counted = [] if self.skipped is None else [high.new_full((1,), num_bad)]
            flat = torch.cat(
                [
                    *(gradient.reshape(-1) for gradient in gradients),
                    drawn.reshape(-1),
                    high[None],
                    low[None],
                    *counted,
                ]
            )
            world.all_reduce(flat)
            start = 0
            for gradient in gradients:
                gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
                start += gradient.numel()
            drawn = flat[start : start + drawn.numel()].view_as(drawn)
            start += drawn.numel()
            loss_sum = flat[start].double() + flat[start + 1].double()
            num_bad = int(flat[-1]) if counted else num_bad
        norms = torch.stack(torch._foreach_norm(gradients)).double()
        norm = float(torch.linalg.vector_norm(norms))
        good = max(1, self.config.train.batch_size - num_bad)
        return float(loss_sum) / good, norm, drawn, num_bad

    def _gradients(self) -> list[Tensor]:
        gradients = [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]
        assert len(gradients) == len(self._parameters)
        return gradients

    def averaged(self) -> nn.Module:
        """A copy of the network with the EMA's weights, for evaluation."""
        model = build_network(self.config.model).to(self.device)
        self.ema.copy_to(model)
        return model.eval().requires_grad_(False)

    def state(self, step: int) -> State:
        """The state after `step` steps."""
        optimizer: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                optimizer[f"{key}/{name}"] = value
        groups = {
            "weights": dict(self.model.state_dict()),
            "ema": dict(self.ema.tensors),
            "optimizer": optimizer,
        }
        if self.loss_moments:
            groups["loss_moments"] = dict(self.loss_moments.tensors)
        if self.skipped is not None:
            groups["skipped"] = {"count": torch.tensor(self.skipped)}
        if self.power_ema:
            groups |= {
                power_group(sigma_rel): dict(average.tensors)
                for sigma_rel, average in zip(
                    self.config.ema.power_sigma_rels, self.power_ema.averages, strict=True
                )
            }
        return State(step, groups)

    def load(self, state: State) -> None:
        """Go back to a saved state; raises `CheckpointError` where it is another network's, or not finite."""
        try:
            self.model.load_state_dict(state.groups["weights"])
            self.ema.load(state.groups["ema"])
            if self.loss_moments:
                self.loss_moments.load(state.groups["loss_moments"])
            if self.skipped is not None and "skipped" in state.groups:
                self.skipped = int(state.groups["skipped"]["count"])
            if self.power_ema:
                for sigma_rel, average in zip(
                    self.config.ema.power_sigma_rels, self.power_ema.averages, strict=True
                ):
                    average.load(state.groups[power_group(sigma_rel)])
            # copies, since Adam changes them in place
            moments: dict[Any, dict[str, Tensor]] = {
                parameter: {
                    key: _like(parameter, state.groups["optimizer"][f"{key}/{name}"])
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
                for name, parameter in self._parameters.items()
                if state.step > 0
            }
        except (RuntimeError, KeyError, ValueError) as error:
            if isinstance(error, ValueError) and "finite" in str(error):
                raise CheckpointError(
                    f"the checkpoint at step {state.step} holds numbers that are not finite, so that training "
                    f"diverged before it: delete it, to go on from an earlier one ({one_line(error, 120)})"
                ) from None
            raise CheckpointError(
                f"the checkpoint at step {state.step} holds another network than model describes"
            ) from None
        self.optimizer.state.update(moments)


def num_skipped(part: Samples) -> int:
    """How many of a micro-batch's samples are bad ones that are passed over."""
    weight: Tensor | None = getattr(part, "weight", None)
    return 0 if weight is None else len(weight) - int(torch.count_nonzero(weight))


def power_group(sigma_rel: float) -> str:
    """The name of a power-function average among a checkpoint's groups."""
    return f"ema-{sigma_rel!r}"


def _average(model: nn.Module, config: Config) -> EMA:
    length = config.ema
    if length.half_life_images is None:
        return EMA(model, length.decay, length.warmup)
    return EMA(model, HalfLife(length.half_life_images, config.train.batch_size, length.ramp_ratio))


def _like(parameter: Tensor, moment: Tensor) -> Tensor:
    """A copy on the parameter's device and in its layout, as the fused optimiser wants it."""
    if moment.dim() == 0:
        return moment.to(parameter.device, copy=True)
    return torch.empty_like(parameter).copy_(moment)


def _default_generator(device: torch.device) -> torch.Generator:
    """The generator that dropout draws from on this device; torch.manual_seed would go through all of them."""
    if device.type == "cuda":
        torch.cuda.init()
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """Linear warm-up to the constant rate; `step` is zero-based."""
    if config.warmup_steps == 0:
        return config.learning_rate
    return config.learning_rate * min(1.0, (step + 1) / config.warmup_steps)


def is_due(step: int, every: int, last: int) -> bool:
    """Whether something done every so many steps, and at the last one, is due after `step` steps."""
    return step % every == 0 or step == last
