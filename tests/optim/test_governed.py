"""Our optimizers under a governor: governed like any other, though their moments change their place."""

import pytest
import torch
from torch import nn

from tolaria import GovernorConfig, TolariaGovernor, judge, veto
from tolaria.config import Recovery
from tolaria.errors import NoSnapshot
from tolaria.optim import SGD, AdamW

KINDS = {
    "adamw": lambda p, **own: AdamW(p, lr=0.05, **own),
    "amsgrad": lambda p, **own: AdamW(p, lr=0.05, amsgrad=True, **own),
    "momentum": lambda p, **own: SGD(p, lr=0.05, momentum=0.9, **own),
}


class Run:
    def __init__(self, make, recovery=None, **own):
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        self.optimizer = make(self.model.parameters(), **own)
        self.batches = [torch.randn(6, 4) for _ in range(16)]
        self.governor = TolariaGovernor(
            self.model,
            self.optimizer,
            config=GovernorConfig(rng="keep", cadence=100, recovery=recovery or Recovery()),
            detector=judge.non_finite(),
        )

    def train(self, *numbers):
        for number in numbers:
            self.optimizer.zero_grad()
            self.model(self.batches[number]).square().mean().backward()
            self.optimizer.step()
        self.optimizer.zero_grad()


@pytest.fixture(params=KINDS)
def make(request):
    return KINDS[request.param]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_rollback_over_moments_that_have_moved(make, steps, compiled, alone, frozen, request):
    if compiled:
        request.getfixturevalue("interpreted")
    run = Run(make, history=2)
    run.train(0, 1)
    run.governor.snapshot()
    before, held = frozen(run.optimizer), [dict(s) for s in run.optimizer.state.values()]
    run.train(*range(2, 2 + steps))
    after = frozen(run.optimizer)
    run.governor.execute_rollback()
    assert frozen(run.optimizer) == before
    for state, former in zip(run.optimizer.state.values(), held, strict=True):
        assert all(state[name] is former[name] for name in former)
    with pytest.raises(NoSnapshot, match="written since"):
        run.optimizer.undo()
    assert frozen(run.optimizer) == before
    run.train(*range(2, 2 + steps))
    assert frozen(run.optimizer) == after
    assert run.optimizer.kept().steps == min(steps, 2)
    assert run.optimizer.kept().compiled == compiled
    run.governor.execute_rollback()
    assert frozen(run.optimizer) == before
    run.governor.close()


def test_an_undo_is_a_write_like_any_other(make, alone, frozen):
    run = Run(make)
    run.train(0, 1)
    before = frozen(run.optimizer)
    run.train(2)
    after = frozen(run.optimizer)
    with run.governor.using(write=True):
        run.optimizer.undo()
    assert frozen(run.optimizer) == before
    run.governor.snapshot()
    run.train(2)
    assert frozen(run.optimizer) == after
    run.governor.execute_rollback()
    assert frozen(run.optimizer) == before
    run.governor.close()


def test_back_to_before_there_was_a_state(make, alone, frozen):
    run = Run(make)
    run.governor.snapshot()
    before = frozen(run.optimizer)
    run.train(0)
    once = frozen(run.optimizer)
    run.train(1)
    run.governor.execute_rollback()
    assert frozen(run.optimizer) == before
    run.train(0)
    assert frozen(run.optimizer) == once
    run.governor.close()


def test_a_veto(make, alone, frozen):
    run = Run(make)
    run.train(0, 1, 2)
    before = frozen(run.optimizer)
    loss = run.model(run.batches[3]).square().mean()
    loss.backward()
    run.model[0].weight.grad[0, 0] = float("nan")
    run.governor.step(loss=loss)
    assert frozen(run.optimizer) == before
    assert run.governor.statistics().vetoes == 1
    run.governor.close()


@pytest.mark.parametrize("how", ["reset", "damp"])
def test_moments_can_be_treated_after_a_rollback(how, make, alone):
    run = Run(make, recovery=Recovery(moments=how, damp=0.5))
    run.train(0, 1)
    first = [next(v.clone() for k, v in s.items() if k != "step") for s in run.optimizer.state.values()]
    from tolaria import moments

    moments.treat([run.optimizer], how, 0.5)
    for state, former in zip(run.optimizer.state.values(), first, strict=True):
        now = next(v for k, v in state.items() if k != "step")
        assert torch.equal(now, former * (0.5 if how == "damp" else 0.0))
    run.train(2)
    run.governor.close()


@pytest.mark.parametrize("protected", [True, False])
def test_a_first_step_that_a_scaler_skips_leaves_no_momentum(protected, alone, monkeypatch):
    """A red twin: with dampening, a momentum of zeros is not none."""
    if not protected:
        monkeypatch.setattr(veto, "forget_momenta", lambda *_: None)
    ends = []
    for governed in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        kind, scaler = (SGD if governed else torch.optim.SGD), torch.amp.GradScaler("cpu", init_scale=4.0)
        optimizer = kind(model.parameters(), lr=0.1, momentum=0.5, dampening=0.5)
        config = GovernorConfig(rng="keep")
        governor = TolariaGovernor(model, optimizer, scaler=scaler, config=config, detector=judge.non_finite())
        for number in range(3):
            loss = model(torch.full((2, 4), float(number + 1))).square().mean()
            scaler.scale(loss).backward()
            if not number:
                model.weight.grad[0, 0] = float("inf")
            if governed:
                governor.step(loss=loss)
            else:
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        governor.close()
        ends.append(model.weight.detach().clone())
    assert torch.equal(*ends) == protected
