"""An S3 server that leads elsewhere: nobody else hears from us, least of all our credentials."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines.adapters import s3
from pipelines.errors import UserError
from pipelines.storage import ObjectMissing, Storage, StorageError, open_storage
from tests.support.s3 import HostileS3, use_endpoint


@pytest.fixture
def fresh_client() -> Iterator[None]:
    """Made anew for a test that leads it elsewhere by a file."""
    s3._server.cache_clear()
    yield
    s3._server.cache_clear()


def everything(storage: Storage) -> list[Callable[[], object]]:
    return [
        lambda: storage.get("x"),
        lambda: storage.get_range("x", 0, 1),
        lambda: storage.put("x", b"1"),
        lambda: storage.put_if_absent("x", b"1"),
        lambda: storage.exists("x"),
        lambda: storage.list(),
    ]


@pytest.mark.parametrize("status", ["301", "302", "307", "308"])
@pytest.mark.parametrize("region", ["", "eu-west-1", "evil.example/"])
def test_a_redirect_to_another_host_is_refused(
    status: str, region: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = HostileS3()
    other.objects["/bucket/p/x"] = b"theirs"
    server = HostileS3(lambda method, path, number: status)
    if region:
        # by which boto3 looks for another endpoint by itself
        server.headers["x-amz-bucket-region"] = region
    with other.running() as elsewhere, server.running() as address:
        server.elsewhere = elsewhere
        use_endpoint(monkeypatch, address)
        for attempt in everything(open_storage("s3://bucket/p")):
            with pytest.raises(StorageError) as caught:
                attempt()
            message = str(caught.value)
            assert not isinstance(caught.value, ObjectMissing)
            assert "\n" not in message
            assert message.startswith("s3://bucket/p")
            assert elsewhere.partition("://")[2] in message
    assert other.requests == []
    assert server.requests != []


@pytest.mark.parametrize("special", [False, True])
def test_a_profiles_endpoint_is_one_like_any_other(
    special: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh_client: None
) -> None:
    other, server = HostileS3(), HostileS3(lambda method, path, number: "301")
    server.headers["x-amz-bucket-region"] = "eu-west-1"
    with other.running() as elsewhere, server.running() as address:
        server.elsewhere = elsewhere
        use_endpoint(monkeypatch, address)
        monkeypatch.delenv("AWS_ENDPOINT_URL")
        named = (
            f"services = mine\n[services mine]\ns3 =\n  endpoint_url = {address}"
            if special
            else f"endpoint_url = {address}"
        )
        (tmp_path / "config").write_text(f"[default]\n{named}\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        for attempt in everything(open_storage("s3://bucket/p")):
            with pytest.raises(StorageError) as caught:
                attempt()
            assert f": the S3 server at {address} redirects to {elsewhere.partition('://')[2]}" in str(
                caught.value
            )
    assert other.requests == []
    # where its buckets are no hosts below it, and each once
    assert s3._server(os.getpid(), None).client.meta.config.s3["addressing_style"] == "path"
    assert [request.split()[1].startswith("/bucket") for request in server.requests] == [True] * 6


def test_a_profiles_endpoint_that_is_none_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh_client: None
) -> None:
    use_endpoint(monkeypatch, "")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    (tmp_path / "config").write_text("[default]\nendpoint_url = ftp://x\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    with pytest.raises(UserError, match=r"^endpoint_url of the profile: 'ftp://x' is no http"):
        open_storage("s3://bucket/p").get("x")


@pytest.mark.parametrize("ignored", [False, True])
def test_without_an_endpoint_it_is_amazons(
    ignored: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh_client: None
) -> None:
    """Whose redirects lead to a bucket's region, and whose buckets are hosts."""
    use_endpoint(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    if ignored:
        (tmp_path / "config").write_text("[default]\nendpoint_url = http://127.0.0.1:9\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        monkeypatch.setenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "true")
    client, name = s3._server(os.getpid(), None)
    assert name == "AWS S3"
    assert client.meta.endpoint_url.endswith("amazonaws.com")
    assert client.meta.config.s3["addressing_style"] == "auto"


def test_a_refusal_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    server = HostileS3(lambda method, path, number: "403")
    with server.running() as address:
        use_endpoint(monkeypatch, address)
        for attempt in everything(open_storage("s3://bucket/p")):
            with pytest.raises(StorageError, match=r"denied access \((AccessDenied|403)\)"):
                attempt()
    assert len(server.requests) == 6
