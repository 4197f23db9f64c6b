"""What the threads of a simulated `Machine` run, and what its ends are expected to be. The words of a scenario."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from tolaria import gradients, ring
from tolaria.admission import begin_capture, close_section, end_capture, open_section
from tolaria.operations import Await, Barrier, CallerStreams, Change, SectionKind
from tolaria.protocol import Ground, rollback, seal, snapshot
from tolaria.testing.world import (
    QUEUED,
    VARIABLES,
    Allocate,
    CaptureBegins,
    CaptureEnds,
    Fused,
    Handover,
    Launch,
    Program,
    Reassign,
    Replay,
    Version,
    World,
)

READ, FORWARD, WRITE, FOREIGN = SectionKind.READ, SectionKind.FORWARD, SectionKind.WRITE, SectionKind.FOREIGN

# ---------------------------------------------------------------- users


def section(
    thread: int, kind: SectionKind, *inside: Program, in_autograd: bool = False, named: tuple[str, ...] = ()
) -> Program:
    """Programs inside a section, with streams that it names."""

    def program() -> Iterator[Any]:
        yield from open_section(thread, kind, in_autograd, None, tuple((QUEUED, stream) for stream in named))
        for one in inside:
            yield from one()
        yield from close_section(thread, 0)

    return program


def writes(value: str, stream: str = "", variables: tuple[str, ...] = VARIABLES) -> Program:
    """The launches of an optimizer step."""

    def program() -> Iterator[Any]:
        for variable in variables:
            yield Launch(stream, "write", variable, value)

    return program


def reads(stream: str = "", variables: tuple[str, ...] = VARIABLES) -> Program:
    """The launches of a forward."""

    def program() -> Iterator[Any]:
        for variable in variables:
            yield Launch(stream, "read", variable)

    return program


def writer(
    thread: int, value: str, stream: str = "", gated: bool = True, variables: tuple[str, ...] = VARIABLES
) -> Program:
    """An optimizer step of one launch per variable, in a write section unless `gated` is off."""
    launches = writes(value, stream, variables)
    return section(thread, WRITE, launches) if gated else launches


def reader(thread: int, stream: str = "", gated: bool = True, variables: tuple[str, ...] = VARIABLES) -> Program:
    """A forward of one launch per variable, inside a forward section unless `gated` is off."""
    launches = reads(stream, variables)
    return section(thread, FORWARD, launches) if gated else launches


def current(stream: str, program: Program) -> Program:
    """A program while another stream is the thread's current one, as inside ``with torch.cuda.stream(...)``."""

    def run() -> Iterator[Any]:
        inner: Any = program()
        answer: Any = None
        try:
            while True:
                op = inner.send(answer)
                answer = ((QUEUED, stream),) if isinstance(op, CallerStreams) else (yield op)
        except StopIteration as end:
            return end.value

    return run


def in_turn(*programs: Program) -> Program:
    """One thread that runs several programs."""

    def program() -> Iterator[Any]:
        for one in programs:
            yield from one()

    return program


def handover(source: str, target: str) -> Program:
    """Later work of stream `target` waits for what stream `source` was given so far; nothing to do without streams."""

    def program() -> Iterator[Any]:
        yield Handover(source, target)

    return program


def captured(thread: int, *inside: Program, graph: str = "g", in_autograd: bool = False) -> Program:
    """A graph capture with programs inside, the way `Sections` announces it."""

    def program() -> Iterator[Any]:
        yield from capture_begins(thread, graph, in_autograd)()
        try:
            for one in inside:
                yield from one()
        finally:
            yield from capture_ends(thread)()

    return program


def capture_begins(thread: int, graph: str = "g", in_autograd: bool = False) -> Program:
    """The first half of `captured`."""

    def program() -> Iterator[Any]:
        yield from begin_capture(thread, thread, in_autograd)
        yield CaptureBegins(graph)

    return program


def capture_ends(thread: int) -> Program:
    """The second half."""

    def program() -> Iterator[Any]:
        yield CaptureEnds()
        yield from end_capture(thread)

    return program


def replayed(thread: int, stream: str, graph: str = "g") -> Program:
    """A replay, in the write section that `Sections` opens around it."""

    def program() -> Iterator[Any]:
        yield Replay(stream, graph)

    return section(thread, WRITE, program)


def backward(thread: int) -> tuple[Program, Program]:
    """What to put into a section that waits for an engine thread, and at the end of what that thread runs."""

    def wait() -> Iterator[Any]:
        yield Await("wait for the engine", lambda s: (s, None) if s.running else None)

    def tell() -> Iterator[Any]:
        yield Change("the engine is done", lambda s: (replace(s, running=((thread, 0),)), None))

    return wait, tell


