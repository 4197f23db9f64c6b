"""Members called from other threads while the loop runs: each sees a whole step, and data and counters stay in step."""

from __future__ import annotations

import collections
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tolaria import Detector, GovernorConfig, Health, TolariaGovernor, Verdict, VitalSigns

Govern = Callable[..., TolariaGovernor]


class InTheMiddle:
    """A detector that, at one step, lets another thread do something in the middle of `governor.step`.

    It gives that thread every chance to finish, and goes on if it does not: the right thing is to wait for the step.
    """

    def __init__(self, kit: Any, at: int, act: Callable[[], Any]) -> None:
        self._kit, self._at, self._act = kit, at, act
        self.worker: Any = None
        self.detector: Detector[int] = Detector(lambda: 0, self._update)

    def _update(self, state: int, signs: VitalSigns) -> tuple[int, Verdict]:
        if signs.step == self._at and self.worker is None:
            self.worker = self._kit.Worker(self._act)
            self.worker.give_a_chance()
        return state, Verdict(Health.HEALTHY, signs.step)


def test_a_rollback_in_the_middle_of_a_step_waits_for_its_end(govern: Govern, kit: Any) -> None:
    """Else the step would be counted on top of a state that no longer holds it."""
    run = kit.Run()
    middle = InTheMiddle(kit, 6, lambda: governor.execute_rollback())
    governor = govern(
        run.model,
        run.optimizer,
        scheduler=run.scheduler,
        detector=middle.detector,
        config=GovernorConfig(gate_timeout_s=kit.PATIENCE_S),
    )
    for batch in run.batches[:3]:
        run.step(governor, batch)
    governor.snapshot()
    good = run.state(with_rng=False)
    for batch in run.batches[3:6]:
        run.step(governor, batch)
    report = middle.worker.join()
    assert (report.snapshot_step, report.panic_step, report.steps_lost) == (3, 6, 3)
    assert run.state(with_rng=False) == good
    assert governor.state_dict()["completed"] == 3
    assert run.step(governor, run.batches[6]).verdict.step == 4


def test_a_snapshot_in_the_middle_of_a_step_waits_for_its_end(govern: Govern, kit: Any) -> None:
    """Else it would hold the weights of one step and the count and data position of another."""
    clean = kit.Run()
    for batch in clean.batches[:8]:
        clean.plain_step(batch)
    run = kit.Run()
    middle = InTheMiddle(kit, 4, lambda: governor.snapshot())
    governor = govern(
        run.model,
        run.optimizer,
        scheduler=run.scheduler,
        detector=middle.detector,
        config=GovernorConfig(cadence=100, gate_timeout_s=kit.PATIENCE_S),
    )
    states = []
    for batch in governor.watch(run.batches[:8]):
        run.step(governor, batch)
        if len(states) == 3:
            info = middle.worker.join()
            assert info.step == 4
        states.append(run.state())
    assert run.state() == clean.state()
    governor.execute_rollback(to=info)
    assert governor.state_dict()["completed"] == 4
    assert run.state() == states[3]


class _Interrupted(collections.deque[Any]):
    """A deque in whose iteration another thread is let in, once."""

    act: Callable[[], None] | None = None

    def __iter__(self) -> Iterator[Any]:
        for item in super().__iter__():
            act, self.act = self.act, None
            if act is not None:
                act()
            yield item


def test_a_delivery_in_the_middle_of_a_rewind(govern: Govern, kit: Any) -> None:
    """The batch that another thread asks for meanwhile is neither lost nor mixed up with those that are put back."""
    run = kit.Run()
    governor = govern(run.model, run.optimizer, config=GovernorConfig(cadence=100, rng="keep"))
    feed = iter(governor.watch(range(10)))
    for _ in range(4):
        run.step(governor, run.batches[next(feed)])
    kept = _Interrupted(governor._feed._kept, governor._feed._kept.maxlen)
    governor._feed._kept = kept
    workers: list[Any] = []

    def ask() -> None:
        workers.append(kit.Worker(lambda: next(feed)))
        workers[0].give_a_chance()

    kept.act = ask
    governor.execute_rollback()
    assert workers[0].join() == 4
    assert list(feed) == [5, 6, 7, 8, 9]


