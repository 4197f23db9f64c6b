"""Feeds the race oracle from a schedule of the model checker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tolaria.gate import GateState
from tolaria.operations import (
    Await,
    CallerWait,
    CaptureHost,
    Change,
    ContextRecord,
    ContextWait,
    Copy,
    HostWait,
    Inspect,
    KnownRecord,
    KnownWait,
    ReadLive,
    RestoreHost,
    StreamRecord,
    StreamWait,
    Synchronize,
    Transfer,
    TransferRecord,
)
from tolaria.testing import timeline
from tolaria.testing.races import Ledger, Race, Range
from tolaria.testing.simulator import Machine
from tolaria.testing.world import HOST, OWN, SECOND, Fused, Handover, Launch, Record, Step, WaitFor, World

_BYTES = 8  # of a variable, so that ranges are what they are on a device
_GATE = ("submissions", "sections")


def races_in(machine: Machine, steps: Sequence[Step]) -> list[Race]:
    """The races of a schedule: pairs of accesses that were ordered by nothing, torn or not.

    What a device does is told when it is launched; its own steps add nothing. Users that share the gate may race with
    each other, which is theirs to avoid.

    Args:
        machine: What the schedule is of.
        steps: The schedule, as `explorer.explore` or `explorer.follow` answer it.
    """
    ledger, before = Ledger(), machine.start()
    for step in steps:
        if step.actor.startswith("T") and step.note not in ("dropped", "fails", "recorded"):
            _tell(ledger, machine, before, step)
        before = step.after
    return ledger.races


def _tell(ledger: Ledger, machine: Machine, before: World, step: Step) -> None:
    op, thread, number = step.op, step.actor, int(step.actor[1:])
    if isinstance(op, Change | Await):
        tell_gate(ledger, thread, number, before.host.gate, step.after.host.gate)
    elif isinstance(op, Launch | Fused):
        for launch in op.launches if isinstance(op, Fused) else (op,):
            _tell_access(ledger, machine, thread, launch.stream, [machine.device.item(before, number, launch)], step)
    elif isinstance(op, Copy | CaptureHost | RestoreHost):
        items = machine.device.copies(before, op)
        if isinstance(op, Copy) and (not machine.streams or op.device == HOST):
            # a copy in its caller is told part by part; the last step of it does nothing
            items = items[before.partial[number] : before.partial[number] + 1]
            _tell_access(ledger, machine, thread, "", items, step)
        else:
            _tell_access(ledger, machine, thread, OWN, items, step)
    elif isinstance(op, ReadLive):
        _tell_reading(ledger, machine, before, step)
    elif isinstance(op, Transfer):
        _tell_transfer(ledger, machine, before, step)
    elif isinstance(op, Inspect):
        if op.at_rest and step.note in machine.variables:  # what was drained is read by its thread, part by part
            where: Range = (f"slot {op.slot}", machine.variables.index(step.note) * _BYTES, _BYTES)
            ledger.did(thread, reads=[where], what=f"{thread}: {timeline.describe(step)}")
    else:
        _tell_order(ledger, machine, before, step)


def _tell_reading(ledger: Ledger, machine: Machine, before: World, step: Step) -> None:
    """Of restored storages: what is enqueued by the first step of it, the rest by its caller, part by part."""
    done = before.partial[int(step.actor[1:])]
    queued, here = machine.device.looks(step.after, step.op)
    if not done and queued:
        _tell_access(ledger, machine, step.actor, OWN, queued, step)
    elif done:
        _tell_access(ledger, machine, step.actor, "", here[done - 1 : done], step)


def _tell_transfer(ledger: Ledger, machine: Machine, before: World, step: Step) -> None:
    op, number = step.op, int(step.actor[1:])
    if before.partial[number]:
        ledger.synchronized(step.actor)
        return
    stream = SECOND if SECOND in machine.streams else OWN
    if stream == SECOND and not machine.faults.overtaking:
        ledger.recorded(("transfer", op), OWN)
        ledger.waited(stream, ("transfer", op))
    items = [("transfer", op.source, op.target, index) for index in range(len(machine.variables))]
    _tell_access(ledger, machine, step.actor, stream, items, step)
    for _, event in step.after.progress[number].history[-1] if stream == SECOND else ():
        ledger.recorded((event,), stream)


def _tell_order(ledger: Ledger, machine: Machine, before: World, step: Step) -> None:
    op, thread, number = step.op, step.actor, int(step.actor[1:])
    answer = step.after.progress[number].history[-1:]
    if isinstance(op, ContextRecord):
        ledger.recorded_all(answer)
    elif isinstance(op, StreamRecord | Record | KnownRecord):
        ledger.recorded(answer, OWN if isinstance(op, StreamRecord) else op.stream)
    elif isinstance(op, TransferRecord):
        if SECOND in machine.streams:
            ledger.recorded(answer, SECOND)
    elif isinstance(op, ContextWait):
        ledger.waited_all((op.event,))
    elif isinstance(op, StreamWait | WaitFor | KnownWait):
        ledger.waited(OWN if isinstance(op, StreamWait) else op.stream, (op.event,))
    elif isinstance(op, CallerWait) and machine.homes and machine.homes[number] and not before.is_capturing(number):
        ledger.waited(machine.homes[number], (op.event,))
    elif isinstance(op, HostWait):
        ledger.host_waited(thread, (op.event,))
    elif isinstance(op, Synchronize):
        ledger.synchronized(thread)
    elif isinstance(op, Handover) and machine.streams:
        ledger.recorded(("handover", op), op.source)
        ledger.waited(op.target, ("handover", op))


def tell_gate(ledger: Ledger, thread: str, number: int, before: GateState, after: GateState) -> None:
    """Tell of one change of the gate by a thread. Sections are ordered with submissions, not with each other.

    Args:
        ledger: Who is told.
        thread: The thread's name there.
        number: Its number in the gate.
        before: The gate before the change.
        after: And after it.
    """
    submissions, sections = _GATE
    if after.depth(number) and not before.depth(number):
        ledger.acquired(thread, submissions)
    if after.owner == number != before.owner:
        ledger.acquired(thread, submissions)
        ledger.acquired(thread, sections)
    if before.depth(number) and not after.depth(number):
        ledger.released(thread, sections)
    if before.owner == number != after.owner:
        ledger.released(thread, submissions)


def _tell_access(
    ledger: Ledger, machine: Machine, thread: str, stream: str, items: Sequence[tuple[Any, ...]], step: Step
) -> None:
    reads: list[Range] = []
    writes: list[Range] = []
    for item in items:
        kind = item[0]
        if kind in ("write", "read"):
            (writes if kind == "write" else reads).append(("memory", item[1] * _BYTES, _BYTES))
        elif kind == "look":
            reads.append(("memory", item[3] * _BYTES, _BYTES))
        elif kind == "transfer":
            reads.append((f"slot {item[1]}", item[3] * _BYTES, _BYTES))
            writes.append((f"slot {item[2]}", item[3] * _BYTES, _BYTES))
        else:
            _, slot, index, cell = item[:4]
            live: Range = ("memory", cell * _BYTES, _BYTES)
            held: Range = (f"slot {slot}", index * _BYTES, _BYTES)
            reads.append(live if kind == "capture" else held)
            writes.append(held if kind == "capture" else live)
    what = f"{step.actor}: {timeline.describe(step)}"
    if stream and machine.streams:
        ledger.launched(thread, stream, reads, writes, what)
    else:
        ledger.did(thread, reads, writes, what)
