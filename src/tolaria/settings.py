"""SETTINGS: where hyperparameters and schedules stand, kept across a rollback after which nothing would repeat them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from tolaria.state.leaves import clone_tree, has_nan, is_finite


class Settings:
    """The hyperparameters of optimizers and the states of their schedulers, as they are now.

    Args:
        optimizers: All groups of each; parameters and moments are not looked at.
        schedulers: Anything with `state_dict` and `load_state_dict`.
    """

    def __init__(self, optimizers: Iterable[Optimizer], schedulers: Iterable[Any]) -> None:
        self._groups = [(each, group, _values(group)) for each in optimizers for group in each.param_groups]
        self._schedulers = [(each, clone_tree(each.state_dict())) for each in schedulers]

    def put_back(self) -> None:
        """Set all of them to what they were, in place: a tensor stays the same tensor.

        What was not finite stays as it is now, and so does the scheduler of a learning rate that was not.
        """
        spoilt: set[int] = set()
        for optimizer, group, values in self._groups:
            if not _is_finite(values.get("lr")):
                spoilt.add(id(optimizer))
            for key, value in values.items():
                if _is_finite(value):
                    _put(group, key, value)
        for scheduler, state in self._schedulers:
            if id(getattr(scheduler, "optimizer", None)) not in spoilt and not _has_nan(state):
                scheduler.load_state_dict(state)


def _values(group: dict[str, Any]) -> dict[str, Any]:
    return {key: clone_tree(value) for key, value in group.items() if key != "params"}


@torch.no_grad()
def _put(group: dict[str, Any], key: str, value: Any) -> None:
    now = group.get(key)
    if isinstance(now, torch.Tensor) and isinstance(value, torch.Tensor) and now.shape == value.shape:
        now.copy_(value)  # captured graphs hold its address
    else:
        group[key] = value


def _is_finite(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return is_finite(value)
    if isinstance(value, (list, tuple)):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _has_nan(value: Any) -> bool:
    """An infinity is no damage in a scheduler: where no metric was seen yet, it is the best one."""
    if isinstance(value, torch.Tensor):
        return has_nan(value)
    if isinstance(value, dict):
        return any(map(_has_nan, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_has_nan, value))
    return isinstance(value, float) and math.isnan(value)
