"""Tensor subclasses that hold their bytes in other tensors: DTensor shards, quantized weights, moments in 8 bit.

Such a *wrapper* says through `__tensor_flatten__` which tensors it consists of and what else belongs to it (its
context: a layout, a scale, block sizes). The inner tensors are governed like any other; the wrapper itself is put back
by identity. Its context cannot be written back in general, so a wrapper whose context changed is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tolaria.errors import UnsupportedState


@dataclass(slots=True, eq=False)
class Wrapper:
    """One tensor subclass as it was at a survey.

    Attributes:
        name: Where it lives, for messages.
        tensor: The live object. Held.
        inner: What it consists of, by attribute: tensors, and perhaps other objects (the mesh of a DTensor).
        outside: (type, dtype, device, shape, strides).
        context: What `__tensor_flatten__` said besides.
        requires_grad: The flag then; some put it into their context, and it belongs to the user's loop.
    """

    name: str
    tensor: torch.Tensor
    inner: tuple[tuple[str, Any], ...]
    outside: tuple[Any, ...]
    context: Any
    requires_grad: bool

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The inner tensors with their names."""
        yield from ((f"{self.name}.{key}", item) for key, item in self.inner if isinstance(item, torch.Tensor))

    def difference(self) -> str | None:
        """Why the object is no longer what the survey saw, however the bytes of its inner tensors may have changed."""
        now = unwrap(self.name, self.tensor)
        if now.outside != self.outside:
            return f"{self.name} has another type, dtype, device, shape or strides"
        if [key for key, _ in now.inner] != [key for key, _ in self.inner]:
            return f"{self.name} consists of other tensors than it did"
        for (key, was), (_, item) in zip(self.inner, now.inner, strict=True):
            if item is not was and (isinstance(was, torch.Tensor) or not _same(item, was)):
                return f"{self.name}.{key} was replaced by another object"
        context, saved = now.context, self.context
        if now.requires_grad != self.requires_grad:
            context, saved = (_without_flag(tree.context, tree.requires_grad) for tree in (now, self))
        return None if _same(context, saved) else f"{self.name} changed what is not in its tensors (its context)"


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether a tensor takes part in the `__tensor_flatten__` protocol. Nested tensors do, and are not handled."""
    return is_traceable_wrapper_subclass(tensor) and not tensor.is_nested


def unwrap(name: str, tensor: torch.Tensor) -> Wrapper:
    """Look at a wrapper.

    Raises:
        UnsupportedState: It has memory of its own, which the protocol does not speak of; or it holds no tensor, or
            makes its inner tensors anew whenever it is asked.
    """
    keys, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    inner = tuple((str(key), getattr(tensor, key)) for key in keys)
    tensors = [(key, item) for key, item in inner if isinstance(item, torch.Tensor)]
    if _has_memory(tensor) or not tensors or any(getattr(tensor, key) is not item for key, item in tensors):
        raise UnsupportedState(
            "surveying the train state",
            f"{name} is a {type(tensor).__module__}.{type(tensor).__qualname__} with memory of its own or without "
            "lasting inner tensors, expected a plain tensor or a wrapper around others",
            "Build it with torch.Tensor._make_wrapper_subclass, or leave this part out of the governed module.",
        )
    outside = (type(tensor), tensor.dtype, tensor.device, tuple(tensor.shape), tuple(tensor.stride()))
    return Wrapper(name, tensor, inner, outside, context, tensor.requires_grad)


def inner_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors that hold the bytes of `tensor`: itself, or what it wraps, however deep. Checks nothing."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter) or not is_wrapper(tensor):
        yield tensor
        return
    for _, inner in unwrap("", tensor).tensors():
        yield from inner_tensors(inner)


def _has_memory(tensor: torch.Tensor) -> bool:
    try:
        return torch.Tensor.untyped_storage(tensor).data_ptr() != 0
    except RuntimeError:  # how torch says that there is none
        return False


def _without_flag(context: Any, flag: bool) -> Any:
    """A context without the copies of `requires_grad` in it."""
    if isinstance(context, dict):
        return {key: item for key, item in context.items() if item is not flag}
    if isinstance(context, (tuple, list)):
        return [item for item in context if item is not flag]
    return context


def _same(one: Any, other: Any) -> bool:
    """Equal, as far as that can be told; what cannot be compared counts as changed unless it is the same object."""
    if one is other:
        return True
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return False
    if type(one) is type(other) and isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    if type(one) is type(other) is dict:
        return one.keys() == other.keys() and all(_same(item, other[key]) for key, item in one.items())
    try:
        return bool(one == other)
    except Exception:
        return False
