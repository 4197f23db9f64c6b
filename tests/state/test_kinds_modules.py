"""What a module holds: buffers that come, go and move, extra state, frozen constants."""

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
INF = float("inf")


class Holder(nn.Module):
    """A linear layer with one buffer that the test names."""

    def __init__(self, **buffers: torch.Tensor | None) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs)


def _rolls_back(governor: TolariaGovernor, freeze: Freeze, model: nn.Module, change: Callable[[], object]) -> None:
    """Snapshot, change, roll back, and that twice: the state must be the same down to the order of its keys."""
    governor.snapshot()
    before, digest, keys = freeze(model), governor.digest(), list(model.state_dict())
    for _ in range(2):
        change()
        assert freeze(model) != before, "the change changed nothing"
        governor.execute_rollback()
        assert freeze(model) == before
        assert governor.digest() == digest
        assert list(model.state_dict()) == keys


# ---------------------------------------------------------------- buffers


def test_a_buffer_assigned_out_of_place(govern: Govern, freeze: Freeze) -> None:
    model = Holder(ema=torch.arange(3.0))
    held = model.ema

    def change() -> None:
        model.ema = model.ema * 0.9 + 1.0

    _rolls_back(govern(model), freeze, model, change)
    assert model.ema is held


def test_a_buffer_assigned_out_of_place_before_the_snapshot(govern: Govern, freeze: Freeze) -> None:
    model = Holder(ema=torch.arange(3.0))
    governor = govern(model)
    model.ema = model.ema * 0.9 + 1.0  # another object than the governor saw at first
    _rolls_back(governor, freeze, model, lambda: model.ema.add_(1.0))


@pytest.mark.parametrize(
    "other",
    [
        torch.ones(3),
        torch.ones(7),
        torch.ones(0),
        torch.ones(2, 2),
        torch.ones(3, dtype=torch.float64),
        torch.ones(3, dtype=torch.float16),
        torch.ones(3, dtype=torch.int64),
    ],
    ids=lambda t: f"{t.dtype}-{tuple(t.shape)}",
)
def test_a_buffer_given_new_data(other: torch.Tensor, govern: Govern, freeze: Freeze) -> None:
    model = Holder(scale=torch.arange(3.0))
    held, address = model.scale, model.scale.data_ptr()

    def change() -> None:
        model.scale.data = other.clone()

    _rolls_back(govern(model), freeze, model, change)
    assert model.scale is held
    assert held.data_ptr() == address


def test_a_buffer_given_data_of_inference_mode(govern: Govern, freeze: Freeze) -> None:
    model = Holder(scale=torch.arange(3.0))

    def change() -> None:
        with torch.inference_mode():
            model.scale.data = torch.ones(3)

    _rolls_back(govern(model), freeze, model, change)
    model.scale.add_(1.0)  # a normal tensor again


def test_a_buffer_resized_in_place(govern: Govern, freeze: Freeze) -> None:
    model = Holder(cache=torch.arange(3.0))
    _rolls_back(govern(model), freeze, model, lambda: model.cache.resize_(1000).fill_(7.0))


def test_a_buffer_whose_memory_was_freed_is_refused(govern: Govern, freeze: Freeze) -> None:
    model = Holder(cache=torch.arange(3.0))
    governor = govern(model)
    governor.snapshot()
    before = freeze(model)
    cache = model.cache
    with torch.no_grad():
        model.layer.weight.add_(1.0)
    after = freeze(model.layer)
    cache.untyped_storage().resize_(0)
    with pytest.raises(tolaria.StateMismatch, match=r"memory of model\.cache was freed"):
        governor.execute_rollback()
    assert freeze(model.layer) == after
    cache.untyped_storage().resize_(12)
    governor.execute_rollback()
    assert freeze(model) == before


def test_a_half_precision_conversion_of_buffers(govern: Govern, freeze: Freeze) -> None:
    model = Holder(scale=torch.arange(3.0))
    model.layer.requires_grad_(False)

    def change() -> None:
        model._buffers["scale"] = model.scale.half()

    _rolls_back(govern(model), freeze, model, change)


def test_a_none_buffer(govern: Govern, freeze: Freeze) -> None:
    model = Holder(a=None, b=torch.ones(1), c=None)

    def change() -> None:
        model.a, model.b = torch.ones(2), None

    _rolls_back(govern(model), freeze, model, change)
    assert model.a is None


