"""PACE: how many steps apart snapshots may be when they are to cost no more than a share of the steps' time."""

from __future__ import annotations

import math
import statistics
from collections import deque

SHARE = 0.01
"""Of the time of the steps that snapshots may take."""

LONGEST = 50
"""Steps between two snapshots at most, whatever they cost."""

_STEPS, _SNAPSHOTS = 64, 8
_FEW = 5  # steps measured before anything is concluded


class Pace:
    """Measures steps and snapshots, and answers the cadence.

    Args:
        shortest: Steps between two snapshots at least: what the slots of the ring allow.
    """

    def __init__(self, shortest: int) -> None:
        self.shortest = shortest
        self._steps: deque[float] = deque(maxlen=_STEPS)
        self._snapshots: deque[float] = deque(maxlen=_SNAPSHOTS)
        self._copies: deque[float] = deque(maxlen=_SNAPSHOTS)
        self._last: float | None = None
        self._in_between = 0.0

    def stepped(self, now: float) -> None:
        """A step is over. `now`: seconds of a monotonic clock."""
        if self._last is not None:
            self._steps.append(max(0.0, now - self._last - self._in_between))
        self._last, self._in_between = now, 0.0

    def took(self, host_s: float) -> None:
        """A snapshot was taken, and held the host for so many seconds."""
        self._snapshots.append(host_s)
        self._in_between += host_s

    def copied(self, device_s: float) -> None:
        """One that was taken earlier held the slowest device for so many seconds, which come on top."""
        self._copies.append(device_s)

    def interrupted(self) -> None:
        """Something else took time (a rollback): the step under way says nothing."""
        self._last = None

    @property
    def cadence(self) -> int:
        """Steps between snapshots: the fewest that keep to `SHARE`, by medians of what was measured."""
        if len(self._steps) < _FEW or not self._snapshots:
            return self.shortest
        step = statistics.median(self._steps)
        if step <= 0.0:
            return LONGEST
        cost = statistics.median(self._snapshots) + (statistics.median(self._copies) if self._copies else 0.0)
        wanted = math.ceil(cost / (SHARE * step))
        return max(self.shortest, min(LONGEST, wanted))
