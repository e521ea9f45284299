"""`ddpm doctor` looks at the S3 server as at the others, and at GPUs."""

from __future__ import annotations

import socket

import pytest

from jobs import doctor
from pipelines.errors import UserError
from tests.support.s3 import free_port

NAMES = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", NAMES)
def test_a_server_that_does_not_answer_is_named_without_its_password(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    monkeypatch.setenv(name, f"http://me:secret@127.0.0.1:{port}")
    with pytest.raises(UserError) as caught:
        doctor._s3()
    told = str(caught.value)
    assert told.startswith(f"{name}=")
    assert f"127.0.0.1:{port}" in told
    assert "secret" not in told
    assert "\n" not in told


def test_a_server_that_answers_is_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        assert doctor._s3() == endpoint


def test_without_an_endpoint_it_is_awss_own() -> None:
    assert "AWS_ENDPOINT_URL is not set" in doctor._s3()


@pytest.mark.parametrize("endpoint", ["http://x:port", "nonsense"])
def test_what_is_no_address_is_named(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(UserError, match=r"^AWS_ENDPOINT_URL="):
        doctor._s3()


def test_gpus_are_counted_by_name_and_one_that_cannot_be_used_costs_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda number: ("A100", "H100", "A100")[number])
    assert doctor._torch().endswith(", 2 × A100, 1 × H100")

    def broken(number: int) -> str:
        raise RuntimeError("CUDA unknown error\nand more")

    monkeypatch.setattr("torch.cuda.get_device_name", broken)
    with pytest.raises(UserError, match=r": its GPU can't be used \(CUDA unknown error and more\)$"):
        doctor._torch()
