"""How far the ring reaches back, a cadence that follows the clock, scrubbing, and rollbacks that are written into."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

import tolaria.course
from tolaria import BudgetExceeded, GovernorConfig, RollbackDisturbed, TolariaGovernor
from tolaria.operations import Copy, Direction, Op, ReadLive
from tolaria.ring import SlotPhase

Govern = Callable[..., TolariaGovernor]


def train(kit: Any, govern: Govern, steps: int = 0, **config: Any) -> tuple[Any, TolariaGovernor, list[Any]]:
    """A run with the state as it was before each step."""
    run = kit.Run(batches=max(steps, 1) + 60)
    settings = GovernorConfig(**{"cadence": 4, "probation": 2, "scrub_every": 0, **config})
    governor = govern(run.model, run.optimizer, scheduler=run.scheduler, config=settings)
    states = []
    for batch in governor.watch(run.batches[:steps]):
        states.append(run.state())
        run.step(governor, batch)
    return run, governor, states


def held(governor: TolariaGovernor) -> list[int]:
    return sorted(slot.completed for slot in governor._keeper.ring if slot.phase is not SlotPhase.FREE)


# ------------------------------------------------------------ reach


def test_slots_to_spare_reach_back_and_thin_out_with_age(govern: Govern, kit: Any) -> None:
    _, governor, _ = train(kit, govern, 200, host_slots=4, reach=100)
    steps = held(governor)
    assert 200 - steps[0] >= 100
    gaps = [newer - older for older, newer in itertools.pairwise(steps)]
    assert gaps[0] >= 2 * gaps[-1], gaps
    assert 200 - steps[-1] <= 4


def test_without_slots_to_spare_the_newest_are_kept(govern: Govern, kit: Any) -> None:
    _, governor, _ = train(kit, govern, 200, reach=100)
    assert held(governor)[0] >= 200 - 4 * 4


def test_every_one_of_them_comes_back_bit_for_bit(govern: Govern, kit: Any) -> None:
    run, governor, states = train(kit, govern, 90, host_slots=4, reach=60)
    for step in reversed(held(governor)):
        report = governor.execute_rollback(to=step, verify="after")
        assert (report.snapshot_step, report.verified, report.tier) == (step, True, "host")
        assert run.state() == states[step]


def test_a_budget_that_holds_too_little_is_refused_with_the_arithmetic(kit: Any) -> None:
    run = kit.Run()
    with pytest.raises(BudgetExceeded, match=r"3 slots x .* MiB = .* MiB in main memory, where .* MiB host_budget"):
        TolariaGovernor(run.model, run.optimizer, config=GovernorConfig(host_budget=1000))


def test_a_budget_that_optimizer_state_exceeds_keeps_what_is_held(govern: Govern, kit: Any) -> None:
    run = kit.Run()
    num_bytes = sum(-(-t.numel() * t.element_size() // 64) * 64 for t in run.model.state_dict().values())
    config = GovernorConfig(cadence=4, probation=2, slots=3, host_budget=3 * num_bytes + 64)
    governor = govern(run.model, run.optimizer, scheduler=run.scheduler, config=config)
    for batch in governor.watch(run.batches[:10]):
        run.step(governor, batch)
    assert governor.statistics().snapshots_failed == 2
    assert governor.execute_rollback().snapshot_step == 0


# ------------------------------------------------------------ cadence


class Clock:
    """Seconds that pass only when told: each step takes one, each snapshot what the test says."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.mark.parametrize(("cost_s", "expected"), [(0.0001, 2), (0.095, 10), (0.295, 30), (9.0, 50)])
