"""What was measured, as plain values. Times are milliseconds. Pure: no torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["measured", "not installed", "not on this device", "failed"]


@dataclass(frozen=True, slots=True)
class Spread:
    """Several measurements of one thing.

    Attributes:
        median: Of all.
        low: Lower quartile; of fewer than four measurements, the least.
        high: Upper quartile; of fewer than four, the most.
        count: How many.
    """

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, found: Sequence[float]) -> Spread:
        """Of at least one measurement."""
        low, high = min(found), max(found)
        if len(found) >= 4:
            low, _, high = statistics.quantiles(found, n=4, method="inclusive")
        return cls(statistics.median(found), low, high, len(found))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure of tolaria.

    Attributes:
        group: ``"snapshot"``, ``"rollback"``, ``"judgement"``, ``"training"`` or ``"host tier"``.
        name: What was measured.
        ms: Milliseconds of it.
        floor: What it is compared with, measured in turns with it; None where there is nothing to compare with.
        floor_ms: Milliseconds of that.
        times_floor: Median over the rounds of the ratio to the floor of the same round.
        note: What else there is to know.
    """

    group: str
    name: str
    ms: Spread
    floor: str | None = None
    floor_ms: Spread | None = None
    times_floor: float | None = None
    note: str = ""

    @classmethod
    def beside(
        cls, group: str, name: str, found: Sequence[float], floor: str, floors: Sequence[float], note: str = ""
    ) -> Row:
        """A figure with its floor; measurements in pairs, of one round each."""
        times = statistics.median(one / other for one, other in zip(found, floors, strict=True))
        return cls(
            group=group,
            name=name,
            ms=Spread.of(found),
            floor=floor,
            floor_ms=Spread.of(floors),
            times_floor=times,
            note=note,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """One contestant of the side-by-side table, measured in a process of its own.

    Attributes:
        name: Of the contestant.
        kind: ``"snapshot"`` or ``"judge"``.
        status: Whether it was measured, else why not.
        version: Of its package; empty where there is none.
        stall_ms: Until training may go on after a snapshot was asked for.
        complete_ms: Until that snapshot can be restored. Contains the stall.
        rollback_ms: Until the state is back and the device is at rest.
        judge_ms: Of a contestant that judges: what judging one healthy step takes, until the device is at rest.
        judge_host_ms: Of that, what the host was held for.
        floor_ms: One copy of the same bytes on the same device, in the same process; for a judge one read of them.
        is_exact: Whether all weights and optimizer state came back bit for bit.
        is_in_place: Whether they came back at the addresses they had.
        note: What was done, or why it was not.
    """

    name: str
    kind: str
    status: Status
    version: str = ""
    stall_ms: Spread | None = None
    complete_ms: Spread | None = None
    rollback_ms: Spread | None = None
    judge_ms: Spread | None = None
    judge_host_ms: Spread | None = None
    floor_ms: Spread | None = None
    is_exact: bool | None = None
    is_in_place: bool | None = None
    note: str = ""

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Standing:
        """Of what `asdict` made, and JSON kept."""
        spreads = {name: Spread(**value) for name, value in found.items() if isinstance(value, dict)}
        values: dict[str, Any] = {**found, **spreads}
        return cls(**values)


def as_json(facts: dict[str, Any], rows: Sequence[Row], standings: Sequence[Standing]) -> dict[str, Any]:
    """The object that ``--json`` prints: the facts, `rows` and `peers`."""
    return {**facts, "rows": [asdict(row) for row in rows], "peers": [asdict(standing) for standing in standings]}
