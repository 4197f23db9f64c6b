"""A loop that steps the optimizer itself, as a framework's loop does, under `FollowingGovernor`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tolaria import GovernorConfig, Health, SnapshotRejected
from tolaria.follow import FollowingGovernor
from tolaria.judge import non_finite

CONFIG = GovernorConfig(cadence=3, probation=2)


@pytest.fixture
def follow() -> Iterator[Callable[..., FollowingGovernor]]:
    made: list[FollowingGovernor] = []

    def make(run: Any, **kwargs: Any) -> FollowingGovernor:
        kwargs = {"config": CONFIG, "detector": non_finite(), "scheduler": run.scheduler, **kwargs}
        made.append(FollowingGovernor(run.model, run.optimizer, **kwargs))
        return made[-1]

    yield make
    for governor in made:
        governor.close()


def train(run: Any, governor: FollowingGovernor, batches: list[Any], fault: Callable[[int], None] | None = None) -> int:
    """What a framework does: fetch, backward, step, schedule. Answers the number of batches it was given."""
    given = 0
    for given, batch in enumerate(governor.watch(batches), start=1):
        run.optimizer.zero_grad()
        loss = run.backward(batch)
        governor.gradients_ready(run.optimizer)
        run.optimizer.step()
        run.scheduler.step()
        if fault is not None:
            fault(given)
        governor.stepped(loss=loss, is_last=batch[0] is batches[-1][0])
    return given


def undisturbed(kit: Any, count: int = 40, dropped: int = -1) -> Any:
    """The state after a run without a governor; the next `Run` begins with the same random numbers."""
    run = kit.Run(batches=count)
    for index, batch in enumerate(run.batches):
        if index != dropped:
            run.plain_step(batch)
    return run.state()


@pytest.mark.parametrize("bad", [0, 11, 39])
def test_a_bad_batch_is_left_out_as_if_the_data_had_never_held_it(kit: Any, follow: Any, bad: int) -> None:
    clean, run = undisturbed(kit, dropped=bad), kit.Run()
    run.batches[bad] = kit.nan_batch(run.batches[bad])
    governor = follow(run)
    train(run, governor, run.batches)
    assert run.state() == clean
    assert governor.rollbacks == 2  # replayed once, then skipped
    assert governor.statistics().skipped_batches == 1


def test_without_a_rollback_the_same_data_ruin_the_weights(kit: Any, follow: Any) -> None:
    run = kit.Run()
    run.batches[11] = kit.nan_batch(run.batches[11])
    train(run, follow(run, config=GovernorConfig(mode="observe")), run.batches)
    assert not all(bool(torch.isfinite(p).all()) for p in run.model.parameters())


@pytest.mark.parametrize("at", [1, 12, 40])
def test_transient_damage_leaves_no_trace(kit: Any, follow: Any, at: int) -> None:
    clean, run = undisturbed(kit), kit.Run()
    governor = follow(run)
    given = train(run, governor, run.batches, lambda count: run.poison() if count == at else None)
    assert run.state() == clean
    assert governor.rollbacks == 1
    assert given == len(run.batches) + governor.statistics().replayed_batches


def test_damage_that_is_seen_later_is_undone_from_its_onset(kit: Any, follow: Any) -> None:
    clean, run = undisturbed(kit), kit.Run()

    def damage(count: int) -> None:
        if count == 17:
            with torch.no_grad():
                run.model[0].weight.mul_(1.5)

    governor = follow(run, detector=kit.scripted({20: ("panic", 17)}))
    train(run, governor, run.batches, damage)
    assert run.state() == clean
    assert governor.rollbacks == 1


def test_open_suspicion_at_the_end_is_replayed_once_and_then_let_pass(kit: Any, follow: Any) -> None:
    clean, run = undisturbed(kit, count=12), kit.Run(batches=12)
    suspect = {count: "suspect" for count in range(12, 40)}  # also after the replay
    governor = follow(run, detector=kit.scripted(suspect))
    train(run, governor, run.batches)
    assert governor.rollbacks == 1
    assert run.state() == clean


def test_no_rollback_crosses_a_fence(kit: Any, follow: Any) -> None:
    run = kit.Run(batches=20)
    # the panic of the 3rd step after the fence says that the trouble began before it
    governor = follow(run, detector=kit.scripted({23: ("panic", 19)}))
    train(run, governor, run.batches)
    governor.fence()
    fenced = run.state(with_rng=False)
    seen: list[Any] = []

    def look(count: int) -> None:
        if count == 4:  # the first batch again
            seen.append(governor.statistics().steps_lost)

    given = train(run, governor, run.batches[:8], look)
    assert seen == [3]
    assert given == 8 + 3
    assert fenced != run.state(with_rng=False)


def test_without_a_fence_the_same_panic_goes_further_back(kit: Any, follow: Any) -> None:
    run = kit.Run(batches=20)
    governor = follow(run, detector=kit.scripted({23: ("panic", 19)}))
    train(run, governor, run.batches)
    train(run, governor, run.batches[:8])
    assert governor.statistics().steps_lost > 3


def test_a_fence_over_poisoned_weights_goes_back_first(kit: Any, follow: Any) -> None:
    run = kit.Run(batches=12)
    governor = follow(run)
    train(run, governor, run.batches)
    run.poison()
    governor.fence()
    assert governor.rollbacks == 1
    assert all(bool(torch.isfinite(p).all()) for p in run.model.parameters())


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_fence_that_goes_back_leaves_schedule_and_hyperparameters_as_they_are(
    kit: Any, follow: Any, as_tensor: bool
) -> None:
    """The framework has stepped them between two epochs, and will not do it again."""
    run = kit.Run(batches=12)
    [group] = run.optimizer.param_groups
    if as_tensor:
        group["lr"] = torch.tensor(group["lr"])
    governor = follow(run)
    train(run, governor, run.batches)
    run.scheduler.step()
    schedule, rate, held = run.scheduler.last_epoch, float(group["lr"]), group["lr"]
    group["weight_decay"] = 0.25
    run.poison()
    governor.fence()
    assert governor.statistics().steps_lost > 0
    assert (run.scheduler.last_epoch, float(group["lr"]), group["weight_decay"]) == (schedule, rate, 0.25)
    assert group["lr"] is held or not as_tensor
    train(
        run, governor, run.batches[:1], lambda count: run.poison() if count == 1 and governor.rollbacks == 1 else None
    )
    assert governor.rollbacks == 2  # to the fence, which holds them too
    assert (run.scheduler.last_epoch, group["weight_decay"]) == (schedule + 1, 0.25)


def test_a_fence_with_all_slots_in_probation_finds_room(kit: Any, follow: Any) -> None:
    run = kit.Run(batches=9)
    # every other step is suspicious, so that probation never ends
    suspect = {count: "suspect" for count in (2, 4, 6, 8)}
    governor = follow(run, config=GovernorConfig(cadence=1, probation=2), detector=kit.scripted(suspect))
    train(run, governor, run.batches)
    assert governor.statistics().snapshots_deferred > 0
    governor.fence()
    assert governor.execute_rollback().snapshot_step == 9


def test_begin_refuses_a_state_that_is_not_finite(kit: Any, follow: Any) -> None:
    run = kit.Run()
    governor = follow(run)
    run.poison()
    with pytest.raises(SnapshotRejected):
        governor.begin()


def test_begin_is_a_place_to_go_back_to(kit: Any, follow: Any) -> None:
    run = kit.Run()
    governor = follow(run)
    governor.begin()
    before = run.state(with_rng=False)
    run.backward(run.batches[0])
    run.optimizer.step()
    run.poison()
    assert governor.stepped().rolled_back
    assert run.state(with_rng=False) == before


def test_finish_answers_a_panic_that_nobody_has_seen(kit: Any, follow: Any) -> None:
    run = kit.Run(batches=6)
    governor = follow(run)
    train(run, governor, run.batches)
    assert not governor.finish()
    assert governor.is_trusted()
    governor._course._unanswered = governor._course._poisoned(_signs(6), "model.0.weight")
    assert not governor.is_trusted()
    assert governor.finish()
    assert governor.num_again == 0


@pytest.mark.parametrize("trained", [False, True])
def test_finish_looks_at_the_weights_once_more(kit: Any, follow: Any, trained: bool) -> None:
    """Without any step there is nothing to go back to, and it is nobody's damage of ours."""
    run = kit.Run(batches=12)
    governor = follow(run)
    if trained:
        train(run, governor, run.batches)
        assert not governor.finish()
    run.poison()
    schedule = run.scheduler.last_epoch
    assert governor.finish() == trained
    assert all(bool(torch.isfinite(p).all()) for p in run.model.parameters()) == trained
    assert run.scheduler.last_epoch == schedule
    assert not governor.finish()


