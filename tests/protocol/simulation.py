"""A machine made of values: explores every interleaving of programs that run the shipped protocol.

Threads run generators of `tolaria.protocol` next to simple writers and readers. A device has streams (FIFO queues of
single-variable reads, writes and copies), stream events and context-wide events; a machine without streams performs a
copy variable by variable in its caller, so that it can be seen half done. Breadth-first search, so that the first
violation found has a shortest schedule.

A running generator is not copied: it is (factory, results so far) and is run again from the start when its next step is
needed. That works because protocols keep nothing but what they were sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from tolaria import ring
from tolaria.admission import close_section, open_section
from tolaria.operations import (
    Await,
    CallerWait,
    CaptureHost,
    Change,
    Check,
    ContextRecord,
    ContextWait,
    Copy,
    Direction,
    Examine,
    HostState,
    Inspect,
    Inspection,
    Part,
    Places,
    Reserve,
    RestoreHost,
    SectionKind,
    StreamRecord,
    StreamWait,
    Survey,
    Synchronize,
)

VARIABLES = ("p0", "p1")
OWN = "R"  # the governor's own stream


@dataclass(frozen=True, slots=True)
class Launch:
    """One device operation of a program: `write` a value to a variable, or `read` it into the thread's observations."""

    stream: str
    kind: str
    variable: str
    value: str = ""
    order: int = 0


@dataclass(frozen=True, slots=True)
class Handover:
    """A program's own event: later work of stream `target` waits for what stream `source` was given so far."""

    source: str
    target: str


@dataclass(frozen=True, slots=True)
class World:
    """The whole machine, a value.

    `progress[i]` are the results thread i was sent so far (an exception marks a throw); `queues` hold what was launched
    and has not run; `done` counts what has run per stream; an event is a tuple of (stream, count) it waits for.
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


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a search found.

    Attributes:
        states: Distinct states visited.
        violation: The first bad end, None when there is none.
        schedule: The steps that lead to it, shortest possible.
        ends: All (memory, observations) of good and bad ends.
    """

    states: int
    violation: str | None
    schedule: tuple[str, ...]
    ends: frozenset[tuple[tuple[str, ...], tuple[tuple[int, str, str], ...]]]


Program = Callable[[], Iterator[Any]]
Mutant = Callable[[Any], bool]


def writer(thread: int, value: str, stream: str = "", gated: bool = True) -> Program:
    """An optimizer step of two launches: writes `value` to every variable, in a write section unless `gated` is off."""

    def program() -> Iterator[Any]:
        if gated:
            yield from open_section(thread, SectionKind.WRITE, False)
        for variable in VARIABLES:
            yield Launch(stream, "write", variable, value)
        if gated:
            yield from close_section(thread, 0)

    return program


def reader(thread: int, stream: str = "", gated: bool = True) -> Program:
    """A forward of two launches: reads every variable, inside a forward section unless `gated` is off."""

    def program() -> Iterator[Any]:
        if gated:
            yield from open_section(thread, SectionKind.FORWARD, False)
        for variable in VARIABLES:
            yield Launch(stream, "read", variable)
        if gated:
            yield from close_section(thread, 0)

    return program


