"""What each sampler puts out for Gaussian data, exactly, against its paper's step written out here.

For Gaussian data the best network is linear, so that every state is a sum of coefficients times draws: the driver
is run on unit draws, which reads the coefficients off, and their squares sum to the variance.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ddpm_core import (
    LinearGaussianProcess,
    PredictionType,
    ReverseProcess,
    SamplerConfig,
    Schedule,
    ScheduleConfig,
    rng,
    sample,
    trajectory,
)
from ddpm_core.samplers import visited_timesteps
from tests.support.oracles import GaussianData

DATA = GaussianData(0.25)
SHORT = Schedule.from_config(ScheduleConfig(num_timesteps=20, beta_start=0.005, beta_end=0.7))
COSINE = Schedule.from_config(ScheduleConfig(kind="cosine", num_timesteps=100))
SILENT = Schedule(torch.cat((SHORT.betas[:-1], torch.ones(1, dtype=torch.float64))))  # zero terminal SNR

CONFIGS = [
    SamplerConfig(kind="ancestral", variance_type="fixed_small"),
    SamplerConfig(kind="ancestral", variance_type="fixed_large"),
    SamplerConfig(kind="ancestral", variance_type="analytic"),
    SamplerConfig(kind="ancestral", variance_type="learned_range"),
    SamplerConfig(kind="ddim"),
    SamplerConfig(kind="ddim", eta=0.4),
    SamplerConfig(kind="ddim", eta=1.0),
    SamplerConfig(kind="dpm_solver_pp_2m"),
    SamplerConfig(kind="dpm_solver_pp_2m_sde"),
    SamplerConfig(kind="heun"),
]
LEARNED_FRACTION = 0.3


def _name(config: SamplerConfig) -> str:
    if config.kind == "ancestral":
        return config.variance_type
    return f"{config.kind}-{config.eta}" if config.kind == "ddim" else config.kind


def _network(process: LinearGaussianProcess, prediction_type: PredictionType, learned: bool):
    """The best network: E[x_0|x_t] = a·s²·x_t/(a²·s² + b²), and ε and v that fit it."""
    a, b = process.a, process.b
    slope = a * DATA.variance / (a.square() * DATA.variance + b.square())
    eps_slope = (1.0 - a * slope) / b
    slopes = {"x_start": slope, "eps": eps_slope, "v": a * eps_slope - b * slope}[prediction_type]

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        output = slopes[t].to(x_t.dtype).reshape(-1, 1, 1, 1) * x_t
        v = torch.full_like(output, 2.0 * LEARNED_FRACTION - 1.0)
        return torch.cat((output, v), 1) if learned else output

    return network


def _responses(
    monkeypatch: pytest.MonkeyPatch,
    schedule: Schedule,
    config: SamplerConfig,
    prediction_type: PredictionType,
) -> list[Tensor]:
    """The states from the noisiest down and the image, each `[1 + num_steps]` coefficients: of x_T, then of the
    noise of the step that leaves each visited timestep."""
    draws = torch.cat((torch.zeros(1, dtype=torch.int64), visited_timesteps(schedule, config) + 1))

    def unit(seed, purpose, index, shape, *, draw, dtype):
        return (index == draw).to(dtype).reshape(-1, 1, 1, 1)

    monkeypatch.setattr(rng, "normal", unit)
    way = list(
        trajectory(
            _network(schedule, prediction_type, config.variance_type == "learned_range"),
            schedule,
            config,
            seed=0,
            index=draws,
            shape=(1, 1, 1),
            prediction_type=prediction_type,
            x_start_mse=DATA.bayes_x_start_mse(schedule),
            dtype=torch.float64,
        )
    )
    return [step.x_t.flatten() for step in way] + [way[-1].pred_x_start.flatten()]


def _by_the_papers(schedule: Schedule, config: SamplerConfig) -> list[Tensor]:
    """The same, by each paper's own formula in its own variables."""
    visited = visited_timesteps(schedule, config).tolist()
    products = (1.0 - schedule.betas).cumprod(0).tolist()
    unit = torch.eye(1 + len(visited), dtype=torch.float64)

    def best(x: Tensor, bar: float) -> Tensor:
        return math.sqrt(bar) * DATA.variance / (bar * DATA.variance + 1 - bar) * x

    x, before, gain_before = unit[0], None, math.inf
    states = [x]
    for place in reversed(range(1, len(visited))):
        bar, bar_next, z = products[visited[place]], products[visited[place - 1]], unit[1 + place]
        a, s, a_next, s_next = (math.sqrt(v) for v in (bar, 1 - bar, bar_next, 1 - bar_next))
        x_0 = best(x, bar)
        gain = math.log(a_next / s_next) - math.log(a / s) if a else math.inf  # h of Lu et al.
        if config.kind == "ancestral":
            beta = 1 - bar / bar_next
            small = beta * (1 - bar_next) / (1 - bar)
            error = DATA.variance * (1 - bar) / (bar * DATA.variance + 1 - bar)
            on_x_0 = a_next * beta / (1 - bar)
            variance = {
                "fixed_small": small,
                "fixed_large": beta,
                "analytic": small + on_x_0**2 * error,
                "learned_range": beta**LEARNED_FRACTION * small ** (1 - LEARNED_FRACTION),
            }[config.variance_type]
            x = on_x_0 * x_0 + math.sqrt(1 - beta) * (1 - bar_next) / (1 - bar) * x + math.sqrt(variance) * z
        elif config.kind == "ddim":
            sigma = config.eta * math.sqrt((1 - bar_next) / (1 - bar)) * math.sqrt(1 - bar / bar_next)
            eps = (x - a * x_0) / s
            # √(1 − ᾱ_{t−1} − σ²), in a form whose rounding the root does not enlarge where it is 0
            rest = (1 - bar_next) / (1 - bar) * (1 - bar - config.eta**2 * (1 - bar / bar_next))
            x = a_next * x_0 + math.sqrt(rest) * eps + sigma * z
        elif config.kind == "heun" and a:
            level, level_next = s / a, s_next / a_next
            y = x / a
            slope = (y - x_0) / level
            reached = y + (level_next - level) * slope
            slope_there = (reached - best(a_next * reached, bar_next)) / level_next
            x = a_next * (y + (level_next - level) * (slope + slope_there) / 2)
        else:
            r = gain_before / gain if math.isfinite(gain) else math.inf
            ahead = x_0 if before is None or config.kind == "heun" else x_0 + (x_0 - before) / (2 * r)
            if config.kind == "dpm_solver_pp_2m_sde":
                x = s_next / s * math.exp(-gain) * x + a_next * -math.expm1(-2 * gain) * ahead
                x = x + s_next * math.sqrt(-math.expm1(-2 * gain)) * z
            else:
                x = s_next / s * x - a_next * math.expm1(-gain) * ahead
        before, gain_before = x_0, gain
        states.append(x)
    return [*states, best(x, products[visited[0]])]


