"""Protocols that tolaria does not use, and what is wrong with them: why the shipped one has the parts it has.

Each is a few lines over the same simulated machine: a governor that restores slot 0 (or fills slot 1), a step of two
launches by another thread, and mostly a mutex. The shipped protocol is checked in `catalog`; this is the table of what
else one might think of.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any

from tolaria.operations import (
    Await,
    Change,
    ContextRecord,
    ContextWait,
    Copy,
    Direction,
    Events,
    HostState,
    HostWait,
    Part,
    StreamRecord,
    StreamWait,
)
from tolaria.testing.programs import handover, in_turn, is_uniform, reads, uniform, writes
from tolaria.testing.simulator import Machine
from tolaria.testing.world import OWN, QUEUED, Close, Fused, Launch, Open, Program, Record, WaitFor, World

Steps = Generator[Any, Any, None]
GOVERNOR = 9  # the governor's number in the mutex

# ---------------------------------------------------------------- parts of a governor


def locked(thread: int, *inside: Program) -> Program:
    """Programs under a mutex."""

    def lock(state: HostState) -> tuple[HostState, None] | None:
        if state.gate.owner is not None:
            return None
        return replace(state, gate=replace(state.gate, owner=thread)), None

    def run() -> Steps:
        yield Await("lock", lock)
        for one in inside:
            yield from one()
        yield Change("unlock", lambda s: (replace(s, gate=replace(s.gate, owner=None)), None))

    return run


def pre() -> Steps:
    """The copies wait for everything launched so far."""
    event = yield ContextRecord(QUEUED)
    yield StreamWait(QUEUED, event)


def post() -> Steps:
    """Everything launched from now on waits for the copies."""
    event = yield StreamRecord(QUEUED)
    yield ContextWait(QUEUED, event)


def restore() -> Steps:
    """Copy slot 0 back."""
    yield Copy(0, QUEUED, Part.REST, Direction.RESTORE)


def capture() -> Steps:
    """Copy into slot 1."""
    yield Copy(1, QUEUED, Part.REST, Direction.CAPTURE)


def capture_and_note() -> Steps:
    """Copy into slot 1 and tell writers when that is done."""
    yield from capture()
    event = yield StreamRecord(QUEUED)
    yield Change("publish `done`", lambda s: (replace(s, all_done=((QUEUED, event),)), None))


full = in_turn(pre, restore, post)


def after_done(stream: str) -> Program:
    """A writer's stream waits for the copies of the last snapshot."""

    def run() -> Steps:
        pending: Events = yield Change("look for `done`", lambda s: (s, s.all_done))
        for _, event in pending:
            yield WaitFor(stream, event)

    return run


def loop(*streams: str) -> Program:
    """A barrier made of the streams that are known, one by one, around the copies."""
    before = [handover(stream, OWN) for stream in streams]
    after = [handover(OWN, stream) for stream in streams]
    return in_turn(*before, restore, *after)


# ---------------------------------------------------------------- a counter instead of a lock


def counted(thread: int, *inside: Program) -> Program:
    """Programs between two increments of a counter of the thread's own, which is odd inside."""

    def count(state: HostState) -> tuple[HostState, None]:
        counts = dict(state.running)
        counts[thread] = counts.get(thread, 0) + 1
        return replace(state, running=tuple(sorted(counts.items()))), None

    def run() -> Steps:
        yield Change("count up", count)
        for one in inside:
            yield from one()
        yield Change("count up", count)

    return run


def repeated(attempt: Program, most: int = 3) -> Program:
    """Repeat an attempt until no counter has moved meanwhile. Nobody is kept out."""

    def even(state: HostState) -> tuple[HostState, Any] | None:
        return None if any(count % 2 for _, count in state.running) else (state, state.running)

    def run() -> Steps:
        for _ in range(most):
            before, _waited = yield Await("wait until every counter is even", even)
            yield from attempt()
            now = yield Change("look at the counters", lambda s: (s, s.running))
            if now == before:
                return

    return run


# ---------------------------------------------------------------- users


def fused(value: str, stream: str) -> Program:
    """Both variables by one launch."""

    def run() -> Steps:
        yield Fused(tuple(Launch(stream, "write", variable, value) for variable in ("p0", "p1")))

    return run


def split(value: str, *streams: str) -> Program:
    """A step whose launches go to one stream each."""

    def run() -> Steps:
        for variable, stream in zip(("p0", "p1"), streams, strict=True):
            yield Launch(stream, "write", variable, value)

    return run


def fused_read(stream: str) -> Program:
    """A forward of one launch."""

    def run() -> Steps:
        yield Fused(tuple(Launch(stream, "read", variable) for variable in ("p0", "p1")))

    return run


def gathering(*, through: str) -> Program:
    """A step, an event behind it, and a gather on another stream that waits for that event only."""

    def run() -> Steps:
        event: Any = ()

        def behind_the_step() -> Steps:
            yield WaitFor(through, event)

        yield from locked(0, writes("N", "A"))()
        event = yield Record("A")
        yield from locked(0, behind_the_step, reads(through))()

    return run


def wait_before_record() -> Steps:
    """The wait first, the record later, with the governor's own stream held back meanwhile."""
    yield Close(OWN)
    done = yield StreamRecord(QUEUED)
    yield ContextWait(QUEUED, done)
    before = yield ContextRecord(QUEUED)
    yield HostWait(QUEUED, tuple(pair for pair in before if pair[0] == 0))
    yield from restore()
    yield Open()


# ---------------------------------------------------------------- the table


