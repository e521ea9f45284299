"""S3 servers for tests: moto's as a process of its own, Ceph's, and one that fails as it is told to."""

from __future__ import annotations

import http.client
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest

from tests.support.ceph import ceph_server

BUCKET = "tests"

# The same tests run against each: moto, an emulator, in make test; Ceph's gateway in make test-s3.
SERVERS = ["moto", pytest.param("ceph", marks=pytest.mark.s3)]


@dataclass(frozen=True)
class S3Server:
    """A running server with one bucket, `BUCKET`, and the keys of its user."""

    endpoint: str
    access_key: str = "test"
    secret_key: str = "test"


@contextmanager
def running(name: str, folder: Path) -> Iterator[S3Server]:
    """The server of this name out of `SERVERS`, until the end of the block."""
    if name == "moto":
        with moto_server(folder / "log") as endpoint:
            yield S3Server(endpoint)
    else:
        with ceph_server(folder) as ceph:
            server = S3Server(ceph.endpoint, ceph.access_key, ceph.secret_key)
            with pytest.MonkeyPatch.context() as patch:
                use_server(patch, server)
                client().create_bucket(Bucket=BUCKET)
            yield server


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def moto_server(log: Path) -> Iterator[str]:
    """The address of a running server with one bucket, `BUCKET`."""
    port = free_port()
    with log.open("wb") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=out, stderr=out
        )
    try:
        deadline = time.monotonic() + 120
        while not _make_bucket(port):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def _make_bucket(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("PUT", f"/{BUCKET}")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def client() -> Any:
    """A client of boto3 as the environment is now; its default session keeps the credentials that it saw first."""
    return boto3.session.Session().client("s3")


def use_server(patch: pytest.MonkeyPatch, server: S3Server, endpoint: str | None = None) -> None:
    """Lead boto3 to this server as its user, by another address where one is given."""
    use_endpoint(patch, endpoint or server.endpoint)
    patch.setenv("AWS_ACCESS_KEY_ID", server.access_key)
    patch.setenv("AWS_SECRET_ACCESS_KEY", server.secret_key)


def use_endpoint(patch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Lead boto3 to this endpoint, and to nobody's real credentials."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        patch.delenv(name)
    patch.setenv("AWS_ENDPOINT_URL", endpoint)
    patch.setenv("AWS_ACCESS_KEY_ID", "test")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    patch.setenv("AWS_CONFIG_FILE", os.devnull)
    patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    patch.setenv("NO_PROXY", "127.0.0.1")


@dataclass
class HostileS3:
    """Objects by path, and a script of what goes wrong: called with (method, path, number of the request).

    It returns "" (nothing), a status ("503"), "short" (half of the body, then the line is cut), "drop" (the line is
    cut before anything is done) or "lost" (it is done, and the line is cut before the answer). A status of 3xx
    leads to `elsewhere`. It answers a request for a range with the whole, unless it knows `ranges`; then the part
    begins `shift` bytes late, and says so, and has `clip` bytes fewer than it says.
    """

    script: Callable[[str, str, int], str] = lambda method, path, number: ""
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    connections: set[object] = field(default_factory=set)
    elsewhere: str = ""
    ranges: bool = False
    shift: int = 0
    clip: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    writers: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def running(self, tls: ssl.SSLContext | None = None) -> Iterator[str]:
        """The server's address."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield f"{'https' if tls else 'http'}://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


_CODES = {
    "301": "PermanentRedirect",
    "302": "Found",
    "307": "TemporaryRedirect",
    "308": "PermanentRedirect",
    "403": "AccessDenied",
    "409": "ConditionalRequestConflict",
    "500": "InternalError",
    "503": "SlowDown",
}
_WRITER = "x-amz-meta-ddpm-writer"


def _handler(s3: HostileS3) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def answer(
            self,
            status: int,
            body: bytes = b"",
            *,
            send: int | None = None,
            code: str = "",
            more: dict[str, str] | None = None,
        ) -> None:
            if code:
                body = f"<Error><Code>{code}</Code><Message>as told</Message></Error>".encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", '"0"')
            if 300 <= status < 400:
                self.send_header("Location", s3.elsewhere + self.path)
            for name, value in {**s3.headers, **(more or {})}.items():
                self.send_header(name, value)
            if self.path in s3.writers:
                self.send_header(_WRITER, s3.writers[self.path])
            self.end_headers()
            if self.command == "HEAD":
                return
            self.wfile.write(body[:send])
            if send is not None:
                self.cut()

        def cut(self) -> None:
            self.close_connection = True
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

        def trouble(self) -> str:
            s3.requests.append(f"{self.command} {self.path}")
            s3.connections.add(self.client_address)
            what = s3.script(self.command, self.path, len(s3.requests))
            if what == "drop":
                self.cut()
            elif what.isdecimal():
                self.answer(int(what), code=_CODES[what])
            return what

        def do_GET(self) -> None:
            what = self.trouble()
            if what == "drop" or what.isdecimal():
                return
            whole = s3.objects.get(self.path)
            span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if s3.ranges else None
            if whole is None:
                self.answer(404, code="NoSuchKey")
            elif span is None:
                self.answer(200, whole, send=len(whole) // 2 if what == "short" else None)
            elif int(span[1]) >= len(whole):
                self.answer(416, code="InvalidRange", more={"Content-Range": f"bytes */{len(whole)}"})
            else:
                first, last = int(span[1]) + s3.shift, min(int(span[2]) + s3.shift, len(whole) - 1)
                given = {"Content-Range": f"bytes {first}-{last}/{len(whole)}"}
                body = whole[first : last + 1 - s3.clip]
                self.answer(206, body, send=len(body) // 2 if what == "short" else None, more=given)

        do_HEAD = do_GET

        def do_PUT(self) -> None:
            # Expect: 100-continue is answered by the base class
            body = self.rfile.read(int(self.headers["Content-Length"]))
            what = self.trouble()
            if what == "drop" or what.isdecimal():
                return
            if self.headers.get("If-None-Match") == "*" and self.path in s3.objects:
                self.answer(412, code="PreconditionFailed")
                return
            s3.objects[self.path] = body
            s3.writers[self.path] = self.headers.get(_WRITER, "")
            if what == "lost":
                self.cut()
            else:
                self.answer(200)

    return Handler
