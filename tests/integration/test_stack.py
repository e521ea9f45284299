"""The whole stack: one for the session, and one more beside it that is killed, stopped and looked for."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time

import psutil
import pytest

from infra.local import Stack, down, find, problems, process, snapshot, up
from infra.local.loopback import RequestFailed, request
from jobs import submission


def pid_of(stack: Stack, component: str) -> int:
    return int(
        json.loads((stack.state_dir / "stack.json").read_text())["records"][component]["process"]["pid"]
    )


def api(stack: Stack, path: str, token: str | None = None) -> bytes:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with request("GET", stack.dashboard_url + path, headers=headers) as response:
        return response.read()


def test_up_again_changes_nothing(stack):
    pids = {name: pid_of(stack, name) for name in ("s3", "mlflow", "ray")}
    assert up(stack.state_dir) == stack
    assert {name: pid_of(stack, name) for name in pids} == pids
    assert find(stack.state_dir) == stack
    assert problems(stack.state_dir) == []


def test_buckets_are_there(stack):
    assert set(snapshot.list_buckets(stack.s3_endpoint)) >= {"ddpm", "mlflow"}


@pytest.mark.parametrize(("token", "status"), [(None, 401), ("wrong", 403)])
def test_rays_api_wants_the_token(stack, token, status):
    with pytest.raises(RequestFailed) as raised:
        api(stack, "/api/jobs/", token)
    assert raised.value.status == status


def test_the_token_is_for_this_user_alone(stack):
    assert stat.S_IMODE(stack.token_path.stat().st_mode) == 0o600
    assert stat.S_IMODE(stack.ray_temp_dir.stat().st_mode) == 0o700
    assert b"ray_version" in api(stack, "/api/version", stack.token_path.read_text())


def test_nothing_listens_beyond_loopback(stack):
    listening = [
        (member.name(), connection.laddr)
        for member in process.family(stack.stack_id)
        for connection in member.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 8
    assert [found for found in listening if found[1].ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")] == []


def test_a_driver_finds_the_cluster_and_its_workers_find_s3(stack):
    code = """
import json, os, ray
ray.init(log_to_driver=False)
names = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_PROFILE", "MLFLOW_TRACKING_URI")
seen = ray.get(ray.remote(lambda: [os.environ.get(name) for name in names]).remote())
print(json.dumps([ray.cluster_resources()["CPU"], *seen]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [
        stack.num_cpus,
        stack.s3_endpoint,
        "ddpm-local",
        None,
        stack.mlflow_uri,
    ]


def test_mlflows_artifacts_go_through_it_to_s3(stack):
    url = f"{stack.mlflow_uri}/api/2.0/mlflow-artifacts/artifacts/some/note.txt"
    with request(
        "PUT", url, body=b"hello", headers={"content-type": "application/octet-stream"}, timeout_s=60
    ):
        pass
    assert "artifacts/some/note.txt" in set(snapshot.list_keys(stack.s3_endpoint, "mlflow"))


def test_a_killed_mlflow_server_is_all_that_up_restarts(stack):
    pids = {name: pid_of(stack, name) for name in ("s3", "ray")}
    killed = pid_of(stack, "mlflow")
    psutil.Process(killed).kill()
    wait_until(lambda: find(stack.state_dir) is None)
    assert [line for line in problems(stack.state_dir) if "MLflow server" in line and "mlflow.log" in line]

    said: list[str] = []
    assert up(stack.state_dir, log=said.append) == stack
    assert any(line.startswith("MLflow server: had ended") for line in said)
    assert {name: pid_of(stack, name) for name in pids} == pids
    assert pid_of(stack, "mlflow") != killed
    assert problems(stack.state_dir) == []


def test_a_second_stack_lives_beside_and_leaves_nothing_behind(stack, tmp_path):
    """Its usual ports are taken; its Ray head is killed while a job runs, which orphans the job's processes."""
    before = dict(os.environ)
    folder = tmp_path / "second"
    try:
        second = up(folder, num_cpus=2)
        assert not set(second.ports.values()) & set(stack.ports.values())
        assert second.num_cpus == 2
        second.activate()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                submission, "entrypoint", lambda job, argv: "python -c 'import time; time.sleep(600)'"
            )
            job = submission.submit("sleep", [], "", run="long", address=second.dashboard_url, wait=False).job
        wait_until(lambda: sleepers(second))
        assert job.submission_id == "sleep-long-1"
        psutil.Process(pid_of(second, "ray")).kill()
    finally:
        os.environ.clear()
        os.environ.update(before)
        assert down(folder)
    assert process.family(second.stack_id) == []
    assert not second.ray_temp_dir.exists()
    assert not second.token_path.exists()
    assert {path.name for path in second.state_dir.iterdir()} == {
        ".gitignore",
        "lock",
        "logs",
        "mlflow.db",
        "s3-snapshot.tar",
    }
    assert problems(stack.state_dir) == []


def sleepers(stack: Stack) -> list[psutil.Process]:
    return [
        found for found in process.family(stack.stack_id) if "time.sleep(600)" in " ".join(found.cmdline())
    ]


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
