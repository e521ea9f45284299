"""Running `ddpm` as a user does, as a process of its own."""

from __future__ import annotations

import subprocess
import sys

from pipelines.checkpoints import Checkpoints
from pipelines.config import Config, load_config
from pipelines.train import Run, open_run

# the digits, with a network and a length that cost seconds
TINY = (
    "model.base_channels=8",
    "model.num_groups=4",
    "train.batch_size=32",
    "train.micro_batches=4",
    "train.log_every=1",
    "optimizer.warmup_steps=5",
    "bound.num_strata=2",
    "bound.num_images=32",
    "sampler.num_steps=5",
    "schedule.num_timesteps=100",
    "schedule.beta_start=0.01",
    "schedule.beta_end=0.2",
)


def settings(*overrides: str) -> list[str]:
    """Arguments for the tiny digits with these overrides."""
    arguments = ["--config", "digits.yaml"]
    for override in (*TINY, *overrides):
        arguments += ["--set", override]
    return arguments


def tiny_config(*overrides: str) -> Config:
    return load_config("digits.yaml", [*TINY, *overrides])


def tiny_run(*overrides: str) -> Run:
    return open_run(tiny_config(*overrides))


def ddpm(
    *arguments: str, timeout_s: float = 300, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`ddpm ARGUMENTS`, with its output caught."""
    return subprocess.run(
        [sys.executable, "-m", "jobs", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=env,
        check=False,
    )


def succeeded(result: subprocess.CompletedProcess[str]) -> str:
    """Standard output of a command that must have exited with 0."""
    assert result.returncode == 0, f"{result.args}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def one_line_mistake(result: subprocess.CompletedProcess[str], *named: str) -> str:
    """The single line on standard error of a user's mistake: exit code 2, and it names these things."""
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    assert len(lines) == 1, result.stderr
    for name in named:
        assert name in lines[0], lines[0]
    return lines[0]


def losses(run: Run) -> dict[int, float]:
    """The loss of every logged step, as the run's history has it."""
    from pipelines.tracking import History

    return {row.step: row.metrics["loss"] for row in History(run.storage).rows() if "loss" in row.metrics}


def committed(run: Run) -> list[int]:
    return Checkpoints(run.storage).steps()
