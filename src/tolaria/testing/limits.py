"""What the protocol does not cover: programs whose violation is known, so that it can be shown.

An unregistered writer launches without asking the gate. It cannot be kept out by anything that works on the device. It
is noticed if its write lands before a comparison of the live state with the slot reads that byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tolaria.operations import Barrier, Change, ContextRecord, StreamWait, Synchronize
from tolaria.testing.explorer import IsGood
from tolaria.testing.programs import is_uniform, roll_back, writer
from tolaria.testing.scenarios import EVERY, Scenario, governor, user
from tolaria.testing.simulator import Machine, dispose
from tolaria.testing.world import QUEUED, Compare, Program, Wait, World


def comparing(program: Program, barrier: Barrier) -> Program:
    """A rollback that compares the live state with its slot before it commits, behind what was launched until then."""

    def compare() -> Iterator[Any]:
        if barrier is Barrier.CONTEXT:
            event = yield ContextRecord(QUEUED)
            yield StreamWait(QUEUED, event)
        elif barrier is Barrier.BLOCKING:
            yield Synchronize(QUEUED)
        yield Compare(0)
        yield Wait()

    def run() -> Iterator[Any]:
        inner: Any = program()
        try:
            op = next(inner)
            while True:
                if isinstance(op, Change) and op.label == "commit":
                    yield from compare()
                try:
                    result = yield op
                except Exception as error:
                    op = inner.throw(error)
                else:
                    op = inner.send(result)
        except StopIteration as end:
            return end.value
        finally:
            dispose(inner)

    return run


def excluded_or_noticed(world: World) -> bool:
    """The state is whole, or the comparison has found that it is not what was restored."""
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


def _unregistered(name: str, says: str, compares: bool) -> Limit:
    def threads(barrier: Barrier) -> list[Any]:
        rollback = roll_back(1, barrier)
        return [
            user(writer(0, "N", "B", gated=False), "B"),
            governor(comparing(rollback, barrier) if compares else rollback),
        ]

    return Limit(name, says, Scenario(name, says, threads, excluded_or_noticed, EVERY))


LIMITS: dict[str, Limit] = {
    limit.name: limit
    for limit in (
        _unregistered(
            "an unregistered writer", "A step of a thread that asks nobody, beside a rollback: torn, unnoticed.", False
        ),
        _unregistered(
            "an unregistered writer, compared",
            "The same with a comparison before the commit: a write that lands after the comparison has read its byte.",
            True,
        ),
    )
}
"""By name."""
