"""What the driver needs to know of a server, whichever it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from infra.local.layout import Stack


@dataclass(frozen=True, eq=False)
class Component:
    """One server of the stack."""

    name: str  # in the state file and in the name of its log
    title: str  # for people
    ports: tuple[str, ...]  # names of the ports that it listens on
    needs: tuple[str, ...]  # names of other servers' ports that it was told at its start
    command: Callable[[Stack], list[str]]
    probe: Callable[[Stack], str | None]  # None if it answers well, else what is wrong
    stop_grace_s: float
    environment: dict[str, str] = field(default_factory=dict)
    passing_failures: tuple[
        str, ...
    ] = ()  # lower-case words of its log after which another try may do better
