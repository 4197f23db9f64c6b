"""ADAMW that leaves the past behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import optim
from torch.optim.adam import adam

from tolaria.errors import UnsupportedState
from tolaria.optim.arguments import flat, is_at_home, refuse_differentiable, split_rate
from tolaria.optim.batch import Batch
from tolaria.optim.launch import Kernels, Table
from tolaria.optim.leaving import Group, Leaving

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class AdamW(Leaving, optim.AdamW):
    """`torch.optim.AdamW` whose step leaves the whole state before it behind, to be taken back with `undo`.

    Results are those of torch's fused AdamW on CUDA and of torch's AdamW with the same arguments elsewhere. State dicts
    can be loaded either way.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, fused: As torch's. `fused` None
            means True where all parameters are on CUDA. With False torch's operators make the step. With `capturable`
            the moments keep their addresses, and their old values are copied.
        history: How many steps can be undone. Each takes the memory of the parameters and the moments once.
        alternate: Let the moments change their place with every step; False: copy the old ones, which takes longer.
        moment_dtype: Element type of the moments, for example float32 over bfloat16 parameters; the arithmetic is then
            in that type, and parameters are rounded at the end. None: as the parameters.
        differentiable: Must be False.

    Raises:
        UnsupportedState: `differentiable`.
        InvalidConfig: `history` or `moment_dtype`.
    """

    _KERNEL = "tolaria_adamw"

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        history: int = 1,
        alternate: bool = True,
        moment_dtype: torch.dtype | None = None,
    ) -> None:
        refuse_differentiable(differentiable)
        params = list(params)
        if fused is None and not foreach and is_at_home(flat(params)):
            fused = True
        self._remember(history, alternate, moment_dtype)
        optim.AdamW.__init__(
            self,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            fused=fused,
        )
        self._step_supports_amp_scaling = self.refuses_by_itself()
        self._refuse_complex(flat(params))

    def refuses_by_itself(self) -> bool:
        # a count in main memory cannot follow a flag on a device, unless the host reads it
        return all(
            group["fused"] or group["capturable"] or all(p.device.type == "cpu" for p in group["params"])
            for group in self.param_groups
        )

    def _check_gradients(self, gradients: Sequence[torch.Tensor]) -> None:
        if any(gradient.is_sparse for gradient in gradients):
            raise RuntimeError("AdamW does not support sparse gradients, please consider SparseAdam instead")

    def _refuse_complex(self, parameters: Sequence[torch.Tensor]) -> None:
        dtype = self._past.options.moment_dtype
        if dtype is not None and any(parameter.is_complex() for parameter in parameters):
            raise UnsupportedState(
                "building an optimizer",
                f"moment_dtype={dtype} over complex parameters, of which it would hold one half",
                "Leave moment_dtype out.",
            )

    def _check_capture(self) -> None:
        self._accelerator_graph_capture_health_check()

    def _names(self, group: Group) -> list[str]:
        return list(_MOMENTS if group["amsgrad"] else _MOMENTS[:2])

    def _names_in(self, state: dict[str, Any]) -> list[str]:
        return [name for name in _MOMENTS if name in state]

    def _create(self, group: Group, parameters: Sequence[torch.Tensor]) -> None:
        self._refuse_complex(parameters)  # of a group that came later
        self._init_group(group, [], [], [], [], [], [])
        dtype = self._past.options.moment_dtype
        for state in map(self.state.__getitem__, parameters):
            for name in self._names(group) if dtype is not None else ():
                state[name] = state[name].to(dtype)

    def _declines(self, group: Group) -> str:
        return "capturable: a graph may hold the addresses of the moments" if group["capturable"] else ""

    def _suits(self, group: Group) -> bool:
        return (
            group["fused"] is not False
            and not group["foreach"]
            and not any(isinstance(value, torch.Tensor) for value in (*group["betas"], group["weight_decay"]))
        )

    def _launch(
        self, batch: Batch, table: Table, kernels: Kernels, group: Group, places: tuple[int, int, int], what: int
    ) -> None:
        step, prepare = kernels
        found, scale = self._pointer("found_inf", batch.device), self._pointer("grad_scale", batch.device)
        past_steps = None if batch.past_steps is None else batch.past_steps[places[2]]
        rate, number, bit = split_rate(group["lr"], batch.device)
        gradients = table.locate(batch.gradients())
        bias = table.prepare(prepare, past_steps, group["betas"], found)
        scalars = [number, *map(float, group["betas"]), float(group["weight_decay"]), float(group["eps"])]
        table.launch(step, gradients, places, what | bit, [bias, rate, scale, found], scalars)

    def _operate(self, batch: Batch, group: Group, parameters: list[torch.Tensor], flags: dict[str, Any]) -> None:
        moments = batch.named(batch.live)
        beta1, beta2 = group["betas"]
        adam(
            parameters,
            [g.to(p.dtype) for g, p in zip(batch.gradients(), parameters, strict=True)],
            moments["exp_avg"],
            moments["exp_avg_sq"],
            moments.get("max_exp_avg_sq", []),
            batch.steps,
            foreach=group["foreach"],
            capturable=group["capturable"],
            differentiable=False,
            fused=group["fused"],
            has_complex=any(p.is_complex() for p in parameters),
            decoupled_weight_decay=True,
            amsgrad=group["amsgrad"],
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
            **flags,
        )
