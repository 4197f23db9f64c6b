"""Every error tolaria raises, sorted by whose doing it is.

    TolariaError
      UsageError               you called it wrongly; nothing was changed
        PhaseError               not now: inside a section, a backward, or another submission
        UnsupportedState         this kind of state or set-up is not handled yet (docs/guarantees.md, "not yet")
        InvalidConfig            a value that cannot work (also a ValueError)
      SafetyError              it could not be shown to be safe; nothing was changed
        QuiesceTimeout           open sections did not close in time
        CaptureInProgress        a graph capture is active on the device
        NoSnapshot               there is nothing good to go back to
        SlotsBusy                every slot holds something that may not be overwritten
        StateMismatch            the train state no longer has the shape the snapshot has
        StaleGradients           gradients began before a rollback (raised in strict mode)
        BudgetExceeded           the snapshot does not fit into memory
        SnapshotRejected         a snapshot is not finite, or its bytes changed since they were sealed
      RetryBudgetExceeded      rolled back correctly, but the trouble keeps returning; ends a run at the last good state
      RollbackFailed           failed after the first write; the train state is undefined
        RollbackDisturbed        somebody wrote what was being restored
      DeviceLost               a sticky device error; this process cannot use the device again
      TolariaInternalError     a bug in tolaria; its invariants are void

A message reads: *what was being done: what was seen, what was expected. Is the train state intact. What to do next.*
"""

from __future__ import annotations


class TolariaError(Exception):
    """Base of all errors of this package.

    Args:
        doing: What was being done, and at which step where that is known.
        seen: What was seen, and what was expected instead.
        advice: What the reader can do next.

    Attributes:
        state_intact: True when the train state is exactly what it was before the call (or, for
            `RetryBudgetExceeded`, exactly the last good state). False only for `RollbackFailed` and
            `TolariaInternalError`.
    """

    state_intact: bool = True
    _state_sentence = "The train state is intact."

    def __init__(self, doing: str, seen: str, advice: str) -> None:
        self.doing, self.seen, self.advice = doing, seen, advice
        super().__init__(f"{doing}: {seen}. {self._state_sentence} {advice}")

    def __reduce__(self) -> tuple[type[TolariaError], tuple[str, str, str]]:
        """Rebuild from the three parts, so that errors cross process borders (data loader workers, launchers)."""
        return type(self), (self.doing, self.seen, self.advice)


class UsageError(TolariaError):
    """You called it wrongly. Nothing was changed. In contrast to `SafetyError`, retrying the same call cannot help."""


class PhaseError(UsageError):
    """Legal, but not at this moment: inside a section, a hook, a backward, or after `close`. Nothing was changed."""


class UnsupportedState(UsageError):
    """A kind of tensor, device or set-up that cannot be restored exactly yet, by name. Nothing was changed."""


class InvalidConfig(UsageError, ValueError):
    """A configuration value that cannot work. Nothing was changed."""


class SafetyError(TolariaError):
    """It could not be shown to be safe, so nothing was changed. The circumstances, not the call, are at fault."""


class QuiesceTimeout(SafetyError):
    """Sections of other threads stayed open longer than `gate_timeout_s`. Nothing was changed; call again."""


class CaptureInProgress(SafetyError):
    """A graph capture is active; touching the device would destroy it. Nothing was changed; call again after it."""


class NoSnapshot(SafetyError):
    """No manual or certified snapshot exists (or not the one asked for). Nothing was changed."""


class SlotsBusy(SafetyError):
    """Every slot holds the last good snapshot or a candidate in probation. No snapshot was taken, none was lost."""


class StateMismatch(SafetyError):
    """Parameters were moved since the snapshot, or its structure cannot come back. Raised before the first write."""


class StaleGradients(SafetyError):
    """A backward straddled a rollback: its gradients belong to weights that are gone. They were dropped."""


class BudgetExceeded(SafetyError):
    """There is not enough memory for one more slot. The train state and the snapshots held so far are intact."""


class SnapshotRejected(SafetyError):
    """A snapshot holds non-finite values, or its bytes changed after they were sealed. It was not used."""


class RetryBudgetExceeded(TolariaError):
    """The same trouble came back more often than the policy allows.

    The rollback itself succeeded: the train state is the last good one and can be saved or inspected. This is the
    exception that ends a governed run.
    """

    _state_sentence = "The train state is the last good one."


class RollbackFailed(TolariaError):
    """A rollback failed after its first write: the train state is undefined. Stop the run, or roll back once more."""

    state_intact = False
    _state_sentence = "The train state is undefined."


class RollbackDisturbed(RollbackFailed):
    """What was restored does not read back as the snapshot, whose own bytes are as they were sealed.

    Somebody outside of any section wrote the train state while, or right after, it was restored.
    """


class DeviceLost(TolariaError):
    """A sticky device error (a failed assert in a kernel, an illegal address): the device is lost to this process.

    Nothing inside the process can repair it, a rollback included. Start a new process from a checkpoint on disk.
    """

    state_intact = False
    _state_sentence = "What the device holds is out of reach."


class TolariaInternalError(TolariaError):
    """A bug in tolaria: one of its own invariants is void. Please report it with the traceback."""

    state_intact = False
    _state_sentence = "The train state may be damaged."


UNTOUCHED = (SafetyError, UsageError)
"""After one of these nothing was written, so what was asked for can be asked for again."""
