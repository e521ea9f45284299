"""For all tests: one thread a process, since they share few cores with the servers that they start."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from tests.support.s3 import SERVERS, S3Server, running, use_server

# the processes that tests start inherit it
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# CI tries the same examples every time; elsewhere each run tries new ones
settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with running("moto", tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture(scope="session")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with running("ceph", tmp_path_factory.mktemp("ceph")) as server:
        yield server


@pytest.fixture(params=SERVERS)
def s3_server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """Each of the S3 servers in turn; the environment leads to it."""
    server: S3Server = request.getfixturevalue(request.param)
    use_server(monkeypatch, server)
    return server
