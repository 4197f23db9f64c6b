"""REFUSAL: the veto on optimizer steps that somebody else makes. See docs/veto.md.

Whoever follows such a loop is told when gradients are complete, shortly before the step or from inside it (a closure, a
hook of the optimizer). What `veto` does around a step of ours is therefore laid in wait for the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.optim import Optimizer

from tolaria import observe, veto
from tolaria.measure import Measured


class Refusals:
    """Vetoes on the next step of each of some optimizers.

    Args:
        optimizers: Those that are governed. Vetoes on any other come to nothing.
        keeps: A veto is kept, so nothing may be left of the step.

    Threads: the one that steps.
    """

    def __init__(self, optimizers: Sequence[Optimizer], keeps: bool) -> None:
        self._keeps, self._means = keeps, veto.Choice()
        self._governed = {id(optimizer) for optimizer in optimizers}
        exact = [optimizer for optimizer in optimizers if self._means.is_exact(optimizer)]
        # for good: a hook of the optimizer, from which a veto may come, cannot add another
        self._predicates = {id(optimizer): veto.Predicate() for optimizer in exact}
        self._hooks = [hook for each in exact for hook in self._predicates[id(each)].attach(each)]

    def can_read_late(self, optimizers: Sequence[Optimizer]) -> bool:
        """Whether the devices can decide on the next step of these, so that nobody need wait for their gradients."""
        if not optimizers:
            return True
        if any(map(veto.unwritten_momenta, optimizers)):
            return False
        prepared = all(id(optimizer) in self._predicates for optimizer in optimizers)
        return not self._keeps or (prepared and self._means.are_exact(optimizers))

    def _are_governed(self, optimizers: Sequence[Optimizer]) -> bool:
        return bool(optimizers) and all(id(optimizer) in self._governed for optimizer in optimizers)

    def decide_late(
        self, optimizers: Sequence[Optimizer], norms: Measured, theirs: torch.Tensor | float
    ) -> torch.Tensor | None:
        """Have the device refuse the next step of `optimizers` if a gradient is not finite. Waits for nothing.

        Args:
            optimizers: One decision for all of them.
            norms: Of their gradients, which are complete and not scaled; with flags where they could be had.
            theirs: What a scaler has found in them: it skips by itself where that is not 0.

        Returns:
            shape [], float32, on a device: 1 where it refuses; None where it cannot.
        """
        if not (norms.single or norms.flags) or not self._are_governed(optimizers):
            return None
        found = [veto.found(observe.total_norm(norms.single))] if norms.single else []
        flag = veto.any_of([*found, *norms.flags])
        if isinstance(theirs, torch.Tensor):
            flag = veto.unseen(flag, theirs)
        means = [self._means.of(optimizer, flag.device) for optimizer in optimizers]
        if veto.Means.NONE in means:
            return None
        for optimizer, way in zip(optimizers, means, strict=True):
            predicate = self._predicates.get(id(optimizer)) if way is veto.Means.PREDICATE else None
            if predicate is not None:
                predicate.refuse(optimizer, flag)
            else:
                veto.blank(optimizer, flag)
        return flag

    def decide_now(self, optimizers: Sequence[Optimizer], is_static: Callable[[torch.Tensor], bool]) -> bool:
        """Take the gradients away, so that the next step of `optimizers` does nothing. Answers whether it could.

        Args:
            optimizers: Of whom a gradient is not finite.
            is_static: Whether a gradient's memory is written by a captured graph, so that it is zeroed and not dropped.
        """
        if not self._are_governed(optimizers):
            return False
        for parameter in (p for each in optimizers for group in each.param_groups for p in group["params"]):
            if parameter.grad is not None and is_static(parameter.grad):
                parameter.grad.zero_()
            else:
                parameter.grad = None
        return True

    def lift(self) -> None:
        """The steps have been made, or never will be."""
        for predicate in self._predicates.values():
            predicate.lift()

    def close(self) -> None:
        """Leave no trace at the optimizers."""
        self.lift()
        while self._hooks:
            self._hooks.pop().remove()
