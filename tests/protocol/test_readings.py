"""Readings of slots: what is sealed late, and what a rollback looks at before it writes, is what the slot holds."""

import functools
from dataclasses import replace

import pytest
from protocol.outcomes import BARRIERS, assert_caught, assert_sound

from tolaria import ring
from tolaria.operations import Barrier, Change, Examine, HostState
from tolaria.protocol import Ground, seal
from tolaria.testing import explorer
from tolaria.testing.alter import altered, delayed
from tolaria.testing.programs import (
    are_slots_uniform,
    both,
    homes,
    in_turn,
    oldest_good,
    roll_back,
    take,
    take_and_seal,
    uniform,
    writer,
)
from tolaria.testing.simulator import Machine, good_ring
from tolaria.testing.world import VARIABLES

BLOCKING, CONTEXT = Barrier.BLOCKING, Barrier.CONTEXT
BUSY = ("SlotsBusy",)
UNSEALED = None

barriers = pytest.mark.parametrize("barrier", BARRIERS, ids=lambda b: b.value)
queued = pytest.mark.parametrize("barrier", [BLOCKING, CONTEXT], ids=lambda b: b.value)


def explore(programs, barrier, where, is_good, held=("S",), digests=(), free=1, variables=VARIABLES, **options):
    """Slots that hold one good snapshot per letter of `held`, the first certified and the rest manual, then free ones.

    `digests` are other letters than those held: bytes that have changed since they were sealed.
    """
    count = len(held) + free
    slots = good_ring(count)
    for serial in range(1, len(held)):
        slots, index = ring.claim(slots, serial, serial, True)
        slots = ring.seal(ring.publish(slots, index), index, serial)
    initial = HostState(ring=slots, next_snapshot=len(held))
    contents = tuple((value,) * len(variables) for value in (*held, *"-" * free))
    taken = tuple((value,) * len(variables) for value in digests or held) + (UNSEALED,) * free
    machine = Machine(
        programs, homes(barrier, *where), initial, contents, digests=taken, variables=variables, **options
    )
    return explorer.explore(machine, is_good)


def late(thread, barrier):
    """Mutant: a snapshot that is examined when the gate is open again."""

    def program():
        taken = yield from delayed(take(thread, barrier, manual=True), Examine, lambda op: False)()
        yield from seal(thread, taken.slot, taken.snapshot, True, Ground(barrier))

    return program


# ---------------------------------------------------------------- late sealing


@barriers
def test_manual_snapshots_that_overwrite_each_other_are_read_as_what_they_hold(barrier):
    """One slot beside the certified one: the second snapshot takes the place of the first, sealed or not."""
    programs = [
        take_and_seal(0, barrier, manual=True),
        in_turn(writer(1, "N", "A"), take_and_seal(1, barrier, manual=True)),
    ]
    found = explore(programs, barrier, ("", "A"), are_slots_uniform, may_raise=BUSY)
    assert_sound(found, 400)


def test_a_snapshot_that_is_examined_after_the_gate_has_opened_is_misread():
    programs = [late(0, CONTEXT), in_turn(writer(1, "N", "A"), take_and_seal(1, CONTEXT, manual=True))]
    assert_caught(explore(programs, CONTEXT, ("", "A"), are_slots_uniform, may_raise=BUSY), "misread")


@barriers
def test_sealing_races_with_a_rollback_that_drops_the_slot_and_a_snapshot_that_claims_it(barrier):
    programs = [
        take_and_seal(0, barrier),
        roll_back(1, barrier),
        in_turn(writer(2, "N", "A"), take_and_seal(2, barrier, step=2)),
    ]
    is_good = both(are_slots_uniform, uniform("S", "N"))
    found = explore(programs, barrier, ("", "", "A"), is_good, may_raise=BUSY)
    assert_sound(found, 1000)


def unpinned(program):
    """Mutant: `seal` holds its slot against nobody."""

    def alter(op):
        if isinstance(op, Change) and op.label == "pin":
            return Change(op.label, lambda s: (s, op.function(s)[1]))
        return Change(op.label, lambda s: (s, None)) if isinstance(op, Change) and op.label == "unpin" else op

    return altered(program, alter)


def test_sealing_without_a_pin_reads_another_snapshot():
    programs = [
        unpinned(take_and_seal(0, CONTEXT, manual=True)),
        in_turn(writer(1, "N", "A"), take_and_seal(1, CONTEXT, manual=True)),
    ]
    assert_caught(explore(programs, CONTEXT, ("", "A"), are_slots_uniform, may_raise=BUSY), "misread")


def forgetful(program):
    """Mutant: `seal` settles whatever the slot holds by now."""

    def alter(op):
        if not (isinstance(op, Change) and op.label in ("pin", "settle")):
            return op

        def function(state):
            if op.label == "pin":
                return replace(state, ring=ring.pin(state.ring, 1, 1)), True
            slot = state.ring[1]
            return replace(state, ring=ring.seal(state.ring, 1, slot.snapshot)), None

        return Change(op.label, function)

    return altered(program, alter)


def test_sealing_without_the_serial_number_seals_another_snapshot():
    programs = [
        forgetful(take_and_seal(0, CONTEXT)),
        in_turn(roll_back(1, CONTEXT), take(1, CONTEXT, step=2)),
    ]
    assert_caught(explore(programs, CONTEXT, ("", ""), lambda world: True, may_raise=BUSY), "misread")


# ---------------------------------------------------------------- verify_before


verified = functools.partial(roll_back, verify_before=True)


@barriers
def test_two_rollbacks_that_verify_before_they_write(barrier):
    programs = [writer(0, "N", "A"), verified(1, barrier), verified(2, barrier)]
    found = explore(programs, barrier, ("A", "", ""), uniform("S", "N"), held=("P", "S"), free=0)
    assert_sound(found, 500)


