"""Registered objects: each kind that `register` takes, and hostile ones."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import tolaria
from tolaria import TolariaGovernor

Govern = Callable[..., TolariaGovernor]
Freeze = Callable[..., Any]


@pytest.fixture
def governor(govern: Govern) -> TolariaGovernor:
    return govern(nn.Linear(2, 2))


class Tally:
    """Anything with `state_dict` and `load_state_dict`. Hands out and takes its live objects, like most do."""

    def __init__(self) -> None:
        self.tensor = torch.zeros(3)
        self.array = np.zeros(3)
        self.numbers: Any = [1, 2.0, {"three": {3}}]
        self.window = deque([1, 2], maxlen=3)

    def state_dict(self) -> dict[str, Any]:
        return {"tensor": self.tensor, "array": self.array, "numbers": self.numbers, "window": self.window}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def touch(self) -> None:
        self.tensor.add_(1.0)
        self.array += 1.0
        self.numbers[2]["three"].add(len(self.numbers))
        self.numbers.append(4)
        self.window.append(7)


def test_a_stateful_object_that_aliases_its_live_tensors(governor: TolariaGovernor, freeze: Freeze) -> None:
    """Neither the live object nor one that took the snapshot's values may ever reach into the snapshot."""
    tally = Tally()
    governor.register("tally", tally)
    tally.touch()
    governor.snapshot()
    before, digest = freeze(tally), governor.digest()
    for _ in range(3):
        tally.touch()
        assert governor.digest() != digest
        governor.execute_rollback()
        assert (freeze(tally), governor.digest()) == (before, digest)


def test_a_generator(governor: TolariaGovernor) -> None:
    generator = torch.Generator().manual_seed(5)
    governor.register("generator", generator)
    torch.rand(2, generator=generator)
    governor.snapshot()
    drawn = torch.rand(4, generator=generator)
    for _ in range(2):
        governor.execute_rollback()
        assert torch.equal(torch.rand(4, generator=generator), drawn)


def test_accessors(governor: TolariaGovernor) -> None:
    """A pair of functions; here around a NumPy generator, which has no `state_dict`."""
    generator = np.random.default_rng(3)
    box: dict[str, Any] = {"list": [1, [2]]}

    def write(state: Any) -> None:
        generator.bit_generator.state, box["list"] = state

    governor.register("numpy", (lambda: (generator.bit_generator.state, box["list"]), write))
    governor.snapshot()
    drawn = generator.random(3)
    for _ in range(2):
        box["list"][1].append(9)
        governor.execute_rollback()
        assert box["list"] == [1, [2]]
        assert np.array_equal(generator.random(3), drawn)


def test_a_module_keeps_its_addresses(governor: TolariaGovernor, freeze: Freeze) -> None:
    average = AveragedModel(nn.Linear(3, 3))
    average.register_buffer("mask", torch.full((2,), -float("inf")))
    governor.register("average", average)
    governor.snapshot()
    before, addresses = freeze(average), [p.data_ptr() for p in average.parameters()]
    average.update_parameters(nn.Linear(3, 3))
    average(torch.ones(3)).sum().backward()
    governor.execute_rollback()
    assert freeze(average) == before
    assert [p.data_ptr() for p in average.parameters()] == addresses
    assert all(p.grad is None for p in average.parameters())


