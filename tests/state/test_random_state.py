"""Global random state under the policies restore, fork and keep, with one governor and with several."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tolaria import TolariaGovernor
from tolaria.state import rng

Govern = Callable[..., TolariaGovernor]
Read = Callable[[], Any]


def _draw() -> tuple[float, float, float, float, float]:
    """One number from each global generator, and one that uses a cached half of a Gaussian pair."""
    return random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn()), float(torch.rand(()))


def _differ(left: tuple[float, ...], right: tuple[float, ...]) -> bool:
    return all(a != b for a, b in zip(left, right, strict=True))


@pytest.fixture
def model() -> nn.Linear:
    return nn.Linear(2, 2)


def test_restore_repeats_every_draw(model: nn.Linear, govern: Govern, read_random: Read) -> None:
    governor = govern(model, rng="restore")
    _draw()
    governor.snapshot()
    state = read_random()
    drawn = [_draw() for _ in range(3)]
    for _ in range(2):
        governor.execute_rollback()
        assert read_random() == state
        assert [_draw() for _ in range(3)] == drawn


def test_keep_moves_nothing(model: nn.Linear, govern: Govern, read_random: Read) -> None:
    governor = govern(model, rng="keep")
    governor.snapshot()
    drawn = [_draw() for _ in range(3)]
    state = read_random()
    governor.execute_rollback()
    assert read_random() == state
    assert _draw() not in drawn


def test_fork_repeats_no_draw_and_is_deterministic(model: nn.Linear, govern: Govern, read_random: Read) -> None:
    governor = govern(model, torch.optim.SGD(model.parameters(), lr=0.1), rng="fork")
    before = read_random()
    governor.snapshot()
    assert read_random() == before
    first = [_draw() for _ in range(2)]
    governor.observe(loss=1.0)
    governor.execute_rollback()
    second = [_draw() for _ in range(2)]
    assert all(_differ(a, b) for a in first for b in second)
    governor.close()

    random.setstate(before[0])
    np.random.set_state((before[1][0], np.frombuffer(before[1][1], dtype=np.uint32), *before[1][2:]))
    torch.set_rng_state(torch.frombuffer(bytearray(before[2]), dtype=torch.uint8))
    assert read_random() == before
    again = govern(model, rng="fork")
    again.snapshot()
    assert [_draw() for _ in range(2)] == first
    again.observe(loss=1.0)
    again.execute_rollback()
    assert [_draw() for _ in range(2)] == second


def test_fork_repeats_no_draw_over_many_rollbacks_to_one_snapshot(model: nn.Linear, govern: Govern) -> None:
    governor = govern(model, rng="fork")
    governor.snapshot()
    seen = [_draw()]
    for _ in range(5):
        governor.execute_rollback()
        drawn = _draw()
        assert all(_differ(drawn, other) for other in seen)
        seen.append(drawn)


def test_the_default_restores_with_one_live_governor(model: nn.Linear, govern: Govern, read_random: Read) -> None:
    governor = govern(model, rng=None)
    assert governor.capabilities().rng == "restore"
    governor.snapshot()
    state = read_random()
    _draw()
    governor.execute_rollback()
    assert read_random() == state


def test_the_default_keeps_with_several_live_governors(model: nn.Linear, govern: Govern, read_random: Read) -> None:
    governor, other = govern(model, rng=None), govern(nn.Linear(2, 2), rng=None)
    assert (governor.capabilities().rng, other.capabilities().rng) == ("keep", "keep")
    governor.snapshot()
    _draw()
    state = read_random()
    governor.execute_rollback()
    assert read_random() == state


def test_a_second_governor_stops_the_first_from_rewinding_its_draws(
    model: nn.Linear, govern: Govern, read_random: Read
) -> None:
    """The snapshot was taken when the policy was still to restore."""
    governor = govern(model, rng=None)
    governor.snapshot()
    other = govern(nn.Linear(2, 2), rng=None)
    _draw()
    state = read_random()
    governor.execute_rollback()
    assert read_random() == state
    other.close()
    governor.execute_rollback()
    assert read_random() != state  # alone again


def test_an_explicit_policy_stands_with_several_governors(model: nn.Linear, govern: Govern, read_random: Read) -> None:
    governor, _ = govern(model, rng="restore"), govern(nn.Linear(2, 2), rng="keep")
    governor.snapshot()
    state = read_random()
    _draw()
    governor.execute_rollback()
    assert read_random() == state


@pytest.mark.parametrize("policy", ["restore", "fork", "keep"])
def test_a_snapshot_draws_nothing(policy: str, model: nn.Linear, govern: Govern, read_random: Read) -> None:
    class Draws:
        """Hostile: draws whenever its state is touched."""

        def state_dict(self) -> dict[str, float]:
            return {"drawn": sum(_draw())}

        def load_state_dict(self, state: dict[str, float]) -> None:
            _draw()

    governor = govern(model, rng=policy)
    governor.register("draws", Draws())
    state = read_random()
    governor.snapshot()
    assert read_random() == state
    governor.digest()
    assert read_random() == state
    governor.execute_rollback()
    assert (read_random() == state) == (policy != "fork")


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_snapshot_sets_no_generator_that_nobody_has_drawn_from(
    scheduled: bool, model: nn.Linear, govern: Govern, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Setting one of CUDA has cuDNN seed the dropout of its RNNs anew, whatever it is set to."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5) if scheduled else None
    governor = govern(model, optimizer, scheduler=scheduler, rng="restore")
    monkeypatch.setattr(rng, "write", lambda _: pytest.fail("random state was set"))
    governor.snapshot()
