"""SETTLE: what there is to do between two bodies of the loop, at the end of the data, and when the run is over.

Between two bodies nothing of the loop is half done: steps can be run again from there, and a snapshot holds what the
body does after `step` (an average of the weights, a scheduler). At the end no later step will tell what the last ones
were worth, so everything is waited for, and a suspicion that is still open is looked at once more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tolaria import recover, ring
from tolaria.coordinate import world_size
from tolaria.course import Course
from tolaria.errors import UNTOUCHED, SafetyError
from tolaria.feed import Rewind
from tolaria.records import Health, Incident, Verdict, VitalSigns
from tolaria.report import RollbackReport, logger
from tolaria.ring import Slot
from tolaria.shield import Shield
from tolaria.target import chooser

STILL_OPEN = "still open at the end"
"""Ends the reason of an incident that is about a suspicion, not about a panic of its own."""

Panic = tuple[VitalSigns, Verdict]


def is_second_look(incident: Incident) -> bool:
    """Whether it is about a suspicion whose steps were run again for want of later ones; no panic."""
    return incident.attempt == 0 and incident.reason.endswith(STILL_OPEN)


class Settlement:
    """Settles what one course has left open.

    Args:
        course: Of the run.

    Attributes:
        looks_again: Whether a suspicion that is open at the end of the data is looked at again here. Not where a
            framework counts the batches, which answers it before (`follow`).

    Threads: the one that is fed by `watch`, between two bodies of its loop; `finish` by whoever ends the run.
    """

    def __init__(self, course: Course) -> None:
        self._course = course
        self.looks_again = True
        self.between: Callable[[], None] = lambda: None  # called at the boundary, before anything else and after it
        # numbers of the batches that would have come next where a suspicion was looked at: each time is the only one
        self._looked: set[int] = set()

    def settle(self, at_the_end: bool) -> None:
        """The loop body is over: run steps again, take the snapshot that is due. At the end of the data, judge all.

        A loop that fetches a batch ahead is seen to have one open, and gets its snapshot inside the following step.
        """
        course = self._course
        self.between()
        if not course.feed.has_open and course.again.is_due(course.completed, at_the_end or course.due is not None):
            self._reexecute(at_the_end)
        if course.verdict.health is not Health.HEALTHY:
            course.due = None  # steps that were judged only now, here or by whoever asked (`state_dict`)
        panic = None
        if course.due is not None and not course.feed.has_open:
            panic = course.snapshot_or_panic(course.due)
            course.again.note_snapshot(course.completed)
        if panic is None and at_the_end and course.config.mode == "observe":
            course.watch_only(wait=True)
        elif panic is None and at_the_end:
            panic = course.catch_up(wait=True) or self._left_torn() or self._look_again()
        if panic is not None:
            course.answer(*panic)
        self.between()

    def finish(self) -> bool:
        """The run is over, wherever its loop was left: wait for all verdicts.

        Nobody asks for batches any more, so a panic is answered by a rollback alone, to before its onset.

        Returns:
            Whether the state was rolled back.
        """
        course = self._course
        if course.config.mode == "observe":
            course.watch_only(wait=True)
            return False
        has_begun = ring.newest_good(course.keeper.ring) is not None  # else whoever broke a step has seen its error
        panic = course.catch_up(wait=True) or (self._left_torn() if has_begun else None)
        if panic is not None and world_size() > 1:
            course.answer(*panic)  # which reports it, and refuses
        if panic is not None:
            try:
                self._go_back(*panic, None)
            except UNTOUCHED:  # it stays open: the next call, or step, tries again
                course._unanswered = panic
                raise
        return panic is not None

    def tell_what_is_open(self) -> None:
        """Log what will never be known or answered, because the governor is let go of now."""
        num, panic = self._course.unsettled()
        if num:
            logger.warning("closed with %d steps whose verdicts had not arrived: call finish() first", num)
        if panic is not None:
            logger.warning("closed with a panic that was not answered (step %d: %s)", panic.step, panic.reason)

    # ------------------------------------------------------------ steps that are run again

    def _reexecute(self, at_the_end: bool) -> None:
        """Run the steps since the last snapshot again, or compare what came of it, if healthy or the last there are."""
        course = self._course
        if (panic := course.catch_up(wait=True)) is not None:
            course.answer(*panic)
        elif at_the_end or course.verdict.health is Health.HEALTHY:
            step = VitalSigns(step=course.completed)
            verdict, report, rewind = course.again.examine(course.completed)
            if verdict is not None and not verdict.is_panic:
                course.report(step, verdict, "observe", None, note=course.again.why_off)
            elif verdict is not None:
                course.count(panics=1)
                executions = course.again.pending()
                if not course.answer(step, verdict, disagreements=int(verdict.evidence["executions"]) - 1).note:
                    course.again.resume(executions)
            elif report is not None and report.corrupted_steps:
                found = Verdict(Health.SUSPECT, step.step, "corrupted snapshot")
                course.report(step, found, recover.Action.REPLAY.value, report, rewind, rewind.note)

    # ------------------------------------------------------------ the end

    def _left_torn(self) -> Panic | None:
        """A panic when the very last step raised half-way, so that no later one could be judged torn."""
        course = self._course
        step, is_torn = course.completed + 1, course.keeper.driver.state.torn
        course.count(panics=int(is_torn))
        if not is_torn:
            return None
        return VitalSigns(step=step), Verdict(Health.PANIC, step, "a write raised half-way", step)

    def _look_again(self) -> Panic | None:
        """The data has ended amid a suspicion: train its steps once more, from the last good snapshot before them.

        Transient damage does not return, and a replay of healthy steps is exact. What returns is a panic where there
        has just been one: then it is lasting. Elsewhere it passes: most suspicions are benign, and the batches would be
        lost for nothing.
        """
        course, found = self._course, self._doubt()
        if found is None or not self.looks_again or course.feed.num_again:
            return None
        if self._is_first_look():
            self._run_again(found)
            return None
        onset = self._onset(found)
        batches = course.history.of(onset, found.step)
        reach = course.config.probation * course.history.widest(onset, found.step)
        if batches and recover.is_known(course.recovery, batches[0], reach):
            course.count(panics=1)
            return VitalSigns(step=found.step), replace(found, health=Health.PANIC)
        self._let_pass(found)
        return None

    def look_again_now(self) -> Verdict | None:
        """The same before a file is written, say, and without any panic: what returns passes, as later steps will tell.

        Returns:
            The suspicion, with its rollback made and its steps about to come again; None: there was no rollback.
        """
        found = self._doubt()
        if found is None:
            return None
        if self._is_first_look():
            return found if self._run_again(found) else None
        self._let_pass(found)
        return None

    def _doubt(self) -> Verdict | None:
        """The suspicion that is open; not with several ranks, which go back together or not at all."""
        verdict = self._course.verdict
        if verdict.health is not Health.SUSPECT or world_size() > 1:
            return None
        return replace(verdict, reason=f"{verdict.reason}, {STILL_OPEN}", onset=self._onset(verdict))

    def _onset(self, verdict: Verdict) -> int:
        return verdict.step if verdict.onset is None else verdict.onset

    def _is_first_look(self) -> bool:
        """Whether no suspicion was looked at here yet: two of them would send each other back for ever."""
        here = self._course.feed.upcoming
        is_first = here not in self._looked
        self._looked.add(here)
        return is_first

    def _run_again(self, found: Verdict) -> bool:
        """Go back and have the steps come again, where they can. Answers whether they do."""
        onset = self._onset(found)
        if not self._can_run_again(chooser(None, 0, onset)(self._course.keeper.ring, None), onset):
            self._let_pass(found)
            return False
        try:
            self._go_back(VitalSigns(step=found.step), found, range(0))
        except SafetyError as error:  # nothing was written
            logger.warning("step %d: %s, and not run again: %s", found.step, found.reason, error)
            return False
        return True

    def _let_pass(self, found: Verdict) -> None:
        logger.warning("step %d: %s (since step %d); the state is kept", found.step, found.reason, found.onset)

    def _can_run_again(self, slot: Slot | None, onset: int) -> bool:
        """Whether nothing but bodies of this very loop would be repeated, and every batch is at hand."""
        feed, keeper = self._course.feed, self._course.keeper
        host = None if slot is None else keeper.vault.slots[slot.index].host
        if slot is None or host is None or slot.completed >= onset or feed.num_delivering != 1:
            return False
        position = host.journal.position
        return position >= feed.first_of_pass and not feed.obstacle(position)

    def _go_back(self, vital: VitalSigns, verdict: Verdict, skip: range | None) -> Rewind:
        """Roll back to before the onset, outside of any policy; report it."""
        course = self._course
        action = (recover.Action.REPLAY if skip is not None else recover.Action.SKIP).value
        report = RollbackReport(success=False, status="failed", env_id=course.config.env_id, reason=verdict.reason)
        with Shield() as shield:
            course.keeper.restore(
                shield,
                report,
                completed=lambda: course.abandoned,
                onset=verdict.onset,
                verify_before=True,
                patient=True,
                read_back=True,
            )
            rewind = course.rewind(skip)
            if not course.after_rollback(report, rewind, repeats=skip is not None and not rewind.note):
                course.again.note_return(course.completed)
            course.report(vital, verdict, action, report, rewind, rewind.note)
        return rewind
