"""A schedule as a picture: rows are threads and streams, columns are steps, and a line for each step below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tolaria.operations import (
    Await,
    CallerStreams,
    CallerWait,
    CaptureHost,
    Change,
    Check,
    ContextRecord,
    ContextWait,
    Copy,
    Examine,
    HostWait,
    Inspect,
    KnownRecord,
    KnownWait,
    Part,
    ReadLive,
    Reserve,
    RestoreHost,
    StreamRecord,
    StreamWait,
    Survey,
    Synchronize,
    Transfer,
    TransferRecord,
)
from tolaria.testing.world import (
    Allocate,
    CaptureBegins,
    CaptureEnds,
    Close,
    Ended,
    Fused,
    Handover,
    Launch,
    Open,
    Reassign,
    Record,
    Replay,
    Step,
    Version,
    WaitFor,
)

_COLUMNS = 40  # steps in one band of the picture

_PLAIN: dict[type[Any], str] = {
    Survey: "survey the train state",
    Reserve: "make room in slot {op.slot}",
    CaptureHost: "clone the host side into slot {op.slot}",
    RestoreHost: "put the host side back, bump version counters",
    Check: "compare the layout with slot {op.slot}",
    Examine: "enqueue the reading of slot {op.slot}",
    Inspect: "read slot {op.slot}",
    Transfer: "copy slot {op.source} into slot {op.target} on a second stream",
    ContextRecord: "record an event that covers all streams",
    ContextWait: "all streams wait for an event",
    StreamRecord: "record an event on R",
    StreamWait: "R waits for an event",
    CallerWait: "its own stream waits for the copies",
    CallerStreams: "look which stream is current",
    KnownRecord: "record an event on {op.stream}",
    KnownWait: "{op.stream} waits for an event",
    TransferRecord: "record an event behind the transfers",
    HostWait: "wait for an event",
    Synchronize: "wait until the device is idle",
    Record: "record an event on {op.stream}",
    WaitFor: "{op.stream} waits for an event",
    Handover: "{op.target} waits for {op.source}",
    CaptureBegins: "begin to capture graph {op.graph}",
    CaptureEnds: "end the capture",
    Replay: "replay graph {op.graph} on {op.stream}",
    Reassign: "put other memory behind {op.variable}, holding {op.value}",
    Allocate: "allocate memory and fill it with {op.value} on {op.stream}",
    Version: "look at the version counters",
    Close: "hold {op.stream} back",
    Open: "let held streams go on",
}


def draw(steps: Sequence[Step]) -> str:
    """The picture of a schedule, as text that ends without a newline. Empty for no steps."""
    if not steps:
        return ""
    actors = sorted({step.actor for step in steps}, key=lambda name: (not name.startswith("T"), name))
    width = max(map(len, actors))
    bands = []
    for first in range(0, len(steps), _COLUMNS):
        band = steps[first : first + _COLUMNS]
        for actor in actors:
            marks = "".join("#" if step.actor == actor else "." for step in band)
            bands.append(f"{actor:<{width}}  {marks}")
        if first + _COLUMNS < len(steps):
            bands.append("")
    lines = [f"{number:>3}  {step.actor:<{width}}  {describe(step)}" for number, step in enumerate(steps, 1)]
    return "\n".join((*bands, "", *lines))


def describe(step: Step) -> str:
    """One step in words."""
    op = step.op
    if step.actor.startswith("T"):
        words = _of_thread(op)
        return f"{words} ({step.note})" if step.note else words
    return _of_stream(op, step)


def _of_thread(op: Any) -> str:
    if isinstance(op, Change | Await):
        return op.label
    if isinstance(op, Ended):
        return op.how if op.how == "returned" else f"ends with {op.how}"
    if isinstance(op, Launch):
        on = f" on {op.stream}" if op.stream else ""
        return f"write {op.value} to {op.variable}{on}" if op.kind == "write" else f"read {op.variable}{on}"
    if isinstance(op, Fused):
        return "one launch: " + ", ".join(map(_of_thread, op.launches))
    if isinstance(op, Copy):
        part = "buffers" if op.part is Part.BUFFERS else "the rest"
        where = "" if op.device == "dev" else " (host memory)"
        return f"copy {part}, slot {op.slot}: {op.direction.value}{where}"
    if isinstance(op, ReadLive):
        return f"read back {'buffers' if op.part is Part.BUFFERS else 'the rest'}, as restored from slot {op.slot}"
    if isinstance(op, Inspect) and op.live:
        return f"compare what was read back with slot {op.slot}"
    return _PLAIN[type(op)].format(op=op)


def _of_stream(item: tuple[Any, ...], step: Step) -> str:
    kind = item[0]
    if kind == "write":
        return f"runs: write {item[2]} to cell {item[1]}"
    if kind == "read":
        return f"runs: read {item[2]}, finds {step.after.seen[-1][2]}"
    if kind == "gate":
        return "runs: is let through"
    if kind == "wait":
        return "runs: passes a wait"
    if kind == "capture":
        return f"runs: copy cell {item[3]} into slot {item[1]}, value {step.after.slots[item[1]][item[2]]}"
    if kind == "restore":
        return f"runs: copy slot {item[1]} back into cell {item[3]}, value {step.after.cells[item[3]]}"
    if kind == "examine":
        return f"runs: read slot {item[2]}, value {step.after.readings[item[1]][1][-1]}"
    if kind == "transfer":
        return f"runs: copy slot {item[1]} into slot {item[2]}, value {step.after.slots[item[2]][item[3]]}"
    return f"runs: read back cell {item[3]}, finds {step.after.cells[item[3]]}"
