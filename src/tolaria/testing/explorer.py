"""Searching a machine's schedules: all of them, breadth first; or some of them, at random. And replaying one.

The first violation of an exhaustive search has a shortest schedule. A schedule is a list of numbers, one for each place
where more than one thing could have happened, so it can be printed, passed on and replayed.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tolaria.errors import UsageError
from tolaria.testing.simulator import Machine
from tolaria.testing.world import End, Outcome, Step, World

IsGood = Callable[[World], bool]
_LOOK_AT_THE_CLOCK = 512  # states between two looks


def explore(machine: Machine, is_good: IsGood, limit: int | None = None, deadline: float | None = None) -> Outcome:
    """Visit every reachable state, up to the first violation.

    Args:
        machine: What to explore.
        is_good: What must hold at every end; see `Machine.wrong` for what must hold besides.
        limit: Most states to visit.
        deadline: `time.monotonic()` at which to stop.
    """
    start = machine.start()
    parents: dict[World, tuple[World, int] | None] = {start: None}
    # invariant: all ways to a state are equally long, so its ways are counted when the level before it is done
    level, ways = [start], {start: 1}
    ends: set[End] = set()
    schedules = visited = 0
    while level:
        further: dict[World, int] = {}
        for world in level:
            if visited % _LOOK_AT_THE_CLOCK == 0 and deadline is not None and time.monotonic() > deadline:
                return Outcome(len(parents), schedules, None, (), (), frozenset(ends), complete=False)
            visited += 1
            steps = machine.steps(world)
            if not steps:
                schedules += ways[world]
                ends.add(_end(world))
                wrong = machine.wrong(world, is_good)
                if wrong is not None:
                    choices = _choices(machine, parents, world)
                    found = f"{wrong}: memory {world.memory}, slots {world.slots}, seen {world.seen}"
                    return Outcome(
                        len(parents), schedules, found, tuple(follow(machine, choices)), choices, frozenset(ends)
                    )
            for number, step in enumerate(steps):
                if step.after not in parents:
                    parents[step.after] = (world, number)
                elif step.after not in further:
                    raise AssertionError(f"a state was reached in fewer steps before: {step}")
                further[step.after] = further.get(step.after, 0) + ways[world]
        if limit is not None and len(parents) > limit:
            return Outcome(len(parents), schedules, None, (), (), frozenset(ends), complete=False)
        level, ways = list(further), further
    return Outcome(len(parents), schedules, None, (), (), frozenset(ends))


def _end(world: World) -> End:
    return world.memory, world.seen, tuple(end.how if end else "stuck" for end in world.finished)


def _choices(machine: Machine, parents: dict[World, tuple[World, int] | None], world: World) -> tuple[int, ...]:
    """How to get there: a number for each place with more than one way on."""
    numbers: list[int] = []
    link = parents[world]
    while link is not None:
        before, number = link
        if len(machine.steps(before)) > 1:
            numbers.append(number)
        link = parents[before]
    return tuple(reversed(numbers))


def follow(machine: Machine, choices: Iterable[int]) -> list[Step]:
    """Take one schedule again, to its end.

    Raises:
        UsageError: The choices do not fit the machine: they are of another program or version.
    """
    left = list(choices)
    world = machine.start()
    taken: list[Step] = []
    while steps := machine.steps(world):
        if len(steps) == 1:
            number = 0
        elif left:
            number = left.pop(0)
        else:
            raise _misfit("it ends too early")
        if number >= len(steps):
            raise _misfit(f"it takes way {number} where there are {len(steps)}")
        taken.append(steps[number])
        world = steps[number].after
    if left:
        raise _misfit(f"{len(left)} choices are left at the end")
    return taken


def _misfit(seen: str) -> UsageError:
    return UsageError(
        "replaying a schedule", f"it does not fit this program: {seen}", "It is from another version: search again."
    )


# ---------------------------------------------------------------- at random


@dataclass(slots=True)
class Uniform:
    """Every step that may happen is as likely as any other."""

    source: random.Random

    def begin(self) -> None:
        """A new run."""

    def choose(self, steps: list[Step]) -> int:
        """One of several steps."""
        return self.source.randrange(len(steps))


class Priorities:
    """The actor of the highest priority moves, as long as it can; at a few places it becomes the last.

    Burckhardt et al., *A randomized scheduler with probabilistic guarantees of finding bugs* (2010): with `changes`
    such places, every bug that needs no more than that many ordered events is found with a probability that depends on
    the number of actors and steps only.

    Args:
        source: Random numbers.
        changes: Places at which priorities change.
        length: About how many choices a run has.
    """

    def __init__(self, source: random.Random, changes: int = 3, length: int = 60) -> None:
        self.source, self.changes, self.length = source, changes, length
        self._priority: dict[str, float] = {}
        self._at: set[int] = set()
        self._taken = 0

    def begin(self) -> None:
        """A new run."""
        self._priority.clear()
        self._taken = 0
        self._at = {self.source.randrange(self.length) for _ in range(self.changes)}

    def choose(self, steps: list[Step]) -> int:
        """One of several steps."""
        for step in steps:
            self._priority.setdefault(step.actor, 1 + self.source.random())
        number = max(range(len(steps)), key=lambda i: (self._priority[steps[i].actor], self.source.random()))
        if self._taken in self._at:
            self._priority[steps[number].actor] = -self._taken - 1.0
        self._taken += 1
        return number


def sample(
    machine: Machine, is_good: IsGood, strategy: Uniform | Priorities, runs: int, deadline: float | None = None
) -> Outcome:
    """Take schedules at random, up to the first violation. Proves nothing, but reaches programs of any size.

    Args:
        machine: What to run.
        is_good: As for `explore`.
        strategy: How to choose; its random source is what makes the search repeatable.
        runs: Most schedules to take.
        deadline: `time.monotonic()` at which to stop.
    """
    seen: set[World] = set()
    ends: set[End] = set()
    for run in range(runs):
        if deadline is not None and time.monotonic() > deadline:
            return Outcome(len(seen), run, None, (), (), frozenset(ends), complete=False)
        strategy.begin()
        world = machine.start()
        choices: list[int] = []
        while steps := machine.steps(world):
            number = 0
            if len(steps) > 1:
                number = strategy.choose(steps)
                choices.append(number)
            world = steps[number].after
            seen.add(world)
        ends.add(_end(world))
        wrong = machine.wrong(world, is_good)
        if wrong is not None:
            found = f"{wrong}: memory {world.memory}, slots {world.slots}, seen {world.seen}"
            taken = tuple(follow(machine, choices))
            return Outcome(len(seen), run + 1, found, taken, tuple(choices), frozenset(ends))
    return Outcome(len(seen), runs, None, (), (), frozenset(ends), complete=False)
