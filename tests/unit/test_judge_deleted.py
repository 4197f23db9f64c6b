"""Lines of the detectors that only show in rare curves: what each is for, and that it fails without the line."""

import importlib
import math
import sys
import types
from pathlib import Path
from random import Random

import pytest

from tolaria.records import VitalSigns
from tolaria.testing import curves


def without(module, line, left=""):
    """The module compiled once more with one line of it changed."""
    original = importlib.import_module(module)
    source = Path(original.__file__).read_text(encoding="utf-8")
    assert source.count(line) == 1
    twin = types.ModuleType(f"{module}_without_a_line")
    sys.modules[twin.__name__] = twin
    try:
        exec(compile(source.replace(line, left), original.__file__, "exec"), twin.__dict__)
    finally:
        del sys.modules[twin.__name__]
    return twin


def panics(detector, losses):
    state, steps = detector.init(), []
    for step, loss in enumerate(losses, start=1):
        state, verdict = detector.update(state, VitalSigns(step=step, loss=loss))
        if verdict.is_panic:
            steps.append(step)
    return steps


def noisy(levels, seed, noise=0.05):
    draw = Random(seed)
    return [level + draw.gauss(0.0, noise) for level in levels]


@pytest.mark.parametrize("seed", range(3))
def test_a_rise_that_panicked_does_not_count_as_a_healed_hump(seed):
    """It came down again because somebody repaired it: a second one, not as high, panics like the first."""
    ramp = [2.0 + min(0.15 * i / 200, 0.375) for i in range(260)]
    losses = noisy([2.0] * 600 + ramp + [2.0] * 400 + [2.25] * 200, seed)
    first, second = panics(importlib.import_module("tolaria.judge.drift").loss_drift(), losses)
    assert 600 < first < 860
    assert 1260 < second < 1400
    mutant = without("tolaria.judge.drift", "levels=before, ")
    assert len(panics(mutant.loss_drift(), losses)) == 1 or panics(mutant.loss_drift(), losses)[1] > second


@pytest.mark.parametrize("seed", range(3))
def test_a_loss_of_which_half_the_steps_are_normal_has_not_risen(seed):
    """Two kinds of batches in turn: the evidence of the hard ones adds up, but the bulk of the losses is not up."""
    losses = noisy([2.0] * 600 + [2.0, 2.5] * 30, seed)
    assert panics(importlib.import_module("tolaria.judge.spike").loss_spike(), losses) == []
    mutant = without("tolaria.judge.spike", " and bulk >= _BULK")
    assert panics(mutant.loss_spike(), losses) != []


_ABRUPT = " and middle <= level - 0.5 * gained"


@pytest.mark.parametrize("seed", range(3))
def test_a_slow_return_to_the_level_of_a_guess_is_no_collapse(seed):
    down = [2.3 * math.exp(-i / 40) + 0.2 for i in range(200)]
    slowly = noisy(down + [0.2 + 2.3 * i / 150 for i in range(200)], seed, 0.01)
    at_once = noisy(down + [2.5] * 10, seed, 0.01)
    collapse = importlib.import_module("tolaria.judge.collapse").collapse
    assert panics(collapse(), slowly) == []
    assert panics(collapse(), at_once) == [205]
    assert panics(without("tolaria.judge.collapse", _ABRUPT).collapse(), slowly) != []


@pytest.mark.parametrize("seed", range(3))
def test_a_run_within_its_own_noise_has_learnt_nothing_to_lose(seed):
    """Most losses are a little below the level of a guess, some far below: getting there again is nothing new."""
    losses = noisy([2.3] * 100 + [1.8, 1.8, 1.4] * 34, seed, 0.01) + [2.4] * 8
    collapse = importlib.import_module("tolaria.judge.collapse").collapse
    assert panics(collapse(), losses) == []
    assert panics(without("tolaria.judge.collapse", "gained > 6.0 * spread and ").collapse(), losses) != []


@pytest.mark.parametrize("seed", range(3))
def test_losses_that_reach_half_of_the_way_by_themselves_tell_nothing_at_the_level_of_a_guess(seed):
    """As in reinforcement learning, where the first losses are no worse than many later ones."""
    losses = noisy([0.82] * 20 + ([0.4] * 11 + [0.7]) * 20, seed, 0.02) + [0.9] * 8
    collapse = importlib.import_module("tolaria.judge.collapse").collapse
    assert panics(collapse(), losses) == []
    mutant = without("tolaria.judge.collapse", " and level - middle > 2.5 * (ordered[-1] - middle)")
    assert panics(mutant.collapse(), losses) != []


@pytest.mark.parametrize("seed", [3, 7])
def test_a_rise_whose_bulk_is_up_panics_within_25_steps(seed):
    """A curve that comes down hides part of the rise, so its evidence grows slowly; but nearly all losses are up."""
    falling = [2.8 - 0.00128 * i for i in range(625)]
    losses = noisy([level + (0.11 if i >= 600 else 0.0) for i, level in enumerate(falling)], seed)
    assert panics(importlib.import_module("tolaria.judge.spike").loss_spike(), losses)[0] > 600
    assert panics(without("tolaria.judge.spike", "_MAKES_UP * ", "0.0 * ").loss_spike(), losses) == []


@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_has_panicked_and_got_well_by_itself_has_to_show_more(seed):
    losses = noisy([2.0] * 600 + [2.5] * 40 + [2.0] * 40 + [2.15] * 12 + [2.0] * 40, seed)
    spike = importlib.import_module("tolaria.judge.spike")
    assert len(panics(spike.loss_spike(), losses)) == 1
    mutant = without("tolaria.judge.spike", "history._replace(learnt=min(history.learnt, _YOUNG // 2))", "history")
    assert len(panics(mutant.loss_spike(), losses)) == 2
    again = [*losses[:700], *noisy([2.5] * 20, seed)]
    assert len(panics(spike.loss_spike(), again)) == 2


def test_levels_that_wander_widen_what_a_rise_is_measured_in():
    """As the returns of reinforcement learning: each rise alone would panic in a run that does not wander."""
    made = [curves.STRESS["PPO-like value loss"](Random(f"wanders {seed}"), 3000) for seed in range(6)]
    drift = importlib.import_module("tolaria.judge.drift")
    assert [panics(drift.loss_drift(), losses) for losses in made] == [[]] * 6
    mutant = without("tolaria.judge.drift", "if common > white:", "if False:")
    assert any(panics(mutant.loss_drift(), losses) for losses in made)
    near = without("tolaria.judge.drift", "_APART = (2, 8)", "_APART = (2,)")
    assert any(panics(near.loss_drift(), losses) for losses in made)
