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

    A state that is made of numbers, strings, None, tuples, lists and dicts goes into a checkpoint of torch's and comes
    back out of it (`plain_state`, `state_from_plain`). So do named tuples, as far as `init` has them where they stand.
    JSON knows no tuples and no keys but strings (`state_from_json`).
    """

    init: Callable[[], S]
    update: Callable[[S, VitalSigns], tuple[S, Verdict]]


@lru_cache(maxsize=1)
def healthy(step: int) -> Verdict:
    """The verdict that nothing is wrong. All detectors share one, because most steps are healthy."""
    return Verdict(Health.HEALTHY, step)


def plain_state(state: Any) -> Any:
    """The same with plain tuples in the place of named ones: what `json` and `torch.load(weights_only=True)` take."""
    if isinstance(state, tuple):
        return tuple(map(plain_state, state))
    if isinstance(state, list):
        return list(map(plain_state, state))
    return {key: plain_state(value) for key, value in state.items()} if type(state) is dict else state


def state_from_json(value: Any, like: Any = None) -> Any:
    """Turn what `json.loads` gives for a detector's state back into that state.

    Args:
        value: A plain state after a round trip through JSON.
        like: What the detector's `init` makes. A list becomes what stands there: a list, or a tuple, a named one if it
            has as many fields. Where it says nothing, a list becomes a tuple.
    """
    return _rebuilt(value, like, lambda _, its: isinstance(its, list))


def state_from_plain(value: Any, like: Any) -> Any:
    """The inverse of `plain_state`: named tuples where `like`, which the detector's `init` makes, has them."""
    return _rebuilt(value, like, lambda found, _: isinstance(found, list))


def _rebuilt(value: Any, like: Any, is_list: Callable[[Any, Any], bool]) -> Any:
    if isinstance(value, dict):
        known = like if isinstance(like, dict) else {}
        return {key: _rebuilt(part, known.get(key), is_list) for key, part in value.items()}
    if not isinstance(value, (list, tuple)):
        return value
    parts = [_rebuilt(part, its, is_list) for part, its in zip(value, _beside(value, like), strict=True)]
    return parts if is_list(value, like) else _tuple(parts, like)


def _beside(value: Sequence[Any], like: Any) -> Sequence[Any]:
    """What of `like` stands beside each element."""
    return like if isinstance(like, (list, tuple)) and len(like) == len(value) else [None] * len(value)


def _tuple(parts: Sequence[Any], like: Any) -> tuple[Any, ...]:
    make: Any = getattr(type(like), "_make", tuple)
    return make(parts) if make is not tuple and len(like) == len(parts) else tuple(parts)


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
