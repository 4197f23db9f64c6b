"""DistributedDataParallel around a governed model: gradients are views of its buckets, and everything stays exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tolaria import GovernorConfig, TolariaGovernor

Govern = Callable[..., TolariaGovernor]

pytestmark = pytest.mark.usefixtures("group_of_one")


def step(ddp: nn.Module, batch: Any) -> torch.Tensor:
    loss = nn.functional.cross_entropy(ddp(batch[0]), batch[1])
    loss.backward()
    return loss


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("order", ["governor first", "wrapper first", "wrapper governed"])
def test_rollback_and_replay_equal_the_undisturbed_run(views: bool, order: str, govern: Govern, kit: Any) -> None:
    plain = kit.Run()
    ddp = DistributedDataParallel(plain.model, gradient_as_bucket_view=views)
    torch.manual_seed(3)
    for batch in plain.batches[:10]:
        step(ddp, batch)
        plain.optimizer.step()
        plain.scheduler.step()
        plain.optimizer.zero_grad()

    run = kit.Run()
    config = GovernorConfig(cadence=3, probation=1)
    ddp = run.model
    if order != "governor first":
        ddp = DistributedDataParallel(ddp, gradient_as_bucket_view=views)
    keys = list(ddp.state_dict())
    governor = govern(
        ddp if order == "wrapper governed" else run.model, run.optimizer, scheduler=run.scheduler, config=config
    )
    if order == "governor first":
        ddp = DistributedDataParallel(ddp, gradient_as_bucket_view=views)
    else:
        assert list(ddp.state_dict()) == keys
    torch.manual_seed(3)
    bad = {5}
    for number, batch in governor.watch(list(enumerate(run.batches[:10]))):
        governor.step(loss=step(ddp, kit.nan_batch(batch) if number in bad else batch))
        bad.discard(number)
    assert governor.statistics().rollbacks == 1
    assert governor.statistics().stale_vetoes == 0
    assert run.state() == plain.state()


@pytest.mark.parametrize("views", [False, True])
def test_a_manual_rollback_drops_the_gradients_in_the_buckets(views: bool, govern: Govern, kit: Any) -> None:
    run = kit.Run()
    ddp = DistributedDataParallel(run.model, gradient_as_bucket_view=views)
    governor = govern(run.model, run.optimizer)
    governor.snapshot()
    good = run.state()
    step(ddp, run.batches[0])
    addresses = [parameter.grad.data_ptr() for parameter in run.model.parameters()]
    governor.execute_rollback()
    assert run.state() == good
    for parameter, address in zip(run.model.parameters(), addresses, strict=True):
        assert parameter.grad is None or (not parameter.grad.any() and parameter.grad.data_ptr() == address)
    run.optimizer.zero_grad()
    step(ddp, run.batches[1])
    governor.step(loss=1.0)
    assert run.state() != good
