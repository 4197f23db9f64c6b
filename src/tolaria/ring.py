r"""The ring of slots: which snapshot is where, how far it may be trusted, and which one may be overwritten.

    FREE -> FILLING -> STAGED -> SEALED -> CERTIFIED
                 \-> FREE     \-> FREE (rejected: not finite)

*staged*: the copies are ordered; *sealed*: the bytes are known to be finite and their digest is taken; *certified*:
`probation` healthy steps followed. A manual snapshot is vouched for by its caller and is a rollback target from staged
on.

Pure values and pure transitions, like `gate`: the model checker explores this code.

A ring has slots of two tiers: beside the train state, in the memory of its devices; and in main memory (page-locked,
where the state is on an accelerator). Snapshots are taken into one of them, whichever was chosen; where that is the
device tier, certified snapshots are drained into the other one, which so reaches further back.

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
from dataclasses import dataclass
from enum import Enum

from tolaria.values import replace


class SlotPhase(Enum):
    """Life of one slot."""

    FREE = "free"  # holds nothing
    FILLING = "filling"  # being written; nobody may read it
    STAGED = "staged"  # every copy is ordered; readable behind its `done` event
    SEALED = "sealed"  # finite, digest taken
    CERTIFIED = "certified"  # sealed, and probation passed


class Tier(Enum):
    """Where the bytes of a slot are."""

    DEVICE = "device"  # beside the train state
    HOST = "host"  # in main memory


READABLE = (SlotPhase.STAGED, SlotPhase.SEALED, SlotPhase.CERTIFIED)  # no set: hashing an enum takes longer


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
        readers: Rollbacks and transfers that are reading it now.
        tier: Where its bytes are, fixed. Where the train state is in main memory, every slot is of the host tier.
    """

    index: int
    phase: SlotPhase = SlotPhase.FREE
    snapshot: int = -1
    step: int = -1
    manual: bool = False
    healthy: int = 0
    readers: int = 0
    completed: int = -1
    tier: Tier = Tier.HOST

    @property
    def is_good(self) -> bool:
        """A rollback may choose it by default: manual and readable, or certified."""
        return self.phase is SlotPhase.CERTIFIED or (self.manual and self.phase in READABLE)

    @property
    def in_probation(self) -> bool:
        """An automatic snapshot that is neither certified nor given up."""
        return not self.manual and self.phase in (SlotPhase.STAGED, SlotPhase.SEALED)


Ring = tuple[Slot, ...]


def empty_ring(host: int, device: int = 0) -> Ring:
    """A ring of free slots: those of the device tier first."""
    tiers = (*(Tier.DEVICE,) * device, *(Tier.HOST,) * host)
    return tuple(Slot(index, tier=tier) for index, tier in enumerate(tiers))


def newest_good(ring: Ring, before: int | None = None) -> Slot | None:
    """The newest manual or certified snapshot, optionally only among those with a serial number below `before`."""
    good = [slot for slot in ring if slot.is_good and (before is None or slot.snapshot < before)]
    return max(good, key=_age, default=None)


def newest_certified(ring: Ring) -> Slot | None:
    """The newest certified snapshot."""
    return max((slot for slot in ring if slot.phase is SlotPhase.CERTIFIED), key=_age, default=None)


def _age(slot: Slot) -> int:
    return slot.snapshot


def _free(slot: Slot) -> Slot:
    """The slot when it holds nothing any more. Its readers are still reading."""
    return Slot(slot.index, readers=slot.readers, tier=slot.tier)


def by_serial(ring: Ring, snapshot: int) -> Slot | None:
    """The slot that holds the snapshot with this serial number and may be read."""
    return next((slot for slot in ring if slot.snapshot == snapshot and slot.phase in READABLE), None)


def by_step(ring: Ring, step: int) -> Slot | None:
    """The newest readable snapshot taken after exactly `step` steps."""
    found = [slot for slot in ring if slot.step == step and slot.phase in READABLE]
    return max(found, key=lambda slot: slot.snapshot, default=None)


