"""One step of each of diffusers' schedulers, and of ours, on the same state, model output and noise.

Where the two mean different things, settings are chosen for which they mean the same:
- diffusers keeps ᾱ in float32, which has lost four digits of 1 − ᾱ at the first timesteps; it gets float64 tables
  of the same betas, for the comparison is of the step.
- DDPM: the visited timesteps are given to it, since with linspace it takes t − ⌊T/S⌋ for the timestep before t. It
  adds noise in a last step that leaves t > 0, where ours has none and ends at x̂_0: there the means are compared.
- DDIM: it takes t − ⌊T/S⌋ too, and no timesteps of one's own: leading at any S, trailing where S divides T, and
  all T. set_alpha_to_one (ᾱ = 1 before the first) and use_clipped_model_output (ε̂ fits the clipped x̂_0) as ours.
- DPM-Solver++: final σ = 0, timesteps given; it knows no clipping, but dynamic thresholding. Without zero terminal
  SNR, where it puts ᾱ = 2^−24.
- Dynamic thresholding with no upper limit of s.
"""

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_core import PredictionType, ReverseProcess, SamplerConfig, Schedule, VarianceType
from ddpm_core.chains import karras_log_snr
from ddpm_core.samplers import Spacing, denoise_step, visited_timesteps

diffusers = pytest.importorskip("diffusers")
from diffusers.schedulers import scheduling_ddpm  # noqa: E402

THEIR_PREDICTION = {"eps": "epsilon", "x_start": "sample", "v": "v_prediction"}
SHAPE = (2, 3, 4, 5)
CASES = range(24)


def _betas(draw: random.Random, num_timesteps: int) -> Tensor:
    """Linear, linear in √β, cosine, or any."""
    kind = draw.choice(["linear", "scaled_linear", "cosine", "any"])
    start, end = draw.uniform(1e-4, 5e-3), draw.uniform(0.01, 0.05)
    if kind == "linear":
        return torch.linspace(start, end, num_timesteps, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, num_timesteps, dtype=torch.float64).square()
    if kind == "cosine":
        bar = (
            torch.cos(
                (torch.arange(num_timesteps + 1) / num_timesteps + 0.008) / 1.008 * torch.pi / 2
            ).double()
            ** 2
        )
        return (1 - bar[1:] / bar[:-1]).clamp(1e-5, 0.999)
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    return start + (end - start) * torch.rand(num_timesteps, generator=generator, dtype=torch.float64)


def _limits(draw: random.Random, can_clip: bool = True) -> dict:
    """clip and threshold_quantile of ours."""
    kind = draw.choice(["none", "clip", "threshold"] if can_clip else ["none", "threshold"])
    return {
        "clip": kind == "clip",
        "threshold_quantile": draw.uniform(0.5, 0.999) if kind == "threshold" else None,
    }


def _theirs(ours: dict) -> dict:
    quantile = ours["threshold_quantile"]
    thresholding = {"thresholding": quantile is not None, "sample_max_value": 1e9}
    return thresholding | ({} if quantile is None else {"dynamic_thresholding_ratio": quantile})


def _with_exact_tables(scheduler, schedule: Schedule):
    scheduler.betas = schedule.betas
    scheduler.alphas = 1.0 - schedule.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    scheduler.one = torch.ones((), dtype=torch.float64)
    scheduler.final_alpha_cumprod = scheduler.one
    return scheduler


def _case(case: int, may_be_silent: bool = True) -> tuple[random.Random, Schedule, PredictionType]:
    draw = random.Random(case)
    num_timesteps = draw.choice([1, 2, 10, 50, 100, 250, 1000])
    prediction_type: PredictionType = draw.choice(["eps", "x_start", "v"])
    betas = _betas(draw, num_timesteps)
    if may_be_silent and prediction_type != "eps" and draw.random() < 0.5:
        betas[-1] = 1.0
    return draw, Schedule(betas), prediction_type


