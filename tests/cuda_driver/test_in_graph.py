"""A captured step under guard: the device decides in each replay, and the host learns of it later."""

import copy

import pytest
import torch
from cuda_driver import taped
from torch import nn

from tolaria import GovernorConfig, TolariaGovernor, judge
from tolaria.in_graph import CapturedStep

NAN = float("nan")


def adam(parameters, **settings):
    return torch.optim.Adam(parameters, lr=torch.tensor(0.05), capturable=True, **settings)


class Momentum(torch.optim.Optimizer):
    """An optimizer of somebody else's: no flag, a counter of its own, all of it on the device."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": torch.tensor(0.05)})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["moment"], state["step"] = torch.zeros_like(p), torch.zeros(())
                state["step"].add_(1)
                state["moment"].mul_(0.9).add_(p.grad)
                p.sub_(state["moment"] * group["lr"] / state["step"].sqrt())


OPTIMIZERS = {
    "adam": lambda p: adam(p, fused=True),
    "amsgrad": lambda p: adam(p, fused=True, amsgrad=True, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=torch.tensor(0.05), momentum=0.9, fused=True),
    "another": Momentum,
}


class Run:
    """A model with BatchNorm and dropout, an average of its weights, a schedule."""

    def __init__(self, late, monkeypatch, make=OPTIMIZERS["adam"], *, ema=True, **settings):
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.25), nn.Linear(8, 3))
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = make(self.model.parameters())
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 4, gamma=0.7)
        generator = torch.Generator().manual_seed(3)
        self.batches = [torch.randn(16, 6, generator=generator) for _ in range(32)]
        self.x = torch.zeros(16, 6)
        self.poison = torch.zeros(())
        config = {"cadence": 4, "probation": 4, "host_slots": 0, "scrub_every": 0, "keep_batches": 64, **settings}
        self.governor = TolariaGovernor(
            self.model,
            self.optimizer,
            scheduler=self.scheduler,
            config=GovernorConfig(**config),
            detector=judge.non_finite(),
        )
        self.governor.register("average", self.average)
        taped.install(monkeypatch, lambda: self.governor._keeper.sections)
        self.step = CapturedStep(self.governor, self.train, after=self.follow if ema else None)

    def train(self):
        loss = self.model(self.x).square().mean()
        loss.backward()
        self.model[4].weight.grad[1, 2] += self.poison  # the loss stays finite
        return loss

    def follow(self):
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 0.1)

    def go(self, poisoned=(), after=lambda delivered: None):
        """Train; in each of the `poisoned` delivered steps a gradient is not finite."""
        for delivered, batch in enumerate(self.governor.watch(self.batches)):
            self.x.copy_(batch)
            self.poison.fill_(NAN if delivered in poisoned else 0.0)
            self.step.step()
            after(delivered)

    def written(self):
        """What the device writes in a step, bit for bit; without the learning rate, which schedules change."""
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        found = [*self.model.state_dict().values(), *self.average.state_dict().values(), *moments]
        return [tensor.detach().clone().view(-1).view(torch.uint8).tolist() for tensor in found]

    def state(self):
        return self.written(), self.scheduler.state_dict(), torch.get_rng_state().tolist()


@pytest.fixture
def make_step(late, monkeypatch):
    made = []

    def make(*args, **settings):
        made.append(Run(late, monkeypatch, *args, **settings))
        return made[-1]

    yield make
    for run in made:
        run.governor.close()


@pytest.mark.parametrize("lag", [1, 3, None])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_run_is_the_clean_one(make, lag, late, make_step):
    late.lag = lag
    clean = make_step(make)
    clean.go()
    expected = clean.state()
    clean.governor.close()
    run = make_step(make)
    run.go(poisoned=[14])
    assert run.step.is_captured
    assert (run.governor.rollbacks, run.governor.statistics().vetoes) == (1, 1)
    assert run.state() == expected
