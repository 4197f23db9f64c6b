"""What hyperparameters and schedules stood at, put back in place."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from tolaria.settings import Settings


def trained(rate: Any = 0.1) -> tuple[torch.optim.AdamW, StepLR, ReduceLROnPlateau]:
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": [weight]} for weight in weights], lr=rate, betas=(0.8, 0.9))
    schedule, plateau = StepLR(optimizer, 1, gamma=0.5), ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    optimizer.step()
    return optimizer, schedule, plateau


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1, dtype=torch.float64)])
def test_all_of_it_comes_back_in_place(rate: Any) -> None:
    optimizer, schedule, plateau = trained(rate)
    group, held = optimizer.param_groups[1], optimizer.param_groups[1]["lr"]
    before, params = float(held), group["params"]
    states = schedule.state_dict(), dict(plateau.state_dict())
    states = ({**states[0]}, {**states[1]})
    settings = Settings([optimizer], [schedule, plateau])
    schedule.step()
    plateau.step(1.0)
    plateau.step(2.0)
    group["betas"] = (0.1, 0.2)
    settings.put_back()
    assert float(group["lr"]) == before
    assert group["betas"] == (0.8, 0.9)
    assert group["params"] is params
    assert (group["lr"] is held) == isinstance(rate, torch.Tensor) or group["lr"] == held
    assert (schedule.last_epoch, plateau.best, plateau.num_bad_epochs) == (0, math.inf, 0)
    schedule.step()
    assert float(group["lr"]) == before / 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_what_is_not_finite_does_not_come_back(bad: float, as_tensor: bool) -> None:
    optimizer, schedule, _ = trained(torch.tensor(0.1) if as_tensor else 0.1)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(bad) if as_tensor else bad
        group["weight_decay"] = 0.5
    settings = Settings([optimizer], [schedule])
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0.2, 0.3
    schedule.last_epoch = 7
    settings.put_back()
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.2]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.5]
    assert schedule.last_epoch == 7  # it belongs to that learning rate


def test_a_scheduler_that_has_met_nan_does_not_come_back() -> None:
    optimizer, schedule, plateau = trained()
    plateau.best = math.nan
    schedule.gamma = 0.25
    settings = Settings([optimizer], [schedule, plateau])
    plateau.best, schedule.gamma = 1.0, 0.5
    settings.put_back()
    assert (plateau.best, schedule.gamma) == (1.0, 0.25)
