"""Slow rises, plateaus after damage, and what must not be taken for either."""

import json
import math
import random

import pytest

from tolaria import judge
from tolaria.records import Health, VitalSigns
from tolaria.testing import curves


def run(detector, losses, state=None, start=0):
    state = detector.init() if state is None else state
    verdicts = []
    for step, loss in enumerate(losses, start=start):
        state, verdict = detector.update(state, VitalSigns(step=step, loss=loss))
        verdicts.append(verdict)
    return verdicts, state


def panics(verdicts):
    return [(verdict.step, verdict.reason) for verdict in verdicts if verdict.is_panic]


def flat(steps, seed, level=2.0, noise=0.05):
    draw = random.Random(seed)
    return [level + draw.gauss(0.0, noise) for _ in range(steps)]


@pytest.mark.parametrize("seed", range(6))
def test_a_slow_ramp_panics_before_it_has_risen_six_deviations(seed):
    losses = flat(1200, seed)
    losses[600:] = curves.ramped(losses[600:], 3 * 0.05, 200)
    ((step, reason),) = panics(run(judge.loss_drift(), losses)[0])[:1]
    assert reason == "slow loss rise"
    assert 640 < step < 1000


@pytest.mark.parametrize("seed", range(6))
def test_a_curve_that_stays_or_falls_does_not(seed):
    """The red twin of the one above: without the ramp, with one down, and with a detector that wants ten times more."""
    losses = flat(1200, seed)
    assert panics(run(judge.loss_drift(), losses)[0]) == []
    down, up = (curves.ramped(losses[600:], sign * 3 * 0.05, 200) for sign in (-1, 1))
    assert panics(run(judge.loss_drift(), losses[:600] + down)[0]) == []
    assert panics(run(judge.loss_drift(threshold=18.0, proportion=30.0), losses[:600] + up[:400])[0]) == []


@pytest.mark.parametrize("seed", range(4))
def test_a_small_rise_after_a_spike_is_a_plateau(seed):
    losses = flat(900, seed)
    losses[500:] = curves.risen(losses[500:], 2.0 * 0.05)
    detector = judge.loss_drift(threshold=3.5)
    assert panics(run(detector, losses)[0]) == []  # the red twin: no damage
    losses[500:502] = [9.0, 5.0]
    ((step, reason),) = panics(run(detector, losses)[0])[:1]
    assert reason == "plateau after damage"
    assert 560 <= step <= 660


def test_a_spike_that_heals_leaves_no_plateau():
    losses = flat(900, 3)
    losses[500:503] = [9.0, 1e30, 5.0]
    assert panics(run(judge.loss_drift(), losses)[0]) == []


def test_a_non_finite_loss_is_a_disturbance_too():
    losses = flat(900, 1)
    losses[500:] = curves.risen(losses[500:], 2.0 * 0.05)
    losses[500] = math.nan
    assert [reason for _, reason in panics(run(judge.loss_drift(threshold=3.5), losses)[0])] == ["plateau after damage"]


def test_humps_that_the_run_has_healed_before_are_its_own():
    """Waves of a height that panics on a flat curve, after a first one during warm-up."""
    draw = random.Random(9)
    waves = [2.0 + 0.1 * math.sin((i - 200) / 60.0) + draw.gauss(0.0, 0.1) for i in range(3000)]
    assert panics(run(judge.loss_drift(), waves)[0]) == []
    lone = [2.0 + 0.2 * (i > 800) * math.sin(min(1.57, (i - 800) / 60.0)) + draw.gauss(0.0, 0.1) for i in range(1200)]
    assert panics(run(judge.loss_drift(), lone)[0]) != []


def test_one_panic_an_episode_with_the_history_frozen_until_it_is_back():
    losses = flat(600, 2) + flat(120, 3, level=2.4) + flat(400, 4) + flat(100, 5, level=4.0)
    verdicts, _ = run(judge.loss_drift(), losses)
    first, second = (step for step, _ in panics(verdicts))
    assert 600 < first < 720
    assert 1120 < second < 1220  # higher than the first rise, which healed by itself and so is the run's own
    assert second - 1120 <= first - 600 + 16
    assert all(verdict.health is Health.SUSPECT for verdict in verdicts[first + 1 : 720])
    assert verdicts[760].health is Health.HEALTHY


def test_a_level_that_stays_becomes_normal():
    verdicts, _ = run(judge.loss_drift(), flat(600, 2) + flat(1400, 3, level=2.4))
    assert len(panics(verdicts)) == 1
    assert all(verdict.health is Health.HEALTHY for verdict in verdicts[1000:])


def test_nothing_is_judged_during_warm_up():
    rising = [1.0 + 0.05 * i for i in range(479)]
    assert all(verdict.health is Health.HEALTHY for verdict in run(judge.loss_drift(), rising)[0])


def test_states_are_values_that_survive_json():
    losses = flat(900, 6)
    losses[800:] = curves.risen(losses[800:], 0.4)
    detector = judge.loss_drift()
    _, middle = run(detector, losses[:815])
    hash(middle)
    back = judge.state_from_json(json.loads(json.dumps(middle)))
    assert run(detector, losses[815:], back, 815) == run(detector, losses[815:], middle, 815)
    assert panics(run(detector, losses[815:], back, 815)[0])


@pytest.mark.parametrize("seed", range(6))
def test_a_young_run_is_suspected_and_does_not_panic_of_a_slow_rise(seed):
    """Nobody knows yet how it roams; a ramp from step 500 on panics all the same before it has risen six deviations."""
    losses = flat(900, seed)
    losses[500:] = curves.ramped(losses[500:], 3 * 0.05, 200)
    verdicts, _ = run(judge.loss_drift(), losses)
    assert any(verdict.health is Health.SUSPECT for verdict in verdicts[:700])
    assert 767 <= panics(verdicts)[0][0] < 900
