"""Tensor subclasses that hold their bytes in other tensors: shards of a DTensor, and anything that flattens."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from state import two_ranks
from state.wrapping import Pair
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor, init_device_mesh

import tolaria
from tolaria import TolariaGovernor, observe
from tolaria.state.leaves import Leaves
from tolaria.state.wrappers import Wrapper
from tolaria.update import Update

Govern = Callable[..., TolariaGovernor]
Freeze = Callable[..., Any]


def _pair(*shape: int, label: Any = "pair") -> Pair:
    first = torch.randn(*shape)
    return Pair(first, torch.randn(*shape), label)


class Layer(nn.Module):
    """A linear map whose weight, and one buffer, are wrappers; the bias is a plain parameter."""

    def __init__(self, weight: torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(_pair(2, 3) if weight is None else weight)
        self.bias = nn.Parameter(torch.zeros(2))
        self.register_buffer("mean", _pair(2))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ self.weight.t() + self.bias


def _train(model: Layer, optimizer: torch.optim.Optimizer, seed: int = 0, steps: int = 2) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        output = model(torch.randn(4, 3, generator=generator))
        output.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.mean.mul_(0.9).add_(0.1)


def _world() -> tuple[Layer, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = Layer()
    # no foreach: a bias that is added to a wrapper gets a wrapper as its gradient, and a list may not mix both
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)


def _plain(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for key in tensor.__tensor_flatten__()[0]:
        if isinstance(getattr(tensor, key), torch.Tensor):
            yield from _plain(getattr(tensor, key))


def _look(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """Wrappers, the tensors in them, and their addresses."""
    found = [*model.parameters(), *model.buffers()]
    found += [value for values in optimizer.state.values() for value in values.values() if torch.is_tensor(value)]
    return [(id(t), [(id(plain), plain.data_ptr()) for plain in _plain(t)]) for t in found]


# ---------------------------------------------------------------- exact


def test_a_wrapper_comes_back_with_all_that_is_in_it(govern: Govern, freeze: Freeze) -> None:
    model, optimizer = _world()
    governor = govern(model, optimizer)
    _train(model, optimizer)
    assert isinstance(optimizer.state[model.weight]["exp_avg"], Pair)
    governor.snapshot()
    before, seen, digest = freeze(model, optimizer), _look(model, optimizer), governor.digest()
    _train(model, optimizer, seed=1)
    reference = freeze(model, optimizer)
    for _ in range(2):
        versions = model.weight._version, model.weight.second._version
        governor.execute_rollback(verify="before")
        assert (freeze(model, optimizer), _look(model, optimizer), governor.digest()) == (before, seen, digest)
        assert (model.weight._version, model.weight.second._version) > versions
        _train(model, optimizer, seed=1)
        assert freeze(model, optimizer) == reference


def test_without_its_inner_tensors_a_wrapper_does_not_come_back(
    govern: Govern, freeze: Freeze, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red twin."""
    monkeypatch.setattr(Wrapper, "tensors", lambda _: iter(()))
    model, optimizer = _world()
    governor = govern(model, optimizer)
    governor.snapshot()
    before = freeze(model, optimizer)
    _train(model, optimizer)
    governor.execute_rollback()
    assert freeze(model, optimizer) != before


def test_a_governed_run_over_wrappers(govern: Govern, freeze: Freeze) -> None:
    """Norms, the finite check, automatic snapshots and an automatic rollback all meet wrappers."""
    model, optimizer = _world()
    governor = govern(model, optimizer, cadence=1, probation=1)
    rolled_back: list[int] = []
    for number in governor.watch(range(6)):
        loss = model(torch.ones(4, 3) * number).square().mean()
        loss.backward()
        if number == 4 and not rolled_back:
            model.weight.second.fill_(float("nan"))  # what the wrapper looks like from outside stays finite
        rolled_back += [number] * governor.step(loss=loss.detach().first, clip=1.0).rolled_back
    assert rolled_back == [4]
    assert bool(model.weight.second.isfinite().all())
    assert governor.statistics().snapshots > 2


def test_a_snapshot_of_a_wrapper_with_something_non_finite_in_it_is_rejected(govern: Govern) -> None:
    """Found in the bytes of the snapshot, when the loop writes it after the step was judged."""
    model, optimizer = _world()
    governor = govern(model, optimizer, cadence=1, probation=1)
    poisoned = False
    for number in governor.watch(range(4)):
        loss = model(torch.ones(4, 3) * number).square().mean()
        loss.backward()
        governor.step(loss=loss.detach().first)
        if number == 2 and not poisoned:
            poisoned = True
            model.mean.second.fill_(float("inf"))
    assert governor.rollbacks == governor.statistics().snapshots_rejected == 1
    assert bool(model.mean.second.isfinite().all())


