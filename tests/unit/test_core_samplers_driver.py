"""The samplers' loop: timesteps that are visited, keyed noise, laziness, and what is refused."""

import pydantic
import pytest
import torch
from torch import Tensor

from ddpm_core import (
    SamplerConfig,
    Schedule,
    ScheduleConfig,
    UNet,
    UNetConfig,
    predict_x_start,
    respaced_timesteps,
    rng,
    sample,
    trajectory,
)
from tests.support.oracles import GaussianData, full

LINEAR = Schedule.from_config(ScheduleConfig())
SHORT = Schedule.from_config(ScheduleConfig(num_timesteps=20, beta_start=0.005, beta_end=0.7))
DATA = GaussianData(0.25)
SHAPE = (1, 2, 3)
DDIM = SamplerConfig(kind="ddim", num_steps=None, eta=0.0, clip=False)


def _some_network(x_t: Tensor, t: Tensor) -> Tensor:
    return torch.sin(3 * x_t) + 0.3 * x_t + 0.001 * t.to(x_t.dtype).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("config", [SamplerConfig(), SamplerConfig(kind="ancestral", num_steps=30)])
def test_images_lie_in_the_range_when_clipped(config: SamplerConfig) -> None:
    images = sample(_some_network, LINEAR, config, seed=0, index=torch.arange(4), shape=SHAPE)
    assert images.dtype == torch.float32
    assert float(images.abs().max()) <= 1.0


@pytest.mark.parametrize("config", [SamplerConfig(num_steps=5), SamplerConfig(kind="ancestral", num_steps=5)])
def test_an_image_does_not_depend_on_its_batch(config: SamplerConfig) -> None:
    torch.manual_seed(0)
    net = UNet(
        UNetConfig(8, 1, base_channels=8, channel_mults=(1, 2), num_groups=4, attention_resolutions=(4,))
    ).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.1)
    index = torch.tensor([3, 1234, 2**40, 0, 7])
    together = sample(net, LINEAR, config, seed=1, index=index, shape=(1, 8, 8))
    assert float(together.std(dim=0).mean()) > 0.1
    for row, one in enumerate(index):
        alone = sample(net, LINEAR, config, seed=1, index=one[None], shape=(1, 8, 8))
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-5)
    other = sample(net, LINEAR, config, seed=2, index=index, shape=(1, 8, 8))
    assert not torch.allclose(other, together, atol=1e-3)


@pytest.mark.parametrize(("num_timesteps", "num_steps"), [(1000, 50), (1000, None), (7, 5), (7, 7), (1, 1)])
def test_linspace_visits_both_ends_evenly(num_timesteps: int, num_steps: int | None) -> None:
    got = respaced_timesteps(num_timesteps, num_steps or num_timesteps)
    steps = num_steps or num_timesteps
    assert got.dtype == torch.int64
    assert got.shape == (steps,)
    assert int(got[0]) == 0
    assert int(got[-1]) == num_timesteps - 1
    gaps = got.diff()
    if steps > 1:
        assert int(gaps.min()) >= 1
        assert int(gaps.max() - gaps.min()) <= 1


def test_one_step_starts_from_the_last_timestep() -> None:
    assert respaced_timesteps(1000, 1).tolist() == [999]
    config = SamplerConfig(num_steps=1, clip=False)
    image = sample(
        DATA.eps_theta(LINEAR),
        LINEAR,
        config,
        seed=0,
        index=torch.tensor([0]),
        shape=SHAPE,
        dtype=torch.float64,
    )
    x_t = rng.normal(0, "sample", torch.tensor([0]), SHAPE, dtype=torch.float64)
    at = full(999, x_t)
    expected = predict_x_start(LINEAR, x_t, at, DATA.eps_theta(LINEAR)(x_t, at))
    torch.testing.assert_close(image, expected)


@pytest.mark.parametrize("num_steps", [0, 21])
def test_too_many_steps_are_refused(num_steps: int) -> None:
    with pytest.raises(ValueError, match=r"^num_steps: must be in 1\.\.20 .*got"):
        respaced_timesteps(20, num_steps)


