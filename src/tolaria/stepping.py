"""STEPPING: when a governor takes notes of single steps, and what follows when it goes back to one (docs/optim.md)."""

from __future__ import annotations

import time
from collections.abc import Callable

from tolaria import recover
from tolaria.course import Course
from tolaria.errors import CaptureInProgress, DeviceLost, SafetyError, UnsupportedState
from tolaria.feed import Rewind
from tolaria.notes import Notes
from tolaria.records import Health, Verdict, VitalSigns
from tolaria.report import RollbackReport, logger
from tolaria.settlement import Settlement
from tolaria.shield import Shield


class Stepping:
    """Notes and steps back of one course.

    A note stands where a snapshot would: with `watch` between two bodies of the loop, else at the end of `step`. In a
    loop that fetches a batch ahead there is no such place between two bodies, so it is taken inside the next `step`.

    Args:
        course: Of the run.
        settlement: Tells when a body of the loop is over.

    Threads: the one that steps; `back` from any.
    """

    def __init__(self, course: Course, settlement: Settlement) -> None:
        self._course = course
        self._is_due = self._has_failed = False
        self._tried = -1  # the last batch of the last panic that was answered from a note
        if course.keeper.notes is not None:
            course.on_step, settlement.between = self._after_step, self._between
            if course.config.past_first:
                course.from_past = self._answer

    def _after_step(self) -> None:
        if self._course.feed.is_delivering and not self._is_due:
            self._is_due = True  # and it is still due at the next step if nobody came by in between
        else:
            self._note()

    def _between(self) -> None:
        notes = self._course.keeper.notes
        is_due = self._is_due or (notes is not None and notes.are_forgotten)  # by a rollback between two bodies
        if is_due and not self._course.feed.has_open:
            self._is_due = False
            self._note()

    def _note(self) -> None:
        keeper = self._course.keeper
        notes = keeper.notes
        if notes is None or not notes.can_be_taken():
            return
        try:
            with Shield() as shield:
                notes.take(shield, keeper.ground)
        except CaptureInProgress:
            return  # a graph capture comes first
        except (UnsupportedState, DeviceLost):
            raise
        except Exception as error:  # out of memory, or an extra that raised: there are snapshots, so training goes on
            if not self._has_failed:  # in a row: the next step will hardly fare better
                logger.warning("step %d: no note could be taken: %s", self._course.completed, error)
            self._has_failed = True
        else:
            self._has_failed = False

    def back(self, report: RollbackReport, steps: int) -> None:
        """Go back by that many steps, one at least, and tell of it as of a rollback by hand. Batches go on.

        Raises:
            UnsupportedState: No notes are taken.
            NoSnapshot, StateMismatch, and what else `Notes.step_back` raises: see there.
        """
        course, notes = self._course, self._course.keeper.notes
        if notes is None:
            raise UnsupportedState(
                "stepping back", "past_steps is 0, so no notes are taken of single steps", "Set it, see docs/optim.md."
            )
        with Shield() as shield:
            self._go(shield, notes, report, lambda completed: completed - steps)
            rewind = course.rewind(None)
            course.after_rollback(report, rewind)
            verdict = Verdict(Health.PANIC, report.panic_step, report.reason, report.panic_step)
            course.report(VitalSigns(step=report.panic_step), verdict, "manual", report, rewind)

    def _answer(self, vital: VitalSigns, verdict: Verdict) -> Rewind | None:
        """Answer a panic by the note from right before its onset, and the same batches again.

        Once for any batch: what is met again was there before the note, or is in the data, and `Course.answer` tells
        which. Not for what is no verdict on a step: a snapshot that is not finite, a rollback that was disturbed.

        Returns:
            None: It could not be done, and nothing was changed.
        """
        course, notes = self._course, self._course.keeper.notes
        onset = vital.step if verdict.onset is None else verdict.onset
        batches = course.history.of(onset, vital.step)
        if notes is None or vital.loss is None or batches is None or batches[0] <= self._tried:
            return None
        step = notes.newest_before(onset)
        if step is None or not course.feed.is_used:
            return None
        report = RollbackReport(success=False, status="failed", env_id=course.config.env_id, reason=verdict.reason)
        with Shield() as shield:
            try:
                self._go(shield, notes, report, lambda completed: step)
            except SafetyError:
                return None  # nothing was written
            self._tried = batches[1]
            rewind = course.rewind(range(0))
            course.after_rollback(report, rewind)
            action = recover.Action.SKIP.value if rewind.note else recover.Action.REPLAY.value
            course.report(vital, verdict, action, report, rewind, rewind.note)
        return rewind

    def _go(self, shield: Shield, notes: Notes, report: RollbackReport, wanted: Callable[[int], int]) -> None:
        """Make it, and fill in the report."""
        course, keeper, started = self._course, self._course.keeper, time.perf_counter()
        done = notes.step_back(shield, keeper.ground, wanted)
        keeper.arrivals.forget_after(done.place.serial - 1, done.place.step)
        report.host_ms = (time.perf_counter() - started) * 1e3
        report.success, report.status, report.tier = True, "submitted", "past"
        report.snapshot_step, report.panic_step = done.place.step, course.abandoned
        report.steps_lost = course.abandoned - done.place.step
        report.optimizer, report.barrier = "restored", keeper.ground.barrier.value
        report.wait_ms, report.penalty = done.waited_s * 1e3, course.config.penalty

        def finish() -> tuple[float | None, bool | None, bool]:
            keeper.wait_for(done.done)
            return notes.duration_s(done.began, done.copied) * 1e3 if done.began else None, None, False

        report._finish = finish
