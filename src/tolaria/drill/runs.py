"""The training loops: one as anybody writes it, and the same one under a governor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch

from tolaria.config import GovernorConfig
from tolaria.drill.faults import Fault, Injector, spoil
from tolaria.drill.records import RunAgain, RunRecord, Trained
from tolaria.drill.workloads import Batch, Training, Workload
from tolaria.errors import TolariaError
from tolaria.governor import TolariaGovernor
from tolaria.records import Incident
from tolaria.testing.faults import Moment, newest_slot

DIGEST_EVERY = 5
"""Steps between two digests of the train state. A state that is off by one bit stays off: nothing hides in between."""


class Audience(Protocol):
    """Who watches the runs. Called on the thread that trains, between two steps."""

    def begin(self, run: str, steps: int) -> None:
        """A run of at most `steps` steps starts."""
        ...

    def trained(self, run: str, step: Trained) -> None:
        """One more step."""
        ...

    def incident(self, run: str, incident: Incident) -> None:
        """The governor has answered a panic."""
        ...

    def again(self, run: str, event: RunAgain) -> None:
        """The governor has gone back to run healthy steps again."""
        ...

    def end(self, record: RunRecord) -> None:
        """The run is over."""
        ...


def run_plain(
    name: str,
    workload: Workload,
    batches: Iterable[Batch],
    faults: Sequence[Fault],
    audience: Audience,
    *,
    with_digests: bool = False,
) -> RunRecord:
    """Train once without a governor.

    Args:
        name: Of the run.
        workload: What to train, from its seed.
        batches: In order; `Workload.parts` of them to an optimizer step.
        faults: Strike along the way; bad data is expected in `batches` already (`faults.spoil`).
        audience: Told about each step.
        with_digests: Take the digest of the train state every `DIGEST_EVERY` steps.
    """
    training, record = workload.build(), RunRecord(name)
    injector = Injector(faults, workload, training)
    state = training.state()
    batches = list(batches)
    audience.begin(name, len(batches) // workload.parts)
    losses = Losses(workload.parts)
    step = 0
    for batch in batches:
        losses.add(batch, _forward_and_backward(workload, training, injector, batch))
        if not losses.are_complete:
            continue
        step += 1
        if workload.clip is not None:
            torch.nn.utils.clip_grad_norm_(training.model.parameters(), workload.clip)
        training.optimizer.step()
        training.scheduler.step()
        training.optimizer.zero_grad()
        _note(record, audience, Trained(step, batch.index, losses.mean(), injector.struck))
        if with_digests and step % DIGEST_EVERY == 0:
            record.digests[step] = state.digest()
    injector.wait()
    record.state_digest = state.digest()
    return _finish(record, workload, training, audience)


class Losses:
    """The losses of one step's micro-batches."""

    def __init__(self, parts: int) -> None:
        self._parts = parts
        self.values: list[torch.Tensor] = []

    def add(self, batch: Batch, loss: torch.Tensor) -> None:
        """One more; the first of a step begins anew."""
        if batch.part == 0:
            self.values = []
        self.values.append(loss.detach())

    @property
    def are_complete(self) -> bool:
        """Whether the optimizer may step."""
        return len(self.values) == self._parts

    def mean(self) -> float:
        """On the host."""
        return sum(map(float, self.values)) / len(self.values)


