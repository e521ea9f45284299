"""S3 through a proxy that spoils answers: all comes whole in the end, or one line names the object."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines import retries
from pipelines.adapters import s3
from pipelines.adapters.s3_bodies import contradicts_etag
from pipelines.dataset import DataError
from pipelines.prepare import prepare
from pipelines.reader import fetch_verified
from pipelines.retries import Budget, Pace
from pipelines.shards import sha256
from pipelines.storage import Storage, StorageError, open_storage
from pipelines.stored_order import read_split
from tests.support.data import random_images, write_image
from tests.support.fault_proxy import FaultProxy, Faults
from tests.support.s3 import BUCKET, S3Server, use_server

SMALL = random.Random(1).randbytes(5000)
LARGE = random.Random(2).randbytes(s3.ETAG_CHECK_MAX_BYTES + 5000)
KINDS = ["unavailable", "reset", "short", "flip", "stall"]


@pytest.fixture
def proxy(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    monkeypatch.setattr(retries, "BUDGET", Budget(first_pause_s=0.002))
    with FaultProxy(s3_server.endpoint).running() as proxy:
        use_server(monkeypatch, s3_server, proxy.address)
        yield proxy


@pytest.fixture
def storage(proxy: FaultProxy, request: pytest.FixtureRequest) -> Storage:
    storage = open_storage(f"s3://{BUCKET}/{request.node.name}")
    storage.put("small", SMALL)
    storage.put("large", LARGE)
    proxy.counts.clear()
    return storage


def first(times: int) -> Callable[[str, str], bool]:
    left = [times]

    def applies(method: str, path: str) -> bool:
        left[0] -= 1
        return left[0] >= 0

    return applies


def only(kind: str, times: int = 10**9) -> Faults:
    return Faults(**{kind: 1.0}, applies=first(times))


def one_line(attempt: Callable[[], object], kind: type[Exception] = StorageError) -> str:
    with pytest.raises(kind) as caught:
        attempt()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_spoilt_twice_comes_whole_at_last(
    proxy: FaultProxy, storage: Storage, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[Callable[[], object]] = [
        lambda: storage.get("small") == SMALL,
        lambda: fetch_verified(storage, "large", sha256(LARGE)) == LARGE,
    ]
    if kind != "flip":
        # a flipped bit of these is their caller's to find: a range has its CRC, a listing its record
        reads += [
            lambda: storage.get_range("large", 700, 3000) == LARGE[700:3700],
            lambda: storage.exists("small"),
            lambda: [info.key for info in storage.list()] == ["large", "small"],
        ]
    times = 2
    if kind == "stall":
        # each costs its time, and a server that is slow for another reason is given up as well
        times = 1
        monkeypatch.setattr(s3, "READ_TIMEOUT_S", 1.0)
        s3._server.cache_clear()
    for read in reads:
        proxy.counts.clear()
        proxy.faults = only(kind, times)
        assert read()
        assert proxy.counts[kind] == times
        assert proxy.counts["passed"] == 1 or kind == "stall"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_always_spoilt_is_named(
    proxy: FaultProxy, storage: Storage, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = Budget().tries
    if kind == "stall":
        tries = 3
        monkeypatch.setattr(s3, "READ_TIMEOUT_S", 0.3)
        monkeypatch.setattr(retries, "BUDGET", Budget(tries=tries))
        # the client that has written them waits longer
        s3._server.cache_clear()
    proxy.faults = only(kind)
    if kind == "flip":
        message = one_line(lambda: fetch_verified(storage, "large", sha256(LARGE)), DataError)
        assert message.startswith(f"{storage.uri}/large: is damaged or was exchanged: ")
        message = one_line(lambda: storage.get("small"))
        assert message.startswith(f"{storage.uri}/small: was altered on its way")
    else:
        for read in (lambda: storage.get("large"), lambda: storage.get_range("large", 700, 3000)):
            proxy.counts.clear()
            message = one_line(read)
            assert message.startswith(f"{storage.uri}/large: ")
            assert f"(tried {tries} times in " in message
            assert proxy.counts["requests"] == tries
            assert proxy.counts[kind] == tries or kind == "stall"


def test_a_body_that_trickles_is_asked_for_again_and_given_up_in_the_end(
    proxy: FaultProxy, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 50 bytes a second the half of it would take hours, and no single read would time out."""
    monkeypatch.setattr(retries, "PACE", Pace(num_bytes=1000, window_s=0.3))
    reads = (lambda: storage.get("large"), lambda: storage.get_range("large", 0, len(LARGE)))
    for read in reads:
        proxy.counts.clear()
        proxy.faults = only("trickle", 1)
        assert read() == LARGE
        assert proxy.counts["trickle"] == 1
    monkeypatch.setattr(retries, "BUDGET", Budget(tries=2, first_pause_s=0.002))
    proxy.faults = only("trickle")
    for read in reads:
        proxy.counts.clear()
        message = one_line(read)
        assert message.startswith(f"{storage.uri}/large: could not be read whole: it comes too slowly, ")
        assert "(tried 2 times in " in message
        assert proxy.counts["trickle"] == 2


