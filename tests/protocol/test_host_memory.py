"""Page-locked host memory, and extras: what is copied beside the governor's stream, or launched on it by other code."""

import functools

import pytest
from protocol.outcomes import BARRIERS, assert_caught, assert_sound

from tolaria.operations import Barrier, CaptureHost, Change, Examine, HostWait, RestoreHost, Synchronize
from tolaria.testing import explorer
from tolaria.testing.alter import delayed
from tolaria.testing.programs import (
    are_slots_uniform,
    both,
    handover,
    homes,
    in_turn,
    reader,
    roll_back,
    take,
    uniform,
    writer,
)
from tolaria.testing.simulator import Machine

BLOCKING, CONTEXT = Barrier.BLOCKING, Barrier.CONTEXT
PINNED, EXTRA, BUFFER = ("p0", "h0"), ("p0", "x0"), ("b0", "p0")

barriers = pytest.mark.parametrize("barrier", [BLOCKING, CONTEXT], ids=lambda b: b.value)
every = pytest.mark.parametrize("barrier", BARRIERS, ids=lambda b: b.value)
everywhere = pytest.mark.parametrize("variables", [PINNED, EXTRA, BUFFER], ids=lambda v: v[1] + v[0])

step = functools.partial(writer, 0, "N", "A")
forward = functools.partial(reader, 0)


def explore(programs, barrier, where, is_good, variables, drop=None):
    return explorer.explore(Machine(programs, homes(barrier, *where), drop=drop, variables=variables), is_good)


@everywhere
@every
def test_a_step_and_a_forward_on_another_stream_beside_a_rollback(barrier, variables):
    before = [reader(0, "A", variables=variables), roll_back(1, barrier)]
    assert_sound(explore(before, barrier, ("A", ""), uniform("S"), variables), 20)
    order = in_turn(step(variables=variables), handover("A", "B"), forward("B", variables=variables))
    found = explore([order, roll_back(1, barrier)], barrier, ("A", "", "B"), uniform("S", "N"), variables)
    assert_sound(found, 50)


@everywhere
@every
def test_a_snapshot_beside_two_steps(barrier, variables):
    steps = in_turn(step(variables=variables), writer(0, "M", "A", variables=variables))
    assert_sound(explore([steps, take(1, barrier)], barrier, ("A", ""), are_slots_uniform, variables), 50)


@everywhere
@every
def test_a_step_a_snapshot_and_a_rollback(barrier, variables):
    programs = [step(variables=variables), take(1, barrier), roll_back(2, barrier)]
    is_good = both(uniform("S", "N"), are_slots_uniform)
    assert_sound(explore(programs, barrier, ("A", "", ""), is_good, variables), 200)


# ---------------------------------------------------------------- each edge removed


def is_host_wait(op):
    return isinstance(op, HostWait)


def test_a_rollback_that_does_not_wait_for_transfers_is_torn():
    programs = [step(variables=PINNED), roll_back(1, CONTEXT)]
    found = explore(programs, CONTEXT, ("A", ""), uniform("S", "N"), PINNED, is_host_wait)
    assert_caught(found, "torn")


def test_a_rollback_under_a_transfer_out_of_host_memory_is_torn():
    programs = [reader(0, "A", variables=PINNED), roll_back(1, CONTEXT)]
    found = explore(programs, CONTEXT, ("A", ""), uniform("S"), PINNED, is_host_wait)
    assert_caught(found, "torn")


def test_a_snapshot_that_does_not_wait_for_transfers_is_torn():
    programs = [step(variables=PINNED), take(1, CONTEXT)]
    found = explore(programs, CONTEXT, ("A", ""), are_slots_uniform, PINNED, is_host_wait)
    assert_caught(found, "torn")


@pytest.mark.parametrize("program", [roll_back, take])
def test_a_device_synchronise_is_what_waits_for_transfers_where_there_are_no_events(program):
    programs = [step(variables=PINNED), program(1, BLOCKING)]
    is_good = both(uniform("S", "N"), are_slots_uniform)
    found = explore(programs, BLOCKING, ("A", ""), is_good, PINNED, lambda op: isinstance(op, Synchronize))
    assert_caught(found, "torn")


def at_commit(op):
    return isinstance(op, Change) and op.label == "commit"


@barriers
@pytest.mark.parametrize("after", [step, functools.partial(forward, "A")], ids=["step", "forward"])
def test_an_extra_that_is_loaded_behind_the_post_barrier_is_torn(barrier, after):
    late = delayed(roll_back(1, barrier), RestoreHost, at_commit)
    found = explore([after(variables=EXTRA), late], barrier, ("A", ""), uniform("S", "N"), EXTRA)
    assert_caught(found, "torn")


@barriers
def test_an_extra_that_is_read_behind_the_end_of_the_copies_is_torn(barrier):
    late = delayed(
        take(1, barrier), CaptureHost, lambda op: isinstance(op, Examine) or getattr(op, "label", "") == "publish"
    )
    found = explore([step(variables=EXTRA), late], barrier, ("A", ""), are_slots_uniform, EXTRA)
    assert_caught(found, "torn")
