"""RECOVER: what to do after a panic, decided from values alone.

A panic means one of three things, and a replay tells them apart: a transient fault (a flipped bit, a stray writer) does
not return; bad data returns with the same batches; damage that the snapshot already holds returns whatever is done. So
the first panic replays, its return skips the batches of the episode, and when that does not help an older snapshot is
used. Panics count as the same trouble while they begin no later than shortly after the last one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from tolaria.config import GovernorConfig
from tolaria.errors import RetryBudgetExceeded


class Action(Enum):
    """What follows a restore."""

    REPLAY = "replay"  # deliver every batch since the snapshot again
    SKIP = "skip"  # the same without the batches of the episode
    STOP = "stop"  # the retry budget is spent


@dataclass(frozen=True, slots=True)
class Plan:
    """The decision for one panic.

    Attributes:
        action: See `Action`.
        first_skipped: First batch index that is not delivered again; None where none is skipped.
        generations_back: 0: the newest good snapshot; 1: the one before it, if there is one; and so on.
        attempt: How often this trouble has been met, from 1.
        cooled: The learning rate is lowered from here on.
    """

    action: Action
    first_skipped: int | None
    generations_back: int
    attempt: int
    cooled: bool


@dataclass(frozen=True, slots=True)
class RecoveryState:
    """What is remembered of past panics. Survives rollbacks.

    Attributes:
        ticks: Steps judged so far, undone ones included, at each past panic within the retry window.
        first_batch: First batch of the present trouble.
        last_batch: Batch at which it last panicked.
        attempt: Panics of the present trouble.
        data_incidents: Ticks of troubles that returned on replay (so not transient), within 1,000 steps.
    """

    ticks: tuple[int, ...] = ()
    first_batch: int = -1
    last_batch: int = -1
    attempt: int = 0
    data_incidents: tuple[int, ...] = ()


_SKIPS_BEFORE_OLDER = 2
_COOL_WINDOW = 1000


def decide(
    state: RecoveryState,
    *,
    tick: int,
    onset_batch: int,
    panic_batch: int,
    reach: int,
    can_replay: bool,
    max_retries: int,
    retry_window: int,
    transient: bool = False,
) -> tuple[RecoveryState, Plan]:
    """Decide what follows a panic.

    Args:
        state: Memory of earlier panics.
        tick: Steps judged so far, undone ones included.
        onset_batch: First batch of the episode (of the step at which the detectors first were suspicious).
        panic_batch: Last batch of the step that panicked.
        reach: Batches after the last panic within which a new episode counts as the same trouble.
        can_replay: Batches come from `watch`.
        max_retries: Panics allowed within `retry_window` ticks.
        retry_window: In ticks.
        transient: It is known that the data is not to blame, so everything is replayed and no trouble is remembered.

    Returns:
        The new memory and the plan.
    """
    recent = (*(t for t in state.ticks if tick - t < retry_window), tick)
    if transient and can_replay and len(recent) <= max_retries:
        cooled = len([t for t in state.data_incidents if tick - t < _COOL_WINDOW]) >= 2
        return replace(state, ticks=recent), Plan(Action.REPLAY, None, 0, 1, cooled)
    same = state.attempt > 0 and onset_batch <= state.last_batch + reach
    attempt = state.attempt + 1 if same else 1
    first = min(onset_batch, state.first_batch) if same else onset_batch
    data = tuple(t for t in state.data_incidents if tick - t < _COOL_WINDOW)
    if attempt == 2:
        data = (*data, tick)
    new = replace(
        state,
        ticks=recent,
        first_batch=first,
        last_batch=max(panic_batch, state.last_batch),
        attempt=attempt,
        data_incidents=data,
    )
    cooled = len(data) >= 2
    if len(recent) > max_retries:
        return new, Plan(Action.STOP, None, 0, attempt, cooled)
    if not can_replay:
        return new, Plan(Action.SKIP, None, max(0, attempt - 1 - _SKIPS_BEFORE_OLDER), attempt, cooled)
    if attempt == 1:
        return new, Plan(Action.REPLAY, None, 0, attempt, cooled)
    older = max(0, attempt - 1 - _SKIPS_BEFORE_OLDER)
    return new, Plan(Action.SKIP, first if older else onset_batch, older, attempt, cooled)


def spent(
    state: RecoveryState, config: GovernorConfig, step: int, reason: str, restored_step: int | None
) -> RetryBudgetExceeded:
    """The error that ends a run: the panics do not end."""
    return RetryBudgetExceeded(
        f"recovering at step {step}",
        f"{len(state.ticks)} panics within {config.retry_window} steps (the last: {reason}), expected at most "
        f"{config.max_retries}",
        f"It is the snapshot of step {restored_step}: save or inspect it; incidents are in the ledger.",
    )


def learning_rate_factor(state: RecoveryState, tick: int, cool_lr: float, cool_steps: int) -> float:
    """Learning rate factor: `cool_lr` from the second lasting incident within 1,000 steps on, back to 1 linearly."""
    if len(state.data_incidents) < 2 or cool_lr == 1.0:
        return 1.0
    since = tick - state.data_incidents[-1]
    return min(1.0, cool_lr + (1.0 - cool_lr) * since / cool_steps) if since >= 0 else 1.0
