"""Back where a run began: the level of a random guess."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, isfinite
from typing import NamedTuple

from tolaria.judge.detector import Detector, healthy, median, require
from tolaria.records import Health, Verdict, VitalSigns

_RECENT = 16  # losses whose median shows what was learnt


class Progress(NamedTuple):
    """How far a run has come.

    Attributes:
        first: Its first losses, until there are enough for the level of a random guess.
        level: That level; None until it is known.
        recent: The last losses that were not up there.
        best: The lowest median of them.
        streak: Steps in a row back at the level.
        onset: The first of those.
        panicked: The panic has been reported.
    """

    first: tuple[float, ...] = ()
    level: float | None = None
    recent: tuple[float, ...] = ()
    best: float | None = None
    streak: int = 0
    onset: int = 0
    panicked: bool = False


def _loss(signs: VitalSigns) -> float | None:
    return signs.loss


def collapse(
    *,
    level: float | None = None,
    steps: int = 5,
    return_to: float = 0.9,
    sign: Callable[[VitalSigns], float | None] = _loss,
    reason: str = "collapse to random guess",
) -> Detector[Progress]:
    """Panic when a run that had learnt something is back where a random guess is, and stays there.

    Args:
        level: Loss of a random guess, for example ``log(number of classes)``. None: the median of the first 5 losses.
        steps: Steps in a row that panic; at least 4, so that a spike of three never does.
        return_to: Share of the progress so far that has to be lost, in (0, 1].
        sign: What is judged in place of the loss; lower is better.
        reason: Of the verdicts.

    Returns:
        The detector. It is silent until the run has come down by six times the spread of its recent losses, and for a
        run that has gone half of the way back step by step: a slow return is the business of `loss_drift`.

    Raises:
        InvalidConfig: A value out of range.
    """
    require("collapse", steps=(steps, 4, inf), return_to=(return_to, 0.01, 1.0))

    def update(state: Progress, signs: VitalSigns) -> tuple[Progress, Verdict]:
        now, loss, step = Progress(*state), sign(signs), signs.step
        fine = healthy(step)
        if loss is None or not isfinite(loss):
            return now, fine
        if now.level is None:
            first = (*now.first, loss)
            return now._replace(first=first, level=median(first) if len(first) == 5 else None), fine
        if now.best is None or not _is_back(now, now.level, loss, return_to):
            recent = (*now.recent[-_RECENT + 1 :], loss)
            best = now.best
            if len(recent) == _RECENT:
                middle = median(recent)
                best = middle if best is None else min(best, middle)
            return now._replace(recent=recent, best=best, streak=0, panicked=False), fine
        streak = now.streak + 1
        onset = step if streak == 1 else now.onset
        numbers = {"loss": loss, "level": now.level, "best": now.best, "steps": float(streak)}
        if streak >= steps and not now.panicked:
            after = now._replace(streak=streak, onset=onset, panicked=True)
            return after, Verdict(Health.PANIC, step, reason, onset, numbers)
        return now._replace(streak=streak, onset=onset), Verdict(Health.SUSPECT, step, reason, onset, numbers)

    return Detector(lambda: Progress(level=level), update)


def _is_back(progress: Progress, level: float, loss: float, return_to: float) -> bool:
    """Whether `loss` has given back, all at once, that share of a progress worth the name."""
    if progress.best is None:
        return False
    gained = level - progress.best
    if loss < level - (1.0 - return_to) * gained:
        return False
    ordered = sorted(progress.recent)
    size = len(ordered)
    spread = ordered[3 * size // 4] - ordered[size // 4]
    middle = median(ordered)
    # losses that reach half of the way up there by themselves tell nothing when they get there
    return gained > 6.0 * spread and middle <= level - 0.5 * gained and level - middle > 2.5 * (ordered[-1] - middle)
