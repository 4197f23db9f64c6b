"""Parts of the protocol: the barriers on both sides of the copies, by kind, the copies themselves, their failure."""

from __future__ import annotations

from dataclasses import dataclass

from tolaria.admission import known_streams, wait_everywhere, wait_known
from tolaria.errors import DeviceLost, RollbackFailed
from tolaria.operations import (
    Barrier,
    CallerStreams,
    Change,
    ContextRecord,
    Copy,
    Direction,
    Events,
    HostWait,
    KnownRecord,
    Part,
    Places,
    Protocol,
    StreamRecord,
    Streams,
    StreamWait,
    Synchronize,
    TransferRecord,
)
from tolaria.values import replace


@dataclass(frozen=True, slots=True)
class Ground:
    """What the protocol knows of the machine.

    Attributes:
        barrier: How to order work on its devices.
        gate_timeout_s: How long to wait for sections.
        reach: How many steps back the tier that snapshots are taken into shall reach, where it has slots to spare; 0:
            what is given up is the oldest.
        drained: How many slots of the host tier drained snapshots may fill.
        drained_reach: How many steps back those shall reach.
    """

    barrier: Barrier
    gate_timeout_s: float | None = None
    reach: int = 0
    drained: int = 0
    drained_reach: int = 0


def pre_barrier(ground: Ground, places: Places) -> Protocol:
    """Order everything launched so far, on any (`streams`: any known) stream of any device, before our copies."""
    if ground.barrier is Barrier.BLOCKING:
        for device in places.queued:
            yield Synchronize(device)
    elif ground.barrier.has_events:
        events = []
        if ground.barrier is Barrier.STREAMS:
            here: Streams = yield CallerStreams()  # what the caller has launched himself is meant as well
            for device, stream in (yield from known_streams(here)):
                events.append((device, (yield KnownRecord(device, stream))))
            for device in places.queued:
                # one that was given up may still be writing to its slot
                transferred = yield TransferRecord(device)
                events += [(device, transferred)] if transferred is not None else []
        else:
            for device in places.queued:
                events.append((device, (yield ContextRecord(device))))
        # a tensor of one device may be written by work of another: every copy stream waits for all of them
        for device in places.queued:
            for _, event in events:
                yield StreamWait(device, event)
        if places.pinned:
            for device, event in events:
                yield HostWait(device, event)


def post_barrier(ground: Ground, places: Places) -> Protocol:
    """Order the governor's work before everything launched from now on, on any stream of any device.

    With `streams`: on any known stream, and on any other as soon as it becomes known. Answers the events at which that
    work ends.
    """
    if ground.barrier is Barrier.BLOCKING:
        for device in places.queued:
            yield Synchronize(device)
    if not ground.barrier.has_events:
        return ()
    events: Events = yield from record(places)
    yield from order_behind(ground, events)
    return events


def order_behind(ground: Ground, events: Events) -> Protocol:
    """Everything launched from now on waits for the events. No graph capture may be in progress."""
    if ground.barrier is Barrier.STREAMS:
        yield Change("streams that become known wait", lambda s: (replace(s, latest=events), None))
        yield from wait_known((yield from known_streams()), events)
    else:
        yield from wait_everywhere(events)


def copies_done(ground: Ground, places: Places) -> Protocol:
    """Mark the end of a capture. With a device queue: events for writers to wait for; else wait here, or nothing."""
    if ground.barrier is Barrier.BLOCKING:
        for device in places.queued:
            yield Synchronize(device)
    if not ground.barrier.has_events:
        return ()
    return (yield from record(places))


def record(places: Places) -> Protocol:
    """An event on the governor's own stream of every device. Answers (device, event) pairs."""
    events = []
    for device in places.queued:
        events.append((device, (yield StreamRecord(device))))
    return tuple(events)


def break_off(error: BaseException, doing: str, advice: str) -> Protocol:
    """A restore has raised behind its first write: mark the train state as torn, and raise `RollbackFailed`.

    Returns where a device is lost: that error says all there is to say, and is for the caller to raise again.
    """
    yield Change("mark the train state as torn", lambda s: (replace(s, torn=True), None))
    if not isinstance(error, DeviceLost):
        raise RollbackFailed(doing, f"{type(error).__name__} after the first write: {error}", advice) from error


def copies(slot: int, places: Places, part: Part, direction: Direction) -> Protocol:
    """One part of a slot, everywhere. The host's copies last: they run while the queued ones are under way."""
    for device in (*places.queued, *places.host):
        yield Copy(slot, device, part, direction)
