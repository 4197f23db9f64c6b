"""JUDGE: detectors that turn the vital signs of a step into a verdict. Pure host numbers: no tensor, no torch.

A detector is a pair of pure functions, `init() -> state` and `update(state, signs) -> (state, verdict)`. States are
values: nested tuples of plain floats, ints, bools and None. A snapshot holds one for free, a rollback puts the old one
back, `json.dumps` writes it and `state_from_json` reads it.

Rules that all detectors keep:

- NaN and infinities never enter a history. A loss of None leaves the history as it is.
- One PANIC per episode, at its trigger; then SUSPECT, with the history frozen, until the signs are normal again.
  Whoever rolls back puts the old state back and never sees that tail; whoever only observes gets one PANIC an event.
- No constant has the unit of a loss: scales come from the run's own past.
- A location is a median and a scale a quantile distance (Hampel 1974: normal consistent, 50 % breakdown). A sustained
  rise is shown by a one-sided cumulative sum (Page 1954) over clipped evidence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from tolaria.errors import InvalidConfig
from tolaria.records import Health, Verdict, VitalSigns

S = TypeVar("S")

RESOLUTION = 1e-3
"""Smallest noise, as a share of the loss itself, that is believed: losses in bf16 come in steps of 4e-3 to 8e-3."""

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
_HUGE = 1e300


@dataclass(frozen=True, slots=True)
class Detector(Generic[S]):
    """A judge of vital signs.

    Attributes:
        init: Makes the state of a run that has not begun.
        update: Takes the state and the signs of the next step; returns the next state and the verdict on this step.
            Pure: it changes neither argument, and equal arguments give equal results. Called once per step, in order.
    """

    init: Callable[[], S]
    update: Callable[[S, VitalSigns], tuple[S, Verdict]]


def state_from_json(value: Any) -> Any:
    """Turn what `json.loads` gives for a detector's state back into that state (lists become tuples)."""
    return tuple(map(state_from_json, value)) if isinstance(value, (list, tuple)) else value


# ---------------------------------------------------------------- non-finite

NonFiniteState: TypeAlias = tuple[int | None, int]
"""Onset of the episode (None outside one), clean steps since its last bad one."""


def non_finite(*, recovery: int = 3) -> Detector[NonFiniteState]:
    """Panic at once on a NaN or an infinity in the loss, gradients, weights, gradient norm or metric.

    Args:
        recovery: Clean steps (SUSPECT) that end an episode.

    Returns:
        The detector. Reasons: ``"non-finite loss"``, ``"non-finite gradients"``, ``"non-finite weights"``,
        ``"non-finite metric"``.

    Raises:
        InvalidConfig: `recovery` is below 1.
    """
    _require("non_finite", recovery=(recovery, 1, inf))

    def update(state: NonFiniteState, signs: VitalSigns) -> tuple[NonFiniteState, Verdict]:
        onset, clean = state
        reason, count = _non_finite_reason(signs)
        if not reason:
            if onset is None or clean + 1 >= recovery:
                return (None, 0), Verdict(Health.HEALTHY, signs.step)
            return (onset, clean + 1), Verdict(Health.SUSPECT, signs.step, "recovering from non-finite values", onset)
        health = Health.PANIC if onset is None else Health.SUSPECT
        onset = signs.step if onset is None else onset
        return (onset, 0), Verdict(health, signs.step, reason, onset, {"count": float(count)})

    return Detector(lambda: (None, 0), update)


def _non_finite_reason(signs: VitalSigns) -> tuple[str, int]:
    """The first non-finite sign, weights first (they are the damage that lasts), and how many tensors it concerns."""
    if signs.nonfinite_weights:
        return "non-finite weights", signs.nonfinite_weights
    if signs.loss is not None and not isfinite(signs.loss):
        return "non-finite loss", 1
    if signs.nonfinite_gradients or (signs.grad_norm is not None and not isfinite(signs.grad_norm)):
        return "non-finite gradients", max(1, signs.nonfinite_gradients)
    if signs.metric is not None and not isfinite(signs.metric):
        return "non-finite metric", 1
    return "", 0


