"""Several governed models in one process: what one goes through, the others do not notice."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from tolaria import TolariaGovernor, living
from tolaria.config import GovernorConfig, Recovery
from tolaria.errors import InvalidConfig, PhaseError, UsageError
from tolaria.group import GovernorGroup
from tolaria.state import standing
from tolaria.state.train_state import TrainState

pytestmark = pytest.mark.usefixtures("alone")

STEPS = 40


class Environment:
    """One training with a generator of its own, stepped through its governor."""

    def __init__(self, group: GovernorGroup, number: int, panics: tuple[int, ...] = ()) -> None:
        self.generator = torch.Generator().manual_seed(100 + number)
        torch.manual_seed(number)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.governor = group.add(self.model, self.optimizer, env_id=number, generator=self.generator)
        self.panics = panics

    def run(self) -> str:
        for step in range(STEPS):
            data = torch.randn(16, 4, generator=self.generator)
            loss = (self.model(data) - data.sum(1, keepdim=True)).square().mean()
            if step in self.panics:
                loss = loss * float("nan")
            loss.backward()
            self.governor.step(loss=loss)
        return self.governor.digest()


def together(panics: dict[int, tuple[int, ...]], threaded: bool = False) -> tuple[dict[int, str], list[int]]:
    """Digests of four environments, and the rollbacks of each."""
    with GovernorGroup(GovernorConfig(recovery=Recovery(max_retries=1000))) as group:
        environments = {number: Environment(group, number, panics.get(number, ())) for number in range(4)}
        digests: dict[int, str] = {}

        def run(number: int) -> None:
            digests[number] = environments[number].run()

        if threaded:
            threads = [threading.Thread(target=run, args=(number,)) for number in environments]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        else:
            for number in environments:
                run(number)
        return digests, [statistics.rollbacks for statistics in group.statistics().values()]


@pytest.mark.parametrize("threaded", [False, True], ids=["in turn", "in threads"])
def test_a_panic_in_one_never_changes_the_others(threaded: bool) -> None:
    quiet, none = together({})
    assert none == [0, 0, 0, 0]
    digests, rollbacks = together({1: (15, 25, 35)}, threaded)
    assert rollbacks == [0, 3, 0, 0]
    assert {n: d for n, d in digests.items() if n != 1} == {n: d for n, d in quiet.items() if n != 1}
    assert digests[1] != quiet[1]


def test_with_shared_random_state_it_would() -> None:
    """The red twin: one generator for all, put back by the rollback of one."""

    def run(panics: tuple[int, ...]) -> str:
        with GovernorGroup() as group:
            shared = torch.Generator().manual_seed(1)
            environments = [Environment(group, number) for number in range(2)]
            for environment in environments:
                environment.governor.register("shared", shared)
                environment.generator = shared
            environments[0].panics = panics
            environments[0].run()
            return environments[1].run()

    assert run(()) != run((15,))


def half_way(environment: Environment) -> None:
    """The last step of this environment breaks off amid its writes, so that no later one can be judged for it."""

    def break_off(*_: object) -> None:
        with torch.no_grad():
            environment.model[0].weight.mul_(3.0)
        raise RuntimeError("half-way")

    environment.governor.snapshot()
    environment.optimizer.register_step_pre_hook(break_off)
    with pytest.raises(RuntimeError, match="half-way"):
        environment.run()


def weights_of(environments: list[Environment]) -> list[torch.Tensor]:
    return [environment.model[0].weight.detach().clone() for environment in environments]


def test_leaving_a_group_answers_what_is_left_in_each() -> None:
    with GovernorGroup() as group:
        environments = [Environment(group, number) for number in range(3)]
        for environment in environments:
            environment.run()
        good = weights_of(environments)
        half_way(environments[0])
        half_way(environments[1])
    assert [group[number].rollbacks for number in group] == [1, 1, 0]
    assert all(map(torch.equal, weights_of(environments), good))


def test_an_error_that_leaves_a_group_is_not_followed_by_rollbacks() -> None:
    group = GovernorGroup()
    environment = Environment(group, 0)
    environment.run()
    half_way(environment)
    with pytest.raises(KeyError), group:
        raise KeyError("the user's own")
    assert group[0].rollbacks == 0


def test_one_that_cannot_be_finished_does_not_keep_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot() -> bool:
        raise PhaseError("finishing", "a test", "Go on.")

    group = GovernorGroup()
    environments = [Environment(group, number) for number in range(3)]
    for environment in environments:
        environment.run()
    good = weights_of(environments)
    half_way(environments[0])
    half_way(environments[2])
    monkeypatch.setattr(group[1], "finish", cannot)
    with pytest.raises(PhaseError, match="a test"), group:
        pass
    assert [group[number].rollbacks for number in group] == [1, 0, 1]
    assert all(map(torch.equal, weights_of(environments), good))


def test_global_random_state_is_never_written() -> None:
    with GovernorGroup() as group:
        environment = Environment(group, 0, (15,))
        assert environment.governor.capabilities().rng == "keep"
        before = torch.get_rng_state()
        environment.run()
        assert environment.governor.rollbacks == 1
        assert torch.equal(torch.get_rng_state(), before)


def test_numbers_and_penalties_of_reports_and_incidents(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    with GovernorGroup(GovernorConfig(ledger=str(ledger), penalty=-3.0)) as group:
        environments = [Environment(group, number, (12,) if number == 2 else ()) for number in (2, 5)]
        for environment in environments:
            environment.run()
        report = group.execute_rollback(env_id=5, reason="by hand")
        assert (report.success, report.env_id, report.penalty, report.reason) == (True, 5, -3.0, "by hand")
        assert group[5].execute_rollback(env_id=9).env_id == 9  # who names a number means it
        assert group.rollbacks == 3
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert [(line["env_id"], line["action"]) for line in lines] == [(2, "skip"), (5, "manual"), (9, "manual")]


def test_a_rollback_that_did_not_happen_costs_nothing() -> None:
    with GovernorGroup(GovernorConfig(mode="observe", penalty=-3.0)) as group:
        Environment(group, 0)
        report = group.execute_rollback(env_id=0)
        assert (report.success, report.penalty) == (False, 0.0)


def test_members_come_and_go() -> None:
    with GovernorGroup() as group:
        first, second = nn.Linear(2, 2), nn.Linear(2, 2)
        group.add(first)
        governor = group.add(second)
        assert (list(group), len(group)) == ([0, 1], 2)
        assert group[1] is governor
        assert governor.config.env_id == 1
        group.remove(1)
        assert list(group) == [0]
        group.add(second, env_id=7)
        assert list(group) == [0, 7]
    assert "forward" not in vars(first)
    with pytest.raises(UsageError, match=r"it is not in the group, there are: 0, 7"):
        group[3]


def test_what_cannot_be_kept_apart_is_refused() -> None:
    with GovernorGroup() as group:
        model = nn.Linear(2, 2)
        group.add(model)
        with pytest.raises(UsageError, match="its number is taken"):
            group.add(nn.Linear(2, 2), env_id=0)
        tied = nn.Linear(2, 2)
        tied.weight = model.weight
        with pytest.raises(UsageError, match="trains some of this model's parameters"):
            group.add(tied)
        tied.weight = nn.Parameter(model.weight.detach())
        with pytest.raises(UsageError, match="shares memory with environment 0"):
            group.add(tied)
        assert "forward" not in vars(tied)
        with pytest.raises(UsageError, match="governed already"):
            group.add(model)
        assert list(group) == [0]
    with pytest.raises(InvalidConfig, match="rng='restore'"):
        GovernorGroup(GovernorConfig(rng="restore"))


def test_disabled_members_share_what_they_like(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOLARIA_DISABLE", "1")
    with GovernorGroup() as group:
        model = nn.Linear(2, 2)
        group.add(model)
        group.add(model)
        assert group.rollbacks == 0


@pytest.mark.parametrize("penalty", [float("nan"), float("inf")])
def test_a_penalty_is_a_number(penalty: float) -> None:
    with pytest.raises(InvalidConfig, match="penalty"):
        GovernorConfig(penalty=penalty)


def test_what_others_hold_is_looked_at_between_their_sections() -> None:
    """A survey beside a step meets half a state, and takes notes that are not its own."""
    with GovernorGroup() as group:
        one = group.add(nn.Linear(2, 2))
        with one.using(write=False), pytest.raises(PhaseError):
            group.add(nn.Linear(2, 2))
        assert list(group) == [0]
        group.add(nn.Linear(2, 2))
        one.snapshot()


def test_one_survey_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two would mix what they note of changed host values, and a snapshot hold those of the step before."""
    model = nn.Linear(2, 2)
    state = TrainState(model, [torch.optim.SGD(model.parameters(), lr=0.1)])
    survey = state.survey()
    ask, free = standing.OptimizerImprint.stands, []

    def stands(self: standing.OptimizerImprint) -> bool:
        other = threading.Thread(target=lambda: free.append(state._asking.acquire(blocking=False)))
        other.start()
        other.join()
        return ask(self)

    monkeypatch.setattr(standing.OptimizerImprint, "stands", stands)
    state.survey()
    assert state.check(survey, "testing")
    assert free == [False, False]


def test_governors_are_counted_while_one_is_built() -> None:
    built: list[TolariaGovernor] = []

    class Config:
        @property
        def mode(self) -> str:
            if not built:
                built.append(None)  # type: ignore[arg-type]
                built[0] = TolariaGovernor(nn.Linear(2, 2))
            return "act"

    with GovernorGroup() as group:
        one = group.add(nn.Linear(2, 2))
        real = one.config
        vars(one)["config"] = Config()
        try:
            assert living.rng_policy(GovernorConfig()) == "restore"
        finally:
            vars(one)["config"] = real
        assert living.rng_policy(GovernorConfig()) == "keep"
        built[0].close()
