"""Gradients that began before a rollback are never applied; a write that raised half-way is rolled back."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tolaria import GovernorConfig, Health, PhaseError, StaleGradients, TolariaGovernor
from tolaria.operations import Op, RestoreHost

Govern = Callable[..., TolariaGovernor]


class Shallow:
    """One layer: its backward saves no weight, so nothing but the epoch can tell that a rollback came in between."""

    def __init__(self, kit: Any, optimizer: Callable[..., Any] = torch.optim.AdamW) -> None:
        torch.manual_seed(1)
        self.kit = kit
        self.model = nn.Linear(6, 3)
        self.optimizer = optimizer(self.model.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2)
        self.x = torch.randn(8, 6)

    def loss(self) -> torch.Tensor:
        out: torch.Tensor = self.model(self.x)
        return out.square().mean()

    def state(self) -> Any:
        return self.kit.freeze([self.model.state_dict(), self.optimizer.state_dict()])

    def straddle(self, governor: TolariaGovernor) -> None:
        """A backward during which another thread rolls back."""
        out = self.model(self.x)
        out.register_hook(lambda _: self.kit.Worker(governor.execute_rollback).join() and None)
        out.square().mean().backward()

    def healthy_step(self, governor: TolariaGovernor) -> Any:
        loss = self.loss()
        loss.backward()
        return governor.step(loss=loss)


@pytest.fixture
def run(kit: Any) -> Shallow:
    return Shallow(kit)


def test_a_backward_that_straddles_a_rollback_is_vetoed(govern: Govern, run: Shallow) -> None:
    governor = govern(run.model, run.optimizer)
    run.healthy_step(governor)
    governor.snapshot()
    good = run.state()
    run.healthy_step(governor)

    run.straddle(governor)
    assert all(parameter.grad is not None for parameter in run.model.parameters())
    run.optimizer.step()
    assert run.state() == good
    assert governor.statistics().stale_vetoes == 1
    assert all(parameter.grad is None for parameter in run.model.parameters())

    run.loss().backward()  # the next one is a step like any other
    run.optimizer.step()
    run.optimizer.zero_grad()
    assert run.state() != good
    assert governor.statistics().stale_vetoes == 1


def test_the_step_after_a_veto_equals_an_undisturbed_one(govern: Govern, run: Shallow, kit: Any) -> None:
    twin = Shallow(kit)
    governor = govern(run.model, run.optimizer)
    governor.snapshot()
    run.straddle(governor)
    run.optimizer.step()
    for shallow in (run, twin):
        shallow.loss().backward()
        shallow.optimizer.step()
    assert run.state() == twin.state()


def test_strict_raises_and_applies_nothing(govern: Govern, run: Shallow) -> None:
    governor = govern(run.model, run.optimizer, config=GovernorConfig(strict=True))
    governor.snapshot()
    good = run.state()
    run.straddle(governor)
    with pytest.raises(StaleGradients) as caught:
        run.optimizer.step()
    assert caught.value.state_intact
    assert run.state() == good
    assert not governor._keeper.driver.state.torn
    assert governor.statistics().stale_vetoes == 1
    run.healthy_step(governor)
    assert run.state() != good
    assert governor.statistics().stale_vetoes == 1


def test_a_governed_step_reports_the_veto_and_leaves_the_scheduler(govern: Govern, run: Shallow) -> None:
    governor = govern(run.model, run.optimizer, scheduler=run.scheduler)
    run.healthy_step(governor)
    governor.snapshot()
    good, steps = run.state(), run.scheduler.last_epoch
    run.straddle(governor)
    result = governor.step(loss=1.0)
    assert result.skipped
    assert not result.rolled_back
    assert (run.state(), run.scheduler.last_epoch) == (good, steps)
    assert governor.statistics().stale_vetoes == 1
    assert not run.healthy_step(governor).skipped
    assert run.scheduler.last_epoch == steps + 1


@pytest.mark.parametrize("scaled", [False, True])
def test_what_a_stale_step_tells_is_not_judged(scaled: bool, govern: Govern, run: Shallow) -> None:
    """Its loss and gradients are those of weights that the rollback has mended: they would panic once more."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if scaled else None
    governor = govern(run.model, run.optimizer, scaler=scaler)
    loss = run.loss()
    (loss if scaler is None else scaler.scale(loss)).backward()
    governor.step(loss=loss)
    governor.snapshot()
    good = run.state()
    with torch.no_grad(), governor.using():
        run.model.weight.fill_(float("nan"))
    out = run.model(run.x)
    out.register_hook(lambda _: run.kit.Worker(governor.execute_rollback).join() and None)
    loss = out.square().mean()
    (loss if scaler is None else scaler.scale(loss)).backward()
    result = governor.step(loss=loss, kl=float("nan"), metric=float("nan"))
    assert result.skipped
    assert not result.rolled_back
    assert result.verdict.health is Health.HEALTHY
    assert run.state() == good
    counted = governor.statistics()
    assert (counted.vetoes, counted.panics, counted.rollbacks) == (0, 0, 1)
    assert counted.stale_vetoes == 1
    loss = run.loss()  # the next one is a step like any other
    (loss if scaler is None else scaler.scale(loss)).backward()
    assert not governor.step(loss=loss).skipped
    assert run.state() != good


