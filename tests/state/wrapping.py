"""A tensor subclass with the protocol of quantized weights and shards, whose bytes lie in two other tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree


class Pair(torch.Tensor):
    """Behaves like `first`; every operator is done on `second` as well, which starts as something else.

    Args:
        first: What it looks like from outside.
        second: The same shape and type.
        label: A value that is in no tensor.
    """

    @staticmethod
    def __new__(cls, first: torch.Tensor, second: torch.Tensor, label: Any = "pair") -> Pair:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            first.shape,
            strides=first.stride(),
            dtype=first.dtype,
            device=first.device,
            requires_grad=first.requires_grad,
        )

    def __init__(self, first: torch.Tensor, second: torch.Tensor, label: Any = "pair") -> None:
        self.first, self.second, self.label = first, second, label

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["first", "second"], {"label": self.label, "requires_grad": self.requires_grad}

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, torch.Tensor], context: Any, size: Any, stride: Any) -> Pair:
        return cls(inner["first"], inner["second"], context["label"])

    def __repr__(self) -> str:
        return f"Pair({self.first!r}, {self.second!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default:
            return cls(args[0].first, args[0].second, args[0].label)
        both = [
            func(*_pick(args, name), **_pick(kwargs, name))  # in place where the operator is
            for name in ("first", "second")
        ]
        given = {id(item): item for item in _pytree.tree_leaves((args, kwargs)) if isinstance(item, Pair)}
        inner = {id(item.first): item for item in given.values()}

        def join(one: Any, other: Any) -> Any:
            if not isinstance(one, torch.Tensor):
                return one
            return inner[id(one)] if id(one) in inner else cls(one, other)

        return _pytree.tree_map(join, both[0], both[1])


def _pick(tree: Any, name: str) -> Any:
    return _pytree.tree_map_only(Pair, lambda item: getattr(item, name), tree)
