"""A gradient that is not finite in a loop of somebody else's, on a device that is late: the device refuses the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_driver.poisoned import FUSED, NAN, PLAIN, freeze, is_finite, poison, stepped, waits

from tolaria import GovernorConfig, observe
from tolaria.follow import FollowingGovernor
from tolaria.judge import non_finite
from tolaria.refusal import Refusals

CONFIG = GovernorConfig(cadence=4, probation=4, keep_batches=64, host_slots=0, scrub_every=0)
KEEPING = GovernorConfig(cadence=100, host_slots=0, scrub_every=0, on_veto="keep")
Step = Callable[[Any, FollowingGovernor, Callable[[], Any]], None]


def before(run: Any, governor: FollowingGovernor, backward: Callable[[], Any]) -> None:
    backward()
    governor.gradients_ready(run.optimizer)
    run.optimizer.step()


def in_closure(run: Any, governor: FollowingGovernor, backward: Callable[[], Any]) -> None:
    """As in Lightning: the optimizer asks for the gradients, and the hook comes between them and the update."""

    def closure() -> Any:
        loss = backward()
        governor.gradients_ready(run.optimizer)
        return loss

    run.optimizer.step(closure)


def in_hook(run: Any, governor: FollowingGovernor, backward: Callable[[], Any]) -> None:
    """As in Accelerate: a hook of the optimizer, behind those that stand there already."""
    backward()
    hook = run.optimizer.register_step_pre_hook(lambda optimizer, *_: governor.gradients_ready(optimizer))
    run.optimizer.step()
    hook.remove()


WAYS = {"before": before, "in closure": in_closure, "in hook": in_hook}


def each(first: str, *more: str, of: Any) -> list[Any]:
    """The first optimizer in every kind of loop, the others in one kind."""
    pairs = [(first, name) for name in WAYS] + [(other, "before") for other in more]
    return [pytest.param(of[name], WAYS[way], id=f"{name}, {way}") for name, way in pairs]


def prepared(make_run: Any, make: Any) -> Any:
    run = make_run(batches=9)
    run.optimizer = make(run.model.parameters())
    run.scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer, 4, gamma=0.7)
    return run


def follow(run: Any, config: GovernorConfig = CONFIG, **parts: Any) -> FollowingGovernor:
    return FollowingGovernor(
        run.model, run.optimizer, scheduler=run.scheduler, config=config, detector=non_finite(), **parts
    )


def train(run: Any, governor: FollowingGovernor, step: Step, poisoned: int, after: Callable[[Any], Any]) -> None:
    """Poison one gradient of the `poisoned`-th delivered step, once; `after` is called right behind that step."""
    for delivered, batch in enumerate(governor.watch(run.batches)):
        written: list[Any] = []
        losses: list[Any] = []

        def backward(
            batch: Any = batch, delivered: int = delivered, losses: Any = losses, written: Any = written
        ) -> Any:
            losses.append(run.backward(batch))
            if delivered == poisoned:
                poison(run)
                written.append(stepped(run))
            return losses[-1]

        step(run, governor, backward)
        if delivered == poisoned:
            after(written[-1])
        run.scheduler.step()
        governor.stepped(loss=losses[-1], is_last=batch[1] is run.batches[-1][1])
        run.optimizer.zero_grad()


def held(run: Any) -> int:
    """Tensors that the optimizer's state has."""
    return sum(value is not None for state in run.optimizer.state.values() for value in state.values())


def clean_state(make_run: Any, make: Any) -> Any:
    clean = prepared(make_run, make)
    clean.plain()
    return clean.state()


@pytest.mark.parametrize(("make", "step"), each("adamw", "momentum", of=FUSED))
def test_nothing_is_left_of_the_step_of_a_fused_optimizer(make: Any, step: Step, late: Any, make_run: Any) -> None:
    late.lag = None
    expected = clean_state(make_run, make)
    run, seen = prepared(make_run, make), []
    with follow(run) as governor:

        def after(was: Any) -> None:
            assert waits(late) == asked
            seen.append(stepped(run) == was)

        governor.begin()
        asked = waits(late)
        train(run, governor, step, 3, after)
        assert seen == [True]
        assert (governor.rollbacks, governor.statistics().vetoes) == (1, 1)
        assert run.state() == expected
    assert not run.optimizer._optimizer_step_pre_hooks
    assert not run.optimizer._optimizer_step_post_hooks
    assert "found_inf" not in vars(run.optimizer)


@pytest.mark.parametrize(("make", "step"), each("foreach", "momentum", "rmsprop", of=PLAIN))
def test_other_optimizers_step_on_zeros(make: Any, step: Step, late: Any, make_run: Any) -> None:
    late.lag = None
    expected = clean_state(make_run, make)
    run, seen = prepared(make_run, make), []
    with follow(run) as governor:
        train(run, governor, step, 3, lambda _: seen.append(is_finite(run.model)))
        assert seen == [True]
        assert (governor.rollbacks, governor.statistics().vetoes) == (1, 1)
        assert run.state() == expected


