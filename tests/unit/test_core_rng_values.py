"""The values of ddpm_core.rng never change: the fast form against the plain one, bit for bit."""

import pytest
import torch
from torch import Tensor

from ddpm_core import rng
from tests.support import rng_reference as reference

SHAPES = [(), (0,), (1,), (3,), (4,), (5,), (7, 1), (2, 3, 5), (1, 8, 8), (3, 17, 9), (3, 32, 32)]
EXTREMES = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40 + 7, 2**63 - 1, -1, -(2**63)])


def _assert_same(ours: Tensor, reference: Tensor) -> None:
    assert ours.dtype == reference.dtype
    assert torch.equal(ours, reference)


def _assert_all_same(seed: int, purpose: str, index: Tensor, shape: tuple[int, ...], draw: int) -> None:
    normal = reference.normal(seed, purpose, index, shape, draw=draw)
    _assert_same(rng.normal(seed, purpose, index, shape, draw=draw), normal)
    for bits, dtype in [(24, torch.float32), (32, torch.float64)]:
        uniform = reference.uniform(seed, purpose, index, shape, draw=draw, bits=bits)
        _assert_same(rng.uniform(seed, purpose, index, shape, draw=draw, dtype=dtype), uniform)
    for high in (1, 1000, 2**31):
        integers = reference.integers(seed, purpose, index, high, draw=draw)
        _assert_same(rng.integers(seed, purpose, index, high, draw=draw), integers)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("batch", [0, 1, 3, 32])
def test_every_shape_and_batch(batch: int, shape: tuple[int, ...]) -> None:
    _assert_all_same(3, "noise", torch.arange(batch) + 5, shape, 0)


@pytest.mark.parametrize(("batch", "shape"), [(128, (3, 32, 32)), (90, (2900,)), (2, (3, 300, 300))], ids=str)
def test_a_batch_that_is_made_in_pieces(batch: int, shape: tuple[int, ...]) -> None:
    _assert_all_same(0, "noise", torch.arange(batch), shape, 0)


@pytest.mark.parametrize("draw", [0, 1, 2**31, 2**32 - 1])
@pytest.mark.parametrize(("seed", "purpose"), [(0, ""), (-1, "sample"), (2**70, "größer;2")])
def test_extreme_keys_and_counters(seed: int, purpose: str, draw: int) -> None:
    _assert_all_same(seed, purpose, EXTREMES, (13,), draw)


def test_philox_of_counters_that_broadcast() -> None:
    torch.manual_seed(0)
    for shapes in [((), (), (), ()), ((5, 1), (3,), (), (2, 1, 1)), ((4,), (), (), ()), ((), (), (), (4,))]:
        counter = tuple(torch.randint(0, 2**32, shape) for shape in shapes)
        before = [word.clone() for word in counter]
        expected = torch.broadcast_tensors(*reference.philox4x32(counter, (2**32 - 1, 12345)))
        ours = rng.philox4x32(counter, (2**32 - 1, 12345))  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(counter, before, strict=True))


def test_a_strided_index() -> None:
    index = torch.arange(60).reshape(20, 3)[:, 1]
    assert torch.equal(rng.normal(0, "noise", index, (9,)), reference.normal(0, "noise", index, (9,)))


def test_the_index_is_left_alone() -> None:
    index = torch.arange(5)
    for _ in range(2):
        rng.integers(0, "timestep", index, 3)
        rng.normal(0, "noise", index, (9,))
    assert torch.equal(index, torch.arange(5))


def test_normal_does_not_depend_on_the_default_dtype() -> None:
    before = torch.get_default_dtype()
    expected = rng.normal(0, "noise", EXTREMES, (9,))
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(rng.normal(0, "noise", EXTREMES, (9,)), expected)
    finally:
        torch.set_default_dtype(before)
