"""What a person sees of a drill: progress while it runs, then tables. Nothing here decides anything.

On a terminal progress is live; elsewhere it is a few plain lines, so that a log stays readable. With ``--json`` the
standard output belongs to the report, and progress goes to a terminal on standard error or nowhere.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from tolaria.drill.faults import Fault
from tolaria.drill.records import RunAgain, RunRecord, Trained
from tolaria.records import Incident

_PLAIN_WIDTH = 118  # of tables where there is no terminal


class Show:
    """The audience of the runs, and the presenter of their results.

    Args:
        console: Where to write; None shows nothing at all.
        with_tables: Also present results (False where the report itself is printed).
    """

    def __init__(self, console: Console | None, *, with_tables: bool) -> None:
        self._console, self._with_tables = console, with_tables
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._told: set[str] = set()
        self._titles: dict[str, str] = {}

    # -- while it runs

    @contextmanager
    def drill(self, workload: str, seed: int, steps: int, device: str, faults: Sequence[Fault] = ()) -> Generator[None]:
        """Around one drill. The titles of `faults` are told as they strike."""
        self._titles = {fault.kind.name: fault.kind.title for fault in faults}
        self._say(f"[bold]tolaria drill[/bold]  {workload}, seed {seed}, {steps} steps, {device}")
        self._tasks.clear()
        self._told.clear()
        if self._console is None or not self._console.is_terminal:
            yield
            return
        columns = (
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:<9}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._console, refresh_per_second=8) as self._progress:
            yield
        self._progress = None

    def begin(self, run: str, steps: int) -> None:
        """A run starts."""
        if self._progress is not None:
            self._tasks[run] = self._progress.add_task(run, total=steps, loss="")

    def trained(self, run: str, step: Trained) -> None:
        """One step: after a rollback the bar goes back as well."""
        if self._progress is not None:
            self._progress.update(self._tasks[run], completed=step.step, loss=_number(step.loss))
        for kind in step.struck:
            if run == "guarded" and kind not in self._told:
                self._told.add(kind)
                self._say(
                    f"  step {step.step:>4}  [magenta]{_plain(kind)}[/magenta]: {self._titles.get(kind, 'strikes')}"
                )

    def incident(self, run: str, incident: Incident) -> None:
        """The governor has answered a panic."""
        answer = (
            "nothing restored"
            if incident.restored_step is None
            else f"back to step {incident.restored_step} in {incident.rollback_ms:.1f} ms, {incident.steps_lost} lost"
        )
        data = f"{incident.batches_replayed} batches again, {incident.batches_skipped} skipped"
        note = f"; {incident.note}" if incident.note else ""
        head = f"  step {incident.step:>4}  [yellow]{incident.reason}[/yellow]"
        self._say(f"{head}: {answer}; {incident.action}, {data}{note}")

    def again(self, run: str, event: RunAgain) -> None:
        """The governor has gone back to run healthy steps again: the bar goes back as well."""
        if self._progress is not None:
            self._progress.update(self._tasks[run], completed=event.restored_step)

    def end(self, record: RunRecord) -> None:
        """A run is over."""
        if self._progress is not None:
            task = self._tasks[record.name]
            last = record.kept[-1].loss if record.kept else math.nan
            self._progress.update(task, total=len(record.kept), completed=len(record.kept), loss=_number(last))
        else:
            self._say(f"  {record.name}: {len(record.kept)} steps, validation loss {_number(record.val_loss)}")

    # -- afterwards

    def result(
        self,
        report: dict[str, Any],
        *,
        steps_lost: Sequence[int],
        num_skipped: int,
        is_equal_at_end: bool,
        ended_by: str,
        folder: Path | None,
    ) -> None:
        """Present one drill.

        Args:
            report: As `score.as_json`.
            steps_lost: Per fault.
            num_skipped: Batches that the guarded run left out.
            is_equal_at_end: The guarded run ended in exactly the reference's state.
            ended_by: The error that ended the guarded run early, or nothing.
            folder: Where picture and report are, or None.
        """
        if self._console is None or not self._with_tables:
            return
        self._console.print(_runs_table(report))
        self._console.print(_faults_table(report, steps_lost))
        for line in _conclusion(report, num_skipped, is_equal_at_end, ended_by):
            self._say(line)
        if folder is not None:
            self._say(f"Picture, report and incidents: {folder / 'drill.svg'}, report.json, incidents.jsonl")

    def seeds(self, reports: Sequence[dict[str, Any]]) -> None:
        """Present several drills in one table."""
        if self._console is None or not self._with_tables:
            return
        table = Table(title="All seeds", title_justify="left", title_style="bold")
        for name in (
            "seed",
            "recovered",
            "rollbacks",
            "false",
            "steps lost",
            "val loss: clean",
            "unguarded",
            "guarded",
        ):
            table.add_column(name, justify="right")
        for report in reports:
            runs = report["runs"]
            table.add_row(
                str(report["seed"]),
                f"{report['recovered']} of {report['injected']}",
                str(runs["guarded"]["rollbacks"]),
                str(runs["guarded"]["false_rollbacks"]),
                str(runs["guarded"]["steps_lost"]),
                *(_val_loss(runs[name]) for name in ("clean", "unguarded", "guarded")),
            )
        self._console.print(table)

    def _say(self, markup: str) -> None:
        if self._console is not None:
            self._console.print(markup, highlight=False, soft_wrap=True)


def open_show(as_json: bool) -> Show:
    """The show for this terminal, see the head of this file."""
    if as_json:
        return Show(Console(stderr=True) if sys.stderr.isatty() else None, with_tables=False)
    console = Console()
    return Show(console if console.is_terminal else Console(width=_PLAIN_WIDTH), with_tables=True)


def _runs_table(report: dict[str, Any]) -> Table:
    table = Table(title="Runs", title_justify="left", title_style="bold")
    for name in ("run", "survived", "final loss", "val loss", "rollbacks", "false", "steps lost", "state digest"):
        table.add_column(name, justify="left" if name in ("run", "survived", "state digest") else "right")
    for name, run in report["runs"].items():
        table.add_row(
            name,
            _yes_no(run["survived"]),
            _number(run["final_loss"]),
            _val_loss(run),
            *(str(run.get(key, "")) for key in ("rollbacks", "false_rollbacks", "steps_lost")),
            run["state_digest"][:16],
        )
    return table


def _faults_table(report: dict[str, Any], steps_lost: Sequence[int]) -> Table:
    table = Table(title="Faults in the guarded run", title_justify="left", title_style="bold")
    for name in ("fault", "step", "detected", "restored to", "steps lost", "action", "ms", "recovered"):
        table.add_column(name, justify="left" if name in ("fault", "action", "recovered") else "right")
    for fault, lost in zip(report["faults"], steps_lost, strict=True):
        table.add_row(
            _plain(fault["kind"]),
            *(_or_dash(fault[key]) for key in ("step", "detected_step", "restored_step")),
            str(lost),
            _or_dash(fault["action"]),
            "-" if fault["rollback_ms"] is None else f"{fault['rollback_ms']:.1f}",
            _yes_no(fault["recovered"]),
        )
    return table


def _conclusion(report: dict[str, Any], num_skipped: int, is_equal_at_end: bool, ended_by: str) -> Iterator[str]:
    guarded = report["runs"]["guarded"]
    good = report["recovered"] == report["injected"] and not guarded["false_rollbacks"] and is_equal_at_end
    colour = "green" if good else "red"
    yield (
        f"[{colour}]{report['recovered']} of {report['injected']} faults recovered, "
        f"{guarded['false_rollbacks']} false rollbacks.[/{colour}]"
    )
    same = "ended bit-identical to" if is_equal_at_end else "did [red]not[/red] end like"
    yield f"The guarded run {same} an undisturbed run without the {num_skipped} batches that were skipped."
    if guarded["reexecuted_steps"]:
        yield f"{guarded['reexecuted_steps']} healthy steps were run twice, to find what raises no alarm."
    if ended_by:
        yield f"[red]The guarded run ended early[/red]: {ended_by}"


def _plain(kind: str) -> str:
    return kind.replace("_", " ")


def _yes_no(value: bool) -> Text:
    return Text("yes", "green") if value else Text("no", "bold red")


def _val_loss(run: dict[str, Any]) -> str:
    return "dead" if run["val_loss"] is None else f"{run['val_loss']:.4f}"


def _or_dash(value: Any) -> str:
    return "-" if value is None else str(value)


def _number(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.4g}"
