"""Sections of other threads: snapshot and rollback wait for open ones, new ones queue behind, and nothing deadlocks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tolaria import GovernorConfig, QuiesceTimeout, TolariaGovernor

Govern = Callable[..., TolariaGovernor]

SECTIONS = ["using(write=True)", "using(write=False)", "forward", "optimizer.step", "backward in using"]
OPERATIONS = ["snapshot", "rollback"]


def operate(governor: TolariaGovernor, operation: str) -> Any:
    return governor.snapshot(grads="drop") if operation == "snapshot" else governor.execute_rollback()


class Busy:
    """A thread that stands still inside one section until it is let go."""

    def __init__(self, kit: Any, run: Any, governor: TolariaGovernor, section: str) -> None:
        self.inside, self.leave = kit.Flag(), kit.Flag()
        self._run, self._governor = run, governor
        self._kit = kit
        self.seen: list[Any] = []
        self.thread = kit.Worker(
            {
                "using(write=True)": lambda: self._stand_in(governor.using(write=True)),
                "using(write=False)": lambda: self._stand_in(governor.using(write=False)),
                "forward": self._forward,
                "optimizer.step": self._step,
                "backward in using": self._backward,
            }[section]
        )
        self.inside.wait()

    def _stand(self) -> None:
        self.seen.append(self._run.state(with_rng=False))
        self.inside.set()
        self.leave.wait()
        self.seen.append(self._run.state(with_rng=False))

    def _stand_in(self, section: AbstractContextManager[None]) -> None:
        with section:
            self._stand()

    def _forward(self) -> None:
        hook = self._run.model[0].register_forward_hook(lambda *_: self._stand())
        try:
            self._run.model(self._run.batches[0][0])
        finally:
            hook.remove()

    def _step(self) -> None:
        hook = self._run.optimizer.register_step_pre_hook(lambda *_: self._stand())
        try:
            self._run.optimizer.step()
        finally:
            hook.remove()

    def _backward(self) -> None:
        with self._governor.using(write=False):
            loss = self._run.loss(self._run.batches[0])
            loss.register_hook(lambda _: self._stand())
            loss.backward()

    def finish(self) -> None:
        self.leave.set()
        self.thread.join()


@pytest.fixture
def run(kit: Any) -> Any:
    run = kit.Run()
    run.plain_step(run.batches[0])
    run.optimizer.zero_grad()
    return run


def damage(run: Any) -> None:
    """A write that no section announces."""
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(1.0)


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_waits_for_an_open_section_of_another_thread(
    section: str, operation: str, govern: Govern, run: Any, kit: Any
) -> None:
    governor = govern(run.model, run.optimizer, config=GovernorConfig(gate_timeout_s=kit.PATIENCE_S))
    governor.snapshot()
    gate = kit.Gate(governor)
    busy = Busy(kit, run, governor, section)
    ring = governor._keeper.ring
    submission = kit.Worker(lambda: operate(governor, operation))
    gate.until_blocked(submission)
    assert gate.state.waiting == (submission.ident,)
    assert governor._keeper.ring == ring
    busy.finish()
    done = submission.join()
    assert busy.seen[0] == busy.seen[1]  # the section saw one state, from its beginning to its end
    if operation == "rollback":
        assert done.success
        assert done.wait_ms > 0
        assert done.host_ms >= done.wait_ms
        assert governor.statistics().gate_wait_s > 0
    else:
        assert done.state == "sealed"


@pytest.mark.parametrize("section", ["using(write=True)", "using(write=False)", "forward", "optimizer.step"])
def test_a_new_section_queues_behind_a_waiting_rollback(section: str, govern: Govern, run: Any, kit: Any) -> None:
    governor = govern(run.model, run.optimizer, config=GovernorConfig(gate_timeout_s=kit.PATIENCE_S))
    governor.snapshot()
    good = run.state(with_rng=False)
    damage(run)
    gate = kit.Gate(governor)
    busy = Busy(kit, run, governor, "using(write=False)")
    rollback = kit.Worker(governor.execute_rollback)
    gate.until_blocked(rollback)

    late_inside = kit.Flag()

    def late() -> Any:
        if section.startswith("using"):
            with governor.using(write="True" in section):
                late_inside.set()
                return run.state(with_rng=False)
        owner = run.model[0] if section == "forward" else run.optimizer
        seen: list[Any] = []

        def look(*_: Any) -> None:
            late_inside.set()
            seen.append(run.state(with_rng=False))

        if section == "forward":
            owner.register_forward_pre_hook(look)
            run.model.eval()(run.batches[0][0])
        else:
            owner.register_step_pre_hook(look)
            run.optimizer.step()
        return seen[0]

    follower = kit.Worker(late)
    gate.until_blocked(follower)
    assert not late_inside.is_set
    busy.finish()
    assert rollback.join().success
    assert follower.join() == good  # it came after the rollback, and saw all of it


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_forward_inside_autograd_does_not_queue(reentrant: bool, govern: Govern, run: Any, kit: Any) -> None:
    """Activation checkpointing runs the governed forward again, inside backward, while a rollback waits.

    If it queued, and the section that the rollback waits for were to wait for this backward, nobody would ever go on.
    """
    governor = govern(run.model, run.optimizer, config=GovernorConfig(gate_timeout_s=kit.PATIENCE_S / 2))
    governor.snapshot()
    gate = kit.Gate(governor)
    x = run.batches[0][0].clone().requires_grad_()
    loss = checkpoint(run.model, x, use_reentrant=reentrant).square().sum()
    busy = Busy(kit, run, governor, "using(write=False)")
    rollback = kit.Worker(governor.execute_rollback)
    gate.until_blocked(rollback)

    backward = kit.Worker(loss.backward)
    backward.join()

    assert gate.state.waiting == (rollback.ident,)  # it still waits: the forward passed by it
    busy.finish()
    assert rollback.join().success


def test_checkpointing_trains_like_without(govern: Govern, kit: Any) -> None:
    def train(run: Any, step: Callable[[torch.Tensor], Any]) -> Any:
        for x, y in run.batches[:4]:
            out = checkpoint(run.model, x.clone().requires_grad_(), use_reentrant=False)
            loss = torch.nn.functional.cross_entropy(out, y)
            loss.backward()
            step(loss)
            run.scheduler.step()
        return run.state()

    plain = kit.Run()
    expected = train(plain, lambda _: (plain.optimizer.step(), plain.optimizer.zero_grad()))
    run = kit.Run()
    governor = govern(run.model, run.optimizer)
    assert train(run, lambda loss: governor.step(loss=loss)) == expected
    assert governor.statistics().stale_vetoes == 0


# ------------------------------------------------------------ time-outs


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_time_out_changes_nothing(section: str, operation: str, govern: Govern, run: Any, kit: Any) -> None:
    governor = govern(run.model, run.optimizer, config=GovernorConfig(gate_timeout_s=0.02))
    info = governor.snapshot()
    busy = Busy(kit, run, governor, section)
    before, host = run.state(), governor._keeper.driver.state
    with pytest.raises(QuiesceTimeout, match=str(busy.thread.ident)) as caught:
        operate(governor, operation)
    assert caught.value.state_intact
    assert run.state() == before
    assert governor._keeper.driver.state == host  # not even a place in the queue is left
    assert info.state == "sealed"
    busy.finish()
    operate(governor, operation)


def test_a_section_that_times_out_changes_nothing(govern: Govern, run: Any, kit: Any) -> None:
    """The gate is held by a snapshot that does not end: an extra hangs in its `state_dict`."""
    governor = govern(run.model, run.optimizer, config=GovernorConfig(gate_timeout_s=0.02))
    hangs, go_on = kit.Flag(), kit.Flag()
    governor.register("slow", (lambda: (hangs.set(), go_on.wait()), lambda _: None))
    snapshot = kit.Worker(governor.snapshot)
    hangs.wait()
    with pytest.raises(QuiesceTimeout):
        run.model(run.batches[0][0])
    with pytest.raises(QuiesceTimeout):
        run.optimizer.step()
    with pytest.raises(QuiesceTimeout), governor.using():
        raise AssertionError("never reached")
    state = governor._keeper.driver.state
    assert (state.gate.sections, state.torn) == ((), False)
    go_on.set()
    assert snapshot.join().state == "sealed"


def test_an_interrupt_while_waiting_for_a_section_is_no_torn_write(
    govern: Govern, run: Any, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    governor = govern(run.model, run.optimizer)
    driver = governor._keeper.driver

    def interrupted(*_: Any) -> int:
        raise KeyboardInterrupt

    def use() -> None:
        with governor.using(write=True):
            raise AssertionError("never reached")

    for act in (run.optimizer.step, use):
        with monkeypatch.context() as patch:
            patch.setattr(driver, "open_section", interrupted)
            with pytest.raises(KeyboardInterrupt):
                act()
        assert not driver.state.torn  # nothing was written: the section never opened


# ------------------------------------------------------------ several at once


@pytest.mark.parametrize("operations", [("rollback", "rollback"), ("snapshot", "rollback"), ("snapshot", "snapshot")])
def test_two_submissions_at_once(operations: tuple[str, str], govern: Govern, run: Any, kit: Any) -> None:
    governor = govern(run.model, run.optimizer, config=GovernorConfig(gate_timeout_s=kit.PATIENCE_S, slots=5))
    governor.snapshot()
    good = run.state(with_rng=False)
    gate = kit.Gate(governor)
    busy = Busy(kit, run, governor, "using(write=False)")
    threads = []
    for operation in operations:
        threads.append(kit.Worker(lambda operation=operation: operate(governor, operation)))
        gate.until_blocked(threads[-1])
    assert gate.state.waiting == tuple(thread.ident for thread in threads)
    busy.finish()
    for thread in threads:
        thread.join()
    rollbacks = operations.count("rollback")
    assert governor.statistics().rollbacks == rollbacks
    assert governor._keeper.driver.state.epoch == rollbacks
    assert governor.statistics().snapshots == 1 + operations.count("snapshot")
    assert run.state(with_rng=False) == good


def test_threads_that_train_and_roll_back_all_the_time(govern: Govern, run: Any, kit: Any) -> None:
    """No schedule is forced here; whatever comes, every section sees one state, all old or all restored."""
    governor = govern(run.model, run.optimizer, config=GovernorConfig(gate_timeout_s=kit.PATIENCE_S))
    parameters = list(run.model.parameters())

    def write(value: float) -> None:
        with torch.no_grad():
            for parameter in parameters:
                parameter.fill_(value)

    write(0.0)
    governor.snapshot()
    torn: list[set[float]] = []
    one_at_a_time = threading.Lock()  # between reader and writer; what is tested is the rollback

    def writer() -> None:
        for i in range(150):
            with governor.using(write=True), one_at_a_time:
                write(float(i))

    def reader() -> None:
        for _ in range(150):
            with governor.using(write=False), one_at_a_time:
                seen = {float(value) for parameter in parameters for value in parameter.detach().reshape(-1)[:3]}
            if len(seen) > 1:
                torn.append(seen)

    def roll_back() -> None:
        for _ in range(60):
            governor.execute_rollback()

    for thread in [kit.Worker(work) for work in (writer, reader, reader, roll_back, roll_back)]:
        thread.join()
    assert torn == []
    assert governor.statistics().rollbacks == 120
    assert governor._keeper.driver.state.epoch == 120


# ------------------------------------------------------------ one thread, several sections


def test_sections_nest(govern: Govern, run: Any) -> None:
    governor = govern(run.model, run.optimizer)
    driver = governor._keeper.driver
    with governor.using(write=True):
        with governor.using(write=False):
            assert driver.depth() == 2
            run.backward(run.batches[1])
            run.optimizer.step()
            assert driver.depth() == 2
        assert driver.depth() == 1
        with pytest.raises(KeyError), governor.using(write=False):
            raise KeyError
        assert driver.depth() == 1
    assert driver.depth() == 0
    governor.execute_rollback(to=governor.snapshot())


def test_a_nested_section_does_not_queue_behind_a_waiting_rollback(govern: Govern, run: Any, kit: Any) -> None:
    """It would wait for a rollback that waits for it."""
    governor = govern(run.model, run.optimizer, config=GovernorConfig(gate_timeout_s=kit.PATIENCE_S / 2))
    governor.snapshot()
    gate = kit.Gate(governor)
    with governor.using(write=False):
        rollback = kit.Worker(governor.execute_rollback)
        gate.until_blocked(rollback)
        run.backward(run.batches[1])
        run.optimizer.step()
        assert gate.state.waiting == (rollback.ident,)
    assert rollback.join().success


def test_an_extra_may_use_the_model_while_it_is_captured(govern: Govern, run: Any, kit: Any) -> None:
    """Its sections belong to the thread that holds the gate."""
    governor = govern(run.model, run.optimizer)
    run.model.eval()
    x = run.batches[0][0]
    seen = []
    governor.register("probe", (lambda: run.model(x).detach(), lambda saved: seen.append((saved, run.model(x)))))
    expected = run.model(x).detach().clone()
    governor.snapshot()
    damage(run)
    governor.execute_rollback()
    [(saved, restored)] = seen
    assert torch.equal(saved, expected)
    assert torch.equal(restored, expected)  # the parameters were back before the extra was asked