def test_an_automatic_cadence_costs_one_percent(
    cost_s: float, expected: int, govern: Govern, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(tolaria.course, "time", clock)
    run = kit.Run(batches=300)
    config = GovernorConfig(cadence="auto", probation=2, keep_batches=4)
    governor = govern(run.model, run.optimizer, scheduler=run.scheduler, config=config)
    take = governor._keeper.take

    def taking(*args: Any, **kwargs: Any) -> Any:
        clock.now += cost_s
        return take(*args, **kwargs)

    monkeypatch.setattr(governor._keeper, "take", taking)
    taken, before = [], 0
    for number, batch in enumerate(governor.watch(run.batches)):
        if governor.statistics().snapshots > before:
            taken.append(number)
            before = governor.statistics().snapshots
        clock.now += 1.0
        run.step(governor, batch)
    assert governor.capabilities().cadence == expected
    assert not governor.capabilities().cadence_stretched
    assert {newer - older for older, newer in zip(taken[-3:], taken[-2:], strict=False)} == {expected}


# ------------------------------------------------------------ scrubbing


@pytest.mark.parametrize("scrubbed", [True, False])
def test_scrubbing_gives_up_an_idle_snapshot_that_has_changed(
    scrubbed: bool, govern: Govern, kit: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run, governor, _ = train(kit, govern, 30, host_slots=3, reach=30, scrub_every=1 if scrubbed else 0)
    keeper = governor._keeper
    keeper.backlog.finish()
    oldest = min((slot for slot in keeper.ring if slot.is_good), key=lambda slot: slot.snapshot)
    arena = keeper.vault.slots[oldest.index].arena
    assert arena is not None
    arena.flat[torch.device("cpu")][77] ^= 1
    with caplog.at_level(logging.WARNING, logger="tolaria"):
        for batch in run.batches[30:40]:
            run.step(governor, batch)
            keeper.backlog.finish()
    assert governor.statistics().snapshots_corrupted == int(scrubbed)
    assert ("has changed in memory" in caplog.text) == scrubbed
    assert any(slot.snapshot == oldest.snapshot for slot in keeper.ring if slot.is_good) != scrubbed


# ------------------------------------------------------------ rollbacks that somebody writes into


class Stray:
    """Writes a weight without a section, between the copies of a rollback and their reading; so many times."""

    def __init__(self, governor: TolariaGovernor, times: int) -> None:
        self.left = times
        self._driver = governor._keeper.driver
        self._perform = self._driver.perform
        self._weight = next(governor.model.parameters())
        self._driver.perform = self  # type: ignore[method-assign]

    def __call__(self, op: Op, shield: Any = None) -> Any:
        result = self._perform(op, shield)
        if isinstance(op, Copy) and op.direction is Direction.RESTORE and op.part.value == "rest" and self.left:
            self.left -= 1
            with torch.no_grad():
                self._weight.view(-1)[3] += 1.0
        return result


def test_a_disturbed_rollback_is_made_again(govern: Govern, kit: Any) -> None:
    run, governor, states = train(kit, govern, 7)
    Stray(governor, 2)
    report = governor.execute_rollback(verify="after")
    assert (report.snapshot_step, report.verified, report.panic_step, report.steps_lost) == (4, True, 7, 3)
    assert run.state() == states[4]


def test_unless_it_is_read_back_nobody_notices(govern: Govern, kit: Any) -> None:
    """The red twin, and why automatic rollbacks are always read back."""
    run, governor, states = train(kit, govern, 7)
    Stray(governor, 1)
    report = governor.execute_rollback().wait()
    assert report.verified  # of the snapshot itself
    assert run.state() != states[4]


def test_a_reading_that_fails_leaves_the_rollback_unverified_and_says_so(govern: Govern, kit: Any, caplog: Any) -> None:
    run, governor, states = train(kit, govern, 7)
    governor._keeper.driver._table[ReadLive] = fail = mock.Mock(side_effect=MemoryError("no room to read"))
    with caplog.at_level(logging.WARNING, logger="tolaria"):
        report = governor.execute_rollback(verify="after").wait()
    assert (report.success, report.status, report.verified) == (True, "done", None)
    assert run.state() == states[4]
    assert caplog.text.count("could not be read back: MemoryError: no room to read") == 1
    assert fail.call_count == 1


def test_a_writer_that_does_not_stop_ends_it(govern: Govern, kit: Any) -> None:
    run, governor, states = train(kit, govern, 7)
    stray = Stray(governor, 1000)
    with pytest.raises(RollbackDisturbed, match="a writer outside of any section") as caught:
        governor.execute_rollback(verify="after")
    assert not caught.value.state_intact
    stray.left = 0
    assert governor.execute_rollback(verify="after").verified
    assert run.state() == states[4]


def test_an_automatic_rollback_is_read_back_by_itself(govern: Govern, kit: Any) -> None:
    expected = kit.Run(batches=30)
    for batch in expected.batches[:20]:
        expected.plain_step(batch)
    run = kit.Run(batches=30)
    config = GovernorConfig(cadence=4, probation=2)
    governor = govern(run.model, run.optimizer, scheduler=run.scheduler, config=config)
    Stray(governor, 1)
    batches = [*run.batches[:9], kit.nan_batch(run.batches[0]), *run.batches[9:20]]
    for batch in governor.watch(batches):
        run.step(governor, batch)
    assert governor.rollbacks == 2
    assert run.state() == expected.state()


def test_a_slot_that_changes_between_reading_and_copying_is_passed_over(govern: Govern, kit: Any) -> None:
    run, governor, states = train(kit, govern, 11, host_slots=2)
    keeper = governor._keeper
    newest = max((slot for slot in keeper.ring if slot.is_good), key=lambda slot: slot.snapshot)
    arena = keeper.vault.slots[newest.index].arena
    assert arena is not None
    arena.flat[torch.device("cpu")][5] ^= 8
    report = governor.execute_rollback(verify="after")
    assert report.corrupted_steps == (newest.step,)
    assert report.snapshot_step < newest.step
    assert run.state() == states[report.snapshot_step or 0]


def test_statistics_tell_what_is_held_where(govern: Govern, kit: Any) -> None:
    _, governor, _ = train(kit, govern, 40, host_slots=3, reach=30)
    found = governor.statistics()
    assert found.held_on_device == ()
    assert list(found.held_on_host) == held(governor)
    info = governor.snapshot()
    assert info.held == ("host",)
    assert governor.statistics().held_on_host[-1] == info.step
    governor.load_state_dict(governor.state_dict())
    assert governor.statistics().held_on_host[-1] == info.step
