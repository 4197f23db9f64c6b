"""REEXECUTE: now and then runs the steps since the last snapshot again and compares what they came to, bit for bit.

A flipped bit that moves a weight a little raises no alarm, whoever judges losses. But the same steps, from the same
snapshot and with the same batches, come to the same bytes: where two executions differ, one of them was disturbed. The
difference is a panic (`SILENT`); its replay is a third execution, and shows by the company it keeps which of the two
was.

Before that is trusted, two healthy steps are run twice. Where the executions differ, a third one tells a model that is
not deterministic, for which re-execution switches itself off, from a step that was disturbed. Later on a third result
is more likely to be a second disturbance, so it goes on until two executions agree, or five have not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

from tolaria import ring
from tolaria.admission import refuse_in_capture
from tolaria.coordinate import world_size
from tolaria.device import QueuedDevice
from tolaria.errors import SafetyError
from tolaria.feed import NO_REWIND, Feed, Rewind
from tolaria.keeper import Keeper
from tolaria.operations import Await, Barrier, HostState
from tolaria.records import Health, Verdict
from tolaria.report import RollbackReport, logger
from tolaria.ring import Slot
from tolaria.shield import Shield

SILENT = "silent corruption"
"""The reason of the panic that follows when two executions differ."""

_MOST_EXECUTIONS = 5  # of the same steps, once two executions of others have agreed
_ORDINALS = ("first", "second", "third", "fourth", "fifth")
_NUMBERS = ("one", "two", "three", "four", "five")


@dataclass(frozen=True, slots=True)
class Base:
    """A snapshot taken at the end of a loop body, so that the loop can be run again from there.

    Attributes:
        slot: As it was then.
        position: Index of the batch that came next.
        passes: Passes over a loader that had ended by then.
    """

    slot: Slot
    position: int
    passes: int


@dataclass(frozen=True, slots=True)
class Executions:
    """What became of the steps after `first` up to `last`, each time that they were run.

    Attributes:
        first: Steps completed at their beginning.
        last: Steps completed at their end.
        digests: Of the train state there, one per execution.
    """

    first: int
    last: int
    digests: tuple[str, ...] = ()

    @property
    def agree(self) -> bool:
        """Whether the last execution came to what an earlier one has come to."""
        return self.digests[-1] in self.digests[:-1]

    def disturbed(self) -> str:
        """Which executions came to something else than the last."""
        odd = [name for name, digest in zip(_ORDINALS, self.digests, strict=False) if digest != self.digests[-1]]
        several = len(odd) > 1
        names = f"{', '.join(odd[:-1])} and {odd[-1]}" if several else odd[0]
        return f"the {names} execution{'s were' if several else ' was'} disturbed"


class Reexecution:
    """Decides when steps are run again, rolls back for it, and compares.

    Args:
        every: The steps since the last snapshot are run again when they include a multiple of this; 0 never.
        keeper: Holds the snapshots.
        feed: Delivers the batches again.
        rewind: Puts the data back to where the snapshot restored last stands, and answers what came of it.
        count: Adds to the statistics.

    Attributes:
        why_off: Why there is none (any more); empty while there is.

    Threads: the one that is fed by `watch`, between two bodies of its loop.
    """

    def __init__(
        self, every: int, keeper: Keeper, feed: Feed, rewind: Callable[[], Rewind], count: Callable[..., None]
    ) -> None:
        self._every, self._keeper, self._feed, self._rewind, self._count = every, keeper, feed, rewind, count
        self.why_off = "" if every else "not asked for"
        self._is_trusted = False
        self._base: Base | None = None
        self._bases: dict[int, Base] = {}  # by snapshot, as long as it is held
        self._executions: Executions | None = None
        self._compared = -1  # steps completed when two executions agreed, unless there was a rollback since
        self._told = ""

    @property
    def in_force(self) -> str:
        """``"on"``, or ``"off: "`` and the reason."""
        return f"off: {self.why_off}" if self.why_off else "on"

    # ------------------------------------------------------------ when

    def note_snapshot(self, completed: int) -> None:
        """The loop body is over, and the train state is that of the snapshot just taken, if one was."""
        slot = self._newest()
        taken_now = slot is not None and not slot.manual and slot.completed == completed
        if slot is not None and taken_now and not self.why_off and not self._feed.has_open:
            self._base = Base(slot, self._feed.position, self._feed.passes)
            held = {slot.snapshot for slot in self._keeper.ring if slot.phase in ring.READABLE}
            self._bases = {snapshot: base for snapshot, base in self._bases.items() if snapshot in held}
            self._bases[slot.snapshot] = self._base

    def note_return(self, completed: int) -> None:
        """A panic was answered: what follows the snapshot that was restored can be run again like anything else."""
        slot = self._newest()
        if slot is not None and slot.completed == completed:
            self._base = self._bases.get(slot.snapshot)

    def forget(self) -> None:
        """There was a rollback: nothing of what was noted is in the past any more."""
        self._base = self._executions = None
        self._compared = -1

    def is_due(self, completed: int, snapshot_is_due: bool) -> bool:
        """Whether `examine` has something to do at the end of this loop body. The end of the data is due as well."""
        if self.why_off or completed == self._compared:
            return False
        if self._executions is not None:
            return completed >= self._executions.last
        if self._base is None or completed <= self._base.slot.completed or not self._can_run_again(self._base):
            return False
        first = self._base.slot.completed
        due = not self._is_trusted or (snapshot_is_due and completed // self._every > first // self._every)
        if due and snapshot_is_due and not self._feed.is_in_step:
            self._say("steps are not run again: some took more batches than others, as in a loop that fetches ahead")
        return due and self._feed.is_in_step

    def _can_run_again(self, base: Base) -> bool:
        """Whether nothing has happened since that running the loop again from there would miss, or destroy."""
        newest = self._newest()
        same = newest is not None and newest.snapshot == base.slot.snapshot  # else a manual one would be dropped
        return same and self._feed.passes == base.passes and self._feed.num_delivering == 1

    def _newest(self) -> Slot | None:
        readable = [slot for slot in self._keeper.ring if slot.phase in ring.READABLE]
        return max(readable, key=lambda slot: slot.snapshot, default=None)

    # ------------------------------------------------------------ what

    def examine(self, completed: int) -> tuple[Verdict | None, RollbackReport | None, Rewind]:
        """Note the train state, and run the steps since the last snapshot again, or compare.

        Call it at the end of a loop body, when `is_due`, with all steps so far judged healthy.

        Returns:
            A panic when two executions differ, or a suspicion when that is given up (else None); what the rollback for
            another execution has met, and where the data went, if there was one.
        """
        noted, base = self._executions, self._base
        try:
            if noted is not None:
                verdict, once_more = self._compare(noted, completed)
                if base is None or once_more is None:
                    return verdict, None, NO_REWIND
                return (None, *self._run_again(base, once_more))
            if base is not None:
                return (None, *self._begin(base, completed))
        except SafetyError as error:  # nothing was written; there will be other steps to run again
            self.forget()
            self._say(f"step {completed}: steps are not run again: {error}")
        return None, None, NO_REWIND

    def _begin(self, base: Base, completed: int) -> tuple[RollbackReport | None, Rewind]:
        obstacle = self._feed.obstacle(base.position)
        if obstacle or world_size() > 1:
            self._switch_off(obstacle or "several ranks: a rollback on one of them alone would ruin the others")
            return None, NO_REWIND
        return self._run_again(base, Executions(base.slot.completed, completed, (fingerprint(self._keeper),)))

    def _run_again(self, base: Base, noted: Executions) -> tuple[RollbackReport | None, Rewind]:
        """Go back to the snapshot for one more execution of what was `noted`."""
        report = RollbackReport(success=False, status="failed", reason="re-execution")
        with Shield() as shield:  # an interrupt between the rollback and its bookkeeping would lose the batches
            self._keeper.restore(
                shield,
                report,
                completed=lambda: noted.last,
                to=base.slot.step,
                verify_before=True,
                patient=True,
                routine=True,
            )
            rewind = self._rewind()
            self._executions = None if rewind.note else noted
            self._base = None if report.corrupted_steps else base  # the journal's return has made us forget
            self._count(reexecutions=1, reexecuted_steps=report.steps_lost, gate_wait_s=report.wait_ms / 1e3)
        return report, rewind

    def _compare(self, noted: Executions, completed: int) -> tuple[Verdict | None, Executions | None]:
        """A panic when a trusted comparison fails; what to run once more when one fails that is not trusted yet.

        No panic but a suspicion when it is given up: nobody can tell which of the results is right, if any.
        """
        self._executions = None
        if completed > noted.last:  # its end was not seen: a loop that fetches ahead
            return None, None
        noted = replace(noted, digests=(*noted.digests, fingerprint(self._keeper)))
        steps, num = f"steps {noted.first + 1} to {noted.last}", len(noted.digests)
        if noted.agree:
            if num > 2:
                logger.warning("%s: %s; the %s is kept", steps, noted.disturbed(), _ORDINALS[num - 1])
            self._is_trusted = True
            self._compared = completed
            return None, None
        if not self._is_trusted and num <= 2:
            return None, noted
        evidence = {"executions": float(num)}
        if num >= (_MOST_EXECUTIONS if self._is_trusted else 3):
            number = _NUMBERS[num - 1]
            different = f"{steps}, run {number} times, came to {number} results"
            if not self._is_trusted:
                self._switch_off(f"{different}: the model is not deterministic here")
                return None, None
            self._switch_off(f"{different}: not deterministic, or a broken machine")
            return Verdict(Health.SUSPECT, completed, SILENT, noted.first + 1, evidence), None
        self._executions = noted
        return Verdict(Health.PANIC, completed, SILENT, noted.first + 1, evidence), None

    def pending(self) -> Executions | None:
        """What to `resume` with after the rollback for a third execution, which makes this forget."""
        return self._executions

    def resume(self, executions: Executions | None) -> None:
        """The rollback for a third execution has taken place, and all batches come again."""
        self._executions = executions

    # ------------------------------------------------------------ words

    def _switch_off(self, why: str) -> None:
        self.forget()
        self.why_off = why
        logger.warning("re-execution is switched off: %s", why)

    def _say(self, what: str) -> None:
        if what != self._told:
            self._told = what
            logger.warning("%s", what)


def fingerprint(keeper: Keeper) -> str:
    """The digest of the train state once every device has done what it was given. Blocks the host.

    Raises:
        CaptureInProgress, QuiesceTimeout: A graph capture is in progress, which any waiting would invalidate.
    """
    if keeper.ground.barrier is Barrier.HOST:
        return keeper.state.digest()
    thread = threading.get_ident()

    def enter(state: HostState) -> tuple[HostState, None] | None:
        refuse_in_capture(state, thread, "comparing two executions", patient=True)
        return None if state.captures else (replace(state, ordering=state.ordering + 1), None)

    keeper.driver.perform(Await("compare: wait for graph captures", enter, keeper.ground.gate_timeout_s))
    try:
        for name, port in keeper.devices.items():
            if port.barrier is Barrier.CONTEXT:
                queued = cast("QueuedDevice", port)
                queued.host_wait(queued.context_record())
            elif port.barrier is Barrier.STREAMS:
                queued = cast("QueuedDevice", port)
                for _, stream in filter(lambda known: known[0] == name, keeper.driver.state.streams or ()):
                    queued.host_wait(queued.known_record(stream))
            else:
                port.synchronize()
        return keeper.state.digest()
    finally:
        keeper.driver.change(lambda s: (replace(s, ordering=s.ordering - 1), None))
