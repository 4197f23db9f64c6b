"""The gate: a shared/exclusive lock written as pure transitions over a small value.

Shared side: *sections* (optimizer steps, forward launches, `using()`). Exclusive side: the submission of a snapshot or
a rollback. Nothing here blocks or knows about threads: every function takes a `GateState` and returns the next one, or
None for "not yet". Whoever runs the protocol (a real lock and condition variable, or a model checker) decides what
waiting means. So the code that the proof explores is the code that ships.

Rules
    * Re-entrant per thread on the shared side; the exclusive owner may open sections of its own.
    * A waiting exclusive request keeps new shared requests out (else a busy program would starve its rollback), except
      those made inside autograd: backward runs on engine threads that others wait for, so they must never queue behind
      a request that itself waits for sections to close.
    * A thread inside a section never gets the exclusive side: it would wait for itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from tolaria.errors import PhaseError
from tolaria.values import replace

ThreadId = int


@dataclass(frozen=True, slots=True)
class GateState:
    """Who is in.

    Attributes:
        sections: Pairs (thread, depth) of open sections, depth >= 1, at most one pair per thread.
        owner: The thread that holds the exclusive side, or None.
        waiting: Threads that have announced an exclusive request, in order of arrival.
    """

    sections: tuple[tuple[ThreadId, int], ...] = ()
    owner: ThreadId | None = None
    waiting: tuple[ThreadId, ...] = ()

    def depth(self, thread: ThreadId) -> int:
        """How many sections `thread` has open, one inside the other."""
        return next((depth for holder, depth in self.sections if holder == thread), 0)


def _with_depth(state: GateState, thread: ThreadId, depth: int) -> GateState:
    others = tuple(pair for pair in state.sections if pair[0] != thread)
    return replace(state, sections=(*others, (thread, depth)) if depth else others)


def enter_section(state: GateState, thread: ThreadId, in_autograd: bool) -> GateState | None:
    """Open a section for `thread`, or None while it has to wait."""
    depth = state.depth(thread)
    if depth or state.owner == thread:
        return _with_depth(state, thread, depth + 1)
    if state.owner is not None:
        return None
    # invariant: a section opened inside autograd waits only for a holder, which never waits for sections itself
    if state.waiting and not in_autograd:
        return None
    return _with_depth(state, thread, 1)


def leave_section(state: GateState, thread: ThreadId, to_depth: int) -> GateState:
    """Close sections of `thread` until `to_depth` are left open.

    Absolute and so idempotent: an interrupt between opening and closing can neither leak a section nor close one twice.
    """
    return _with_depth(state, thread, to_depth) if state.depth(thread) > to_depth else state


def announce_exclusive(state: GateState, thread: ThreadId, doing: str) -> GateState:
    """Register an exclusive request, so that new sections queue behind it.

    Raises:
        PhaseError: `thread` is inside one of its own sections or is submitting already.
    """
    if state.owner == thread:
        raise PhaseError(
            doing,
            "it was called from inside another snapshot or rollback of the same governor (a registered object's "
            "state_dict or load_state_dict?)",
            "Call it after the running one has returned.",
        )
    if state.depth(thread):
        raise PhaseError(
            doing,
            "it was called from inside one of this thread's own sections (a forward or optimizer hook, or `using()`); "
            "expected a boundary between two steps",
            'Pass when="boundary" to have it done when the section closes.',
        )
    return replace(state, waiting=(*state.waiting, thread))


def enter_exclusive(state: GateState, thread: ThreadId) -> GateState | None:
    """Take the exclusive side for an announced thread, or None while sections or another owner are in."""
    if state.sections or state.owner is not None:
        return None
    return replace(state, owner=thread, waiting=tuple(t for t in state.waiting if t != thread))


def leave_exclusive(state: GateState, thread: ThreadId) -> GateState:
    """Give the exclusive side back, or withdraw the announcement. Idempotent, so that any exit path may call it."""
    owner = None if state.owner == thread else state.owner
    return replace(state, owner=owner, waiting=tuple(t for t in state.waiting if t != thread))