@dataclass(frozen=True, slots=True)
class Design:
    """One protocol and what comes of it.

    Attributes:
        name: Unique.
        threads: Programs with the streams that they launch on.
        is_good: What would have to hold.
        expected: ``"sound"``, or how the violation begins.
    """

    name: str
    threads: tuple[tuple[Program, str], ...]
    expected: str
    is_good: Callable[[World], bool]

    def machine(self) -> Machine:
        """The machine to explore."""
        return Machine([program for program, _ in self.threads], tuple(stream for _, stream in self.threads))


def _slot_is_whole(world: World) -> bool:
    return is_uniform(world.slots[1])


_whole = uniform("S", "N", "M", "O")
_w, _gov = writes("N", "A"), ""


def _rollback(name: str, governor: Program, expected: str, *users: tuple[Program, str]) -> Design:
    return Design(name, (*(users or ((_w, "A"),)), (governor, _gov)), expected, _whole)


def _snapshot(name: str, governor: Program, expected: str, *users: Program) -> Design:
    return Design(name, (*((program, "A") for program in users), (governor, _gov)), expected, _slot_is_whole)


_MINE, _TORN, _SOUND = (locked(0, _w), "A"), "torn", "sound"


def alone(*parts: Program) -> Program:
    """The parts of a governor under the mutex."""
    return locked(GOVERNOR, *parts)


def _barriers() -> Iterator[Design]:
    yield _rollback("no ordering", restore, _TORN)
    yield _rollback("lock only", alone(restore), _TORN, _MINE)
    yield _rollback("lock, pre only", alone(pre, restore), _TORN, _MINE)
    yield _rollback("lock, post only", alone(restore, post), _TORN, _MINE)
    yield _rollback("pre and post, no lock, step of two launches", full, _TORN)
    yield _rollback("pre and post, no lock, step of one launch", full, _TORN, (fused("N", "A"), "A"))
    twice = in_turn(pre, restore, pre, restore, post)
    yield _rollback("double copy, no lock, step of two launches", twice, _TORN)
    yield _rollback("double copy, no lock, step of one launch", twice, _TORN, (fused("N", "A"), "A"))
    yield _rollback("wait before record", wait_before_record, "deadlock")
    yield _rollback("pre, post and lock", alone(full), _SOUND, _MINE)


def _counters() -> Iterator[Design]:
    yield _rollback("counters and retry", repeated(full), _SOUND, (counted(0, _w), "A"))
    yield _rollback(
        "counters and retry, two writers of one launch on two streams",
        repeated(full),
        _SOUND,
        (counted(0, fused("N", "A")), "A"),
        (counted(1, fused("N", "B")), "B"),
    )
    forward = fused_read("A")
    yield _rollback(
        "counters and retry, then a forward", repeated(full), _TORN, (in_turn(counted(0, _w), forward), "A")
    )
    yield _rollback(
        "counters and retry, then a counted forward",
        repeated(full),
        _TORN,
        (in_turn(counted(0, _w), counted(0, forward)), "A"),
    )
    yield _rollback("counters and retry, one writer does not count", repeated(full), _TORN)
    yield _rollback("all three, then a forward outside the lock", alone(full), _TORN, (in_turn(_MINE[0], forward), "A"))
    yield _rollback(
        "all three, then a forward inside the lock", alone(full), _SOUND, (in_turn(_MINE[0], locked(0, forward)), "A")
    )


def _streams() -> Iterator[Design]:
    yield _rollback("loop over known streams, lock: A", alone(loop("A")), _SOUND, _MINE)
    both_streams = (locked(0, split("N", "A", "B")), "A")
    yield _rollback(
        "loop over known streams, lock: A and B", alone(loop("A", "B")), _SOUND, both_streams, (in_turn(), "B")
    )
    yield _rollback(
        "loop over known streams, lock: B is not known", alone(loop("A")), _TORN, both_streams, (in_turn(), "B")
    )
    elsewhere = (locked(0, writes("N", "B")), "B")
    yield _rollback("the caller's current stream only, lock", alone(loop("A")), _TORN, elsewhere, (in_turn(), "A"))
    yield _rollback("pre and post, no lock, a forward of two launches", full, _TORN, (reads("A"), "A"))
    yield _rollback("all three, a forward of two launches", alone(full), _SOUND, (locked(0, reads("A")), "A"))
    yield _rollback(
        "a gather that waits for the step's event, post for the step's stream only",
        alone(pre, restore, handover(OWN, "A")),
        _TORN,
        (gathering(through="G"), "A"),
        (in_turn(), "G"),
    )
    yield _rollback(
        "a gather that waits for the step's event, post for all",
        alone(full),
        _SOUND,
        (gathering(through="G"), "A"),
        (in_turn(), "G"),
    )


def _snapshots() -> Iterator[Design]:
    yield _snapshot("snapshot: lock only", alone(capture), _TORN, locked(0, _w))
    yield _snapshot("snapshot: lock, pre only", alone(pre, capture), _TORN, locked(0, _w))
    yield _snapshot("snapshot: pre and post, no lock", in_turn(pre, capture, post), _TORN, _w)
    yield _snapshot(
        "snapshot: lock, pre, writers wait for `done`",
        alone(pre, capture_and_note),
        _SOUND,
        locked(0, after_done("A"), _w),
    )
    yield _snapshot(
        "snapshot: lock, pre, all streams wait for `done`", alone(pre, capture, post), _SOUND, locked(0, _w)
    )


DESIGNS: dict[str, Design] = {
    design.name: design for design in (*_barriers(), *_counters(), *_streams(), *_snapshots())
}
"""By name, in the order of the table."""
