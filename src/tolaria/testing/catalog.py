"""The scenarios themselves. Bounds, and what lies outside of them: docs/proof.md.

Values: O is in memory at the start, S in the snapshot, N and M come from optimizer steps, X is not finite, F belongs to
somebody else.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from tolaria import ring
from tolaria.operations import Barrier, CaptureHost, Check, ContextRecord, Copy, RestoreHost
from tolaria.testing.background import BACKGROUND
from tolaria.testing.known import KNOWN
from tolaria.testing.programs import (
    FOREIGN,
    FORWARD,
    WRITE,
    are_buffers_whole,
    are_slots_uniform,
    backward,
    backward_over_an_old_graph,
    both,
    captured,
    current,
    failing_step,
    first_snapshot_is_kept,
    freed_or_held,
    freeing,
    fused_step,
    handover,
    in_turn,
    is_uniform,
    moving,
    never_beside_restored,
    oldest_good,
    outliving_section,
    reader,
    reader_is_fresh,
    refused_or_done,
    replayed,
    restored_is_read_whole,
    roll_back,
    rolled_back,
    section,
    straddling_step,
    take,
    take_and_seal,
    torn_only_if_marked,
    tried,
    two_published,
    two_slots,
    uniform,
    whole_step_captured,
    writer,
    writes,
)
from tolaria.testing.scenarios import CONTEXT_ONLY, QUEUES, Held, Scenario, Thread, governor, user

REFUSED = {"may_raise": ("CaptureInProgress",)}
BUSY = {"may_raise": ("SlotsBusy",)}
PINNED, EXTRA, BUFFER = ("p0", "h0"), ("p0", "x0"), ("b0", "p0")


def with_an_engine(barrier: Barrier) -> list[Thread]:
    """Thread 0 holds a section while it waits for an engine thread that wants one of its own."""
    wait, tell = backward(1)
    engine = section(1, FORWARD, in_autograd=True)
    return [
        user(section(0, FORWARD, wait)),
        user(in_turn(engine, tell)),
        governor(roll_back(2, barrier)),
    ]


def _named(barrier: Barrier, *streams: str) -> tuple[str, ...]:
    """The streams that a section has to name: all of them, where only known ones are ordered."""
    return streams if barrier is Barrier.STREAMS else ()


verified = functools.partial(roll_back, verify_before=True)
step = functools.partial(writer, 0, "N", "A")


# ---------------------------------------------------------------- rollbacks


_ROLLBACKS = (
    Scenario(
        "one writer",
        "A step of two launches beside a rollback of another thread.",
        lambda b: [user(step()), governor(roll_back(1, b))],
        uniform("S", "N"),
    ),
    Scenario(
        "one fused writer",
        "A step of one launch that the device works off in two parts.",
        lambda b: [user(fused_step(0, "N", "A")), governor(roll_back(1, b))],
        uniform("S", "N"),
    ),
    Scenario(
        "two writers on one stream",
        "Two threads step on one stream beside a rollback.",
        lambda b: [user(step()), user(writer(1, "M", "A")), governor(roll_back(2, b))],
        never_beside_restored,
    ),
    Scenario(
        "two writers on two streams",
        "Two threads step on streams of their own beside a rollback.",
        lambda b: [user(step()), user(writer(1, "M", "B"), "B"), governor(roll_back(2, b))],
        never_beside_restored,
    ),
    Scenario(
        "one reader",
        "A forward of two launches sees O or S, never both.",
        lambda b: [user(reader(0, "A")), governor(roll_back(1, b))],
        uniform("S"),
    ),
    Scenario(
        "a writer and a reader on two streams",
        "A step, then a forward on another stream behind an event.",
        lambda b: [
            user(in_turn(step(), handover("A", "B"), current("B", reader(0, "B")))),
            Thread(roll_back(1, b), governs=True),
            user(in_turn(), "B"),
        ],
        uniform("S", "N"),
    ),
    Scenario(
        "two readers across a rollback",
        "Forwards of two threads on two streams.",
        lambda b: [user(reader(0, "A")), user(reader(1, "B"), "B"), governor(roll_back(2, b))],
        uniform("S"),
    ),
    Scenario(
        "two rollbacks at once",
        "A step beside rollbacks of two threads.",
        lambda b: [user(step()), governor(roll_back(1, b)), governor(roll_back(2, b))],
        both(uniform("S", "N"), rolled_back(2)),
    ),
    Scenario(
        "a rollback after one that went further back",
        "What a rollback has given up does not come back.",
        lambda b: [governor(in_turn(roll_back(0, b, oldest_good), roll_back(0, b))), user(reader(1, "A"))],
        both(uniform("P"), rolled_back(2)),
        held=Held(("P", "S"), free=1),
    ),
    Scenario(
        "a rollback by a stepping thread",
        "A thread steps, rolls back and reads, beside the forward of another.",
        lambda b: [governor(in_turn(step(), roll_back(0, b), reader(0, "A")), "A"), user(reader(1, "B"), "B")],
        both(never_beside_restored, restored_is_read_whole),
    ),
    Scenario(
        "an exception inside a step",
        "A step that raises half-way leaves the state marked as torn until a rollback.",
        lambda b: [user(failing_step(0, "N", "A")), governor(roll_back(1, b))],
        torn_only_if_marked("S"),
    ),
    Scenario(
        "a rollback that fails",
        "An operation of a rollback fails: nothing was written, or the state is marked until the next rollback.",
        lambda b: [user(step(variables=BUFFER)), governor(tried(roll_back(1, b))), governor(roll_back(2, b))],
        torn_only_if_marked("S", "N"),
        variables=BUFFER,
        options={"may_fail": ((1, Copy), (1, RestoreHost), (1, Check), (1, ContextRecord))},
    ),
    Scenario(
        "an engine thread",
        "An engine thread asks for a section while a rollback waits for the section that waits for the engine.",
        with_an_engine,
        uniform("S"),
    ),
    Scenario(
        "a forward that straddles a rollback",
        "Gradients of a forward from before a rollback are never applied after it.",
        lambda b: [user(straddling_step(0, "A")), governor(roll_back(1, b))],
        uniform("S", "N1"),
        options={"versions": True},
    ),
    Scenario(
        "a backward over an old graph",
        "A backward over a graph from before a rollback is refused.",
        lambda b: [governor(backward_over_an_old_graph(0, "A", b), "A"), user(writer(1, "N", "B"), "B")],
        reader_is_fresh,
        options={"versions": True},
    ),
    Scenario(
        "moved storage",
        "A step puts other memory behind a parameter: the rollback comes before, or is refused.",
        lambda b: [user(moving(0, "A", "N")), governor(roll_back(1, b))],
        both(uniform("N"), refused_or_done(1)),
        options={"spare": 3, "may_raise": ("StateMismatch",)},
    ),
    Scenario(
        "storage freed beside a rollback",
        "Memory let go beside a rollback is written by nobody else than its next owner.",
        lambda b: [user(section(0, FOREIGN, freeing("A", "N"))), governor(roll_back(1, b))],
        refused_or_done(1),
        options={"spare": 3, "may_raise": ("StateMismatch",)},
    ),
)


# ---------------------------------------------------------------- snapshots


_SNAPSHOTS = (
    Scenario(
        "a snapshot and the next step",
        "A snapshot between two steps holds one of them whole.",
        lambda b: [user(in_turn(step(), writer(0, "M", "A"))), governor(take(1, b))],
        two_slots,
    ),
    Scenario(
        "a snapshot and a writer on any stream",
        "A section that may launch on any stream waits for the copies on all of them.",
        lambda b: [
            user(section(0, FOREIGN, writes("N", "B"), named=_named(b, "B")), "A"),
            governor(take(1, b)),
            user(in_turn(), "B"),
        ],
        two_slots,
    ),
    Scenario(
        "a rollback during a snapshot",
        "A step, a snapshot and a rollback at once.",
        lambda b: [user(step()), governor(take(1, b)), governor(roll_back(2, b))],
        both(uniform("S", "N"), are_slots_uniform),
    ),
    Scenario(
        "a snapshot of buffers",
        "A forward in train mode writes buffers and waits for their copies only.",
        lambda b: [
            user(section(0, FORWARD, writes("N", "A", ("b0", "b1")))),
            governor(take(1, b)),
            user(writer(2, "N", "A", variables=("p0",))),
        ],
        both(two_published, are_buffers_whole),
        variables=("b0", "b1", "p0"),
    ),
    Scenario(
        "a snapshot that fails",
        "A failure gives the slot up; the last good snapshot is still there.",
        lambda b: [user(step()), governor(tried(take(1, b))), governor(roll_back(2, b))],
        both(uniform("S", "N"), are_slots_uniform, first_snapshot_is_kept),
        options={"may_fail": ((1, Copy), (1, CaptureHost))},
    ),
    Scenario(
        "three snapshots for three slots",
        "Slots rotate; the certified snapshot of the start is never overwritten.",
        lambda b: [governor(take(0, b)), governor(take(1, b)), governor(take(2, b))],
        first_snapshot_is_kept,
        barriers=(Barrier.HOST, Barrier.BLOCKING),
        options=BUSY,
    ),
    Scenario(
        "slot reuse",
        "Manual snapshots overwrite each other; each is sealed as what its slot holds.",
        lambda b: [
            governor(take_and_seal(0, b, manual=True)),
            governor(in_turn(writer(1, "N", "A"), take_and_seal(1, b, manual=True)), "A"),
        ],
        are_slots_uniform,
        held=Held(free=1, modelled=True),
        options=BUSY,
    ),
    Scenario(
        "storage freed under a copy",
        "Memory let go while a snapshot copies it is not given to others before the copy is over.",
        lambda b: [user(freeing("A", "O")), governor(take(1, b))],
        freed_or_held,
        options={"spare": 3},
    ),
)


def _beside_queued_work() -> Iterator[Scenario]:
    """Page-locked memory, which the host copies itself, and extras, which other code launches."""
    for name, variables in (("page-locked memory", PINNED), ("an extra", EXTRA)):
        yield Scenario(
            f"{name}: rollback",
            "A step, then a forward on another stream.",
            lambda b, v=variables: [
                user(in_turn(step(variables=v), handover("A", "B"), current("B", reader(0, "B", variables=v)))),
                governor(roll_back(1, b)),
                user(in_turn(), "B"),
            ],
            uniform("S", "N"),
            variables=variables,
        )
        yield Scenario(
            f"{name}: snapshot",
            "A snapshot beside two steps.",
            lambda b, v=variables: [
                user(in_turn(step(variables=v), writer(0, "M", "A", variables=v))),
                governor(take(1, b)),
            ],
            are_slots_uniform,
            variables=variables,
        )


# ---------------------------------------------------------------- readings


_READINGS = (
    Scenario(
        "sealing beside a rollback",
        "A snapshot is sealed while a rollback drops it and another snapshot claims its slot.",
        lambda b: [
            governor(take_and_seal(0, b)),
            governor(in_turn(roll_back(1, b), take(1, b, step=2))),
        ],
        are_slots_uniform,
        held=Held(free=1, modelled=True),
        options=BUSY,
    ),
    Scenario(
        "a snapshot that is not finite",
        "An automatic snapshot of a state that is not finite is no target, sealed or not.",
        lambda b: [
            governor(in_turn(writer(0, "X", "A"), take_and_seal(0, b), roll_back(0, b)), "A"),
            user(reader(1, "B"), "B"),
        ],
        lambda world: is_uniform(world.memory) and world.memory[0] == "S",
        held=Held(free=1, modelled=True),
    ),
    Scenario(
        "a verified rollback beside a manual snapshot",
        "A rollback reads a slot that a manual snapshot would like to overwrite.",
        lambda b: [
            governor(verified(0, b)),
            governor(in_turn(writer(1, "N", "A"), take_and_seal(1, b, manual=True)), "A"),
        ],
        both(uniform("S", "N"), are_slots_uniform),
        held=Held(("P", "S"), free=0, modelled=True),
        options=BUSY,
    ),
    Scenario(
        "a manual snapshot beside a verified rollback",
        "A rollback goes to a manual snapshot as soon as it is published, and finds all of it.",
        lambda b: [
            governor(verified(0, b)),
            governor(in_turn(writer(1, "N", "A"), take(1, b, manual=True)), "A"),
        ],
        both(uniform("S", "N"), are_slots_uniform),
        held=Held(("S",), free=1, modelled=True),
    ),
    Scenario(
        "two verified rollbacks",
        "Two rollbacks read before they write; one of them goes further back.",
        lambda b: [
            user(step()),
            governor(verified(1, b)),
            governor(roll_back(2, b, oldest_good)),
        ],
        uniform("P", "S", "N"),
        held=Held(("P", "S"), free=0, modelled=True),
    ),
    Scenario(
        "a dropped choice",
        "What a rollback has read is dropped by another that goes further back, and its slot is claimed.",
        lambda b: [governor(verified(0, b)), governor(in_turn(roll_back(1, b, oldest_good), take(1, b)))],
        lambda world: (
            world.host.ring[0].phase in ring.READABLE
            and (world.memory[0] == "P" or world.host.ring[1].phase in ring.READABLE)
        ),
        held=Held(("P", "S"), free=1, modelled=True),
    ),
    Scenario(
        "a corrupted snapshot",
        "A snapshot whose bytes have changed is not restored: the older one is.",
        lambda b: [user(step(variables=("p0",))), governor(verified(1, b))],
        lambda world: world.memory[0] in "PN",
        variables=("p0",),
        held=Held(("P", "C"), ("P", "S"), free=0, modelled=True),
    ),
)


# ---------------------------------------------------------------- captures


_CAPTURES = (
    Scenario(
        "a rollback by hand during a capture",
        "Refused and without effect, or before or after the capture.",
        lambda b: [user(whole_step_captured(0)), governor(roll_back(1, b))],
        both(refused_or_done(1), uniform("S", "O")),
        QUEUES,
        options=REFUSED,
    ),
    Scenario(
        "an automatic rollback during a capture",
        "It waits for the end of the capture, whose own sections do not wait for it.",
        lambda b: [user(whole_step_captured(0)), governor(roll_back(1, b, patient=True))],
        both(rolled_back(1), uniform("S")),
        QUEUES,
    ),
    Scenario(
        "a snapshot during a capture",
        "Refused, or a whole snapshot.",
        lambda b: [user(in_turn(step(), whole_step_captured(0))), governor(take(1, b))],
        are_slots_uniform,
        QUEUES,
        options=REFUSED,
    ),
    Scenario(
        "a capture inside an open section",
        "A section that was open when a rollback was announced turns out to hold a capture.",
        lambda b: [user(section(0, WRITE, whole_step_captured(0))), governor(roll_back(1, b, patient=True))],
        both(rolled_back(1), uniform("S")),
        QUEUES,
    ),
    Scenario(
        "a capture and its replay",
        "A replay is a step; a rollback comes before or after it.",
        lambda b: [
            user(in_turn(whole_step_captured(0), replayed(0, "A"))),
            governor(roll_back(1, b, patient=True)),
        ],
        both(rolled_back(1), uniform("N", "S")),
        QUEUES,
    ),
    Scenario(
        "a capture that begins under the copies",
        "What a capture records is replayed later and does not overtake a snapshot's copies.",
        lambda b: [user(in_turn(whole_step_captured(0), replayed(0, "A"))), governor(take(1, b))],
        are_slots_uniform,
        QUEUES,
        options=REFUSED,
    ),
    Scenario(
        "a section that outlives its capture",
        "Its own wait does nothing inside the capture: the one at the beginning of the capture stands in for it.",
        lambda b: [user(outliving_section(0, "A")), governor(take(1, b))],
        are_slots_uniform,
        QUEUES,
        options=REFUSED,
    ),
    Scenario(
        "two captures",
        "An automatic rollback waits for both.",
        lambda b: [
            user(captured(0, writes("N", "A"))),
            user(captured(1, writes("N", "B"), graph="h"), "B"),
            governor(roll_back(2, b, patient=True)),
        ],
        both(rolled_back(1), uniform("S")),
        CONTEXT_ONLY,
    ),
)


SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario
    for scenario in (*_ROLLBACKS, *_SNAPSHOTS, *_beside_queued_work(), *_READINGS, *_CAPTURES, *BACKGROUND, *KNOWN)
}
"""By name, in the order of the table."""
