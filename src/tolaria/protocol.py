"""The protocol: section, snapshot, seal and rollback as generators that yield explicit operations. Sans-I/O.

A generator decides *what happens in which order*; it never touches a tensor, a lock or a device. Whoever drives it
performs each yielded operation and sends the result back (or throws the exception that performing it raised):

    op = next(generator); result = perform(op); op = generator.send(result); ...

All shared state is one immutable `HostState`, and it changes only through `Change` and `Await`, whose functions are
pure. A generator keeps nothing but what it was sent. So an explorer can save a run as (program, results so far) and
branch it, and what it explores is this file.

Order of a rollback, and why each edge is there:
    exclusive gate      no other host thread launches between the two barriers
    check               a mismatch is found before the first write
    pre barrier         work launched earlier, on any stream, finishes before the copies
    copies              slot -> storages, in place
    post barrier        work launched later, on any stream, starts after the copies
    host state          schedulers, hyper-parameters, random state; gradients dropped; version counters bumped
    epoch + 1           backward passes that straddle this point are recognised as stale
    gate released       never held while waiting for a device, except by the ``blocking`` barrier

A snapshot has no post barrier: writers wait for its `done` events lazily when they open their next section. Buffers
are copied first and have events of their own, because a train-mode forward writes them before any optimizer does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tolaria import gate, ring
from tolaria.errors import CaptureInProgress, NoSnapshot, PhaseError, RollbackFailed, SlotsBusy, SnapshotRejected
from tolaria.gate import ThreadId
from tolaria.operations import (
    Await,
    Barrier,
    CallerWait,
    CaptureHost,
    Change,
    Check,
    ContextRecord,
    ContextWait,
    Copy,
    DeviceName,
    Direction,
    Events,
    HostState,
    Inspect,
    Inspection,
    Op,
    Part,
    Protocol,
    Reserve,
    RestoreHost,
    SectionKind,
    StreamRecord,
    StreamWait,
    Survey,
    Synchronize,
)
from tolaria.ring import Ring, Slot

Devices = tuple[DeviceName, ...]


@dataclass(frozen=True, slots=True)
class Ground:
    """What the protocol knows of the machine: how to order work on its devices, and how long to wait for sections."""

    barrier: Barrier
    gate_timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class Taken:
    """Result of `snapshot`."""

    slot: int
    snapshot: int
    step: int | None
    waited_s: float


@dataclass(frozen=True, slots=True)
class RolledBack:
    """Result of `rollback`."""

    slot: Slot
    epoch: int
    corrupted: tuple[int, ...]  # steps of newer snapshots that were found corrupted and given up
    waited_s: float


# ---------------------------------------------------------------- sections


def open_section(thread: ThreadId, kind: SectionKind, in_autograd: bool, timeout_s: float | None = None) -> Protocol:
    """Open a section for `thread`; its stream waits for copies that still read what the section may write.

    Returns:
        The epoch in which the section runs.
    """

    def enter(state: HostState) -> tuple[HostState, tuple[int, Events]] | None:
        entered = gate.enter_section(state.gate, thread, in_autograd)
        if entered is None:
            return None
        pending = {
            SectionKind.READ: (),
            SectionKind.FORWARD: state.buffers_done,
            SectionKind.WRITE: state.all_done,
        }[kind]
        return replace(state, gate=entered), (state.epoch, pending)

    (epoch, pending), _ = yield Await(f"open a {kind.value} section", enter, timeout_s)
    for device, event in pending:
        yield CallerWait(device, event)
    return epoch


def close_section(thread: ThreadId, to_depth: int) -> Protocol:
    """Close sections of `thread` until `to_depth` are left open."""
    yield Change("close a section", lambda s: (replace(s, gate=gate.leave_section(s.gate, thread, to_depth)), None))


# ---------------------------------------------------------------- barriers


def _pre_barrier(ground: Ground, devices: Devices) -> Protocol:
    """Order everything launched so far, on any stream of any device, before the governor's copies."""
    if ground.barrier is Barrier.BLOCKING:
        for device in devices:
            yield Synchronize(device)
    elif ground.barrier is Barrier.CONTEXT:
        events = []
        for device in devices:
            events.append((yield ContextRecord(device)))
        # a tensor of one device may be written by work of another: every copy stream waits for all of them
        for device in devices:
            for event in events:
                yield StreamWait(device, event)


