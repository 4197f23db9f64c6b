"""Every interleaving of small programs with the shipped protocol: nothing torn. Each edge removed: something torn."""

import functools
from dataclasses import replace

import pytest
from protocol.outcomes import BARRIERS, assert_caught, assert_sound

from tolaria import gate, ring
from tolaria.admission import close_section, open_section
from tolaria.operations import (
    Await,
    Barrier,
    CallerWait,
    Change,
    ContextRecord,
    ContextWait,
    HostState,
    SectionKind,
    Synchronize,
)
from tolaria.testing import explorer
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
from tolaria.testing.simulator import Machine, good_ring
from tolaria.testing.world import Outcome, World

HOST, BLOCKING, CONTEXT = Barrier.HOST, Barrier.BLOCKING, Barrier.CONTEXT


def slots_uniform(world: World) -> bool:
    """Two slots are published, each holding one value throughout."""
    return ring.count(world.host.ring, lambda slot: slot.phase in ring.READABLE) == 2 and are_slots_uniform(world)


# ---------------------------------------------------------------- the shipped protocol

PROGRAMS = {
    "one writer": (lambda b: [writer(0, "N", "A"), roll_back(1, b)], ("A", ""), uniform("S", "N")),
    "one reader": (lambda b: [reader(0, "A"), roll_back(1, b)], ("A", ""), uniform("S")),
    "a step and the next forward": (
        lambda b: [in_turn(writer(0, "N", "A"), reader(0, "A")), roll_back(1, b)],
        ("A", ""),
        uniform("S", "N"),
    ),
    "a step on one stream, the next forward on another, behind an event": (
        lambda b: [in_turn(writer(0, "N", "A"), handover("A", "B"), reader(0, "B")), roll_back(1, b)],
        ("A", "", "B"),
        uniform("S", "N"),
    ),
    "two rollbacks at once": (
        lambda b: [writer(0, "N", "A"), roll_back(1, b), roll_back(2, b)],
        ("A", "", ""),
        uniform("S", "N"),
    ),
}


@pytest.mark.parametrize("barrier", BARRIERS, ids=lambda b: b.value)
@pytest.mark.parametrize("name", PROGRAMS)
def test_nothing_is_torn(name, barrier):
    programs, where, is_good = PROGRAMS[name]
    found = explorer.explore(Machine(programs(barrier), homes(barrier, *where)), is_good)
    assert_sound(found, 20)


@pytest.mark.parametrize("barrier", BARRIERS, ids=lambda b: b.value)
@pytest.mark.parametrize("drop", [None, ContextWait, Synchronize])
def test_the_reduction_loses_no_end(barrier, drop):
    """Neither of the shipped protocol nor of a broken one: every end of the full search is found."""

    def search(reduced):
        dropped = (lambda op: isinstance(op, drop)) if drop else None
        programs = [in_turn(writer(0, "N", "A"), reader(0, "A")), in_turn(roll_back(1, barrier), take(1, barrier))]
        machine = Machine(programs, homes(barrier, "A", ""), drop=dropped, reduced=reduced)
        return explorer.explore(machine, lambda world: True)

    full, reduced = search(False), search(True)
    assert reduced.ends == full.ends
    assert len(full.ends) > 1
    assert 20 < reduced.states < full.states


@pytest.mark.parametrize("barrier", BARRIERS, ids=lambda b: b.value)
def test_a_snapshot_beside_a_step_is_never_torn(barrier):
    found = explorer.explore(Machine([writer(0, "N", "A"), take(1, barrier)], homes(barrier, "A", "")), slots_uniform)
    assert_sound(found, 20)


@pytest.mark.parametrize("barrier", BARRIERS, ids=lambda b: b.value)
def test_a_snapshot_and_a_rollback_at_once(barrier):
    """Whichever comes first, memory and every readable slot end uniform, and nobody is left waiting."""

    programs = [writer(0, "N", "A"), take(1, barrier), roll_back(2, barrier)]
    found = explorer.explore(Machine(programs, homes(barrier, "A", "", "")), both(uniform("S", "N"), are_slots_uniform))
    assert_sound(found, 20)


