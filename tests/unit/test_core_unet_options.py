"""The U-Net's options: what each computes, that its default changes nothing, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from typing import Any

import pydantic
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_core.unet import UNet, UNetConfig
from ddpm_core.unet_blocks import Attention, BlockOptions, Residual, Upsample

TINY = UNetConfig(8, 2, 8, (1, 2), 1, (4, 8), 0.0, 4)
OPTIONS: list[dict[str, Any]] = [
    {"scale_shift_norm": True},
    {"num_heads": 4},
    {"head_channels": 2},
    {"learned_variance": True},
    {"num_classes": 3},
    {"conditioning": "log_snr"},
    {
        "scale_shift_norm": True,
        "head_channels": 4,
        "learned_variance": True,
        "num_classes": 3,
        "conditioning": "log_snr",
        "dropout": 0.2,
    },
]


def awake(net: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.15, generator=generator)


def made(config: UNetConfig) -> UNet:
    net = UNet(config).eval()
    awake(net)
    return net


def given(config: UNetConfig, batch: int = 3) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(batch, config.in_channels, 8, 8, generator=generator)
    t = torch.arange(batch) * 17
    labels = None if config.num_classes is None else torch.arange(batch) % (config.num_classes + 1)
    return x_t, t if config.conditioning == "timestep" else 3.0 - t / 4, labels


@pytest.mark.parametrize("options", OPTIONS)
def test_each_option_makes_another_network_whose_output_starts_at_zero(options: dict[str, Any]) -> None:
    config = replace(TINY, **options)
    torch.manual_seed(0)
    fresh = UNet(config).eval()
    x_t, t, labels = given(config)
    out = fresh(x_t, t, labels)
    assert out.shape == (3, config.out_channels, 8, 8)
    assert bool((out == 0).all())
    net = made(config)
    together = net(x_t, t, labels)
    for row in range(3):
        alone = net(x_t[row : row + 1], t[row : row + 1], None if labels is None else labels[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-4)
    together.square().sum().backward()
    dead = [
        name
        for name, p in net.named_parameters()
        if (p.grad is None or not p.grad.any()) and not name.endswith("attention.key.bias")
    ]
    assert dead == []
    assert config.identity() != TINY.identity()


def test_the_defaults_are_the_network_of_the_paper() -> None:
    names = set(UNet(TINY).state_dict())
    assert {name.split(".")[0] for name in names} == {
        "time_dense_0", "time_dense_1", "conv_in", "down", "middle", "up", "norm_out", "conv_out",
    }  # fmt: skip
    assert TINY.out_channels == 2
    assert {*TINY.identity()} == {
        "image_size", "in_channels", "base_channels", "channel_mults", "num_res_blocks",
        "attention_resolutions", "dropout", "num_groups",
    }  # fmt: skip


def test_checkpointing_is_no_part_of_the_identity_but_what_differs_is() -> None:
    config = replace(TINY, gradient_checkpointing=True, num_classes=3)
    assert config.identity() == {**TINY.identity(), "num_classes": 3}
    assert asdict(config)["gradient_checkpointing"] is True


def test_scale_shift_norm_by_hand() -> None:
    options = BlockOptions(time_channels=6, dropout=0.0, groups=2, scale_shift=True)
    block = Residual(4, 8, options)
    awake(block)
    state = block.state_dict()
    x, temb = torch.randn(2, 4, 5, 5), torch.randn(2, 6)
    h = F.conv2d(
        F.silu(F.group_norm(x, 2, state["norm_0.weight"], state["norm_0.bias"], 1e-6)),
        state["conv_0.weight"],
        state["conv_0.bias"],
        padding=1,
    )
    change = temb @ state["time_dense.weight"].T + state["time_dense.bias"]
    scale, shift = change[:, :8, None, None], change[:, 8:, None, None]
    h = F.group_norm(h, 2, state["norm_1.weight"], state["norm_1.bias"], 1e-6) * (1 + scale) + shift
    h = F.conv2d(F.silu(h), state["conv_1.weight"], state["conv_1.bias"], padding=1)
    expected = h + F.conv2d(x, state["shortcut.weight"], state["shortcut.bias"])
    torch.testing.assert_close(block(x, temb), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_each_head_attends_over_its_own_channels(num_heads: int) -> None:
    attention = Attention(8, num_heads, 2)
    awake(attention)
    state = attention.state_dict()
    x = torch.randn(2, 8, 3, 3)
    h = F.group_norm(x, 2, state["norm.weight"], state["norm.bias"], 1e-6).flatten(2).transpose(1, 2)
    query, key, value = (h @ state[f"{n}.weight"].T + state[f"{n}.bias"] for n in ("query", "key", "value"))
    width = 8 // num_heads
    mixed = torch.cat(
        [
            torch.softmax(query[..., s] @ key[..., s].transpose(1, 2) / width**0.5, dim=2) @ value[..., s]
            for s in (slice(head * width, (head + 1) * width) for head in range(num_heads))
        ],
        dim=2,
    )
    out = (mixed @ state["out.weight"].T + state["out.bias"]).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(attention(x), x + out, rtol=1e-4, atol=1e-5)


def test_heads_are_counted_by_their_channels() -> None:
    config = replace(TINY, head_channels=4)
    assert config.attention_widths == (8, 16)
    net = UNet(config)
    found = {m.query.in_features: m.num_heads for m in net.modules() if isinstance(m, Attention)}
    assert found == {8: 2, 16: 4}


def test_labels_matter_and_none_means_the_null_label() -> None:
    config = replace(TINY, num_classes=3)
    net = made(config)
    x_t, t, _ = given(config)
    null = net(x_t, t, torch.full((3,), 3))
    assert torch.equal(net(x_t, t), null)
    for label in range(3):
        assert not torch.allclose(net(x_t, t, torch.full((3,), label)), null, atol=1e-3)


def test_a_fresh_network_s_labels_do_not_disturb_it_much() -> None:
    torch.manual_seed(0)
    rows = UNet(replace(TINY, num_classes=50)).state_dict()["label_embedding.weight"]
    assert rows.shape == (51, 32)
    assert float(rows.std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("options", [{}, OPTIONS[-1]])
def test_gradient_checkpointing_gives_the_same_gradients(options: dict[str, Any]) -> None:
    """Dropout included: the units that are dropped are the same in both forward passes."""
    plain = UNet(replace(TINY, **{"dropout": 0.3, **options})).train()
    awake(plain)
    saving = UNet(replace(plain.config, gradient_checkpointing=True)).train()
    saving.load_state_dict(plain.state_dict())
    x_t, t, labels = given(plain.config)
    outs = []
    for net in (plain, saving):
        torch.manual_seed(5)
        out = net(x_t, t, labels)
        outs.append(out.detach())
        out.square().sum().backward()
    assert torch.equal(*outs)
    peers = dict(saving.named_parameters())
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None
        other = peers[name].grad
        assert other is not None
        assert torch.equal(parameter.grad, other), name


def test_gradient_checkpointing_keeps_less() -> None:
    def kept(config: UNetConfig) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        net = UNet(config)
        weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = net(*given(config))
        assert out.requires_grad
        return sum(size for pointer, size in sizes.items() if pointer not in weights)

    config = replace(TINY, num_res_blocks=3)
    assert kept(replace(config, gradient_checkpointing=True)) < 0.5 * kept(config)


@pytest.mark.parametrize("options", [{}, *OPTIONS])
def test_every_memory_format_gives_the_same(options: dict[str, Any]) -> None:
    config = replace(TINY, **options)
    net = made(config)
    x_t, t, labels = given(config)
    expected = net(x_t, t, labels)
    assert expected.is_contiguous()
    last = x_t.contiguous(memory_format=torch.channels_last)
    mixed = x_t.transpose(2, 3).contiguous().transpose(2, 3)
    strided = torch.stack((x_t, x_t), dim=-1)[..., 0]
    assert not any(other.is_contiguous() for other in (last, mixed, strided))
    for other in (last, mixed, strided, x_t[:1].expand(3, -1, -1, -1)):
        want = expected if other.stride(0) else net(other.contiguous(), t, labels)
        torch.testing.assert_close(net(other, t, labels), want, rtol=1e-4, atol=1e-5)
    converted = copy.deepcopy(net).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    torch.testing.assert_close(converted(last, t, labels), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, OPTIONS[-1]])
def test_bfloat16_one_sample_and_autocast(options: dict[str, Any]) -> None:
    config = replace(TINY, **options)
    net = made(config)
    x_t, t, labels = given(config, batch=1)
    expected = net(x_t, t, labels)
    scale = float(expected.detach().abs().max())
    half = copy.deepcopy(net).to(torch.bfloat16)
    got = half(x_t.to(torch.bfloat16), t, labels)
    assert got.dtype == torch.bfloat16
    assert float((got.float() - expected).detach().abs().max()) < 0.1 * scale
    with torch.autocast("cpu", torch.bfloat16):
        got = net(x_t, t, labels)
    assert float((got.float() - expected).detach().abs().max()) < 0.1 * scale
    got.float().square().sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.parametrize(("channels", "size"), [(4, 2), (8, 4), (64, 16), (6, 1)])
def test_the_way_up_is_a_convolution_of_doubled_pixels(channels: int, size: int) -> None:
    up = Upsample(channels).double()
    awake(up)
    x = torch.randn(2, channels, size, size, dtype=torch.float64, requires_grad=True)
    weight, bias = up.conv.weight, up.conv.bias
    assert bias is not None
    doubled = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    expected = F.conv2d(doubled, weight, bias, padding=1)
    for form in (torch.contiguous_format, torch.channels_last):
        got = up(x.contiguous(memory_format=form))
        torch.testing.assert_close(got, expected)
        inputs = (x, weight, bias)
        ours = torch.autograd.grad(got.sin().sum(), inputs)
        theirs = torch.autograd.grad(expected.sin().sum(), inputs, retain_graph=True)
        torch.testing.assert_close(ours, theirs)
    rounded = up.float()
    with torch.autocast("cpu", torch.bfloat16):
        got = rounded(x.float())
    assert got.dtype == torch.bfloat16
    scale = float(expected.detach().abs().max())
    assert float((got.double() - expected).detach().abs().max()) < 0.03 * scale
    assert got.shape == rounded.to(torch.bfloat16)(x.to(torch.bfloat16)).shape == expected.shape


def test_the_way_up_has_second_derivatives() -> None:
    up = Upsample(1).double()
    x = torch.randn(1, 1, 16, 16, dtype=torch.float64, requires_grad=True)
    weight = up.conv.weight
    doubled = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    second = []
    for out in (up(x), F.conv2d(doubled, weight, up.conv.bias, padding=1)):
        (first,) = torch.autograd.grad(out.sin().sum(), x, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), weight)[0])
    torch.testing.assert_close(*second)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("num_heads", {"num_heads": 3}),
        ("num_heads", {"num_heads": 0}),
        ("num_heads", {"num_heads": 2, "head_channels": 4}),
        ("head_channels", {"head_channels": 5}),
        ("head_channels", {"head_channels": 0}),
        ("num_classes", {"num_classes": 0}),
        ("conditioning", {"conditioning": "sigma"}),
    ],
)
def test_config_errors_name_the_field(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: must be "):
        replace(TINY, **changes)


def test_options_in_pydantic() -> None:
    adapter = pydantic.TypeAdapter(UNetConfig)
    values = {"image_size": 8, "in_channels": 1, "attention_resolutions": [8], **OPTIONS[-1]}
    config = adapter.validate_python(values)
    assert (config.conditioning, config.num_classes, config.head_channels) == ("log_snr", 3, 4)
    with pytest.raises(pydantic.ValidationError, match="num_class"):
        adapter.validate_python({**values, "num_class": 3})
    with pytest.raises(pydantic.ValidationError, match="conditioning"):
        adapter.validate_python({**values, "conditioning": "sigma"})


X = torch.zeros(2, 2, 8, 8)
T = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("message", "options", "arguments"),
    [
        ("labels: must be None", {}, (X, T, T)),
        ("labels: must be int64", {"num_classes": 3}, (X, T, T.float())),
        ("labels: must have the shape", {"num_classes": 3}, (X, T, T[:, None])),
        ("labels: must have one entry a sample, got 1 for a batch", {"num_classes": 3}, (X, T, T[:1])),
        ("labels: must lie in 0..3 .*, got 4", {"num_classes": 3}, (X, T, T + 4)),
        ("labels: must lie in 0..3 .*, got -1", {"num_classes": 3}, (X, T, T - 1)),
        ("log_snr: must be a floating-point", {"conditioning": "log_snr"}, (X, T)),
        ("log_snr: must have the shape", {"conditioning": "log_snr"}, (X, torch.zeros(2, 1))),
        ("log_snr: must have one entry a sample", {"conditioning": "log_snr"}, (X, torch.zeros(3))),
        ("log_snr: must be a number", {"conditioning": "log_snr"}, (X, torch.full((2,), torch.nan))),
        ("x_t: must have the weights' dtype torch.float32, got torch.float64", {}, (X.double(), T)),
        ("x_t: must be a floating-point", {}, (X.long(), T)),
    ],
)
def test_errors_name_the_argument(
    message: str, options: dict[str, Any], arguments: tuple[Tensor, ...]
) -> None:
    net = UNet(replace(TINY, **options))
    with pytest.raises(ValueError, match=rf"^{message}"):
        net(*arguments)