class Machine:
    """Explores programs.

    Args:
        programs: One per thread; thread numbers are their indices.
        homes: The stream on which each thread launches, empty for the governor's threads; None: a machine without
            queues (CPU).
        initial: Host state; its ring tells which slots hold something.
        slots: Contents of the slots.
        drop: Mutant: operations for which it answers True are not performed.
    """

    def __init__(
        self,
        programs: list[Program],
        homes: tuple[str, ...] | None = None,
        initial: HostState | None = None,
        slots: tuple[tuple[str, ...], ...] = (("S", "S"), ("-", "-"), ("-", "-")),
        drop: Mutant = lambda op: False,
    ) -> None:
        self.programs, self.drop = programs, drop
        self.homes = homes
        self.streams = (*dict.fromkeys(filter(None, homes)), OWN) if homes is not None else ()
        self.initial = initial if initial is not None else HostState(ring=good_ring(len(slots)), next_snapshot=1)
        self.slots = slots

    # ------------------------------------------------------------ search

    def explore(self, is_good: Callable[[World], bool]) -> Outcome:
        """Visit every reachable state; an end is good if every thread finished, every queue is empty and `is_good`."""
        count = len(self.programs)
        start = World(
            self.initial, ("O",) * len(VARIABLES), self.slots, ((),) * count, (0,) * count,
            tuple((s, ()) for s in self.streams), tuple((s, 0) for s in self.streams),
            tuple((s, 0) for s in self.streams), (), (None,) * count,
        )  # fmt: skip
        parents: dict[World, tuple[World, str] | None] = {start: None}
        frontier = deque([start])
        ends = set()
        violation: tuple[World, str] | None = None
        while frontier:
            world = frontier.popleft()
            moves = list(self._moves(world))
            if not moves:
                ends.add((world.memory, world.seen))
                stuck = any(done is None for done in world.finished) or any(queue for _, queue in world.queues)
                wrong = "deadlock" if stuck else None if is_good(world) else "torn"
                if wrong and violation is None:
                    violation = (world, wrong)
            for label, after in moves:
                if after not in parents:
                    parents[after] = (world, label)
                    frontier.append(after)
        return Outcome(
            len(parents),
            f"{violation[1]}: memory {violation[0].memory}, seen {violation[0].seen}" if violation else None,
            _path(parents, violation[0]) if violation else (),
            frozenset(ends),
        )

    def _moves(self, world: World) -> Iterator[tuple[str, World]]:
        for thread in range(len(self.programs)):
            if world.finished[thread] is None:
                yield from self._host_moves(world, thread)
        for stream, queue in world.queues:
            if queue:
                after = self._device_step(world, stream, queue)
                if after is not None:
                    yield f"{stream}: {queue[0]}", after

    # ------------------------------------------------------------ host

    def _host_moves(self, world: World, thread: int) -> Iterator[tuple[str, World]]:
        op = self._next(world, thread)
        if isinstance(op, _End):
            yield f"T{thread}: end", replace(world, finished=_at(world.finished, thread, op))
            return
        label = f"T{thread}: {getattr(op, 'label', op)}"
        if self.drop(op):
            yield f"{label} (dropped)", self._sent(world, thread, _default(op))
        elif isinstance(op, Change | Await):
            try:
                answer = op.function(world.host)
            except Exception as error:
                yield f"{label} raises", self._sent(world, thread, _Thrown(type(error).__name__, error))
                return
            if answer is not None:
                host, result = answer
                result = (result, 0.0) if isinstance(op, Await) else result
                yield label, self._sent(replace(world, host=host), thread, result)
        elif isinstance(op, Copy) and not self.streams:
            yield from self._copy_here(world, thread, op, label)
        elif isinstance(op, Launch) and not self.streams:
            yield label, self._sent(self._apply(world, op, thread), thread, None)
        else:
            yield from self._device_call(world, thread, op, label)

    def _copy_here(self, world: World, thread: int, op: Copy, label: str) -> Iterator[tuple[str, World]]:
        """Without streams a copy runs in its caller, one variable after the other."""
        micro = _micro_copies(op)
        done = world.partial[thread]
        if done == len(micro):
            yield f"{label} done", self._sent(replace(world, partial=_at(world.partial, thread, 0)), thread, None)
            return
        after = self._apply(world, micro[done], thread)
        yield f"{label} {micro[done][2]}", replace(after, partial=_at(after.partial, thread, done + 1))

    def _device_call(self, world: World, thread: int, op: Any, label: str) -> Iterator[tuple[str, World]]:
        if isinstance(op, Survey | Check):
            places = Places(queued=("dev",)) if self.streams else Places(host=("dev",))
            yield label, self._sent(world, thread, places)
        elif isinstance(op, Reserve | CaptureHost | RestoreHost | Examine):
            yield label, self._sent(world, thread, None)
        elif isinstance(op, Inspect):
            yield label, self._sent(world, thread, Inspection())
        elif isinstance(op, Synchronize):
            if not any(queue for _, queue in world.queues):
                yield label, self._sent(world, thread, None)
        elif isinstance(op, ContextRecord):
            yield label, self._sent(world, thread, world.launched)
        elif isinstance(op, StreamRecord):
            yield label, self._sent(world, thread, ((OWN, dict(world.launched)[OWN]),))
        elif isinstance(op, ContextWait):
            after = world
            for stream in self.streams:
                after = self._enqueue(after, stream, ("wait", op.event or ()))
            yield label, self._sent(after, thread, None)
        elif isinstance(op, StreamWait):
            yield label, self._sent(self._enqueue(world, OWN, ("wait", op.event or ())), thread, None)
        elif isinstance(op, CallerWait):
            own = self.homes[thread] if self.homes else ""
            yield label, self._sent(self._enqueue(world, own, ("wait", op.event)) if own else world, thread, None)
        elif isinstance(op, Copy):
            after = world
            for micro in _micro_copies(op):
                after = self._enqueue(after, OWN, micro)
            yield label, self._sent(after, thread, None)
        elif isinstance(op, Launch):
            yield label, self._sent(self._enqueue(world, op.stream, (op, thread)), thread, None)
        elif isinstance(op, Handover):
            event = ((op.source, dict(world.launched).get(op.source, 0)),)
            yield (
                label,
                self._sent(self._enqueue(world, op.target, ("wait", event)) if self.streams else world, thread, None),
            )
        else:
            raise AssertionError(f"the simulation has no answer to {op}")

    def _next(self, world: World, thread: int) -> Any:
        """Run the program again up to its next operation."""
        program: Any = self.programs[thread]()
        try:
            op = next(program)
            for result in world.progress[thread]:
                op = program.throw(result.error) if isinstance(result, _Thrown) else program.send(result)
        except StopIteration:
            return _End("returned")
        except Exception as error:
            return _End(type(error).__name__)
        _dispose(program)
        return op

    def _sent(self, world: World, thread: int, result: Any) -> World:
        return replace(world, progress=_at(world.progress, thread, (*world.progress[thread], result)))

    # ------------------------------------------------------------ device

    def _enqueue(self, world: World, stream: str, item: Any) -> World:
        queues = tuple((s, (*q, item) if s == stream else q) for s, q in world.queues)
        launched = tuple((s, n + (s == stream)) for s, n in world.launched)
        return replace(world, queues=queues, launched=launched)

    def _device_step(self, world: World, stream: str, queue: tuple[Any, ...]) -> World | None:
        item = queue[0]
        done = dict(world.done)
        if item[0] == "wait" and any(done[s] < n for s, n in item[1]):
            return None
        after = world
        if item[0] == "copy":
            after = self._apply(world, item, -1)
        elif isinstance(item[0], Launch):
            after = self._apply(world, item[0], item[1])
        queues = tuple((s, q[1:] if s == stream else q) for s, q in after.queues)
        return replace(after, queues=queues, done=tuple((s, n + (s == stream)) for s, n in after.done))

    def _apply(self, world: World, op: Any, thread: int) -> World:
        if isinstance(op, Launch):
            index = VARIABLES.index(op.variable)
            if op.kind == "write":
                return replace(world, memory=_at(world.memory, index, op.value))
            return replace(world, seen=(*world.seen, (thread, op.variable, world.memory[index])))
        _, slot, variable, direction = op
        index = VARIABLES.index(variable)
        if direction is Direction.RESTORE:
            return replace(world, memory=_at(world.memory, index, world.slots[slot][index]))
        return replace(world, slots=_at(world.slots, slot, _at(world.slots[slot], index, world.memory[index])))


