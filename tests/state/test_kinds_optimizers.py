"""What optimizers, schedulers and scalers hold, beyond the tables of test_replay_exact.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from tolaria import TolariaGovernor

Govern = Callable[..., TolariaGovernor]
Freeze = Callable[..., Any]


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


# ---------------------------------------------------------------- state


def test_keys_created_after_the_snapshot_are_deleted(model: nn.Sequential, govern: Govern, freeze: Freeze) -> None:
    """Zeroed state would not do: SGD's first momentum is a copy of the gradient, whatever the dampening."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5)
    governor = govern(model, optimizer)
    _train(model[0], optimizer)  # the second layer gets no gradient, so no state
    governor.snapshot()
    before = freeze(model, optimizer)
    _train(model, optimizer, 2)
    optimizer.state[model[0].weight]["note"] = "written after the snapshot"
    assert len(optimizer.state) == 4
    governor.execute_rollback()
    assert len(optimizer.state) == 2
    assert freeze(model, optimizer) == before


def test_keys_deleted_after_the_snapshot_come_back_in_their_place(
    model: nn.Sequential, govern: Govern, freeze: Freeze
) -> None:
    optimizer = torch.optim.Adam(model.parameters())
    governor = govern(model, optimizer)
    _train(model, optimizer)
    governor.snapshot()
    before, digest = freeze(optimizer), governor.digest()
    held = optimizer.state[model[0].weight]["exp_avg"]
    for damage in (lambda: optimizer.state.clear(), lambda: optimizer.state.pop(model[0].weight)):
        damage()
        governor.execute_rollback()
        assert optimizer.state[model[0].weight]["exp_avg"] is held
        assert (freeze(optimizer), governor.digest()) == (before, digest)
    del optimizer.state[model[0].weight]["step"]
    governor.execute_rollback()
    assert (freeze(optimizer), governor.digest()) == (before, digest)
    assert optimizer.state["an unknown key"] == {}  # still the default dict that it was


@pytest.mark.parametrize("sizes", [(3, 4), (3, 3), (1, 1)])
def test_state_that_was_dropped_and_made_again_comes_back_in_its_place(
    sizes: tuple[int, int], govern: Govern, freeze: Freeze
) -> None:
    """As of units that are set back to the start: the same parameters in another order; `==` of tensors is no bool."""
    model = nn.ParameterList([nn.Parameter(torch.ones(size)) for size in sizes])
    optimizer = torch.optim.Adam(model.parameters())

    def train() -> None:
        optimizer.zero_grad()
        torch.stack([p.square().sum() for p in model]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    governor = govern(model, optimizer)
    train()
    governor.snapshot()
    before, digest = freeze(model, optimizer), governor.digest()
    del optimizer.state[model[0]]
    train()
    assert next(iter(optimizer.state)) is model[1]
    governor.execute_rollback()
    assert next(iter(optimizer.state)) is model[0]
    assert (freeze(model, optimizer), governor.digest()) == (before, digest)


@pytest.mark.parametrize("name", ["step", "exp_avg"])
def test_state_tensors_given_new_data_or_replaced(
    name: str, model: nn.Sequential, govern: Govern, freeze: Freeze
) -> None:
    optimizer = torch.optim.Adam(model.parameters())
    governor = govern(model, optimizer)
    _train(model, optimizer)
    assert optimizer.state[model[0].weight]["step"].device.type == "cpu"
    governor.snapshot()
    before = freeze(optimizer)
    held = optimizer.state[model[0].weight][name]
    address = held.data_ptr()
    for other in (held.double() + 1.0, held.bfloat16(), torch.zeros(5)):
        held.data = other
        governor.execute_rollback()
        optimizer.state[model[0].weight][name] = other
        governor.execute_rollback()
        assert optimizer.state[model[0].weight][name] is held
        assert held.data_ptr() == address
        assert freeze(optimizer) == before


def test_loading_an_optimizer_checkpoint_is_undone(model: nn.Sequential, govern: Govern, freeze: Freeze) -> None:
    """`load_state_dict` replaces every tensor and every group; the old ones come back, addresses and all."""
    optimizer = torch.optim.AdamW(model.parameters())
    governor = govern(model, optimizer)
    _train(model, optimizer)
    governor.snapshot()
    before, held = freeze(model, optimizer), optimizer.state[model[0].weight]["exp_avg"]
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.5)
    _train(other, other_optimizer, 3)
    optimizer.load_state_dict(other_optimizer.state_dict())
    model.load_state_dict(other.state_dict())
    governor.execute_rollback()
    assert freeze(model, optimizer) == before
    assert optimizer.state[model[0].weight]["exp_avg"] is held


