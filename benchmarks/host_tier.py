"""Whether snapshots that go to main memory slow the compute stream, beside the same run without a governor.

    python benchmarks/host_tier.py [--size 355m] [--steps 30] [--queue]

Other memory fills the device until the train state fits no second time: less than half of it is left above the peak of
training and the 15 % that `budget` keeps free. The governor has its default settings and takes main memory by itself.

The loop is bound by its device: the batch is doubled until a step takes the device three times as long as the host.
Host time is that of the same step on a batch of 16 positions, which has the same launches. Page-locking is over before
anything is measured. The loop without a governor runs before and after; each step is timed by events on the compute
stream.

The first row is the loop alone. `no copy`: governed steps in which no snapshot was under way. `under a copy`: steps
that a snapshot was transferred beside. `all`: every governed step. The last row is the control: the loop without a
governor, and once in ten steps as many bytes copied to main memory on the compute stream itself: it has to be seen.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")

import torch
from torch import nn

from tolaria import GovernorConfig, TolariaGovernor, judge, protocol
from tolaria.bench.workload import SIZES, Workload
from tolaria.budget import FREE_SHARE

FEW = 16  # positions of the batch that costs the host as much as any other, and the device next to nothing
TIMES_HOST = 3.0
MOST_SEQUENCES = 64
STANDS_OUT = 1.02
BUSY_CYCLES = 500_000_000  # a quarter of a second


@dataclass
class Seen:
    """Milliseconds per step, by events on the compute stream; `copied`: of steps that a transfer ran beside."""

    alone: list[float] = field(default_factory=list)
    copied: list[float] = field(default_factory=list)

    @property
    def all(self) -> list[float]:
        """Every step."""
        return self.alone + self.copied


def main() -> None:
    """Measure, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="355m")
    parser.add_argument("--steps", type=int, default=30, help="measured with the governor, and as many without it")
    parser.add_argument("--queue", action="store_true", help="only the table of submissions behind a busy device")
    arguments = parser.parse_args()
    logging.getLogger("tolaria").setLevel(logging.ERROR)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    if arguments.queue:
        queue()
        return
    work = Workload(SIZES[arguments.size], torch.device("cuda"))
    sequences = find_batch(work)
    ballast = fill_device(work)
    plain, governed, control = Seen(), Seen(), Seen()
    print(HEADING)
    half = arguments.steps // 2
    time_steps(work, sequences, half, plain)
    show("plain", plain.alone, plain)
    with TolariaGovernor(work.model, work.optimizer) as governor:
        warmed = warm(work, governor)
        time_governed(work, governor, sequences, arguments.steps, governed)
        for name, found in (("no copy", governed.alone), ("under a copy", governed.copied), ("all", governed.all)):
            show(name, found, plain)
        pinned, floors_ms = find_floor(work)
        print_facts(governor, warmed, floors_ms)
    time_steps(work, sequences, half, plain)
    show("plain again", plain.alone[half:], plain)
    time_steps(work, sequences, max(20, half), control, lambda: to_host(work, pinned))
    show("control", control.copied, plain)
    del ballast


def queue() -> None:
    """How long the host is held by a snapshot behind a busy device, against the number of tensors.

    A stream takes about a thousand commands. Once they are enqueued, the next copy holds the host until the device has
    come so far, and training launches nothing meanwhile.
    """
    print(f"{'tensors':>8} {'tier':>7} {'idle device: host ms':>21} {'busy for ms':>12} {'host ms':>9}")
    for count in (400, 900, 1000, 1100, 1200, 2000):
        for tier in ("device", "host"):
            model = nn.ParameterList([nn.Parameter(torch.ones(256, device="cuda")) for _ in range(count)])
            config = GovernorConfig(probation=0, slots=2, host_slots=0, tier=tier)
            with TolariaGovernor(model, config=config, detector=judge.non_finite()) as governor:
                for _ in range(3):
                    governor.snapshot().wait("sealed")
                idle, busy, held = (statistics.median(column) for column in zip(*_behind(governor), strict=True))
            print(f"{count:>8} {tier:>7} {idle:>21.1f} {busy:>12.1f} {held:>9.1f}", flush=True)


def _behind(governor: TolariaGovernor, rounds: int = 3) -> Iterator[tuple[float, float, float]]:
    for _ in range(rounds):
        torch.cuda.synchronize()
        started = time.perf_counter()
        governor.snapshot()
        idle = (time.perf_counter() - started) * 1e3
        torch.cuda.synchronize()
        marks = [_mark()]
        torch.cuda._sleep(BUSY_CYCLES)
        marks.append(_mark())
        started = time.perf_counter()
        governor.snapshot()
        held = (time.perf_counter() - started) * 1e3
        yield idle, _elapsed(marks)[0], held


