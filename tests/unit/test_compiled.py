"""Compiled networks, to generate and to train: the same numbers but for rounding, or a line that says why not."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
from torch import nn

from ddpm_core import build_network
from pipelines.compiled import compile_frozen, compile_training
from pipelines.errors import UserError
from pipelines.training import Learner
from pipelines.world import SingleWorker
from tests.support.runs import made_up_batches, tiny_config

CPU = torch.device("cpu")
Compile = Callable[[nn.Module, Callable[[], object]], None]

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="compiling for a CPU needs a C++ compiler"
)


@needs_compiler
def test_a_compiled_network_is_the_network_but_for_rounding() -> None:
    config = tiny_config("model.in_channels=3").model
    torch.manual_seed(0)
    net = build_network(config).eval().requires_grad_(False)
    for parameter in net.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    x = torch.randn(3, config.in_channels, config.image_size, config.image_size)
    t = torch.tensor([0, 3, 7])
    expected = net(x, t)
    asked = []

    def example() -> None:
        asked.append(net(x, t))

    compile_frozen(net, example)
    with torch.inference_mode():
        torch.testing.assert_close(net(x, t), expected, rtol=1e-4, atol=1e-5)
        for parameter in net.parameters():
            if parameter.dim() == 4:
                parameter.zero_()
        # the convolutions' weights are constants by now, laid out as they are read: what makes it fast
        torch.testing.assert_close(net(x, t), expected, rtol=1e-4, atol=1e-5)
        # also for the layout that the network's own outputs have
        other = x.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(net(other, t), expected, rtol=1e-4, atol=1e-5)
    assert len(asked) == 1


@needs_compiler
def test_compiled_training_is_training_but_for_rounding() -> None:
    config = tiny_config("model.dropout=0")
    compiled = tiny_config("model.dropout=0", "train.compile=true")
    assert config.training_identity("d") != compiled.training_identity("d")
    learners = [Learner(given, CPU) for given in (config, compiled)]
    for step in range(2):
        plain, fast = (
            learner.step(step, made_up_batches(config, step), SingleWorker(CPU)) for learner in learners
        )
        assert fast.loss == pytest.approx(plain.loss, rel=1e-4)
        assert fast.grad_norm == pytest.approx(plain.grad_norm, rel=1e-4)
    # the calls of the compiled one are not the module's own
    assert learners[1].model._compiled_call_impl is not None


@needs_compiler
def test_a_compiled_learner_drops_out_by_seed_and_step_alone() -> None:
    """Whatever was drawn before: the whole of exact resume, and of elasticity, hangs on it."""
    config = tiny_config("model.dropout=0.5", "train.compile=true")

    def losses(steps: list[int], drawn_before: int) -> list[float]:
        learner = Learner(config, CPU)
        with torch.no_grad():
            for parameter in learner.model.parameters():
                parameter.fill_(0.05)  # some begin at zero, behind which nothing that is dropped is seen
        torch.rand(drawn_before)
        data, world = made_up_batches(config, 0), SingleWorker(CPU)
        return [learner.step(step, data, world).loss for step in steps]

    assert losses([0, 1], drawn_before=0) == losses([0, 1], drawn_before=3)
    assert losses([0], drawn_before=0) != losses([1], drawn_before=0)


@pytest.mark.parametrize(("compile_it", "setting"), [(compile_frozen, "sample"), (compile_training, "train")])
def test_what_can_not_be_compiled_is_one_line(
    compile_it: Callable[[nn.Module, Callable[[], object]], None], setting: str
) -> None:
    def example() -> None:
        raise RuntimeError("no C++\ncompiler")

    with pytest.raises(UserError, match=rf"^{setting}\.compile: .*no C\+\+ compiler.*set it to false$"):
        compile_it(nn.Linear(1, 1), example)
