"""The race oracle: rules with a passing and a failing twin each, and schedules of the model checker."""

import random

import pytest

from tolaria.operations import Barrier
from tolaria.testing import explorer
from tolaria.testing.catalog import SCENARIOS
from tolaria.testing.mutants import MUTANTS
from tolaria.testing.races import Ledger
from tolaria.testing.recording import races_in

X = [("cuda:0", 0, 64)]


@pytest.fixture
def ledger():
    return Ledger()


def write(ledger, stream="A", thread="main", where=X):
    ledger.launched(thread, stream, writes=where, what="step")


def copy(ledger, stream="R", thread="main", where=X):
    ledger.launched(thread, stream, reads=where, what="copy")


def test_two_streams_race(ledger):
    write(ledger)
    copy(ledger)
    (race,) = ledger.races
    assert (race.first.actor, race.second.actor) == ("A", "R")
    assert race.missing == "R does not wait for A: nothing orders 'copy' behind 'step'"
    assert "A writes cuda:0[0:64] (step)" in str(race)


def test_the_same_stream_does_not(ledger):
    write(ledger)
    copy(ledger, "A")
    assert not ledger.races


def test_reads_do_not_race(ledger):
    copy(ledger, "A")
    copy(ledger, "R")
    assert not ledger.races


@pytest.mark.parametrize(("start", "races"), [(63, 1), (64, 0), (0, 1)])
def test_bytes_in_common_are_what_counts(ledger, start, races):
    write(ledger)
    copy(ledger, where=[("cuda:0", start, 64)])
    copy(ledger, where=[("cuda:1", 0, 64)])
    assert len(ledger.races) == races


def test_an_event_orders_what_came_before_it_and_nothing_after(ledger):
    write(ledger)
    ledger.recorded("e", "A")
    ledger.waited("R", "e")
    copy(ledger)
    assert not ledger.races
    write(ledger)
    copy(ledger)
    assert len(ledger.races) == 2  # the copy of before with this step, this step with the copy of now


def test_a_record_after_the_wait_orders_nothing(ledger):
    write(ledger)
    ledger.waited("R", "e")
    ledger.recorded("e", "A")
    copy(ledger)
    assert len(ledger.races) == 1


def test_a_context_wide_event_covers_all_streams(ledger):
    for stream in "AB":
        write(ledger, stream, where=[("cuda:0", ord(stream), 1)])
    ledger.recorded_all("e")
    ledger.waited("R", "e")
    copy(ledger, where=[("cuda:0", 0, 128)])
    assert not ledger.races


def test_a_context_wide_wait_covers_streams_that_are_made_later(ledger):
    write(ledger, "R")
    ledger.recorded("e", "R")
    ledger.waited_all("e")
    copy(ledger, "late")
    assert not ledger.races
    fresh = Ledger()
    write(fresh, "R")
    copy(fresh, "late")
    assert len(fresh.races) == 1


def test_a_host_that_reads_before_the_copy_has_landed(ledger):
    """What a sanitizer that looks at device memory only cannot see."""
    host = [("host", 0, 8)]
    ledger.launched("main", "R", reads=X, writes=host, what="copy to the host")
    ledger.recorded("e", "R")
    ledger.did("main", reads=host, what="tolist")
    (race,) = ledger.races
    assert race.missing.startswith("main does not wait for R")
    ledger.host_waited("main", "e")
    ledger.did("main", reads=host, what="tolist again")
    assert len(ledger.races) == 1


def test_a_synchronise_of_one_thread_tells_another_nothing(ledger):
    write(ledger)
    ledger.synchronized("main")
    copy(ledger, thread="main")
    assert not ledger.races
    copy(ledger, stream="S", thread="other")
    assert len(ledger.races) == 1


def test_a_lock_passes_on_what_its_holder_knew(ledger):
    write(ledger)
    ledger.synchronized("main")
    ledger.released("main", "gate")
    ledger.acquired("other", "gate")
    copy(ledger, stream="S", thread="other")
    assert not ledger.races


def test_a_lock_does_not_order_what_was_only_launched(ledger):
    """Why a host lock without a barrier is not enough."""
    write(ledger)
    ledger.released("main", "gate")
    ledger.acquired("other", "gate")
    copy(ledger, thread="other")
    assert len(ledger.races) == 1


def test_memory_that_was_given_back_is_new(ledger):
    write(ledger)
    ledger.given_back(X[0])
    copy(ledger)
    assert not ledger.races


def test_stacks_are_kept_when_asked_for():
    ledger = Ledger(with_stacks=True)
    write(ledger)
    copy(ledger)
    text = str(ledger.races[0])
    assert text.count("test_stacks_are_kept_when_asked_for") == 2


# ---------------------------------------------------------------- schedules

SOUND = [
    "one writer", "one reader", "one fused writer", "a writer and a reader on two streams", "two rollbacks at once",
    "two readers across a rollback", "a snapshot and the next step", "a snapshot and a writer on any stream",
    "a rollback during a snapshot", "a snapshot of buffers", "page-locked memory: rollback", "an extra: rollback",
    "page-locked memory: snapshot", "an extra: snapshot",
]  # fmt: skip


def some_schedules(machine, count=12):
    """Schedules at random: whether anything is torn in them does not matter."""
    source = random.Random(0)
    for _ in range(count):
        world, steps = machine.start(), []
        while possible := machine.steps(world):
            steps.append(source.choice(possible))
            world = steps[-1].after
        yield steps


@pytest.mark.parametrize("barrier", list(Barrier), ids=lambda b: b.value)
@pytest.mark.parametrize("name", SOUND)
def test_the_shipped_protocol_has_no_race(name, barrier):
    machine = SCENARIOS[name].machine(barrier)
    for steps in some_schedules(machine):
        assert [str(race) for race in races_in(machine, steps)] == []


RACY = [
    ("pre barrier", Barrier.CONTEXT), ("pre barrier (the copies' wait)", Barrier.CONTEXT),
    ("pre barrier (blocking)", Barrier.BLOCKING), ("post barrier", Barrier.CONTEXT),
    ("post barrier (reader)", Barrier.CONTEXT), ("post barrier (blocking)", Barrier.BLOCKING),
    ("gate, shared side", Barrier.HOST), ("gate, shared side (reader)", Barrier.HOST),
    ("gate, exclusive side", Barrier.HOST), ("writers wait for `done`", Barrier.CONTEXT),
    ("forwards wait for the copies of buffers", Barrier.CONTEXT),
    ("writers on any stream wait for `done`", Barrier.CONTEXT),
    ("transfers of page-locked memory", Barrier.CONTEXT), ("host state inside the barrier", Barrier.CONTEXT),
    ("host state before `done`", Barrier.CONTEXT),
]  # fmt: skip


@pytest.mark.parametrize(("name", "barrier"), RACY, ids=lambda value: getattr(value, "value", value))
def test_a_missing_edge_is_a_race(name, barrier):
    mutant = MUTANTS[name]
    machine = mutant.machine(barrier)
    found = explorer.explore(machine, mutant.is_good)
    races = races_in(machine, found.steps)
    assert races
    assert all("does not wait for" in race.missing for race in races)


def test_a_missing_edge_shows_in_a_schedule_in_which_nothing_is_torn():
    mutant = MUTANTS["post barrier"]
    machine = mutant.machine(Barrier.CONTEXT)
    whole = [steps for steps in some_schedules(machine, 60) if machine.wrong(steps[-1].after, mutant.is_good) is None]
    assert whole
    assert any(races_in(machine, steps) for steps in whole)