def find_batch(work: Workload) -> int:
    """Sequences a step, so that the device takes three times as long as the host."""
    tiny = [tokens[:, : FEW + 1].contiguous() for tokens in work.batches(20, sequences=1)]
    for tokens in tiny[:5]:
        work.step(tokens)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for tokens in tiny[5:]:
        work.step(tokens)
    torch.cuda.synchronize()
    host_ms = (time.perf_counter() - started) / len(tiny[5:]) * 1e3
    sequences = work.size.batch
    while True:
        seen = Seen()
        time_steps(work, sequences, 6, seen)
        device_ms = statistics.median(seen.all)
        if device_ms >= TIMES_HOST * host_ms or sequences >= MOST_SEQUENCES:
            break
        sequences *= 2
    print(
        f"{work.size.name}: {work.size.state_bytes / 1e9:.2f} GB in {len(work.tensors())} tensors, {sequences} x "
        f"{work.size.context} positions, {device_ms:.1f} ms per step of the device, {host_ms:.1f} ms of the host: "
        f"{device_ms / host_ms:.1f} x"
    )
    return sequences


def fill_device(work: Workload) -> torch.Tensor:
    """Take memory until half a train state is left above the peak so far and what the budget keeps free."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    others = total - free - torch.cuda.memory_reserved()
    used = others + torch.cuda.max_memory_allocated()
    ballast = int(total * (1 - FREE_SHARE)) - used - work.size.state_bytes // 2
    print(f"device: {total / 2**30:.1f} GiB, {used / 2**30:.1f} at the peak, {ballast / 2**30:.1f} of ballast")
    return torch.empty(ballast, dtype=torch.uint8, device="cuda")


def find_floor(work: Workload) -> tuple[list[torch.Tensor], tuple[float, float]]:
    """Page-locked memory for every tensor; milliseconds of one flat copy of as many bytes to main memory, and back."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in work.tensors())
    flat = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    beside = torch.empty(min(size, 1 << 30), dtype=torch.uint8, device="cuda")
    parts = [flat[start : start + beside.numel()] for start in range(0, size, beside.numel())]
    there = _copy_ms(lambda: [part.copy_(beside[: part.numel()], non_blocking=True) for part in parts])
    back = _copy_ms(lambda: [beside[: part.numel()].copy_(part, non_blocking=True) for part in parts])
    for name, taken in (("to", there), ("from", back)):
        print(f"floor: {size / 1e9:.2f} GB {name} page-locked memory in {taken:.1f} ms, {size / taken / 1e6:.1f} GB/s")
    pinned: list[torch.Tensor] = []
    start = 0
    for tensor in work.tensors():
        end = start + tensor.numel() * tensor.element_size()
        pinned.append(flat[start:end])
        start = end
    return pinned, (there, back)


def _copy_ms(call: Callable[[], object]) -> float:
    taken: list[float] = []
    for _ in range(4):
        marks = [_mark()]
        call()
        marks.append(_mark())
        taken += _elapsed(marks)
    return statistics.median(taken[1:])


def to_host(work: Workload, pinned: list[torch.Tensor]) -> None:
    """The control: all tensors on the compute stream."""
    for held, tensor in zip(pinned, work.tensors(), strict=True):
        held.copy_(tensor.reshape(-1).view(torch.uint8), non_blocking=True)


def time_steps(
    work: Workload, sequences: int, num_steps: int, seen: Seen, at_tenth: Callable[[], None] | None = None
) -> None:
    """Steps without a governor. The first three are not counted."""
    marks = [_mark()]
    for number, tokens in enumerate(work.batches(num_steps + 3, sequences=sequences)):
        work.step(tokens)
        if at_tenth is not None and number % 10 == 9:
            at_tenth()
        marks.append(_mark())
    for number, taken in enumerate(_elapsed(marks)):
        if number >= 3:
            (seen.copied if at_tenth is not None and number % 10 == 9 else seen.alone).append(taken)


def warm(work: Workload, governor: TolariaGovernor) -> str:
    """Steps on next to no data until every slot has its memory. Answers how long that took."""
    started, steps = time.perf_counter(), 0
    while governor.statistics().snapshots <= governor.capabilities().slots:
        for tokens in governor.watch(work.batches(10, sequences=1)):
            work.step(tokens[:, : FEW + 1].contiguous(), governor)
        steps += 10
    return f"{governor.capabilities().slots} slots within {steps} steps and {time.perf_counter() - started:.1f} s"


