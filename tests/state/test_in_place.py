"""Rollbacks write in place: no address and no identity changes, no memory is taken, and stale graphs are found out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

import tolaria
from tolaria import TolariaGovernor
from tolaria.state.leaves import Leaves
from tolaria.state.train_state import TrainState

Govern = Callable[..., TolariaGovernor]


class World:
    def __init__(self, width: int = 4) -> None:
        self.model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=torch.tensor(0.01), amsgrad=True)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        self.average = AveragedModel(self.model)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.scaler.scale(self.model(torch.randn(4, 3)).square().mean()).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.average.update_parameters(self.model)

    def govern(self, govern: Govern, **options: Any) -> TolariaGovernor:
        governor = govern(self.model, self.optimizer, scaler=self.scaler, **options)
        governor.register("average", self.average)
        return governor

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.model.state_dict(keep_vars=True).items()
        yield from self.average.state_dict(keep_vars=True, prefix="average.").items()
        for i, values in enumerate(self.optimizer.state.values()):
            yield from ((f"state[{i}].{key}", value) for key, value in values.items())
        yield "lr", self.optimizer.param_groups[0]["lr"]
        yield "scale", self.scaler._scale  # type: ignore[misc]
        yield "growth", self.scaler._growth_tracker  # type: ignore[misc]


def test_identity_and_address_survive_100_rollbacks(govern: Govern, freeze: Callable[..., Any]) -> None:
    world = World()
    governor = world.govern(govern)
    world.step()
    governor.snapshot()
    held = [(name, tensor, tensor.data_ptr(), tensor.untyped_storage().data_ptr()) for name, tensor in world.tensors()]
    groups = list(map(id, world.optimizer.param_groups))
    inner = {id(parameter): id(values) for parameter, values in world.optimizer.state.items()}
    before = freeze(world.model, world.optimizer, world.scaler, world.average)
    for _ in range(100):
        world.step()
        governor.execute_rollback()
        assert freeze(world.model, world.optimizer, world.scaler, world.average) == before
        for (name, tensor, address, storage), (now_name, now) in zip(held, world.tensors(), strict=True):
            assert now_name == name
            assert now is tensor, name
            assert (now.data_ptr(), now.untyped_storage().data_ptr()) == (address, storage), name
    assert list(map(id, world.optimizer.param_groups)) == groups
    assert {id(parameter): id(values) for parameter, values in world.optimizer.state.items()} == inner


# ---------------------------------------------------------------- memory


class Allocations(TorchDispatchMode):
    """Counts the bytes of every storage that an operator makes and that nobody held before."""

    def __init__(self, held: list[torch.Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage().data_ptr() for tensor in held}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in _pytree.tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        result = func(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, _pytree.tree_leaves(result)):
            if tensor.untyped_storage().data_ptr() not in self._known | given:
                self.bytes += tensor.untyped_storage().nbytes()
        return result


def _count(world: World, governor: TolariaGovernor, call: Callable[[], object]) -> int:
    arenas = [slot.arena for slot in governor._keeper.vault.slots if slot.arena is not None]
    held = [tensor for _, tensor in world.tensors()] + [flat for arena in arenas for flat in arena.flat.values()]
    with Allocations(held) as allocations:
        call()
    return allocations.bytes


def _state_bytes(world: World) -> int:
    return sum(tensor.untyped_storage().nbytes() for _, tensor in world.tensors())


def test_nothing_is_allocated_between_layout_changes(govern: Govern) -> None:
    """The few bytes that remain (sums that look for NaN) do not grow with the state."""
    counted: dict[int, list[int]] = {}
    sizes: dict[int, int] = {}
    for width in (4, 400):
        world = World(width)
        governor = world.govern(govern)
        world.step()
        for _ in range(3):  # every slot gets its memory
            governor.snapshot()
        counted[width] = []
        for _ in range(4):
            world.step()
            counted[width].append(_count(world, governor, governor.snapshot))
            world.step()
            counted[width].append(_count(world, governor, governor.execute_rollback))
            verified = functools.partial(governor.execute_rollback, verify="before")
            counted[width].append(_count(world, governor, verified))
        sizes[width] = _state_bytes(world)
    assert counted[4] == counted[400]
    assert max(counted[400]) < 256
    assert sizes[400] > 50_000


def test_a_layout_change_allocates_once_for_each_slot(govern: Govern) -> None:
    """Red twin of the test above: where memory is taken, the count shows it."""
    world = World(400)
    governor = world.govern(govern)
    world.step()
    for _ in range(3):
        assert _count(world, governor, governor.snapshot) >= _state_bytes(world)
    assert _count(world, governor, governor.snapshot) < 256
    world.model[1].register_buffer("late", torch.zeros(7))
    for _ in range(3):
        assert _count(world, governor, governor.snapshot) >= _state_bytes(world)
    assert _count(world, governor, governor.snapshot) < 256


# ---------------------------------------------------------------- version counters


def test_a_backward_that_straddles_the_rollback_raises(govern: Govern) -> None:
    world = World()
    governor = world.govern(govern)
    world.step()
    governor.snapshot()
    loss = world.model(torch.randn(4, 3)).sum()
    governor.execute_rollback()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_right_order_works_after_a_rollback(govern: Govern, freeze: Callable[..., Any]) -> None:
    world = World()
    governor = world.govern(govern)
    world.step()
    governor.snapshot()
    before = freeze(world.model)
    governor.execute_rollback()
    world.step()
    assert governor.statistics().stale_vetoes == 0
    assert freeze(world.model) != before


@pytest.mark.parametrize("kind", ["parameter", "buffer", "moment", "view of a parameter"])
def test_version_counters_of_every_kind_are_bumped(kind: str, govern: Govern) -> None:
    world = World()
    governor = world.govern(govern)
    world.step()
    tensor: torch.Tensor = {
        "parameter": world.model[0].weight,
        "buffer": world.model[1].running_mean,
        "moment": world.optimizer.state[world.model[0].weight]["exp_avg"],
        "view of a parameter": world.model[0].weight.detach()[0],
    }[kind]
    governor.snapshot()
    taken = tensor._version
    governor.execute_rollback()
    assert tensor._version > taken


def test_a_snapshot_bumps_no_version_counter(govern: Govern) -> None:
    """A graph built before a snapshot stays usable: only its gradients have to be dead at that moment."""
    world = World()
    governor = world.govern(govern)
    loss = world.model(torch.randn(4, 3)).sum()
    governor.snapshot()
    loss.backward()
    gradient = world.model[0].weight.grad
    assert gradient is not None
    assert bool(gradient.abs().sum() > 0)


def test_stale_gradients_are_refused_where_no_version_counter_can_tell(govern: Govern, raw: Callable[..., Any]) -> None:
    """No operator saves a bias, so its stale gradient would be applied silently: the epoch of the forward tells."""
    bias = nn.Sequential(nn.Linear(2, 2))
    bias[0].weight.requires_grad_(False).zero_()
    optimizer = torch.optim.SGD([bias[0].bias], lr=1.0)
    governor = govern(bias, optimizer)
    governor.snapshot()
    loss = bias(torch.ones(1, 2)).sum()
    governor.execute_rollback()
    before = raw(bias[0].bias)
    loss.backward()
    optimizer.step()
    assert raw(bias[0].bias) == before
    assert bias[0].bias.grad is None
    assert governor.statistics().stale_vetoes == 1


def test_strict_mode_raises_on_stale_gradients(govern: Govern, raw: Callable[..., Any]) -> None:
    model = nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    optimizer = torch.optim.SGD([model.bias], lr=1.0)
    governor = govern(model, optimizer, strict=True)
    governor.snapshot()
    loss = model(torch.ones(1, 2)).sum()
    governor.execute_rollback()
    before = raw(model.bias)
    loss.backward()
    with pytest.raises(tolaria.StaleGradients):
        optimizer.step()
    assert raw(model.bias) == before


# ---------------------------------------------------------------- inference mode


def test_snapshots_and_rollbacks_inside_inference_mode(govern: Govern, freeze: Callable[..., Any]) -> None:
    """A validation loop under `inference_mode` may call the governor: nothing it allocates is an inference tensor."""
    world = World()
    governor = world.govern(govern)
    world.step()
    before = freeze(world.model, world.optimizer, world.average)
    with torch.inference_mode():
        for _ in range(3):
            governor.snapshot()
    for _ in range(2):
        world.step()
        with torch.inference_mode():
            governor.execute_rollback()
        assert freeze(world.model, world.optimizer, world.average) == before
    world.step()
    for _ in range(3):
        governor.snapshot()
    assert not any(tensor.is_inference() for _, tensor in world.tensors())


def test_a_survey_that_knows_the_last_one_sees_what_a_fresh_one_sees() -> None:
    """Storages are taken over from the last survey only where nothing changed; changed ones are looked at again."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    state = TrainState(model, [])
    first = state.survey().leaves
    old = model[0].weight.data
    model[0].weight.data = torch.zeros(4, 3)  # other memory, same object
    model[1].running_mean = torch.ones(4)  # another object
    model[0].bias.data = model[0].bias.data[:2]  # same memory, other shape
    second = state.survey().leaves
    fresh = Leaves()
    for part in state.parts:
        part.survey(fresh)
    assert [(leaf.name, leaf.geometry) for leaf in second.leaves] == [
        (leaf.name, leaf.geometry) for leaf in fresh.leaves
    ]
    assert [storage.key for storage in second.storages] == [storage.key for storage in fresh.storages]
    for mine, theirs in zip(second.storages, fresh.storages, strict=True):
        assert mine.bytes.data_ptr() == theirs.bytes.data_ptr()
    kept = {id(storage.bytes) for storage in first.storages} & {id(storage.bytes) for storage in second.storages}
    assert len(kept) == len(first.storages) - 3  # the weight, the bias and the running mean were looked at again
    del old


def test_the_same_address_in_another_storage_is_looked_at_again() -> None:
    """The former storage may be shrunk to nothing, and its address taken once more: its old view would be no place."""
    memory = numpy.zeros(12, dtype="float32")
    model = torch.nn.Linear(3, 4, bias=False)
    model.weight.data = torch.from_numpy(memory).view(4, 3)
    state = TrainState(model, [])
    first = state.survey().leaves.storages[0]
    model.weight.data = torch.from_numpy(memory).view(4, 3)
    second = state.survey().leaves.storages[0]
    assert first.key == second.key
    assert second.bytes.untyped_storage()._cdata == model.weight.untyped_storage()._cdata
