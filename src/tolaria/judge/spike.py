"""A loss that rose within a few steps and stays up."""

from __future__ import annotations

from itertools import pairwise
from math import inf, isfinite
from typing import NamedTuple, TypeAlias

from tolaria.judge.detector import HUGE, RESOLUTION, Detector, difference, healthy, hump, median, require
from tolaria.records import Health, Verdict, VitalSigns

_WINDOW = 32  # accepted losses remembered one by one
_MEMORY = 96  # residuals remembered
_FAST = 8  # losses whose median is where the curve is now
_BLOCK = 16  # losses whose median is one level and whose largest excess is one peak
_LEVELS = 64  # levels remembered: 1,024 steps
_NEAR_LEVELS = 24  # levels whose lowest the location may not leave far behind
_PEAKS = 32  # peaks remembered: 512 steps
_IQR = 1.349  # interquartile range in standard deviations of a normal distribution
_Q90 = 1.2816  # its 90 % point
_FIRST_SPREAD = 3.0  # scale while there are only a few losses, in units of their range
_SMALL_SAMPLE = 4.0  # a scale from n residuals is taken 1 + 4 / n times as large
_RANGE_FLOOR = 0.02  # smallest scale, as a share of the range of losses remembered
_ROAMING = 1.4  # a rise between levels 32 steps apart that is not rare in a run is worth that many times as much
_HUMP = 1.8  # and a hump in the medians of four levels
_FEW_LEVELS = 8  # with fewer, rises between medians of 8 losses stand in for those between levels
_FIRST_RISES = 2.5
_YOUNG = 480  # losses after which the thresholds are as given; before, up to twice as high
_BULK = 12.0  # the lower quartile of an episode times its length, in scales, is at least that in a panic
_LONG = 20  # steps of an episode whose bulk is known well
_MAKES_UP = 0.33  # there, what it has beyond that counts so much towards the threshold
_NORMAL = 1.0483  # standard deviation of normal losses, in median distances of neighbours
_HINGE = 3.0  # evidence up to here counts once, above it twice
_FALL = 2.5  # falls of that many scales within a window are the noise of a curve still coming down
_FALL_DECAY = 0.9
_PIN = 2.5  # the location stays within that many scales of the lowest recent level
_RELEASE = -4.0  # a score as low as this ends an episode
_SUSPECT_SCORE = 1.0
_SUSPECT_STEP = 4.0  # evidence of one step that is suspicious by itself
_TRIM = 3  # the largest pieces of evidence in an episode do not count: spikes of up to three steps never panic
_LONGEST = 31  # steps after which an undecided episode is taken for the new normal
_CALM = 5  # normal steps that end an episode after its panic
_RELEARN = 256  # steps after a panic that nobody answered, after which the past is forgotten


class History(NamedTuple):
    """What is remembered of accepted losses.

    Attributes:
        recent: The last losses, outliers drawn in.
        residuals: Their distances from the median of the losses just before each.
        levels: Medians of blocks.
        peaks: Largest excess over the location within each block.
        filled: Losses in the present block.
        peak: Its largest excess so far.
        fall: How far the curve has been falling lately, in scales, decaying.
        learnt: Losses accepted since the run began, up to `_YOUNG`; half of that after a panic that went by by itself.
    """

    recent: tuple[float, ...] = ()
    residuals: tuple[float, ...] = ()
    levels: tuple[float, ...] = ()
    peaks: tuple[float, ...] = ()
    filled: int = 0
    peak: float = 0.0
    fall: float = 0.0
    learnt: int = 0


class Baseline(NamedTuple):
    """What is normal now, in units of loss.

    Attributes:
        location: Where losses are expected.
        scale: How far from there they lie.
        tail: How high benign outliers have been; 0 while that is not known.
        near: Median of the last 8 losses.
        moves: How far the run has risen before and healed by itself.
    """

    location: float = 0.0
    scale: float = 0.0
    tail: float = 0.0
    near: float = 0.0
    moves: float = 0.0


class Episode(NamedTuple):
    """An excursion that is not judged yet, or one that has panicked.

    Attributes:
        onset: Its first step.
        score: Sum of evidence; after the panic, normal steps in a row.
        top: The largest pieces of evidence, which do not count.
        steps: Its length so far, or steps since the panic.
        panicked: The panic has been reported.
        pending: Its losses, to be learnt if it turns out to be benign.
    """

    onset: int
    score: float = 0.0
    top: tuple[float, ...] = (0.0,) * _TRIM
    steps: int = 0
    panicked: bool = False
    pending: tuple[float, ...] = ()


SpikeState: TypeAlias = tuple[History, Baseline, Episode | None]


