"""One update over several optimizers and a `GradScaler`, which skips each of them by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tolaria import observe
from tolaria.update import Outcome, Update

SCALE = 65536.0


class Pair:
    """Two parameters with an optimizer each, and a third that no optimizer steps."""

    def __init__(self, late: bool, steps: int = 2) -> None:
        self.first, self.second, self.third = (nn.Parameter(torch.ones(4)) for _ in range(3))
        self.optimizers = [torch.optim.AdamW([p], lr=0.1, fused=True) for p in (self.first, self.second)][:steps]
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizers[0], 1)
        scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
        scaler.scale(torch.tensor(1.0))
        self.update = Update(self.optimizers, [self.scheduler], scaler)
        self.run = self.update.run_late if late else self.update.run

    def step(self, may_veto: bool = True) -> Outcome:
        parameters = [self.first, self.second, self.third]
        return self.run(parameters, 0.5, 1.0, None, None, 1.0, may_veto, lambda _: False)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_the_scaler_skips_has_no_say_in_the_clipping_of_the_others(bad: float, late: bool) -> None:
    pair = Pair(late)
    pair.first.grad, pair.second.grad = torch.full((4,), bad), torch.full((4,), 100 * SCALE)
    pair.step()
    assert torch.equal(pair.first, torch.ones(4))
    moment = pair.optimizers[1].state[pair.second]["exp_avg"]  # a tenth of the gradient, of norm 1 when clipped
    assert float(moment.norm()) == pytest.approx(0.1, rel=1e-3)
    assert bool(pair.second.isfinite().all())


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("steps", [1, 2])
def test_gradients_that_nobody_steps_change_nothing_behind_a_scaler(steps: int, late: bool) -> None:
    pair, plain = Pair(late, steps), Pair(late, steps)
    for each in (pair, plain):
        each.first.grad = torch.full((4,), SCALE)
    pair.third.grad = torch.full((4,), float("nan"))
    done = pair.step()
    plain.step()
    assert torch.equal(pair.first, plain.first)
    assert not torch.equal(pair.first, torch.ones(4))
    assert not done.vetoed
    assert not bool(done.late_veto)
    assert not bool(done.scaler_skipped)
    assert pair.scheduler.last_epoch == 1
    assert pair.third.grad is None


def test_a_step_that_observe_mode_lets_pass_was_not_skipped() -> None:
    pair = Pair(late=False)
    pair.first.grad = torch.full((4,), SCALE)
    pair.update._unscale()
    pair.first.grad.fill_(float("nan"))  # after the scaler has looked
    done = pair.step(may_veto=False)
    assert not bool(done.scaler_skipped)
    assert pair.scheduler.last_epoch == 1


@pytest.mark.parametrize("late", [False, True])
def test_an_optimizer_without_gradients_is_not_asked_of_the_scaler(late: bool) -> None:
    """The scaler would raise, when others have stepped already: a discriminator rests while the generator trains."""
    pair = Pair(late)
    for one, other in ((pair.first, pair.second), (pair.second, pair.first)):
        before = one.detach().clone(), other.detach().clone()
        one.grad = torch.full((4,), SCALE)
        done = pair.step()
        assert not bool(done.scaler_skipped)
        assert torch.equal(other, before[1])
        assert not torch.equal(one, before[0])
    assert pair.scheduler.last_epoch == 2


@pytest.mark.parametrize("late", [False, True])
def test_a_step_without_any_gradient_leaves_the_scaler_alone(late: bool) -> None:
    pair = Pair(late)
    done = pair.step()
    assert not bool(done.scaler_skipped)
    assert torch.equal(pair.first, torch.ones(4))
    assert pair.update.scaler is not None
    assert pair.update.scaler.get_scale() == SCALE
    pair.first.grad = torch.full((4,), SCALE)
    pair.step()
    assert not torch.equal(pair.first, torch.ones(4))


@pytest.mark.parametrize("late", [False, True])
def test_what_a_scaler_skips_counts_as_skipped_though_its_gradients_were_made_finite(late: bool) -> None:
    """As `clip_grad_value_` does it with an infinity, behind `unscale_`."""
    pair = Pair(late, steps=1)
    assert pair.update.scaler is not None
    pair.first.grad = torch.full((4,), float("inf"))
    pair.update.scaler.unscale_(pair.optimizers[0])
    torch.nn.utils.clip_grad_value_([pair.first], 1.0)
    done = pair.step()
    assert torch.equal(pair.first, torch.ones(4))
    assert bool(done.scaler_skipped)
    assert not done.vetoed
    assert late or pair.scheduler.last_epoch == 0
    assert pair.update.scaler.get_scale() == SCALE / 2


class Elsewhere(torch.Tensor):
    """In main memory, and says that it is on a device: whoever reads it by itself would wait there."""

    device = torch.device("xpu:0")  # type: ignore[assignment]

    def to(self, *_: Any, **__: Any) -> torch.Tensor:  # type: ignore[override]
        return torch.tensor(self.tolist(), dtype=torch.float64)

    def __bool__(self) -> bool:
        raise AssertionError("waits for the device")

    __float__ = __bool__  # type: ignore[assignment]


class Schedule:
    """Counts its steps."""

    def __init__(self) -> None:
        self.steps = 0

    def step(self) -> None:
        self.steps += 1


def move_away(monkeypatch: pytest.MonkeyPatch, pair: Pair) -> None:
    """What the scaler has found is on a device. It reads that itself where an optimizer cannot skip by itself."""
    assert pair.update.scaler is not None
    monkeypatch.setattr(observe, "home_of", lambda tensors: torch.device("cpu"))
    for state in pair.update.scaler._per_optimizer_states.values():
        found = state["found_inf_per_device"]
        for device, flag in found.items():
            found[device] = flag.as_subclass(Elsewhere)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("spoilt", [False, True])
def test_what_a_scaler_has_found_on_a_device_is_read_beside_the_norm(
    spoilt: bool, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind `clip_grad_value_` nothing else tells; and where nothing is wrong no number more is waited for."""
    pair = Pair(late=False, steps=1)
    if not fused:
        pair.optimizers[:] = [torch.optim.AdamW([pair.first], lr=0.1)]
        pair.update.optimizers[:] = pair.optimizers
    scaler = pair.update.scaler
    assert scaler is not None
    pair.first.grad = torch.full((4,), float("inf") if spoilt else SCALE)
    scaler.unscale_(pair.optimizers[0])
    torch.nn.utils.clip_grad_value_([pair.first], 1.0)
    move_away(monkeypatch, pair)
    monkeypatch.setattr(pair.update, "_step", lambda *_, **__: None)  # what a fused one does with a flag is torch's
    pair.update.schedulers[:] = [schedule := Schedule()]
    done = pair.step()
    assert bool(done.scaler_skipped) == spoilt
    assert done.nonfinite_gradients == 0
    assert done.grad_norm == 2.0
    assert schedule.steps == (0 if spoilt else 1)


