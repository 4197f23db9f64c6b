"""The protocol: section, snapshot, seal and rollback as generators that yield explicit operations. Sans-I/O.

A generator decides *what happens in which order*; it never touches a tensor, a lock or a device. Whoever drives it
performs each yielded operation and sends the result back (or throws the exception that performing it raised):

    op = next(generator); result = perform(op); op = generator.send(result); ...

All shared state is one immutable `HostState`, and it changes only through `Change` and `Await`, whose functions are
pure. A generator keeps nothing but what it was sent. So an explorer can save a run as (program, results so far) and
branch it, and what it explores is this file.

Order of a rollback, and why each edge is there:
    exclusive gate      no other host thread launches between the two barriers, and no graph capture is in progress
    check               a mismatch is found before the first write
    pre barrier         work launched earlier, on any stream, finishes before the copies
    copies              slot -> storages, in place
    host state          schedulers, hyper-parameters, random state; gradients dropped; version counters bumped; what
                        of this is work for a device goes to the stream of the copies
    post barrier        work launched later, on any stream, starts after all of that
    epoch + 1           backward passes that straddle this point are recognised as stale
    gate released       never held while waiting for a device, except by the ``blocking`` barrier

A snapshot has no post barrier: writers wait for its `done` events lazily when they open their next section. Buffers
are copied first and have events of their own, because a train-mode forward writes them before any optimizer does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tolaria import ring
from tolaria.admission import (
    announce,
    announce_exclusive,
    enter_exclusive,
    leave_exclusive,
    refuse_in_capture,
    wait_everywhere,
)
from tolaria.errors import (
    DeviceLost,
    NoSnapshot,
    PhaseError,
    RollbackFailed,
    SlotsBusy,
    SnapshotRejected,
)
from tolaria.gate import ThreadId
from tolaria.operations import (
    Await,
    Barrier,
    CaptureHost,
    Change,
    Check,
    ContextRecord,
    Copy,
    Direction,
    Events,
    Examine,
    HostState,
    HostWait,
    Inspect,
    Inspection,
    Op,
    Part,
    Places,
    Protocol,
    Reserve,
    RestoreHost,
    StreamRecord,
    StreamWait,
    Survey,
    Synchronize,
)
from tolaria.ring import Ring, Slot


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
    done: Events = ()  # when the copies have been made
    completed: int = -1  # optimizer steps completed when it was taken


@dataclass(frozen=True, slots=True)
class RolledBack:
    """Result of `rollback`."""

    slot: Slot
    epoch: int
    corrupted: tuple[int, ...]  # steps of newer snapshots that were found corrupted and given up
    waited_s: float
    began: Events = ()  # when the device began to copy,
    copied: Events = ()  # when it had copied, and
    done: Events = ()  # when everything else that it had to do for this rollback was done


# ---------------------------------------------------------------- barriers


def _pre_barrier(ground: Ground, places: Places) -> Protocol:
    """Order everything launched so far, on any stream of any device, before the governor's copies."""
    if ground.barrier is Barrier.BLOCKING:
        for device in places.queued:
            yield Synchronize(device)
    elif ground.barrier is Barrier.CONTEXT:
        events = []
        for device in places.queued:
            events.append((device, (yield ContextRecord(device))))
        # a tensor of one device may be written by work of another: every copy stream waits for all of them
        for device in places.queued:
            for _, event in events:
                yield StreamWait(device, event)
        if places.pinned:
            for device, event in events:
                yield HostWait(device, event)


def _post_barrier(ground: Ground, places: Places) -> Protocol:
    """Order the governor's work before everything launched from now on, on any stream of any device.

    Answers the events at which that work ends.
    """
    if ground.barrier is Barrier.BLOCKING:
        for device in places.queued:
            yield Synchronize(device)
    if ground.barrier is not Barrier.CONTEXT:
        return ()
    events: Events = yield from _record(places)
    yield from wait_everywhere(events)
    return events


def _copies_done(ground: Ground, places: Places) -> Protocol:
    """Mark the end of a capture. With a device queue: events for writers to wait for; else wait here, or nothing."""
    if ground.barrier is Barrier.BLOCKING:
        for device in places.queued:
            yield Synchronize(device)
    if ground.barrier is not Barrier.CONTEXT:
        return ()
    return (yield from _record(places))


def _record(places: Places) -> Protocol:
    """An event on the governor's own stream of every device. Answers (device, event) pairs."""
    events = []
    for device in places.queued:
        events.append((device, (yield StreamRecord(device))))
    return tuple(events)