def test_a_buffer_added_after_the_snapshot_is_deleted(govern: Govern, freeze: Freeze) -> None:
    model = Holder(a=torch.zeros(1))

    def change() -> None:
        model.layer.register_buffer("late", torch.ones(2))
        model.register_buffer("later", torch.ones(2), persistent=False)

    _rolls_back(govern(model), freeze, model, change)
    assert not hasattr(model.layer, "late")


def test_a_buffer_deleted_after_the_snapshot_comes_back_in_its_place(govern: Govern, freeze: Freeze) -> None:
    model = Holder(a=torch.zeros(1), b=torch.ones(2), c=torch.ones(3))

    def change() -> None:
        del model.a

    _rolls_back(govern(model), freeze, model, change)


@pytest.mark.parametrize("persistent", [True, False])
def test_a_buffer_stays_as_persistent_as_it_was(persistent: bool, govern: Govern, freeze: Freeze) -> None:
    model = Holder()
    model.register_buffer("mask", torch.ones(2), persistent=persistent)

    def change() -> None:
        del model.mask
        model.register_buffer("mask", torch.zeros(2), persistent=not persistent)

    _rolls_back(govern(model), freeze, model, change)
    assert ("mask" in model.state_dict()) == persistent


def test_a_deleted_non_persistent_buffer_does_not_become_persistent(govern: Govern, freeze: Freeze) -> None:
    model = Holder()
    model.register_buffer("mask", torch.ones(2), persistent=False)

    def change() -> None:
        del model.mask

    _rolls_back(govern(model), freeze, model, change)


def test_a_buffer_object(govern: Govern, freeze: Freeze) -> None:
    model = Holder()
    model.statistics = nn.Buffer(torch.ones(2))
    _rolls_back(govern(model), freeze, model, lambda: model.statistics.add_(1.0))


def test_a_module_used_twice(govern: Govern, freeze: Freeze) -> None:
    shared = nn.BatchNorm1d(2)
    model = nn.Sequential(shared, nn.Linear(2, 2), shared)
    _rolls_back(govern(model), freeze, model, lambda: model(torch.randn(4, 2)))


def test_batch_norm_statistics(govern: Govern, freeze: Freeze) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, momentum=None), nn.BatchNorm1d(3, affine=False))
    _rolls_back(govern(model), freeze, model, lambda: model(torch.randn(4, 3)))


@pytest.mark.parametrize("change", ["added", "removed", "replaced"])
def test_a_module_with_buffers_that_came_or_went(change: str, govern: Govern, freeze: Freeze) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False))
    norm = model[1]

    def change_it() -> None:
        model(torch.randn(4, 2))
        model[0].weight.data.add_(1.0)
        if change == "removed":
            del model[1]
        else:
            model.add_module({"added": "2", "replaced": "1"}[change], nn.BatchNorm1d(2, affine=False))

    _rolls_back(govern(model), freeze, model, change_it)
    assert model[1] is norm


# ---------------------------------------------------------------- extra state


