"""One trial: a short training with one fault under a governor, and its judgement against trainings without it."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch

from tolaria.config import GovernorConfig, Recovery
from tolaria.drill.campaign.kinds import CONTROL, Kind
from tolaria.drill.campaign.outcome import Facts, Outcome, judge
from tolaria.drill.campaign.strokes import InjectedError, Moment, Striker
from tolaria.drill.digits import Digits
from tolaria.drill.gpt import Gpt
from tolaria.drill.regression import Regression
from tolaria.drill.runs import Losses
from tolaria.drill.workloads import Batch, Training, Workload
from tolaria.errors import RetryBudgetExceeded, TolariaError
from tolaria.governor import TolariaGovernor
from tolaria.judge import Detector
from tolaria.records import Health, Incident, Verdict
from tolaria.ring import READABLE, newest_good
from tolaria.settlement import is_second_look

STEPS = 80
"""Optimizer steps of one training."""

CADENCE = 10

Mode = Literal["full", "signs", "blind"]


class BriefDigits(Digits):
    """The digits in batches of 32."""

    _BATCH = 32


class BriefGpt(Gpt):
    """The GPT with one layer and batches of 4."""

    _BATCH = 4
    _VALIDATION = 64
    _WARM_UP = 10
    _DEPTH = 1


WORKLOADS: dict[str, Callable[[int, int, torch.device], Workload]] = {
    "gpt": BriefGpt,
    "digits": BriefDigits,
    "regression": Regression,
}


@dataclass(slots=True, eq=False)
class References:
    """The trainings that trials of one workload and seed are compared with, each made once.

    Attributes:
        workload: With its data.
        clean: Digest of the train state after each number of undisturbed steps.
        val_loss: Validation loss at the end of the clean run.
    """

    workload: Workload
    clean: list[str] = field(default_factory=list)
    val_loss: float = math.nan
    _others: dict[Any, str] = field(default_factory=dict)

    def digest(self, kept: Sequence[int], bad: dict[int, list[Batch]], name: str) -> str:
        """Of the state of a training on just those batches, `bad` ones in place of theirs, as `name` says."""
        if not self.clean:
            self._train_clean()
        bad_kept = [index for index in kept if index in bad]
        if list(kept) == list(range(len(kept))) and not bad_kept:
            return self.clean[len(kept)]
        key = (tuple(kept), name if bad_kept else "")
        if key not in self._others:
            self._others[key] = self._train([bad.get(index, _step(self.workload, index)) for index in kept])
        return self._others[key]

    def _train_clean(self) -> None:
        training = self.workload.build()
        state = training.state()
        self.clean.append(state.digest())
        for index in range(len(self.workload.batches) // self.workload.parts):
            _plain_step(self.workload, training, _step(self.workload, index))
            self.clean.append(state.digest())
        self.val_loss = self.workload.validate(training.model)

    def _train(self, steps: Sequence[Sequence[Batch]]) -> str:
        training = self.workload.build()
        for step in steps:
            _plain_step(self.workload, training, step)
        return training.state().digest()


def _step(workload: Workload, index: int) -> list[Batch]:
    return list(workload.batches[index * workload.parts : (index + 1) * workload.parts])


def _plain_step(workload: Workload, training: Training, batches: Sequence[Batch]) -> None:
    """One step as anybody writes it; the order of calls is that of `_train`."""
    for batch in batches:
        if batch.part == 0:
            training.ema.update_parameters(training.model)
        (workload.loss(training.model, batch) / workload.parts).backward()
    if workload.clip is not None:
        torch.nn.utils.clip_grad_norm_(training.model.parameters(), workload.clip)
    training.optimizer.step()
    training.scheduler.step()
    training.optimizer.zero_grad()


def open_references(workload: str, seed: int, steps: int = STEPS) -> References:
    """Load the data of one workload and seed."""
    return References(WORKLOADS[workload](seed, steps, torch.device("cpu")))


@dataclass(frozen=True, slots=True)
class Trial:
    """One trial after it ran.

    Attributes:
        kind: Name.
        workload: Name.
        seed: Of weights, data and place of the fault.
        place: Batch that it was placed at.
        outcome: What it came to.
        facts: What that rests on.
    """

    kind: str
    workload: str
    seed: int
    place: int
    outcome: Outcome
    facts: Facts


def run_trial(kind: Kind, references: References, seed: int, mode: Mode = "full") -> Trial:
    """Run one trial on one CPU thread. Equal arguments give an equal answer, on one machine.

    Args:
        kind: What goes wrong.
        references: Of its workload and seed; may be used for many trials.
        seed: Of the references, and of the place of the fault.
        mode: ``"full"``: default detectors, and every step is run twice. ``"signs"``: the detectors alone. ``"blind"``:
            neither (the campaign's red twin: it must fail).
    """
    workload = references.workload
    steps = len(workload.batches) // workload.parts
    place = place_of(kind, workload.name, seed, steps)
    run = _Run(kind, place, seed, workload, mode)
    run.go()
    bad = _bad_data(kind, place, seed, workload, steps)
    is_equal = run.digest == references.digest(run.kept, bad, f"{kind.name}/{place}")
    ratio = run.val_loss / references.val_loss
    facts = Facts(
        struck=run.striker.struck,
        panics=len(run.incidents),
        is_false=run.false_panics > 0,
        skipped=0 if run.ended_by else steps - len(run.kept),
        bad_kept=sum(index in bad for index in run.kept),
        is_equal=is_equal,
        ratio=ratio if math.isfinite(ratio) else math.nan,
        ended_by=run.ended_by,
        is_honest=is_equal if run.ended_by == RetryBudgetExceeded.__name__ else run.is_left_alone,
    )
    return Trial(kind.name, workload.name, seed, place, judge(facts, kind.ending, kind is CONTROL), facts)


def place_of(kind: Kind, workload: str, seed: int, steps: int) -> int:
    """The batch at which a fault is placed: drawn from its span, or the last one of an epoch in it."""
    low, high = (round(share * (steps - 1)) for share in kind.span)
    place = random.Random(f"{workload}/{kind.name}/{seed}").randint(low, high)
    return min(place // kind.epoch * kind.epoch + kind.epoch, steps) - 1 if kind.epoch else place


def _bad_data(kind: Kind, place: int, seed: int, workload: Workload, steps: int) -> dict[int, list[Batch]]:
    """The batches that are bad each time that they come, by index, as they come."""
    strokes = [stroke for stroke in kind.strokes if stroke.is_bad_data]
    found: dict[int, list[Batch]] = {}
    if strokes:
        # numbers of strokes are part of their seeds, so the others stay in the list and are kept from striking
        striker = Striker(kind.name, kind.strokes, place, seed, workload, workload.build())
        for index in range(steps):
            parts = _step(workload, index)
            if any(stroke.hits(batch, place, workload.parts) for stroke in strokes for batch in parts):
                found[index] = [striker.begin(batch) for batch in parts]
    return found


class _Run:
    """One governed training, and what is noted of it."""

    def __init__(self, kind: Kind, place: int, seed: int, workload: Workload, mode: Mode) -> None:
        self._kind, self._workload, self._mode = kind, workload, mode
        self._training = workload.build()
        self.striker = Striker(kind.name, kind.strokes, place, seed, workload, self._training)
        self.kept: list[int] = []  # batches in the past of the present state
        self.incidents: list[Incident] = []
        self.false_panics = 0
        self.ended_by = ""
        self.is_left_alone = False
        self.digest = ""
        self.val_loss = math.nan

    def go(self) -> None:
        """Train to the end, or to the error that ends it."""
        training = self._training
        config = GovernorConfig(
            cadence=CADENCE,
            reexecute_every=1 if self._mode == "full" else 0,
            recovery=Recovery(cool_lr=self._kind.cool_lr, max_retries=self._kind.max_retries),
            on_incident=self._note,
        )
        detector = _blind() if self._mode == "blind" else None
        governor = TolariaGovernor(
            training.model, training.optimizer, scheduler=training.scheduler, config=config, detector=detector
        )
        # not `with governor`: leaving that would ask once more for what the run has just ended over
        with contextlib.closing(governor):
            governor.register("ema", training.ema)
            self.striker.slots = partial(_slots, governor)
            left: TolariaError | None = None
            try:
                self._train(governor)
                governor.finish()
            except TolariaError as error:
                self.ended_by = type(error).__name__
                left = error
            self.digest = governor.digest()
            if left is not None and not isinstance(left, RetryBudgetExceeded):
                self.is_left_alone = left.state_intact and _is_left_alone(governor)
        if not self.ended_by:
            self.val_loss = self._workload.validate(training.model)

    def _note(self, incident: Incident) -> None:
        if not is_second_look(incident):
            self.incidents.append(incident)
            self.false_panics += not self.striker.struck
        if incident.restored_step is not None:
            del self.kept[incident.restored_step :]
            self.striker.rolled_back = True

    def _train(self, governor: TolariaGovernor) -> None:
        losses = Losses(self._workload.parts)
        for part_of_run in self._passes():
            for batch in governor.watch(part_of_run):
                try:
                    losses.add(batch, self._forward_and_backward(batch))
                    if losses.are_complete:
                        self._step(governor, losses, batch.index)
                except InjectedError:
                    continue  # as a loop does that takes a flaky step for granted

    def _passes(self) -> Iterator[Sequence[Batch]]:
        length = self._kind.epoch * self._workload.parts or len(self._workload.batches)
        for first in range(0, len(self._workload.batches), length):
            yield self._workload.batches[first : first + length]

    def _forward_and_backward(self, batch: Batch) -> torch.Tensor:
        workload, training = self._workload, self._training
        if batch.part == 0:
            training.ema.update_parameters(training.model)
        loss = workload.loss(training.model, self.striker.begin(batch))
        other = self.striker.strike(Moment.LOSS, loss)
        loss = other if isinstance(other, torch.Tensor) else loss
        (loss / workload.parts).backward()
        if batch.part == workload.parts - 1:
            self.striker.strike(Moment.UPDATE)
        return loss

    def _step(self, governor: TolariaGovernor, losses: Losses, index: int) -> None:
        result = governor.step(loss=losses.values, clip=self._workload.clip)
        if not result.rolled_back:
            self.kept[result.step - 1 :] = [index]
        self.striker.strike(Moment.REST)


def _slots(governor: TolariaGovernor, every: bool) -> list[torch.Tensor]:
    """Memory of snapshots, as `Target.slots` wants it. A bit that flips there asks no interface: round the governor."""
    newest = newest_good(governor._keeper.ring)
    chosen = [slot for slot in governor._keeper.ring if slot.phase in READABLE] if every else [newest]
    arenas = [governor._keeper.vault.slots[slot.index].arena for slot in chosen if slot is not None]
    return [view for arena in arenas if arena is not None for view in arena.views if len(view)]


def _is_left_alone(governor: TolariaGovernor) -> bool:
    """Whether one more attempt raises as well, and leaves every byte where it is."""
    before = governor.digest()
    try:
        governor.execute_rollback(verify="before")
    except TolariaError as error:
        return error.state_intact and governor.digest() == before
    return False


def _blind() -> Detector[None]:
    """A detector to whom all is well."""
    return Detector(lambda: None, lambda state, signs: (state, Verdict(Health.HEALTHY, signs.step)))