def _copies(slot: int, places: Places, part: Part, direction: Direction) -> Protocol:
    """One part of a slot, everywhere. The host's copies last: they run while the queued ones are under way."""
    for device in (*places.queued, *places.host):
        yield Copy(slot, device, part, direction)


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
        PhaseError, CaptureInProgress, QuiesceTimeout, SlotsBusy, UnsupportedState: nothing was changed.
        BudgetExceeded, and whatever else fails later: the snapshot whose slot was claimed is gone. That is one which
            this snapshot would have replaced, never the newest certified one.
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

    yield announce(thread, doing, patient=False)
    try:
        waited_s = yield from enter_exclusive(thread, ground.gate_timeout_s, doing, patient=False)
        places: Places = yield Survey()
        slot, serial = yield Change("claim a slot", claim)
        claimed.append((slot, serial))
        yield from _pre_barrier(ground, places)
        # behind the barrier: memory of the governor's stream may have been in the hands of the user's objects
        yield Reserve(slot)
        yield from _copies(slot, places, Part.BUFFERS, Direction.CAPTURE)
        buffers_done = yield from _copies_done(ground, places)
        yield from _copies(slot, places, Part.REST, Direction.CAPTURE)
        # before `done`: what an extra's state_dict clones on a device is read by the governor's stream as well
        counted: int | None = yield CaptureHost(slot)
        all_done: Events = yield from _copies_done(ground, places)
        pending = (buffers_done, all_done)
        if places.unguarded:
            yield from wait_everywhere(all_done)
            pending = ((), ())
        if ground.barrier is Barrier.CONTEXT:
            # behind the copies and before anything that may overwrite the slot; `seal` asks for the answer later
            yield Examine(slot)
        taken_at = counted if step is None else step

        # publish last: until here nobody can choose this slot
        yield Change(
            "publish",
            lambda s: (
                replace(
                    s,
                    ring=ring.publish(s.ring, slot, taken_at, -1 if counted is None else counted),
                    buffers_done=pending[0],
                    all_done=pending[1],
                ),
                None,
            ),
        )
        claimed.clear()
        return Taken(slot, serial, taken_at, waited_s, all_done, -1 if counted is None else counted)
    finally:
        for index, serial in claimed:
            yield Change(
                "give the slot up", lambda s, i=index, n=serial: (replace(s, ring=ring.release(s.ring, i, n)), None)
            )
        yield leave_exclusive(thread)


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
        found: Inspection = yield from _read(thread, slot, ground, again=False)
        settle = ring.release if found.nonfinite and not vouched else ring.seal
        yield Change("settle", lambda s: (replace(s, ring=settle(s.ring, slot, serial)), None))
        return found
    finally:
        yield Change("unpin", lambda s: (replace(s, ring=ring.pin(s.ring, slot, -1)), None))


def snapshot_and_seal(thread: ThreadId, ground: Ground, step: int | None, manual: bool) -> Protocol:
    """`snapshot`, then `seal` with the gate open again. Answers (`Taken`, `Inspection` or None)."""
    taken: Taken = yield from snapshot(thread, ground, step, manual)
    try:
        found = yield from seal(thread, taken.slot, taken.snapshot, manual, ground)
    except BaseException:
        # nobody learns of this snapshot: never sealed, it would hold its slot for ever
        yield Change(
            "give the slot up",
            lambda s: (replace(s, ring=ring.release(s.ring, taken.slot, taken.snapshot)), None),
        )
        raise
    return taken, found


def reinspect(thread: ThreadId, slot: int, serial: int, ground: Ground) -> Protocol:
    """Compare a slot's bytes with its digest. Needs no gate. None when the slot has moved on."""
    if not (yield from _pin(slot, serial)):
        return None
    try:
        return (yield from _read(thread, slot, ground, again=True))
    finally:
        yield Change("unpin", lambda s: (replace(s, ring=ring.pin(s.ring, slot, -1)), None))


