"""Scenarios of work that goes on behind a submission: reading back what was restored, and draining.

Values are those of `catalog`; P is in an older snapshot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tolaria import ring
from tolaria.operations import Barrier, CaptureHost, HostWait, Inspect, ReadLive, Transfer
from tolaria.protocol import Ground, RolledBack, drain, reinspect_restored, rollback
from tolaria.ring import Tier
from tolaria.testing.programs import (
    FORWARD,
    are_slots_uniform,
    both,
    captured,
    ground,
    in_turn,
    oldest_good,
    reader,
    roll_back,
    rolled_back,
    section,
    take,
    tried,
    uniform,
    whole_step_captured,
    writer,
    writes,
)
from tolaria.testing.scenarios import QUEUES, Held, Scenario, Thread, governor, user
from tolaria.testing.world import VARIABLES, Program, World

BUSY = {"may_raise": ("SlotsBusy",)}
BUFFER, PINNED = ("b0", "p0"), ("p0", "h0")


def read_back(thread: int, barrier: Barrier, choose: Callable[..., Any] = ring.newest_good) -> Program:
    """A rollback that reads what it has restored, and asks some time later what was found."""

    def program() -> Iterator[Any]:
        done: RolledBack = yield from rollback(thread, ground(barrier), choose, "rolling back", read_back=True)
        if done.read_back:
            yield from reinspect_restored(thread, done.slot.index, done.slot.snapshot, ground(barrier))

    return program


def drained(thread: int, barrier: Barrier, source: int = 0, most: int = 1) -> Program:
    """The shipped draining of a slot that holds the snapshot of that very number."""

    def program() -> Iterator[Any]:
        yield from drain(thread, Ground(barrier, drained=most), source, source)

    return program


# ---------------------------------------------------------------- ends


def undisturbed(world: World) -> bool:
    """No rollback was told that what it restored is not what was read back."""
    return not world.disturbed


def _noticed_if_it_landed_before(world: World) -> bool:
    """A write that was there when its byte was read back is reported, and nothing else is."""
    landed = any(value == "N" for found in world.lives for _, value in found)
    return world.disturbed == landed


def _nothing_undone_is_left(world: World) -> bool:
    """Of the second snapshot, which the rollback has undone, no tier holds anything that may be read."""
    return all(slot.snapshot != 1 for slot in world.host.ring if slot.phase in ring.READABLE)


def _slots_hold_what_they_say(world: World) -> bool:
    """Whatever may be read is whole, and what its snapshot was taken of."""
    readable = [slot for slot in world.host.ring if slot.phase in ring.READABLE]
    held = {
        (slot.snapshot, *pair) for slot in readable for pair in zip(VARIABLES, world.slots[slot.index], strict=True)
    }
    return are_slots_uniform(world) and held <= world.held


def _first_is_held(world: World) -> bool:
    """Some slot holds the first snapshot, certified and whole."""
    return any(slot.snapshot == 0 and slot.is_good for slot in world.host.ring)


def _drained(world: World) -> bool:
    """The slot of the host tier holds the snapshot that was drained."""
    slot = world.host.ring[-1]
    return slot.snapshot == 0 and slot.phase is ring.SlotPhase.CERTIFIED and set(world.slots[-1]) == {"S"}


# ---------------------------------------------------------------- reading back


_READ_BACK = (
    Scenario(
        "reading back beside a writer",
        "A step beside a rollback that reads back what it restored: whole, and never reported as disturbed.",
        lambda b: [user(writer(0, "N", "A")), governor(read_back(1, b))],
        both(uniform("S", "N"), undisturbed),
    ),
    Scenario(
        "reading back beside a forward",
        "A forward in train mode waits for the reading of buffers only, and does not disturb it; a step waits for all.",
        lambda b: [
            user(in_turn(section(0, FORWARD, writes("N", "A", ("b0",))), writer(0, "N", "A", variables=("p0",)))),
            governor(read_back(1, b)),
        ],
        undisturbed,
        variables=BUFFER,
    ),
    Scenario(
        "reading back beside a reader",
        "A forward that only reads sees what was restored, whole, whether it was read back by then or not.",
        lambda b: [user(reader(0, "A")), governor(read_back(1, b))],
        both(uniform("S"), undisturbed),
    ),
    Scenario(
        "reading back twice",
        "Two rollbacks of one snapshot, a step beside them: each is told of its own reading or a later one.",
        lambda b: [user(writer(0, "N", "A", variables=("p0",))), governor(read_back(1, b)), governor(read_back(2, b))],
        both(undisturbed, rolled_back(2)),
        variables=("p0",),
    ),
    Scenario(
        "reading back that fails",
        "A reading that cannot be made is none of the rollback's business: it stays unread.",
        lambda b: [user(writer(0, "N", "A")), governor(read_back(1, b))],
        both(uniform("S", "N"), undisturbed, rolled_back(1)),
        options={"may_fail": ((1, ReadLive),)},
    ),
    Scenario(
        "reading back page-locked memory",
        "What the host restored it also reads back, before a step can begin.",
        lambda b: [user(writer(0, "N", "A", variables=PINNED)), governor(read_back(1, b))],
        both(uniform("S", "N"), undisturbed),
        variables=PINNED,
    ),
    Scenario(
        "reading back beside an unregistered writer",
        "A write of a thread that asks nobody: reported if it is there when its byte is read back, and only then.",
        lambda b: [user(writer(0, "N", "B", gated=False), "B"), governor(read_back(1, b))],
        _noticed_if_it_landed_before,
    ),
)


# ---------------------------------------------------------------- draining


def _left_slot(b: Barrier) -> list[Thread]:
    return [governor(in_turn(take(0, b), roll_back(0, b))), governor(drained(1, b))]


_DRAINING = (
    Scenario(
        "draining beside a step and a rollback",
        "A snapshot drains while it is restored beside a step.",
        lambda b: [user(writer(0, "N", "A")), governor(roll_back(1, b)), governor(drained(2, b))],
        both(uniform("S", "N"), _drained),
        QUEUES,
        held=Held(free=0, modelled=True, host=1),
    ),
    Scenario(
        "draining beside a snapshot that wants the slot",
        "A snapshot may overwrite what is draining, but not before it is drained.",
        lambda b: [governor(in_turn(writer(0, "N", "A"), take(0, b)), "A"), governor(drained(1, b))],
        _slots_hold_what_they_say,
        QUEUES,
        held=Held(("P", "S"), free=0, modelled=True, certified=2, host=1),
        options=BUSY,
    ),
    Scenario(
        "draining beside a snapshot without another slot",
        "The last good snapshot's place beside the train state is free for another once it was drained.",
        lambda b: [governor(in_turn(writer(0, "N", "A"), take(0, b)), "A"), governor(drained(1, b))],
        both(_slots_hold_what_they_say, _first_is_held, _drained),
        QUEUES,
        held=Held(free=0, modelled=True, host=1),
        options=BUSY,
    ),
    Scenario(
        "draining beside a rollback to an older snapshot",
        "What is draining is undone meanwhile: its copy is not kept, and no snapshot claims its slot too early.",
        lambda b: [
            governor(in_turn(roll_back(0, b, oldest_good), writer(0, "N", "A"), take(0, b, step=2)), "A"),
            governor(drained(1, b, source=1)),
        ],
        both(_slots_hold_what_they_say, _nothing_undone_is_left, rolled_back(1)),
        QUEUES,
        held=Held(("P", "S"), free=0, modelled=True, certified=2, host=1),
        options=BUSY,
    ),
    Scenario(
        "draining into a slot of a snapshot that failed",
        "A snapshot of the host tier fails when its copies are ordered but not made, and its slot is drained into.",
        lambda b: [governor(tried(take(0, b))), governor(drained(1, b))],
        both(_slots_hold_what_they_say, _first_is_held),
        QUEUES,
        held=Held(free=0, modelled=True, host=1),
        options={"tier": Tier.HOST, "may_fail": ((0, CaptureHost),), **BUSY},
    ),
    Scenario(
        "draining into a slot that was dropped",
        "A rollback drops a snapshot of the host tier whose copies have not been made, and its slot is drained into.",
        _left_slot,
        both(_slots_hold_what_they_say, _first_is_held),
        QUEUES,
        held=Held(free=0, modelled=True, host=1),
        options={"tier": Tier.HOST, **BUSY},
    ),
    Scenario(
        "a rollback to what was drained",
        "A snapshot drains, its place is taken by another, and a rollback goes back to the copy.",
        lambda b: [
            governor(in_turn(drained(0, b), writer(0, "N", "A"), tried(take(0, b))), "A"),
            governor(roll_back(1, b)),
        ],
        both(uniform("S", "N"), _slots_hold_what_they_say, _first_is_held),
        QUEUES,
        held=Held(free=0, modelled=True, host=1),
    ),
    Scenario(
        "draining that fails",
        "A transfer that fails is given up: nobody reads its copy, and a snapshot may have either slot.",
        lambda b: [governor(in_turn(writer(0, "N", "A"), take(0, b)), "A"), governor(tried(drained(1, b)))],
        both(_slots_hold_what_they_say, _first_is_held),
        QUEUES,
        held=Held(free=0, modelled=True, host=1),
        options={"tier": Tier.HOST, "may_fail": ((1, Transfer), (1, HostWait), (1, Inspect)), **BUSY},
    ),
    Scenario(
        "draining beside a capture",
        "A transfer takes page-locked memory, which no capture survives: one waits for the other.",
        lambda b: [user(whole_step_captured(0)), governor(drained(1, b))],
        _drained,
        QUEUES,
        held=Held(free=0, modelled=True, host=1),
    ),
    Scenario(
        "draining beside a capture and a rollback",
        "All three at once: nobody waits for somebody who waits for him.",
        lambda b: [
            user(captured(0, writes("N", "A"))),
            governor(drained(1, b)),
            governor(roll_back(2, b, patient=True)),
        ],
        both(_drained, uniform("S"), rolled_back(1)),
        QUEUES,
        held=Held(free=0, modelled=True, host=1),
    ),
)


BACKGROUND = (*_READ_BACK, *_DRAINING)
"""In the order of the table."""
