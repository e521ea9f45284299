"""The U-Net: its size, its parts, what it depends on, its errors."""

import math

import pydantic
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ddpm_core import Schedule, ScheduleConfig, UNet, UNetConfig, simple_loss
from ddpm_core.unet import timestep_embedding

SMALL = UNetConfig(
    8, 2, base_channels=8, channel_mults=(1, 2), num_res_blocks=1, attention_resolutions=(4,), num_groups=4
)


def _small_net(seed: int = 0, *, awake: bool = True) -> UNet:
    """A small network; awake: with weights that make every part matter, also those that start at zero."""
    torch.manual_seed(seed)
    net = UNet(SMALL).eval()
    if awake:
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.normal_(std=0.15)
    return net


def _input(batch: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 2, 8, 8, generator=generator), torch.arange(batch) * 17


def _count(config: UNetConfig) -> int:
    return sum(p.numel() for p in UNet(config).parameters())


def test_the_cifar10_network_has_the_paper_s_size_and_takes_a_step() -> None:
    torch.manual_seed(0)
    net = UNet(UNetConfig(image_size=32, in_channels=3))
    assert sum(p.numel() for p in net.parameters()) == 35_746_307
    optimiser = torch.optim.Adam(net.parameters(), lr=2e-4)
    schedule = Schedule.from_config(ScheduleConfig())
    x_start, noise = torch.rand(1, 3, 32, 32) * 2 - 1, torch.randn(1, 3, 32, 32)
    loss = simple_loss(net, schedule, x_start, torch.tensor([500]), noise).mean()
    assert float(loss.detach()) == pytest.approx(float(noise.square().mean()))
    loss.backward()
    optimiser.step()
    assert float(net.conv_out.weight.detach().abs().max()) > 0
    after = simple_loss(net, schedule, x_start, torch.tensor([500]), noise).mean()
    assert float(after.detach()) < float(loss.detach())


def test_a_minimal_network_counted_by_hand() -> None:
    config = UNetConfig(4, 1, 8, (1,), 1, (), 0.0, 4)

    def dense(i: int, o: int) -> int:
        return i * o + o

    def conv(i: int, o: int, k: int) -> int:
        return i * o * k * k + o

    def residual(i: int, o: int) -> int:
        shortcut = conv(i, o, 1) if i != o else 0
        return 2 * i + conv(i, o, 3) + dense(32, o) + 2 * o + conv(o, o, 3) + shortcut

    attention = 2 * 8 + 4 * dense(8, 8)
    expected = (
        dense(8, 32)
        + dense(32, 32)
        + conv(1, 8, 3)
        + residual(8, 8)
        + residual(8, 8)
        + attention
        + residual(8, 8)
        + 2 * residual(16, 8)
        + 2 * 8
        + conv(8, 1, 3)
    )
    assert _count(config) == expected


def test_the_output_is_zero_at_initialisation() -> None:
    x_t, t = _input()
    out = _small_net(awake=False)(x_t, t)
    assert out.shape == x_t.shape
    assert bool((out == 0).all())


def test_residual_branches_start_at_zero() -> None:
    """With conv_out awake, the middle of a fresh network passes its input on: every branch adds nothing."""
    net = _small_net(awake=False)
    h, temb = torch.randn(2, 16, 4, 4), torch.randn(2, 32)
    for block in net.middle:
        assert torch.equal(block(h, temb), h)


def test_every_parameter_gets_a_gradient() -> None:
    net = _small_net()
    x_t, t = _input()
    net(x_t, t).square().sum().backward()
    # A key's bias moves all scores of a query alike, which the softmax ignores.
    dead = [
        name
        for name, p in net.named_parameters()
        if (p.grad is None or float(p.grad.abs().max()) == 0) and not name.endswith("attention.key.bias")
    ]
    assert dead == []


def test_seeding_torch_fixes_the_weights() -> None:
    one, same, other = (_small_net(seed, awake=False).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["conv_in.weight"], other["conv_in.weight"])


