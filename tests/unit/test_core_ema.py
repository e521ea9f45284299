"""The exponential moving average in closed form."""

import pytest
import torch
from torch import Tensor, nn

from ddpm_core import EMA, HalfLife, ema_decay


class _Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2, 3), 4.0, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(3, dtype=dtype))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("scale", torch.tensor(1.0))


def _set(model: nn.Module, name: str, value: float) -> None:
    with torch.no_grad():
        model.get_parameter(name).fill_(value)


def test_closed_form_of_a_constant_weight() -> None:
    """Starting at 4 with the weight held at 1, after n updates the average is 1 + 3·d^n."""
    model = _Model()
    ema = EMA(model, decay=0.9)
    _set(model, "weight", 1.0)
    for step in range(20):
        ema.update(model, step)
        expected = torch.full((2, 3), 1 + 3 * 0.9 ** (step + 1))
        torch.testing.assert_close(ema.tensors["weight"], expected)


def test_closed_form_of_a_moving_weight() -> None:
    model = _Model()
    ema = EMA(model, decay=0.7)
    expected = 4.0
    for step in range(10):
        _set(model, "weight", float(step**2))
        ema.update(model, step)
        expected = 0.7 * expected + 0.3 * step**2
    assert float(ema.tensors["weight"][0, 0]) == pytest.approx(expected, rel=1e-6)


def test_warm_up() -> None:
    assert ema_decay(0.999, True, 0) == 0.1
    assert ema_decay(0.999, True, 9) == 10 / 19
    assert ema_decay(0.999, True, 10**6) == 0.999
    assert ema_decay(0.999, False, 0) == 0.999
    model = _Model()
    ema = EMA(model, decay=0.999, warmup=True)
    _set(model, "weight", 0.0)
    product = 4.0
    for step in range(5):
        ema.update(model, step)
        product *= (1 + step) / (10 + step)
    assert float(ema.tensors["weight"][0, 0]) == pytest.approx(product, rel=1e-6)


def test_averages_of_a_bfloat16_model_are_float32() -> None:
    """In bfloat16 a decay of 0.999 would never move the average at all."""
    model = _Model(torch.bfloat16)
    ema = EMA(model, decay=0.999)
    assert ema.tensors["weight"].dtype == torch.float32
    _set(model, "weight", 5.0)
    ema.update(model, 0)
    assert float(ema.tensors["weight"][0, 0]) == pytest.approx(4.001, rel=1e-6)
    ema.copy_to(model)
    assert model.weight.dtype == torch.bfloat16


def test_buffers_are_copied() -> None:
    model = _Model()
    ema = EMA(model, decay=0.9)
    model.get_buffer("count").fill_(7)
    model.get_buffer("scale").fill_(2.0)
    ema.update(model, 0)
    assert int(ema.tensors["count"]) == 7
    assert float(ema.tensors["scale"]) == 2.0


def test_the_averages_are_a_copy() -> None:
    model = _Model()
    ema = EMA(model, decay=0.9)
    _set(model, "weight", 0.0)
    assert float(ema.tensors["weight"][0, 0]) == 4.0
    ema.update(model, 0)
    assert float(model.weight.detach()[0, 0]) == 0.0
    assert not any(tensor.requires_grad for tensor in ema.tensors.values())


def test_copy_to_and_load() -> None:
    model, other = _Model(), _Model()
    ema = EMA(model, decay=0.5)
    _set(model, "weight", 0.0)
    ema.update(model, 0)
    ema.copy_to(other)
    assert float(other.weight.detach()[0, 0]) == 2.0
    assert other.weight.requires_grad
    restored = EMA(_Model(), decay=0.5)
    restored.load({name: tensor.clone() for name, tensor in ema.tensors.items()})
    for average in (ema, restored):
        average.update(model, 1)
    assert torch.equal(ema.tensors["weight"], restored.tensors["weight"])


def test_names_are_those_of_the_state_dict() -> None:
    assert list(EMA(_Model(), decay=0.5).tensors) == list(_Model().state_dict())


def _without_bias(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != "bias"}


def test_load_refuses_other_names_and_shapes_and_changes_nothing() -> None:
    ema = EMA(_Model(), decay=0.5)
    good = {name: tensor + 1 for name, tensor in ema.tensors.items()}
    with pytest.raises(ValueError, match=r"^tensors: .*bias"):
        ema.load(_without_bias(good))
    with pytest.raises(ValueError, match=r"^tensors: .*extra"):
        ema.load({**good, "extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"^tensors\['bias'\]: must have the shape \[3\], got \[4\]"):
        ema.load({**good, "bias": torch.zeros(4)})
    assert float(ema.tensors["weight"][0, 0]) == 4.0


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_decay_is_checked(decay: float) -> None:
    with pytest.raises(ValueError, match=r"^decay: "):
        EMA(_Model(), decay=decay)


@pytest.mark.parametrize("batch_size", [1, 50, 1000])
def test_a_half_life_halves_a_weights_share(batch_size: int) -> None:
    """Starting at 4 with the weight held at 0, the average is 2 after a half-life, 1 after two."""
    model = _Model()
    ema = EMA(model, HalfLife(images=1000, batch_size=batch_size))
    _set(model, "weight", 0.0)
    for step in range(2000 // batch_size):
        ema.update(model, step)
        expected = 4 * 0.5 ** ((step + 1) * batch_size / 1000)
        assert float(ema.tensors["weight"][0, 0]) == pytest.approx(expected, rel=2e-4)


def test_a_half_life_ramps_up_with_the_images_seen() -> None:
    half_life = HalfLife(images=500_000, batch_size=100, ramp_ratio=0.05)
    assert half_life.decay(0) == 0
    assert half_life.decay(200) == pytest.approx(0.5 ** (100 / 1000), rel=1e-15)
    # 5 % of 10⁷ images are the half-life itself
    assert half_life.decay(99_999) < half_life.decay(100_000) == half_life.decay(10**9)
    assert half_life.decay(10**9) == HalfLife(images=500_000, batch_size=100).decay(0) == 0.5 ** (1 / 5000)


def test_with_a_ramp_nothing_of_the_initialisation_stays() -> None:
    model = _Model()
    ema = EMA(model, HalfLife(images=1e6, batch_size=10, ramp_ratio=0.05))
    _set(model, "weight", 1.25)
    for step in range(3):
        ema.update(model, step)
        assert torch.equal(ema.tensors["weight"], torch.full((2, 3), 1.25))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("images", lambda: HalfLife(0, 1)),
        ("images", lambda: HalfLife(float("nan"), 1)),
        ("images", lambda: HalfLife(float("inf"), 1)),
        ("batch_size", lambda: HalfLife(100, 0)),
        ("ramp_ratio", lambda: HalfLife(100, 1, 0.0)),
        ("ramp_ratio", lambda: HalfLife(100, 1, float("inf"))),
        ("step", lambda: HalfLife(100, 1).decay(-1)),
        ("warmup", lambda: EMA(_Model(), HalfLife(100, 1), warmup=True)),
    ],
)
def test_half_life_errors_name_the_argument(name: str, call) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: "):
        call()
