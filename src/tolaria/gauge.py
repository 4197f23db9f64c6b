"""GAUGE: how far an optimizer step moves the weights, and the gradient norms of single parameter groups.

Everything stays on the devices it is on, and travels to the host with the other signs of its step (`observe`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from tolaria import observe
from tolaria.observe import Scalar

RATIO = "update_ratio"
"""Sign: L2 norm of what a step has added to the weights, in L2 norms of the weights before it."""


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    """Weights of one parameter group as they were before a step."""

    now: list[torch.Tensor]
    before: list[torch.Tensor]


class Gauge:
    """Measures around optimizer steps, where it was asked to.

    Args:
        optimizers: Whose parameter groups are meant. A group has the name of its entry ``"name"`` if it has one, else
            its number; with several optimizers the number of its optimizer and a dot stand before that.
        ratio_every: `RATIO` is measured every that many steps, beside which the weights are held twice; 0 never.
        by_group: Also ``update_ratio/<group>`` at those steps, and ``grad_norm/<group>`` at every step.

    Threads: the one that steps.
    """

    def __init__(self, optimizers: Sequence[Optimizer], ratio_every: int, by_group: bool) -> None:
        self._optimizers, self._every, self._by_group = list(optimizers), ratio_every, by_group
        self._step = -1
        self._norms: dict[str, Scalar] = {}
        self._held: dict[str, _Held] = {}

    def note(
        self,
        step: int,
        optimizer: Optimizer | None = None,
        scaler: torch.amp.GradScaler | None = None,
        gradients: bool = True,
    ) -> None:
        """Look at gradients and weights right before a step, on the caller's current streams.

        Args:
            step: Its number. What was noted for another one is forgotten.
            optimizer: Of whose groups; None: of all.
            scaler: Has scaled the gradients; those of some optimizers may have been unscaled already.
            gradients: They are complete.
        """
        wants_ratio = self._every > 0 and step % self._every == 0
        if not (wants_ratio or self._by_group):
            return
        if step != self._step:
            self._forget()
            self._step = step
        for name, owner, parameters in self._groups(optimizer):
            if self._by_group and gradients:
                parts = observe.norms(observe.gradients(parameters))
                if parts:
                    norm, scale = observe.total_norm(parts), scale_of(scaler, owner)
                    self._norms[f"grad_norm/{name}"] = norm if scale is None else norm / scale.to(norm.device)
            if wants_ratio and name not in self._held:  # a closure may be called several times in one step
                now = [p.detach() for p in parameters if not is_lazy(p) and p.is_floating_point() and p.numel()]
                self._held[name] = _Held(now, [weight.clone() for weight in now])

    def read(self, step: int) -> dict[str, Scalar]:
        """The signs of the step just made, by name; forgets what was noted for it. Nothing waits."""
        norms, held = self._norms, self._held
        self._forget()
        if step != self._step:
            return {}
        moved: list[torch.Tensor] = []
        size: list[torch.Tensor] = []
        signs = dict(norms)
        for name, each in held.items():
            if not each.now:
                continue
            group_moved = observe.norms(torch._foreach_sub(each.now, each.before))
            group_size = observe.norms(each.before)
            if self._by_group:
                signs[f"{RATIO}/{name}"] = _ratio(group_moved, group_size)
            moved += group_moved
            size += group_size
        if moved:
            signs[RATIO] = _ratio(moved, size)
        return signs

    def _forget(self) -> None:
        self._norms, self._held = dict[str, Scalar](), dict[str, _Held]()

    def _groups(self, wanted: Optimizer | None) -> Iterator[tuple[str, Optimizer, Iterable[torch.nn.Parameter]]]:
        for number, optimizer in enumerate(self._optimizers):
            if wanted is not None and optimizer is not wanted:
                continue
            prefix = f"{number}." if len(self._optimizers) > 1 else ""
            for index, group in enumerate(optimizer.param_groups):
                yield f"{prefix}{group.get('name', index)}", optimizer, group["params"]


def _ratio(moved: Sequence[torch.Tensor], size: Sequence[torch.Tensor]) -> torch.Tensor:
    far, long = observe.total_norm(moved), observe.total_norm(size)
    return far / long.to(far.device, non_blocking=True)


def scale_of(scaler: torch.amp.GradScaler | None, optimizer: Optimizer | None) -> torch.Tensor | None:
    """What the gradients of one optimizer are multiplied by, a scalar on the device.

    None where nobody scales, or they have been unscaled: a scaler does that for each optimizer by itself, so the
    gradients of another may be scaled still. Those that no optimizer steps (`optimizer` is None) stay scaled.
    """
    if scaler is None:
        return None
    if optimizer is not None and scaler._per_optimizer_states[id(optimizer)]["stage"].name != "READY":
        return None
    return scaler._scale