def test_rollbacks_of_a_watchdog_while_the_loop_is_fed(govern: Govern, kit: Any) -> None:
    """No schedule is forced: threads are switched as often as Python can. Every batch of the loader comes, in order."""
    run = kit.Run()
    governor = govern(
        run.model, run.optimizer, config=GovernorConfig(gate_timeout_s=kit.PATIENCE_S, keep_batches=500, rng="keep")
    )
    governor.snapshot()
    ended = kit.Flag()

    def watchdog() -> int:
        rollbacks = 0
        while not ended.is_set:
            governor.execute_rollback()
            rollbacks += 1
        return rollbacks

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        worker = kit.Worker(watchdog)
        delivered = list(governor.watch(range(3000)))
        ended.set()
        rollbacks = worker.join()
    finally:
        ended.set()
        sys.setswitchinterval(interval)
    assert delivered == list(range(3000))
    assert governor.statistics().rollbacks == rollbacks
    assert rollbacks > 0


def test_two_loops_at_once(govern: Govern, kit: Any) -> None:
    """Two threads, each with a loader of its own, one governor: every batch is delivered to somebody, once."""
    run = kit.Run()
    governor = govern(run.model, run.optimizer, config=GovernorConfig(rng="keep"))

    def loop(numbers: range) -> list[int]:
        return list(governor.watch(numbers))

    governor.snapshot()
    workers = [kit.Worker(lambda numbers=numbers: loop(numbers)) for numbers in (range(500), range(500, 1000))]
    delivered = [worker.join() for worker in workers]
    assert sorted(delivered[0] + delivered[1]) == list(range(1000))


def test_a_watchdog_rolls_back_while_the_loader_works(govern: Govern, kit: Any) -> None:
    """The loop waits for data; another thread rolls back; the batch that then arrives is trained on as usual."""
    clean, run = kit.Run(), kit.Run()
    asked, go_on = kit.Flag(), kit.Flag()

    def loader() -> Iterator[int]:
        for number in range(6):
            if number == 3:
                asked.set()
                go_on.wait()
            yield number

    governor = govern(run.model, run.optimizer, scheduler=run.scheduler, config=GovernorConfig(rng="restore"))
    torch.manual_seed(8)

    def loop() -> list[int]:
        delivered = []
        for number in governor.watch(loader()):
            delivered.append(number)
            run.step(governor, run.batches[number])
        return delivered

    worker = kit.Worker(loop)
    asked.wait()
    good = governor.execute_rollback()
    assert good.snapshot_step == 0
    go_on.set()
    assert worker.join() == list(range(6))
    assert governor.state_dict()["completed"] == 3
    torch.manual_seed(8)
    for number in (3, 4, 5):
        clean.plain_step(clean.batches[number])
    assert kit.freeze(run.model.state_dict()) == kit.freeze(clean.model.state_dict())


@pytest.mark.parametrize("member", ["capabilities", "statistics", "state_dict", "rollbacks"])
def test_facts_may_be_asked_from_anywhere(member: str, govern: Govern, kit: Any) -> None:
    """Also inside a section, a hook, or while another thread holds the gate."""
    run = kit.Run()
    governor = govern(run.model, run.optimizer)
    hangs, go_on = kit.Flag(), kit.Flag()
    governor.register("slow", (lambda: (hangs.set(), go_on.wait()), lambda saved: None))
    snapshot = kit.Worker(governor.snapshot)
    hangs.wait()

    def ask() -> Any:
        found = getattr(governor, member)
        return found() if callable(found) else found

    ask()
    go_on.set()
    snapshot.join()
    with governor.using():
        ask()