def claim(
    ring: Ring,
    snapshot: int,
    step: int,
    manual: bool,
    tier: Tier = Tier.HOST,
    reach: int = 0,
    most: int | None = None,
) -> tuple[Ring, int] | None:
    """Take a slot of one tier for writing: a free one, else a good one that may be given up.

    The newest certified snapshot is always kept, and so is the newest good one, except that a manual snapshot may take
    the place of an older manual one while a certified one stands behind it.

    Args:
        ring: The slots.
        snapshot: Serial number of the snapshot to be written.
        step: Its step number.
        manual: Vouched for by its caller.
        tier: Where to.
        reach: How many steps back the ring shall reach. What is given up is chosen by `thinnest`; 0: the oldest.
        most: Use that many slots of the tier, the first ones; None: all.

    Returns:
        The ring with that slot filling, and its index; None when every slot must be kept.
    """
    certified = newest_certified(ring)
    keep = {slot.snapshot for slot in (newest_good(ring), certified) if slot is not None}
    idle = [slot for slot in [slot for slot in ring if slot.tier is tier][:most] if not slot.readers]
    chosen = min((s for s in idle if s.phase is SlotPhase.FREE), key=lambda slot: slot.index, default=None)
    if chosen is None:
        # the place beside the train state is worth keeping; one in main memory is not, while there is another
        if tier is Tier.DEVICE:
            chosen = thinnest([s for s in idle if s.is_good and s.snapshot not in keep], ring, reach)
        chosen = chosen or thinnest([s for s in idle if s.is_good and not _is_kept(ring, s, keep)], ring, reach)
    if chosen is None and manual and certified is not None:
        chosen = min((s for s in idle if s.is_good and s.snapshot != certified.snapshot), key=_age, default=None)
    if chosen is None:
        return None
    filling = Slot(chosen.index, SlotPhase.FILLING, snapshot, step, manual, tier=tier)
    return _put(ring, filling), chosen.index


def _is_kept(ring: Ring, slot: Slot, keep: set[int]) -> bool:
    """Whether this is the only place of a snapshot that must be kept."""
    if slot.snapshot not in keep:
        return False
    return not any(other.snapshot == slot.snapshot and other.is_good for other in ring if other.index != slot.index)


def thinnest(candidates: list[Slot], ring: Ring, reach: int) -> Slot | None:
    """The snapshot that will be missed least.

    Ages grow like a geometric series: what goes is the one whose neighbours in time are closest to each other, measured
    by its age. The oldest stays until the next one is older than `reach` steps as well. With `reach` 0: the oldest.
    """
    if not candidates or reach <= 0:
        return min(candidates, key=_age, default=None)
    held = sorted({slot.completed for slot in ring if slot.is_good})
    now = held[-1]
    if sum(now - step >= reach for step in held) > 1:
        return min(candidates, key=_age)
    inner = [slot for slot in candidates if slot.completed > held[0]]

    def loss(slot: Slot) -> tuple[float, int]:
        older = max(step for step in held if step < slot.completed)
        newer = min((step for step in held if step > slot.completed), default=slot.completed)
        return (newer - older) / max(1, now - slot.completed), slot.snapshot

    return min(inner, key=loss) if inner else min(candidates, key=_age)


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
    return _put(ring, _free(slot))


def advance(ring: Ring, probation: int, step: int) -> Ring:
    """Count one healthy step for every candidate taken before it; certify those that have had `probation`."""

    def one(slot: Slot) -> Slot:
        if not slot.in_probation or slot.step >= step:
            return slot
        healthy = slot.healthy + 1
        if healthy >= probation and slot.phase is SlotPhase.SEALED:
            return replace(slot, healthy=healthy, phase=SlotPhase.CERTIFIED)
        return replace(slot, healthy=healthy)

    if not any(slot.in_probation for slot in ring):
        return ring
    return tuple(map(one, ring))


