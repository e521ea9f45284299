"""A handover keeps order and bound, and lets nobody wait once it is closed."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from pipelines.handover import Handover

LONG_S = 30.0


def started(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def ended(thread: threading.Thread) -> bool:
    thread.join(LONG_S)
    return not thread.is_alive()


def test_all_comes_in_order_and_never_more_than_size_ahead() -> None:
    handover = Handover[int](3)
    put: list[int] = []

    def produce() -> None:
        for number in range(200):
            put.append(number)
            assert handover.put(number)
        handover.flush()

    thread = started(produce)
    for number in range(200):
        assert handover.get() == number
        # three wait, one is being put, one has just been taken
        assert len(put) <= number + 5
    assert ended(thread)


def test_a_consumer_that_found_nothing_sleeps_until_it_is_full_or_flushed() -> None:
    handover = Handover[int](3)
    got: list[int] = []
    thread = started(lambda: got.extend(handover.get() for _ in range(5)))
    for number in range(2):
        assert handover.put(number)
    thread.join(0.2)
    assert got == []
    assert handover.put(2)
    while len(got) < 3:
        thread.join(0.01)
    assert handover.put(3)
    assert handover.put(4)
    thread.join(0.2)
    assert thread.is_alive()
    handover.flush()
    assert ended(thread)
    assert got == [0, 1, 2, 3, 4]


def test_what_is_there_is_had_without_waiting() -> None:
    handover = Handover[int](3)
    assert handover.put(1)
    assert handover.get() == 1


def test_a_full_one_makes_its_producer_wait() -> None:
    handover = Handover[int](2)
    thread = started(lambda: [handover.put(number) for number in range(3)])
    thread.join(0.2)
    assert thread.is_alive()
    assert handover.get() == 0
    assert ended(thread)


def test_a_producer_that_waits_is_told_that_it_was_closed() -> None:
    handover = Handover[int](1)
    told: list[bool] = []

    def produce() -> None:
        for number in range(2):
            told.append(handover.put(number))

    thread = started(produce)
    thread.join(0.2)
    handover.close()
    assert ended(thread)
    assert told == [True, False]
    assert not handover.put(3)


def test_a_consumer_that_waits_is_let_go() -> None:
    handover = Handover[int](1)
    told: list[str] = []

    def consume() -> None:
        try:
            handover.get()
        except StopIteration:
            told.append("closed")

    thread = started(consume)
    thread.join(0.1)
    handover.close()
    assert ended(thread)
    assert told == ["closed"]


def test_what_was_put_before_it_was_closed_is_not_given_any_more() -> None:
    handover = Handover[int](2)
    handover.put(1)
    handover.close()
    handover.close()
    for _ in range(2):
        with pytest.raises(StopIteration):
            handover.get()
