"""Notes of single steps and the way back to one, in every interleaving with a step and a forward of other threads."""

import functools

import pytest
from protocol.outcomes import BARRIERS, assert_caught, assert_sound

from tolaria import gate
from tolaria import noting as noting_module
from tolaria.errors import CaptureInProgress, PhaseError
from tolaria.noting import Place, note, step_back
from tolaria.operations import (
    Await,
    Barrier,
    CallerWait,
    Change,
    Check,
    ContextRecord,
    ContextWait,
    Copy,
    HostState,
    Places,
    StreamRecord,
    Synchronize,
)
from tolaria.ring import Slot, SlotPhase, Tier
from tolaria.testing import explorer
from tolaria.testing.programs import (
    failing_step,
    ground,
    homes,
    in_turn,
    is_uniform,
    reader,
    roll_back,
    straddling_step,
    take,
    uniform,
    writer,
)
from tolaria.testing.simulator import Machine, dispose

HOST, BLOCKING, CONTEXT = Barrier.HOST, Barrier.BLOCKING, Barrier.CONTEXT


def back(thread, barrier, serial=1):
    """The shipped way back, to what slot 0 holds. In the ring there is a certified snapshot there as well."""
    return functools.partial(step_back, thread, ground(barrier), lambda: Place(0, 0, serial), "stepping back")


def noting(thread, barrier):
    """The shipped note, into slot 1."""
    return functools.partial(note, thread, ground(barrier), 1)


def noted_whole(world):
    return is_uniform(world.slots[1]) and world.slots[1][0] in ("O", "N")


PROGRAMS = {
    "a step": (lambda b: [writer(0, "N", "A"), back(1, b)], ("A", "")),
    "a step and the next forward": (
        lambda b: [in_turn(writer(0, "N", "A"), reader(0, "A")), back(1, b)],
        ("A", ""),
    ),
    "a rollback as well": (lambda b: [writer(0, "N", "A"), back(1, b), roll_back(2, b)], ("A", "", "")),
}


@pytest.mark.parametrize("barrier", BARRIERS, ids=lambda b: b.value)
@pytest.mark.parametrize("name", PROGRAMS)
def test_nothing_is_torn(name, barrier):
    programs, where = PROGRAMS[name]
    machine = Machine(programs(barrier), homes(barrier, *where))
    assert_sound(explorer.explore(machine, uniform("S", "N")), 20)


def is_exclusive(op):
    return isinstance(op, Await) and "wait for open sections" in op.label