def time_governed(work: Workload, governor: TolariaGovernor, sequences: int, num_steps: int, seen: Seen) -> None:
    """Steps with a governor at its default settings. The first three are not counted. Names those that stand out."""
    before = governor.statistics().snapshots
    marks, snapshots = [_mark()], [before]
    held: list[tuple[float, float, float]] = []
    asked = time.perf_counter()
    for tokens in governor.watch(work.batches(num_steps + 3, sequences=sequences)):
        snapshots.append(governor.statistics().snapshots)
        delivered = time.perf_counter()
        loss = work.loss(tokens)
        loss.backward()
        launched = time.perf_counter()
        governor.step(loss=loss)
        marks.append(_mark())  # ahead of the snapshot that may follow, and of the wait at the end of the data
        stepped = time.perf_counter()
        held.append((delivered - asked, launched - delivered, stepped - launched))
        asked = stepped
    # a snapshot is taken while the loop waits for its next batch, and transferred beside the step on that batch
    taken = _elapsed(marks)
    for number, (one, last, now) in enumerate(zip(taken, snapshots, snapshots[1:], strict=False)):
        if number >= 3:
            (seen.copied if now > last else seen.alone).append(one)
    usual = statistics.median(seen.all)
    for number, (one, last, now, parts) in enumerate(zip(taken, snapshots, snapshots[1:], held, strict=False)):
        if one > STANDS_OUT * usual or now > last:
            what = "beside a transfer" if now > last else "beside none"
            host = " + ".join(f"{part * 1e3:.0f}" for part in parts)
            late = "" if number >= 3 else ", not counted"
            print(f"  step {number}: {one:.1f} ms, {what}; host {host} ms (next batch, loss and backward, step){late}")
    if governor.capabilities().tier != "host":
        raise SystemExit(f"expected the governor to take main memory by itself: {governor.capabilities()}")


def print_facts(governor: TolariaGovernor, warmed: str, floors_ms: tuple[float, float]) -> None:
    """Tier and counts; a snapshot and a rollback that nothing else runs beside, on the device and as a whole."""
    facts, counts = governor.capabilities(), governor.statistics()
    print(f"tier: {facts.tier}, because {facts.tier_reason}")
    print(f"page-locked: {warmed}; {counts.snapshots} snapshots, {counts.panics} panics, {counts.rollbacks} rollbacks")
    keeper = governor._keeper
    snapshots: list[tuple[float, float]] = []
    rollbacks: list[tuple[float, float]] = []
    for _ in range(3):
        torch.cuda.synchronize()
        started = time.perf_counter()
        taken = keeper.driver.submit(protocol.snapshot(threading.get_ident(), keeper.ground, None, True))
        keeper.wait_for(taken.done)
        whole = (time.perf_counter() - started) * 1e3
        snapshots.append((keeper.vault.duration_s(taken.began, taken.done) * 1e3, whole))
        started = time.perf_counter()
        report = governor.execute_rollback().wait()
        rollbacks.append((report.device_ms or 0.0, (time.perf_counter() - started) * 1e3))
    for name, found, floor in zip(("snapshot", "rollback"), (snapshots, rollbacks), floors_ms, strict=True):
        device, whole = (statistics.median(column) for column in zip(*found, strict=True))
        print(f"{name}, idle device: copies {device:.1f} ms, {device / floor:.3f} x floor; call to done {whole:.1f} ms")


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed(marks: list[torch.cuda.Event]) -> list[float]:
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in itertools.pairwise(marks)]


HEADING = f"{'steps':>14} {'number':>7} {'median':>9} {'quartiles':>19} {'mean':>9} {'x plain':>8} {'mean x':>8}"


def show(name: str, found: list[float], plain: Seen) -> None:
    """One row: median, quartiles and mean, beside those of the loop alone."""
    if len(found) < 2:
        return
    middle, mean = statistics.median(found), statistics.fmean(found)
    low, _, high = statistics.quantiles(found, n=4)
    times, mean_times = middle / statistics.median(plain.alone), mean / statistics.fmean(plain.alone)
    columns = " ".join(f"{value:>9.3f}" for value in (middle, low, high, mean))
    print(f"{name:>14} {len(found):>7} {columns} {times:>8.4f} {mean_times:>8.4f}", flush=True)


if __name__ == "__main__":
    main()
