"""The vocabulary of the protocol: the shared host state, and the operations that a protocol may yield.

Operations are values. The driver performs them on a real machine, a model checker in a simulated one.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from tolaria.gate import GateState, ThreadId
from tolaria.ring import Ring, Tier

DeviceName = str
Event = Any
Events = tuple[tuple[DeviceName, Event], ...]
Stream = Any  # what the driver calls it
Streams = tuple[tuple[DeviceName, Stream], ...]


class Barrier(Enum):
    """How device work is ordered around the copies."""

    HOST = "host"  # CPU: operators run in their caller, so the gate alone orders them
    BLOCKING = "blocking"  # device synchronise on both sides, under the gate
    CONTEXT = "context"  # context-wide events on both sides; the host never waits
    STREAMS = "streams"  # events of the known streams on both sides; the host never waits, nor do other streams

    has_events: bool
    """Whether the host never waits: what a device does is ordered, and asked for, by events."""

    def __init__(self, word: str) -> None:
        self.has_events = word in ("context", "streams")  # asked a dozen times per rollback


class Part(Enum):
    """The two ranges of a slot: what a forward may write, and the rest."""

    BUFFERS = "buffers"
    REST = "rest"

    __hash__ = object.__hash__  # Enum's own is written in Python, and parts are keys


PARTS = tuple(Part)
"""In the order in which they are moved. Going through an enum takes longer."""


class Direction(Enum):
    """Which way a copy moves bytes."""

    CAPTURE = "storages -> slot"
    RESTORE = "slot -> storages"


@dataclass(frozen=True, slots=True)
class Places:
    """Where the tensors of a layout are.

    Attributes:
        queued: Devices that work asynchronously, whose order the barrier has to enforce.
        host: Devices whose copies are done when the call returns.
        pinned: Some of the host's tensors are page-locked, so that a transfer may be reading or writing them even now.
        unguarded: Something is written outside of sections as well (gradients, registered objects), so that nobody
            would wait for the copies of it by himself.
        tier: Where a snapshot of them is to be held.
    """

    queued: tuple[DeviceName, ...] = ()
    host: tuple[DeviceName, ...] = ()
    pinned: bool = False
    unguarded: bool = False
    tier: Tier = Tier.HOST


class SectionKind(Enum):
    """What a section may write, and so which copies it has to wait for."""

    FORWARD = "forward"  # buffers
    WRITE = "write"  # anything, on the caller's current stream: optimizer steps, graph replays
    FOREIGN = "foreign write"  # anything, on any stream: using(write=True)
    READ = "read"  # nothing

    @property
    def writes(self) -> bool:
        """Whether one that raises half-way leaves a torn train state."""
        return self in (SectionKind.WRITE, SectionKind.FOREIGN)


@dataclass(frozen=True, slots=True)
class HostState:
    """Everything the threads of one governor share. A value: every change makes a new one.

    Attributes:
        gate: Open sections and the exclusive owner.
        ring: The slots.
        epoch: Number of rollbacks so far; tells gradients of different pasts apart.
        next_snapshot: Serial number of the next snapshot.
        captures: Graph captures in progress, as (token, thread); no barrier may touch a device while there are any.
        ordering: Threads doing to a device what would invalidate a graph capture; none may begin meanwhile.
        buffers_done: Events after which buffers may be written again.
        all_done: Events after which everything may be written again.
        running: Backward passes in progress, as (token, epoch of their forward).
        grad_epoch: Oldest epoch whose gradients have been accumulated since the last optimizer step; None without any.
        torn: A write section raised half-way, so the train state may be half updated; only a rollback clears this.
        streams: With the `streams` barrier: the known streams, in order of appearance. None with any other.
        latest: With the `streams` barrier: where the governor's work ends so far. A stream that becomes known waits for
            it, since no barrier of before has made it wait.
    """

    gate: GateState = field(default_factory=GateState)
    ring: Ring = ()
    epoch: int = 0
    next_snapshot: int = 0
    captures: tuple[tuple[int, ThreadId], ...] = ()
    ordering: int = 0
    buffers_done: Events = ()
    all_done: Events = ()
    running: tuple[tuple[int, int], ...] = ()
    grad_epoch: int | None = None
    torn: bool = False
    streams: Streams | None = None
    latest: Events = ()


# ---------------------------------------------------------------- operations


@dataclass(frozen=True, slots=True)
class Change:
    """Atomically replace the host state: ``function(state) -> (state, result)``. The function is pure and may raise."""

    label: str
    function: Callable[[HostState], tuple[HostState, Any]]


@dataclass(frozen=True, slots=True)
class Await:
    """Like `Change`, but the function may answer None: then wait until the state has changed and ask again.

    Performing it raises `QuiesceTimeout` after `timeout_s` seconds without having changed anything.
    """

    label: str
    function: Callable[[HostState], tuple[HostState, Any] | None]
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class Survey:
    """Find every governed tensor, check that each can be restored exactly, and lay the table of copies.

    Answers the `Places` that hold them: they change when optimizer state appears. With `gradients`: live ones as well.
    """

    gradients: bool = False


@dataclass(frozen=True, slots=True)
class Reserve:
    """Make sure that the slot has memory for the surveyed layout; allocates only when the layout is new.

    With `like`: for the layout of that slot, which it is going to be a copy of.
    """

    slot: int
    like: int | None = None


@dataclass(frozen=True, slots=True)
class CaptureHost:
    """Clone the host side of the train state (numbers, schedulers, random state, extras) into the slot.

    Answers the optimizer steps completed: known for certain only now, since other threads may have been stepping.
    """

    slot: int


@dataclass(frozen=True, slots=True)
class Check:
    """Compare the live train state with the slot; raise `StateMismatch` if it cannot be restored exactly.

    Answers the `Places` of the slot's tensors.
    """

    slot: int


@dataclass(frozen=True, slots=True)
class Examine:
    """Enqueue the reading of a slot behind its copies: digest and search for non-finite values. Waits for nothing."""

    slot: int


@dataclass(frozen=True, slots=True)
class Inspect:
    """Answer what the first reading of a slot showed, an `Inspection`; waits for the `Examine` that is under way.

    With `again` the slot is then read once more: are its bytes still those of the first reading? With `live` the answer
    is that of `ReadLive`: are the restored bytes those of the first reading? With `at_rest` a digest is taken of what
    an accelerator's storages have in main memory, which later readings then compare with.
    """

    slot: int
    again: bool = False
    live: bool = False
    at_rest: bool = False


@dataclass(frozen=True, slots=True)
class RestoreHost:
    """Put the host side back, drop gradients, bump version counters; clear optimizers that have no snapshot.

    Answers whether gradients came back with the snapshot.
    """

    slot: int
    reset: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Copy:
    """Enqueue one range of copies on the governor's own stream of `device` (performed at once on a CPU)."""

    slot: int
    device: DeviceName
    part: Part
    direction: Direction