def test_of_two_optimizers_the_one_that_a_scaler_skips_is_told_from_its_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the gradients of the other are clipped by their own norm, on a device as well."""
    pair = Pair(late=False)
    scaler = pair.update.scaler
    assert scaler is not None
    pair.first.grad, pair.second.grad = torch.full((4,), float("inf")), torch.full((4,), 100 * SCALE)
    for optimizer in pair.optimizers:
        scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_value_([pair.first], 1e6)
    move_away(monkeypatch, pair)
    pair.update.schedulers.clear()
    seen = []
    monkeypatch.setattr(pair.update, "_step", lambda *_, **__: seen.append(pair.second.grad.clone()))
    assert bool(pair.step().scaler_skipped)
    assert float(seen[0].norm()) == pytest.approx(1.0)


class NoRate(torch.optim.SGD):
    """A group that has no learning rate, and one whose rate is None: the optimizer finds its own."""

    def __init__(self, first: nn.Parameter, second: nn.Parameter, third: nn.Parameter) -> None:
        super().__init__([{"params": [first]}, {"params": [second]}, {"params": [third]}], lr=0.5)
        self.param_groups[0]["lr"] = None
        del self.param_groups[1]["lr"]


def test_a_group_without_a_learning_rate_is_not_cooled() -> None:
    optimizer = NoRate(*(nn.Parameter(torch.ones(2)) for _ in range(3)))
    update = Update([optimizer], [], None)
    with update._scaled_learning_rate(0.5):
        assert [group.get("lr", "none") for group in optimizer.param_groups] == [None, "none", 0.25]
    assert [group.get("lr", "none") for group in optimizer.param_groups] == [None, "none", 0.5]
