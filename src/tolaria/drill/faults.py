"""What goes wrong in a drill, and when. A fault is one function here and one row in `KINDS`.

A fault belongs to batches, not to step numbers: a batch keeps its number whatever is rolled back or skipped before it.
So "comes again on replay" has one meaning, and a run whose data never held some batches meets the others unchanged.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tolaria.drill.workloads import Batch, CannotRun, Training, Workload
from tolaria.testing.faults import (
    Moment,
    Occasions,
    exponent_bit,
    flip_bit,
    generator_for,
    is_hit,
    scale_gradients,
    write_from_foreign_thread,
    zero_second_moments,
)


@dataclass(frozen=True, slots=True)
class Scene:
    """What a fault may touch.

    Attributes:
        workload: Knows where this model can be hurt.
        training: The run's own state; None for faults of the data.
        batch: The batch of this step, as it should be.
        generator: On the CPU. Seeded by drill, fault and batch, so a fault that returns is the same fault.
        section: Opens a write section of the run's governor, for faults that keep to its rules; nothing without one.
        newest_slot: Memory of the snapshot that a rollback would take now; nothing without a governor.
    """

    workload: Workload
    training: Training | None
    batch: Batch
    generator: torch.Generator
    section: Callable[[], AbstractContextManager[Any]] = nullcontext
    newest_slot: Callable[[], Sequence[torch.Tensor]] = tuple


class UnderWay(Protocol):
    """What a fault has started on a device and left to itself."""

    def is_under_way(self) -> bool:
        """Whether the newest of it has not ended. Waits for nothing."""
        ...

    def wait(self) -> None:
        """Block the host until it has."""
        ...


@dataclass(frozen=True, slots=True)
class FaultKind:
    """One row of `KINDS`.

    Attributes:
        name: In reports.
        title: For people: what is done to the run.
        moment: When in a step.
        act: Does it. Faults of the data return the bad batch, others None.
        at: When in a run, as a share of its steps.
        length: Consecutive batches that it hits.
        times: Of the occasions on which its first batch is trained, at how many it strikes. Bad data strikes each time.
        part: The only micro-batch of a step that it concerns; None: all of them.
        beat: (period, place): it strikes at a batch that is `place` more than a multiple of `period`. As long as no
            batch was skipped, a snapshot follows every tenth step.
        under_way: What it leaves behind on the device; None where it is over when `act` returns.
    """

    name: str
    title: str
    moment: Moment
    act: Callable[[Scene], Batch | None]
    at: float
    length: int = 1
    times: int = 1
    part: int | None = None
    beat: tuple[int, int] | None = None
    under_way: UnderWay | None = None


def training_of(scene: Scene) -> Training:
    """The run's own state."""
    assert scene.training is not None  # only faults of the data have none
    return scene.training


def explode_gradients(scene: Scene) -> None:
    """Every gradient a million times too large, and finite.

    Adam divides by its size, so the harm comes over ten steps: the first moments forget it by 0.9 a step, the second by
    0.999, and in between every weight marches one way. After that the second moments are too large to learn anything.
    """
    scale_gradients(training_of(scene).model.parameters(), 1e6)


def zero_moments(scene: Scene) -> None:
    """Adam forgets how large gradients are."""
    zero_second_moments(training_of(scene).optimizer)


def write_from_foreign(scene: Scene) -> None:
    """A thread that the governor knows nothing of writes while the step is under way."""
    write_from_foreign_thread(list(training_of(scene).model.parameters()), scene.generator)


def flip_exponent_bit(scene: Scene) -> None:
    """The highest exponent bit of a positive weight: 0.05 becomes 1.7e37. A negative one would only silence a ReLU."""
    weight = scene.workload.exposed_weight(training_of(scene).model)
    candidates = (weight.data.view(-1) > 0).nonzero().flatten()
    if not len(candidates):  # a run that is dead already
        candidates = torch.arange(weight.numel(), device=weight.device)
    chosen = candidates[int(torch.randint(len(candidates), (), generator=scene.generator))]
    flip_bit(weight, int(chosen), exponent_bit(weight.dtype))


def spoil_labels(scene: Scene) -> Batch:
    """Finite, and nothing to learn from."""
    return scene.workload.garbage_batch(scene.batch, scene.generator)


def spoil_with_nan(scene: Scene) -> Batch:
    """Not finite."""
    return scene.workload.nan_batch(scene.batch)


KINDS: tuple[FaultKind, ...] = (
    # transient ones first: until a batch is skipped, the guarded run can be compared with the clean one itself
    FaultKind("gradient_explosion", "gradients x 1e6 for one step", Moment.STEP, explode_gradients, 0.20),
    FaultKind("zeroed_moments", "Adam's second moments zeroed, 3 steps", Moment.UPDATE, zero_moments, 0.32, length=3),
    FaultKind("foreign_write", "another thread overwrites weights", Moment.FORWARD, write_from_foreign, 0.44),
    FaultKind("bit_flip", "one exponent bit of a weight flips", Moment.UPDATE, flip_exponent_bit, 0.56),
    FaultKind("garbage_batches", "16 batches with random labels", Moment.DATA, spoil_labels, 0.67, length=16),
    FaultKind(
        "returning_bit_flip", "a bit flip that returns on replay", Moment.UPDATE, flip_exponent_bit, 0.80, times=2
    ),
    FaultKind("nan_batch", "one batch holds a NaN", Moment.DATA, spoil_with_nan, 0.91),
)
"""In the order in which they strike. Shares of the run leave room between them for a certified snapshot, see `plan`."""