# ---------------------------------------------------------------- the governor's threads


def ground(barrier: Barrier) -> Ground:
    """What the protocol knows of the machine; nobody gives up waiting."""
    return Ground(barrier)


def oldest_good(slots: ring.Ring, before: int | None) -> ring.Slot | None:
    """A choice that goes as far back as possible."""
    good = [slot for slot in slots if slot.is_good and (before is None or slot.snapshot < before)]
    return min(good, key=lambda slot: slot.snapshot, default=None)


def roll_back(thread: int, barrier: Barrier, choose: Callable[..., Any] = ring.newest_good, **options: Any) -> Program:
    """The shipped rollback, by hand unless the options say otherwise."""
    return functools.partial(rollback, thread, ground(barrier), choose, "rolling back", **options)


def take(thread: int, barrier: Barrier, step: int = 1, manual: bool = False) -> Program:
    """The shipped snapshot."""
    return functools.partial(snapshot, thread, ground(barrier), step, manual)


def take_and_seal(thread: int, barrier: Barrier, manual: bool = False, step: int = 1) -> Program:
    """A snapshot, and its sealing some time later."""

    def program() -> Iterator[Any]:
        taken = yield from snapshot(thread, ground(barrier), step, manual)
        yield from seal(thread, taken.slot, taken.snapshot, manual, Ground(barrier))

    return program


def homes(barrier: Barrier, *names: str) -> tuple[str, ...] | None:
    """The streams of the threads; a host has none."""
    return None if barrier is Barrier.HOST else names


# ---------------------------------------------------------------- what users do besides


def fused_step(thread: int, value: str, stream: str) -> Program:
    """An optimizer step by a single launch that writes every variable."""

    def launch() -> Iterator[Any]:
        yield Fused(tuple(Launch(stream, "write", variable, value) for variable in ("p0", "p1")))

    return section(thread, WRITE, launch)


def failing_step(thread: int, value: str, stream: str) -> Program:
    """An optimizer step that raises after the first of its two launches, and is told as `Sections` tells it."""

    def program() -> Iterator[Any]:
        yield from open_section(thread, WRITE, False)
        yield Launch(stream, "write", "p0", value)
        yield Change("mark the step as torn", lambda s: (gradients.mark_torn(s), None))
        yield from close_section(thread, 0)

    return program


def outliving_section(thread: int, stream: str) -> Program:
    """A section that is opened inside a capture and writes after its end."""
    opened = functools.partial(open_section, thread, WRITE, False)
    closed = functools.partial(close_section, thread, 0)
    return in_turn(capture_begins(thread), opened, capture_ends(thread), writes("N", stream), closed)


def straddling_step(thread: int, stream: str) -> Program:
    """Forward, backward and an optimizer step, told as `Sections` tells them. What it writes names its forward's epoch.

    Only the step itself is a write section. It is left out when its gradients began before a rollback, and writes
    nothing when a rollback has dropped them since they were accumulated (`RestoreHost`, which bumps the version too).
    """

    def program() -> Iterator[Any]:
        epoch: int = yield from open_section(thread, FORWARD, False)
        yield Launch(stream, "read", "p0")
        yield from close_section(thread, 0)
        yield Change("the backward begins", lambda s: gradients.begin_backward(s, 7, epoch))
        accumulated = yield Version()
        yield Change("the backward ends", lambda s: gradients.end_backward(s, 7, epoch))
        yield from open_section(thread, WRITE, False)
        stale = yield Change("are the gradients stale?", lambda s: (s, gradients.are_gradients_stale(s, -1)))
        if not stale and (yield Version()) == accumulated:
            yield from writes(f"N{epoch}", stream)()
        yield Change("forget the gradients", lambda s: gradients.forget_gradients(s, -1))
        yield from close_section(thread, 0)

    return program


def backward_over_an_old_graph(thread: int, stream: str, barrier: Barrier) -> Program:
    """A forward, a rollback by the same thread, and a backward that reads what was saved, if its version fits."""

    def program() -> Iterator[Any]:
        yield from open_section(thread, FORWARD, False)
        saved = yield Version()
        yield from reads(stream)()
        yield from close_section(thread, 0)
        yield from roll_back(thread, barrier)()
        if (yield Version()) == saved:
            yield from reads(stream)()

    return program


