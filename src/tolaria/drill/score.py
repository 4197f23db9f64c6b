"""What counts as detected, recovered, survived, and as a false rollback. Pure: host values in, host values out.

*Detected*: the governor answered an incident at a step whose state held the fault's effect (it had struck at most
`PATIENCE` steps before, and no rollback had undone it yet; where two executions of the same steps differ, it may have
struck in either). An incident without such a fault is a *false rollback*.

*Recovered*: detected, and from its last rollback up to the next fault the train state is bit-identical, at every digest
taken, to a reference run that no fault ever touched and whose data never held the batches that were skipped. As long as
nothing was skipped, that is the clean run, and the reference must agree with the clean run itself.

*Survived*: all weights are finite at the end and the validation loss is no worse than that of a model that has learnt
nothing (`Workload.chance_loss`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tolaria.drill.records import RunAgain, RunRecord, Trained
from tolaria.records import SCHEMA_VERSION, Incident
from tolaria.reexecute import SILENT
from tolaria.settlement import is_second_look

PATIENCE = 20
"""Steps after a fault's last stroke within which an incident is put down to it."""

_FINAL = 10  # steps whose mean is the final training loss


@dataclass(slots=True, eq=False)
class FaultScore:
    """What became of one fault in the guarded run.

    Attributes:
        kind: Its name.
        step: The step in which it first struck; None if it never did.
        last_step: The step in which it last struck.
        incidents: What the governor answered it with, in order.
        recovered: See the head of this file.
    """

    kind: str
    step: int | None = None
    last_step: int | None = None
    incidents: list[Incident] = field(default_factory=list)
    recovered: bool = False

    @property
    def steps_lost(self) -> int:
        """Optimizer steps undone because of it."""
        return sum(incident.steps_lost for incident in self.incidents)

    def as_json(self) -> dict[str, Any]:
        """`detected_step` and `restored_step` of its first incident, `action` of its last, `rollback_ms` of all."""
        first = self.incidents[0] if self.incidents else None
        return {
            "kind": self.kind,
            "step": self.step,
            "detected_step": first.step if first else None,
            "restored_step": first.restored_step if first else None,
            "action": self.incidents[-1].action if first else None,
            "rollback_ms": round(sum(i.rollback_ms for i in self.incidents), 3) if first else None,
            "barrier": first.barrier if first else None,
            "recovered": self.recovered,
        }


@dataclass(frozen=True, slots=True, eq=False)
class Score:
    """The result of one drill.

    Attributes:
        faults: In the order of the plan.
        false: Incidents that no fault explains.
        skipped: Batches that are not in the guarded run's final past.
        survived: By name of run.
        is_equal_at_end: The guarded run ended in exactly the state of the reference run.
    """

    faults: tuple[FaultScore, ...]
    false: tuple[Incident, ...]
    skipped: tuple[int, ...]
    survived: dict[str, bool]
    is_equal_at_end: bool

    @property
    def is_good(self) -> bool:
        """All recovered, nothing rolled back without cause, the guarded run alive and where it ought to be."""
        return (
            all(fault.recovered for fault in self.faults)
            and not self.false
            and self.survived["guarded"]
            and self.is_equal_at_end
        )


def skipped_batches(guarded: RunRecord, num_batches: int) -> tuple[int, ...]:
    """Batches that the guarded run was offered and that are not in the past of its final state."""
    kept = {step.batch for step in guarded.kept}
    return tuple(index for index in range(num_batches) if index not in kept)


def survived(record: RunRecord, chance_loss: float) -> bool:
    """See the head of this file."""
    return record.weights_finite and math.isfinite(record.val_loss) and record.val_loss <= chance_loss


def attribute(guarded: RunRecord, kinds: Sequence[str]) -> tuple[tuple[FaultScore, ...], tuple[Incident, ...]]:
    """Put each incident down to a fault, or to none.

    Returns:
        One score per kind, not yet compared with any other run, and the incidents that no fault explains.
    """
    scores = {kind: FaultScore(kind) for kind in kinds}
    false: list[Incident] = []
    alive: list[tuple[int, str]] = []  # (step, kind): strokes whose effect is in the present state
    compared: list[tuple[int, str]] = []  # strokes in the execution that the present one will be compared with
    for event in guarded.events:
        if isinstance(event, Trained):
            for kind in event.struck:
                alive.append((event.step, kind))
                score = scores[kind]
                score.step = event.step if score.step is None else score.step
                score.last_step = event.step
            continue
        if isinstance(event, RunAgain):
            compared = [(step, kind) for step, kind in alive if step > event.restored_step]
            alive = [(step, kind) for step, kind in alive if step <= event.restored_step]
            continue
        suspects = alive + compared if event.reason == SILENT else alive
        causes = [(step, kind) for step, kind in suspects if 0 <= event.step - step <= PATIENCE]
        if causes:
            scores[max(causes)[1]].incidents.append(event)
        elif not is_second_look(event):
            false.append(event)
        if event.restored_step is not None:
            alive = [(step, kind) for step, kind in alive if step <= event.restored_step]
    return tuple(scores.values()), tuple(false)


