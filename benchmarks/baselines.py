"""Simple detectors to measure the default one against. Each fires at a loss that is not finite as well."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite, sqrt
from statistics import fmean, pstdev
from typing import Any

from tolaria.judge import Detector, default_detector
from tolaria.records import Health, Verdict, VitalSigns

Rule = Callable[[Any, float], tuple[Any, bool]]
"""From state and finite loss to the next state, and whether this loss is an alarm."""


def _detector(first: Any, rule: Rule) -> Detector[Any]:
    """One panic an episode: alarms in a row are one."""

    def update(state: Any, signs: VitalSigns) -> tuple[Any, Verdict]:
        inner, was_alarmed = state
        if signs.loss is None:
            return state, Verdict(Health.HEALTHY, signs.step)
        inner, is_alarmed = rule(inner, signs.loss) if isfinite(signs.loss) else (inner, True)
        health = Health.HEALTHY if not is_alarmed else Health.SUSPECT if was_alarmed else Health.PANIC
        return (inner, is_alarmed), Verdict(health, signs.step, "alarm" if is_alarmed else "", signs.step)

    return Detector(lambda: (first, False), update)


def six_sigma(window: int = 100) -> Detector[Any]:
    """Above the mean of the last `window` losses by six of their standard deviations."""

    def rule(past: tuple[float, ...], loss: float) -> tuple[tuple[float, ...], bool]:
        alarmed = len(past) == window and loss > fmean(past) + 6.0 * pstdev(past)
        return (*past[1 - window :], min(loss, 1e100)), alarmed

    return _detector((), rule)


def ten_times_the_first(first: int = 100) -> Detector[Any]:
    """Above ten times the largest of the first `first` losses."""

    def rule(state: tuple[int, float], loss: float) -> tuple[tuple[int, float], bool]:
        seen, highest = state
        return ((seen + 1, max(highest, loss)), False) if seen < first else (state, loss > 10.0 * highest)

    return _detector((0, 0.0), rule)


def lightning_spike(window: int = 10, warmup: int = 1, rtol: float = 2.0) -> Detector[Any]:
    """The rule that Lightning documents for its `SpikeDetection` callback, with its defaults.

    An alarm is a loss that is worse than the running mean of the last `window` by more than `rtol` times that mean.
    """

    def rule(state: tuple[tuple[float, ...], int], loss: float) -> tuple[tuple[tuple[float, ...], int], bool]:
        past, seen = state
        mean = fmean(past) if past else loss
        alarmed = seen >= warmup and loss > mean and loss - mean > rtol * abs(mean)
        return ((*past[1 - window :], min(loss, 1e100)), seen + 1), alarmed

    return _detector(((), 0), rule)


def zclip(alpha: float = 0.97, threshold: float = 2.5, warmup: int = 25) -> Detector[Any]:
    """Like ZClip: a z-score against exponential averages of mean and variance, which alarms enter as clipped.

    ZClip is made for gradient norms, where it clips and does not roll back; here it reads the loss.
    """

    def rule(state: tuple[Any, ...], loss: float) -> tuple[tuple[Any, ...], bool]:
        first, mean, variance = state
        if mean is None:
            first = (*first, loss)
            if len(first) < warmup:
                return (first, None, 0.0), False
            return ((), fmean(first), pstdev(first) ** 2), False
        deviation = sqrt(variance) + 1e-12
        alarmed = (loss - mean) / deviation > threshold
        taken = mean + threshold * deviation if alarmed else loss
        variance = alpha * variance + (1.0 - alpha) * min(1e100, (taken - mean) ** 2)
        return ((), alpha * mean + (1.0 - alpha) * taken, variance), alarmed

    return _detector(((), None, 0.0), rule)


CONTESTANTS: dict[str, Callable[[], Detector[Any]]] = {
    "tolaria, defaults": default_detector,
    "mean + 6 sigma (last 100)": six_sigma,
    "10 x maximum of first 100": ten_times_the_first,
    "Lightning SpikeDetection rule": lightning_spike,
    "ZClip-like EMA, z > 2.5": zclip,
}
"""By name, in the order of the table."""
