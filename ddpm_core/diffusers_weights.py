"""Our U-Net's configuration and weights as those of diffusers' UNet2DModel, and back: names alone, no files.

The two compute the same function of the same weights where UNet2DModel has the options; what either lacks is
refused by name. State is a mapping of names to tensors; the tensors themselves are passed on, not copied.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ddpm_core.unet import UNet, UNetConfig

CLASS_NAME = "UNet2DModel"

_PLAIN, _ATTENDING = ("DownBlock2D", "UpBlock2D"), ("AttnDownBlock2D", "AttnUpBlock2D")
_NORM_EPS = 1e-6

# What UNet2DModel takes where its configuration is silent, of the options that have no place in ours, and the
# values of each that our network is.
_FIXED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "center_input_sample": (False, (False,)),
    "time_embedding_type": ("positional", ("positional",)),
    "freq_shift": (0, (1,)),
    "flip_sin_to_cos": (True, (False,)),
    "mid_block_type": ("UNetMidBlock2D", ("UNetMidBlock2D",)),
    "mid_block_scale_factor": (1, (1,)),
    "downsample_padding": (1, (0,)),
    "downsample_type": ("conv", ("conv",)),
    "upsample_type": ("conv", ("conv",)),
    "act_fn": ("silu", ("silu", "swish")),
    "norm_eps": (1e-5, (_NORM_EPS,)),
    "add_attention": (True, (True,)),
    "class_embed_type": (None, (None,)),
}
_DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "time_embedding_dim": None,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "dropout": 0.0,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "resnet_time_scale_shift": "default",
    "num_class_embeds": None,
    "num_train_timesteps": None,
}

_TOP = {
    "time_dense_0": "time_embedding.linear_1",
    "time_dense_1": "time_embedding.linear_2",
    "label_embedding": "class_embedding",
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
_RESIDUAL = {
    "norm_0": "norm1",
    "conv_0": "conv1",
    "time_dense": "time_emb_proj",
    "norm_1": "norm2",
    "conv_1": "conv2",
    "shortcut": "conv_shortcut",
}
_ATTENTION = {"norm": "group_norm", "query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"}
# older versions of diffusers wrote these, and published weights still have them
_OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def unet_to_diffusers(config: UNetConfig) -> dict[str, Any]:
    """The keyword arguments of the UNet2DModel that is the same function.

    Raises ValueError naming the field that UNet2DModel can't express: conditioning "log_snr", a first level
    that is wider than base_channels, several heads of different sizes. gradient_checkpointing is no part of it.
    """
    if config.conditioning != "timestep":
        raise ValueError(f"conditioning: UNet2DModel has 'timestep' alone, got {config.conditioning!r}")
    if config.channel_mults[0] != 1:
        raise ValueError(f"channel_mults: UNet2DModel has 1 for the first level, got {config.channel_mults}")
    attends = [resolution in config.attention_resolutions for resolution in config.resolutions]
    kinds = [_ATTENDING if attention else _PLAIN for attention in attends]
    values = {name: accepted[0] for name, (_, accepted) in _FIXED.items()}
    return values | {
        "sample_size": config.image_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "time_embedding_dim": None,
        "down_block_types": tuple(down for down, _ in kinds),
        "up_block_types": tuple(up for _, up in reversed(kinds)),
        "block_out_channels": config.widths,
        "layers_per_block": config.num_res_blocks,
        "dropout": config.dropout,
        "attention_head_dim": _head_dim(config),
        "norm_num_groups": config.num_groups,
        # the middle would leave out this norm if the scale-shift norm came without it
        "attn_norm_num_groups": config.num_groups if config.scale_shift_norm else None,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift_norm else "default",
        "num_class_embeds": None if config.num_classes is None else config.num_classes + 1,
        "num_train_timesteps": None,
    }


def unet_from_diffusers(values: Mapping[str, Any]) -> UNetConfig:
    """The configuration of the same function as UNet2DModel(**values), names with a leading _ left out.

    What is not given is UNet2DModel's own default. num_class_embeds counts our null label, its last row.
    Raises ValueError naming the key that is unknown, of the wrong form, or that our network does not have.
    """
    given = {name: value for name, value in values.items() if not name.startswith("_")}
    for name in given:
        if name not in _FIXED and name not in _DEFAULTS:
            raise ValueError(f"{name}: is no option of UNet2DModel that is known here, got {given[name]!r}")
    for name, (default, accepted) in _FIXED.items():
        value = given.get(name, default)
        if value not in accepted:
            raise ValueError(f"{name}: must be {' or '.join(map(repr, accepted))}, got {value!r}")
    options = _DEFAULTS | given
    widths = _positive(options, "block_out_channels")
    base = widths[0]
    _require(all(w % base == 0 for w in widths), options, "block_out_channels", "multiples of the first")
    width = options["time_embedding_dim"]
    _require(width in (None, 4 * base), options, "time_embedding_dim", f"null or {4 * base}")
    size = _image_size(options)
    resolutions = [size // 2**level for level in range(len(widths))]
    scale_shift = options["resnet_time_scale_shift"]
    _require(
        scale_shift in ("default", "scale_shift"),
        options,
        "resnet_time_scale_shift",
        "'default' or 'scale_shift'",
    )
    for name in ("norm_num_groups", "in_channels", "out_channels", "layers_per_block"):
        _require(isinstance(options[name], int), options, name, "an integer")
    groups = options["norm_num_groups"]
    middle_groups = (groups,) if scale_shift == "scale_shift" else (None, groups)
    _require(
        options["attn_norm_num_groups"] in middle_groups,
        options,
        "attn_norm_num_groups",
        " or ".join(map(repr, middle_groups)),
    )
    channels, out = options["in_channels"], options["out_channels"]
    _require(
        out in (channels, 2 * channels), options, "out_channels", f"in_channels {channels}, once or twice"
    )
    labels = options["num_class_embeds"]
    _require(
        labels is None or labels >= 2, options, "num_class_embeds", "null, or 2 or more with the null label"
    )
    attends = _attending(options, len(widths))
    return UNetConfig(
        image_size=size,
        in_channels=channels,
        base_channels=base,
        channel_mults=tuple(w // base for w in widths),
        num_res_blocks=options["layers_per_block"],
        attention_resolutions=tuple(
            r for r, attention in zip(resolutions, attends, strict=True) if attention
        ),
        dropout=options["dropout"],
        num_groups=groups,
        scale_shift_norm=scale_shift == "scale_shift",
        head_channels=options["attention_head_dim"],
        learned_variance=out != channels,
        num_classes=None if labels is None else labels - 1,
    )


def state_to_diffusers(config: UNetConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of UNet2DModel(**unet_to_diffusers(config)) from our network's.

    Raises ValueError naming the tensor that is missing, unknown or of another shape.
    """
    shapes = _shapes(config)
    _check(shapes, {name: name for name in shapes}, state)
    return {_translated(name): state[name] for name in shapes}


