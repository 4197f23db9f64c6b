"""The race oracle: which two accesses to the same bytes are ordered by nothing, whatever the order they happened in.

Actors are streams and host threads; locations are bytes of device and of host memory. Whoever records calls one method
of `Ledger` for each launch, event and wait, in the order in which the host makes them; the streams' own progress need
not be known. Each actor has a vector clock (Lamport 1978; Mattern 1989): an access is ordered before another if the
other's actor has heard of it by then. So a missing edge shows in a run in which nothing went wrong.

    ledger = Ledger()
    ledger.launched("main", "A", writes=[("device", 0, 64)], what="step")
    ledger.launched("main", "R", reads=[("device", 0, 64)], what="copy into the slot")
    print(ledger.races[0])      # R does not wait for A

`recording.races_in` feeds it from a schedule of the model checker, `recorder.Recorder` from a real run.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

Actor = str
Clock = dict[Actor, int]
Range = tuple[str, int, int]
"""(space, first byte, number of bytes). A space is one memory, for example "cuda:0" or "host"."""

_FRAMES = 16  # of a stack, the innermost: enough to see who asked
_RECORDERS = ("races.py", "recorder.py", "recording.py")


@dataclass(frozen=True, slots=True)
class Access:
    """One actor reading or writing some bytes.

    Attributes:
        actor: Stream or thread.
        tick: The actor's own time.
        writes: Whether it writes them.
        where: The bytes.
        what: What did it, in words.
        stack: Where the host asked for it.
    """

    actor: Actor
    tick: int
    writes: bool
    where: Range
    what: str
    stack: str

    def overlaps(self, other: Access) -> bool:
        """Whether they have a byte in common."""
        space, first, size = self.where
        another, start, length = other.where
        return space == another and first < start + length and start < first + size


@dataclass(frozen=True, slots=True)
class Race:
    """Two accesses to the same bytes, one of them a write, and neither ordered before the other."""

    first: Access
    second: Access

    @property
    def missing(self) -> str:
        """The edge that is not there."""
        earlier, later = self.first, self.second
        return f"{later.actor} does not wait for {earlier.actor}: nothing orders {later.what!r} behind {earlier.what!r}"

    def __str__(self) -> str:
        lines: list[str] = []
        for name, access in (("first", self.first), ("second", self.second)):
            space, start, size = access.where
            how = "writes" if access.writes else "reads"
            lines.append(f"{name}: {access.actor} {how} {space}[{start}:{start + size}] ({access.what})")
            lines += [f"    {line}" for line in access.stack.splitlines()]
        return "\n".join((*lines, f"missing: {self.missing}"))


class Ledger:
    """What was recorded so far, and the races among it.

    Args:
        with_stacks: Keep the stack of every access. Costs more than everything else.
        device_of: Which device a stream belongs to; one and the same unless given. A context-wide event covers the
            streams of one device.

    Attributes:
        races: Found so far, each pair of places once.

    Threads: calls must be made one at a time, in the order in which the host does the things they tell of.
    """

    def __init__(self, *, with_stacks: bool = False, device_of: Callable[[Actor], str] = lambda stream: "") -> None:
        self.races: list[Race] = []
        self._with_stacks, self._device_of = with_stacks, device_of
        self._clocks: dict[Actor, Clock] = {}
        self._streams: set[Actor] = set()
        self._floors: dict[
            str, Clock
        ] = {}  # by device: what every stream waits for, those that are made later included
        self._events: dict[Hashable, Clock] = {}
        self._accesses: dict[tuple[Actor, bool, Range, str], Access] = {}
        self._told: set[tuple[Actor, str, Actor, str, Range]] = set()

    # ------------------------------------------------------------ work

    def launched(
        self, thread: Actor, stream: Actor, reads: Sequence[Range] = (), writes: Sequence[Range] = (), what: str = ""
    ) -> None:
        """A thread has given a stream some work."""
        clock = self._stream(stream)
        _join(clock, self._clock(thread))
        self._access(stream, clock, reads, writes, what)

    def did(self, thread: Actor, reads: Sequence[Range] = (), writes: Sequence[Range] = (), what: str = "") -> None:
        """A thread itself reads or writes, now."""
        self._access(thread, self._clock(thread), reads, writes, what)

    def given_back(self, where: Range) -> None:
        """Memory was freed and everything that used it is over: what is there later has nothing to do with it."""
        probe = Access("", 0, True, where, "", "")
        self._accesses = {key: access for key, access in self._accesses.items() if not access.overlaps(probe)}

    # ------------------------------------------------------------ order

    def recorded(self, event: Hashable, stream: Actor) -> None:
        """An event on one stream. Recording it again gives it a new meaning for later waits."""
        self._events[event] = dict(self._stream(stream))

    def recorded_all(self, event: Hashable, device: str = "") -> None:
        """An event that covers all streams of a device."""
        self._events[event] = {}
        for stream in self._streams_of(device):
            _join(self._events[event], self._clocks[stream])

    def waited(self, stream: Actor, event: Hashable) -> None:
        """Later work of a stream waits for an event. One that was never recorded orders nothing."""
        _join(self._stream(stream), self._events.get(event, {}))

    def waited_all(self, event: Hashable, device: str = "") -> None:
        """Later work of all streams of a device waits for an event, also of streams that do not exist yet."""
        found = self._events.get(event, {})
        _join(self._floors.setdefault(device, {}), found)
        for stream in self._streams_of(device):
            _join(self._clocks[stream], found)

    def host_waited(self, thread: Actor, event: Hashable) -> None:
        """A thread has waited until an event had passed."""
        _join(self._clock(thread), self._events.get(event, {}))

    def synchronized(self, thread: Actor, streams: Iterable[Actor] | None = None) -> None:
        """A thread has waited until some streams (all, unless named) were idle."""
        for stream in list(self._streams) if streams is None else streams:
            _join(self._clock(thread), self._stream(stream))

    def released(self, thread: Actor, lock: Hashable) -> None:
        """A thread lets others in: what it did until now is ordered before what they do."""
        _join(self._events.setdefault(("lock", lock), {}), self._clock(thread))

    def acquired(self, thread: Actor, lock: Hashable) -> None:
        """A thread was let in."""
        _join(self._clock(thread), self._events.get(("lock", lock), {}))

    # ------------------------------------------------------------ clocks

    def _clock(self, actor: Actor) -> Clock:
        return self._clocks.setdefault(actor, {})

    def _stream(self, stream: Actor) -> Clock:
        if stream not in self._streams:
            self._streams.add(stream)
            _join(self._clock(stream), self._floors.get(self._device_of(stream), {}))
        return self._clocks[stream]

    def _streams_of(self, device: str) -> list[Actor]:
        return [stream for stream in self._streams if self._device_of(stream) == device]

    def _access(self, actor: Actor, clock: Clock, reads: Sequence[Range], writes: Sequence[Range], what: str) -> None:
        clock[actor] = tick = clock.get(actor, 0) + 1
        stack = _stack() if self._with_stacks else ""
        for ranges, is_write in ((reads, False), (writes, True)):
            for where in ranges:
                access = Access(actor, tick, is_write, where, what, stack)
                self._compare(access, clock)
                self._accesses[actor, is_write, where, what] = access

    def _compare(self, access: Access, clock: Clock) -> None:
        for earlier in self._accesses.values():
            if not (earlier.writes or access.writes) or clock.get(earlier.actor, 0) >= earlier.tick:
                continue
            place = (earlier.actor, earlier.what, access.actor, access.what, access.where)
            if earlier.overlaps(access) and place not in self._told:
                self._told.add(place)
                self.races.append(Race(earlier, access))


def _stack() -> str:
    frames = traceback.extract_stack()
    while frames and Path(frames[-1].filename).name in _RECORDERS:
        frames.pop()
    return "".join(traceback.format_list(frames[-_FRAMES:]))


def _join(clock: Clock, other: Clock) -> None:
    for actor, tick in other.items():
        if clock.get(actor, 0) < tick:
            clock[actor] = tick
