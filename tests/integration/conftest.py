"""The real servers, once a session: Ray, S3 and MLflow as `ddpm up` starts them."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator

import pytest

from infra.local import Stack, down, ports, process, up


def read_rays_settings_again() -> None:
    """Ray read the environment when a test module imported it, before there was a stack."""
    if "ray" in sys.modules:
        vars(importlib.import_module("ray._private.ray_constants"))["ENABLE_RAY_CLUSTER"] = False
        raylet = importlib.import_module("ray._raylet")
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A running local stack; the environment of this process leads to it until the session ends.

    Its ports are not the usual ones, which another stack on this machine may be about to take.  At the end none of
    its processes is left.
    """
    state_dir = tmp_path_factory.mktemp("stack")
    before = dict(os.environ)
    usual = dict(ports.USUAL_PORTS)
    try:
        for name in usual:
            ports.USUAL_PORTS[name] = ports.choose_any(ports.USUAL_PORTS.values())
        started = up(state_dir)
        started.activate()
        read_rays_settings_again()
        yield started
    finally:
        os.environ.clear()
        os.environ.update(before)
        ports.USUAL_PORTS.update(usual)
        down(state_dir)
    assert process.family(started.stack_id) == []
