"""Mutants of the `streams` barrier: which streams are known, and whom they wait for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tolaria.operations import (
    Await,
    Barrier,
    CallerStreams,
    Change,
    HostState,
    KnownRecord,
    KnownWait,
    StreamWait,
    TransferRecord,
)
from tolaria.testing.alter import asking, changing, delayed, skipping
from tolaria.testing.edges import dropping, mutant, without_change
from tolaria.testing.scenarios import Removal, alters
from tolaria.testing.world import Launch, Program


def _waits_for_nobody(program: Program) -> Program:
    return skipping(program, lambda op: isinstance(op, KnownWait))


def _known_before_it_waits(program: Program) -> Program:
    return delayed(program, KnownWait, lambda op: isinstance(op, Launch))


def _without_callers(op: Any) -> Any:
    """A submission does not ask which stream is current where it was called."""
    return Change("ask nobody", lambda s: (s, ())) if isinstance(op, CallerStreams) else op


def _forgets_where_work_ends(op: Any, state: HostState) -> Any:
    after, result = op.function(state)
    return replace(after, latest=state.latest), result


def _hides_captures(state: HostState) -> HostState:
    return replace(state, captures=())


def _begins_at_once(op: Any) -> Any:
    """A capture does not ask who makes which stream wait."""
    if not (isinstance(op, Await) and op.label == "begin a graph capture"):
        return op

    def function(state: HostState) -> Any:
        answer = op.function(replace(state, ordering=0))
        return None if answer is None else (replace(answer[0], ordering=state.ordering), answer[1])

    return Await(op.label, function, op.timeout_s)


STREAMS = Barrier.STREAMS
_CAPTURED = "a named stream that is captured"
_SPOILED = ("capture invalidated",)
KNOWN = [
    mutant("known streams, pre barrier", "No event covers their work.", "one writer", dropping(KnownRecord), STREAMS),
    mutant(
        "known streams, pre barrier (the copies' wait)",
        "R does not wait for it.",
        "one writer",
        dropping(StreamWait),
        STREAMS,
    ),
    mutant(
        "known streams, post barrier",
        "They do not wait for the copies.",
        "a step and the next forward",
        Removal(governs=_waits_for_nobody),
        STREAMS,
    ),
    mutant("a stream becomes known", "It does not.", "one writer", without_change("streams become known"), STREAMS),
    mutant(
        "a stream that becomes known waits",
        "For nobody, although it was not there when the barrier was.",
        "one reader",
        Removal(uses=_waits_for_nobody),
        STREAMS,
    ),
    mutant(
        "a stream is known when it has waited",
        "It is known before, and a section of another thread takes it for one that has.",
        "one stream of two threads",
        Removal(uses=_known_before_it_waits),
        STREAMS,
    ),
    mutant(
        "a stream that is named waits",
        "It does not.",
        "a stream that a reader names",
        Removal(uses=_waits_for_nobody),
        STREAMS,
    ),
    mutant(
        "known streams wait for `done`",
        "They do not.",
        "a snapshot and the next step",
        Removal(uses=_waits_for_nobody),
        STREAMS,
    ),
    mutant(
        "what streams that become known wait for (rollback)",
        "It is not noted.",
        "one reader",
        without_change("streams that become known wait"),
        STREAMS,
    ),
    mutant(
        "what streams that become known wait for (snapshot)",
        "It is not noted.",
        "a snapshot and the next step",
        Removal(governs=alters(changing("publish", _forgets_where_work_ends))),
        STREAMS,
    ),
    mutant(
        "what streams that become known wait for (reading back)",
        "It is not noted.",
        "reading back beside a writer",
        Removal(governs=alters(changing("commit", _forgets_where_work_ends))),
        STREAMS,
    ),
    mutant(
        "the caller's own stream",
        "A submission does not ask for it.",
        "work of the caller",
        Removal(governs=alters(_without_callers)),
        STREAMS,
    ),
    mutant(
        "a transfer that was given up",
        "A snapshot is copied into a slot that it still writes to.",
        "draining that fails",
        dropping(TransferRecord),
        STREAMS,
    ),
    mutant(
        "the host waits where a stream is captured",
        "The stream itself is told to wait.",
        _CAPTURED,
        Removal(uses=alters(asking("open a", _hides_captures))),
        STREAMS,
        kinds=_SPOILED,
    ),
    mutant(
        "a capture waits while streams are told to wait",
        "It begins meanwhile.",
        _CAPTURED,
        Removal(uses=alters(_begins_at_once)),
        STREAMS,
        kinds=_SPOILED,
    ),
]
