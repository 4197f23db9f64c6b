"""What a mutant is: an edge of the protocol taken away, and the ways to take one away that need no more than a name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tolaria.operations import Barrier, Change
from tolaria.testing.catalog import SCENARIOS
from tolaria.testing.explorer import IsGood
from tolaria.testing.scenarios import Removal
from tolaria.testing.simulator import Machine


@dataclass(frozen=True, slots=True)
class EdgeMutant:
    """One edge taken away.

    Attributes:
        name: Unique; the edge.
        says: What is missing, in one sentence.
        scenario: The program that shows it.
        removal: What is changed.
        barriers: With which it is tried.
        kinds: How the violation may begin.
    """

    name: str
    says: str
    scenario: str
    removal: Removal
    barriers: tuple[Barrier, ...]
    kinds: tuple[str, ...] = ("torn",)

    def machine(self, barrier: Barrier) -> Machine:
        """The scenario without the edge."""
        return SCENARIOS[self.scenario].machine(barrier, self.removal)

    @property
    def is_good(self) -> IsGood:
        """What the scenario asks of every end."""
        return SCENARIOS[self.scenario].is_good


def dropping(*kinds: type[Any]) -> Removal:
    """Operations of some kinds are not performed."""
    return Removal(drop=lambda op: isinstance(op, kinds))


def without_change(*labels: str) -> Removal:
    """Changes of the host state that never happen."""
    return Removal(drop=lambda op: isinstance(op, Change) and op.label in labels)


def mutant(
    name: str, says: str, scenario: str, removal: Removal, *barriers: Barrier, kinds: tuple[str, ...] = ("torn",)
) -> EdgeMutant:
    """One of `MUTANTS`."""
    return EdgeMutant(name, says, scenario, removal, barriers, kinds)
