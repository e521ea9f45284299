"""Our U-Net beside diffusers' UNet2DModel: the same function of the same weights, both ways."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ddpm_core.diffusers_weights import (
    state_from_diffusers,
    state_to_diffusers,
    unet_from_diffusers,
    unet_to_diffusers,
)
from ddpm_core.unet import UNet, UNetConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import UNet2DModel

TINY = UNetConfig(8, 2, 8, (1, 2), 1, (4,), 0.0, 4)


@st.composite
def configs(draw: st.DrawFn) -> UNetConfig:
    mults = (1, *draw(st.lists(st.integers(1, 3), max_size=2)))
    size = 2 ** (len(mults) - 1) * draw(st.integers(1, 3))
    resolutions = [size // 2**level for level in range(len(mults))]
    groups = draw(st.sampled_from([1, 2, 4]))
    return UNetConfig(
        image_size=size,
        in_channels=draw(st.integers(1, 3)),
        base_channels=draw(st.sampled_from([4, 8, 12])),
        channel_mults=mults,
        num_res_blocks=draw(st.integers(1, 2)),
        attention_resolutions=tuple(draw(st.sets(st.sampled_from(resolutions)))),
        dropout=draw(st.sampled_from([0.0, 0.3])),
        num_groups=groups,
        scale_shift_norm=draw(st.booleans()),
        head_channels=draw(st.sampled_from([None, 1, 2, 4])),
        learned_variance=draw(st.booleans()),
        num_classes=draw(st.sampled_from([None, 1, 5])),
        gradient_checkpointing=draw(st.booleans()),
    )


def awake(net: torch.nn.Module, seed: int = 0) -> None:
    """Weights that make every part matter, also those that start at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.15, generator=generator)


def pair(config: UNetConfig, dtype: torch.dtype) -> tuple[UNet, Any]:
    """Our network and theirs with our weights, in eval mode."""
    ours, theirs = UNet(config), UNet2DModel(**unet_to_diffusers(config))
    awake(ours)
    # strict: neither side has a key that the other lacks
    theirs.load_state_dict(state_to_diffusers(config, ours.state_dict()))
    return ours.to(dtype).eval(), theirs.to(dtype).eval()


def inputs(config: UNetConfig, dtype: torch.dtype, batch: int = 2) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, config.in_channels, *[config.image_size] * 2, generator=generator, dtype=dtype)
    t = torch.randint(0, 1000, (batch,), generator=generator)
    if config.num_classes is None:
        return x, t, None
    return x, t, torch.randint(0, config.num_classes + 1, (batch,), generator=generator)


def compare(config: UNetConfig, dtype: torch.dtype, tolerance: float) -> None:
    ours, theirs = pair(config, dtype)
    x_t, t, labels = inputs(config, dtype)
    x_ours, x_theirs = x_t.clone().requires_grad_(), x_t.clone().requires_grad_()
    out, expected = ours(x_ours, t, labels), theirs(x_theirs, t, labels).sample
    assert out.shape == expected.shape == (2, config.out_channels, *x_t.shape[2:])
    scale = float(expected.detach().abs().max()) + 1
    assert float((out - expected).detach().abs().max()) <= tolerance * scale
    weight = torch.linspace(-1, 1, out.numel(), dtype=dtype).reshape(out.shape)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    named = state_to_diffusers(config, gradients)  # type: ignore[arg-type]
    peers = {name: p.grad for name, p in theirs.named_parameters()}
    assert set(named) == set(peers)
    named["x_t"], peers["x_t"] = x_ours.grad, x_theirs.grad  # type: ignore[assignment]
    largest = max(float(gradient.abs().max()) for gradient in peers.values())
    for name, gradient in named.items():
        assert float((gradient - peers[name]).abs().max()) <= tolerance * (largest + 1), name


@settings(max_examples=6, deadline=None)
@given(configs())
def test_outputs_and_gradients_agree_in_float64(config: UNetConfig) -> None:
    # the embedding of t is float32 on both sides, and each rounds its angles in its own way
    compare(config, torch.float64, 2e-6)


@settings(max_examples=6, deadline=None)
@given(configs())
def test_outputs_and_gradients_agree_in_float32(config: UNetConfig) -> None:
    compare(config, torch.float32, 1e-5)


@pytest.mark.parametrize("num_heads", [2, 4])
def test_several_heads_agree_where_attention_has_one_width(num_heads: int) -> None:
    compare(replace(TINY, num_heads=num_heads), torch.float32, 1e-5)


@pytest.mark.parametrize("scale_shift_norm", [False, True])
def test_larger_images_agree(scale_shift_norm: bool) -> None:
    """Of a size at which the CPU takes its own ways: another memory format, the faster way up."""
    config = UNetConfig(32, 3, 4, (1, 2), 1, (16,), 0.0, 2, scale_shift_norm=scale_shift_norm)
    compare(config, torch.float32, 1e-5)


