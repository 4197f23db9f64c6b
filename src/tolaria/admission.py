"""Who may come in: sections, graph captures and submissions, as protocols. Sans-I/O, like `protocol`.

Sections share the gate; a submission (snapshot or rollback) has it for itself; a graph capture keeps submissions out
altogether, because any barrier would invalidate it.
"""

from __future__ import annotations

from dataclasses import replace
from enum import Enum

from tolaria import gate
from tolaria.errors import CaptureInProgress
from tolaria.gate import ThreadId
from tolaria.operations import (
    Await,
    CallerWait,
    Change,
    ContextWait,
    Events,
    HostState,
    HostWait,
    Protocol,
    SectionKind,
)

# ---------------------------------------------------------------- sections


def open_section(thread: ThreadId, kind: SectionKind, in_autograd: bool, timeout_s: float | None = None) -> Protocol:
    """Open a section for `thread`; what it launches waits for copies that still read what the section may write.

    Returns:
        The epoch in which the section runs.
    """

    def enter(state: HostState) -> tuple[HostState, tuple[int, Events, _Wait]] | None:
        # a submission that waits for a capture to end keeps nobody out: the capture's own sections would wait for it
        entered = gate.enter_section(state.gate, thread, in_autograd or bool(state.captures))
        if entered is None:
            return None
        pending = {
            SectionKind.READ: (),
            SectionKind.FORWARD: state.buffers_done,
            SectionKind.WRITE: state.all_done,
            SectionKind.FOREIGN: state.all_done,
        }[kind]
        wait = _how_to_wait(state, thread, kind) if pending else _Wait.CALLER
        ordering = state.ordering + (wait is _Wait.CONTEXT)
        return replace(state, gate=entered, ordering=ordering), (state.epoch, pending, wait)

    (epoch, pending, wait), _ = yield Await(f"open a {kind.value} section", enter, timeout_s)
    if wait is _Wait.CONTEXT:
        yield from _order_everything(pending)
    for device, event in pending:
        if wait is _Wait.CALLER:
            yield CallerWait(device, event)
        elif wait is _Wait.HOST:
            yield HostWait(device, event)
    return epoch


class _Wait(Enum):
    """Who waits for the copies of a snapshot."""

    CALLER = "the caller's current stream"
    CONTEXT = "every stream"
    HOST = "the host"


def _how_to_wait(state: HostState, thread: ThreadId, kind: SectionKind) -> _Wait:
    if kind is not SectionKind.FOREIGN or any(capturing == thread for _, capturing in state.captures):
        return _Wait.CALLER
    # it may launch on streams that we do not know. A context-wide wait would invalidate the capture of another thread
    return _Wait.HOST if state.captures else _Wait.CONTEXT


def wait_everywhere(events: Events) -> Protocol:
    """Make all later work on any stream of their devices wait for the events. No graph capture may be in progress."""
    for device, _ in events:
        for _, event in events:
            yield ContextWait(device, event)


def _order_everything(pending: Events) -> Protocol:
    waited = False
    try:
        yield from wait_everywhere(pending)
        waited = True
    finally:

        def ordered(state: HostState, done: bool = waited) -> tuple[HostState, None]:
            if done and state.all_done == pending:  # from here on everything waits by itself
                state = replace(state, buffers_done=(), all_done=())
            return replace(state, ordering=state.ordering - 1), None

        yield Change("everything waits", ordered)


def close_section(thread: ThreadId, to_depth: int) -> Protocol:
    """Close sections of `thread` until `to_depth` are left open."""
    yield Change("close a section", lambda s: (replace(s, gate=gate.leave_section(s.gate, thread, to_depth)), None))


# ---------------------------------------------------------------- graph captures


def begin_capture(thread: ThreadId, token: int, in_autograd: bool, timeout_s: float | None = None) -> Protocol:
    """Announce a graph capture of `thread`. Until `end_capture` no snapshot or rollback touches a device.

    Its stream waits now for copies that still read governed memory: inside the capture it could not any more, because
    waiting for work outside of a capture invalidates it.
    """

    def enter(state: HostState) -> tuple[HostState, Events] | None:
        # behind a submission that waits for sections, unless that submission waits for this very thread
        if state.ordering or gate.enter_section(state.gate, thread, in_autograd or bool(state.captures)) is None:
            return None
        return replace(state, captures=(*state.captures, (token, thread))), state.all_done

    pending, _ = yield Await("begin a graph capture", enter, timeout_s)
    try:
        for device, event in pending:
            yield CallerWait(device, event)
    except BaseException:
        yield from end_capture(token)
        raise


def end_capture(token: int) -> Protocol:
    """The capture is over, or never began. Idempotent."""

    def leave(state: HostState) -> tuple[HostState, None]:
        return replace(state, captures=tuple(pair for pair in state.captures if pair[0] != token)), None

    yield Change("end a graph capture", leave)


def refuse_in_capture(state: HostState, thread: ThreadId, doing: str, patient: bool) -> None:
    """Raise `CaptureInProgress` while there is a graph capture; if `patient` only for one of this very thread."""
    if state.captures and (not patient or any(capturing == thread for _, capturing in state.captures)):
        raise CaptureInProgress(
            doing,
            f"{len(state.captures)} graph capture(s) are in progress, and any barrier would invalidate them",
            'Call it after capture_end, or pass when="boundary".',
        )


# ---------------------------------------------------------------- the exclusive side


def announce_exclusive(state: HostState, thread: ThreadId, doing: str, patient: bool) -> HostState:
    """A snapshot or rollback wants in: new sections queue behind it.

    Raises:
        CaptureInProgress: A graph capture is in progress, and the request does not wait (`patient`) or never could.
        PhaseError: See `gate.announce_exclusive`.
    """
    refuse_in_capture(state, thread, doing, patient)
    return replace(state, gate=gate.announce_exclusive(state.gate, thread, doing))


def announce(thread: ThreadId, doing: str, patient: bool) -> Change:
    """Outside of the `try` that withdraws it: a refused call of the owner must not open the gate of the outer one."""
    return Change("announce", lambda state: (announce_exclusive(state, thread, doing, patient), None))


def enter_exclusive(thread: ThreadId, timeout_s: float | None, doing: str, patient: bool) -> Protocol:
    """Wait until every section is closed. Answers the seconds waited."""

    def enter(state: HostState) -> tuple[HostState, None] | None:
        # a capture may have begun inside a section that was open when we announced: waiting for it could last for ever
        refuse_in_capture(state, thread, doing, patient)
        if state.captures:
            return None
        entered = gate.enter_exclusive(state.gate, thread)
        return None if entered is None else (replace(state, gate=entered), None)

    _, waited_s = yield Await(f"{doing}: wait for open sections", enter, timeout_s)
    return waited_s


def leave_exclusive(thread: ThreadId) -> Change:
    """Open the gate again, or withdraw the announcement. Idempotent."""
    return Change("leave", lambda s: (replace(s, gate=gate.leave_exclusive(s.gate, thread)), None))
