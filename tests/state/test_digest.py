"""`governor.digest()`: equal for equal states, different for the smallest difference, and without effect."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tolaria import TolariaGovernor

Govern = Callable[..., TolariaGovernor]


class World:
    def __init__(self) -> None:
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.model.register_buffer("hidden", torch.zeros(2), persistent=False)
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 3)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        self.value: Any = None
        self.scaler.scale(self.model(torch.randn(4, 2)).sum()).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def write(self, value: Any) -> None:
        self.value = value

    def govern(self, govern: Govern) -> TolariaGovernor:
        governor = govern(self.model, self.optimizer, scheduler=self.scheduler, scaler=self.scaler)
        governor.register("value", (lambda: self.value, self.write))
        return governor


def test_equal_states_of_different_objects_have_equal_digests(govern: Govern) -> None:
    first, second = World(), World()
    one, two = first.govern(govern), second.govern(govern)
    assert one.digest() == one.digest() == two.digest()
    for world in (first, second):
        world.value = {"a": deque([1]), "b": OrderedDict(c=object)}
    assert one.digest() == two.digest()


def test_it_does_not_depend_on_how_the_governor_is_attached(govern: Govern) -> None:
    world = World()
    acting = world.govern(govern)
    digest = acting.digest()
    acting.close()
    observing = govern(world.model, world.optimizer, scheduler=world.scheduler, scaler=world.scaler, mode="observe")
    observing.register("value", (lambda: world.value, world.write))
    assert observing.digest() == digest


MEDDLERS: dict[str, Callable[[World], object]] = {
    "parameter": lambda w: w.model[0].weight.data[0, 0].mul_(1.0000001),  # type: ignore[index]
    "signed zero": lambda w: w.model.hidden.neg_(),
    "buffer": lambda w: w.model[1].running_var.add_(1e-6),  # type: ignore[operator, union-attr]
    "batch count": lambda w: w.model[1].num_batches_tracked.add_(1),  # type: ignore[operator, union-attr]
    "moment": lambda w: w.optimizer.state[w.model[0].weight]["exp_avg"][0, 0].add_(1e-6),
    "step": lambda w: w.optimizer.state[w.model[0].weight]["step"].add_(1),
    "key": lambda w: w.optimizer.state[w.model[0].weight].update(new=1),
    "group": lambda w: w.optimizer.param_groups[0].update(eps=1e-9),
    "attribute": lambda w: setattr(w.optimizer, "calls", 1),
    "scheduler": lambda w: setattr(w.scheduler, "last_epoch", 1),
    "scale": lambda w: w.scaler.update(3.0),
    "growth": lambda w: w.scaler.set_growth_interval(3),
    "extra": lambda w: setattr(w, "value", 0),
    "swapped rows": lambda w: w.model[0].weight.data.copy_(w.model[0].weight.data.flip(0)),
    "shape": lambda w: w.model._buffers.update(hidden=torch.zeros(1, 2)),
    "type": lambda w: w.model._buffers.update(hidden=torch.zeros(2, dtype=torch.int32)),
    "persistence": lambda w: w.model._non_persistent_buffers_set.clear(),
    "another buffer": lambda w: w.model.register_buffer("more", None),
}


@pytest.mark.parametrize("name", MEDDLERS)
def test_the_smallest_difference_shows(name: str, govern: Govern) -> None:
    world = World()
    governor = world.govern(govern)
    before = governor.digest()
    governor.snapshot()
    MEDDLERS[name](world)
    assert governor.digest() != before
    governor.execute_rollback()
    assert governor.digest() == before


class Thing:
    def __init__(self, number: int) -> None:
        self.number, self.itself = number, self


class Slotted:
    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


PAIRS: list[tuple[Any, Any]] = [
    (1, 1.0),
    (1, True),
    (1, "1"),
    (0.0, -0.0),
    (b"a", "a"),
    (None, "None"),
    ([1, 23], [12, 3]),
    ([1, [2]], [[1], 2]),
    ([1], (1,)),
    ({"a": {"b": 1}}, {"a": {}, "b": 1}),
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    ({1}, {2}),
    (deque([1, 2]), deque([2, 1])),
    (deque([1], maxlen=2), deque([1], maxlen=3)),
    (np.zeros(3), np.array([0.0, 0.0, 1e-300])),
    (np.zeros(3), np.zeros((3, 1))),
    (np.zeros(2, dtype=np.int32), np.zeros(2, dtype=np.float32)),
    (np.float32(1), np.float64(1)),
    (torch.zeros(2), torch.zeros(1, 2)),
    (torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16)),
    (torch.tensor([0.0]), torch.tensor([-0.0])),
    (Thing(1), Thing(2)),
    (Slotted(1), Slotted(2)),
    (OrderedDict(a=1, b=2), OrderedDict(b=2, a=1)),
    (complex(0, 1), complex(1, 0)),
]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0]!r:.20}-{pair[1]!r:.20}")
def test_host_values_that_look_alike_have_different_digests(pair: tuple[Any, Any], govern: Govern) -> None:
    world = World()
    governor = world.govern(govern)
    digests = []
    for world.value in pair:
        digests.append(governor.digest())
        assert governor.digest() == digests[-1]
    assert digests[0] != digests[1]


def test_it_changes_nothing(govern: Govern, freeze: Callable[..., Any], read_random: Callable[[], Any]) -> None:
    world = World()
    governor = world.govern(govern)
    world.model(torch.randn(4, 2)).sum().backward()
    loss = world.model(torch.randn(4, 2)).sum()
    before = freeze(world.model, world.optimizer, world.scheduler, world.scaler), read_random()
    versions = [p._version for p in world.model.parameters()]
    governor.digest()
    assert (freeze(world.model, world.optimizer, world.scheduler, world.scaler), read_random()) == before
    assert [p._version for p in world.model.parameters()] == versions
    assert world.model[0].weight.grad is not None
    loss.backward()
