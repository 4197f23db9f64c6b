"""What a person sees of a benchmark: progress while it runs, then one table of tolaria and one of everybody."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tolaria.bench.records import Row, Spread, Standing

_PLAIN_WIDTH = 150  # of tables where there is no terminal


class Show:
    """Progress, and the tables.

    Args:
        as_json: The standard output belongs to the report: progress goes to a terminal on standard error, or nowhere.
    """

    def __init__(self, *, as_json: bool) -> None:
        self._with_tables = not as_json
        console = Console(stderr=as_json)
        if not console.is_terminal:
            console = Console(stderr=as_json, width=_PLAIN_WIDTH)
        self._console, self._is_silent = console, as_json and not sys.stderr.isatty()
        self._bars: Progress | None = None

    @contextmanager
    def running(self) -> Generator[None]:
        """Around everything that is measured."""
        if not self._console.is_terminal:
            yield
            return
        columns = (
            TextColumn("{task.description:<24}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as self._bars:
            yield
        self._bars = None

    def part(self, name: str, total: int) -> Callable[[], None]:
        """One part of it begins. Call the answer `total` times."""
        if self._bars is None:
            if not self._is_silent:
                self._console.print(f"measuring {name} ...", highlight=False)
            return lambda: None
        bars, task = self._bars, self._bars.add_task(name, total=total)
        return lambda: bars.advance(task)

    def facts(self, facts: dict[str, Any]) -> None:
        """What it was measured on."""
        if not self._with_tables:
            return
        size = facts["size"]
        lines = (
            f"{facts['device_name']} ({facts['device']}), {facts['cpus']} CPUs, {facts['threads']} threads, torch "
            f"{facts['torch']}, CUDA {facts['cuda'] or 'none'}, Python {facts['python']}, tolaria {facts['tolaria']}",
            f"{size['name']}: {size['num_weights'] / 1e6:,.1f} M weights, AdamW, {size['state_bytes'] / 1e6:,.1f} MB "
            f"of state in {size['num_tensors']} tensors; {size['sequences']} x {size['context']} positions a step",
            f"barrier {facts['barrier']}, {facts['copy_path']}",
            f"medians of {facts['rounds']} rounds, quartiles in brackets",
        )
        for line in lines:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def rows(self, rows: Sequence[Row]) -> None:
        """Our figures beside their floors."""
        if not self._with_tables:
            return
        table = Table("what", "", "ms", "floor", "ms", "x floor", title="tolaria beside its floors")
        for column in (2, 4, 5):
            table.columns[column].justify = "right"
        group = ""
        for row in rows:
            if group and row.group != group:
                table.add_section()
            times = "" if row.times_floor is None else f"{row.times_floor:.3f}"
            name = row.name if not row.note else f"{row.name}\n  {row.note}"
            shown = row.group if row.group != group else ""
            table.add_row(shown, name, _spread(row.ms), row.floor or "", _median(row.floor_ms), times)
            group = row.group
        self._console.print(table, highlight=False)

    def standings(self, standings: Sequence[Standing]) -> None:
        """Everybody, side by side."""
        if not self._with_tables or not standings:
            return
        snapshots = Table("snapshots", "stall", "complete", "rollback", "x copy", "exact", "in place", "how")
        judges = Table("judging a healthy step", "host", "until the device rests", "x read", "how")
        for table, right in ((snapshots, (1, 2, 3, 4)), (judges, (1, 2, 3))):
            for column in right:
                table.columns[column].justify = "right"
        for one in standings:
            name = f"{one.name} {one.version}".strip()
            how = one.note if one.status == "measured" else f"{one.status}: {one.note}"
            if one.kind == "snapshot":
                values = (_spread(one.stall_ms), _spread(one.complete_ms), _spread(one.rollback_ms))
                exact, in_place = _yes(one.is_exact), _yes(one.is_in_place)
                snapshots.add_row(name, *values, _times(one.rollback_ms, one.floor_ms), exact, in_place, how)
            else:
                times = _times(one.judge_ms, one.floor_ms)
                judges.add_row(name, _spread(one.judge_host_ms), _spread(one.judge_ms), times, how)
        snapshots.title = "side by side, ms; x copy: rollback by one flat copy of the same bytes in the same process"
        judges.title = "side by side, ms; x read: by one read of all gradients"
        for table in (snapshots, judges):
            self._console.print(table, highlight=False)


def _spread(value: Spread | None) -> str:
    return "" if value is None else f"{value.median:,.3f} [{value.low:,.3f}, {value.high:,.3f}]".replace("[", "\\[")


def _median(value: Spread | None) -> str:
    return "" if value is None else f"{value.median:,.3f}"


def _times(value: Spread | None, floor: Spread | None) -> str:
    return "" if value is None or floor is None or not floor.median else f"{value.median / floor.median:.1f}"


def _yes(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "NO"