def test_a_section_inside_autograd_does_not_deadlock_with_a_waiting_rollback():
    """Thread 0 holds a section while it waits for an engine thread that wants one of its own."""

    def outcome(in_autograd: bool) -> Outcome:
        def forward():
            yield from open_section(0, SectionKind.FORWARD, False)
            yield Await("wait for the engine", lambda s: (s, None) if s.torn else None)
            yield from close_section(0, 0)

        def engine():
            yield from open_section(1, SectionKind.FORWARD, in_autograd)
            yield Change("engine done", lambda s: (replace(s, torn=True), None))
            yield from close_section(1, 0)

        return explorer.explore(Machine([forward, engine, functools.partial(_exclusive, 2)]), lambda world: True)

    assert outcome(in_autograd=True).violation is None
    assert "deadlock" in outcome(in_autograd=False).violation  # the red twin: queue like any other thread


def _exclusive(thread):
    """The exclusive side alone, without the capture guard (`torn` stands in for a flag above)."""
    yield Change("announce", lambda s: (replace(s, gate=gate.announce_exclusive(s.gate, thread, "test")), None))

    def enter(state):
        entered = gate.enter_exclusive(state.gate, thread)
        return None if entered is None else (replace(state, gate=entered), None)

    yield Await("enter", enter)
    yield Change("leave", lambda s: (replace(s, gate=gate.leave_exclusive(s.gate, thread)), None))


# ---------------------------------------------------------------- each edge removed


def is_section(op):
    return isinstance(op, Await) and op.label.startswith("open a")


def is_exclusive(op):
    return isinstance(op, Await) and "wait for open sections" in op.label


MUTANTS = {
    "host: no exclusive side": (HOST, is_exclusive),
    "host: no shared side": (HOST, is_section),
    "blocking: no exclusive side": (BLOCKING, is_exclusive),
    "blocking: no synchronise": (BLOCKING, lambda op: isinstance(op, Synchronize)),
    "context: no exclusive side": (CONTEXT, is_exclusive),
    "context: no shared side": (CONTEXT, is_section),
    "context: no pre barrier": (CONTEXT, lambda op: isinstance(op, ContextRecord)),
    "context: no post barrier": (CONTEXT, lambda op: isinstance(op, ContextWait)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_rollback_without_one_edge_is_torn(name):
    barrier, drop = MUTANTS[name]
    programs = [writer(0, "N", "A"), roll_back(1, barrier)]
    if is_section is drop:  # the dropped answer has no epoch in it: use ungated writers instead
        programs, drop = [writer(0, "N", "A", gated=False), roll_back(1, barrier)], lambda op: False
    found = explorer.explore(Machine(programs, homes(barrier, "A", ""), drop=drop), uniform("S", "N"))
    assert_caught(found, "torn")


def test_a_reader_outside_of_the_gate_sees_a_mix():
    found = explorer.explore(Machine([reader(0, gated=False), roll_back(1, HOST)]), uniform("S"))
    assert_caught(found, "torn")


@pytest.mark.parametrize("barrier", [HOST, CONTEXT], ids=lambda b: b.value)
def test_a_snapshot_without_the_gate_is_torn(barrier):
    machine = Machine([writer(0, "N", "A"), take(1, barrier)], homes(barrier, "A", ""), drop=is_exclusive)
    assert_caught(explorer.explore(machine, slots_uniform), "torn")


def test_a_snapshot_whose_writers_do_not_wait_is_torn():
    """The lazy edge: a writer's stream waits for `done` when its next section opens."""
    programs = [writer(0, "N", "A"), take(1, CONTEXT)]
    machine = Machine(programs, ("A", ""), drop=lambda op: isinstance(op, CallerWait))
    assert_caught(explorer.explore(machine, slots_uniform), "torn")


def test_the_newest_good_snapshot_survives_every_interleaving_of_snapshots():
    """Three snapshots race for three slots: the certified one of the start is never overwritten."""
    initial = HostState(ring=good_ring(3), next_snapshot=1)
    programs = [take(0, HOST), take(1, HOST), take(2, HOST)]
    machine = Machine(programs, initial=initial, may_raise=("SlotsBusy",))
    assert_sound(explorer.explore(machine, lambda w: w.host.ring[0].snapshot == 0 and w.slots[0] == ("S", "S")), 20)