def test_a_wrapper_in_a_wrapper(govern: Govern, freeze: Freeze) -> None:
    inner = _pair(2, 3)
    model = Layer(Pair(inner, _pair(2, 3)))
    assert len(list(_plain(model.weight))) == 4
    optimizer = torch.optim.SGD([model.weight], lr=0.1)
    governor = govern(model, optimizer)
    governor.snapshot()
    before, seen = freeze(model), _look(model, optimizer)
    with torch.no_grad():
        model.weight.add_(1.0)
    governor.execute_rollback()
    assert (freeze(model), _look(model, optimizer)) == (before, seen)


def test_wrappers_share_and_are_tied(govern: Govern, freeze: Freeze) -> None:
    """One inner tensor in two wrappers, one of them in two places, is copied once."""
    shared = torch.zeros(4)
    model = nn.Module()
    model.register_buffer("a", Pair(shared, torch.ones(4)))
    model.register_buffer("b", Pair(shared, torch.ones(4)))
    model.register_buffer("c", model.a)
    governor = govern(model)
    governor.snapshot()
    assert governor.capabilities().state_bytes == 3 * 4 * 4
    before = freeze(model)
    model.b.add_(1.0)
    model.c = _pair(4)
    governor.execute_rollback()
    assert model.c is model.a
    assert model.b.first is model.a.first
    assert freeze(model) == before


def test_replaced_wrappers_are_put_back(govern: Govern, freeze: Freeze) -> None:
    model, optimizer = _world()
    governor = govern(model, optimizer)
    _train(model, optimizer)
    governor.snapshot()
    before, seen = freeze(model, optimizer), _look(model, optimizer)
    model.mean = _pair(2)
    optimizer.state[model.weight]["exp_avg"] = _pair(2, 3)
    model.weight = nn.Parameter(_pair(2, 3))
    optimizer.param_groups[0]["params"][0] = model.weight
    governor.execute_rollback()
    assert (freeze(model, optimizer), _look(model, optimizer)) == (before, seen)


def test_freezing_a_wrapper_is_no_change_of_its_context(govern: Govern) -> None:
    model, optimizer = _world()
    governor = govern(model, optimizer)
    governor.snapshot()
    model.weight.requires_grad_(False)
    governor.execute_rollback()
    assert not model.weight.requires_grad


def test_a_stale_backward_through_a_wrapper_raises(govern: Govern) -> None:
    model, optimizer = _world()
    governor = govern(model, optimizer)
    governor.snapshot()
    loss = model.weight.square().sum()
    governor.execute_rollback()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_that_are_wrappers_are_held_too(govern: Govern, freeze: Freeze) -> None:
    model, optimizer = _world()
    governor = govern(model, optimizer)
    model(torch.ones(4, 3)).square().mean().backward()
    gradient = model.weight.grad
    governor.snapshot(grads="capture")
    before = freeze(gradient)
    with torch.no_grad():
        gradient.mul_(2.0)
    model.weight.grad = None
    governor.execute_rollback()
    assert model.weight.grad is gradient
    assert freeze(gradient) == before


# ---------------------------------------------------------------- refused


class Marked(nn.Parameter):
    """A subclass with memory of its own. Its bytes might do; nobody can know that of a subclass."""


class Hollow(Pair):
    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return [], None


class Fleeting(Pair):
    @property
    def halves(self) -> torch.Tensor:
        return self.first * 0.5

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["halves"], None


class Solid(torch.Tensor):
    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["twin"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, context: Any, size: Any, stride: Any) -> Solid:
        raise NotImplementedError


def _solid() -> torch.Tensor:
    weight = nn.Parameter(torch.zeros(2, 3).as_subclass(Solid))
    weight.twin = torch.zeros(2)
    return weight