def moving(thread: int, stream: str, value: str) -> Program:
    """A step that writes one parameter and puts other memory behind the other."""

    def program() -> Iterator[Any]:
        yield Launch(stream, "write", "p0", value)
        yield Reassign("p1", value)

    return section(thread, FOREIGN, program)


def freeing(stream: str, value: str) -> Program:
    """Put other memory with the same contents behind a parameter, then take memory for something else. No section."""

    def program() -> Iterator[Any]:
        yield Reassign("p1", value)
        yield Allocate(stream, "F")

    return program


def whole_step_captured(thread: int, **options: Any) -> Program:
    """A graph capture of a forward section and a write section."""
    return captured(thread, in_turn(section(thread, FORWARD), section(thread, WRITE, writes("N", "A"))), **options)


def tried(program: Program) -> Program:
    """A program whose errors are caught, as a caller of `execute_rollback` may."""

    def run() -> Iterator[Any]:
        try:
            yield from program()
        except Exception:
            return

    return run


# ---------------------------------------------------------------- ends


def is_uniform(values: tuple[str, ...]) -> bool:
    """All the same."""
    return len(set(values)) == 1


def uniform(*allowed: str) -> Callable[[World], bool]:
    """Ends whose memory is one of `allowed` throughout, and whose readers saw one value each."""

    def is_good(world: World) -> bool:
        if not is_uniform(world.memory) or world.memory[0] not in allowed:
            return False
        readers = {thread for thread, _, _ in world.seen}
        return all(is_uniform(tuple(value for t, _, value in world.seen if t == thread)) for thread in readers)

    return is_good


def are_slots_uniform(world: World) -> bool:
    """Every published slot holds one value throughout."""
    held = [world.slots[slot.index] for slot in world.host.ring if slot.phase in ring.READABLE]
    return all(map(is_uniform, held))


def are_buffers_whole(world: World) -> bool:
    """The first two variables of every published slot are of one step."""
    held = [world.slots[slot.index][:2] for slot in world.host.ring if slot.phase in ring.READABLE]
    return all(map(is_uniform, held))


def both(*conditions: Callable[[World], bool]) -> Callable[[World], bool]:
    """Ends that fulfil every condition."""
    return lambda world: all(condition(world) for condition in conditions)


def never_beside_restored(world: World) -> bool:
    """What a rollback restored is not mixed with what a step wrote. Steps of several writers may mix by themselves."""
    return all(value == "S" for value in world.memory) or "S" not in world.memory


def restored_is_read_whole(world: World) -> bool:
    """No forward has seen what a rollback restored beside anything else."""
    threads = {thread for thread, _, _ in world.seen}
    return all(len({value == "S" for t, _, value in world.seen if t == thread}) == 1 for thread in threads)


def torn_only_if_marked(*allowed: str) -> Callable[[World], bool]:
    """Uniform ends, or ends in which the train state is known to be torn."""
    is_whole = uniform(*allowed)

    def is_good(world: World) -> bool:
        return world.host.torn or is_whole(world)

    return is_good


def two_slots(world: World) -> bool:
    """Two slots are published, each holding one value throughout."""
    return ring.count(world.host.ring, lambda slot: slot.phase in ring.READABLE) == 2 and are_slots_uniform(world)


def first_snapshot_is_kept(world: World) -> bool:
    """The certified snapshot of the start is where it was."""
    return world.host.ring[0].snapshot == 0 and is_uniform(("S", *world.slots[0]))


def refused_or_done(thread: int) -> Callable[[World], bool]:
    """A rollback took place, or was refused and changed nothing."""

    def is_good(world: World) -> bool:
        end = world.finished[thread]
        done = end is not None and end.how == "returned"
        return world.host.epoch == int(done) and (done or world.host.ring[0].phase is ring.SlotPhase.CERTIFIED)

    return is_good


def rolled_back(times: int) -> Callable[[World], bool]:
    """So many rollbacks took place."""

    def is_good(world: World) -> bool:
        return world.host.epoch == times

    return is_good


def freed_or_held(world: World) -> bool:
    """Slots hold what they were taken of, also where their source was let go meanwhile."""
    return all(
        set(world.slots[slot.index]) <= {"O", "S"} for slot in world.host.ring if slot.phase in ring.READABLE
    ) and are_slots_uniform(world)


def reader_is_fresh(world: World) -> bool:
    """What the second pass over an old graph read, if it read at all, is what the first read."""
    found = [value for _, _, value in world.seen]
    return found[2:] in ([], found[:2])


def two_published(world: World) -> bool:
    """Two slots may be read."""
    return ring.count(world.host.ring, lambda slot: slot.phase in ring.READABLE) == 2
