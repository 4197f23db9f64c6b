"""`tolaria verify`: explore the shipped protocol, kill every mutant, work it hard, force races on a GPU.

Exit codes: 0 everything is as it ought to be; 1 a violation, a mutant that survived, a search that was cut off by the
budget, something lost or torn, or a test on the device that failed.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from tolaria.errors import UsageError
from tolaria.operations import Barrier
from tolaria.records import SCHEMA_VERSION
from tolaria.testing import checks, timeline
from tolaria.testing.world import Outcome

_SHARE_OF_STRESS = 1 / 6  # of the budget
Told = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Result:
    """One search and what it found."""

    check: checks.Check
    found: Outcome

    @property
    def is_good(self) -> bool:
        """Whether it found what it ought to."""
        return self.check.is_as_expected(self.found)


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that one run of `tolaria verify` found.

    Attributes:
        programs: The shipped protocol.
        mutants: The protocol with an edge less, and other designs that are known to be unsound.
        device: Trials on a GPU: `test`, `control`, `result` each; empty on a machine without one.
        stress: `rollbacks`, `lost`, `torn`.
        capabilities: Of a governor on that device.
    """

    programs: tuple[Result, ...]
    mutants: tuple[Result, ...]
    device: tuple[dict[str, str], ...]
    stress: dict[str, int]
    capabilities: dict[str, Any]

    @property
    def is_good(self) -> bool:
        """Whether everything is as it ought to be."""
        searches = all(result.is_good for result in (*self.programs, *self.mutants))
        trials = all(trial["result"] == "ok" for trial in self.device)
        worked = self.stress["rollbacks"] > 0 and not self.stress["lost"] and not self.stress["torn"]
        return searches and trials and worked

    def as_json(self) -> dict[str, Any]:
        """The report with the names of the documented schema (docs/proof.md)."""
        return {
            "schema_version": SCHEMA_VERSION,
            "capabilities": self.capabilities,
            "protocol": [
                {
                    "program": result.check.title,
                    "states": result.found.states,
                    "schedules": result.found.schedules,
                    "violations": int(result.found.violation is not None),
                    "complete": result.found.complete,
                }
                for result in self.programs
            ],
            "mutants": [
                {
                    "name": _name(result.check),
                    "caught": result.is_good,
                    "schedule_length": len(result.found.steps),
                }
                for result in self.mutants
            ],
            "device": list(self.device),
            "stress": self.stress,
        }


def _name(check: checks.Check) -> str:
    return f"design: {check.name}" if check.kind == "design" else check.title


def run(
    device: str = "cpu", budget_s: float = 120.0, stress_s: float | None = None, tell: Told = lambda _: None
) -> Report:
    """Do all of it.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        budget_s: Seconds for everything. Searches that are not over by then are cut off.
        stress_s: Seconds of them for the stress slice; a sixth unless given.
        tell: Called with the name of each search before it begins.
    """
    stress_s = budget_s * _SHARE_OF_STRESS if stress_s is None else stress_s
    deadline = time.monotonic() + max(budget_s - stress_s, 0.0)

    def searched(wanted: Iterator[checks.Check]) -> tuple[Result, ...]:
        results = []
        for check in wanted:
            tell(check.title)
            results.append(Result(check, check.explore(deadline)))
        return tuple(results)

    programs, mutants = searched(checks.programs()), searched(_broken())
    tell("stress")
    worked, capabilities = _stress(device, stress_s)
    tell("trials on the device")
    return Report(programs, mutants, _trials(device), worked, capabilities)


def _broken() -> Iterator[checks.Check]:
    yield from checks.mutants()
    yield from (check for check in checks.designs() if check.expected)


def _stress(device: str, seconds: float) -> tuple[dict[str, int], dict[str, Any]]:
    from tolaria.testing import stress

    counts, capabilities = stress.check(stress.plan_for(device), seconds)
    return {"rollbacks": counts.rollbacks, "lost": counts.lost, "torn": counts.torn}, asdict(capabilities)


def _trials(device: str) -> tuple[dict[str, str], ...]:
    if device == "cpu":
        return ()
    from tolaria.testing import gates

    return tuple(asdict(trial) for trial in gates.run_in_subprocess())


# ---------------------------------------------------------------- for a person


def main(device: str | None, budget_s: float, as_json: bool, replay: str | None) -> int:
    """`tolaria verify`. Prints a table, one JSON object, or one schedule. Returns the exit code.

    Args:
        device: ``"cpu"`` or ``"cuda"``; None: CUDA where there is any.
        budget_s: Seconds for everything.
        as_json: Print one JSON object, and nothing else.
        replay: A token: take that schedule again and do nothing else.
    """
    if replay is not None:
        return _replay(replay, Console())
    if not 0 < budget_s < math.inf:
        raise UsageError("verifying", f"the budget is {budget_s:g} s, expected more than none", "Leave it out.")
    device = _device(device)
    console = Console()
    with _progress(console, quiet=as_json) as tell:
        report = run(device, budget_s, tell=tell)
    if as_json:
        print(json.dumps(report.as_json(), allow_nan=False))
    else:
        _present(report, device, console)
    return 0 if report.is_good else 1


