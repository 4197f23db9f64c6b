"""Rounds of a plain loop: snapshot, learn, judge; make again, drop, reject. Bit-exact, with the unguarded twin."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tolaria import TolariaGovernor
from tolaria.config import GovernorConfig, Recovery
from tolaria.errors import (
    NoSnapshot,
    PhaseError,
    QuiesceTimeout,
    RetryBudgetExceeded,
    RollbackFailed,
    SafetyError,
    SnapshotRejected,
    StateMismatch,
    UnsupportedState,
    UsageError,
)
from tolaria.records import Health
from tolaria.rounds import Rounds, drift
from tolaria.surge import round_detector

pytestmark = pytest.mark.usefixtures("alone")

STEPS = 4


class Policy(nn.Module):
    """With a target network that no optimizer trains."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 1))
        self.target = nn.Linear(4, 1)

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        return self.net(data)


class Learner:
    """A small regression whose rounds draw their data from global random state."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(3)
        self.model = Policy()
        self.optimizer = torch.optim.Adam(self.model.net.parameters(), lr=0.05)
        self.counter = [0]
        self.faults: dict[tuple[int, int], Callable[[Learner], object]] = {}
        self.steps = self.rounds = 0
        config = {key: options.pop(key) for key in list(options) if key != "snapshot_every"}
        self.governor = TolariaGovernor(
            self.model, self.optimizer, config=GovernorConfig(**config), detector=round_detector()
        )
        self.governor.register("counter", (lambda: list(self.counter), self._set_counter))
        self.guard = Rounds(self.governor, **options)

    def _set_counter(self, value: list[int]) -> None:
        self.counter[:] = value

    def learn(self) -> None:
        """One round; `faults` are keyed by attempts and steps."""
        self.rounds += 1
        self.counter[0] += 1
        for step in range(STEPS):
            data = torch.randn(16, 4)
            loss = (self.model(data) - data.sum(1, keepdim=True)).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.steps += 1
            self.faults.get((self.rounds, step), lambda _: None)(self)


def scale(learner: Learner) -> None:
    for parameter in learner.model.net.parameters():
        parameter.data.mul_(40.0).add_(1.0)


def poison(learner: Learner) -> None:
    learner.model.net[0].weight.data[0, 0] = float("nan")


def raises(learner: Learner) -> None:
    poison(learner)
    raise ValueError("the policy does not like NaN")


def go(learner: Learner, rounds: int = 5, **faults: Any) -> str:
    for _ in range(rounds):
        torch.randn(3)  # what experience draws
        learner.guard.run(learner.learn)
    return learner.governor.digest()


def unguarded(rounds: int = 5, left_out: tuple[int, ...] = (), faults: Any = None) -> str:
    learner = Learner()
    learner.faults = faults or {}
    for number in range(rounds):
        torch.randn(3)
        if number not in left_out:
            learner.learn()
    digest = learner.governor.digest()
    learner.governor.close()
    return digest


FAULTS = [scale, poison, raises]


@pytest.mark.parametrize("step", [1, STEPS - 1])
@pytest.mark.parametrize("number", [1, 3, 5])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_round_that_panics_is_made_again(fault: Any, number: int, step: int) -> None:
    clean = unguarded()
    learner = Learner()
    learner.faults[number, step] = fault
    assert go(learner) == clean
    assert learner.governor.rollbacks == 1
    assert learner.rounds == 6
    assert learner.counter == [5]
    if fault is not raises:
        assert unguarded(faults={(number, step): fault}) != clean


@pytest.mark.parametrize("fault", FAULTS)
def test_a_round_that_panics_again_is_dropped(fault: Any) -> None:
    reference = unguarded(left_out=(2,))
    learner = Learner()
    learner.faults = {(3, 1): fault, (4, 2): fault}
    results = []
    for _ in range(5):
        torch.randn(3)
        results.append(learner.guard.run(learner.learn))
    assert learner.governor.digest() == reference
    assert [result.learnt for result in results] == [True, True, False, True, True]
    assert [len(result.reports) for result in results] == [0, 0, 2, 0, 0]
    assert [report.snapshot_step for report in results[2].reports] == [2, 2]
    assert results[2].verdict.is_panic
    assert learner.governor.statistics().steps == 6


def test_a_panic_right_after_a_dropped_round_drops_too() -> None:
    reference = unguarded(left_out=(1, 2))
    learner = Learner()
    learner.faults = {(2, 0): scale, (3, 0): scale, (4, 0): scale}
    assert go(learner) == reference
    assert learner.rounds == 6


def test_the_ledger_tells_what_was_done(tmp_path: Path) -> None:
    learner = Learner(ledger=str(tmp_path / "ledger.jsonl"), env_id=6, penalty=-2.5)
    learner.faults = {(2, 1): raises, (3, 1): scale}
    torch.randn(3)
    learner.guard.run(learner.learn)
    result = learner.guard.run(learner.learn)
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert [(line["action"], line["reason"], line["restored_step"], line["env_id"]) for line in lines] == [
        ("replay", "non-finite weights", 1, 6),
        ("skip", "surge of drift", 1, 6),
    ]
    assert lines[0]["note"] == "ValueError: the policy does not like NaN"
    assert [(report.penalty, report.env_id) for report in result.reports] == [(-2.5, 6)] * 2


def test_an_error_without_damage_is_the_callers() -> None:
    learner = Learner()
    learner.guard.run(learner.learn)
    before = learner.governor.digest()

    def broken() -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        learner.guard.run(broken)
    assert learner.governor.rollbacks == 0
    assert learner.governor.digest() == before


def test_signs_are_judged_and_draw_nothing() -> None:
    clean = unguarded()
    learner = Learner()
    asked = iter([0.1, 0.2, 99.0, 0.1, 0.1, 0.1])

    def signs() -> dict[str, float]:
        torch.randn(7)
        return {"policy_change": next(asked)}

    for _ in range(5):
        torch.randn(3)
        learner.guard.run(learner.learn, signs=signs)
    assert learner.governor.digest() == clean
    assert learner.governor.rollbacks == 1


def test_a_policy_that_cannot_be_asked_any_more_is_damaged() -> None:
    learner, broken = Learner(), [True, False, False]

    def signs() -> dict[str, float]:
        if broken.pop(0):
            raise ValueError("not a distribution")
        return {}

    result = learner.guard.run(learner.learn, signs=signs)
    assert result.learnt
    assert [report.reason for report in result.reports] == ["non-finite unmeasured"]


def test_damage_done_between_rounds_is_not_taken_into_a_snapshot() -> None:
    reference = Learner()
    go(reference, 1)
    learner = Learner()
    go(learner, 2)
    scale(learner)  # a stray write while experience is gathered
    result = learner.guard.run(learner.learn)
    assert not result.learnt
    assert [report.snapshot_step for report in result.reports] == [1]  # from before the second round
    for a, b in zip(learner.model.parameters(), reference.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert learner.guard.run(learner.learn).learnt


def test_weights_that_somebody_else_writes_each_time_are_snapshotted_once_they_have_proved_good() -> None:
    learner = Learner()
    for _ in range(4):
        for parameter in learner.model.net.parameters():
            parameter.data.mul_(0.99)  # a decay of the caller's own
        assert learner.guard.run(learner.learn).learnt
    assert learner.guard.reject("poison").snapshot_step == 4
    assert learner.guard.run(learner.learn).learnt


def test_moments_that_are_not_finite_drop_the_round() -> None:
    """No weight shows them before the next step does."""
    learner = Learner()
    go(learner, 2)
    learner.optimizer.state[learner.model.net[0].weight]["exp_avg"][0, 0] = float("inf")
    result = learner.guard.run(learner.learn)
    assert not result.learnt
    assert result.verdict.reason == "non-finite train state"
    assert learner.rounds == 2
    assert bool(learner.optimizer.state[learner.model.net[0].weight]["exp_avg"].isfinite().all())
    assert learner.guard.run(learner.learn).learnt


def test_a_run_that_begins_damaged_is_refused() -> None:
    learner = Learner()
    poison(learner)
    with pytest.raises(SnapshotRejected):
        learner.guard.run(learner.learn)


def test_rejected_experience_goes_back_to_before_it_was_gathered() -> None:
    learner = Learner()
    go(learner, 2)
    assert learner.guard.snapshot()
    assert not learner.guard.snapshot()
    before = learner.governor.digest()
    learner.counter[0] = 77  # statistics of inputs, say
    torch.randn(5)  # what gathering has drawn
    draws = torch.get_rng_state()
    report = learner.guard.reject("non-finite observation")
    assert report.success
    assert report.reason == "non-finite observation"
    assert learner.governor.digest() == before
    assert learner.counter == [2]
    assert torch.equal(torch.get_rng_state(), draws)


def test_without_a_snapshot_of_its_own_it_goes_back_to_before_the_last_round() -> None:
    learner = Learner()
    go(learner, 2)
    assert learner.guard.reject("poison").snapshot_step == 1


def test_rounds_between_snapshots_are_lost_and_their_draws_are_not_repeated() -> None:
    learner = Learner(snapshot_every=3)
    go(learner, 4)  # snapshots before the first and the fourth
    reference = Learner(snapshot_every=3)
    go(reference, 3)
    drawn = []

    def fault(learner: Learner) -> None:
        scale(learner)
        drawn.append(torch.get_rng_state())

    learner.faults[5, 3] = fault
    result = learner.guard.run(learner.learn)
    assert not result.learnt
    assert result.reports[0].steps_lost == 2
    assert learner.governor.rollbacks == 1
    assert learner.counter == [3]
    for a, b in zip(learner.model.parameters(), reference.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), drawn[0])


def hinder(learner: Learner, times: int = 1, error: type[Exception] = QuiesceTimeout) -> None:
    """Rollbacks cannot be made, that many times."""
    left = [times]
    restore = learner.governor._keeper.restore

    def hindered(*args: Any, **settings: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise error("rolling back", "not possible now, expected it to be", "Do it again.")
        return restore(*args, **settings)

    learner.governor._keeper.restore = hindered  # type: ignore[method-assign]


def spoil_moments(learner: Learner) -> None:
    learner.optimizer.state[learner.model.net[0].weight]["exp_avg"][0, 0] = float("inf")


@pytest.mark.parametrize("error", [QuiesceTimeout, StateMismatch, UsageError])
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("then", ["run", "snapshot", "reject"])
def test_a_panic_that_could_not_be_answered_is_answered_by_the_next_call(then: str, times: int, error: Any) -> None:
    learner = Learner()
    go(learner, 2)
    learner.guard.snapshot()
    good = weights(learner)
    learner.faults[3, 1] = scale
    hinder(learner, times, error)
    for _ in range(times):
        with pytest.raises(error):
            call(learner, "run" if learner.rounds == 2 else then)
        assert learner.rounds == 3
        assert weights(learner) != good
        assert learner.governor._course.unsettled()[1] is not None
    taken = learner.governor.statistics().snapshots
    result = call(learner, then)
    assert learner.rounds == 3  # what was drawn from the damaged policy teaches nothing
    assert weights(learner) == good
    assert learner.counter == [2]
    assert (learner.governor.rollbacks, learner.governor.statistics().snapshots) == (1, taken)
    assert learner.governor.statistics().panics == 1
    assert learner.governor._course.unsettled()[1] is None
    if then == "run":
        assert not result.learnt
        assert result.verdict.reason == "surge of drift"
        assert [report.success for report in result.reports] == [True]
    elif then == "snapshot":
        assert result is False
    else:
        assert result.success
        assert result.reason == "surge of drift"
    assert learner.guard.run(learner.learn).learnt
    assert learner.counter == [3]


def test_a_rollback_that_failed_half_way_is_made_before_anything_else() -> None:
    learner = Learner()
    extra, broken = {"value": 0}, list[bool]()

    def load(value: int) -> None:
        if broken.pop():
            raise RuntimeError("not now")
        extra["value"] = value

    learner.governor.register("zz_extra", (lambda: extra["value"], load))
    go(learner, 2)
    good = weights(learner)

    def learn() -> None:
        extra["value"] += 100
        learner.learn()

    learner.faults[3, 1] = scale
    broken.append(True)
    with pytest.raises(RollbackFailed):
        learner.guard.run(learn)
    assert learner.governor._course.unsettled()[1] is not None
    broken[:] = [False]
    assert not learner.guard.run(learner.learn).learnt
    assert (weights(learner), extra["value"]) == (good, 0)
    assert not learner.governor._keeper.driver.state.torn


def weights(learner: Learner) -> list[Any]:
    return [parameter.tolist() for parameter in learner.model.parameters()]


def call(learner: Learner, what: str) -> Any:
    if what == "run":
        return learner.guard.run(learner.learn)
    return learner.guard.snapshot() if what == "snapshot" else learner.guard.reject("bad experience")


def test_moments_whose_panic_could_not_be_answered_are_in_no_snapshot() -> None:
    """No weight shows them, so nothing would keep the next round from beginning with one."""
    learner = Learner()
    go(learner, 2)
    spoil_moments(learner)
    hinder(learner)
    with pytest.raises(SafetyError):
        learner.guard.run(learner.learn)
    assert learner.governor._course.unsettled()[1] is not None
    assert not learner.guard.snapshot()
    assert learner.governor.rollbacks == 1
    assert bool(learner.optimizer.state[learner.model.net[0].weight]["exp_avg"].isfinite().all())
    assert learner.guard.run(learner.learn).learnt


def test_experience_that_could_not_be_rejected_is_rejected_by_the_next_call() -> None:
    learner = Learner()
    go(learner, 2)
    learner.guard.snapshot()
    learner.counter[0] = 77
    hinder(learner)
    with pytest.raises(QuiesceTimeout):
        learner.guard.reject("non-finite observation")
    result = learner.guard.run(learner.learn)
    assert not result.learnt
    assert result.verdict.reason == "non-finite observation"
    assert learner.counter == [2]


def test_without_any_snapshot_nothing_stays_open() -> None:
    learner = Learner()
    with pytest.raises(NoSnapshot):
        learner.guard.reject("non-finite observation")
    assert learner.guard.run(learner.learn).learnt


def test_the_panics_of_a_hopeless_run_end_it() -> None:
    learner = Learner(recovery=Recovery(max_retries=4))
    learner.guard.run(learner.learn)
    before = [parameter.clone() for parameter in learner.model.parameters()]
    learner.faults = {(attempt, 0): scale for attempt in range(2, 99)}
    with pytest.raises(RetryBudgetExceeded, match="5 panics within 1000 rounds"):
        go(learner, 99)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.model.parameters(), strict=True))


def test_watching_touches_nothing() -> None:
    learner = Learner(mode="observe")
    learner.faults[2, 1] = scale
    results = [learner.guard.run(learner.learn) for _ in range(3)]
    assert [result.verdict.health for result in results] == [Health.HEALTHY, Health.PANIC, Health.HEALTHY]
    assert all(result.learnt for result in results)
    assert learner.governor.rollbacks == 0
    assert not learner.guard.snapshot()
    assert not learner.guard.reject("poison").success


def test_disabled_it_only_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOLARIA_DISABLE", "1")
    learner = Learner()
    learner.faults[1, 0] = scale
    assert learner.guard.run(learner.learn).learnt
    assert learner.governor.rollbacks == 0
    assert learner.rounds == 1


def test_several_ranks_are_not_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = Learner()
    learner.guard.run(learner.learn)
    monkeypatch.setattr("tolaria.rounds.world_size", lambda: 2)
    learner.faults[2, 0] = scale
    with pytest.raises(UnsupportedState, match="several ranks"):
        learner.guard.run(learner.learn)
    assert learner.governor.rollbacks == 0
    assert learner.governor._course.unsettled() == (0, None)  # told once


def test_bad_use_is_refused() -> None:
    learner = Learner()
    with pytest.raises(UsageError, match="snapshot_every=0"):
        Rounds(learner.governor, snapshot_every=0)
    with learner.governor.using(), pytest.raises(PhaseError):
        learner.guard.run(learner.learn)
    learner.governor.close()
    with pytest.raises(PhaseError, match="closed"):
        learner.guard.run(learner.learn)


def test_drift_is_the_largest_of_any_tensor() -> None:
    before = [torch.zeros(4), torch.full((4,), 2.0)]
    now = [torch.full((4,), 0.5), torch.full((4,), 3.0)]
    assert float(drift(before, now)) == pytest.approx(1.0)  # 1 / (0 + 1) against 2 / (4 + 1)
    assert float(drift(before, before)) == 0.0
    assert float(drift([], [])) == 0.0
    assert bool(drift(before, [now[0], torch.full((4,), torch.nan)]).isnan())


def test_target_networks_may_jump() -> None:
    learner = Learner()

    def learn() -> None:
        learner.learn()
        for parameter in learner.model.target.parameters():
            parameter.data.add_(1e3)

    assert all(learner.guard.run(learn).learnt for _ in range(3))
    assert learner.governor.rollbacks == 0


def test_what_is_trained_may_change_between_rounds() -> None:
    """An optimizer that gets more to train: what was there before is still judged by how far it has moved."""

    def run(**faults: Any) -> tuple[str, Learner]:
        learner = Learner()
        learner.faults = {(4, 1): faults["fault"]} if faults else {}
        go(learner, 2)
        learner.optimizer.add_param_group({"params": list(learner.model.target.parameters()), "lr": 0.01})
        digest = go(learner, 3)
        learner.governor.close()
        return digest, learner

    clean, _ = run()
    digest, learner = run(fault=scale)
    assert digest == clean
    assert learner.governor.rollbacks == 1


# ------------------------------------------------------------ policies


def spoil(rounds: tuple[int, ...], **recovery: Any) -> tuple[Learner, list[float], list[float]]:
    """Rounds, some bad at both attempts: the learner, the rate at each step, and the step counts of Adam."""
    learner = Learner(recovery=Recovery(**recovery))
    rates: list[float] = []
    counts: list[float] = []
    group = learner.optimizer.param_groups[0]
    learner.optimizer.register_step_pre_hook(lambda *_: rates.append(group["lr"]))
    attempts = 0
    for number in range(6):
        bad = number in rounds
        for attempt in range(attempts + 1, attempts + 3):
            if bad:
                learner.faults[attempt, 0] = scale
        learner.guard.run(learner.learn)
        attempts += 2 if bad else 1
        counts.append(float(next(iter(learner.optimizer.state.values()))["step"]))
    return learner, rates, counts


def test_rounds_that_are_dropped_twice_cool_the_rate_of_those_that_follow() -> None:
    learner, rates, _ = spoil((1, 3), cool_lr=0.5, warm_steps=2)
    assert learner.governor.statistics().troubles_returned == 2
    made = [rate for index, rate in enumerate(rates) if index % STEPS == 0]
    # six rounds, of which two were made twice; after the second was dropped, two rounds warm the rate up again
    assert made == pytest.approx([0.05] * 6 + [0.025, 0.0375])
    assert learner.optimizer.param_groups[0]["lr"] == 0.05
    assert set(spoil((1, 3), cool_lr=1.0)[1]) == {0.05}


def test_a_dropped_round_can_reset_moments() -> None:
    _, _, counts = spoil((2,), moments="reset")
    assert counts == [4, 8, 0, 4, 8, 12]
    assert spoil((2,))[2] == [4, 8, 8, 12, 16, 20]
