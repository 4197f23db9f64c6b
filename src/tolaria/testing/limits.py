"""What the protocol does not cover: programs whose violation is known, so that it can be shown.

An unregistered writer launches without asking the gate. It cannot be kept out by anything that works on the device. It
is noticed if its write is there when that byte is read back; see `background` for what holds of all others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tolaria.operations import Barrier
from tolaria.testing.background import read_back
from tolaria.testing.explorer import IsGood
from tolaria.testing.programs import FOREIGN, in_turn, is_uniform, roll_back, section, writer, writes
from tolaria.testing.scenarios import EVERY, STREAMS_ONLY, Scenario, governor, user
from tolaria.testing.simulator import Machine
from tolaria.testing.world import World


def excluded_or_noticed(world: World) -> bool:
    """The state is whole, or the rollback was told that it is not what was restored."""
    return is_uniform(world.memory) or world.disturbed


@dataclass(frozen=True, slots=True)
class Limit:
    """One program that the protocol cannot protect.

    Attributes:
        name: Unique.
        says: What is shown.
        scenario: The program.
    """

    name: str
    says: str
    scenario: Scenario

    @property
    def barriers(self) -> tuple[Barrier, ...]:
        """With which it is shown."""
        return self.scenario.barriers

    @property
    def is_good(self) -> IsGood:
        """What does not hold at every end."""
        return self.scenario.is_good

    def machine(self, barrier: Barrier) -> Machine:
        """The machine to explore."""
        return self.scenario.machine(barrier)


def _unregistered(name: str, says: str, reads_back: bool) -> Limit:
    def threads(barrier: Barrier) -> list[Any]:
        rollback = read_back(1, barrier) if reads_back else roll_back(1, barrier)
        return [user(writer(0, "N", "B", gated=False), "B"), governor(rollback)]

    return Limit(name, says, Scenario(name, says, threads, excluded_or_noticed, EVERY))


def _unnamed(name: str, says: str) -> Limit:
    def threads(barrier: Barrier) -> list[Any]:
        return [user(section(0, FOREIGN, writes("N", "B"))), governor(read_back(1, barrier)), user(in_turn(), "B")]

    return Limit(name, says, Scenario(name, says, threads, excluded_or_noticed, STREAMS_ONLY))


LIMITS: dict[str, Limit] = {
    limit.name: limit
    for limit in (
        _unregistered(
            "an unregistered writer", "A step of a thread that asks nobody, beside a rollback: torn, unnoticed.", False
        ),
        _unregistered(
            "an unregistered writer, read back",
            "The same beside a rollback that reads back what it restored: a write that lands after its byte was read.",
            True,
        ),
        _unnamed(
            "a stream that nobody named",
            "With the `streams` barrier: a section that launches on another stream than the current one, and does not "
            "name it, beside a rollback that reads back what it restored.",
        ),
    )
}
"""By name."""
