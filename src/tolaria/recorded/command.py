"""`tolaria judge`: when the governor would have fired on runs that are over, and why."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tolaria.recorded.picture import draw
from tolaria.recorded.read import read
from tolaria.recorded.records import JudgedRun, Panic, UnreadableRecord
from tolaria.recorded.verdicts import judge_run
from tolaria.records import SCHEMA_VERSION


def main(*, files: Sequence[Path], as_json: bool, picture: Path | None) -> int:
    """`tolaria judge`, see `tolaria.cli.Judge` for its arguments.

    Returns:
        0 when no run panicked, 1 when one did.

    Raises:
        UnreadableRecord: A file is malformed, or the picture cannot be written. Nothing was printed.
    """
    runs = [run for file in files for run in read(file)]  # all of them, before the first is judged
    judged = [judge_run(run) for run in runs]
    if picture is not None:
        try:
            picture.write_text(draw(judged), encoding="utf-8")
        except OSError as error:
            raise UnreadableRecord(f"--picture {picture}: cannot be written ({error.strerror})") from None
    if as_json:
        report = {"schema_version": SCHEMA_VERSION, "runs": [one.as_json() for one in judged]}
        print(json.dumps(report, allow_nan=False))
    else:
        _present(judged, picture)
    return 1 if any(one.panics for one in judged) else 0


def _present(judged: Sequence[JudgedRun], picture: Path | None) -> None:
    for one in judged:
        suspect = sum(_num_suspect(one))
        verdict = f"{len(one.panics)} panic{'' if len(one.panics) == 1 else 's'}" if one.panics else "no panic"
        print(f"{one.run.file}, run {one.run.name}: {len(one.run.signs)} steps, {verdict}, {suspect} suspect steps")
        for panic in one.panics:
            print(f"  step {panic.step}: PANIC, {panic.reason}{_why(panic)}")
        for suspicion in one.suspicions:
            print(f"  steps {suspicion.step} to {suspicion.last_step}: suspect, {suspicion.reason}")
    steps, fired = sum(len(one.run.signs) for one in judged), sum(bool(one.panics) for one in judged)
    print(f"{len(judged)} runs, {steps} steps: {fired} would have been rolled back")
    if picture is not None:
        print(f"Picture: {picture}")


def _num_suspect(one: JudgedRun) -> list[int]:
    """Recorded steps in each suspicion."""
    steps = [signs.step for signs in one.run.signs]
    return [sum(each.step <= step <= each.last_step for step in steps) for each in one.suspicions]


def _why(panic: Panic) -> str:
    numbers = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in panic.evidence.items())
    return f" since step {panic.onset} ({numbers})" if numbers else f" since step {panic.onset}"
