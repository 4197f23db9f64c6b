"""How a fault of the campaign strikes: at which moment of a step, at which batch, on which occasion.

A batch is trained more than once: by a replay, and by re-execution. Which of these times a fault strikes is its nature.
A *transient* fault strikes on one occasion, *lasting* ones on each.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from tolaria.drill.workloads import Batch, Training, Workload


class Moment(Enum):
    """Where in a step a stroke falls."""

    BATCH = "batch"  # as a batch is taken up; the act may answer another one in its place
    LOSS = "loss"  # between forward and backward; the act may answer another loss in its place
    UPDATE = "update"  # after the last backward of the step
    STEP = "step"  # inside the optimizer's step, behind any clipping of the gradients
    REST = "rest"  # after the step, at the end of the loop body


class InjectedError(RuntimeError):
    """Raised by a fault, caught by the training loop, which goes on with the next batch."""


class NothingToHit(Exception):
    """Raised by an act that finds nothing to change: no blow has fallen."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a stroke may touch.

    Attributes:
        workload: Knows where this model can be hurt.
        training: The run's own state.
        batch: The one being trained.
        loss: With its graph, at `Moment.LOSS`; None elsewhere.
        generator: On the CPU, seeded by seed, kind, number of the stroke and batch: what returns is the same fault,
            unless the stroke is `fresh`.
        slots: Answers the memory of snapshots, each shape [bytes], uint8: of the newest good one, or of all.
    """

    workload: Workload
    training: Training
    batch: Batch
    loss: torch.Tensor | None
    generator: torch.Generator
    slots: Callable[[bool], Sequence[torch.Tensor]]


Act = Callable[[Target], Batch | torch.Tensor | None]

TRANSIENT = frozenset({1})
TWICE = frozenset({1, 2})
LASTING: frozenset[int] | None = None


@dataclass(frozen=True, slots=True)
class Stroke:
    """One blow of a fault.

    Attributes:
        moment: When in a step.
        act: Does it.
        offset: Batches after the place of the fault; may be negative.
        length: Consecutive batches; 0: all that follow.
        occasions: Which times of training its batch, from 1; None: each.
        part: The micro-batch it concerns, -1 for the last, for the moments that each of them has.
        fresh: Each occasion has random numbers of its own.
        after_rollback: It strikes in the first step after the first rollback for a panic, wherever that is.
    """

    moment: Moment
    act: Act
    offset: int = 0
    length: int = 1
    occasions: frozenset[int] | None = TRANSIENT
    part: int = 0
    fresh: bool = False
    after_rollback: bool = False

    def hits(self, batch: Batch, place: int, parts: int) -> bool:
        """Whether it concerns this batch of a fault placed at batch `place`, in steps of `parts` micro-batches."""
        first = place + self.offset
        has_part = self.moment not in (Moment.BATCH, Moment.LOSS) or batch.part == self.part % parts
        return has_part and batch.index >= first and (not self.length or batch.index < first + self.length)

    @property
    def is_bad_data(self) -> bool:
        """Whether the batch itself is bad, each time that it is delivered."""
        return self.moment is Moment.BATCH and self.occasions is LASTING


class Striker:
    """Strikes in one run. Call `begin` for each batch, and `strike` at each moment of it.

    Args:
        name: Of the fault, for its random numbers.
        strokes: Of the fault; none for an undisturbed run.
        place: Batch that offsets count from.
        seed: Of the trial.
        workload: What is trained.
        training: The run's own.
        slots: See `Target.slots`; may be set until the first step.

    Attributes:
        struck: How many blows have fallen.
        rolled_back: Set by the loop when a panic was answered.
    """

    def __init__(
        self,
        name: str,
        strokes: Sequence[Stroke],
        place: int,
        seed: int,
        workload: Workload,
        training: Training,
        slots: Callable[[bool], Sequence[torch.Tensor]] = lambda _: (),
    ) -> None:
        self._name, self._strokes, self._place, self._seed = name, strokes, place, seed
        self._workload, self._training, self.slots = workload, training, slots
        self._occasions: dict[int, int] = {}
        self._now: Batch | None = None
        self._spent: set[int] = set()
        self.struck = 0
        self.rolled_back = False
        training.optimizer.register_step_pre_hook(self._in_step)

    def begin(self, batch: Batch) -> Batch:
        """A batch is taken up. Returns what is trained in its place."""
        if batch.part == 0:
            self._occasions[batch.index] = self._occasions.get(batch.index, 0) + 1
        self._now = batch
        answer = self.strike(Moment.BATCH)
        return answer if isinstance(answer, Batch) else batch

    def strike(self, moment: Moment, loss: torch.Tensor | None = None) -> Batch | torch.Tensor | None:
        """The step has come to `moment`. Returns what an act has answered last."""
        batch, answer = self._now, None
        if batch is None:
            return None
        for number, stroke in enumerate(self._strokes):
            if stroke.moment is moment and self._is_due(number, stroke, batch):
                self._spent.add(number)
                self.struck += 1  # first: an act may raise what the loop catches
                try:
                    returned = stroke.act(self._target(number, stroke, batch, loss))
                except NothingToHit:
                    self.struck -= 1
                    continue
                answer = returned if answer is None else answer
        return answer

    def _is_due(self, number: int, stroke: Stroke, batch: Batch) -> bool:
        if stroke.after_rollback:
            return self.rolled_back and number not in self._spent
        occasion = self._occasions[batch.index]
        on_time = stroke.occasions is None or occasion in stroke.occasions
        return on_time and stroke.hits(batch, self._place, self._workload.parts)

    def _target(self, number: int, stroke: Stroke, batch: Batch, loss: torch.Tensor | None) -> Target:
        occasion = self._occasions[batch.index] if stroke.fresh else 1
        name = f"{self._seed}/{self._name}/{number}/{batch.index}/{batch.part}/{occasion}"
        generator = torch.Generator().manual_seed(random.Random(name).getrandbits(63))
        return Target(self._workload, self._training, batch, loss, generator, self.slots)

    def _in_step(self, *_: Any) -> None:
        self.strike(Moment.STEP)
