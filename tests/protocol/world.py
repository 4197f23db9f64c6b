"""The values that `protocol.simulation` works on: what programs may ask for, the state of the machine, and findings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tolaria.operations import HostState

VARIABLES = ("p0", "p1")
OWN = "R"  # the governor's own stream
QUEUED, HOST = "dev", "cpu"


@dataclass(frozen=True, slots=True)
class Launch:
    """One device operation of a program: `write` a value to a variable, or `read` it into the thread's observations."""

    stream: str
    kind: str
    variable: str
    value: str = ""


@dataclass(frozen=True, slots=True)
class Handover:
    """A program's own event: later work of stream `target` waits for what stream `source` was given so far."""

    source: str
    target: str


@dataclass(frozen=True, slots=True)
class CaptureBegins:
    """From here on what the thread launches is recorded in a graph instead of executed."""

    graph: str


@dataclass(frozen=True, slots=True)
class CaptureEnds:
    """The thread's capture is over; its graph can be replayed."""


@dataclass(frozen=True, slots=True)
class Replay:
    """Launch everything that a graph recorded, by one call of the host."""

    stream: str
    graph: str


@dataclass(frozen=True, slots=True)
class World:
    """The whole machine, a value.

    `progress[i]` are the results thread i was sent so far (an exception marks a throw); `queues` hold what was launched
    and has not run; `done` counts what has run per stream; an event is a tuple of (stream, count) it waits for.

    `captures` in progress are (thread, graph, recorded); `graphs` are those finished. `spoiled` says how one of them
    was invalidated. `readings` are (snapshot, values read so far); `examined` says which one waits per slot, `digests`
    are those taken per slot; `taking` (per thread) and `held` (snapshot, variable, value) are what the checker itself
    remembers of snapshots.
    """

    host: HostState
    memory: tuple[str, ...]
    slots: tuple[tuple[str, ...], ...]
    progress: tuple[tuple[Any, ...], ...]
    partial: tuple[int, ...]
    queues: tuple[tuple[str, tuple[Any, ...]], ...]
    done: tuple[tuple[str, int], ...]
    launched: tuple[tuple[str, int], ...]
    seen: tuple[tuple[int, str, str], ...]
    finished: tuple[Any, ...]
    captures: tuple[tuple[int, str, tuple[Any, ...]], ...] = ()
    graphs: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    spoiled: str = ""
    readings: tuple[tuple[int, tuple[str, ...]], ...] = ()
    examined: tuple[int, ...] = ()
    digests: tuple[tuple[str, ...] | None, ...] = ()
    taking: tuple[int, ...] = ()
    held: frozenset[tuple[int, str, str]] = frozenset()

    def is_capturing(self, thread: int) -> bool:
        return any(capturing == thread for capturing, _, _ in self.captures)


End = tuple[tuple[str, ...], tuple[tuple[int, str, str], ...], tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a search found.

    Attributes:
        states: Distinct states visited. A search stops at the first violation.
        violation: The first bad end, None when there is none.
        schedule: The steps that lead to it, shortest possible.
        ends: All (memory, observations, how each thread ended) of ends.
    """

    states: int
    violation: str | None
    schedule: tuple[str, ...]
    ends: frozenset[End]


Program = Callable[[], Iterator[Any]]
Mutant = Callable[[Any], bool]