# ---------------------------------------------------------------- loss spike


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
    """

    recent: tuple[float, ...] = ()
    residuals: tuple[float, ...] = ()
    levels: tuple[float, ...] = ()
    peaks: tuple[float, ...] = ()
    filled: int = 0
    peak: float = 0.0
    fall: float = 0.0


class Baseline(NamedTuple):
    """What is normal now, in units of loss: location, scale, and how high benign outliers have been (0: not known)."""

    location: float = 0.0
    scale: float = 0.0
    tail: float = 0.0


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


def loss_spike(*, threshold: float = 9.5, allowance: float = 1.0, clip: float = 11.0) -> Detector[SpikeState]:
    """Panic on a loss that rose and stays up; stay calm on spikes of one to three steps, whatever their height.

    A one-sided cumulative sum (Page 1954) of how far each loss lies above the location, in scales, minus `allowance`.
    The three largest pieces of an episode do not count towards the panic. Location: the lower of the medians of the
    last 8 and of the last 32 accepted losses, held near the lowest recent level so that a slow rise is not learnt as
    normal. Scale: the wider of interquartile range and upper 90 % point of the residuals, widened where the sample is
    small, where the curve has healed humps of its own, and where it is coming down steeply.

    Args:
        threshold: Score at which it panics.
        allowance: Evidence that every step may have without raising the score, in scales.
        clip: Most evidence of one step, in scales.

    Returns:
        The detector. Reasons: ``"loss spike"`` (suspect), ``"sustained loss spike"`` (panic).

    Raises:
        InvalidConfig: A value that is not positive, or a `clip` that could not reach the threshold.
    """
    _require("loss_spike", threshold=(threshold, 0.1, inf), allowance=(allowance, 0.0, inf), clip=(clip, _HINGE, inf))

    def init() -> SpikeState:
        return History(), Baseline(), None

    def update(state: SpikeState, signs: VitalSigns) -> tuple[SpikeState, Verdict]:
        history, baseline = History(*state[0]), Baseline(*state[1])
        episode = None if state[2] is None else Episode(*state[2])
        loss, step = signs.loss, signs.step
        healthy = Verdict(Health.HEALTHY, step)
        if loss is None or not isfinite(loss):
            open_since = episode.onset if episode is not None and loss is not None else None
            verdict = healthy if open_since is None else Verdict(Health.SUSPECT, step, "loss spike", open_since)
            return (history, baseline, episode), verdict
        if len(history.recent) < 3 or baseline.scale == 0.0:
            return (*_learn(history, baseline, (loss,)), None), healthy
        if episode is None or not episode.panicked:
            below = min(_HUGE, (_median(history.recent[-_FAST:]) - loss) / baseline.scale)
            history = history._replace(fall=max(_FALL_DECAY * history.fall, below))
        evidence = _evidence(history, baseline, loss, clip)
        increment = evidence - allowance
        if episode is None:
            if increment <= 0.0:
                return (*_learn(history, baseline, (loss,)), None), healthy
            episode = Episode(step)
        if episode.panicked:
            return _after_panic(history, baseline, episode, increment <= allowance, step)
        score = episode.score + increment
        top = tuple(sorted((*episode.top[1:], increment))) if increment > episode.top[0] else episode.top
        counted = score - sum(top)
        pending = (*episode.pending[-_WINDOW + 1 :], loss)
        undecided = episode.steps >= _LONGEST and counted < threshold
        if score <= 0.0 or counted <= _RELEASE or undecided:
            return (*_learn(history, baseline, pending), None), healthy
        numbers = {
            "loss": loss,
            "location": baseline.location,
            "scale": baseline.scale,
            "score": counted,
            "threshold": threshold,
            "steps": float(episode.steps + 1),
        }
        if counted >= threshold:
            verdict = Verdict(Health.PANIC, step, "sustained loss spike", episode.onset, numbers)
            return (history, baseline, Episode(episode.onset, panicked=True)), verdict
        after = episode._replace(score=score, top=top, steps=episode.steps + 1, pending=pending)
        if counted >= _SUSPECT_SCORE or increment >= _SUSPECT_STEP:
            return (history, baseline, after), Verdict(Health.SUSPECT, step, "loss spike", episode.onset, numbers)
        return (history, baseline, after), healthy

    return Detector(init, update)


def _evidence(history: History, baseline: Baseline, loss: float, clip: float) -> float:
    """How far `loss` lies above the normal, in scales, clipped to `clip` on both sides."""
    excess = max(-_HUGE, min(_HUGE, loss - baseline.location))
    evidence = excess / baseline.scale / max(1.0, history.fall / _FALL)
    if evidence > _HINGE:
        evidence += evidence - _HINGE
        if baseline.tail > 0.0:  # as high as benign outliers of this run: believed in part, up to three times as high
            beyond = max(0.0, min(1.0, (excess / baseline.tail - 1.0) / 2.0))
            evidence = min(evidence, _HINGE + (clip - _HINGE) * beyond)
    return max(-clip, min(clip, evidence))


def _after_panic(
    history: History, baseline: Baseline, episode: Episode, is_normal: bool, step: int
) -> tuple[SpikeState, Verdict]:
    """Nobody rolled back: stay suspicious until the loss is normal again, or until this has become the normal."""
    calm = episode.score + 1.0 if is_normal else 0.0
    if calm >= _CALM:
        return (history, baseline, None), Verdict(Health.HEALTHY, step)
    if episode.steps >= _RELEARN:
        return (History(), Baseline(), None), Verdict(Health.HEALTHY, step)
    after = episode._replace(score=calm, steps=episode.steps + 1)
    return (history, baseline, after), Verdict(Health.SUSPECT, step, "loss spike", episode.onset)


def _learn(history: History, baseline: Baseline, losses: tuple[float, ...]) -> tuple[History, Baseline]:
    """Accept losses as normal. Outliers are drawn in to four scales before they enter the windows."""
    recent, residuals, levels, peaks, filled, peak, fall = history
    location, scale, tail = baseline
    refresh = False
    for loss in losses:
        if len(recent) >= 3:
            peak = max(peak, max(-_HUGE, min(_HUGE, loss - location)))
            near = _median(recent[-_FAST:])
            residual = max(-_HUGE, min(_HUGE, loss - near))
            if scale > 0.0:
                residual = max(-4 * scale, min(4 * scale, residual))
                loss = near + residual
            residuals = (*residuals[-_MEMORY + 1 :], residual)
        recent = (*recent[-_WINDOW + 1 :], loss)
        filled += 1
        refresh |= filled % 8 == 0
        if filled == _BLOCK:
            levels = (*levels[-_LEVELS + 1 :], _median(recent[-_BLOCK:]))
            peaks = (*peaks[-_PEAKS + 1 :], peak)
            peak, filled = 0.0, 0
    location = min(_median(recent[-_FAST:]) + scale, _median(recent))
    if len(recent) < _WINDOW or refresh:
        scale = _scale(recent, residuals, levels, location)
        tail = sorted(peaks)[3 * len(peaks) // 4] if len(peaks) >= 4 else tail
    if levels:
        location = min(location, min(levels[-_NEAR_LEVELS:]) + _PIN * scale)
    return History(recent, residuals, levels, peaks, filled, peak, fall), Baseline(location, scale, tail)


def _scale(
    recent: tuple[float, ...], residuals: tuple[float, ...], levels: tuple[float, ...], location: float
) -> float:
    """The step-to-step noise of the run, in units of loss."""
    span = max(*recent, *levels) - min(*recent, *levels) if len(recent) + len(levels) > 1 else 0.0
    if len(residuals) < 5:
        return max(_FIRST_SPREAD * (max(recent) - min(recent)), abs(location))
    ordered = sorted(residuals)
    size = len(ordered)
    spread = (ordered[3 * size // 4] - ordered[size // 4]) / _IQR
    upper = (ordered[9 * size // 10] - ordered[size // 2]) / _Q90
    noise = max(spread, upper) * (1.0 + _SMALL_SAMPLE / size)
    return max(noise, _hump(levels), _RANGE_FLOOR * span, RESOLUTION * abs(location))


def _hump(levels: tuple[float, ...]) -> float:
    """Height of the highest hump among the levels above the higher of its two feet: a rise that healed by itself."""
    hump, foot = 0.0, inf
    feet: list[float] = []
    for level in levels:
        foot = min(foot, level)
        feet.append(foot)
    foot = inf
    for level, left in zip(reversed(levels), reversed(feet), strict=True):
        foot = min(foot, level)
        hump = max(hump, level - max(left, foot))
    return hump


# ---------------------------------------------------------------- collapse


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


def collapse(*, level: float | None = None, steps: int = 5, return_to: float = 0.9) -> Detector[Progress]:
    """Panic when a run that had learnt something is back where a random guess is, and stays there.

    Args:
        level: Loss of a random guess, for example ``log(number of classes)``. None: the median of the first 5 losses.
        steps: Steps in a row that panic; at least 4, so that a spike of three never does.
        return_to: Share of the progress so far that has to be lost, in (0, 1].

    Returns:
        The detector. Reason: ``"collapse to random guess"``. It is silent until the run has come down by six times
        the spread of its recent losses.

    Raises:
        InvalidConfig: A value out of range.
    """
    _require("collapse", steps=(steps, 4, inf), return_to=(return_to, 0.01, 1.0))

    def update(state: Progress, signs: VitalSigns) -> tuple[Progress, Verdict]:
        now, loss, step = Progress(*state), signs.loss, signs.step
        healthy = Verdict(Health.HEALTHY, step)
        if loss is None or not isfinite(loss):
            return now, healthy
        if now.level is None:
            first = (*now.first, loss)
            return now._replace(first=first, level=_median(first) if len(first) == 5 else None), healthy
        if now.best is None or not _is_back(now, now.level, loss, return_to):
            recent = (*now.recent[-_BLOCK + 1 :], loss)
            best = now.best
            if len(recent) == _BLOCK:
                best = _median(recent) if best is None else min(best, _median(recent))
            return now._replace(recent=recent, best=best, streak=0, panicked=False), healthy
        streak = now.streak + 1
        onset = step if streak == 1 else now.onset
        numbers = {"loss": loss, "level": now.level, "best": now.best, "steps": float(streak)}
        reason = "collapse to random guess"
        if streak >= steps and not now.panicked:
            after = now._replace(streak=streak, onset=onset, panicked=True)
            return after, Verdict(Health.PANIC, step, reason, onset, numbers)
        return now._replace(streak=streak, onset=onset), Verdict(Health.SUSPECT, step, reason, onset, numbers)

    return Detector(lambda: Progress(level=level), update)


def _is_back(progress: Progress, level: float, loss: float, return_to: float) -> bool:
    """Whether `loss` has given back that share of a progress worth the name."""
    ordered = sorted(progress.recent)
    size = len(ordered)
    if progress.best is None or size < _BLOCK:
        return False
    gained = level - progress.best
    spread = ordered[3 * size // 4] - ordered[size // 4]
    return gained > 6.0 * spread and loss >= level - (1.0 - return_to) * gained


# ---------------------------------------------------------------- together


def any_of(*detectors: Detector[Any]) -> Detector[tuple[Any, ...]]:
    """The worst verdict of several detectors; each sees every step.

    Returns:
        A detector whose state is the tuple of their states. Its onset is the earliest among those that are not healthy,
        so that an episode begins where the first of them became suspicious.

    Raises:
        InvalidConfig: No detector was given.
    """
    _require("any_of", detectors=(len(detectors), 1, inf))
    order = (Health.HEALTHY, Health.SUSPECT, Health.PANIC)

    def update(states: tuple[Any, ...], signs: VitalSigns) -> tuple[tuple[Any, ...], Verdict]:
        answers = [one.update(state, signs) for one, state in zip(detectors, states, strict=True)]
        worst = max((verdict for _, verdict in answers), key=lambda verdict: order.index(verdict.health))
        onsets = [verdict.onset for _, verdict in answers if verdict.onset is not None]
        if onsets and worst.onset is not None:
            worst = replace(worst, onset=min(onsets))
        return tuple(state for state, _ in answers), worst

    return Detector(lambda: tuple(one.init() for one in detectors), update)


def default_detector() -> Detector[Any]:
    """Non-finite values, sustained loss spikes, and collapse to the level of a random guess."""
    return any_of(non_finite(), loss_spike(), collapse())


def _median(values: tuple[float, ...]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else 0.5 * (ordered[half - 1] + ordered[half])


def _require(what: str, **rules: tuple[float, float, float]) -> None:
    for name, (value, low, high) in rules.items():
        if not low <= value <= high:
            raise InvalidConfig(
                f"building the detector {what}", f"{name} is {value}, expected {low} to {high}", "Correct the value."
            )
