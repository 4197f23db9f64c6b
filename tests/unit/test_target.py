"""Which snapshot a rollback goes to."""

from __future__ import annotations

import pytest

from tolaria.errors import NoSnapshot
from tolaria.ring import Ring, Slot, SlotPhase
from tolaria.target import chooser

# certified after steps 10 and 20, by hand after step 30, one in probation, a free slot
SLOTS: Ring = (
    Slot(0, SlotPhase.CERTIFIED, snapshot=1, step=20, completed=20),
    Slot(1, SlotPhase.CERTIFIED, snapshot=0, step=10, completed=10),
    Slot(2, SlotPhase.SEALED, snapshot=2, step=30, completed=30, manual=True),
    Slot(3, SlotPhase.SEALED, snapshot=3, step=40, completed=40),
    Slot(4),
)


@pytest.mark.parametrize(
    ("generations", "onset", "steps", "before", "expected"),
    [
        (0, None, 0, None, 30),
        (0, None, 0, 2, 20),
        (0, 50, 0, None, 30),
        (0, 30, 0, None, 20),  # the one by hand was taken after the step in which the trouble began
        (0, 30, 0, 1, 10),
        (0, 10, 0, None, 30),  # none is from before it
        (0, 10, 0, 2, 20),
        (0, 25, 5, None, 20),
        (0, 25, 6, None, 10),
        (0, 25, 100, None, 10),  # as far as there are any
        (1, None, 0, None, 20),
        (1, 30, 0, None, 10),
        (9, 30, 0, None, 10),
    ],
)
def test_the_newest_good_one(
    generations: int, onset: int | None, steps: int, before: int | None, expected: int
) -> None:
    chosen = chooser(None, generations, onset, steps)(SLOTS, before)
    assert chosen is not None
    assert chosen.step == expected


def test_none_that_is_good() -> None:
    assert chooser(None, 1, 5)(SLOTS[3:], None) is None


def test_one_that_was_asked_for() -> None:
    choose = chooser(10, 0, None)
    assert choose(SLOTS, None) is SLOTS[1]
    assert choose(SLOTS, 2) is SLOTS[0]  # it is corrupted: an older good one
    with pytest.raises(NoSnapshot, match=r"step 99 is not held, held are steps \[10, 20, 30, 40\]"):
        chooser(99, 0, None)(SLOTS, None)
