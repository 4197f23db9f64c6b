"""ARENA: the memory of one slot, one flat tensor per device, and where each storage lies in it.

Storages lie in the order (part, trained, dtype), each aligned to 64 bytes, so that one reduction per element type looks
for non-finite values and one pass takes the digest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tolaria import memory
from tolaria.kernels import Finite
from tolaria.operations import Part
from tolaria.ring import Tier
from tolaria.state.leaves import Leaf, Storage

_ALIGNMENT = 64
WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
"""What to sum in: a sum of many overflows in 16 bits."""

Signature = tuple[tuple[torch.device, int, Part, bool, torch.dtype | None], ...]
"""The layout of a train state: per storage device, bytes, part, whether it ought to be finite, and element type."""


def part_of(storage: Storage) -> Part:
    """The part of a slot that a storage belongs to."""
    return Part.BUFFERS if storage.has_buffers else Part.REST


def signature_of(storages: Sequence[Storage]) -> Signature:
    """The layout."""
    return tuple((s.key[0], s.key[2], part_of(s), s.trained, s.dtype) for s in storages)


def num_bytes(signature: Signature) -> dict[torch.device, int]:
    """Bytes of one slot per device of the state, alignment included."""
    found: dict[torch.device, int] = {}
    for device, size, *_ in signature:
        found[device] = found.get(device, 0) + _aligned(size)
    return found


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


@dataclass(slots=True, eq=False)
class Arena:
    """Memory for one layout.

    Attributes:
        signature: The layout it was made for.
        flat: Per device of the state, all of it: shape [bytes], uint8. In the host tier the tensors are in main memory,
            page-locked where the state is on an accelerator.
        views: Per storage of the survey, its place: shape [storage bytes], uint8.
        order: Indices of the storages in the order in which they lie.
        ranges: Homogeneous stretches in main memory that ought to be finite, as 1-d floating-point tensors.
        num_bytes: Of the storages, without alignment.
    """

    signature: Signature
    flat: dict[torch.device, torch.Tensor]
    views: list[torch.Tensor]
    order: list[int]
    ranges: list[torch.Tensor]
    num_bytes: int

    def of(self, device: torch.device, part: Part | None = None) -> list[int]:
        """Indices of the storages of that device (and part), in the order in which they lie."""
        return [i for i in self.order if self.signature[i][0] == device and part in (None, self.signature[i][2])]

    def finite(self, index: int) -> Finite:
        """What a sweep looks for in that storage."""
        _, _, _, trained, dtype = self.signature[index]
        return (Finite.of(dtype) if trained else None) or Finite.ANYTHING

    def leaf(self, leaf: Leaf) -> torch.Tensor:
        """The snapshot's copy of one leaf."""
        dtype, offset, shape, strides = leaf.geometry
        held = self.views[leaf.storage]
        start = held.storage_offset() // dtype.itemsize + offset
        return torch.empty(0, dtype=dtype, device=held.device).set_(held.untyped_storage(), start, shape, strides)


def allocate(signature: Signature, tier: Tier, doing: str) -> Arena:
    """Memory for that layout, zeroed: on the devices of the state, or in main memory.

    Raises:
        BudgetExceeded: It does not fit.
    """
    order = sorted(
        range(len(signature)),
        key=lambda i: (str(signature[i][0]), signature[i][2].value, signature[i][3], str(signature[i][4])),
    )
    used: dict[torch.device, int] = {}
    offsets: dict[int, int] = {}
    stretches: dict[tuple[torch.device, Part, torch.dtype], list[int]] = {}
    for i in order:
        device, size, part, trained, dtype = signature[i]
        offsets[i] = start = used.get(device, 0)
        used[device] = end = start + _aligned(size)
        if device.type == "cpu" and trained and dtype is not None and is_summable(dtype):
            stretches.setdefault((device, part, dtype), [start, end])[1] = end
    flat = {device: memory.allocate(size, device, doing, on_host=tier is Tier.HOST) for device, size in used.items()}
    views = [flat[signature[i][0]][offsets[i] : offsets[i] + signature[i][1]] for i in range(len(signature))]
    ranges = [flat[device][start:end].view(dtype) for (device, _, dtype), (start, end) in stretches.items()]
    return Arena(signature, flat, views, order, ranges, sum(size for _, size, *_ in signature))


def is_summable(dtype: torch.dtype) -> bool:
    """Whether one sum over a stretch tells if all of it is finite."""
    return dtype.is_complex or (dtype.is_floating_point and dtype.itemsize > 1)


def may_be_nonfinite(dtype: torch.dtype) -> bool:
    """Whether the type has non-finite values."""
    return dtype.is_floating_point or dtype.is_complex


def needs_a_look(leaf: Leaf, storage: Storage) -> bool:
    """Whether a leaf ought to be finite and is in no stretch or block that is looked at as a whole."""
    dtype = leaf.geometry[0]
    if not leaf.trained or not may_be_nonfinite(dtype):
        return False
    return not (storage.trained and storage.dtype is dtype and is_summable(dtype))
