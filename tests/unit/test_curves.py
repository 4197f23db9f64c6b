"""The default detector on made curves: awkward noise that must not panic, and rises that must (docs/detection.md)."""

import math
from random import Random

import pytest

from tolaria import judge
from tolaria.records import Health, VitalSigns
from tolaria.testing import curves

SPOTS = range(520, 1500, 35)


def judged(detector, losses, state=None, start=0):
    """First panic and first suspect step (or None), number of panics, and the last state."""
    state = detector.init() if state is None else state
    first: dict[Health, int] = {}
    panics = 0
    for step, loss in enumerate(losses, start=start):
        state, verdict = detector.update(state, VitalSigns(step=step, loss=loss))
        panics += verdict.is_panic
        first.setdefault(verdict.health, step)
    return first.get(Health.PANIC), first.get(Health.SUSPECT), panics, state


@pytest.mark.slow
@pytest.mark.parametrize("name", curves.STRESS)
def test_awkward_noise_does_not_panic(name):
    assert judged(judge.default_detector(), curves.STRESS[name](Random(name), 4000))[2] == 0


def language_model(steps, seed):
    """As recorded runs look: down steeply, then slowly; noise of 0.1 with heavy tails, and outliers of one step."""
    draw = Random(seed)
    return [
        3.2
        + 1.2 * math.exp(-i / 600)
        + 6.0 * math.exp(-i / 60)
        + 0.09 * curves.student_t(draw, 5.0)
        + (draw.uniform(1.0, 3.0) if draw.random() < 0.002 else 0.0)
        for i in range(steps)
    ]


@pytest.fixture(scope="module")
def healthy():
    """Such curves, with the detector's states where to splice: states are values, so each serves many times."""
    found = []
    for seed in range(3):
        losses = language_model(1950, seed)
        detector, states, at = judge.default_detector(), {}, 0
        state = detector.init()
        for spot in SPOTS:
            _, _, panics, state = judged(detector, losses[at:spot], state, at)
            assert panics == 0
            states[spot], at = state, spot
        found.append((losses, states))
    return found


def splices(healthy, make, steps):
    for losses, states in healthy:
        for spot, state in states.items():
            noise = curves.step_noise(losses[spot - 200 : spot], robust=True)
            spliced = make(losses[spot : spot + steps], noise)
            panic, suspect, _, _ = judged(judge.default_detector(), spliced, state, spot)
            yield None if panic is None else panic - spot, None if suspect is None else suspect - spot


def test_a_rise_of_three_deviations_panics_within_25_steps(healthy):
    delays = [panic for panic, _ in splices(healthy, lambda rest, noise: curves.risen(rest, 3 * noise), 25)]
    assert delays.count(None) <= 1, delays  # of 84
    unchanged = [panic for panic, _ in splices(healthy, lambda rest, _: list(rest), 25)]
    assert unchanged == [None] * len(delays)  # the red twin: it is the rise that panics


def test_a_rise_of_two_deviations_is_suspect_within_60_steps(healthy):
    found = list(splices(healthy, lambda rest, noise: curves.risen(rest, 2 * noise), 60))
    assert sum(one == (None, None) for one in found) <= 0.05 * len(found)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_spikes_do_not_panic(healthy, length):
    for height in (8.0, 1e30):
        found = splices(healthy, lambda rest, noise, h=height: curves.spiked(rest, h * noise, length), 40)
        assert [panic for panic, _ in found if panic is not None] == []


@pytest.mark.slow
def test_slow_ramps_panic_before_they_have_risen_six_deviations(healthy):
    found = splices(healthy[:1], lambda rest, noise: curves.ramped(rest, 3 * noise, 200), 400)
    assert [panic for panic, _ in found if panic is None] == []
