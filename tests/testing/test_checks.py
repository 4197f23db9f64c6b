"""Everything that `tolaria verify` explores, once: what it finds, the pages that tell of it, and replay."""

import json
import random
from pathlib import Path

import pytest

from tolaria.errors import UsageError
from tolaria.operations import Barrier, ContextWait
from tolaria.testing import checks, explorer, golden, timeline
from tolaria.testing.catalog import SCENARIOS
from tolaria.testing.explorer import Priorities, Uniform, explore, sample
from tolaria.testing.mutants import MUTANTS
from tolaria.testing.programs import in_turn, roll_back, take, uniform, writer
from tolaria.testing.scenarios import Removal
from tolaria.testing.simulator import Machine

DOCS = Path(__file__).parents[2] / "docs"

KINDS = {"program": checks.programs, "mutant": checks.mutants, "design": checks.designs, "limit": checks.limits}
NAMES = [(kind, check.title) for kind, listed in KINDS.items() for check in listed()]


@pytest.fixture(scope="session")
def found():
    """Kind -> [(check, outcome)], searched once for all tests."""
    return golden.search()


@pytest.fixture(scope="session")
def by_title(found):
    return {(check.kind, check.title): (check, outcome) for listed in found.values() for check, outcome in listed}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("kind", "title"), NAMES)
def test_the_search_finds_what_it_ought_to(kind, title, by_title):
    check, outcome = by_title[kind, title]
    assert check.is_as_expected(outcome), f"{outcome.violation}\n{timeline.draw(outcome.steps)}"
    assert outcome.complete
    assert (kind in ("mutant", "limit")) <= bool(check.expected)
    assert outcome.states > 1
    assert outcome.schedules >= 1


def test_programs_are_not_trivial(found):
    """Each has several schedules that end differently or at least meet: a search of one way proves nothing."""
    assert min(outcome.schedules for _, outcome in found["program"]) > 1
    assert sum(outcome.states for _, outcome in found["program"]) > 100_000


@pytest.mark.timeout(300)
def test_the_pages_tell_what_is_found(found):
    for path, text in golden.pages(DOCS, found).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is old: python -m tolaria.testing.golden docs"


def test_every_violation_is_replayed_by_its_token(found):
    for kind in ("mutant", "design", "limit"):
        for check, outcome in found[kind]:
            if outcome.violation is None:
                continue
            again = checks.replay(check.token(outcome))
            assert again.violation is not None
            assert outcome.violation.startswith(again.violation)
            assert timeline.draw(again.steps) == timeline.draw(outcome.steps)
            assert again.check.title == check.title


def test_every_mutant_has_a_program_that_is_sound_without_it():
    assert {mutant.scenario for mutant in MUTANTS.values()} <= set(SCENARIOS)
    for mutant in MUTANTS.values():
        assert set(mutant.barriers) <= set(SCENARIOS[mutant.scenario].barriers)


# ---------------------------------------------------------------- the reduction, and the search itself


REDUCED = ["one fused writer", "an exception inside a step", "a forward that straddles a rollback", "moved storage",
           "storage freed under a copy", "a rollback that fails", "a corrupted snapshot"]  # fmt: skip


@pytest.mark.parametrize("name", REDUCED)
@pytest.mark.parametrize("barrier", [Barrier.HOST, Barrier.BLOCKING], ids=lambda b: b.value)
def test_the_reduction_loses_no_end(name, barrier):
    scenario = SCENARIOS[name]
    full = explore(scenario.machine(barrier, reduced=False), lambda world: True)
    reduced = explore(scenario.machine(barrier), lambda world: True)
    assert reduced.ends == full.ends
    assert reduced.states < full.states


def test_schedules_are_counted_as_they_are_taken():
    """The count of ways against a walk over all of them."""
    machine = Machine([writer(0, "N"), roll_back(1, Barrier.HOST)])

    def walk(world):
        steps = machine.steps(world)
        return sum(walk(step.after) for step in steps) if steps else 1

    found = explore(machine, uniform("S", "N"))
    assert found.schedules == walk(machine.start()) > 1