UNSUPPORTED: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "marked": (lambda: Marked(torch.zeros(2, 3)), r"model\.weight is a .*Marked"),
    "hollow": (lambda: nn.Parameter(Hollow(torch.zeros(2, 3), torch.zeros(2, 3))), "Hollow .*lasting inner tensors"),
    "fleeting": (lambda: nn.Parameter(Fleeting(torch.zeros(2, 3), torch.zeros(2, 3))), "Fleeting .*lasting"),
    "solid": (_solid, "Solid with memory of its own"),
    "meta inside": (
        lambda: nn.Parameter(Pair(torch.zeros(2, 3), torch.zeros(2, 3, device="meta"))),
        r"model\.weight\.second is on the meta device",
    ),
    "sparse inside": (
        lambda: nn.Parameter(Pair(torch.zeros(2, 3), torch.zeros(2, 3).to_sparse())),
        r"model\.weight\.second has layout torch\.sparse_coo",
    ),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_subclasses_that_cannot_be_restored_are_refused(kind: str, govern: Govern) -> None:
    make, message = UNSUPPORTED[kind]
    model = nn.Module()
    model.register_parameter("weight", make())
    attributes = set(vars(model))
    with pytest.raises(tolaria.UnsupportedState, match=message):
        govern(model)
    assert set(vars(model)) == attributes


Undo = Callable[[], object]


def _relabel(weight: Pair) -> Undo:
    weight.label = "another"
    return lambda: setattr(weight, "label", "pair")


def _exchange(weight: Pair) -> Undo:
    second, weight.second = weight.second, torch.zeros(2, 3)
    return lambda: setattr(weight, "second", second)


def _move(weight: Pair) -> Undo:
    data = weight.second.data
    weight.second.data = data.clone()
    return lambda: setattr(weight.second, "data", data)


def _become(weight: Pair) -> Undo:
    weight.__class__ = Hollow2
    return lambda: setattr(weight, "__class__", Pair)


class Hollow2(Pair):
    """Looks the same; is another class."""


