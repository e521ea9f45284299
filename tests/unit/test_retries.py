"""How often, how long and with which pauses something is tried again."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import pytest

from pipelines import retries
from pipelines.buffers import Buffers
from pipelines.errors import UserError
from pipelines.retries import Budget, Pace, Read1, TryAgain, insist, read_steadily, read_steadily_hashed
from tests.support.data import hashed


def test_pauses_double_up_to_the_longest_and_are_drawn_from_their_upper_half() -> None:
    budget = Budget(tries=9, seconds=1000, first_pause_s=0.1, longest_pause_s=1.0)
    longest = [budget.pause(tried, 0, 1.0) for tried in range(1, 9)]
    assert longest == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0, 1.0])
    assert [budget.pause(tried, 0, 0.0) for tried in range(1, 9)] == pytest.approx(
        [pause / 2 for pause in longest if pause]
    )
    assert Budget(tries=10**6).pause(10**5, 0, 1.0) == 10.0


def test_the_budget_ends_by_tries_and_by_time() -> None:
    budget = Budget(tries=3, seconds=10, first_pause_s=1, longest_pause_s=1)
    assert budget.pause(2, 0, 1.0) == 1
    assert budget.pause(3, 0, 1.0) is None
    # a pause that would end too late is not begun
    assert budget.pause(1, 9.0, 1.0) == 1
    assert budget.pause(1, 9.1, 1.0) is None


class Clock:
    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.pauses: list[float] = []
        patch.setattr("pipelines.retries.time.monotonic", lambda: self.now)
        patch.setattr("pipelines.retries.time.sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


def failing(times: int, clock: Clock, seconds: float = 0.0) -> Callable[[], int]:
    numbers = count(1)

    def attempt() -> int:
        clock.now += seconds
        if (number := next(numbers)) <= times:
            raise TryAgain(f"trouble {number}")
        return number

    return attempt


def test_what_works_in_the_end_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert insist("x", failing(4, clock), UserError, Budget(tries=5)) == 5
    assert len(clock.pauses) == 4
    assert clock.pauses == sorted(clock.pauses)


def test_the_last_reason_and_what_was_spent_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with pytest.raises(UserError) as caught:
        insist("x", failing(9, clock), UserError, Budget(tries=2))
    assert str(caught.value) == "x: trouble 2 (tried 2 times in 0 s)"
    with pytest.raises(UserError) as caught:
        insist("x", failing(9, clock, 50), UserError, Budget(seconds=60))
    assert str(caught.value) == "x: trouble 2 (tried 2 times in 100 s)"
    with pytest.raises(UserError, match=r"x: trouble 1 \(tried once in 70 s\)"):
        insist("x", failing(9, clock, 70), UserError, Budget(seconds=60))


def test_another_error_passes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def attempt() -> None:
        raise UserError("no bucket")

    with pytest.raises(UserError, match=r"^no bucket$"):
        insist("x", attempt, UserError)
    assert clock.pauses == []


def test_two_readers_do_not_pause_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = []
    for _ in range(2):
        clock = Clock(monkeypatch)
        insist("x", failing(5, clock), UserError)
        pauses.append(clock.pauses)
    assert pauses[0] != pauses[1]


def pieces(clock: Clock, *parts: tuple[float, int]) -> Callable[[int], bytes]:
    """A body in (seconds, bytes), each of which comes at once after so long."""
    left = list(parts)

    def read1(most: int) -> bytes:
        if not left:
            return b""
        seconds, size = left.pop(0)
        assert size <= most
        clock.now += seconds
        return b"x" * size

    return read1


PACE = Pace(num_bytes=100, window_s=10)


@pytest.mark.parametrize(
    "parts",
    [
        (),
        [(1.0, 10)],
        # slow, but each window has its bytes
        [(9.0, 100)] * 20,
        [(3.0, 40)] * 50,
        # the last few may come late, as long as that is no whole window
        [(1.0, 100), (10.0, 1)],
    ],
)
def test_a_body_that_keeps_its_pace_is_read_whole(
    parts: list[tuple[float, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    assert len(read_steadily(pieces(clock, *parts), pace=PACE)) == sum(size for _, size in parts)


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ([(1.0, 1)] * 10**4, "11 bytes in 11 s"),
        # a fast beginning is no credit
        ([(0.0, 2**18)] * 50 + [(1.0, 1)] * 10**4, "11 bytes in 11 s"),
        ([(2.0, 15)] * 100, "90 bytes in 12 s"),
    ],
)
def test_a_body_that_is_too_slow_is_given_up(
    parts: list[tuple[float, int]], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    with pytest.raises(TryAgain, match="it comes too slowly") as caught:
        read_steadily(pieces(clock, *parts), pace=PACE)
    assert told in str(caught.value)


def given(*pieces: bytes) -> Read1:
    coming = iter(pieces)
    return lambda _: next(coming, b"")


@pytest.mark.parametrize("expected", [0, 1, 299, 300, 301, 10**6, 2**26, 2**62])
def test_a_body_is_what_came_whatever_was_expected(expected: int) -> None:
    whole = b"a" * 100 + b"b" * 200
    assert read_steadily(given(whole[:100], whole[100:]), expected) == whole
    read = read_steadily_hashed(Buffers().bytes, given(whole[:100], whole[100:]), expected)
    assert read == hashed(whole)


def test_a_servers_word_takes_no_more_memory_than_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "_MOST_TRUSTED", 1000)
    asked: list[int] = []

    def memory(num_bytes: int) -> memoryview:
        asked.append(num_bytes)
        return memoryview(bytearray(num_bytes))

    pieces = [bytes([number]) * 700 for number in range(7)]
    whole = b"".join(pieces)
    assert read_steadily_hashed(memory, given(*pieces), 10**12) == hashed(whole)
    # twice as much as there was
    assert asked == [1000, 2000, 4000, 8000]
    # but no more than what was said
    asked.clear()
    assert len(read_steadily_hashed(memory, given(*pieces), 4900)) == 4900
    assert asked == [1000, 2000, 4000, 4900]
    asked.clear()
    # and of one that says nothing all at once
    assert read_steadily_hashed(memory, given(*pieces), 0) == hashed(whole)
    assert asked == [4900]
