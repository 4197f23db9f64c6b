r"""The ring of slots: which snapshot is where, how far it may be trusted, and which one may be overwritten.

    FREE -> FILLING -> STAGED -> SEALED -> CERTIFIED
                 \-> FREE     \-> FREE (rejected: not finite)

*staged*: the copies are ordered; *sealed*: the bytes are known to be finite and their digest is taken; *certified*:
`probation` healthy steps followed. A manual snapshot is vouched for by its caller and is a rollback target from staged
on.

Pure values and pure transitions, like `gate`: the model checker explores this code.

Invariants
    * The newest certified snapshot is never claimed for writing, nor dropped before a newer one is certified.
    * The newest good snapshot (manual or certified) is not either, except a manual one by its manual successor, while a
      certified one stands behind it.
    * A candidate in probation is never claimed for writing.
    * Only a fence (`follow`) gives all of them up on purpose, for the manual snapshot that it has found finite.
    * A slot with readers (a rollback under way, a transfer out of it) is never claimed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum


class SlotPhase(Enum):
    """Life of one slot."""

    FREE = "free"  # holds nothing
    FILLING = "filling"  # being written; nobody may read it
    STAGED = "staged"  # every copy is ordered; readable behind its `done` event
    SEALED = "sealed"  # finite, digest taken
    CERTIFIED = "certified"  # sealed, and probation passed


READABLE = frozenset({SlotPhase.STAGED, SlotPhase.SEALED, SlotPhase.CERTIFIED})


@dataclass(frozen=True, slots=True)
class Slot:
    """One entry of the ring.

    Attributes:
        index: Position in the ring, fixed.
        phase: See `SlotPhase`.
        snapshot: Serial number of the snapshot held, unique within a governor; -1 when free.
        step: Its step number: the optimizer steps completed when it was taken, unless its caller chose another.
        completed: The optimizer steps completed when it was taken; -1 until it is published.
        manual: Vouched for by its caller.
        healthy: Healthy steps judged since.
        readers: Rollbacks that are reading it now.
    """

    index: int
    phase: SlotPhase = SlotPhase.FREE
    snapshot: int = -1
    step: int = -1
    manual: bool = False
    healthy: int = 0
    readers: int = 0
    completed: int = -1

    @property
    def is_good(self) -> bool:
        """A rollback may choose it by default: manual and readable, or certified."""
        return self.phase is SlotPhase.CERTIFIED or (self.manual and self.phase in READABLE)

    @property
    def in_probation(self) -> bool:
        """An automatic snapshot that is neither certified nor given up."""
        return not self.manual and self.phase in (SlotPhase.STAGED, SlotPhase.SEALED)


Ring = tuple[Slot, ...]


def empty_ring(num_slots: int) -> Ring:
    """A ring of free slots."""
    return tuple(Slot(index) for index in range(num_slots))


def newest_good(ring: Ring, before: int | None = None) -> Slot | None:
    """The newest manual or certified snapshot, optionally only among those with a serial number below `before`."""
    good = [slot for slot in ring if slot.is_good and (before is None or slot.snapshot < before)]
    return max(good, key=lambda slot: slot.snapshot, default=None)


def newest_certified(ring: Ring) -> Slot | None:
    """The newest certified snapshot."""
    return max((slot for slot in ring if slot.phase is SlotPhase.CERTIFIED), key=_age, default=None)


def _age(slot: Slot) -> int:
    return slot.snapshot


def by_serial(ring: Ring, snapshot: int) -> Slot | None:
    """The slot that holds the snapshot with this serial number and may be read."""
    return next((slot for slot in ring if slot.snapshot == snapshot and slot.phase in READABLE), None)


def by_step(ring: Ring, step: int) -> Slot | None:
    """The newest readable snapshot taken after exactly `step` steps."""
    found = [slot for slot in ring if slot.step == step and slot.phase in READABLE]
    return max(found, key=lambda slot: slot.snapshot, default=None)


def claim(ring: Ring, snapshot: int, step: int, manual: bool) -> tuple[Ring, int] | None:
    """Take a slot for writing: a free one, else the oldest good one that may be given up.

    The newest certified snapshot is always kept, and so is the newest good one, except that a manual snapshot may take
    the place of an older manual one while a certified one stands behind it.

    Returns:
        The ring with that slot filling, and its index; None when every slot must be kept.
    """
    certified = newest_certified(ring)
    keep = (newest_good(ring), certified)
    idle = [slot for slot in ring if not slot.readers]
    chosen = min((s for s in idle if s.phase is SlotPhase.FREE), key=lambda slot: slot.index, default=None)
    if chosen is None:
        chosen = min((s for s in idle if s.is_good and s not in keep), key=_age, default=None)
    if chosen is None and manual and certified is not None:
        chosen = min((s for s in idle if s.is_good and s is not certified), key=_age, default=None)
    if chosen is None:
        return None
    filling = Slot(chosen.index, SlotPhase.FILLING, snapshot, step, manual)
    return _put(ring, filling), chosen.index


def publish(ring: Ring, index: int, step: int | None = None, completed: int = -1) -> Ring:
    """The copies of a filling slot are ordered: it becomes readable, as the snapshot of `step` if that is known now."""
    slot = ring[index]
    known = slot.step if step is None else step
    return _put(ring, replace(slot, phase=SlotPhase.STAGED, step=known, completed=completed))


def seal(ring: Ring, index: int, snapshot: int) -> Ring:
    """Its bytes are finite and their digest is known. Without effect if the slot has moved on meanwhile."""
    slot = ring[index]
    if slot.snapshot != snapshot or slot.phase is not SlotPhase.STAGED:
        return ring
    return _put(ring, replace(slot, phase=SlotPhase.SEALED))


def release(ring: Ring, index: int, snapshot: int) -> Ring:
    """Give a slot up (failed, rejected, or corrupted). Without effect if it holds another snapshot by now."""
    slot = ring[index]
    if slot.snapshot != snapshot:
        return ring
    return _put(ring, replace(Slot(index), readers=slot.readers))


def advance(ring: Ring, probation: int, step: int) -> Ring:
    """Count one healthy step for every candidate taken before it; certify those that have had `probation`."""

    def one(slot: Slot) -> Slot:
        if not slot.in_probation or slot.step >= step:
            return slot
        healthy = slot.healthy + 1
        if healthy >= probation and slot.phase is SlotPhase.SEALED:
            return replace(slot, healthy=healthy, phase=SlotPhase.CERTIFIED)
        return replace(slot, healthy=healthy)

    return tuple(map(one, ring))


def certify(ring: Ring, index: int, snapshot: int) -> Ring:
    """Certify a sealed snapshot at once (the first of a run, before which nothing can have gone wrong)."""
    slot = ring[index]
    if slot.snapshot != snapshot or slot.phase is not SlotPhase.SEALED:
        return ring
    return _put(ring, replace(slot, phase=SlotPhase.CERTIFIED))


def suspend(ring: Ring) -> Ring:
    """A suspect step: the probation of every candidate begins again."""
    return tuple(replace(slot, healthy=0) if slot.in_probation else slot for slot in ring)


def drop_newer(ring: Ring, snapshot: int) -> Ring:
    """After a rollback to `snapshot`: what was taken later belongs to the abandoned future and is dropped."""

    def one(slot: Slot) -> Slot:
        newer = slot.snapshot > snapshot and slot.phase in READABLE
        return replace(Slot(slot.index), readers=slot.readers) if newer else slot

    return tuple(map(one, ring))


def pin(ring: Ring, index: int, by: int) -> Ring:
    """Add (`by` = 1) or remove (`by` = -1) a reader."""
    return _put(ring, replace(ring[index], readers=ring[index].readers + by))


def count(ring: Ring, wanted: Callable[[Slot], bool]) -> int:
    """How many slots fulfil a condition."""
    return sum(map(wanted, ring))


def _put(ring: Ring, slot: Slot) -> Ring:
    return (*ring[: slot.index], slot, *ring[slot.index + 1 :])
