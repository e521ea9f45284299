"""A running local stack as its users see it: where everything is, and the environment that leads there."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping, MutableMapping
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
# One of these set means that somebody has decided where S3, MLflow or Ray is, and as whom to ask.
_DECIDING = {
    "s3": (
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_PROFILE",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
    ),
    "mlflow": ("MLFLOW_TRACKING_URI",),
    "ray": (
        "RAY_ADDRESS",
        "RAY_API_SERVER_ADDRESS",
        "DDPM_DASHBOARD",
        "RAY_AUTH_MODE",
        "RAY_AUTH_TOKEN",
        "RAY_AUTH_TOKEN_PATH",
    ),
}
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
        return {**self._s3(), **self._mlflow(), **self._ray(), **_common()}

    def _s3(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.s3_endpoint,
            "AWS_ACCESS_KEY_ID": "ddpm-local",
            "AWS_SECRET_ACCESS_KEY": "ddpm-local",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def _mlflow(self) -> dict[str, str]:
        return {
            "MLFLOW_TRACKING_URI": self.mlflow_uri,
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        }

    def _ray(self) -> dict[str, str]:
        return {
            "RAY_ADDRESS": self.ray_address,
            "RAY_API_SERVER_ADDRESS": self.dashboard_url,
            "DDPM_DASHBOARD": self.dashboard_url,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_path),
            # Ray's node address becomes 127.0.0.1, so that all its ports are on loopback; a driver that does not
            # know looks for the head at this machine's outer address, in vain and for minutes
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        }

    def activate(self, environ: MutableMapping[str, str] = os.environ) -> None:
        """Make `environ` lead to this stack: foreign addresses and credentials go, `environment()` comes."""
        for name in foreign(environ):
            del environ[name]
        environ.update(self.environment())

    def complement(
        self, environ: MutableMapping[str, str] = os.environ, *, skip: Collection[str] = ()
    ) -> None:
        """Take from this stack what `environ` does not say: of "s3", "mlflow" and "ray" each as a whole, or not.

        Not, if one of the variables is set that say where it is and who asks, or if it is in `skip`.
        """
        for name, offered in (("s3", self._s3()), ("mlflow", self._mlflow()), ("ray", self._ray())):
            if name not in skip and not any(decided in environ for decided in _DECIDING[name]):
                environ.update(offered)
        for name, value in _common().items():
            environ.setdefault(name, value)
        environ.update(_never_proxied())

    def server_environment(self, inherited: Mapping[str, str], **marks: str) -> dict[str, str]:
        """The environment of the stack's servers, which Ray's workers and jobs inherit."""
        found = {name: value for name, value in inherited.items() if name not in foreign(inherited)}
        found.update(self.environment())
        # the head is the cluster and must not look for one; its API server's address stays, without which Ray
        # Train's cleaner of placement groups gives up on a machine with several clusters, and a sweep stalls
        del found["RAY_ADDRESS"]
        # so that `python` in a job's command is this one
        binaries = str(Path(sys.executable).parent)
        found["PATH"] = os.pathsep.join((binaries, inherited.get("PATH", os.defpath)))
        found.update(marks)
        return found


def _common() -> dict[str, str]:
    return {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "RAY_USAGE_STATS_ENABLED": "0",
        # how often Ray Train looks at its workers: at its default of 2 s each report costs 2 s
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        **_never_proxied(),
    }


def foreign(environ: Mapping[str, str]) -> list[str]:
    """Names of the variables that must not reach the stack or its users."""
    return [name for name in environ if name in _FOREIGN_NAMES or name.startswith(_FOREIGN_PREFIXES)]


def _never_proxied() -> dict[str, str]:
    """The user's own exceptions from a proxy, and loopback."""
    own = os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or ""
    hosts = [host.strip() for host in own.split(",") if host.strip()]
    every = ",".join([*hosts, *(host for host in _NEVER_PROXIED if host not in hosts)])
    return {"NO_PROXY": every, "no_proxy": every}