@barriers
@pytest.mark.parametrize("both_verify", [False, True])
def test_a_verified_choice_is_dropped_by_a_rollback_to_an_older_snapshot(barrier, both_verify):
    programs = [
        writer(0, "N", "A"),
        verified(1, barrier),
        roll_back(2, barrier, oldest_good, verify_before=both_verify),
    ]
    found = explore(programs, barrier, ("A", "", ""), uniform("P", "S", "N"), held=("P", "S"), free=0)
    assert_sound(found, 500)
    assert {memory[0] for memory, _, _ in found.ends} == {"P", "N"}


def overtaken(barrier, is_good):
    programs = [verified(0, barrier), in_turn(writer(1, "N", "A"), take_and_seal(1, barrier, manual=True))]
    return explore(programs, barrier, ("", "A"), is_good, held=("P", "S"), free=0, may_raise=BUSY)


@barriers
def test_snapshots_that_would_like_the_slot_which_a_rollback_reads(barrier):
    """The manual one may be overwritten by its successor, unless it is pinned."""
    found = overtaken(barrier, both(uniform("P", "S", "N"), are_slots_uniform))
    assert_sound(found, 200)
    assert {how[1] for _, _, how in found.ends} == {"returned", "SlotsBusy"}


@barriers
def test_a_verified_rollback_goes_no_further_back_than_one_before_or_after_the_snapshot(barrier):
    """To S before the manual snapshot, to N after it; never past both, dropping the new one as well."""
    assert_sound(overtaken(barrier, uniform("S", "N")), 200)


@queued
def test_a_verified_choice_is_dropped_while_a_snapshot_would_like_its_slot(barrier):
    programs = [
        verified(0, barrier),
        roll_back(1, barrier, oldest_good),
        take(2, barrier, manual=True),
    ]
    is_good = both(uniform("P", "S"), are_slots_uniform)
    found = explore(programs, barrier, ("", "", ""), is_good, held=("P", "S"), free=0, may_raise=BUSY)
    assert_sound(found, 500)


@barriers
def test_rollbacks_that_find_a_corrupted_snapshot_go_further_back(barrier):
    programs = [verified(0, barrier), verified(1, barrier)]
    options = {"held": ("P", "C"), "digests": ("P", "S"), "free": 0, "variables": VARIABLES[:1]}
    found = explore(programs, barrier, ("", ""), uniform("P"), **options)
    assert_sound(found, 200)


@barriers
def test_when_every_snapshot_is_corrupted_nothing_is_written(barrier):
    programs = [writer(0, "N", "A"), verified(1, barrier)]
    options = {"held": ("C", "D"), "digests": ("P", "S"), "free": 0, "may_raise": ("SnapshotRejected",)}
    found = explore(programs, barrier, ("A", ""), uniform("N"), **options)
    assert_sound(found, 50)


@barriers
def test_a_verified_rollback_that_gives_up_leaves_no_pin(barrier):
    programs = [writer(0, "N", "A"), verified(1, barrier), roll_back(2, barrier, oldest_good)]
    options = {"held": ("P", "S"), "free": 0, "may_raise": ("QuiesceTimeout",), "may_time_out": (1, 2)}
    found = explore(programs, barrier, ("A", "", ""), uniform("P", "S", "N"), **options)
    assert_sound(found, 800)


def unpinned_choice(program):
    """Mutant: a rollback reads and restores a slot that it does not hold."""

    def alter(op):
        if not isinstance(op, Change):
            return op
        if op.label == "discard a corrupted snapshot":
            return Change(op.label, lambda s: op.function(replace(s, ring=ring.pin(s.ring, 1, 1))))
        if op.label not in ("choose a snapshot", "unpin"):
            return op

        def function(state):
            if op.label == "unpin":
                return state, None
            after, slot = op.function(state)
            return replace(after, ring=state.ring), slot

        return Change(op.label, function)

    return altered(program, alter)


@barriers
def test_a_rollback_that_does_not_pin_what_it_reads_finds_another_snapshot(barrier):
    programs = [
        unpinned_choice(verified(0, barrier)),
        in_turn(writer(1, "N", "A"), take_and_seal(1, barrier, manual=True)),
    ]
    found = explore(programs, barrier, ("", "A"), uniform("S", "N"), held=("P", "S"), free=0, may_raise=BUSY)
    assert_caught(found, ("misread", "torn"))


def unasked(program):
    """Mutant: after the wait for the gate, a verified choice is taken for granted."""

    def alter(op):
        if not (isinstance(op, Change) and op.label == "choose a snapshot"):
            return op

        def function(state):
            after, slot = op.function(state)
            if slot is not None:
                return after, slot
            return state, replace(oldest_good(state.ring, None), index=1, snapshot=1)  # what it had chosen

        return Change(op.label, function)

    return altered(program, alter)


@barriers
def test_a_verified_choice_that_was_dropped_is_not_to_be_restored(barrier):
    """The abandoned future would come back after the rollback that gave it up."""
    programs = [unasked(verified(0, barrier)), in_turn(roll_back(1, barrier, oldest_good), take(1, barrier))]
    held = {"held": ("P", "S"), "free": 1}

    def is_good(world):
        restorable = world.host.ring[0].phase in ring.READABLE
        return restorable and (world.memory[0] == "P" or world.host.ring[1].phase in ring.READABLE)

    assert_caught(explore(programs, barrier, ("", ""), is_good, **held), "torn")
    programs[0] = verified(0, barrier)
    assert_sound(explore(programs, barrier, ("", ""), is_good, **held), 100)
