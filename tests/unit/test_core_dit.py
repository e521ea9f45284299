"""The diffusion transformer: its size, its parts by hand, what it depends on, its errors."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pydantic
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_core.conditioning import log_snr_embedding, timestep_embedding
from ddpm_core.dit import DiT, DiTConfig, from_patches, grid_positions, to_patches

TINY = DiTConfig(8, 2, patch_size=2, hidden_size=16, depth=2, num_heads=2)
FULL = replace(TINY, learned_variance=True, num_classes=3, conditioning="log_snr")


def awake(net: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.15, generator=generator)


def made(config: DiTConfig) -> DiT:
    net = DiT(config).eval()
    awake(net)
    return net


def given(config: DiTConfig, batch: int = 3) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(batch, config.in_channels, 8, 8, generator=generator)
    t = torch.arange(batch) * 17
    labels = None if config.num_classes is None else torch.arange(batch) % (config.num_classes + 1)
    return x_t, t if config.conditioning == "timestep" else 3.0 - t / 4, labels


def by_hand(net: DiT, x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
    """The network again, written out with loops and one head at a time."""
    config, state = net.config, net.state_dict()

    def dense(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    signal = (timestep_embedding if config.conditioning == "timestep" else log_snr_embedding)(t, 256)
    condition = dense("time_dense_1", F.silu(dense("time_dense_0", signal)))
    if labels is not None:
        condition = condition + state["label_embedding.weight"][labels]
    condition = F.silu(condition)
    p, rows = config.patch_size, config.grid_size
    patches = [
        x_t[:, :, i * p : (i + 1) * p, j * p : (j + 1) * p].flatten(1)
        for i in range(rows)
        for j in range(rows)
    ]
    h = dense("patch_dense", torch.stack(patches, 1)) + grid_positions(rows, config.hidden_size)
    width = config.hidden_size // config.num_heads
    for index in range(config.depth):
        block = f"blocks.{index}"
        parts = dense(f"{block}.modulation", condition).split(config.hidden_size, dim=1)
        shift_0, scale_0, gate_0, shift_1, scale_1, gate_1 = (part[:, None] for part in parts)
        joint = dense(f"{block}.query_key_value", norm(h) * (1 + scale_0) + shift_0)
        query, key, value = joint.split(config.hidden_size, dim=2)
        heads = []
        for head in range(config.num_heads):
            s = slice(head * width, (head + 1) * width)
            scores = query[..., s] @ key[..., s].transpose(1, 2) / width**0.5
            heads.append(torch.softmax(scores, dim=2) @ value[..., s])
        h = h + gate_0 * dense(f"{block}.attention_out", torch.cat(heads, 2))
        hidden = F.gelu(dense(f"{block}.mlp_in", norm(h) * (1 + scale_1) + shift_1), approximate="tanh")
        h = h + gate_1 * dense(f"{block}.mlp_out", hidden)
    shift, scale = dense("modulation_out", condition)[:, None].split(config.hidden_size, dim=2)
    tokens = dense("dense_out", norm(h) * (1 + scale) + shift)
    out = x_t.new_zeros(len(x_t), config.out_channels, 8, 8)
    for k in range(rows**2):
        i, j = divmod(k, rows)
        out[:, :, i * p : (i + 1) * p, j * p : (j + 1) * p] = tokens[:, k].unflatten(1, (-1, p, p))
    return out


@pytest.mark.parametrize("config", [TINY, FULL, replace(TINY, patch_size=4, num_heads=1, mlp_ratio=1.5)])
def test_the_whole_by_hand(config: DiTConfig) -> None:
    net = made(config)
    arguments = given(config)
    torch.testing.assert_close(net(*arguments), by_hand(net, *arguments), rtol=1e-3, atol=1e-4)


def test_the_paper_s_largest_network_has_its_size() -> None:
    """675,129,632 with the 256 · 1152 positions that the paper's code counts and we keep as constants."""
    with torch.device("meta"):
        net = DiT(DiTConfig(32, 4, 2, 1152, 28, 16, learned_variance=True, num_classes=1000))
    assert sum(p.numel() for p in net.parameters()) == 675_129_632 - 256 * 1152
    assert "positions" not in net.state_dict()


def test_the_output_is_zero_and_blocks_pass_on_at_initialisation() -> None:
    torch.manual_seed(0)
    net = DiT(FULL).eval()
    out = net(*given(FULL))
    assert out.shape == (3, 4, 8, 8)
    assert bool((out == 0).all())
    h, condition = torch.randn(2, 16, 16), torch.randn(2, 16)
    for block in net.blocks:
        assert torch.equal(block(h, condition), h)


def test_seeding_torch_fixes_the_weights() -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(DiT(TINY).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["patch_dense.weight"], states[2]["patch_dense.weight"])


