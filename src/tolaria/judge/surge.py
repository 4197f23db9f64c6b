"""Signs that are positive and live on a logarithmic scale: gradient norm, update ratio, approximate KL, entropy."""

from __future__ import annotations

from collections.abc import Callable
from math import exp, inf, isfinite, log
from typing import NamedTuple

from tolaria.judge.detector import Detector, healthy, median, require
from tolaria.records import Health, Verdict, VitalSigns

_MEMORY = 48  # logarithms remembered
_WARM_UP = 12  # of them are needed for a verdict
_SPREADS = 6.0  # a surge is that many distances of the upper quartile above the median, besides its ratio
_RELEARN = 256  # steps after a panic that nobody answered, after which the past is forgotten

Sign = Callable[[VitalSigns], float | None]


class SurgeState(NamedTuple):
    """What is remembered of one sign.

    Attributes:
        past: Logarithms of its last normal values.
        bound: Logarithm above which it surges; None during warm-up.
        fresh: Values learnt since the bound was taken.
        onset: First step of the surge; None outside one.
        streak: Steps in a row above the bound, or since the panic.
        panicked: The panic has been reported.
        pending: Logarithms of the surge so far, to be learnt if it ends by itself.
    """

    past: tuple[float, ...] = ()
    bound: float | None = None
    fresh: int = 0
    onset: int | None = None
    streak: int = 0
    panicked: bool = False
    pending: tuple[float, ...] = ()


def surge(sign: Sign, reason: str, *, ratio: float = 20.0, steps: int = 4) -> Detector[SurgeState]:
    """Panic when a positive sign stays far above what it used to be.

    Judged on its logarithm: above the median of its last 48 normal values by `ratio`, and by six times the
    distance of their upper quartile. Values that are missing, not finite or not positive are passed over.

    Args:
        sign: Takes the value out of the signs; None where it is missing.
        reason: Of the verdicts.
        ratio: How many times the median; above 1.
        steps: Steps in a row that panic; at least 4, so that a spike of three never does.

    Raises:
        InvalidConfig: A value out of range.
    """
    require("surge", ratio=(ratio, 1.01, inf), steps=(steps, 4, inf))
    least = log(ratio)

    def update(state: SurgeState, signs: VitalSigns) -> tuple[SurgeState, Verdict]:
        value = sign(signs)
        if value is None:
            return state, _still(state, signs.step, reason)
        now = SurgeState(*state)
        if not isfinite(value) or value <= 0.0:
            return now, _still(now, signs.step, reason)
        height = log(value)
        if now.bound is None or height <= now.bound:
            return _learn(now, (height,), least), healthy(signs.step)
        onset = signs.step if now.onset is None else now.onset
        after = now._replace(onset=onset, streak=now.streak + 1)
        if now.panicked:
            after = SurgeState() if after.streak > _RELEARN else after
            return after, _still(after, signs.step, reason)
        numbers = {"value": value, "bound": exp(min(700.0, now.bound)), "steps": float(after.streak)}
        if after.streak >= steps:
            after = after._replace(streak=0, panicked=True, pending=())
            return after, Verdict(Health.PANIC, signs.step, reason, onset, numbers)
        after = after._replace(pending=(*now.pending, height))
        return after, Verdict(Health.SUSPECT, signs.step, reason, onset, numbers)

    return Detector(SurgeState, update)


def _still(state: SurgeState, step: int, reason: str) -> Verdict:
    onset = SurgeState(*state).onset
    return healthy(step) if onset is None else Verdict(Health.SUSPECT, step, reason, onset)


def _learn(state: SurgeState, heights: tuple[float, ...], least: float) -> SurgeState:
    """Accept values as normal, and after every eighth take the bound anew."""
    fresh = state.fresh + 1
    past = (*state.past, *state.pending, *heights)[-_MEMORY:]
    if len(past) < _WARM_UP or (state.bound is not None and fresh < 8):
        return SurgeState(past, state.bound, fresh)
    ordered = sorted(past)
    middle = median(ordered)
    return SurgeState(past, middle + max(least, _SPREADS * (ordered[3 * len(ordered) // 4] - middle)), 0)


def gradient_explosion(*, ratio: float = 20.0, steps: int = 4) -> Detector[SurgeState]:
    """Panic when the gradient norm stays `ratio` times above its recent median for `steps` steps, see `surge`.

    Reason: ``"gradient explosion"``. Norms that are not finite are the business of `non_finite`.
    """
    return surge(lambda signs: signs.grad_norm, "gradient explosion", ratio=ratio, steps=steps)


def update_ratio_jump(*, sign: str = "update_ratio", ratio: float = 20.0, steps: int = 4) -> Detector[SurgeState]:
    """Panic when updates stay `ratio` times larger, relative to the weights, than they used to be, see `surge`.

    Args:
        sign: Name of the ratio among `VitalSigns.extra`.
        ratio: As for `surge`.
        steps: As for `surge`.

    Reason: ``"update ratio jump"``.
    """
    return surge(lambda signs: signs.extra.get(sign), "update ratio jump", ratio=ratio, steps=steps)
