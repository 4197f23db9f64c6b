"""What counts as recovered and as a false rollback; each rule with a twin that breaks it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from tolaria.drill import score
from tolaria.drill.records import RunAgain, RunRecord, Trained
from tolaria.drill.score import PATIENCE, attribute, skipped_batches
from tolaria.records import Incident
from tolaria.reexecute import SILENT
from tolaria.settlement import STILL_OPEN

STEPS = 60
CHANCE = 2.3


def incident(step: int, restored: int | None, action: str = "replay", onset: int | None = None) -> Incident:
    return Incident(
        step=step,
        onset=step if onset is None else onset,
        reason="sustained loss spike",
        signs={},
        evidence={},
        action=action,
        restored_step=restored,
        certified=True,
        steps_lost=0 if restored is None else step - restored,
        batches_replayed=0,
        batches_skipped=0,
        rollback_ms=1.5,
        barrier="host",
    )


def run(name: str, batches: list[int], *, val_loss: float = 0.1) -> RunRecord:
    """Undisturbed; its digest after a step tells which batches led there."""
    record = RunRecord(name, val_loss=val_loss, weights_finite=True)
    record.events.extend(Trained(step, batch, 0.1) for step, batch in enumerate(batches, 1))
    record.digests.update({step: digest(batches[:step]) for step in range(5, len(batches) + 1, 5)})
    record.state_digest = digest(batches)
    return record


def digest(batches: list[int]) -> str:
    return str(hash(tuple(batches)))


def guarded_run() -> RunRecord:
    """A transient fault in step 21, and batch 40, which is bad and skipped at last."""
    record = run("guarded", [batch for batch in range(STEPS) if batch != 40])
    first = [Trained(step, step - 1, 0.1) for step in range(1, 21)]
    struck = [Trained(21, 20, 0.1, ("flip",)), Trained(22, 21, 9.0), Trained(23, 22, 9.0)]
    again = [Trained(step, step - 1, 0.1) for step in range(11, 41)]
    bad = Trained(41, 40, math.nan, ("nan",))
    back = [Trained(step, step - 1, 0.1) for step in range(31, 41)]
    after = [Trained(step, step, 0.1) for step in range(41, STEPS)]
    record.events = [
        *first,
        *struck,
        incident(23, 10, onset=22),
        *again,
        bad,
        incident(41, 30),
        *back,
        bad,
        incident(41, 30, "skip"),
        *back,
        *after,
    ]
    return record


def judge(guarded: RunRecord, clean: RunRecord | None = None, reference: RunRecord | None = None) -> score.Score:
    batches = list(range(STEPS))
    unguarded = run("unguarded", batches, val_loss=math.nan)
    kept = [batch for batch in batches if batch not in skipped_batches(guarded, STEPS)]
    clean = clean or run("clean", batches)
    reference = reference or run("reference", kept)
    return score.score(clean, unguarded, guarded, reference, ["flip", "nan"], CHANCE, STEPS)


def test_the_guarded_run_is_read_right() -> None:
    guarded = guarded_run()
    assert [step.step for step in guarded.kept] == list(range(1, STEPS))
    assert skipped_batches(guarded, STEPS) == (40,)


def test_all_is_well() -> None:
    result = judge(guarded_run())
    assert [fault.recovered for fault in result.faults] == [True, True]
    assert result.false == ()
    assert result.is_equal_at_end
    assert result.is_good
    flip, nan = (fault.as_json() for fault in result.faults)
    assert flip == {
        "kind": "flip",
        "step": 21,
        "detected_step": 23,
        "restored_step": 10,
        "action": "replay",
        "rollback_ms": 1.5,
        "barrier": "host",
        "recovered": True,
    }
    assert (nan["action"], nan["rollback_ms"]) == ("skip", 3.0)


@pytest.mark.parametrize(("step", "recovered"), [(25, [False, True]), (55, [True, False])])
def test_one_tampered_digest_is_not_recovered(step: int, recovered: list[bool]) -> None:
    guarded = guarded_run()
    guarded.digests[step] = "tampered"
    result = judge(guarded)
    assert [fault.recovered for fault in result.faults] == recovered
    assert not result.is_good


def test_a_tampered_end_is_a_finding() -> None:
    guarded = guarded_run()
    guarded.state_digest = "tampered"
    result = judge(guarded)
    assert not result.is_equal_at_end
    assert not result.is_good


def test_a_reference_that_is_not_the_clean_run_proves_nothing() -> None:
    clean = run("clean", list(range(STEPS)))
    clean.digests[30] = "tampered"
    assert [fault.recovered for fault in judge(guarded_run(), clean=clean).faults] == [False, True]


def test_clean_and_reference_part_at_the_first_skip() -> None:
    clean = run("clean", list(range(STEPS)))
    clean.digests[45] = "no matter"
    assert judge(guarded_run(), clean=clean).is_good


def test_no_digest_in_between_is_not_recovered() -> None:
    guarded = guarded_run()
    guarded.digests = {step: digest for step, digest in guarded.digests.items() if step > 40}
    assert [fault.recovered for fault in judge(guarded).faults] == [False, True]


def test_an_undetected_fault_is_not_recovered() -> None:
    guarded = guarded_run()
    guarded.events = [event for event in guarded.events if not (isinstance(event, Incident) and event.step == 23)]
    flip = attribute(guarded, ["flip", "nan"])[0][0]
    assert flip.incidents == []
    assert flip.as_json()["detected_step"] is None


def test_detected_but_not_rolled_back_is_not_recovered() -> None:
    guarded = guarded_run()
    guarded.events = [
        replace(event, restored_step=None, action="observe") if isinstance(event, Incident) else event
        for event in guarded.events
    ]
    result = judge(guarded)
    assert [len(fault.incidents) for fault in result.faults] == [1, 2]
    assert not any(fault.recovered for fault in result.faults)


def test_an_incident_without_a_fault_is_false() -> None:
    guarded = guarded_run()
    guarded.events.append(incident(STEPS - 1, STEPS - 1))
    result = judge(guarded)
    assert [one.step for one in result.false] == [STEPS - 1]
    assert all(fault.recovered for fault in result.faults)
    assert not result.is_good


def test_an_incident_before_the_fault_is_false() -> None:
    record = RunRecord("guarded", events=[Trained(1, 0, 0.1), incident(1, 0), Trained(1, 0, 0.1, ("flip",))])
    (flip,), false = attribute(record, ["flip"])
    assert flip.incidents == []
    assert len(false) == 1


def test_a_fault_that_was_undone_explains_nothing_more() -> None:
    events = [Trained(1, 0, 0.1), Trained(2, 1, 0.1, ("flip",)), incident(2, 1), Trained(2, 1, 0.1), incident(2, 1)]
    (flip,), false = attribute(RunRecord("guarded", events=list(events)), ["flip"])
    assert len(flip.incidents) == 1
    assert len(false) == 1


@pytest.mark.parametrize(("late", "explained"), [(PATIENCE, True), (PATIENCE + 1, False)])
def test_patience_ends(late: int, explained: bool) -> None:
    struck = Trained(1, 0, 0.1, ("flip",))
    steps = [Trained(1 + i, i, 0.1) for i in range(1, late + 1)]
    (flip,), false = attribute(RunRecord("guarded", events=[struck, *steps, incident(1 + late, 0)]), ["flip"])
    assert bool(flip.incidents) is explained
    assert bool(false) is not explained


def twice(struck: int, reason: str = SILENT) -> RunRecord:
    """Steps 1 to 4, and 3 and 4 again, with a stroke in the `struck`th execution of step 3; then the incident."""
    events: list[Trained | Incident | RunAgain] = [Trained(1, 0, 0.1), Trained(2, 1, 0.1)]
    for execution in (1, 2):
        events += [Trained(3, 2, 0.1, ("flip",) if execution == struck else ()), Trained(4, 3, 0.1)]
        events += [RunAgain(4, 2)] if execution == 1 else []
    return RunRecord("guarded", events=[*events, replace(incident(4, 2), reason=reason)])


@pytest.mark.parametrize("struck", [1, 2])
def test_a_fault_in_either_execution_explains_why_they_differ(struck: int) -> None:
    (flip,), false = attribute(twice(struck), ["flip"])
    assert len(flip.incidents) == 1
    assert false == ()
    assert [step.step for step in twice(struck).kept] == [1, 2]


def test_a_fault_that_was_run_over_explains_no_other_panic() -> None:
    assert len(attribute(twice(1, "sustained loss spike"), ["flip"])[1]) == 1
    assert len(attribute(twice(2, "sustained loss spike"), ["flip"])[1]) == 0


def test_executions_differ_for_a_reason_that_is_there() -> None:
    """Long over: the steps that struck were not among those that were compared."""
    record = twice(1)
    record.events[:0] = [Trained(1, 0, 0.1), RunAgain(1, 0)]
    record.events.append(RunAgain(2, 1))
    record.events.append(replace(incident(2, 1), reason=SILENT))
    assert len(attribute(record, ["flip"])[1]) == 1


def test_a_second_look_at_a_suspicion_is_no_false_panic() -> None:
    look = replace(incident(4, 2), reason=f"loss spike, {STILL_OPEN}", attempt=0)
    for event, num_false in ((look, 0), (replace(look, attempt=2), 1), (replace(look, reason="loss spike"), 1)):
        record = RunRecord("guarded", events=[*[Trained(1 + i, i, 0.1) for i in range(4)], event])
        assert len(attribute(record, ["flip"])[1]) == num_false
        assert [step.step for step in record.kept] == [1, 2]


def test_the_latest_of_two_faults_gets_the_incident() -> None:
    events = [Trained(1, 0, 0.1, ("flip",)), Trained(2, 1, 0.1, ("nan",)), incident(2, 0)]
    (flip, nan), _ = attribute(RunRecord("guarded", events=list(events)), ["flip", "nan"])
    assert (len(flip.incidents), len(nan.incidents)) == (0, 1)


@pytest.mark.parametrize(
    ("val_loss", "weights_finite", "alive"),
    [
        (0.1, True, True),
        (CHANCE, True, True),
        (CHANCE + 0.01, True, False),
        (0.1, False, False),
        (math.nan, True, False),
    ],
)
def test_survival(val_loss: float, weights_finite: bool, alive: bool) -> None:
    record = RunRecord("unguarded", val_loss=val_loss, weights_finite=weights_finite)
    assert score.survived(record, CHANCE) is alive


def test_a_run_that_ended_early_is_a_finding() -> None:
    guarded = guarded_run()
    guarded.ended_by = "RetryBudgetExceeded: ..."
    assert not judge(guarded).is_good


def test_json_has_no_number_that_is_not_finite() -> None:
    guarded = guarded_run()
    unguarded = run("unguarded", list(range(STEPS)), val_loss=math.inf)
    unguarded.events.append(Trained(STEPS + 1, STEPS, math.nan))
    report = score.as_json(
        judge(guarded),
        (run("clean", list(range(STEPS))), unguarded, guarded),
        workload="digits",
        seed=0,
        device="cpu",
        steps=STEPS,
    )
    json.dumps(report, allow_nan=False)
    assert report["runs"]["unguarded"]["val_loss"] is None
    assert report["runs"]["unguarded"]["final_loss"] is None
    assert (report["injected"], report["recovered"]) == (2, 2)
    assert report["runs"]["guarded"]["steps_lost"] == 13 + 11 + 11
    assert report["runs"]["guarded"]["reexecuted_steps"] == 0
