"""Rollback and replay equal the undisturbed run bit for bit, for every optimizer, and a governor changes no number.

The reference is the same loop without any governor. The loop holds what makes a replay hard: dropout, BatchNorm, noise
from all three global generators, a scheduler, a scaler, and an averaged model that is registered as an extra.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn, optim
from torch.optim.lr_scheduler import StepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tolaria import TolariaGovernor

Govern = Callable[..., TolariaGovernor]
Parameters = Iterable[nn.Parameter]

STEPS = 8


class Hoarder(optim.Optimizer):
    """A home-made optimizer with state in every corner: nested lists, scalars, attributes, some created late."""

    def __init__(self, parameters: Parameters, lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "drift": 0.0})
        self.calls = 0
        self.largest = 0.0
        self.history: list[float] = []
        self.shared = torch.zeros(2)
        self._private = 1.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.calls += 1
        self._private *= 0.9
        for group in self.param_groups:
            group["drift"] += 0.001
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["nested"] = [[torch.zeros_like(parameter), 1.0], {"seen": (0, "times")}]
                    state["trace"] = parameter.detach().clone()
                trace, weight = state["nested"][0]
                trace.mul_(0.5).add_(parameter.grad)
                state["nested"][0][1] = weight * 0.99
                state["nested"][1]["seen"] = (state["nested"][1]["seen"][0] + 1, "times")
                state["trace"] = state["trace"] * 0.9 + parameter * 0.1  # replaced, not written in place
                self.largest = max(self.largest, float(trace.abs().max()))
                self.shared.add_(self.largest)
                scale = group["lr"] * weight * self._private / (1.0 + self.calls + float(self.shared[0]))
                parameter.sub_((trace + group["drift"] * state["trace"]) * scale)
        self.history.append(self.largest)
        if not hasattr(self, "born_at"):
            self.born_at = self.calls  # an attribute that a snapshot before the first step does not know


def _muon_and_sgd(parameters: Parameters) -> list[optim.Optimizer]:
    both = list(parameters)
    return [
        optim.Muon([p for p in both if p.ndim == 2], lr=0.02, momentum=0.9),
        optim.SGD([p for p in both if p.ndim != 2], lr=0.05, momentum=0.5),
    ]


OPTIMIZERS: dict[str, Callable[[Parameters], Any]] = {
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "sgd-momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd-dampening": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.01),
    "sgd-nesterov": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "sgd-foreach": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "adam": lambda p: optim.Adam(p, lr=0.01),
    "adam-amsgrad": lambda p: optim.Adam(p, lr=0.01, amsgrad=True),
    "adam-tensor-lr": lambda p: optim.Adam(p, lr=torch.tensor(0.01)),
    "adamw": lambda p: optim.AdamW(p, lr=0.01),
    "adamw-foreach": lambda p: optim.AdamW(p, lr=0.01, foreach=True),
    "adamw-fused": lambda p: optim.AdamW(p, lr=0.01, fused=True),
    "nadam": lambda p: optim.NAdam(p, lr=0.01),
    "radam": lambda p: optim.RAdam(p, lr=0.01),
    "adamax": lambda p: optim.Adamax(p, lr=0.01),
    "adadelta": lambda p: optim.Adadelta(p, lr=0.5),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.05, lr_decay=0.01),
    "adafactor": lambda p: optim.Adafactor(p, lr=0.05),
    "rprop": lambda p: optim.Rprop(p, lr=0.01),
    "asgd": lambda p: optim.ASGD(p, lr=0.05, t0=2),
    "asgd-foreach": lambda p: optim.ASGD(p, lr=0.05, t0=2, foreach=True),
    "muon": _muon_and_sgd,
    "lbfgs": lambda p: optim.LBFGS(p, lr=0.1, max_iter=3, history_size=4),
    "lbfgs-wolfe": lambda p: optim.LBFGS(p, lr=0.5, max_iter=3, line_search_fn="strong_wolfe"),
    "custom": lambda p: Hoarder(p, lr=0.05),
}


class Run:
    """One training run of a tiny classifier. `step` is what a user would write, and knows nothing of a governor."""

    def __init__(self, name: str, seed: int, averages: bool = True) -> None:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        self.model = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3, bias=name != "muon")
        )
        made = OPTIMIZERS[name](self.model.parameters())
        self.optimizers: list[optim.Optimizer] = made if isinstance(made, list) else [made]
        self.schedulers = [StepLR(optimizer, step_size=2, gamma=0.7) for optimizer in self.optimizers]
        self.with_closure = name.startswith("lbfgs")  # which GradScaler refuses
        self.scaler = None if self.with_closure else torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        data = torch.Generator().manual_seed(seed)
        self.batches = [
            (torch.randn(5, 6, generator=data), torch.randint(3, (5,), generator=data)) for _ in range(STEPS)
        ]
        self.averages = averages
        self.losses: dict[int, list[float]] = {}

    def loss(self, number: int) -> torch.Tensor:
        inputs, labels = self.batches[number]
        noisy = inputs * (1 + 0.1 * random.random()) + 0.1 * np.random.standard_normal() + 0.1 * torch.randn(6)
        return nn.functional.cross_entropy(self.model(noisy), labels)

    def step(self, number: int) -> None:
        if self.scaler is None:
            self.optimizers[0].step(self.closure(number))
        else:
            loss = self.loss(number)
            self.scaler.scale(loss).backward()
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
            self.scaler.update()
            self.losses[number] = [float(loss.detach())]
        for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
            optimizer.zero_grad()
            scheduler.step()
        if self.averages:
            self.average.update_parameters(self.model)

    def closure(self, number: int) -> Callable[[], float]:
        def evaluate() -> float:
            self.optimizers[0].zero_grad()
            loss = self.loss(number)
            loss.backward()
            self.losses[number].append(float(loss.detach()))
            return self.losses[number][-1]

        self.losses[number] = []
        return evaluate

    def play(self, first: int, end: int) -> None:
        for number in range(first, end):
            self.step(number)

    def play_governed(self, governor: TolariaGovernor, panic_at: int | None) -> None:
        panics = {panic_at}
        for number in governor.watch(range(STEPS)):
            loss, closure = None, None
            if self.scaler is None:
                closure = self.closure(number)
            else:
                loss = self.loss(number)
                self.scaler.scale(loss).backward()
                self.losses[number] = [float(loss.detach())]
            reading = float("nan") if number in panics else loss
            panics.discard(number)
            result = governor.step(loss=reading, closure=closure)
            if self.averages and not result.rolled_back:
                self.average.update_parameters(self.model)

    def damage(self) -> None:
        """What a fault may leave behind: NaN weights, shrunk moments, another learning rate, a spoiled average."""
        with torch.no_grad():
            for parameter in (*self.model.parameters(), *self.average.parameters()):
                parameter.fill_(float("nan"))
            for optimizer in self.optimizers:
                for values in optimizer.state.values():
                    for tensor in filter(torch.is_tensor, values.values()):
                        tensor.mul_(0.5)
                optimizer.param_groups[0]["weight_decay"] = 0.5

    def govern(self, govern: Govern, **options: Any) -> TolariaGovernor:
        governor = govern(self.model, self.optimizers, scheduler=self.schedulers, scaler=self.scaler, **options)
        governor.register("average", self.average)
        return governor

    @property
    def everything(self) -> tuple[Any, ...]:
        return self.model, *self.optimizers, *self.schedulers, self.scaler, self.average, self.losses


@pytest.fixture(scope="module")
def references() -> dict[str, Any]:
    return {}


@pytest.fixture
def undisturbed(
    references: dict[str, Any], seed: int, freeze: Callable[..., Any], read_random: Callable[[], Any]
) -> Callable[[str], Any]:
    """The end of a run that never met a governor: state, losses, random state."""

    def play(name: str) -> Any:
        if name not in references:
            run = Run(name, seed)
            run.play(0, STEPS)
            references[name] = freeze(*run.everything), read_random()
        return references[name]

    return play


@pytest.mark.parametrize("taken_at", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_replay_equals_the_undisturbed_run(
    name: str,
    taken_at: int,
    seed: int,
    govern: Govern,
    undisturbed: Callable[[str], Any],
    freeze: Callable[..., Any],
    read_random: Callable[[], Any],
) -> None:
    """After 1, 2 and 5 rollbacks to one snapshot, taken before the optimizer has any state, or later."""
    reference = undisturbed(name)
    run = Run(name, seed)
    governor = run.govern(govern)
    run.play(0, taken_at)
    governor.snapshot()
    digest, before = governor.digest(), freeze(*run.everything[:-1])
    run.play(taken_at, STEPS)
    assert (freeze(*run.everything), read_random()) == reference  # governed, and never rolled back
    for count in range(1, 6):
        run.damage()
        governor.execute_rollback()
        assert freeze(*run.everything[:-1]) == before
        assert governor.digest() == digest
        if count in (1, 2, 5):
            run.play(taken_at, STEPS)
            assert (freeze(*run.everything), read_random()) == reference
        else:
            run.play(taken_at, taken_at + count - 1)


@pytest.mark.parametrize("chosen", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["sgd-dampening", "adam-amsgrad", "adamw-fused", "muon", "lbfgs", "custom"])
def test_replay_from_every_slot_of_the_ring(
    name: str,
    chosen: int,
    seed: int,
    govern: Govern,
    undisturbed: Callable[[str], Any],
    freeze: Callable[..., Any],
    read_random: Callable[[], Any],
) -> None:
    reference = undisturbed(name)
    run = Run(name, seed)
    governor = run.govern(govern, slots=4)
    taken = []
    for i in range(4):
        taken.append((governor.snapshot(step=2 * i), freeze(*run.everything[:-1])))
        run.play(2 * i, 2 * i + 2)
    run.damage()
    info, before = taken[chosen]
    report = governor.execute_rollback(to=info if chosen % 2 else 2 * chosen)
    assert report.snapshot_step == 2 * chosen
    assert freeze(*run.everything[:-1]) == before
    run.play(2 * chosen, STEPS)
    assert (freeze(*run.everything), read_random()) == reference


@pytest.mark.parametrize("panic_at", [None, 1, 5])  # 1: back to the snapshot before the first step
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_governed_loop_equals_the_undisturbed_run(
    name: str,
    panic_at: int | None,
    seed: int,
    govern: Govern,
    references: dict[str, Any],
    freeze: Callable[..., Any],
    read_random: Callable[[], Any],
) -> None:
    """`watch` and `step` instead of the user's own loop; the loss of one step reads NaN, once."""
    if f"governed {name}" not in references:
        undisturbed = Run(name, seed, averages=False)
        undisturbed.play(0, STEPS)
        references[f"governed {name}"] = freeze(*undisturbed.everything), read_random()
    run = Run(name, seed, averages=False)
    governor = run.govern(govern, slots=4, cadence=2, probation=2)
    run.play_governed(governor, panic_at)
    assert governor.rollbacks == (panic_at is not None)
    assert governor.statistics().replayed_batches == {None: 0, 1: 2, 5: 4}[panic_at]
    assert (freeze(*run.everything), read_random()) == references[f"governed {name}"]