def score(
    clean: RunRecord,
    unguarded: RunRecord,
    guarded: RunRecord,
    reference: RunRecord,
    kinds: Sequence[str],
    chance_loss: float,
    num_batches: int,
) -> Score:
    """Judge one drill.

    Args:
        clean: Undisturbed, with digests.
        unguarded: With the faults, without a governor.
        guarded: With both, with digests.
        reference: Unguarded, on the disturbed data without `skipped_batches(guarded)`, no other fault, with digests.
        kinds: Names of the planned faults.
        chance_loss: Of the workload.
        num_batches: That each run was offered.
    """
    faults, false = attribute(guarded, kinds)
    skipped = skipped_batches(guarded, num_batches)
    expected = _confirmed(reference, clean)
    starts = sorted(fault.step for fault in faults if fault.step is not None)
    for fault in faults:
        fault.recovered = _is_recovered(fault, starts, guarded, expected)
    return Score(
        faults,
        false,
        skipped,
        {record.name: survived(record, chance_loss) for record in (clean, unguarded, guarded)},
        bool(guarded.state_digest) and guarded.state_digest == reference.state_digest and not guarded.ended_by,
    )


def _confirmed(reference: RunRecord, clean: RunRecord) -> dict[int, str]:
    """The reference's digests, less those that a clean run contradicts while both have had the same data."""
    expected = dict(reference.digests)
    for step in reference.kept:
        if step.batch != step.step - 1 or step.struck:
            break  # the first batch that was skipped before, or that is bad
        if clean.digests.get(step.step) != expected.get(step.step):
            expected.pop(step.step, None)
    return expected


def _is_recovered(fault: FaultScore, starts: Sequence[int], guarded: RunRecord, expected: dict[int, str]) -> bool:
    if fault.step is None or not fault.incidents:
        return False
    restored = fault.incidents[-1].restored_step
    if restored is None:
        return False
    until = min((start for start in starts if start > fault.step), default=math.inf)
    window = [step for step in guarded.digests if restored < step < until]
    return bool(window) and all(guarded.digests[step] == expected.get(step) for step in window)


def as_json(
    result: Score,
    records: Sequence[RunRecord],
    *,
    workload: str,
    seed: int,
    device: str,
    steps: int,
) -> dict[str, Any]:
    """The object that ``tolaria drill --json`` prints. No NaN and no infinity: a number that is not finite is null.

    Args:
        result: From `score`.
        records: The clean, the unguarded and the guarded run.
        workload: Name.
        seed: Of the drill.
        device: Name.
        steps: Per run.
    """
    runs: dict[str, dict[str, Any]] = {
        record.name: {
            "survived": result.survived[record.name],
            "final_loss": _finite(final_loss(record)),
            "val_loss": _finite(record.val_loss) if result.survived[record.name] else None,
            "state_digest": record.state_digest,
        }
        for record in records
    }
    guarded = next(record for record in records if record.name == "guarded")
    incidents = guarded.incidents
    runs["guarded"] |= {
        "rollbacks": sum(incident.restored_step is not None for incident in incidents),
        "false_rollbacks": len(result.false),
        "steps_lost": sum(incident.steps_lost for incident in incidents),
        "reexecuted_steps": sum(e.step - e.restored_step for e in guarded.events if isinstance(e, RunAgain)),
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "workload": workload,
        "seed": seed,
        "device": device,
        "steps": steps,
        "runs": runs,
        "faults": [fault.as_json() for fault in result.faults],
        "injected": len(result.faults),
        "recovered": sum(fault.recovered for fault in result.faults),
    }


def final_loss(record: RunRecord) -> float:
    """Mean training loss of the last ten steps that were not undone; NaN without any."""
    losses = [step.loss for step in record.kept[-_FINAL:]]
    return sum(losses) / len(losses) if losses else math.nan


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