def test_samples_do_not_mix() -> None:
    net = _small_net()
    x_t, t = _input()
    together = net(x_t, t)
    for row in range(3):
        alone = net(x_t[row : row + 1], t[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-5)


def test_the_timestep_and_every_pixel_matter() -> None:
    net = _small_net()
    x_t, t = _input(1)
    assert not torch.allclose(net(x_t, t + 500), net(x_t, t), atol=1e-3)
    far = x_t.clone()
    far[0, 0, 7, 7] += 1.0
    changed = (net(far, t) - net(x_t, t)).abs()
    assert float(changed[0, 0, 0, 0].detach()) > 0  # attention reaches the far corner


def test_dropout_acts_in_training_alone() -> None:
    net = _small_net()
    x_t, t = _input()
    assert torch.equal(net(x_t, t), net(x_t, t))
    net.train()
    assert not torch.equal(net(x_t, t), net(x_t, t))
    torch.manual_seed(3)
    one = net(x_t, t)
    torch.manual_seed(3)
    assert torch.equal(net(x_t, t), one)


@pytest.mark.parametrize("channels", [8, 32, 128])
def test_timestep_embedding(channels: int) -> None:
    t = torch.tensor([0, 1, 999, 3999])
    got = timestep_embedding(t, channels)
    half = channels // 2
    for row, value in enumerate(t.tolist()):
        for i in range(half):
            angle = value * 10_000 ** (-i / (half - 1))
            assert float(got[row, i]) == pytest.approx(math.sin(angle), abs=1e-3)
            assert float(got[row, half + i]) == pytest.approx(math.cos(angle), abs=1e-3)
    assert float(got[1, half - 1]) == pytest.approx(1e-4, rel=1e-3)


def test_downsampling_pads_on_the_right_and_below() -> None:
    net = _small_net()
    downsample = net.down[0].downsample
    assert isinstance(downsample, torch.nn.Module)
    x = torch.randn(1, 8, 8, 8)
    conv = downsample.conv
    assert isinstance(conv, torch.nn.Conv2d)
    assert conv.bias is not None
    got = downsample(x)
    assert got.shape == (1, 8, 4, 4)
    top_left = (conv.weight * x[:, :, 0:3, 0:3]).sum((1, 2, 3)) + conv.bias
    torch.testing.assert_close(got[0, :, 0, 0], top_left, rtol=1e-4, atol=1e-5)
    corner = (conv.weight[:, :, :2, :2] * x[:, :, 6:8, 6:8]).sum((1, 2, 3)) + conv.bias
    torch.testing.assert_close(got[0, :, 3, 3], corner, rtol=1e-4, atol=1e-5)


def test_attention_is_softmax_over_positions_with_one_head() -> None:
    block = _small_net().middle[0]
    attention = block.attention
    assert isinstance(attention, torch.nn.Module)
    x = torch.randn(2, 16, 4, 4)
    state = attention.state_dict()
    h = F.group_norm(x, 4, state["norm.weight"], state["norm.bias"], 1e-6).flatten(2).transpose(1, 2)
    q, k, v = (h @ state[f"{n}.weight"].T + state[f"{n}.bias"] for n in ("query", "key", "value"))
    mixed = torch.softmax(q @ k.transpose(1, 2) / 4.0, dim=2) @ v
    out = (mixed @ state["out.weight"].T + state["out.bias"]).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(attention(x), x + out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_network_runs_in_its_weights_dtype(dtype: torch.dtype) -> None:
    net = _small_net().to(dtype)
    x_t, t = _input()
    assert net(x_t.to(dtype), t).dtype == dtype


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("num_groups", {"base_channels": 20, "num_groups": 8}),
        ("num_groups", {"num_groups": 0}),
        ("image_size", {"image_size": 10, "channel_mults": (1, 2, 2)}),
        ("image_size", {"image_size": 0}),
        ("in_channels", {"in_channels": 0}),
        ("base_channels", {"base_channels": 9, "num_groups": 1}),
        ("base_channels", {"base_channels": 2, "num_groups": 1}),
        ("channel_mults", {"channel_mults": ()}),
        ("channel_mults", {"channel_mults": (1, 0)}),
        ("num_res_blocks", {"num_res_blocks": 0}),
        ("attention_resolutions", {"attention_resolutions": (16,)}),
        ("dropout", {"dropout": 1.0}),
    ],
)
def test_config_errors_name_the_field(field: str, changes: dict) -> None:
    values = {"image_size": 8, "in_channels": 1, "base_channels": 16, "num_groups": 8, **changes}
    values.setdefault("attention_resolutions", ())
    with pytest.raises(ValueError, match=rf"^{field}: must be "):
        UNetConfig(**values)


def test_config_in_pydantic() -> None:
    adapter = pydantic.TypeAdapter(UNetConfig)
    config = adapter.validate_python({"image_size": 32, "in_channels": 3, "channel_mults": [1, 2, 2, 2]})
    assert config == UNetConfig(32, 3)
    with pytest.raises(pydantic.ValidationError, match="channels_mult"):
        adapter.validate_python({"image_size": 32, "in_channels": 3, "channels_mult": [1]})


@pytest.mark.parametrize(
    ("name", "x_t", "t"),
    [
        ("x_t", torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)),
        ("x_t", torch.zeros(2, 2, 16, 16), torch.zeros(2, dtype=torch.int64)),
        ("x_t", torch.zeros(2, 8, 8), torch.zeros(2, dtype=torch.int64)),
        ("t", torch.zeros(2, 2, 8, 8), torch.zeros(1, dtype=torch.int64)),
        ("t", torch.zeros(2, 2, 8, 8), torch.zeros(2)),
    ],
)
def test_errors_name_the_argument(name: str, x_t: Tensor, t: Tensor) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: must "):
        _small_net()(x_t, t)
