"""Everything that `tolaria verify` asks the model checker, by name; and tokens that replay a schedule of it.

A token reads ``program.one-writer.context.01002-3fa2``: what it is of, the barrier, a digit (base 36) for each place at
which more than one thing could have happened, and a check sum over the rest.
"""

from __future__ import annotations

import re
import string
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tolaria.errors import UsageError
from tolaria.operations import Barrier
from tolaria.testing import explorer
from tolaria.testing.catalog import SCENARIOS
from tolaria.testing.designs import DESIGNS
from tolaria.testing.limits import LIMITS
from tolaria.testing.mutants import MUTANTS
from tolaria.testing.simulator import Machine
from tolaria.testing.world import Outcome, Step

_DIGITS = string.digits + string.ascii_lowercase
_DOING = "replaying a schedule"


@dataclass(frozen=True, slots=True)
class Check:
    """One search.

    Attributes:
        kind: ``"program"``: the shipped protocol. ``"mutant"``: an edge less. ``"design"``: another protocol.
            ``"limit"``: what the shipped protocol does not cover.
        name: Of the scenario, mutant, design or limit.
        barrier: With which it runs.
        build: Makes the machine.
        is_good: What must hold at every end.
        expected: How a violation may begin; empty for none.
    """

    kind: str
    name: str
    barrier: Barrier
    build: Callable[[], Machine]
    is_good: explorer.IsGood
    expected: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Name and barrier."""
        return f"{self.name} [{self.barrier.value}]"

    def explore(self, deadline: float | None = None) -> Outcome:
        """Search all of it, or until the deadline."""
        return explorer.explore(self.build(), self.is_good, deadline=deadline)

    def is_as_expected(self, found: Outcome) -> bool:
        """Whether the search found what it ought to find: nothing, or a violation of the right kind."""
        if not self.expected:
            return found.complete and found.violation is None
        return found.violation is not None and found.violation.startswith(self.expected)

    def token(self, found: Outcome) -> str:
        """What replays the schedule of a violation."""
        choices = "".join(_DIGITS[choice] for choice in found.choices)
        body = f"{self.kind}.{_slug(self.name)}.{self.barrier.value}.{choices}"
        return f"{body}-{_check_sum(body)}"


def programs() -> Iterator[Check]:
    """The shipped protocol."""
    for scenario in SCENARIOS.values():
        for barrier in scenario.barriers:
            yield Check("program", scenario.name, barrier, _bound(scenario.machine, barrier), scenario.is_good)


def mutants() -> Iterator[Check]:
    """The shipped protocol with an edge less."""
    for mutant in MUTANTS.values():
        for barrier in mutant.barriers:
            yield Check("mutant", mutant.name, barrier, _bound(mutant.machine, barrier), mutant.is_good, mutant.kinds)


def designs() -> Iterator[Check]:
    """Other protocols, sound and unsound."""
    for design in DESIGNS.values():
        expected = () if design.expected == "sound" else (design.expected,)
        yield Check("design", design.name, Barrier.CONTEXT, design.machine, design.is_good, expected)


def limits() -> Iterator[Check]:
    """What the shipped protocol does not cover."""
    for limit in LIMITS.values():
        for barrier in limit.barriers:
            yield Check("limit", limit.name, barrier, _bound(limit.machine, barrier), limit.is_good, ("torn",))


def _bound(build: Callable[[Barrier], Machine], barrier: Barrier) -> Callable[[], Machine]:
    return lambda: build(barrier)


# ---------------------------------------------------------------- replay


@dataclass(frozen=True, slots=True)
class Replayed:
    """One schedule, taken again.

    Attributes:
        check: What it is of.
        steps: What happened.
        violation: What is wrong with its end; None if nothing is.
    """

    check: Check
    steps: tuple[Step, ...]
    violation: str | None


def replay(token: str) -> Replayed:
    """Take a schedule again.

    Raises:
        UsageError: The token was mistyped, or is of another version.
    """
    body, _, check_sum = token.strip().rpartition("-")
    parts = body.split(".")
    if check_sum != _check_sum(body) or len(parts) != 4:
        raise UsageError(_DOING, f"{token!r} is no token, or was mistyped", "Copy all of it.")
    kind, slug, barrier, choices = parts
    for check in (*programs(), *mutants(), *designs(), *limits()):
        if (check.kind, _slug(check.name), check.barrier.value) == (kind, slug, barrier):
            machine = check.build()
            steps = tuple(explorer.follow(machine, [_DIGITS.index(digit) for digit in choices]))
            end = steps[-1].after if steps else machine.start()
            return Replayed(check, steps, machine.wrong(end, check.is_good))
    raise UsageError(
        _DOING, f"there is no {kind} {slug!r} for the {barrier} barrier", "It is from another version: search again."
    )


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _check_sum(text: str) -> str:
    return f"{zlib.crc32(text.encode()) & 0xFFFF:04x}"
