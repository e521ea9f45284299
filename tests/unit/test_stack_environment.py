"""Nothing of a user's real credentials reaches the stack, nor anybody who works with it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from infra.local import Stack

PORTS = {"s3": 9100, "mlflow": 5100, "gcs": 6400, "dashboard": 8300, "client": 10100}

REAL = {
    "AWS_PROFILE": "production",
    "AWS_SESSION_TOKEN": "hunter2",
    "AWS_SECRET_ACCESS_KEY": "hunter2",
    "AWS_ENDPOINT_URL_S3": "https://hunter2.example",
    "AWS_WEB_IDENTITY_TOKEN_FILE": "/hunter2",
    "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true",
    "GOOGLE_APPLICATION_CREDENTIALS": "/hunter2",
    "AZURE_CLIENT_SECRET": "hunter2",
    "MLFLOW_TRACKING_TOKEN": "hunter2",
    "RAY_ADDRESS": "hunter2.example:6379",
    "RAY_AUTH_TOKEN": "hunter2",
    "RAY_NAMESPACE": "hunter2",
}


@pytest.fixture
def stack(tmp_path):
    return Stack(tmp_path, "id", PORTS, Path("/tmp/x"), 3)


def test_servers_inherit_no_real_credentials(stack):
    inherited = {**REAL, "PATH": "/usr/bin", "HOME": "/home/me", "LANG": "C.UTF-8"}
    found = stack.server_environment(inherited)
    assert not [name for name, value in found.items() if "hunter2" in value or value == "production"]
    assert found["HOME"] == "/home/me"
    assert found["AWS_ACCESS_KEY_ID"] == "ddpm-local"


def test_the_head_looks_for_no_cluster(stack):
    found = stack.server_environment(REAL)
    assert "RAY_ADDRESS" not in found
    # but what runs in it finds its own API server where there are several
    assert found["RAY_API_SERVER_ADDRESS"] == stack.dashboard_url


def test_a_jobs_python_is_this_one(stack):
    first = stack.server_environment({"PATH": "/usr/bin"})["PATH"].split(os.pathsep)[0]
    assert first == str(Path(sys.executable).parent)


def test_activating_replaces_what_leads_elsewhere(stack):
    environ = {**REAL, "KEPT": "yes"}
    stack.activate(environ)
    assert environ == {**stack.environment(), "KEPT": "yes"}


def test_the_environment_leads_to_the_stacks_ports(stack):
    found = stack.environment()
    assert found["AWS_ENDPOINT_URL"] == "http://127.0.0.1:9100"
    assert found["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5100"
    assert found["RAY_ADDRESS"] == "127.0.0.1:6400"
    assert found["DDPM_DASHBOARD"] == "http://127.0.0.1:8300"
    assert found["RAY_AUTH_MODE"] == "token"
    assert found["RAY_USAGE_STATS_ENABLED"] == "0"


def test_loopback_is_not_proxied_and_own_exceptions_stay(stack, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "intranet.example, localhost")
    assert stack.environment()["NO_PROXY"] == "intranet.example,localhost,127.0.0.1"


def test_an_empty_environment_is_complemented_with_everything(stack):
    environ: dict[str, str] = {}
    stack.complement(environ)
    assert environ == stack.environment()


@pytest.mark.parametrize(
    ("decided", "untouched"),
    [
        ("AWS_PROFILE", ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_CONFIG_FILE")),
        ("MLFLOW_TRACKING_URI", ("MLFLOW_HTTP_REQUEST_TIMEOUT",)),
        ("RAY_ADDRESS", ("DDPM_DASHBOARD", "RAY_AUTH_TOKEN_PATH", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")),
        ("RAY_API_SERVER_ADDRESS", ("DDPM_DASHBOARD", "RAY_ADDRESS", "RAY_AUTH_MODE")),
    ],
)
def test_what_somebody_decided_is_not_mixed_with_the_stacks(stack, decided, untouched):
    environ = {decided: "mine"}
    stack.complement(environ)
    assert environ[decided] == "mine"
    assert not [name for name in untouched if name in environ]
    assert len(environ) > 5  # the rest is there


def test_a_cluster_named_otherwise_takes_nothing_of_ray(stack):
    environ: dict[str, str] = {}
    stack.complement(environ, skip=("ray",))
    assert not [name for name in environ if name.startswith("RAY_A") or name == "DDPM_DASHBOARD"]
    assert environ["AWS_ENDPOINT_URL"] == stack.s3_endpoint