def _post_barrier(ground: Ground, devices: Devices) -> Protocol:
    """Order the governor's copies before everything launched from now on, on any stream of any device."""
    if ground.barrier is Barrier.BLOCKING:
        for device in devices:
            yield Synchronize(device)
    elif ground.barrier is Barrier.CONTEXT:
        events = []
        for device in devices:
            events.append((yield StreamRecord(device)))
        for device in devices:
            for event in events:
                yield ContextWait(device, event)


def _copies_done(ground: Ground, devices: Devices) -> Protocol:
    """Mark the end of a capture. With a device queue: events for writers to wait for; else wait here, or nothing."""
    if ground.barrier is Barrier.BLOCKING:
        for device in devices:
            yield Synchronize(device)
    if ground.barrier is not Barrier.CONTEXT:
        return ()
    events = []
    for device in devices:
        events.append((device, (yield StreamRecord(device))))
    return tuple(events)


def _announce(thread: ThreadId, doing: str) -> Change:
    """Outside of the `try` that withdraws it: a refused call of the owner must not open the gate of the outer one."""

    def announce(state: HostState) -> tuple[HostState, None]:
        _refuse_in_capture(state, doing)
        return replace(state, gate=gate.announce_exclusive(state.gate, thread, doing)), None

    return Change("announce", announce)


def _enter_exclusive(thread: ThreadId, ground: Ground, doing: str) -> Protocol:
    def enter(state: HostState) -> tuple[HostState, None] | None:
        # a capture may have begun inside a section that was open when we announced: waiting for it could last for ever
        _refuse_in_capture(state, doing)
        entered = gate.enter_exclusive(state.gate, thread)
        return None if entered is None else (replace(state, gate=entered), None)

    _, waited_s = yield Await(f"{doing}: wait for open sections", enter, ground.gate_timeout_s)
    return waited_s


def _refuse_in_capture(state: HostState, doing: str) -> None:
    if state.captures:
        raise CaptureInProgress(
            doing,
            f"{len(state.captures)} graph captures are active, and any barrier would invalidate them",
            'Call it after capture_end, or pass when="boundary".',
        )


def _leave_exclusive(thread: ThreadId) -> Change:
    return Change("leave", lambda s: (replace(s, gate=gate.leave_exclusive(s.gate, thread)), None))


# ---------------------------------------------------------------- snapshot


def snapshot(thread: ThreadId, ground: Ground, step: int | None, manual: bool) -> Protocol:
    """Stage one snapshot.

    Args:
        thread: The calling thread.
        ground: Barrier and time-out.
        step: Its step number; None: the optimizer steps completed when it is taken.
        manual: Vouched for by the caller, so a rollback target from now on.

    Returns:
        `Taken`.

    Raises:
        PhaseError, QuiesceTimeout, SlotsBusy, UnsupportedState, BudgetExceeded: nothing was changed; every snapshot
            held so far is still there.
    """
    doing = "taking a snapshot" if step is None else f"taking a snapshot at step {step}"
    claimed: list[tuple[int, int]] = []

    def claim(state: HostState) -> tuple[HostState, tuple[int, int]]:
        serial = state.next_snapshot
        answer = ring.claim(state.ring, serial, -1 if step is None else step, manual)
        if answer is None:
            raise SlotsBusy(
                doing,
                f"all {len(state.ring)} slots hold the last good snapshot, a candidate in probation, or are being read",
                "Nothing was overwritten. Try again after the next healthy steps, or configure more slots.",
            )
        slots, index = answer
        return replace(state, ring=slots, next_snapshot=serial + 1), (index, serial)

    yield _announce(thread, doing)
    try:
        waited_s = yield from _enter_exclusive(thread, ground, doing)
        devices: Devices = yield Survey()
        slot, serial = yield Change("claim a slot", claim)
        claimed.append((slot, serial))
        yield Reserve(slot)
        yield from _pre_barrier(ground, devices)
        for device in devices:
            yield Copy(slot, device, Part.BUFFERS, Direction.CAPTURE)
        buffers_done = yield from _copies_done(ground, devices)
        for device in devices:
            yield Copy(slot, device, Part.REST, Direction.CAPTURE)
        all_done = yield from _copies_done(ground, devices)
        counted: int | None = yield CaptureHost(slot)
        taken_at = counted if step is None else step

        # publish last: until here nobody can choose this slot
        yield Change(
            "publish",
            lambda s: (
                replace(s, ring=ring.publish(s.ring, slot, taken_at), buffers_done=buffers_done, all_done=all_done),
                None,
            ),
        )
        claimed.clear()
        return Taken(slot, serial, taken_at, waited_s)
    finally:
        for index, serial in claimed:
            yield Change(
                "give the slot up", lambda s, i=index, n=serial: (replace(s, ring=ring.release(s.ring, i, n)), None)
            )
        yield _leave_exclusive(thread)


