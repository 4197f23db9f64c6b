"""The device refuses a step whose gradients are not finite, while the host is not told."""

import contextlib

import pytest
import torch
from torch import nn

from tolaria import GovernorConfig, TolariaGovernor, judge, veto
from tolaria.follow import FollowingGovernor
from tolaria.testing.gates import Gate

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")]

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2, device="cuda"), fused=True, capturable=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True, weight_decay=0.1, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "for-loop": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, foreach=False),
}
EXACT = ("adamw", "tensor lr", "amsgrad", "momentum")


@pytest.fixture(autouse=True)
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Run:
    def __init__(self, name, scaler=False, kind=TolariaGovernor, **settings):
        torch.manual_seed(0)
        # of half precision too, where no scaler has to unscale it: two kinds of words
        self.half = torch.float32 if scaler else torch.bfloat16
        self.model = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 4, dtype=self.half)]).cuda()
        self.optimizer = OPTIMIZERS[name](self.model.parameters())
        self.scaler = torch.amp.GradScaler("cuda", init_scale=256.0) if scaler else None
        self.batches = [torch.randn(8, 16, device="cuda") for _ in range(24)]
        self.poison = torch.tensor(float("nan"), device="cuda")
        self.governor = kind(
            self.model,
            self.optimizer,
            scaler=self.scaler,
            config=GovernorConfig(**{"cadence": 4, "probation": 4, "rng": "keep", **settings}),
            detector=judge.non_finite(),
        )

    def backward(self, x):
        loss = self.model[1](self.model[0](x).tanh().to(self.half)).float().square().mean()
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss

    def step(self, x, bad=False):
        loss = self.backward(x)
        if bad:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)  # so that the scaler has not seen it
            self.model[0].weight.grad[3, 3:4].copy_(self.poison)
        if not isinstance(self.governor, FollowingGovernor):
            return self.governor.step(loss=loss)
        self.governor.gradients_ready(self.optimizer)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()
        return self.governor.stepped(loss=loss)

    def tensors(self):
        # a tensor learning rate is the governor's business elsewhere
        return [*self.model.parameters(), *(v for s in self.optimizer.state.values() for v in s.values())]

    def written(self):
        return [tensor.detach().clone() for tensor in self.tensors()]


def same(run, before):
    return all(torch.equal(a, b) for a, b in zip(run.tensors(), before, strict=True))


def is_finite(run):
    return all(bool(p.isfinite().all()) for p in run.model.parameters())


def poisoned_behind_a_gate(run):
    """One poisoned step, launched from first to last while the device stands still. Answers the state before it."""
    for x in run.batches[:6]:
        run.step(x)
    before = run.written()
    torch.cuda.synchronize()
    with Gate(limit_s=10.0) as gate:
        gate.close(torch.cuda.current_stream())
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert not run.step(run.batches[6], bad=True).rolled_back
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert not gate.is_open
    assert not gate.was_forced
    torch.cuda.synchronize()
    return before


# over other optimizers a scaler waits for the device by itself
@pytest.mark.parametrize(
    ("name", "scaler"), [*((each, False) for each in OPTIMIZERS), *((each, True) for each in EXACT)]
)
def test_the_device_decides_alone(name, scaler):
    run = Run(name, scaler, cadence=100)
    before = poisoned_behind_a_gate(run)
    assert is_finite(run)
    assert same(run, before) == (name in EXACT)
    run.governor.close()


@pytest.mark.parametrize(("name", "scaler"), [*((each, False) for each in OPTIMIZERS), ("adamw", True)])
def test_the_device_decides_alone_in_a_loop_of_somebody_else_s(name, scaler):
    run = Run(name, scaler, FollowingGovernor, cadence=100)
    run.governor.begin()
    before = poisoned_behind_a_gate(run)
    assert is_finite(run)
    assert same(run, before) == (name in EXACT)
    run.governor.close()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_its_means_the_weights_are_lost(name, monkeypatch):
    monkeypatch.setattr(veto, "predicated", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(veto, "blank", lambda *_: None)
    run = Run(name, cadence=100)
    poisoned_behind_a_gate(run)
    assert not is_finite(run)
    run.governor.close()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_run_is_the_clean_one(name):
    states = []
    for bad in (True, False):
        run = Run(name)
        for number, x in enumerate(run.governor.watch(run.batches)):
            run.step(x, bad and number == 11)
        assert run.governor.statistics().vetoes == run.governor.rollbacks == int(bad)
        states.append(run.written())
        run.governor.close()
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.parametrize("name", EXACT)
def test_a_kept_veto_leaves_the_step_out(name):
    run = Run(name, on_veto="keep", cadence=100)
    for number, x in enumerate(run.batches):
        run.step(x, number == 11)
    run.governor.state_dict()
    assert (run.governor.statistics().vetoes, run.governor.rollbacks) == (1, 0)
    plain = Run(name)
    plain.governor.close()
    for number, x in enumerate(plain.batches):
        if number != 11:
            plain.backward(x)
            plain.optimizer.step()
            plain.optimizer.zero_grad()
    assert same(run, plain.written())
    run.governor.close()
