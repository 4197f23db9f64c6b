"""VETO on the device: an optimizer step that does nothing if a gradient is not finite, decided where the gradients are.

The host launches the step as always and learns later what became of it. Two means, by optimizer:

* **predicate**: torch's fused optimizers and those of `tolaria.optim` take a flag, `found_inf`, and their kernels leave
  everything as it is where it is 1 (the mechanism of `GradScaler`). They test for exactly 1, and `GradScaler` adds up
  the flags of several devices, so theirs and ours are merged into 0 or 1. Nothing of the step is left, bit for bit.
* **blank**: any other optimizer gets gradients of zero instead. Nothing that is not finite reaches the weights, but
  moments decay and weight decay is applied, so only the rollback that follows makes it exact.

All of it is enqueued on the caller's current streams and waits for nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer
from torch.utils.hooks import RemovableHandle

from tolaria import observe
from tolaria.optim.leaving import Leaving
from tolaria.state.wrappers import inner_tensors, is_wrapper

_MISSING = object()
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Means(Enum):
    """How a veto is carried out on one optimizer."""

    PREDICATE = "predicate"
    BLANK = "blank"
    NONE = "none"  # parameters in main memory, while the decision falls on a device: the host would have to wait for it


class Choice:
    """Chooses the means for each optimizer; looks at its parameters again only when groups have changed."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, bool, set[str]]] = {}

    def of(self, optimizer: Optimizer, home: torch.device) -> Means:
        """The means for `optimizer` when the decision falls on `home`."""
        can, kinds = self._look(optimizer)
        if kinds - {home.type}:
            return Means.NONE
        return Means.PREDICATE if can else Means.BLANK

    def is_exact(self, optimizer: Optimizer) -> bool:
        """`can_be_predicated`."""
        return self._look(optimizer)[0]

    def are_exact(self, optimizers: Sequence[Optimizer]) -> bool:
        """Whether a step of all of them can be refused so that nothing of it is left."""
        looked = [self._look(optimizer) for optimizer in optimizers]
        return all(can for can, _ in looked) and len(set[str]().union(*(kinds for _, kinds in looked))) == 1

    def _look(self, optimizer: Optimizer) -> tuple[bool, set[str]]:
        groups = optimizer.param_groups
        key = [(len(group["params"]), group.get("fused")) for group in groups]
        known = self._known.get(id(optimizer))
        if known is None or known[0] != key:
            kinds = {parameter.device.type for group in groups for parameter in group["params"]}
            known = self._known[id(optimizer)] = key, can_be_predicated(optimizer), kinds
        return known[1:]


def can_be_predicated(optimizer: Optimizer) -> bool:
    """Whether it is one of torch's fused ones or ours, over plain tensors: of those it is known what a flag does."""
    if isinstance(optimizer, Leaving) and inspect.unwrap(type(optimizer).step) is inspect.unwrap(Leaving.step):
        return optimizer.refuses_by_itself() and not any(
            is_wrapper(parameter) for group in optimizer.param_groups for parameter in group["params"]
        )
    known = {inspect.unwrap(kind.step) for kind in (Adam, AdamW, SGD, Adagrad)}
    return (
        inspect.unwrap(type(optimizer).step) in known
        and getattr(optimizer, "_step_supports_amp_scaling", False)
        and all(group.get("fused") for group in optimizer.param_groups)
        and not any(is_wrapper(parameter) for group in optimizer.param_groups for parameter in group["params"])
    )


def found(norm: torch.Tensor) -> torch.Tensor:
    """Whether a norm is not finite: shape [] in and out, float32, 1 or 0."""
    return _flag(torch.ne, norm * 0, 0)  # neither a NaN nor an infinity times 0 is 0


