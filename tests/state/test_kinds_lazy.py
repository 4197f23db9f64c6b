"""Lazily initialised modules: before, across and after the batch that gives them their shapes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

import tolaria
from tolaria import TolariaGovernor
from tolaria.state.structure import Blank, ModuleRecord

Govern = Callable[..., TolariaGovernor]
Freeze = Callable[..., Any]


@pytest.fixture(autouse=True)
def without_the_warning_of_torch() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Lazy modules are a new feature")
        yield


def _world(**options: Any) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    model = nn.Sequential(nn.LazyConv1d(2, 1), nn.Flatten(), nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Linear(4, 2))
    model[2].register_forward_pre_hook(lambda *_: None)  # of the user's, after the one that waits for the first batch
    return model, torch.optim.Adam(model.parameters(), **options)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        model(torch.randn(4, 3, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def _look(model: nn.Module) -> Any:
    """Objects, kinds and what hangs on the modules; addresses of what has one."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return (
        [(n, type(m), str(m), list(m._forward_pre_hooks), sorted(vars(m))) for n, m in model.named_modules()],
        [(n, id(t), type(t), None if nn.parameter.is_lazy(t) else t.data_ptr()) for n, t in tensors],
    )


def test_a_rollback_to_before_the_first_batch(govern: Govern, freeze: Freeze) -> None:
    """The modules wait for a first batch again, and draw the same weights from it; the replay is exact."""
    model, optimizer = _world()
    governor = govern(model, optimizer)
    governor.snapshot()
    before, seen, digest = freeze(model, optimizer), _look(model), governor.digest()
    _train(model, optimizer)
    assert type(model[2]) is nn.Linear
    reference = freeze(model, optimizer)
    for _ in range(2):
        governor.execute_rollback(verify="before")
        assert type(model[2]) is nn.LazyLinear
        assert (freeze(model, optimizer), _look(model), governor.digest()) == (before, seen, digest)
        _train(model, optimizer)
        assert freeze(model, optimizer) == reference


def test_another_shape_after_the_rollback(govern: Govern) -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    governor = govern(model, optimizer)
    governor.snapshot()
    model(torch.randn(4, 2)).sum().backward()
    model[0].weight.grad = torch.ones(20)[:6].view(3, 2)  # a view of a bucket, which a rollback zeroes and keeps
    model[0].requires_grad_(False)
    governor.execute_rollback()
    assert model[0].weight.requires_grad
    assert model[0].weight.grad is None
    model(torch.randn(4, 5)).sum().backward()
    optimizer.step()
    assert model[0].in_features == 5
    assert model[0].weight.shape == (3, 5)


def test_a_rollback_to_after_the_first_batch(govern: Govern, freeze: Freeze) -> None:
    model, optimizer = _world()
    governor = govern(model, optimizer)
    governor.snapshot()
    _train(model, optimizer)
    governor.snapshot()
    before, seen = freeze(model, optimizer), _look(model)
    _train(model, optimizer)
    governor.execute_rollback()
    assert (freeze(model, optimizer), _look(model)) == (before, seen)


@pytest.mark.parametrize("twin", ["rest", "blank"])
def test_without_the_return_to_laziness_the_model_stays_made(
    twin: str, govern: Govern, freeze: Freeze, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red twin."""
    if twin == "rest":
        monkeypatch.setattr(ModuleRecord, "restore_rest", lambda *_: None)
    else:
        monkeypatch.setattr(Blank, "put_back", lambda blank: blank.tensor)
    model, optimizer = _world()
    governor = govern(model, optimizer)
    governor.snapshot()
    before = freeze(model), _look(model)
    _train(model, optimizer)
    governor.execute_rollback()
    assert (freeze(model), _look(model)) != before


def test_a_governed_run_starts_lazy_and_its_first_step_is_undone(govern: Govern, freeze: Freeze) -> None:
    """The first automatic snapshot is taken before the first batch; a bad first batch is replayed from there."""
    states = []
    for bad in (False, True):
        torch.manual_seed(7)
        model, optimizer = _world()
        governor = govern(model, optimizer, cadence=2, probation=1)
        rollbacks = 0
        for batch in governor.watch([torch.full((4, 3, 5), float(number)) for number in range(5)]):
            loss = (model(batch) + torch.randn(4, 2)).square().mean()
            loss.backward()
            if bad and not rollbacks:
                model[2].weight.grad[0, 0] = float("nan")
            rollbacks += governor.step(loss=loss).rolled_back
        assert rollbacks == int(bad)
        states.append(freeze(model, optimizer))
        governor.close()
    assert states[0] == states[1]


class Growing(LazyModuleMixin, nn.Linear):
    """A lazy module of the user's own, which becomes a class with another forward."""

    cls_to_become = None  # set below: the class has to exist first

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.weight, self.bias = nn.UninitializedParameter(), nn.UninitializedParameter()

    def initialize_parameters(self, inputs: torch.Tensor) -> None:
        self.weight.materialize((2, inputs.shape[-1]))
        self.bias.materialize((2,))
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs)


