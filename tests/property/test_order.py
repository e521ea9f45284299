"""The order of samples: exact epochs for all sizes, the same for every reader, found at once anywhere."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.order import Order, permutation

PERMUTATION = [0, 6, 5, 3, 7, 4, 2, 1]
LOCATIONS = [(0, 2, 3), (0, 2, 2), (0, 2, 1), (1, 2, 4), (1, 2, 2), (1, 0, 2), (1, 0, 0)]

counts_of = st.lists(st.integers(0, 12), min_size=1, max_size=9).filter(lambda counts: sum(counts) > 0)
seeds = st.integers(0, 2**63 - 1)


def length(order: Order, stream: int, epochs: int) -> int:
    """C_m(e): what stream m has read after e epochs."""
    return (epochs * order.num_samples + stream) // order.num_streams


def read(order: Order, stream: int, start: int, stop: int) -> list[tuple[int, int, int]]:
    """By both ways of asking, which must agree."""
    found = order.locate(stream, np.arange(start, stop))
    places = list(zip(found.epoch.tolist(), found.shard.tolist(), found.sample.tolist(), strict=True))
    pieces = list(order.pieces(stream, start, stop))
    assert places == [(piece.epoch, piece.shard, row) for piece in pieces for row in piece.rows.tolist()]
    assert all(len(piece.rows) for piece in pieces)
    return places


@given(counts=counts_of, seed=seeds, num_streams=st.integers(1, 40), first=st.integers(0, 10**6))
@settings(max_examples=150, deadline=None)
def test_the_streams_together_read_every_sample_once_an_epoch(
    counts: list[int], seed: int, num_streams: int, first: int
) -> None:
    order = Order(counts, seed, num_streams)
    everything = {(shard, row) for shard, count in enumerate(counts) for row in range(count)}
    for epoch in (first, first + 1):
        seen: Counter[tuple[int, int]] = Counter()
        for stream in range(num_streams):
            piece = read(order, stream, length(order, stream, epoch), length(order, stream, epoch + 1))
            assert all(e == epoch for e, _, _ in piece)
            seen.update((shard, row) for _, shard, row in piece)
        assert set(seen) == everything
        assert max(seen.values()) == 1


@given(
    counts=counts_of,
    seed=seeds,
    num_streams=st.integers(1, 12),
    num_workers=st.integers(1, 12),
    start=st.integers(0, 40),
    batch=st.integers(1, 7),
)
@settings(max_examples=40, deadline=None)
def test_the_global_batch_does_not_depend_on_workers_or_on_where_reading_began(
    counts: list[int], seed: int, num_streams: int, num_workers: int, start: int, batch: int
) -> None:
    workers = [Order(counts, seed, num_streams) for _ in range(min(num_workers, num_streams))]
    alone = Order(counts, seed, num_streams)
    from_zero = {stream: read(alone, stream, 0, (start + 2) * batch) for stream in range(num_streams)}
    for step in (start, start + 1):
        streams = list(range(num_streams))
        random.Random(step).shuffle(streams)
        for place, stream in enumerate(streams):
            worker = workers[place % len(workers)]
            expected = from_zero[stream][step * batch : (step + 1) * batch]
            assert read(worker, stream, step * batch, (step + 1) * batch) == expected


@given(counts=counts_of, seed=seeds, num_streams=st.integers(1, 20), data=st.data())
@settings(max_examples=100, deadline=None)
def test_positions_may_be_asked_in_any_order(
    counts: list[int], seed: int, num_streams: int, data: st.DataObject
) -> None:
    order = Order(counts, seed, num_streams)
    stream = data.draw(st.integers(0, num_streams - 1))
    positions = data.draw(st.lists(st.integers(0, 300), max_size=20))
    together = order.locate(stream, positions)
    for place, position in enumerate(positions):
        one = order.locate(stream, [position])
        assert (together.epoch[place], together.shard[place], together.sample[place]) == (
            one.epoch[0], one.shard[0], one.sample[0],
        )  # fmt: skip


@given(num_samples=st.integers(1, 500), num_streams=st.integers(1, 60), epochs=st.integers(0, 50))
@settings(max_examples=100, deadline=None)
def test_no_stream_runs_ahead_of_another_by_more_than_one_sample(
    num_samples: int, num_streams: int, epochs: int
) -> None:
    order = Order([num_samples], 0, num_streams)
    lengths = [length(order, stream, epochs) for stream in range(num_streams)]
    assert sum(lengths) == epochs * num_samples
    assert max(lengths) - min(lengths) <= 1


def test_the_order_is_this_one_for_ever() -> None:
    """A run that is resumed by a later version must find its place: these values may not change."""
    assert permutation(8, 0, "shards", 0).tolist() == PERMUTATION
    found = read(Order([3, 0, 5, 2], seed=7, num_streams=3), 1, 0, 7)
    assert found == LOCATIONS


def test_epochs_seeds_and_shards_have_orders_of_their_own() -> None:
    order = Order([50, 50], seed=1, num_streams=1)
    first, second = (order.locate(0, np.arange(100) + 100 * epoch) for epoch in (0, 1))
    other = Order([50, 50], seed=2, num_streams=1).locate(0, np.arange(100))
    assert first.sample.tolist() != second.sample.tolist()
    assert first.sample.tolist() != other.sample.tolist()
    assert first.sample[:50].tolist() != first.sample[50:].tolist()


def test_the_order_does_not_use_or_change_numpys_global_state() -> None:
    np.random.seed(0)
    before = np.random.get_state()[1].tolist()  # type: ignore[index]
    one = read(Order([20, 20], 3, 4), 2, 0, 30)
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index]
    np.random.seed(99)
    assert read(Order([20, 20], 3, 4), 2, 0, 30) == one


@pytest.mark.timeout(20)
def test_a_place_far_into_a_huge_run_is_found_without_replaying() -> None:
    order = Order([1000] * 100_000, seed=5, num_streams=1024)  # 10^8 samples, 10^3 epochs on
    found = order.locate(1023, np.arange(10**9, 10**9 + 64))
    assert [piece.shard for piece in order.pieces(1023, 10**9, 10**9 + 64)] == list(
        dict.fromkeys(found.shard.tolist())
    )
    assert found.epoch.tolist() == [((p + 1) * 1024 - 1 - 1023) // 10**8 for p in range(10**9, 10**9 + 64)]
    small = Order([1, 2, 0, 3], seed=5, num_streams=4).locate(3, [10**9])
    assert small.epoch[0] == (10**9 * 4) // 6


def test_each_sample_is_as_likely_at_every_place() -> None:
    """χ² over 2,000 epochs of 8 samples in shards of 3, 1 and 4, at the first and last place of the line."""
    order = Order([3, 1, 4], seed=11, num_streams=1)
    epochs = np.arange(2000)
    for place in (0, 7):
        found = order.locate(0, epochs * 8 + place)
        # a shard is first (or last) in a third of the epochs, whatever its size, and its samples share that
        seen = Counter(zip(found.shard.tolist(), found.sample.tolist(), strict=True))
        expected = {(s, r): 2000 / 3 / n for s, n in enumerate([3, 1, 4]) for r in range(n)}
        chi2 = sum((seen[key] - mean) ** 2 / mean for key, mean in expected.items())
        assert chi2 < 24.3  # 7 degrees of freedom, p = 0.001; the seed is fixed


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (([], 0, 1), "no sample"),
        (([0, 0], 0, 1), "no sample"),
        (([-1, 2], 0, 1), "fewer than 0"),
        (([1], 0, 0), "num_streams: must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_ordered_is_refused(arguments: tuple[list[int], int, int], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        Order(*arguments)


@pytest.mark.parametrize(("stream", "position"), [(-1, 0), (2, 0), (0, -1), (0, 2**62)])
def test_places_that_do_not_exist_are_refused(stream: int, position: int) -> None:
    with pytest.raises(ValueError, match="must be 0"):
        Order([4], 0, 2).locate(stream, [position])
