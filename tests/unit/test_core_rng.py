"""Randomness by (seed, purpose, index, draw)."""

import math

import pytest
import torch
from torch import Tensor

from ddpm_core import rng

INDEX = torch.arange(1000)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    """The vectors published with Random123 (kat_vectors, philox4x32 10)."""
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    assert tuple(int(word) for word in rng.philox4x32((c0, c1, c2, c3), key)) == expected


def _normal(index: Tensor) -> Tensor:
    return rng.normal(3, "noise", index, (2, 3, 5), draw=4)


def _uniform(index: Tensor) -> Tensor:
    return rng.uniform(3, "flip", index, (7,), draw=4)


def _integers(index: Tensor) -> Tensor:
    return rng.integers(3, "timestep", index, 1000, draw=4)


@pytest.mark.parametrize("function", [_normal, _uniform, _integers])
def test_a_sample_does_not_depend_on_its_batch(function) -> None:
    index = torch.tensor([5, 0, 17, 2**33 + 1, 5])
    together = function(index)
    for row, one in enumerate(index):
        assert torch.equal(function(one[None])[0], together[row])
    assert torch.equal(function(index.flip(0)), together.flip(0))
    assert function(index[:0]).shape == (0, *together.shape[1:])


def test_a_shorter_shape_is_a_prefix() -> None:
    index = torch.arange(4)
    long = rng.normal(0, "noise", index, (11,))
    for length in range(11):
        assert torch.equal(rng.normal(0, "noise", index, (length,)), long[:, :length])
    assert torch.equal(rng.normal(0, "noise", index, (11, 1)).flatten(1), long)


def test_every_part_of_the_key_matters() -> None:
    index = torch.tensor([1])
    values = [
        rng.normal(seed, purpose, index + shift, (1,), draw=draw).item()
        for seed in (0, 1, -1, 2**70)
        for purpose in ("noise", "sample", "")
        for shift in (0, 1, 2**32, 2**40)
        for draw in (0, 1, 2**32 - 1)
    ]
    assert len(set(values)) == len(values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_normal_is_one_number_in_every_dtype(dtype: torch.dtype) -> None:
    exact = rng.normal(0, "noise", INDEX[:10], (4,), dtype=torch.float64)
    assert torch.equal(rng.normal(0, "noise", INDEX[:10], (4,), dtype=dtype), exact.to(dtype))


def test_normal_moments_and_tails() -> None:
    values = rng.normal(1, "noise", INDEX, (1000,), dtype=torch.float64)
    count = values.numel()
    for power, moment in [(1, 0), (2, 1), (3, 0), (4, 3), (5, 0), (6, 15)]:
        # Var(Z^k) = E Z^2k − (E Z^k)²
        double_factorial = math.prod(range(1, 2 * power, 2))
        stderr = math.sqrt((double_factorial - moment**2) / count)
        assert abs(float(values.pow(power).mean()) - moment) < 5 * stderr
    # Kolmogorov–Smirnov distance: sqrt(n)·D exceeds 2 with probability 7e-4.
    cdf = torch.special.ndtr(values.flatten().sort().values)
    distance = (cdf - (torch.arange(count, dtype=torch.float64) + 0.5) / count).abs().max()
    assert float(distance) * math.sqrt(count) < 2.0
    assert 4.2 < float(values.abs().max()) < 6.8


@pytest.mark.parametrize("other", ["index", "draw", "purpose", "seed", "position"])
def test_neighbours_are_uncorrelated(other: str) -> None:
    values = rng.normal(1, "noise", INDEX, (101,), dtype=torch.float64)
    changed = {
        "index": lambda: rng.normal(1, "noise", INDEX + 1, (101,), dtype=torch.float64),
        "draw": lambda: rng.normal(1, "noise", INDEX, (101,), draw=1, dtype=torch.float64),
        "purpose": lambda: rng.normal(1, "noise2", INDEX, (101,), dtype=torch.float64),
        "seed": lambda: rng.normal(2, "noise", INDEX, (101,), dtype=torch.float64),
        "position": lambda: values.roll(1, dims=1),
    }[other]()
    for a, b in [(values, changed), (values.square() - 1, changed.square() - 1)]:
        z = (a * b).sum() / math.sqrt(float(a.square().mean() * b.square().mean()) * a.numel())
        assert abs(float(z)) < 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_lies_in_its_range(dtype: torch.dtype) -> None:
    values = rng.uniform(1, "flip", INDEX, (1000,), dtype=dtype)
    assert values.dtype == dtype
    assert 0 <= float(values.min()) < 1e-4
    assert 1 - 1e-4 < float(values.max()) < 1
    counts = torch.histc(values.float(), bins=64, min=0, max=1)
    chi_square = float(((counts - 1e6 / 64) ** 2 / (1e6 / 64)).sum())
    assert abs(chi_square - 63) < 5 * math.sqrt(2 * 63)


def test_uniform_takes_no_dtype_that_rounds_up_to_one() -> None:
    with pytest.raises(ValueError, match=r"^dtype: "):
        rng.uniform(0, "flip", INDEX, dtype=torch.bfloat16)


@pytest.mark.parametrize("high", [1, 2, 3, 1000, 2**31])
def test_integers_are_uniform(high: int) -> None:
    values = rng.integers(1, "timestep", torch.arange(100_000), high)
    assert values.dtype == torch.int64
    assert int(values.min()) >= 0
    assert int(values.max()) < high
    cells = min(high, 50)
    counts = torch.bincount(values * cells // high, minlength=cells)
    expected = 100_000 / cells
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_square - (cells - 1)) <= 5 * math.sqrt(2 * (cells - 1))


def test_derive_seed() -> None:
    seeds = [rng.derive_seed(s, p, *i) for s in (0, 1) for p in ("a", "b") for i in ((), (0,), (1,), (0, 1))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert rng.derive_seed(1, "a", 23) != rng.derive_seed(12, "a", 3)
    assert rng.derive_seed(1, "a;2") != rng.derive_seed(1, "a", 2)
    torch.Generator().manual_seed(max(seeds))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("index", lambda: rng.normal(0, "noise", torch.tensor([1.0]), (2,))),
        ("index", lambda: rng.normal(0, "noise", torch.tensor([[1]]), (2,))),
        ("index", lambda: rng.integers(0, "timestep", torch.tensor([1], dtype=torch.int32), 5)),
        ("high", lambda: rng.integers(0, "timestep", INDEX, 0)),
        ("draw", lambda: rng.uniform(0, "flip", INDEX, draw=-1)),
        ("draw", lambda: rng.uniform(0, "flip", INDEX, draw=2**32)),
        ("seed", lambda: rng.derive_seed(1.5, "a")),  # type: ignore[arg-type]
    ],
)
def test_errors_name_the_argument(name: str, call) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: "):
        call()