def loss_spike(*, threshold: float = 9.0, allowance: float = 1.0, clip: float = 8.5) -> Detector[SpikeState]:
    """Panic on a loss that rose and stays up; stay calm on spikes of one to three steps, whatever their height.

    A one-sided cumulative sum (Page 1954) of how far each loss lies above the location, in scales, minus `allowance`.
    The three largest pieces of an episode do not count towards the panic. Location: the lower of the medians of the
    last 8 and of the last 32 accepted losses, held near the lowest recent level so that a slow rise is not learnt as
    normal. Scale: the wider of interquartile range and upper 90 % point of the residuals, widened where the sample is
    small, where the curve has healed humps of its own, and where it is coming down steeply. A panic also takes the bulk
    of the episode's losses to be up: the lower quartile, in scales of then or now.

    Args:
        threshold: Score at which it panics; up to twice that in the first 480 steps.
        allowance: Evidence that every step may have without raising the score, in scales.
        clip: Most evidence of one step, in scales.

    Returns:
        The detector. Reasons: ``"loss spike"`` (suspect), ``"sustained loss spike"`` (panic).

    Raises:
        InvalidConfig: A value that is not positive, or a `clip` that could not reach the threshold.
    """
    require("loss_spike", threshold=(threshold, 0.1, inf), allowance=(allowance, 0.0, inf), clip=(clip, _HINGE, inf))

    def init() -> SpikeState:
        return History(), Baseline(), None

    def update(state: SpikeState, signs: VitalSigns) -> tuple[SpikeState, Verdict]:
        history, baseline = History(*state[0]), Baseline(*state[1])
        episode = None if state[2] is None else Episode(*state[2])
        loss, step = signs.loss, signs.step
        fine = healthy(step)
        if loss is None or not isfinite(loss):
            open_since = episode.onset if episode is not None and loss is not None else None
            verdict = fine if open_since is None else Verdict(Health.SUSPECT, step, "loss spike", open_since)
            return (history, baseline, episode), verdict
        if len(history.recent) < 3 or baseline.scale == 0.0:
            return (*_learn(history, baseline, (loss,)), None), fine
        fall = history.fall
        if episode is None or not episode.panicked:
            below = min(HUGE, difference(baseline.near, loss) / baseline.scale)
            fall = max(_FALL_DECAY * history.fall, below)
        evidence = _evidence(fall, baseline, loss, clip)
        increment = evidence - allowance
        if episode is None:
            if increment <= 0.0:
                return (*_learn(history, baseline, (loss,), fall), None), fine
            episode = Episode(step)
        if episode.panicked:
            return _after_panic(history, baseline, episode, increment <= allowance, step)
        history = history._replace(fall=fall)
        score = episode.score + increment
        top = tuple(sorted((*episode.top[1:], increment))) if increment > episode.top[0] else episode.top
        counted = score - sum(top)
        pending = (*episode.pending[-_WINDOW + 1 :], loss)
        if score <= 0.0 or counted <= _RELEASE or episode.steps >= _LONGEST:
            return (*_learn(history, baseline, pending), None), fine
        caution = max(1.0, min(2.0, _YOUNG / (history.learnt + 1)))
        numbers = {
            "loss": loss,
            "location": baseline.location,
            "scale": baseline.scale,
            "score": counted,
            "threshold": caution * threshold,
            "steps": float(episode.steps + 1),
        }
        if _has_risen(counted / caution, _bulk(baseline, pending) / caution, threshold, len(pending)):
            verdict = Verdict(Health.PANIC, step, "sustained loss spike", episode.onset, numbers)
            return (history, baseline, Episode(episode.onset, panicked=True)), verdict
        after = episode._replace(score=score, top=top, steps=episode.steps + 1, pending=pending)
        if counted >= _SUSPECT_SCORE or increment >= _SUSPECT_STEP:
            return (history, baseline, after), Verdict(Health.SUSPECT, step, "loss spike", episode.onset, numbers)
        return (history, baseline, after), fine

    return Detector(init, update)


def _evidence(fall: float, baseline: Baseline, loss: float, clip: float) -> float:
    """How far `loss` lies above the normal, in scales, clipped to `clip` on both sides."""
    excess = difference(loss, baseline.location)
    evidence = excess / baseline.scale / max(1.0, fall / _FALL)
    if evidence > _HINGE:
        evidence += evidence - _HINGE
        if baseline.tail > 0.0:  # as high as benign outliers of this run: believed in part, up to three times as high
            beyond = max(0.0, min(1.0, (excess / baseline.tail - 1.0) / 2.0))
            evidence = min(evidence, _HINGE + (clip - _HINGE) * beyond)
    return max(-clip, min(clip, evidence))


def _has_risen(counted: float, bulk: float, threshold: float, steps: int) -> bool:
    """Whether the evidence of an episode is that of a panic; in a long one a high bulk makes up for some of its sum."""
    if steps >= _LONG:
        counted += min(0.5 * threshold, _MAKES_UP * max(0.0, bulk - _BULK))
    return counted >= threshold and bulk >= _BULK


