"""One drill from seed to report, and `tolaria drill` around it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tolaria.drill import score
from tolaria.drill.catalogue import WORKLOADS
from tolaria.drill.faults import Fault, FaultKind, Moment, plan
from tolaria.drill.picture import draw
from tolaria.drill.records import RunRecord
from tolaria.drill.runs import Audience, disturbed, run_guarded, run_plain, without
from tolaria.drill.show import Show, open_show
from tolaria.drill.workloads import CannotRun, Workload
from tolaria.report import logger

STEPS = 600
"""Of each run, unless `--steps` says otherwise."""


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """One drill before it runs.

    Attributes:
        workload: With its data.
        faults: As planned.
        seed: Of weights, data and faults.
        steps: Optimizer steps of each run.
        device: Where all of it happens.
    """

    workload: Workload
    faults: tuple[Fault, ...]
    seed: int
    steps: int
    device: torch.device


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """One drill after it ran.

    Attributes:
        stage: What was run.
        clean, unguarded, guarded, reference: The four runs.
        score: What came of it.
        report: The object that ``--json`` prints.
    """

    stage: Stage
    clean: RunRecord
    unguarded: RunRecord
    guarded: RunRecord
    reference: RunRecord
    score: score.Score
    report: dict[str, Any]


def prepare(
    workload: str, seed: int, steps: int, device: torch.device, kinds: Sequence[FaultKind] | None = None
) -> Stage:
    """Load the data of one drill and plan its faults.

    Args:
        workload: A key of `WORKLOADS`.
        seed: Not negative.
        steps: `faults.fewest_steps` or more.
        device: From `open_device`.
        kinds: Faults to inject; those of `catalogue.Entry.kinds_for(device)` unless given.

    Raises:
        CannotRun: One of them is not possible, or scikit-learn is missing.
    """
    if workload not in WORKLOADS:
        raise CannotRun(f"there is no workload {workload!r}: choose from {', '.join(WORKLOADS)}")
    if not 0 <= seed < 2**63:
        raise CannotRun(f"--seed {seed} is out of range: use one from 0 to 2^63 - 1")
    entry = WORKLOADS[workload]
    faults = plan(seed, steps, entry.kinds_for(device) if kinds is None else kinds)
    with deterministic(device):
        return Stage(entry.build(seed, steps, device), faults, seed, steps, device)


def run_drill(stage: Stage, audience: Audience, ledger: Path | None = None) -> Result:
    """Run one drill: four trainings and their comparison. Deterministic in its stage, on one machine.

    Args:
        stage: From `prepare`; may be run again.
        audience: Told about each step and incident.
        ledger: Where the guarded run's governor writes its incidents; it appends.
    """
    workload, faults, steps = stage.workload, stage.faults, stage.steps
    with deterministic(stage.device):
        bad = disturbed(workload, faults)
        clean = run_plain("clean", workload, workload.batches, (), audience, with_digests=True)
        unguarded = run_plain("unguarded", workload, bad, faults, audience)
        guarded = run_guarded(workload, bad, faults, audience, WORKLOADS[workload.name].config(ledger))
        data_faults = [fault for fault in faults if fault.kind.moment is Moment.DATA]
        kept = without(bad, score.skipped_batches(guarded, steps))
        reference = run_plain("reference", workload, kept, data_faults, audience, with_digests=True)
    kinds = [fault.kind.name for fault in faults]
    result = score.score(clean, unguarded, guarded, reference, kinds, workload.chance_loss, steps)
    report = score.as_json(
        result,
        (clean, unguarded, guarded),
        workload=workload.name,
        seed=stage.seed,
        device=str(stage.device),
        steps=steps,
    )
    return Result(stage, clean, unguarded, guarded, reference, result, report)


def main(
    *, workload: str, seed: int, seeds: int, steps: int | None, device: str, as_json: bool, out: Path | None
) -> int:
    """`tolaria drill`, see `tolaria.cli.Drill` for its arguments.

    Returns:
        0 when every drill recovered from every fault without a false rollback, 1 otherwise.

    Raises:
        CannotRun: As `prepare`; also without such a device, a folder that can be written, or a governor at all.
    """
    if seeds < 1:
        raise CannotRun(f"--seeds {seeds} is no number of drills: use 1 or more")
    if os.environ.get("TOLARIA_DISABLE", "") not in ("", "0"):
        raise CannotRun("TOLARIA_DISABLE is set, so there would be no governor: unset it")
    where = open_device("cpu" if workload == "cartpole" and device == "auto" else device)
    if workload == "cartpole":
        return _cartpole(seed, seeds, steps, where, as_json, out)
    steps = STEPS if steps is None else steps
    show = open_show(as_json)
    results: list[Result] = []
    with _quiet_log():
        for one in range(seed, seed + seeds):
            stage = prepare(workload, one, steps, where)
            folder = out if out is None or seeds == 1 else out / f"seed-{one}"
            ledger = _new_ledger(folder)
            with show.drill(workload, one, steps, str(where), stage.faults):
                result = run_drill(stage, show, ledger)
            if folder is not None:
                _write(result, folder)
            if as_json:
                print(json.dumps(result.report, allow_nan=False), flush=True)
            _present(show, result, folder)
            results.append(result)
    if seeds > 1:
        show.seeds([result.report for result in results])
    return 0 if all(result.score.is_good for result in results) else 1


def _cartpole(seed: int, seeds: int, steps: int | None, device: torch.device, as_json: bool, out: Path | None) -> int:
    from tolaria.drill import cartpole_drill  # brings Stable-Baselines3 along

    if not 0 <= seed < 2**31:
        raise CannotRun(f"--seed {seed} is out of range: use one from 0 to 2^31 - 1")
    chosen = range(seed, seed + seeds)
    folders = (out if out is None or seeds == 1 else out / f"seed-{one}" for one in chosen)
    places = ((folder, _new_ledger(folder)) for folder in folders)
    with deterministic(device):
        return cartpole_drill.main(
            seeds=chosen,
            rounds=cartpole_drill.ROUNDS if steps is None else steps,
            device=device,
            as_json_lines=as_json,
            folders=places,
            quiet=_quiet_log,
        )


def open_device(name: str) -> torch.device:
    """The device of that name; ``"auto"`` is CUDA where there is any, else the CPU.

    Raises:
        CannotRun: There is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, when CUDA is first used
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise CannotRun(f"--device {name} cannot be used here ({first}): try --device cpu") from error
    return device


