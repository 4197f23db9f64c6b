"""The veto in the loops of frameworks, on a device that is late: each has its hook at another place. Bit for bit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from adapters import test_accelerate, test_lightning, test_transformers
from adapters.material import batches, is_finite
from cuda_driver.conftest import install
from cuda_driver.fake_driver import Machine
from torch.optim.optimizer import register_optimizer_step_post_hook

from tolaria import GovernorConfig, Recovery
from tolaria.refusal import Refusals

pytestmark = test_lightning.pytestmark
CONFIG = GovernorConfig(cadence=3, probation=2, recovery=Recovery(cool_lr=1.0), host_slots=0, scrub_every=0)
BAD = 7


def lightning(guarded: bool, fused: bool) -> Any:
    import lightning.pytorch as pl

    data = batches(bad=[BAD]) if guarded else batches(dropped=[BAD])
    callback = test_lightning.guard(config=CONFIG)
    return test_lightning.state(test_lightning.fit(pl, data, [callback] if guarded else [], max_epochs=1)), callback


def transformers(guarded: bool, fused: bool) -> Any:
    data = test_transformers.samples(bad=[BAD]) if guarded else test_transformers.samples(dropped=[BAD])
    callback = test_transformers.guard(config=CONFIG)
    optim = "adamw_torch_fused" if fused else "adamw_torch"
    trainer = test_transformers.train(data, callback if guarded else None, optim=optim, num_train_epochs=1)
    return test_transformers.state(trainer), callback


def accelerate(guarded: bool, fused: bool) -> Any:
    data = batches(bad=[BAD]) if guarded else batches(dropped=[BAD])
    run = test_accelerate.Run(data, guarded=guarded, config=CONFIG).train(epochs=1)
    return run.state, run.governor


FRAMEWORKS = {"lightning": lightning, "transformers": transformers, "accelerate": accelerate}
Train = Callable[[bool, bool], Any]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Governors take the CPU for it. Nothing arrives within two steps."""
    machine = Machine()
    machine.lag = 2
    install(monkeypatch, machine)
    yield machine
    assert machine.violations == []


@pytest.fixture
def was_finite() -> Iterator[list[bool]]:
    """Of the parameters, after each step of any optimizer."""
    seen: list[bool] = []

    def look(optimizer: Any, *_: Any) -> None:
        seen.append(is_finite([p.detach() for group in optimizer.param_groups for p in group["params"]]))

    hook = register_optimizer_step_post_hook(look)
    yield seen
    hook.remove()


@pytest.mark.parametrize("train", FRAMEWORKS.values(), ids=FRAMEWORKS)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_the_device_refuses_the_step_and_the_run_is_the_clean_one(
    train: Train, fused: bool, device: Machine, was_finite: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    if fused and train is not transformers:  # which has an option for it
        monkeypatch.setattr(torch.optim, "AdamW", functools.partial(torch.optim.AdamW, fused=True))
    clean, _ = train(False, fused)
    state, guard = train(True, fused)
    assert state == clean
    assert guard.rollbacks == 2  # replayed, then skipped
    assert all(was_finite)


def test_without_a_decision_it_reaches_the_weights(
    device: Machine, was_finite: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red twin: the rollback takes it back, and the run ends as the clean one all the same."""
    monkeypatch.setattr(Refusals, "decide_late", lambda *_: None)
    state, _ = accelerate(True, False)
    assert is_finite(state)
    assert not all(was_finite)
