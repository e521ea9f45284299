"""Servers whose answers no server should give: each costs one line that names the object."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from pipelines.retries import Budget
from pipelines.storage import ObjectInfo, ObjectMissing, Storage, StorageError, open_storage
from tests.support.s3 import use_endpoint

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
ENDLESS = b"HTTP/1.1 200 OK\r\n\r\nhello"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.retries.time.sleep", lambda s: None)


@contextmanager
def answering(answer: Callable[[str], bytes]) -> Iterator[tuple[str, list[str]]]:
    """A server that answers the request line with these bytes and cuts the line; its address, and what it heard."""
    heard: list[str] = []

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            request = self.rfile.readline().decode().strip()
            while self.rfile.readline().strip():
                pass
            heard.append(request)
            head, _, body = answer(request).partition(b"\r\n\r\n")
            body = b"" if request.startswith("HEAD") else body
            self.wfile.write(head + b"\r\nConnection: close\r\n\r\n" + body)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        allow_reuse_address = True

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", heard
        finally:
            server.shutdown()
            thread.join()


def with_length(length: str, body: bytes = b"hello", more: str = "") -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Length: {length}{more}\r\n\r\n".encode() + body


def listing(inside: str) -> bytes:
    body = f'<?xml version="1.0"?><ListBucketResult>{inside}</ListBucketResult>'.encode()
    return with_length(str(len(body)), body)


def one_line(attempt: Callable[[], object]) -> str:
    with pytest.raises(StorageError) as caught:
        attempt()
    assert not isinstance(caught.value, ObjectMissing)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def on_s3(monkeypatch: pytest.MonkeyPatch, address: str) -> Storage:
    use_endpoint(monkeypatch, address)
    return open_storage("s3://bucket/p")


@pytest.mark.parametrize("answer", [CHUNKED, ENDLESS], ids=["chunked", "endless"])
def test_s3_without_a_length_is_refused(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(lambda request: answer) as (address, heard):
        message = one_line(lambda: on_s3(monkeypatch, address).get("x"))
        assert message.startswith("s3://bucket/p/x: the server does not say how long it is")
        assert len(heard) == 1


def test_s3_without_a_length_where_what_was_written_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = with_length("0", b"", f'\r\nETag: "{"0" * 32}"')
    with answering(lambda request: wrong if request.startswith("PUT") else CHUNKED) as (address, _):
        message = one_line(lambda: on_s3(monkeypatch, address).put("x", b"hello"))
        assert message.startswith("s3://bucket/p/x: the server does not say how long it is")


@pytest.mark.parametrize(
    "answer",
    [with_length("many"), with_length("5, 6"), with_length("5", more="\r\nLast-Modified: once")],
    ids=["length", "lengths", "time"],
)
@pytest.mark.parametrize("call", ["get", "get_hashed", "get_range", "exists"])
def test_s3_headers_that_cannot_be_read(answer: bytes, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(lambda request: answer) as (address, heard):
        storage = on_s3(monkeypatch, address)
        calls = {
            "get": lambda: storage.get("x"),
            "get_hashed": lambda: storage.get_hashed("x"),
            "get_range": lambda: storage.get_range("x", 0, 3),
            "exists": lambda: storage.exists("x"),
        }
        message = one_line(calls[call])
        assert message.startswith(f"s3://bucket/p/x: the S3 server at {address}: ")
        assert f"(tried {Budget().tries} times in " in message
        assert len(heard) == Budget().tries


@pytest.mark.parametrize(
    ("inside", "said"),
    [
        ("<IsTruncated>true</IsTruncated>", "does not say how to go on (0 objects came)"),
        (
            "<IsTruncated>true</IsTruncated><NextContinuationToken>t</NextContinuationToken>"
            "<Contents><Key>p/a</Key><Size>1</Size></Contents>",
            "does not say how to go on (2 objects came)",
        ),
        ("<Contents><Size>1</Size></Contents>", "lists what was not asked for: ''"),
        ("<Contents><Key>p/a</Key></Contents>", "lists what was not asked for: 'p/a'"),
        ("<Contents><Key>p/a</Key><Size>-1</Size></Contents>", "lists what was not asked for: 'p/a'"),
        ("<Contents><Key>other/a\n</Key><Size>1</Size></Contents>", "lists what was not asked for: 'other/a"),
        ("<Contents><Key>p/a</Key><Size>big</Size></Contents>", f"(tried {Budget().tries} times in "),
    ],
    ids=["no token", "same token", "no key", "no size", "negative", "outside", "no number"],
)
def test_s3_listings_that_make_no_sense(inside: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # it ends some time, so that a reader who goes on and on fails and does not hang
    answers = iter([listing(inside)] * 20)
    with answering(lambda request: next(answers, listing(""))) as (address, _):
        message = one_line(lambda: on_s3(monkeypatch, address).list())
        assert message.startswith("s3://bucket/p/: ")
        assert said in message


def test_an_s3_listing_that_makes_sense(monkeypatch: pytest.MonkeyPatch) -> None:
    inside = "<Contents><Key>p/a</Key><Size>1</Size></Contents>"
    with answering(lambda request: listing(inside)) as (address, _):
        assert on_s3(monkeypatch, address).list() == [ObjectInfo("a", 1)]


@pytest.mark.parametrize(
    "inside",
    ["", "<Key>p/x</Key>", "<Code>Internal</Code>", "<Key>p/x&#10;y</Key><Code>Internal</Code>"],
    ids=["nothing", "no code", "no key", "two lines"],
)
def test_s3_deletions_that_fail_without_a_word(inside: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body = f'<?xml version="1.0"?><DeleteResult><Error>{inside}</Error></DeleteResult>'.encode()
    with answering(lambda request: with_length(str(len(body)), body)) as (address, _):
        message = one_line(lambda: on_s3(monkeypatch, address).delete(["x"]))
        assert message.startswith("s3://bucket/")
        assert "not deleted" in message


@pytest.mark.parametrize("answer", [with_length("many"), ENDLESS], ids=["length", "endless"])
def test_a_web_server_that_does_not_say_how_long_it_is(
    answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("http_proxy", raising=False)
    with answering(lambda request: answer) as (address, _):
        message = one_line(lambda: open_storage(f"{address}/p").get("loc"))
        assert message.startswith(f"{address}/p/loc: the server does not say how long it is")


def test_a_web_server_whose_chunks_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("http_proxy", raising=False)
    with answering(lambda request: CHUNKED) as (address, _):
        assert open_storage(f"{address}/p").get("x") == b"hello"