CHANGES: dict[str, tuple[Callable[[Pair], Undo], str]] = {
    "context": (_relabel, r"model\.weight changed what is not in its tensors"),
    "inner replaced": (_exchange, r"model\.weight\.second was replaced by another object"),
    "inner moved": (_move, r"model\.weight\.second was given other storage"),
    "class": (_become, r"model\.weight has another type"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_wrapper_that_changed_in_more_than_bytes_is_refused(name: str, govern: Govern, freeze: Freeze) -> None:
    change, message = CHANGES[name]
    model, optimizer = _world()
    governor = govern(model, optimizer)
    _train(model, optimizer)
    governor.snapshot()
    before, seen = freeze(model, optimizer), _look(model, optimizer)
    _train(model, optimizer)
    undo = change(model.weight)
    changed = freeze(model, optimizer)
    for verify in (None, "before"):
        with pytest.raises(tolaria.StateMismatch, match=message) as caught:
            governor.execute_rollback(verify=verify)
        assert caught.value.state_intact
        assert freeze(model, optimizer) == changed
    undo()
    governor.execute_rollback()
    assert (freeze(model, optimizer), _look(model, optimizer)) == (before, seen)


@pytest.mark.parametrize("name", CHANGES)
def test_without_the_comparison_a_changed_wrapper_passes(
    name: str, govern: Govern, freeze: Freeze, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red twin: it would be reported as restored, and is something else."""
    monkeypatch.setattr(Leaves, "changed_wrappers", lambda _: iter(()))
    model, optimizer = _world()
    governor = govern(model, optimizer)
    governor.snapshot()
    before = freeze(model), _look(model, optimizer)
    CHANGES[name][0](model.weight)
    assert governor.execute_rollback().success
    assert (freeze(model), _look(model, optimizer)) != before


@pytest.mark.parametrize(
    ("context", "other", "same"),
    [
        ((1, [2.0], {"a": torch.float32}), (1, [2.0], {"a": torch.float32}), True),
        ((1, [2.0]), (1, [2.5]), False),
        ({"a": 1}, {"b": 1}, False),
        ([1], (1,), False),
        (torch.ones(2), torch.ones(2), False),  # cannot be told without reading a device
    ],
)
def test_contexts_are_compared_by_value(context: Any, other: Any, same: bool, govern: Govern) -> None:
    model = nn.Module()
    model.register_buffer("table", _pair(2, label=context))
    governor = govern(model)
    governor.snapshot()
    model.table.label = other
    if same:
        assert governor.execute_rollback().success
    else:
        with pytest.raises(tolaria.StateMismatch, match="its context"):
            governor.execute_rollback()


# ---------------------------------------------------------------- DTensor


def _sharded(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))

    def shard(_: str, module: nn.Module, mesh: Any) -> None:
        for key, parameter in list(module._parameters.items()):
            module.register_parameter(key, nn.Parameter(distribute_tensor(parameter.data, mesh, [Shard(0)])))

    model = distribute_module(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)), mesh, shard)
    model.register_buffer("mean", distribute_tensor(torch.zeros(4), mesh, [Replicate()]))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def _train_sharded(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    mesh = model.mean.device_mesh
    for number in range(steps):
        inputs = distribute_tensor(torch.arange(12.0).view(4, 3) + number, mesh, [Replicate()])
        model[1](model[0](inputs).relu()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.mean.add_(1.0)


def test_the_local_shards_of_dtensors(one_rank: None, govern: Govern, freeze: Freeze) -> None:
    model, optimizer = _sharded()
    governor = govern(model, optimizer)
    _train_sharded(model, optimizer)
    assert isinstance(optimizer.state[model[0].weight]["exp_avg"], DTensor)
    governor.snapshot()
    before, seen, digest = freeze(model, optimizer), _look(model, optimizer), governor.digest()
    _train_sharded(model, optimizer)
    reference = freeze(model, optimizer)
    for _ in range(2):
        governor.execute_rollback()
        assert (freeze(model, optimizer), _look(model, optimizer), governor.digest()) == (before, seen, digest)
        _train_sharded(model, optimizer)
        assert freeze(model, optimizer) == reference
    model[0].weight.requires_grad_(False)  # a DTensor has this flag in its context
    governor.execute_rollback()
    assert _look(model, optimizer) == seen


def test_a_governed_run_over_dtensors(one_rank: None, govern: Govern) -> None:
    model, optimizer = _sharded()
    governor = govern(model, optimizer, cadence=1, probation=1)
    mesh, rolled_back = model.mean.device_mesh, []
    for number in governor.watch(range(5)):
        inputs = distribute_tensor(torch.full((2, 3), float(number)), mesh, [Replicate()])
        loss = model[1](model[0](inputs)).square().mean()
        loss.backward()
        if number == 3 and not rolled_back:
            model[1].bias.grad.to_local().fill_(float("nan"))
        rolled_back += [number] * governor.step(loss=loss, clip=1.0).rolled_back
    assert rolled_back == [3]
    assert all(bool(p.to_local().isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("clip", [None, 0.5])
def test_an_update_over_dtensors_that_waits_for_nothing(one_rank: None, clip: float | None) -> None:
    """As on a device with events: norms are plain tensors to be sent, and equal those of a model without shards."""
    found = []
    for whole in (False, True):
        model, optimizer = _sharded()
        if whole:
            for layer in model:
                for key, parameter in list(layer._parameters.items()):
                    layer.register_parameter(key, nn.Parameter(parameter.to_local().detach().clone()))
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        inputs = torch.arange(12.0).view(4, 3)
        if not whole:
            inputs = distribute_tensor(inputs, model.mean.device_mesh, [Replicate()])
        model[1](model[0](inputs)).square().mean().backward()
        parameters = list(model.parameters())
        outcome = Update([optimizer], [], None).run_late(parameters, None, clip, None, None, 1.0, True, lambda _: False)
        assert all(type(norms) is torch.Tensor for norms in outcome.norms.single)
        plain = [p if whole else p.to_local() for p in parameters]
        found.append((torch.cat(list(outcome.norms.single)).tolist(), [p.tolist() for p in plain]))
    assert found[0] == found[1]


def test_norms_of_shards_and_plain_tensors_together(one_rank: None) -> None:
    mesh = init_device_mesh("cpu", (1,))
    tensors = [torch.full((4,), 2.0), distribute_tensor(torch.full((9,), 1.0), mesh, [Shard(0)])]
    assert observe.gradient_norm(tensors) == (5.0, 0)
    tensors[1].to_local()[3] = float("nan")
    assert observe.gradient_norm(tensors)[1] == 1
    assert observe.num_nonfinite([_pair(2), tensors[1]]) == 1


def test_the_shards_of_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank snapshots and rolls back its own shards by hand; together they are the whole again.

    One rank is this process, for the sake of the seconds that another one takes to import torch.
    """
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    script = Path(two_ranks.__file__)
    other = subprocess.Popen([sys.executable, str(script), "1", str(tmp_path)], stderr=subprocess.PIPE, text=True)
    try:
        two_ranks.main(0, tmp_path)
    finally:
        try:
            _, error = other.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            other.kill()
            raise
    assert other.returncode == 0, error
    assert (tmp_path / "done-0").exists()
    assert (tmp_path / "done-1").exists()