def test_a_finished_backward_is_dropped_and_vetoes_nothing(govern: Govern, run: Shallow) -> None:
    governor = govern(run.model, run.optimizer)
    governor.snapshot()
    good = run.state()
    run.loss().backward()
    governor.execute_rollback()
    assert all(parameter.grad is None for parameter in run.model.parameters())
    run.optimizer.step()
    assert run.state() == good
    run.healthy_step(governor)
    assert run.state() != good
    assert governor.statistics().stale_vetoes == 0


def test_a_forward_before_and_its_backward_after_are_stale(govern: Govern, run: Shallow) -> None:
    governor = govern(run.model, run.optimizer)
    governor.snapshot()
    good = run.state()
    loss = run.loss()
    governor.execute_rollback()
    loss.backward()
    run.optimizer.step()
    assert run.state() == good
    assert governor.statistics().stale_vetoes == 1


def test_a_graph_that_saved_a_weight_raises(govern: Govern, kit: Any) -> None:
    """The version counter of a restored parameter has moved: autograd refuses by itself."""
    run = kit.Run()
    governor = govern(run.model, run.optimizer)
    governor.snapshot()
    loss = run.loss(run.batches[0])
    governor.execute_rollback()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    run.step(governor, run.batches[1])
    assert governor.statistics().stale_vetoes == 0


@pytest.mark.parametrize("stale_first", [True, False])
def test_one_stale_micro_batch_spoils_the_whole_step(stale_first: bool, govern: Govern, run: Shallow) -> None:
    governor = govern(run.model, run.optimizer)
    governor.snapshot()
    good = run.state()
    old = run.loss()
    governor.execute_rollback()
    for loss in (old, run.loss()) if stale_first else (run.loss(), old):
        loss.backward()
    run.optimizer.step()
    assert run.state() == good
    assert governor.statistics().stale_vetoes == 1


def test_one_backward_over_an_old_and_a_new_graph_is_stale(govern: Govern, run: Shallow) -> None:
    governor = govern(run.model, run.optimizer)
    governor.snapshot()
    good = run.state()
    old = run.loss()
    governor.execute_rollback()
    (run.loss() + old).backward()
    run.optimizer.step()
    assert run.state() == good
    assert governor.statistics().stale_vetoes == 1


def test_a_backward_that_fails_half_way_is_forgotten(govern: Govern, run: Shallow) -> None:
    governor = govern(run.model, run.optimizer)
    governor.snapshot()
    out = run.model(run.x)

    def fail(_: torch.Tensor) -> None:
        raise ArithmeticError("the user's own")

    out.register_hook(fail)
    with pytest.raises(ArithmeticError):
        out.sum().backward()
    governor.execute_rollback()
    good = run.state()
    run.healthy_step(governor)
    assert run.state() != good
    assert governor.statistics().stale_vetoes == 0
    assert governor._keeper.driver.state.running == ()