def _signs(step: int) -> Any:
    from tolaria import VitalSigns

    return VitalSigns(step=step)


class _Seen:
    """Keeps the vital signs that it is asked about."""

    def __init__(self) -> None:
        self.signs: list[Any] = []

    def detector(self) -> Any:
        from tolaria import Detector

        inner = non_finite()

        def update(state: Any, signs: Any) -> Any:
            self.signs.append(signs)
            return inner.update(state, signs)

        return Detector(inner.init, update)


def test_norms_of_several_optimizers_are_one_norm(kit: Any, follow: Any) -> None:
    run, seen = kit.Run(), _Seen()
    first = torch.optim.SGD(run.model[0].parameters(), lr=0.1)
    second = torch.optim.SGD([p for layer in run.model[1:] for p in layer.parameters()], lr=0.1)
    governor = FollowingGovernor(run.model, [first, second], config=CONFIG, detector=seen.detector())
    governor.begin()
    run.backward(run.batches[0])
    whole = math.sqrt(sum(float(p.grad.double().square().sum()) for p in run.model.parameters()))
    governor.gradients_ready(first)
    governor.gradients_ready(second)
    governor.stepped(loss=1.0)
    governor.stepped(loss=1.0)
    governor.close()
    assert seen.signs[0].grad_norm == pytest.approx(whole, rel=1e-5)
    assert seen.signs[1].grad_norm is None  # they belong to one step


