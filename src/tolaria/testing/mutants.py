"""The protocol with one edge removed: every mutant must be caught by a scenario that is sound without it.

A mutant changes what the shipped generators ask for, or how it is performed; never a copy of their source.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tolaria import ring
from tolaria.gate import GateState
from tolaria.operations import (
    Await,
    Barrier,
    CallerWait,
    CaptureHost,
    Change,
    ContextRecord,
    ContextWait,
    Examine,
    HostState,
    HostWait,
    RestoreHost,
    StreamWait,
    Synchronize,
)
from tolaria.ring import Slot, SlotPhase
from tolaria.testing.alter import altered, asking, blind_to_captures, changing, delayed, skipping, ungated
from tolaria.testing.background_mutants import BACKGROUND
from tolaria.testing.edges import EdgeMutant, dropping, mutant, without_change
from tolaria.testing.known_mutants import KNOWN
from tolaria.testing.scenarios import CONTEXT_ONLY, QUEUES, Faults, Removal, alters
from tolaria.testing.world import Program

HOST, BLOCKING, CONTEXT = Barrier.HOST, Barrier.BLOCKING, Barrier.CONTEXT
FIRST, LAST = 0, 1  # of the two times that a blocking submission waits for the device


def without_wait(number: int) -> Removal:
    """A governor that leaves out one of its device-wide waits."""
    return Removal(governs=lambda program: skipping(program, lambda op: isinstance(op, Synchronize), number))


def _is_exclusive(op: Any) -> bool:
    return isinstance(op, Await) and "wait for open sections" in op.label


def _is_commit(op: Any) -> bool:
    return isinstance(op, Change) and op.label == "commit"


def _is_publish(op: Any) -> bool:
    return isinstance(op, Examine) or getattr(op, "label", "") == "publish"


def _claims_the_first(op: Any, state: HostState) -> Any:
    """Slots do not take turns: the first is always overwritten."""
    others = tuple(replace(slot, readers=slot.readers + 1) for slot in state.ring[1:])
    after, result = op.function(replace(state, ring=(Slot(0), *others)))
    return replace(after, ring=(after.ring[0], *state.ring[1:])), result


def _published_at_once(op: Any, state: HostState) -> Any:
    after, (index, serial) = op.function(state)
    return replace(after, ring=ring.publish(after.ring, index)), (index, serial)


def _any_readable(op: Any, state: HostState) -> Any:
    """An automatic snapshot is a target as soon as it is staged, finite or not."""
    readable = [slot for slot in state.ring if slot.phase in (*ring.READABLE, SlotPhase.FREE) and slot.snapshot >= 0]
    newest = max(readable, key=lambda slot: slot.snapshot)
    hidden = tuple(replace(s, phase=SlotPhase.CERTIFIED) if s == newest else s for s in state.ring)
    after, chosen = op.function(replace(state, ring=hidden))
    pinned = tuple(replace(s, readers=h.readers) for s, h in zip(state.ring, after.ring, strict=True))
    return replace(after, ring=pinned), chosen


def _settles_anyway(op: Any, state: HostState) -> Any:
    """A snapshot that is not finite is kept."""
    after, result = op.function(state)
    return replace(after, ring=state.ring), result


def _without_epoch(op: Any, state: HostState) -> Any:
    after, epoch = op.function(state)
    return replace(after, epoch=state.epoch), epoch


def _forgets_at_commit(op: Any, state: HostState) -> Any:
    after, epoch = op.function(state)
    return replace(after, grad_epoch=None), epoch


def _keeps_newer(op: Any, state: HostState) -> Any:
    after, epoch = op.function(state)
    return replace(after, ring=state.ring), epoch


def _taken_for_granted(op: Any, state: HostState) -> Any:
    """After the wait for the gate, a verified choice is restored whatever has become of it."""
    after, slot = op.function(state)
    return (after, slot) if slot is not None else (state, replace(state.ring[1], snapshot=1))


def _unpinned(op: Any) -> Any:
    """`seal` holds its slot against nobody."""
    if isinstance(op, Change) and op.label == "pin":
        return Change(op.label, lambda s: (s, op.function(s)[1]))
    return Change(op.label, lambda s: (s, None)) if isinstance(op, Change) and op.label == "unpin" else op


def _settles_whatever(op: Any) -> Any:
    """`seal` settles whatever the slot holds by now."""
    if not (isinstance(op, Change) and op.label in ("pin", "settle")):
        return op

    def function(state: HostState) -> Any:
        if op.label == "pin":
            return replace(state, ring=ring.pin(state.ring, 1, 1)), True
        return replace(state, ring=ring.seal(state.ring, 1, state.ring[1].snapshot)), None

    return Change(op.label, function)


def _late_examined(program: Program) -> Program:
    return delayed(program, Examine, lambda op: isinstance(op, Change) and op.label == "pin")


def _hides_captures(state: HostState) -> HostState:
    return replace(state, captures=())


def _hides_gate(state: HostState) -> HostState:
    return replace(state, gate=GateState())


def _queues_like_any_other(op: Any) -> Any:
    """Sections opened inside autograd wait for a rollback that waits."""
    if not (isinstance(op, Await) and op.label.startswith("open a")):
        return op

    def function(state: HostState) -> Any:
        return None if state.gate.waiting and not state.captures else op.function(state)

    return Await(op.label, function, op.timeout_s)


_EXCLUSIVE = Removal(drop=_is_exclusive)
_DELAYS = Removal(governs=lambda program: delayed(program, RestoreHost, _is_commit))
_BARRIERS_AND_GATE = [
    mutant("pre barrier", "No event covers the work of before.", "one writer", dropping(ContextRecord), CONTEXT),
    mutant("pre barrier (the copies' wait)", "R does not wait for it.", "one writer", dropping(StreamWait), CONTEXT),
    mutant("pre barrier (blocking)", "No wait before the copies.", "one writer", without_wait(FIRST), BLOCKING),
    mutant("post barrier", "Nobody waits for the copies.", "one writer", dropping(ContextWait), CONTEXT),
    mutant("post barrier (reader)", "Nobody waits for them.", "one reader", dropping(ContextWait), CONTEXT),
    mutant("post barrier (blocking)", "No wait after the copies.", "one writer", without_wait(LAST), BLOCKING),
    mutant("gate, shared side", "Steps ask nobody.", "one writer", Removal(uses=alters(ungated)), *Barrier),
    mutant(
        "gate, shared side (one launch)",
        "A fused step slips between the two barriers.",
        "one fused writer",
        Removal(uses=alters(ungated)),
        *QUEUES,
    ),
    mutant("gate, shared side (reader)", "Forwards ask nobody.", "one reader", Removal(uses=alters(ungated)), *Barrier),
    mutant("gate, exclusive side", "A rollback waits for nobody.", "one writer", _EXCLUSIVE, *Barrier),
    mutant(
        "gate, exclusive side (snapshot)",
        "A snapshot waits for nobody.",
        "a snapshot and the next step",
        _EXCLUSIVE,
        HOST,
        CONTEXT,
    ),
    mutant(
        "gate, two owners",
        "A rollback does not ask whether a snapshot is being taken.",
        "a rollback during a snapshot",
        _EXCLUSIVE,
        HOST,
        kinds=("torn", "left behind", "raised"),
    ),
    mutant(
        "gate, opened again",
        "The gate stays closed after a submission.",
        "one writer",
        without_change("leave"),
        *Barrier,
        kinds=("deadlock", "left behind"),
    ),
    mutant(
        "gate, sections of autograd",
        "An engine thread queues behind a rollback that waits for the section that waits for it.",
        "an engine thread",
        Removal(uses=alters(_queues_like_any_other)),
        *Barrier,
        kinds=("deadlock",),
    ),
    mutant("host state inside the barrier", "Loaded behind it.", "an extra: rollback", _DELAYS, *QUEUES),
    mutant(
        "host state before `done`",
        "What `state_dict` clones is read behind the end of the copies.",
        "an extra: snapshot",
        Removal(governs=lambda program: delayed(program, CaptureHost, _is_publish)),
        *QUEUES,
    ),
    mutant(
        "transfers of page-locked memory",
        "The host does not wait for them.",
        "page-locked memory: rollback",
        dropping(HostWait),
        CONTEXT,
    ),
    mutant(
        "transfers of page-locked memory (snapshot)",
        "The host does not wait for them.",
        "page-locked memory: snapshot",
        dropping(HostWait),
        CONTEXT,
    ),
]


_ROTATION = Removal(governs=alters(changing("claim a slot", _claims_the_first)))
_EARLY = Removal(governs=alters(changing("claim a slot", _published_at_once)))
_STAGED = Removal(
    governs=lambda program: altered(
        altered(program, changing("settle", _settles_anyway)), changing("choose a snapshot", _any_readable)
    )
)
_GRANTED = Removal(governs=alters(changing("choose a snapshot", _taken_for_granted)))
_NEXT_STEP, _REUSE = "a snapshot and the next step", "slot reuse"
_SLOTS = [
    mutant(
        "forwards wait for the copies of buffers",
        "They do not.",
        "a snapshot of buffers",
        dropping(CallerWait),
        CONTEXT,
    ),
    mutant("writers wait for `done`", "They do not.", _NEXT_STEP, dropping(CallerWait), CONTEXT),
    mutant(
        "writers on any stream wait for `done`",
        "They do not.",
        "a snapshot and a writer on any stream",
        dropping(ContextWait),
        CONTEXT,
    ),
    mutant(
        "slot rotation", "One slot for all.", "a rollback during a snapshot", _ROTATION, *Barrier, kinds=("raised",)
    ),
    mutant(
        "slot rotation (certified)",
        "The last good snapshot is overwritten.",
        "three snapshots for three slots",
        _ROTATION,
        HOST,
    ),
    mutant(
        "publish after the copies",
        "A slot may be chosen before its copies are ordered.",
        "a manual snapshot beside a verified rollback",
        _EARLY,
        *Barrier,
        kinds=("misread", "torn"),
    ),
    mutant(
        "publish after seal",
        "An automatic snapshot is a target before it was found finite.",
        "a snapshot that is not finite",
        _STAGED,
        *Barrier,
    ),
    mutant(
        "read behind the copies",
        "A slot is read later.",
        _REUSE,
        Removal(governs=_late_examined),
        CONTEXT,
        kinds=("misread",),
    ),
    mutant(
        "slot held while read",
        "Not pinned.",
        _REUSE,
        Removal(governs=alters(_unpinned)),
        CONTEXT,
        kinds=("misread",),
    ),
    mutant(
        "serial number of a slot",
        "`seal` settles whatever the slot holds by now.",
        "sealing beside a rollback",
        Removal(governs=alters(_settles_whatever)),
        CONTEXT,
        kinds=("misread",),
    ),
    mutant("choice made again", "A dropped choice is restored.", "a dropped choice", _GRANTED, *Barrier),
    mutant(
        "slot given up after a failure",
        "It stays claimed for ever.",
        "a snapshot that fails",
        without_change("give the slot up"),
        *Barrier,
        kinds=("left behind",),
    ),
    mutant(
        "digest check",
        "Every digest is right.",
        "a corrupted snapshot",
        Removal(faults=Faults(trusting=True)),
        *Barrier,
        kinds=("torn", "misread"),
    ),
    mutant(
        "newer snapshots dropped",
        "A rollback keeps snapshots of the future it gave up.",
        "a rollback after one that went further back",
        Removal(governs=alters(changing("commit", _keeps_newer))),
        *Barrier,
    ),
]


_STRADDLING = "a forward that straddles a rollback"
_TRAIN_STATE = [
    mutant(
        "validation",
        "Bytes go back to memory that no parameter lives in any more.",
        "moved storage",
        Removal(faults=Faults(blind=True)),
        *Barrier,
    ),
    mutant(
        "validation (freed storage)",
        "Bytes go back to memory that belongs to somebody else by now.",
        "storage freed beside a rollback",
        Removal(faults=Faults(blind=True, unreferenced=True)),
        *Barrier,
        kinds=("overwritten",),
    ),
    mutant(
        "references until done",
        "Memory under a copy is given to somebody else.",
        "storage freed under a copy",
        Removal(faults=Faults(unreferenced=True)),
        CONTEXT,
    ),
    mutant(
        "version bump",
        "A backward over a graph from before a rollback reads restored weights.",
        "a backward over an old graph",
        Removal(faults=Faults(unbumped=True)),
        *Barrier,
    ),
    mutant(
        "epoch",
        "Gradients of before are taken for gradients of now.",
        _STRADDLING,
        Removal(governs=alters(changing("commit", _without_epoch))),
        *Barrier,
    ),
    mutant(
        "gradients forgotten before they are dropped",
        "A backward that ends in between is forgotten, its gradients are not.",
        _STRADDLING,
        Removal(governs=alters(changing("commit", _forgets_at_commit))),
        *Barrier,
    ),
    mutant(
        "torn step marked",
        "A step that raises half-way leaves no trace.",
        "an exception inside a step",
        without_change("mark the step as torn"),
        *Barrier,
    ),
    mutant(
        "torn rollback marked",
        "A rollback that fails half-way leaves no trace.",
        "a rollback that fails",
        without_change("mark the train state as torn"),
        *Barrier,
    ),
]


_SPOILED = ("capture invalidated",)
_BLIND = Removal(governs=alters(blind_to_captures))
_LATE = Removal(governs=alters(asking("wait for open sections", _hides_captures)))
_HASTY = Removal(uses=alters(asking("begin a graph capture", _hides_gate)))
_BY_HAND, _AUTOMATIC = "a rollback by hand during a capture", "an automatic rollback during a capture"
_BEGINS, _OUTLIVES = "a capture that begins under the copies", "a section that outlives its capture"
_CARELESS = Removal(faults=Faults(careless=True))
_CAPTURES = [
    mutant("capture guard", "A rollback does not ask.", _BY_HAND, _BLIND, *QUEUES, kinds=_SPOILED),
    mutant(
        "capture guard (snapshot)",
        "A snapshot does not ask.",
        "a snapshot during a capture",
        _BLIND,
        *QUEUES,
        kinds=_SPOILED,
    ),
    mutant(
        "capture guard, second look",
        "A rollback asks when it is announced only.",
        "a capture inside an open section",
        _LATE,
        *QUEUES,
        kinds=_SPOILED,
    ),
    mutant(
        "capture waits for a submission",
        "It begins while one is under way.",
        _AUTOMATIC,
        _HASTY,
        *QUEUES,
        kinds=_SPOILED,
    ),
    mutant(
        "sections of a capture",
        "They queue behind the rollback that waits for the capture.",
        _AUTOMATIC,
        Removal(uses=alters(asking("open a", _hides_captures))),
        *QUEUES,
        kinds=("deadlock",),
    ),
    mutant("replay waits for copies", "Nor does its capture.", _BEGINS, dropping(CallerWait), *CONTEXT_ONLY),
    mutant("capture waits for copies", "It does not.", _OUTLIVES, dropping(CallerWait), *CONTEXT_ONLY),
    mutant("no wait inside a capture", "A device waits there.", _BEGINS, _CARELESS, *CONTEXT_ONLY, kinds=_SPOILED),
]


MUTANTS: dict[str, EdgeMutant] = {
    one.name: one for one in (*_BARRIERS_AND_GATE, *_SLOTS, *_TRAIN_STATE, *_CAPTURES, *BACKGROUND, *KNOWN)
}
"""By name, in the order of the table."""