def _read(thread: ThreadId, slot: int, ground: Ground, *, again: bool) -> Protocol:
    """Inspect a pinned slot. Reading a device may wait for it or take memory, which invalidates a graph capture."""
    if ground.barrier is Barrier.HOST:
        return (yield Inspect(slot, again))

    def enter(state: HostState) -> tuple[HostState, None] | None:
        refuse_in_capture(state, thread, "reading a snapshot", patient=True)
        return None if state.captures else (replace(state, ordering=state.ordering + 1), None)

    yield Await("read a snapshot: wait for graph captures", enter, ground.gate_timeout_s)
    try:
        return (yield Inspect(slot, again))
    finally:
        yield Change("read", lambda s: (replace(s, ordering=s.ordering - 1), None))


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
    patient: bool = False,
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
        patient: Wait for graph captures of other threads to end, instead of raising.

    Returns:
        `RolledBack`.

    Raises:
        PhaseError, CaptureInProgress, QuiesceTimeout, NoSnapshot, StateMismatch, SnapshotRejected: nothing was written.
        RollbackFailed: an operation failed after the first write.
    """
    pinned: list[int] = []
    corrupted: list[Slot] = []
    wrote = announced = False

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

    def commit(state: HostState, restored: int) -> tuple[HostState, int]:
        epoch = state.epoch + 1
        slots = ring.suspend(ring.drop_newer(state.ring, restored))
        # captured gradients belong to the new epoch, those of a backward that has ended since the dropping do not
        oldest = epoch if alive and state.grad_epoch is None else state.grad_epoch
        return replace(state, ring=slots, epoch=epoch, grad_epoch=oldest, torn=False), epoch

    def may_run(state: HostState) -> tuple[HostState, None]:
        announce_exclusive(state, thread, doing, patient)  # raises what the real one would
        return state, None

    def intact() -> Protocol:
        while True:
            slot: Slot = yield Change("choose a snapshot", select)
            pinned.append(slot.index)
            found: Inspection = yield from _read(thread, slot.index, ground, again=True)
            if found.intact:
                return slot
            corrupted.append(slot)
            pinned.clear()
            yield Change("discard a corrupted snapshot", discard)

    def choose_again(state: HostState, slot: Slot | None) -> tuple[HostState, Slot | None]:
        chosen, answer = select(state)
        if slot is None:
            return chosen, answer
        if answer.snapshot == slot.snapshot:
            return state, slot  # pinned already
        # a newer snapshot was published meanwhile, or a rollback of another thread has dropped what had been read
        return replace(state, ring=ring.pin(state.ring, slot.index, -1)), None

    try:
        while True:
            read: Slot | None = None
            if verify_before:
                # with the gate open: this reads the slot only, and may take its time
                yield Change("may it run?", may_run)
                read = yield from intact()
            yield announce(thread, doing, patient)
            announced = True
            waited_s = yield from enter_exclusive(thread, ground.gate_timeout_s, doing, patient)
            target: Slot | None = yield Change("choose a snapshot", lambda s, slot=read: choose_again(s, slot))
            if target is not None:
                pinned[:] = [target.index]
                break
            pinned.clear()
            yield leave_exclusive(thread)
            announced = False
        places: Places = yield Check(target.index)
        # the copies below run on the stream that filled the slot, so they are ordered behind its `done` by themselves
        yield from _pre_barrier(ground, places)
        began: Events = () if ground.barrier is not Barrier.CONTEXT else (yield from _record(places))
        wrote = True
        alive = False
        try:
            for part in Part:
                yield from _copies(target.index, places, part, Direction.RESTORE)
            copied: Events = () if ground.barrier is not Barrier.CONTEXT else (yield from _record(places))
            # before the post barrier: gradients zeroed in place and what an extra loads are device work too
            # before they are dropped: a backward that ends afterwards leaves others. Running ones are not forgotten
            yield Change("forget the gradients", lambda s: (replace(s, grad_epoch=None), None))
            alive = yield RestoreHost(target.index, reset)
        finally:
            done: Events = yield from _post_barrier(ground, places)
        epoch = yield Change("commit", lambda s: commit(s, target.snapshot))
        return RolledBack(target, epoch, tuple(slot.step for slot in corrupted), waited_s, began, copied, done)
    except BaseException as error:
        if wrote and not isinstance(error, GeneratorExit):
            yield Change("mark the train state as torn", lambda s: (replace(s, torn=True), None))
            if isinstance(error, DeviceLost):
                raise
            raise RollbackFailed(
                doing,
                f"{type(error).__name__} after the first write: {error}",
                "Call execute_rollback() again once the cause is mended (the snapshot is still held), or stop the run.",
            ) from error
        raise
    finally:
        for index in pinned:
            yield Change("unpin", lambda s, i=index: (replace(s, ring=ring.pin(s.ring, i, -1)), None))
        if announced:
            yield leave_exclusive(thread)


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
