"""Snapshots, rollbacks and judging of tolaria, each in turns with its floor."""

from __future__ import annotations

import logging
import platform
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import torch

from tolaria import GovernorConfig, TolariaGovernor, judge, protocol
from tolaria.bench.clock import Clock, Floors, PinnedFloors, ReadFloor
from tolaria.bench.records import Row, Spread
from tolaria.bench.workload import Workload
from tolaria.budget import TierChoice

WARM_UPS = 3
"""Rounds that are not counted: every slot gets its memory, and every kernel is compiled."""


@contextmanager
def quiet() -> Generator[None]:
    """No line of the library's own log about rollbacks that nobody needs to know of."""
    logger = logging.getLogger("tolaria")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def bare(work: Workload, tier: TierChoice | None = None) -> Generator[TolariaGovernor]:
    """A governor with two slots and nothing to certify, warmed up."""
    config = GovernorConfig(probation=0, slots=2, host_slots=0, tier=tier)
    with quiet(), TolariaGovernor(work.model, work.optimizer, config=config, detector=judge.non_finite()) as governor:
        for _ in range(WARM_UPS):
            governor.snapshot().wait("sealed")
            governor.execute_rollback().wait()
        yield governor


class Timed:
    """One governor's snapshots and rollbacks, by the host's clock and by the device's."""

    def __init__(self, governor: TolariaGovernor, clock: Clock) -> None:
        self._governor, self._keeper, self._clock = governor, governor._keeper, clock

    def stage_ms(self) -> tuple[float, float, float]:
        """A snapshot until its bytes are copied: milliseconds of the call, of the copies, and of both together."""
        keeper = self._keeper
        self._clock.rest()
        started = time.perf_counter()
        taken = keeper.driver.submit(protocol.snapshot(threading.get_ident(), keeper.ground, None, True))
        returned = time.perf_counter()
        keeper.wait_for(taken.done)
        ended = time.perf_counter()
        host, whole = (returned - started) * 1e3, (ended - started) * 1e3
        return host, keeper.vault.duration_s(taken.began, taken.done) * 1e3 if taken.began else host, whole

    def busy_stage_ms(self) -> float:
        """The copies of a snapshot that is enqueued as a whole before they begin. On the CPU: the call."""
        keeper = self._keeper
        self._clock.rest()
        self._clock.occupy()
        started = time.perf_counter()
        taken = keeper.driver.submit(protocol.snapshot(threading.get_ident(), keeper.ground, None, True))
        returned = time.perf_counter()
        keeper.wait_for(taken.done)
        if not taken.began:
            return (returned - started) * 1e3
        return keeper.vault.duration_s(taken.began, taken.done) * 1e3

    def seal_ms(self) -> float:
        """A snapshot until it is sealed, from the call on."""
        self._clock.rest()
        started = time.perf_counter()
        self._governor.snapshot().wait("sealed")
        return (time.perf_counter() - started) * 1e3

    def back_ms(self) -> tuple[float, float]:
        """A rollback: milliseconds of the call, and of the copies (on the CPU the same)."""
        self._clock.rest()
        self._clock.occupy()
        report = self._governor.execute_rollback()
        return report.host_ms, report.wait().device_ms or report.host_ms


