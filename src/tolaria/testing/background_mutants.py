"""Mutants of work that goes on behind a submission: reading back what was restored, and draining."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tolaria import ring
from tolaria.operations import Await, Barrier, Change, HostState, HostWait, Part, ReadLive, StreamRecord
from tolaria.ring import SlotPhase, Tier
from tolaria.testing.alter import asking, changing, unfollowed
from tolaria.testing.edges import dropping, mutant, without_change
from tolaria.testing.scenarios import QUEUES, Faults, Removal, alters


def _hides_captures(state: HostState) -> HostState:
    return replace(state, captures=())


def _source_not_pinned(op: Any) -> Any:
    """A transfer holds its source, the first slot, against nobody."""
    if not (isinstance(op, Change) and op.label in ("claim for draining", "drained", "give a transfer up")):
        return op

    def function(state: HostState) -> Any:
        if op.label != "claim for draining":
            return op.function(replace(state, ring=ring.pin(state.ring, 0, 1)))
        after, target = op.function(state)
        return (after if target is None else replace(after, ring=ring.pin(after.ring, 0, -1))), target

    return Change(op.label, function)


def _kept_anyway(op: Any, state: HostState) -> Any:
    """A transfer certifies its target, whatever has become of its source."""
    after, result = op.function(state)
    (target,) = (slot for slot in state.ring if slot.phase is SlotPhase.FILLING and slot.tier is Tier.HOST)
    kept = replace(target, phase=SlotPhase.CERTIFIED)
    return replace(after, ring=tuple(kept if slot.index == kept.index else slot for slot in after.ring)), result


def _begins_at_once(op: Any) -> Any:
    """A capture does not ask who is doing to the device what would invalidate it."""
    if not (isinstance(op, Await) and op.label == "begin a graph capture"):
        return op

    def function(state: HostState) -> Any:
        answer = op.function(replace(state, ordering=0))
        return None if answer is None else (replace(answer[0], ordering=state.ordering), answer[1])

    return Await(op.label, function, op.timeout_s)


_WAITS = "draining a snapshot: wait for graph captures"
_FIRST_EVENT = Removal(governs=lambda program: unfollowed(program, ReadLive(0, Part.BUFFERS), StreamRecord))
_LAST_EVENT = Removal(governs=lambda program: unfollowed(program, ReadLive(0, Part.REST), StreamRecord))
_READ_BACK, _DRAIN = "reading back beside a writer", "draining beside a capture"
BACKGROUND = [
    mutant(
        "forwards wait until buffers were read back",
        "One that writes buffers overtakes the reading, and is reported as a stranger.",
        "reading back beside a forward",
        _FIRST_EVENT,
        Barrier.CONTEXT,
    ),
    mutant(
        "writers wait until all was read back",
        "A step overtakes the reading.",
        _READ_BACK,
        _LAST_EVENT,
        Barrier.CONTEXT,
    ),
    mutant(
        "what was read back is compared",
        "Whatever was found is right.",
        "reading back beside an unregistered writer",
        Removal(faults=Faults(trusting=True)),
        *Barrier,
    ),
    mutant(
        "source of a transfer held",
        "Not pinned: a snapshot overwrites what is draining.",
        "draining beside a snapshot that wants the slot",
        Removal(governs=alters(_source_not_pinned)),
        *QUEUES,
        kinds=("torn", "misread"),
    ),
    mutant(
        "drained when the transfer is over",
        "Nobody waits for it.",
        "draining beside a snapshot without another slot",
        dropping(HostWait),
        Barrier.CONTEXT,
        kinds=("misread",),
    ),
    mutant(
        "transfers behind the copies",
        "The second stream does not wait for the first: copies of a snapshot that failed overwrite what was drained.",
        "draining into a slot of a snapshot that failed",
        Removal(faults=Faults(overtaking=True)),
        Barrier.CONTEXT,
        kinds=("torn", "misread"),
    ),
    mutant(
        "a drained copy of an undone future",
        "It is kept.",
        "draining beside a rollback to an older snapshot",
        Removal(governs=alters(changing("drained", _kept_anyway))),
        *QUEUES,
    ),
    mutant(
        "a failed transfer given up",
        "Its slots stay held for ever.",
        "draining that fails",
        without_change("give a transfer up"),
        *QUEUES,
        kinds=("left behind", "torn"),
    ),
    mutant(
        "capture guard (draining)",
        "A transfer does not ask.",
        _DRAIN,
        Removal(governs=alters(asking(_WAITS, _hides_captures))),
        *QUEUES,
        kinds=("capture invalidated",),
    ),
    mutant(
        "capture waits for a transfer",
        "It begins while one is being prepared.",
        _DRAIN,
        Removal(uses=alters(_begins_at_once)),
        *QUEUES,
        kinds=("capture invalidated",),
    ),
]
"""In the order of the table."""
