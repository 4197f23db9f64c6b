"""Gradient explosion, update ratio, collapse of a policy: signs on a logarithmic scale."""

import json
import math
import random

import pytest

from tolaria import judge
from tolaria.errors import InvalidConfig
from tolaria.records import Health, VitalSigns


def run(detector, signs):
    state, verdicts = detector.init(), []
    for one in signs:
        state, verdict = detector.update(state, one)
        verdicts.append(verdict)
    return verdicts, state


def panics(verdicts):
    return [(verdict.step, verdict.reason) for verdict in verdicts if verdict.is_panic]


def norms(values):
    return [VitalSigns(step=step, grad_norm=value) for step, value in enumerate(values)]


def heavy(steps, seed, spread=0.5):
    draw = random.Random(seed)
    return [math.exp(draw.gauss(0.0, spread)) for _ in range(steps)]


@pytest.mark.parametrize("history", [13, 40, 300])
@pytest.mark.parametrize("seed", range(4))
def test_an_exploding_gradient_panics_at_its_fourth_step(history, seed):
    values = heavy(history, seed) + [100.0 * 5**i for i in range(6)]
    verdicts, _ = run(judge.gradient_explosion(), norms(values))
    assert panics(verdicts) == [(history + 3, "gradient explosion")]
    assert verdicts[history + 3].onset == history
    assert verdicts[history + 5].health is Health.SUSPECT


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_short_one_does_not(length):
    """The red twin: one step fewer than it takes."""
    values = heavy(100, 1) + [1e30] * length + heavy(100, 2)
    assert panics(run(judge.gradient_explosion(), norms(values))[0]) == []


def test_growth_over_hundreds_of_steps_and_wide_noise_are_left_alone():
    draw = random.Random(4)
    growing = [math.exp(0.02 * i + draw.gauss(0.0, 0.3)) for i in range(1000)]
    wide = heavy(3000, 5, spread=2.0)
    assert panics(run(judge.gradient_explosion(), norms(growing))[0]) == []
    assert panics(run(judge.gradient_explosion(), norms(wide))[0]) == []


def test_what_is_missing_or_not_finite_enters_no_history():
    values = heavy(60, 6)
    mixed = [x for value in values for x in (value, math.nan, None, math.inf, 0.0, -1.0)]
    detector = judge.gradient_explosion()
    assert run(detector, norms(values))[1] == run(detector, norms(mixed))[1]


def test_a_new_scale_becomes_normal_when_nobody_answers():
    verdicts, _ = run(judge.gradient_explosion(), norms(heavy(60, 7) + [1e4 * x for x in heavy(600, 8)]))
    assert len(panics(verdicts)) == 1
    assert verdicts[-1].health is Health.HEALTHY


def test_states_survive_json():
    detector = judge.gradient_explosion()
    _, state = run(detector, norms([*heavy(60, 9), 1e4, 1e4]))
    back = judge.state_from_json(json.loads(json.dumps(state)))
    signs = VitalSigns(step=62, grad_norm=1e4)
    assert detector.update(back, signs) == detector.update(state, signs)


def test_update_ratio():
    def signs(values):
        return [VitalSigns(step=i, extra={"update_ratio": value}) for i, value in enumerate(values)]

    values = [1e-3 * x for x in heavy(100, 3)]
    assert panics(run(judge.update_ratio_jump(), signs(values))[0]) == []
    assert panics(run(judge.update_ratio_jump(), signs(values + [0.5] * 4))[0]) == [(103, "update ratio jump")]
    assert panics(run(judge.update_ratio_jump(sign="other"), signs(values + [0.5] * 4))[0]) == []


def policy(steps, seed):
    """Signs of a PPO run that learns: reward up, entropy down to a tenth, KL small and ragged."""
    draw = random.Random(seed)
    return [
        VitalSigns(
            step=i,
            metric=200.0 * (1.0 - math.exp(-i / 200.0)) + draw.gauss(0.0, 10.0),
            extra={
                "approx_kl": abs(draw.gauss(0.0, 0.01)),
                "entropy": 2.0 * math.exp(-i / 300.0) + 0.1,
                "explained_variance": 0.9 * (1.0 - math.exp(-i / 100.0)) + draw.gauss(0.0, 0.03),
            },
        )
        for i in range(steps)
    ]


def test_a_policy_that_learns_is_left_alone():
    assert panics(run(judge.rl_collapse(), policy(800, 0))[0]) == []


@pytest.mark.parametrize(
    ("metric", "extra", "reason", "steps"),
    [
        (180.0, {"approx_kl": 5.0, "entropy": 0.2}, "policy update explosion", 8),
        (180.0, {"approx_kl": 0.01, "entropy": 1e-4}, "entropy collapse", 8),
        (0.0, {"approx_kl": 0.01, "entropy": 0.2}, "reward collapse", 16),
        (180.0, {"approx_kl": 0.01, "entropy": 0.2, "explained_variance": -0.1}, "critic collapse", 16),
    ],
)
def test_a_policy_that_collapses(metric, extra, reason, steps):
    ill = [VitalSigns(step=600 + i, metric=metric, extra=extra) for i in range(40)]
    verdicts, _ = run(judge.rl_collapse(), policy(600, 1) + ill)
    assert panics(verdicts) == [(599 + steps, reason)]


@pytest.mark.parametrize("settings", [{"ratio": 1.0}, {"steps": 3}, {"ratio": math.nan}])
def test_bad_settings_are_named(settings):
    with pytest.raises(InvalidConfig, match="expected"):
        judge.gradient_explosion(**settings)
