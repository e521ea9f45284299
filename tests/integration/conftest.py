"""The real servers, once a session: Ray, S3 and MLflow as `ddpm up` starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from infra.local import Stack, down, up


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A running local stack; the environment of this process leads to it until the session ends."""
    state_dir = tmp_path_factory.mktemp("stack")
    before = dict(os.environ)
    try:
        started = up(state_dir)
        started.activate()
        yield started
    finally:
        down(state_dir)
        os.environ.clear()
        os.environ.update(before)
