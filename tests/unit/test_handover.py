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


class Consumer:
    """Takes so many, in a thread of its own."""

    def __init__(self, handover: Handover[int], count: int) -> None:
        self.got: list[int] = []
        self._handover = handover
        self.thread = started(lambda: self.got.extend(handover.get() for _ in range(count)))

    def asleep_with(self, count: int) -> bool:
        """Whether it has so many, and does not have the next one for a while."""
        for _ in range(3000):
            if len(self.got) == count and self._handover._sleeping:
                break
            self.thread.join(0.01)
        self.thread.join(0.1)
        return len(self.got) == count


def test_a_consumer_that_soon_finds_nothing_again_sleeps_longer_until_all_places_are_taken() -> None:
    handover = Handover[int](5)
    consumer, number = Consumer(handover, 19), 0
    # the first is had at once: nobody knows yet who is the faster
    for enough in (1, 2, 4, 5, 5):
        for missing in range(enough, 0, -1):
            assert consumer.asleep_with(number - (enough - missing))
            assert handover.put(number)
            number += 1
    assert consumer.asleep_with(17)
    # no more come
    for _ in range(2):
        assert handover.put(number)
        number += 1
    assert consumer.asleep_with(17)
    handover.flush()
    assert ended(consumer.thread)
    assert consumer.got == list(range(19))


def test_a_consumer_that_waits_now_and_then_alone_is_woken_at_once() -> None:
    handover = Handover[int](4)
    for _ in range(20):
        for number in range(3):
            assert handover.put(number)
        assert [handover.get() for _ in range(3)] == [0, 1, 2]
        consumer = Consumer(handover, 1)
        assert consumer.asleep_with(0)
        assert handover.put(3)
        assert ended(consumer.thread)
        assert consumer.got == [3]


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
