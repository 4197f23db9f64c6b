"""What is measured for each curve of `scale.py`: one thing is varied, the others stay."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass

import torch
from scale_model import Point
from torch import nn

from tolaria import GovernorConfig, TolariaGovernor, judge
from tolaria.bench.clock import Clock, Floors
from tolaria.bench.own import Timed, quiet
from tolaria.bench.records import Spread
from tolaria.bench.training import block_ms
from tolaria.bench.workload import SIZES, Size, Workload
from tolaria.config import BarrierChoice
from tolaria.group import GovernorGroup

GIGA = 1e9

MOST_FLOOR_BYTES = 5 * 10**9
"""Of one side of a flat copy. A larger state is compared with that many bytes, and the time scaled."""

Tick = Callable[[], None]
Found = dict[str, list[Point]]
"""Points by the name of their figure."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Which places of each curve are measured on one kind of device.

    Attributes:
        sizes: Bytes of the train state.
        sizes_with_one_slot: The same, where there is no room for two.
        tensors_beside_sizes: Tensors of all of them.
        tensors: Numbers of tensors.
        bytes_beside_tensors: Bytes of all of them together.
        streams: Busy streams. Empty where there are none.
        models: Governed models on one device. Ascending.
        cadences: Steps from one snapshot to the next.
        workload: What is trained for the cadences.
        steps: Of one block, at least; and of the blocks without a governor.
    """

    sizes: Sequence[int]
    sizes_with_one_slot: Sequence[int]
    tensors_beside_sizes: int
    tensors: Sequence[int]
    bytes_beside_tensors: int
    streams: Sequence[int]
    models: Sequence[int]
    cadences: Sequence[int]
    workload: Size
    steps: int


CUDA_PLAN = Plan(
    sizes=[10**7, 10**8, 10**9, 4 * 10**9, 10**10, 2 * 10**10, 4 * 10**10],
    sizes_with_one_slot=[6 * 10**10],
    tensors_beside_sizes=400,
    tensors=[10, 100, 400, 1000, 2000, 5000, 10_000, 20_000],
    bytes_beside_tensors=10**9,
    streams=[1, 2, 4, 8, 16, 32, 64],
    models=[1, 4, 16, 64, 256],
    cadences=[1, 2, 5, 10, 20, 50, 100],
    # a step of some 30 ms that the device takes longer for than the host
    workload=Size("cadences", 1024, 6, 16, 8192, 16, 1024),
    steps=40,
)

CPU_PLAN = Plan(
    sizes=[10**6, 10**7, 4 * 10**7, 10**8, 4 * 10**8],
    sizes_with_one_slot=[],
    tensors_beside_sizes=100,
    tensors=[10, 100, 400, 1000, 2000, 5000],
    bytes_beside_tensors=2 * 10**7,
    streams=[],
    models=[1, 4, 16, 64],
    cadences=[1, 2, 5, 10, 20],
    workload=SIZES["10mb"],
    steps=20,
)


def parameters(num_bytes: int, num_tensors: int, device: torch.device) -> nn.Module:
    """A module of that many equal float32 parameters."""
    size = max(1, num_bytes // 4 // num_tensors)
    return nn.ParameterList([nn.Parameter(torch.ones(size, device=device)) for _ in range(num_tensors)])


@contextlib.contextmanager
def governed(model: nn.Module, device: torch.device) -> Generator[TolariaGovernor]:
    """A governor with two slots, on the device whatever room it leaves, and nothing to certify."""
    config = GovernorConfig(
        probation=0,
        slots=2,
        host_slots=0,
        rng="keep",
        tier="device" if device.type == "cuda" else None,
        device_budget=2**62 if device.type == "cuda" else None,
    )
    with quiet(), TolariaGovernor(model, config=config, detector=judge.non_finite()) as governor:
        yield governor


# ---------------------------------------------------------------- sizes and tensors


def sizes(plan: Plan, clock: Clock, rounds: int, tick: Tick) -> Found:
    """Snapshot and rollback against the bytes of the train state."""
    found: Found = {}
    for num_bytes in plan.sizes:
        _add(found, "size", num_bytes, plan.tensors_beside_sizes, _copies, clock, rounds)
        tick()
    for num_bytes in plan.sizes_with_one_slot:
        _add(found, "size", num_bytes, plan.tensors_beside_sizes, _copies_with_one_slot, clock, rounds)
        tick()
    return found


def tensors(plan: Plan, clock: Clock, rounds: int, tick: Tick) -> Found:
    """The same against the number of tensors."""
    found: Found = {}
    for num_tensors in plan.tensors:
        _add(found, "tensors", plan.bytes_beside_tensors, num_tensors, _copies, clock, rounds)
        tick()
    return found


Measure = Callable[[nn.Module, int, Clock, int], Mapping[str, Sequence[float]]]


def _add(
    found: Found, curve: str, num_bytes: int, num_tensors: int, measure: Measure, clock: Clock, rounds: int
) -> None:
    model = parameters(num_bytes, num_tensors, clock.device)
    at = {"gigabytes": num_bytes / GIGA, "tensors": float(num_tensors)}
    for name, values in measure(model, num_bytes, clock, rounds).items():
        found.setdefault(name, []).append(Point(curve, at, Spread.of(values)))
    del model
    _forget(clock)


def _forget(clock: Clock) -> None:
    """Give back what nobody uses: the next state is of another size, and may need all of the device."""
    gc.collect()
    if clock.is_queued:
        torch.cuda.empty_cache()


def _copies(model: nn.Module, num_bytes: int, clock: Clock, rounds: int) -> Mapping[str, Sequence[float]]:
    floor = _floor(clock, num_bytes)
    with governed(model, clock.device) as governor:
        for _ in range(3):
            governor.snapshot().wait("sealed")
            governor.execute_rollback().wait()
        timed = Timed(governor, clock)
        rows: list[tuple[float, ...]] = []
        for _ in range(rounds):
            call, _, _ = timed.stage_ms()
            back_call, back = timed.back_ms()
            rows.append((floor(), call, timed.busy_stage_ms(), timed.seal_ms(), back_call, back))
    return _figures(rows, clock, ("flat copy", "snapshot, host", "snapshot", "sealed", "rollback, host", "rollback"))


def _copies_with_one_slot(model: nn.Module, num_bytes: int, clock: Clock, rounds: int) -> Mapping[str, Sequence[float]]:
    """A slot has memory once something was put into it: each governor takes one snapshot only."""
    floor = _floor(clock, num_bytes)
    rows: list[tuple[float, ...]] = []
    for number in range(1 + rounds):
        with governed(model, clock.device) as governor:
            timed = Timed(governor, clock)
            row = (timed.busy_stage_ms(), *timed.back_ms(), floor())
        del governor, timed
        gc.collect()  # its slot, before the next one needs the room
        if number:
            rows.append(row)
    return _figures(rows, clock, ("snapshot", "rollback, host", "rollback", "flat copy"))


def _figures(rows: Sequence[tuple[float, ...]], clock: Clock, names: Sequence[str]) -> Mapping[str, Sequence[float]]:
    """By name; without those that say on a CPU, where calls copy, the same as another one."""
    columns = dict(zip(names, zip(*rows, strict=True), strict=True))
    return columns if clock.is_queued else {k: v for k, v in columns.items() if not k.endswith(", host")}


def _floor(clock: Clock, num_bytes: int) -> Callable[[], float]:
    copied = min(num_bytes, MOST_FLOOR_BYTES)
    floors = Floors(clock, copied)
    return lambda: floors.copy_ms() * num_bytes / copied


# ---------------------------------------------------------------- streams

_BESIDE_STREAMS = (64 * 10**6, 40)  # bytes, and tensors: little, so that the ordering is seen
_BUSY_CYCLES = 10_000_000  # some 5 ms, longer than it takes to make 64 streams busy


def streams(plan: Plan, clock: Clock, rounds: int, tick: Tick) -> Found:
    """A rollback against the number of streams that are busy when it is asked for."""
    found: Found = {}
    model = parameters(*_BESIDE_STREAMS, clock.device)
    with governed(model, clock.device) as governor:
        for _ in range(3):
            governor.snapshot().wait("sealed")
            governor.execute_rollback().wait()
        for count in plan.streams:
            # torch has 32 of each priority
            busy = [torch.cuda.Stream(clock.device, priority=-(number % 2)) for number in range(count)]
            rows = [_behind(governor, clock, busy) for _ in range(1 + rounds)][1:]
            for name, values in zip(("host", "after the last"), zip(*rows, strict=True), strict=True):
                place = Point("streams", {"streams": float(count)}, Spread.of(values))
                found.setdefault(f"rollback beside streams, {name}", []).append(place)
            tick()
    return found


def _behind(governor: TolariaGovernor, clock: Clock, busy: Sequence[torch.cuda.Stream]) -> tuple[float, float]:
    """Milliseconds of the call, and from the end of the last stream's work until work after the rollback may begin."""
    clock.rest()
    ended = [torch.cuda.Event(enable_timing=True) for _ in busy]
    restored = torch.cuda.Event(enable_timing=True)
    for stream, event in zip(busy, ended, strict=True):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(_BUSY_CYCLES)
            event.record()
    report = governor.execute_rollback()
    restored.record()
    clock.rest()
    return report.host_ms, min(event.elapsed_time(restored) for event in ended)


