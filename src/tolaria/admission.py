"""Who may come in: sections, graph captures and submissions, as protocols. Sans-I/O, like `protocol`.

Sections share the gate; a submission (snapshot or rollback) has it for itself; a graph capture keeps submissions out
altogether, because any barrier would invalidate it.
"""

from __future__ import annotations

from enum import Enum

from tolaria import gate
from tolaria.errors import CaptureInProgress
from tolaria.gate import ThreadId
from tolaria.operations import (
    Await,
    CallerStreams,
    CallerWait,
    Change,
    ContextWait,
    Events,
    HostState,
    HostWait,
    KnownWait,
    Protocol,
    SectionKind,
    Streams,
)
from tolaria.values import replace

# ---------------------------------------------------------------- sections


def open_section(
    thread: ThreadId, kind: SectionKind, in_autograd: bool, timeout_s: float | None = None, named: Streams = ()
) -> Protocol:
    """Open a section for `thread`; what it launches waits for copies that still read what the section may write.

    With the `streams` barrier the streams that it launches on become known: those that are current on the calling
    thread, and those that are `named`.

    Returns:
        The epoch in which the section runs.
    """

    def enter(state: HostState) -> tuple[HostState, tuple[int, Events, _Wait, bool]] | None:
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
        joins = _joins(state, thread)
        wait = _how_to_wait(state, thread, kind, joins and bool(named)) if pending or joins else _Wait.CALLER
        ordering = state.ordering + (wait is _Wait.ALL)
        return replace(state, gate=entered, ordering=ordering), (state.epoch, pending, wait, joins)

    (epoch, pending, wait, joins), _ = yield Await(f"open a {kind.value} section", enter, timeout_s)
    if joins:
        yield from _join(pending, wait, named)
        return epoch
    if wait is _Wait.ALL:
        yield from _order_everything(pending)
    for device, event in pending:
        if wait is _Wait.CALLER:
            yield CallerWait(device, event)
        elif wait is _Wait.HOST:
            yield HostWait(device, event)
    return epoch


class _Wait(Enum):
    """Who waits for the copies of a snapshot."""

    CALLER = "the streams of the section"
    ALL = "every stream"  # `streams`: that is known
    HOST = "the host"


def _how_to_wait(state: HostState, thread: ThreadId, kind: SectionKind, named: bool) -> _Wait:
    if not (named or kind is SectionKind.FOREIGN) or any(capturing == thread for _, capturing in state.captures):
        return _Wait.CALLER
    # it may launch on streams that we do not know. A context-wide wait would invalidate the capture of another thread
    return _Wait.HOST if state.captures else _Wait.ALL


def _joins(state: HostState, thread: ThreadId) -> bool:
    """Whether the streams of a section become known.

    Not inside a capture, which has waited before it began: nothing is executed there. Not inside a submission of the
    same thread either, whose streams are the governor's own.
    """
    if state.streams is None or state.gate.owner == thread:
        return False
    return not any(capturing == thread for _, capturing in state.captures)


def known_streams(besides: Streams = ()) -> Protocol:
    """The streams that are known now, and from now on those `besides`. To be asked with the gate held exclusively."""

    def look(state: HostState) -> tuple[HostState, Streams]:
        after = _with_streams(state, besides)
        return after, after.streams or ()

    return (yield Change("which streams are known", look))


def wait_known(streams: Streams, events: Events) -> Protocol:
    """Make all later work of some streams wait for the events. None of them may be capturing."""
    for device, stream in streams:
        for _, event in events:
            yield KnownWait(device, stream, event)


def _join(pending: Events, wait: _Wait, named: Streams = ()) -> Protocol:
    """Let the streams of an open section wait for what they have to wait for, then make them known.

    In this order: the section keeps submissions out, and what is known has waited for every one of before. `latest` is
    behind whatever else may be pending.
    """
    try:
        here: Streams = yield CallerStreams()
        mine = tuple(dict.fromkeys((*here, *named)))
        known, latest = yield Change("what is known", lambda s: (s, (s.streams or (), s.latest)))
        new = tuple(stream for stream in mine if stream not in known)
        if wait is _Wait.HOST:
            for device, event in latest if new else pending:
                yield HostWait(device, event)
        else:
            old = known if wait is _Wait.ALL else tuple(stream for stream in mine if stream in known)
            yield from wait_known(old, pending)
            yield from wait_known(new, latest)
        if new:
            yield Change("streams become known", lambda s: (_with_streams(s, new), None))
    finally:
        if wait is _Wait.ALL:
            yield Change("all have waited", lambda s: (replace(s, ordering=s.ordering - 1), None))


def _with_streams(state: HostState, new: Streams) -> HostState:
    return replace(state, streams=tuple(dict.fromkeys((*(state.streams or ()), *new))))


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

    def enter(state: HostState) -> tuple[HostState, tuple[Events, bool]] | None:
        # behind a submission that waits for sections, unless that submission waits for this very thread
        if state.ordering or gate.enter_section(state.gate, thread, in_autograd or bool(state.captures)) is None:
            return None
        return replace(state, captures=(*state.captures, (token, thread))), (state.all_done, _joins(state, thread))

    (pending, joins), _ = yield Await("begin a graph capture", enter, timeout_s)
    try:
        if joins:
            yield from _join(pending, _Wait.CALLER)
            return
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
