"""BUDGET: which tier holds the snapshots, and how many of them main memory may hold besides. Arithmetic on bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from tolaria.errors import BudgetExceeded
from tolaria.ring import Tier

TierChoice = Literal["device", "host"]

FREE_SHARE = 0.15
"""Of a device, left free by `auto` above the measured peak of training."""

DRAINING_SHARE = 0.25
"""Of the main memory that is available: what `auto` takes for snapshots drained from devices."""


MAIN_MEMORY = "host"
"""Stands where others stand by the name of their device."""


@dataclass(frozen=True, slots=True)
class Room:
    """Memory of one device.

    Attributes:
        total: Its size in bytes.
        used: The most that anybody but us, slots and notes, has had of it at once, as far as that is known.
    """

    total: int
    used: int


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be held, and what the user allows.

    Attributes:
        device_bytes: Of one slot on each accelerator, by name. Empty where the train state is in main memory.
        host_bytes: Of one slot in main memory.
        slots: Slots of the tier that snapshots are taken into.
        host_slots: Slots of main memory for drained snapshots, at most.
        tier: The tier asked for; None: the device, if it fits.
        device_budget: Bytes for all slots of one device; None: so many that `FREE_SHARE` stays free.
        host_budget: Bytes for all slots in main memory; None: what is available.
        beside: Bytes of ours besides slots on each accelerator, by name, and in main memory as `MAIN_MEMORY`: notes of
            single steps. They are taken whatever becomes of the slots, so slots have what they leave of a budget.
    """

    device_bytes: Mapping[str, int]
    host_bytes: int
    slots: int
    host_slots: int
    tier: TierChoice | None = None
    device_budget: int | None = None
    host_budget: int | None = None
    beside: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer.

    Attributes:
        tier: Where snapshots are taken into.
        host_slots: Slots of main memory that drained snapshots may fill.
        reason: One line for people; why it is not the device tier, where it is not.
    """

    tier: Tier
    host_slots: int
    reason: str = ""


def plan(request: Request, rooms: Mapping[str, Room], available: int | None) -> Plan:
    """Choose.

    Args:
        request: See there.
        rooms: Memory of the accelerators, as far as it is known.
        available: Bytes of main memory that can be taken now, what we hold of it ourselves counted in; None: not known.

    Raises:
        BudgetExceeded: It fits nowhere. Nothing was allocated.
    """
    refusals = [
        refused
        for name, size in sorted(request.device_bytes.items())
        if (refused := _refused_by_device(request, name, size, rooms.get(name)))
    ]
    beside = request.beside.get(MAIN_MEMORY, 0)
    if request.device_bytes and request.tier != "host":
        if not refusals:
            limit = None if request.host_budget is None else max(0, request.host_budget - beside)
            if limit is None and available is not None:
                limit = int(max(0, available - beside) * DRAINING_SHARE)
            fits = request.host_slots if limit is None else limit // max(1, request.host_bytes)
            return Plan(Tier.DEVICE, min(request.host_slots, fits))
        if request.tier == "device":
            raise _exceeded("; ".join(refusals))
    needed = request.slots * request.host_bytes + beside
    limit = available if request.host_budget is None else request.host_budget
    if limit is not None and needed > limit:
        allowed = "are available" if request.host_budget is None else "host_budget allows"
        refusals.append(
            f"{_sum(request.slots, request.host_bytes, beside)} in main memory, where {_mib(limit)} {allowed}"
        )
        raise _exceeded("; ".join(refusals))
    reason = 'tier="host" was asked for' if request.tier == "host" else "; ".join(refusals)
    return Plan(Tier.HOST, 0, reason if request.device_bytes else "")


def _refused_by_device(request: Request, name: str, size: int, room: Room | None) -> str:
    """Why one device cannot hold all slots; empty if it can."""
    beside = request.beside.get(name, 0)
    needed, shown = request.slots * size + beside, _sum(request.slots, size, beside)
    if request.device_budget is not None:
        if needed <= request.device_budget:
            return ""
        return f"{shown} on {name}, where device_budget allows {_mib(request.device_budget)}"
    if room is None:
        return ""
    left = int(room.total * (1 - FREE_SHARE)) - room.used
    if needed <= left:
        return ""
    return (
        f"{shown} on {name}, where {_mib(max(0, left))} are left: {_mib(room.total)} less "
        f"{FREE_SHARE:.0%} to stay free, less {_mib(room.used)} at the peak so far"
    )


def _sum(slots: int, size: int, beside: int) -> str:
    notes = f" + {_mib(beside)} of notes" if beside else ""
    return f"{slots} slots x {_mib(size)}{notes} = {_mib(slots * size + beside)}"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _exceeded(seen: str) -> BudgetExceeded:
    return BudgetExceeded(
        "finding room for snapshots",
        seen,
        "Snapshots held so far are intact. Configure fewer slots (a longer cadence, a shorter probation), allow more, "
        "or free memory.",
    )
