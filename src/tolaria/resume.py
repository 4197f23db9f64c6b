"""RESUME: what of the bookkeeping of a run goes into a checkpoint and comes back in another process. Plain values."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from tolaria.errors import UsageError
from tolaria.judge import plain_state, state_from_json, state_from_plain
from tolaria.records import SCHEMA_VERSION, Statistics
from tolaria.recover import RecoveryState


@dataclass(frozen=True, slots=True)
class Bookkeeping:
    """One run so far, without its snapshots.

    Attributes:
        completed: Optimizer steps in the past of the present state.
        tick: Steps judged, undone ones included.
        judgement: State of the detector.
        recovery: Memory of past panics.
        statistics: Counters.
    """

    completed: int
    tick: int
    judgement: Any
    recovery: RecoveryState
    statistics: Statistics


def as_json(books: Bookkeeping) -> dict[str, Any]:
    """Values that `json.dumps` writes, and `torch.load` reads without trusting the file."""
    counters = {one.name: getattr(books.statistics, one.name) for one in fields(Statistics) if one.compare}
    return {
        "schema_version": SCHEMA_VERSION,
        **asdict(books),
        "judgement": plain_state(books.judgement),
        "statistics": counters,
    }


def from_json(saved: Any, judgement: Any) -> Bookkeeping:
    """The inverse of `as_json`, also after a round trip through JSON. Raises `UsageError` for another schema.

    `judgement`: of the detector before it has judged anything.
    """
    try:
        version = saved["schema_version"]
        if version != SCHEMA_VERSION:
            raise ValueError(f"schema_version {version!r}, expected {SCHEMA_VERSION}")
        was_json = isinstance(saved["recovery"]["ticks"], list)  # a tuple otherwise
        back = state_from_json if was_json else state_from_plain
        recovery = RecoveryState(**{name: state_from_json(value) for name, value in saved["recovery"].items()})
        return Bookkeeping(
            completed=int(saved["completed"]),
            tick=int(saved["tick"]),
            judgement=back(saved["judgement"], judgement),
            # batches are numbered afresh in a new process, so no panic here is the return of one there
            recovery=replace(recovery, attempt=0, first_batch=-1, last_batch=-1),
            statistics=Statistics(**saved["statistics"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            "resuming the governor",
            f"this is not a state_dict of a governor of this version ({type(error).__name__}: {error})",
            "Resume with the version of tolaria that wrote it, or start the governor afresh.",
        ) from error
