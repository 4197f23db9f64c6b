"""`check_detector`: every detector of ours keeps its contract, and one that breaks a sentence is told which."""

import math
from dataclasses import replace

import pytest

from tolaria import judge
from tolaria.errors import InvalidConfig
from tolaria.judge import Detector
from tolaria.records import Health, Verdict
from tolaria.testing.contract import ContractBroken
from tolaria.testing.detector_contract import RULES, check_detector

OURS = {
    "non_finite": (
        judge.non_finite,
        ("loss is not finite", "gradients are not finite", "weights are not finite", "metric is not finite"),
    ),
    "loss_spike": (judge.loss_spike, ("loss stays high",)),
    "loss_drift": (judge.loss_drift, ()),
    "collapse": (judge.collapse, ("loss is back where it began",)),
    "gradient_explosion": (judge.gradient_explosion, ("gradients explode",)),
    "update_ratio_jump": (judge.update_ratio_jump, ("updates jump",)),
    "rl_collapse": (judge.rl_collapse, ("policy runs away", "entropy dies", "reward is lost")),
    "default_detector": (
        judge.default_detector,
        ("loss is not finite", "loss stays high", "loss is back where it began", "gradients explode", "updates jump"),
    ),
    "all_of": (lambda: judge.all_of(judge.non_finite(), judge.non_finite(recovery=5)), ("loss is not finite",)),
    "sustained": (lambda: judge.sustained(judge.non_finite(), 3), ("loss is not finite",)),
}


@pytest.mark.parametrize("name", OURS)
def test_ours_keep_the_contract(name):
    make, duties = OURS[name]
    check_detector(make(), panics_on=duties, steps=320)


def test_a_duty_that_there_is_not_is_refused():
    with pytest.raises(InvalidConfig, match="loss is sad"):
        check_detector(judge.non_finite(), panics_on=("loss is sad",))


# ---------------------------------------------------------------- hostile detectors: one sentence each

SOUND = judge.non_finite()


def _over(update):
    """`non_finite` with its answer changed: ``update(state, signs, verdict) -> (state, verdict)``, its state kept."""

    def judged(state, signs):
        after, verdict = SOUND.update(state, signs)
        return update(after, signs, verdict)

    return Detector(SOUND.init, judged)


def _remembering(learn, start=()):
    """`non_finite` with a memory beside its state: ``learn(memory, signs) -> memory``."""

    def judged(state, signs):
        after, verdict = SOUND.update(state[0], signs)
        return (after, learn(state[1], signs)), verdict

    return Detector(lambda: (SOUND.init(), start), judged)


def _panicky(state, signs, verdict):
    panics = signs.loss is not None and signs.loss > 2.0
    return state, replace(verdict, health=Health.PANIC, reason="high", onset=signs.step) if panics else verdict


def _unforgiving(state, signs, verdict):
    """Every bad step is a panic of its own."""
    bad = verdict.health is Health.SUSPECT and signs.loss is not None and not math.isfinite(signs.loss)
    return state, replace(verdict, health=Health.PANIC) if bad else verdict


def _moody():
    calls = []

    def judged(state, signs):
        calls.append(1)
        after, verdict = SOUND.update(state, signs)
        return after, replace(verdict, evidence={"calls": float(len(calls))})

    return Detector(SOUND.init, judged)


def _mean_without_care():
    return _remembering(lambda mean, signs: mean if signs.loss is None else 0.9 * mean + 0.1 * signs.loss, 0.0)


def _in_place():
    """Its state is a list that it changes."""

    def judged(state, signs):
        state[0].append(signs.loss)
        return state, SOUND.update(SOUND.init(), signs)[1]

    return Detector(lambda: ([],), judged)


def _tampering():
    """Adds to the caller's own signs."""

    def judged(state, signs):
        signs.extra["seen"] = 1.0
        return SOUND.update(state, signs)

    return Detector(SOUND.init, judged)


class _Shy(tuple):
    """A tuple that does not survive pickling."""

    def __reduce__(self):
        return (tuple, ())

    def __deepcopy__(self, memo):
        return self


def _shy():
    def judged(state, signs):
        after, verdict = SOUND.update(tuple(state)[:2] or (None, 0), signs)
        return _Shy((*after, (state[2] + 1) if len(state) > 2 else 1)), verdict

    return Detector(lambda: _Shy((None, 0, 0)), judged)


def _keyed():
    """Tells states apart by their type, which `json` forgets."""

    class Mark(tuple):
        __slots__ = ()

    def judged(state, signs):
        number = state[0] + 1 if isinstance(state, Mark) else 0
        return Mark((number,)), SOUND.update(SOUND.init(), signs)[1]

    return Detector(lambda: Mark((0,)), judged)


def _blinded():
    """Once it has seen a NaN it never panics again."""

    def judged(state, signs):
        blind = state[1] or (signs.loss is not None and math.isnan(signs.loss))
        after, verdict = judge.loss_spike().update(state[0], signs)
        if blind:
            after, verdict = state[0], Verdict(Health.HEALTHY, signs.step)
        return (after, blind), verdict

    return Detector(lambda: (judge.loss_spike().init(), False), judged)


HOSTILE = {
    "chokes on a missing loss": (_over(lambda state, signs, verdict: (state, verdict, signs.loss + 1)[:2]), "answers"),
    "answers a bool": (_over(lambda state, signs, verdict: (state, verdict.is_panic)), "answers"),
    "keeps the signs": (_remembering(lambda memory, signs: (signs,)), "values"),
    "learns NaN": (_mean_without_care(), "finite state"),
    "counts its calls": (_moody(), "pure"),
    "changes its state": (_in_place(), "arguments"),
    "changes the signs": (_tampering(), "arguments"),
    "is lost in a pickle": (_shy(), "pickle"),
    "is lost in json": (_keyed(), "json"),
    "judges the step before": (
        _over(lambda state, signs, verdict: (state, replace(verdict, step=signs.step - 1))),
        "step",
    ),
    "knows no onset": (_over(lambda state, signs, verdict: (state, replace(verdict, onset=None))), "onset"),
    "gives a reason for health": (
        _over(lambda state, signs, verdict: (state, replace(verdict, reason=verdict.reason or "fine"))),
        "onset",
    ),
    "shows what is no number": (
        _over(lambda state, signs, verdict: (state, replace(verdict, evidence={"loss": signs}))),
        "evidence",
    ),
    "counts steps without signs": (_remembering(lambda memory, signs: memory + 1, 0), "missing"),
    "is blinded by a NaN": (_blinded(), "not finite"),
    "panics on a high loss": (_over(_panicky), "healthy"),
    "panics at every bad step": (_over(_unforgiving), "one panic"),
    "sleeps": (Detector(lambda: (), lambda state, signs: (state, Verdict(Health.HEALTHY, signs.step))), "panics"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_detector_is_told_which_sentence(name):
    detector, rule = HOSTILE[name]
    duty = {"not finite": "loss stays high", "panics": "loss is not finite"}.get(rule)
    with pytest.raises(ContractBroken) as caught:
        check_detector(detector, panics_on=() if duty is None else (duty,), steps=320)
    assert rule in caught.value.rules
    assert RULES[rule] in str(caught.value)


def test_every_sentence_has_a_detector_that_breaks_it():
    assert {rule for _, rule in HOSTILE.values()} == set(RULES)
