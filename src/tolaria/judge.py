"""JUDGE: detectors that turn the vital signs of a step into a verdict. Pure host numbers: no tensor, no torch.

A detector is a pair of pure functions, `init() -> state` and `update(state, signs) -> (state, verdict)`. States are values: nested
tuples of plain floats, ints, bools and None. A snapshot holds one for free, a rollback puts the old one back, `json.dumps` writes
it and `state_from_json` reads it.

Rules that all detectors keep:

- NaN and infinities never enter a history. A loss of None leaves the history as it is.
- One PANIC per episode, at its trigger; then SUSPECT, with the history frozen, until the signs are normal again. Whoever rolls back puts
  the old state back and never sees that tail; whoever only observes gets one PANIC for one event.
- No constant has the unit of a loss: scales come from the run's own past. Adding a constant to every loss or multiplying
  them all changes nothing, down to the resolution of a reported loss (`RESOLUTION` of its size).
- A location is a median and a scale a quantile distance (Hampel 1974: normal consistent, 50 % breakdown). A sustained rise is shown
  by a one-sided cumulative sum (Page 1954) over clipped evidence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any, Generic, TypeAlias, TypeVar

from tolaria.errors import InvalidConfig
from tolaria.records import Health, Verdict, VitalSigns

S = TypeVar("S")

RESOLUTION = 1e-3
"""Smallest noise, as a share of the loss itself, that is believed: losses in bf16 come in steps of 4e-3 to 8e-3."""

_BLOCK = 16  # steps whose median is one level and whose largest excess is one peak
_BLOCKS = 32  # blocks remembered: 512 steps
_MAD = 1.4826  # median absolute deviation -> standard deviation of a normal distribution
_IQR = 1.349  # interquartile range in standard deviations
_Q90 = 1.2816  # 90 % point in standard deviations
_LEVEL_STEP = 0.443  # sd of the difference of two medians of 16 normal values (1.2533 * sqrt(2 / 16))
_TRIM = 3  # the largest pieces of evidence in an episode that do not count: spikes of up to three steps
_HUGE = 1e300


@dataclass(frozen=True, slots=True)
class Detector(Generic[S]):
    """A judge of vital signs.

    Attributes:
        init: Makes the state of a run that has not begun.
        update: Takes the state and the signs of the next step; returns the next state and the verdict on this step. Pure: it
            changes neither argument, and equal arguments give equal results. Called once per step, in order, on any thread.
    """

    init: Callable[[], S]
    update: Callable[[S, VitalSigns], tuple[S, Verdict]]


def state_from_json(value: Any) -> Any:
    """Turn what `json.loads` gives for a detector's state back into that state (lists become tuples)."""
    return tuple(state_from_json(item) for item in value) if isinstance(value, list) else value


# -- non-finite ---------------------------------------------------------------------------------------------------------------------

NonFiniteState: TypeAlias = tuple[int | None, int]
"""Onset of the episode (None outside one), clean steps since its last bad one."""


