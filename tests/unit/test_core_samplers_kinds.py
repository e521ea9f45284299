"""What every kind of sampler keeps: batches, timesteps, dtypes and memory formats."""

import math

import pytest
import torch
from torch import Tensor

from ddpm_core import (
    LinearGaussianProcess,
    ReverseProcess,
    SamplerConfig,
    Schedule,
    ScheduleConfig,
    UNet,
    UNetConfig,
    rng,
    sample,
    trajectory,
)
from ddpm_core.processes import variance_exploding
from ddpm_core.samplers import SAMPLER_KINDS, SPACINGS, denoise_step, step_tables, visited_timesteps
from ddpm_core.steps import Step, advance, ddim_tables

LINEAR = Schedule.from_config(ScheduleConfig())
SHORT = Schedule.from_config(ScheduleConfig(num_timesteps=20, beta_start=0.005, beta_end=0.7))
SILENT = Schedule(torch.cat((SHORT.betas[:-1], torch.ones(1, dtype=torch.float64))))
SHAPE = (2, 3, 4)


def _some_network(x_t: Tensor, t: Tensor) -> Tensor:
    return torch.sin(3 * x_t) + 0.3 * x_t + 0.001 * t.to(x_t.dtype).reshape(-1, 1, 1, 1)


def _with_variance(x_t: Tensor, t: Tensor) -> Tensor:
    return torch.cat((_some_network(x_t, t), torch.cos(5 * x_t)), 1)


CONFIGS = [
    SamplerConfig(kind="ancestral", num_steps=5, variance_type="learned_range"),
    SamplerConfig(kind="ancestral", num_steps=5, variance_type="analytic", threshold_quantile=0.8),
    SamplerConfig(kind="ddim", num_steps=5, eta=0.5, spacing="quadratic"),
    SamplerConfig(kind="dpm_solver_pp_2m", num_steps=5, spacing="trailing", threshold_quantile=0.8),
    SamplerConfig(kind="dpm_solver_pp_2m_sde", num_steps=5, spacing="leading"),
    SamplerConfig(kind="heun", num_steps=5, spacing="karras"),
]


def _make(config: SamplerConfig, index: Tensor, process=LINEAR, dtype=torch.float32, **kwargs) -> Tensor:
    is_learned = config.kind == "ancestral" and config.variance_type == "learned_range"
    return sample(
        _with_variance if is_learned else _some_network,
        process,
        config,
        seed=1,
        index=index,
        shape=SHAPE,
        x_start_mse=torch.full_like(process.log_a, 0.01),
        dtype=dtype,
        **kwargs,
    )


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.kind)
def test_an_image_does_not_depend_on_its_batch(config: SamplerConfig) -> None:
    torch.manual_seed(0)
    net = UNet(
        UNetConfig(8, 1, base_channels=8, channel_mults=(1, 2), num_groups=4, attention_resolutions=(4,))
    ).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.1)

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        out = net(x_t, t)
        return torch.cat((out, out.tanh()), 1) if config.variance_type == "learned_range" else out

    def images(index: Tensor, seed: int = 1) -> Tensor:
        return sample(
            network,
            LINEAR,
            config,
            seed=seed,
            index=index,
            shape=(1, 8, 8),
            x_start_mse=torch.full_like(LINEAR.betas, 0.01),
        )

    index = torch.tensor([3, 1234, 2**40, 0, 7])
    together = images(index)
    assert float(together.std(dim=0).mean()) > 0.1
    for row, one in enumerate(index):
        torch.testing.assert_close(images(one[None])[0], together[row], rtol=0, atol=1e-5)
    assert not torch.allclose(images(index, seed=2), together, atol=1e-3)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.kind)
