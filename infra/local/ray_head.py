"""The Ray head: the cluster of one machine, its dashboard and its Jobs API."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
import tempfile
from pathlib import Path

from infra.local.component import Component
from infra.local.layout import Stack
from infra.local.loopback import RequestFailed, request

_OBJECT_STORE_BYTES = 512 * 1024**2


def default_num_cpus() -> int:
    """Two workers at least, and one spare for the drivers of jobs and trials, which only wait."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores, 2) + 1


def make_temp_dir() -> Path:
    """A folder for Ray's sockets, readable by this user alone.

    Directly under /tmp, since the path of a unix socket is limited to about 100 bytes and Ray adds 70.
    """
    short = Path("/tmp")
    usable = short.is_dir() and os.access(short, os.W_OK)
    return Path(tempfile.mkdtemp(prefix="ddpm-ray-", dir=short if usable else None))


def remove_temp_dir(path: Path) -> None:
    """Remove it with all that Ray left there; no error if it is gone."""
    shutil.rmtree(path, ignore_errors=True)


def make_token(path: Path) -> None:
    """A new random token in `path`, for this user's eyes alone; one that exists is kept."""
    if path.exists() and path.stat().st_size:
        path.chmod(0o600)
        return
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))


def _session_dir(stack: Stack) -> Path:
    # Ray opens its own folder to everybody; inside the private one nobody gets there
    return stack.ray_temp_dir / "r"


def _command(stack: Stack) -> list[str]:
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
        f"--port={stack.ports['gcs']}",
        "--include-dashboard=true",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={stack.ports['dashboard']}",
        f"--ray-client-server-port={stack.ports['client']}",
        # 0: whatever is free, so that several stacks fit on one machine
        *("--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0"),
        f"--num-cpus={stack.num_cpus}",
        f"--object-store-memory={_OBJECT_STORE_BYTES}",
        f"--temp-dir={_session_dir(stack)}",
        "--disable-usage-stats",
    ]


def _probe(stack: Stack) -> str | None:
    # `ray start` writes it last
    if not (_session_dir(stack) / "ray_current_cluster").exists():
        return "not ready yet"
    try:
        bearer = {"Authorization": f"Bearer {stack.token_path.read_text().strip()}"}
        with request("GET", stack.dashboard_url + "/api/version", headers=bearer, timeout_s=5) as response:
            json.loads(response.read())["ray_version"]
        with request("GET", stack.dashboard_url + "/api/jobs/", headers=bearer, timeout_s=5) as response:
            json.loads(response.read())
    except (RequestFailed, OSError, ValueError, KeyError) as error:
        return str(error)
    return None


RAY = Component(
    "ray",
    "Ray head",
    ("gcs", "dashboard", "client"),
    ("s3", "mlflow"),
    _command,
    _probe,
    stop_grace_s=10,
    # Ray gives its own parts 30 s to find each other, which a busy machine may exceed
    passing_failures=("timed out", "timeout"),
    environment={
        # a job that is stopped gets this long to save its state
        "RAY_JOB_STOP_WAIT_TIME_S": "30",
        # no other node takes over, so there is nothing to wait for
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        # two metrics servers have fixed ports by default
        "AUTOSCALER_METRIC_PORT": "0",
        "DASHBOARD_METRIC_PORT": "0",
        # Ray's process titles would overwrite the environment in which the stack's mark is looked up
        "SPT_NOENV": "1",
    },
)
