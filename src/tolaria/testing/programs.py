"""What the threads of a simulated `Machine` run, and what its ends are expected to be. The words of a scenario."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from tolaria import ring
from tolaria.admission import begin_capture, close_section, end_capture, open_section
from tolaria.operations import Await, Barrier, Change, SectionKind
from tolaria.protocol import Ground, rollback, seal, snapshot
from tolaria.testing.world import (
    VARIABLES,
    CaptureBegins,
    CaptureEnds,
    Handover,
    Launch,
    Program,
    Replay,
    World,
)

READ, FORWARD, WRITE = SectionKind.READ, SectionKind.FORWARD, SectionKind.WRITE

# ---------------------------------------------------------------- users


def section(thread: int, kind: SectionKind, *inside: Program, in_autograd: bool = False) -> Program:
    """Programs inside a section."""

    def program() -> Iterator[Any]:
        yield from open_section(thread, kind, in_autograd)
        for one in inside:
            yield from one()
        yield from close_section(thread, 0)

    return program


def writes(value: str, stream: str = "", variables: tuple[str, ...] = VARIABLES) -> Program:
    """The launches of an optimizer step."""

    def program() -> Iterator[Any]:
        for variable in variables:
            yield Launch(stream, "write", variable, value)

    return program


def reads(stream: str = "", variables: tuple[str, ...] = VARIABLES) -> Program:
    """The launches of a forward."""

    def program() -> Iterator[Any]:
        for variable in variables:
            yield Launch(stream, "read", variable)

    return program


def writer(
    thread: int, value: str, stream: str = "", gated: bool = True, variables: tuple[str, ...] = VARIABLES
) -> Program:
    """An optimizer step of one launch per variable, in a write section unless `gated` is off."""
    launches = writes(value, stream, variables)
    return section(thread, WRITE, launches) if gated else launches


def reader(thread: int, stream: str = "", gated: bool = True, variables: tuple[str, ...] = VARIABLES) -> Program:
    """A forward of one launch per variable, inside a forward section unless `gated` is off."""
    launches = reads(stream, variables)
    return section(thread, FORWARD, launches) if gated else launches


def in_turn(*programs: Program) -> Program:
    """One thread that runs several programs."""

    def program() -> Iterator[Any]:
        for one in programs:
            yield from one()

    return program


def handover(source: str, target: str) -> Program:
    """Later work of stream `target` waits for what stream `source` was given so far; nothing to do without streams."""

    def program() -> Iterator[Any]:
        yield Handover(source, target)

    return program


def captured(thread: int, *inside: Program, graph: str = "g", in_autograd: bool = False) -> Program:
    """A graph capture with programs inside, the way `Sections` announces it."""

    def program() -> Iterator[Any]:
        yield from capture_begins(thread, graph, in_autograd)()
        try:
            for one in inside:
                yield from one()
        finally:
            yield from capture_ends(thread)()

    return program


def capture_begins(thread: int, graph: str = "g", in_autograd: bool = False) -> Program:
    """The first half of `captured`."""

    def program() -> Iterator[Any]:
        yield from begin_capture(thread, thread, in_autograd)
        yield CaptureBegins(graph)

    return program


def capture_ends(thread: int) -> Program:
    """The second half."""

    def program() -> Iterator[Any]:
        yield CaptureEnds()
        yield from end_capture(thread)

    return program


def replayed(thread: int, stream: str, graph: str = "g") -> Program:
    """A replay, in the write section that `Sections` opens around it."""

    def program() -> Iterator[Any]:
        yield Replay(stream, graph)

    return section(thread, WRITE, program)


def backward(thread: int) -> tuple[Program, Program]:
    """What to put into a section that waits for an engine thread, and at the end of what that thread runs."""

    def wait() -> Iterator[Any]:
        yield Await("wait for the engine", lambda s: (s, None) if s.running else None)

    def tell() -> Iterator[Any]:
        yield Change("the engine is done", lambda s: (replace(s, running=((thread, 0),)), None))

    return wait, tell


# ---------------------------------------------------------------- the governor's threads


def ground(barrier: Barrier) -> Ground:
    """What the protocol knows of the machine; nobody gives up waiting."""
    return Ground(barrier)


def oldest_good(slots: ring.Ring, before: int | None) -> ring.Slot | None:
    """A choice that goes as far back as possible."""
    good = [slot for slot in slots if slot.is_good and (before is None or slot.snapshot < before)]
    return min(good, key=lambda slot: slot.snapshot, default=None)


def roll_back(thread: int, barrier: Barrier, choose: Callable[..., Any] = ring.newest_good, **options: Any) -> Program:
    """The shipped rollback, by hand unless the options say otherwise."""
    return functools.partial(rollback, thread, ground(barrier), choose, "rolling back", **options)


def take(thread: int, barrier: Barrier, step: int = 1, manual: bool = False) -> Program:
    """The shipped snapshot."""
    return functools.partial(snapshot, thread, ground(barrier), step, manual)


def take_and_seal(thread: int, barrier: Barrier, manual: bool = False, step: int = 1) -> Program:
    """A snapshot, and its sealing some time later."""

    def program() -> Iterator[Any]:
        taken = yield from snapshot(thread, ground(barrier), step, manual)
        yield from seal(thread, taken.slot, taken.snapshot, manual, Ground(barrier))

    return program


def homes(barrier: Barrier, *names: str) -> tuple[str, ...] | None:
    """The streams of the threads; a host has none."""
    return None if barrier is Barrier.HOST else names


# ---------------------------------------------------------------- ends


def is_uniform(values: tuple[str, ...]) -> bool:
    """All the same."""
    return len(set(values)) == 1


def uniform(*allowed: str) -> Callable[[World], bool]:
    """Ends whose memory is one of `allowed` throughout, and whose readers saw one value each."""

    def is_good(world: World) -> bool:
        if not is_uniform(world.memory) or world.memory[0] not in allowed:
            return False
        readers = {thread for thread, _, _ in world.seen}
        return all(is_uniform(tuple(value for t, _, value in world.seen if t == thread)) for thread in readers)

    return is_good


def are_slots_uniform(world: World) -> bool:
    """Every published slot holds one value throughout."""
    held = [world.slots[slot.index] for slot in world.host.ring if slot.phase in ring.READABLE]
    return all(map(is_uniform, held))


def both(*conditions: Callable[[World], bool]) -> Callable[[World], bool]:
    """Ends that fulfil every condition."""
    return lambda world: all(condition(world) for condition in conditions)