def test_a_bad_gradient_in_any_evaluation_of_one_step_counts(kit: Any, follow: Any) -> None:
    run, seen = kit.Run(), _Seen()
    governor = follow(run, detector=seen.detector())
    governor.begin()
    run.backward(kit.nan_batch(run.batches[0]))
    governor.gradients_ready(run.optimizer)
    run.optimizer.zero_grad()
    governor.gradients_ready(run.optimizer)  # a closure that is evaluated again
    assert governor.stepped().rolled_back
    assert seen.signs[0].nonfinite_gradients > 0


@pytest.mark.parametrize("unscaled", [True, False])
def test_gradients_are_judged_without_the_scale(kit: Any, follow: Any, unscaled: bool) -> None:
    run, seen = kit.Run(), _Seen()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    governor = follow(run, scaler=scaler, detector=seen.detector())
    governor.begin()
    scaler.scale(run.loss(run.batches[0])).backward()
    if unscaled:
        scaler.unscale_(run.optimizer)
    governor.gradients_ready(run.optimizer)
    plain = kit.Run()
    plain.backward(plain.batches[0])
    expected = math.sqrt(sum(float(p.grad.double().square().sum()) for p in plain.model.parameters()))
    governor.stepped()
    assert seen.signs[0].grad_norm == pytest.approx(expected, rel=1e-5)


def test_gradients_are_judged_without_the_scale_of_each_optimizer(kit: Any) -> None:
    """A loop unscales and steps one optimizer after the other."""
    run = kit.Run()
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.0) for layer in run.model if list(layer.parameters())]
    assert len(optimizers) > 1
    scaler, seen = torch.amp.GradScaler("cpu", init_scale=1024.0), _Seen()
    governor = FollowingGovernor(run.model, optimizers, scaler=scaler, detector=seen.detector())
    governor.begin()
    scaler.scale(run.loss(run.batches[0])).backward()
    for optimizer in optimizers:
        governor.gradients_ready(optimizer)
        scaler.step(optimizer)
    governor.stepped()
    governor.close()
    plain = kit.Run()
    plain.backward(plain.batches[0])
    expected = math.sqrt(sum(float(p.grad.double().square().sum()) for p in plain.model.parameters()))
    assert seen.signs[0].grad_norm == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("unscaled", [[], [0], [1], [0, 1]])
