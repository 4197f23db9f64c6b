"""The cartpole drill, shortened: 24 rounds and a bar of 60, where the command has 140 and 475."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributions import Categorical, Distribution

from tolaria import sb3
from tolaria.cli import main
from tolaria.config import GovernorConfig
from tolaria.drill import cartpole, cartpole_drill
from tolaria.drill.cartpole import PolicyFault, PolicyRecord, plan
from tolaria.drill.cartpole_drill import is_recovered, run_policy_drill
from tolaria.drill.cartpole_show import PolicyShow
from tolaria.records import Incident

ROUNDS, BAR = 24, 60.0
KINDS = ["nan_gradient", "blow_up", "last_step", "returning_blow_up", "poisoned_observation", "last_round"]


@contextlib.contextmanager
def shortened() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cartpole, "MIN_ROUNDS", ROUNDS)
        patch.setattr(cartpole, "SOLVED", BAR)
        patch.setattr(cartpole_drill, "SOLVED", BAR)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str, Path]:
    out = tmp_path_factory.mktemp("cartpole") / "report"
    stdout = io.StringIO()
    with shortened(), contextlib.redirect_stdout(stdout):
        code = main(["drill", "--workload", "cartpole", "--steps", str(ROUNDS), "--json", "--out", str(out)])
    return code, stdout.getvalue(), out


@pytest.mark.slow
def test_every_fault_is_recovered_and_the_policy_is_as_good(finished: tuple[int, str, Path]) -> None:
    code, stdout, _ = finished
    report = json.loads(stdout)
    assert code == 0
    assert [fault["kind"] for fault in report["faults"]] == KINDS
    assert all(fault["recovered"] for fault in report["faults"])
    assert report["injected"] == report["recovered"] == len(KINDS)
    runs = report["runs"]
    assert [runs[name]["survived"] for name in ("clean", "unguarded", "guarded")] == [True, False, True]
    assert runs["guarded"]["mean_return"] >= BAR
    assert runs["unguarded"]["mean_return"] is None
    assert runs["unguarded"]["ended_by"].startswith("ValueError")
    assert runs["unguarded"]["mean_return_of_last_fault_alone"] < BAR
    assert (runs["guarded"]["rollbacks"], runs["guarded"]["false_rollbacks"], runs["guarded"]["dropped"]) == (7, 0, 2)


@pytest.mark.slow
def test_the_report_has_exactly_its_fields(finished: tuple[int, str, Path]) -> None:
    _, stdout, out = finished
    assert len(stdout.splitlines()) == 1
    report = json.loads(stdout)
    assert list(report) == [
        "schema_version",
        "workload",
        "seed",
        "device",
        "steps",
        "runs",
        "faults",
        "injected",
        "recovered",
    ]
    assert (report["workload"], report["seed"], report["device"], report["steps"]) == ("cartpole", 0, "cpu", ROUNDS)
    for fault in report["faults"]:
        assert list(fault) == ["kind", "round", "reason", "action", "rollback_ms", "recovered"]
    assert json.loads((out / "report.json").read_text()) == report
    ledger = [json.loads(line) for line in (out / "incidents.jsonl").read_text().splitlines()]
    assert [line["action"] for line in ledger] == ["replay", "replay", "replay", "replay", "skip", "skip", "replay"]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_without_rollbacks_nothing_is_recovered() -> None:
    """The red twin of the whole: the same governor, only watching, and the finite faults only."""
    finite = ["blow_up", "last_step", "last_round"]
    show = PolicyShow(silent=True)
    watching = GovernorConfig(mode="observe")
    result = run_policy_drill(0, ROUNDS, torch.device("cpu"), show, watching, kinds=finite)
    assert result.recovered == dict.fromkeys(finite, False)
    assert result.guarded.struck == dict.fromkeys(finite, 1)
    assert result.guarded.evaluation == result.unguarded.evaluation < BAR
    assert not result.is_good
    assert result.guarded.incidents[0][0] == result.faults[0].round


# ---------------------------------------------------------------- what counts


def incident(action: str) -> Incident:
    return Incident(
        step=5,
        onset=5,
        reason="surge of drift",
        signs={},
        evidence={},
        action=action,
        restored_step=4,
        certified=True,
        steps_lost=1,
        batches_replayed=0,
        batches_skipped=0,
        rollback_ms=1.0,
        barrier="host",
    )


def record(states: str, actions: tuple[str, ...], struck: bool = True) -> PolicyRecord:
    """States before rounds 5 and 6: `a|b`, several of a kind without a separator."""
    made = PolicyRecord("guarded", struck={"blow_up": 1} if struck else {})
    made.digests = [(5 + number, digest) for number, some in enumerate(states.split("|")) for digest in some]
    made.incidents = [(5, incident(action)) for action in actions]
    return made


@pytest.mark.parametrize(
    ("kind", "action", "states", "actions", "first_drop", "expected"),
    [
        ("blow_up", "replay", "a|b", ("replay",), 99, True),
        ("blow_up", "replay", "a|x", ("replay",), 99, False),  # not what the clean run has
        ("blow_up", "replay", "a|x", ("replay",), 4, True),  # it has learnt from other experience since round 4
        ("blow_up", "replay", "a|b", (), 99, False),
        ("blow_up", "replay", "a|b", ("replay", "skip"), 99, False),
        ("blow_up", "replay", "a|", ("replay",), 4, False),  # ended early
        ("blow_up", "skip", "a|a", ("replay", "skip"), 5, True),
        ("blow_up", "skip", "a|b", ("replay", "skip"), 5, False),
        ("blow_up", "skip", "a|a", ("replay",), 5, False),
        ("poisoned_observation", "skip", "aa|b", ("skip",), 5, True),
        ("poisoned_observation", "skip", "ax|b", ("skip",), 5, False),
        ("poisoned_observation", "skip", "a|b", ("skip",), 5, False),
        ("poisoned_observation", "skip", "aa|b", (), 5, False),
    ],
)
def test_what_counts_as_recovered(
    kind: str, action: str, states: str, actions: tuple[str, ...], first_drop: int, expected: bool
) -> None:
    fault = PolicyFault(kind, "", round=5, step=0, action=action)
    clean = record("a|b", ())
    assert is_recovered(fault, clean, record(states, actions), first_drop) is expected


def test_a_fault_that_never_struck_is_not_recovered() -> None:
    fault = PolicyFault("blow_up", "", round=5, step=0)
    assert not is_recovered(fault, record("a|b", ()), record("a|b", ("replay",), struck=False), 99)


@pytest.mark.parametrize(
    "change",
    [
        {"recovered": {"blow_up": False}},
        {"false": (incident("skip"),)},
        {"guarded": PolicyRecord("guarded", evaluation=474.0)},
        {"unguarded": PolicyRecord("unguarded", evaluation=480.0)},
        {"only_last": 480.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_is_good(change: dict[str, Any]) -> None:
    good = cartpole_drill.PolicyResult(
        faults=(),
        clean=PolicyRecord("clean", evaluation=500.0),
        unguarded=PolicyRecord("unguarded"),
        guarded=PolicyRecord("guarded", evaluation=500.0),
        only_last=9.0,
        recovered={"blow_up": True},
        false=(),
    )
    assert good.is_good
    assert not dataclasses.replace(good, **change).is_good


def test_the_plan() -> None:
    assert plan(3, 120) == plan(3, 120) != plan(4, 120)
    for seed in range(50):
        faults = plan(seed, 60)
        assert [fault.kind for fault in faults] == KINDS
        # apart by more than a round: a panic right after a dropped round would be taken for the same trouble
        assert all(b.round - a.round > 2 for a, b in itertools.pairwise(faults))
        assert (faults[-1].round, faults[-1].step) == (59, cartpole.STEPS_PER_ROUND - 1)
        assert faults[2].step == cartpole.STEPS_PER_ROUND - 1


# ---------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [(["--steps", "59"], "use --steps 60 or more"), (["--seed", "-1"], "use one from 0")],
    ids=" ".join,
)
def test_what_cannot_run_is_one_line_and_2(
    arguments: list[str], advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["drill", "--workload", "cartpole", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert advice in captured.err


def test_without_stable_baselines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sb3, "_MISSING", ImportError("No module named 'stable_baselines3'"))
    assert main(["drill", "--workload", "cartpole"]) == 2
    assert "pip install 'tolaria[sb3]'" in capsys.readouterr().err
    monkeypatch.setattr(sb3, "_MISSING", None)
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    assert main(["drill", "--workload", "cartpole"]) == 2
    assert "pip install 'tolaria[sb3]'" in capsys.readouterr().err


def test_other_packages_may_have_told_distributions_not_to_look() -> None:
    nan = torch.full((2,), float("nan"))
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        Categorical(logits=nan)
        with cartpole.looking_distributions(), pytest.raises(ValueError, match="Expected parameter"):
            Categorical(logits=nan)
        Categorical(logits=nan)
    finally:
        Distribution.set_default_validate_args(before)