@pytest.mark.parametrize("num_steps", [1, 2, 3, 9, None])
@pytest.mark.parametrize(
    ("schedule", "prediction_type", "spacing"),
    [
        (SHORT, "eps", "linspace"),
        (COSINE, "v", "karras"),
        (SHORT, "x_start", "quadratic"),
        (SILENT, "v", "linspace"),
        (SILENT, "x_start", "karras"),
        (SILENT, "v", "trailing"),
        (SHORT, "eps", "leading"),
    ],
    ids=[
        "eps",
        "cosine-v-karras",
        "quadratic",
        "silent-v",
        "silent-x_start-karras",
        "silent-v-trailing",
        "leading",
    ],
)
@pytest.mark.parametrize("config", CONFIGS, ids=_name)
def test_every_state_is_that_of_the_paper_s_own_step(
    monkeypatch: pytest.MonkeyPatch,
    schedule: Schedule,
    prediction_type: PredictionType,
    spacing,
    config: SamplerConfig,
    num_steps: int | None,
) -> None:
    config = replace(config, clip=False, spacing=spacing, num_steps=num_steps)
    states = _responses(monkeypatch, schedule, config, prediction_type)
    expected = _by_the_papers(schedule, config)
    assert len(states) == len(expected)
    for state, paper in zip(states, expected, strict=True):
        torch.testing.assert_close(state, paper, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, None])
