"""The simulated device: streams as FIFO queues, events as counts, memory as cells, captures, allocation and reuse.

Every function takes a `World` and answers the next one. An item of a queue is a plain tuple, its first entry one of
``write``, ``read``, ``wait``, ``capture``, ``restore``, ``examine``, ``look``, ``transfer`` and ``gate``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tolaria.operations import (
    CallerStreams,
    CallerWait,
    CaptureHost,
    Check,
    ContextRecord,
    ContextWait,
    Copy,
    Direction,
    Examine,
    HostWait,
    Inspect,
    Inspection,
    KnownRecord,
    KnownWait,
    Part,
    Places,
    ReadLive,
    Reserve,
    RestoreHost,
    StreamRecord,
    StreamWait,
    Survey,
    Synchronize,
    Transfer,
    TransferRecord,
)
from tolaria.ring import Tier
from tolaria.testing.world import (
    HOST,
    OWN,
    QUEUED,
    SECOND,
    Allocate,
    CaptureBegins,
    CaptureEnds,
    Close,
    Faults,
    Fused,
    Handover,
    Items,
    Launch,
    Open,
    Reassign,
    Record,
    Replay,
    Version,
    WaitFor,
    World,
    at,
)

Item = tuple[Any, ...]
Answer = tuple[World, Any] | None

_ORDERS = (
    CallerStreams
    | ContextRecord
    | StreamRecord
    | KnownRecord
    | ContextWait
    | StreamWait
    | KnownWait
    | CallerWait
    | TransferRecord
    | Record
    | WaitFor
)


class SimulatedDevice:
    """What operations do to a world.

    Args:
        streams: Names, the governor's own last, its second one behind them if there is one; empty on a machine without
            queues.
        homes: The stream on which each thread launches, empty for none.
        variables: Names of the variables.
        faults: Mutants.
        with_readings: Digests are modelled.
        tier: Where snapshots are taken to.
    """

    def __init__(
        self,
        streams: tuple[str, ...],
        homes: tuple[str, ...],
        variables: tuple[str, ...],
        faults: Faults,
        with_readings: bool,
        tier: Tier = Tier.HOST,
    ) -> None:
        self.streams, self.homes, self.variables, self.tier = streams, homes, variables, tier
        self.faults, self.with_readings = faults, with_readings
        self._number = {stream: number for number, stream in enumerate(streams)}

    # ------------------------------------------------------------ the device by itself

    def step(self, world: World, number: int) -> World | None:
        """Run the head of a queue; None while it waits."""
        queue, done = world.queues[number], world.done
        item = queue[0]
        if (item[0] == "wait" and not self._is_over(world, item[1])) or (item[0] == "gate" and not world.open):
            return None
        after = world if item[0] in ("wait", "gate") else self.apply(world, item)
        return after._replace(queues=at(after.queues, number, queue[1:]), done=at(done, number, done[number] + 1))

    @staticmethod
    def _is_over(world: World, event: Any) -> bool:
        done = world.done
        return all(done[stream] >= count for stream, count in event or ())

    def apply(self, world: World, item: Item) -> World:
        """Do what one item says."""
        kind = item[0]
        if kind == "write":
            return world._replace(cells=at(world.cells, item[1], item[2]))
        if kind == "read":
            _, cell, variable, thread = item
            return world._replace(seen=(*world.seen, (thread, variable, world.cells[cell])))
        if kind == "restore":
            _, slot, index, cell = item
            return world._replace(cells=at(world.cells, cell, world.slots[slot][index]))
        if kind == "capture":
            _, slot, index, cell, serial = item
            value = world.cells[cell]
            after = world._replace(slots=at(world.slots, slot, at(world.slots[slot], index, value)))
            if self.with_readings:
                after = after._replace(held=world.held | {(serial, self.variables[index], value)})
            return after
        if kind == "examine":
            _, reading, slot, index = item
            serial, values = world.readings[reading]
            entry = (serial, (*values, world.slots[slot][index]))
            return world._replace(readings=at(world.readings, reading, entry))
        if kind == "transfer":
            _, source, target, index = item
            value = world.slots[source][index]
            return world._replace(slots=at(world.slots, target, at(world.slots[target], index, value)))
        _, number, index, cell = item
        found = (*world.lives[number], (index, world.cells[cell]))
        return world._replace(lives=at(world.lives, number, found))

    def enqueue(self, world: World, stream: str, *items: Item) -> World:
        """Hand work to a stream; without streams it is done at once."""
        if not self.streams:
            for item in items:
                world = self.apply(world, item)
            return world
        number = self._number[stream]
        return world._replace(
            queues=at(world.queues, number, (*world.queues[number], *items)),
            launched=at(world.launched, number, world.launched[number] + len(items)),
        )

    # ------------------------------------------------------------ what threads ask for

    def spoils(self, world: World, thread: int, op: Any) -> bool:
        """Any barrier invalidates every capture in progress, and so does waiting inside one for outside work.

        So does taking page-locked memory, and a transfer where its caller waits for the device. What concerns one
        stream only invalidates the capture of that stream.
        """
        if not world.captures:
            return False
        if isinstance(op, ContextRecord | ContextWait | Synchronize | Reserve | Transfer):
            return True
        if isinstance(op, KnownRecord | KnownWait):
            return any(self.homes[capturing] == op.stream for capturing, _, _ in world.captures)
        return isinstance(op, CallerWait) and self.faults.careless and world.is_capturing(thread)

    def call(self, world: World, thread: int, op: Any) -> Answer:
        """The world after an operation and its answer; None while it has to wait."""
        if isinstance(op, Survey | Check | Reserve | CaptureHost | RestoreHost | Copy | Examine | Inspect):
            return self._vault(world, thread, op)
        if isinstance(op, Synchronize | HostWait):
            return (world, None) if self._may_go_on(world, op) else None
        if isinstance(op, _ORDERS):
            return self._order(world, thread, op)
        return self._user(world, thread, op)

    def _may_go_on(self, world: World, op: Synchronize | HostWait) -> bool:
        return not any(world.queues) if isinstance(op, Synchronize) else self._is_over(world, op.event)

    def _order(self, world: World, thread: int, op: Any) -> Answer:
        after, answer = world, None
        if isinstance(op, TransferRecord):
            number = self._number.get(SECOND)
            answer = None if number is None else ((number, world.launched[number]),)
        elif isinstance(op, CallerStreams):
            answer = ((QUEUED, self.homes[thread]),) if self.homes[thread] else ()
        elif isinstance(op, ContextRecord):
            answer = tuple(enumerate(world.launched))
        elif isinstance(op, StreamRecord | Record | KnownRecord):
            number = self._number[OWN if isinstance(op, StreamRecord) else op.stream]
            answer = ((number, world.launched[number]),)
        elif isinstance(op, ContextWait):
            for stream in self.streams:
                after = self.enqueue(after, stream, ("wait", op.event or ()))
        elif isinstance(op, StreamWait | WaitFor | KnownWait):
            after = self.enqueue(world, OWN if isinstance(op, StreamWait) else op.stream, ("wait", op.event or ()))
        elif self.homes and self.homes[thread] and not world.is_capturing(thread):
            after = self.enqueue(world, self.homes[thread], ("wait", op.event))
        return after, answer

    # ------------------------------------------------------------ the train state and the slots

    def _vault(self, world: World, thread: int, op: Any) -> Answer:
        after, answer = world, None
        if isinstance(op, Survey | Check):
            if isinstance(op, Survey):
                after = world._replace(surveyed=at(world.surveyed, thread, world.where))
            pinned = any(variable[0] == "h" for variable in self.variables)
            hosts = (HOST,) if pinned else ()
            queued, here = ((QUEUED,), hosts) if self.streams else ((), (QUEUED, *hosts))
            answer = Places(queued, here, pinned and bool(queued), tier=self.tier)
        elif isinstance(op, Reserve):
            after = self._reserve(world, thread, op)
        elif isinstance(op, CaptureHost | RestoreHost | Copy):
            after = self.note(world, thread, op)
            if isinstance(op, RestoreHost):
                after = after._replace(version=after.version + (not self.faults.unbumped))
            after = self.enqueue(after, OWN, *self.copies(after, op))
        elif isinstance(op, Examine):
            if self.with_readings:
                after = world._replace(examined=at(world.examined, op.slot, len(world.readings)))
                after = self.read(after, op.slot, world.taking[thread])
        else:
            answer = Inspection()
        return after, answer

    def _reserve(self, world: World, thread: int, op: Reserve) -> World:
        layout = world.surveyed[thread] if op.like is None else world.layouts[op.like]
        after = world._replace(layouts=at(world.layouts, op.slot, layout))
        if op.like is None:
            after = after._replace(surveyed=at(world.surveyed, thread, ()))
        if not self.with_readings:
            return after
        return after._replace(examined=at(world.examined, op.slot, -1), digests=at(world.digests, op.slot, None))

    def transfer(self, world: World, op: Transfer) -> tuple[World, Any]:
        """Enqueue a transfer; the target takes over the digest. Answers its end; none: its caller waits for it."""
        items = tuple(("transfer", op.source, op.target, index) for index in range(len(self.variables)))
        after = world
        if self.with_readings:
            after = world._replace(digests=at(world.digests, op.target, world.digests[op.source]))
        if SECOND not in self._number:
            return self.enqueue(after, OWN, *items), ()
        first, second = self._number[OWN], self._number[SECOND]
        if not self.faults.overtaking:
            after = self.enqueue(after, SECOND, ("wait", ((first, world.launched[first]),)))
        after = self.enqueue(after, SECOND, *items)
        return after, ((QUEUED, ((second, after.launched[second]),)),)

    def looks(self, world: World, op: ReadLive) -> tuple[Items, Items]:
        """What a reading of restored storages reads: what is enqueued, and what its caller reads, all of it at last."""
        letters = {Part.BUFFERS: "b", Part.REST: "p"}[op.part] if self.streams else ""
        last = "" if op.part is Part.BUFFERS else ("h" if self.streams else "bph")
        number, layout = world.restored[op.slot], world.layouts[op.slot] or world.where
        queued, here = (
            tuple(("look", number, i, layout[i]) for i, variable in enumerate(self.variables) if variable[0] in wanted)
            for wanted in (letters, last)
        )
        return queued, here

    def begin_looking(self, world: World, op: ReadLive) -> World:
        """The first part of a reading begins it; what is enqueued of this part is."""
        after = world
        if op.part is Part.BUFFERS:
            after = world._replace(lives=(*world.lives, ()), restored=at(world.restored, op.slot, len(world.lives)))
        return self.enqueue(after, OWN, *self.looks(after, op)[0]) if self.streams else after

    def note(self, world: World, thread: int, op: Copy | CaptureHost | RestoreHost) -> World:
        """Remember which snapshot a thread takes."""
        if not self.with_readings or not isinstance(op, Copy) or op.direction is Direction.RESTORE:
            return world
        return world._replace(taking=at(world.taking, thread, world.host.ring[op.slot].snapshot))

    def copies(self, world: World, op: Copy | CaptureHost | RestoreHost) -> Items:
        """What one operation copies, variable by variable, with the snapshot that the slot is for."""
        if isinstance(op, Copy):
            letters = {Part.BUFFERS: "b", Part.REST: "p" if op.device == QUEUED else "h"}[op.part]
            letters = "" if op.part is Part.BUFFERS and op.device == HOST else letters
            restores = op.direction is Direction.RESTORE
        else:
            letters, restores = "x", isinstance(op, RestoreHost)
        wanted = [index for index, variable in enumerate(self.variables) if variable[0] in letters]
        layout = world.layouts[op.slot] or world.where
        if restores:
            return tuple(("restore", op.slot, index, layout[index]) for index in wanted)
        serial = world.host.ring[op.slot].snapshot
        return tuple(("capture", op.slot, index, layout[index], serial) for index in wanted)

    def read(self, world: World, slot: int, serial: int, here: bool = False) -> World:
        """Begin a reading; with streams, enqueue all of it, unless its caller reads main memory."""
        reading = len(world.readings)
        after = world._replace(readings=(*world.readings, (serial, ())))
        if not self.streams or here:
            return after
        return self.enqueue(after, OWN, *(("examine", reading, slot, index) for index in range(len(self.variables))))

    # ------------------------------------------------------------ users

    def item(self, world: World, thread: int, launch: Launch) -> Item:
        """What a stream is given for a launch. The address is the one of now."""
        cell = world.where[self.variables.index(launch.variable)]
        if launch.kind == "write":
            return ("write", cell, launch.value, thread)
        return ("read", cell, launch.variable, thread)

    def items(self, world: World, thread: int, launches: Iterable[Launch]) -> Items:
        """The same for several launches."""
        return tuple(self.item(world, thread, launch) for launch in launches)

    def recorded(self, world: World, thread: int, op: Launch | Fused) -> World:
        """A launch inside a capture."""
        new = self.items(world, thread, op.launches if isinstance(op, Fused) else (op,))
        captures = tuple((t, g, (*items, *new) if t == thread else items) for t, g, items in world.captures)
        return world._replace(captures=captures)

    def _user(self, world: World, thread: int, op: Any) -> Answer:
        after, answer = world, None
        if isinstance(op, Launch):
            after = self.enqueue(world, op.stream, self.item(world, thread, op))
        elif isinstance(op, Fused):
            after = self.enqueue(world, op.launches[0].stream, *self.items(world, thread, op.launches))
        elif isinstance(op, Handover):
            if self.streams:
                source = self._number[op.source]
                after = self.enqueue(world, op.target, ("wait", ((source, world.launched[source]),)))
        elif isinstance(op, CaptureBegins):
            after = world._replace(captures=(*world.captures, (thread, op.graph, ())))
        elif isinstance(op, CaptureEnds):
            graphs = tuple((graph, items) for capturing, graph, items in world.captures if capturing == thread)
            others = tuple(capture for capture in world.captures if capture[0] != thread)
            after = world._replace(captures=others, graphs=(*world.graphs, *graphs))
        elif isinstance(op, Replay):
            items = tuple((*item[:-1], thread) for item in dict(world.graphs)[op.graph])
            after = self.enqueue(world, op.stream, *items)
        elif isinstance(op, Reassign):
            after = self._reassign(world, op)
        elif isinstance(op, Allocate):
            after = self._allocate(world, op)
        elif isinstance(op, Version):
            answer = world.version
        elif isinstance(op, Close):
            after = self.enqueue(world, op.stream, ("gate",))
        elif isinstance(op, Open):
            after = world._replace(open=True)
        else:
            raise AssertionError(f"the simulation has no answer to {op}")
        return after, answer

    # ------------------------------------------------------------ memory

    def _is_held(self, world: World, cell: int) -> bool:
        """Whether the governor refers to a cell: a survey, or a slot that is a copy of it."""
        return not self.faults.unreferenced and any(cell in cells for cells in (*world.layouts, *world.surveyed))

    def _fresh(self, world: World) -> int:
        used = {*world.where, *world.free, *(cell for cell, _ in world.users)}
        used.update(cell for cells in (*world.layouts, *world.surveyed) for cell in cells)
        return next(cell for cell in range(len(world.cells)) if cell not in used)

    def _reassign(self, world: World, op: Reassign) -> World:
        index, fresh = self.variables.index(op.variable), self._fresh(world)
        return world._replace(
            cells=at(world.cells, fresh, op.value),
            where=at(world.where, index, fresh),
            free=(*world.free, world.where[index]),
        )

    def _allocate(self, world: World, op: Allocate) -> World:
        """As torch's allocator does it: the block let go last is handed out at once, whoever may still be using it."""
        idle = [cell for cell in world.free if not self._is_held(world, cell)]
        cell = idle[-1] if idle else self._fresh(world)
        after = world._replace(
            free=tuple(one for one in world.free if one != cell), users=(*world.users, (cell, op.value))
        )
        return self.enqueue(after, op.stream, ("write", cell, op.value, -1))
