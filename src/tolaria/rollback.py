"""Part of the protocol: the rollback. The order of its steps, and why, is told in `tolaria.protocol`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tolaria import ring
from tolaria.admission import announce, announce_exclusive, enter_exclusive, leave_exclusive
from tolaria.barriers import Ground, break_off, copies, order_behind, post_barrier, pre_barrier, record
from tolaria.errors import DeviceLost, NoSnapshot, SnapshotRejected
from tolaria.gate import ThreadId
from tolaria.operations import (
    PARTS,
    Change,
    Check,
    Direction,
    Events,
    HostState,
    Inspection,
    Places,
    Protocol,
    ReadLive,
    RestoreHost,
)
from tolaria.ring import Ring, Slot
from tolaria.sealing import read
from tolaria.values import replace


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
    read_back: bool = False  # what was restored is read once more:
    read: Events = ()  # until then
    unread: Exception | None = None  # why it could not be


def rollback(
    thread: ThreadId,
    ground: Ground,
    choose: Callable[[Ring, int | None], Slot | None],
    doing: str,
    verify_before: bool = False,
    reset: tuple[Any, ...] = (),
    patient: bool = False,
    read_back: bool = False,
    routine: bool = False,
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
        read_back: Read what was restored, to notice a writer that the gate could not keep out.
        routine: Nothing was wrong, so probation does not begin again; steps undone count no longer.

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
        # + 1: the other tier may hold the same snapshot, intact
        slot = choose(state.ring, corrupted[-1].snapshot + 1 if corrupted else None)
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
        older = ring.drop_newer(state.ring, restored)
        slots = ring.rewind(older, restored) if routine else ring.suspend(older)
        # captured gradients belong to the new epoch, those of a backward that has ended since the dropping do not
        oldest = epoch if alive and state.grad_epoch is None else state.grad_epoch
        after = replace(state, ring=slots, epoch=epoch, grad_epoch=oldest, torn=False)
        if read_until:
            after = replace(after, buffers_done=read_until[0], all_done=read_until[1])
            after = replace(after, latest=read_until[2] if after.streams is not None else ())
        return after, epoch

    def may_run(state: HostState) -> tuple[HostState, None]:
        announce_exclusive(state, thread, doing, patient)  # raises what the real one would
        return state, None

    def intact() -> Protocol:
        while True:
            slot: Slot = yield Change("choose a snapshot", select)
            pinned.append(slot.index)
            found: Inspection = yield from read(thread, slot.index, ground, again=True)
            if found.intact:
                return slot
            corrupted.append(slot)
            pinned.clear()
            yield Change("discard a corrupted snapshot", discard)

    def choose_again(state: HostState, slot: Slot | None) -> tuple[HostState, Slot | None]:
        chosen, answer = select(state)
        if slot is None:
            return chosen, answer
        if (answer.index, answer.snapshot) == (slot.index, slot.snapshot):
            return state, slot  # pinned already
        # a newer snapshot was published meanwhile, or a rollback of another thread has dropped what had been read
        return replace(state, ring=ring.pin(state.ring, slot.index, -1)), None

    try:
        while True:
            checked: Slot | None = None
            if verify_before:
                # with the gate open: this reads the slot only, and may take its time
                yield Change("may it run?", may_run)
                checked = yield from intact()
            yield announce(thread, doing, patient)
            announced = True
            waited_s = yield from enter_exclusive(thread, ground.gate_timeout_s, doing, patient)
            target: Slot | None = yield Change("choose a snapshot", lambda s, slot=checked: choose_again(s, slot))
            if target is not None:
                pinned[:] = [target.index]
                break
            pinned.clear()
            yield leave_exclusive(thread)
            announced = False
        places: Places = yield Check(target.index)
        # the copies below run on the stream that filled the slot, so they are ordered behind its `done` by themselves
        yield from pre_barrier(ground, places)
        began: Events = () if not ground.barrier.has_events else (yield from record(places))
        wrote = True
        alive = False
        read_until: tuple[Events, ...] = ()
        unread: Exception | None = None
        try:
            for part in PARTS:
                yield from copies(target.index, places, part, Direction.RESTORE)
            copied: Events = () if not ground.barrier.has_events else (yield from record(places))
            # before the post barrier: gradients zeroed in place and what an extra loads are device work too
            # before they are dropped: a backward that ends afterwards leaves others. Running ones are not forgotten
            yield Change("forget the gradients", lambda s: (replace(s, grad_epoch=None), None))
            alive = yield RestoreHost(target.index, reset)
            if read_back and not ground.barrier.has_events:
                unread, _ = yield from _read_back(target.index, None, ground)
        finally:
            done: Events = yield from post_barrier(ground, places)
        if read_back and ground.barrier.has_events:
            unread, read_until = yield from _read_back(target.index, places, ground)
        epoch = yield Change("commit", lambda s: commit(s, target.snapshot))
        corrupted_steps = tuple(slot.step for slot in corrupted)
        read_events = read_until[2] if read_until else ()
        is_read = read_back and unread is None
        return RolledBack(target, epoch, corrupted_steps, waited_s, began, copied, done, is_read, read_events, unread)
    except BaseException as error:
        if wrote and not isinstance(error, GeneratorExit):
            held = (
                "Call execute_rollback() again once the cause is mended (the snapshot is still held), or stop the run."
            )
            yield from break_off(error, doing, held)
        raise
    finally:
        for index in pinned:
            yield Change("unpin", lambda s, i=index: (replace(s, ring=ring.pin(s.ring, i, -1)), None))
        if announced:
            yield leave_exclusive(thread)


def _read_back(slot: int, places: Places | None, ground: Ground) -> Protocol:
    """Read what was restored. With queues: behind the post barrier, so that readers go on at once; writers wait lazily.

    Answers why it could not be done, if so, and three ends: until then buffers may not be written, until then nothing
    may, and then the reading is there. Should writers come that wait for nobody, everything waits. A failure (out of
    memory) is none of the rollback, which stays unverified.
    """
    ends: list[Events] = []
    try:
        for part in PARTS:
            yield ReadLive(slot, part)
            ends.append(() if places is None else (yield from record(places)))
        if places is not None and places.unguarded:
            yield from order_behind(ground, ends[-1])
            return None, ((), (), ends[-1])
    except DeviceLost:
        raise
    except Exception as error:
        return error, ()
    return None, (ends[0], ends[-1], ends[-1])
