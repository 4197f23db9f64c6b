"""What a person sees of a cartpole drill: a line for each incident, and tables. Nothing here decides anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.table import Table

from tolaria.drill.cartpole import PolicyFault
from tolaria.records import Incident

_PLAIN_WIDTH = 118
_EVERY = 10  # rounds between two refreshes


class PolicyShow:
    """The presenter.

    Args:
        silent: Show nothing: the standard output belongs to the reports.
    """

    def __init__(self, silent: bool) -> None:
        console = Console()
        self._console = None if silent else console if console.is_terminal else Console(width=_PLAIN_WIDTH)
        self._status: Status | None = None
        self._reports: list[dict[str, Any]] = []

    def begin(self, seed: int, rounds: int, faults: Sequence[PolicyFault]) -> None:
        """A drill starts."""
        self._say(f"[bold]tolaria drill[/bold]  cartpole, seed {seed}, {rounds} rounds of PPO, {len(faults)} faults")
        if self._console is not None and self._console.is_terminal:
            self._status = self._console.status("")
            self._status.start()

    def round(self, run: str, number: int, rounds: int) -> None:
        """A run has come to that round, from 1."""
        if self._status is not None and number % _EVERY == 0:
            self._status.update(f"{run}: round {number} of {rounds}")

    def incident(self, incident: Incident) -> None:
        """The governor has answered a panic."""
        self._say(
            f"  round {incident.step:>4}  [yellow]{incident.reason}[/yellow]: "
            f"back to round {incident.restored_step} in {incident.rollback_ms:.1f} ms; {incident.action}"
        )

    def result(self, report: dict[str, Any]) -> None:
        """A drill is over."""
        if self._status is not None:
            self._status.stop()
            self._status = None
        self._reports.append(report)
        if self._console is None:
            return
        table = Table(title="Faults in the guarded run", title_justify="left", title_style="bold")
        for name in ("fault", "round", "seen as", "action", "ms", "recovered"):
            table.add_column(name, justify="right" if name in ("round", "ms") else "left")
        for fault in report["faults"]:
            table.add_row(
                fault["kind"].replace("_", " "),
                str(fault["round"]),
                fault["reason"] or "-",
                fault["action"] or "-",
                "-" if fault["rollback_ms"] is None else f"{fault['rollback_ms']:.1f}",
                "[green]yes[/green]" if fault["recovered"] else "[bold red]no[/bold red]",
            )
        self._console.print(table)
        self._console.print(_runs_table([report]))

    def all_seeds(self) -> None:
        """All drills are over."""
        if self._console is not None and len(self._reports) > 1:
            self._console.print(_runs_table(self._reports))

    def _say(self, markup: str) -> None:
        if self._console is not None:
            self._console.print(markup, highlight=False, soft_wrap=True)


def _runs_table(reports: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="Mean return of the greedy policy (475 solves)", title_justify="left", title_style="bold")
    columns = (
        "seed",
        "clean",
        "unguarded",
        "last fault alone",
        "guarded",
        "recovered",
        "rollbacks",
        "false",
        "dropped",
    )
    for name in columns:
        table.add_column(name, justify="right")
    for report in reports:
        runs = report["runs"]
        table.add_row(
            str(report["seed"]),
            _mean(runs["clean"]["mean_return"]),
            _mean(runs["unguarded"]["mean_return"]),
            _mean(runs["unguarded"]["mean_return_of_last_fault_alone"]),
            _mean(runs["guarded"]["mean_return"]),
            f"{report['recovered']} of {report['injected']}",
            *(str(runs["guarded"][key]) for key in ("rollbacks", "false_rollbacks", "dropped")),
        )
    return table


def _mean(value: float | None) -> str:
    return "dead" if value is None else f"{value:.1f}"