def seal(slot: int, serial: int, vouched: bool) -> Protocol:
    """Read a staged slot back: take its digest and look for non-finite values. Needs no gate: it reads the slot only.

    Args:
        slot: Index in the ring.
        serial: Serial number of the snapshot that should be there.
        vouched: A manual snapshot is kept even if it is not finite: its caller vouches for it.

    Returns:
        The `Inspection`; None when the slot has moved on meanwhile.
    """
    if not (yield from _pin(slot, serial)):
        return None
    try:
        found: Inspection = yield Inspect(slot)
        settle = ring.release if found.nonfinite and not vouched else ring.seal
        yield Change("settle", lambda s: (replace(s, ring=settle(s.ring, slot, serial)), None))
        return found
    finally:
        yield Change("unpin", lambda s: (replace(s, ring=ring.pin(s.ring, slot, -1)), None))


def snapshot_and_seal(thread: ThreadId, ground: Ground, step: int | None, manual: bool) -> Protocol:
    """`snapshot`, then `seal` with the gate open again. Answers (`Taken`, `Inspection` or None)."""
    taken: Taken = yield from snapshot(thread, ground, step, manual)
    try:
        found = yield from seal(taken.slot, taken.snapshot, vouched=manual)
    except BaseException:
        # nobody learns of this snapshot: never sealed, it would hold its slot for ever
        yield Change(
            "give the slot up",
            lambda s: (replace(s, ring=ring.release(s.ring, taken.slot, taken.snapshot)), None),
        )
        raise
    return taken, found


def reinspect(slot: int, serial: int) -> Protocol:
    """Compare a slot's bytes with its digest. Needs no gate. None when the slot has moved on."""
    if not (yield from _pin(slot, serial)):
        return None
    try:
        return (yield Inspect(slot))
    finally:
        yield Change("unpin", lambda s: (replace(s, ring=ring.pin(s.ring, slot, -1)), None))


def _pin(slot: int, serial: int) -> Protocol:
    """Hold a slot against being claimed, if it still holds that snapshot. Answers whether it does."""

    def function(state: HostState) -> tuple[HostState, bool]:
        if ring.by_serial(state.ring, serial) is None:
            return state, False
        return replace(state, ring=ring.pin(state.ring, slot, 1)), True

    return (yield Change("pin", function))


# ---------------------------------------------------------------- rollback


