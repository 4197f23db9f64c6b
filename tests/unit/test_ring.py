"""The ring as plain functions: what is kept, what may be overwritten, what is certified."""

import dataclasses
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tolaria import ring
from tolaria.ring import Slot, SlotPhase, Tier


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


# ------------------------------------------------------------ two tiers

DEVICE, HOST = Tier.DEVICE, Tier.HOST


def filled(*completed, tier=DEVICE, host=0, device=0):
    """A ring whose slots of one tier hold certified snapshots of these steps, serials counting from 0."""
    slots = ring.empty_ring(host, device)
    for serial, step in enumerate(completed):
        slots, index = ring.claim(slots, serial, step, False, tier)
        slots = ring.publish(slots, index, step, step)
        slots = ring.certify(ring.seal(slots, index, serial), index, serial)
    return slots


def test_slots_of_the_device_tier_come_first_and_are_claimed_for_it_only():
    slots = ring.empty_ring(2, 3)
    assert [slot.tier for slot in slots] == [DEVICE] * 3 + [HOST] * 2
    assert ring.claim(slots, 0, 0, False, HOST)[1] == 3
    assert ring.claim(slots, 0, 0, False, DEVICE)[1] == 0
    full = filled(0, 1, tier=HOST, host=2, device=3)
    assert ring.claim(full, 9, 9, False, HOST, most=1) is not None
    assert ring.claim(full, 9, 9, False, HOST, most=0) is None


@pytest.mark.parametrize("tier", list(Tier))
def test_a_slot_keeps_its_tier_for_life(tier):
    slots = filled(1, 2, 3, 4, tier=tier, host=2, device=2)
    slots = ring.drop_newer(ring.release(slots, 0, slots[0].snapshot), 0)
    assert [slot.tier for slot in slots] == [DEVICE, DEVICE, HOST, HOST]


def test_most_leaves_the_rest_of_a_tier_alone():
    slots = filled(0, 5, tier=HOST, host=4)
    assert ring.claim(slots, 9, 9, False, HOST, most=2)[1] == 0
    assert ring.claim(slots, 9, 9, False, HOST, most=3)[1] == 2


@pytest.mark.parametrize(
    ("steps", "reach", "goes"),
    [
        ((0, 10, 20, 30), 0, 0),  # no reach: the oldest
        ((0, 10, 20, 30), 1000, 10),  # neighbours 20 apart at age 20, and 20 apart at age 10: the older one
        ((0, 16, 24, 28, 30), 1000, 16),  # ages 30, 14, 6, 2: 24 / 14 is the least
        ((0, 16, 24, 28, 30), 16, 16),  # the only one beyond `reach` stays
        ((0, 16, 24, 28, 30), 14, 0),  # not any more when the next one is as far back
        ((0, 4, 24, 28, 30), 16, 0),  # two beyond: the older one
        ((7,), 100, 7),
    ],
)
def test_the_thinnest(steps, reach, goes):
    slots = filled(*steps, device=len(steps))
    candidates = list(slots[:-1]) if len(steps) > 1 else list(slots)
    chosen = ring.thinnest(candidates, slots, reach)
    assert chosen.completed == goes


def test_nothing_is_thinned_out_of_nothing():
    assert ring.thinnest([], filled(1, device=1), 5) is None


def test_ages_of_a_thinned_ring_grow_and_reach_back():
    """After many snapshots into few slots: the youngest is there, and something from far back as well."""
    slots, reach = ring.empty_ring(6), 320
    for serial in range(200):
        slots, index = ring.claim(slots, serial, serial * 10, False, HOST, reach)
        slots = ring.publish(slots, index, serial * 10, serial * 10)
        slots = ring.certify(ring.seal(slots, index, serial), index, serial)
        if serial >= 64:
            ages = sorted(serial * 10 - slot.completed for slot in slots)
            assert ages[0] == 0
            assert ages[-1] >= reach
            assert sum(age > reach for age in ages) <= 2
            gaps = [after - before for before, after in itertools.pairwise(ages)]
            assert max(gaps[:2]) <= max(gaps[-2:])  # finer near the end of the run