ROOM = 28
"""Batches between two faults, at least: cadence, probation, detection, and late verdicts (10 + 10 + 5 + 3)."""

_ROOM_ON_AVERAGE = 40


@dataclass(frozen=True, slots=True)
class Fault:
    """One planned fault.

    Attributes:
        kind: What.
        batch: Index of the first batch it hits.
        seed: Of the drill.
    """

    kind: FaultKind
    batch: int
    seed: int

    @property
    def name(self) -> str:
        """Of its kind."""
        return self.kind.name

    @property
    def moment(self) -> Moment:
        """Of its kind."""
        return self.kind.moment

    @property
    def length(self) -> int:
        """Of its kind."""
        return self.kind.length

    @property
    def times(self) -> int:
        """Of its kind."""
        return self.kind.times

    @property
    def part(self) -> int | None:
        """Of its kind."""
        return self.kind.part

    def hits(self, batch: Batch) -> bool:
        """Whether it concerns this batch."""
        return is_hit(self, batch.index, batch.part)

    def act(
        self,
        workload: Workload,
        training: Training | None,
        batch: Batch,
        section: Callable[[], AbstractContextManager[Any]] = nullcontext,
        newest_slot: Callable[[], Sequence[torch.Tensor]] = tuple,
    ) -> Batch | None:
        """Do it, with random numbers that depend on seed, kind and batch alone."""
        generator = generator_for(self.seed, self.name, batch.index, batch.part)
        return self.kind.act(Scene(workload, training, batch, generator, section, newest_slot))


def fewest_steps(kinds: Sequence[FaultKind]) -> int:
    """The shortest run, in hundreds of steps, that has room for these faults."""
    needed = sum(kind.length for kind in kinds) + _ROOM_ON_AVERAGE * (len(kinds) + 1)
    return -(-needed // 100) * 100


def plan(seed: int, steps: int, kinds: Sequence[FaultKind]) -> tuple[Fault, ...]:
    """When each fault strikes: its share of the run, moved by up to 1.5 % of the run, depending on the seed.

    One that would come too soon after its predecessor is put off.

    Raises:
        CannotRun: Too few steps.
    """
    if steps < fewest_steps(kinds):
        raise CannotRun(f"{steps} steps are too few to space the faults out: use --steps {fewest_steps(kinds)} or more")
    faults: list[Fault] = []
    free = 0
    for kind in kinds:
        share = kind.at + random.Random(f"{seed}/{kind.name}").uniform(-0.015, 0.015)
        faults.append(Fault(kind, _on_beat(max(round(share * steps), free), free, kind.beat), seed))
        free = faults[-1].batch + kind.length + ROOM
    return tuple(faults)


def _on_beat(batch: int, free: int, beat: tuple[int, int] | None) -> int:
    """The batch that is nearest to `batch`, on the beat, and not before `free`."""
    if beat is None:
        return batch
    period, place = beat
    below = batch - (batch - place) % period
    nearest = below if batch - below <= period // 2 else below + period
    return nearest if nearest >= free else nearest + period


class Injector:
    """Strikes planned faults in one run. Make one per run and call it in the order in which it is written.

    Args:
        faults: From `plan`; empty for an undisturbed run.
        workload: What is trained.
        training: The run's own.

    Attributes:
        section: Opens a write section of the run's governor; set it before the first step of a governed run.
        newest_slot: Answers the memory of its newest good snapshot; likewise.
    """

    def __init__(self, faults: Sequence[Fault], workload: Workload, training: Training) -> None:
        self._faults, self._workload, self._training = faults, workload, training
        self._occasions = Occasions(faults)
        self.section: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.newest_slot: Callable[[], Sequence[torch.Tensor]] = tuple
        self._now: Batch | None = None
        training.optimizer.register_step_pre_hook(self._in_step)

    def begin(self, batch: Batch) -> None:
        """A step takes up `batch`, the first of its micro-batches or another."""
        self._now = batch
        self._occasions.begin(batch.index, batch.part)

    def strike(self, moment: Moment, batch: Batch) -> None:
        """The step has come to `moment`, at the latest of its micro-batches."""
        for fault in self._occasions.due(moment):
            fault.act(self._workload, self._training, batch, self.section, self.newest_slot)

    def _in_step(self, *_: Any) -> None:
        if self._now is not None:
            self.strike(Moment.STEP, self._now)

    @property
    def struck(self) -> tuple[str, ...]:
        """Names of the faults that struck in this step so far."""
        return tuple(self._occasions.struck)

    def under_way(self) -> tuple[str, ...]:
        """Names of the faults whose writes a device has yet to finish. Waits for nothing."""
        kinds = (fault.kind for fault in self._faults)
        return tuple(kind.name for kind in kinds if kind.under_way is not None and kind.under_way.is_under_way())

    def wait(self) -> None:
        """The run is over: block the host until no fault can write any more."""
        for fault in self._faults:
            if fault.kind.under_way is not None:
                fault.kind.under_way.wait()


def spoil(batches: Iterable[Batch], faults: Sequence[Fault], workload: Workload) -> list[Batch]:
    """The data as a disturbed run gets it: the same batches, with the bad ones in place of theirs."""
    bad = [fault for fault in faults if fault.kind.moment is Moment.DATA]
    spoilt = []
    for batch in batches:
        for fault in bad:
            if fault.hits(batch):
                batch = fault.act(workload, None, batch) or batch
        spoilt.append(batch)
    return spoilt
