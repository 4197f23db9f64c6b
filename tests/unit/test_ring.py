"""The ring as plain functions: what is kept, what may be overwritten, what is certified."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tolaria import ring
from tolaria.ring import Slot, SlotPhase


def taken(slots, serial, step, *, manual=False, sealed=True, certified=False):
    slots, index = ring.claim(slots, serial, step, manual)
    slots = ring.publish(slots, index)
    if sealed or certified:
        slots = ring.seal(slots, index, serial)
    return ring.certify(slots, index, serial) if certified else slots


def test_life_of_an_automatic_snapshot():
    slots, index = ring.claim(ring.empty_ring(3), 0, 10, False)
    assert slots[index].phase is SlotPhase.FILLING
    assert ring.by_serial(slots, 0) is None  # nobody may read it yet
    slots = ring.publish(slots, index)
    assert ring.newest_good(slots) is None
    slots = ring.advance(ring.seal(slots, index, 0), probation=2, step=11)
    assert slots[index].phase is SlotPhase.SEALED
    slots = ring.advance(slots, probation=2, step=12)
    assert ring.newest_good(slots).snapshot == 0


def test_the_step_that_was_snapshotted_does_not_count_for_it():
    slots = taken(ring.empty_ring(3), 0, 10)
    assert ring.advance(slots, probation=1, step=10) == slots
    assert ring.newest_good(ring.advance(slots, probation=1, step=11)) is not None


def test_unsealed_snapshots_are_not_certified_however_long_they_wait():
    slots = taken(ring.empty_ring(3), 0, 0, sealed=False)
    for step in range(1, 9):
        slots = ring.advance(slots, probation=2, step=step)
    assert ring.newest_good(slots) is None


def test_suspicion_starts_probation_again():
    slots = ring.advance(taken(ring.empty_ring(3), 0, 0), probation=2, step=1)
    slots = ring.advance(ring.suspend(slots), probation=2, step=3)
    assert ring.newest_good(slots) is None
    assert ring.newest_good(ring.advance(slots, probation=2, step=4)) is not None


def test_a_manual_snapshot_is_good_as_soon_as_it_is_staged():
    assert ring.newest_good(taken(ring.empty_ring(2), 0, 0, manual=True, sealed=False)).snapshot == 0


def test_claim_takes_free_slots_then_the_oldest_good_but_the_newest():
    slots = ring.empty_ring(3)
    for serial in range(3):
        slots = taken(slots, serial, serial, certified=True)
    slots, index = ring.claim(slots, 3, 3, False)
    assert index == 0  # the oldest
    slots = ring.release(slots, index, 3)
    slots = taken(slots, 4, 4)
    assert ring.claim(slots, 5, 5, False)[1] == 1  # serial 1: 2 is the newest good, 4 is in probation


def test_claim_refuses_to_overwrite_the_last_good_or_a_candidate():
    slots = taken(taken(ring.empty_ring(2), 0, 0, certified=True), 1, 1)
    assert ring.claim(slots, 2, 2, True) is None


def test_claim_spares_slots_that_are_being_read():
    slots = taken(taken(ring.empty_ring(2), 0, 0, certified=True), 1, 1, certified=True)
    assert ring.claim(ring.pin(slots, 0, 1), 2, 2, False) is None
    assert ring.claim(ring.pin(ring.pin(slots, 0, 1), 0, -1), 2, 2, False)[1] == 0


def test_late_answers_for_a_slot_that_has_moved_on_change_nothing():
    slots = taken(ring.empty_ring(2), 7, 0)
    assert ring.seal(slots, 0, 6) == slots
    assert ring.release(slots, 0, 6) == slots
    assert ring.certify(slots, 0, 6) == slots


def test_a_rollback_drops_the_abandoned_future():
    slots = taken(taken(taken(ring.empty_ring(3), 0, 0, certified=True), 1, 5), 2, 9, manual=True)
    slots = ring.drop_newer(slots, 0)
    assert [slot.phase for slot in slots] == [SlotPhase.CERTIFIED, SlotPhase.FREE, SlotPhase.FREE]


@pytest.mark.parametrize("before", [None, 2, 1])
def test_newest_good_before_a_serial_number(before):
    slots = ring.empty_ring(3)
    for serial in range(3):
        slots = taken(slots, serial, serial, certified=True)
    expected = {None: 2, 2: 1, 1: 0}[before]
    assert ring.newest_good(slots, before).snapshot == expected


@given(st.lists(st.sampled_from(["take", "fail", "reject", "healthy", "suspect", "manual", "rollback"]), max_size=60))
def test_the_last_good_snapshot_is_never_lost(program):
    """Whatever happens, a good snapshot is only ever replaced by a newer good one, or chosen by a rollback."""
    slots, serial, step = taken(ring.empty_ring(4), 0, 0, certified=True), 1, 0
    for action in program:
        good = ring.newest_good(slots)
        assert good is not None
        if action in ("take", "fail", "reject", "manual"):
            claimed = ring.claim(slots, serial, step, action == "manual")
            if claimed is not None:
                slots, index = claimed
                assert index != good.index
                if action == "fail":
                    slots = ring.release(slots, index, serial)
                else:
                    slots = ring.publish(slots, index)
                    settle = ring.release if action == "reject" else ring.seal
                    slots = settle(slots, index, serial)
                serial += 1
        elif action == "healthy":
            step += 1
            slots = ring.advance(slots, 2, step)
        elif action == "suspect":
            step += 1
            slots = ring.suspend(slots)
        else:
            step = good.step
            slots = ring.drop_newer(slots, good.snapshot)
        now = ring.newest_good(slots)
        assert now is not None
        assert now.snapshot >= good.snapshot
        assert all(isinstance(slot, Slot) and slot.index == i for i, slot in enumerate(slots))


def test_after_a_routine_rollback_undone_steps_do_not_count_and_older_ones_still_do():
    """Taken after 4, 10 and 14 steps, gone back to 10: the first keeps 6 healthy steps of its 12, the second none."""
    slots = ring.empty_ring(4)
    for serial, step in enumerate((4, 10, 14)):
        slots, index = ring.claim(slots, serial, step, False)
        slots = ring.seal(ring.publish(slots, index, completed=step), index, serial)
        for healthy in range(step + 1, (10, 14, 16)[serial] + 1):
            slots = ring.advance(slots, probation=20, step=healthy)
    assert [slot.healthy for slot in slots[:3]] == [12, 6, 2]
    slots = ring.rewind(ring.drop_newer(slots, 1), 1)
    assert [(slot.snapshot, slot.healthy) for slot in slots] == [(0, 6), (1, 0), (-1, 0), (-1, 0)]
    suspended = ring.rewind(ring.suspend(slots), 1)
    assert [slot.healthy for slot in suspended] == [0, 0, 0, 0], "it gives nothing back"