@pytest.mark.parametrize(
    ("on_device", "in_host", "spacing", "expected"),
    [
        ((), (), 10, None),
        ((10,), (), 10, 10),  # nothing there yet: at once
        ((10, 20, 30), (), 10, 30),  # the newest
        ((30,), (20,), 10, 30),
        ((29,), (20,), 10, None),  # not far enough ahead
        ((30,), (30,), 10, None),  # there already
    ],
)
def test_drainable(on_device, in_host, spacing, expected):
    slots = both_tiers(on_device, in_host)
    found = ring.drainable(slots, spacing)
    assert (None if found is None else found.completed) == expected
    assert found is None or found.tier is DEVICE


def both_tiers(on_device, in_host):
    """Certified snapshots whose serial numbers are their steps, so that one step in both tiers is one snapshot."""
    slots = list(ring.empty_ring(3, 3))
    for base, steps in ((0, on_device), (3, in_host)):
        for i, step in enumerate(steps, base):
            slots[i] = dataclasses.replace(
                slots[i], phase=SlotPhase.CERTIFIED, snapshot=step, step=step, completed=step
            )
    return tuple(slots)


def test_one_transfer_at_a_time_and_only_what_is_certified():
    slots = both_tiers((30,), ())
    claimed, _ = ring.claim_for_draining(slots, 0, 30, 300, 3)
    assert ring.drainable(claimed, 1) is None
    for phase in (SlotPhase.STAGED, SlotPhase.SEALED):
        young = (dataclasses.replace(slots[0], phase=phase), *slots[1:])
        assert ring.drainable(young, 1) is None
        assert ring.claim_for_draining(young, 0, 30, 300, 3) is None


def test_a_transfer_pins_its_source_and_fills_a_copy_of_it():
    slots = both_tiers((30,), ())
    claimed, target = ring.claim_for_draining(slots, 0, 30, 300, 3)
    assert (target, claimed[0].readers) == (3, 1)
    assert (claimed[3].phase, claimed[3].snapshot, claimed[3].step, claimed[3].completed) == (
        SlotPhase.FILLING,
        30,
        30,
        30,
    )
    after = ring.drained(claimed, 0, target, 30)
    assert after[0] == slots[0]
    assert (after[3].phase, after[3].snapshot, after[3].tier) == (SlotPhase.CERTIFIED, 30, HOST)


def test_a_source_that_has_moved_on_is_not_drained():
    slots = both_tiers((30,), ())
    assert ring.claim_for_draining(slots, 0, 29, 300, 3) is None
    assert ring.claim_for_draining(slots, 0, 30, 300, 0) is None  # no room


@pytest.mark.parametrize("lost", ["source released", "undone", "target released"])
def test_a_transfer_of_what_was_lost_meanwhile_leaves_nothing(lost):
    slots, target = ring.claim_for_draining(both_tiers((10, 30), ()), 1, 30, 300, 3)
    if lost == "source released":
        slots = ring.release(slots, 1, 30)
    elif lost == "undone":
        slots = ring.drop_newer(slots, 10)
    else:
        slots = ring.release(slots, target, 30)
    after = ring.drained(slots, 1, target, 30)
    assert after[target].phase is SlotPhase.FREE
    assert all(slot.readers == 0 for slot in after)
    assert ring.newest_certified(after).snapshot == (30 if lost == "target released" else 10)


# ------------------------------------------------------------ which one is chosen


def at_panic(onset, cadence, probation, lag, num_slots):
    """Train up to the verdict on step `onset`, which arrives `lag` steps late. Answers the ring then."""
    slots = filled(0, host=num_slots, tier=HOST)
    serial = 1
    for step in range(1, onset + lag + 1):
        if 0 < step - lag < onset:
            slots = ring.advance(slots, probation, step - lag)
        if step % cadence == 0:
            claimed = ring.claim(slots, serial, step, False)
            if claimed is not None:
                slots, index = claimed
                slots = ring.seal(ring.publish(slots, index, step, step), index, serial)
                if probation == 0:
                    slots = ring.certify(slots, index, serial) if step - lag < 0 else slots
                serial += 1
    return slots


