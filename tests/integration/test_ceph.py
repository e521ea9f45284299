"""What only a real S3 server has, Ceph's gateway: it knows its users, and what they may do."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from botocore import UNSIGNED

from pipelines import retries
from pipelines.adapters import s3
from pipelines.dataset import Dataset
from pipelines.retries import Budget
from pipelines.storage import ObjectMissing, Storage, StorageError, open_storage
from pipelines.stored_order import read_split
from tests.support.ceph import Ceph, ceph_server
from tests.support.data import dataset_of
from tests.support.s3 import BUCKET, S3Server, client, use_server

pytestmark = pytest.mark.s3


@pytest.fixture
def storage(
    ceph: S3Server, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Storage]:
    use_server(monkeypatch, ceph)
    yield open_storage(f"s3://{BUCKET}/{request.node.name}")
    # one that was made with a test's own credentials
    s3._server.cache_clear()


def everything(storage: Storage) -> list[Callable[[], object]]:
    return [
        lambda: storage.get("x"),
        lambda: storage.get_range("x", 0, 1),
        lambda: storage.put("x", b""),
        lambda: storage.put_if_absent("x", b""),
        lambda: storage.list(),
        lambda: storage.exists("x"),
        lambda: storage.delete(["x"]),
    ]


def one_line(attempt: Callable[[], object]) -> str:
    with pytest.raises(StorageError) as caught:
        attempt()
    assert not isinstance(caught.value, ObjectMissing)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("variable", "code"),
    [("AWS_ACCESS_KEY_ID", "InvalidAccessKeyId"), ("AWS_SECRET_ACCESS_KEY", "SignatureDoesNotMatch")],
)
def test_wrong_credentials(
    ceph: S3Server, storage: Storage, variable: str, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "wrong-and-secret")
    s3._server.cache_clear()
    for attempt in everything(storage):
        message = one_line(attempt)
        assert message.startswith(storage.uri)
        if "denied access (403)" not in message:  # HEAD has no body that could say why
            assert f"{ceph.endpoint} refused the credentials ({code}); check AWS_ACCESS_KEY_ID" in message
        assert "tried" not in message
        assert "wrong-and-secret" not in message
        assert ceph.secret_key not in message


def test_a_bucket_of_another_user(storage: Storage, other_user: Callable[[], None]) -> None:
    storage.put("x", b"mine")
    other_user()
    for attempt in everything(storage):
        message = one_line(attempt)
        assert message.startswith(storage.uri) or message.startswith(f"s3://{BUCKET}/")
        assert "denied" in message.lower()


@pytest.fixture
def other_user(ceph: S3Server, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on we are a user who owns nothing: nobody, who needs no making."""

    def become() -> None:
        events = s3._server(os.getpid(), ceph.endpoint).client.meta.events
        events.register("choose-signer.s3", lambda **_: UNSIGNED)

    return become


def test_a_public_data_set_is_read_over_http(ceph: S3Server, storage: Storage) -> None:
    made, _ = dataset_of(storage.uri, [7, 5])
    for info in storage.list():
        key = f"{storage.uri.partition(BUCKET)[2].strip('/')}/{info.key}"
        client().put_object_acl(Bucket=BUCKET, Key=key, ACL="public-read")
    public = Dataset.load(f"{ceph.endpoint}/{BUCKET}{storage.uri.partition(BUCKET)[2]}")
    assert public == made
    assert [sample[0] for sample in read_split(public, "train")] == [
        sample[0] for sample in read_split(made, "train")
    ]
    first = made.splits["train"][0].key
    assert public.storage.get_range(first, 100, 50) == made.storage.get_range(first, 100, 50)
    storage.put("secret", b"")
    assert "it is not public, or not there" in one_line(lambda: public.storage.get("secret"))


@pytest.fixture
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ceph]:
    """A server that a test may do things to."""
    with ceph_server(tmp_path_factory.mktemp("own")) as server:
        yield server


def test_a_gateway_that_stops_and_goes_on(own: Ceph, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_server(monkeypatch, S3Server(own.endpoint, own.access_key, own.secret_key))
    monkeypatch.setattr(s3, "READ_TIMEOUT_S", 0.5)
    client().create_bucket(Bucket=BUCKET)
    storage = open_storage(f"s3://{BUCKET}/x")
    storage.put("x", b"1")
    gateway = own.daemons["rgw"]
    # stopped, it accepts connections and says nothing
    gateway.send_signal(signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(retries, "BUDGET", Budget(seconds=1.5))
        message = one_line(lambda: storage.get("x"))
    assert message.startswith(f"{storage.uri}/x: the S3 server at {own.endpoint}")
    assert "Read timeout" in message
    gateway.send_signal(signal.SIGCONT)
    assert storage.get("x") == b"1"
    # killed, it refuses them; begun again, it holds what it held
    gateway.kill()
    gateway.wait()
    with monkeypatch.context() as patch:
        patch.setattr(retries, "BUDGET", Budget(seconds=1.0))
        assert f"{own.endpoint} does not answer; check AWS_ENDPOINT_URL" in one_line(lambda: storage.get("x"))
    own.start("rgw", "radosgw", "-n", "client.rgw.a")
    monkeypatch.setattr(retries, "BUDGET", Budget(tries=1000, longest_pause_s=0.5))
    assert storage.get("x") == b"1"
    assert storage.put_if_absent("x", b"2") is False


def test_without_ceph_the_server_fails_and_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AssertionError, match="apt-get install --no-install-recommends radosgw ceph-mon"):
        ceph_server(tmp_path).__enter__()