@dataclass(frozen=True, slots=True)
class ReadLive:
    """Read the restored storages of one part back, behind the copies: `Inspect` with `live` tells what was found.

    Enqueued where devices have queues, else performed at once.
    """

    slot: int
    part: Part


@dataclass(frozen=True, slots=True)
class Transfer:
    """Copy a whole slot of the device tier into one of the host tier, on streams that nothing else waits for.

    Enqueues, behind everything that the governor's own streams were given so far. Answers the `Events` of its end.
    """

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class ContextRecord:
    """Record an event that covers the work of *all* streams of the device so far. Answers the event."""

    device: DeviceName


@dataclass(frozen=True, slots=True)
class ContextWait:
    """Make all later work of *all* streams of the device wait for an event."""

    device: DeviceName
    event: Event


@dataclass(frozen=True, slots=True)
class StreamRecord:
    """Record an event on the governor's own stream of the device. Answers the event."""

    device: DeviceName


@dataclass(frozen=True, slots=True)
class StreamWait:
    """Make the governor's own stream of the device wait for an event."""

    device: DeviceName
    event: Event


@dataclass(frozen=True, slots=True)
class CallerWait:
    """Make the calling thread's current stream of the device wait for an event."""

    device: DeviceName
    event: Event


@dataclass(frozen=True, slots=True)
class CallerStreams:
    """Answers the calling thread's current stream of every device, as `Streams`."""


@dataclass(frozen=True, slots=True)
class KnownRecord:
    """Record an event that covers the work of one stream so far. Answers the event."""

    device: DeviceName
    stream: Stream


@dataclass(frozen=True, slots=True)
class KnownWait:
    """Make all later work of one stream wait for an event."""

    device: DeviceName
    stream: Stream
    event: Event


@dataclass(frozen=True, slots=True)
class TransferRecord:
    """Record an event that covers the governor's transfers so far. Answers the event; None before the first."""

    device: DeviceName


@dataclass(frozen=True, slots=True)
class HostWait:
    """Block the host until an event has passed: page-locked host memory may be under transfer until then."""

    device: DeviceName
    event: Event


@dataclass(frozen=True, slots=True)
class Synchronize:
    """Block the host until the device is idle."""

    device: DeviceName


Op = (
    Change
    | Await
    | Survey
    | Reserve
    | CaptureHost
    | Check
    | Examine
    | Inspect
    | RestoreHost
    | ReadLive
    | Transfer
    | Copy
    | ContextRecord
    | ContextWait
    | StreamRecord
    | StreamWait
    | CallerWait
    | CallerStreams
    | KnownRecord
    | KnownWait
    | TransferRecord
    | HostWait
    | Synchronize
)
Protocol = Generator[Op, Any, Any]


@dataclass(frozen=True, slots=True)
class Inspection:
    """What reading a slot showed.

    Attributes:
        nonfinite: Names of governed tensors that hold a NaN or an infinity (and did not from the start).
        intact: The digest equals the one taken when the slot was sealed (True when it was taken just now).
    """

    nonfinite: tuple[str, ...] = ()
    intact: bool = True
