"""Marks on a rollout, and advantages that do not cross them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tolaria.errors import UsageError
from tolaria.report import RollbackReport
from tolaria.trajectories import Trajectories

GAMMA, LAM = 0.9, 0.8


def report(env_id: int = 0, lost: int = 1, penalty: float = 0.0, success: bool = True) -> RollbackReport:
    status = "submitted" if success else "failed"
    return RollbackReport(success=success, status=status, env_id=env_id, steps_lost=lost, penalty=penalty)


def plain(rewards: list[float], values: list[float], after: float, *, done: bool = False) -> list[float]:
    """GAE of one stretch of one environment, from its definition: a sum, not a recursion."""
    states = [*values, 0.0 if done else after]
    deltas = [r + GAMMA * states[t + 1] - states[t] for t, r in enumerate(rewards)]
    return [sum((GAMMA * LAM) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


def advantages(marks: Trajectories, rewards: torch.Tensor, values: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """With the values of the next states taken from the next row, `after` behind the last one."""
    return marks.advantages(
        rewards,
        values,
        torch.cat([values[1:], after[None]]),
        torch.zeros_like(values, dtype=torch.bool),
        gamma=GAMMA,
        lam=LAM,
    )


@given(st.integers(0, 6), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_nothing_flows_out_of_a_void_part(end: int, lost: int, seed: int) -> None:
    """Whatever stands in the void part, other transitions and environments get the same advantages."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values, after = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((7, 3), (7, 3), (3,)))
    marks = Trajectories(7, 3)
    marks.undo(report(env_id=1, lost=lost), end)
    first = max(0, end - lost + 1)
    expected = advantages(Trajectories(7, 3), rewards, values, after)
    hurt = rewards.clone()
    hurt[first : end + 1, 1] = torch.nan
    got = advantages(marks, hurt, values, after)
    assert torch.equal(got[:, [0, 2]], expected[:, [0, 2]])
    r, v = rewards[:, 1].tolist(), [*values[:, 1].tolist(), float(after[1])]
    before = plain(r[:first], v[:first], v[first])
    behind = plain(r[end + 1 :], v[end + 1 : -1], v[-1])
    assert got[:, 1].tolist() == pytest.approx([*before, *[0.0] * (end + 1 - first), *behind])
    assert marks.valid[:, 1].tolist() == [not first <= t <= end for t in range(7)]
    assert marks.cut[:, 1].tolist() == [t in (first - 1, end) for t in range(7)]  # for estimators of the caller's own
    assert bool(marks.valid[:, [0, 2]].all())


def test_without_the_marks_the_damage_spreads() -> None:
    """The red twin."""
    rewards, values, after = torch.zeros(5, 1), torch.zeros(5, 1), torch.zeros(1)
    rewards[3] = 1e6
    assert float(advantages(Trajectories(5, 1), rewards, values, after)[0, 0]) > 1.0
    marks = Trajectories(5, 1)
    marks.undo(report(lost=2), 4)
    assert advantages(marks, rewards, values, after).abs().max() == 0.0


def test_a_penalty_ends_the_episode_and_is_learnt_from() -> None:
    rewards, values, after = torch.ones(4, 2), torch.full((4, 2), 3.0), torch.full((2,), 3.0)
    marks = Trajectories(4, 2)
    marks.charge(report(env_id=1, lost=2, penalty=-10.0), 2, rewards)
    assert rewards[:, 1].tolist() == [1.0, 1.0, -9.0, 1.0]
    assert rewards[:, 0].tolist() == [1.0] * 4
    assert bool(marks.valid.all())
    got = advantages(marks, rewards, values, after)[:, 1].tolist()
    first = plain([1.0, 1.0, -9.0], [3.0] * 3, 99.0, done=True)
    assert got == pytest.approx([*first, *plain([1.0], [3.0], 3.0)])


def test_what_follows_a_done_is_nothing_whatever_its_value() -> None:
    marks, done = Trajectories(2, 1), torch.tensor([[True], [False]])
    ahead = torch.tensor([[torch.nan], [0.0]])
    got = marks.advantages(torch.ones(2, 1), torch.zeros(2, 1), ahead, done, gamma=GAMMA, lam=LAM)
    assert got.tolist() == [[1.0], [1.0]]


def test_steps_lost_in_units_of_transitions() -> None:
    marks = Trajectories(8, 1)
    marks.undo(report(lost=11), 5, per_step=5)
    assert marks.valid[:, 0].tolist() == [True] * 3 + [False] * 3 + [True] * 2
    marks.clear()
    marks.undo(report(lost=0), 5)
    assert marks.valid[:, 0].tolist() == [True] * 5 + [False] + [True] * 2


def test_a_void_part_may_begin_in_an_earlier_rollout() -> None:
    marks = Trajectories(4, 1)
    marks.invalidate(0, -3, 1)
    assert marks.valid[:, 0].tolist() == [False, False, True, True]
    marks.clear()
    assert bool(marks.valid.all())
    assert not bool(marks.cut.any())
    marks.invalidate(0, 3, 2)
    assert bool(marks.valid.all())


def test_a_rollback_that_did_not_happen_marks_nothing() -> None:
    marks, rewards = Trajectories(4, 1), torch.zeros(4, 1)
    marks.undo(report(success=False), 2)
    marks.charge(report(success=False, penalty=-1.0), 2, rewards)
    assert bool(marks.valid.all())
    assert not bool((marks.cut | marks.terminal).any())
    assert not bool(rewards.any())


def test_what_is_outside_of_the_rollout_is_refused() -> None:
    marks = Trajectories(4, 2)
    for env_id, step in ((2, 0), (-1, 0), (0, 4), (0, -1)):
        with pytest.raises(UsageError, match="expected below 2 and 4"):
            marks.undo(report(env_id=env_id), step)
    with pytest.raises(UsageError, match="at least 1"):
        Trajectories(0, 1)
