"""Signs around a step: several losses, the caller's own norm, update ratios, parameter groups."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tolaria import Detector, GovernorConfig, Health, TolariaGovernor, Verdict, VitalSigns, update_ratio_jump
from tolaria.follow import FollowingGovernor
from tolaria.judge import any_of, non_finite

Govern = Callable[..., TolariaGovernor]


def recorder(seen: list[VitalSigns]) -> Detector[int]:
    """Notes every sign, and finds everything healthy."""

    def update(state: int, signs: VitalSigns) -> tuple[int, Verdict]:
        seen.append(signs)
        return state, Verdict(Health.HEALTHY, signs.step)

    return Detector(lambda: 0, update)


def groups_of(run: Any, **named: Any) -> list[dict[str, Any]]:
    return [
        {"params": list(run.model[0].parameters()), "name": "first"}
        if named
        else {"params": run.model[0].parameters()},
        {"params": [*run.model[1].parameters(), *run.model[4].parameters()]},
    ]


def norm(tensors: Any) -> float:
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors))


def test_several_losses_by_name(govern: Govern, kit: Any) -> None:
    run, seen = kit.Run(), []
    governor = govern(run.model, run.optimizer, detector=recorder(seen))
    first = run.backward(run.batches[0])
    governor.step(loss={"policy": first, "value": 0.5, "entropy": torch.tensor([1.0, 2.0])}, kl=torch.tensor(3))
    expected = (float(first.detach()) + 0.5 + 1.5) / 3
    assert seen[0].loss == pytest.approx(expected, rel=1e-6)
    assert seen[0].extra == {"loss/policy": float(first.detach()), "loss/value": 0.5, "loss/entropy": 1.5, "kl": 3.0}
    run.backward(run.batches[1])
    governor.observe(loss={"a": 1.0, "b": math.inf})
    assert seen[1].loss == math.inf
    assert seen[1].extra == {"loss/a": 1.0, "loss/b": math.inf}


def test_one_loss_of_several_that_is_not_finite_panics(govern: Govern, kit: Any) -> None:
    run = kit.Run()
    governor = govern(run.model, run.optimizer)
    run.backward(run.batches[0])
    result = governor.step(loss={"policy": 1.0, "value": torch.tensor(math.nan)})
    assert (result.verdict.reason, result.rolled_back) == ("non-finite loss", True)


def test_the_callers_own_norm_is_judged(govern: Govern, kit: Any) -> None:
    """Clipped by the caller: the norm from before that is the sign."""
    run, seen = kit.Run(), []
    governor = govern(run.model, run.optimizer, detector=recorder(seen))
    loss = run.backward(run.batches[0])
    before = torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e-3)
    governor.step(loss=loss, grad_norm=before)
    assert seen[0].grad_norm == float(before) > 1e-2
    assert "grad_norm" not in seen[0].extra
    run.backward(run.batches[1])
    governor.observe(loss=1.0, grad_norm=7.5)
    assert seen[1].grad_norm == 7.5


def test_a_norm_that_was_handed_in_is_not_taken_again(
    govern: Govern, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tolaria import observe

    run, seen, taken = kit.Run(), [], []
    governor = govern(run.model, run.optimizer, detector=recorder(seen))
    run.backward(run.batches[0])
    original = observe.gradient_norm
    monkeypatch.setattr(observe, "gradient_norm", lambda grads: taken.append(1) or original(grads))
    governor.observe(loss=1.0, grad_norm=torch.tensor(2.0))
    assert (taken, seen[0].grad_norm) == ([], 2.0)
    governor.observe(loss=1.0)
    assert taken == [1]


def test_a_handed_in_norm_that_is_not_finite_panics(govern: Govern, kit: Any) -> None:
    run = kit.Run()
    governor = govern(run.model, run.optimizer)
    governor.snapshot()
    assert governor.check_vital_signs(1.0, grad_norm=torch.tensor(math.inf))


def test_weights_are_looked_at_as_often_as_configured_by_observe_too(govern: Govern, kit: Any) -> None:
    run, seen = kit.Run(), []
    governor = govern(run.model, run.optimizer, detector=recorder(seen), config=GovernorConfig(check_weights_every=3))
    for _ in range(6):
        governor.observe(loss=1.0)
    assert [signs.nonfinite_weights for signs in seen] == [None, None, 0, None, None, 0]


# ------------------------------------------------------------ update ratio and groups


@pytest.mark.parametrize("by_watching", [False, True], ids=["step", "observe"])
def test_a_flipped_exponent_panics_in_its_own_step(by_watching: bool, govern: Govern, kit: Any) -> None:
    """In a weight that no later loss may ask for: a negative logit of 1e37 is as good as none."""
    run = kit.Run()
    governor = govern(run.model, run.optimizer, scheduler=run.scheduler, config=GovernorConfig(cadence=5, probation=5))
    for number, batch in enumerate(governor.watch(run.batches[:20])):
        loss = run.backward(batch)
        if number == 12 and governor.rollbacks == 0:
            run.model[4].weight.data.view(torch.int32)[0, 0] ^= 1 << 30
            assert bool(torch.isfinite(run.model[4].weight).all())
            if by_watching:
                assert governor.check_vital_signs(loss)
                return
        verdict = governor.step(loss=loss).verdict
        assert verdict.is_panic == (number == 12 and governor.rollbacks == 1 and verdict.step == 13)
    assert not by_watching
    assert governor.rollbacks == 1
    clean = kit.Run()
    for batch in clean.batches[:20]:
        clean.plain_step(batch)
    assert run.state() == clean.state()


def test_the_update_ratio_is_what_the_step_has_moved(govern: Govern, kit: Any) -> None:
    run, seen = kit.Run(), []
    governor = govern(run.model, run.optimizer, detector=recorder(seen), config=GovernorConfig(update_ratio_every=2))
    expected = []
    for batch in run.batches[:6]:
        before = [p.detach().clone() for p in run.model.parameters()]
        run.step(governor, batch)
        moved = norm(p.detach() - b for p, b in zip(run.model.parameters(), before, strict=True))
        expected.append(moved / norm(before))
    assert [set(signs.extra) for signs in seen] == [set(), {"update_ratio"}] * 3
    assert [signs.extra["update_ratio"] for signs in seen[1::2]] == pytest.approx(expected[1::2], rel=1e-5)
    assert governor._gauge._held == {}  # nothing is held between two steps


def test_by_group_each_has_its_own(govern: Govern, kit: Any) -> None:
    run, seen = kit.Run(), []
    optimizer = torch.optim.SGD(groups_of(run, named=True), lr=0.1)
    config = GovernorConfig(update_ratio_every=1, by_group=True)
    governor = govern(run.model, optimizer, detector=recorder(seen), config=config)
    loss = run.backward(run.batches[0])
    first = norm(p.grad for p in run.model[0].parameters())
    second = norm(p.grad for module in (run.model[1], run.model[4]) for p in module.parameters())
    weights = norm(run.model[0].parameters())
    governor.step(loss=loss)
    extra = seen[0].extra
    assert set(extra) == {"grad_norm/first", "grad_norm/1", "update_ratio", "update_ratio/first", "update_ratio/1"}
    assert extra["grad_norm/first"] == pytest.approx(first, rel=1e-6)
    assert extra["grad_norm/1"] == pytest.approx(second, rel=1e-6)
    assert extra["update_ratio/first"] == pytest.approx(0.1 * first / weights, rel=1e-4)


def test_several_optimizers_have_their_number_in_front(govern: Govern, kit: Any) -> None:
    run, seen = kit.Run(), []
    first, second = (group["params"] for group in groups_of(run))
    optimizers = [torch.optim.SGD(list(first), lr=0.1), torch.optim.Adam(second)]
    governor = govern(run.model, optimizers, detector=recorder(seen), config=GovernorConfig(by_group=True))
    run.step(governor, run.batches[0])
    assert set(seen[0].extra) == {"grad_norm/0.0", "grad_norm/1.0"}


@pytest.mark.parametrize("unscaled", [False, True])
def test_norms_of_groups_are_those_of_unscaled_gradients(unscaled: bool, govern: Govern, kit: Any) -> None:
    run, seen = kit.Run(), []
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    governor = govern(
        run.model, run.optimizer, scaler=scaler, detector=recorder(seen), config=GovernorConfig(by_group=True)
    )
    loss = run.loss(run.batches[0])
    scaler.scale(loss).backward()
    if unscaled:
        scaler.unscale_(run.optimizer)
    governor.step(loss=loss)
    assert seen[0].extra["grad_norm/0"] == pytest.approx(seen[0].grad_norm, rel=1e-6)


@pytest.mark.parametrize("unscaled", [[], [0], [1], [0, 1]])
def test_norms_of_groups_are_unscaled_by_what_their_own_optimizer_has_been_through(
    unscaled: list[int], govern: Govern, kit: Any
) -> None:
    """A loop that clips one optimizer by itself unscales that one alone."""
    plain = kit.Run()
    plain.backward(plain.batches[0])
    expected = [math.sqrt(sum(float(p.grad.square().sum()) for p in g["params"])) for g in groups_of(plain)]
    run, seen = kit.Run(), []
    optimizers = [torch.optim.SGD(list(group["params"]), lr=0.1) for group in groups_of(run)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    governor = govern(
        run.model, optimizers, scaler=scaler, detector=recorder(seen), config=GovernorConfig(by_group=True)
    )
    loss = run.loss(run.batches[0])
    scaler.scale(loss).backward()
    for number in unscaled:
        scaler.unscale_(optimizers[number])
    governor.step(loss=loss)
    assert [seen[0].extra["grad_norm/0.0"], seen[0].extra["grad_norm/1.0"]] == pytest.approx(expected, rel=1e-5)


def test_a_closure_has_an_update_ratio(govern: Govern, kit: Any) -> None:
    run, seen = kit.Run(optimizer=lambda p: torch.optim.LBFGS(p, lr=0.1)), []
    config = GovernorConfig(update_ratio_every=1, by_group=True)
    governor = govern(run.model, run.optimizer, detector=recorder(seen), config=config)

    def closure() -> torch.Tensor:
        run.optimizer.zero_grad()
        return run.backward(run.batches[0])

    governor.step(loss=None, closure=closure)
    assert set(seen[0].extra) == {"update_ratio", "update_ratio/0"}
    assert seen[0].extra["update_ratio"] > 0


def test_a_framework_s_step_is_measured_between_its_two_calls(kit: Any) -> None:
    run, seen = kit.Run(), []
    config = GovernorConfig(update_ratio_every=1, by_group=True)
    with FollowingGovernor(run.model, run.optimizer, config=config, detector=recorder(seen)) as governor:
        for batch in governor.watch(run.batches[:2]):
            before = [p.detach().clone() for p in run.model.parameters()]
            loss = run.backward(batch)
            governor.gradients_ready(run.optimizer)
            run.optimizer.step()
            moved = norm(p.detach() - b for p, b in zip(run.model.parameters(), before, strict=True)) / norm(before)
            run.optimizer.zero_grad()
            governor.stepped(loss=loss)
            assert seen[-1].extra["update_ratio"] == pytest.approx(moved, rel=1e-5)
            assert seen[-1].extra["grad_norm/0"] == pytest.approx(seen[-1].grad_norm, rel=1e-6)


def test_a_step_that_raised_leaves_no_sign_behind(govern: Govern, kit: Any) -> None:
    """What was noted for a step that never came belongs to no other."""
    run, seen = kit.Run(), []
    config = GovernorConfig(update_ratio_every=2)
    with FollowingGovernor(run.model, run.optimizer, config=config, detector=recorder(seen)) as governor:
        governor.stepped(loss=1.0)
        run.backward(run.batches[0])
        governor.gradients_ready(run.optimizer)  # of step 2, which then is judged without having been made
        governor._course.completed = 2
        governor.stepped(loss=1.0)
    assert [signs.extra for signs in seen] == [{}, {}]


def test_weights_blown_up_by_steps_too_large_are_rolled_back(govern: Govern, kit: Any) -> None:
    """The default detector's jump of the update ratio, fed by the governor's own sign."""
    run, incidents = kit.Run(optimizer=lambda p: torch.optim.SGD(p, lr=1e-3)), []
    config = GovernorConfig(update_ratio_every=1, cadence=4, probation=4, on_incident=incidents.append)
    governor = govern(run.model, run.optimizer, config=config, detector=any_of(non_finite(), update_ratio_jump()))
    for number, batch in governor.watch(list(enumerate(run.batches))):
        run.optimizer.param_groups[0]["lr"] = 10.0 if number >= 25 and not incidents else 1e-3
        run.step(governor, batch)
    assert [incident.reason for incident in incidents] == ["update ratio jump"]
    assert incidents[0].step - 25 <= 5
    assert incidents[0].restored_step <= 25
    assert norm(run.model.parameters()) < 20