def test_every_output_carries_its_epoch(govern: Govern, kit: Any) -> None:
    """Tuples, dicts, named tuples and lists: whichever tensor the loss is made of."""

    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> Any:
            y = self.body(x)
            return {"a": (y, [y * 2]), "b": torch.max(y, dim=1), "text": "no tensor"}

    for pick in (lambda o: o["a"][0], lambda o: o["a"][1][0], lambda o: o["b"].values):
        model = Many()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        governor = govern(model, optimizer)
        governor.snapshot()
        good = kit.freeze(model.state_dict())
        out = pick(model(torch.randn(4, 6)))
        governor.execute_rollback()
        out.sum().backward()
        optimizer.step()
        assert kit.freeze(model.state_dict()) == good
        assert governor.statistics().stale_vetoes == 1


def test_an_optimizer_that_steps_inside_backward(govern: Govern, kit: Any) -> None:
    """One optimizer per parameter, stepped by a post-accumulate hook: the step belongs to the pass it runs in."""
    run = Shallow(kit)
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in run.model.parameters()}

    def step(parameter: torch.Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(step)
    governor = govern(run.model, list(optimizers.values()))
    governor.snapshot()
    good = run.state()
    run.straddle(governor)
    assert run.state() == good
    assert governor.statistics().stale_vetoes >= 1
    run.loss().backward()
    assert run.state() != good
    vetoes = governor.statistics().stale_vetoes
    run.loss().backward()
    assert governor.statistics().stale_vetoes == vetoes


def test_a_step_of_another_thread_does_not_launder_a_straddling_backward(govern: Govern, kit: Any) -> None:
    """Thread A is inside backward; thread B rolls back and trains one step; then A's gradients arrive."""
    run = Shallow(kit, torch.optim.SGD)
    governor = govern(run.model, run.optimizer)
    governor.snapshot()
    inside, go_on = kit.Flag(), kit.Flag()

    def slow_backward() -> None:
        out = run.model(run.x)

        def pause(_: torch.Tensor) -> None:
            inside.set()
            go_on.wait()

        out.register_hook(pause)
        out.square().mean().backward()

    slow = kit.Worker(slow_backward)
    inside.wait()
    governor.execute_rollback()
    run.healthy_step(governor)
    after = run.state()
    go_on.set()
    slow.join()
    run.optimizer.step()
    assert run.state() == after
    assert governor.statistics().stale_vetoes == 1


# ------------------------------------------------------------ torn writes


class HalfWay(torch.optim.SGD):
    """Raises after it has written half of the parameters, when told."""

    error: BaseException | None = None
    act: Callable[[], Any] | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        first, *rest = self.param_groups[0]["params"]
        first.sub_(first.grad, alpha=0.1)
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        if self.act is not None:
            self.act()
        for parameter in rest:
            parameter.sub_(parameter.grad, alpha=0.1)


ERRORS = [RuntimeError("boom"), KeyboardInterrupt(), MemoryError()]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_step_that_raised_half_way_is_rolled_back(error: BaseException, govern: Govern, kit: Any) -> None:
    run = Shallow(kit, HalfWay)
    governor = govern(run.model, run.optimizer)
    governor.snapshot()
    good = run.state()
    run.optimizer.error = error  # type: ignore[attr-defined]
    with pytest.raises(type(error)):
        run.healthy_step(governor)
    assert governor._keeper.driver.state.torn
    assert run.state() != good
    run.optimizer.zero_grad()
    result = run.healthy_step(governor)
    assert result.rolled_back
    assert result.verdict.reason == "a write raised half-way"
    assert run.state() == good
    assert not governor._keeper.driver.state.torn
    assert not run.healthy_step(governor).rolled_back


def test_the_last_step_of_the_data_that_raised_half_way_is_rolled_back(govern: Govern, kit: Any) -> None:
    """No later step could be judged torn. It is trained again."""
    run = Shallow(kit, HalfWay)
    governor = govern(run.model, run.optimizer)
    trained = []
    for number in governor.watch([0, 1]):
        run.optimizer.error = RuntimeError("boom") if number == 1 and 1 not in trained else None  # type: ignore[attr-defined]
        trained.append(number)
        with contextlib.suppress(RuntimeError):
            run.healthy_step(governor)
    assert trained == [0, 1, 0, 1]
    assert not governor._keeper.driver.state.torn
    assert governor.statistics().rollbacks == 1


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_write_section_that_raised_is_rolled_back(error: BaseException, govern: Govern, run: Shallow) -> None:
    governor = govern(run.model, run.optimizer)
    governor.snapshot()
    good = run.state()

    def write_and_fail() -> None:
        with governor.using(write=True), torch.no_grad():
            run.model.weight.add_(1.0)
            raise error

    with pytest.raises(type(error)):
        write_and_fail()
    assert run.healthy_step(governor).rolled_back
    assert run.state() == good


def test_an_error_of_ours_in_the_middle_of_a_write_is_torn_too(govern: Govern, kit: Any) -> None:
    """A snapshot asked for inside `optimizer.step` is refused with `PhaseError`; what was written until then stays."""
    run = Shallow(kit, HalfWay)
    governor = govern(run.model, run.optimizer)
    governor.snapshot()
    good = run.state()
    run.optimizer.act = governor.snapshot  # type: ignore[attr-defined]
    with pytest.raises(PhaseError):
        run.healthy_step(governor)
    run.optimizer.act = None  # type: ignore[attr-defined]
    run.optimizer.zero_grad()
    assert run.healthy_step(governor).rolled_back
    assert run.state() == good


def test_a_manual_rollback_mends_a_torn_write(govern: Govern, run: Shallow) -> None:
    governor = govern(run.model, run.optimizer)
    governor.snapshot()
    with pytest.raises(KeyError), governor.using():
        raise KeyError
    governor.execute_rollback()
    assert not run.healthy_step(governor).rolled_back


def test_what_only_reads_may_raise(govern: Govern, run: Shallow) -> None:
    governor = govern(run.model, run.optimizer)
    governor.snapshot()
    with pytest.raises(KeyError), governor.using(write=False):
        raise KeyError
    with pytest.raises(RuntimeError, match="shapes"):
        run.model(torch.zeros(2, 5))
    assert not governor._keeper.driver.state.torn
    assert not run.healthy_step(governor).rolled_back


def test_a_torn_state_is_never_an_automatic_snapshot(govern: Govern, kit: Any) -> None:
    run = Shallow(kit, HalfWay)
    governor = govern(run.model, run.optimizer, config=GovernorConfig(cadence=1, probation=1))
    list(governor.watch([]))  # the first snapshot
    good = run.state()
    run.optimizer.error = RuntimeError("boom")  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="boom"):
        run.healthy_step(governor)
    run.optimizer.zero_grad()
    taken = governor.statistics().snapshots
    assert run.healthy_step(governor).rolled_back
    assert governor.statistics().snapshots == taken
    assert run.state() == good


def test_a_backward_that_ends_after_its_gradients_would_have_been_dropped_is_stale(
    govern: Govern, run: Shallow, kit: Any
) -> None:
    """The rollback has dropped gradients already and has not committed yet. Found by the model checker."""
    governor = govern(run.model, run.optimizer)
    run.healthy_step(governor)
    governor.snapshot()
    good = run.state()
    begun, may_end = threading.Event(), threading.Event()
    out = run.model(run.x)
    out.register_hook(lambda _: begun.set() or (may_end.wait(60) and None))
    backward = kit.Worker(lambda: out.square().mean().backward())
    assert begun.wait(60)

    driver = governor._keeper.driver
    perform = driver.perform

    def meeting(op: Op, shield: Any = None) -> Any:
        result = perform(op, shield)
        if isinstance(op, RestoreHost):
            may_end.set()
            backward.join()
        return result

    driver.perform = meeting  # type: ignore[method-assign]
    governor.execute_rollback()
    assert may_end.is_set()
    assert all(parameter.grad is not None for parameter in run.model.parameters())
    run.optimizer.step()  # refused
    assert run.state() == good
    assert all(parameter.grad is None for parameter in run.model.parameters())
