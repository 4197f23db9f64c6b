"""What a detector is, and the small statistics that several of them use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, TypeVar

from tolaria.errors import InvalidConfig
from tolaria.records import Health, Verdict, VitalSigns

S = TypeVar("S")

RESOLUTION = 1e-3
"""Smallest noise, as a share of the loss itself, that is believed: losses in bf16 come in steps of 4e-3 to 8e-3."""

HUGE = 1e300
"""Differences are clipped to this, so that none of them becomes infinite."""


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


@lru_cache(maxsize=1)
def healthy(step: int) -> Verdict:
    """The verdict that nothing is wrong. All detectors share one, because most steps are healthy."""
    return Verdict(Health.HEALTHY, step)


def state_from_json(value: Any) -> Any:
    """Turn what `json.loads` gives for a detector's state back into that state (lists become tuples)."""
    return tuple(map(state_from_json, value)) if isinstance(value, (list, tuple)) else value


def median(values: Sequence[float]) -> float:
    """The median; of an even number of values the mean of the two in the middle."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else 0.5 * ordered[half - 1] + 0.5 * ordered[half]


def difference(value: float, other: float) -> float:
    """`value` minus `other`, finite for finite arguments."""
    found = value - other
    return found if -HUGE <= found <= HUGE else max(-HUGE, min(HUGE, found))


def hump(levels: Sequence[float]) -> float:
    """Height of the highest hump among the levels above the higher of its two feet: a rise that healed by itself."""
    highest, foot = 0.0, HUGE
    feet: list[float] = []
    for level in levels:
        if level < foot:
            foot = level
        feet.append(foot)
    foot = HUGE
    for level, left in zip(reversed(levels), reversed(feet), strict=True):
        if level < foot:
            foot = level
        above = level - (left if left > foot else foot)
        if above > highest:
            highest = above
    return highest


def require(what: str, **rules: tuple[float, float, float]) -> None:
    """Refuse settings that cannot work.

    Args:
        what: The detector that is being built.
        rules: Per setting its value, the smallest and the largest that are allowed.

    Raises:
        InvalidConfig: One of them is out of its range, or no number.
    """
    for name, (value, low, high) in rules.items():
        if not low <= value <= high:
            raise InvalidConfig(
                f"building the detector {what}", f"{name} is {value}, expected {low} to {high}", "Correct the value."
            )
