"""The values that `simulator` works on: what programs may ask for, the state of the machine, and moves.

Everything is a plain tuple of small values, so that a state is hashed and compared without running Python code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from tolaria.operations import HostState

VARIABLES = ("p0", "p1")
OWN = "R"  # the governor's own stream
SECOND = "Q"  # and its second one, for transfers from the device tier into the host tier
QUEUED, HOST = "dev", "cpu"

# ---------------------------------------------------------------- what programs may yield besides operations


class Launch(NamedTuple):
    """One device operation of a program: `write` a value to a variable, or `read` it into the thread's observations."""

    stream: str
    kind: str
    variable: str
    value: str = ""


class Fused(NamedTuple):
    """Several launches by one call of the host, as a kernel that works on many tensors: the device may be half done."""

    launches: tuple[Launch, ...]


class Handover(NamedTuple):
    """A program's own event: later work of stream `target` waits for what stream `source` was given so far."""

    source: str
    target: str


class Record(NamedTuple):
    """An event on a stream. Answers the event."""

    stream: str


class WaitFor(NamedTuple):
    """Later work of a stream waits for an event that `Record` has answered."""

    stream: str
    event: Any


class CaptureBegins(NamedTuple):
    """From here on what the thread launches is recorded in a graph instead of executed."""

    graph: str


class CaptureEnds(NamedTuple):
    """The thread's capture is over; its graph can be replayed."""


class Replay(NamedTuple):
    """Launch everything that a graph recorded, by one call of the host."""

    stream: str
    graph: str


class Reassign(NamedTuple):
    """The user puts other memory behind a variable (``p.data = ...``), holding `value`; the old memory is let go."""

    variable: str
    value: str


class Allocate(NamedTuple):
    """The user takes memory (the block let go last, if it is free), fills it with `value` on a stream and keeps it."""

    stream: str
    value: str


class Version(NamedTuple):
    """Answers the version counter of the parameters, which autograd compares with the one it saved."""


class Close(NamedTuple):
    """Hold a stream back until `Open`."""

    stream: str


class Open(NamedTuple):
    """Let held streams go on."""


# ---------------------------------------------------------------- the machine


class Shared:
    """One host state. Equal states are one object, so that it hashes by identity."""

    __slots__ = ("value",)

    def __init__(self, value: HostState) -> None:
        self.value = value


class Node:
    """How far a thread has come: the operation it asks for next, after one history of results.

    Equal histories are one object. A generator cannot be copied, so the program is run again for each new history.
    """

    __slots__ = ("answers", "history", "op", "sequel")

    def __init__(self, history: tuple[Any, ...], op: Any) -> None:
        self.history, self.op = history, op
        self.sequel: dict[Any, Node] = {}
        self.answers: dict[Shared, Any] = {}  # what `Change` and `Await` answer, which depends on the host state only


class Ended(NamedTuple):
    """A thread has come to its end: it returned, or the name of the error it ended with."""

    how: str


Items = tuple[tuple[Any, ...], ...]
Progress = tuple[Any, ...]