def test_all_gradients_at_once_are_judged_without_the_scale_of_each_optimizer(kit: Any, unscaled: list[int]) -> None:
    """Whoever names no optimizer means all of them, of which some may have been unscaled already."""
    run = kit.Run()
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.0) for layer in run.model if list(layer.parameters())]
    scaler, seen = torch.amp.GradScaler("cpu", init_scale=1024.0), _Seen()
    governor = FollowingGovernor(run.model, optimizers, scaler=scaler, detector=seen.detector())
    governor.begin()
    scaler.scale(run.loss(run.batches[0])).backward()
    for number in unscaled:
        scaler.unscale_(optimizers[number])
    governor.gradients_ready()
    governor.stepped()
    governor.close()
    plain = kit.Run()
    plain.backward(plain.batches[0])
    expected = math.sqrt(sum(float(p.grad.double().square().sum()) for p in plain.model.parameters()))
    assert seen.signs[0].grad_norm == pytest.approx(expected, rel=1e-5)


def test_an_overflow_that_the_scaler_skips_is_no_incident(kit: Any, follow: Any) -> None:
    run = kit.Run()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    governor = follow(run, scaler=scaler)
    governor.begin()
    scaler.scale(run.loss(run.batches[0])).backward()
    run.model[0].weight.grad.fill_(math.inf)
    scaler.unscale_(run.optimizer)
    governor.gradients_ready(run.optimizer)
    scaler.step(run.optimizer)
    scaler.update()
    result = governor.stepped(loss=1.0)
    assert result.skipped
    assert result.verdict.health is Health.HEALTHY
    # without a scaler the same gradients are one
    bare = kit.Run()
    governor.close()
    other = follow(bare)
    other.begin()
    bare.backward(bare.batches[0])
    bare.model[0].weight.grad.fill_(math.inf)
    other.gradients_ready(bare.optimizer)
    assert other.stepped(loss=1.0).rolled_back


def test_observing_touches_nothing(kit: Any, follow: Any) -> None:
    clean, run = undisturbed(kit), kit.Run()
    governor = follow(run, config=GovernorConfig(mode="observe"), detector=kit.scripted({9: ("panic", 9)}))
    governor.begin()
    train(run, governor, run.batches)
    governor.fence()
    governor.finish()
    assert run.state() == clean
    assert governor.statistics().panics == 1
    assert governor.rollbacks == 0


def test_disabled_it_is_not_there(kit: Any, follow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOLARIA_DISABLE", "1")
    run = kit.Run(batches=4)
    run.batches[1] = kit.nan_batch(run.batches[1])
    governor = follow(run)
    governor.begin()
    train(run, governor, run.batches)
    governor.fence()
    assert governor.num_again == 0
    assert not governor.finish()
    assert governor.is_trusted()


@pytest.mark.parametrize("keeps", [False, True])
def test_a_bad_gradient_never_reaches_the_weights(kit: Any, follow: Any, keeps: bool) -> None:
    """Kept, the step is as if it had been left out; else it is made again, here with a gradient that is good."""
    run, finite = kit.Run(), []
    config = GovernorConfig(cadence=3, probation=2, on_veto="keep" if keeps else "rollback")
    governor = follow(run, config=config)
    for given, batch in enumerate(governor.watch(run.batches)):
        loss = run.backward(batch)
        if given == 7:
            run.model[0].weight.grad[0, 0] = float("nan")
        governor.gradients_ready(run.optimizer)
        run.optimizer.step()
        finite.append(all(bool(p.isfinite().all()) for p in run.model.parameters()))
        run.scheduler.step()
        run.optimizer.zero_grad()
        governor.stepped(loss=loss)
    assert all(finite)
    assert (governor.rollbacks, governor.statistics().vetoes) == (int(not keeps), 1)
    plain = kit.Run()
    for given, batch in enumerate(plain.batches):
        plain.optimizer.zero_grad()
        plain.backward(batch)
        if given != 7 or not keeps:
            plain.optimizer.step()
        plain.scheduler.step()
    assert run.state() == plain.state()


def test_a_captured_gradient_is_taken_away_where_it_is(kit: Any, follow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay writes to that memory again, so the parameter keeps it."""
    run = kit.Run()
    governor = follow(run)
    monkeypatch.setattr(governor._keeper.state, "is_static", lambda grad: grad is held)
    governor.begin()
    run.backward(run.batches[0])
    held = run.model[0].weight.grad
    held[0, 0] = float("inf")
    governor.gradients_ready(run.optimizer)
    assert run.model[0].weight.grad is held
    assert not held.any()
    assert run.model[4].weight.grad is None