@pytest.mark.parametrize("make", [FUSED["adamw"], PLAIN["adamw"]], ids=["fused", "plain"])
def test_without_a_decision_it_reaches_the_weights(make: Any, late: Any, make_run: Any, monkeypatch: Any) -> None:
    """Red twin: only the rollback is left."""
    monkeypatch.setattr(Refusals, "decide_late", lambda *_: None)
    run, seen = prepared(make_run, make), []
    with follow(run) as governor:
        train(run, governor, before, 3, lambda _: seen.append(is_finite(run.model)))
        assert seen == [False]
        assert governor.statistics().vetoes == 0
        assert is_finite(run.model)


@pytest.mark.parametrize(("make", "step"), [*each("adamw", of=FUSED), *each("momentum", of=PLAIN)])
def test_a_kept_veto_leaves_nothing_of_the_step(
    make: Any, step: Step, late: Any, make_run: Any, monkeypatch: Any
) -> None:
    """Where the device could not do that, the host waits for the gradients and takes them away."""
    late.lag = None
    if make is FUSED["adamw"]:
        monkeypatch.setattr(observe, "gradient_norm", lambda _: pytest.fail("the host has waited for the gradients"))
    run, seen = prepared(make_run, make), []
    with follow(run, KEEPING) as governor:
        train(run, governor, step, 3, lambda was: seen.append(stepped(run) == was))
        assert seen == [True]
        assert (governor.rollbacks, governor.statistics().vetoes) == (0, 1)
    plain = prepared(make_run, make)
    for number, batch in enumerate(plain.batches):
        plain.backward(batch)
        if number != 3:
            plain.optimizer.step()
        plain.scheduler.step()
        plain.optimizer.zero_grad()
    assert run.state() == plain.state()


def test_the_first_step_of_a_fused_momentum_leaves_no_buffer_unwritten(late: Any, make_run: Any) -> None:
    run, seen = prepared(make_run, FUSED["momentum"]), []
    weights = freeze(list(run.model.parameters()))
    with follow(run) as governor:
        train(run, governor, in_closure, 0, lambda _: seen.append((freeze(list(run.model.parameters())), held(run))))
        assert seen == [(weights, 0)]
    assert run.state() == clean_state(make_run, FUSED["momentum"])


def test_what_a_scaler_had_not_seen_is_refused(late: Any, make_run: Any) -> None:
    """Damage between `unscale_` and the step. What the scaler has found itself is its business, and routine."""
    run = prepared(make_run, FUSED["adamw"])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with follow(run, KEEPING, scaler=scaler) as governor:
        governor.begin()
        for damage in ("none", "unseen", "seen", "none"):
            loss = torch.nn.functional.cross_entropy(run.model(run.batches[0][0]), run.batches[0][1])
            scaler.scale(loss).backward()
            if damage == "seen":
                poison(run, float("inf"))
            scaler.unscale_(run.optimizer)
            if damage == "unseen":
                poison(run)
            before = stepped(run)
            governor.gradients_ready(run.optimizer)
            scaler.step(run.optimizer)
            scaler.update()
            assert (stepped(run) == before) == (damage != "none")
            governor.stepped(loss=loss, is_last=True)
            run.optimizer.zero_grad()
        assert (governor.rollbacks, governor.statistics().vetoes) == (0, 1)
        assert scaler.get_scale() == 2.0
    assert "found_inf" not in vars(run.optimizer)


def test_a_flag_is_for_one_step_of_one_optimizer(late: Any, make_run: Any) -> None:
    """Also where the step that was announced is never made, or raises."""
    run = prepared(make_run, FUSED["adamw"])
    with follow(run) as governor:
        governor.begin()
        loss = run.backward(run.batches[0])
        poison(run)

        def closure() -> Any:
            governor.gradients_ready(run.optimizer)
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            run.optimizer.step(closure)
        assert float(run.optimizer.found_inf) == 1.0
        governor.execute_rollback()
        governor.stepped(loss=loss.detach(), is_last=True)
        assert "found_inf" not in vars(run.optimizer)
        run.optimizer.zero_grad()
        run.backward(run.batches[0])
        was = stepped(run)
        run.optimizer.step()
        assert stepped(run) != was


def test_observing_refuses_nothing(late: Any, make_run: Any) -> None:
    run = prepared(make_run, FUSED["adamw"])
    with follow(run, GovernorConfig(mode="observe")) as governor:
        assert not run.optimizer._optimizer_step_pre_hooks
        train(run, governor, before, 3, lambda _: None)
        assert governor.statistics().vetoes == 0
    assert not is_finite(run.model)


def test_an_optimizer_that_is_not_governed_is_left_alone(late: Any, make_run: Any) -> None:
    run = prepared(make_run, FUSED["adamw"])
    other = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))], fused=True)
    parameter = other.param_groups[0]["params"][0]
    with follow(run) as governor:
        governor.begin()
        parameter.grad = torch.full((3,), NAN)
        governor.gradients_ready(other)
        other.step()
        assert parameter.isnan().all()
        governor.stepped(is_last=True)
        assert governor.statistics().vetoes == 0
