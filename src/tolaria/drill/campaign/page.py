"""Puts summaries of campaigns into docs/campaign.md, between two marks. What stands around them is written by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tolaria.drill.campaign.kinds import BY_NAME, CONTROL, Ending
from tolaria.drill.workloads import CannotRun

BEGIN = "<!-- campaign: written by python -m tolaria.drill.campaign --page -->"
END = "<!-- end of campaign -->"
_TURN = " (each kind and seed on one of them, the next seed on the next)"


def write(path: Path, full: dict[str, Any], others: dict[str, dict[str, Any]]) -> None:
    """Replace what stands between the marks.

    Args:
        path: The page.
        full: Summary of the campaign.
        others: Summaries of the same trials in other modes, for comparison; empty where there are none.

    Raises:
        CannotRun: There is no such page, or no marks in it.
    """
    try:
        head, rest = path.read_text(encoding="utf-8").split(BEGIN)
        tail = rest.split(END)[1]
    except (OSError, ValueError, IndexError) as error:
        raise CannotRun(f"--page {path}: there is no page with the marks {BEGIN} and {END}") from error
    body = "\n".join(lines(full, others))
    path.write_text(f"{head}{BEGIN}\n\n{body}\n\n{END}{tail}", encoding="utf-8")


def lines(full: dict[str, Any], others: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The text between the marks."""
    machine = full["machine"]
    yield (
        f"{full['good']} of {full['trials']} trials passed ({_percent(full['good'], full['trials'])}), "
        f"{full['silent']} silent failures; {full['num_kinds']} kinds, seeds {full['seeds'][0]} to {full['seeds'][1]}, "
        f"{len(full['workloads'])} workloads{_TURN if full['in_turn'] else ''}, {full['steps']} steps each. "
        f"{full['false_panics_of_control']} false panics in {full['controls']} undisturbed runs."
    )
    yield ""
    taken = "in several goes" if full["minutes"] is None else f"{full['minutes']} minutes"
    yield (
        f"{machine['processor']}, {machine['cores']} cores, CPU only, one thread per trial, {full['processes']} "
        f"processes, {taken}; torch {machine['torch']}, Python {machine['python']}."
    )
    for workload, its in full["workloads"].items():
        yield f"* {workload}: {its['good']} of {its['trials']}"
    yield from _table(full, others)
    yield from _misses(full)


def _table(full: dict[str, Any], others: dict[str, dict[str, Any]]) -> Iterator[str]:
    columns = [BY_NAME_OF_MODE[mode] for mode in others]
    heads = ["kind", "what is done", "trials", "passed", "how they ended", *columns]
    inside = [
        count for count in full["kinds"] if count["ending"] != Ending.OUTSIDE.value and count["kind"] != CONTROL.name
    ]
    outside = [count for count in full["kinds"] if count["ending"] == Ending.OUTSIDE.value]
    yield ""
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    for count in inside:
        cells = [
            count["kind"].replace("_", " "),
            BY_NAME[count["kind"]].title,
            str(count["trials"]),
            str(count["good"]),
            _ended(count),
            *(_passed(other, count["kind"]) for other in others.values()),
        ]
        yield f"| {' | '.join(cells)} |"
    if not outside:
        return
    yield ""
    yield "Outside, and in no figure above:"
    yield ""
    yield "| kind | what is done | trials | how they ended | validation loss above 1.3 x clean |"
    yield "|---|---|---|---|---|"
    for count in outside:
        name = count["kind"]
        yield (
            f"| {name.replace('_', ' ')} | {BY_NAME[name].title} | {count['trials']} | {_ended(count)} "
            f"| {count['harmed']} |"
        )


BY_NAME_OF_MODE = {"signs": "passed, signs alone", "blind": "passed, red twin"}
"""Heads of the columns of comparisons, by mode."""


def _misses(full: dict[str, Any]) -> Iterator[str]:
    yield ""
    if not full["misses"]:
        yield "No trial missed."
        return
    yield "Misses, each by name:"
    yield ""
    yield "| kind | workload | seed | batch | outcome | validation loss / clean |"
    yield "|---|---|---|---|---|---|"
    for row in full["misses"]:
        cells = (
            row["kind"].replace("_", " "),
            row["workload"],
            row["seed"],
            row["place"],
            row["outcome"],
            row["ratio"],
        )
        yield f"| {' | '.join(map(str, cells))} |"


def _ended(count: dict[str, Any]) -> str:
    return ", ".join(f"{number} {outcome}" for outcome, number in count["outcomes"].items())


def _passed(summary: dict[str, Any], kind: str) -> str:
    found = [count for count in summary["kinds"] if count["kind"] == kind]
    return f"{found[0]['good']} of {found[0]['trials']}" if found else "-"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f} %" if whole else "none"
