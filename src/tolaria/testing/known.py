"""Scenarios of the `streams` barrier: which streams are known, when they become so, and whom that leaves alone.

All other scenarios run with it too. Values are those of `catalog`; M comes from a neighbour's step.
"""

from __future__ import annotations

from tolaria.testing.programs import (
    FOREIGN,
    READ,
    are_slots_uniform,
    both,
    captured,
    in_turn,
    is_uniform,
    reader,
    reads,
    roll_back,
    rolled_back,
    section,
    take,
    uniform,
    writer,
    writes,
)
from tolaria.testing.scenarios import STREAMS_ONLY, Scenario, governor, user
from tolaria.testing.world import VARIABLES, World

_NEIGHBOUR = (*VARIABLES, "n0")  # what nobody governs here


def neighbour_is_left_alone(world: World) -> bool:
    """The second stream was given its own two launches and nothing else; everything governed is whole."""
    governed = world.memory[:2]
    slots = all(is_uniform(slot[:2]) for slot in world.slots)
    return is_uniform(governed) and governed[0] in "SN" and slots and world.memory[2] == "M" and world.launched[1] == 2


NEIGHBOUR = Scenario(
    "a neighbour",
    "A stream of another model is told to wait for nothing, whatever a snapshot and a rollback of this one do.",
    lambda b: [
        user(writer(0, "N", "A")),
        governor(in_turn(take(1, b), roll_back(1, b))),
        user(in_turn(writes("O", "B", ("n0",)), writes("M", "B", ("n0",))), "B"),
    ],
    neighbour_is_left_alone,
    STREAMS_ONLY,
    variables=_NEIGHBOUR,
)

KNOWN = (
    NEIGHBOUR,
    Scenario(
        "a step and the next forward",
        "A stream that is known by its first section waits for a rollback before its second.",
        lambda b: [user(in_turn(writer(0, "N", "A"), reader(0, "A"))), governor(roll_back(1, b))],
        uniform("S", "N"),
        STREAMS_ONLY,
    ),
    Scenario(
        "one stream of two threads",
        "A stream becomes known by sections of two threads at once, beside a rollback.",
        lambda b: [user(reader(0, "A")), user(reader(1, "A")), governor(roll_back(2, b))],
        uniform("S"),
        STREAMS_ONLY,
    ),
    Scenario(
        "a stream that a reader names",
        "A section that launches on another stream than the current one names it.",
        lambda b: [user(section(0, READ, reads("B"), named=("B",))), governor(roll_back(1, b)), user(in_turn(), "B")],
        uniform("S"),
        STREAMS_ONLY,
    ),
    Scenario(
        "work of the caller",
        "What a thread has launched on its current stream comes before its rollback, what it launches next after it.",
        lambda b: [governor(in_turn(writes("N", "A"), roll_back(0, b), reads("A")), "A")],
        uniform("S"),
        STREAMS_ONLY,
    ),
    Scenario(
        "a named stream that is captured",
        "A section names a stream that another thread captures: the host waits, the capture stays whole.",
        lambda b: [
            user(in_turn(writer(0, "O", "A"), captured(0, writes("N", "A")))),
            governor(take(1, b)),
            user(section(2, FOREIGN, writes("O", "B"), named=("A", "B")), "B"),
        ],
        are_slots_uniform,
        STREAMS_ONLY,
        options={"may_raise": ("CaptureInProgress",)},
    ),
    Scenario(
        "a capture on a stream that is new",
        "A capture's stream becomes known before it begins; its replay is a step like any other.",
        lambda b: [user(captured(0, writes("N", "A"))), governor(roll_back(1, b, patient=True))],
        both(rolled_back(1), uniform("S")),
        STREAMS_ONLY,
    ),
)
"""In the order of the table."""
