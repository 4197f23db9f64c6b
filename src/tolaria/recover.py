"""RECOVER: what to do after a panic, decided from values alone.

A panic means one of three things, and a replay tells them apart: a transient fault (a flipped bit, a stray writer) does
not return; bad data returns with the same batches; damage that the snapshot already holds returns whatever is done. So
the first panic replays, its return skips the batches of the episode, and when that does not help an older snapshot is
used. Panics count as the same trouble while they begin no later than shortly after the last one. What goes beyond that
(`tolaria.config.Recovery`) waits for the return too: a transient fault says nothing about learning rate or moments.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from enum import Enum

from tolaria.config import Moments, Recovery
from tolaria.errors import RetryBudgetExceeded


class Action(Enum):
    """What follows a restore."""

    REPLAY = "replay"  # deliver every batch since the snapshot again
    SKIP = "skip"  # the same without the batches of the episode
    STOP = "stop"  # the retry budget is spent


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The decision for one panic.

    Attributes:
        action: See `Action`.
        first_skipped: First batch index that is not delivered again; None where none is skipped, or nobody can deliver.
        last_skipped: Last batch index of the episode.
        further: Batches after it that are left out as well.
        generations_back: 0: the newest good snapshot; 1: the one before it, if there is one; and so on.
        steps_back: Steps before the onset that the snapshot shall have at least.
        attempt: How often this trouble has been met, from 1; from 2 on it is known to be lasting.
        cools: The learning rate is lowered from the restored step on.
        moments: What becomes of the restored moments.
        rekeys: Restored random state is re-keyed.
    """

    action: Action
    first_skipped: int | None = None
    last_skipped: int = -1
    further: int = 0
    generations_back: int = 0
    steps_back: int = 0
    attempt: int = 1
    cools: bool = False
    moments: Moments = "keep"
    rekeys: bool = False

    @property
    def skipped(self) -> range | None:
        """Batch indices of the episode that are not delivered again; None: all since the snapshot."""
        if self.action is Action.REPLAY:
            return range(0)
        return None if self.first_skipped is None else range(self.first_skipped, self.last_skipped + 1)


NO_PLAN = Plan(action=Action.SKIP, attempt=0)
"""Of a rollback that somebody else has decided on, or of none."""


@dataclass(frozen=True, slots=True)
class RecoveryState:
    """What is remembered of past panics. Survives rollbacks.

    Attributes:
        ticks: Steps judged so far, undone ones included, at each past panic within the retry window.
        first_batch: First batch of the present trouble.
        last_batch: Batch at which it last panicked, or the last one left out because of it.
        attempt: Panics of the present trouble.
        data_incidents: Ticks of troubles that returned on replay (so not transient), within the cool window.
        cooled_at: Optimizer steps completed when the learning rate was lowered last. Not in ticks: a replayed step has
            the learning rate that it had.
        cooled_before: The same of earlier times, for steps before it that are made again.
    """

    ticks: tuple[int, ...] = ()
    first_batch: int = -1
    last_batch: int = -1
    attempt: int = 0
    data_incidents: tuple[int, ...] = ()
    cooled_at: int | None = None
    cooled_before: tuple[int, ...] = ()


def decide(
    state: RecoveryState,
    *,
    policy: Recovery,
    tick: int,
    onset_batch: int,
    panic_batch: int,
    reach: int,
    can_replay: bool,
    disagreements: int = 0,
) -> tuple[RecoveryState, Plan]:
    """Decide what follows a panic.

    Args:
        state: Memory of earlier panics.
        policy: What the user wants.
        tick: Steps judged so far, undone ones included.
        onset_batch: First batch of the episode (of the step at which the detectors first were suspicious).
        panic_batch: Last batch of the step that panicked.
        reach: Batches after the last panic within which a new episode counts as the same trouble.
        can_replay: Batches come from `watch`.
        disagreements: Not 0: it is known that the data is not to blame, so everything is replayed and no trouble is
            remembered; and how often executions of these steps have differed.

    Returns:
        The new memory and the plan.
    """
    recent = (*(t for t in state.ticks if tick - t < policy.retry_window), tick)
    is_spent = len(recent) > policy.max_retries
    if disagreements and can_replay and not is_spent:
        return replace(state, ticks=recent), Plan(action=Action.REPLAY, attempt=disagreements)
    same = is_known(state, onset_batch, reach)
    attempt = state.attempt + 1 if same else 1
    data = tuple(t for t in state.data_incidents if tick - t < policy.cool_window)
    if attempt == 2:
        data = (*data, tick)
    further = _further(policy, attempt) if can_replay and not is_spent else 0
    new = replace(
        state,
        ticks=recent,
        first_batch=min(onset_batch, state.first_batch) if same else onset_batch,
        last_batch=max(panic_batch + further, state.last_batch),
        attempt=attempt,
        data_incidents=data,
    )
    if is_spent:
        return new, Plan(action=Action.STOP, attempt=attempt)
    if attempt == 1 and can_replay and policy.first == "replay":
        return new, Plan(action=Action.REPLAY)
    older = max(0, attempt - 1 - policy.skips_before_older)
    first = new.first_batch if older else onset_batch
    returned = attempt > 1
    return new, Plan(
        action=Action.SKIP,
        first_skipped=first if can_replay else None,
        last_skipped=panic_batch,
        further=further,
        generations_back=older,
        steps_back=policy.go_back if returned else 0,
        attempt=attempt,
        cools=returned and len(data) >= policy.cool_after and policy.cool_lr < 1.0,
        moments=policy.moments if returned else "keep",
        rekeys=returned and policy.rng == "rekey",
    )


