"""Mass generation with a compiled network: the same images but for rounding, or a line that says why not."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from ddpm_core import build_network
from pipelines.compiled import compile_frozen
from pipelines.errors import UserError
from tests.support.runs import tiny_config


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs a C++ compiler")
def test_a_compiled_network_is_the_network_but_for_rounding() -> None:
    config = tiny_config().model
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
    assert len(asked) == 1


def test_what_can_not_be_compiled_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Linear(1, 1)
    options = []
    monkeypatch.setattr(net, "compile", lambda **given: options.append(given))

    def example() -> None:
        raise RuntimeError("no C++\ncompiler")

    with pytest.raises(UserError, match=r"^sample\.compile: .*no C\+\+ compiler.*set it to false$"):
        compile_frozen(net, example)
    assert options == [{"options": {"freezing": True}}]
