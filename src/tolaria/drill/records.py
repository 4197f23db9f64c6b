"""The facts that flow from a run to its score, picture and report. Host values only: no tensor, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from tolaria.records import Incident


@dataclass(frozen=True, slots=True)
class Trained:
    """One optimizer step, whether or not it was undone later.

    Attributes:
        step: Optimizer steps in the past of the state, this one included: what the governor counts.
        batch: Index of its batch.
        loss: Its training loss; may be NaN or infinite.
        struck: Names of the faults that struck in it.
    """

    step: int
    batch: int
    loss: float
    struck: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RunAgain:
    """The governor went back to run healthy steps a second time, and compare.

    Attributes:
        step: Steps in the past of the state before that.
        restored_step: And after it.
    """

    step: int
    restored_step: int


@dataclass(slots=True, eq=False)
class RunRecord:
    """One whole run.

    Attributes:
        name: ``"clean"``, ``"unguarded"``, ``"guarded"`` or ``"reference"``.
        events: Steps, incidents and re-executions in the order in which they happened. An incident follows the step it
            judged.
        digests: Digest of the train state by step, every few steps; none of a step that was undone.
        val_loss: Validation loss at the end; NaN when the run did not get there.
        weights_finite: Every parameter at the end.
        state_digest: Of the train state at the end.
        ended_by: The error that ended the run early; empty otherwise.
    """

    name: str
    events: list[Trained | Incident | RunAgain] = field(default_factory=list)
    digests: dict[int, str] = field(default_factory=dict)
    val_loss: float = math.nan
    weights_finite: bool = False
    state_digest: str = ""
    ended_by: str = ""

    @property
    def incidents(self) -> list[Incident]:
        """In order."""
        return [event for event in self.events if isinstance(event, Incident)]

    @property
    def kept(self) -> list[Trained]:
        """The steps that were not undone, in order: the past of the final state."""
        kept: list[Trained] = []
        for event in self.events:
            if isinstance(event, Trained):
                kept.append(event)
            elif event.restored_step is not None:
                while kept and kept[-1].step > event.restored_step:
                    kept.pop()
        return kept

    def note_rollback(self, restored_step: int) -> None:
        """Forget the digests of steps that were undone."""
        for step in [step for step in self.digests if step > restored_step]:
            del self.digests[step]
