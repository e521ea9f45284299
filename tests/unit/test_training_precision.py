"""The format that a network computes in: bfloat16 where a GPU has it, elsewhere by request alone."""

from __future__ import annotations

import logging

import pytest
import torch

from pipelines import precision
from pipelines.precision import Autocast
from pipelines.training import Learner, StepResult
from pipelines.world import SingleWorker
from tests.support.runs import made_up_batches, tiny_config

CPU = torch.device("cpu")
GPU = torch.device("cuda")


def trained(wanted: str) -> tuple[Learner, list[StepResult]]:
    config = tiny_config(f"train.precision={wanted}")
    learner = Learner(config, CPU)
    return learner, [learner.step(k, made_up_batches(config, k), SingleWorker(CPU)) for k in range(3)]


def test_bfloat16_trains_float32_weights() -> None:
    exact, expected = trained("float32")
    learner, got = trained("bfloat16")
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=0.02)
        assert ours.grad_norm != theirs.grad_norm, "the network was not asked in bfloat16"
    for group, tensors in learner.state(3).groups.items():
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}, group
    assert exact.state(3).groups.keys() == learner.state(3).groups.keys()


def test_a_cpu_trains_in_float32_unless_told_otherwise() -> None:
    _, expected = trained("float32")
    _, got = trained("auto")
    assert got == expected


@pytest.mark.parametrize(("has_it", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_gpu_trains_in_bfloat16_if_it_has_it(
    has_it: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_it)
    assert Autocast("auto", GPU).dtype == dtype
    assert Autocast("float32", GPU).dtype == torch.float32


@pytest.mark.parametrize("has_it", [True, False])
def test_a_cpu_that_is_slow_at_it_is_warned_about(
    has_it: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: has_it)
    with caplog.at_level(logging.WARNING):
        assert Autocast("bfloat16", CPU).dtype == torch.bfloat16
        Autocast("auto", CPU)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["train.precision"] * (
        not has_it
    )