def _device(wanted: str | None) -> str:
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise UsageError("verifying on CUDA", "torch sees no CUDA device", "Use --device cpu.")
    return wanted or ("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def _progress(console: Console, *, quiet: bool) -> Generator[Told]:
    if quiet or not console.is_terminal:
        yield lambda _: None
        return
    total = sum(1 for _ in checks.programs()) + sum(1 for _ in _broken()) + 2
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda name: progress.update(task, advance=1, description=name)


def _replay(token: str, console: Console) -> int:
    again = checks.replay(token)
    _say(console, f"{again.check.kind} {again.check.title}: {again.violation or 'nothing is wrong with this schedule'}")
    _say(console, timeline.draw(again.steps))
    return 1 if again.violation and again.check.kind == "program" else 0


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _present(report: Report, device: str, console: Console) -> None:
    console.print(_table_of_programs(report))
    console.print(_table_of_mutants(report))
    if report.device:
        console.print(_table_of_trials(report))
    elif device == "cpu":
        _say(console, "device: no trials, since they need a CUDA device (tolaria verify --device cuda)")
    stress, barrier = report.stress, report.capabilities["barrier"]
    _say(
        console,
        f"stress ({barrier} barrier): {stress['rollbacks']:,} rollbacks beside random work, {stress['lost']} lost, "
        f"{stress['torn']} torn",
    )
    for result in (*report.programs, *report.mutants):
        if not result.is_good:
            _explain(result, console)
    _say(console, "verified" if report.is_good else "NOT verified: see above")


def _explain(result: Result, console: Console) -> None:
    found = result.found
    if not found.complete:
        _say(console, f"{result.check.title}: cut off after {found.states:,} states; use a larger --budget")
    elif found.violation is None:
        _say(console, f"{result.check.title}: SURVIVED all {found.states:,} states: nothing depends on this edge")
    else:
        _say(console, f"{result.check.title}: {found.violation}")
        _say(console, timeline.draw(found.steps))
        _say(console, f"again: tolaria verify --replay {result.check.token(found)}")


def _table_of_programs(report: Report) -> Table:
    table = _table("the shipped protocol: every schedule of each program", "program", "most schedules", "found")
    for name, results in _by_name(report.programs):
        verdicts = {_verdict(result.found) for result in results.values()}
        most = max(result.found.schedules for result in results.values())
        states = (f"{results[b].found.states:,}" if b in results else "" for b in Barrier)
        table.add_row(name, *states, _large(most), " ".join(sorted(verdicts)))
    states = sum(result.found.states for result in report.programs)
    bad = sum(not result.is_good for result in report.programs)
    table.add_section()
    table.add_row(f"{len(report.programs)} searches, {states:,} states", "", "", "", "", f"{bad} bad")
    return table


def _verdict(found: Outcome) -> str:
    return "cut off" if not found.complete else "VIOLATION" if found.violation else "nothing"


def _table_of_mutants(report: Report) -> Table:
    table = _table("with something missing: each must be caught (steps that show it)", "what is missing", "caught as")
    for name, results in _by_name(report.mutants):
        kinds = {(result.found.violation or "SURVIVED").split(":")[0].split(" by ")[0] for result in results.values()}
        steps = (str(len(results[b].found.steps)) if b in results else "" for b in Barrier)
        table.add_row(name, *steps, ", ".join(sorted(kinds)))
    caught = sum(result.is_good for result in report.mutants)
    table.add_section()
    table.add_row(f"{len(report.mutants)} searches", "", "", "", f"{caught} caught")
    return table


def _table(title: str, name: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(name)
    for barrier in Barrier:
        table.add_column(barrier.value, justify="right")
    for other in others:
        table.add_column(other)
    return table


def _by_name(results: Sequence[Result]) -> list[tuple[str, dict[Barrier, Result]]]:
    found: dict[str, dict[Barrier, Result]] = {}
    for result in results:
        check = result.check
        name = _name(check) if check.kind == "design" else check.name
        found.setdefault(name, {})[check.barrier] = result
    return list(found.items())


def _table_of_trials(report: Report) -> Table:
    table = Table(title="on the device: races forced by gates", title_justify="left")
    for name in ("test", "without protection", "result"):
        table.add_column(name)
    for trial in report.device:
        table.add_row(trial["test"], trial["control"], trial["result"])
    return table


def _large(number: int) -> str:
    return f"{number:,}" if number < 1_000_000 else f"{number:.1e}"
