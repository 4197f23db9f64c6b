"""Detectors made of detectors, on scripted ones."""

import json
import math

import pytest

from tolaria import judge
from tolaria.errors import InvalidConfig
from tolaria.judge import Detector
from tolaria.records import Health, Verdict, VitalSigns

KINDS = {"h": Health.HEALTHY, "s": Health.SUSPECT, "p": Health.PANIC}


def scripted(script, reason="x"):
    """Says `h`, `s` or `p` at each step, with the onset it would have."""

    def update(state, signs):
        kind = KINDS[script[state[0]]]
        onset = None if kind is Health.HEALTHY else signs.step if state[1] is None else state[1]
        return (state[0] + 1, onset), Verdict(kind, signs.step, "" if onset is None else reason, onset)

    return Detector(lambda: (0, None), update)


def words(detector, steps):
    state, verdicts = detector.init(), []
    for step in range(steps):
        state = judge.state_from_json(json.loads(json.dumps(state)))  # any state may have been on a disk
        state, verdict = detector.update(state, VitalSigns(step=step))
        verdicts.append(verdict)
    return "".join(verdict.health.value[0] for verdict in verdicts), verdicts


def test_any_of_reports_one_panic_an_episode():
    first, second = scripted("hpsshhhh", "a"), scripted("hhspsshp", "b")
    assert words(first, 8)[0].count("p") + words(second, 8)[0].count("p") == 3  # without the rule
    told, verdicts = words(judge.any_of(first, second), 8)
    assert told == "hpsssshp"
    assert [verdict.reason for verdict in verdicts] == ["", "a", "a", "b", "b", "b", "", "b"]
    assert verdicts[3].onset == 1
    assert verdicts[7].onset == 7


def test_all_of_waits_for_the_last_and_forgets_who_got_well():
    assert words(judge.all_of(scripted("hpssssh"), scripted("hhhpssh")), 7)[0] == "hsspssh"
    assert words(judge.all_of(scripted("hpshhhh"), scripted("hhhpssh")), 7)[0] == "hsssssh"
    assert words(judge.all_of(scripted("hpsshps"), scripted("hpsshps")), 7)[0] == "hpsshps"


def test_sustained_holds_a_panic_back():
    assert words(judge.sustained(scripted("hpssshpsh"), 4), 9)[0] == "hsssphssh"
    assert words(judge.sustained(scripted("hsssph"), 4), 6)[0] == "hsssph"
    assert words(judge.sustained(scripted("hpsh"), 1), 4)[0] == "hpsh"
    assert words(judge.sustained(scripted("sssss"), 3), 5)[0] == "sssss"  # never more than it found


def test_one_entry_where_loss_and_gradient_go_one_after_the_other():
    """As recorded of diverging runs: the loss rises, then nothing is finite any more."""
    signs = [VitalSigns(step=i, loss=2.0 + 0.01 * (i % 7), grad_norm=1.0 + 0.1 * (i % 5)) for i in range(300)]
    signs += [VitalSigns(step=300 + i, loss=3.0 * 2**i, grad_norm=1e3) for i in range(9)]
    signs += [VitalSigns(step=309 + i, loss=math.nan, grad_norm=math.nan) for i in range(40)]
    counts = []
    for detector in (judge.loss_spike(), judge.gradient_explosion(), judge.non_finite(), judge.default_detector()):
        state, found = detector.init(), 0
        for one in signs:
            state, verdict = detector.update(state, one)
            found += verdict.is_panic
        counts.append(found)
    assert counts == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "build",
    [
        judge.all_of,
        judge.any_of,
        lambda: judge.sustained(judge.non_finite(), 0),
        lambda: judge.loss_drift(threshold=0.5),
    ],
)
def test_bad_settings_are_named(build):
    with pytest.raises(InvalidConfig, match="expected"):
        build()
