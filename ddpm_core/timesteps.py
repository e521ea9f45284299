"""How a training step draws t: uniformly (Algorithm 1, line 3), or by the second moment of the loss at each t.

p_t ∝ √E[L_t²] with the loss weighted by 1/(T·p_t) estimates the same mean with the least variance (Nichol &
Dhariwal 2021, arXiv:2102.09672, section 3.3). A draw is a function of (seed, index, p), the same on every worker.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ddpm_core import rng
from ddpm_core._checks import (
    check_finite,
    check_floating,
    check_index,
    check_same_shape,
    check_tensor,
    check_timesteps,
    require,
    require_int,
    require_number,
    values_are_at_hand,
)
from ddpm_core.process import LinearGaussianProcess

HISTORY = 10
"""Losses that are kept of each t."""
UNIFORM_SHARE = 0.001

_GRID = 2.0**32


def draw_timesteps(process: LinearGaussianProcess, seed: int, index: Tensor) -> Tensor:
    """t ~ Uniform{0, ..., T−1}, int64 `[B]`, a function of (seed, index) alone (Algorithm 1, line 3)."""
    return rng.integers(seed, "timestep", index, process.num_timesteps)


def second_moment_probabilities(
    losses: Tensor, counts: Tensor, uniform_share: float = UNIFORM_SHARE
) -> Tensor:
    """p_t = (1 − u)·√(mean of L_t²)/Σ_s √(mean of L_s²) + u/T with u = uniform_share; float64 `[T]` on the CPU.

    losses: floating-point `[T, H]`, the last H losses of each t; counts: int64 `[T]`, how many each has had.
    Uniform until every t has H of them, and where all losses are 0. Rounded to multiples of 2**-32, the grid of
    `rng.uniform`, so that p_t is the very probability with which `draw_by_probability` draws t; sums to exactly 1.
    Raises ValueError naming the argument that is wrong.
    """
    check_floating("losses", losses)
    if losses.dim() != 2 or not losses.numel():
        raise ValueError(f"losses: must have the shape [T, H], got {list(losses.shape)}")
    check_index(counts, "counts")
    check_same_shape("counts", counts, "losses[:, 0]", losses[:, 0])
    num_timesteps, history = losses.shape
    require_number("uniform_share", uniform_share)
    least = num_timesteps / _GRID  # with less a t could be rounded away, and its loss never be seen again
    require(
        least <= uniform_share <= 1, "uniform_share", f"between {least:.3g} (T/2**32) and 1", uniform_share
    )
    share = torch.full((num_timesteps,), 1.0 / num_timesteps, dtype=torch.float64)
    if bool((counts >= history).all()):
        table = losses.detach().to("cpu", torch.float64)
        largest = float(table.abs().max())  # taken out, so that no square overflows
        require(math.isfinite(largest), "losses", "finite", largest)
        if largest > 0:
            moment = (table / largest).square().mean(1).sqrt()
            share = (1.0 - uniform_share) * moment / moment.sum() + uniform_share * share
    edges = (share.cumsum(0) * _GRID).round()
    return edges.diff(prepend=edges.new_zeros(1)) / _GRID


def draw_by_probability(probabilities: Tensor, seed: int, index: Tensor) -> tuple[Tensor, Tensor]:
    """t with p_t, int64 `[B]`, and the weights 1/(T·p_t), float64 `[B]`, on index.device; keyed by (seed, index).

    The mean of weight·L_t over draws is then the mean of L_t over uniform t. probabilities: float64 `[T]`,
    multiples of 2**-32 (see `second_moment_probabilities`), whose partial sums are exact in whatever order.
    Raises ValueError naming the argument that is wrong.
    """
    check_tensor("probabilities", probabilities)
    if probabilities.dtype != torch.float64 or probabilities.dim() != 1:
        raise ValueError(
            f"probabilities: must be float64 [T], got {probabilities.dtype} {list(probabilities.shape)}"
        )
    check_index(index)
    if values_are_at_hand(probabilities):
        low, total = float(probabilities.min()), float(probabilities.sum())
        require(low >= 0, "probabilities", "at least 0", low)
        require(total == 1.0, "probabilities", "multiples of 2**-32 that sum to 1", total)
    table = probabilities.to(index.device)
    # contiguous, or torch warns the user of a copy
    place = rng.uniform(seed, "importance timestep", index, dtype=torch.float64).contiguous()
    t = torch.searchsorted(table.cumsum(0), place, right=True)
    return t, 1.0 / (table.shape[0] * table[t])


class LossMoments:
    """The last losses of each t, of which the probabilities of t follow; the same on every worker.

    tensors: by name, what a checkpoint keeps: "losses" float64 `[T, 10]`, a ring a timestep, and "counts" int64
    `[T]`, how many losses each t has had. They live on the CPU.
    """

    def __init__(self, num_timesteps: int) -> None:
        require_int("num_timesteps", num_timesteps, 1)
        self.tensors: dict[str, Tensor] = {
            "losses": torch.zeros(num_timesteps, HISTORY, dtype=torch.float64),
            "counts": torch.zeros(num_timesteps, dtype=torch.int64),
        }

    @property
    def probabilities(self) -> Tensor:
        """`second_moment_probabilities` of what is kept."""
        return second_moment_probabilities(self.tensors["losses"], self.tensors["counts"])

    def draw(self, seed: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """t and its weights for samples index int64 `[B]`, on index.device: `draw_by_probability`."""
        return draw_by_probability(self.probabilities, seed, index)

    def update(self, t: Tensor, loss: Tensor) -> None:
        """Add the losses of one global batch: t int64 `[B]`, loss `[B]`, each sample's own, before 1/(T·p_t).

        Every worker gives all of the batch, in an order that does not depend on their number (by place in the
        batch, say): where a t has more losses than are kept, the order decides which. Raises ValueError naming the
        argument that is wrong. A loss may be below 0 (a KL by its rounding, or a loss of your own).
        """
        check_floating("loss", loss)
        check_index(t, "t")
        losses, counts = self.tensors["losses"], self.tensors["counts"]
        t, loss = t.detach().cpu(), loss.detach().to("cpu", torch.float64)
        check_timesteps(t, counts.shape[0], loss)
        check_same_shape("loss", loss, "t", t)
        if not bool(loss.isfinite().all()):
            raise ValueError(f"loss: must be finite, got {float(loss[~loss.isfinite()][0])}")
        by_t = t.argsort(stable=True)
        t, loss = t[by_t], loss[by_t]
        added = torch.bincount(t, minlength=counts.shape[0])
        rank = torch.arange(t.shape[0]) - (added.cumsum(0) - added)[t]
        # one loss a place: of two that are written there, torch does not say which stays
        stays = rank >= added[t] - HISTORY
        losses[t[stays], ((counts[t] + rank) % HISTORY)[stays]] = loss[stays]
        counts += added

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over saved tensors. Raises ValueError naming the one whose name, shape or dtype is not this table's,
        a loss that is not finite, or a count below 0."""
        if tensors.keys() != self.tensors.keys():
            raise ValueError(f"tensors: must be {sorted(self.tensors)}, got {sorted(tensors)}")
        for name, own in self.tensors.items():
            check_same_shape(name, tensors[name], "this table", own)
            require(tensors[name].dtype == own.dtype, name, str(own.dtype), tensors[name].dtype)
        check_finite("losses", tensors["losses"].cpu())
        least = int(tensors["counts"].min())
        require(least >= 0, "counts", "at least 0", least)
        for name, own in self.tensors.items():
            own.copy_(tensors[name])
