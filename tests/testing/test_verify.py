"""`tolaria verify`: exit codes, the table, and the schema of its JSON."""

import dataclasses
import json

import pytest

from tolaria.cli import main
from tolaria.errors import UsageError
from tolaria.operations import Barrier
from tolaria.testing import checks, verify
from tolaria.testing.scenarios import NOTHING
from tolaria.testing.stress import Plan, Stress, check, unprotected


@pytest.fixture
def few(monkeypatch):
    """Only the first few searches of each kind, so that the command is quick."""

    def first(kind, count):
        listed = list(getattr(checks, kind)())[:count]
        monkeypatch.setattr(checks, kind, lambda: iter(listed))

    for kind, count in (("programs", 4), ("mutants", 3), ("designs", 3)):
        first(kind, count)
    return monkeypatch


SCHEMA = {
    "schema_version": int,
    "capabilities": dict,
    "protocol": [{"program": str, "states": int, "schedules": int, "violations": int, "complete": bool}],
    "mutants": [{"name": str, "caught": bool, "schedule_length": int}],
    "device": [{"test": str, "control": str, "result": str}],
    "stress": {"rollbacks": int, "lost": int, "torn": int},
}


def assert_fits(value, schema):
    if isinstance(schema, list):
        for item in value:
            assert_fits(item, schema[0])
    elif isinstance(schema, dict):
        assert list(value) == list(schema)
        for name, inner in schema.items():
            assert_fits(value[name], inner)
    else:
        assert type(value) is schema


def run_json(capsys, *arguments):
    code = main(["verify", "--device", "cpu", "--json", *arguments])
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return code, json.loads(out)


@pytest.mark.usefixtures("few", "alone")
def test_json(capsys):
    code, report = run_json(capsys, "--budget", "6")
    assert_fits(report, SCHEMA)
    assert code == 0
    assert report["schema_version"] == 1
    assert report["capabilities"]["barrier"] == "host"
    assert len(report["protocol"]) == 4
    assert all(row["complete"] and row["violations"] == 0 and row["schedules"] > 1 for row in report["protocol"])
    assert all(row["caught"] and row["schedule_length"] > 1 for row in report["mutants"])
    assert {row["name"].startswith("design: ") for row in report["mutants"]} == {True, False}
    assert report["device"] == []
    assert report["stress"]["rollbacks"] > 0
    assert report["stress"]["lost"] == report["stress"]["torn"] == 0


@pytest.mark.usefixtures("alone")
def test_a_budget_that_cuts_a_search_is_a_finding(capsys):
    code, report = run_json(capsys, "--budget", "0.5")
    assert code == 1
    assert not all(row["complete"] for row in report["protocol"])


def test_a_search_that_was_cut_off_is_not_as_expected():
    program = next(checks.programs())
    found = program.explore()
    assert program.is_as_expected(found)
    assert not program.is_as_expected(dataclasses.replace(found, complete=False))
    assert not program.is_as_expected(dataclasses.replace(found, violation="torn: everything"))


@pytest.mark.usefixtures("alone")
def test_a_mutant_that_survives_is_a_finding(few, capsys):
    survivor = dataclasses.replace(next(checks.programs()), kind="mutant", expected=("torn",))
    few.setattr(checks, "mutants", lambda: iter([survivor]))
    code, report = run_json(capsys, "--budget", "6")
    assert code == 1
    assert report["mutants"][0] == {"name": survivor.title, "caught": False, "schedule_length": 0}


@pytest.mark.usefixtures("alone")
def test_a_violation_is_a_finding_and_can_be_replayed(few, capsys):
    broken = dataclasses.replace(next(checks.mutants()), expected=())
    few.setattr(checks, "programs", lambda: iter([broken]))
    assert main(["verify", "--device", "cpu", "--budget", "6"]) == 1
    out = capsys.readouterr().out
    assert "VIOLATION" in out
    assert "NOT verified" in out
    token = out.split("--replay ")[1].split()[0]
    assert main(["verify", "--replay", token]) == 0  # that of a mutant, where it is expected
    assert "torn" in capsys.readouterr().out


@pytest.mark.usefixtures("few", "alone")
def test_the_table_says_what_was_tried(capsys):
    assert main(["verify", "--device", "cpu", "--budget", "6"]) == 0
    out = capsys.readouterr().out
    for said in ("one writer", "schedules", "pre barrier", "rollbacks beside random work", "need a CUDA device"):
        assert said in out
    assert out.rstrip().endswith("verified")
    assert "NOT" not in out


def test_wrong_usage(capsys):
    for budget in ("0", "nan", "inf"):
        assert main(["verify", "--budget", budget]) == 2
    assert main(["verify", "--replay", "nonsense"]) == 2
    assert "mistyped" in capsys.readouterr().err


def test_cuda_is_not_taken_for_granted(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="no CUDA device"):
        verify.main("cuda", 1.0, True, None)


@pytest.mark.usefixtures("few", "alone")
def test_failed_trials_and_lost_rollbacks_are_findings():
    good = verify.run("cpu", 6.0)
    assert good.is_good
    trial = {"test": "write", "control": "torn", "result": "ok"}
    assert dataclasses.replace(good, device=(trial,)).is_good
    assert not dataclasses.replace(good, device=(trial, {**trial, "result": "torn"})).is_good
    for name in ("lost", "torn"):
        assert not dataclasses.replace(good, stress={**good.stress, name: 1}).is_good
    assert not dataclasses.replace(good, stress={**good.stress, "rollbacks": 0}).is_good


# ---------------------------------------------------------------- stress


SMALL = Plan(threads=3, elements=1 << 12)


@pytest.mark.usefixtures("alone")
def test_nothing_is_lost_or_torn_under_stress(seed):
    counts, capabilities = check(dataclasses.replace(SMALL, seed=seed), seconds=60.0, most=60)
    assert capabilities.barrier == "host"
    assert (counts.rollbacks, counts.lost, counts.torn) == (60, 0, 0)
    assert counts.steps > 20
    assert counts.reads > 60


@pytest.mark.usefixtures("alone")
def test_without_the_gate_it_is_torn(seed):
    """The red twin: half a step before a rollback, half of it after."""
    assert unprotected(dataclasses.replace(SMALL, seed=seed), most=60).torn > 0


@pytest.mark.usefixtures("alone")
def test_a_rollback_that_restores_nothing_is_lost(monkeypatch, seed):
    """The other red twin: steps of an abandoned past are still there."""
    from tolaria.operations import Direction
    from tolaria.snapshot import Vault

    original = Vault.copy
    monkeypatch.setattr(Vault, "copy", lambda self, op: op.direction is Direction.RESTORE or original(self, op))
    counts, _ = check(dataclasses.replace(SMALL, seed=seed), seconds=60.0, most=30)
    assert counts.lost > 0
    assert counts.torn == 0


@pytest.mark.usefixtures("alone")
def test_an_error_of_a_worker_is_not_swallowed():
    with Stress(SMALL) as stress:
        stress._groups[0].parameters.append("no tensor")
        with pytest.raises(AttributeError):
            stress.run(60.0, most=500)


def test_scenarios_take_nothing_away_by_themselves():
    assert NOTHING.drop is None
    assert NOTHING.governs is NOTHING.uses is None
    assert Barrier.HOST in Barrier
