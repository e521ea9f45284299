"""Averages of the weights whose length is chosen after training (Karras et al. 2024, arXiv:2312.02696, section 3).

The average of length γ after t updates is θ̂_γ(t) = ∫₀ᵗ p_γ,t(τ) θ(τ) dτ with the power-function profile
p_γ,t(τ) = (γ + 1) τ^γ / t^(γ+1): however long the run, it looks back over the same share of it. That share is
given as σ_rel, the profile's standard deviation divided by t. A run tracks two or more profiles and stores
snapshots of them now and then; any profile is then a weighted sum of snapshots, with the weights whose profile
comes nearest in the least-squares sense.

Throughout, t counts updates made: t = 1 after the first. θ(τ) is constant over (i − 1, i], the weights after
update i, which makes the recursion of `power_decay` the integral above and not an approximation to it.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddpm_core._checks import require, require_int, require_number
from ddpm_core.ema import EMA

MAX_SIGMA_REL = 12**-0.5
"""σ_rel of γ = 0, the plain mean of all weights; a longer average would weigh the oldest weights most."""

MIN_SIGMA_REL = 1e-6
"""In a run of a million updates the average of this σ_rel is the last update alone."""

# A snapshot that the chosen ones give up to this share of its squared norm adds rounding and no information.
_COLLINEAR = 1e-10
# What is left of the target's squared norm when it is matched to float64's precision.
_MATCHED = 1e-16


@dataclass(frozen=True)
class Profile:
    """The profile p_γ,t: step is t, the number of updates made (at least 1); gamma is γ >= 0.

    Raises ValueError naming the field that is out of range.
    """

    step: int
    gamma: float

    def __post_init__(self) -> None:
        require_int("step", self.step)
        require(self.step >= 1, "step", "at least 1 (before the first update there is no average)", self.step)
        require_number("gamma", self.gamma)
        require(self.gamma >= 0 and math.isfinite(self.gamma), "gamma", "at least 0 and finite", self.gamma)


@dataclass(frozen=True)
class Snapshot:
    """A tracked average: the tensors by the names of model.state_dict(), and which profile they are of."""

    profile: Profile
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Combination:
    """How to make an average from snapshots.

    weights: one a snapshot, in their order, summing to 1; some may be 0, and those snapshots need not be read.
    relative_error: ‖Σ w_i p_i − p‖₂ / ‖p‖₂. The average made differs from the one tracked directly by at most
    relative_error · ‖p‖₂ · (Σ_i (θ(i) − c)²)^½ for any constant c and each weight θ (Cauchy–Schwarz), where
    ‖p‖₂² = inner_product(p, p) and i runs to the last snapshot's step. Its own rounding is about 1e-8.
    """

    weights: tuple[float, ...]
    relative_error: float


def sigma_rel_from_gamma(gamma: float) -> float:
    """σ_rel = (γ + 1)^½ (γ + 2)^−1 (γ + 3)^−½, the standard deviation of p_γ,t divided by t.

    Raises ValueError unless gamma >= 0.
    """
    require_number("gamma", gamma)
    require(gamma >= 0 and math.isfinite(gamma), "gamma", "at least 0 and finite", gamma)
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def gamma_from_sigma_rel(sigma_rel: float) -> float:
    """The γ >= 0 of a σ_rel in [1e-6, 12^−½], exact to rounding. Raises ValueError outside that range.

    With a = γ + 1 and s = σ_rel^−2 the definition reads a³ + 4a² + (5 − s)a + 2 = 0. For s >= 12 it has three
    real roots, of which only the largest is at least 1. Viète's cosine gives it without cancellation.
    """
    require_number("sigma_rel", sigma_rel)
    require(MIN_SIGMA_REL <= sigma_rel <= MAX_SIGMA_REL, "sigma_rel", "in 1e-6..12**-0.5", sigma_rel)
    s = sigma_rel**-2
    # a = x − 4/3 leaves x³ − 3r²x + q = 0 with
    r = math.sqrt(s + 1 / 3) / math.sqrt(3)
    q = 2 / 27 + 4 * s / 3
    x = 2 * r * math.cos(math.acos(-q / (2 * r**3)) / 3)
    return max(0.0, x - 7 / 3)


def power_decay(gamma: float, t: int) -> float:
    """β_γ(t) = (1 − 1/t)^(γ+1), the share of the old average that update t = 1, 2, … keeps.

    The first update keeps nothing, so the initialisation has no part in any average.
    Raises ValueError for gamma < 0 or t < 1.
    """
    return 1.0 - _new_share(gamma, t)


def _new_share(gamma: float, t: int) -> float:
    """1 − β_γ(t), without the cancellation of a long run."""
    profile = Profile(t, gamma)
    return 1.0 if t == 1 else -math.expm1((profile.gamma + 1) * math.log1p(-1 / t))


def profile_weights(gamma: float, t: int) -> Tensor:
    """The share of θ(1), …, θ(t) in θ̂_γ(t): (i^(γ+1) − (i − 1)^(γ+1)) / t^(γ+1), float64 `[t]`; sums to 1.

    It is p_γ,t integrated over (i − 1, i], and also (1 − β(i)) β(i + 1) … β(t).
    """
    profile = Profile(t, gamma)
    edges = torch.arange(t + 1, dtype=torch.float64) / t
    return (edges ** (profile.gamma + 1)).diff()


def inner_product(a: Profile, b: Profile) -> float:
    """∫ p_a(τ) p_b(τ) dτ over τ > 0, per update.

    With A = γ_a + 1, B = γ_b + 1 and t_a <= t_b it is A·B / ((A + B − 1) t_b) · (t_a / t_b)^(B−1).
    """
    if a.step > b.step:
        a, b = b, a
    first, second = a.gamma + 1, b.gamma + 1
    return first * second / ((first + second - 1) * b.step) * (a.step / b.step) ** b.gamma


def combine_profiles(profiles: Sequence[Profile], target: Profile) -> Combination:
    """The weights w, with Σ w_i = 1, that minimise ‖Σ w_i p_i − p_target‖₂.

    The condition is not the paper's: it makes the combination of constant weights, a normalisation layer's scale
    say, that constant. It is met by construction: with p_0 the snapshot nearest to the target, d_i = p_i − p_0
    and d = p − p_0, the w_i other than w_0 = 1 − Σ w_i solve G w = b, where G_ij = ⟨d_i, d_j⟩, b_i = ⟨d_i, d⟩.

    Snapshots are taken in one by one, each time the one that lowers the error most, until the target is matched
    to float64's precision or those left are combinations of those taken: G is close to singular for profiles of
    neighbouring steps. A target that was tracked comes out as its own snapshot.

    Raises ValueError if profiles is empty, holds one twice, or ends before the target's step.
    """
    require(len(profiles) > 0, "profiles", "at least one", list(profiles))
    twice = [profile for profile, count in Counter(profiles).items() if count > 1]
    require(not twice, "profiles", "each there once", twice)
    latest = max(profile.step for profile in profiles)
    if target.step > latest:
        raise ValueError(f"step: must be at most {latest}, the last snapshot's, got {target.step}")
    products = torch.tensor(
        [[inner_product(a, b) for b in (*profiles, target)] for a in (*profiles, target)], dtype=torch.float64
    )
    products /= products[-1, -1].clone()
    base = int((products.diagonal() - 2 * products[-1])[:-1].argmin())
    # ⟨a − p_0, b − p_0⟩ for all a and b, the target among them
    products += products[base, base] - products[base] - products[:, base, None]
    gram, towards, squared = products[:-1, :-1], products[:-1, -1], products[-1, -1]
    # Unit norms: what is small is then small by comparison. Nearer to p_0 than rounding is p_0 itself.
    norms = gram.diagonal().clamp(min=0).sqrt()
    norms = torch.where(norms > 1e-7, norms, math.inf)
    gram, towards = gram / norms / norms[:, None], towards / norms
    taken = _take(gram, towards)
    weights = [0.0] * len(profiles)
    if taken:
        gram, towards = gram[taken][:, taken], towards[taken]
        solution = torch.cholesky_solve(towards[:, None], torch.linalg.cholesky(gram))[:, 0]
        squared = squared + solution @ (gram @ solution) - 2 * (solution @ towards)
        for index, weight in zip(taken, (solution / norms[taken]).tolist(), strict=True):
            weights[index] = weight
    weights[base] = 1 - math.fsum(weights)
    return Combination(tuple(weights), math.sqrt(max(0.0, float(squared))))


def _take(gram: Tensor, towards: Tensor) -> list[int]:
    """Indices in the order in which each lowers the squared error most (orthogonal least squares)."""
    rest, towards = gram.clone(), towards.clone()
    taken: list[int] = []
    while True:
        left = rest.diagonal()
        gain = torch.where(left > _COLLINEAR, towards.square() / left, 0.0)
        best = int(gain.argmax())
        if float(gain[best]) <= _MATCHED:
            return taken
        taken.append(best)
        column = rest[:, best] / left[best].sqrt()
        towards -= column * (towards[best] / column[best])
        rest -= torch.outer(column, column)


def combine_tensors(parts: Iterable[tuple[float, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """Σ weight · tensor by name, summed in float64, in the dtype and on the device of the first part.

    parts: (weight, tensors); read one at a time, so that they may come from storage one at a time. What is not
    floating-point is state and no weight, and comes from the part of the largest weight.
    Raises ValueError if parts is empty or their names or shapes differ.
    """
    sums: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    largest = -math.inf
    for weight, tensors in parts:
        if not sums:
            dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
            sums = {name: _start(tensor) for name, tensor in tensors.items()}
        _check_same(tensors, sums)
        for name, tensor in tensors.items():
            if dtypes[name].is_floating_point:
                sums[name].add_(tensor.to(sums[name]), alpha=weight)
            elif weight > largest:
                sums[name].copy_(tensor)
        largest = max(largest, weight)
    require(bool(sums), "parts", "at least one, with tensors", [])
    return {name: tensor.to(dtypes[name]) for name, tensor in sums.items()}


def reconstruct(snapshots: Sequence[Snapshot], sigma_rel: float, step: int) -> dict[str, Tensor]:
    """The average of length sigma_rel after `step` updates, from snapshots of any profiles, by name.

    How near it comes to the average tracked directly is `combine_profiles(...).relative_error`. For lengths of
    0.05 and 0.10 with 64 evenly spaced snapshots each, at the last step: 2e-4 at 0.06, 7e-4 at 0.04, 2e-3 at 0.2,
    6e-2 at 0.01. It falls with the square of the spacing. Between the steps of snapshots it is large (0.2),
    because no snapshot ends where the average does.
    Raises ValueError naming sigma_rel, step, profiles or tensors.
    """
    target = Profile(step, gamma_from_sigma_rel(sigma_rel))
    weights = combine_profiles([snapshot.profile for snapshot in snapshots], target).weights
    pairs = zip(weights, snapshots, strict=True)
    return combine_tensors((weight, snapshot.tensors) for weight, snapshot in pairs if weight != 0)


class PowerEMA:
    """Tracks the averages of several lengths at once, in float32; `averages` holds one EMA each.

    sigma_rels: one or more different lengths; two, as the paper has it (0.05 and 0.10), are enough to make any
    length between them and some way beyond.
    """

    def __init__(self, model: nn.Module, sigma_rels: Sequence[float] = (0.05, 0.10)) -> None:
        require(
            len(sigma_rels) > 0 and len(set(sigma_rels)) == len(sigma_rels),
            "sigma_rels",
            "one or more different lengths",
            sigma_rels,
        )
        self.gammas = tuple(gamma_from_sigma_rel(sigma_rel) for sigma_rel in sigma_rels)
        self.averages = tuple(EMA(model, decay=0.0) for _ in self.gammas)

    def update(self, model: nn.Module, step: int) -> None:
        """Move the averages towards the model's weights. step counts updates from 0, so that t = step + 1."""
        for gamma, average in zip(self.gammas, self.averages, strict=True):
            average.move(model, _new_share(gamma, step + 1))

    def snapshots(self, step: int) -> list[Snapshot]:
        """Copies of the averages after `step` updates, in the order of sigma_rels.

        Raises ValueError for step < 1.
        """
        return [
            Snapshot(Profile(step, gamma), {name: tensor.clone() for name, tensor in average.tensors.items()})
            for gamma, average in zip(self.gammas, self.averages, strict=True)
        ]

    def load(self, snapshots: Sequence[Snapshot]) -> None:
        """Take over the averages of a checkpoint: what `snapshots` gave, in any order.

        Raises ValueError if they are not one of each tracked profile, of one step, or of another model.
        """
        by_gamma = {snapshot.profile.gamma: snapshot.tensors for snapshot in snapshots}
        profiles = [snapshot.profile for snapshot in snapshots]
        one_each = len(snapshots) == len(self.gammas) and by_gamma.keys() == set(self.gammas)
        require(
            one_each and len({profile.step for profile in profiles}) == 1,
            "snapshots",
            f"one of each gamma of {self.gammas}, of one step",
            profiles,
        )
        for gamma, average in zip(self.gammas, self.averages, strict=True):
            average.load(by_gamma[gamma])


def _start(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, dtype=torch.float64 if tensor.is_floating_point() else tensor.dtype)


def _check_same(tensors: Mapping[str, Tensor], sums: Mapping[str, Tensor]) -> None:
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    first = {name: list(tensor.shape) for name, tensor in sums.items()}
    if shapes != first:
        names = sorted(name for name in shapes.keys() | first.keys() if shapes.get(name) != first.get(name))
        raise ValueError(
            f"tensors: must have the names and shapes of the first part's, got others in {names[:3]}"
        )
