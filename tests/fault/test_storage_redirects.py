"""An S3 server that leads elsewhere: nobody else hears from us, least of all our credentials."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pipelines.storage import ObjectMissing, Storage, StorageError, open_storage
from tests.support.s3 import HostileS3, use_endpoint


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


def test_a_refusal_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    server = HostileS3(lambda method, path, number: "403")
    with server.running() as address:
        use_endpoint(monkeypatch, address)
        for attempt in everything(open_storage("s3://bucket/p")):
            with pytest.raises(StorageError, match=r"denied access \((AccessDenied|403)\)"):
                attempt()
    assert len(server.requests) == 6
