"""Values that are not finite."""

from __future__ import annotations

from math import inf, isfinite
from typing import TypeAlias

from tolaria.judge.detector import Detector, healthy, require
from tolaria.records import Health, Verdict, VitalSigns

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
    require("non_finite", recovery=(recovery, 1, inf))

    def update(state: NonFiniteState, signs: VitalSigns) -> tuple[NonFiniteState, Verdict]:
        onset, clean = state
        reason, count = _non_finite_reason(signs)
        if not reason:
            if onset is None or clean + 1 >= recovery:
                return (None, 0), healthy(signs.step)
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
