"""Post-hoc averages against a trajectory whose every weight is known."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddpm_core import PowerEMA, Profile, Snapshot, combine_profiles, combine_tensors, reconstruct
from ddpm_core import posthoc_ema as posthoc

SIGMAS = (0.05, 0.10)
T = 1280


def _trajectory(steps: int = T) -> Tensor:
    """θ(1), …, θ(steps) of five weights, float64: an offset, a decaying approach, a random walk and noise."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, steps, 5, dtype=torch.float64, generator=generator)
    t = torch.arange(1, steps + 1, dtype=torch.float64)[:, None] / steps
    return 3 + torch.exp(-5 * t) + noise[0].cumsum(0) / steps**0.5 + noise[1]


def _direct(trajectory: Tensor, gamma: float, step: int) -> Tensor:
    return posthoc.profile_weights(gamma, step) @ trajectory[:step]


def _profiles(num: int, steps: int = T, sigmas: tuple[float, ...] = SIGMAS) -> list[Profile]:
    gammas = [posthoc.gamma_from_sigma_rel(sigma) for sigma in sigmas]
    return [Profile(steps * (k + 1) // num, gamma) for k in range(num) for gamma in gammas]


def _snapshots(trajectory: Tensor, profiles: list[Profile]) -> list[Snapshot]:
    return [Snapshot(p, {"weight": _direct(trajectory, p.gamma, p.step)}) for p in profiles]


def test_sigma_rel_as_published() -> None:
    """The paper's two lengths, 0.05 and 0.10, have γ = 16.97 and 6.94."""
    assert posthoc.gamma_from_sigma_rel(0.05) == pytest.approx(16.97, abs=5e-3)
    assert posthoc.gamma_from_sigma_rel(0.10) == pytest.approx(6.94, abs=5e-3)
    assert posthoc.gamma_from_sigma_rel(posthoc.MAX_SIGMA_REL) == pytest.approx(0, abs=1e-14)
    assert posthoc.sigma_rel_from_gamma(0) == pytest.approx(12**-0.5, rel=1e-15)


@pytest.mark.parametrize("gamma", [0.0, 1e-9, 0.1, 1.0, 6.94, 100.0, 1e4, 9e5])
def test_gamma_and_sigma_rel_are_inverses(gamma: float) -> None:
    back = posthoc.gamma_from_sigma_rel(posthoc.sigma_rel_from_gamma(gamma))
    assert back + 1 == pytest.approx(gamma + 1, rel=1e-14)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 6.94, 16.97, 300.0])
@pytest.mark.parametrize("t", [10, 1000])
def test_sigma_rel_is_the_profiles_standard_deviation(gamma: float, t: int) -> None:
    """Moving each τ to the middle of its update moves the deviation by at most half an update."""
    weights = posthoc.profile_weights(gamma, t)
    middle = (torch.arange(t, dtype=torch.float64) + 0.5) / t
    mean = weights @ middle
    deviation = float((weights @ (middle - mean).square()).sqrt())
    assert abs(deviation - posthoc.sigma_rel_from_gamma(gamma)) <= 0.5 / t


@pytest.mark.parametrize("gamma", [0.0, 0.5, 6.94, 16.97, 300.0])
def test_profile_weights_are_those_of_the_recursion(gamma: float) -> None:
    shares = torch.zeros(0, dtype=torch.float64)
    for t in range(1, 200):
        decay = posthoc.power_decay(gamma, t)
        shares = torch.cat([shares * decay, torch.tensor([1 - decay], dtype=torch.float64)])
        weights = posthoc.profile_weights(gamma, t)
        torch.testing.assert_close(shares, weights, rtol=1e-10, atol=1e-14)
        assert float(weights.sum()) == pytest.approx(1, abs=1e-14)
        assert float(weights.min()) >= 0


def test_the_plain_mean_has_gamma_0() -> None:
    torch.testing.assert_close(
        posthoc.profile_weights(0, 7), torch.full((7,), 1 / 7, dtype=torch.float64), rtol=1e-14, atol=0
    )


def test_decay_late_in_a_long_run() -> None:
    """1 − β = (γ + 1)/t to first order."""
    t = 10**12
    assert posthoc._new_share(16.97, t) * t == pytest.approx(17.97, rel=1e-10)


