"""Parts of the protocol: what is done with a slot after its copies are ordered. None of it needs the gate.

Sealing reads a slot back; draining copies it into the other tier. Both pin it meanwhile, so that nobody claims it.
"""

from __future__ import annotations

from tolaria import ring
from tolaria.admission import refuse_in_capture
from tolaria.barriers import Ground
from tolaria.gate import ThreadId
from tolaria.operations import (
    Await,
    Barrier,
    Change,
    Events,
    HostState,
    HostWait,
    Inspect,
    Inspection,
    Protocol,
    Reserve,
    Transfer,
)
from tolaria.ring import Ring
from tolaria.values import replace


def seal(thread: ThreadId, slot: int, serial: int, vouched: bool, ground: Ground) -> Protocol:
    """Read a staged slot back: take its digest and look for non-finite values. Needs no gate: it reads the slot only.

    Args:
        thread: The calling thread.
        slot: Index in the ring.
        serial: Serial number of the snapshot that should be there.
        vouched: A manual snapshot is kept even if it is not finite: its caller vouches for it.
        ground: Barrier and time-out.

    Returns:
        The `Inspection`; None when the slot has moved on meanwhile.
    """
    if not (yield from _pin(slot, serial)):
        return None
    try:
        found: Inspection = yield from read(thread, slot, ground)
        settle = ring.release if found.nonfinite and not vouched else ring.seal
        yield Change("settle", lambda s: (replace(s, ring=settle(s.ring, slot, serial)), None))
        return found
    finally:
        yield Change("unpin", lambda s: (replace(s, ring=ring.pin(s.ring, slot, -1)), None))


def reinspect(thread: ThreadId, slot: int, serial: int, ground: Ground, at_rest: bool = False) -> Protocol:
    """Compare a slot's bytes with its digest. Needs no gate. None when the slot has moved on.

    With `at_rest`: and take a digest of what accelerators' storages have in main memory, if there is none yet.
    """
    if not (yield from _pin(slot, serial)):
        return None
    try:
        return (yield from read(thread, slot, ground, again=True, at_rest=at_rest))
    finally:
        yield Change("unpin", lambda s: (replace(s, ring=ring.pin(s.ring, slot, -1)), None))


def reinspect_restored(thread: ThreadId, slot: int, serial: int, ground: Ground) -> Protocol:
    """What the reading of the storages showed that were restored from a slot. None when the slot has moved on."""
    if not (yield from _pin(slot, serial)):
        return None
    try:
        return (yield from read(thread, slot, ground, live=True))
    finally:
        yield Change("unpin", lambda s: (replace(s, ring=ring.pin(s.ring, slot, -1)), None))


def read(
    thread: ThreadId, slot: int, ground: Ground, *, again: bool = False, live: bool = False, at_rest: bool = False
) -> Protocol:
    """Inspect a pinned slot. Reading a device may wait for it or take memory, which invalidates a graph capture."""
    if ground.barrier is Barrier.HOST:
        return (yield Inspect(slot, again, live, at_rest))
    yield from _keep_captures_away(thread, ground, "reading a snapshot")
    try:
        return (yield Inspect(slot, again, live, at_rest))
    finally:
        yield _let_captures_in()


def drain(thread: ThreadId, ground: Ground, source: int, serial: int) -> Protocol:
    """Copy a certified snapshot from the device tier into the host tier. Needs no gate: it reads a pinned slot only.

    Args:
        thread: The calling thread, which waits for the transfer: not one that trains.
        ground: Barrier, time-out, reach.
        source: Index in the ring.
        serial: Serial number of the snapshot that should be there.

    Returns:
        Index of the slot that holds it as well now; None when the snapshot has moved on, or no slot can be given up.
    """
    target: int | None = yield Change(
        "claim for draining",
        lambda s: _with_ring(s, ring.claim_for_draining(s.ring, source, serial, ground.drained_reach, ground.drained)),
    )
    if target is None:
        return None
    index, arrived = target, False
    try:
        yield from _keep_captures_away(thread, ground, "draining a snapshot")
        try:
            yield Reserve(index, like=source)
            events: Events = yield Transfer(source, index)
        finally:
            yield _let_captures_in()
        for device, event in events:
            yield HostWait(device, event)
        yield Inspect(index, at_rest=True)
        arrived = True
    finally:
        # the source is let go last: until here nobody may write over what the transfer reads
        if arrived:
            yield Change("drained", lambda s: (replace(s, ring=ring.drained(s.ring, source, index, serial)), None))
        else:
            yield Change(
                "give a transfer up",
                lambda s: (replace(s, ring=ring.release(ring.pin(s.ring, source, -1), index, serial)), None),
            )
    return index


def _with_ring(state: HostState, answer: tuple[Ring, int] | None) -> tuple[HostState, int | None]:
    return (state, None) if answer is None else (replace(state, ring=answer[0]), answer[1])


def _keep_captures_away(thread: ThreadId, ground: Ground, doing: str) -> Protocol:
    """Wait until no graph capture is in progress, and let none begin until `_let_captures_in`."""

    def enter(state: HostState) -> tuple[HostState, None] | None:
        refuse_in_capture(state, thread, doing, patient=True)
        return None if state.captures else (replace(state, ordering=state.ordering + 1), None)

    yield Await(f"{doing}: wait for graph captures", enter, ground.gate_timeout_s)


def _let_captures_in() -> Change:
    return Change("let captures in", lambda s: (replace(s, ordering=s.ordering - 1), None))


def _pin(slot: int, serial: int) -> Protocol:
    """Hold a slot against being claimed, if it still holds that snapshot. Answers whether it does."""

    def function(state: HostState) -> tuple[HostState, bool]:
        # this very slot: the other tier may hold the same snapshot still, while this one holds another
        if state.ring[slot].snapshot != serial or state.ring[slot].phase not in ring.READABLE:
            return state, False
        return replace(state, ring=ring.pin(state.ring, slot, 1)), True

    return (yield Change("pin", function))