@pytest.mark.parametrize("spacing", ["linspace", "karras", "trailing"])
@pytest.mark.parametrize(
    ("schedule", "prediction_type"),
    [(SHORT, "eps"), (COSINE, "v"), (SILENT, "v")],
    ids=["eps", "cosine", "silent"],
)
def test_analytic_variance_is_exact_at_any_number_of_steps(
    monkeypatch: pytest.MonkeyPatch, schedule: Schedule, prediction_type: PredictionType, spacing, num_steps
) -> None:
    """For Gaussian data p(x_{t−1}|x_t) is Gaussian, with the posterior's mean at x̂_0 and the analytic variance."""
    config = SamplerConfig(
        kind="ancestral", variance_type="analytic", clip=False, spacing=spacing, num_steps=num_steps
    )
    visited = visited_timesteps(schedule, config)
    marginal = DATA.marginal_variance(schedule)[visited]
    *states, image = _responses(monkeypatch, schedule, config, prediction_type)
    if schedule is SILENT:
        assert float(marginal[-1]) == 1.0  # p(x_T) is the law of x_T itself
    start = torch.ones_like(states[0])
    start[0] = marginal[-1]
    for state, variance in zip(states, reversed(marginal.tolist()), strict=True):
        assert abs(float(state.square() @ start) - variance) < 1e-12
    error = float(DATA.bayes_x_start_mse(schedule)[visited[0]])
    # the image is E[x_0|x_t], without the last step's variance
    assert abs(float(image.square() @ start) + error - DATA.variance) < 1e-12
    last = ReverseProcess(
        schedule.at(visited),
        variance_type="analytic",
        x_start_mse=DATA.bayes_x_start_mse(schedule)[visited],
        prediction_type=prediction_type,
    ).log_variance_table()[0]
    assert abs(float(last.exp()) - error) < 1e-12


@pytest.mark.parametrize("config", CONFIGS, ids=_name)
def test_drawn_images_have_these_moments(config: SamplerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(config, clip=False, num_steps=7)
    images = sample(
        _network(SILENT, "v", config.variance_type == "learned_range"),
        SILENT,
        config,
        seed=11,
        index=torch.arange(250),
        shape=(1, 20, 20),
        prediction_type="v",
        x_start_mse=DATA.bayes_x_start_mse(SILENT),
    )
    variance = float(_by_the_papers(SILENT, config)[-1].square().sum())
    count = images.numel()
    assert abs(float(images.mean())) < 5 * math.sqrt(variance / count)
    assert abs(float(images.square().mean()) - variance) < 5 * variance * math.sqrt(2 / count)


@pytest.mark.parametrize(
    "config",
    [c for c in CONFIGS if c.kind != "ancestral" or c.variance_type in ("fixed_small", "analytic")],
    ids=_name,
)
def test_the_scale_of_the_process_does_not_matter(config: SamplerConfig) -> None:
    """At equal SNR a variance-exploding process (a = 1) gives the images of the variance-preserving one.

    β, the variance of q's own step, is another at another scale, hence not with fixed_large and learned_range.
    """
    config = replace(config, clip=False, num_steps=9)
    exploding = LinearGaussianProcess(
        torch.zeros_like(SHORT.log_snr), -0.5 * SHORT.log_snr, total_variance=(-SHORT.log_snr).exp()
    )
    images = [
        sample(
            _network(process, "x_start", False),
            process,
            config,
            seed=0,
            index=torch.arange(3),
            shape=(1, 2, 2),
            prediction_type="x_start",
            x_start_mse=DATA.bayes_x_start_mse(SHORT),
            dtype=torch.float64,
        )
        for process in (
            LinearGaussianProcess(SHORT.log_a, SHORT.log_b, total_variance=SHORT.b.square()),
            exploding,
        )
    ]
    torch.testing.assert_close(images[0], images[1], rtol=1e-9, atol=1e-12)
