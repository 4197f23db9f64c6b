"""The real governor on CPU tensors, with `ContextDevice` over a fake driver in the place of the CPU port.

What has to be bent so that tensors on the CPU can stand for tensors on a device:

* `DeviceSet` opens a `ContextDevice` for "cpu".
* Page-locked memory is ordinary memory. Rows that numbers travel to (`observe`) arrive late all the same
  (`PageLockedRow`); rows of a slot's reading are written by work on the governor's own stream, so they are late anyway.

Random state needs nothing: the CPU's generator is captured and restored on the host, as it is in a run on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cuda_driver.fake_driver import Machine, PageLockedRow
from torch import nn

from tolaria import GovernorConfig, TolariaGovernor, observe
from tolaria.cuda import ContextDevice
from tolaria.device import DeviceSet
from tolaria.judge import non_finite
from tolaria.operations import Barrier


@pytest.fixture(autouse=True)
def _alone(alone: None) -> None:
    """Every test here."""


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A device that nothing is attached to; afterwards no rule of the driver may have been broken."""
    made = Machine()
    yield made
    assert made.violations == []
    assert made.depth() == 0


@pytest.fixture
def late(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Governors built in this test take the CPU for that device."""
    install(monkeypatch, machine)
    return machine


def install(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    def opened(self: DeviceSet, name: str) -> ContextDevice:
        barrier = Barrier.STREAMS if self._wanted == "streams" else Barrier.CONTEXT
        return ContextDevice(name, machine.driver, machine.streams, barrier)

    monkeypatch.setattr(DeviceSet, "_open", opened, raising=True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    empty_like = torch.empty_like

    def unpinned(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        made = empty_like(*args, **kwargs)
        return made.fill_(5555) if pin_memory else made  # what nobody has written yet is wrong for certain

    monkeypatch.setattr(torch, "empty_like", unpinned)
    monkeypatch.setattr(
        observe, "_page_locked", lambda count, width: [PageLockedRow(machine, width) for _ in range(count)]
    )


@pytest.fixture
def govern(late: Machine) -> Iterator[Callable[..., TolariaGovernor]]:
    """Builds governors on the late device, closed afterwards."""
    made: list[TolariaGovernor] = []

    def make(*args: Any, **settings: Any) -> TolariaGovernor:
        parts = {name: settings.pop(name) for name in ("scheduler", "scaler") if name in settings}
        detector = settings.pop("detector", None) or non_finite()
        # draining waits for the device on a thread of its own: `test_tiers` is about that
        settings = {"host_slots": 0, "scrub_every": 0, **settings}
        governor = TolariaGovernor(*args, config=GovernorConfig(**settings), detector=detector, **parts)
        made.append(governor)
        return governor

    yield make
    for governor in made:
        governor.close()


class Run:
    """A small real run: BatchNorm (buffers), dropout (random state), AdamW (state that appears), a schedule."""

    def __init__(self, batches: int = 40) -> None:
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.25), nn.Linear(8, 3))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 4, gamma=0.7)
        generator = torch.Generator().manual_seed(3)
        self.batches: list[Any] = [
            (torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator))
            for _ in range(batches)
        ]

    def backward(self, batch: Any) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        loss.backward()
        return loss

    def plain(self) -> None:
        """The loop without a governor."""
        for batch in self.batches:
            self.backward(batch)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()

    def step(self, governor: TolariaGovernor, batch: Any) -> Any:
        return governor.step(loss=self.backward(batch))

    def train(self, governor: TolariaGovernor, batches: Any = None) -> list[Any]:
        watched = governor.watch(self.batches if batches is None else batches)
        return [self.step(governor, batch) for batch in watched]

    def poisoned(self, at: int) -> list[Any]:
        """The batches with one more that is not a number."""
        batches = list(self.batches)
        batches.insert(at, (torch.full_like(batches[0][0], float("nan")), batches[0][1]))
        return batches

    def state(self) -> Any:
        """Every bit of the train state, read without tolaria."""
        return freeze(
            [self.model.state_dict(), self.optimizer.state_dict(), self.scheduler.state_dict(), torch.get_rng_state()]
        )


def freeze(value: Any) -> Any:
    """A copy that `==` compares bit for bit."""
    if isinstance(value, torch.Tensor):
        return (
            str(value.dtype),
            tuple(value.shape),
            bytes(value.detach().contiguous().reshape(-1).view(torch.uint8).tolist()),
        )
    if isinstance(value, dict):
        return {key: freeze(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [freeze(item) for item in value]
    return repr(value)


@pytest.fixture
def run() -> Run:
    return Run()


@pytest.fixture
def make_run() -> type[Run]:
    return Run