@contextmanager
def deterministic(device: torch.device) -> Generator[None]:
    """Equal arguments give equal bits inside: one CPU thread (the model is small), deterministic kernels on a GPU."""
    threads, was_on = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.set_num_threads(1)
    if device.type != "cpu":
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(was_on)
        torch.backends.cudnn.benchmark = benchmark


@contextmanager
def _quiet_log() -> Generator[None]:
    """The show tells of incidents; the library's own log lines would tear its display."""
    silent, propagate = logging.NullHandler(), logger.propagate
    logger.addHandler(silent)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(silent)
        logger.propagate = propagate


def _new_ledger(folder: Path | None) -> Path | None:
    """An empty ledger in place of an earlier drill's."""
    if folder is None:
        return None
    ledger = folder / "incidents.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ledger.write_text("", encoding="utf-8")
    except OSError as error:
        raise CannotRun(f"--out {folder} cannot be written ({error.strerror}): choose another folder") from error
    return ledger


def _write(result: Result, folder: Path) -> None:
    """`report.json` and `drill.svg`, in place of an earlier drill's; the governor has written `incidents.jsonl`."""
    (folder / "report.json").write_text(json.dumps(result.report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    (folder / "drill.svg").write_text(draw_result(result), encoding="utf-8")


def draw_result(result: Result) -> str:
    """The picture of one drill, an SVG document."""
    report, stage = result.report, result.stage
    return draw(
        result.clean,
        result.unguarded,
        result.guarded,
        result.score,
        num_batches=stage.steps,
        chance_loss=stage.workload.chance_loss,
        heading=f"tolaria drill: {report['workload']}, seed {stage.seed}, {stage.steps} steps, {report['device']}",
    )


def _present(show: Show, result: Result, folder: Path | None) -> None:
    show.result(
        result.report,
        steps_lost=[fault.steps_lost for fault in result.score.faults],
        num_skipped=len(result.score.skipped),
        is_equal_at_end=result.score.is_equal_at_end,
        ended_by=result.guarded.ended_by,
        folder=folder,
    )