def snapshots(work: Workload, rounds: int, tick: Callable[[], None]) -> list[Row]:
    """Snapshot and rollback beside one flat copy of the same bytes."""
    clock = Clock(work.device)
    floors = Floors(clock, work.num_bytes())
    found: dict[str, list[float]] = {
        name: [] for name in ("flat", "call", "done", "whole", "sealed", "back call", "back")
    }
    with bare(work) as governor:
        timed = Timed(governor, clock)
        for _ in range(rounds):
            found["flat"].append(floors.copy_ms())
            call, _, whole = timed.stage_ms()
            back_call, back = timed.back_ms()
            values = (call, timed.busy_stage_ms(), whole, timed.seal_ms(), back_call, back)
            for name, value in zip(list(found)[1:], values, strict=True):
                found[name].append(value)
            tick()
    floor = "flat copy"
    rows = [Row.beside("snapshot", "to done", found["done"], floor, found["flat"])]
    if clock.is_queued:
        rows[0] = Row.beside("snapshot", "to done, on the device", found["done"], floor, found["flat"])
        rows.append(_held("snapshot", found["call"], len(work.tensors())))
        rows.append(Row.beside("snapshot", "call to done, idle device", found["whole"], floor, found["flat"]))
    rows.append(Row.beside("snapshot", "call to sealed", found["sealed"], floor, found["flat"]))
    if clock.is_queued:
        rows.append(Row.beside("rollback", "to done, on the device", found["back"], floor, found["flat"]))
        rows.append(_held("rollback", found["back call"], len(work.tensors())))
    else:
        rows.append(Row.beside("rollback", "to done", found["back call"], floor, found["flat"]))
    return rows


def _held(group: str, found: Sequence[float], num_tensors: int) -> Row:
    """Host time of a call that waits for no device: it grows with the number of tensors, not with their bytes."""
    spread = Spread.of(found)
    note = f"{spread.median / num_tensors * 1e3:.1f} us per tensor"
    return Row(group=group, name="host, until the call returns", ms=spread, note=note)


def host_tier(work: Workload, rounds: int, tick: Callable[[], None]) -> list[Row]:
    """Snapshot and rollback of a device's state in page-locked main memory, beside page-locked copies of the bytes."""
    clock = Clock(work.device)
    floors = PinnedFloors(clock, work.num_bytes())
    out: list[float] = []
    back: list[float] = []
    done: list[float] = []
    whole: list[float] = []
    restored: list[float] = []
    with bare(work, "host") as governor:
        timed = Timed(governor, clock)
        for _ in range(rounds):
            out.append(floors.out_ms())
            back.append(floors.back_ms())
            whole.append(timed.stage_ms()[2])
            done.append(timed.busy_stage_ms())
            restored.append(timed.back_ms()[1])
            tick()
    rate = work.num_bytes() / 1e6
    group, to, fro = "host tier", "page-locked copy to the host", "page-locked copy from the host"
    return [
        Row.beside(group, "snapshot, to done", done, to, out, note=f"{rate / sorted(done)[len(done) // 2]:.1f} GB/s"),
        Row.beside(group, "snapshot, call to done, idle device", whole, to, out),
        Row.beside(
            group, "rollback", restored, fro, back, note=f"{rate / sorted(restored)[len(restored) // 2]:.1f} GB/s"
        ),
    ]


def judging(work: Workload, rounds: int, tick: Callable[[], None]) -> list[Row]:
    """Observe and judge one step: loss, gradients and weights, beside one read of as many numbers."""
    clock = Clock(work.device)
    weights = sum(parameter.numel() for parameter in work.model.parameters())
    floor = ReadFloor(clock, 2 * weights)
    loss = work.backward()
    held: list[float] = []
    device: list[float] = []
    read: list[float] = []
    config = GovernorConfig(probation=0, slots=2, host_slots=0)
    with quiet(), TolariaGovernor(work.model, work.optimizer, config=config) as governor:

        def watch() -> None:
            governor.observe(loss=loss)

        for number in range(WARM_UPS + rounds):
            values = (floor.read_ms(), clock.host_ms(watch)[0], clock.device_ms(watch))
            if number >= WARM_UPS:
                for column, value in zip((read, held, device), values, strict=True):
                    column.append(value)
                tick()
    work.optimizer.zero_grad(set_to_none=True)
    against = "one read of gradients and weights"
    if not clock.is_queued:
        return [Row.beside("judgement", "observe and judge", held, against, read)]
    return [
        _held("judgement", held, 2 * len(list(work.model.parameters()))),
        Row.beside("judgement", "on the device", device, against, read),
    ]


def name_of(device: torch.device) -> str:
    """What people call it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