def test_everything_matters() -> None:
    net = made(FULL)
    x_t, log_snr, labels = given(FULL)
    out = net(x_t, log_snr, labels)
    out.square().sum().backward()
    dead = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []
    assert not torch.allclose(net(x_t, log_snr + 1, labels), out, atol=1e-3)
    assert not torch.allclose(net(x_t, log_snr), out, atol=1e-3)
    assert torch.equal(net(x_t, log_snr), net(x_t, log_snr, torch.full((3,), 3)))
    far = x_t.clone()
    far[:, 0, 7, 7] += 1
    assert float((net(far, log_snr, labels) - out)[:, :, 0, 0].detach().abs().max()) > 0
    alone = net(x_t[1:2], log_snr[1:2], torch.tensor([1]))
    torch.testing.assert_close(alone[0], out[1], rtol=1e-4, atol=1e-5)
    for end in (torch.inf, -torch.inf):
        assert bool(net(x_t, torch.full((3,), end), labels).isfinite().all())


def test_moved_patches_are_told_apart_by_their_positions() -> None:
    net = made(TINY)
    x_t, t, _ = given(TINY)
    moved = net(x_t.roll(2, dims=3), t).roll(-2, dims=3)
    assert not torch.allclose(moved, net(x_t, t), atol=1e-3)


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
def test_patches_there_and_back(patch_size: int) -> None:
    x = torch.randn(2, 3, 8, 8)
    patches = to_patches(x, patch_size)
    assert patches.shape == (2, (8 // patch_size) ** 2, 3 * patch_size**2)
    assert torch.equal(patches[0, 0], x[0, :, :patch_size, :patch_size].flatten())
    assert torch.equal(from_patches(patches, patch_size), x)


def test_positions() -> None:
    table = grid_positions(3, 8)
    assert table.shape == (9, 8)
    for row in range(3):
        for column in range(3):
            angles = [torch.tensor([1.0, 0.01]) * p for p in (column, row)]
            expected = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())])
            torch.testing.assert_close(table[3 * row + column], expected)
    assert len(torch.unique(grid_positions(16, 16), dim=0)) == 256


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    plain = made(FULL).train()
    saving = DiT(replace(FULL, gradient_checkpointing=True)).train()
    saving.load_state_dict(plain.state_dict())
    kept = []
    for net in (plain, saving):
        saved: list[int] = []

        def pack(tensor: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = net(*given(FULL))
        out.square().sum().backward()
        kept.append(sum(saved))
    for one, other in zip(plain.parameters(), saving.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)
    assert kept[1] < 0.5 * kept[0]


def test_every_memory_format_gives_the_same() -> None:
    net = made(TINY)
    x_t, t, _ = given(TINY)
    expected = net(x_t, t)
    assert expected.is_contiguous()
    for other in (
        x_t.contiguous(memory_format=torch.channels_last),
        x_t.transpose(2, 3).contiguous().transpose(2, 3),
        torch.stack((x_t, x_t), dim=-1)[..., 0],
    ):
        assert not other.is_contiguous()
        torch.testing.assert_close(net(other, t), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [TINY, FULL])
def test_bfloat16_one_sample_and_autocast(config: DiTConfig) -> None:
    net = made(config)
    x_t, t, labels = given(config, batch=1)
    expected = net(x_t, t, labels)
    scale = float(expected.detach().abs().max())
    got = copy.deepcopy(net).to(torch.bfloat16)(x_t.to(torch.bfloat16), t, labels)
    assert got.dtype == torch.bfloat16
    assert float((got.float() - expected).detach().abs().max()) < 0.1 * scale
    with torch.autocast("cpu", torch.bfloat16):
        got = net(x_t, t, labels)
    assert float((got.float() - expected).detach().abs().max()) < 0.1 * scale


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("image_size", {"image_size": 9}),
        ("image_size", {"image_size": 0}),
        ("in_channels", {"in_channels": 0}),
        ("patch_size", {"patch_size": 0}),
        ("hidden_size", {"hidden_size": 18}),
        ("hidden_size", {"hidden_size": 0}),
        ("depth", {"depth": 0}),
        ("num_heads", {"num_heads": 3}),
        ("num_heads", {"num_heads": 0}),
        ("mlp_ratio", {"mlp_ratio": 0.0}),
        ("mlp_ratio", {"mlp_ratio": 0.01}),
        ("mlp_ratio", {"mlp_ratio": float("inf")}),
        ("num_classes", {"num_classes": 0}),
        ("conditioning", {"conditioning": "sigma"}),
    ],
)
def test_config_errors_name_the_field(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: must be "):
        replace(TINY, **changes)


def test_config_in_pydantic() -> None:
    adapter = pydantic.TypeAdapter(DiTConfig)
    assert adapter.validate_python({"image_size": 32, "in_channels": 3}) == DiTConfig(32, 3)
    with pytest.raises(pydantic.ValidationError, match="base_channels"):
        adapter.validate_python({"image_size": 32, "in_channels": 3, "base_channels": 8})


def test_errors_name_the_argument() -> None:
    net, x_t, t = DiT(TINY), torch.zeros(2, 2, 8, 8), torch.zeros(2, dtype=torch.int64)
    for name, arguments in (
        ("x_t", (x_t[:, :1], t)),
        ("x_t", (x_t[:, :, :4], t)),
        ("x_t", (x_t[0], t)),
        ("x_t", (x_t.double(), t)),
        ("t", (x_t, t[:1])),
        ("t", (x_t, t.float())),
        ("labels", (x_t, t, t)),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: must "):
            net(*arguments)
