"""A user's own stages on a real Ray cluster: the workers find the module that lies where the command was called."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from infra.local import Stack
from pipelines.config import load_config
from pipelines.stages import load_stages
from pipelines.tracking import History
from pipelines.train import Run, claim, open_run, train
from pipelines.world import SingleWorker
from tests.support.jobs import TINY, one_line_mistake, succeeded

ROOT = Path(__file__).resolve().parents[2]
(EXAMPLE,) = re.findall(
    r"```python\n(.*?)```", (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8"), re.DOTALL
)
# inverts, so that it shows in every number
MORE = """

def invert(samples):
    for sample in samples:
        yield sample | {"image": 255 - sample["image"]}
"""
STAGES = "data.stages=[augment.shift, augment.invert, {name: augment.darken, args: {strength: 0.2}}]"


@pytest.fixture
def work(stack: Stack, tmp_path: Path) -> Path:
    """A user's working directory with a module of theirs; the digits are prepared."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "augment.py").write_text(EXAMPLE + MORE, encoding="utf-8")
    succeeded(ddpm(folder, "prepare", "digits", *settings()))
    return folder


def settings(*overrides: str) -> list[str]:
    length = ("train.steps=6", "train.eval_every=6", "train.checkpoint_every=6", "workers.num=2")
    given = (*TINY, *length, "data.uri=s3://ddpm/tests/stages", *overrides)
    return ["--config", "digits.yaml", *(part for override in given for part in ("--set", override))]


def ddpm(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """An installed `ddpm` called in a folder, which is not on its path."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "jobs", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def run_of(*overrides: str) -> Run:
    arguments = settings(*overrides)
    return open_run(load_config("digits.yaml", [one for one in arguments[2:] if one != "--set"]))


def gradients(run: Run) -> list[float]:
    return [row.metrics["grad_norm"] for row in History(run.storage).rows() if "grad_norm" in row.metrics]


def test_workers_of_a_cluster_and_of_a_submitted_job_find_the_module(work: Path) -> None:
    here = (STAGES, "storage=s3://ddpm/tests/stages-here")
    there = (STAGES, "storage=s3://ddpm/tests/stages-there")
    without = ("storage=s3://ddpm/tests/stages-without",)
    succeeded(ddpm(work, "train", *settings(*here)))
    succeeded(ddpm(work, "submit", "train", *settings(*there)))
    plain = run_of(*without)
    claim(plain)
    train(plain, SingleWorker(torch.device("cpu")))
    found = gradients(run_of(*here))
    assert len(found) == 6
    assert gradients(run_of(*there)) == found
    assert run_of(*here).name == run_of(*there).name != plain.name
    assert gradients(plain) != pytest.approx(found, rel=1e-3)
    # this process has not imported it, and could not: what ran was the workers'
    with pytest.raises(Exception, match="augment cannot be imported"):
        load_stages(run_of(*here).config.data.stages)


def test_a_submitted_job_whose_stage_is_nowhere_ends_with_the_line(work: Path) -> None:
    job = ddpm(work, "submit", "train", *settings("data.stages=[elsewhere.x]", "name=nowhere"))
    assert job.returncode == 1
    assert "data.stages[0]: elsewhere.x: elsewhere cannot be imported" in job.stderr
    one_line_mistake(
        ddpm(work, "train", *settings("data.stages=[augment.y]")),
        "data.stages[0]: augment.y: the module augment",
    )
