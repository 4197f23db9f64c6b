"""ARGUMENTS of the optimizers, looked at before anything is built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tolaria.errors import UnsupportedState
from tolaria.optim import source


def is_at_home(parameters: Sequence[torch.Tensor]) -> bool:
    """Whether all of them are of a kind that the kernels step, so that torch's fused optimizer is the one to match."""
    return bool(parameters) and all(
        p.device.type in source.KERNEL_DEVICES and p.is_floating_point() for p in parameters
    )


def refuse_differentiable(differentiable: bool) -> None:
    """Refuse what no past can be kept of."""
    if differentiable:
        raise UnsupportedState(
            "building an optimizer",
            "differentiable=True, and what a step leaves behind is not recorded by autograd",
            "Use torch's own optimizer.",
        )


def flat(params: Sequence[Any]) -> list[torch.Tensor]:
    """The tensors among what an optimizer is given: tensors, with names or not, or groups. Iterators become lists."""
    found: list[torch.Tensor] = []
    for each in params:
        if isinstance(each, dict):
            if not isinstance(each["params"], torch.Tensor):
                each["params"] = list(each["params"])
            inside = each["params"]
            found += flat([inside] if isinstance(inside, torch.Tensor) else inside)
        else:
            found.append(each[1] if isinstance(each, tuple) else each)
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]


def split_rate(rate: float | torch.Tensor, device: torch.device) -> tuple[torch.Tensor | None, float, int]:
    """A learning rate as a kernel takes it: where it is on the device, else its value, and the bit that says so."""
    if isinstance(rate, torch.Tensor) and rate.device.type != "cpu":
        return rate.to(device, torch.float32, non_blocking=True), 0.0, source.RATE
    return None, float(rate), 0