def test_an_etag_that_is_no_hash_of_the_bytes_is_not_held_against_them() -> None:
    """As of an object that was written in parts, or by a server that counts otherwise."""
    answer = {"ETag": '"00000000000000000000000000000000"'}
    assert contradicts_etag(answer, SMALL)
    for other in ('"0"', '"00000000000000000000000000000000-2"', ""):
        assert not contradicts_etag({"ETag": other}, SMALL)
    assert not contradicts_etag({**answer, "ServerSideEncryption": "aws:kms"}, SMALL)
    assert not contradicts_etag({**answer, "SSECustomerAlgorithm": "AES256"}, SMALL)


@pytest.mark.parametrize("kind", ["unavailable", "reset", "short", "stall"])
def test_writes_through_trouble(
    proxy: FaultProxy, storage: Storage, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = 2
    if kind == "stall":
        times = 1
        monkeypatch.setattr(s3, "READ_TIMEOUT_S", 1.0)
        s3._server.cache_clear()
    proxy.faults = only(kind, times)
    storage.put("new", SMALL)
    assert proxy.counts[kind] == times
    assert storage.get("new") == SMALL
    proxy.faults = only(kind, times)
    assert storage.put_if_absent("record", SMALL) is True
    proxy.faults = only(kind, times)
    assert storage.put_if_absent("record", SMALL) is False
    proxy.faults = only(kind, times)
    storage.delete(["new", "record"])
    assert [info.key for info in storage.list()] == ["large", "small"]


@pytest.mark.parametrize("times", [1, 3])
def test_what_is_altered_on_its_way_there_is_written_again(
    proxy: FaultProxy, storage: Storage, times: int
) -> None:
    for write in (storage.put, storage.put_if_absent):
        for data in (SMALL, LARGE):
            proxy.counts.clear()
            proxy.faults = Faults(flip=1.0, applies=altered_puts(times))
            write(f"{write.__name__}-{len(data)}", data)
            assert proxy.counts["flip"] == times
            assert storage.get(f"{write.__name__}-{len(data)}") == data
            assert storage.put_if_absent(f"{write.__name__}-{len(data)}", b"late") is False


def altered_puts(times: int) -> Callable[[str, str], bool]:
    count = first(times)
    return lambda method, path: method == "PUT" and count(method, path)


@pytest.mark.parametrize("same", [False, True])
def test_one_of_eight_writers_wins_though_answers_are_lost(
    proxy: FaultProxy, storage: Storage, same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "BUDGET", Budget(tries=50, first_pause_s=0.002))
    proxy.faults = Faults(unavailable=0.1, reset=0.2, short=0.1, applies=lambda m, path: "commit" in path)
    for number in range(8):
        barrier = threading.Barrier(8)
        won: dict[int, bool] = {}

        def write(writer: int, key: str = f"commit-{number}", barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            data = b"the same" if same else str(writer).encode()
            won[writer] = storage.put_if_absent(key, data)  # noqa: B023  joined below

        threads = [threading.Thread(target=write, args=(writer,)) for writer in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 8
        winners = [writer for writer, ours in won.items() if ours]
        assert len(winners) == 1
        assert storage.get(f"commit-{number}") == (b"the same" if same else str(winners[0]).encode())
    assert proxy.counts["reset"] > 0


def test_a_data_set_is_made_and_read_through_trouble(
    proxy: FaultProxy, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "BUDGET", Budget(tries=50, first_pause_s=0.002))
    for number, pixels in enumerate(random_images(60)):
        write_image(tmp_path / "photos" / f"{number:03d}.png", pixels[0])
    proxy.faults = Faults(
        unavailable=0.1, reset=0.05, short=0.05, flip=0.05,
        applies=lambda method, path: "list-type" not in path,
    )  # fmt: skip
    there = prepare(str(tmp_path / "photos"), f"{storage.uri}/set", samples_per_shard=4)
    here = prepare(str(tmp_path / "photos"), str(tmp_path / "out"), samples_per_shard=4)
    assert there == here
    for split in ("train", "test"):
        samples = list(zip(read_split(there, split), read_split(here, split), strict=True))
        assert len(samples) == there.count(split)
        assert all(a[0] == b[0] and (a[1] == b[1]).all() and a[2] == b[2] for a, b in samples)
    assert all(proxy.counts[kind] > 0 for kind in ("unavailable", "reset", "short", "flip"))
