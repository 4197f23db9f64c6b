"""Trials as rows of JSON, and what many of them come to. Pure: no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, TypedDict

from tolaria.drill.campaign.kinds import BY_NAME, CONTROL, Ending
from tolaria.drill.campaign.outcome import Outcome
from tolaria.drill.campaign.trial import Trial
from tolaria.records import SCHEMA_VERSION

Row = dict[str, Any]


class Count(TypedDict):
    """What the trials of one kind came to."""

    kind: str
    ending: str
    trials: int
    good: int
    outcomes: dict[str, int]
    harmed: int  # validation loss above the tolerance, or not finite; of those that did not end early


def row_of(trial: Trial, mode: str) -> Row:
    """One line of the file of results. A ratio that is not a number is null."""
    facts: Row = dict(asdict(trial.facts))
    facts["ratio"] = None if math.isnan(trial.facts.ratio) else round(trial.facts.ratio, 6)
    return {
        "kind": trial.kind,
        "workload": trial.workload,
        "seed": trial.seed,
        "mode": mode,
        "place": trial.place,
        "outcome": trial.outcome.value,
        **facts,
    }


def is_good(row: Row) -> bool:
    """Whether that trial passed."""
    return Outcome(row["outcome"]).is_good


def is_inside(row: Row) -> bool:
    """Whether its kind counts: it is none of those that are outside, nor the control."""
    return row["kind"] != CONTROL.name and BY_NAME[row["kind"]].ending is not Ending.OUTSIDE


def summary(rows: Sequence[Row], about: dict[str, Any]) -> dict[str, Any]:
    """The object that ``--json`` prints and the page shows.

    Args:
        rows: From `row_of`; one per trial.
        about: Settings and machine.
    """
    inside = [row for row in rows if is_inside(row)]
    good = sum(map(is_good, inside))
    outcomes = [row["outcome"] for row in inside]
    return {
        "schema_version": SCHEMA_VERSION,
        **about,
        "trials": len(inside),
        "good": good,
        "rate": round(good / len(inside), 6) if inside else None,
        "silent": outcomes.count(Outcome.SILENT.value),
        "num_kinds": len({row["kind"] for row in inside}),
        "false_panics_of_control": sum(row["panics"] for row in rows if row["kind"] == CONTROL.name),
        "controls": sum(row["kind"] == CONTROL.name for row in rows),
        "kinds": counts(rows),
        "workloads": {name: _rate(inside, name) for name in sorted({row["workload"] for row in inside})},
        "misses": [row for row in inside if not is_good(row)],
    }


def _rate(rows: Iterable[Row], workload: str) -> dict[str, int]:
    its = [is_good(row) for row in rows if row["workload"] == workload]
    return {"trials": len(its), "good": sum(its)}


def counts(rows: Sequence[Row]) -> list[Count]:
    """One entry per kind that has trials, in the order of the catalogue."""
    found: list[Count] = []
    for name, kind in BY_NAME.items():
        its = [row for row in rows if row["kind"] == name]
        if not its:
            continue
        outcomes = [row["outcome"] for row in its]
        found.append(
            {
                "kind": name,
                "ending": kind.ending.value,
                "trials": len(its),
                "good": sum(map(is_good, its)),
                "outcomes": {one.value: outcomes.count(one.value) for one in Outcome if one.value in outcomes},
                "harmed": sum(not row["ended_by"] and not (row["ratio"] or math.inf) <= 1.3 for row in its),
            }
        )
    return found
