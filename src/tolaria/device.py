"""The `Device` port: the few calls through which the protocol touches a device, and its real implementations.

Every operation of `tolaria.protocol` that names a device ends in exactly one method here. CPU operators run in their
caller, so a CPU needs no ordering beyond the gate. Any other accelerator is ordered by blocking the host on both
sides, which is sound under the gate and says so in `capabilities()`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch

from tolaria.errors import UnsupportedState
from tolaria.operations import Barrier


class Device(Protocol):
    """One device with governed tensors. Called under the gate, on the thread that submits."""

    name: str
    barrier: Barrier

    def copy(self, destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        """Copy each source into the destination of the same index. Flat uint8 tensors of pairwise equal size."""

    def synchronize(self) -> None:
        """Return when all work of this device, on every stream, is done."""


class CpuDevice:
    """Main memory. A copy is done when `copy` returns; torch splits large ones over its intra-op threads."""

    barrier = Barrier.HOST

    def __init__(self, name: str = "cpu") -> None:
        self.name = name

    def copy(self, destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        """One call for all tensors: the loop runs outside of Python. Version counters are bumped by the caller."""
        if sources:
            torch._foreach_copy_(list(destinations), list(sources))

    def synchronize(self) -> None:
        """Nothing runs behind our back."""


class BlockingDevice:
    """Any accelerator known to `torch.accelerator`, ordered by device synchronise before and after the copies."""

    barrier = Barrier.BLOCKING

    def __init__(self, name: str) -> None:
        self.name = name

    def copy(self, destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        """Enqueue on the caller's current stream; `synchronize` follows before the gate opens."""
        if sources:
            torch._foreach_copy_(list(destinations), list(sources))

    def synchronize(self) -> None:
        """`torch.accelerator.synchronize`: covers every stream of this process on the device."""
        torch.accelerator.synchronize(torch.device(self.name))


def open_devices(devices: Iterable[torch.device]) -> tuple[Device, ...]:
    """The port for each device, CPU last (its copies run at once, while an accelerator's are under way).

    Raises:
        UnsupportedState: A device type that torch offers no synchronisation for.
    """
    names = sorted({str(device) for device in devices}, key=lambda name: (name == "cpu", name))
    return tuple(_open(name) for name in names)


def _open(name: str) -> Device:
    kind = torch.device(name).type
    if kind == "cpu":
        return CpuDevice(name)
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and accelerator.type == kind:
        return BlockingDevice(name)
    raise UnsupportedState(
        "attaching the governor",
        f"governed tensors are on {name}, expected the CPU or the accelerator that torch.accelerator knows "
        f"({accelerator})",
        "Move the model to a supported device.",
    )
