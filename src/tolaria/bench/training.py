"""What a governor costs a real training loop: each variant between two runs of the loop without it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tolaria import GovernorConfig, TolariaGovernor
from tolaria.bench.clock import Clock, Floors
from tolaria.bench.own import quiet
from tolaria.bench.records import Row, Spread
from tolaria.bench.workload import Workload

TINY = 16
"""Positions of a batch that costs the host as much as any other, and a device next to nothing."""

_MOST_WARM_STEPS = 240


@dataclass(slots=True)
class Variant:
    """One way to govern the loop.

    Attributes:
        name: For people.
        config: Of the governor.
        ms: Per step, of each block of steps.
        plain_ms: Per step without a governor, around it: one figure a block.
        cadence: Steps between snapshots that came of it.
        snapshots: Taken while it was timed.
        tier: Of them.
    """

    name: str
    config: GovernorConfig
    ms: list[float] = field(default_factory=list)
    plain_ms: list[float] = field(default_factory=list)
    cadence: int = 0
    snapshots: int = 0
    tier: str = ""


def variants() -> list[Variant]:
    """The three that are measured."""
    return [
        Variant("governed, no snapshots", GovernorConfig(cadence=10_000, host_slots=0)),
        Variant("governed, default settings", GovernorConfig()),
        Variant("governed, a snapshot every step", GovernorConfig(cadence=1, probation=0, host_slots=0)),
    ]


def train(work: Workload, steps: int, rounds: int, tick: Callable[[], None]) -> list[Row]:
    """Time per step of the loop, with the governor and without it.

    Args:
        work: Trains.
        steps: Of one block. A multiple of 10, so that each block of the default settings takes as many snapshots.
        rounds: Blocks of each variant.
        tick: Called after each block.
    """
    clock = Clock(work.device)
    flat = statistics.median(Floors(clock, work.num_bytes()).copy_ms() for _ in range(5))
    block_ms(work, clock, 3)
    before = _plain(work, clock, steps, rounds, tick)
    plain = list(before)
    chosen = variants()
    for variant in chosen:
        _governed(work, clock, variant, steps, rounds, tick)
        after = _plain(work, clock, steps, rounds, tick)
        variant.plain_ms = [(one + other) / 2 for one, other in zip(before, after, strict=True)]
        plain += after
        before = after
    rows = [Row(group="training", name="without a governor", ms=Spread.of(plain))]
    without = chosen[0]
    for variant in chosen:
        rows.append(_row(variant, without, steps, flat))
    return rows


def blocks(rounds: int) -> int:
    """How often `train` calls its `tick`."""
    return (2 * len(variants()) + 1) * rounds


def _row(variant: Variant, without: Variant, steps: int, flat_ms: float) -> Row:
    note = ""
    if variant is not without and variant.snapshots:
        taken = variant.snapshots / (steps * len(variant.ms))
        ratios = [
            one / plain - two / bare
            for one, plain, two, bare in zip(variant.ms, variant.plain_ms, without.ms, without.plain_ms, strict=True)
        ]
        plain_ms = statistics.median(variant.plain_ms)
        cost = statistics.median(ratios) * plain_ms / taken
        in_series = 1.0 + taken * flat_ms / plain_ms
        each = f"{cost:.2f} ms of the steps' time each" if cost > 0.0 else "too cheap to be seen among these steps"
        note = f"{variant.snapshots} snapshots, {variant.tier} tier: {each}; "
        note += f"a flat copy alone {flat_ms:.2f} ms, in series with the steps x {in_series:.4f}"
    return Row.beside("training", variant.name, variant.ms, "without a governor", variant.plain_ms, note=note)


def warm(work: Workload, governor: TolariaGovernor) -> int:
    """Steps on next to no data, until every slot that the settings will use has its memory. Answers how many."""
    positions = min(TINY, work.size.context)
    steps, slots = 0, governor.capabilities().slots
    wants_snapshots = governor.capabilities().cadence < _MOST_WARM_STEPS
    while steps < _MOST_WARM_STEPS:
        for tokens in governor.watch(work.batches(10, sequences=1)):
            work.step(tokens[:, : positions + 1].contiguous(), governor)
        steps += 10
        counts, facts = governor.statistics(), governor.capabilities()
        drained = counts.snapshots_drained >= (facts.host_slots if facts.tier == "device" else 0)
        if not wants_snapshots or (counts.snapshots > slots and drained):
            break
    return steps


def _governed(
    work: Workload, clock: Clock, variant: Variant, steps: int, rounds: int, tick: Callable[[], None]
) -> None:
    with quiet(), TolariaGovernor(work.model, work.optimizer, config=variant.config) as governor:
        warm(work, governor)
        block_ms(work, clock, 3, governor)
        before = governor.statistics().snapshots
        for _ in range(rounds):
            variant.ms.append(block_ms(work, clock, steps, governor))
            tick()
        facts = governor.capabilities()
        variant.snapshots = governor.statistics().snapshots - before
        variant.cadence, variant.tier = facts.cadence, facts.tier


def _plain(work: Workload, clock: Clock, steps: int, rounds: int, tick: Callable[[], None]) -> list[float]:
    found: list[float] = []
    for _ in range(rounds):
        found.append(block_ms(work, clock, steps))
        tick()
    return found


def block_ms(work: Workload, clock: Clock, steps: int, governor: TolariaGovernor | None = None) -> float:
    """Milliseconds per step of that many. The device is at rest before and after."""
    batches = work.batches(steps)
    clock.rest()
    started = time.perf_counter()
    for tokens in batches if governor is None else governor.watch(batches):
        work.step(tokens, governor)
    clock.rest()
    return (time.perf_counter() - started) / steps * 1e3
