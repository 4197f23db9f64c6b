"""A machine made of values, on which the shipped protocol runs: what may happen next, and what it does.

Threads run generators of `tolaria.protocol` and `tolaria.admission`, unchanged, next to simple writers, readers and
graph captures (`programs`). A device has streams (FIFO queues of single-variable reads, writes and copies), stream
events and context-wide events; a machine without streams performs a copy variable by variable in its caller, so that it
can be seen half done.

Where a variable lives is told by its first letter: ``p`` a parameter in device memory; ``b`` a buffer there; ``h`` page
-locked host memory, which both queued work and the copies of a caller touch; ``x`` an extra, moved by `CaptureHost` and
`RestoreHost` with one launch on the governor's stream.

One reduction: a step that neither sees nor changes anything that others see or change (`_is_quiet`, and passing a wait
whose event is over) is taken at once, alone. It commutes with every other step and disables none, so every end that
exists is still reached; such a step is in the schedule as soon as it can be.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from tolaria import ring
from tolaria.errors import QuiesceTimeout, StateMismatch
from tolaria.gate import GateState
from tolaria.operations import (
    Await,
    CallerStreams,
    CaptureHost,
    Change,
    Check,
    Copy,
    Examine,
    HostState,
    Inspect,
    Inspection,
    ReadLive,
    Reserve,
    RestoreHost,
    Survey,
    Transfer,
)
from tolaria.ring import Tier
from tolaria.testing.device import SimulatedDevice
from tolaria.testing.world import (
    HOST,
    NO_FAULTS,
    OWN,
    SECOND,
    VARIABLES,
    Ended,
    Faults,
    Fused,
    Handover,
    Launch,
    Mutant,
    Node,
    Program,
    Shared,
    Step,
    World,
    at,
)

_SEALED = (ring.SlotPhase.SEALED, ring.SlotPhase.CERTIFIED)


def good_ring(num_slots: int) -> ring.Ring:
    """A ring whose first slot holds a certified snapshot."""
    slots, index = ring.claim(ring.empty_ring(num_slots), 0, 0, False) or ((), 0)
    slots = ring.seal(ring.publish(slots, index), index, 0)
    return ring.certify(slots, index, 0)


class Machine:
    """What programs do to each other.

    Args:
        programs: One per thread; thread numbers are their indices.
        homes: The stream on which each thread launches, empty for the governor's threads; None: a machine without
            queues (CPU).
        initial: Host state; its ring tells which slots hold something.
        slots: Contents of the slots.
        drop: Mutant: operations for which it answers True are not performed.
        faults: Mutants of whoever performs the operations.
        variables: What there is; see above.
        spare: Cells of memory beyond those of the variables, for `Reassign` and `Allocate`.
        digests: Readings (`Examine`, `Inspect`) are modelled, and these are the digests at the start; None: every
            reading is performed at once and finds nothing.
        versions: Programs look at version counters.
        may_raise: Names of the errors with which a thread may end.
        may_time_out: Threads that may give up while they wait.
        may_fail: (thread, kind of operation) that may fail, once in a run.
        tier: Where snapshots are taken to.
        second: The governor has a second stream of its own, on which transfers run; else their caller waits for them.
        reduced: Take quiet steps at once, see above.
    """

    def __init__(
        self,
        programs: list[Program],
        homes: tuple[str, ...] | None = None,
        initial: HostState | None = None,
        slots: tuple[tuple[str, ...], ...] = (("S", "S"), ("-", "-"), ("-", "-")),
        drop: Mutant | None = None,
        faults: Faults = NO_FAULTS,
        variables: tuple[str, ...] = VARIABLES,
        spare: int = 0,
        digests: tuple[tuple[str, ...] | None, ...] | None = None,
        versions: bool = False,
        may_raise: tuple[str, ...] = (),
        may_time_out: tuple[int, ...] = (),
        may_fail: tuple[tuple[int, type[Any]], ...] = (),
        tier: Tier = Tier.HOST,
        second: bool = False,
        reduced: bool = True,
    ) -> None:
        self.programs, self.faults = programs, faults
        self.drop: Mutant = drop if drop is not None else lambda op: False
        self.homes = homes
        own = (OWN, SECOND) if second else (OWN,)
        self.streams = (*dict.fromkeys(filter(None, homes)), *own) if homes is not None else ()
        self.initial = initial if initial is not None else HostState(ring=good_ring(len(slots)), next_snapshot=1)
        self.slots, self.variables, self.spare, self.digests = slots, variables, spare, digests
        self.versions = versions
        self.may_raise, self.may_time_out, self.may_fail = may_raise, may_time_out, may_fail
        self.reduced = reduced
        self.device = SimulatedDevice(self.streams, homes or (), variables, faults, digests is not None, tier)
        self._states: dict[HostState, Shared] = {}

    # ------------------------------------------------------------ beginning and end

    def start(self) -> World:
        """The world before the first step."""
        threads, count = len(self.programs), len(self.variables)
        home = tuple(range(count))
        none: tuple[int, ...] = (0,) * len(self.streams)
        start = World(
            shared=self._shared(self.initial),
            cells=("O",) * count + ("-",) * self.spare,
            slots=self.slots,
            progress=tuple(self._node(thread, ()) for thread in range(threads)),
            partial=(0,) * threads,
            queues=((),) * len(self.streams),
            done=none,
            launched=none,
            seen=(),
            finished=(None,) * threads,
            where=home,
            layouts=tuple(home if slot.snapshot >= 0 else () for slot in self.initial.ring),
            surveyed=((),) * threads,
            restored=(-1,) * len(self.slots),
        )
        if self.digests is None:
            return start
        held = frozenset(
            (slot.snapshot, *pair)
            for slot in self.initial.ring
            for pair in zip(self.variables, self.slots[slot.index], strict=True)
        )
        return start._replace(examined=(-1,) * len(self.slots), digests=self.digests, taking=(-1,) * threads, held=held)

    def wrong(self, world: World, is_good: Callable[[World], bool]) -> str | None:
        """What is wrong with an end, None for a good one.

        An end is good if every thread has finished as it may, every queue is empty, no capture was invalidated, nothing
        is left open, every reading was of the snapshot it was meant for, memory of others is intact, and `is_good`.
        """
        if world.spoiled:
            return f"capture invalidated by {world.spoiled}"
        if any(end is None for end in world.finished) or any(world.queues):
            return "deadlock"
        if any(world.cells[cell] != value for cell, value in world.users):
            return "overwritten: memory of others"
        if not is_good(world):
            return "torn"
        if self.digests is not None and not self._read_right(world):
            return f"misread: {world.readings}, digests {world.digests}"
        if self._left(world):
            return f"left behind: {self._left(world)}"
        strange = [
            end.how for end in world.finished if end is not None and end.how not in ("returned", *self.may_raise)
        ]
        return f"raised: {strange}" if strange else None

    def _left(self, world: World) -> tuple[Any, ...]:
        """What no end may leave: open sections, owners, who waits, captures; slots read, filled, or of nothing."""
        slots = tuple(
            slot
            for slot in world.host.ring
            if slot.readers
            or slot.phase is ring.SlotPhase.FILLING
            or (slot.phase in ring.READABLE and slot.snapshot < 0)
        )
        open_gate = () if world.host.gate == GateState() else (world.host.gate,)
        return (*open_gate, *world.host.captures, *world.captures, *slots)

    def _read_right(self, world: World) -> bool:
        """Every reading found what its snapshot holds, and every sealed slot has the digest of what it holds.

        A reading is complete, unless an operation has failed.
        """
        read = all(
            serial < 0
            or {(serial, *pair) for pair in zip(self.variables, values, strict=not world.failed)} <= world.held
            for serial, values in world.readings
        )
        return read and all(
            world.digests[slot.index] == world.slots[slot.index] for slot in world.host.ring if slot.phase in _SEALED
        )

    # ------------------------------------------------------------ what may happen next

    def steps(self, world: World) -> list[Step]:
        """Everything that may happen next. The order is the same each time, so that a number tells which."""
        if world.spoiled:
            return []
        running = [thread for thread, end in enumerate(world.finished) if end is None]
        if self.reduced:
            for thread in running:
                if self._is_quiet(world.progress[thread].op, thread):
                    return list(self._host_steps(world, thread))
            for number, queue in enumerate(world.queues):
                if queue and queue[0][0] == "wait" and (after := self.device.step(world, number)) is not None:
                    return [Step(self.streams[number], queue[0], "", after)]
        found = [step for thread in running for step in self._host_steps(world, thread)]
        for number, queue in enumerate(world.queues):
            if queue and (after := self.device.step(world, number)) is not None:
                found.append(Step(self.streams[number], queue[0], "", after))
        return found

    def _is_quiet(self, op: Any, thread: int) -> bool:
        if self.may_fail and (thread, type(op)) in self.may_fail:
            return False
        if isinstance(op, Ended) or self.drop(op):
            return True
        if isinstance(op, CallerStreams):
            return True
        if isinstance(op, Survey | Check):
            return not self.spare
        if isinstance(op, CaptureHost | RestoreHost):
            return not self.versions and not any(variable[0] == "x" for variable in self.variables)
        if isinstance(op, Reserve):
            return self.digests is None and not self.spare
        if isinstance(op, Examine | Inspect):
            return self.digests is None and not (isinstance(op, Inspect) and op.live)
        return isinstance(op, Handover) and not self.streams

    # ------------------------------------------------------------ host

    def _host_steps(self, world: World, thread: int) -> Iterator[Step]:
        op, actor = world.progress[thread].op, f"T{thread}"
        if isinstance(op, Ended):
            yield Step(actor, op, "", world._replace(finished=at(world.finished, thread, op)))
            return
        if self.may_fail and not world.failed and (thread, type(op)) in self.may_fail:
            failed = self.sent(world, thread, Thrown(RuntimeError("the operation failed")))
            how_far = 1 + world.partial[thread]
            yield Step(actor, op, "fails", failed._replace(failed=how_far, partial=at(world.partial, thread, 0)))
        if self.drop(op):
            yield Step(actor, op, "dropped", self.sent(world, thread, (None, 0.0) if isinstance(op, Await) else None))
        elif isinstance(op, Change | Await):
            yield from self._change(world, thread, op)
        elif isinstance(op, Copy) and (not self.streams or op.device == HOST):
            yield from self._copy_here(world, thread, op)
        elif isinstance(op, Launch | Fused) and world.is_capturing(thread):
            yield Step(actor, op, "recorded", self.sent(self.device.recorded(world, thread, op), thread, None))
        elif isinstance(op, Fused) and not self.streams:
            yield from self._fused_here(world, thread, op)
        elif isinstance(op, ReadLive):
            yield self._read_live(world, thread, op)
        elif isinstance(op, Inspect) and op.live:
            yield from self._inspect_live(world, thread, op)
        elif isinstance(op, Inspect) and self.digests is not None:
            yield from self._inspect(world, thread, op)
        elif isinstance(op, Check) and world.layouts[op.slot] != world.where and not self.faults.blind:
            error = StateMismatch("rolling back", "a parameter lives elsewhere", "Take another snapshot.")
            yield Step(actor, op, "raises StateMismatch", self.sent(world, thread, Thrown(error)))
        elif self.device.spoils(world, thread, op):
            yield Step(actor, op, "", world._replace(spoiled=type(op).__name__))
        elif isinstance(op, Transfer):
            yield from self._transfer(world, thread, op)
        else:
            answer = self.device.call(world, thread, op)
            if answer is not None:
                yield Step(actor, op, "", self.sent(answer[0], thread, answer[1]))

    def _change(self, world: World, thread: int, op: Change | Await) -> Iterator[Step]:
        node, actor = world.progress[thread], f"T{thread}"
        if world.shared not in node.answers:
            node.answers[world.shared] = self._ask(op, world.host)
        answer = node.answers[world.shared]
        if isinstance(answer, Thrown):
            yield Step(actor, op, f"raises {answer.name}", self.sent(world, thread, answer))
        elif answer is not None:
            yield Step(actor, op, "", self.sent(world._replace(shared=answer[0]), thread, answer[1]))
        elif thread in self.may_time_out:
            error = QuiesceTimeout(op.label, "waited", "Repeat.")
            yield Step(actor, op, "times out", self.sent(world, thread, Thrown(error)))

    def _ask(self, op: Change | Await, state: HostState) -> Any:
        try:
            answer = op.function(state)
        except Exception as error:
            return Thrown(error)
        if answer is None:
            return None
        after, result = answer
        return self._shared(after), (result, 0.0) if isinstance(op, Await) else result

    def _shared(self, state: HostState) -> Shared:
        found = self._states.get(state)
        if found is None:
            found = self._states[state] = Shared(state)
        return found

    def _copy_here(self, world: World, thread: int, op: Copy) -> Iterator[Step]:
        """On a host a copy runs in its caller, one variable after the other."""
        micro = self.device.copies(world, op)
        done = world.partial[thread]
        if done == len(micro):
            after = self.sent(world._replace(partial=at(world.partial, thread, 0)), thread, None)
            yield Step(f"T{thread}", op, "done", after)
            return
        after = self.device.apply(self.device.note(world, thread, op), micro[done])
        note = self.variables[micro[done][2]]
        yield Step(f"T{thread}", op, note, after._replace(partial=at(after.partial, thread, done + 1)))

    def _fused_here(self, world: World, thread: int, op: Fused) -> Iterator[Step]:
        done = world.partial[thread]
        launch = op.launches[done]
        after = self.device.apply(world, self.device.item(world, thread, launch))
        if done + 1 < len(op.launches):
            after = after._replace(partial=at(after.partial, thread, done + 1))
        else:
            after = self.sent(after._replace(partial=at(after.partial, thread, 0)), thread, None)
        yield Step(f"T{thread}", launch, "", after)

    def _read_live(self, world: World, thread: int, op: ReadLive) -> Step:
        """What has a queue is enqueued; main memory is read by the caller, one variable after the other."""
        here, done = self.device.looks(world, op)[1], world.partial[thread]
        after = self.device.apply(world, here[done - 1]) if done else self.device.begin_looking(world, op)
        note = self.variables[here[done - 1][2]] if done else ""
        if done < len(here):
            return Step(f"T{thread}", op, note, after._replace(partial=at(after.partial, thread, done + 1)))
        return Step(
            f"T{thread}", op, note, self.sent(after._replace(partial=at(after.partial, thread, 0)), thread, None)
        )

    def _inspect_live(self, world: World, thread: int, op: Inspect) -> Iterator[Step]:
        """Wait until everything was read back; compare with the digest, or with the slot where none is modelled."""
        found = world.lives[world.restored[op.slot]]
        if len(found) < sum(variable[0] != "x" for variable in self.variables):
            return
        known = (self.digests is not None and world.digests[op.slot]) or world.slots[op.slot]
        intact = self.faults.trusting or all(known[index] == value for index, value in found)
        after = world._replace(disturbed=world.disturbed or not intact)
        note = "as restored" if intact else "not as restored"
        yield Step(f"T{thread}", op, note, self.sent(after, thread, Inspection((), intact)))

    def _transfer(self, world: World, thread: int, op: Transfer) -> Iterator[Step]:
        """Enqueue it. Where the governor has no second stream, its caller waits for the device."""
        actor = f"T{thread}"
        if not world.partial[thread]:
            after, events = self.device.transfer(world, op)
            if events:
                yield Step(actor, op, "", self.sent(after, thread, events))
            else:
                yield Step(actor, op, "begins", after._replace(partial=at(after.partial, thread, 1)))
        elif not any(world.queues):
            after = world._replace(partial=at(world.partial, thread, 0))
            yield Step(actor, op, "ends", self.sent(after, thread, ()))

    def _inspect(self, world: World, thread: int, op: Inspect) -> Iterator[Step]:
        """Take over the reading that is under way, or begin one; wait until it is complete; compare.

        What a transfer brought to main memory (`at_rest`) is read by the caller.
        """
        actor, resting = f"T{thread}", op.at_rest and not op.again
        if not world.partial[thread]:
            index, after = world.examined[op.slot], world._replace(examined=at(world.examined, op.slot, -1))
            if index < 0:
                slot = world.host.ring[op.slot]
                index, after = len(world.readings), self.device.read(after, op.slot, slot.snapshot, here=resting)
            yield Step(actor, op, "begins", after._replace(partial=at(after.partial, thread, index + 1)))
            return
        index = world.partial[thread] - 1
        values = world.readings[index][1]
        if len(values) == len(self.variables):
            after = world._replace(partial=at(world.partial, thread, 0))
            known = world.digests[op.slot]
            if known is None:
                after = after._replace(digests=at(after.digests, op.slot, values))
            intact = known in (None, values) or self.faults.trusting
            poisoned = ("p",) if "X" in values else ()  # X stands for a value that is not finite
            yield Step(actor, op, "ends", self.sent(after, thread, Inspection(poisoned, intact)))
        elif not self.streams or resting:
            micro = ("examine", index, op.slot, len(values))
            yield Step(actor, op, self.variables[len(values)], self.device.apply(world, micro))

    # ------------------------------------------------------------ running programs

    def sent(self, world: World, thread: int, result: Any) -> World:
        """The world in which the thread has been sent that result."""
        before = world.progress[thread]
        after = before.sequel.get(result)
        if after is None:
            after = before.sequel[result] = self._node(thread, (*before.history, result))
        return world._replace(progress=at(world.progress, thread, after))

    def _node(self, thread: int, history: tuple[Any, ...]) -> Node:
        """Run the program again up to its next operation."""
        program: Any = self.programs[thread]()
        try:
            op = next(program)
            for result in history:
                op = program.throw(result.error) if isinstance(result, Thrown) else program.send(result)
        except StopIteration:
            return Node(history, Ended("returned"))
        except Exception as error:
            return Node(history, Ended(type(error).__name__))
        dispose(program)
        return Node(history, op)


class Thrown:
    """An error sent to a thread. Equal to others of its name."""

    __slots__ = ("error", "name")

    def __init__(self, error: Exception) -> None:
        self.error, self.name = error, type(error).__name__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Thrown) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)


def dispose(program: Any) -> None:
    """Let go of a suspended run. Its clean-up steps are yielded too, which `close` objects to; nobody performs them."""
    while program.gi_frame is not None:
        innermost = program
        while innermost.gi_yieldfrom is not None and innermost.gi_yieldfrom.gi_frame is not None:
            innermost = innermost.gi_yieldfrom
        with contextlib.suppress(RuntimeError):
            innermost.close()