# ---------------------------------------------------------------- models

_MOST_ASKED = 16  # models of a group that are measured, evenly spread


def models(plan: Plan, clock: Clock, rounds: int, tick: Tick) -> Found:
    """What one model costs the host, against the number of governed models on its device."""
    found: Found = {}
    barriers: tuple[BarrierChoice | None, ...] = ("context", "streams") if clock.is_queued else (None,)
    for barrier in barriers:
        config = GovernorConfig(barrier=barrier, probation=0, slots=2, host_slots=0, cadence=10_000)
        suffix = f", {barrier}" if barrier else ""
        parts: list[tuple[nn.Module, torch.optim.Optimizer]] = []
        with quiet(), GovernorGroup(config) as group:
            for count in plan.models:
                added = [_added(group, parts, clock.device) for _ in range(count - len(parts))]
                figures = {"adding": added[-max(1, len(added) // 2) :], **_asked(group, parts, clock, rounds)}
                for name, values in figures.items():
                    place = Point("models", {"models": float(count)}, Spread.of(values))
                    found.setdefault(f"models, {name}{suffix}", []).append(place)
                tick()
    return found


def _added(group: GovernorGroup, parts: list[tuple[nn.Module, torch.optim.Optimizer]], device: torch.device) -> float:
    """Make and govern one more model. Milliseconds of the latter."""
    with device:
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    parts.append((model, optimizer))
    number = len(group)
    started = time.perf_counter()
    group.add(model, optimizer)
    added_ms = (time.perf_counter() - started) * 1e3
    x = torch.ones(1, 64, device=device)
    for _ in range(2):  # its state is complete, and each slot has its memory
        loss = model(x).square().mean()
        loss.backward()
        group[number].step(loss=loss)
        group[number].snapshot().wait("sealed")
    group[number].execute_rollback().wait()
    return added_ms


def _asked(
    group: GovernorGroup, parts: Sequence[tuple[nn.Module, torch.optim.Optimizer]], clock: Clock, rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of the host for `step` (the optimizer's included), a snapshot and a rollback of one of them."""
    found: dict[str, list[float]] = {"step": [], "snapshot": [], "rollback": []}
    x = torch.ones(1, 64, device=clock.device)
    stride = max(1, len(parts) // _MOST_ASKED)
    for _ in range(rounds):
        for number in range(0, len(parts), stride):
            governor = group[number]
            loss = parts[number][0](x).square().mean()
            loss.backward()
            found["step"].append(clock.host_ms(lambda governor=governor, loss=loss: governor.step(loss=loss))[0])
            found["snapshot"].append(clock.host_ms(governor.snapshot)[0])
            found["rollback"].append(clock.host_ms(governor.execute_rollback)[0])
    return found


# ---------------------------------------------------------------- cadence


def cadences(plan: Plan, clock: Clock, rounds: int, tick: Tick) -> Found:
    """Milliseconds per step of a training loop against the cadence, and of the loop without a governor around it.

    What a block takes more than the two blocks around it is put on top of the median of all blocks without a governor,
    so that a machine that grows slower or faster meanwhile does not bend the curve.
    """
    work = Workload(plan.workload, clock.device)
    block_ms(work, clock, 3)
    plain: list[list[float]] = [_plain(work, clock, plan.steps, rounds)]
    blocks: list[tuple[int, float, list[float]]] = []
    for cadence in plan.cadences:
        steps = max(plan.steps, cadence)
        share, ms = _with_snapshots(work, clock, cadence, steps, rounds)
        blocks.append((cadence, share, ms))
        plain.append(_plain(work, clock, plan.steps, rounds))
        tick()
    middle = statistics.median(value for values in plain for value in values)
    found: Found = {"step without a governor": [], "step with snapshots": []}
    for number, (cadence, share, ms) in enumerate(blocks):
        at = {"cadence": float(cadence), "snapshots per step": share}
        around = [(one + other) / 2 for one, other in zip(plain[number], plain[number + 1], strict=True)]
        with_snapshots = [middle + value - beside for value, beside in zip(ms, around, strict=True)]
        found["step without a governor"].append(Point("cadence", at, Spread.of(around)))
        found["step with snapshots"].append(Point("cadence", at, Spread.of(with_snapshots)))
    return found


def _plain(work: Workload, clock: Clock, steps: int, rounds: int) -> list[float]:
    return [block_ms(work, clock, steps) for _ in range(rounds)]


def _with_snapshots(work: Workload, clock: Clock, cadence: int, steps: int, rounds: int) -> tuple[float, list[float]]:
    """Snapshots per step, and milliseconds per step of each block."""
    # as many slots as the cadence needs: with fewer, some are left out while verdicts of earlier ones are on their way
    config = GovernorConfig(cadence=cadence, probation=0, host_slots=0)
    # one that takes no offence at new made-up tokens after others were learnt by heart, which is a collapse
    detector = judge.non_finite()
    with quiet(), TolariaGovernor(work.model, work.optimizer, config=config, detector=detector) as governor:
        for _ in range(governor.capabilities().slots + 1):  # each slot has its memory
            governor.snapshot().wait("sealed")
        block_ms(work, clock, 3, governor)
        before = governor.statistics().snapshots
        found = [block_ms(work, clock, steps, governor) for _ in range(rounds)]
        return (governor.statistics().snapshots - before) / (steps * rounds), found
