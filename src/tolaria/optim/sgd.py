"""SGD that leaves the past behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import optim
from torch.optim.sgd import sgd

from tolaria.optim import source
from tolaria.optim.arguments import flat, is_at_home, refuse_differentiable, split_rate
from tolaria.optim.batch import Batch
from tolaria.optim.launch import Kernels, Table
from tolaria.optim.leaving import Group, Leaving

_MOMENTUM = "momentum_buffer"


class SGD(Leaving, optim.SGD):
    """`torch.optim.SGD` whose step leaves the whole state before it behind, to be taken back with `undo`.

    Results are those of torch's fused SGD on CUDA and of torch's SGD with the same arguments elsewhere. State dicts can
    be loaded either way.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize, foreach, fused: As torch's. `fused` None
            means True where all parameters are on CUDA. With False torch's operators make the step.
        history, alternate: As of `AdamW`.
        differentiable: Must be False.

    Raises:
        UnsupportedState: `differentiable`.
        InvalidConfig: `history`.
    """

    _KERNEL = "tolaria_sgd"

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | torch.Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        history: int = 1,
        alternate: bool = True,
    ) -> None:
        refuse_differentiable(differentiable)
        params = list(params)
        if fused is None and not foreach and is_at_home(flat(params)):
            fused = True
        self._remember(history, alternate, None)
        optim.SGD.__init__(
            self,
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            fused=fused,
        )
        self._step_supports_amp_scaling = True

    def _names(self, group: Group) -> list[str]:
        return [_MOMENTUM] if group["momentum"] != 0 else []

    def _names_in(self, state: dict[str, Any]) -> list[str]:
        return [_MOMENTUM] if state.get(_MOMENTUM) is not None else []

    def _create(self, group: Group, parameters: Sequence[torch.Tensor]) -> None:
        """The first step makes the momentum out of the gradient."""

    def _declines(self, group: Group) -> str:
        return ""

    def _suits(self, group: Group) -> bool:
        return (
            group["fused"] is not False and not group["foreach"] and not isinstance(group["weight_decay"], torch.Tensor)
        )

    def _launch(
        self, batch: Batch, table: Table, kernels: Kernels, group: Group, places: tuple[int, int, int], what: int
    ) -> None:
        step, prepare = kernels
        found, scale = self._pointer("found_inf", batch.device), self._pointer("grad_scale", batch.device)
        rate, number, bit = split_rate(group["lr"], batch.device)
        gradients = table.locate(batch.gradients())
        if self._past.captured:
            table.prepare(prepare, None, (0.0, 0.0), found)  # counts the launch: nothing else would tell of a replay
        scalars = [number, float(group["momentum"]), float(group["dampening"]), float(group["weight_decay"])]
        what |= bit | (source.NESTEROV if group["nesterov"] else 0)
        table.launch(step, gradients, places, what, [rate, scale, found], scalars)

    def _operate(self, batch: Batch, group: Group, parameters: list[torch.Tensor], flags: dict[str, Any]) -> None:
        gradients = batch.gradients()
        momenta: list[torch.Tensor | None] = [state.get(_MOMENTUM) for state in batch.states if batch.names]
        sgd(
            parameters,
            gradients,
            momenta,
            has_sparse_grad=any(gradient.is_sparse for gradient in gradients),
            foreach=group["foreach"],
            fused=group["fused"],
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            **flags,
        )
        for state, momentum in zip(batch.states if batch.names else (), momenta, strict=True):
            state[_MOMENTUM] = momentum
