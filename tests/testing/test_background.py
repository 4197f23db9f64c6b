"""Reading back and draining in the model: programs reach what they are about; what the race oracle says of them."""

import random

import pytest

from tolaria.operations import Barrier
from tolaria.ring import SlotPhase
from tolaria.testing.background import BACKGROUND
from tolaria.testing.catalog import SCENARIOS
from tolaria.testing.explorer import explore
from tolaria.testing.mutants import MUTANTS
from tolaria.testing.races import Ledger
from tolaria.testing.recording import races_in
from tolaria.testing.world import SECOND

CONTEXT = Barrier.CONTEXT
UNREGISTERED = "reading back beside an unregistered writer"
# an unregistered writer races by design, and what fails is not told to the oracle
ORDERED = [one for one in BACKGROUND if not one.name.endswith(("unregistered writer", "fails"))]


def reaches(name, wanted, barrier=CONTEXT):
    """Whether an end of the program is as wanted."""
    found = explore(SCENARIOS[name].machine(barrier), lambda world: not wanted(world))
    return found.violation is not None


@pytest.mark.parametrize("barrier", list(Barrier), ids=lambda b: b.value)
@pytest.mark.parametrize(
    "wanted",
    [
        lambda world: world.disturbed,
        lambda world: not world.disturbed and world.memory == ("S", "S"),
        lambda world: not world.disturbed and "N" in world.memory,
    ],
    ids=["noticed", "undone", "too late to be noticed"],
)
def test_an_unregistered_write_may_end_in_each_way(wanted, barrier):
    assert reaches(UNREGISTERED, wanted, barrier)


def test_what_is_noticed_was_written_between_the_copy_and_the_reading_of_a_byte():
    machine = SCENARIOS[UNREGISTERED].machine(CONTEXT)
    steps = explore(machine, lambda world: not world.disturbed).steps
    items = [step.op for step in steps if step.actor in ("B", "R")]
    order = {(item[0], item[1 if item[0] == "write" else 3]): n for n, item in enumerate(items) if item[0] != "wait"}
    assert any(
        order["restore", cell] < order["write", cell] < order["look", cell] for kind, cell in order if kind == "write"
    )


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("draining beside a snapshot that wants the slot", lambda w: w.host.ring[2].snapshot == 0),
        ("draining beside a snapshot that wants the slot", lambda w: w.host.ring[0].snapshot == 2),
        ("draining beside a snapshot without another slot", lambda w: w.host.ring[0].snapshot == 1),
        ("draining beside a rollback to an older snapshot", lambda w: w.slots[2] == ("S", "S")),
        ("draining beside a rollback to an older snapshot", lambda w: w.host.ring[1].snapshot == 2),
        ("draining into a slot of a snapshot that failed", lambda w: w.slots[1] == ("S", "S")),
        ("a rollback to what was drained", lambda w: w.host.ring[0].snapshot != 0 and w.memory == ("S", "S")),
        ("draining that fails", lambda w: w.failed and w.host.ring[1].phase is SlotPhase.STAGED),
        ("reading back that fails", lambda w: w.failed),
    ],
)
def test_programs_reach_what_they_are_about(name, wanted):
    assert reaches(name, wanted)


def test_a_copy_is_seen_half_done():
    machine = SCENARIOS["draining beside a capture"].machine(CONTEXT)
    world, halves = machine.start(), []
    while steps := machine.steps(world):
        world = steps[-1].after  # devices come last, so a transfer runs as soon as it can
        halves.append(world.slots[1])
    assert ("S", "-") in halves


@pytest.mark.parametrize("scenario", BACKGROUND, ids=lambda scenario: scenario.name)
def test_the_reduction_loses_no_end(scenario):
    barrier = scenario.barriers[-1]
    full = explore(scenario.machine(barrier, reduced=False), lambda world: True, limit=10_000)
    reduced = explore(scenario.machine(barrier), lambda world: True)
    assert reduced.ends >= full.ends
    assert not full.complete or (reduced.ends == full.ends and reduced.states < full.states)


def some_schedules(machine, source, count=12):
    for _ in range(count):
        world, steps = machine.start(), []
        while possible := machine.steps(world):
            steps.append(source.choice(possible))
            world = steps[-1].after
        yield steps


@pytest.mark.parametrize("scenario", ORDERED, ids=lambda scenario: scenario.name)
def test_no_race_behind_a_submission(scenario, seed):
    for barrier in scenario.barriers:
        machine = scenario.machine(barrier)
        for steps in some_schedules(machine, random.Random(seed)):
            assert [str(race) for race in races_in(machine, steps)] == []


def as_late_as_possible(machine):
    """The first thread until it fails or ends, then the next; the device only when nobody else can go on."""
    world, steps = machine.start(), []
    while possible := machine.steps(world):
        steps.append(min(possible, key=lambda step: (not step.actor.startswith("T"), step.note != "fails", step.actor)))
        world = steps[-1].after
    return steps


FAILED = "draining into a slot of a snapshot that failed"


def races_when_late(monkeypatch, missing=None):
    """Of a drain into a slot that copies which nobody waits for are still on their way to."""
    waited, recorded = Ledger.waited, Ledger.recorded
    if missing == "wait":
        monkeypatch.setattr(
            Ledger, "waited", lambda self, stream, event: stream == SECOND or waited(self, stream, event)
        )
    elif missing == "end":
        monkeypatch.setattr(Ledger, "recorded", lambda self, event, on: on == SECOND or recorded(self, event, on))
    machine = SCENARIOS[FAILED].machine(CONTEXT)
    steps = as_late_as_possible(machine)
    assert "fails" in {step.note for step in steps}
    return [race.missing for race in races_in(machine, steps)]


def test_the_second_streams_wait_and_its_end_are_told(monkeypatch):
    assert races_when_late(monkeypatch) == []


@pytest.mark.parametrize(
    ("untold", "missing"), [("wait", f"{SECOND} does not wait for R"), ("end", f"T1 does not wait for {SECOND}")]
)
def test_a_transfer_whose_wait_or_end_is_not_told_is_a_race(monkeypatch, untold, missing):
    assert any(race.startswith(missing) for race in races_when_late(monkeypatch, untold))


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("forwards wait until buffers were read back", "A does not wait for R"),
        ("writers wait until all was read back", "A does not wait for R"),
        ("transfers behind the copies", f"{SECOND} does not wait for R"),
    ],
)
def test_a_missing_edge_is_a_race(name, missing):
    mutant = MUTANTS[name]
    machine = mutant.machine(CONTEXT)
    races = races_in(machine, explore(machine, mutant.is_good).steps)
    assert races[0].missing.startswith(missing)  # others follow from it
