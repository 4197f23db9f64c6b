"""What a person sees: live on a terminal, plain lines elsewhere, nothing where the report is the output."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tolaria.drill.faults import Fault, FaultKind, Moment
from tolaria.drill.records import RunAgain, RunRecord, Trained
from tolaria.drill.show import Show
from tolaria.records import Incident

INCIDENT = Incident(
    step=3,
    onset=3,
    reason="non-finite loss",
    signs={},
    evidence={},
    action="skip",
    restored_step=1,
    certified=True,
    steps_lost=2,
    batches_replayed=1,
    batches_skipped=1,
    rollback_ms=1.25,
    barrier="host",
)


def report(recovered: bool) -> dict[str, Any]:
    run = {"survived": True, "final_loss": 0.1, "val_loss": 0.1, "state_digest": "0123456789abcdef0123"}
    return {
        "seed": 7,
        "runs": {
            "clean": run,
            "unguarded": {**run, "survived": False, "final_loss": None, "val_loss": None},
            "guarded": {**run, "rollbacks": 1, "false_rollbacks": 0, "steps_lost": 2, "reexecuted_steps": 10},
        },
        "faults": [
            {
                "kind": "nan_batch",
                "step": 3,
                "detected_step": 3 if recovered else None,
                "restored_step": 1 if recovered else None,
                "action": "skip" if recovered else None,
                "rollback_ms": 1.25 if recovered else None,
                "barrier": "host" if recovered else None,
                "recovered": recovered,
            }
        ],
        "injected": 1,
        "recovered": int(recovered),
    }


KIND = FaultKind("nan_batch", "one batch holds a NaN", Moment.DATA, lambda _: None, at=0.5)


def play(show: Show) -> None:
    with show.drill("digits", 7, 4, "cpu", [Fault(KIND, 2, 7)]):
        show.begin("guarded", 4)
        for step in (1, 2, 3):
            show.trained("guarded", Trained(step, step - 1, 0.5, ("nan_batch",) if step == 3 else ()))
        show.incident("guarded", INCIDENT)
        show.again("guarded", RunAgain(2, 1))
        record = RunRecord("guarded", val_loss=0.25)
        record.events = [Trained(1, 0, 0.5)]
        show.end(record)


@pytest.mark.parametrize("terminal", [False, True], ids=["plain", "terminal"])
def test_progress_tells_of_faults_and_incidents(terminal: bool) -> None:
    out = io.StringIO()
    play(Show(Console(file=out, force_terminal=terminal, width=118), with_tables=True))
    shown = out.getvalue()
    for words in ("digits, seed 7, 4 steps, cpu", "one batch holds a NaN", "non-finite loss", "back to step 1", "skip"):
        assert words in shown
    assert ("\x1b" in shown) is terminal


def test_titles_of_the_planned_faults_and_notes_are_told() -> None:
    out = io.StringIO()
    show = Show(Console(file=out, width=118), with_tables=True)
    kind = FaultKind("nan_batch", "one batch in French", Moment.DATA, lambda _: None, at=0.5)
    with show.drill("digits", 7, 4, "cuda", [Fault(kind, 2, 7)]):
        show.trained("guarded", Trained(3, 2, 0.5, ("nan_batch",)))
        show.incident("guarded", replace(INCIDENT, note="still in flight"))
    assert "one batch in French" in out.getvalue()
    assert "1 skipped; still in flight" in out.getvalue()


@pytest.mark.parametrize("recovered", [True, False])
def test_tables(recovered: bool, tmp_path: Path) -> None:
    out = io.StringIO()
    show = Show(Console(file=out, width=118), with_tables=True)
    show.result(
        report(recovered), steps_lost=[2], num_skipped=1, is_equal_at_end=recovered, ended_by="", folder=tmp_path
    )
    show.seeds([report(recovered)])
    shown = out.getvalue()
    for words in ("nan batch", "restored to", "steps lost", "dead", "0123456789abcdef", "drill.svg"):
        assert words in shown
    assert f"{int(recovered)} of 1 faults recovered" in shown
    assert ("not end like" in shown) is not recovered
    assert "10 healthy steps were run twice" in shown


def test_an_early_end_is_told() -> None:
    out = io.StringIO()
    show = Show(Console(file=out, width=118), with_tables=True)
    show.result(
        report(False), steps_lost=[2], num_skipped=0, is_equal_at_end=False, ended_by="NoSnapshot: x", folder=None
    )
    assert "NoSnapshot: x" in out.getvalue()


def test_silence() -> None:
    show = Show(None, with_tables=False)
    play(show)
    show.result(report(True), steps_lost=[2], num_skipped=1, is_equal_at_end=True, ended_by="", folder=None)
    show.seeds([])