class Grown(nn.Linear):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs) + 1.0


Growing.cls_to_become = Grown


def test_a_lazy_root_gets_the_forward_of_the_class_that_it_becomes(govern: Govern) -> None:
    """`forward` of the root is a section: it must look for the method when it is called, not when it is attached."""
    model = Growing()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    governor = govern(model, optimizer)
    governor.snapshot()
    for _ in range(2):
        model(torch.ones(1, 3))
        assert type(model) is Grown
        result = model(torch.ones(1, 3))
        assert result.tolist() == [[4.0, 4.0]]
        result.sum().backward()
        optimizer.step()
        governor.execute_rollback()
        assert type(model) is Growing
    governor.close()
    assert "forward" not in vars(model)


def test_uninitialised_tensors_outside_of_modules_are_refused(govern: Govern) -> None:
    weight = nn.UninitializedParameter()
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    optimizer.param_groups[0]["spare"] = weight
    with pytest.raises(tolaria.UnsupportedState, match=r"spare is not initialised yet.*Run one batch"):
        govern(nn.Sequential(), optimizer)


def test_a_module_waiting_for_its_first_batch_among_others_that_do_not(govern: Govern, freeze: Freeze) -> None:
    """What is trained before the lazy part is reached comes back by its bytes, the lazy part by its emptiness."""
    model = nn.ModuleDict({"first": nn.Linear(3, 3), "later": nn.LazyLinear(2)})
    optimizer = torch.optim.Adam(model.parameters())
    governor = govern(model, optimizer)

    def train(*names: str) -> None:
        value = torch.ones(2, 3)
        for name in names:
            value = model[name](value)
        value.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    train("first")
    governor.snapshot()
    before, seen, random_state = freeze(model, optimizer), _look(model), torch.get_rng_state()
    train("first", "later")
    reference = freeze(model, optimizer)
    governor.execute_rollback()
    assert (freeze(model, optimizer), _look(model)) == (before, seen)
    assert torch.equal(torch.get_rng_state(), random_state)
    train("first", "later")
    assert freeze(model, optimizer) == reference


def test_a_governed_run_in_which_a_lazy_part_is_used_late(govern: Govern, freeze: Freeze) -> None:
    """Its parameters are no weights to be judged until they have a shape; a bad step after that is undone."""
    ends = []
    for bad in (False, True):
        torch.manual_seed(11)
        model = nn.ModuleDict({"first": nn.Linear(3, 3), "later": nn.LazyLinear(2)})
        optimizer = torch.optim.Adam(model.parameters())
        governor, rollbacks = govern(model, optimizer, cadence=1, probation=1), 0
        for number in governor.watch(range(6)):
            value = model["first"](torch.full((2, 3), number + 1.0))
            loss = (model["later"](value) if number > 2 else value).square().sum()
            loss.backward()
            if bad and number == 3 and not rollbacks:
                model["later"].weight.grad.fill_(float("nan"))
            rollbacks += governor.step(loss=loss).rolled_back
        assert rollbacks == int(bad)
        ends.append(freeze(model, optimizer))
        governor.close()
    assert ends[0] == ends[1]
