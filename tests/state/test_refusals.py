"""What cannot be restored exactly is refused by name, before the first write, and the state is untouched after it."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tolaria
from tolaria import TolariaGovernor

Govern = Callable[..., TolariaGovernor]
Freeze = Callable[..., Any]


def _world() -> tuple[nn.Sequential, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = torch.optim.Adam(
        [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters())}], lr=0.01
    )
    return model, optimizer


def _step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


# ---------------------------------------------------------------- parameters moved since the snapshot

Undo = Callable[[], object]


def _move(model: nn.Sequential, _: torch.optim.Optimizer) -> Undo:
    weight, data = model[0].weight, model[0].weight.data
    weight.data = data.clone()

    def undo() -> None:
        weight.data = data

    return undo


def _resize(model: nn.Sequential, _: torch.optim.Optimizer) -> Undo:
    weight, data = model[0].weight, model[0].weight.data
    weight.data = data[:2].clone()

    def undo() -> None:
        weight.data = data

    return undo


def _transpose(model: nn.Sequential, _: torch.optim.Optimizer) -> Undo:
    weight, data = model[0].weight, model[0].weight.data
    weight.data = data.view(3, 4)  # the same memory in another shape

    def undo() -> None:
        weight.data = data

    return undo


def _convert(model: nn.Sequential, _: torch.optim.Optimizer) -> Undo:
    held = {parameter: parameter.data for parameter in model.parameters()}
    model.double()

    def undo() -> None:
        for parameter, data in held.items():
            parameter.data = data

    return undo


def _swap(model: nn.Sequential, _: torch.optim.Optimizer) -> Undo:
    first, second = model[0].bias, nn.Parameter(torch.zeros(4))
    data, other = first.data, second.data
    first.data, second.data = other, data

    def undo() -> None:
        first.data, second.data = data, other

    return undo


CHANGES: dict[str, tuple[Callable[[nn.Sequential, torch.optim.Optimizer], Undo], str]] = {
    "parameter moved": (_move, r"model\.0\.weight was given other storage, shape or dtype"),
    "parameter resized": (_resize, r"model\.0\.weight was given other storage, shape or dtype"),
    "parameter reshaped": (_transpose, r"model\.0\.weight was given other storage, shape or dtype"),
    "model converted": (_convert, r"model\.2\.bias was given other storage, shape or dtype"),
    "data swapped": (_swap, r"model\.0\.bias was given other storage, shape or dtype"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_rollback_of_parameters_that_were_moved_is_refused(name: str, govern: Govern, freeze: Freeze) -> None:
    change, message = CHANGES[name]
    model, optimizer = _world()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    governor = govern(model, optimizer, scheduler=scheduler)
    _step(model, optimizer)
    governor.snapshot()
    before, digest = freeze(model, optimizer, scheduler), governor.digest()
    _step(model, optimizer)
    scheduler.step()
    undo = change(model, optimizer)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    changed, changed_digest = freeze(model, optimizer, scheduler), governor.digest()
    versions = [parameter._version for parameter in model.parameters()]
    for verify in (None, "before"):
        with pytest.raises(tolaria.StateMismatch, match=message) as caught:
            governor.execute_rollback(verify=verify)
        assert caught.value.state_intact
        assert freeze(model, optimizer, scheduler) == changed
        assert governor.digest() == changed_digest
        assert [parameter._version for parameter in model.parameters()] == versions
        assert model[0].weight.grad is not None
    model[0].weight.grad = None
    undo()
    governor.execute_rollback()
    assert freeze(model, optimizer, scheduler) == before
    assert governor.digest() == digest


def test_a_new_snapshot_governs_the_new_place(govern: Govern, freeze: Freeze) -> None:
    """What follows a conversion is restored exactly, the old snapshots stay refused."""
    model, optimizer = _world()
    governor = govern(model, optimizer)
    old = governor.snapshot()
    _convert(model, optimizer)
    inputs = torch.randn(4, 3).to(model[0].weight.dtype)
    new = governor.snapshot()
    before = freeze(model, optimizer)
    model(inputs).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(tolaria.StateMismatch):
        governor.execute_rollback(to=old)
    assert governor.execute_rollback(to=new).success
    assert freeze(model, optimizer) == before


def test_every_difference_is_named(govern: Govern) -> None:
    model, optimizer = _world()
    governor = govern(model, optimizer)
    governor.snapshot()
    _move(model, optimizer)
    model[2].bias.data = torch.zeros(2)
    with pytest.raises(tolaria.StateMismatch) as caught:
        governor.execute_rollback()
    for part in ("model.0.weight was given other", "model.2.bias was given other"):
        assert part in str(caught.value)


# ---------------------------------------------------------------- kinds of tensors


class Labelled(torch.Tensor):
    """A subclass without fields. Its bytes might do; nobody can know that of a subclass."""


def _inference() -> torch.Tensor:
    with torch.inference_mode():
        return torch.zeros(3)


def _quietly(make: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    def quiet() -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make()

    return quiet


UNSUPPORTED: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "layout torch.sparse_coo"),
    "compressed": (_quietly(lambda: torch.eye(3).to_sparse_csr()), "layout torch.sparse_csr"),
    "quantized": (_quietly(lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)), "quantized: True"),
    "mkldnn": (lambda: torch.eye(3).to_mkldnn(), "layout torch._mkldnn"),
    "nested": (_quietly(lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])), "expected a plain"),
    "jagged": (
        _quietly(lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)),
        "NestedTensor",
    ),
    "meta": (lambda: torch.zeros(3, device="meta"), "on the meta device"),
    "inference": (_inference, "is an inference tensor"),
    "subclass": (lambda: torch.zeros(3).as_subclass(Labelled), "Labelled"),
    "uninitialised": (lambda: nn.UninitializedBuffer(), "is not initialised yet"),
}


@pytest.mark.parametrize("kind", [kind for kind in UNSUPPORTED if kind != "uninitialised"])
def test_an_unsupported_buffer_is_refused_at_construction(kind: str, govern: Govern, freeze: Freeze) -> None:
    make, message = UNSUPPORTED[kind]
    model, optimizer = _world()
    before, attributes = freeze(model, optimizer), (set(vars(model)), set(vars(optimizer)))
    model[0].register_buffer("odd", make())
    with pytest.raises(tolaria.UnsupportedState, match=rf"model\.0\.odd .*{message}"):
        govern(model, optimizer)
    assert (set(vars(model)), set(vars(optimizer))) == attributes
    del model[0]._buffers["odd"]
    assert freeze(model, optimizer) == before
    governor = govern(model, optimizer)  # nothing of the refused one is left
    governor.snapshot()
    assert governor.execute_rollback().success
    assert governor.capabilities().rng == "restore"


PLACES = ["buffer", "optimizer state", "param group", "optimizer attribute", "registered"]
IN_MODULES = {("uninitialised", "buffer"), ("uninitialised", "registered")}  # restored: test_kinds_lazy.py


@pytest.mark.parametrize(("kind", "place"), sorted({*itertools.product(UNSUPPORTED, PLACES)} - IN_MODULES))
def test_an_unsupported_tensor_is_refused_at_a_snapshot(kind: str, place: str, govern: Govern, freeze: Freeze) -> None:
    make, message = UNSUPPORTED[kind]
    model, optimizer = _world()
    extra = nn.Module()
    governor = govern(model, optimizer)
    governor.register("extra", extra)
    _step(model, optimizer)
    info = governor.snapshot()
    before, digest = freeze(model, optimizer), governor.digest()
    _step(model, optimizer)
    changed = freeze(model, optimizer)
    state = optimizer.state[model[2].weight]
    owner, key, name = {
        "buffer": (model[0]._buffers, "odd", r"model\.0\.odd"),
        "optimizer state": (state, "odd", r"optimizer\.state\[2\]\.odd"),
        "param group": (optimizer.param_groups[1], "odd", r"optimizer\.param_groups\[1\]\.odd"),
        "optimizer attribute": (vars(optimizer), "odd", r"optimizer\.odd"),
        "registered": (extra._buffers, "odd", r"extra\.odd"),
    }[place]
    owner[key] = make()
    for _ in range(4):  # more often than there are slots
        with pytest.raises(tolaria.UnsupportedState, match=rf"{name} .*{message}") as caught:
            governor.snapshot()
    assert caught.value.state_intact
    del owner[key]
    assert freeze(model, optimizer) == changed
    assert info.state == "sealed"
    governor.execute_rollback()
    assert freeze(model, optimizer) == before
    assert governor.digest() == digest


def test_a_rollback_removes_an_unsupported_tensor_that_came_later(govern: Govern, freeze: Freeze) -> None:
    """It has no place in the snapshot, so it is deleted like everything that came later."""
    model, optimizer = _world()
    governor = govern(model, optimizer)
    _step(model, optimizer)
    governor.snapshot()
    before = freeze(model, optimizer)
    model[0].register_buffer("odd", torch.eye(3).to_sparse())
    optimizer.state[model[2].weight]["odd"] = torch.eye(3).to_sparse()
    governor.execute_rollback()
    assert freeze(model, optimizer) == before


def test_a_parameter_of_a_subclass_is_refused(govern: Govern) -> None:
    class Marked(nn.Parameter):
        pass

    model = nn.Linear(2, 2)
    model.weight = Marked(torch.zeros(2, 2))
    with pytest.raises(tolaria.UnsupportedState, match=r"model\.weight is a .*Marked"):
        govern(model)


class Pretender:
    """Looks like a scaler."""

    def is_enabled(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer": object()}, r"optimizer is a object, expected a torch\.optim\.Optimizer"),
        ({"scaler": Pretender()}, r"scaler is a Pretender, expected a torch\.amp\.GradScaler"),
    ],
)
def test_strange_optimizers_and_scalers_are_refused(arguments: dict[str, Any], message: str, govern: Govern) -> None:
    model = nn.Linear(2, 2)
    attributes = set(vars(model))
    with pytest.raises(tolaria.UsageError, match=message):
        govern(model, **arguments)
    assert set(vars(model)) == attributes
    assert govern(model).snapshot().state == "sealed"


# ---------------------------------------------------------------- nothing to go back to


def test_a_rollback_without_a_snapshot_is_refused(govern: Govern, freeze: Freeze) -> None:
    model, optimizer = _world()
    governor = govern(model, optimizer)
    _step(model, optimizer)
    before, digest = freeze(model, optimizer), governor.digest()
    with pytest.raises(tolaria.NoSnapshot):
        governor.execute_rollback()
    governor.snapshot(step=4)
    with pytest.raises(tolaria.NoSnapshot, match=r"step 5 is not held, held are steps \[4\]"):
        governor.execute_rollback(to=5)
    assert (freeze(model, optimizer), governor.digest()) == (before, digest)
    _step(model, optimizer)
    governor.execute_rollback(to=4)
    assert (freeze(model, optimizer), governor.digest()) == (before, digest)


def test_a_snapshot_that_was_undone_or_overwritten_is_refused(govern: Govern, freeze: Freeze) -> None:
    model, optimizer = _world()
    governor = govern(model, optimizer, slots=3)
    first = governor.snapshot()
    before = freeze(model, optimizer)
    _step(model, optimizer)
    second = governor.snapshot()
    governor.execute_rollback(to=first)
    assert second.state == "dropped"
    with pytest.raises(tolaria.NoSnapshot):
        governor.execute_rollback(to=second)
    assert freeze(model, optimizer) == before
    for _ in range(3):
        _step(model, optimizer)
        governor.snapshot()
    changed = freeze(model, optimizer)
    with pytest.raises(tolaria.NoSnapshot):
        governor.execute_rollback(to=first)
    _step(model, optimizer)
    governor.execute_rollback()
    assert freeze(model, optimizer) == changed
