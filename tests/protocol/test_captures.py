"""Graph captures beside snapshots and rollbacks: no barrier while one is in progress, nobody waits for ever."""

import functools
from dataclasses import replace

import pytest
from protocol.outcomes import assert_caught, assert_sound

from tolaria import admission
from tolaria.admission import close_section, open_section
from tolaria.gate import GateState
from tolaria.operations import Barrier, CallerWait, HostState
from tolaria.testing import explorer
from tolaria.testing.alter import altered, asking
from tolaria.testing.programs import (
    FORWARD,
    WRITE,
    are_slots_uniform,
    backward,
    both,
    capture_begins,
    capture_ends,
    captured,
    handover,
    homes,
    in_turn,
    reader,
    replayed,
    roll_back,
    section,
    take,
    uniform,
    writer,
    writes,
)
from tolaria.testing.simulator import Machine
from tolaria.testing.world import Faults, World

BLOCKING, CONTEXT = Barrier.BLOCKING, Barrier.CONTEXT
REFUSED = ("CaptureInProgress",)

barriers = pytest.mark.parametrize("barrier", [BLOCKING, CONTEXT], ids=lambda b: b.value)


def explore(programs, barrier, where, is_good=lambda world: True, **options):
    return explorer.explore(Machine(programs, homes(barrier, *where), **options), is_good)


def steps(thread, *, in_autograd=False):
    """What a capture of a whole step holds: a forward section and a write section."""
    forward = section(thread, FORWARD, in_autograd=in_autograd)
    return in_turn(forward, section(thread, WRITE, writes("N", "A"), in_autograd=in_autograd))


def rolled_back(times):
    return lambda world: world.host.epoch == times


def all_or_nothing(thread):
    """The rollback of that thread either took place or was refused, and then changed nothing."""

    def is_good(world: World) -> bool:
        if world.finished[thread].how == "returned":
            return world.host.epoch == 1
        return world.host.epoch == 0 and world.host.ring[0].phase.value == "certified"

    return is_good


def outcomes(found, thread):
    return {how[thread] for _, _, how in found.ends}


# ---------------------------------------------------------------- manual: refused while a capture is in progress


@barriers
def test_a_manual_rollback_beside_a_capture(barrier):
    """Refused and without effect, or before or after the capture. What the capture records is not executed."""
    programs = [captured(0, steps(0)), roll_back(1, barrier)]
    is_good = both(all_or_nothing(1), uniform("S", "O"))
    found = explore(programs, barrier, ("A", ""), is_good, may_raise=REFUSED)
    assert_sound(found, 50)
    assert outcomes(found, 1) == {"returned", "CaptureInProgress"}


@barriers
def test_a_manual_rollback_from_inside_the_capture_is_refused_and_changes_nothing(barrier):
    programs = [captured(0, roll_back(0, barrier)), reader(1, "B")]
    found = explore(programs, barrier, ("A", "B"), both(all_or_nothing(0), uniform("O")), may_raise=REFUSED)
    assert_sound(found, 40)
    assert outcomes(found, 0) == {"CaptureInProgress"}


@barriers
def test_a_snapshot_beside_a_capture(barrier):
    """Refused, or a whole snapshot."""
    programs = [in_turn(writer(0, "N", "A"), captured(0, steps(0))), take(1, barrier)]
    found = explore(programs, barrier, ("A", ""), are_slots_uniform, may_raise=REFUSED)
    assert_sound(found, 100)
    assert outcomes(found, 1) == {"returned", "CaptureInProgress"}


# ---------------------------------------------------------------- patient: after the capture, never a deadlock


def from_autograd(barrier, in_autograd=True):
    """Thread 0 holds a section and waits for an engine thread that captures."""
    wait, tell = backward(1)
    engine = captured(1, steps(1, in_autograd=in_autograd), in_autograd=in_autograd)
    return [section(0, FORWARD, wait), in_turn(engine, tell), roll_back(2, barrier, patient=True)]


