"""UPDATE: one optimizer step under guard: unscale, clip, veto, step, scheduler, scaler, zero the gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from tolaria import observe

Closure = Callable[[], Any]
IsStatic = Callable[[torch.Tensor], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one update. Numbers are on the host, or still on a device when they are to be read late.

    Attributes:
        loss: As handed in (from the closure where nothing was).
        grad_norm: L2 norm before clipping, after unscaling; None without gradients, and where `norms` stands for it.
        nonfinite_gradients: Gradient tensors with a non-finite value.
        norms: L2 norms of the single gradients, on their devices, to be read late; see `observe.norms`.
        vetoed: The step was refused because of them.
        stale: The step was refused because its backward straddled a rollback.
        scaler_skipped: The scaler did not apply the step, which is routine; not 0 means it did not.
    """

    loss: observe.Scalar
    grad_norm: float | None = None
    nonfinite_gradients: int = 0
    norms: Sequence[torch.Tensor] = ()
    vetoed: bool
    stale: bool
    scaler_skipped: observe.Scalar


class Update:
    """Optimizers, schedulers and scaler of one train state, stepped together.

    Args:
        optimizers: Stepped in order.
        schedulers: Stepped after an applied update, in order.
        scaler: Or None. One that is not enabled counts as None.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], schedulers: Sequence[Any], scaler: torch.amp.GradScaler | None
    ) -> None:
        self.optimizers, self.schedulers = list(optimizers), list(schedulers)
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None

    @property
    def can_read_late(self) -> bool:
        """Whether an update needs no number on the host: a scaler over an optimizer that cannot skip by itself does."""
        return self.scaler is None or all(
            getattr(optimizer, "_step_supports_amp_scaling", False) for optimizer in self.optimizers
        )

    def run(
        self,
        parameters: Sequence[nn.Parameter],
        loss: observe.Loss,
        clip: float | None,
        metric: float | None,
        closure: Closure | None,
        lr_factor: float,
        may_veto: bool,
        is_static: IsStatic,
        is_stale: bool = False,
    ) -> Outcome:
        """Apply one update, or refuse it because a gradient is not finite.

        Args:
            parameters: Governed parameters, whose gradients are read.
            loss: As handed to `step`.
            clip: Greatest gradient norm, or None.
            metric: For schedulers that want one.
            closure: Handed to every optimizer; its gradients do not exist before, so nothing can be vetoed.
            lr_factor: Factor on every learning rate, for this step only.
            may_veto: False: apply whatever comes (observe mode).
            is_static: Whether a gradient's memory is written by a captured graph, so that it is zeroed and not dropped.
            is_stale: The optimizer's own section will refuse these gradients, so schedulers stay where they are.
        """
        self._unscale()
        grads = observe.gradients(parameters) if closure is None else []
        norm, bad = observe.gradient_norm(grads)
        value = observe.read_loss(loss)
        by_scaler = self.scaler is not None and bad > 0
        vetoed = bad > 0 and not by_scaler and may_veto
        if not vetoed:
            # what the scaler skips needs no clipping; what only observe mode lets pass is clipped as it would be anyway
            if clip is not None and norm is not None and not by_scaler:
                # the same type as the norm had before it was read, or the factor would be rounded otherwise
                dtype = functools.reduce(torch.promote_types, (grad.dtype for grad in grads))
                torch.nn.utils.clip_grads_with_norm_(parameters, clip, torch.tensor(norm, dtype=dtype))
            with self._scaled_learning_rate(lr_factor):
                returned = self._step(closure)
            value = observe.read_loss(returned) if value is None else value
            if not by_scaler and not is_stale:
                self._step_schedulers(value if metric is None else metric)
        self._clear(parameters, is_static)
        return Outcome(
            loss=value, grad_norm=norm, nonfinite_gradients=bad, vetoed=vetoed, stale=is_stale, scaler_skipped=by_scaler
        )

    def run_late(
        self,
        parameters: Sequence[nn.Parameter],
        loss: observe.Loss,
        clip: float | None,
        metric: float | None,
        closure: Closure | None,
        lr_factor: float,
        is_static: IsStatic,
        is_stale: bool = False,
    ) -> Outcome:
        """`run` without waiting for the device: nothing is vetoed, and schedulers also follow a step a scaler skips.

        Whoever learns later that a gradient was not finite rolls back, so nothing is lost but time. A
        `ReduceLROnPlateau` without `metric` needs the loss itself, and waits for it.
        """
        self._unscale()
        grads = observe.gradients(parameters) if closure is None else []
        norms = observe.norms(grads)
        skipped = self.skipped_by_scaler()
        if clip is not None and norms:
            dtype = functools.reduce(torch.promote_types, (grad.dtype for grad in grads))
            torch.nn.utils.clip_grads_with_norm_(parameters, clip, observe.total_norm(norms).to(dtype))
        with self._scaled_learning_rate(lr_factor):
            returned = self._step(closure)
        value = observe.mean_loss(returned if loss is None else loss)
        if not is_stale and self.schedulers:
            if metric is None and self._wants_metric():
                metric = observe.read_loss(value)
            self._step_schedulers(metric)
        self._clear(parameters, is_static)
        return Outcome(loss=value, norms=norms, vetoed=False, stale=is_stale, scaler_skipped=skipped)

    def skipped_by_scaler(self) -> torch.Tensor | float:
        """What the scaler has found in the unscaled gradients: not 0 where it will skip."""
        if self.scaler is None:
            return 0.0
        found = [
            flag
            for optimizer in self.optimizers
            for flag in self.scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values()
        ]
        if not found:
            return 0.0
        return sum((flag.to(found[0].device, non_blocking=True) for flag in found[1:]), start=found[0].clone())

    def plain(
        self,
        parameters: Sequence[nn.Parameter],
        clip: float | None,
        metric: float | None,
        loss: observe.Loss,
        closure: Closure | None,
    ) -> None:
        """The same update without any guard: what a loop without tolaria would do."""
        if clip is not None:
            self._unscale()
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        returned = self._step(closure)
        if metric is None and self._wants_metric():
            metric = observe.read_loss(returned if loss is None else loss)
        self._step_schedulers(metric)
        self._clear(parameters, lambda _: False)

    def _wants_metric(self) -> bool:
        return any(isinstance(scheduler, ReduceLROnPlateau) for scheduler in self.schedulers)

    def _clear(self, parameters: Sequence[nn.Parameter], is_static: IsStatic) -> None:
        """Set the gradients to None, also of parameters that no optimizer steps: they would add up for ever.

        A captured backward writes its gradients to the same memory at every replay: those are zeroed instead.
        """
        static = [(p, p.grad) for p in parameters if p.grad is not None and is_static(p.grad)]
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        for parameter in parameters:
            parameter.grad = None
        for parameter, grad in static:
            parameter.grad = grad
            grad.zero_()

    def _unscale(self) -> None:
        if self.scaler is None:
            return
        for optimizer in self.optimizers:
            # a caller that clips by itself has unscaled already; doing it twice is an error
            if self.scaler._per_optimizer_states[id(optimizer)]["stage"].name == "READY":
                self.scaler.unscale_(optimizer)

    def _step(self, closure: Closure | None) -> Any:
        returned = None
        arguments = () if closure is None else (closure,)
        for optimizer in self.optimizers:
            if self.scaler is not None:
                returned = self.scaler.step(optimizer, *arguments)
            else:
                returned = optimizer.step(*arguments)
        if self.scaler is not None:
            self.scaler.update()
        return returned

    def _step_schedulers(self, metric: float | None) -> None:
        for scheduler in self.schedulers:
            if not isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step()
            elif metric is not None:
                scheduler.step(metric)

    @contextmanager
    def _scaled_learning_rate(self, factor: float) -> Generator[None]:
        """Lower every learning rate for one step. Put back at once: schedulers start from the present one."""
        if factor == 1.0:
            yield
            return
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        # torch shares one tensor among all groups when the rate is given as a tensor: lower it once
        shared = {id(group["lr"]): group for group in groups if isinstance(group["lr"], torch.Tensor)}
        groups = [group for group in groups if shared.get(id(group["lr"]), group) is group]
        saved = [lr.clone() if isinstance(lr := group["lr"], torch.Tensor) else lr for group in groups]
        try:
            for group in groups:
                _set_lr(group, group["lr"] * factor)
            yield
        finally:
            for group, lr in zip(groups, saved, strict=True):
                _set_lr(group, lr)


def _set_lr(group: dict[str, Any], lr: Any) -> None:
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].copy_(lr)  # in place: captured graphs hold its address
    else:
        group["lr"] = lr
