"""The pages that are written from what the checker finds: `docs/schedules.md`, and the parts of others between marks.

    python -m tolaria.testing.golden docs

writes them anew. A test compares them with what is found, so that a page never tells of another version.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tolaria.testing import checks, timeline
from tolaria.testing.catalog import SCENARIOS
from tolaria.testing.checks import Check
from tolaria.testing.limits import LIMITS
from tolaria.testing.mutants import MUTANTS
from tolaria.testing.scenarios import STREAMS_ONLY
from tolaria.testing.world import Outcome

Found = Sequence[tuple[Check, Outcome]]

_HEAD = """# Schedules

Written by `python -m tolaria.testing.golden docs` from what the model checker finds; a test compares. What it means,
and what lies outside of it, is told in [proof.md](proof.md). `tolaria verify --replay TOKEN` shows a schedule again.

In a picture, rows are threads (`T0`, `T1` ...) and streams (`A`, `B`, and the governor's own, `R` and `Q`); columns
are steps.
Values: O is in memory at the start, S in the snapshot, N and M come from optimizer steps.
"""


def search() -> dict[str, Found]:
    """Everything the pages tell of, by kind."""
    kinds = (checks.programs(), checks.mutants(), checks.designs(), checks.limits())
    searched = [(check, check.explore()) for kind in kinds for check in kind]
    return {
        kind: [pair for pair in searched if pair[0].kind == kind] for kind in ("program", "mutant", "design", "limit")
    }


def schedules(found: dict[str, Found]) -> str:
    """`docs/schedules.md`."""
    return "\n".join(
        (
            _HEAD,
            "## Programs\n\n" + programs_table(found["program"]),
            "## Other designs\n\n" + designs_table(found["design"]),
            "## Mutants\n\n" + mutants_table(found["mutant"]),
            "## The shortest schedule of each mutant\n\n" + "\n".join(_mutant_pages(found["mutant"])),
        )
    )


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    head = list(head)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def programs_table(found: Found) -> str:
    """What was explored, and how large it is."""

    def rows() -> Iterator[tuple[object, ...]]:
        for name, scenario in SCENARIOS.items():
            mine = [(check, outcome) for check, outcome in found if check.name == name]
            sizes = ", ".join(f"{check.barrier.value} {outcome.states:,}" for check, outcome in mine)
            schedules = max(outcome.schedules for _, outcome in mine)
            yield name, scenario.says, scenario.bounds(mine[-1][0].barrier), sizes, _large(schedules)

    states = sum(outcome.states for _, outcome in found)
    total = f"\n{len(found)} searches, {states:,} states, all complete, no violation.\n"
    return _table(("program", "what is checked", "bounds", "states", "most schedules"), rows()) + total


def designs_table(found: Found) -> str:
    """Other protocols."""
    return _table(
        ("protocol", "found", "states", "steps", "token"),
        (
            (check.name, *_verdict(outcome), f"`{check.token(outcome)}`" if outcome.violation else "")
            for check, outcome in found
        ),
    )


def _verdict(outcome: Outcome) -> tuple[str, str, str]:
    if outcome.violation is None:
        return "sound", f"{outcome.states:,}", ""
    kind, _, rest = outcome.violation.partition(": ")
    shown = "" if kind == "deadlock" else f" ({_seen(rest)})"
    return f"**{kind}**{shown}", f"{outcome.states:,}", str(len(outcome.steps))


def _seen(rest: str) -> str:
    """The one of memory, slot 1 and reads that is not whole."""
    memory, slots, seen = (
        rest.split(", slots ")[0],
        rest.split(", slots ")[1].split(", seen ")[0],
        rest.split("seen ")[1],
    )
    letters = re.findall(r"'(\w)'", memory)
    slot = re.findall(r"'(\S)'", slots)[2:4]
    if len(set(letters)) > 1:
        return f"memory {letters[0]},{letters[1]}"
    if len(set(slot)) > 1:
        return f"slot {slot[0]},{slot[1]}"
    found: list[str] = re.findall(r"'(\w)'\)", seen)
    return "read " + ",".join(found)


def mutants_table(found: Found) -> str:
    """What is missing, and how it shows."""

    def rows() -> Iterator[tuple[object, ...]]:
        for name, mutant in MUTANTS.items():
            mine = [(check, outcome) for check, outcome in found if check.name == name]
            kind = (mine[0][1].violation or "SURVIVED").split(":")[0]
            steps = ", ".join(f"{check.barrier.value} {len(outcome.steps)}" for check, outcome in mine)
            yield name, mutant.says, mutant.scenario, kind, steps

    return _table(("missing edge", "what that means", "program", "caught as", "steps"), rows())


def _mutant_pages(found: Found) -> Iterator[str]:
    told: set[str] = set()
    for check, outcome in found:
        if check.name not in told:
            told.add(check.name)
            yield f"### {check.title}\n\n{MUTANTS[check.name].says}\n\n{_picture(check, outcome)}"


def _picture(check: Check, outcome: Outcome) -> str:
    violation = (outcome.violation or "nothing found").replace("\n", " ")
    return f"{violation}\n\n```text\n{timeline.draw(outcome.steps)}\n```\n\n`{check.token(outcome)}`\n"


def limits_part(found: Found) -> str:
    """For docs/guarantees.md: the writer that nobody knows, with the `context` barrier where it has one."""
    shown = [(check, outcome) for check, outcome in found if check.barrier.value == "context"]
    shown += [(check, outcome) for check, outcome in found if LIMITS[check.name].barriers == STREAMS_ONLY]
    return "\n".join(f"{LIMITS[check.name].says}\n\n{_picture(check, outcome)}" for check, outcome in shown)


def _large(number: int) -> str:
    return f"{number:,}" if number < 1_000_000 else f"{number:.1e}"


def placed(page: str, name: str, part: str) -> str:
    """A page with the part between its two marks of that name replaced."""
    begin, end = f"<!-- {name}: written by tolaria.testing.golden -->", f"<!-- end of {name} -->"
    head, _, rest = page.partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        raise ValueError(f"the page has no marks for {name!r}")
    return f"{head}{begin}\n\n{part.strip()}\n\n{end}{tail}"


def pages(folder: Path, found: dict[str, Found]) -> dict[Path, str]:
    """Every page that is written, wholly or in part, with its new contents."""
    guarantees, proof = folder / "guarantees.md", folder / "proof.md"
    text = placed(proof.read_text(encoding="utf-8"), "designs", designs_table(found["design"]))
    return {
        folder / "schedules.md": schedules(found),
        proof: text,
        guarantees: placed(guarantees.read_text(encoding="utf-8"), "unregistered writers", limits_part(found["limit"])),
    }


if __name__ == "__main__":
    for path, text in pages(Path(sys.argv[1]), search()).items():
        path.write_text(text, encoding="utf-8")
