"""How far a round may move a policy."""

from __future__ import annotations

import json
import math

import pytest

from tolaria.errors import InvalidConfig
from tolaria.judge import state_from_json
from tolaria.records import Health, Verdict, VitalSigns
from tolaria.surge import round_detector, surge


def judge(values: list[float | None], **options: float) -> list[Verdict]:
    detector = surge("drift", **{"ceiling": 5.0, "floor": 0.1, **options})
    state, verdicts = detector.init(), []
    for step, value in enumerate(values, 1):
        extra = {} if value is None else {"drift": value}
        state, verdict = detector.update(state, VitalSigns(step=step, extra=extra))
        verdicts.append(verdict)
    return verdicts


def last(values: list[float | None], **options: float) -> Verdict:
    return judge(values, **options)[-1]


def test_a_young_run_has_the_ceiling() -> None:
    assert last([4.9]).health is Health.HEALTHY
    verdict = last([5.1])
    assert (verdict.health, verdict.reason) == (Health.PANIC, "surge of drift")
    assert verdict.evidence == {"drift": 5.1, "limit": 5.0}
    assert last([0.5] * 7 + [4.9]).health is Health.HEALTHY


def test_an_older_one_its_own_past() -> None:
    assert last([0.2] * 8 + [1.9]).health is Health.HEALTHY
    assert last([0.2] * 8 + [2.1]).health is Health.PANIC
    assert last([7.0]).health is Health.PANIC
    assert last([0.9] * 8 + [7.0]).health is Health.HEALTHY  # the ceiling is for the young


def test_only_the_last_32_count() -> None:
    assert last([3.0] + [0.2] * 31 + [20.0]).health is Health.HEALTHY
    assert last([3.0] + [0.2] * 32 + [20.0]).health is Health.PANIC


def test_what_is_small_never_alarms() -> None:
    assert last([1e-6] * 8 + [0.09]).health is Health.HEALTHY
    assert last([1e-6] * 8 + [0.11]).health is Health.PANIC


def test_a_panic_is_not_remembered() -> None:
    verdicts = judge([0.2] * 8 + [50.0, 50.0])
    assert [v.health for v in verdicts[-2:]] == [Health.PANIC, Health.PANIC]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_panics_at_once(value: float) -> None:
    verdict = last([value])
    assert (verdict.health, verdict.reason, verdict.onset) == (Health.PANIC, "non-finite drift", 1)


def test_without_the_sign_nothing_is_said() -> None:
    assert [v.health for v in judge([None] * 3)] == [Health.HEALTHY] * 3


def test_the_state_survives_json() -> None:
    detector = surge("drift", ceiling=5.0, floor=0.1)
    state, _ = detector.update(detector.init(), VitalSigns(step=1, extra={"drift": 0.3}))
    assert state_from_json(json.loads(json.dumps(state))) == state


@pytest.mark.parametrize("options", [{"ceiling": 0.0}, {"floor": 0.0}, {"factor": 0.5}], ids=str)
def test_bad_values_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InvalidConfig, match="surge"):
        judge([], **options)


@pytest.mark.parametrize(
    ("signs", "reason"),
    [
        (VitalSigns(step=1, nonfinite_weights=1), "non-finite weights"),
        (VitalSigns(step=1, extra={"drift": 6.0}), "surge of drift"),
        (VitalSigns(step=1, extra={"policy_change": 6.0}), "surge of policy_change"),
        (VitalSigns(step=1, extra={"unmeasured": math.nan}), "non-finite unmeasured"),
        (VitalSigns(step=1, extra={"drift": 1.0, "policy_change": 0.4}), ""),
    ],
)
def test_the_default_judge_of_rounds(signs: VitalSigns, reason: str) -> None:
    detector = round_detector()
    _, verdict = detector.update(detector.init(), signs)
    assert verdict.reason == reason
    assert verdict.is_panic == bool(reason)
