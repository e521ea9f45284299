"""The MLflow tracking server: runs in SQLite in the state folder, artifacts through the server on the S3 server."""

from __future__ import annotations

import sys
from pathlib import Path

from infra.local.component import Component
from infra.local.layout import Stack
from infra.local.loopback import RequestFailed, request

DATABASE = "mlflow.db"


def remove_database(state_dir: Path) -> None:
    """Forget all runs; the server must not run."""
    for suffix in ("", "-journal", "-wal", "-shm"):
        (state_dir / f"{DATABASE}{suffix}").unlink(missing_ok=True)


def _command(stack: Stack) -> list[str]:
    return [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--host", "127.0.0.1", "--port", str(stack.ports["mlflow"])),
        *("--workers", "1"),
        # relative to the working directory, the state folder: a path of any characters needs no quoting
        *("--backend-store-uri", f"sqlite:///{DATABASE}"),
        *("--serve-artifacts", "--artifacts-destination", "s3://mlflow/artifacts"),
    ]


def _probe(stack: Stack) -> str | None:
    try:
        with request("GET", stack.mlflow_uri + "/health", timeout_s=5) as response:
            response.read()
    except RequestFailed as error:
        return str(error)
    return None


MLFLOW = Component(
    "mlflow",
    "MLflow server",
    ("mlflow",),
    ("s3",),
    _command,
    _probe,
    stop_grace_s=5,
    # its runner of background jobs is more processes, for features that nothing here uses
    environment={"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
)
