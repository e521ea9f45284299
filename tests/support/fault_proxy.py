"""A TCP proxy in front of an S3 (or any HTTP/1.1) server that spoils what passes, as often as it is told to.

It parses as much HTTP as it takes to know where an answer's body begins and ends, so that a body can be cut,
altered or held up in its middle. Which answer is spoilt, how, and where, is drawn from (seed, number of the
request), so a test with one connection sees the same faults every time.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"


@dataclass(frozen=True)
class Faults:
    """Shares of the requests, of those that `applies` (method, path) says; all others pass untouched.

    `unavailable`: 503 before the server hears of it. The others come after the server did its work. `reset`: the
    connection is reset in mid-body, `short`: closed in good order there. `flip`: one bit of the body is another,
    or, of a request that has a body, one of that. `stall`: nothing more comes after half of the body. `trickle`:
    the second half comes a byte at a time, 50 of them a second. An answer without a body is reset, cut or held up
    before its first byte.
    """

    unavailable: float = 0.0
    reset: float = 0.0
    short: float = 0.0
    flip: float = 0.0
    stall: float = 0.0
    trickle: float = 0.0
    applies: Callable[[str, str], bool] = field(default=lambda method, path: True)

    def draw(self, draw: random.Random) -> str:
        """The name of a fault, or "" """
        mark = draw.random()
        for name in ("unavailable", "reset", "short", "flip", "stall", "trickle"):
            mark -= getattr(self, name)
            if mark < 0:
                return name
        return ""


@dataclass
class FaultProxy:
    """`faults` may be exchanged while it runs. `counts`: the faults that were done, and "passed"."""

    upstream: str
    faults: Faults = field(default_factory=Faults)
    seed: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    address: str = ""

    @contextmanager
    def running(self) -> Iterator[FaultProxy]:
        loop = asyncio.new_event_loop()
        server = loop.run_until_complete(asyncio.start_server(self._connected, "127.0.0.1", 0, limit=2**20))
        self.address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        thread = threading.Thread(target=loop.run_forever, name="fault-proxy", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            asyncio.run_coroutine_threadsafe(_end(server), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        where = urlsplit(self.upstream)
        client, server = _Side(reader, writer), None
        try:
            server = _Side(*await asyncio.open_connection(where.hostname, where.port, limit=2**20))
            while await self._exchange(client, server):
                pass
        except (OSError, EOFError):
            pass
        finally:
            client.writer.close()
            if server is not None:
                server.writer.close()

    async def _exchange(self, client: _Side, server: _Side) -> bool:
        """One request and its answer; False where the connection must end."""
        head = await client.head()
        method, path, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
        self.counts["requests"] += 1
        # not the moment's: so the n-th request meets the same fault whatever came before
        draw = random.Random(f"{self.seed} {self.counts['requests']}")
        fault = self.faults.draw(draw) if self.faults.applies(method, path) else ""
        length = int(_header(head, b"content-length") or 0)
        waits = _header(head, b"expect").lower() == b"100-continue"
        if fault == "unavailable":
            self.counts[fault] += 1
            if not waits:
                await client.reader.readexactly(length)
            client.writer.write(_answer(503, SLOW_DOWN, close=waits))
            await client.writer.drain()
            return not waits
        server.writer.write(head)
        if waits:
            answer = await server.head()
            client.writer.write(answer)
            if _status(answer) != 100:
                await client.writer.drain()
                return False
        if length:
            body = await client.reader.readexactly(length)
            if fault == "flip":
                self.counts[fault] += 1
                body, fault = _flipped(body, draw), "passed"
            server.writer.write(body)
        await server.writer.drain()
        return await self._answer(client, server, method, fault, draw)

    async def _answer(
        self, client: _Side, server: _Side, method: str, fault: str, draw: random.Random
    ) -> bool:
        head = await server.head()
        while _status(head) == 100:
            client.writer.write(head)
            head = await server.head()
        if method == "HEAD" or _status(head) in (204, 304):
            body = b""
        elif _header(head, b"transfer-encoding").lower() == b"chunked":
            body = await server.chunks()
        else:
            body = await server.reader.readexactly(int(_header(head, b"content-length") or 0))
        if fault == "flip" and not body:
            fault = ""
        self.counts[fault or "passed"] += 1
        if fault == "flip":
            body = _flipped(body, draw)
        elif fault == "trickle" and body:
            client.writer.write(head + body[: len(body) // 2])
            for position in range(len(body) // 2, len(body)):
                # until the client gives up
                await client.writer.drain()
                await asyncio.sleep(0.02)
                client.writer.write(body[position : position + 1])
            return False
        elif fault in ("reset", "short", "stall"):
            if body:
                client.writer.write(head + body[: len(body) // 2])
                await client.writer.drain()
            if fault == "reset":
                # what was sent must be under way, for a reset throws away what is not
                await asyncio.sleep(0.001)
                client.reset()
            elif fault == "stall":
                # until the client gives up
                await client.reader.read(1)
            return False
        client.writer.write(head + body)
        await client.writer.drain()
        return _header(head, b"connection").lower() != b"close"


@dataclass
class _Side:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def head(self) -> bytes:
        return await self.reader.readuntil(b"\r\n\r\n")

    async def chunks(self) -> bytes:
        """A chunked body as it came, sizes and all."""
        parts = []
        while True:
            line = await self.reader.readuntil(b"\r\n")
            chunk = await self.reader.readexactly(int(line.split(b";")[0], 16) + 2)
            parts += [line, chunk]
            if chunk == b"\r\n":
                return b"".join(parts)

    def reset(self) -> None:
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


async def _end(server: asyncio.Server) -> None:
    server.close()
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    for task in others:
        with suppress(asyncio.CancelledError):
            await task


def _header(head: bytes, name: bytes) -> bytes:
    for line in head.split(b"\r\n")[1:]:
        found, _, value = line.partition(b":")
        if found.strip().lower() == name:
            return value.strip()
    return b""


def _status(head: bytes) -> int:
    return int(head.split(b" ", 2)[1])


def _answer(status: int, body: bytes, *, close: bool) -> bytes:
    connection = "close" if close else "keep-alive"
    head = f"HTTP/1.1 {status} As-Told\r\nContent-Length: {len(body)}\r\nConnection: {connection}\r\n\r\n"
    return head.encode() + body


def _flipped(body: bytes, draw: random.Random) -> bytes:
    altered = bytearray(body)
    altered[draw.randrange(len(altered))] ^= 1 << draw.randrange(8)
    return bytes(altered)