def _bulk(baseline: Baseline, losses: tuple[float, ...]) -> float:
    """How far the lower quartile of an episode's losses lies above the normal, in scales, times their number.

    A rise lifts the bulk of the losses; spikes and noise that has become wider lift some of them. Wider noise shows in
    the distances by which losses fall: those by which they rise belong to the rise, if there is one.
    """
    quartile = sorted(losses)[len(losses) // 4]
    falls = [before - after for before, after in pairwise(losses) if after < before]
    noise = _NORMAL * median(falls) if falls and 3 * len(falls) >= len(losses) - 1 else 0.0
    return difference(quartile, baseline.location) / max(baseline.scale, noise) * len(losses)


def _after_panic(
    history: History, baseline: Baseline, episode: Episode, is_normal: bool, step: int
) -> tuple[SpikeState, Verdict]:
    """Nobody rolled back: stay suspicious until the loss is normal again, or until this has become the normal."""
    calm = episode.score + 1.0 if is_normal else 0.0
    if calm >= _CALM:
        return (history._replace(learnt=min(history.learnt, _YOUNG // 2)), baseline, None), healthy(step)
    if episode.steps >= _RELEARN:
        return (History(), Baseline(), None), healthy(step)
    after = episode._replace(score=calm, steps=episode.steps + 1)
    return (history, baseline, after), Verdict(Health.SUSPECT, step, "loss spike", episode.onset)


def _learn(
    history: History, baseline: Baseline, losses: tuple[float, ...], fall: float | None = None
) -> tuple[History, Baseline]:
    """Accept losses as normal. Outliers are drawn in to four scales before they enter the windows."""
    recent, residuals, levels, peaks, filled, peak, old_fall, learnt = history
    location, scale, tail, near, moves = baseline
    refresh = False
    for loss in losses:
        if len(recent) >= 3:
            peak = max(peak, difference(loss, location))
            residual = difference(loss, near)
            if scale > 0.0:
                residual = max(-4 * scale, min(4 * scale, residual))
                loss = near + residual
            residuals = (*residuals[-_MEMORY + 1 :], residual)
        recent = (*recent[-_WINDOW + 1 :], loss)
        near = median(recent[-_FAST:])
        filled += 1
        refresh |= filled % 8 == 0
        if filled == _BLOCK:
            levels = (*levels[-_LEVELS + 1 :], median(recent[-_BLOCK:]))
            peaks = (*peaks[-_PEAKS + 1 :], peak)
            peak, filled = 0.0, 0
            moves = _moves(levels)
    location = min(near + scale, median(recent))
    if refresh or len(recent) < _WINDOW:
        scale = max(_scale(recent, residuals, levels, location), moves)
        tail = sorted(peaks)[3 * len(peaks) // 4] if len(peaks) >= 4 else tail
    if levels:
        location = min(location, min(levels[-_NEAR_LEVELS:]) + _PIN * scale)
    learnt = min(_YOUNG, learnt + len(losses))
    history = History(recent, residuals, levels, peaks, filled, peak, old_fall if fall is None else fall, learnt)
    return history, Baseline(location, scale, tail, near, moves)


def _scale(
    recent: tuple[float, ...], residuals: tuple[float, ...], levels: tuple[float, ...], location: float
) -> float:
    """The step-to-step noise of the run, in units of loss."""
    if len(residuals) < 5:
        return max(_FIRST_SPREAD * difference(max(recent), min(recent)), abs(location))
    near = levels[-_NEAR_LEVELS:]
    span = difference(max(*recent, *near), min(*recent, *near))
    ordered = sorted(residuals)
    size = len(ordered)
    spread = (ordered[3 * size // 4] - ordered[size // 4]) / _IQR
    upper = (ordered[9 * size // 10] - ordered[size // 2]) / _Q90
    noise = max(spread, upper, _first_rises(recent) if len(levels) < _FEW_LEVELS else 0.0)
    return max(noise * (1.0 + _SMALL_SAMPLE / size), _RANGE_FLOOR * span, RESOLUTION * abs(location))


def _first_rises(recent: tuple[float, ...]) -> float:
    """How far a young run moves: noise that remembers shows in the medians of 8 losses, not in neighbours."""
    medians = [median(recent[i : i + _FAST]) for i in range(0, len(recent) - _FAST + 1, _FAST)]
    return _FIRST_RISES * max((difference(after, before) for before, after in pairwise(medians)), default=0.0)


def _moves(levels: tuple[float, ...]) -> float:
    """How far the levels have risen before and healed by themselves, and how far they rise in general."""
    fours = (sorted(levels[i : i + 4]) for i in range(len(levels) - 3))
    slow = [0.5 * ordered[1] + 0.5 * ordered[2] for ordered in fours]
    rises = sorted(max(0.0, difference(after, before)) for before, after in zip(levels, levels[2:], strict=False))
    common = rises[-1 - len(rises) // 20] if len(rises) >= 6 else 0.0
    return max(hump(levels), _HUMP * hump(slow), _ROAMING * common)
