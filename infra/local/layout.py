"""A running local stack as its users see it: where everything is, and the environment that leads there."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

BUCKETS = ("ddpm", "mlflow")

# What would lead a process elsewhere, or take somebody's real credentials into the stack.
_FOREIGN_PREFIXES = ("AWS_", "AZURE_", "CLOUDSDK_", "DATABRICKS_", "GOOGLE_", "MLFLOW_")
_FOREIGN_NAMES = frozenset(
    (
        "RAY_ADDRESS",
        "RAY_API_SERVER_ADDRESS",
        "RAY_AUTH_MODE",
        "RAY_AUTH_TOKEN",
        "RAY_AUTH_TOKEN_PATH",
        "RAY_JOB_CONFIG_JSON_ENV_VAR",
        "RAY_JOB_HEADERS",
        "RAY_NAMESPACE",
        "RAY_REDIS_ADDRESS",
        "RAY_RUNTIME_ENV_HOOK",
        "RAY_START_HOOK",
        "RAY_TMPDIR",
    )
)
_NEVER_PROXIED = ("127.0.0.1", "localhost")


@dataclass(frozen=True)
class Stack:
    """The local stack whose files are in `state_dir`; its servers listen on 127.0.0.1."""

    state_dir: Path
    stack_id: str
    ports: Mapping[str, int]  # s3, mlflow, gcs, dashboard, client
    ray_temp_dir: Path
    num_cpus: int

    @property
    def s3_endpoint(self) -> str:
        return f"http://127.0.0.1:{self.ports['s3']}"

    @property
    def mlflow_uri(self) -> str:
        return f"http://127.0.0.1:{self.ports['mlflow']}"

    @property
    def ray_address(self) -> str:
        """HOST:PORT for `ray.init`."""
        return f"127.0.0.1:{self.ports['gcs']}"

    @property
    def dashboard_url(self) -> str:
        """Ray's dashboard and its Jobs API."""
        return f"http://127.0.0.1:{self.ports['dashboard']}"

    @property
    def token_path(self) -> Path:
        return self.state_dir / "ray-token"

    @property
    def snapshot_path(self) -> Path:
        return self.state_dir / "s3-snapshot.tar"

    def log_path(self, component: str) -> Path:
        return self.state_dir / "logs" / f"{component}.log"

    def environment(self) -> dict[str, str]:
        """The variables with which boto3, PyArrow, MLflow and Ray find this stack and nothing else.

        Ray reads its own when it is imported, so they must be set before that.
        """
        nowhere = os.devnull
        return {
            "AWS_ENDPOINT_URL": self.s3_endpoint,
            "AWS_ACCESS_KEY_ID": "ddpm-local",
            "AWS_SECRET_ACCESS_KEY": "ddpm-local",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": nowhere,
            "AWS_SHARED_CREDENTIALS_FILE": nowhere,
            "AWS_EC2_METADATA_DISABLED": "true",
            "MLFLOW_TRACKING_URI": self.mlflow_uri,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
            "DO_NOT_TRACK": "true",
            "RAY_ADDRESS": self.ray_address,
            "RAY_API_SERVER_ADDRESS": self.dashboard_url,
            "DDPM_DASHBOARD": self.dashboard_url,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_path),
            "RAY_USAGE_STATS_ENABLED": "0",
            # Ray's node address becomes 127.0.0.1, so that all its ports are on loopback
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            # how often Ray Train looks at its workers: at its default of 2 s each report costs 2 s
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
            "NO_PROXY": _never_proxied(),
            "no_proxy": _never_proxied(),
        }

    def activate(self, environ: MutableMapping[str, str] = os.environ) -> None:
        """Make `environ` lead to this stack: foreign addresses and credentials go, `environment()` comes."""
        for name in foreign(environ):
            del environ[name]
        environ.update(self.environment())

    def server_environment(self, inherited: Mapping[str, str], **marks: str) -> dict[str, str]:
        """The environment of the stack's servers, which Ray's workers and jobs inherit."""
        found = {name: value for name, value in inherited.items() if name not in foreign(inherited)}
        found.update(self.environment())
        # the head is the cluster and must not look for one; Ray tells its jobs and workers by itself
        del found["RAY_ADDRESS"], found["RAY_API_SERVER_ADDRESS"]
        # so that `python` in a job's command is this one
        binaries = str(Path(sys.executable).parent)
        found["PATH"] = os.pathsep.join((binaries, inherited.get("PATH", os.defpath)))
        found.update(marks)
        return found


def foreign(environ: Mapping[str, str]) -> list[str]:
    """Names of the variables that must not reach the stack or its users."""
    return [name for name in environ if name in _FOREIGN_NAMES or name.startswith(_FOREIGN_PREFIXES)]


def _never_proxied() -> str:
    """The user's own exceptions from a proxy, and loopback."""
    own = os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or ""
    hosts = [host.strip() for host in own.split(",") if host.strip()]
    return ",".join([*hosts, *(host for host in _NEVER_PROXIED if host not in hosts)])
