"""ROUNDS: for loops that step their optimizers themselves, as those of reinforcement learning do.

A round is everything that one rollout, or one draw from a replay buffer, is used for: many optimizer steps, in code
that is not ours. It is judged as a whole, undone as a whole, and made again as a whole. What the governor counts as a
step is a round here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from tolaria import observe, recover, ring
from tolaria.brake import brake_foreign_steps
from tolaria.coordinate import world_size
from tolaria.course import Course
from tolaria.errors import (
    UNTOUCHED,
    NoSnapshot,
    RetryBudgetExceeded,
    SafetyError,
    SnapshotRejected,
    UnsupportedState,
    UsageError,
)
from tolaria.feed import NO_REWIND
from tolaria.governor import TolariaGovernor
from tolaria.keeper import Keeper
from tolaria.records import Health, Verdict, VitalSigns
from tolaria.report import RollbackReport, logger
from tolaria.shield import Shield
from tolaria.state import rng
from tolaria.vitals import EXTRA, Sent

Panic = tuple[VitalSigns, Verdict]
Signs = Callable[[], Mapping[str, float]]

_REACH = 1  # a panic in the next round is the same trouble


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundResult:
    """What became of one round.

    Attributes:
        learnt: The state holds what the round has taught, perhaps at the second attempt. False: it is the state of the
            snapshot, and the experience of this round must not be used again.
        verdict: Of the last attempt.
        reports: Of the rollbacks made meanwhile, in order.
    """

    learnt: bool
    verdict: Verdict
    reports: tuple[RollbackReport, ...] = ()


class Rounds:
    """Runs rounds of learning under a governor: snapshot, learn, judge, and where that panics roll back.

    The first panic of a round makes it again: what did that was a fault in the machine, and the second attempt equals
    the undisturbed run bit for bit (under ``rng="restore"``). If it panics again the experience is to blame: the round
    is dropped, and the run goes on as one that never made it. A panic in the round after a dropped one drops that too.

    A panic whose rollback cannot be made (`SafetyError`) stays open. The next call rolls back before anything else: a
    round is not learnt then, because its experience comes from the state that has panicked.

    Args:
        governor: Of the policy, with all its optimizers; `round_detector()` suits as its detector. Its cadence and
            probation have no say here: a round is judged before the next snapshot is taken.
        snapshot_every: Rounds between snapshots. With more than 1 a round can only be made again where a snapshot
            stands right before it; elsewhere a panic goes back to the snapshot, and the rounds since are lost.

    Threads: one thread makes rounds; other threads keep to `governor.using()`.
    """

    def __init__(self, governor: TolariaGovernor, *, snapshot_every: int = 1) -> None:
        if isinstance(snapshot_every, bool) or not isinstance(snapshot_every, int) or snapshot_every < 1:
            raise UsageError(
                "governing rounds",
                f"snapshot_every={snapshot_every!r}, expected a whole number of at least 1",
                "Correct the value.",
            )
        brake_foreign_steps(governor, "rounds", "skip_further", "go_back")
        self.governor = governor
        self.snapshot_every = snapshot_every
        self._number = 0  # of rounds begun
        self._since: int | None = None  # rounds learnt since the last snapshot; None: there is none
        self._reference: dict[int, torch.Tensor] = {}  # trained weights as the last round left them
        self._put_off = False  # a snapshot that waits until the round has shown that the state is good

    # ------------------------------------------------------------ the loop

    def run(self, learn: Callable[[], object], *, signs: Signs | None = None) -> RoundResult:
        """Make one round.

        Args:
            learn: Does all of it; called again for a second attempt, then with the same weights, optimizers, registered
                objects and random state. What it reads besides must be as it was at the first call.
            signs: Called after it, without gradients; returns further vital signs by name (``metric``: the reward).
                What it draws from global random state is put back. An error in it counts as the sign ``unmeasured``,
                which is a panic.

        Returns:
            Whether the round was learnt, and what was rolled back.

        Raises:
            RetryBudgetExceeded: The panics do not end; the state is the last good one.
            SafetyError: A panic could not be answered; nothing was restored, and it stays open.
            UnsupportedState: A panic in a run of several ranks; nothing was restored.
            Exception: Whatever `learn` raised, where the state shows no damage. Where it does, the error is taken for
                its effect and logged.
        """
        if self.governor.is_disabled:
            learn()
            return RoundResult(learnt=True, verdict=Verdict(Health.HEALTHY, 0))
        self.governor._require_boundary("making a round")
        self._number += 1
        if self.governor.config.mode == "observe":
            return self._only_watch(learn, signs)
        if (answered := self._answer_open()) is not None:
            return RoundResult(learnt=False, verdict=answered[0], reports=(answered[1],))
        reports: list[RollbackReport] = []
        try:
            is_fresh = self._snapshot_before_round()
        except SnapshotRejected as rejected:
            return self._drop_unfit(rejected)
        while True:
            error = _error_of(learn)
            panic = self._judge(signs, error)
            if panic is None and error is not None:
                raise error
            if panic is None:
                self._settle()
                return RoundResult(learnt=True, verdict=self._course.verdict, reports=tuple(reports))
            action, report = self._answer(panic, can_replay=is_fresh, error=error)
            reports.append(report)
            if action is not recover.Action.REPLAY:
                return RoundResult(learnt=False, verdict=panic[1], reports=tuple(reports))

    def snapshot(self) -> bool:
        """Take a snapshot of what the last round has left. Call before new experience is gathered.

        `reject` then goes back to here. Without it, and where `snapshot_every` is more than 1 (except at the very
        beginning), it goes back to the newest snapshot taken before a round.

        Returns:
            Whether one was taken: not if there is one of this state, as after a rollback that was still to be made.

        Raises:
            RetryBudgetExceeded, SafetyError: As `run`, where a panic was still open.
        """
        if not self.is_acting:
            return False
        self._answer_open()
        if self._since is not None and (self.snapshot_every > 1 or self._since == 0):
            return False
        return self._take()

    def reject(self, reason: str) -> RollbackReport:
        """Experience gathered since the last snapshot is unusable: put the state back, statistics of inputs included.

        Args:
            reason: Short, for the ledger; for example ``"non-finite observation of environments 3"``.

        Raises:
            RetryBudgetExceeded: It happened too often; the state is the last good one.
            SafetyError: Nothing was restored, and it stays open, unless there is no snapshot at all.
        """
        if not self.is_acting:
            return self.governor.execute_rollback(reason=reason)  # does nothing, and says so
        self.governor._require_boundary("rejecting experience")
        if (answered := self._answer_open()) is not None:
            return answered[1]
        step = self._course.completed
        panic = (VitalSigns(step=step), Verdict(Health.PANIC, step, reason, step))
        try:
            return self._answer(panic, can_replay=False, to_newest=True)[1]
        except NoSnapshot:  # the next round takes the first one
            self._course._unanswered = None
            raise

    # ------------------------------------------------------------ snapshots

    def _settle(self) -> None:
        """A round was learnt."""
        self._since = (self._since or 0) + 1
        self._reference = self._copied_weights()
        if self._put_off:
            self._put_off = False
            with contextlib.suppress(SnapshotRejected):  # the next round begins with it
                self._take()

    @property
    def _course(self) -> Course:
        return self.governor._course

    @property
    def _keeper(self) -> Keeper:
        return self.governor._keeper

    @property
    def is_acting(self) -> bool:
        """Whether anything is ever put back: not in observe mode, nor where the governor is disabled."""
        return not self.governor.is_disabled and self.governor.config.mode == "act"

    def _snapshot_before_round(self) -> bool:
        """Take the snapshot that is due. Answers whether a rollback would lead to right here.

        Not where somebody has written weights since the last round: were it damage, the snapshot would hold it. The
        round is judged from where the last one ended, so damage shows, and the rollback leads to before it.
        """
        if self._reference and not _equal(self._reference, self._weights()):
            self._put_off = True
            return False
        due = self.snapshot_every == 1 or self._since is None or self._since >= self.snapshot_every
        return due and self._take()

    def _take(self) -> bool:
        first = self._since is None
        try:
            self._course.take_first()  # judged already, so it is certified at once
        except SnapshotRejected:
            raise
        except SafetyError as error:
            if first:
                raise
            # no memory, or a capture: training goes on with the snapshots held so far
            self._course.count(snapshots_failed=1)
            logger.warning("round %d: no snapshot could be taken: %s", self._number, error)
            return False
        self._since = 0
        if first:
            self._reference = self._copied_weights()
        return True

    def _drop_unfit(self, rejected: SnapshotRejected) -> RoundResult:
        """The state is not finite outside of the weights (moments, buffers), which no round has shown."""
        if ring.newest_good(self._keeper.ring) is None:
            raise rejected
        step = self._course.completed
        verdict = Verdict(Health.PANIC, step, "non-finite train state", step)
        self._course.count(panics=1)
        _, report = self._answer((VitalSigns(step=step), verdict), can_replay=False, error=rejected)
        return RoundResult(learnt=False, verdict=verdict, reports=(report,))

    # ------------------------------------------------------------ judge and answer

    def _judge(self, signs: Signs | None, error: Exception | None) -> Panic | None:
        numbers: dict[str, observe.Scalar] = {"nonfinite_weights": observe.num_overflowing(self._trained())}
        now = self._weights()
        both = [key for key in self._reference if key in now]  # layers may have come or gone
        if both:
            numbers[EXTRA + "drift"] = drift([self._reference[key] for key in both], [now[key] for key in both])
        if signs is not None and error is None:
            measured = self._measured(signs).items()
            numbers |= {name if name == "metric" else EXTRA + name: value for name, value in measured}
        reading = self.governor._readings.send(numbers)
        torn = self._keeper.driver.state.torn
        self._course.account(Sent(step=self._course.completed + 1, reading=reading, torn=torn))
        return self._course.catch_up(wait=True)

    def _measured(self, signs: Signs) -> Mapping[str, float]:
        before = rng.read(self._keeper.accelerators)
        try:
            with torch.no_grad():
                return signs()
        except Exception as error:
            # a policy that cannot be asked any more raises here first; a bug in `signs` spends the retry budget
            logger.warning("round %d: its signs could not be measured: %r", self._number, error)
            return {"unmeasured": float("nan")}
        finally:
            rng.write(before)

    def _only_watch(self, learn: Callable[[], object], signs: Signs | None) -> RoundResult:
        error = _error_of(learn)
        panic = self._judge(signs, error)
        if panic is not None:
            self._course.report(*panic, "observe", None)
            self._course._unanswered = None
        if error is not None:
            raise error
        self._reference = self._copied_weights()
        return RoundResult(learnt=True, verdict=panic[1] if panic else self._course.verdict)

    def _answer_open(self) -> tuple[Verdict, RollbackReport] | None:
        """Answer the panic, if any, that could not be answered when it was found: nothing may be built on its state."""
        panic = self._course._unanswered
        if panic is None:
            return None
        self.governor._require_boundary("rolling back")
        return panic[1], self._answer(panic, can_replay=False)[1]

    def _answer(
        self, panic: Panic, *, can_replay: bool, error: Exception | None = None, to_newest: bool = False
    ) -> tuple[recover.Action, RollbackReport]:
        """Roll back, and decide what follows.

        Random state goes back with the rest only where the environments are as they were at the snapshot, right before
        this round: elsewhere the same draws would come again in another place.
        """
        vital, verdict = panic
        course, config = self._course, self.governor.config
        if world_size() > 1:
            course._unanswered = None
            raise UnsupportedState(
                f"rolling back round {self._number}",
                "this process is one of several ranks, and a rollback on one of them alone would ruin the others",
                'Use mode="observe", and restart all ranks from a checkpoint.',
            ) from error
        before, draws = course.recovery, None if can_replay else rng.read(self._keeper.accelerators)
        report = RollbackReport(success=False, status="failed", env_id=config.env_id, reason=verdict.reason)
        with Shield() as shield:  # an interrupt between the rollback and its bookkeeping would lose the count
            course.recovery, plan = recover.decide(
                before,
                tick=course.tick,
                onset_batch=self._number,
                panic_batch=self._number,
                reach=_REACH,
                can_replay=can_replay,
                policy=config.recovery,
            )
            try:
                self._keeper.restore(
                    shield,
                    report,
                    completed=lambda: course.abandoned,
                    generations_back=0 if to_newest else plan.generations_back,
                    verify_before=True,
                    patient=True,
                )
            except BaseException as error:  # the panic is not over: nothing was restored, or not everything
                course._unanswered = panic
                if isinstance(error, (*UNTOUCHED, KeyboardInterrupt)):
                    course.recovery = before
                raise
            course.treat(plan)
            course.after_rollback(report, NO_REWIND, rekeys=plan.rekeys and can_replay)
            if draws is not None:
                rng.write(draws)
            note = "" if error is None else f"{type(error).__name__}: {error}".splitlines()[0]
            course.report(vital, verdict, plan.action.value, report, note=note, plan=plan)
        self._since, self._reference, self._put_off = 0, self._copied_weights(), False
        if plan.action is recover.Action.STOP:
            raise RetryBudgetExceeded(
                f"recovering in round {self._number}",
                f"{len(course.recovery.ticks)} panics within {config.recovery.retry_window} rounds (the last: "
                f"{verdict.reason}), expected at most {config.recovery.max_retries}",
                f"It is the snapshot of round {report.snapshot_step}: save or inspect it; incidents are in the ledger.",
            ) from error
        return plan.action, report

    # ------------------------------------------------------------ weights

    def _trained(self) -> Sequence[torch.Tensor]:
        return self._keeper.state.roster()[1]

    def _weights(self) -> dict[int, torch.Tensor]:
        """What the optimizers train: target networks jump by design."""
        found = {id(p): p for part in self._keeper.state.optimizers for p in part.parameters()}
        return {key: p.detach() for key, p in found.items() if p.is_floating_point()}

    def _copied_weights(self) -> dict[int, torch.Tensor]:
        return {key: weight.clone() for key, weight in self._weights().items()}


def drift(before: Sequence[torch.Tensor], now: Sequence[torch.Tensor]) -> torch.Tensor:
    """How far weights have moved: the largest ``|now - before| / (|before| + 1)`` of any tensor, L2 norms.

    The 1 keeps tensors that start at zero (biases) from counting as infinitely far.

    Returns:
        Shape [], float64, on the device of the first; NaN where a weight is.
    """
    if not now:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    moved = torch._foreach_norm(torch._foreach_sub(list(now), list(before)))
    size = torch._foreach_norm(list(before))
    home = now[0].device
    return torch.stack([(m.double() / (s.double() + 1.0)).to(home) for m, s in zip(moved, size, strict=True)]).max()


def _equal(before: Mapping[int, torch.Tensor], now: Mapping[int, torch.Tensor]) -> bool:
    return before.keys() == now.keys() and all(torch.equal(before[key], now[key]) for key in before)


def _error_of(learn: Callable[[], object]) -> Exception | None:
    try:
        learn()
    except Exception as error:
        return error
    return None
