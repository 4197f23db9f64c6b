"""COURSE: where the run stands, and what follows a verdict: probation, the next snapshot, or rollback and recovery.

Joins judge, snapshot, recover and report for one governor; `governor` is its public face.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from tolaria import recover, resume, ring
from tolaria.config import MOST_OUTSTANDING, GovernorConfig
from tolaria.coordinate import refuse_several_ranks, world_size
from tolaria.errors import UNTOUCHED, CaptureInProgress, DeviceLost, SlotsBusy, SnapshotRejected, UnsupportedState
from tolaria.feed import NO_REWIND, Feed, Rewind
from tolaria.judge import Detector
from tolaria.keeper import Keeper
from tolaria.operations import Inspection
from tolaria.pace import Pace
from tolaria.records import Health, Journal, Statistics, StepResult, Tally, Verdict, VitalSigns
from tolaria.reexecute import Reexecution
from tolaria.report import Board, Ledger, RollbackReport, SnapshotInfo, incident_of, logger
from tolaria.shield import Shield
from tolaria.state import rng
from tolaria.target import Target
from tolaria.values import replace
from tolaria.vitals import Sent

_HISTORY_STEPS = 4096


class Course:
    """The course of one run.

    Args:
        config: Cadence, probation, recovery settings.
        detector: Judges.
        rng_policy: ``"restore"``, ``"fork"`` or ``"keep"``, asked whenever it matters.

    Attributes:
        completed: Optimizer steps in the past of the present state; goes back with a rollback.
        tick: Steps judged, undone ones included; never goes back.
        recovery: Memory of past panics; never goes back.
        verdict: The newest one.
        due: Of the step whose snapshot waits for the end of the loop body.
        history: Which batches the steps have consumed.
        on_step: Called when a step is concluded, and when a rollback was made there or by hand.
        from_past: Asked first when a panic is to be answered; None: it could not.
    """

    def __init__(self, config: GovernorConfig, detector: Detector[Any], rng_policy: Callable[[], str]) -> None:
        self.config = config
        self.completed = self.tick = 0
        self._tally, self.recovery = Tally(), recover.RecoveryState()
        self._detector = detector
        self._judgement = detector.init()
        self._rng_policy = rng_policy
        self._ledger = Ledger(config.ledger, config.on_incident, Board.of(config.writer, config.write_every))
        self._last_automatic = 0  # `completed` at the last automatic snapshot
        self.due: VitalSigns | None = None
        self.abandoned = 0  # `completed` when the last rollback took place
        self._position = 0  # of the data, at the snapshot restored last
        self.history = recover.Consumption(_HISTORY_STEPS)
        self._judged: deque[tuple[int, Any]] = deque(maxlen=_HISTORY_STEPS)  # (step, state of the detector after it)
        self._outstanding: deque[Sent] = deque()  # completed, not judged yet
        self._begun: tuple[Sent | None, Any, int] = (None, None, 0)  # being judged; detectors and skips before it
        self._unanswered: tuple[VitalSigns, Verdict] | None = None  # a panic, until its rollback is made
        self._judge_lock = threading.RLock()
        self._skips = 0  # in a row
        self.verdict = Verdict(Health.HEALTHY, 0)
        self.on_step: Callable[[], None] = lambda: None
        self.from_past: Callable[[VitalSigns, Verdict], Rewind | None] = lambda vital, verdict: None
        self.keeper: Keeper
        self.feed: Feed

    def begin(self, keeper: Keeper, feed: Feed) -> None:
        """Take on snapshots and data of the run. Separate from construction: the keeper reads our journal."""
        self.keeper, self.feed = keeper, feed
        feed.on_left_out = lambda: self.count(skipped_batches=1)
        feed.num_steps = lambda: self.config.num_kept_steps(keeper.lag, self.cadence)
        self._pace = Pace(self.config.effective_cadence(keeper.lag))
        every = self.config.reexecute_every * (self.config.mode == "act")
        self.again = Reexecution(every, keeper, feed, lambda: self.rewind(range(0)), self.count)

    # ------------------------------------------------------------ what a snapshot holds of us

    def read_journal(self, gradients: bool) -> Journal:
        """What rolls back with the train state: step count, detector states, data position. Immutable."""
        # captured gradients hold the batches that are open, so those must not come again
        position = self.feed.upcoming if gradients else self.feed.position
        return Journal(self.completed, self._judgement, position)

    def write_journal(self, journal: Journal) -> None:
        """The inverse, at a rollback. Numbers of undone steps that are still on their way are forgotten."""
        self.abandoned = self.completed
        self.again.forget()
        self.completed, judgement, self._position = journal
        with self._judge_lock:
            self._forget_outstanding(self.completed)
            self.verdict = Verdict(Health.HEALTHY, self.completed)
            while self._judged and self._judged[-1][0] > self.completed:
                self._judged.pop()
            if self._judged and self._judged[-1][0] == self.completed:
                # the snapshot may have been taken before its own step was judged
                self._judgement = self._judged[-1][1]
            elif not self._outstanding:
                self._judgement = judgement
        self._last_automatic, self.due = self.completed, None
        self.history.undo(self.completed)

    def _forget_outstanding(self, after: int) -> None:
        """Steps after that one are gone, and with them a panic that is open and a run of skips."""
        self._unanswered, self._skips = None, 0
        for sent in self._outstanding:
            if sent.step > after:
                sent.reading.forget()
        self._outstanding = deque(sent for sent in self._outstanding if sent.step <= after)

    # ------------------------------------------------------------ judge

    def account(self, sent: Sent) -> None:
        """A step is completed: count it, note its batches, and queue its numbers to be judged."""
        self.completed, self.tick = sent.step, self.tick + 1
        self.history.note(sent.step, self.feed.consume())
        self.count(steps=1)
        self._outstanding.append(sent)

    def catch_up(self, *, wait: bool = False) -> tuple[VitalSigns, Verdict] | None:
        """Judge steps and seal snapshots, in order, as far as their numbers have arrived; all of them with `wait`.

        Returns:
            The first panic, with the steps after it not judged, again and again until a rollback answers it; or None.
        """
        with self._judge_lock:
            while self._unanswered is None and self._outstanding:
                sent, must = self._outstanding[0], wait or len(self._outstanding) > MOST_OUTSTANDING
                if not must and not sent.reading.has_arrived():
                    break
                try:
                    self._judge(sent)
                except Exception:  # it would raise for ever
                    if sent in self._outstanding:
                        self._outstanding.remove(sent)
                    raise
            return self._unanswered or self._seal_arrived(wait)

    def _judge(self, sent: Sent) -> None:
        """Ask the detectors, unless the state is known to be half written or a veto says enough; move probation on.

        A step that was not applied (a veto, a scaler that skipped) shows nothing, so it counts for no probation. The
        step is taken from those that are outstanding when all is noted: interrupted before that, it is judged anew.
        """
        vital, by_scaler, vetoed, _ = arrived = sent.read()
        if self._begun[0] is not sent:
            self._begun = sent, self._judgement, self._skips
        judgement, skips = self._begun[1], arrived.skips(self._begun[2])
        if sent.torn:
            verdict = Verdict(Health.PANIC, vital.step, "a write raised half-way", vital.step)
        else:
            judgement, verdict = self._detector.update(judgement, vital)
        verdict = arrived.overrule(verdict, skips)
        if verdict.health is not Health.HEALTHY:
            self.keeper.suspend()
        self._judged.append(noted := (vital.step, judgement))
        panic = (vital, verdict) if verdict.is_panic else None
        if not self._outstanding or self._outstanding[0] is not sent:
            if self._judged and self._judged[-1] is noted:
                self._judged.pop()
            return  # a signal handler of this thread has judged or undone it; none runs before `popleft`: no calls
        self._judgement, self._skips, self.verdict, self._unanswered = judgement, skips, verdict, panic
        self._outstanding.popleft()
        self.count(panics=int(verdict.is_panic), vetoes=int(vetoed))
        self._ledger.watch(vital, verdict, self._tally.read)
        if verdict.health is Health.HEALTHY and not (sent.skipped or by_scaler or vetoed):
            self.keeper.advance(vital.step)

    def _seal_arrived(self, wait: bool) -> tuple[VitalSigns, Verdict] | None:
        """Seal the snapshots that have been read; one that is not finite is a panic of the step it was taken after."""
        # a snapshot is not read before the step it was taken after is judged, or that one's damage would be its own
        limit, arrivals = self._outstanding[0].step if self._outstanding else None, self.keeper.arrivals
        arrivals.seal(wait=wait, before=limit)
        if arrivals.have_findings or arrivals.is_unverified:
            with Shield() as shield:  # they tell it once
                found = arrivals.poisoned(self._pace.copied, self.count)
                poisoned = self._poisoned(VitalSigns(step=found[0]), found[1]) if found else None
                self._unanswered = poisoned or self._read_back(wait, shield)
        return self._unanswered

    def _read_back(self, wait: bool, shield: Shield) -> tuple[VitalSigns, Verdict] | None:
        """Whether the last rollback reads back as its snapshot, once that is known. If not, it is a panic again."""
        seen = self.keeper.arrivals.read_back(wait=wait, shield=shield)
        if seen is None or seen.intact:
            return None
        self.count(panics=1, snapshots_corrupted=int(seen.corrupted), rollbacks_disturbed=int(not seen.corrupted))
        reason = "the restored snapshot was corrupted" if seen.corrupted else "a writer disturbed the rollback"
        self.verdict = Verdict(Health.PANIC, self.completed, reason, seen.slot.completed + 1)
        return VitalSigns(step=self.completed), self.verdict

    def _poisoned(self, vital: VitalSigns, names: str) -> tuple[VitalSigns, Verdict]:
        logger.warning("step %d: not finite: %s", vital.step, names)
        self.count(panics=1)
        self.verdict = Verdict(Health.PANIC, vital.step, "non-finite train state", vital.step)
        return vital, self.verdict

    def judge_all(self) -> None:
        """Judge every step so far; waits. What follows a panic is left to the next step."""
        self.catch_up(wait=True)

    def unsettled(self) -> tuple[int, Verdict | None]:
        """Steps that are not judged yet, and a panic that is not answered yet."""
        return len(self._outstanding), None if self._unanswered is None else self._unanswered[1]

    def watch_only(self, *, wait: bool = False) -> Verdict:
        """Judge what has arrived and report every panic, without acting. Answers the gravest verdict, or the newest."""
        gravest = None
        while self.catch_up(wait=wait) is not None:
            with Shield():  # it is told once, and without the lock: whoever is told may roll back, or ask for more
                with self._judge_lock:
                    panic, self._unanswered = self._unanswered, None
                if panic is not None:  # else another thread tells it
                    self.report(*panic, "observe", None)
                    gravest = panic[1]
        return gravest or self.verdict

    def conclude(self, sent: Sent) -> StepResult:
        """Everything that follows an accounted step: report it, take a snapshot, or roll back."""
        if self.config.mode == "observe":
            return StepResult(verdict=self.watch_only(), rolled_back=False, skipped=sent.skipped, step=sent.step)
        panic = self.catch_up(wait=self.keeper.driver.state.torn)
        ahead = self.completed - self._last_automatic - self.cadence
        self.keeper.backlog.tend(self.tick, self.cadence)
        self._pace.stepped(time.perf_counter())
        if panic is None:
            self.on_step()  # before a snapshot, whose copies the buffers of a note would wait for
        if panic is None and self.verdict.health is Health.HEALTHY and ahead >= 0 and not sent.skipped:
            # taken as soon as a candidate has come through its probation; steps that are run again wait for that anyway
            if not self._has_room() and not (self.feed.is_delivering and self.again.is_due(self.completed, True)):
                self.count(snapshots_deferred=int(ahead % self.cadence == 0))
            elif self.feed.is_delivering and self.due is None:
                self.due = VitalSigns(step=sent.step)  # `Settlement` takes it at the end of the loop body
            else:
                panic = self.snapshot_or_panic(VitalSigns(step=sent.step))
        elif self.verdict.health is not Health.HEALTHY:
            self.due = None
        verdict = self.verdict
        if panic is not None:
            self.answer(*panic)
            self.on_step()
        return StepResult(verdict=verdict, rolled_back=panic is not None, skipped=sent.skipped, step=sent.step)

    def snapshot_or_panic(self, vital: VitalSigns) -> tuple[VitalSigns, Verdict] | None:
        """Take the snapshot that is due after that step; a panic when it is not finite."""
        self.due, poisoned = None, self._take_automatic()
        return self._poisoned(vital, ", ".join(poisoned[:8])) if poisoned else None

    def _has_room(self) -> bool:
        """Whether an automatic snapshot would find a slot now."""
        tier, reach = self.keeper.vault.plan.tier, self.keeper.ground.reach
        return ring.claim(self.keeper.ring, -1, -1, False, tier, reach) is not None

    @property
    def cadence(self) -> int:
        """Steps between automatic snapshots."""
        return self._pace.cadence if self.config.cadence == "auto" else self.config.effective_cadence(self.keeper.lag)

    # ------------------------------------------------------------ snapshots

    def take_first(self) -> None:
        """The first snapshot of a run. Nothing earlier could be better, so it is certified if it is finite."""
        with Shield() as shield:
            info, found = self.take(shield, manual=False, wait=True)
            self._last_automatic = self.completed
            if found is None or not found.nonfinite:
                self.keeper.certify(info)
        self.again.note_snapshot(self.completed)
        self.on_step()
        if found is not None and found.nonfinite:
            raise SnapshotRejected(
                f"taking the first snapshot at step {self.completed}",
                f"the train state is not finite: {', '.join(found.nonfinite[:8])}",
                "Start from finite weights.",
            )

    def take(
        self, shield: Shield, *, manual: bool, step: int | None = None, gradients: bool = False, wait: bool = False
    ) -> tuple[SnapshotInfo, Inspection | None]:
        """Take a snapshot and count it. What was found may arrive later, unless `wait`."""
        started = time.perf_counter()
        info, found = self.keeper.take(shield, step, manual=manual, gradients=gradients)
        if wait and found is None and self.keeper.reads_late:
            self.keeper.arrivals.seal(wait=True)
            found = next((finding.found for finding in self.keeper.arrivals.findings(info.serial)), None)
            if found is None:
                raise SnapshotRejected("taking a snapshot", "it could not be read back", "The log says why.")
        rejected = found is not None and bool(found.nonfinite) and not manual
        if manual and found is not None and found.nonfinite:
            logger.warning("step %s: a manual snapshot is not finite: %s", info.step, ", ".join(found.nonfinite[:8]))
        spent = time.perf_counter() - started
        self._pace.took(spent)
        self.count(snapshots=int(not rejected), snapshots_rejected=int(rejected), snapshot_s=spent)
        return info, found

    def _take_automatic(self) -> tuple[str, ...]:
        """Take the snapshot that is due. Returns the names of non-finite tensors, for which it was rejected."""
        self._last_automatic = self.completed
        first = not any(slot.phase in ring.READABLE for slot in self.keeper.ring)
        try:
            with Shield() as shield:
                info, found = self.take(shield, manual=False, wait=first)
                if first and (found is None or not found.nonfinite):
                    self.keeper.certify(info)
        except (SlotsBusy, CaptureInProgress):
            # a graph capture comes first, and so does who took the last slot meanwhile; the next cadence tries again
            self.count(snapshots_deferred=1)
            return ()
        except (UnsupportedState, DeviceLost):
            raise
        except Exception as error:
            # out of memory, or an extra that raised: the last certified snapshot is still there, so training goes on
            self.count(snapshots_failed=1)
            logger.warning("step %d: no snapshot could be taken: %s", self.completed, error)
            return ()
        return () if found is None else found.nonfinite

    # ------------------------------------------------------------ rollback and recovery

    def answer(self, vital: VitalSigns, verdict: Verdict, *, disagreements: int = 0) -> Rewind:
        """Roll back, arrange the data, report; then end the run if the retry budget is spent.

        Args:
            vital: Of the step that panicked.
            verdict: Its panic.
            disagreements: Executions of the same steps that came to different bytes, less one. The data is not to
                blame, so all of it is replayed, and random state is as it was, whatever its policy.
        """
        if world_size() > 1:
            self.report(vital, verdict, "observe", None, note="several ranks: not rolled back")
            self._unanswered = None
            refuse_several_ranks(vital.step)
        if not disagreements and (answered := self.from_past(vital, verdict)) is not None:
            return answered
        onset = vital.step if verdict.onset is None else verdict.onset
        before = self.recovery
        batches = self.history.of(onset, vital.step)
        first, last = batches or self._blamed(onset, vital.step)
        report = RollbackReport(success=False, status="failed", env_id=self.config.env_id, reason=verdict.reason)
        with Shield() as shield:  # an interrupt between the rollback and its bookkeeping would lose the batches
            self.recovery, plan = recover.decide(
                before,
                policy=self.config.recovery,
                tick=self.tick,
                onset_batch=first,
                panic_batch=last,
                reach=self.config.probation * self.history.widest(onset, vital.step),
                can_replay=self.feed.is_used,
                disagreements=disagreements,
            )
            try:
                self.keeper.restore(
                    shield,
                    report,
                    completed=lambda: self.abandoned,
                    generations_back=plan.generations_back,
                    onset=onset,
                    steps_back=plan.steps_back,
                    verify_before=True,
                    patient=True,
                    read_back=True,
                )
            except (*UNTOUCHED, KeyboardInterrupt):  # the panic is not over because it could not be answered now
                self.recovery, self._unanswered = before, (vital, verdict)
                raise
            rewind = self.rewind(plan.skipped, further=plan.further if batches else 0, rekeys=plan.rekeys)
            self.treat(plan)
            repeats = disagreements > 0 and not rewind.note
            if not self.after_rollback(report, rewind, rekeys=plan.rekeys, repeats=repeats) and plan.moments == "keep":
                self.again.note_return(self.completed)  # else what follows did not begin with the snapshot's state
            action = recover.Action.SKIP.value if rewind.note else plan.action.value
            self.report(vital, verdict, action, report, rewind, rewind.note, plan)
        if plan.action is recover.Action.STOP:
            raise recover.spent(self.recovery, self.config.recovery, vital.step, verdict.reason, report.snapshot_step)
        return rewind

    def _blamed(self, onset: int, step: int) -> tuple[int, int]:
        """Batches of a panic whose steps took none: open ones, or the next. Counts stand in where nobody watches."""
        if self.feed.is_delivering:
            return self.feed.position, max(self.feed.position, self.feed.upcoming - 1)
        return self.tick - (step - onset), self.tick

    def treat(self, plan: recover.Plan) -> None:
        """What a policy changes in the state that was restored: the learning rate from here on, and the moments."""
        self.count(troubles=int(plan.attempt == 1), troubles_returned=int(plan.attempt == 2))
        self.recovery = recover.cooled(self.recovery, plan, self.completed)
        self.keeper.treat_moments(plan.moments)

    def rewind(self, skip: range | None, *, further: int = 0, rekeys: bool = False) -> Rewind:
        return self.feed.rewind(self._position, skip, self._rng_policy() == "restore" and not rekeys, further)

    def roll_back(self, report: RollbackReport, to: Target, optimizer: Optimizer | None, verify: str | None) -> None:
        """A rollback on request. Data goes on: batches delivered since the snapshot are not delivered again."""
        with Shield() as shield:
            try:
                self.keeper.restore(
                    shield,
                    report,
                    completed=lambda: self.abandoned,
                    to=to,
                    optimizer=optimizer,
                    verify_before=verify == "before",
                    read_back=verify is not None,
                )
            except BaseException:
                report.status = "failed"  # a boundary may be what raises, but who queued it holds only the report
                raise
            rewind = self.rewind(None)
            self.after_rollback(report, rewind)
            verdict = Verdict(Health.PANIC, report.panic_step, report.reason, report.panic_step)
            self.report(VitalSigns(step=report.panic_step), verdict, "manual", report, rewind)
        self.on_step()

    def after_rollback(
        self, report: RollbackReport, rewind: Rewind, *, rekeys: bool = False, repeats: bool = False
    ) -> bool:
        """Count it, and re-key random state where draws would repeat, unless they must. Answers whether it did."""
        self._pace.interrupted()
        self.count(
            rollbacks=1,
            steps_lost=report.steps_lost,
            replayed_batches=rewind.replayed,
            skipped_batches=rewind.skipped,
            rollback_s=report.host_ms / 1e3,
            gate_wait_s=report.wait_ms / 1e3,
        )
        policy = self._rng_policy()
        # skipped batches had drawn shuffle seeds or augmentation from random state that was just put back
        if rekeys := not repeats and (policy == "fork" or (policy == "restore" and (rewind.drew or rekeys))):
            rng.rekey(self.statistics.rollbacks)
        return rekeys

    def report(
        self,
        vital: VitalSigns,
        verdict: Verdict,
        action: str,
        report: RollbackReport | None,
        rewind: Rewind = NO_REWIND,
        note: str = "",
        plan: recover.Plan = recover.NO_PLAN,
    ) -> None:
        """One line in the ledger."""
        barrier, batches = self.keeper.ground.barrier.value, (rewind.replayed, rewind.skipped + rewind.ahead)
        incident = incident_of(vital, verdict, action, report, batches, note, barrier, self.config.env_id)
        after = replace(incident, attempt=plan.attempt, moments=plan.moments, lr_factor=self.learning_rate_factor())
        self._ledger.write(after, self._tally.read)

    # ------------------------------------------------------------ counters, resume

    def count(self, **increments: float) -> None:
        """Add to the statistics; from any thread."""
        self._tally.add(increments)

    @property
    def statistics(self) -> Statistics:
        """Counters so far; they never go back."""
        return self._tally.read()

    def learning_rate_factor(self) -> float:
        """Factor on the learning rate for the next step."""
        return recover.learning_rate_factor(self.recovery, self.completed, self.config.recovery)

    def forget(self) -> None:
        """A new episode: detectors and the retry budget start afresh."""
        with self._judge_lock:
            self._forget_outstanding(-1)
            self._judgement = self._detector.init()
            self._judged.clear()
        self.recovery = recover.RecoveryState()

    def state_dict(self) -> dict[str, Any]:
        """Plain values only."""
        now = resume.Bookkeeping(self.completed, self.tick, self._judgement, self.recovery, self.statistics)
        return resume.as_json(now)

    def load_state_dict(self, saved: Any) -> None:
        """The inverse, also after a round trip through JSON. Raises `UsageError` for another schema."""
        books = resume.from_json(saved, self._detector.init())
        self.completed = self._last_automatic = books.completed
        self.tick, self._judgement, self.recovery = books.tick, books.judgement, books.recovery
        self._tally.set(books.statistics)
        with self._judge_lock:
            self._forget_outstanding(-1)
            self._judged.clear()
            self.verdict = Verdict(Health.HEALTHY, self.completed)
