"""Looks at values stand in nobody's way: transforms, tracers, compilers, and what the network itself says."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from ddpm_core import (
    DiT,
    DiTConfig,
    ObjectiveConfig,
    SamplerConfig,
    Schedule,
    ScheduleConfig,
    UNet,
    UNetConfig,
    as_eps_theta,
    discretized_gaussian_log_likelihood,
    q_sample,
    sample,
    simple_loss,
    training_loss,
    trajectory,
)
from ddpm_core._checks import check_finite, check_timesteps, values_are_at_hand
from tests.support.core_example import awake, network, wide_network

SHORT = Schedule.from_config(ScheduleConfig(num_timesteps=6, beta_start=0.02, beta_end=0.6))
X, NOISE, T = torch.zeros(3, 2, 4, 4), torch.ones(3, 2, 4, 4), torch.tensor([0, 2, 5])
LABELS = torch.tensor([1, 0, 4])
INDEX = torch.tensor([3, 4])
UNET = UNetConfig(4, 2, 8, (1, 2), 1, (2,), 0.0, 4, num_classes=4)
DIT = DiTConfig(4, 2, 2, 16, 1, 2, num_classes=4)


def _made(config: UNetConfig | DiTConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    return awake(UNet(config) if isinstance(config, UNetConfig) else DiT(config)).float()


def test_vmap_over_data_noise_and_time() -> None:
    noises, times = torch.stack((NOISE, 2 * NOISE)), torch.stack((T, T.flip(0)))
    expected = torch.stack([q_sample(SHORT, X, t, noise) for t, noise in zip(times, noises, strict=True)])
    assert torch.equal(
        torch.func.vmap(lambda t, noise: q_sample(SHORT, X, t, noise))(times, noises), expected
    )
    losses = torch.func.vmap(lambda noise: simple_loss(network, SHORT, X, T, noise))(noises)
    assert torch.equal(losses, torch.stack([simple_loss(network, SHORT, X, T, noise) for noise in noises]))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_over_a_network_with_labels_and_the_decoder() -> None:
    net = _made(DIT)
    labels = torch.stack((LABELS, LABELS.flip(0)))
    with torch.no_grad():
        x = torch.stack((NOISE, 2 * NOISE))
        both = torch.func.vmap(lambda x, told: net(x, T, told))(x, labels)
        torch.testing.assert_close(
            both, torch.stack([net(*each) for each in ((NOISE, T, LABELS), (2 * NOISE, T, LABELS.flip(0)))])
        )
    scales = torch.tensor([-1.0, -2.0])
    both = torch.func.vmap(lambda scale: discretized_gaussian_log_likelihood(X, X, scale.reshape(1), 9))(
        scales
    )
    assert both.shape == (2, *X.shape)


def test_gradients_of_gradients() -> None:
    def total(x: Tensor) -> Tensor:
        return q_sample(SHORT, x, T, NOISE).square().sum()

    slope = torch.func.grad(total)(X + 1.0)
    a, b = SHORT.a[T].float().reshape(3, 1, 1, 1), SHORT.b[T].float().reshape(3, 1, 1, 1)
    torch.testing.assert_close(slope, (2 * a * (a + b)).expand_as(X))
    assert torch.func.hessian(total)(X + 1.0).shape == (*X.shape, *X.shape)


@pytest.mark.parametrize("config", [UNET, DIT], ids=["unet", "dit"])
@pytest.mark.parametrize("conditioning", ["timestep", "log_snr"])
def test_networks_of_fake_tensors(config: UNetConfig | DiTConfig, conditioning: str) -> None:
    with FakeTensorMode():
        given = replace(config, conditioning=conditioning)  # type: ignore[arg-type]
        net = UNet(given) if isinstance(given, UNetConfig) else DiT(given)
        level = torch.zeros(3, dtype=torch.int64 if conditioning == "timestep" else torch.float32)
        said = net(torch.zeros(3, 2, 4, 4), level, torch.zeros(3, dtype=torch.int64))
    assert said.shape == (3, 2, 4, 4)


def _doubled(x: Tensor) -> Tensor:
    check_finite("x", x)
    return 2 * x


def test_fake_and_traced_tensors_have_no_values_to_look_at() -> None:
    with FakeTensorMode() as mode:
        fake, t = mode.from_tensor(X), mode.from_tensor(T)
        assert not values_are_at_hand(fake)
        check_finite("x", fake)
        check_timesteps(t, 6, fake)
        assert not values_are_at_hand(X)
    check_finite("x", fake)
    check_timesteps(t, 6, fake)
    # what a tracer saw must hold of other data too
    graph = make_fx(_doubled)(X)
    assert torch.equal(graph(NOISE), 2 * NOISE)
    assert [node.op for node in graph.graph.nodes] == ["placeholder", "call_function", "output"]
    with warnings.catch_warnings():
        # of a tensor that becomes a bool
        warnings.filterwarnings("error", message="Converting a tensor to a Python")
        traced = torch.jit.trace(_doubled, X)
    assert torch.equal(traced(NOISE), 2 * NOISE)
    with FlopCounterMode(display=False):
        q_sample(SHORT, X, T, NOISE)


def test_plain_tensors_and_what_only_names_them_are_looked_at() -> None:
    class Named(Tensor):
        """Of another type, but it holds its own data."""

    for plain in (X, torch.nn.Parameter(X), X.as_subclass(Named)):
        assert values_are_at_hand(plain)
    with pytest.raises(ValueError, match=r"^x_start: must be finite, got nan"):
        q_sample(SHORT, (X * math.nan).as_subclass(Named), T, NOISE)


@pytest.mark.parametrize("config", [UNET, DIT], ids=["unet", "dit"])
def test_a_network_with_classes_compiles_into_one_graph(config: UNetConfig | DiTConfig) -> None:
    net = _made(config)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(NOISE, T, LABELS), net(NOISE, T, LABELS))


def test_a_loss_compiles_into_one_graph() -> None:
    loss = torch.compile(lambda x, t, noise: q_sample(SHORT, x, t, noise), fullgraph=True, backend="eager")
    assert torch.equal(loss(X, T, NOISE), q_sample(SHORT, X, T, NOISE))


@pytest.mark.parametrize("config", [UNET, DIT], ids=["unet", "dit"])
@pytest.mark.parametrize("kind", ["ancestral", "ddim", "dpm_solver_pp_2m", "dpm_solver_pp_2m_sde", "heun"])
def test_what_a_network_says_passes_into_the_image(config: UNetConfig | DiTConfig, kind: str) -> None:
    net = _made(config)
    with torch.no_grad():
        next(net.parameters()).fill_(math.nan)
    sampler = SamplerConfig(kind=kind, num_steps=3, eta=0.5, clip=False)  # type: ignore[arg-type]
    image = sample(as_eps_theta(net, SHORT), SHORT, sampler, seed=0, index=INDEX, shape=(2, 4, 4))
    assert bool(image.isnan().all())


@pytest.mark.parametrize("said", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("channel", [0, 2], ids=["prediction", "variance"])
@pytest.mark.parametrize("loss", ["vlb", "hybrid"])
def test_what_a_network_says_passes_into_the_loss(said: float, channel: int, loss: str) -> None:
    def spoilt(x_t: Tensor, t: Tensor) -> Tensor:
        output = wide_network(x_t, t).clone()
        output[1, channel] = said
        return output

    objective = ObjectiveConfig(loss=loss, variance_type="learned_range")  # type: ignore[arg-type]
    for t in (T, T.roll(1), T.roll(2)):  # the decoder's term, and others
        found = training_loss(spoilt, SHORT, objective, X, t, NOISE, levels=9)
        assert found.isfinite().tolist() == [True, False, True]


def test_it_passes_on_from_the_step_that_says_it() -> None:
    def sometimes(x_t: Tensor, t: Tensor) -> Tensor:
        return torch.full_like(x_t, math.nan) if int(t[0]) == 3 else network(x_t, t)

    steps = trajectory(sometimes, SHORT, SamplerConfig(num_steps=None), seed=0, index=INDEX, shape=(2, 4, 4))
    seen = {step.t: bool(step.pred_x_start.isnan().any()) for step in steps}
    assert seen == {5: False, 4: False, 3: True, 2: True, 1: True, 0: True}


@pytest.mark.parametrize("config", [UNET, DIT], ids=["unet", "dit"])
def test_a_network_lets_nan_pass_and_names_what_is_wrong(config: UNetConfig | DiTConfig) -> None:
    net = _made(config)
    with torch.no_grad():
        assert bool(net(X * math.nan, T, LABELS).isnan().all())
        with pytest.raises(ValueError, match=r"^labels: must lie in 0\.\.4 \(4 means none\), got 5$"):
            net(X, T, LABELS + 1)
        for name, wrong in (
            ("x_t", ([1.0], T, LABELS)),
            ("t", (X, 3, LABELS)),
            ("labels", (X, T, [1, 0, 4])),
        ):
            with pytest.raises(ValueError, match=rf"^{name}: must be a tensor, got (list|int)$"):
                net(*wrong)