@settings(max_examples=12, deadline=None)
@given(configs())
def test_the_mapping_there_and_back(config: UNetConfig) -> None:
    values = unet_to_diffusers(config)
    again = unet_from_diffusers(values)
    assert again == replace(
        config,
        gradient_checkpointing=False,
        attention_resolutions=tuple(r for r in config.resolutions if r in config.attention_resolutions),
    )
    state = UNet(config).state_dict()
    there = state_to_diffusers(config, state)
    assert len(there) == len(state)
    back = state_from_diffusers(again, there)
    assert list(back) == list(state)
    assert all(back[name] is state[name] for name in state)


def test_what_diffusers_itself_writes_down_is_read() -> None:
    """Its full configuration, private keys included, after it filled in its defaults."""
    config = replace(TINY, scale_shift_norm=True, head_channels=4, num_classes=3, learned_variance=True)
    theirs = UNet2DModel(**unet_to_diffusers(config))
    assert unet_from_diffusers(dict(theirs.config)) == config
    assert set(state_from_diffusers(config, theirs.state_dict())) == set(UNet(config).state_dict())


def test_the_cifar10_network_has_as_many_parameters_in_both() -> None:
    config = UNetConfig(32, 3)
    with torch.device("meta"):
        nets = UNet(config), UNet2DModel(**unet_to_diffusers(config))
    assert [sum(p.numel() for p in net.parameters()) for net in nets] == [35_746_307] * 2


def test_attention_under_its_older_names_is_read() -> None:
    state = UNet(TINY).state_dict()
    there = state_to_diffusers(TINY, state)
    old = {}
    for name, tensor in there.items():
        for new, before in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f".{new}.", f".{before}.")
        old[name] = tensor
    assert set(old) != set(there)
    back = state_from_diffusers(TINY, old)
    assert all(back[name] is state[name] for name in state)


@pytest.mark.parametrize(
    ("field", "config"),
    [
        ("conditioning", replace(TINY, conditioning="log_snr")),
        ("channel_mults", replace(TINY, channel_mults=(2, 2))),
        ("num_heads", replace(TINY, num_heads=2, attention_resolutions=(4, 8))),
    ],
)
def test_what_diffusers_lacks_is_refused_by_name(field: str, config: UNetConfig) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: UNet2DModel has "):
        unet_to_diffusers(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("center_input_sample", True),
        ("time_embedding_type", "fourier"),
        ("time_embedding_dim", 31),
        ("freq_shift", 0),
        ("flip_sin_to_cos", True),
        ("mid_block_type", None),
        ("mid_block_scale_factor", 2),
        ("downsample_padding", 1),
        ("downsample_type", "resnet"),
        ("upsample_type", "resnet"),
        ("act_fn", "relu"),
        ("norm_eps", 1e-5),
        ("norm_num_groups", None),
        ("attn_norm_num_groups", 2),
        ("add_attention", False),
        ("class_embed_type", "timestep"),
        ("num_class_embeds", 1),
        ("resnet_time_scale_shift", "spatial"),
        ("sample_size", None),
        ("sample_size", (8, 4)),
        ("out_channels", 3),
        ("in_channels", None),
        ("layers_per_block", None),
        ("block_out_channels", (8, 12)),
        ("block_out_channels", ()),
        ("down_block_types", ("DownBlock2D", "SkipDownBlock2D")),
        ("up_block_types", ("UpBlock2D", "UpBlock2D")),
        ("up_block_types", ("UpBlock2D",)),
        ("encoder_hid_dim", 8),
    ],
)
def test_what_we_lack_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{key}: .*got "):
        unet_from_diffusers({**unet_to_diffusers(TINY), key: value})


def test_the_defaults_of_diffusers_are_what_silence_means() -> None:
    """A configuration without a key is UNet2DModel's own default there, which mostly is not our network."""
    values = unet_to_diffusers(TINY)
    for key in ("flip_sin_to_cos", "freq_shift", "downsample_padding", "norm_eps", "sample_size"):
        with pytest.raises(ValueError, match=rf"^{key}: "):
            unet_from_diffusers({name: value for name, value in values.items() if name != key})
    for key in ("act_fn", "dropout", "num_class_embeds", "resnet_time_scale_shift", "mid_block_type"):
        assert unet_from_diffusers({name: value for name, value in values.items() if name != key}) == TINY
    assert (
        unet_from_diffusers({k: v for k, v in values.items() if k != "attention_head_dim"}).head_channels == 8
    )


def test_a_wrong_state_is_refused_by_name() -> None:
    state = state_to_diffusers(TINY, UNet(TINY).state_dict())
    name = "down_blocks.0.resnets.0.conv1.weight"
    with pytest.raises(ValueError, match=rf"^{name}: is missing"):
        state_from_diffusers(TINY, {key: value for key, value in state.items() if key != name})
    with pytest.raises(ValueError, match=r"^more\.weight: is no tensor"):
        state_from_diffusers(TINY, {**state, "more.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=rf"^{name}: must have the shape \[8, 8, 3, 3\], got \[1\]"):
        state_from_diffusers(TINY, {**state, name: torch.zeros(1)})
    with pytest.raises(ValueError, match=r"^time_dense_0\.weight: is missing"):
        state_to_diffusers(TINY, {})
