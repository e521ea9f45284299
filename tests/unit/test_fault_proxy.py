"""The proxy that spoils answers: each fault is what its name says, and what is to pass passes unchanged."""

from __future__ import annotations

import http.client
import random
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from tests.support.fault_proxy import FaultProxy, Faults
from tests.support.s3 import HostileS3

BODY = random.Random(0).randbytes(5000)


@pytest.fixture
def proxy() -> Iterator[FaultProxy]:
    server = HostileS3()
    server.objects["/x"] = BODY
    with server.running() as address, FaultProxy(address).running() as proxy:
        yield proxy


def fetch(proxy: FaultProxy, timeout: float = 30, method: str = "GET") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(urlsplit(proxy.address).netloc, timeout=timeout)
    try:
        connection.request(method, "/x", body=BODY if method == "PUT" else None)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def trickled(proxy: FaultProxy, reads: int) -> list[int]:
    """How many bytes come at each of the first reads."""
    connection = http.client.HTTPConnection(urlsplit(proxy.address).netloc, timeout=30)
    try:
        connection.request("GET", "/x")
        answer = connection.getresponse()
        return [len(answer.read1(2500)) for _ in range(reads)]
    finally:
        connection.close()


def test_without_faults_everything_passes(proxy: FaultProxy) -> None:
    assert fetch(proxy) == (200, BODY)
    assert fetch(proxy, method="HEAD") == (200, b"")
    assert fetch(proxy, method="PUT") == (200, b"")
    assert fetch(proxy) == (200, BODY)
    assert proxy.counts == {"requests": 4, "passed": 4}


def test_each_fault(proxy: FaultProxy) -> None:
    proxy.faults = Faults(unavailable=1)
    status, body = fetch(proxy)
    assert status == 503
    assert b"SlowDown" in body
    proxy.faults = Faults(flip=1)
    status, body = fetch(proxy)
    assert (status, len(body)) == (200, len(BODY))
    assert sum((a ^ b).bit_count() for a, b in zip(body, BODY, strict=True)) == 1
    proxy.faults = Faults(short=1)
    with pytest.raises(http.client.IncompleteRead) as short:
        fetch(proxy)
    assert short.value.partial == BODY[:2500]
    proxy.faults = Faults(reset=1)
    with pytest.raises(ConnectionResetError):
        fetch(proxy)
    proxy.faults = Faults(trickle=1)
    first, *more = trickled(proxy, 5)
    assert first == 2500
    assert all(1 <= size < 500 for size in more)
    proxy.faults = Faults(stall=1)
    with pytest.raises(TimeoutError):
        fetch(proxy, timeout=0.1)
    assert proxy.counts == {
        "requests": 6, "unavailable": 1, "flip": 1, "short": 1, "reset": 1, "trickle": 1, "stall": 1
    }  # fmt: skip


def test_faults_come_at_their_rate_and_again_with_their_seed(proxy: FaultProxy) -> None:
    def seen(seed: int) -> list[bool]:
        proxy.seed, proxy.faults = seed, Faults(unavailable=0.25)
        proxy.counts.clear()
        return [fetch(proxy)[0] == 503 for _ in range(200)]

    first = seen(1)
    assert 30 <= sum(first) <= 70
    assert seen(1) == first
    assert seen(2) != first


def test_faults_can_be_kept_to_some_requests(proxy: FaultProxy) -> None:
    proxy.faults = Faults(unavailable=1, applies=lambda method, path: method == "PUT")
    assert fetch(proxy) == (200, BODY)
    assert fetch(proxy, method="PUT")[0] == 503
