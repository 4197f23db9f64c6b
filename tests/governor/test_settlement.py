"""What is left open when the data ends, or the governor is let go of."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tolaria import (
    Detector,
    GovernorConfig,
    Health,
    Incident,
    PhaseError,
    QuiesceTimeout,
    TolariaGovernor,
    Verdict,
    VitalSigns,
)
from tolaria.settlement import STILL_OPEN

Govern = Callable[..., TolariaGovernor]

LIMIT = 50.0  # the loss of a healthy step is far below


def slow(patience: int = 4) -> Detector[tuple[int, int]]:
    """Suspects a loss above the limit, and panics at the `patience`-th in a row."""

    def update(state: tuple[int, int], signs: VitalSigns) -> tuple[tuple[int, int], Verdict]:
        onset, length = state
        if signs.loss is None or signs.loss <= LIMIT:
            return (0, 0), Verdict(Health.HEALTHY, signs.step)
        onset, length = (onset if length else signs.step), length + 1
        health = Health.PANIC if length == patience else Health.SUSPECT
        return (onset, length), Verdict(health, signs.step, "high loss", onset)

    return Detector(lambda: (0, 0), update)


class End:
    """A governed run; `hurt` maps a batch to the visits (from 1) before which a weight is made huge."""

    def __init__(self, kit: Any, govern: Govern, hurt: dict[int, set[int]] | None = None, **settings: Any) -> None:
        self.kit, self.run, self.hurt = kit, kit.Run(batches=30), hurt or {}
        self.incidents: list[Incident] = []
        self.steps: list[int] = []
        self.visits: dict[int, int] = {}
        self.governor = govern(
            self.run.model,
            self.run.optimizer,
            scheduler=self.run.scheduler,
            config=GovernorConfig(
                **{"cadence": 5, "probation": 5, "rng": "restore", **settings}, on_incident=self.incidents.append
            ),
            detector=slow(),
        )
        torch.manual_seed(11)

    def train(self, batches: range = range(30)) -> End:
        for number in self.governor.watch(batches):
            self.step(number)
        return self

    def step(self, number: int) -> None:
        self.now = number
        self.visits[number] = self.visits.get(number, 0) + 1
        if self.visits[number] in self.hurt.get(number, ()):
            with torch.no_grad():
                self.run.model[4].bias[0] = 1e4
        self.steps.append(self.run.step(self.governor, self.run.batches[number]).step)

    @property
    def told(self) -> list[tuple[str, int | None, str]]:
        return [(incident.reason, incident.restored_step, incident.action) for incident in self.incidents]


def undisturbed(kit: Any, batches: Any = range(30)) -> Any:
    run = kit.Run(batches=30)
    torch.manual_seed(11)
    for number in batches:
        run.plain_step(run.batches[number])
    return run.state()


OPEN = f"high loss, {STILL_OPEN}"


# ------------------------------------------------------------ a suspicion at the end


@pytest.mark.parametrize("at", [27, 28, 29])
def test_transient_damage_in_the_last_steps_is_undone(at: int, govern: Govern, kit: Any) -> None:
    """Too few steps follow for a panic. Their replay, from the last good snapshot, is healthy."""
    end = End(kit, govern, {at: {1}}).train()
    assert end.told == [(OPEN, 20, "replay")]
    assert end.steps == [*range(1, 31), *range(21, 31)]
    assert end.run.state() == undisturbed(kit)
    found = end.governor.statistics()
    assert (found.panics, found.rollbacks, found.troubles) == (0, 1, 0)


def test_damage_that_the_newest_snapshot_holds_is_undone_too(govern: Govern, kit: Any) -> None:
    """The weight turns huge behind the last step before a snapshot. Nothing shows until later."""
    end = End(kit, govern)
    for number in end.governor.watch(range(28)):
        end.step(number)
        if end.steps == list(range(1, 26)):
            end.run.model[4].bias.data[0] = 1e4
    assert end.told == [(OPEN, 20, "replay")]
    assert end.run.state() == undisturbed(kit, range(28))


def test_a_suspicion_that_returns_passes_and_is_told(
    govern: Govern, kit: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """No panic was there before it: most are benign, as an odd batch at the end is."""
    end = End(kit, govern, {29: {1, 2, 3}})
    with caplog.at_level(logging.WARNING, "tolaria"):
        end.train()
    assert end.told == [(OPEN, 20, "replay")]
    assert end.steps == [*range(1, 31), *range(21, 31)]
    assert f"step 30: {OPEN} (since step 30); the state is kept" in caplog.text
    assert end.governor.statistics().skipped_batches == 0


def test_a_suspicion_that_returns_after_a_panic_is_lasting(govern: Govern, kit: Any) -> None:
    """A first flip panics; a second one comes in the replay, too late for a panic, and comes again."""
    end = End(kit, govern, {26: {1}, 28: {2, 3}}).train()
    assert end.told == [("high loss", 20, "replay"), (OPEN, 20, "replay"), (OPEN, 20, "skip")]
    assert end.run.state() == undisturbed(kit, range(28))
    assert end.governor.statistics().panics == 2


def test_the_end_of_each_pass_is_looked_at(govern: Govern, kit: Any) -> None:
    end = End(kit, govern, {14: {1}, 29: {1}})
    end.train(range(15)).train(range(15, 30))
    assert end.told == [(OPEN, 5, "replay"), (OPEN, 20, "replay")]
    assert end.run.state() == undisturbed(kit)


def test_what_lies_before_the_pass_is_not_repeated(govern: Govern, kit: Any) -> None:
    """What the user does between two passes would be left out."""
    end = End(kit, govern, {11: {1}})
    for first in range(0, 12, 3):
        end.train(range(first, first + 3))
    assert end.told == []
    assert end.steps == list(range(1, 13))


@pytest.mark.parametrize(
    ("settings", "change"),
    [({"keep_batches": 4}, False), ({"mode": "observe"}, False), ({}, True)],
    ids=["not kept", "observe", "changed"],
)
def test_nothing_is_lost_for_a_suspicion(
    settings: dict[str, Any], change: bool, govern: Govern, kit: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A replay that would become a skip is not made."""
    end = End(kit, govern, {29: {1}}, **settings)
    with caplog.at_level(logging.WARNING, "tolaria"):
        for number, inputs in end.governor.watch([(number, torch.zeros(1)) for number in range(30)]):
            end.step(number)
            if change:
                inputs.add_(1)
    assert end.told == []
    assert end.steps == list(range(1, 31))
    assert ("the state is kept" in caplog.text) == (end.governor.config.mode == "act")


