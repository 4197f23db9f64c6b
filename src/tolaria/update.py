"""UPDATE: one optimizer step under guard: unscale, clip, veto, step, scheduler, scaler, zero the gradients."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from tolaria import observe, veto
from tolaria.measure import Measure, Measured

Closure = Callable[[], Any]
IsStatic = Callable[[torch.Tensor], bool]
_Read = tuple[Optimizer | None, Measured]
"""Norms of gradients, and the optimizer that a scaler may skip them with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one update. Numbers are on the host, or still on a device when they are to be read late.

    Attributes:
        loss: As handed in (from the closure where nothing was).
        grad_norm: L2 norm before clipping, after unscaling; None without gradients, and where `norms` stands for it.
        nonfinite_gradients: Gradient tensors with a non-finite value.
        norms: On their devices, to be read late.
        vetoed: The step was refused because of them.
        late_veto: shape [], float32, on a device: 1 where the device refuses it. None where the host has decided, and
            where the device cannot.
        stale: The step was refused because its backward straddled a rollback.
        scaler_skipped: The scaler did not apply the step, which is routine; not 0 means it did not.
    """

    loss: observe.Scalar
    grad_norm: float | None = None
    nonfinite_gradients: int = 0
    norms: Measured = field(default_factory=Measured)
    vetoed: bool
    late_veto: torch.Tensor | None = None
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
        self._means = veto.Choice()
        self._measures: dict[int, Measure] = {}  # by optimizer where a scaler skips each by itself

    def can_read_late(self, *, may_veto: bool, keeps: bool) -> bool:
        """Whether the next update needs no number on the host.

        It does with a scaler over an optimizer that cannot skip by itself, in the first step of torch's fused SGD with
        momentum, and where a veto is kept (`keeps`) but cannot be carried out bit for bit on the device.
        """
        if self.scaler is not None and not all(
            getattr(optimizer, "_step_supports_amp_scaling", False) for optimizer in self.optimizers
        ):
            return False
        if not may_veto:
            return True
        if any(map(veto.unwritten_momenta, self.optimizers)):
            return False
        return not keeps or self.are_exact

    @property
    def are_exact(self) -> bool:
        """Whether a step of all optimizers can be refused by a flag so that nothing of it is left."""
        return self._means.are_exact(self.optimizers)

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
        counted = self._counted(parameters)
        grads = observe.gradients(counted) if closure is None else []
        flags = () if is_stale else self._scaler_flags()
        norm, bad, found = observe.norm_beside(grads, [flag for _, flag in flags])
        value = observe.read_loss(loss)
        flagged = [optimizer for (optimizer, _), is_found in zip(flags, found, strict=True) if is_found]
        by_scaler = bool(flagged) and not (may_veto and self._is_beyond(flagged))
        vetoed = bad > 0 and not by_scaler and may_veto and not is_stale
        if (vetoed or is_stale) and self.scaler is not None:
            self.scaler._per_optimizer_states.clear()  # as its `update` leaves it, but for the scale
        if not vetoed:
            # what only observe mode lets pass is clipped as it would be anyway
            self._clip(counted, clip, norm, flagged if by_scaler else [])
            if is_stale and closure is None:  # else a scaler that skips would keep the section from refusing them
                self._clear(parameters, is_static)
            unwritten = [(each, veto.unwritten_momenta(each)) for each in flagged] if may_veto else []
            with self._scaled_learning_rate(lr_factor):
                returned = self._step(closure, guarded=may_veto)
            for optimizer, momenta in unwritten:
                veto.forget_momenta(optimizer, momenta)
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
        may_veto: bool,
        is_static: IsStatic,
        is_stale: bool = False,
    ) -> Outcome:
        """`run` without waiting for the device, which vetoes by itself; schedulers also follow a step that it refuses.

        Whoever learns later that a gradient was not finite rolls back, so nothing is lost but time. A
        `ReduceLROnPlateau` without `metric` needs the loss itself, and waits for it.
        """
        with self._scaled_learning_rate(lr_factor):
            done = self.launch(parameters, loss, clip, closure, (lambda flag: flag) if may_veto else None)
        if not is_stale and self.schedulers:
            if metric is None and self._wants_metric():
                metric = observe.read_loss(done.loss)
            self._step_schedulers(metric)
        self._clear(parameters, is_static)
        return replace(done, stale=is_stale)

    def launch(
        self,
        parameters: Sequence[nn.Parameter],
        loss: observe.Loss,
        clip: float | None,
        closure: Closure | None,
        decide: Callable[[torch.Tensor], torch.Tensor | None] | None,
    ) -> Outcome:
        """What the device does in one update, and nothing of the host's: what a graph can hold.

        Args:
            parameters: Governed parameters, whose gradients are read.
            loss: As handed to `step`.
            clip: Greatest gradient norm, or None.
            closure: Handed to every optimizer.
            decide: Called right before the optimizers with the flag that tells whether a gradient is not finite (see
                `veto`), and answers the flag by which they are to be refused; None: they are not. None for no veto.
        """
        self._unscale()
        counted = self._counted(parameters)
        grads = observe.gradients(counted) if closure is None else []
        read = self._measured(grads, clips=clip is not None, flagged=decide is not None)
        skipped = self.skipped_by_scaler()
        single = list(_single(read))
        total = observe.total_norm(single) if single else None
        refusal = None if decide is None else self._refusal(read, total)
        if refusal is not None and decide is not None:
            refusal = decide(refusal)
        if clip is not None and total is not None:
            total = observe.clipping_norm(grads, single, total).to(_dtype_of_norm(grads))
            if decide is not None and len(read) > 1 and isinstance(skipped, torch.Tensor):
                applied = observe.total_norm(list(self._applied(read)))
                total = torch.where(skipped.to(total.device, non_blocking=True).ne(0), applied.to(total), total)
            torch.nn.utils.clip_grads_with_norm_(counted, clip, total)
        returned = self._step(closure, guarded=decide is not None, refusal=refusal)
        value = observe.mean_loss(returned if loss is None else loss)
        return Outcome(
            loss=value,
            norms=Measured(single, [total for _, norms in read for total in norms.totals]),
            vetoed=False,
            late_veto=refusal,
            stale=False,
            scaler_skipped=skipped,
        )

    def skipped_by_scaler(self, optimizer: Optimizer | None = None) -> torch.Tensor | float:
        """What the scaler has found in the unscaled gradients (of one optimizer): not 0 where it will skip."""
        if self.scaler is None:
            return 0.0
        found = [
            flag
            for each in (self.optimizers if optimizer is None else [optimizer])
            for flag in self.scaler._per_optimizer_states[id(each)]["found_inf_per_device"].values()
        ]
        if not found:
            return 0.0
        return sum((flag.to(found[0].device, non_blocking=True) for flag in found[1:]), start=found[0].clone())

    def _scaler_flags(self) -> list[tuple[Optimizer, torch.Tensor]]:
        """By optimizer: not 0 where the scaler will skip it, even if its gradients were clipped to finite ones."""
        flags = ((optimizer, self.skipped_by_scaler(optimizer)) for optimizer in self.optimizers)
        return [(optimizer, flag) for optimizer, flag in flags if isinstance(flag, torch.Tensor)]

    def _is_beyond(self, flagged: Sequence[Optimizer]) -> bool:
        """Whether an optimizer is about to apply what is not finite and the scaler has not seen. Waits."""
        others = [optimizer for optimizer in self.optimizers if all(optimizer is not each for each in flagged)]
        return any(observe.num_nonfinite(observe.gradients(_parameters(optimizer))) for optimizer in others)

    def _counted(self, parameters: Sequence[nn.Parameter]) -> Sequence[nn.Parameter]:
        """Those whose gradients count. Behind a scaler not those that nobody steps: they stay scaled, and overflow."""
        if self.scaler is None:
            return parameters
        stepped = {id(parameter) for optimizer in self.optimizers for parameter in _parameters(optimizer)}
        return [parameter for parameter in parameters if id(parameter) in stepped]

    def _clip(
        self, parameters: Sequence[nn.Parameter], clip: float | None, norm: float | None, flagged: Sequence[Optimizer]
    ) -> None:
        """Clip what will be applied: gradients of the `flagged`, which the scaler skips, have no say in the others."""
        if clip is None or norm is None:
            return
        if flagged:
            skipped = {id(parameter) for optimizer in flagged for parameter in _parameters(optimizer)}
            parameters = [parameter for parameter in parameters if id(parameter) not in skipped]
            norm, _ = observe.gradient_norm(observe.gradients(parameters))
        if norm is not None:
            # the same type as the norm had before it was read, or the factor would be rounded otherwise
            dtype = _dtype_of_norm(observe.gradients(parameters))
            torch.nn.utils.clip_grads_with_norm_(parameters, clip, torch.tensor(norm, dtype=dtype, device="cpu"))

    def _applied(self, read: Sequence[_Read]) -> Iterator[torch.Tensor]:
        """The norms, with 0 for those of optimizers that the scaler skips: they would spoil the clipping of others."""
        for optimizer, norms in read:
            theirs = 0.0 if optimizer is None else self.skipped_by_scaler(optimizer)
            for norm in norms.single:
                if isinstance(theirs, torch.Tensor):
                    norm = norm.masked_fill(theirs.to(norm.device, non_blocking=True).ne(0), 0.0)
                yield norm

    def _measured(self, grads: Sequence[torch.Tensor], *, clips: bool, flagged: bool) -> list[_Read]:
        """The norms of all gradients: by optimizer where a scaler skips each by itself, else together.

        Where we clip, they are taken by torch's operators: clipping is that of torch then, bit for bit.
        """

        def take(optimizer: Optimizer | None, some: Sequence[torch.Tensor]) -> _Read:
            if clips:
                return optimizer, Measured(observe.norms(some))
            return optimizer, self._measures.setdefault(id(optimizer), Measure()).take(some, flagged=flagged)

        if self.scaler is None or len(self.optimizers) <= 1 or not grads:
            return [take(self.optimizers[0] if self.scaler is not None and self.optimizers else None, grads)]
        return [take(each, observe.gradients(_parameters(each))) for each in self.optimizers]

    def _refusal(self, read: Sequence[_Read], total: torch.Tensor | None) -> torch.Tensor | None:
        """1 on a device where a gradient is not finite and no scaler has seen it; None where nobody could act on it.

        What a scaler has seen it skips by itself, optimizer by optimizer, and that is routine.
        """
        flags = []
        for optimizer, norms in read:
            if norms.single or norms.flags:
                theirs = 0.0 if optimizer is None else self.skipped_by_scaler(optimizer)
                whole = total if len(read) == 1 else observe.total_norm(norms.single) if norms.single else None
                bad = veto.any_of([*norms.flags] if whole is None else [veto.found(whole), *norms.flags])
                flags.append(veto.unseen(bad, theirs) if isinstance(theirs, torch.Tensor) else bad)
        if not flags:
            return None
        refusal = veto.any_of(flags)
        reachable = all(self._means.of(each, refusal.device) is not veto.Means.NONE for each in self.optimizers)
        return refusal if reachable else None

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
        returned = self._step(closure, guarded=False)
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

    def _step(self, closure: Closure | None, *, guarded: bool, refusal: torch.Tensor | None = None) -> Any:
        """Step every optimizer.

        Args:
            closure: Handed to each.
            guarded: Make what a scaler has found 0 or 1, as the optimizers expect it.
            refusal: Nothing shall happen where it is 1; see `veto`.
        """
        returned = None
        arguments = () if closure is None else (closure,)
        for optimizer in self.optimizers:
            means = veto.Means.NONE if refusal is None else self._means.of(optimizer, refusal.device)
            if refusal is not None and means is veto.Means.BLANK:
                veto.blank(optimizer, refusal)
            by_flag = means is veto.Means.PREDICATE or (
                guarded and self.scaler is not None and self._means.is_exact(optimizer)
            )
            with veto.predicated(optimizer, refusal) if by_flag else contextlib.nullcontext():
                if self.scaler is not None and (closure is not None or _has_gradients(optimizer)):
                    returned = self.scaler.step(optimizer, *arguments)
                else:  # also where a scaler would raise for want of gradients: of two that take turns, one rests
                    returned = optimizer.step(*arguments)
        if self.scaler is not None and any(
            state["found_inf_per_device"] for state in self.scaler._per_optimizer_states.values()
        ):
            self.scaler.update()
        elif self.scaler is not None:  # no gradient anywhere: nothing that a scale could follow
            self.scaler._per_optimizer_states.clear()
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
        groups = [group for group in groups if group.get("lr") is not None]  # else it finds its own, as Adafactor can
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


def _single(read: Sequence[_Read]) -> Iterator[torch.Tensor]:
    return (norm for _, norms in read for norm in norms.single)


def _parameters(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _has_gradients(optimizer: Optimizer) -> bool:
    return any(parameter.grad is not None for parameter in _parameters(optimizer))


def _set_lr(group: dict[str, Any], lr: Any) -> None:
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].copy_(lr)  # in place: captured graphs hold its address
    else:
        group["lr"] = lr


def _dtype_of_norm(grads: Sequence[torch.Tensor]) -> torch.dtype:
    """In which `torch.nn.utils.clip_grad_norm_` has the norm of these gradients."""
    return functools.reduce(torch.promote_types, (grad.dtype for grad in grads)).to_real()
