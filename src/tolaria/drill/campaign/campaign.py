"""Many trials on several processes, written down one by one, so that a campaign that was broken off goes on."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from tolaria.drill.campaign.kinds import BY_NAME
from tolaria.drill.campaign.tally import Row, is_good, row_of
from tolaria.drill.campaign.trial import STEPS, WORKLOADS, Mode, open_references, run_trial
from tolaria.drill.workloads import CannotRun


@dataclass(frozen=True, slots=True)
class Plan:
    """Which trials there are.

    Attributes:
        workloads: Names.
        kinds: Names.
        seeds: Of the trials.
        mode: See `trial.run_trial`.
        in_turn: Each kind and seed on one workload, the next seed on the next one; else on all of them.
    """

    workloads: tuple[str, ...]
    kinds: tuple[str, ...]
    seeds: range
    mode: Mode
    in_turn: bool = False

    def batches(self, known: set[tuple[str, str, int]]) -> list[tuple[str, int, tuple[str, ...], Mode]]:
        """What one process does at a time: the kinds of one workload and seed that are not `known` yet."""
        found: list[tuple[str, int, tuple[str, ...], Mode]] = []
        for seed in self.seeds:
            for workload in self.workloads:
                kinds = tuple(
                    kind
                    for kind in self.kinds
                    if workload in self._workloads_of(kind, seed) and (kind, workload, seed) not in known
                )
                if kinds:
                    found.append((workload, seed, kinds, self.mode))
        return found

    def _workloads_of(self, kind: str, seed: int) -> list[str]:
        suitable = [workload for workload in self.workloads if applies(kind, workload)]
        return [suitable[seed % len(suitable)]] if self.in_turn and suitable else suitable


def applies(kind: str, workload: str) -> bool:
    """Whether the kind means something on that workload."""
    return not BY_NAME[kind].workloads or workload in BY_NAME[kind].workloads


def choose(
    workloads: Sequence[str], kinds: Sequence[str], first: int, count: int, mode: Mode, *, in_turn: bool = False
) -> Plan:
    """A plan of what is named; of everything where nothing is.

    Raises:
        CannotRun: A name that there is not, or no seed.
    """
    for given, known in ((workloads, WORKLOADS), (kinds, BY_NAME)):
        for name in given:
            if name not in known:
                raise CannotRun(f"there is no {name!r}: choose from {', '.join(known)}")
    if count < 1 or first < 0:
        raise CannotRun(f"seeds {first} to {first + count - 1} are none: use --seeds 1 or more, from 0 on")
    seeds = range(first, first + count)
    return Plan(tuple(workloads) or tuple(WORKLOADS), tuple(kinds) or tuple(BY_NAME), seeds, mode, in_turn)


def run_batch(workload: str, seed: int, kinds: Sequence[str], mode: Mode) -> list[Row]:
    """Some trials of one workload and seed, in this process, on one CPU thread."""
    threads = torch.get_num_threads()
    logger = logging.getLogger("tolaria")
    level = logger.level
    torch.set_num_threads(1)
    logger.setLevel(logging.CRITICAL)  # each incident has its line in the log, and there are thousands of them
    try:
        references = open_references(workload, seed)
        return [row_of(run_trial(BY_NAME[kind], references, seed, mode), mode) for kind in kinds]
    finally:
        torch.set_num_threads(threads)
        logger.setLevel(level)


def run(plan: Plan, path: Path | None, processes: int) -> list[Row]:
    """Run what of the plan is not in the file yet. Progress goes to standard error.

    Args:
        plan: From `choose`.
        path: JSON lines, one per trial; those of the plan that it holds are not run again. None: nothing is kept.
        processes: That work at once; 1: this one.

    Returns:
        The rows of the plan, earlier ones included.

    Raises:
        CannotRun: The file is none of ours, or cannot be written.
    """
    wanted = {(kind, workload, seed) for workload, seed, kinds, _ in plan.batches(set()) for kind in kinds}
    rows = [row for row in read(path) if row["mode"] == plan.mode and _key(row) in wanted]
    batches = plan.batches({_key(row) for row in rows})
    num_left, began = sum(len(batch[2]) for batch in batches), time.perf_counter()
    done = 0
    for found in _finished(batches, processes):
        _append(path, found)
        rows += found
        done += len(found)
        left = (time.perf_counter() - began) / done * (num_left - done)
        good = sum(map(is_good, rows))
        print(f"{len(rows)} trials, {good} good, about {left / 60:.0f} min left", file=sys.stderr, flush=True)
    return sorted(rows, key=_key)


def _finished(batches: Sequence[tuple[str, int, tuple[str, ...], Mode]], processes: int) -> Iterator[list[Row]]:
    if processes == 1:
        for batch in batches:
            yield run_batch(*batch)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        pending = [pool.submit(run_batch, *batch) for batch in batches]
        try:
            for future in as_completed(pending):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _key(row: Row) -> tuple[str, str, int]:
    return row["kind"], row["workload"], row["seed"]


def read(path: Path | None) -> list[Row]:
    """The rows of a file of results; none where there is no file. A last line that was broken off is left out.

    Raises:
        CannotRun: It is no such file.
    """
    if path is None or not path.exists():
        return []
    rows: list[Row] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
            _key(row), row["mode"], row["outcome"]
            rows.append(row)
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) - 1:
                break
            raise CannotRun(f"{path}, line {number + 1}, is no trial ({error}): choose another file") from error
    return rows


def _append(path: Path | None, rows: Sequence[Row]) -> None:
    if path is None:
        return
    try:
        whole = not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
        with path.open("a", encoding="utf-8") as file:
            file.write("" if whole else "\n")
            file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    except OSError as error:
        raise CannotRun(f"{path} cannot be written ({error.strerror}): choose another file") from error


def about(plan: Plan, seconds: float | None, processes: int) -> dict[str, Any]:
    """Settings and machine, for the summary. `seconds` is None where some trials had been run before."""
    return {
        "mode": plan.mode,
        "steps": STEPS,
        "seeds": [plan.seeds.start, plan.seeds.stop - 1],
        "in_turn": plan.in_turn,
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "device": "cpu",
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "processes": processes,
        "minutes": None if seconds is None else round(seconds / 60, 1),
    }