def test_the_network_sees_the_schedule_s_own_timesteps() -> None:
    seen: list[int] = []

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        assert t.dtype == torch.int64
        assert t.shape == x_t.shape[:1]
        seen.append(int(t.unique()))
        return 0 * x_t

    config = SamplerConfig(num_steps=4)
    steps = list(trajectory(network, LINEAR, config, seed=0, index=torch.arange(2), shape=SHAPE))
    assert seen == [999, 666, 333, 0]
    assert [step.t for step in steps] == seen
    start = rng.normal(0, "sample", torch.arange(2), SHAPE)
    assert torch.equal(steps[0].x_t, start)
    image = sample(network, LINEAR, config, seed=0, index=torch.arange(2), shape=SHAPE)
    assert torch.equal(steps[-1].pred_x_start, image)


def test_a_trajectory_is_lazy_and_keeps_no_graph() -> None:
    weight = torch.tensor(0.5, requires_grad=True)
    calls: list[Tensor] = []

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        calls.append(t)
        return weight * x_t

    steps = trajectory(network, LINEAR, SamplerConfig(), seed=0, index=torch.arange(1), shape=SHAPE)
    assert calls == []
    step = next(steps)
    assert len(calls) == 1
    assert not step.pred_x_start.requires_grad
    assert torch.is_grad_enabled()


def test_no_noise_where_there_is_none() -> None:
    """DDIM with η = 0 depends on x_T alone: an image composed by its slopes, without a single other draw."""
    index = torch.tensor([5])
    image = sample(DATA.eps_theta(SHORT), SHORT, DDIM, seed=0, index=index, shape=SHAPE, dtype=torch.float64)
    start = rng.normal(0, "sample", index, SHAPE, dtype=torch.float64)
    torch.testing.assert_close(image, DATA.ddim_slopes(SHORT).prod() * start, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", "euler"),
        ("num_steps", 0),
        ("eta", -0.1),
        ("eta", 1.5),
        ("eta", float("nan")),
        ("variance_type", "zero"),
    ],
)
def test_config_errors_name_the_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: must be .*, got {value!r}$"):
        SamplerConfig(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["ddim", "ancestral", "dpm_solver_pp_2m", "dpm_solver_pp_2m_sde", "heun"])
@pytest.mark.parametrize("num_timesteps", [1000, 4000])
def test_low_precision_survives_the_cosine_schedule(kind, num_timesteps: int) -> None:
    """1/a is 20,000 at its last step, more than float16 can multiply by."""
    schedule = Schedule.from_config(ScheduleConfig(kind="cosine", num_timesteps=num_timesteps))
    config = SamplerConfig(kind=kind, num_steps=20)
    shape = (1, 8, 8)
    exact = sample(DATA.eps_theta(schedule), schedule, config, seed=0, index=torch.arange(8), shape=shape)
    for dtype, within in ((torch.float16, 0.1), (torch.bfloat16, 0.5)):
        got = sample(
            DATA.eps_theta(schedule),
            schedule,
            config,
            seed=0,
            index=torch.arange(8),
            shape=shape,
            dtype=dtype,
        )
        assert float((got.float() - exact).square().mean().sqrt()) < within, dtype


@pytest.mark.parametrize("length", [10, 2000])
def test_errors_of_another_schedule_are_refused(length: int) -> None:
    config = SamplerConfig(kind="ancestral", num_steps=5, variance_type="analytic")
    with pytest.raises(ValueError, match=r"^x_start_mse: "):
        sample(
            _some_network,
            LINEAR,
            config,
            seed=0,
            index=torch.arange(2),
            shape=SHAPE,
            x_start_mse=torch.full((length,), 0.1, dtype=torch.float64),
        )


def test_config_in_pydantic_refuses_unknown_keys() -> None:
    adapter = pydantic.TypeAdapter(SamplerConfig)
    assert adapter.validate_python({"num_steps": None}).num_steps is None
    with pytest.raises(pydantic.ValidationError, match="steps"):
        adapter.validate_python({"steps": 5})


@pytest.mark.parametrize(
    ("name", "index", "network"),
    [
        ("index", torch.tensor([1.0]), _some_network),
        ("index", torch.tensor(1), _some_network),
        ("eps_theta.s output", torch.tensor([1]), lambda x, t: x[:, :, :1]),
    ],
)
def test_errors_name_the_argument(name: str, index: Tensor, network) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: "):
        sample(network, LINEAR, SamplerConfig(), seed=0, index=index, shape=SHAPE)
