"""TARGET: which snapshot a rollback goes to."""

from __future__ import annotations

from collections.abc import Callable

from tolaria import ring
from tolaria.errors import NoSnapshot
from tolaria.report import SnapshotInfo
from tolaria.ring import Ring, Slot

Target = SnapshotInfo | int | None
"""A snapshot, the step of one, or None: the newest good one."""


def chooser(
    to: Target, generations_back: int, onset: int | None, steps_back: int = 0
) -> Callable[[Ring, int | None], Slot | None]:
    """The choice as the protocol asks for it: of the ring, and only below a serial number where one is given.

    Args:
        to: What was asked for.
        generations_back: With `to` None: that many good snapshots further back, as far as there are any.
        onset: With `to` None: only snapshots from before this step, if there is one.
        steps_back: With `onset`: and at least that many steps before it; where none is, the oldest from before it.
    """

    def newest(slots: Ring, before: int | None) -> Slot | None:
        chosen = ring.newest_good(slots, before)
        if onset is not None:
            earlier = tuple(slot for slot in slots if slot.completed < onset)
            found = ring.newest_good(earlier, before)
            slots, chosen = (slots, chosen) if found is None else (earlier, found)
        while steps_back and onset is not None and chosen is not None and chosen.completed + steps_back > onset:
            older = ring.newest_good(slots, chosen.snapshot)
            if older is None:
                break
            chosen = older
        for _ in range(generations_back):
            older = None if chosen is None else ring.newest_good(slots, chosen.snapshot)
            chosen = older or chosen
        return chosen

    def named(slots: Ring, before: int | None) -> Slot | None:
        if before is not None:  # the one that was asked for is corrupted: only an older good one will do
            return ring.newest_good(slots, before)
        slot = ring.by_step(slots, to) if isinstance(to, int) else ring.by_serial(slots, to.serial if to else -1)
        if slot is None:
            held = sorted({s.step for s in slots if s.phase in ring.READABLE})
            wanted = f"step {to}" if isinstance(to, int) else f"the snapshot of step {to.step if to else None}"
            raise NoSnapshot(
                "rolling back",
                f"{wanted} is not held, held are steps {held}",
                "Choose one of those, or leave `to` out.",
            )
        return slot

    return newest if to is None else named
