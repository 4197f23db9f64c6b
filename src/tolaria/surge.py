"""JUDGE for reinforcement learning: what a whole round of learning has done to a policy, judged by how far it moved it.

Losses say little there: they are averages of the last epoch, they move as the experience does, and damage done by the
last optimizer step shows in none of them. How far the weights and the policy have moved is read off the result itself.
Pure host numbers, like `judge`.
"""

from __future__ import annotations

from math import isfinite
from typing import Any, TypeAlias

from tolaria.errors import InvalidConfig
from tolaria.judge import Detector, any_of, non_finite
from tolaria.records import Health, Verdict, VitalSigns

SurgeState: TypeAlias = tuple[float, ...]
"""The last accepted values."""

_WINDOW = 32
_ENOUGH = 8  # values from which the run's own past is the measure


def surge(sign: str, *, ceiling: float, floor: float, factor: float = 10.0) -> Detector[SurgeState]:
    """Panic when one of the caller's signs is not finite, or far above anything it has been lately.

    The limit is `factor` times the largest of the last 32 accepted values, and at least `floor`; as long as there are
    fewer than 8 it is `ceiling`. A step without the sign is healthy.

    Args:
        sign: Name of the sign, as passed to the governor. Not negative, small when all is well.
        ceiling: Limit of a run that is too young to be its own measure.
        floor: What never alarms, in the unit of the sign.
        factor: How much larger than the recent largest.

    Returns:
        The detector. Reasons: ``"non-finite <sign>"``, ``"surge of <sign>"``.

    Raises:
        InvalidConfig: A value that is not positive, or a `factor` below 1.
    """
    if not (ceiling > 0.0 and floor > 0.0 and factor >= 1.0):
        raise InvalidConfig(
            f"building the detector surge({sign!r})",
            f"ceiling={ceiling}, floor={floor}, factor={factor}, expected positive numbers and a factor of at least 1",
            "Correct the value.",
        )

    def update(state: SurgeState, signs: VitalSigns) -> tuple[SurgeState, Verdict]:
        value = signs.extra.get(sign)
        if value is None:
            return state, Verdict(Health.HEALTHY, signs.step)
        if not isfinite(value):
            return state, Verdict(Health.PANIC, signs.step, f"non-finite {sign}", signs.step, {sign: value})
        limit = max(floor, factor * max(state)) if len(state) >= _ENOUGH else ceiling
        if value > limit:
            evidence = {sign: value, "limit": limit}
            return state, Verdict(Health.PANIC, signs.step, f"surge of {sign}", signs.step, evidence)
        return (*state[-_WINDOW + 1 :], value), Verdict(Health.HEALTHY, signs.step)

    return Detector(lambda: (), update)


def round_detector() -> Detector[Any]:
    """The default judge of a round: non-finite values, and surges of ``drift``, ``policy_change`` and ``unmeasured``.

    ``drift`` is measured by `Rounds`, ``policy_change`` (half the mean square of the log-probability ratio, in nats:
    an estimate of the KL divergence that no single sample can dominate) by whoever knows the policy. ``unmeasured`` is
    NaN where measuring them raised an error.
    """
    return any_of(
        non_finite(),
        surge("drift", ceiling=5.0, floor=0.1),
        surge("policy_change", ceiling=5.0, floor=0.5),
        surge("unmeasured", ceiling=1.0, floor=1.0),
    )