def test_full_precision_moments_of_bf16_parameters(model: nn.Sequential, govern: Govern, freeze: Freeze) -> None:
    model.bfloat16()

    class Master(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for parameter in self.param_groups[0]["params"]:
                state = self.state[parameter]
                if not state:
                    state["master"] = parameter.detach().float()
                    state["moment"] = torch.zeros_like(parameter, dtype=torch.float32)
                state["moment"].mul_(0.9).add_(parameter.grad.float())
                state["master"].sub_(state["moment"] * 0.0123)
                parameter.copy_(state["master"])

    optimizer = Master(model.parameters(), {})

    def step(seed: int) -> None:
        torch.manual_seed(seed)
        optimizer.zero_grad()
        model(torch.randn(4, 3, dtype=torch.bfloat16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    governor = govern(model, optimizer)
    step(0)
    governor.snapshot()
    before = freeze(model, optimizer)
    step(1)
    reference = freeze(model, optimizer)
    governor.execute_rollback()
    assert freeze(model, optimizer) == before
    assert optimizer.state[model[0].weight]["moment"].dtype is torch.float32
    step(1)
    assert freeze(model, optimizer) == reference


# ---------------------------------------------------------------- hyper-parameters


def test_hyper_parameters_changed_added_and_removed(model: nn.Sequential, govern: Govern, freeze: Freeze) -> None:
    groups = [{"params": model[0].parameters(), "lr": 0.1, "label": "low"}, {"params": model[1].parameters()}]
    optimizer = torch.optim.AdamW(groups, lr=0.2)
    governor = govern(model, optimizer)
    governor.snapshot()
    before, digest, held = freeze(optimizer), governor.digest(), optimizer.param_groups[0]
    for _ in range(2):
        low, high = optimizer.param_groups
        low.update(lr=7.0, betas=(0.5, 0.5), capturable=True)
        low["new"] = [1, {"deep": torch.ones(1)}]
        del low["label"], high["lr"]
        high["lr"] = 3.0  # now the last key
        optimizer.defaults["lr"] = 9.0
        governor.execute_rollback()
        assert optimizer.param_groups[0] is held
        assert (freeze(optimizer), governor.digest()) == (before, digest)


def test_a_tensor_learning_rate_keeps_its_address(model: nn.Sequential, govern: Govern, freeze: Freeze) -> None:
    rate = torch.tensor(0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    governor = govern(model, optimizer)
    governor.snapshot()
    before = freeze(optimizer)
    rate.fill_(5.0)
    governor.execute_rollback()
    assert freeze(optimizer) == before
    optimizer.param_groups[0]["lr"] = 0.5
    governor.execute_rollback()
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
    governor.execute_rollback()
    assert optimizer.param_groups[0]["lr"] is rate
    assert freeze(optimizer) == before


def test_attributes_of_the_optimizer(model: nn.Sequential, govern: Govern, freeze: Freeze) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.calls, optimizer.name, optimizer.flag, optimizer.none = 3, "a", True, None
    optimizer.tensor, optimizer.nested = torch.ones(2), {"list": [1, (2.0, torch.zeros(1))]}
    optimizer._private = 1
    governor = govern(model, optimizer)
    governor.snapshot()
    before, digest, held = freeze(optimizer), governor.digest(), optimizer.tensor
    for _ in range(2):
        optimizer.calls, optimizer.name, optimizer.flag, optimizer.none = 4, "b", False, 5
        optimizer.tensor = torch.zeros(2)
        optimizer.nested["list"][1][1].add_(1.0)
        optimizer.nested["list"].append(2)
        optimizer._private = 2
        optimizer.late, optimizer._late = 1, [2]
        governor.execute_rollback()
        assert (freeze(optimizer), governor.digest(), optimizer._private) == (before, digest, 1)
        assert optimizer.tensor is held
        assert not hasattr(optimizer, "late")
        assert not hasattr(optimizer, "_late")


def test_attributes_of_other_kinds_are_left_alone(model: nn.Sequential, govern: Govern) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.helper, optimizer.window = object(), None
    governor = govern(model, optimizer)
    governor.snapshot()
    optimizer.helper, optimizer.window, optimizer.late = 3, object(), object()
    late = optimizer.late
    governor.execute_rollback()
    assert optimizer.helper == 3
    assert optimizer.window is None
    assert optimizer.late is late


def test_several_optimizers(model: nn.Sequential, govern: Govern, freeze: Freeze) -> None:
    """One of them holds a parameter that is not in the model, one shares its parameters with the first."""
    temperature = nn.Parameter(torch.ones(()))
    optimizers = [
        torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9),
        torch.optim.Adam([*model[1].parameters(), temperature]),
        torch.optim.SGD(model[0].parameters(), lr=0.01, momentum=0.5),
    ]

    def step() -> None:
        (model(torch.randn(4, 3)).square().mean() * temperature).backward()
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()

    governor = govern(model, optimizers)
    step()
    governor.snapshot()
    before = freeze(model, temperature, *optimizers)
    step()
    (temperature * 2.0).backward()
    governor.execute_rollback()
    assert temperature.grad is None
    assert freeze(model, temperature, *optimizers) == before


def test_an_optimizer_given_only_to_the_rollback_is_cleared(
    model: nn.Sequential, govern: Govern, freeze: Freeze
) -> None:
    governed = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    foreign = torch.optim.Adam(model.parameters())
    governor = govern(model, governed)
    _train(model, governed)
    governor.snapshot()
    before = freeze(governed)
    _train(model, foreign)
    held = foreign.param_groups[0]
    report = governor.execute_rollback(optimizer=foreign)
    assert report.optimizer == "reset"
    assert not foreign.state
    assert foreign.param_groups[0] is held
    assert governor.execute_rollback(optimizer=governed).optimizer == "restored"
    assert freeze(governed) == before


class Wrapping(torch.optim.Optimizer):
    """Like SAM or Lookahead: steps an optimizer of its own, which holds the momentum, and refers back to itself."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.inner = torch.optim.SGD(self.param_groups, momentum=0.9)
        self.param_groups = self.inner.param_groups
        self.inner.outer = self
        self.count = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.count += 1
        self.inner.step()
        for group in self.param_groups:
            for parameter in group["params"]:
                slow = self.state[parameter].setdefault("slow", parameter.clone())
                parameter.copy_(slow.lerp_(parameter, 0.5))


def test_an_optimizer_inside_an_optimizer(model: nn.Sequential, govern: Govern, freeze: Freeze) -> None:
    optimizer = Wrapping(model.parameters())
    governor = govern(model, optimizer)
    for _ in range(2):
        governor.snapshot()
        before, digest, inner = freeze(model, optimizer, optimizer.inner), governor.digest(), optimizer.inner
        seed = torch.get_rng_state()
        _train(model, optimizer, 2)
        reference = freeze(model, optimizer, optimizer.inner)
        optimizer.inner = torch.optim.SGD(model.parameters())
        assert governor.digest() != digest
        governor.execute_rollback()
        assert optimizer.inner is inner
        assert (freeze(model, optimizer, optimizer.inner), governor.digest()) == (before, digest)
        torch.set_rng_state(seed)
        _train(model, optimizer, 2)
        assert freeze(model, optimizer, optimizer.inner) == reference
    optimizer.inner.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    governor.execute_rollback()
    assert optimizer.param_groups is optimizer.inner.param_groups
    assert (freeze(model, optimizer, optimizer.inner), governor.digest()) == (before, digest)


# ---------------------------------------------------------------- schedulers

Schedule = Callable[[torch.optim.Optimizer], Any]

SCHEDULERS: dict[str, Schedule] = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.9),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=2, T_mult=2),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=30),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2, mode="exp_range", gamma=0.9),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5, cooldown=1),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "averaging": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=3),
}


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("taken_at", [0, 3])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(
    name: str, taken_at: int, tensor_lr: bool, model: nn.Sequential, govern: Govern, freeze: Freeze
) -> None:
    rate = torch.tensor(0.1) if tensor_lr else 0.1
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    scheduler = SCHEDULERS[name](optimizer)
    losses = [1.0, 2.0, 3.0, 3.0, 0.5, 4.0, 4.0, 4.0]

    def play(first: int, end: int) -> list[Any]:
        seen = []
        for number in range(first, end):
            _train(model, optimizer)
            scheduler.step(losses[number]) if name == "plateau" else scheduler.step()
            seen.append(freeze(optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"], scheduler))
        return seen

    governor = govern(model, optimizer, scheduler=scheduler)
    play(0, taken_at)
    governor.snapshot()
    before, digest = freeze(optimizer, scheduler), governor.digest()
    reference = play(taken_at, 8)
    for _ in range(2):
        governor.execute_rollback()
        assert (freeze(optimizer, scheduler), governor.digest()) == (before, digest)
        assert play(taken_at, 8) == reference


def test_several_schedulers(model: nn.Sequential, govern: Govern, freeze: Freeze) -> None:
    optimizers = [torch.optim.SGD(model[i].parameters(), lr=0.1) for i in range(2)]
    schedulers = [lr_scheduler.StepLR(optimizers[0], 1, 0.5), lr_scheduler.ExponentialLR(optimizers[1], 0.9)]
    governor = govern(model, optimizers, scheduler=schedulers)
    governor.snapshot()
    before = freeze(*optimizers, *schedulers)
    for i in range(2):
        _train(model[i], optimizers[i]) if i == 0 else optimizers[i].step()
        schedulers[i].step()
    assert freeze(*optimizers, *schedulers) != before
    governor.execute_rollback()
    assert freeze(*optimizers, *schedulers) == before


# ---------------------------------------------------------------- scaler


def _scaled_step(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, size: float) -> None:
    optimizer.zero_grad()
    scaler.scale(model(torch.full((2, 3), size)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def test_a_scaler_with_growth_and_skipped_steps(model: nn.Sequential, govern: Govern, freeze: Freeze) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**124, growth_interval=2)
    governor = govern(model, optimizer, scaler=scaler)
    sizes = [1e-3, 1e-3, 1e-3, 1e8, 1e8, 1e-3, 1e-3]

    def play(first: int) -> list[Any]:
        seen = []
        for size in sizes[first:]:
            _scaled_step(model, optimizer, scaler, size)
            seen.append((scaler.get_scale(), freeze(model, optimizer, scaler)))
        return seen

    for size in sizes[:2]:
        _scaled_step(model, optimizer, scaler, size)
    governor.snapshot()
    before, held = freeze(model, optimizer, scaler), scaler._scale
    reference = play(2)
    scales = [scale for scale, _ in reference]
    assert any(b < a for a, b in itertools.pairwise(scales)), "no step was skipped"
    assert any(b > a for a, b in itertools.pairwise(scales)), "the scale never grew"
    for _ in range(2):
        governor.execute_rollback()
        assert freeze(model, optimizer, scaler) == before
        assert scaler._scale is held
        assert play(2) == reference


def test_a_scale_that_did_not_exist_yet(model: nn.Sequential, govern: Govern, freeze: Freeze) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1)
    governor = govern(model, optimizer, scaler=scaler)
    governor.snapshot()
    assert scaler._scale is None
    before, digest = freeze(scaler), governor.digest()
    for _ in range(2):
        _scaled_step(model, optimizer, scaler, 1.0)
        scaler.set_growth_factor(4.0)
        scaler.set_growth_interval(7)
        governor.execute_rollback()
        assert scaler._scale is None
        assert (freeze(scaler), governor.digest()) == (before, digest)
    _scaled_step(model, optimizer, scaler, 1.0)
    assert scaler.get_scale() == 128.0


def test_a_rollback_between_unscale_and_step(model: nn.Sequential, govern: Govern, freeze: Freeze) -> None:
    """What was unscaled is gone with its gradients: the next step has to unscale again."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    governor = govern(model, optimizer, scaler=scaler)
    governor.snapshot()
    _scaled_step(model, optimizer, scaler, 1.0)
    reference = freeze(model, optimizer, scaler)
    governor.execute_rollback()
    scaler.scale(model(torch.ones(2, 3)).sum()).backward()
    scaler.unscale_(optimizer)
    governor.execute_rollback()
    _scaled_step(model, optimizer, scaler, 1.0)
    assert freeze(model, optimizer, scaler) == reference


def test_a_disabled_scaler(model: nn.Sequential, govern: Govern, freeze: Freeze) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    governor = govern(model, optimizer, scaler=scaler)
    governor.snapshot()
    before = freeze(model, optimizer)
    _scaled_step(model, optimizer, scaler, 1.0)
    governor.execute_rollback()
    assert freeze(model, optimizer) == before
