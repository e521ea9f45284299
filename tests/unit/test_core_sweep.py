"""Every public callable of ddpm_core that takes tensors: dtypes, layouts, a batch of one, few and many steps."""

import pytest
import torch
from torch import Tensor

import ddpm_core
from ddpm_core import Schedule, ScheduleConfig
from tests.support.core_example import BATCH, Example
from tests.support.core_examples import examples
from tests.support.core_public import NO_TENSORS, WITHOUT_EXAMPLE, public_callables, tensor_parameters

SHORT = Schedule.from_config(ScheduleConfig(num_timesteps=6, beta_start=0.02, beta_end=0.6))
EXAMPLES = examples(SHORT)
PUBLIC = public_callables()

# of one rounding, and how many of the result's largest number a call may be wrong by
EPSILON = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}
ROUNDINGS = 8


def _close(got: Tensor, expected: Tensor, dtype: torch.dtype, loose: float = 1.0) -> None:
    assert got.shape == expected.shape
    if not got.is_floating_point():
        assert torch.equal(got, expected)
        return
    got, expected = got.double(), expected.double()
    finite = expected.isfinite()
    assert torch.equal(got[~finite], expected[~finite])
    got, expected = got[finite], expected[finite]
    if got.numel():
        largest = float(expected.abs().max())
        error = float((got - expected).abs().max())
        assert error <= ROUNDINGS * loose * EPSILON[dtype] * largest, f"{error / largest:.3g} of the largest"


def _floating(example: Example) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in example.tensors.items() if tensor.is_floating_point()}


def test_every_public_name_that_takes_tensors_has_an_example_with_all_of_them() -> None:
    excused = {name for names in WITHOUT_EXAMPLE.values() for name in names}
    assert EXAMPLES.keys() | excused == PUBLIC.keys()
    assert not EXAMPLES.keys() & excused
    for name, example in EXAMPLES.items():
        assert set(example.tensors) == set(PUBLIC[name]), name


def test_every_other_public_name_has_a_reason() -> None:
    listed = [name for names in NO_TENSORS.values() for name in names]
    assert len(listed) == len(set(listed))
    with_tensors = {name.split(".")[0] for name in PUBLIC}
    assert set(listed) | with_tensors >= set(ddpm_core.__all__)
    assert not set(listed) & with_tensors
    assert set(listed) <= set(ddpm_core.__all__)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("dtype", EPSILON, ids=str)
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    example = EXAMPLES[name]
    cast = {key: tensor.to(dtype) for key, tensor in _floating(example).items()}
    if not cast and dtype != torch.float64:
        return
    expected = example.run(**{key: tensor.double() for key, tensor in cast.items()})
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    dtypes = {"like": dtype, "wide": wide, "float64": torch.float64, "integer": torch.int64}
    results = example.results
    got = example.run(**cast)
    assert len(got) == len(example.out_batch)
    for place, (ours, exact) in enumerate(zip(got, expected, strict=True)):
        said = results if isinstance(results, str) else results[place]
        assert ours.dtype == dtypes[said]
        assert ours.device == torch.device("cpu")
        _close(ours, exact, dtype, example.loose)


def _strided(tensor: Tensor) -> Tensor:
    return torch.stack((tensor, torch.zeros_like(tensor)), dim=-1)[..., 0]


def _channels_last(tensor: Tensor) -> Tensor:
    """The channels, the third dimension from the end, are made the fastest."""
    return tensor.movedim(-3, -1).contiguous().movedim(-1, -3) if tensor.dim() >= 4 else tensor


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("lay", [_strided, _channels_last])
def test_memory_layouts(name: str, lay) -> None:
    example = EXAMPLES[name]
    laid = {key: lay(tensor) for key, tensor in example.tensors.items()}
    if all(tensor.is_contiguous() for tensor in laid.values()):
        return
    before = {key: tensor.clone() for key, tensor in laid.items()}
    for ours, expected in zip(example.run(**laid), example.run(), strict=True):
        _close(ours, expected, torch.float64, example.loose)
    for key, tensor in laid.items():
        assert torch.equal(tensor, before[key]), f"{key} was changed"


@pytest.mark.parametrize("name", [name for name, example in EXAMPLES.items() if example.batch])
def test_a_batch_of_one(name: str) -> None:
    """A row alone gives its row of a result; of one that has no rows the rows' own results are summands."""
    example = EXAMPLES[name]
    rows = [
        example.run(**{key: example.tensors[key].narrow(dim, row, 1) for key, dim in example.batch.items()})
        for row in range(BATCH)
    ]
    for place, (whole, dim) in enumerate(zip(example.run(), example.out_batch, strict=True)):
        alone = [results[place] for results in rows]
        assert all(bool(each.isfinite().all()) for each in alone)
        if dim is None:
            _close(torch.stack(alone).sum(0), whole, torch.float64, example.loose)
            continue
        assert whole.shape[dim] == BATCH
        for row, each in enumerate(alone):
            _close(each, whole.narrow(dim, row, 1), torch.float64, example.loose)


def test_what_has_no_batch_is_a_table() -> None:
    for name, example in EXAMPLES.items():
        for key in example.tensors.keys() - example.batch.keys():
            assert example.tensors[key].dim() == 1, f"{name}: {key}"
        if not example.batch:
            assert set(example.out_batch) == {None}, name


def test_annotations_are_read_whether_quoted_or_not() -> None:
    def quoted(x: "Tensor | None", count: int) -> None: ...

    class Kind:
        def method(self, x: "dict[str, Tensor]") -> None: ...

    def bare(x) -> None: ...

    assert tensor_parameters(quoted) == tensor_parameters(Kind().method) == ("x",)
    with pytest.raises(AssertionError, match=r"\['x'\] have no annotation"):
        tensor_parameters(bare)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("num_timesteps", [1, 4000])
def test_few_and_many_steps(name: str, num_timesteps: int) -> None:
    example = _on_other_chains()[num_timesteps].get(name)
    if example is None:
        return
    for result in example.run():
        assert bool(result.isfinite().all())


_OTHER: dict[int, dict[str, Example]] = {}


def _on_other_chains() -> dict[int, dict[str, Example]]:
    if not _OTHER:
        for num_timesteps in (1, 4000):
            config = ScheduleConfig(num_timesteps=num_timesteps, beta_start=1e-4, beta_end=0.02)
            _OTHER[num_timesteps] = examples(Schedule.from_config(config))
        # C_t stands between two steps
        del _OTHER[1]["two_sided_term"]
    return _OTHER
