"""Tensors that tell by themselves whether they are torn: each step fills them with a number that no other step uses.

A step's number is its *tag*. A tensor whose smallest and largest element differ holds two steps, and so do two tensors
with different tags: one reduction shows it, on the device and without waiting for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tolaria.errors import UnsupportedState

_MOST = {
    torch.float64: 2**24,
    torch.float32: 2**24,
    torch.float16: 2**11,
    torch.bfloat16: 2**8,
    torch.int64: 2**24,
    torch.int32: 2**24,
    torch.int16: 2**15 - 1,
    torch.uint8: 2**8 - 1,
    torch.int8: 2**7 - 1,
    torch.complex64: 2**24,
    torch.complex128: 2**24,
}
"""The largest tag that a type holds exactly, with all below it."""


def extremes(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Smallest and largest element of each tensor: shape [tensors, 2], float64, on the device of the first.

    Launched on the caller's current stream of each device; waits for nothing as long as all are on one device.

    Args:
        tensors: Not empty, neither they nor any of them.
    """
    each = [torch.stack(_numbers(tensor.detach()).aminmax()).to(torch.float64) for tensor in tensors]
    return torch.stack([one.to(each[0].device) for one in each])


def _numbers(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def tag_in(found: torch.Tensor) -> int | None:
    """The tag that `extremes` has found; None where they are torn. Waits for the device."""
    smallest, largest = float(found.min()), float(found.max())
    return int(smallest) if smallest == largest else None


@dataclass(frozen=True, slots=True)
class Torn:
    """Tensors of one reading that do not hold one step.

    Attributes:
        tensors: Name -> (smallest, largest) element, of all that were read together.
    """

    tensors: Mapping[str, tuple[float, float]]

    def __str__(self) -> str:
        pairs = self.tensors.items()
        found = [f"{name} {low:g}" + (f" and {high:g}" if low != high else "") for name, (low, high) in pairs]
        return f"steps in one reading: {', '.join(found[:8])}{' ...' if len(found) > 8 else ''}"


class Tags:
    """The tensors of a model (and its optimizers), to be written and read as tags. What they held is overwritten.

    Args:
        sources: Modules (parameters and buffers), optimizers (their state), tensors, or mappings of tensors by name.
            A tensor that is met twice counts once.
        first: Tag that everything is filled with now.

    Attributes:
        tensors: By name, those that hold tags.
        left_out: Names of those that cannot: empty ones, and types with too few numbers (bool, float8).
        most: The largest tag; the next one after it is 1 again. 127 where a tensor is int8, 2**24 for float32.

    Threads: `write` and `read` from any; who writes one set of tensors at a time is the caller's business.

    Raises:
        UnsupportedState: Nothing is left that could hold a tag.
    """

    def __init__(self, *sources: Any, first: int = 1) -> None:
        found = dict(_named(sources))
        seen: set[int] = set()
        self.tensors: dict[str, torch.Tensor] = {}
        self.left_out: list[str] = []
        for name, tensor in found.items():
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if tensor.numel() and tensor.dtype in _MOST:
                self.tensors[name] = tensor
            else:
                self.left_out.append(name)
        if not self.tensors:
            raise UnsupportedState(
                "tagging a state", f"no tensor of {len(found)} can hold a tag", "Pass modules, optimizers or tensors."
            )
        self.most = min(_MOST[tensor.dtype] for tensor in self.tensors.values())
        self.write(first)

    def after(self, tag: int) -> int:
        """The tag of the next step."""
        return tag % self.most + 1

    def write(
        self, tag: int, *, order: Sequence[str] | None = None, halfway: Callable[[], object] | None = None
    ) -> None:
        """One step: fill every tensor with a tag, one after the other, on the caller's current stream.

        Args:
            tag: 1 to `most`.
            order: Names in the order in which to write; None: as they stand.
            halfway: Called when half of the tensors are written (of a single tensor: of its elements).
        """
        names = list(self.tensors) if order is None else list(order)
        parts = [_numbers(self.tensors[name].detach()) for name in names]
        if len(parts) == 1:
            flat = parts[0]
            parts = list(flat.tensor_split(2)) if flat.dim() else [flat]
        with torch.no_grad():
            for number, part in enumerate(parts):
                if halfway is not None and number == max(1, len(parts) // 2):
                    halfway()
                part.fill_(tag)

    def look(self, tensors: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """`extremes` of the live tensors, or of a copy of them with the same names. Waits for nothing."""
        return extremes(self._chosen(tensors).values())

    def torn(self, tensors: Mapping[str, torch.Tensor] | None = None) -> Torn | None:
        """What is torn in the live tensors, or in a copy of them with the same names. Waits for the device.

        Args:
            tensors: For example a `state_dict` that somebody has copied. Names that are not in both are passed over.

        Raises:
            UnsupportedState: No name is in both.
        """
        chosen = self._chosen(tensors)
        found = extremes(chosen.values())
        if tag_in(found) is not None:
            return None
        return Torn({name: (row[0], row[1]) for name, row in zip(chosen, found.tolist(), strict=True)})

    def _chosen(self, tensors: Mapping[str, torch.Tensor] | None) -> Mapping[str, torch.Tensor]:
        chosen = self.tensors if tensors is None else {n: tensors[n] for n in self.tensors if n in tensors}
        if not chosen:
            raise UnsupportedState(
                "looking for torn tensors", f"none of {list(self.tensors)[:4]} ... is there", "Use the same names."
            )
        return chosen


def _named(sources: Iterable[Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for number, source in enumerate(sources):
        if isinstance(source, torch.Tensor):
            yield f"tensor {number}", source
        elif isinstance(source, nn.Module):
            yield from source.named_parameters(remove_duplicate=False)
            yield from source.named_buffers(remove_duplicate=False)
        elif isinstance(source, torch.optim.Optimizer):
            for place, state in enumerate(source.state.values()):
                yield from (
                    (f"optimizer {number}: {key} of {place}", value)
                    for key, value in state.items()
                    if isinstance(value, torch.Tensor)
                )
        elif isinstance(source, Mapping):
            yield from ((name, value) for name, value in source.items() if isinstance(value, torch.Tensor))
        else:
            raise UnsupportedState(
                "tagging a state",
                f"found a {type(source).__name__}, expected modules, optimizers, tensors or mappings of tensors",
                "Pass the tensors themselves.",
            )
