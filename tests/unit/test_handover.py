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


def test_what_comes_just_before_a_consumer_falls_asleep_is_not_slept_through() -> None:
    class Between(Handover[int]):
        """Its last thing comes when the consumer has found nothing and is not asleep yet."""

        coming: tuple[int, ...] = (7,)

        def __setattr__(self, name: str, value: object) -> None:
            if name == "_sleeping" and value:
                coming, self.coming = self.coming, ()
                for item in coming:
                    assert self.put(item)
                    self.flush()
            super().__setattr__(name, value)

    handover, got = Between(3), list[int]()
    assert ended(started(lambda: got.append(handover.get())))
    assert got == [7]


def test_a_consumer_that_is_awake_is_not_woken() -> None:
    handover = Handover[int](2)
    for number in range(100):
        assert handover.put(number)
        handover.flush()
        assert handover.get() == number
    # else these would pile up, one a step
    assert handover._wake.empty()


def test_a_producer_that_must_wait_wakes_its_consumer_first() -> None:
    handover, got = Handover[int](3), list[int]()
    # as where an error came before a place was given back
    handover._places.get()
    consumer = started(lambda: got.extend(handover.get() for _ in range(3)))
    consumer.join(0.1)
    producer = started(lambda: [handover.put(number) for number in range(4)])
    assert ended(producer)
    handover.flush()
    assert ended(consumer)
    assert got == [0, 1, 2]


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