class World(NamedTuple):
    """The whole machine, a value.

    Attributes:
        shared: The host state.
        cells: Contents of all memory that live tensors are in; a variable starts in the cell of its own number.
        slots: Contents of the slots, variable by variable.
        progress: How far each thread has come.
        partial: How much of a copy that runs in its caller is done, per thread.
        queues: Per stream, what was launched and has not run.
        done: Per stream, how much has run. An event is a tuple of (stream, count) that it waits for.
        launched: Per stream, how much was launched.
        seen: What reads have found: (thread, variable, value).
        finished: How each thread ended.
        captures: In progress: (thread, graph, recorded).
        graphs: Finished ones.
        spoiled: How a capture was invalidated.
        readings: (snapshot, values read so far).
        examined: Which reading waits, per slot.
        digests: Those taken, per slot.
        taking: Per thread, the snapshot whose copies it made last; what the checker itself remembers.
        held: (snapshot, variable, value) that were captured; likewise.
        where: The cell of each variable.
        free: Cells that nobody refers to, the one let go last at the end.
        surveyed: Per thread, the cells it found at its last survey, which it refers to until it takes another.
        layouts: Per slot, the cells that it is a copy of, which it refers to.
        users: (cell, value) of memory that the user has allocated.
        version: Times that a rollback has bumped version counters.
        lives: What each reading of restored storages has found so far: (number of a variable, value).
        restored: Per slot, which of `lives` is of a rollback to it; -1 for none.
        disturbed: A rollback was told that what it restored is not what was read back.
        open: Whether held streams may go on.
        failed: An operation has failed: after so many of its parts, and one; 0 if none has.
    """

    shared: Shared
    cells: tuple[str, ...]
    slots: tuple[tuple[str, ...], ...]
    progress: tuple[Node, ...]
    partial: tuple[int, ...]
    queues: tuple[Items, ...]
    done: tuple[int, ...]
    launched: tuple[int, ...]
    seen: tuple[tuple[int, str, str], ...]
    finished: tuple[Ended | None, ...]
    where: tuple[int, ...]
    layouts: tuple[tuple[int, ...], ...]
    surveyed: tuple[tuple[int, ...], ...]
    captures: tuple[tuple[int, str, Items], ...] = ()
    graphs: tuple[tuple[str, Items], ...] = ()
    spoiled: str = ""
    readings: tuple[tuple[int, tuple[str, ...]], ...] = ()
    examined: tuple[int, ...] = ()
    digests: tuple[tuple[str, ...] | None, ...] = ()
    taking: tuple[int, ...] = ()
    held: frozenset[tuple[int, str, str]] = frozenset()
    free: tuple[int, ...] = ()
    users: tuple[tuple[int, str], ...] = ()
    version: int = 0
    lives: tuple[tuple[tuple[int, str], ...], ...] = ()
    restored: tuple[int, ...] = ()
    disturbed: bool = False
    open: bool = False
    failed: int = 0

    @property
    def host(self) -> HostState:
        return self.shared.value

    @property
    def memory(self) -> tuple[str, ...]:
        """What each variable holds."""
        return tuple(self.cells[cell] for cell in self.where)

    def is_capturing(self, thread: int) -> bool:
        return any(capturing == thread for capturing, _, _ in self.captures)


class Step(NamedTuple):
    """One thing that may happen next.

    Attributes:
        actor: ``"T0"`` for a thread, the name of a stream for a device.
        op: The operation of a thread, or the item at the head of the stream's queue.
        note: What of it, where it takes several steps or has a choice.
        after: The world afterwards.
    """

    actor: str
    op: Any
    note: str
    after: World


End = tuple[tuple[str, ...], tuple[tuple[int, str, str], ...], tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a search found.

    Attributes:
        states: Distinct states visited. A search stops at the first violation.
        schedules: How many different schedules lead through them; of a random search, how many were run.
        violation: The first bad end, None when there is none.
        steps: What leads to it, shortest possible unless the search was random.
        choices: The same as numbers, for `explorer.replay`.
        ends: All (memory, observations, how each thread ended) of ends.
        complete: Every reachable state was visited, or a violation was found.
    """

    states: int
    schedules: int
    violation: str | None
    steps: tuple[Step, ...]
    choices: tuple[int, ...]
    ends: frozenset[End]
    complete: bool = True


Program = Callable[[], Iterator[Any]]
Mutant = Callable[[Any], bool]


@dataclass(frozen=True, slots=True)
class Faults:
    """Mutants of whoever performs the operations.

    Attributes:
        careless: `caller_wait` does not ask whether its stream is capturing.
        unbumped: Version counters stay where they are at a rollback.
        unreferenced: Nobody holds on to the memory that copies read and write.
        blind: `Check` finds that everything fits.
        trusting: `Inspect` finds every digest right.
        overtaking: The second stream does not wait for the first one.
    """

    careless: bool = False
    unbumped: bool = False
    unreferenced: bool = False
    blind: bool = False
    trusting: bool = False
    overtaking: bool = False


NO_FAULTS = Faults()


def at(values: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    """The tuple with one value replaced."""
    return (*values[:index], value, *values[index + 1 :])