def certify(ring: Ring, index: int, snapshot: int) -> Ring:
    """Certify a sealed snapshot at once (the first of a run, before which nothing can have gone wrong)."""
    slot = ring[index]
    if slot.snapshot != snapshot or slot.phase is not SlotPhase.SEALED:
        return ring
    return _put(ring, replace(slot, phase=SlotPhase.CERTIFIED))


def suspend(ring: Ring) -> Ring:
    """A suspect step: the probation of every candidate begins again."""
    return tuple([replace(slot, healthy=0) if slot.healthy and slot.in_probation else slot for slot in ring])


def drop_newer(ring: Ring, snapshot: int) -> Ring:
    """After a rollback to `snapshot`: what was taken later belongs to the abandoned future and is dropped."""
    return tuple([_free(slot) if slot.snapshot > snapshot and slot.phase in READABLE else slot for slot in ring])


def rewind(ring: Ring, snapshot: int) -> Ring:
    """The healthy steps after that snapshot are undone, and will be judged again: they do not count for probation."""
    restored = next(slot for slot in ring if slot.snapshot == snapshot)

    def one(slot: Slot) -> Slot:
        left = max(0, restored.completed - slot.completed)
        return replace(slot, healthy=min(slot.healthy, left)) if slot.in_probation else slot

    return tuple(map(one, ring))


def drainable(ring: Ring, spacing: int) -> Slot | None:
    """The certified snapshot that the host tier should hold next: the newest, if it is `spacing` steps ahead of it."""
    certified = [slot for slot in ring if slot.phase is SlotPhase.CERTIFIED and slot.tier is Tier.DEVICE]
    newest = max(certified, key=_age, default=None)
    if newest is None:
        return None
    drained = [slot for slot in ring if slot.tier is Tier.HOST and slot.phase is not SlotPhase.FREE]
    if any(slot.phase is SlotPhase.FILLING or slot.snapshot >= newest.snapshot for slot in drained):
        return None  # one at a time
    ahead = min((newest.completed - slot.completed for slot in drained), default=spacing)
    return newest if ahead >= spacing else None


def claim_for_draining(ring: Ring, source: int, snapshot: int, reach: int, most: int) -> tuple[Ring, int] | None:
    """Pin a certified slot as the source of a transfer, and claim one of the host tier for it.

    Returns:
        The ring, and the index of the slot to fill; None if the source has moved on, or nothing can be given up.
    """
    slot = ring[source]
    if slot.snapshot != snapshot or slot.phase is not SlotPhase.CERTIFIED:
        return None
    claimed = claim(pin(ring, source, 1), snapshot, slot.step, False, Tier.HOST, reach, most)
    if claimed is None:
        return None
    after, index = claimed
    return _put(after, replace(after[index], completed=slot.completed, manual=slot.manual)), index


def drained(ring: Ring, source: int, target: int, snapshot: int) -> Ring:
    """A transfer is over: its target holds what its source holds, unless that was dropped or given up meanwhile."""
    slots = pin(ring, source, -1)
    if slots[target].snapshot != snapshot or slots[target].phase is not SlotPhase.FILLING:
        return slots
    if slots[source].snapshot != snapshot or slots[source].phase is not SlotPhase.CERTIFIED:
        return _put(slots, _free(slots[target]))
    return _put(slots, replace(slots[target], phase=SlotPhase.CERTIFIED))


def pin(ring: Ring, index: int, by: int) -> Ring:
    """Add (`by` = 1) or remove (`by` = -1) a reader."""
    return _put(ring, replace(ring[index], readers=ring[index].readers + by))


def count(ring: Ring, wanted: Callable[[Slot], bool]) -> int:
    """How many slots fulfil a condition."""
    return sum(map(wanted, ring))


def _put(ring: Ring, slot: Slot) -> Ring:
    return (*ring[: slot.index], slot, *ring[slot.index + 1 :])
