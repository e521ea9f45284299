"""What a verification finds, whatever it looked at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Progress = Callable[[int, int], None]
"""Told how much is done, and of how much."""


@dataclass(frozen=True)
class Problem:
    """What is wrong with an object; `sample` is the key of the one it concerns, or None; `likewise` are the keys of
    the object's other samples that it stands for.
    """

    object: str
    sample: str | None
    reason: str
    likewise: tuple[str, ...] = ()

    def __str__(self) -> str:
        which = "" if self.sample is None else f"sample {self.sample!r}: "
        rest = f" … and {counted(len(self.likewise), 'more sample')} likewise" if self.likewise else ""
        return f"{self.object}: {which}{self.reason}{rest}"


def counted(number: int, noun: str) -> str:
    """ "1 shard", "2 shards"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


@dataclass(frozen=True)
class Verified:
    """What was found at an address.

    `identity`: what of its content other things name. `looked`: how much was looked at, in the order to be told.
    `problems`: in the order of the objects. `notes`: what is worth knowing and no damage. `advice`: what to
    do about the problems, in one line, or "".
    """

    kind: str
    uri: str
    identity: str
    looked: Mapping[str, int]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = ()
    advice: str = ""

    def summary(self, deep: bool) -> dict[str, Any]:
        """The result as plain values, to be written as JSON."""
        return {
            "kind": self.kind,
            "uri": self.uri,
            "identity": self.identity,
            "deep": deep,
            **self.looked,
            "whole": not self.problems,
            "problems": [vars(problem) for problem in self.problems],
            "notes": list(self.notes),
            "advice": self.advice,
        }


def problem_of(error: Exception, where: str) -> Problem:
    """An error whose message mostly begins with the object, or with the prefix that it is missing from, as a
    problem of one line.
    """
    text = " ".join(str(error).split())
    for named in (where, where.rpartition("/")[0]):
        if text.startswith(f"{named}: "):
            return Problem(named, None, text.removeprefix(f"{named}: "))
    return Problem(where, None, text)