def test_an_optimizer_keeps_its_tensors(governor: TolariaGovernor, freeze: Freeze) -> None:
    critic = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(critic.parameters())
    governor.register("critic optimizer", optimizer)  # governs the parameters of the critic as well

    def step() -> None:
        optimizer.zero_grad()
        critic(torch.ones(2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    governor.snapshot()
    before, held = freeze(critic, optimizer), optimizer.state[critic.weight]["exp_avg"]
    step()
    governor.execute_rollback()
    assert freeze(critic, optimizer) == before
    assert optimizer.state[critic.weight]["exp_avg"] is held


def test_a_scaler(governor: TolariaGovernor, freeze: Freeze) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(1))
    governor.register("scaler", scaler)
    governor.snapshot()
    before, held = freeze(scaler), scaler._scale
    scaler.update(4.0)
    governor.execute_rollback()
    assert freeze(scaler) == before
    assert scaler._scale is held


def test_an_object_that_wraps_a_module_keeps_its_version_marks(governor: TolariaGovernor) -> None:
    """`Module.state_dict` carries versions in an attribute; without them modules take new state for old."""

    class Wrapper:
        def __init__(self) -> None:
            self.module = nn.Sequential(nn.BatchNorm1d(2))
            self.metadata: list[Any] = []

        def state_dict(self) -> OrderedDict[str, torch.Tensor]:
            return self.module.state_dict()  # type: ignore[return-value]

        def load_state_dict(self, state: Any) -> None:
            self.metadata.append(getattr(state, "_metadata", None))
            self.module.load_state_dict(state)

    wrapper = Wrapper()
    governor.register("wrapper", wrapper)
    governor.snapshot()
    wrapper.module(torch.randn(4, 2))
    for _ in range(2):
        governor.execute_rollback()
    assert wrapper.metadata == [wrapper.module.state_dict()._metadata] * 2  # type: ignore[attr-defined]
    assert wrapper.module.state_dict()["0.num_batches_tracked"] == 0


def test_several_extras_of_every_kind(governor: TolariaGovernor, freeze: Freeze) -> None:
    tally, generator, module = Tally(), torch.Generator(), nn.Linear(1, 1)
    governor.register("tally", tally)
    governor.register("generator", generator)
    governor.register("module", module)
    governor.snapshot()
    before = freeze(tally, generator, module)
    tally.touch()
    torch.rand(1, generator=generator)
    module.weight.data.zero_()
    governor.execute_rollback()
    assert freeze(tally, generator, module) == before


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "value",
    [object(), 3, [1, 2], (lambda: 1,), np.random.default_rng(0)],
    ids=["object", "number", "list", "function in a tuple", "generator"],  # the same in every worker: no addresses
)
def test_what_cannot_be_read_and_written_is_refused(value: Any, governor: TolariaGovernor) -> None:
    digest = governor.digest()
    with pytest.raises(tolaria.UsageError, match="registering 'thing'"):
        governor.register("thing", value)
    assert governor.digest() == digest
    governor.register("thing", torch.Generator())  # the name is still free
    governor.snapshot()
    assert governor.execute_rollback().success


@pytest.mark.parametrize("name", ["model", "tally"])
def test_a_name_in_use_is_refused(name: str, governor: TolariaGovernor) -> None:
    governor.register("tally", Tally())
    digest = governor.digest()
    with pytest.raises(tolaria.UsageError, match="name is in use"):
        governor.register(name, Tally())
    assert governor.digest() == digest


def test_an_extra_registered_after_the_snapshot_is_refused_at_the_rollback(
    governor: TolariaGovernor, freeze: Freeze
) -> None:
    governor.snapshot()
    tally = Tally()
    governor.register("tally", tally)
    governor.model.weight.data.fill_(3.0)
    changed, digest = freeze(tally, governor.model), governor.digest()
    with pytest.raises(tolaria.StateMismatch, match="tally was registered later"):
        governor.execute_rollback()
    assert (freeze(tally, governor.model), governor.digest()) == (changed, digest)
    governor.snapshot()
    tally.touch()
    governor.execute_rollback()
    assert (freeze(tally, governor.model), governor.digest()) == (changed, digest)


class Failing(Tally):
    """Hostile: raises on demand."""

    fails = ""

    def state_dict(self) -> dict[str, Any]:
        if self.fails == "state_dict":
            raise ZeroDivisionError("no state today")
        return super().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.fails == "load_state_dict":
            raise ZeroDivisionError("no loading today")
        super().load_state_dict(state)


def test_an_extra_that_cannot_be_read_leaves_earlier_snapshots(governor: TolariaGovernor, freeze: Freeze) -> None:
    failing = Failing()
    governor.register("failing", failing)
    governor.snapshot()
    before = freeze(failing, governor.model)
    governor.model.weight.data.fill_(3.0)
    failing.touch()
    changed = freeze(failing, governor.model)
    failing.fails = "state_dict"
    for _ in range(4):  # more often than there are slots
        with pytest.raises(ZeroDivisionError):
            governor.snapshot()
    failing.fails = ""
    assert freeze(failing, governor.model) == changed
    governor.execute_rollback()
    assert freeze(failing, governor.model) == before


def test_an_extra_that_cannot_be_written_says_that_the_state_is_undefined(
    governor: TolariaGovernor, freeze: Freeze, read_random: Callable[[], Any]
) -> None:
    """All else is restored, and a second rollback, once the cause is mended, makes it whole."""
    failing, tally = Failing(), Tally()
    governor.register("failing", failing)
    governor.register("tally", tally)
    governor.snapshot()
    before, random_state, digest = freeze(tally, governor.model), read_random(), governor.digest()
    for thing in (failing, tally):
        thing.touch()
    torch.rand(3)
    governor.model.weight.data.fill_(3.0)
    failing.fails = "load_state_dict"
    with pytest.raises(tolaria.RollbackFailed, match="failing could not be restored") as caught:
        governor.execute_rollback()
    assert caught.value.state_intact is False
    assert (freeze(tally, governor.model), read_random()) == (before, random_state)
    assert governor.digest() != digest
    failing.fails = ""
    governor.execute_rollback()
    assert governor.digest() == digest