def rollback(
    thread: ThreadId,
    ground: Ground,
    choose: Callable[[Ring, int | None], Slot | None],
    doing: str,
    verify_before: bool = False,
    reset: tuple[Any, ...] = (),
) -> Protocol:
    """Restore one snapshot in place.

    Args:
        thread: The calling thread.
        ground: Barrier and time-out.
        choose: Picks the slot from the ring; its second argument, when not None, excludes snapshots from that serial
            number on (used to go further back past a corrupted one).
        doing: For messages.
        verify_before: Read the slot's digest before the first write, and fall back to an older snapshot on a mismatch.
        reset: Optimizers that were not governed at the snapshot; their state is cleared (a cold start).

    Returns:
        `RolledBack`.

    Raises:
        PhaseError, CaptureInProgress, QuiesceTimeout, NoSnapshot, StateMismatch, SnapshotRejected: nothing was written.
        RollbackFailed: an operation failed after the first write.
    """
    pinned: list[int] = []
    corrupted: list[Slot] = []
    wrote = False

    def select(state: HostState) -> tuple[HostState, Slot]:
        slot = choose(state.ring, corrupted[-1].snapshot if corrupted else None)
        if slot is None:
            if corrupted:
                raise SnapshotRejected(
                    doing,
                    f"the bytes of {len(corrupted)} snapshots changed since they were sealed, and none is older",
                    "Restart from a checkpoint on disk; this machine's memory is not to be trusted.",
                )
            raise NoSnapshot(
                doing,
                "there is no manual or certified snapshot to go back to, expected at least one",
                "Take one with snapshot(), or let the run reach its first certified snapshot.",
            )
        return replace(state, ring=ring.pin(state.ring, slot.index, 1)), slot

    def discard(state: HostState) -> tuple[HostState, None]:
        bad = corrupted[-1]
        slots = ring.release(ring.pin(state.ring, bad.index, -1), bad.index, bad.snapshot)
        return replace(state, ring=slots), None

    def commit(state: HostState) -> tuple[HostState, int]:
        epoch = state.epoch + 1
        slots = ring.suspend(ring.drop_newer(state.ring, target.snapshot))
        # finished backward passes are forgotten, since their gradients were dropped (captured ones, if the snapshot
        # holds any, belong to the new epoch); running passes are not
        return replace(state, ring=slots, epoch=epoch, grad_epoch=epoch if alive else None, torn=False), epoch

    yield _announce(thread, doing)
    try:
        waited_s = yield from _enter_exclusive(thread, ground, doing)
        while True:
            target = yield Change("choose a snapshot", select)
            pinned.append(target.index)
            devices: Devices = yield Check(target.index)
            if not verify_before:
                break
            found: Inspection = yield Inspect(target.index)
            if found.intact:
                break
            corrupted.append(target)
            yield Change("discard a corrupted snapshot", discard)
            pinned.clear()
        # the copies below run on the stream that filled the slot, so they are ordered behind its `done` by themselves
        yield from _pre_barrier(ground, devices)
        wrote = True
        for device in devices:
            for part in Part:
                yield Copy(target.index, device, part, Direction.RESTORE)
        yield from _post_barrier(ground, devices)
        alive: bool = yield RestoreHost(target.index, reset)
        epoch = yield Change("commit", commit)
        return RolledBack(target, epoch, tuple(slot.step for slot in corrupted), waited_s)
    except BaseException as error:
        if wrote and not isinstance(error, GeneratorExit):
            yield Change("mark the train state as torn", lambda s: (replace(s, torn=True), None))
            raise RollbackFailed(
                doing,
                f"{type(error).__name__} after the first write: {error}",
                "Call execute_rollback() again once the cause is mended (the snapshot is still held), or stop the run.",
            ) from error
        raise
    finally:
        for index in pinned:
            yield Change("unpin", lambda s, i=index: (replace(s, ring=ring.pin(s.ring, i, -1)), None))
        yield _leave_exclusive(thread)


def refuse_in_autograd(doing: str) -> PhaseError:
    """The error for a snapshot or rollback asked for from inside a backward pass."""
    return PhaseError(
        doing,
        "it was called from inside a backward pass (a tensor, module or post-accumulate hook); expected a boundary "
        "between two steps",
        'Pass when="boundary" to have it done at the next one.',
    )


def drive(protocol: Protocol, perform: Callable[[Op], Any]) -> Any:
    """Run a protocol to its end on one thread: perform every operation, hand back results and exceptions.

    Raises:
        Whatever the protocol lets out. Exceptions of `perform` are thrown *into* the protocol, whose own clean-up
        operations are then performed as well.
    """
    try:
        op = next(protocol)
        while True:
            try:
                result = perform(op)
            except BaseException as error:
                op = protocol.throw(error)
            else:
                op = protocol.send(result)
    except StopIteration as end:
        return end.value