def test_the_driver_takes_the_public_steps(config: SamplerConfig) -> None:
    """A trajectory is denoise_step after denoise_step, with the noise by its key."""
    index = torch.tensor([4, 9])
    visited = visited_timesteps(LINEAR, config)
    is_learned = config.kind == "ancestral" and config.variance_type == "learned_range"
    network = _with_variance if is_learned else _some_network
    mse = torch.linspace(0.001, 0.2, 1000, dtype=torch.float64)
    way = list(
        trajectory(
            network, LINEAR, config, seed=5, index=index, shape=SHAPE, x_start_mse=mse, dtype=torch.float64
        )
    )
    reverse = ReverseProcess(
        LINEAR.at(visited), "eps", config.variance_type, config.clip, mse[visited], config.threshold_quantile
    )
    x_t, before = rng.normal(5, "sample", index, SHAPE, dtype=torch.float64), None
    for place, step in zip(reversed(range(len(visited))), way, strict=True):
        at, t = torch.full((2,), place), torch.full((2,), int(visited[place]))
        torch.testing.assert_close(step.x_t, x_t, rtol=1e-9, atol=1e-9)
        noise = rng.normal(5, "sample", index, SHAPE, draw=int(visited[place]) + 1, dtype=torch.float64)
        if config.kind == "heun":
            reached, _ = denoise_step(reverse, config, x_t, at, network(x_t, t), None)
            if place:
                t_next = torch.full((2,), int(visited[place - 1]))
                before = reverse.predict(network(reached, t_next), reached, at - 1).x_start
        x_t, pred = denoise_step(reverse, config, x_t, at, network(x_t, t), noise, before)
        torch.testing.assert_close(step.pred_x_start, pred, rtol=1e-9, atol=1e-9)
        before = pred
    torch.testing.assert_close(x_t, way[-1].pred_x_start, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.kind)
def test_dtypes_memory_formats_and_devices(config: SamplerConfig) -> None:
    index = torch.tensor([7])
    exact = _make(config, index, SHORT, torch.float64)
    assert exact.shape == (1, *SHAPE)
    torch.testing.assert_close(_make(config, index, SHORT).double(), exact, rtol=1e-3, atol=1e-3)
    for dtype in (torch.bfloat16, torch.float16):
        image = _make(config, index, SHORT, dtype, device="cpu")
        assert image.dtype == dtype
        assert bool(image.isfinite().all())
        assert float(image.abs().max()) <= 1.0

    visited = visited_timesteps(LINEAR, config)
    reverse = ReverseProcess(
        LINEAR.at(visited),
        "eps",
        config.variance_type,
        config.clip,
        torch.full((5,), 0.01),
        config.threshold_quantile,
    )
    x_t = torch.randn(3, *SHAPE, dtype=torch.float64)
    t = torch.tensor([0, 2, 4])
    network = _with_variance if config.variance_type == "learned_range" else _some_network
    expected, _ = denoise_step(reverse, config, x_t, t, network(x_t, t), x_t, 0.5 * x_t)
    assert bool(expected.isfinite().all())
    strided = x_t.repeat_interleave(2, dim=3)[..., ::2]
    for other in (x_t.to(memory_format=torch.channels_last), strided):
        got, _ = denoise_step(reverse, config, other, t, network(other, t), other, 0.5 * other)
        torch.testing.assert_close(got, expected)


def _asked(process: LinearGaussianProcess, config: SamplerConfig) -> list[int]:
    seen: list[int] = []

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        assert t.dtype == torch.int64
        seen.append(int(t.unique()))
        return 0 * x_t

    sample(network, process, config, seed=0, index=torch.arange(2), shape=SHAPE, prediction_type="v")
    return seen


def test_evaluations_of_heun_and_of_the_others() -> None:
    assert _asked(SHORT, SamplerConfig(kind="heun", num_steps=3, spacing="leading")) == [12, 6, 6, 0, 0]
    assert _asked(SILENT, SamplerConfig(kind="heun", num_steps=3, spacing="trailing")) == [19, 12, 6, 6]
    assert _asked(SHORT, SamplerConfig(kind="heun", num_steps=1)) == [19]
    for kind in ("dpm_solver_pp_2m", "dpm_solver_pp_2m_sde"):
        assert _asked(SILENT, SamplerConfig(kind=kind, num_steps=3)) == [19, 10, 0]


@pytest.mark.parametrize("num_timesteps", [1, 2, 20, 4000])
@pytest.mark.parametrize("kind", SAMPLER_KINDS)
@pytest.mark.parametrize("is_silent", [False, True])
def test_chains_of_any_length(kind, num_timesteps: int, is_silent: bool) -> None:
    """T = 1 and T = 4000, β at its limits, with and without a signal at the end."""
    betas = torch.linspace(1e-8, 0.02 if num_timesteps > 20 else 1 - 1e-8, num_timesteps, dtype=torch.float64)
    betas[-1] = 1.0 if is_silent else betas[-1]
    schedule = Schedule(betas)
    for spacing in SPACINGS:
        config = SamplerConfig(kind=kind, num_steps=min(num_timesteps, 4), spacing=spacing)
        image = sample(
            _some_network, schedule, config, seed=0, index=torch.arange(2), shape=SHAPE, prediction_type="v"
        )
        assert bool(image.isfinite().all())
    tables = step_tables(ReverseProcess(schedule, "v"), SamplerConfig(kind=kind))
    for table in tables:
        assert bool(table.isfinite().all())
    assert [float(table[0]) for table in tables] == [0.0, 1.0, 0.0, 0.0]
    if kind != "heun" or is_silent:
        assert float(tables.on_other[-1]) == 0.0