@pytest.mark.parametrize("lag", [0, 1, 3])
@pytest.mark.parametrize("probation", [1, 2, 5, 10])
@pytest.mark.parametrize("cadence", [1, 2, 5, 10])
@pytest.mark.parametrize("onset", [1, 2, 7, 20, 37, 60])
def test_the_snapshot_chosen_for_a_panic(onset, cadence, probation, lag):
    """The newest that had its probation before the bad step: a multiple of the cadence, and never one from after it."""
    num_slots = 2 + -(-(probation + lag) // cadence)
    chosen = ring.newest_good(at_panic(onset, cadence, probation, lag, num_slots))
    newest = max(0, (onset - 1 - probation) // cadence * cadence)
    assert chosen.completed == newest


# ------------------------------------------------------------ whatever happens

ACTIONS = ["take", "take", "healthy", "healthy", "suspect", "reject", "fail", "manual", "rollback", "older"]
TIERED = [*ACTIONS, "drain", "drained", "lose", "flip"]


SHAPES, REACHES = [(0, 4), (3, 1), (3, 3), (2, 2)], [0, 8, 300]


@settings(max_examples=200)
@given(st.sampled_from(SHAPES), st.sampled_from(REACHES), st.lists(st.sampled_from(TIERED), min_size=5, max_size=30))
def test_the_last_certified_snapshot_is_never_lost(shape, reach, program):
    live(shape, reach, program)


@settings(max_examples=100)
@given(st.integers(0, 2**32 - 1))
def test_the_last_certified_snapshot_is_never_lost_in_many_programs(seed):
    """A hundred programs to an example: drawing each of them by itself takes longer than running it."""
    chance = random.Random(seed)
    for _ in range(100):
        live(chance.choice(SHAPES), chance.choice(REACHES), chance.choices(TIERED, k=chance.randint(5, 16)))


def live(shape, reach, program):
    """Over both tiers a certified snapshot stays until a newer one is certified, or a rollback chose an older one."""
    device, host = shape
    tier = DEVICE if device else HOST
    slots, serial, step, moving = filled(0, tier=tier, host=host, device=device), 1, 0, None
    for action in program:
        before = ring.newest_certified(slots)
        allowed = {before.snapshot}
        if action in ("take", "manual", "fail", "reject"):
            claimed = ring.claim(slots, serial, step, action == "manual", tier, reach)
            if claimed is not None:
                slots, index = claimed
                assert slots[index].readers == 0
                if action != "fail":
                    slots = ring.publish(slots, index, step, step)
                settle = ring.seal if action in ("take", "manual") else ring.release
                slots, serial = settle(slots, index, serial), serial + 1
        elif action == "healthy":
            step += 1
            slots = ring.advance(slots, 2, step)
        elif action == "suspect":
            slots = ring.suspend(slots)
        elif action in ("rollback", "older"):
            chosen = ring.newest_good(slots, before.snapshot if action == "older" else None) or before
            step, slots = chosen.completed, ring.drop_newer(slots, chosen.snapshot)
            if chosen.snapshot < before.snapshot:
                if ring.newest_certified(slots) is None:
                    return  # an uncertified one was asked for by name: its caller's decision
                allowed.add(ring.newest_certified(slots).snapshot)
        elif action == "drain" and moving is None and device:
            source = ring.drainable(slots, 1)
            claimed = source and ring.claim_for_draining(slots, source.index, source.snapshot, reach, host)
            if claimed:
                slots, moving = claimed[0], (source.index, claimed[1], source.snapshot)
        elif action in ("drained", "lose") and moving is not None:
            source, target, number = moving
            if action == "drained":
                slots = ring.drained(slots, source, target, number)
            else:
                slots = ring.release(ring.pin(slots, source, -1), target, number)
            moving = None
        elif action == "flip":  # one copy is damaged and given up; another may be left
            copies = [slot for slot in slots if slot.snapshot == before.snapshot and slot.is_good]
            if len(copies) > 1:
                slots = ring.release(slots, copies[0].index, before.snapshot)
        now = ring.newest_certified(slots)
        assert now is not None
        assert now.snapshot > before.snapshot or now.snapshot in allowed
        assert [slot.index for slot in slots] == list(range(device + host))
        assert [slot.tier for slot in slots] == [DEVICE] * device + [HOST] * host
        assert all(0 <= slot.readers <= 1 for slot in slots)


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