def unseen(bad: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """1 where `bad` is 1 and `theirs`, what a scaler has found, is 0."""
    return _flag(torch.gt, bad, theirs.to(bad.device))


def _flag(compare: Callable[..., torch.Tensor], one: torch.Tensor, other: Any) -> torch.Tensor:
    """A comparison as the kernels want it, in one launch: shape [], float32."""
    return compare(one, other, out=torch.empty((), dtype=torch.float32, device=one.device))


def any_of(flags: Sequence[torch.Tensor]) -> torch.Tensor:
    """1 where one of the flags is, on a device if one of them is there. At least one."""
    if len(flags) == 1:
        return flags[0]
    home = observe.home_of(flags)
    return torch.stack([flag.to(home, non_blocking=True) for flag in flags]).amax(0)


class Predicate:
    """Makes steps of one optimizer do nothing where a flag, or the `found_inf` that the optimizer has then, is not 0.

    Theirs is looked at when a step begins, since a `GradScaler` puts it there just before, and put back when it ends.

    Args:
        flag: shape [], float32; None: bring nothing of our own, only make theirs 0 or 1.
    """

    def __init__(self, flag: torch.Tensor | None = None) -> None:
        self._flag, self._is_stepping = flag, False
        self._attributes: dict[str, Any] = {}
        self._ours: torch.Tensor | None = None  # stands in the place of `_theirs`
        self._theirs: Any = _MISSING

    def attach(self, optimizer: Optimizer) -> list[RemovableHandle]:
        """Hooks around its steps, to be removed by the caller. It is one of which `can_be_predicated` holds."""
        return [optimizer.register_step_pre_hook(self._begin), optimizer.register_step_post_hook(self._end)]

    def refuse(self, optimizer: Optimizer, flag: torch.Tensor) -> None:
        """Bring this flag to the step that is being made, or else to the next one, until `lift`."""
        self._flag = flag
        if self._is_stepping:
            self._merge(optimizer)

    def lift(self) -> None:
        """Bring none any more, and put back what was there. Also where a step has raised."""
        self._end()

    def _begin(self, optimizer: Optimizer, *_: Any) -> None:
        self._is_stepping = True
        self._merge(optimizer)

    def _end(self, *_: Any) -> None:
        self._flag, self._is_stepping = None, False
        self._put_back()

    def _merge(self, optimizer: Optimizer) -> None:
        self._put_back()
        self._attributes = attributes = vars(optimizer)
        theirs = attributes.get("found_inf", _MISSING)
        merged = _merged(theirs, self._flag)
        if merged is not None:
            self._theirs, self._ours = theirs, merged
            attributes["found_inf"] = merged

    def _put_back(self) -> None:
        if self._ours is not None and self._attributes.get("found_inf") is self._ours:
            if self._theirs is _MISSING:
                del self._attributes["found_inf"]
            else:
                self._attributes["found_inf"] = self._theirs
        self._ours, self._theirs = None, _MISSING


@contextmanager
def predicated(optimizer: Optimizer, flag: torch.Tensor | None) -> Generator[None]:
    """A `Predicate` for one step of `optimizer`, which is made inside."""
    predicate = Predicate(flag)
    hooks = predicate.attach(optimizer)
    try:
        yield
    finally:
        predicate.lift()  # where the step has raised
        for hook in hooks:
            hook.remove()


def _merged(theirs: Any, flag: torch.Tensor | None) -> torch.Tensor | None:
    if not isinstance(theirs, torch.Tensor):
        return flag
    if flag is None:
        return _flag(torch.ne, theirs, 0)
    return _flag(torch.ne, theirs.to(flag.device, non_blocking=True) + flag, 0)


@torch.no_grad()
def blank(optimizer: Optimizer, flag: torch.Tensor) -> None:
    """Make every gradient that `optimizer` will apply zero where `flag` is 1; where it is 0 no bit changes.

    As integers, because NaN times 0 is NaN. A handful of launches, whatever the number of gradients.
    """
    grouped: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for tensor in _plain_gradients(optimizer):
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        words = real.view(_WORDS[real.element_size()])
        grouped.setdefault((words.device, words.dtype), []).append(words)
    for (device, dtype), tensors in grouped.items():
        torch._foreach_mul_(tensors, flag.eq(0).to(device, dtype, non_blocking=True))


def _plain_gradients(optimizer: Optimizer) -> Iterable[torch.Tensor]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            grad = parameter.grad
            if grad is None:
                continue
            if grad.is_sparse:
                yield grad._values()
                continue
            if not is_wrapper(grad) and torch._debug_has_internal_overlap(grad) == 1:  # expanded: no place to write
                grad = parameter.grad = grad.clone(memory_format=torch.contiguous_format)
            yield from inner_tensors(grad)


def unwritten_momenta(optimizer: Optimizer) -> list[torch.Tensor]:
    """Parameters whose momentum a predicated step would leave behind as memory that nobody has written.

    Torch's fused SGD makes the buffers of its first step without clearing them, and its kernel, refused, does not write
    them; ours writes zeros, which with dampening are another beginning. Such a step has to be decided on the host.
    """
    if not isinstance(optimizer, SGD):
        return []
    lacking: list[torch.Tensor] = []
    for group in optimizer.param_groups:
        if not (group["fused"] or isinstance(optimizer, Leaving)) or not group["momentum"]:
            continue
        having = (parameter for parameter in group["params"] if parameter.grad is not None)
        if isinstance(optimizer, Leaving) and group["dampening"]:  # ours go on where some have none yet
            lacking += [parameter for parameter in having if _has_no_momentum(optimizer, parameter)]
            continue
        first = next(having, None)  # torch makes all buffers of a group at once
        if first is not None and _has_no_momentum(optimizer, first):
            lacking += [first, *having]
    return lacking


def _has_no_momentum(optimizer: Optimizer, parameter: torch.Tensor) -> bool:
    return optimizer.state.get(parameter, {}).get("momentum_buffer") is None


def forget_momenta(optimizer: Optimizer, parameters: Sequence[torch.Tensor]) -> None:
    """After a step that was refused: take back the buffers that `unwritten_momenta` has told of."""
    for parameter in parameters:
        state = optimizer.state.get(parameter)
        if state is not None:
            state.pop("momentum_buffer", None)
            if not state:
                del optimizer.state[parameter]