@pytest.mark.parametrize(
    "panic_at",
    [
        1,
        5,
    ],
)
def test_what_follows_the_step_in_the_loop_body_is_replayed_exactly(
    panic_at: int,
    seed: int,
    govern: Govern,
    undisturbed: Callable[[str], Any],
    freeze: Callable[..., Any],
    read_random: Callable[[], Any],
) -> None:
    """An average that the user updates after each step that stands belongs to that step."""
    reference = undisturbed("adam")
    run = Run("adam", seed)
    run.play_governed(run.govern(govern, slots=4, cadence=2, probation=2), panic_at)
    assert (freeze(*run.everything), read_random()) == reference


def test_the_loop_is_sensitive_to_everything_it_holds(
    seed: int, undisturbed: Callable[[str], Any], freeze: Callable[..., Any], read_random: Callable[[], Any]
) -> None:
    """Red twin: one forgotten piece of state, and the comparison notices."""

    def perturbed(meddle: Callable[[Run], object]) -> Any:
        run = Run("adam", seed)
        run.play(0, 3)
        meddle(run)
        run.play(3, STEPS)
        return freeze(*run.everything), read_random()

    assert perturbed(lambda run: None) == undisturbed("adam")
    meddlers: dict[str, Callable[[Run], object]] = {
        "python": lambda run: random.random(),
        "numpy": lambda run: np.random.random(),
        "torch": lambda run: torch.rand(1),
        "moment": lambda run: next(iter(run.optimizers[0].state.values()))["exp_avg"].view(-1)[0].mul_(1.001),
        "step": lambda run: next(iter(run.optimizers[0].state.values()))["step"].add_(1),
        "learning rate": lambda run: run.optimizers[0].param_groups[0].update(lr=0.0123),
        "scheduler": lambda run: setattr(run.schedulers[0], "last_epoch", 0),
        "scaler": lambda run: run.scaler is not None and run.scaler.update(128.0),
        "BatchNorm": lambda run: run.model[1].running_mean.add_(1e-6),  # type: ignore[operator, union-attr]
        "average": lambda run: run.average.n_averaged.add_(1),
    }
    for name, meddle in meddlers.items():
        assert perturbed(meddle) != undisturbed("adam"), name
