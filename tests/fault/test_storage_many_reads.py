"""Very many reads through a proxy that spoils some of them: no wrong byte is taken, and little speed is lost."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipelines.buffers import Buffers
from pipelines.reader import fetch_verified
from pipelines.shards import sha256
from pipelines.storage import Storage, open_storage
from tests.support.fault_proxy import FaultProxy, Faults
from tests.support.s3 import BUCKET, S3Server, use_server

FAULTS = Faults(unavailable=0.05, reset=0.01, short=0.005, flip=0.001)
THREADS = 16
NUM_OBJECTS = 64
# moto takes several times as long for a request
READS = {"moto": 1200, "ceph": 20_000}
ROUNDS = 20


def test_no_wrong_byte_is_taken(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Prints the throughput beside that of the same proxy when it spoils nothing, measured in turns."""
    draw = random.Random(0)
    objects = {f"object-{n:02d}": draw.randbytes(draw.randrange(1000, 8000)) for n in range(NUM_OBJECTS)}
    hashes = {key: sha256(data) for key, data in objects.items()}
    name = request.node.callspec.params["s3_server"]
    # the clean ones are the measure alone
    reads = {"clean": READS[name] // 2, "faulty": READS[name]}
    spent = dict.fromkeys(reads, 0.0)
    with FaultProxy(s3_server.endpoint, seed=1).running() as proxy:
        use_server(monkeypatch, s3_server, proxy.address)
        storage = open_storage(f"s3://{BUCKET}/many-reads")
        for key, data in objects.items():
            storage.put(key, data)
        proxy.counts.clear()
        for _ in range(ROUNDS):
            for kind, count in reads.items():
                proxy.faults = FAULTS if kind == "faulty" else Faults()
                keys = draw.choices(sorted(objects), k=count // ROUNDS)
                start = time.monotonic()
                got = read_all(storage, keys, hashes)
                spent[kind] += time.monotonic() - start
                wrong = [key for key, data in zip(keys, got, strict=True) if data != objects[key]]
                assert wrong == []
    # each was done, about as often as it was asked for
    for fault in ("unavailable", "reset", "short", "flip"):
        expected = getattr(FAULTS, fault) * READS[name]
        assert abs(proxy.counts[fault] - expected) <= 5 * expected**0.5 + 1, proxy.counts
    rate = {kind: reads[kind] / seconds for kind, seconds in spent.items()}
    print(
        f"\n{name}: {READS[name]} reads through {dict(proxy.counts)}: {rate['faulty']:.0f}/s, "
        f"clean {rate['clean']:.0f}/s, ratio {rate['faulty'] / rate['clean']:.2f}"
    )


def read_all(storage: Storage, keys: Sequence[str], hashes: dict[str, str]) -> list[bytes]:
    """Half of them as a reader of shards does, half without knowing their hash."""

    memory = Buffers(spare=2).bytes

    def read(number: int) -> bytes:
        key = keys[number]
        if number % 2:
            return bytes(fetch_verified(storage, key, hashes[key], memory))
        return storage.get(key)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(read, range(len(keys))))