def run_guarded(
    workload: Workload,
    batches: Iterable[Batch],
    faults: Sequence[Fault],
    audience: Audience,
    config: GovernorConfig,
) -> RunRecord:
    """Train once under a governor with its default detectors, through its public interface alone.

    A `TolariaError` ends the run and is noted; the state is measured as it was left.

    Args:
        workload: What to train, from its seed.
        batches: In order.
        faults: As for `run_plain`.
        audience: Told about each step and incident.
        config: Of the governor; its `on_incident` is replaced.
    """
    training, record = workload.build(), RunRecord("guarded")
    injector = Injector(faults, workload, training)
    batches = list(batches)
    audience.begin(record.name, len(batches) // workload.parts)
    answered: list[Incident] = []

    def answer(incident: Incident) -> None:
        left = ", ".join(injector.under_way()).replace("_", " ")
        note = f"{left} still in flight when the rollback was submitted" if left else ""
        answered.append(replace(incident, note="; ".join(filter(None, (incident.note, note)))))

    with TolariaGovernor(
        training.model,
        training.optimizer,
        scheduler=training.scheduler,
        config=replace(config, on_incident=answer),
    ) as governor:
        governor.register("ema", training.ema)
        injector.section = partial(governor.using, write=True)
        injector.newest_slot = partial(newest_slot, governor)
        try:
            _train_guarded(governor, workload, training, injector, batches, record, audience, answered)
        except TolariaError as error:
            record.ended_by = f"{type(error).__name__}: {error}"
        _note_incidents(record, audience, answered)
        injector.wait()
        record.state_digest = governor.digest()
        if record.ended_by:
            governor.close()  # leaving the block would judge what is open, and raise the same once more
    return _finish(record, workload, training, audience)


def _train_guarded(
    governor: TolariaGovernor,
    workload: Workload,
    training: Training,
    injector: Injector,
    batches: Iterable[Batch],
    record: RunRecord,
    audience: Audience,
    answered: list[Incident],
) -> None:
    """The loop. Steps are counted here: the verdict that `step` answers may be that of an earlier one.

    An incident is answered inside `step`, or where the loop asks for its next batch: at the end of the data, for one.
    """
    completed = 0
    losses = Losses(workload.parts)
    for batch in governor.watch(batches):
        completed = _note_incidents(record, audience, answered, completed)
        losses.add(batch, _forward_and_backward(workload, training, injector, batch))
        if not losses.are_complete:
            continue
        result = governor.step(loss=losses.values, clip=workload.clip)
        completed = _note_again(record, audience, result.step, completed)
        _note(record, audience, Trained(completed, batch.index, losses.mean(), injector.struck))
        completed = _note_incidents(record, audience, answered, completed)
        if not result.rolled_back and completed % DIGEST_EVERY == 0:
            record.digests[completed] = governor.digest()


def disturbed(workload: Workload, faults: Sequence[Fault]) -> list[Batch]:
    """The data of the runs with faults."""
    return spoil(workload.batches, faults, workload)


def without(batches: Iterable[Batch], skipped: Iterable[int]) -> list[Batch]:
    """The data of the reference run: those batches never existed."""
    gone = set(skipped)
    return [batch for batch in batches if batch.index not in gone]


def _forward_and_backward(workload: Workload, training: Training, injector: Injector, batch: Batch) -> torch.Tensor:
    """One micro-batch. Gradients add up to those of the mean over the step's micro-batches."""
    injector.begin(batch)
    if batch.part == 0:
        # The average is moved at the head of the step, from the weights that the last step left: a snapshot may be
        # taken inside of `governor.step`, and what is moved after it would then be missing from the snapshot.
        training.ema.update_parameters(training.model)
    loss = workload.loss(training.model, batch)
    if batch.part == 0:
        injector.strike(Moment.FORWARD, batch)
    (loss / workload.parts).backward()
    if batch.part == workload.parts - 1:
        injector.strike(Moment.UPDATE, batch)
    return loss


def _note(record: RunRecord, audience: Audience, step: Trained) -> None:
    record.events.append(step)
    audience.trained(record.name, step)


def _note_incidents(record: RunRecord, audience: Audience, answered: list[Incident], completed: int = 0) -> int:
    """Take over what was answered. Returns the steps in the past of the state after it."""
    for incident in answered:
        record.events.append(incident)
        if incident.restored_step is not None:
            record.note_rollback(incident.restored_step)
            completed = incident.restored_step
        audience.incident(record.name, incident)
    answered.clear()
    return completed


def _note_again(record: RunRecord, audience: Audience, step: int, completed: int) -> int:
    """Steps in the past of the state, `step` included, which the governor has counted. Fewer: it has gone back."""
    if step <= completed:
        again = RunAgain(completed, step - 1)
        record.events.append(again)
        record.note_rollback(again.restored_step)
        audience.again(record.name, again)
    return step


def _finish(record: RunRecord, workload: Workload, training: Training, audience: Audience) -> RunRecord:
    record.val_loss = workload.validate(training.model)
    record.weights_finite = all(bool(p.isfinite().all()) for p in training.model.parameters())
    audience.end(record)
    return record
