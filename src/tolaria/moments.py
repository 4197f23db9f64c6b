"""MOMENTS: what an optimizer remembers of earlier gradients, reset or damped after a rollback.

In place: a captured graph may hold the address of every one of these tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import optim
from torch.optim import Optimizer

from tolaria.config import Moments
from tolaria.errors import UnsupportedState
from tolaria.optim.adamw import AdamW
from tolaria.optim.sgd import SGD

_AVERAGES = {"step": 0.0, "exp_avg": 0.0, "exp_avg_sq": 0.0, "max_exp_avg_sq": 0.0}

_COLD: dict[type[Optimizer], dict[str, float]] = {
    optim.Adam: _AVERAGES,
    optim.AdamW: _AVERAGES,
    optim.RAdam: _AVERAGES,
    optim.NAdam: {**_AVERAGES, "mu_product": 1.0},
    optim.Adamax: {"step": 0.0, "exp_avg": 0.0, "exp_inf": 0.0},
    optim.RMSprop: {"step": 0.0, "square_avg": 0.0, "momentum_buffer": 0.0, "grad_avg": 0.0},
    optim.Adadelta: {"step": 0.0, "square_avg": 0.0, "acc_delta": 0.0},
    optim.SGD: {"momentum_buffer": 0.0},
    AdamW: _AVERAGES,
    SGD: {"momentum_buffer": 0.0},
}
"""What each entry of the state is before the first step. A step from there is a first step, bit for bit."""

_DIRECTIONS = ("exp_avg", "momentum_buffer")
"""First moments. The second ones are left as they are: smaller ones would make the next steps larger."""


def refuse_unknown(optimizers: Iterable[Optimizer], how: Moments) -> None:
    """Refuse optimizers of which it is not known what in their state is a moment. Call before anything is attached.

    Raises:
        UnsupportedState: One of them is not in the table of docs/recovery.md.
    """
    for optimizer in optimizers:
        reason = _obstacle(optimizer, how)
        if reason:
            raise UnsupportedState(
                "attaching the governor",
                f"Recovery(moments={how!r}), and {type(optimizer).__qualname__} {reason}",
                'Use moments="keep", or one of the optimizers that docs/recovery.md lists.',
            )


def _obstacle(optimizer: Optimizer, how: Moments) -> str:
    if how == "keep":
        return ""
    cold = _COLD.get(type(optimizer))
    if cold is None:
        return "is none of those whose moments are known"
    if how == "damp" and not set(_DIRECTIONS) & set(cold):
        return "has no first moment"
    if isinstance(optimizer, optim.SGD) and any(group["dampening"] for group in optimizer.param_groups):
        return "with dampening makes its first step in another way than those after it"
    return ""


@torch.no_grad()
def treat(optimizers: Iterable[Optimizer], how: Moments, damp: float) -> None:
    """Change the moments of every parameter in place. Call inside a write section; nothing waits for a device.

    Args:
        optimizers: Each accepted by `refuse_unknown`.
        how: ``"reset"``: as before the first step. ``"damp"``: first moments times `damp`.
        damp: Factor.
    """
    for optimizer in optimizers:
        cold = _COLD[type(optimizer)] if how != "keep" else {}
        for state in optimizer.state.values():
            for name in cold.keys() & state.keys():
                if how == "reset":
                    state[name] = _filled(state[name], cold[name])
                elif name in _DIRECTIONS and state[name] is not None:
                    state[name].mul_(damp)


def _filled(value: Any, number: float) -> Any:
    """The tensor itself, filled; a number where there was one; None stays None."""
    if isinstance(value, torch.Tensor):
        return value.fill_(number)
    return value if value is None else type(value)(number)
