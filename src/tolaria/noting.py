"""Part of the protocol: notes of single steps, and the way back to one. The order is that of `tolaria.protocol`.

A note is a snapshot without what optimizers leave behind by themselves (`tolaria.optim`). It is in no slot of the ring:
it is never sealed or certified, and only `step_back` goes back to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tolaria import ring
from tolaria.admission import announce, enter_exclusive, leave_exclusive
from tolaria.barriers import Ground, break_off, copies, copies_done, order_behind, post_barrier, pre_barrier, record
from tolaria.errors import StateMismatch
from tolaria.gate import ThreadId
from tolaria.operations import (
    PARTS,
    Barrier,
    CaptureHost,
    Change,
    Check,
    Direction,
    Events,
    HostState,
    Part,
    Places,
    Protocol,
    Reserve,
    RestoreHost,
    Survey,
)
from tolaria.ring import Ring
from tolaria.values import replace


@dataclass(frozen=True, slots=True)
class Place:
    """Where a note is.

    Attributes:
        index: Of its memory; no slot of the ring.
        step: Optimizer steps completed when it was taken.
        serial: Of the next snapshot then: of that one and later ones, those of later steps belong to its future.
    """

    index: int
    step: int
    serial: int


@dataclass(frozen=True, slots=True)
class SteppedBack:
    """Result of `step_back`."""

    place: Place
    epoch: int
    waited_s: float
    began: Events = ()  # when the device began to copy,
    copied: Events = ()  # when it had copied, and
    done: Events = ()  # when everything else that it had to do was done


def note(thread: ThreadId, ground: Ground, index: int) -> Protocol:
    """Take a note. As a snapshot: writers wait lazily for the copies of it.

    Args:
        thread: The calling thread.
        ground: Barrier and time-out.
        index: Memory for it; what it held is given up.

    Raises:
        PhaseError, CaptureInProgress, QuiesceTimeout, UnsupportedState: nothing was changed.
        BudgetExceeded, and whatever else fails later: what the memory held is gone.
    """
    doing = "noting a step"
    yield announce(thread, doing, patient=False)
    try:
        yield from enter_exclusive(thread, ground.gate_timeout_s, doing, patient=False)
        places: Places = yield Survey(False)
        yield from pre_barrier(ground, places)
        yield Reserve(index)
        yield from copies(index, places, Part.BUFFERS, Direction.CAPTURE)
        buffers_done = yield from copies_done(ground, places)
        yield from copies(index, places, Part.REST, Direction.CAPTURE)
        yield CaptureHost(index)
        all_done: Events = yield from copies_done(ground, places)
        pending = (buffers_done, all_done)
        if places.unguarded:
            yield from order_behind(ground, all_done)
            pending = ((), ())
        latest = all_done if ground.barrier is Barrier.STREAMS else ()

        def publish(state: HostState) -> tuple[HostState, None]:
            return replace(state, buffers_done=pending[0], all_done=pending[1], latest=latest), None

        yield Change("publish a note", publish)
    finally:
        yield leave_exclusive(thread)


def step_back(thread: ThreadId, ground: Ground, choose: Callable[[], Place], doing: str) -> Protocol:
    """Go back to a note, in place.

    Args:
        thread: The calling thread.
        ground: Barrier and time-out.
        choose: Picks the note, once nobody else can take or drop any; may raise.
        doing: For messages.

    Returns:
        `SteppedBack`.

    Raises:
        PhaseError, CaptureInProgress, QuiesceTimeout, StateMismatch, and what `choose` raises: nothing was written.
        RollbackFailed: An operation failed after the first write.
    """
    wrote = False

    def select(state: HostState) -> tuple[HostState, Place]:
        if state.torn:
            raise StateMismatch(
                doing,
                "a step raised half-way, so that what it has left behind may be half of it",
                "Use execute_rollback(), which needs nothing of that step.",
            )
        return state, choose()

    yield announce(thread, doing, patient=False)
    try:
        waited_s = yield from enter_exclusive(thread, ground.gate_timeout_s, doing, patient=False)
        place: Place = yield Change("choose a note", select)
        places: Places = yield Check(place.index)
        # what the steps have left behind was written on streams of theirs: the copies wait for that as well
        yield from pre_barrier(ground, places)
        began: Events = () if not ground.barrier.has_events else (yield from record(places))
        wrote = True
        try:
            for part in PARTS:
                yield from copies(place.index, places, part, Direction.RESTORE)
            copied: Events = () if not ground.barrier.has_events else (yield from record(places))
            yield Change("forget the gradients", lambda s: (replace(s, grad_epoch=None), None))
            alive: bool = yield RestoreHost(place.index)
        finally:
            # and the next step writes over it: behind them
            done: Events = yield from post_barrier(ground, places)

        def commit(state: HostState) -> tuple[HostState, int]:
            epoch = state.epoch + 1
            slots = ring.suspend(_without_future(state.ring, place))
            oldest = epoch if alive and state.grad_epoch is None else state.grad_epoch
            return replace(state, ring=slots, epoch=epoch, grad_epoch=oldest), epoch

        epoch: int = yield Change("commit", commit)
        return SteppedBack(place, epoch, waited_s, began, copied, done)
    except BaseException as error:
        if wrote and not isinstance(error, GeneratorExit):
            advice = "Call execute_rollback(), which goes back to a snapshot of the ring, or stop the run."
            yield from break_off(error, doing, advice)
        raise
    finally:
        yield leave_exclusive(thread)


def _without_future(slots: Ring, place: Place) -> Ring:
    """A snapshot that was taken after the note and before the next step is as good as it was."""
    for slot in slots:
        if slot.phase in ring.READABLE and slot.snapshot >= place.serial and slot.completed > place.step:
            slots = ring.release(slots, slot.index, slot.snapshot)
    return slots
