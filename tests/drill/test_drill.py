"""A whole drill on small settings: its report, its files, and a drill whose governor does nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from tolaria.config import GovernorConfig, Recovery
from tolaria.drill import command
from tolaria.drill.catalogue import WORKLOADS, Entry
from tolaria.drill.faults import KINDS
from tolaria.drill.runs import Audience

pytestmark = pytest.mark.slow

RUN_KEYS = ["survived", "final_loss", "val_loss", "state_digest"]
SVG = "{http://www.w3.org/2000/svg}"


def test_every_fault_is_recovered(finished: Any) -> None:
    report = finished.report
    assert finished.exit_code == 0
    assert report["injected"] == report["recovered"] == len(KINDS)
    assert all(fault["recovered"] for fault in report["faults"])
    assert report["runs"]["guarded"]["false_rollbacks"] == 0
    assert report["runs"]["guarded"]["survived"]
    assert not report["runs"]["unguarded"]["survived"]


def test_the_report_has_exactly_its_fields(finished: Any) -> None:
    report = finished.report
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
    assert (report["workload"], report["seed"], report["device"], report["steps"]) == ("digits", 0, "cpu", 400)
    assert list(report["runs"]) == ["clean", "unguarded", "guarded"]
    assert list(report["runs"]["clean"]) == list(report["runs"]["unguarded"]) == RUN_KEYS
    assert list(report["runs"]["guarded"]) == [
        *RUN_KEYS,
        "rollbacks",
        "false_rollbacks",
        "steps_lost",
        "reexecuted_steps",
    ]
    assert [fault["kind"] for fault in report["faults"]] == [kind.name for kind in KINDS]
    for fault in report["faults"]:
        assert list(fault) == [
            "kind",
            "step",
            "detected_step",
            "restored_step",
            "action",
            "rollback_ms",
            "barrier",
            "recovered",
        ]
        assert fault["restored_step"] < fault["step"] <= fault["detected_step"]
        assert fault["barrier"] == "host"


def test_what_returns_is_skipped_and_what_does_not_is_replayed(finished: Any) -> None:
    actions = {fault["kind"]: fault["action"] for fault in finished.report["faults"]}
    assert [kind for kind, action in actions.items() if action == "skip"] == [
        "garbage_batches",
        "returning_bit_flip",
        "nan_batch",
    ]
    assert set(actions.values()) == {"skip", "replay"}


def test_a_dead_run_has_no_validation_loss(finished: Any) -> None:
    assert finished.report["runs"]["unguarded"]["val_loss"] is None
    assert "NaN" not in finished.stdout


def test_only_the_report_is_on_standard_output(finished: Any) -> None:
    assert len(finished.stdout.splitlines()) == 1
    assert finished.stderr == ""


def test_files_in_out(finished: Any) -> None:
    assert sorted(path.name for path in finished.out.iterdir()) == ["drill.svg", "incidents.jsonl", "report.json"]
    assert json.loads((finished.out / "report.json").read_text()) == finished.report
    incidents = ledger(finished.out)
    guarded = finished.report["runs"]["guarded"]
    assert len(incidents) == guarded["rollbacks"]
    assert sum(incident["steps_lost"] for incident in incidents) == guarded["steps_lost"]
    assert sum(incident["rollback_ms"] for incident in incidents) == pytest.approx(
        sum(fault["rollback_ms"] for fault in finished.report["faults"]), abs=0.01
    )


def ledger(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "incidents.jsonl").read_text().splitlines()]


def test_the_picture_shows_every_fault_and_incident(finished: Any) -> None:
    root = ElementTree.parse(finished.out / "drill.svg").getroot()
    assert root.tag == f"{SVG}svg"
    groups = root.iter(f"{SVG}g")
    marks = [(int(g.attrib["data-step"]), g.attrib["data-action"]) for g in groups if g.get("class") == "incident"]
    assert marks == [(incident["step"], incident["action"]) for incident in ledger(finished.out)]
    words = ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]
    for kind in KINDS:
        assert kind.name.replace("_", " ") in words
    assert {"with faults, unguarded", "with faults, guarded", "clean run"} <= set(words)
    curves = {path.get("class") for path in root.iter(f"{SVG}path")}
    assert {"clean", "unguarded", "guarded", "undone"} <= curves
    assert "prefers-color-scheme: dark" in (finished.out / "drill.svg").read_text()


def test_the_governor_has_its_defaults() -> None:
    assert WORKLOADS["digits"].config() == GovernorConfig(recovery=Recovery(cool_lr=1.0))
    assert WORKLOADS["gpt"].config() == GovernorConfig(recovery=Recovery(cool_lr=1.0), reexecute_every=100)


def test_without_rollbacks_the_drill_has_findings(
    deaf: Audience, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The red twin of the whole: the same governor, only watching."""
    monkeypatch.setattr(Entry, "config", lambda _, ledger: GovernorConfig(mode="observe", ledger=ledger))
    result = command.run_drill(command.prepare("digits", 0, 400, torch.device("cpu")), deaf)
    assert result.report["recovered"] == 0
    assert result.report["runs"]["guarded"]["rollbacks"] == 0
    assert not result.report["runs"]["guarded"]["survived"]
    assert not result.score.is_good
    ElementTree.fromstring(command.draw_result(result))