class Counting(nn.Module):
    """Keeps state that is neither parameter nor buffer: a number, a live tensor and a list, handed out by reference."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.table = torch.zeros(3)
        self.seen: list[int] = []

    def get_extra_state(self) -> Any:
        torch.rand(3)  # hostile: reading it draws
        return {"count": self.count, "table": self.table, "seen": self.seen}

    def set_extra_state(self, state: Any) -> None:
        self.count, self.table, self.seen = state["count"], state["table"], state["seen"]

    def touch(self) -> None:
        self.count += 1
        self.table.add_(1.0)
        self.seen.append(self.count)


@pytest.mark.parametrize("shared", [False, True])
def test_extra_state(shared: bool, govern: Govern, freeze: Freeze) -> None:
    inner = Counting()
    model = nn.Sequential(nn.Linear(2, 2), inner, *([inner] if shared else []), Counting())
    _rolls_back(govern(model), freeze, model, inner.touch)


def test_reading_extra_state_does_not_move_random_state(govern: Govern, read_random: Callable[[], Any]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), Counting())
    governor = govern(model)
    before = read_random()
    governor.snapshot()
    assert read_random() == before
    governor.digest()
    assert read_random() == before
    governor.execute_rollback()
    assert read_random() == before


def test_the_digest_sees_extra_state(govern: Govern) -> None:
    model = nn.Sequential(nn.Linear(2, 2), Counting())
    governor = govern(model)
    digest = governor.digest()
    model[1].table.add_(1.0)  # type: ignore[operator, union-attr]
    assert governor.digest() != digest


# ---------------------------------------------------------------- not state


def test_switches_of_the_user_are_left_as_they_are(govern: Govern) -> None:
    """Train or eval mode and which parameters are frozen belong to the loop, like its own counters."""
    model = Holder(table=torch.zeros(2))
    governor = govern(model)
    governor.snapshot()
    model.eval()
    model.layer.bias.requires_grad_(False)
    digest = governor.digest()
    governor.execute_rollback()
    assert not model.training
    assert not model.layer.bias.requires_grad
    assert governor.digest() == digest


# ---------------------------------------------------------------- not finite by intention


def _survives_ten_steps(governor: TolariaGovernor, model: nn.Module) -> None:
    optimizer = governor._update.optimizers[0]
    for _ in governor.watch(range(10)):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 2)).square().mean()
        loss.backward()
        assert governor.step(loss=loss).verdict.health is tolaria.Health.HEALTHY
    assert governor.rollbacks == 0
    assert governor.statistics().snapshots > 2


def test_mask_buffers_of_minus_infinity_are_no_damage(govern: Govern) -> None:
    model = Holder(mask=torch.triu(torch.full((3, 3), -INF), 1))
    model.layer.register_buffer("table", torch.tensor([float("nan"), 1.0]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _survives_ten_steps(govern(model, optimizer, cadence=2, probation=2), model)


def test_frozen_parameters_of_minus_infinity_are_no_damage(govern: Govern) -> None:
    model = Holder()
    model.layer.bound = nn.Parameter(torch.tensor([-INF, 0.0]), requires_grad=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _survives_ten_steps(govern(model, optimizer, cadence=2, probation=2), model)


def test_frozen_parameters_of_minus_infinity_do_not_spoil_a_snapshot(govern: Govern) -> None:
    model = Holder()
    model.layer.bound = nn.Parameter(torch.tensor([-INF, 0.0]), requires_grad=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    governor = govern(model, optimizer)
    for _ in governor.watch(range(1)):
        pass
    assert governor.statistics().snapshots == 1  # the first, automatic one, which is refused when it is not finite
    assert [id(p) for p in governor._keeper.state.roster()[1]] == [
        id(model.layer.weight),
        id(model.layer.bias),
    ]


def test_a_mask_that_is_made_in_the_first_forward_is_no_damage(govern: Govern) -> None:
    class Lazy(Holder):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            if "mask" not in self._buffers:
                self.register_buffer("mask", torch.full((2,), -INF))
            return super().forward(inputs)

    model = Lazy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _survives_ten_steps(govern(model, optimizer, cadence=2, probation=2), model)


def test_a_trained_weight_beside_a_mask_in_one_storage_is_still_looked_at(govern: Govern) -> None:
    flat = torch.zeros(8)
    flat[4:] = -INF
    model = Holder(mask=flat[4:], statistics=flat[:4])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    governor = govern(model, optimizer, cadence=1, probation=1)
    for _ in governor.watch(range(1)):
        model(torch.randn(4, 2)).sum().backward()
        model.statistics[0] = float("nan")
        governor.step(loss=1.0)
    assert governor.statistics().snapshots_rejected == governor.rollbacks == 2  # replayed, then skipped
    assert bool(model.statistics.isfinite().all())


@pytest.mark.parametrize(
    "poison",
    [
        torch.tensor([1.0, float("nan")], dtype=torch.bfloat16),
        torch.tensor([1.0, INF], dtype=torch.float64),
        torch.tensor([1.0, complex(0.0, float("nan"))], dtype=torch.complex64),
        torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn),
    ],
    ids=lambda t: str(t.dtype),
)
def test_poison_of_every_type_is_found_before_a_snapshot_is_certified(poison: torch.Tensor, govern: Govern) -> None:
    model = Holder(statistics=torch.ones(2).to(poison.dtype))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    governor = govern(model, optimizer, cadence=1, probation=1)
    for _ in governor.watch(range(1)):
        model(torch.randn(4, 2)).sum().backward()
        model.statistics.copy_(poison)
        governor.step(loss=1.0)
    assert governor.statistics().snapshots_rejected == governor.rollbacks == 2  # replayed, then skipped
    assert model.statistics.to(torch.complex64).tolist() == [1.0, 1.0]


def test_weights_whose_sum_overflows_are_no_damage(govern: Govern) -> None:
    model = Holder(statistics=torch.full((4,), 3e38))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _survives_ten_steps(govern(model, optimizer, cadence=2, probation=2), model)