PATIENT = {
    "a capture": (lambda b: [captured(0, writes("N", "A")), roll_back(1, b, patient=True)], ("A", "")),
    "a capture with sections of its own": (
        lambda b: [captured(0, steps(0)), roll_back(1, b, patient=True)],
        ("A", ""),
    ),
    "a capture inside an open section": (
        lambda b: [section(0, WRITE, captured(0, steps(0))), roll_back(1, b, patient=True)],
        ("A", ""),
    ),
    "a capture from inside autograd": (from_autograd, ("A", "A", "")),
    "two captures": (
        lambda b: [captured(0, writes("N", "A")), captured(1, steps(1), graph="h"), roll_back(2, b, patient=True)],
        ("A", "B", ""),
    ),
    "a capture beside a reader": (
        lambda b: [captured(0, steps(0)), reader(1, "B"), roll_back(2, b, patient=True)],
        ("A", "B", ""),
    ),
}


@barriers
@pytest.mark.parametrize("name", PATIENT)
def test_a_patient_rollback_beside(name, barrier):
    programs, where = PATIENT[name]
    found = explore(programs(barrier), barrier, where, both(rolled_back(1), uniform("S")))
    assert_sound(found, 25)
    assert all(set(how) == {"returned"} for _, _, how in found.ends)


@barriers
def test_two_patient_rollbacks_beside_a_capture(barrier):
    programs = [captured(0, steps(0)), roll_back(1, barrier, patient=True), roll_back(2, barrier, patient=True)]
    assert_sound(explore(programs, barrier, ("A", "", ""), both(rolled_back(2), uniform("S"))), 200)


@barriers
def test_two_captures_and_a_manual_rollback(barrier):
    programs = [captured(0, steps(0)), captured(1, graph="h"), roll_back(2, barrier)]
    found = explore(programs, barrier, ("A", "B", ""), all_or_nothing(2), may_raise=REFUSED)
    assert_sound(found, 200)
    assert outcomes(found, 2) == {"returned", "CaptureInProgress"}


@barriers
def test_a_patient_rollback_gives_up_and_leaves_nothing_behind(barrier):
    programs = [captured(0, steps(0)), roll_back(1, barrier, patient=True, verify_before=True)]
    found = explore(programs, barrier, ("A", ""), all_or_nothing(1), may_raise=("QuiesceTimeout",), may_time_out=(1,))
    assert_sound(found, 80)
    assert outcomes(found, 1) == {"returned", "QuiesceTimeout"}


# ---------------------------------------------------------------- replays


@barriers
@pytest.mark.parametrize("patient", [False, True])
def test_a_capture_and_its_replay_beside_a_rollback(barrier, patient):
    programs = [in_turn(captured(0, steps(0)), replayed(0, "A")), roll_back(1, barrier, patient=patient)]
    is_good = both(all_or_nothing(1), uniform("N", "S"))
    assert_sound(explore(programs, barrier, ("A", ""), is_good, may_raise=REFUSED), 60)


@barriers
def test_a_replay_and_a_reader_on_another_stream_beside_a_rollback(barrier):
    programs = [
        in_turn(captured(0, steps(0)), replayed(0, "A"), handover("A", "B"), reader(0, "B")),
        roll_back(1, barrier, patient=True),
    ]
    found = explore(programs, barrier, ("A", "", "B"), both(rolled_back(1), uniform("N", "S")))
    assert_sound(found, 200)


@barriers
def test_a_snapshot_whose_copies_are_under_way_when_a_capture_begins(barrier):
    """What the capture recorded is replayed later and must not overtake the copies."""
    programs = [in_turn(captured(0, steps(0)), replayed(0, "A")), take(1, barrier)]
    found = explore(programs, barrier, ("A", ""), are_slots_uniform, may_raise=REFUSED)
    assert_sound(found, 100)


def outliving(thread):
    """A section that is opened inside a capture and writes after its end."""
    opened = functools.partial(open_section, thread, WRITE, False)
    closed = functools.partial(close_section, thread, 0)
    return in_turn(capture_begins(thread), opened, capture_ends(thread), writes("N", "A"), closed)


@barriers
def test_a_section_that_outlives_the_capture_in_which_it_began(barrier):
    """Its own wait does nothing inside the capture: the one at the beginning of the capture stands in for it."""
    found = explore([outliving(0), take(1, barrier)], barrier, ("A", ""), are_slots_uniform, may_raise=REFUSED)
    assert_sound(found, 50)


# ---------------------------------------------------------------- each part removed


def no_captures(state: HostState) -> HostState:
    return replace(state, captures=())


def open_gate(state: HostState) -> HostState:
    return replace(state, gate=GateState())


def no_sections(state: HostState) -> HostState:
    return replace(state, gate=replace(state.gate, sections=()))