@dataclass(frozen=True, slots=True)
class _Thrown:
    name: str
    error: Exception


@dataclass(frozen=True, slots=True)
class _End:
    how: str


def _dispose(program: Any) -> None:
    """Let go of a suspended run. Its clean-up steps are yielded too, which `close` objects to; nobody performs them."""
    while True:
        try:
            program.close()
        except RuntimeError:
            continue
        return


def _micro_copies(op: Copy) -> tuple[Any, ...]:
    return tuple(("copy", op.slot, v, op.direction) for v in VARIABLES) if op.part is Part.REST else ()


def _default(op: Any) -> Any:
    return (None, 0.0) if isinstance(op, Await) else None


def _at(values: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    return (*values[:index], value, *values[index + 1 :])


def _path(parents: dict[World, tuple[World, str] | None], world: World) -> tuple[str, ...]:
    steps = []
    link = parents[world]
    while link is not None:
        world, label = link
        steps.append(label)
        link = parents[world]
    return tuple(reversed(steps))


def good_ring(num_slots: int) -> ring.Ring:
    """A ring whose first slot holds a certified snapshot."""
    slots, index = ring.claim(ring.empty_ring(num_slots), 0, 0, False) or ((), 0)
    slots = ring.seal(ring.publish(slots, index), index, 0)
    return ring.certify(slots, index, 0)