@pytest.mark.parametrize("gammas", [(0, 0), (0, 5), (7, 17), (17, 7), (0.5, 16.97)])
@pytest.mark.parametrize("steps", [(100, 100), (100, 250), (250, 100)])
def test_inner_product_is_the_integral(gammas: tuple[float, float], steps: tuple[int, int]) -> None:
    """Against Gauss–Legendre quadrature, exact for the integer γ."""
    a, b = Profile(steps[0], gammas[0]), Profile(steps[1], gammas[1])
    nodes, weights = np.polynomial.legendre.leggauss(60)
    end = min(steps)
    tau = (nodes + 1) * end / 2
    values = [(p.gamma + 1) * tau**p.gamma / p.step ** (p.gamma + 1) for p in (a, b)]
    integral = float((weights * values[0] * values[1]).sum() * end / 2)
    assert posthoc.inner_product(a, b) == pytest.approx(integral, rel=1e-12)


def test_a_tracked_profile_is_reconstructed_exactly() -> None:
    trajectory = _trajectory()
    snapshots = _snapshots(trajectory, _profiles(20))
    for sigma in SIGMAS:
        for step in (T // 20, T // 2, T):
            made = reconstruct(snapshots, sigma, step)["weight"]
            direct = _direct(trajectory, posthoc.gamma_from_sigma_rel(sigma), step)
            torch.testing.assert_close(made, direct, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("sigma", "limit"), [(0.03, 3e-2), (0.04, 8e-3), (0.06, 3e-3), (0.075, 3e-3), (0.15, 7e-3), (0.2, 2e-2)]
)
def test_an_untracked_profile_within_the_bound(sigma: float, limit: float) -> None:
    """20 snapshots of two lengths. The profile's error is as measured, and the weights' error follows from it."""
    trajectory = _trajectory()
    profiles = _profiles(20)
    target = Profile(T, posthoc.gamma_from_sigma_rel(sigma))
    combination = combine_profiles(profiles, target)
    assert limit / 4 < combination.relative_error < limit
    assert sum(combination.weights) == pytest.approx(1, abs=1e-13)
    made = reconstruct(_snapshots(trajectory, profiles), sigma, T)["weight"]
    error = (made - _direct(trajectory, target.gamma, T)).abs()
    spread = (trajectory - trajectory.mean(0)).square().sum(0).sqrt()
    norm = math.sqrt(posthoc.inner_product(target, target))
    assert (error <= (combination.relative_error + 1e-7) * norm * spread).all()


@pytest.mark.parametrize("sigma", [0.03, 0.075, 0.2])
def test_the_bound_is_reached(sigma: float) -> None:
    """By weights that move as the profile's own error does; so the bound is no wider than it must be."""
    profiles = _profiles(20, 20_000)
    target = Profile(20_000, posthoc.gamma_from_sigma_rel(sigma))
    combination = combine_profiles(profiles, target)
    error = -posthoc.profile_weights(target.gamma, target.step)
    for weight, profile in zip(combination.weights, profiles, strict=True):
        error[: profile.step] += weight * posthoc.profile_weights(profile.gamma, profile.step)
    norm = math.sqrt(posthoc.inner_product(target, target))
    assert float(error.norm()) / norm == pytest.approx(combination.relative_error, rel=1e-2)
    assert float(error.norm()) / norm <= combination.relative_error + 1e-8


@pytest.mark.parametrize("sigma", [0.03, 0.06, 0.2])
def test_no_other_weights_are_nearer(sigma: float) -> None:
    """At the least squares under Σ w = 1 the error's inner product with every snapshot is the same number."""
    profiles = _profiles(12)
    target = Profile(T, posthoc.gamma_from_sigma_rel(sigma))
    weights = combine_profiles(profiles, target).weights
    slopes = [
        sum(w * posthoc.inner_product(p, q) for w, q in zip(weights, profiles, strict=True))
        - posthoc.inner_product(p, target)
        for p in profiles
    ]
    size = posthoc.inner_product(target, target)
    assert max(slopes) - min(slopes) < 1e-6 * size


@pytest.mark.parametrize("sigma", [0.03, 0.06, 0.075, 0.15, 0.2])
def test_the_sum_of_1_costs_little(sigma: float) -> None:
    """The paper's weights are free; here by a singular value decomposition of the profiles themselves."""
    steps = 12_800
    profiles = _profiles(20, steps)
    target = Profile(steps, posthoc.gamma_from_sigma_rel(sigma))
    columns = torch.zeros(steps, len(profiles), dtype=torch.float64)
    for k, profile in enumerate(profiles):
        columns[: profile.step, k] = posthoc.profile_weights(profile.gamma, profile.step)
    goal = posthoc.profile_weights(target.gamma, steps)
    free = np.linalg.lstsq(columns.numpy(), goal.numpy(), rcond=1e-12)[0]
    error = float((columns @ torch.from_numpy(free) - goal).norm() / goal.norm())
    assert 0.98 < combine_profiles(profiles, target).relative_error / error < 1.02


def test_the_error_falls_with_the_square_of_the_spacing() -> None:
    target = Profile(T, posthoc.gamma_from_sigma_rel(0.075))
    errors = [combine_profiles(_profiles(num), target).relative_error for num in (16, 32, 64)]
    assert 3 < errors[0] / errors[1] < 5
    assert 3.5 < errors[1] / errors[2] < 4.5


def test_the_error_of_a_step_without_a_snapshot_is_told() -> None:
    target = Profile(T * 5 // 8, posthoc.gamma_from_sigma_rel(0.05))
    at_a_snapshot, between = (combine_profiles(_profiles(num), target).relative_error for num in (16, 4))
    assert at_a_snapshot < 1e-7
    assert between > 0.1


def test_constant_weights_stay_constant() -> None:
    snapshots = [Snapshot(p, {"scale": torch.full((2,), 7.0).double()}) for p in _profiles(3)]
    for sigma in (0.01, 0.05, 0.28):
        torch.testing.assert_close(
            reconstruct(snapshots, sigma, T * 2 // 3)["scale"],
            torch.full((2,), 7.0).double(),
            rtol=1e-13,
            atol=0,
        )


def test_one_snapshot_is_what_there_is() -> None:
    profile = Profile(100, 6.94)
    other = combine_profiles([profile], Profile(100, 16.97))
    assert other.weights == (1.0,)
    assert other.relative_error > 0.3
    same = combine_profiles([profile], profile)
    assert same.weights == (1.0,)
    assert same.relative_error < 1e-7


def test_snapshots_of_neighbouring_steps_do_no_harm() -> None:
    """Profiles one update apart are collinear to seven digits; the tracked one still comes out."""
    gamma = posthoc.gamma_from_sigma_rel(0.05)
    steps = [10**6 - k for k in range(6)]
    combination = combine_profiles([Profile(step, gamma) for step in steps], Profile(steps[3], gamma))
    assert combination.weights == pytest.approx([0, 0, 0, 1, 0, 0], abs=1e-10)
    near = combine_profiles([Profile(s, gamma) for s in steps], Profile(10**6, gamma * 1.01))
    assert math.fsum(abs(weight) for weight in near.weights) < 1e4
    assert near.relative_error < 0.01


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((5,), 100.0))
        self.register_buffer("count", torch.tensor(0))


def _train(model: _Model, ema: PowerEMA, trajectory: Tensor, steps: range) -> None:
    for step in steps:
        with torch.no_grad():
            model.weight.copy_(trajectory[step])
        model.get_buffer("count").fill_(step + 1)
        ema.update(model, step)


def test_tracking_is_the_profile() -> None:
    """In float32 to its rounding, and the initialisation of 100 has no part in it."""
    trajectory = _trajectory(300)
    model = _Model()
    ema = PowerEMA(model, SIGMAS)
    _train(model, ema, trajectory, range(300))
    for sigma, snapshot in zip(SIGMAS, ema.snapshots(300), strict=True):
        assert snapshot.profile == Profile(300, posthoc.gamma_from_sigma_rel(sigma))
        direct = _direct(trajectory, snapshot.profile.gamma, 300)
        torch.testing.assert_close(snapshot.tensors["weight"].double(), direct, rtol=2e-6, atol=0)
        assert int(snapshot.tensors["count"]) == 300


def test_a_run_that_goes_on_ends_as_one_that_was_not_stopped() -> None:
    trajectory = _trajectory(40)
    whole, first, second = _Model(), _Model(), _Model()
    tracked, before, after = PowerEMA(whole), PowerEMA(first), PowerEMA(second)
    _train(whole, tracked, trajectory, range(40))
    _train(first, before, trajectory, range(15))
    saved = before.snapshots(15)
    after.load(saved[::-1])
    _train(first, before, trajectory, range(15, 20))
    _train(second, after, trajectory, range(15, 40))
    for a, b in zip(tracked.snapshots(40), after.snapshots(40), strict=True):
        assert torch.equal(a.tensors["weight"], b.tensors["weight"])


def test_combine_tensors() -> None:
    parts = [
        (0.25, {"w": torch.tensor([4.0, 8.0]), "count": torch.tensor(1)}),
        (0.75, {"w": torch.tensor([0.0, 4.0]), "count": torch.tensor(2)}),
    ]
    made = combine_tensors(iter(parts))
    assert torch.equal(made["w"], torch.tensor([1.0, 5.0]))
    assert int(made["count"]) == 2
    assert made["w"].dtype == torch.float32
    assert torch.equal(parts[0][1]["w"], torch.tensor([4.0, 8.0]))


_SNAPSHOT = Snapshot(Profile(10, 6.94), {"w": torch.zeros(2)})


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("sigma_rel", lambda: posthoc.gamma_from_sigma_rel(0.0)),
        ("sigma_rel", lambda: posthoc.gamma_from_sigma_rel(0.2887)),
        ("sigma_rel", lambda: posthoc.gamma_from_sigma_rel(float("nan"))),
        ("sigma_rel", lambda: reconstruct([_SNAPSHOT], -0.1, 10)),
        ("sigma_rel", lambda: PowerEMA(_Model(), (0.05, 0.3))),
        ("sigma_rels", lambda: PowerEMA(_Model(), ())),
        ("sigma_rels", lambda: PowerEMA(_Model(), (0.05, 0.05))),
        ("gamma", lambda: posthoc.sigma_rel_from_gamma(-0.5)),
        ("gamma", lambda: Profile(1, float("inf"))),
        ("step", lambda: Profile(0, 1.0)),
        ("step", lambda: reconstruct([_SNAPSHOT], 0.1, 0)),
        ("step", lambda: reconstruct([_SNAPSHOT], 0.1, 11)),
        ("step", lambda: posthoc.power_decay(1.0, 0)),
        ("step", lambda: PowerEMA(_Model()).snapshots(0)),
        ("step", lambda: PowerEMA(_Model()).update(_Model(), -1)),
        ("profiles", lambda: reconstruct([], 0.1, 10)),
        ("profiles", lambda: reconstruct([_SNAPSHOT, _SNAPSHOT], 0.1, 10)),
        ("parts", lambda: combine_tensors([])),
        ("tensors", lambda: combine_tensors([(1.0, {"w": torch.zeros(2)}), (1.0, {"w": torch.zeros(3)})])),
        ("tensors", lambda: combine_tensors([(1.0, {"w": torch.zeros(2)}), (1.0, {"v": torch.zeros(2)})])),
        ("snapshots", lambda: PowerEMA(_Model()).load([_SNAPSHOT])),
        ("snapshots", lambda: PowerEMA(_Model()).load(PowerEMA(_Model()).snapshots(1) * 2)),
    ],
)
def test_errors_name_the_argument(name: str, call) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: "):
        call()


def test_a_snapshot_stays_while_training_goes_on() -> None:
    model = nn.Linear(2, 2)
    tracked = PowerEMA(model, SIGMAS)
    tracked.update(model, 0)
    taken = tracked.snapshots(1)
    before = [{name: tensor.clone() for name, tensor in snapshot.tensors.items()} for snapshot in taken]
    with torch.no_grad():
        model.weight.add_(1.0)
    tracked.update(model, 1)
    for snapshot, tensors, later in zip(taken, before, tracked.snapshots(2), strict=True):
        assert torch.equal(snapshot.tensors["weight"], tensors["weight"])
        assert not torch.equal(later.tensors["weight"], tensors["weight"])
