"""The order at a billion samples, over empty, huge and few shards; and how far it is from uniform, by measure."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.order import Order

BILLION = """
import time
from pathlib import Path
import numpy as np
from pipelines.order import Order
def peak():
    # not ru_maxrss, which begins with that of the process that started this one
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
draw = np.random.default_rng(0)
counts = draw.integers(5_000, 15_001, 100_000)
counts[:100] = 0
counts[0] += 10**9 - counts.sum()
began = time.perf_counter()
order = Order(counts, 5, 1024)
b = 4
where = order.locate(1023, np.arange(10**7 * b, 10**7 * b + b))
ahead = order.shards_ahead(1023, 10**7 * b, 4)
print(time.perf_counter() - began, peak())
# what the definition says, without any of the code above it
positions = np.arange(10**7 * b, 10**7 * b + b)
epoch = ((positions + 1) * 1024 - 1 - 1023) // 10**9
assert where.epoch.tolist() == epoch.tolist() and len(set(epoch.tolist())) == 1
e = int(epoch[0])
def length(m, epochs):
    return (epochs * 10**9 + m) // 1024
start = sum(length(m, e + 1) - length(m, e) for m in range(1023))
from pipelines.order import permutation
shards = permutation(100_000, 5, "shards", e)
ends = np.cumsum(counts[shards])
for position, shard, sample in zip(positions.tolist(), where.shard.tolist(), where.sample.tolist()):
    place = start + position - length(1023, e)
    rank = int((ends <= place).sum())
    assert shard == shards[rank]
    row = place - int(ends[rank] - counts[shards[rank]])
    assert sample == permutation(int(counts[shard]), 5, "samples", e, shard)[row]