@pytest.mark.parametrize("kind", SAMPLER_KINDS)
def test_eps_is_refused_without_a_signal(kind) -> None:
    with pytest.raises(ValueError, match=r"^prediction_type: must be 'v' or 'x_start'"):
        sample(
            _some_network,
            SILENT,
            SamplerConfig(kind=kind, num_steps=3),
            seed=0,
            index=torch.arange(1),
            shape=SHAPE,
        )


@pytest.mark.parametrize("kind", ["ddim", "dpm_solver_pp_2m", "dpm_solver_pp_2m_sde", "heun"])
def test_the_variance_type_is_ancestral_s_alone(kind) -> None:
    """The others take the first half of an output with a learned variance, and need no x_start_mse."""
    images = [
        sample(
            _with_variance if variance_type == "learned_range" else _some_network,
            SHORT,
            SamplerConfig(kind=kind, num_steps=4, variance_type=variance_type),
            seed=0,
            index=torch.arange(2),
            shape=SHAPE,
        )
        for variance_type in ("fixed_large", "fixed_small", "analytic", "learned_range")
    ]
    for image in images[1:]:
        torch.testing.assert_close(image, images[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", "euler"),
        ("spacing", "random"),
        ("karras_rho", 0.0),
        ("karras_rho", float("inf")),
        ("karras_rho", float("nan")),
        ("threshold_quantile", 0.0),
        ("threshold_quantile", 1.5),
        ("threshold_quantile", float("nan")),
    ],
)
def test_config_errors_name_the_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: must be .*, got {value!r}$"):
        SamplerConfig(**{field: value})  # type: ignore[arg-type]


def test_errors_name_the_argument() -> None:
    x = torch.zeros(1, *SHAPE)
    step = Step(1.0, 1.0, 1.0, 1.0)
    for kwargs in ({"other": x[:, :1]}, {"noise": x[:, :1]}):
        with pytest.raises(ValueError, match=rf"^{next(iter(kwargs))}: must have the shape of x_t"):
            advance(step, x, x, **kwargs)
    with pytest.raises(ValueError, match=r"^pred_x_start: must have the shape of x_t"):
        advance(step, x, x[:, :1])
    with pytest.raises(ValueError, match=r"^eta: must be between 0 and 1, got nan$"):
        ddim_tables(LINEAR, math.nan)
    for spacing in SPACINGS:
        with pytest.raises(ValueError, match=r"^num_steps: must be in 1\.\.20 "):
            visited_timesteps(SHORT, SamplerConfig(num_steps=21, spacing=spacing))
    with pytest.raises(ValueError, match=r"^eps_theta's output: must have twice the channels"):
        sample(
            _some_network,
            SHORT,
            SamplerConfig(kind="ancestral", variance_type="learned_range", num_steps=2),
            seed=0,
            index=torch.arange(1),
            shape=SHAPE,
        )
    with pytest.raises(ValueError, match=r"^x_start_mse: must be given"):
        sample(
            _some_network,
            SHORT,
            SamplerConfig(kind="ancestral", variance_type="analytic", num_steps=2),
            seed=0,
            index=torch.arange(1),
            shape=SHAPE,
        )


def test_noise_has_the_scale_of_the_last_timestep_that_is_visited() -> None:
    """The spacing "leading" ends before T − 1, where σ of an exploding process is another one."""
    process = variance_exploding(10, 0.01, 50.0)
    config = SamplerConfig(num_steps=5, spacing="leading")
    last = int(visited_timesteps(process, config)[-1])
    assert last < 9
    start = next(trajectory(_some_network, process, config, seed=0, index=torch.arange(2), shape=SHAPE)).x_t
    expected = rng.normal(0, "sample", torch.arange(2), SHAPE) * float(1 + process.b[last] ** 2) ** 0.5
    torch.testing.assert_close(start, expected)
