"""Gradients at a snapshot and at a rollback: refused, captured, dropped, or zeroed where they are views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tolaria
from tolaria import TolariaGovernor

Govern = Callable[..., TolariaGovernor]
Freeze = Callable[..., Any]


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def _backward(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model(torch.randn(4, 3, generator=generator)).square().sum().backward()


def _gradients(model: nn.Module) -> list[torch.Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def _same(left: list[torch.Tensor | None], right: list[torch.Tensor | None]) -> bool:
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(left, right, strict=True))


def _bucket_views(model: nn.Module) -> torch.Tensor:
    """Make every gradient a view of one flat bucket, like DDP with `gradient_as_bucket_view`."""
    parameters = list(model.parameters())
    bucket = torch.zeros(sum(p.numel() for p in parameters))
    for parameter, part in zip(parameters, bucket.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)
    return bucket


# ---------------------------------------------------------------- at a rollback


def test_gradients_are_dropped(model: nn.Sequential, govern: Govern) -> None:
    governor = govern(model, torch.optim.SGD(model.parameters(), lr=0.1))
    governor.snapshot()
    _backward(model, 0)
    governor.execute_rollback()
    assert _gradients(model) == [None] * 4


def test_view_gradients_are_zeroed_in_place(model: nn.Sequential, govern: Govern) -> None:
    governor = govern(model, torch.optim.SGD(model.parameters(), lr=0.1))
    bucket = _bucket_views(model)
    held = [parameter.grad for parameter in model.parameters()]
    governor.snapshot()
    _backward(model, 0)
    assert torch.count_nonzero(bucket)
    governor.execute_rollback()
    assert not torch.count_nonzero(bucket)
    assert all(parameter.grad is grad for parameter, grad in zip(model.parameters(), held, strict=True))


def test_sparse_gradients_are_dropped(govern: Govern, freeze: Freeze) -> None:
    model = nn.Embedding(5, 2, sparse=True)
    optimizer = torch.optim.SparseAdam(model.parameters())
    governor = govern(model, optimizer)

    def step() -> None:
        model(torch.tensor([1, 3])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    governor.snapshot()
    before = freeze(model, optimizer)
    step()
    reference = freeze(model, optimizer)
    model(torch.tensor([2])).sum().backward()
    governor.execute_rollback()
    assert model.weight.grad is None
    assert freeze(model, optimizer) == before
    step()
    assert freeze(model, optimizer) == reference


# ---------------------------------------------------------------- at a snapshot


@pytest.mark.parametrize("sparse", [False, True])
def test_live_gradients_are_refused(sparse: bool, govern: Govern, freeze: Freeze) -> None:
    model = nn.Embedding(5, 2, sparse=sparse)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    governor = govern(model, optimizer)
    info = governor.snapshot()
    before = freeze(model)
    model(torch.tensor([1, 3])).sum().backward()
    assert model.weight.grad is not None
    gradient = model.weight.grad.to_dense().clone()
    with pytest.raises(tolaria.PhaseError, match="gradients are alive"):
        governor.snapshot()
    assert torch.equal(model.weight.grad.to_dense(), gradient)
    assert freeze(model) == before
    assert info.state != "dropped"
    optimizer.step()
    optimizer.zero_grad()
    governor.execute_rollback()
    assert freeze(model) == before


@pytest.mark.parametrize("end", ["zero_grad", "zero_grad in place", "step"])
def test_dead_gradients_are_no_obstacle(end: str, model: nn.Sequential, govern: Govern) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    governor = govern(model, optimizer)
    _backward(model, 0)
    if end == "step":
        optimizer.step()  # gradients stay until the next zero_grad, but their step is done
    else:
        optimizer.zero_grad(set_to_none=end == "zero_grad")
    assert governor.snapshot().state == "sealed"


@pytest.mark.parametrize("views", [False, True])
def test_captured_gradients_come_back(views: bool, model: nn.Sequential, govern: Govern, freeze: Freeze) -> None:
    """In the middle of an accumulation window: two micro-batches, a rollback, and the window is finished again."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    governor = govern(model, optimizer)
    bucket = _bucket_views(model) if views else None
    held = [parameter.grad for parameter in model.parameters()]
    _backward(model, 0)
    governor.snapshot(grads="capture")
    captured = _gradients(model)

    def finish() -> Any:
        _backward(model, 1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=not views)
        return freeze(model, optimizer)

    reference = finish()
    for _ in range(2):
        governor.execute_rollback()
        assert _same(_gradients(model), captured)
        if bucket is not None:
            assert all(parameter.grad is grad for parameter, grad in zip(model.parameters(), held, strict=True))
            assert torch.equal(bucket, torch.cat([grad.flatten() for grad in captured if grad is not None]))
        assert finish() == reference
    assert governor.statistics().stale_vetoes == 0


