"""`ddpm demo`: the commands that a new user would give, one after the other, and what they measured."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from infra.local import find
from jobs import common
from pipelines.errors import UserError

DESCRIPTION = """\
The whole way on 1,797 handwritten digits, on this machine alone: start the local stack, prepare the data,
submit the training job, sweep the schedule, make 2,000 digits, judge them.

Each step is a command that is printed as it runs.  Interrupted or failed, run it again: it goes on where it
was.  The stack stays up afterwards, to look at; `ddpm down` stops it.
"""

CONFIG = "digits.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument(
        "--out",
        default="demo-results",
        metavar="FOLDER",
        help="for the report and the pictures (demo-results)",
    )


def steps(out: str) -> list[tuple[str, list[str]]]:
    """What each step does, and its command."""
    config = ["--config", CONFIG]
    return [
        ("start the local stack", ["up"]),
        ("make the data set", ["prepare", "digits", *config]),
        ("train, as a job on the cluster", ["submit", "train", *config]),
        ("sweep T and the β range", ["tune", *config, "--out", out]),
        ("make 2,000 digits", ["sample", *config]),
        ("judge them", ["evaluate", *config, "--out", out]),
    ]


def run(arguments: argparse.Namespace) -> int:
    # the demo must not meet anybody's real buckets or cluster, whatever the environment says
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("AWS_", "RAY_", "MLFLOW_", "DDPM_DASHBOARD"))
    }
    environment["PYTHONUNBUFFERED"] = "1"
    took: list[tuple[str, float]] = []
    planned = steps(arguments.out)
    for number, (title, command) in enumerate(planned, 1):
        print(f"\n[{number}/{len(planned)}] {title}\n$ ddpm {' '.join(command)}", flush=True)
        start = time.monotonic()
        code = subprocess.run(
            [sys.executable, "-m", "jobs", *command], env=environment, check=False
        ).returncode
        if code:
            raise _StepFailed(
                f"step {number} (ddpm {' '.join(command)}) failed with exit code {code}, see above; "
                "run the demo again to go on from here"
            )
        took.append((title, time.monotonic() - start))
    print(summary(Path(arguments.out), took))
    return 0


class _StepFailed(UserError):
    exit_code = 1


def _sampled(report: dict[str, Any]) -> list[str]:
    bound, of = report["sampler_bound"], report["sampler_bound_of"]
    if bound is None:
        return []
    return [f"    the same of what is sampled {bound['total']:.3f} ± {bound['total_stderr']:.3f} ({of})"]


def summary(out: Path, took: list[tuple[str, float]]) -> str:
    """The table at the end: what was measured, how long it took, where to look."""
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    best: dict[str, Any] = json.loads((out / "sweep.json").read_text())["trials"][0]
    samples, real, noise = report["distances"]
    bound = report["bound"]
    shares = report["class_shares"]
    rarest = min(shares, key=lambda name: float(shares[name]))
    lines = [
        "",
        "what was measured",
        f"  held-out bits/dim             {bound['total']:.3f} ± {bound['total_stderr']:.3f} "
        f"after {report['step']} steps (reconstruction {bound['reconstruction']:.3f}, consistency "
        f"{bound['consistency']:.3f}, prior {bound['prior']:.1e})",
        *_sampled(report),
        f"  best schedule of the sweep    T = {best['num_timesteps']}, β {best['beta_start']:.2g} … "
        f"{best['beta_end']:.2g}: {best['bits_per_dim']:.3f} bits/dim after {best['step']} steps",
        f"  images made                   {report['num_samples']}",
        f"  distances, {samples['count']} images a side   samples    real   noise   (not FID: see the README)",
        *(
            f"    {title:<26} {samples[key]:>9.3f} {real[key]:>7.3f} {noise[key]:>7.3f}"
            for title, key in (
                ("Fréchet", "frechet"),
                ("kernel", "kernel"),
                ("classifier's confidence", "confidence"),
            )
        ),
        f"  rarest class among samples    {rarest}, {shares[rarest]:.1%}",
        "",
        "how long it took",
        *(f"  {title:<32} {seconds:>6.0f} s" for title, seconds in took),
        f"  {'in all':<32} {sum(seconds for _, seconds in took):>6.0f} s",
        "",
        "where to look",
        f"  pictures and report           {out.resolve()}",
    ]
    stack = find(common.state_dir())
    if stack is not None:
        lines += [
            f"  runs, losses, sample grids    {stack.mlflow_uri}",
            f"  the cluster                   {stack.dashboard_url} (asks for the token in {stack.token_path})",
            "  everything else               `ddpm --help`; `ddpm down` stops the stack",
        ]
    return "\n".join(lines)
