"""One contestant in a process of its own, so that one that breaks costs only its row.

    python -m tolaria.bench.contest INDEX --size 10mb --device cpu --rounds 9

prints one JSON object, the `Standing`, as the last line of its standard output. `compare` starts such processes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from tolaria.bench.clock import Clock, Floors, ReadFloor
from tolaria.bench.own import quiet
from tolaria.bench.peers.contestant import CATALOGUE, Entry, Judge, Keeper, WithReference
from tolaria.bench.records import Spread, Standing
from tolaria.bench.workload import SIZES, Size, Workload

_PATIENCE_S = 600.0  # for one contestant
_START_S = 60.0  # of that, for all but its rounds, where these are limited
_LONGEST_ROUND = 5.0  # how many times the limit one contestant may take that cannot be interrupted in a round
_WARM_UPS = 3
_SHARED_MEMORY = Path("/dev/shm")
_FILES_HELD = 3  # the most that a contestant keeps at once


def compare(
    size: str, device: torch.device, rounds: int, tick: Callable[[], None], seconds: float = math.inf
) -> list[Standing]:
    """Every contestant, one after the other.

    Args:
        size: A key of `SIZES`.
        device: Where the workload is.
        rounds: Measurements of each.
        tick: Called after each of them.
        seconds: After which no contestant begins another round, see `turns`.
    """
    standings: list[Standing] = []
    for index, entry in enumerate(CATALOGUE):
        standings.append(_absent(entry, device) or _in_process(index, entry, size, device, rounds, seconds))
        tick()
    return standings


def _absent(entry: Entry, device: torch.device) -> Standing | None:
    """The row of a contestant that cannot run here; None where it can."""
    version = entry.version
    if version is None:
        return _bare(entry, "not installed", f"pip install {entry.package}")
    if entry.device and entry.device != device.type:
        return _bare(entry, "not on this device", f"works on {entry.device} only")
    return None


def _bare(entry: Entry, status: Any, note: str) -> Standing:
    return Standing(name=entry.name, kind=entry.kind, status=status, version=entry.version or "", note=note)


def _in_process(
    index: int, entry: Entry, size: str, device: torch.device, rounds: int, seconds: float = math.inf
) -> Standing:
    command = [sys.executable, "-m", "tolaria.bench.contest", str(index), "--size", size]
    command += ["--device", str(device), "--rounds", str(rounds), "--seconds", str(seconds)]
    patience = min(_PATIENCE_S, _START_S + _LONGEST_ROUND * seconds)
    code, printed, said = _run(command, patience)
    if code is None:
        return _bare(entry, "failed", f"took longer than {patience:.0f} s")
    try:
        return Standing.from_json(json.loads(printed.strip().splitlines()[-1]))
    except (IndexError, ValueError, TypeError):
        last = (said.strip().splitlines() or [""])[-1]
        return _bare(entry, "failed", f"its process ended with {code}: {last[:200]}")


def _run(command: Sequence[str], patience_s: float) -> tuple[int | None, str, str]:
    """Exit code (None where it took too long), and what went to both outputs.

    What a contestant has started may outlive it and hold its outputs open: they are files, so nobody waits for that,
    and all of it is ended.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, text=True, start_new_session=True
        )
        try:
            code: int | None = process.wait(patience_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        err.seek(0)
        return code, out.read(), err.read()


def _has_room(num_bytes: int) -> bool:
    """Whether files of a state of that size can be kept in memory here."""
    return _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free >= _FILES_HELD * num_bytes


@contextlib.contextmanager
def _folder(in_memory: bool) -> Generator[Path]:
    """For files of a contestant."""
    path = Path(tempfile.mkdtemp(prefix="tolaria-bench-", dir=_SHARED_MEMORY if in_memory else None))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def turns(rounds: int, seconds: float, now: Callable[[], float] = time.monotonic) -> Iterator[bool]:
    """The rounds of one contestant; whether each of them counts. The first ones are warm-ups and do not.

    Args:
        rounds: That count, at most; at least one does.
        seconds: After half of them the warm-ups end, if there was one, and after all of them the rounds.
        now: The clock.
    """
    started = now()
    for number in range(_WARM_UPS):
        if number and now() - started > seconds / 2:
            break
        yield False
    for number in range(rounds):
        if number and now() - started > seconds:
            break
        yield True


def run(entry: Entry, work: Workload, rounds: int, seconds: float = math.inf) -> Standing:
    """Measure one contestant in this process. What it raises becomes its row.

    Args:
        entry: Who.
        work: With optimizer state. Its weights and moments are changed.
        rounds: Measurements.
        seconds: After which no further round begins, see `turns`.
    """
    in_memory = _has_room(work.num_bytes())
    with _folder(in_memory) as folder:
        try:
            made = entry.make(work, folder)
            try:
                measure = _keep if entry.kind == "snapshot" else _judge
                found = measure(made, work, turns(rounds, seconds))
            finally:
                made.close()
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            return _bare(entry, "failed", f"{type(error).__name__}: {first[:200]}")
    note = entry.note if in_memory else f"{entry.note}; {_SHARED_MEMORY} has no room: any files lay elsewhere"
    return replace(found, name=entry.name, version=entry.version or "", note=note)


def _keep(made: Keeper, work: Workload, rounds: Iterator[bool]) -> Standing:
    """Snapshot, change everything, roll back, look whether all of it is there."""
    clock = Clock(work.device)
    floors = Floors(clock, work.num_bytes())
    found: list[tuple[float, float, float, float]] = []
    exact, in_place = True, True
    for counts in rounds:
        floor = floors.copy_ms()
        addresses = [tensor.data_ptr() for tensor in work.tensors()]
        besides = clock.host_ms(made.reference)[1] if isinstance(made, WithReference) else 0.0
        stall, complete = (taken - besides for taken in _timed_snapshot(made, clock))
        kept = [tensor.clone() for tensor in work.tensors()]
        _spoil(work)
        back = clock.host_ms(made.rollback)[1]
        now = work.tensors()
        exact = exact and len(now) == len(kept) and all(map(torch.equal, now, kept))
        in_place = in_place and [tensor.data_ptr() for tensor in now] == addresses
        del kept, now
        if counts:
            found.append((floor, stall, complete, back))
    columns = [Spread.of(column) for column in zip(*found, strict=True)]
    return Standing(
        name="",
        kind="snapshot",
        status="measured",
        floor_ms=columns[0],
        stall_ms=columns[1],
        complete_ms=columns[2],
        rollback_ms=columns[3],
        is_exact=exact,
        is_in_place=in_place,
    )


def _timed_snapshot(made: Keeper, clock: Clock) -> tuple[float, float]:
    """Milliseconds until the call returned, and until what it began is complete."""
    clock.rest()
    started = time.perf_counter()
    made.snapshot()
    returned = time.perf_counter()
    made.complete()
    clock.rest()
    return (returned - started) * 1e3, (time.perf_counter() - started) * 1e3


def _spoil(work: Workload) -> None:
    """Change every number, as an optimizer step would, in place."""
    with torch.no_grad():
        for tensor in work.tensors():
            tensor.add_(1.0)


def _judge(made: Judge, work: Workload, rounds: Iterator[bool]) -> Standing:
    """One healthy step after the other. What the loop would do anyway is subtracted, round by round."""
    clock = Clock(work.device)
    floor = ReadFloor(clock, sum(parameter.numel() for parameter in work.model.parameters()))
    loss = work.backward()
    found: list[tuple[float, float, float]] = []
    for counts in rounds:
        read = floor.read_ms()
        held, whole = clock.host_ms(lambda: made.healthy(loss))
        plain_held, plain = clock.host_ms(lambda: made.reference(loss))
        if counts:
            found.append((read, held - plain_held, whole - plain))
    columns = [Spread.of(column) for column in zip(*found, strict=True)]
    return Standing(
        name="",
        kind="judge",
        status="measured",
        floor_ms=columns[0],
        judge_host_ms=columns[1],
        judge_ms=columns[2],
    )


def prepare(size: Size, device: torch.device, *, fused: bool = True) -> Workload:
    """A workload whose optimizer state exists."""
    work = Workload(size, device, fused=fused)
    for tokens in work.batches(2, sequences=1):
        work.step(tokens)
    return work


def main(arguments: Sequence[str] | None = None) -> int:
    """One contestant; see the head of this module."""
    parser = argparse.ArgumentParser(prog="python -m tolaria.bench.contest")
    parser.add_argument("index", type=int)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--seconds", type=float, default=math.inf)
    given = parser.parse_args(arguments)
    entry = CATALOGUE[given.index]
    with quiet(), contextlib.redirect_stdout(sys.stderr):  # whatever it prints
        work = prepare(SIZES[given.size], given.device, fused=entry.fused)
        standing = run(entry, work, given.rounds, given.seconds)
    print(json.dumps(asdict(standing), allow_nan=False), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