def is_known(state: RecoveryState, onset_batch: int, reach: int) -> bool:
    """Whether an episode that begins at that batch belongs to the trouble that panicked last."""
    return state.attempt > 0 and onset_batch <= state.last_batch + reach


def _further(policy: Recovery, attempt: int) -> int:
    """Batches after the panicking one that are left out at a return: from the first return on, more with each."""
    if attempt < 2 or not policy.skip_further:
        return 0
    wanted = float(policy.skip_further)
    for _ in range(attempt - 2):
        wanted = min(float(policy.most_further), wanted * policy.widen)
    return min(policy.most_further, int(wanted))


def cooled(state: RecoveryState, plan: Plan, completed: int) -> RecoveryState:
    """The memory after the plan's restore, to a state of `completed` optimizer steps."""
    if not plan.cools:
        return state
    earlier = tuple(at for at in _coolings(state) if at < completed)  # what came later is undone
    return replace(state, cooled_at=completed, cooled_before=earlier)


def _coolings(state: RecoveryState) -> tuple[int, ...]:
    return state.cooled_before if state.cooled_at is None else (*state.cooled_before, state.cooled_at)


def spent(
    state: RecoveryState, policy: Recovery, step: int, reason: str, restored_step: int | None
) -> RetryBudgetExceeded:
    """The error that ends a run: the panics do not end."""
    return RetryBudgetExceeded(
        f"recovering at step {step}",
        f"{len(state.ticks)} panics within {policy.retry_window} steps (the last: {reason}), expected at most "
        f"{policy.max_retries}",
        f"It is the snapshot of step {restored_step}: save or inspect it; incidents are in the ledger.",
    )


def learning_rate_factor(state: RecoveryState, completed: int, policy: Recovery) -> float:
    """Factor on the learning rate of the step after `completed`: `cool_lr` where it was lowered, back to 1 linearly."""
    # a rollback may lead to before a cool-down: the steps up to it have the rate that they had
    cooled_at = max((at for at in _coolings(state) if at <= completed), default=None)
    if cooled_at is None or policy.cool_lr == 1.0:
        return 1.0
    return min(1.0, policy.cool_lr + (1.0 - policy.cool_lr) * (completed - cooled_at) / policy.warm_steps)


class Consumption:
    """Which batches each of the last steps has consumed.

    Args:
        steps: Steps remembered.
    """

    def __init__(self, steps: int) -> None:
        self._taken: deque[tuple[int, tuple[int, ...]]] = deque(maxlen=steps)

    def note(self, step: int, batches: tuple[int, ...]) -> None:
        """A step is completed."""
        self._taken.append((step, batches))

    def undo(self, completed: int) -> None:
        """Forget the steps after `completed`."""
        while self._taken and self._taken[-1][0] > completed:
            self._taken.pop()

    def of(self, onset: int, step: int) -> tuple[int, int] | None:
        """First and last batch of the steps from `onset` to `step`; None where they are not known to have any."""
        taken = [batch for at, batches in self._taken if onset <= at <= step for batch in batches]
        return (min(taken), max(taken)) if taken else None

    def widest(self, onset: int, step: int) -> int:
        """Most batches that one of these steps has taken (accumulation); 1 where none is known to have any."""
        return max((len(batches) for at, batches in self._taken if onset <= at <= step), default=1) or 1