MUTANTS = {
    "host: no exclusive side": (HOST, is_exclusive),
    "blocking: no exclusive side": (BLOCKING, is_exclusive),
    "blocking: no synchronise": (BLOCKING, lambda op: isinstance(op, Synchronize)),
    "context: no exclusive side": (CONTEXT, is_exclusive),
    "context: no pre barrier": (CONTEXT, lambda op: isinstance(op, ContextRecord)),
    "context: no post barrier": (CONTEXT, lambda op: isinstance(op, ContextWait)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_without_one_edge_it_is_torn(name):
    barrier, drop = MUTANTS[name]
    machine = Machine([writer(0, "N", "A"), back(1, barrier)], homes(barrier, "A", ""), drop=drop)
    assert_caught(explorer.explore(machine, uniform("S", "N")), "torn")


@pytest.mark.parametrize("barrier", BARRIERS, ids=lambda b: b.value)
def test_a_note_beside_a_step_is_never_torn(barrier):
    machine = Machine([writer(0, "N", "A"), noting(1, barrier)], homes(barrier, "A", ""))
    assert_sound(explorer.explore(machine, noted_whole), 20)


@pytest.mark.parametrize(
    ("barrier", "drop"),
    [(HOST, is_exclusive), (CONTEXT, is_exclusive), (CONTEXT, CallerWait), (CONTEXT, ContextRecord)],
    ids=lambda v: getattr(v, "value", getattr(v, "__name__", "")),
)
def test_a_note_without_one_edge_is_torn(barrier, drop):
    dropped = drop if drop is is_exclusive else (lambda op: isinstance(op, drop))
    machine = Machine([writer(0, "N", "A"), noting(1, barrier)], homes(barrier, "A", ""), drop=dropped)
    assert_caught(explorer.explore(machine, noted_whole), "torn")


@pytest.mark.parametrize("protected", [True, False])
@pytest.mark.parametrize("barrier", BARRIERS, ids=lambda b: b.value)
def test_gradients_from_before_are_never_applied_after_it(barrier, protected):
    """A red twin: without a new epoch they are."""

    def same_epoch(op):
        return isinstance(op, Change) and op.label == "commit"

    programs, where = [straddling_step(0, "A"), back(1, barrier)], homes(barrier, "A", "")
    machine = Machine(programs, where, versions=True, drop=None if protected else same_epoch)
    found = explorer.explore(machine, uniform("S", "N1"))
    if protected:
        assert_sound(found, 20)
    else:
        assert_caught(found, "torn")


@pytest.mark.parametrize(("serial", "step"), [(1, 1), (1, 2), (2, 1)])
def test_snapshots_of_its_future_are_dropped(serial, step):
    """Those from before the note stay, and those of its own step."""
    machine = Machine([in_turn(take(0, HOST, step=step, manual=True), back(0, HOST, serial))])

    def is_good(world):
        first, second, *_ = world.host.ring
        stays = serial == 2 or second.completed <= 1
        return first.phase is SlotPhase.CERTIFIED and (second.phase is not SlotPhase.FREE) == stays

    assert_sound(explorer.explore(machine, is_good), 3)


@pytest.mark.parametrize("protocol", [back, noting])
def test_it_announces_itself(protocol):
    """Steps of other threads queue behind it, and who would wait for himself is told so at once."""
    run = protocol(1, HOST)()
    first = next(run)
    after, _ = first.function(HostState())
    assert gate.enter_section(after.gate, 2, False) is None
    inside = HostState(gate=gate.enter_section(gate.GateState(), 1, False))
    with pytest.raises(PhaseError):
        first.function(inside)
    with pytest.raises(CaptureInProgress):
        first.function(HostState(captures=((1, 2),)))
    second = run.send(None)
    with pytest.raises(CaptureInProgress):  # one that began inside a section that was open then
        second.function(HostState(gate=after.gate, captures=((1, 2),)))
    dispose(run)


@pytest.mark.parametrize("barrier", BARRIERS, ids=lambda b: b.value)
def test_only_where_there_are_events_the_way_back_records_any(barrier):
    recorded = []
    machine = Machine([back(0, barrier)], homes(barrier, ""), drop=lambda op: recorded.append(type(op)) or False)
    assert_sound(explorer.explore(machine, uniform("S")), 1)
    assert (StreamRecord in recorded) == barrier.has_events


def test_what_stays_of_the_ring():
    """Of what is later than step 3: snapshots from before the note, and a slot that somebody else is filling."""
    sealed, filling = SlotPhase.SEALED, SlotPhase.FILLING
    slots = (
        Slot(0, sealed, snapshot=4, completed=4),
        Slot(1, sealed, snapshot=6, completed=3),
        Slot(2, sealed, snapshot=5, completed=4),
        Slot(3, filling, snapshot=6, completed=4, tier=Tier.HOST),
        Slot(4),
    )
    left = noting_module._without_future(slots, Place(0, 3, 5))
    assert left == (*slots[:2], Slot(2), *slots[3:])


def test_a_run_that_is_let_go_of_has_not_failed():
    """Only an error marks the train state as torn."""
    protocol = back(1, HOST)()
    answers = {Await: (None, 0.0), Change: Place(0, 0, 1), Check: Places((), ("cpu",))}
    op = next(protocol)
    while not isinstance(op, Copy):
        op = protocol.send(answers[type(op)])
    assert protocol.throw(GeneratorExit()).label == "leave"
    dispose(protocol)


def test_what_a_broken_step_has_left_is_not_gone_back_to():
    programs = [in_turn(failing_step(0, "N", "A"), back(0, CONTEXT))]
    found = explorer.explore(Machine(programs, ("A",), may_raise=("StateMismatch",)), lambda w: w.host.torn)
    assert_sound(found, 5)
    assert {ends for _, _, ends in found.ends} == {("StateMismatch",)}
