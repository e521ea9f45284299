"""Objects at an http address: read whole or named, never written, and no other server is led to."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import pickle
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pipelines import retries
from pipelines.adapters import https
from pipelines.dataset import DataError, Dataset
from pipelines.reader import StreamBatches
from pipelines.retries import Budget, Pace
from pipelines.storage import ObjectMissing, Storage, StorageError, open_storage
from pipelines.stored_order import read_split
from tests.support.data import dataset_of, hashed
from tests.support.fault_proxy import FaultProxy, Faults
from tests.support.s3 import HostileS3, free_port

BODY = bytes(range(256)) * 20


@pytest.fixture(autouse=True)
def no_waiting_and_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.retries.time.sleep", lambda s: None)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def web() -> Iterator[tuple[HostileS3, Storage]]:
    server = HostileS3(ranges=True)
    with server.running() as address:
        server.objects["/data/set/x"] = BODY
        yield server, open_storage(f"{address}/data/set/")


def one_line(attempt: Callable[[], object], kind: type[Exception] = StorageError) -> str:
    with pytest.raises(kind) as caught:
        attempt()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_reading(web: tuple[HostileS3, Storage]) -> None:
    server, storage = web
    server.objects["/data/set/a%20b/%C3%A9%3Fq%23%25"] = b"odd"
    assert storage.get("x") == BODY
    assert storage.get("a b/é?q#%") == b"odd"
    assert storage.child("a b").get("é?q#%") == b"odd"
    assert open_storage(storage.child("a b").uri).get("é?q#%") == b"odd"
    assert storage.get_range("x", 5, 7) == BODY[5:12]
    assert storage.get_range("x", 0, len(BODY)) == BODY
    assert storage.get_range("x", 3, 0) == b""
    assert storage.exists("x")
    assert not storage.exists("y")
    again = pickle.loads(pickle.dumps(storage))  # noqa: S301  what Ray does with arguments
    assert again.uri == storage.uri
    assert again.get("x") == BODY
    for attempt in (lambda: storage.get("y"), lambda: storage.get_range("y", 0, 1)):
        assert one_line(attempt, ObjectMissing) == f"{storage.uri}/y"


def test_many_reads_share_their_connections(web: tuple[HostileS3, Storage]) -> None:
    server, storage = web
    for _ in range(20):
        storage.get("x")
    assert len(server.requests) == 20
    assert len(server.connections) == 1


@pytest.mark.parametrize(("start", "length", "there"), [(5118, 3, 2), (5120, 1, 0), (9999, 2, 0)])
def test_a_range_past_the_end(web: tuple[HostileS3, Storage], start: int, length: int, there: int) -> None:
    server, storage = web
    message = one_line(lambda: storage.get_range("x", start, length))
    assert message == f"{storage.uri}/x: {there} of {length} bytes at {start}: the object is too short"
    assert len(server.requests) == 1


def test_a_server_without_ranges_is_named(web: tuple[HostileS3, Storage]) -> None:
    server, storage = web
    server.ranges = False
    assert "gives no parts of objects" in one_line(lambda: storage.get_range("x", 0, 4))
    assert len(server.requests) == 1


def test_nothing_is_written_listed_or_deleted(web: tuple[HostileS3, Storage]) -> None:
    server, storage = web
    for attempt in (
        lambda: storage.put("y", b""),
        lambda: storage.put_if_absent("y", b""),
        lambda: storage.delete(["x"]),
    ):
        assert "can only be read; write to s3://BUCKET/PREFIX or a folder" in one_line(attempt)
    assert "can't be listed" in one_line(lambda: storage.list("a/"))
    assert server.requests == []


@pytest.mark.parametrize("trouble", ["503", "500", "drop", "short"])
def test_trouble_that_passes(web: tuple[HostileS3, Storage], trouble: str) -> None:
    server, storage = web
    server.script = lambda method, path, number: trouble if number <= 3 else ""
    assert storage.get("x") == BODY
    server.requests.clear()
    memory = bytearray(len(BODY))
    assert storage.get_hashed("x", lambda num_bytes: memoryview(memory)[:num_bytes]) == hashed(BODY)
    assert memory == BODY
    assert len(server.requests) == 4
    server.requests.clear()
    assert storage.get_range("x", 100, 2000) == BODY[100:2100]
    assert len(server.requests) == 4


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("503", "the server answered 503"),
        ("drop", "127.0.0.1 does not answer as it should"),
        ("short", "(2560 bytes read, 2560 more expected)"),
    ],
)
def test_trouble_that_stays_is_named(web: tuple[HostileS3, Storage], trouble: str, reason: str) -> None:
    server, storage = web
    server.script = lambda method, path, number: trouble
    message = one_line(lambda: storage.get("x"))
    assert message.startswith(f"{storage.uri}/x: ")
    assert reason in message
    assert f"(tried {Budget().tries} times in " in message
    assert len(server.requests) == Budget().tries


def test_what_is_refused_is_not_asked_again(web: tuple[HostileS3, Storage]) -> None:
    server, storage = web
    server.script = lambda method, path, number: "403"
    assert "the server answered 403 Forbidden: it is not public, or not there" in one_line(
        lambda: storage.exists("x")
    )
    assert len(server.requests) == 1


def test_nobody_there() -> None:
    storage = open_storage(f"http://127.0.0.1:{free_port()}/x")
    message = one_line(lambda: storage.get("y"))
    assert message.startswith(f"{storage.uri}/y: 127.0.0.1 does not answer as it should: ")


@pytest.mark.parametrize(
    ("answer", "ranged"),
    [
        ("200 OK\r\nContent-Length: {}", False),
        ("206 OK\r\nContent-Length: 3\r\nContent-Range: bytes 0-2/{}", True),
        ("416 No\r\nContent-Length: 0\r\nContent-Range: bytes */{}", True),
    ],
)
def test_a_size_of_thousands_of_digits_costs_a_line(answer: str, ranged: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    asked, _ = server.accept()
                    asked.recv(65536)
                    asked.sendall(
                        f"HTTP/1.1 {answer.format('9' * 5000)}\r\nConnection: close\r\n\r\nabc".encode()
                    )
                    asked.close()

        threading.Thread(target=serve, daemon=True).start()
        storage = open_storage(f"http://127.0.0.1:{server.getsockname()[1]}")
        line = one_line(lambda: storage.get_range("x", 0, 3) if ranged else storage.get("x"))
        server.shutdown(socket.SHUT_RDWR)
    assert line.startswith(f"{storage.uri}/x: ")
    assert "the server says that it has 99999999999999999999… bytes" in line


def test_a_body_that_stalls(web: tuple[HostileS3, Storage], monkeypatch: pytest.MonkeyPatch) -> None:
    _, storage = web
    monkeypatch.setattr(https, "READ_TIMEOUT_S", 0.2)
    https._pool.cache_clear()
    first = iter([True])
    faults = Faults(stall=1.0, applies=lambda method, path: next(first, False))
    with FaultProxy(storage.uri, faults).running() as proxy:
        assert open_storage(f"{proxy.address}/data/set").get("x") == BODY
        assert proxy.counts["stall"] == 1
    https._pool.cache_clear()


def test_a_body_that_trickles(web: tuple[HostileS3, Storage], monkeypatch: pytest.MonkeyPatch) -> None:
    _, storage = web
    monkeypatch.setattr(retries, "PACE", Pace(num_bytes=1000, window_s=0.3))
    first = iter([True])
    faults = Faults(trickle=1.0, applies=lambda method, path: next(first, False))
    with FaultProxy(storage.uri, faults).running() as proxy:
        there = open_storage(f"{proxy.address}/data/set")
        assert there.get("x") == BODY
        proxy.faults = Faults(trickle=1.0)
        monkeypatch.setattr(retries, "BUDGET", Budget(tries=2))
        message = one_line(lambda: there.get("x"))
        assert message.startswith(f"{there.uri}/x: could not be read whole: it comes too slowly, ")
        assert proxy.counts["trickle"] == 3


def test_a_compressed_answer_is_not_taken_for_the_object(web: tuple[HostileS3, Storage]) -> None:
    server, storage = web
    server.headers["Content-Encoding"] = "gzip"
    assert "sends it as 'gzip', which was not asked for" in one_line(lambda: storage.get("x"))


@pytest.mark.parametrize("status", ["301", "302", "307", "308"])
def test_a_redirect_to_another_server_is_refused(web: tuple[HostileS3, Storage], status: str) -> None:
    server, storage = web
    server.script = lambda method, path, number: status
    other = HostileS3()
    other.objects["/data/set/x"] = b"theirs"
    with other.running() as address:
        server.elsewhere = address.replace("://", "://user:secret@")
        for attempt in (
            lambda: storage.get("x"),
            lambda: storage.get_range("x", 0, 1),
            lambda: storage.exists("x"),
        ):
            message = one_line(attempt)
            assert message.startswith(f"{storage.uri}/x: is redirected to {address}, and no other server")
            assert "secret" not in message
    assert other.requests == []
    assert len(server.requests) == 3


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_redirect_to_another_scheme_of_the_same_host_and_port_is_refused(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls = None
    if scheme == "https":
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(_certificate(tmp_path / "pem"))
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "pem"))
    https._pool.cache_clear()
    server = HostileS3(lambda method, path, number: "302")
    with server.running(tls) as address:
        here, _, place = address.partition("://")
        assert here == scheme
        server.elsewhere = f"{'http' if tls else 'https'}://{place}"
        message = one_line(lambda: open_storage(address).get("x"))
        assert message.startswith(f"{address}/x: is redirected to {server.elsewhere}, and no other server")
    assert len(server.requests) == 1
    https._pool.cache_clear()


def test_a_redirect_to_what_is_no_address_is_refused(web: tuple[HostileS3, Storage]) -> None:
    server, storage = web
    server.script = lambda method, path, number: "302"
    server.elsewhere = "http://user:secret@[x/\x1b"
    line = one_line(lambda: storage.get("x"))
    assert line == f"{storage.uri}/x: is redirected to http://[x/\\x1b/data/set/x, which is no address"
    server.elsewhere = "http://x\x1b31m"
    assert "is redirected to http://x\\x1b31m, " in one_line(lambda: storage.get("x"))


def test_a_proxy_that_is_no_address_costs_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://user:secret@[x")
    line = one_line(lambda: open_storage("http://set.example/a").get("x"))
    assert line == "http://set.example/a/x: the proxy of the environment: Invalid IPv6 URL"


def test_a_redirect_within_the_server_is_followed(web: tuple[HostileS3, Storage]) -> None:
    server, storage = web
    server.script = lambda method, path, number: "" if path.startswith("/moved") else "302"
    server.elsewhere = "/moved"
    server.objects["/moved/data/set/x"] = b"moved"
    assert storage.get("x") == b"moved"
    server.script = lambda method, path, number: "302"
    assert "is redirected more than 3 times" in one_line(lambda: storage.get("x"))


def test_a_certificate_that_nobody_signed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(_certificate(tmp_path / "pem"))
    server = HostileS3()
    server.objects["/x"] = BODY
    with server.running(tls) as address:
        https._pool.cache_clear()
        message = one_line(lambda: open_storage(address).get("x"))
        assert message.startswith(f"{address}/x: ")
        assert "CERTIFICATE_VERIFY_FAILED" in message
        assert "tried" not in message
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "pem"))
        https._pool.cache_clear()
        assert open_storage(address).get("x") == BODY
    https._pool.cache_clear()


def _certificate(path: Path) -> Path:
    """A key and its self-signed certificate for 127.0.0.1, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(address, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.write_bytes(secret + certificate.public_bytes(serialization.Encoding.PEM))
    return path


def test_a_data_set_on_the_web(tmp_path: Path) -> None:
    here, _ = dataset_of(tmp_path / "set", [20, 0, 13])
    server = HostileS3()
    for path in (tmp_path / "set").rglob("*.*"):
        server.objects[f"/sets/one/{path.relative_to(tmp_path / 'set').as_posix()}"] = path.read_bytes()
    with server.running() as address:
        there = Dataset.load(f"{address}/sets/one")
        assert there == here
        batches = []
        for dataset in (there, here):
            with StreamBatches(
                dataset, "train", seed=3, num_streams=2, streams=[0, 1], micro_batch_size=4
            ) as stream:
                batches.append([next(stream) for _ in range(5)])
        for one, two in zip(*batches, strict=True):
            assert all(torch.equal(a.x_start, b.x_start) for a, b in zip(one, two, strict=True))
        assert len(list(read_split(there, "test"))) == 3
        tar = f"/sets/one/{there.splits['train'][0].key}"
        server.objects[tar] = server.objects[tar][:-1] + b"?"
        assert f"{address}{tar}: is damaged" in one_line(lambda: list(read_split(there, "train")), DataError)
        del server.objects[tar]
        assert f"{address}{tar}: is missing" in one_line(lambda: list(read_split(there, "train")), DataError)
        assert "there is no finished data set" in one_line(lambda: Dataset.load(f"{address}/no"), DataError)


def test_proxies_of_the_environment_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    server = HostileS3()
    with server.running() as address:
        monkeypatch.setenv("http_proxy", address.replace("://", "://user:secret@"))
        monkeypatch.setenv("no_proxy", "")
        server.objects["http://data.example/x"] = BODY
        assert open_storage("http://data.example").get("x") == BODY
        server.script = lambda method, path, number: "drop"
        assert "secret" not in one_line(lambda: open_storage("http://data.example").get("x"))