def _states(case: int, channels: int = SHAPE[1]) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, a model output and a noise."""
    generator = torch.Generator().manual_seed(case)
    shapes = SHAPE, (SHAPE[0], channels, *SHAPE[2:]), SHAPE
    x_t, output, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return x_t, output, noise


def _some(draw: random.Random, num_visited: int) -> list[int]:
    """A few positions of the chain, with both ends."""
    return sorted({0, num_visited - 1, *(draw.randrange(num_visited) for _ in range(6))}, reverse=True)


@pytest.mark.parametrize("case", CASES)
def test_ddpm_steps_agree(case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, schedule, prediction_type = _case(case)
    limits = _limits(draw)
    variance_type: VarianceType = draw.choice(["fixed_small", "fixed_large", "learned_range"])
    config = SamplerConfig(
        kind="ancestral",
        num_steps=draw.randint(1, schedule.num_timesteps),
        variance_type=variance_type,
        spacing=draw.choice(["linspace", "leading", "trailing", "quadratic", "karras"]),
        **limits,
    )
    visited = visited_timesteps(schedule, config)
    scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=schedule.num_timesteps,
        trained_betas=schedule.betas.numpy(),
        variance_type=variance_type,
        prediction_type=THEIR_PREDICTION[prediction_type],
        clip_sample=limits["clip"],
        **_theirs(limits),
    )
    _with_exact_tables(scheduler, schedule).set_timesteps(timesteps=visited.flip(0).tolist())
    reverse = ReverseProcess(schedule.at(visited), prediction_type, variance_type, **limits)
    x_t, output, noise = _states(case, SHAPE[1] * (2 if variance_type == "learned_range" else 1))
    for place in _some(draw, len(visited)):
        z = torch.zeros_like(noise) if place == 0 else noise
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *a, z=z, **k: z)
        theirs = scheduler.step(output, int(visited[place]), x_t)
        ours, pred_x_start = denoise_step(reverse, config, x_t, torch.full((SHAPE[0],), place), output, noise)
        torch.testing.assert_close(pred_x_start, theirs.pred_original_sample, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours, theirs.prev_sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_ddim_steps_agree(case: int) -> None:
    draw, schedule, prediction_type = _case(case)
    limits = _limits(draw)
    num_timesteps = schedule.num_timesteps
    spacing: Spacing = draw.choice(["leading", "trailing", "linspace"])
    divisors = [n for n in range(1, num_timesteps + 1) if num_timesteps % n == 0]
    num_steps = {
        "leading": draw.randint(1, num_timesteps),
        "trailing": draw.choice(divisors),
        "linspace": num_timesteps,
    }[spacing]
    eta = draw.choice([0.0, 0.5, 1.0])
    config = SamplerConfig(kind="ddim", num_steps=num_steps, eta=eta, spacing=spacing, **limits)
    visited = visited_timesteps(schedule, config)
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=num_timesteps,
        trained_betas=schedule.betas.numpy(),
        prediction_type=THEIR_PREDICTION[prediction_type],
        timestep_spacing=spacing,
        set_alpha_to_one=True,
        clip_sample=limits["clip"],
        **_theirs(limits),
    )
    _with_exact_tables(scheduler, schedule).set_timesteps(num_steps)
    assert scheduler.timesteps.flip(0).tolist() == visited.tolist()
    reverse = ReverseProcess(schedule.at(visited), prediction_type, **limits)
    x_t, output, noise = _states(case)
    for place in _some(draw, len(visited)):
        theirs = scheduler.step(
            output, int(visited[place]), x_t, eta=eta, use_clipped_model_output=True, variance_noise=noise
        )
        ours, pred_x_start = denoise_step(reverse, config, x_t, torch.full((SHAPE[0],), place), output, noise)
        torch.testing.assert_close(pred_x_start, theirs.pred_original_sample, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours, theirs.prev_sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("kind", "algorithm_type"),
    [("dpm_solver_pp_2m", "dpmsolver++"), ("dpm_solver_pp_2m_sde", "sde-dpmsolver++")],
    ids=["ode", "sde"],
)
def test_dpm_solver_steps_agree(case: int, kind, algorithm_type: str) -> None:
    """Whole chains, since a step depends on the one before, with each step's state taken from ours."""
    draw, schedule, prediction_type = _case(case, may_be_silent=False)
    limits = _limits(draw, can_clip=False)
    config = SamplerConfig(
        kind=kind,
        num_steps=draw.randint(1, min(schedule.num_timesteps, 40)),
        spacing=draw.choice(["linspace", "leading", "trailing", "quadratic", "karras"]),
        **limits,
    )
    visited = visited_timesteps(schedule, config)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        num_train_timesteps=schedule.num_timesteps,
        trained_betas=schedule.betas.numpy(),
        solver_order=2,
        solver_type="midpoint",
        algorithm_type=algorithm_type,
        prediction_type=THEIR_PREDICTION[prediction_type],
        final_sigmas_type="zero",
        **_theirs(limits),
    )
    _with_exact_tables(scheduler, schedule).set_timesteps(timesteps=visited.flip(0).tolist())
    levels = torch.exp(-0.5 * schedule.at(visited).log_snr).flip(0)
    torch.testing.assert_close(scheduler.sigmas[:-1].double(), levels, rtol=1e-5, atol=0)
    scheduler.sigmas = torch.cat((levels, levels.new_zeros(1)))
    reverse = ReverseProcess(schedule.at(visited), prediction_type, **limits)
    x_t = _states(case)[0]
    before = None
    for place in reversed(range(len(visited))):
        _, output, noise = _states(1000 * case + place)
        theirs = scheduler.step(output, int(visited[place]), x_t, variance_noise=noise).prev_sample
        x_t, before = denoise_step(
            reverse, config, x_t, torch.full((SHAPE[0],), place), output, noise, before
        )
        torch.testing.assert_close(x_t, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize(("num_timesteps", "num_steps"), [(1000, 50), (1000, 8), (100, 100), (12, 4)])
def test_spacings_agree(num_timesteps: int, num_steps: int, spacing) -> None:
    """diffusers rounds halves to even, ours go up: none of these has one."""
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=num_timesteps, timestep_spacing=spacing)
    scheduler.set_timesteps(num_steps)
    schedule = Schedule(torch.linspace(1e-4, 0.02, num_timesteps))
    ours = visited_timesteps(schedule, SamplerConfig(num_steps=num_steps, spacing=spacing))
    assert ours.tolist() == scheduler.timesteps.flip(0).tolist()


def test_karras_levels_agree() -> None:
    """Their σ between the ends of the schedule, ρ = 7."""
    schedule = Schedule(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    scheduler = diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True)
    scheduler.set_timesteps(18)
    points = karras_log_snr(float(schedule.log_snr[0]), float(schedule.log_snr[-1]), 18)
    expected = np.log(scheduler.sigmas[:-1].numpy()[::-1].astype(np.float64))
    torch.testing.assert_close(-0.5 * points, torch.from_numpy(expected.copy()), rtol=1e-3, atol=1e-3)
