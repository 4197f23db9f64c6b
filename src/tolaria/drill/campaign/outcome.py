"""What a trial came to. Pure: host values in, host values out.

*Recovered*: the governor answered, and the train state at the end is bit-identical to that of an undisturbed training
on the batches in its past (those that were skipped never existed); where batches were skipped, the validation loss is
also at most 1.3 times the clean run's. Where the recovery changed the learning rate, that bound alone counts.

*Unharmed*: the same state, and there was nothing to answer.

*Ended*: an error of tolaria's ended the run. `RetryBudgetExceeded` says that the state is the last good one, which is
checked bit for bit; any other says that its call has changed nothing, and a second call must find the same bytes.

Everything else is a miss, by name. *Silent* is the worst of them: a wrong state, and nobody was told.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from tolaria.drill.campaign.kinds import Ending

TOLERANCE = 1.3
"""Greatest validation loss, in units of the clean run's."""


class Outcome(Enum):
    """See the head of this file."""

    RECOVERED = "recovered"
    UNHARMED = "unharmed"
    ENDED = "ended"
    SILENT = "silent"  # no panic, and a wrong state
    WRONG = "wrong"  # a panic was answered, and the state is wrong all the same
    WORSE = "worse"  # exact, but so much was skipped that the run has not learnt enough
    FALSE = "false"  # a panic before anything had happened
    CRASHED = "crashed"  # an error that is not tolaria's
    UNTOUCHED = "untouched"  # the fault never struck: the campaign's own mistake

    @property
    def is_good(self) -> bool:
        """Whether the trial counts as passed."""
        return self in (Outcome.RECOVERED, Outcome.UNHARMED, Outcome.ENDED)


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of one trial.

    Attributes:
        struck: Blows that fell.
        panics: Answered ones.
        is_false: One of them came before the first blow.
        skipped: Batches that are not in the past of the final state, of those offered.
        bad_kept: Bad batches that are.
        is_equal: The final state is that of an undisturbed training on the batches in its past, bad ones included.
        ratio: Validation loss in units of the clean run's; NaN when it is not finite, or the run ended early.
        ended_by: Name of the error that ended the run; empty otherwise.
        is_honest: What that error says of the state is true.
    """

    struck: int
    panics: int
    is_false: bool = False
    skipped: int = 0
    bad_kept: int = 0
    is_equal: bool = False
    ratio: float = math.nan
    ended_by: str = ""
    is_honest: bool = False


def judge(facts: Facts, ending: Ending, is_control: bool = False) -> Outcome:
    """What the facts come to, for a kind that may end like that."""
    if facts.is_false:
        return Outcome.FALSE
    if not facts.struck and not is_control:
        return Outcome.UNTOUCHED
    if facts.ended_by:
        return Outcome.ENDED if facts.is_honest else Outcome.CRASHED
    if not facts.panics:
        return Outcome.UNHARMED if facts.is_equal and not facts.bad_kept else Outcome.SILENT
    learnt = facts.ratio <= TOLERANCE  # False for NaN
    if ending is Ending.CLOSE:
        return Outcome.RECOVERED if learnt else Outcome.WORSE
    if not facts.is_equal:
        return Outcome.WRONG
    return Outcome.WORSE if (facts.skipped or facts.bad_kept) and not learnt else Outcome.RECOVERED