def non_finite(*, recovery: int = 3) -> Detector[NonFiniteState]:
    """Panic at once on a NaN or an infinity in the loss, gradients, weights, gradient norm or metric.

    Args:
        recovery: Clean steps (SUSPECT) that end an episode.

    Returns:
        The detector. Reasons: ``"non-finite loss"``, ``"non-finite gradients"``, ``"non-finite weights"``, ``"non-finite metric"``.

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


# -- loss spike ---------------------------------------------------------------------------------------------------------------------

_History: TypeAlias = tuple[
    tuple[float, ...], tuple[float, ...], tuple[float, ...], tuple[float, ...], int, float, float
]
_Baseline: TypeAlias = tuple[float, float, float]
_Episode: TypeAlias = tuple[int, float, tuple[float, ...], int, bool, tuple[float, ...]]
SpikeState: TypeAlias = tuple[_History, _Baseline, _Episode | None]
"""History: accepted losses, their residuals, block levels, block peaks, steps into the block, its peak, recent fall.
Baseline: location, scale, tail, in units of loss. Episode: onset, score, largest increments, steps, panicked, pending losses."""

import os

P = {k: float(v) for k, v in (x.split("=") for x in os.environ.get("JP", "").split(",") if x)}
HUMP = P.get("hump", 1.0)
PIN = P.get("pin", 3.0)
PM = int(P.get("pm", 24))
INF = P.get("inf", 6.0)
MEM = int(P.get("mem", 96))
THR = P.get("thr", 7.5)
ALLOW = P.get("k", 1.0)
CLIP = P.get("clip", 9.0)
CALM = P.get("calm", 2.0)
EXTREME = P.get("ext", 4.0)
RELEASE = P.get("rel", -4.0)
HINGE = P.get("hinge", 3.0)
FALL = P.get("fall", 2.5)
LB = int(P.get("lb", 64))
FLOOR = P.get("floor", 0.02)
MARG = P.get("marg", 1.0)
FAST = int(P.get("fast", 8))
WIN = int(P.get("win", 32))


def loss_spike(
    *, threshold: float = THR, allowance: float = ALLOW, clip: float = CLIP, window: int = WIN, memory: int = MEM
) -> Detector[SpikeState]:
    """Panic on a loss that rose and stays up; stay calm on spikes of one to three steps, whatever their height."""
    _require("loss_spike", threshold=(threshold, 0, inf))
    recovery = 5

    def update(state: SpikeState, signs: VitalSigns) -> tuple[SpikeState, Verdict]:
        loss = signs.loss
        history, baseline, episode = state
        if loss is None or not isfinite(loss):
            return state, Verdict(Health.HEALTHY, signs.step)
        location, scale, tail = baseline
        if len(history[0]) < 3 or scale == 0.0:
            return (*_learn(history, baseline, (loss,), window, memory), None), Verdict(Health.HEALTHY, signs.step)
        excess = max(-_HUGE, min(_HUGE, loss - location))
        z = excess / scale
        evidence = z / max(1.0, history[6] / FALL)
        if evidence > HINGE and tail > 0.0:
            evidence = min(evidence, HINGE + (clip - HINGE) * max(0.0, min(1.0, (excess / tail - 1.0) / 2.0)))
        increment = max(-clip, min(clip, evidence)) - allowance

        if episode is None:
            if increment <= 0.0:
                return (*_learn(history, baseline, (loss,), window, memory), None), Verdict(Health.HEALTHY, signs.step)
            episode = (signs.step, 0.0, (0.0, 0.0, 0.0), 0, False, ())
        onset, score, top, steps, panicked, pending = episode
        if panicked:
            score = score + 1.0 if increment <= allowance else 0.0
            if score >= recovery:
                return (history, baseline, None), Verdict(Health.HEALTHY, signs.step)
            if steps>=RELEARN: return (((), (), (), (), 0, 0.0, 0.0), (0.0, 0.0, 0.0), None), Verdict(Health.HEALTHY, signs.step)
            return (history, baseline, (onset, score, top, steps + 1, True, ())), Verdict(
                Health.SUSPECT, signs.step, "loss spike", onset
            )
        score += increment
        if increment > top[0]:
            top = tuple(sorted((*top[1:], increment)))
        trimmed = score - top[0] - top[1] - top[2]
        pending = (*pending[-window + 1 :], loss)
        if score <= 0.0 or trimmed <= RELEASE:
            return (*_learn(history, baseline, pending, window, memory), None), Verdict(Health.HEALTHY, signs.step)
        numbers = {"loss": loss, "location": location, "scale": scale, "z": z, "score": trimmed, "count": float(steps)}
        if trimmed >= threshold:
            return (history, baseline, (onset, 0.0, top, 0, True, ())), Verdict(
                Health.PANIC, signs.step, "sustained loss spike", onset, numbers
            )
        state = (history, baseline, (onset, score, top, steps + 1, False, pending))
        if trimmed >= CALM or increment >= EXTREME:
            return state, Verdict(Health.SUSPECT, signs.step, "loss spike", onset, numbers)
        return state, Verdict(Health.HEALTHY, signs.step)

    return Detector(lambda: (((), (), (), (), 0, 0.0, 0.0), (0.0, 0.0, 0.0), None), update)


def _learn(history, baseline, losses, window, memory):
    recent, residuals, levels, peaks, filled, peak, fall = history
    location, scale, tail = baseline
    refresh = False
    for loss in losses:
        if len(recent) >= 3:
            excess = max(-_HUGE, min(_HUGE, loss - location))
            peak = max(peak, excess)
            if scale > 0.0:
                fall = max(0.9 * fall, -excess / scale)
                excess = max(-4 * scale, min(4 * scale, excess))
                loss = location + excess
            residuals = (*residuals[-memory + 1 :], excess)
        recent = (*recent[-window + 1 :], loss)
        filled += 1
        refresh |= filled % 8 == 0
        if filled == _BLOCK:
            levels = (*levels[-LB + 1 :], _median(recent[-_BLOCK:]))
            peaks = (*peaks[-_BLOCKS + 1 :], peak)
            peak, filled = 0.0, 0
    location = min(_median(recent[-FAST:]) + MARG * scale, _median(recent))
    if len(recent) < window or refresh:
        if len(residuals) < 5:
            scale = max(EA*(max(recent) - min(recent)), EB * abs(location))
        else:
            ordered = sorted(residuals)
            m = len(ordered)
            median = ordered[m // 2]
            scale = max((ordered[(3 * m) // 4] - ordered[m // 4]) / _IQR, (ordered[(9 * m) // 10] - median) / _Q90)
            scale *= 1.0 + INF / m
            scale = max(
                scale,
                _hump(levels) / HUMP,
                FLOOR * (max(*recent, *levels) - min(*recent, *levels)),
                RESOLUTION * abs(location),
            )
        if len(peaks) >= 4:
            tail = sorted(peaks)[(3 * len(peaks)) // 4]
    if levels:
        location = min(location, min(levels[-PM:]) + PIN * scale)
    return ((recent, residuals, levels, peaks, filled, peak, fall), (location, scale, tail))


def _hump(levels: tuple[float, ...]) -> float:
    """Height of the highest hump among the levels, measured from the higher of its two feet: a rise that healed by itself."""
    hump, foot, feet = 0.0, inf, []
    for level in levels:
        foot = min(foot, level)
        feet.append(foot)
    foot = inf
    for level, left in zip(reversed(levels), reversed(feet)):
        foot = min(foot, level)
        hump = max(hump, level - max(left, foot))
    return hump


def _median(values) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else 0.5 * (ordered[half - 1] + ordered[half])


def _require(what: str, **rules: tuple[float, float, float]) -> None:
    for name, (value, low, high) in rules.items():
        if not low <= value <= high:
            raise InvalidConfig(what, f"{name} is {value}, expected {low} to {high}", "")