def test_a_shortest_schedule_comes_first():
    """No shorter one reaches a violation: every state that is nearer to the start was looked at."""
    scenario = SCENARIOS["one writer"]
    machine = scenario.machine(Barrier.CONTEXT, Removal(drop=lambda op: isinstance(op, ContextWait)))
    found = explore(machine, scenario.is_good)
    others = [sample(machine, scenario.is_good, Uniform(random.Random(seed)), 100) for seed in range(4)]
    assert len(found.steps) <= min(len(other.steps) for other in others if other.violation)


def test_a_limit_makes_a_search_incomplete():
    scenario = SCENARIOS["two rollbacks at once"]
    cut = explore(scenario.machine(Barrier.CONTEXT), scenario.is_good, limit=100)
    assert not cut.complete
    assert cut.violation is None
    assert not explore(scenario.machine(Barrier.CONTEXT), scenario.is_good, deadline=0.0).complete


# ---------------------------------------------------------------- at random


def larger():
    """Four threads, each with several turns: too large for an exhaustive search in a test."""
    steps = in_turn(writer(0, "N", "A"), writer(0, "N", "A"), writer(0, "N", "A"))
    others = in_turn(writer(1, "N", "B"), writer(1, "N", "B"))
    back = in_turn(roll_back(2, Barrier.CONTEXT), roll_back(2, Barrier.CONTEXT))
    return Machine([steps, others, back, take(3, Barrier.CONTEXT)], ("A", "B", "", ""))


STRATEGIES = {"uniform": Uniform, "priorities": Priorities}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_random_schedules_of_a_larger_program(strategy, seed):
    found = sample(larger(), uniform("S", "N"), STRATEGIES[strategy](random.Random(seed)), 40)
    assert found.violation is None
    assert not found.complete
    assert found.schedules == 40
    assert found.states > 1_000


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_random_schedules_find_a_missing_edge_and_replay_it(strategy, seed):
    scenario = MUTANTS["gate, shared side (reader)"]
    machine = scenario.machine(Barrier.HOST)
    runs = [sample(machine, scenario.is_good, STRATEGIES[strategy](random.Random(seed)), 2_000) for _ in range(2)]
    assert runs[0].violation is not None
    assert runs[0].choices == runs[1].choices, "the seed decides"
    again = explorer.follow(machine, runs[0].choices)
    assert timeline.draw(again) == timeline.draw(runs[0].steps)


# ---------------------------------------------------------------- tokens


def a_token():
    check = next(checks.mutants())
    return check.token(check.explore())


@pytest.mark.parametrize(
    "spoil", [lambda t: t[:-1], lambda t: t.replace("context", "host"), lambda t: "", lambda t: "x-0"]
)
def test_a_mistyped_token_is_refused(spoil):
    with pytest.raises(UsageError, match="mistyped"):
        checks.replay(spoil(a_token()))


def with_check_sum(body):
    return f"{body}-{checks._check_sum(body)}"


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("program.no-such.host.0", "there is no program"),
        ("program.one-writer.host.", "ends too early"),
        ("program.one-writer.host.9", "takes way 9"),
        ("program.one-writer.host.00000000000000000000", "are left"),
    ],
)
def test_a_token_of_another_version_is_refused(body, why):
    with pytest.raises(UsageError, match=why):
        checks.replay(with_check_sum(body))


def test_a_picture_has_a_row_for_each_actor_and_a_line_for_each_step():
    check = next(checks.mutants())
    outcome = check.explore()
    picture = timeline.draw(outcome.steps)
    actors = {step.actor for step in outcome.steps}
    rows = [line for line in picture.splitlines() if set(line[4:].strip()) <= {"#", "."} and line.strip()]
    assert {row.split()[0] for row in rows} == actors
    assert sum(row.split()[1].count("#") for row in rows) == len(outcome.steps)
    assert len(picture.splitlines()) == len(rows) + 1 + len(outcome.steps)
    assert json.dumps(picture)
    assert timeline.draw(()) == ""
