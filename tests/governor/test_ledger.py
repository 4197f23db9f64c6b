"""Incidents: one JSON line each, one call of the sink each, and nothing in them can end a run."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tolaria import (
    GovernorConfig,
    Health,
    Incident,
    Recovery,
    RetryBudgetExceeded,
    TolariaGovernor,
    Verdict,
    VitalSigns,
)
from tolaria.judge import Detector

Govern = Callable[..., TolariaGovernor]

FIELDS = {
    "schema_version",
    "step",
    "onset",
    "reason",
    "signs",
    "evidence",
    "action",
    "restored_step",
    "certified",
    "steps_lost",
    "batches_replayed",
    "batches_skipped",
    "rollback_ms",
    "barrier",
    "env_id",
    "tier",
    "note",
    "attempt",
    "lr_factor",
    "moments",
}


def strict(line: str) -> Any:
    """Parse as JSON proper: no NaN, no Infinity."""

    def refuse(name: str) -> Any:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


def train(kit: Any, govern: Govern, bad: dict[int, int], **config: Any) -> tuple[Any, TolariaGovernor]:
    """Train 12 batches; batch -> how many of its deliveries are poisoned."""
    run = kit.Run()
    governor = govern(
        run.model,
        run.optimizer,
        scheduler=run.scheduler,
        config=GovernorConfig(**{"cadence": 2, "probation": 1, **config}),
    )
    left = dict(bad)
    for number, batch in governor.watch(list(enumerate(run.batches[:12]))):
        poisoned = left.get(number, 0) > 0
        left[number] = left.get(number, 0) - 1
        run.step(governor, kit.nan_batch(batch) if poisoned else batch)
    return run, governor


def test_one_line_per_incident(govern: Govern, kit: Any, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "ledger.jsonl"
    heard: list[Incident] = []
    _, governor = train(kit, govern, {5: 2, 9: 1}, ledger=str(path), on_incident=heard.append)
    governor.execute_rollback(env_id=6, reason="because I say so")
    lines = [strict(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["action"] for line in lines] == ["replay", "skip", "replay", "manual"]
    assert [set(line) for line in lines] == [FIELDS] * 4
    assert {line["schema_version"] for line in lines} == {1}
    assert [(line["step"], line["restored_step"], line["steps_lost"]) for line in lines[:2]] == [(6, 4, 2)] * 2
    assert [(line["batches_replayed"], line["batches_skipped"]) for line in lines[:2]] == [(2, 0), (1, 1)]
    assert [line["reason"] for line in lines] == ["non-finite loss"] * 3 + ["because I say so"]
    assert [line["certified"] for line in lines] == [True] * 4
    assert lines[3]["env_id"] == 6
    assert [line["attempt"] for line in lines] == [1, 2, 1, 0]
    assert [(line["lr_factor"], line["moments"]) for line in lines] == [(1.0, "keep")] * 4
    assert all(line["rollback_ms"] > 0 and line["barrier"] == "host" for line in lines)
    assert [incident.action for incident in heard] == [line["action"] for line in lines]
    assert governor.statistics().rollbacks == len(lines)


def test_non_finite_numbers_are_parseable(govern: Govern, kit: Any, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"

    def update(state: int, signs: VitalSigns) -> tuple[int, Verdict]:
        evidence = {"ratio": math.inf, "z": -math.inf, "nan": math.nan, "fine": 1.5}
        return state, Verdict(Health.PANIC, signs.step, "odd", signs.step, evidence)

    run = kit.Run()
    governor = govern(
        run.model, run.optimizer, detector=Detector(lambda: 0, update), config=GovernorConfig(ledger=str(path))
    )
    governor.snapshot()
    governor.step(loss=float("nan"), kl=float("inf"))
    line = strict(path.read_text())
    assert line["evidence"] == {"ratio": "inf", "z": "-inf", "nan": "nan", "fine": 1.5}
    assert line["signs"]["loss"] == "nan"
    assert line["signs"]["extra"] == {"kl": "inf"}
    assert math.isnan(float(line["signs"]["loss"]))


def test_no_file_without_an_incident(govern: Govern, kit: Any, tmp_path: Path) -> None:
    train(kit, govern, {}, ledger=str(tmp_path / "ledger.jsonl"))
    assert list(tmp_path.iterdir()) == []


def test_the_ledger_is_appended_to(govern: Govern, kit: Any, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    for _ in range(2):
        train(kit, govern, {5: 1}, ledger=str(path))[1].close()
    assert len(path.read_text().splitlines()) == 2


def test_each_incident_is_one_clear_warning(govern: Govern, kit: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "tolaria"):
        train(kit, govern, {5: 1})
    [record] = [record for record in caplog.records if record.name == "tolaria"]
    assert record.levelno == logging.WARNING
    assert "step 6: non-finite loss (loss nan" in record.message
    assert "rolled back to step 4" in record.message
    assert "2 steps lost, replay, 2 batches again, 0 skipped" in record.message


class Broken:
    """Everything an incident can run into."""

    @staticmethod
    def directory(tmp_path: Path) -> dict[str, Any]:
        return {"ledger": str(tmp_path)}

    @staticmethod
    def under_a_file(tmp_path: Path) -> dict[str, Any]:
        (tmp_path / "file").write_text("")
        return {"ledger": str(tmp_path / "file" / "ledger.jsonl")}

    @staticmethod
    def sink(tmp_path: Path) -> dict[str, Any]:
        def fail(_: Incident) -> None:
            raise RuntimeError("the sink's own")

        return {"on_incident": fail, "ledger": str(tmp_path / "ledger.jsonl")}


@pytest.mark.parametrize("broken", [Broken.directory, Broken.under_a_file, Broken.sink])
def test_a_failing_report_never_ends_a_run(
    broken: Callable[[Path], dict[str, Any]],
    govern: Govern,
    kit: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = train(kit, govern, {5: 1})
    expected[1].close()
    config = broken(tmp_path)
    heard: list[Incident] = []
    config.setdefault("on_incident", heard.append)
    with caplog.at_level(logging.ERROR, "tolaria"):
        run, governor = train(kit, govern, {5: 1}, **config)
    assert governor.statistics().rollbacks == 1
    assert run.state() == expected[0].state()
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert ["could not be reported" in record.message for record in errors] == [True]
    if broken is Broken.sink:
        assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) == 1
    else:
        assert len(heard) == 1  # a full disk does not keep the sink from hearing


def test_a_sink_may_look_at_the_governor(govern: Govern, kit: Any) -> None:
    """It runs when the rollback is complete, on the thread that rolled back."""
    seen = []
    run = kit.Run()

    def sink(incident: Incident) -> None:
        seen.append((incident.action, governor.statistics().rollbacks, governor.digest(), governor.snapshot().state))

    governor = govern(run.model, run.optimizer, config=GovernorConfig(on_incident=sink))
    governor.snapshot()
    good = governor.digest()
    run.step(governor, run.batches[0])
    governor.execute_rollback()
    assert seen == [("manual", 1, good, "sealed")]


def test_the_end_of_a_run_is_in_the_ledger(govern: Govern, kit: Any, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with pytest.raises(RetryBudgetExceeded):
        train(kit, govern, dict.fromkeys(range(12), 99), ledger=str(path), recovery=Recovery(max_retries=3))
    lines = [strict(line) for line in path.read_text().splitlines()]
    assert [line["action"] for line in lines] == ["replay", "skip", "skip", "stop"]
