"""A short training run, whole: network, t, ε, gradient, clipping, warm-up, Adam and the EMA together.

Without dropout, whose random numbers torch does not promise to keep from one kind of processor to another.
"""

from __future__ import annotations

import pytest
import torch

from pipelines.training import Learner
from pipelines.world import SingleWorker
from tests.support.runs import made_up_batches, tiny_config

LOSSES = [
    1.0197381,
    1.0286437,
    0.9196632,
    0.8605433,
    0.8724709,
    0.9093511,
    0.7902978,
    0.7395144,
    0.7301294,
    0.6925328,
]
FIRST_AND_LAST_GRAD_NORM = (2.454988, 1.705452)
WEIGHTS_NORM = 17.777495
EMA_NORM = 17.753867
EMA_TO_WEIGHTS = 0.634168


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return float(torch.stack([tensor.double().norm() for tensor in tensors.values()]).norm())


def ten_steps() -> tuple[list[float], tuple[float, float], float, float, float]:
    settings = (
        "model.dropout=0.0",
        "optimizer.grad_clip=0.5",
        "optimizer.learning_rate=0.003",
        "ema.warmup=false",
    )
    config = tiny_config(*settings)
    learner, world = Learner(config, torch.device("cpu")), SingleWorker(torch.device("cpu"))
    results = [learner.step(step, made_up_batches(config, step), world) for step in range(10)]
    groups = learner.state(10).groups
    apart = {name: groups["ema"][name] - tensor for name, tensor in groups["weights"].items()}
    norms = norm(groups["weights"]), norm(groups["ema"]), norm(apart)
    return [result.loss for result in results], (results[0].grad_norm, results[-1].grad_norm), *norms


def test_ten_steps() -> None:
    losses, grad_norms, weights, ema, apart = ten_steps()
    assert losses == pytest.approx(LOSSES, rel=1e-4)
    assert grad_norms == pytest.approx(FIRST_AND_LAST_GRAD_NORM, rel=1e-3)
    assert weights == pytest.approx(WEIGHTS_NORM, rel=1e-4)
    assert ema == pytest.approx(EMA_NORM, rel=1e-4)
    assert apart == pytest.approx(EMA_TO_WEIGHTS, rel=1e-3)
