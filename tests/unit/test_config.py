"""Every value is checked before anything is built."""

import numpy as np
import pytest

from tolaria import GovernorConfig, InvalidConfig, Recovery


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mode", "watch"),
        ("rng", "reset"),
        ("on_veto", "ignore"),
        ("cadence", 0),
        ("cadence", 1.5),
        ("cadence", True),
        ("cadence", "fast"),
        ("reach", -1),
        ("scrub_every", -1),
        ("host_slots", -1),
        ("tier", "disk"),
        ("device_budget", 0),
        ("host_budget", 1.5),
        ("probation", -1),
        ("reexecute_every", -1),
        ("reexecute_every", 2.5),
        ("slots", 2),
        ("slots", 0),
        ("keep_batches", 0),
        ("check_weights_every", 0),
        ("gate_timeout_s", 0.0),
        ("gate_timeout_s", float("nan")),
        ("gate_timeout_s", "3"),
        ("gate_timeout_s", True),
        ("penalty", "x"),
        ("penalty", float("inf")),
    ],
)
def test_bad_values_are_named(name, value):
    with pytest.raises(InvalidConfig, match=f"{name}=") as caught:
        GovernorConfig(**{name: value})
    assert isinstance(caught.value, ValueError)
    assert caught.value.state_intact


def test_numbers_of_numpy_are_numbers():
    recovery = Recovery(cool_lr=np.float32(0.5), widen=np.int64(2), damp=np.float64(0.25))
    assert GovernorConfig(recovery=recovery, penalty=np.float32(-1.0), gate_timeout_s=np.int32(3)).penalty == -1.0


@pytest.mark.parametrize("name", ["widen", "cool_lr", "damp"])
@pytest.mark.parametrize("value", ["x", None, True, float("nan"), -1.0])
def test_bad_factors_of_a_recovery_are_named(name, value):
    with pytest.raises(InvalidConfig, match=f"{name}="):
        Recovery(**{name: value})


@pytest.mark.parametrize(
    ("settings", "slots", "cadence"),
    [
        ({"cadence": 10, "probation": 10}, 3, 10),
        ({"cadence": 1, "probation": 8}, 10, 1),
        ({"cadence": 3, "probation": 8}, 5, 3),
        ({"cadence": 1, "probation": 8, "slots": 3}, 3, 8),
        ({"cadence": 1, "probation": 8, "slots": 6}, 6, 2),
        ({"cadence": 5, "probation": 0}, 2, 5),
        ({"cadence": 5, "probation": 0, "slots": 2}, 2, 5),
    ],
)
def test_slots_follow_cadence_and_probation_or_stretch_the_cadence(settings, slots, cadence):
    config = GovernorConfig(**settings)
    assert (config.num_slots(), config.effective_cadence()) == (slots, cadence)
    # a candidate is never overwritten in probation: the candidates alive at once, the good one, and one to write into
    in_probation = -(-config.probation // config.effective_cadence())
    assert config.num_slots() >= 2 + in_probation
