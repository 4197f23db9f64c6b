"""The command line of the campaign. Exit codes: 0 good, 1 too many misses or a silent failure, 2 wrong usage."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from tolaria.drill.campaign import campaign, page
from tolaria.drill.campaign.tally import summary
from tolaria.drill.workloads import CannotRun

ENOUGH = 0.995
"""Share of trials that must pass."""


@dataclass(frozen=True)
class Campaign:
    """Short trainings by the thousand, each with one kind of fault, each judged alone (docs/campaign.md).

    Broken off, it goes on where it was when it is started again with the same --results.
    """

    seeds: int = 50
    """Number of seeds; a trial is one kind, one workload and one seed."""

    first_seed: int = 0
    """The first of them."""

    workloads: tuple[str, ...] = ()
    """Some of gpt, digits, regression; all unless given."""

    kinds: tuple[str, ...] = ()
    """Some kinds of fault; all, and undisturbed runs, unless given."""

    in_turn: bool = False
    """Each kind and seed on one workload, the next seed on the next one: a third of the trials."""

    mode: Literal["full", "signs", "blind"] = "full"
    """full: detectors, and every step is run twice; signs: the detectors alone; blind: neither (the red twin)."""

    processes: int = 1
    """Processes that work at once."""

    results: Path | None = None
    """File of JSON lines, one per trial, to which is appended and from which is resumed."""

    summary: Path | None = None
    """File for the object that --json prints."""

    json: bool = False
    """Print one JSON object, and nothing else on standard output."""

    page: Path | None = None
    """Page whose tables are written anew, for example docs/campaign.md."""

    beside: tuple[Path, ...] = ()
    """Summaries of other modes, to stand in the table of that page."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; those of the process unless given.

    Returns:
        The exit code.
    """
    try:
        command = tyro.cli(
            Campaign,
            prog="python -m tolaria.drill.campaign",
            args=None if argv is None else list(argv),
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except SystemExit as stop:  # help, or wrong usage: tyro has said what was wrong
        return stop.code if isinstance(stop.code, int) else 2
    try:
        return _run(command)
    except KeyboardInterrupt:
        print("campaign: interrupted; start it again with the same --results to go on", file=sys.stderr)
        return 130
    except CannotRun as error:
        print(f"campaign: {error}", file=sys.stderr)
        return 2


def _run(command: Campaign) -> int:
    if os.environ.get("TOLARIA_DISABLE", "") not in ("", "0"):
        raise CannotRun("TOLARIA_DISABLE is set, so there would be no governor: unset it")
    if command.processes < 1:
        raise CannotRun(f"--processes {command.processes} is no number of processes: use 1 or more")
    plan = campaign.choose(
        command.workloads, command.kinds, command.first_seed, command.seeds, command.mode, in_turn=command.in_turn
    )
    others = {found["mode"]: found for found in map(_read_summary, command.beside)}
    goes_on = bool(campaign.read(command.results))
    began = time.perf_counter()
    rows = campaign.run(plan, command.results, command.processes)
    seconds = None if goes_on else time.perf_counter() - began
    found = summary(rows, campaign.about(plan, seconds, command.processes))
    if command.summary is not None:
        command.summary.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if command.page is not None:
        page.write(command.page, found, others)
    if command.json:
        print(json.dumps(found, allow_nan=False))
    else:
        print("\n".join(page.lines(found, others)))
    is_good = found["rate"] is None or found["rate"] >= ENOUGH
    return 0 if is_good and not found["silent"] and not found["false_panics_of_control"] else 1


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["mode"] in page.BY_NAME_OF_MODE and isinstance(found["kinds"], list):
            return dict(found)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise CannotRun(f"--beside {path} is no summary of another mode: write one with --summary")


if __name__ == "__main__":
    sys.exit(main())