def test_captured_gradients_of_every_governed_parameter(model: nn.Sequential, govern: Govern) -> None:
    """Also of a registered module, and of a parameter that only an optimizer knows."""
    temperature, critic = nn.Parameter(torch.ones(2)), nn.Linear(3, 1)
    governor = govern(model, torch.optim.SGD([*model.parameters(), temperature], lr=0.1))
    governor.register("critic", critic)
    (model(torch.ones(3)).sum() * temperature.sum() * critic(torch.ones(3)).sum()).backward()
    everything = [*model.parameters(), temperature, *critic.parameters()]
    captured = [p.grad.clone() for p in everything if p.grad is not None]
    governor.snapshot(grads="capture")
    for parameter in everything:
        parameter.grad = None
    governor.execute_rollback()
    assert len(captured) == len(everything)
    for parameter, gradient in zip(everything, captured, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)


def test_a_gradient_that_did_not_exist_is_dropped_beside_captured_ones(model: nn.Sequential, govern: Govern) -> None:
    governor = govern(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model[0](torch.ones(3)).sum().backward()
    governor.snapshot(grads="capture")
    _backward(model, 0)
    governor.execute_rollback()
    assert model[0].weight.grad is not None
    assert model[0].weight.grad.tolist() == [[1.0] * 3] * 4
    assert model[2].weight.grad is None


def test_dropped_gradients_stay_alive_but_are_not_in_the_snapshot(model: nn.Sequential, govern: Govern) -> None:
    governor = govern(model, torch.optim.SGD(model.parameters(), lr=0.1))
    _backward(model, 0)
    alive = _gradients(model)
    governor.snapshot(grads="drop")
    assert _same(_gradients(model), alive)
    governor.execute_rollback()
    assert _gradients(model) == [None] * 4


def test_captured_gradients_are_in_no_later_snapshot(model: nn.Sequential, govern: Govern) -> None:
    governor = govern(model, torch.optim.SGD(model.parameters(), lr=0.1))
    _backward(model, 0)
    first = governor.snapshot(grads="capture")
    second = governor.snapshot(grads="drop")
    assert first.bytes == 2 * second.bytes
    governor.execute_rollback()
    assert _gradients(model) == [None] * 4
    governor.execute_rollback(to=first)
    assert model[0].weight.grad is not None


def test_gradients_that_came_back_are_alive(model: nn.Sequential, govern: Govern) -> None:
    """A snapshot that would leave them out is refused, like before the rollback."""
    governor = govern(model, torch.optim.SGD(model.parameters(), lr=0.1))
    _backward(model, 0)
    governor.snapshot(grads="capture")
    governor.execute_rollback()
    with pytest.raises(tolaria.PhaseError, match="gradients are alive"):
        governor.snapshot()


def test_sparse_gradients_cannot_be_captured(govern: Govern, freeze: Freeze) -> None:
    model = nn.Embedding(5, 2, sparse=True)
    governor = govern(model, torch.optim.SGD(model.parameters(), lr=0.1))
    governor.snapshot()
    before = freeze(model)
    model(torch.tensor([1, 3])).sum().backward()
    with pytest.raises(tolaria.UnsupportedState, match=r"model\.weight\.grad has layout torch\.sparse_coo"):
        governor.snapshot(grads="capture")
    assert model.weight.grad is not None
    governor.execute_rollback()
    assert freeze(model) == before


def test_unscaled_gradients_cannot_be_captured(model: nn.Sequential, govern: Govern, freeze: Freeze) -> None:
    """A rollback forgets which gradients a scaler has unscaled, so the step would unscale them a second time."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    governor = govern(model, optimizer, scaler=scaler)
    scaler.scale(model(torch.ones(3)).sum()).backward()
    governor.snapshot(grads="capture")
    scaler.unscale_(optimizer)
    before = _gradients(model)
    with pytest.raises(tolaria.UnsupportedState, match="scaler has unscaled"):
        governor.snapshot(grads="capture")
    assert _same(_gradients(model), before)

    def finish() -> Any:
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return freeze(model, optimizer, scaler)

    reference = finish()
    governor.execute_rollback()
    assert finish() == reference