def state_from_diffusers(config: UNetConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `state_to_diffusers`; config is `unet_from_diffusers` of its configuration.

    Takes the names that older versions of diffusers gave to attention as well.
    Raises ValueError naming the tensor that is missing, unknown or of another shape.
    """
    shapes = _shapes(config)
    names = {ours: _translated(ours) for ours in shapes}
    for ours, theirs in names.items():
        old = _old(theirs)
        if theirs not in state and old in state:
            names[ours] = old
    _check(shapes, names, state)
    return {ours: state[theirs] for ours, theirs in names.items()}


def _shapes(config: UNetConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in UNet(config).state_dict().items()}


def _check(shapes: Mapping[str, torch.Size], names: Mapping[str, str], state: Mapping[str, Tensor]) -> None:
    """shapes by our names; names: what each of our tensors is called in state."""
    for ours, shape in shapes.items():
        name = names[ours]
        if name not in state:
            raise ValueError(f"{name}: is missing from the state")
        if state[name].shape != shape:
            raise ValueError(f"{name}: must have the shape {list(shape)}, got {list(state[name].shape)}")
    unknown = sorted(set(state) - set(names.values()))
    if unknown:
        raise ValueError(f"{unknown[0]}: is no tensor of this network ({len(unknown)} unknown in all)")


def _translated(name: str) -> str:
    """UNet2DModel's name for a tensor of ours."""
    *path, leaf = name.split(".")
    if len(path) == 1:
        return f"{_TOP[path[0]]}.{leaf}"
    if path[0] == "middle":
        return f"mid_block.{_in_block(path[1], path[2:])}.{leaf}"
    level = f"{path[0]}_blocks.{path[1]}"
    if path[2] == "blocks":
        return f"{level}.{_in_block(path[3], path[4:])}.{leaf}"
    return f"{level}.{path[2]}rs.0.conv.{leaf}"


def _in_block(index: str, path: list[str]) -> str:
    kind, part = path
    if kind == "residual":
        return f"resnets.{index}.{_RESIDUAL[part]}"
    return f"attentions.{index}.{_ATTENTION[part]}"


def _old(name: str) -> str:
    for new, old in _OLD_ATTENTION.items():
        name = name.replace(f".{new}.", f".{old}.")
    return name


def _head_dim(config: UNetConfig) -> int | None:
    """UNet2DModel's attention_head_dim: null is one head wherever attention stands."""
    if config.num_heads == 1:
        return config.head_channels
    widths = config.attention_widths
    if len(widths) > 1:
        raise ValueError(
            f"num_heads: UNet2DModel has heads of one size alone, got {config.num_heads} heads over "
            f"{list(widths)} channels; head_channels sets the size"
        )
    return widths[0] // config.num_heads


def _require(ok: bool, options: Mapping[str, Any], name: str, must_be: str) -> None:
    if not ok:
        raise ValueError(f"{name}: must be {must_be}, got {options[name]!r}")


def _positive(options: Mapping[str, Any], name: str) -> tuple[int, ...]:
    values = options[name]
    ok = (
        isinstance(values, list | tuple)
        and len(values) > 0
        and all(isinstance(v, int) and v > 0 for v in values)
    )
    _require(ok, options, name, "one or more positive integers")
    return tuple(values)


def _image_size(options: Mapping[str, Any]) -> int:
    size = options["sample_size"]
    sides = {size} if isinstance(size, int) else set(size) if isinstance(size, list | tuple) else set()
    _require(len(sides) == 1, options, "sample_size", "an integer, since images are square here")
    return int(sides.pop())


def _attending(options: Mapping[str, Any], num_levels: int) -> list[bool]:
    """For each level, whether attention stands there, the same on both ways."""
    down, up = options["down_block_types"], options["up_block_types"]
    for names, name in ((down, "down_block_types"), (up, "up_block_types")):
        index = int(name == "up_block_types")
        known = (_PLAIN[index], _ATTENDING[index])
        ok = len(names) == num_levels and all(kind in known for kind in names)
        _require(ok, options, name, f"{num_levels} of {' or '.join(known)}")
    attends = [kind == _ATTENDING[0] for kind in down]
    mirrored = [kind == _ATTENDING[1] for kind in reversed(up)]
    _require(attends == mirrored, options, "up_block_types", f"the mirror image of down_block_types {down}")
    return attends
