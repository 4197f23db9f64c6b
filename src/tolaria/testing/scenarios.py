"""The programs that `tolaria verify` explores: small, named, each with what must hold at every end.

A scenario is a list of threads. Those that run a snapshot or a rollback are marked, so that a mutant (`mutants`) can
change the governor and leave the users alone, or the other way round.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from tolaria import ring
from tolaria.operations import Barrier, HostState
from tolaria.testing.alter import altered
from tolaria.testing.simulator import Machine
from tolaria.testing.world import NO_FAULTS, VARIABLES, Faults, Mutant, Program, World

EVERY = tuple(Barrier)
QUEUES = (Barrier.BLOCKING, Barrier.CONTEXT, Barrier.STREAMS)
EVENTS = (Barrier.CONTEXT, Barrier.STREAMS)
CONTEXT_ONLY = (Barrier.CONTEXT,)
STREAMS_ONLY = (Barrier.STREAMS,)
UNSEALED = None


@dataclass(frozen=True, slots=True)
class Thread:
    """One thread of a scenario.

    Attributes:
        program: What it runs.
        stream: The stream that is current there; empty for none.
        governs: It runs a snapshot or a rollback.
    """

    program: Program
    stream: str = ""
    governs: bool = False


def user(program: Program, stream: str = "A") -> Thread:
    """A thread that trains."""
    return Thread(program, stream)


def governor(program: Program, stream: str = "") -> Thread:
    """A thread that takes a snapshot or rolls back."""
    return Thread(program, stream, governs=True)


@dataclass(frozen=True, slots=True)
class Removal:
    """What a mutant takes away. Nothing, unless said otherwise.

    Attributes:
        drop: Operations that are not performed, whoever asks for them.
        faults: What is wrong with whoever performs the operations.
        governs: Changes a program of the governor.
        uses: Changes a program of a user.
        within: Entered while the search runs.
    """

    drop: Mutant | None = None
    faults: Faults = NO_FAULTS
    governs: Callable[[Program], Program] | None = None
    uses: Callable[[Program], Program] | None = None
    within: Callable[[], AbstractContextManager[Any]] = nullcontext


NOTHING = Removal()


def alters(change: Callable[[Any], Any]) -> Callable[[Program], Program]:
    """For `Removal`: every operation of a program goes through `change`."""
    return lambda program: altered(program, change)


@dataclass(frozen=True, slots=True)
class Held:
    """What the slots hold at the start.

    Attributes:
        snapshots: One letter for each: the oldest ones are certified, later ones are manual.
        digests: Other letters than those: bytes that have changed since they were sealed.
        free: Empty slots besides.
        certified: How many of the snapshots are, from the oldest on.
        host: Empty slots of the host tier; the others are of the device tier then. None: there is one tier only.
        modelled: Readings are modelled. Without, they are performed at once and find nothing.
    """

    snapshots: tuple[str, ...] = ("S",)
    digests: tuple[str, ...] = ()
    free: int = 2
    modelled: bool = False
    certified: int = 1
    host: int = 0

    def options(self, width: int) -> dict[str, Any]:
        """For `Machine`, with `width` variables."""
        count, free = len(self.snapshots) + self.free, self.free + self.host
        tier = ring.Tier.DEVICE if self.host else ring.Tier.HOST
        slots = ring.empty_ring(self.host, count) if self.host else ring.empty_ring(count)
        for serial in range(len(self.snapshots)):
            slots, index = ring.claim(slots, serial, serial, serial >= self.certified, tier) or (slots, -1)
            slots = ring.seal(ring.publish(slots, index, completed=serial), index, serial)
            slots = slots if serial >= self.certified else ring.certify(slots, index, serial)
        contents = tuple((value,) * width for value in (*self.snapshots, *"-" * free))
        found: dict[str, Any] = {
            "initial": HostState(ring=slots, next_snapshot=len(self.snapshots)),
            "slots": contents,
            "tier": tier,
        }
        if self.modelled:
            taken = tuple((value,) * width for value in self.digests or self.snapshots)
            found["digests"] = (*taken, *((UNSEALED,) * free))
        return found


@dataclass(frozen=True, slots=True)
class Scenario:
    """One program for the checker.

    Attributes:
        name: Unique.
        says: What is checked, in one sentence.
        threads: What runs, for a barrier.
        is_good: What must hold at every end.
        barriers: Those it makes sense with.
        variables: What there is; see `simulator`.
        held: What the slots hold at the start.
        options: Further ones for `Machine`.
    """

    name: str
    says: str
    threads: Callable[[Barrier], list[Thread]]
    is_good: Callable[[World], bool]
    barriers: tuple[Barrier, ...] = EVERY
    variables: tuple[str, ...] = VARIABLES
    held: Held = Held()
    options: dict[str, Any] = field(default_factory=dict)

    def machine(self, barrier: Barrier, removal: Removal = NOTHING, reduced: bool = True) -> Machine:
        """The machine to explore."""
        threads = self.threads(barrier)
        programs = [_changed(thread, removal) for thread in threads]
        held = self.held.options(len(self.variables))
        if barrier is Barrier.STREAMS:
            held["initial"] = replace(held["initial"], streams=())
        return Machine(
            programs,
            None if barrier is Barrier.HOST else tuple(thread.stream for thread in threads),
            drop=removal.drop,
            faults=removal.faults,
            variables=self.variables,
            reduced=reduced,
            second=barrier.has_events and bool(self.held.host),
            **{**held, **self.options},
        )

    def bounds(self, barrier: Barrier) -> str:
        """The size of the program, in words."""
        machine = self.machine(barrier)
        threads, streams = len(machine.programs), len(machine.streams)
        return (
            f"{_count(threads, 'thread')}, {_count(streams, 'stream')}, {_count(len(self.variables), 'variable')}, "
            f"{_count(len(machine.slots), 'slot')}"
        )


def _count(number: int, name: str) -> str:
    return f"{number or 'no'} {name}{'' if number == 1 else 's'}"


def _changed(thread: Thread, removal: Removal) -> Program:
    change = removal.governs if thread.governs else removal.uses
    return thread.program if change is None else change(thread.program)