@barriers
@pytest.mark.parametrize("patient", [False, True])
def test_without_any_guard_a_rollback_invalidates_a_capture(barrier, patient, monkeypatch):
    monkeypatch.setattr(admission, "refuse_in_capture", lambda *_: None)
    blind = altered(roll_back(1, barrier, patient=patient), asking("wait for open sections", no_captures))
    assert_caught(explore([captured(0, steps(0)), blind], barrier, ("A", "")), "capture invalidated")


@barriers
def test_without_any_guard_a_snapshot_invalidates_a_capture(barrier, monkeypatch):
    monkeypatch.setattr(admission, "refuse_in_capture", lambda *_: None)
    blind = altered(take(1, barrier), asking("wait for open sections", no_captures))
    assert_caught(explore([captured(0, steps(0)), blind], barrier, ("A", "")), "capture invalidated")


@barriers
@pytest.mark.parametrize("patient", [False, True])
def test_a_guard_at_the_announcement_only_is_not_enough(barrier, patient):
    """A capture may begin inside a section that was open when the rollback was announced."""
    blind = altered(roll_back(1, barrier, patient=patient), asking("wait for open sections", no_captures))
    program = in_turn(section(0, WRITE, capture_begins(0)), section(0, WRITE), capture_ends(0))
    assert_caught(explore([program, blind], barrier, ("A", ""), may_raise=REFUSED), "capture invalidated")
    sound = [program, roll_back(1, barrier, patient=patient)]
    assert_sound(explore(sound, barrier, ("A", ""), may_raise=REFUSED), 50)


@barriers
def test_without_the_refusal_a_manual_rollback_inside_a_capture_waits_for_itself(barrier, monkeypatch):
    monkeypatch.setattr(admission, "refuse_in_capture", lambda *_: None)
    programs = [captured(0, roll_back(0, barrier)), reader(1, "B")]
    assert_caught(explore(programs, barrier, ("A", "B")), "deadlock")


@barriers
def test_a_capture_that_does_not_wait_for_a_submission_under_way_is_invalidated(barrier):
    hasty = altered(captured(0, steps(0)), asking("begin a graph capture", open_gate))
    found = explore([hasty, roll_back(1, barrier)], barrier, ("A", ""), may_raise=REFUSED)
    assert_caught(found, "capture invalidated")


@barriers
def test_sections_of_a_capture_that_queue_behind_a_patient_rollback_deadlock(barrier):
    queueing = altered(captured(0, steps(0)), asking("open a", no_captures))
    assert_caught(explore([queueing, roll_back(1, barrier, patient=True)], barrier, ("A", "")), "deadlock")


@barriers
def test_a_capture_inside_a_section_that_queues_behind_a_patient_rollback_deadlocks(barrier):
    inside = altered(section(0, WRITE, captured(0)), asking("begin a graph capture", no_sections))
    programs = [inside, roll_back(1, barrier, patient=True)]
    assert_caught(explore(programs, barrier, ("A", "")), "deadlock")


@barriers
def test_a_capture_in_autograd_that_queues_behind_a_patient_rollback_deadlocks(barrier):
    assert_caught(explore(from_autograd(barrier, in_autograd=False), barrier, ("A", "A", "")), "deadlock")


def test_a_replay_whose_section_does_not_wait_for_the_copies_is_torn():
    programs = [in_turn(captured(0, steps(0)), replayed(0, "A")), take(1, CONTEXT)]
    waits = functools.partial(explore, programs, CONTEXT, ("A", ""), are_slots_uniform, may_raise=REFUSED)
    assert_caught(waits(drop=lambda op: isinstance(op, CallerWait)), "torn")


def test_a_section_that_outlives_its_capture_without_the_wait_at_the_beginning_is_torn():
    found = explore(
        [outliving(0), take(1, CONTEXT)],
        CONTEXT,
        ("A", ""),
        are_slots_uniform,
        may_raise=REFUSED,
        drop=lambda op: isinstance(op, CallerWait),
    )
    assert_caught(found, "torn")


def test_a_device_that_waits_inside_a_capture_invalidates_it():
    programs = [captured(0, steps(0)), take(1, CONTEXT)]
    found = explore(programs, CONTEXT, ("A", ""), may_raise=REFUSED, faults=Faults(careless=True))
    assert_caught(found, "capture invalidated")