assert ahead[0] == where.shard[0] and counts[ahead].all() and len(set(ahead)) == len(ahead)
"""


def test_step_ten_million_of_a_billion_samples_in_100_000_shards() -> None:
    """In a process of its own, whose memory is its own. `pytest -s` shows the time, which is no test."""
    done = subprocess.run([sys.executable, "-c", BILLION], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seconds, num_bytes = map(float, done.stdout.split())
    print(f"\nlocated in {seconds:.3f} s, {num_bytes / 2**20:.0f} MiB of memory in all")
    assert num_bytes < 500 * 10**6


SHAPES = st.one_of(
    st.lists(st.sampled_from([0, 0, 1, 3]), min_size=1, max_size=9),  # mostly empty
    st.integers(1, 300).map(lambda n: [n]),  # one huge shard
    st.tuples(st.integers(1, 200), st.lists(st.integers(0, 2), max_size=6)).map(lambda t: [t[0], *t[1]]),
).filter(lambda counts: sum(counts) > 0)


@given(
    counts=SHAPES,
    seed=st.integers(0, 2**63 - 1),
    streams=st.integers(1, 24),
    workers=st.integers(1, 24),
    batch=st.integers(1, 9),
    start=st.integers(0, 30),
)
@settings(max_examples=120, deadline=None)
def test_every_worker_makes_the_same_steps_and_every_sample_comes_once_an_epoch_from_any_start(
    counts: list[int], seed: int, streams: int, workers: int, batch: int, start: int
) -> None:
    """Workers take whole streams; each makes a step whatever the shards are, so that none waits for another."""
    order, workers = Order(counts, seed, streams), min(workers, streams)
    owned = [range(w * streams // workers, (w + 1) * streams // workers) for w in range(workers)]
    assert sorted(stream for own in owned for stream in own) == list(range(streams))
    assert all(len(own) >= 1 for own in owned)
    total = sum(counts)
    steps = -(-2 * total // (streams * batch)) + 1
    seen: dict[int, list[tuple[int, int]]] = {}
    for own in owned:
        for stream in own:
            found = order.locate(stream, np.arange(start * batch, (start + steps) * batch))
            assert len(found.shard) == steps * batch
            rows = zip(found.epoch.tolist(), found.shard.tolist(), found.sample.tolist(), strict=True)
            for epoch, shard, sample in rows:
                seen.setdefault(epoch, []).append((shard, sample))
    everything = {(shard, row) for shard, count in enumerate(counts) for row in range(count)}
    for samples in seen.values():
        assert len(set(samples)) == len(samples)
        assert set(samples) <= everything
    whole = [epoch for epoch, samples in seen.items() if len(samples) == total]
    # an epoch that begins at or after the start, of which no stream has been cut off
    assert whole
    assert all(set(seen[epoch]) == everything for epoch in whole)


@given(counts=SHAPES, seed=st.integers(0, 2**63 - 1), streams=st.integers(1, 9), data=st.data())
@settings(max_examples=80, deadline=None)
def test_the_shards_ahead_are_those_that_the_stream_reads(
    counts: list[int], seed: int, streams: int, data: st.DataObject
) -> None:
    order = Order(counts, seed, streams)
    stream, position = data.draw(st.integers(0, streams - 1)), data.draw(st.integers(0, 500))
    limit = data.draw(st.integers(1, 4))
    ahead = order.shards_ahead(stream, position, limit)
    read = order.locate(stream, np.arange(position, position + sum(counts) // streams + 1)).shard.tolist()
    expected = list(dict.fromkeys(read))
    assert ahead[: len(expected)] == expected[:limit]
    assert len(set(ahead)) == len(ahead) <= limit
    assert all(counts[shard] for shard in ahead)
    stop = position + data.draw(st.integers(0, sum(counts) // streams + 1))
    until = order.locate(stream, np.arange(position, stop)).shard.tolist()
    assert order.shards_ahead(stream, position, limit, stop) == list(dict.fromkeys(until))[:limit]


@pytest.mark.parametrize(
    ("shards", "streams", "low", "high"), [(1000, 1, 0.97, 1.03), (1000, 20, 0.97, 1.03)]
)
def test_a_sample_lands_anywhere_in_its_epoch(shards: int, streams: int, low: float, high: float) -> None:
    """How far a sample moves from one epoch to the next, as a share of what uniform shuffling gives (a third of the
    epoch), is 1: between epochs the order forgets. What it does not forget is which samples share a shard.
    """
    order = Order([50] * shards, 3, streams)
    places = [_places(order, epoch) for epoch in range(6)]
    n = order.num_samples
    moved = np.mean([np.abs(one - two).mean() for one, two in pairwise(places)])
    assert low < moved / (n / 3) < high


@pytest.mark.parametrize(("streams", "low", "high"), [(1, 49, 52), (20, 3.7, 3.9), (80, 0, 0.1)])
def test_a_global_batch_is_as_mixed_as_it_has_streams(streams: int, low: float, high: float) -> None:
    """Pairs of a batch of 80 that come from one shard, against uniform shuffling, for 100 shards of 50.

    A stream's part of a batch comes from one shard or two, so that these pairs are about (part − 1) · 100/79
    times as many: with one stream 50 times, with 20 of 4 samples 3.8 times, with 80 of 1 sample hardly ever.
    """
    order, batch = Order([50] * 100, 3, streams), 80
    pairs = []
    for step in range(200):
        shards = np.concatenate(
            [
                order.locate(stream, np.arange(batch // streams) + step * (batch // streams)).shard
                for stream in range(streams)
            ]
        )
        counts = np.bincount(shards, minlength=100)
        pairs.append((counts * (counts - 1)).sum())
    uniform = batch * (batch - 1) * 49 / 4999
    assert low < np.mean(pairs) / uniform < high


def _places(order: Order, epoch: int) -> np.ndarray:
    """Where in the epoch each sample is read, by step and then stream."""
    n, streams = order.num_samples, order.num_streams
    found = []
    for stream in range(streams):
        begun, stop = (epoch * n + stream) // streams, ((epoch + 1) * n + stream) // streams
        where = order.locate(stream, np.arange(begun, stop))
        time = np.arange(stop - begun) * streams + stream
        found.append(np.stack([where.shard * 50 + where.sample, time]))
    sample, time = np.concatenate(found, 1)
    places = np.empty(n)
    places[sample] = time
    return places
