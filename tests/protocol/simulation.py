"""A machine made of values: explores every interleaving of programs that run the shipped protocol.

Threads run generators of `tolaria.protocol` and `tolaria.admission` next to simple writers, readers and graph captures
(`protocol.programs`). A device has streams (FIFO queues of single-variable reads, writes and copies), stream events and
context-wide events; a machine without streams performs a copy variable by variable in its caller, so that it can be
seen half done. Breadth-first search, so that the first violation found has a shortest schedule.

Where a variable lives is told by its first letter: ``p`` a parameter in device memory; ``b`` a buffer there; ``h`` page
-locked host memory, which both queued work and the copies of a caller touch; ``x`` an extra, moved by `CaptureHost` and
`RestoreHost` with one launch on the governor's stream.

A running generator is not copied: it is (factory, results so far) and is run again from the start when its next step is
needed. That works because protocols keep nothing but what they were sent.

One reduction: a step that neither sees nor changes anything that others see or change (`_is_quiet`, and passing a wait
whose event is over) is taken at once, alone. It commutes with every other step and disables none, so every end that
exists is still reached; such a step is in the schedule as soon as it can be.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from protocol.world import (
    HOST,
    OWN,
    QUEUED,
    VARIABLES,
    CaptureBegins,
    CaptureEnds,
    End,
    Handover,
    Launch,
    Mutant,
    Outcome,
    Program,
    Replay,
    World,
)

from tolaria import ring
from tolaria.errors import QuiesceTimeout
from tolaria.gate import GateState
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
    HostWait,
    Inspect,
    Inspection,
    Part,
    Places,
    Reserve,
    RestoreHost,
    StreamRecord,
    StreamWait,
    Survey,
    Synchronize,
)


class Machine:
    """Explores programs.

    Args:
        programs: One per thread; thread numbers are their indices.
        homes: The stream on which each thread launches, empty for the governor's threads; None: a machine without
            queues (CPU).
        initial: Host state; its ring tells which slots hold something.
        slots: Contents of the slots.
        drop: Mutant: operations for which it answers True are not performed.
        variables: What there is; see above.
        digests: Readings (`Examine`, `Inspect`) are modelled, and these are the digests at the start; None: every
            reading is performed at once and finds nothing.
        may_raise: Names of the errors with which a thread may end.
        may_time_out: Threads that may give up while they wait.
        careless: Mutant: a device whose `caller_wait` does not ask whether its stream is capturing.
        reduced: Take quiet steps at once, see above.
    """

    def __init__(
        self,
        programs: list[Program],
        homes: tuple[str, ...] | None = None,
        initial: HostState | None = None,
        slots: tuple[tuple[str, ...], ...] = (("S", "S"), ("-", "-"), ("-", "-")),
        drop: Mutant = lambda op: False,
        variables: tuple[str, ...] = VARIABLES,
        digests: tuple[tuple[str, ...] | None, ...] | None = None,
        may_raise: tuple[str, ...] = (),
        may_time_out: tuple[int, ...] = (),
        careless: bool = False,
        reduced: bool = True,
    ) -> None:
        self.programs, self.drop = programs, drop
        self.homes = homes
        self.streams = (*dict.fromkeys(filter(None, homes)), OWN) if homes is not None else ()
        self.initial = initial if initial is not None else HostState(ring=good_ring(len(slots)), next_snapshot=1)
        self.slots, self.variables, self.digests = slots, variables, digests
        self.may_raise, self.may_time_out = may_raise, may_time_out
        self.careless, self.reduced = careless, reduced
        self._known: dict[tuple[int, tuple[Any, ...]], Any] = {}

    # ------------------------------------------------------------ search

    def explore(self, is_good: Callable[[World], bool]) -> Outcome:
        """Visit every reachable state, up to the first violation.

        An end is good if every thread has finished as it may, every queue is empty, no capture was invalidated, nothing
        is left open (see `_left`), every reading was of the snapshot it was meant for, and `is_good`.
        """
        start = self._start()
        parents: dict[World, tuple[World, str] | None] = {start: None}
        frontier = deque([start])
        ends: set[End] = set()
        while frontier:
            world = frontier.popleft()
            moves = self._moves(world)
            if not moves:
                ends.add((world.memory, world.seen, tuple(end.how if end else "stuck" for end in world.finished)))
                wrong = self._wrong(world, is_good)
                if wrong is not None:
                    found = f"{wrong}: memory {world.memory}, slots {world.slots}, seen {world.seen}"
                    return Outcome(len(parents), found, _path(parents, world), frozenset(ends))
            for label, after in moves:
                if after not in parents:
                    parents[after] = (world, label)
                    frontier.append(after)
        return Outcome(len(parents), None, (), frozenset(ends))

    def _start(self) -> World:
        count = len(self.programs)
        start = World(
            self.initial, ("O",) * len(self.variables), self.slots, ((),) * count, (0,) * count,
            tuple((s, ()) for s in self.streams), tuple((s, 0) for s in self.streams),
            tuple((s, 0) for s in self.streams), (), (None,) * count,
        )  # fmt: skip
        if self.digests is None:
            return start
        held = frozenset(
            (slot.snapshot, *pair)
            for slot in self.initial.ring
            for pair in zip(self.variables, self.slots[slot.index], strict=True)
        )
        no_reading = (-1,) * len(self.slots)
        return replace(start, examined=no_reading, digests=self.digests, taking=(-1,) * count, held=held)

    def _wrong(self, world: World, is_good: Callable[[World], bool]) -> str | None:
        if world.spoiled:
            return f"capture invalidated by {world.spoiled}"
        if any(end is None for end in world.finished) or any(queue for _, queue in world.queues):
            return "deadlock"
        if self.digests is not None and not self._read_right(world):
            return f"misread: {world.readings}, digests {world.digests}"
        if not is_good(world):
            return "torn"
        if self._left(world):
            return f"left behind: {self._left(world)}"
        strange = [end.how for end in world.finished if end.how not in ("returned", *self.may_raise)]
        return f"raised: {strange}" if strange else None

    def _left(self, world: World) -> tuple[Any, ...]:
        """What no end may leave: open sections, owners, waiting threads, captures, slots being read or filled."""
        filling = ring.SlotPhase.FILLING
        slots = tuple(slot for slot in world.host.ring if slot.readers or slot.phase is filling)
        open_gate = () if world.host.gate == GateState() else (world.host.gate,)
        return (*open_gate, *world.host.captures, *world.captures, *slots)

    def _read_right(self, world: World) -> bool:
        """Every reading found what its snapshot holds, and every sealed slot has the digest of what it holds."""
        read = all(
            serial < 0 or {(serial, *pair) for pair in zip(self.variables, values, strict=True)} <= world.held
            for serial, values in world.readings
        )
        sealed = (ring.SlotPhase.SEALED, ring.SlotPhase.CERTIFIED)
        return read and all(
            world.digests[slot.index] == world.slots[slot.index] for slot in world.host.ring if slot.phase in sealed
        )

    def _moves(self, world: World) -> list[tuple[str, World]]:
        if world.spoiled:
            return []
        running = [thread for thread, end in enumerate(world.finished) if end is None]
        if self.reduced:
            for thread in running:
                if self._is_quiet(world, thread):
                    return list(self._host_moves(world, thread))
            for stream, queue in world.queues:
                if queue and queue[0][0] == "wait" and (after := self._device_step(world, stream, queue)) is not None:
                    return [(f"{stream}: {queue[0]}", after)]
        moves = [move for thread in running for move in self._host_moves(world, thread)]
        for stream, queue in world.queues:
            if queue and (after := self._device_step(world, stream, queue)) is not None:
                moves.append((f"{stream}: {queue[0]}", after))
        return moves

    def _is_quiet(self, world: World, thread: int) -> bool:
        op = self._next(world, thread)
        if isinstance(op, _End | Survey | Check) or self.drop(op):
            return True
        if isinstance(op, CaptureHost | RestoreHost):
            return not any(variable[0] == "x" for variable in self.variables)
        if isinstance(op, Reserve | Examine | Inspect):
            return self.digests is None
        return isinstance(op, Handover) and not self.streams

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
            yield from self._change(world, thread, op, label)
        elif isinstance(op, Copy) and (not self.streams or op.device == HOST):
            yield from self._copy_here(world, thread, op, label)
        elif isinstance(op, Launch) and world.is_capturing(thread):
            captures = tuple((t, g, (*items, op) if t == thread else items) for t, g, items in world.captures)
            yield f"{label} (recorded)", self._sent(replace(world, captures=captures), thread, None)
        elif isinstance(op, Launch) and not self.streams:
            yield label, self._sent(self._apply(world, op, thread), thread, None)
        elif isinstance(op, Inspect) and self.digests is not None:
            yield from self._inspect(world, thread, op, label)
        elif self._spoils(world, thread, op):
            yield label, replace(world, spoiled=label)
        else:
            after = self._device_call(world, thread, op)
            if after is not None:
                yield label, self._sent(after[0], thread, after[1])

    def _change(self, world: World, thread: int, op: Change | Await, label: str) -> Iterator[tuple[str, World]]:
        try:
            answer = op.function(world.host)
        except Exception as error:
            yield f"{label} raises {type(error).__name__}", self._sent(world, thread, _thrown(error))
            return
        if answer is not None:
            host, result = answer
            result = (result, 0.0) if isinstance(op, Await) else result
            yield label, self._sent(replace(world, host=host), thread, result)
        elif thread in self.may_time_out:
            yield f"{label} times out", self._sent(world, thread, _thrown(QuiesceTimeout(label, "waited", "Repeat.")))

    def _spoils(self, world: World, thread: int, op: Any) -> bool:
        """Any barrier invalidates every capture in progress, and so does waiting inside one for outside work."""
        if isinstance(op, ContextRecord | ContextWait | Synchronize):
            return bool(world.captures)
        return isinstance(op, CallerWait) and self.careless and world.is_capturing(thread)

    def _copy_here(self, world: World, thread: int, op: Copy, label: str) -> Iterator[tuple[str, World]]:
        """On a host a copy runs in its caller, one variable after the other."""
        micro = self._micro_copies(world, op)
        done = world.partial[thread]
        if done == len(micro):
            yield f"{label} done", self._sent(replace(world, partial=_at(world.partial, thread, 0)), thread, None)
            return
        after = self._apply(self._note(world, thread, op), micro[done], thread)
        yield f"{label} {micro[done][2]}", replace(after, partial=_at(after.partial, thread, done + 1))

    def _inspect(self, world: World, thread: int, op: Inspect, label: str) -> Iterator[tuple[str, World]]:
        """Take over the reading that is under way, or begin one; wait until it is complete; compare."""
        if not world.partial[thread]:
            index, after = world.examined[op.slot], replace(world, examined=_at(world.examined, op.slot, -1))
            if index < 0:
                slot = world.host.ring[op.slot]
                index, after = len(world.readings), self._read(after, op.slot, slot.snapshot)
            yield f"{label} begins", replace(after, partial=_at(after.partial, thread, index + 1))
            return
        index = world.partial[thread] - 1
        values = world.readings[index][1]
        if len(values) == len(self.variables):
            after = replace(world, partial=_at(world.partial, thread, 0))
            known = world.digests[op.slot]
            if known is None:
                after = replace(after, digests=_at(after.digests, op.slot, values))
            yield f"{label} ends", self._sent(after, thread, Inspection(intact=known in (None, values)))
        elif not self.streams:
            micro = ("examine", index, op.slot, self.variables[len(values)])
            yield f"{label} {micro[3]}", self._apply(world, micro, thread)

    def _read(self, world: World, slot: int, serial: int) -> World:
        """Begin a reading; with streams, enqueue all of it."""
        after = replace(world, readings=(*world.readings, (serial, ())))
        for variable in self.variables if self.streams else ():
            after = self._enqueue(after, OWN, ("examine", len(world.readings), slot, variable))
        return after

    def _device_call(self, world: World, thread: int, op: Any) -> tuple[World, Any] | None:
        """The world after an operation and its answer; None while it has to wait."""
        after, answer = world, None
        home = self.homes[thread] if self.homes else ""
        if isinstance(op, Survey | Check):
            pinned = any(variable[0] == "h" for variable in self.variables)
            hosts = (HOST,) if pinned else ()
            answer = Places((QUEUED,), hosts, pinned) if self.streams else Places(host=(QUEUED, *hosts))
        elif isinstance(op, Reserve):
            if self.digests is not None:
                after = replace(
                    world, examined=_at(world.examined, op.slot, -1), digests=_at(world.digests, op.slot, None)
                )
        elif isinstance(op, CaptureHost | RestoreHost | Copy):
            after = self._note(world, thread, op) if isinstance(op, Copy) else world
            for micro in self._micro_copies(world, op):
                after = self._enqueue(after, OWN, micro) if self.streams else self._apply(after, micro, thread)
        elif isinstance(op, Examine):
            if self.digests is not None:
                after = replace(world, examined=_at(world.examined, op.slot, len(world.readings)))
                after = self._read(after, op.slot, world.taking[thread])
        elif isinstance(op, Inspect):
            answer = Inspection()
        elif isinstance(op, Synchronize):
            if any(queue for _, queue in world.queues):
                return None
        elif isinstance(op, HostWait):
            done = dict(world.done)
            if any(done[stream] < count for stream, count in op.event or ()):
                return None
        elif isinstance(op, ContextRecord):
            answer = world.launched
        elif isinstance(op, StreamRecord):
            answer = ((OWN, dict(world.launched)[OWN]),)
        elif isinstance(op, ContextWait):
            for stream in self.streams:
                after = self._enqueue(after, stream, ("wait", op.event or ()))
        elif isinstance(op, StreamWait):
            after = self._enqueue(world, OWN, ("wait", op.event or ()))
        elif isinstance(op, CallerWait):
            if home and not world.is_capturing(thread):
                after = self._enqueue(world, home, ("wait", op.event))
        elif isinstance(op, Launch):
            after = self._enqueue(world, op.stream, (op, thread))
        elif isinstance(op, Handover):
            if self.streams:
                after = self._enqueue(world, op.target, ("wait", ((op.source, dict(world.launched)[op.source]),)))
        elif isinstance(op, CaptureBegins):
            after = replace(world, captures=(*world.captures, (thread, op.graph, ())))
        elif isinstance(op, CaptureEnds):
            graphs = tuple((graph, items) for capturing, graph, items in world.captures if capturing == thread)
            others = tuple(capture for capture in world.captures if capture[0] != thread)
            after = replace(world, captures=others, graphs=(*world.graphs, *graphs))
        elif isinstance(op, Replay):
            for item in dict(world.graphs)[op.graph]:
                after = self._enqueue(after, op.stream, (item, thread))
        else:
            raise AssertionError(f"the simulation has no answer to {op}")
        return after, answer

    def _next(self, world: World, thread: int) -> Any:
        """Run the program again up to its next operation."""
        key = (thread, world.progress[thread])
        if key not in self._known:
            self._known[key] = self._run(*key)
        return self._known[key]

    def _run(self, thread: int, results: tuple[Any, ...]) -> Any:
        program: Any = self.programs[thread]()
        try:
            op = next(program)
            for result in results:
                op = program.throw(result.error) if isinstance(result, _Thrown) else program.send(result)
        except StopIteration:
            return _End("returned")
        except Exception as error:
            return _End(type(error).__name__)
        dispose(program)
        return op

    def _sent(self, world: World, thread: int, result: Any) -> World:
        return replace(world, progress=_at(world.progress, thread, (*world.progress[thread], result)))

    # ------------------------------------------------------------ device

    def _micro_copies(self, world: World, op: Copy | CaptureHost | RestoreHost) -> tuple[Any, ...]:
        """What one operation copies, variable by variable, with the snapshot that the slot is for."""
        if isinstance(op, Copy):
            letters = {Part.BUFFERS: "b", Part.REST: "p" if op.device == QUEUED else "h"}[op.part]
            letters = "" if op.part is Part.BUFFERS and op.device == HOST else letters
            direction = op.direction
        else:
            letters, direction = "x", Direction.RESTORE if isinstance(op, RestoreHost) else Direction.CAPTURE
        serial = world.host.ring[op.slot].snapshot
        return tuple(("copy", op.slot, v, direction, serial) for v in self.variables if v[0] in letters)

    def _note(self, world: World, thread: int, op: Copy) -> World:
        if self.digests is None or op.direction is Direction.RESTORE:
            return world
        return replace(world, taking=_at(world.taking, thread, world.host.ring[op.slot].snapshot))

    def _enqueue(self, world: World, stream: str, item: Any) -> World:
        queues = tuple((s, (*q, item) if s == stream else q) for s, q in world.queues)
        launched = tuple((s, n + (s == stream)) for s, n in world.launched)
        return replace(world, queues=queues, launched=launched)

    def _device_step(self, world: World, stream: str, queue: tuple[Any, ...]) -> World | None:
        item = queue[0]
        if item[0] == "wait":
            done = dict(world.done)
            if any(done[s] < n for s, n in item[1]):
                return None
            after = world
        else:
            after = self._apply(world, *item) if isinstance(item[0], Launch) else self._apply(world, item, -1)
        queues = tuple((s, q[1:] if s == stream else q) for s, q in after.queues)
        return replace(after, queues=queues, done=tuple((s, n + (s == stream)) for s, n in after.done))

    def _apply(self, world: World, op: Any, thread: int) -> World:
        if isinstance(op, Launch):
            index = self.variables.index(op.variable)
            if op.kind == "write":
                return replace(world, memory=_at(world.memory, index, op.value))
            return replace(world, seen=(*world.seen, (thread, op.variable, world.memory[index])))
        if op[0] == "examine":
            _, reading, slot, variable = op
            serial, values = world.readings[reading]
            values = (*values, world.slots[slot][self.variables.index(variable)])
            return replace(world, readings=_at(world.readings, reading, (serial, values)))
        _, slot, variable, direction, serial = op
        index = self.variables.index(variable)
        if direction is Direction.RESTORE:
            return replace(world, memory=_at(world.memory, index, world.slots[slot][index]))
        held = world.held if self.digests is None else world.held | {(serial, variable, world.memory[index])}
        return replace(
            world, slots=_at(world.slots, slot, _at(world.slots[slot], index, world.memory[index])), held=held
        )


@dataclass(frozen=True, slots=True)
class _Thrown:
    name: str
    error: Exception = field(compare=False)


@dataclass(frozen=True, slots=True)
class _End:
    how: str


def _thrown(error: Exception) -> _Thrown:
    return _Thrown(type(error).__name__, error)


def dispose(program: Any) -> None:
    """Let go of a suspended run. Its clean-up steps are yielded too, which `close` objects to; nobody performs them."""
    while program.gi_frame is not None:
        innermost = program
        while innermost.gi_yieldfrom is not None and innermost.gi_yieldfrom.gi_frame is not None:
            innermost = innermost.gi_yieldfrom
        with contextlib.suppress(RuntimeError):
            innermost.close()


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
