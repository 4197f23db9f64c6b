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
    reading back        what was restored is read once more; writers wait for the end of it lazily, readers do not
    epoch + 1           backward passes that straddle this point are recognised as stale
    gate released       never held while waiting for a device, except by the ``blocking`` barrier

The parts: `admission` (sections, captures, the exclusive side), `barriers`, `sealing` (reading slots back, draining),
`rollback`; the snapshot and the driver of all of them are here.

A snapshot has no post barrier: writers wait for its `done` events lazily when they open their next section. Buffers
are copied first and have events of their own, because a train-mode forward writes them before any optimizer does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tolaria import ring
from tolaria.admission import announce, enter_exclusive, leave_exclusive
from tolaria.barriers import Ground, copies, copies_done, order_behind, pre_barrier, record
from tolaria.errors import PhaseError, SlotsBusy
from tolaria.gate import ThreadId
from tolaria.operations import (
    Barrier,
    CaptureHost,
    Change,
    Direction,
    Events,
    Examine,
    HostState,
    Op,
    Part,
    Places,
    Protocol,
    Reserve,
    Survey,
)
from tolaria.ring import Tier
from tolaria.rollback import RolledBack, rollback
from tolaria.sealing import drain, reinspect, reinspect_restored, seal
from tolaria.values import replace

__all__ = [
    "Ground",
    "RolledBack",
    "Taken",
    "drain",
    "drive",
    "refuse_in_autograd",
    "reinspect",
    "reinspect_restored",
    "rollback",
    "seal",
    "snapshot",
    "snapshot_and_seal",
]


@dataclass(frozen=True, slots=True)
class Taken:
    """Result of `snapshot`."""

    slot: int
    snapshot: int
    step: int | None
    waited_s: float
    began: Events = ()  # when the devices began to copy
    done: Events = ()  # when the copies have been made
    completed: int = -1  # optimizer steps completed when it was taken


# ---------------------------------------------------------------- snapshot


def snapshot(thread: ThreadId, ground: Ground, step: int | None, manual: bool, gradients: bool = False) -> Protocol:
    """Stage one snapshot.

    Args:
        thread: The calling thread.
        ground: Barrier and time-out.
        step: Its step number; None: the optimizer steps completed when it is taken.
        manual: Vouched for by the caller, so a rollback target from now on.
        gradients: Hold live gradients too.

    Returns:
        `Taken`.

    Raises:
        PhaseError, CaptureInProgress, QuiesceTimeout, SlotsBusy, UnsupportedState: nothing was changed.
        BudgetExceeded, and whatever else fails later: the snapshot whose slot was claimed is gone. That is one which
            this snapshot would have replaced, never the newest certified one.
    """
    doing = "taking a snapshot" if step is None else f"taking a snapshot at step {step}"
    claimed: list[tuple[int, int]] = []

    def claim(state: HostState, tier: Tier) -> tuple[HostState, tuple[int, int]]:
        serial = state.next_snapshot
        answer = ring.claim(state.ring, serial, -1 if step is None else step, manual, tier, ground.reach)
        if answer is None:
            raise SlotsBusy(
                doing,
                f"all {ring.count(state.ring, lambda slot: slot.tier is tier)} slots of the {tier.value} tier hold the "
                "last good snapshot, a candidate in probation, or are being read",
                "Nothing was overwritten. Try again after the next healthy steps, or configure more slots.",
            )
        slots, index = answer
        return replace(state, ring=slots, next_snapshot=serial + 1), (index, serial)

    yield announce(thread, doing, patient=False)
    try:
        waited_s = yield from enter_exclusive(thread, ground.gate_timeout_s, doing, patient=False)
        places: Places = yield Survey(gradients)
        slot, serial = yield Change("claim a slot", lambda s: claim(s, places.tier))
        claimed.append((slot, serial))
        yield from pre_barrier(ground, places)
        # behind the barrier: memory of the governor's stream may have been in the hands of the user's objects
        yield Reserve(slot)
        began: Events = () if not ground.barrier.has_events else (yield from record(places))
        yield from copies(slot, places, Part.BUFFERS, Direction.CAPTURE)
        buffers_done = yield from copies_done(ground, places)
        yield from copies(slot, places, Part.REST, Direction.CAPTURE)
        # before `done`: what an extra's state_dict clones on a device is read by the governor's stream as well
        counted: int | None = yield CaptureHost(slot)
        all_done: Events = yield from copies_done(ground, places)
        pending = (buffers_done, all_done)
        if places.unguarded:
            yield from order_behind(ground, all_done)
            pending = ((), ())
        if ground.barrier.has_events:
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
                    latest=all_done if ground.barrier is Barrier.STREAMS else (),
                ),
                None,
            ),
        )
        claimed.clear()
        return Taken(slot, serial, taken_at, waited_s, began, all_done, -1 if counted is None else counted)
    finally:
        for index, serial in claimed:
            yield Change(
                "give the slot up", lambda s, i=index, n=serial: (replace(s, ring=ring.release(s.ring, i, n)), None)
            )
        yield leave_exclusive(thread)


def snapshot_and_seal(
    thread: ThreadId, ground: Ground, step: int | None, manual: bool, gradients: bool = False
) -> Protocol:
    """`snapshot`, then `seal` with the gate open again. Answers (`Taken`, `Inspection` or None)."""
    taken: Taken = yield from snapshot(thread, ground, step, manual, gradients)
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