def test_a_rollback_that_is_refused_leaves_the_suspicion(
    govern: Govern, kit: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tolaria import QuiesceTimeout

    end = End(kit, govern, {29: {1}})

    def refuse(*_: Any, **__: Any) -> Any:
        raise QuiesceTimeout("rolling back", "a section stays open", "Wait.")

    monkeypatch.setattr(end.governor._keeper, "restore", refuse)
    with caplog.at_level(logging.WARNING, "tolaria"):
        end.train()
    assert end.steps == list(range(1, 31))
    assert "not run again: " in caplog.text


def test_with_steps_run_twice_both_executions_may_be_hurt(govern: Govern, kit: Any) -> None:
    """They agree, as the same bit flips in both; the third one does not."""
    end = End(kit, govern, {28: {1, 2}}, reexecute_every=1).train()
    assert end.told == [(OPEN, 20, "replay")]
    assert end.run.state() == undisturbed(kit)


def test_a_healthy_end_is_left_alone(govern: Govern, kit: Any) -> None:
    end = End(kit, govern).train()
    assert end.told == []
    assert end.steps == list(range(1, 31))


# ------------------------------------------------------------ a panic whose steps took no batch


@pytest.mark.parametrize("times", [1, 2])
def test_a_step_that_breaks_off_at_the_end_is_blamed_on_its_own_batch(times: int, govern: Govern, kit: Any) -> None:
    """It was never accounted. Transient: replayed; else the batch that was open is left out, and no other."""
    end, broken = End(kit, govern), []

    def break_off(*_: Any) -> None:
        if end.now == 29 and end.visits[29] <= times:
            broken.append(end.visits[29])
            end.run.model[4].bias.data.mul_(3.0)
            raise RuntimeError("half-way")

    end.run.optimizer.register_step_pre_hook(break_off)
    for number in end.governor.watch(range(30)):
        try:
            end.step(number)
        except RuntimeError:
            end.run.optimizer.zero_grad()
    assert broken == list(range(1, times + 1))
    assert [action for _, _, action in end.told] == ["replay", "skip"][:times]
    assert end.run.state() == undisturbed(kit, range(31 - times))


# ------------------------------------------------------------ leaving


def test_leaving_the_with_block_finishes(govern: Govern, kit: Any) -> None:
    run = kit.Run()
    governor = govern(run.model, run.optimizer, config=GovernorConfig(cadence=2, probation=1))
    with governor:
        for number, batch in enumerate(governor.watch(run.batches)):
            run.step(governor, batch)
            if number == 5:
                break
        before = run.state(with_rng=False)
        run.poison()
        governor._course._unanswered = governor._course._poisoned(VitalSigns(step=6), "0.weight")
    assert governor.rollbacks == 1
    assert run.state(with_rng=False) != before
    assert all(bool(torch.isfinite(p).all()) for p in run.model.parameters())


def test_an_error_that_leaves_it_is_not_followed_by_a_rollback(
    govern: Govern, kit: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run = kit.Run()
    governor = govern(run.model, run.optimizer)
    run.step(governor, run.batches[0])
    before = run.state(with_rng=False)
    governor._course._unanswered = governor._course._poisoned(VitalSigns(step=1), "0.weight")
    with caplog.at_level(logging.WARNING, "tolaria"), pytest.raises(KeyError), governor:
        raise KeyError("the user's own")
    assert run.state(with_rng=False) == before
    assert governor.rollbacks == 0
    assert "closed with a panic that was not answered (step 1: non-finite train state)" in caplog.text


def test_finish_reports_what_it_did(govern: Govern, kit: Any) -> None:
    end = End(kit, govern)
    for number in end.governor.watch(range(30)):
        end.step(number)
        if number == 12:
            break
    assert not end.governor.finish()
    end.governor._course._unanswered = end.governor._course._poisoned(VitalSigns(step=13), "4.bias")
    assert end.governor.finish()
    assert end.told == [("non-finite train state", 5, "skip")]
    assert not end.governor.finish()
    end.governor.close()
    assert not end.governor.finish()


@pytest.mark.parametrize("error", [QuiesceTimeout, PhaseError])
def test_a_panic_that_finish_could_not_answer_stays_open(error: type[Exception], govern: Govern, kit: Any) -> None:
    end = End(kit, govern)
    for number in end.governor.watch(range(30)):
        end.step(number)
        if number == 12:
            break
    course, keeper = end.governor._course, end.governor._keeper
    course._unanswered = course._poisoned(VitalSigns(step=13), "4.bias")
    with refusing(keeper, error), pytest.raises(error):
        end.governor.finish()
    assert end.governor.finish()
    assert end.told == [("non-finite train state", 5, "skip")]


@pytest.mark.parametrize("error", [QuiesceTimeout, PhaseError])
def test_so_does_one_that_no_step_could_answer(error: type[Exception], govern: Govern, kit: Any) -> None:
    end = End(kit, govern)
    governor, run = end.governor, end.run
    run.train(governor, run.batches[:12])
    course = governor._course
    course._unanswered = course._poisoned(VitalSigns(step=12), "4.bias")
    before = course.recovery
    loss = run.backward(run.batches[12])
    with refusing(governor._keeper, error), pytest.raises(error):
        governor.step(loss=loss)
    assert course.recovery == before
    result = run.step(governor, run.batches[13])
    assert result.rolled_back
    assert [reason for reason, *_ in end.told] == ["non-finite train state"]


@contextlib.contextmanager
def refusing(keeper: Any, error: type[Exception]) -> Iterator[None]:
    """Rollbacks come to nothing, as beside a section that stays open, or from inside of one."""

    def refuse(*_: Any, **__: Any) -> None:
        raise error("rolling back", "a section is open", "Close it.")

    keeper.restore = refuse
    try:
        yield
    finally:
        del keeper.restore


class Anew:
    """Numbers from 0 on, and from 0 on again when it is asked after its end, as no iterator ought to."""

    def __init__(self, end: int) -> None:
        self.end, self.next = end, 0

    def __iter__(self) -> Anew:
        return self

    def __next__(self) -> int:
        if self.next == self.end:
            self.next = 0
            raise StopIteration
        self.next += 1
        return self.next - 1


def test_a_loader_that_has_ended_is_not_asked_again(govern: Govern, kit: Any) -> None:
    """The steps that are looked at once more at the end are not followed by a second epoch."""
    end = End(kit, govern, {28: {1}}, keep_batches=40)
    for number in end.governor.watch(Anew(30)):
        end.step(number)
    assert end.visits[28] == 2
    assert end.visits[0] == 1
    assert end.run.state() == undisturbed(kit, range(30))
