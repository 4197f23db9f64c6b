"""The `Device` port: the few calls through which the protocol touches a device, and its real implementations.

Every operation of `tolaria.protocol` that names a device ends in exactly one method here. CPU operators run in their
caller, so a CPU needs no ordering beyond the gate. Any other accelerator is ordered by blocking the host on both
sides, which is sound under the gate and says so in `capabilities()`.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Protocol

import torch

from tolaria.errors import UnsupportedState
from tolaria.operations import Barrier

_LARGE_COPY_BYTES = 16 * 2**20
_JOB_BYTES = 8 * 2**20
_MOST_COPY_THREADS = 4


class Device(Protocol):
    """One device with governed tensors. Called under the gate, on the thread that submits."""

    name: str
    barrier: Barrier

    def copy(self, destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        """Copy each source into the destination of the same index. Flat uint8 tensors of pairwise equal size."""

    def synchronize(self) -> None:
        """Return when all work of this device, on every stream, is done."""


class CpuDevice:
    """Main memory. A copy is done when `copy` returns.

    Large copies are cut into jobs of about 8 MiB that the caller and a few helper threads take in turns. torch's own
    parallel copy meets at a barrier after every tensor, which costs a multiple of the copy itself when another process
    holds one of the cores. The threads start with the first large copy and end with the governor.
    """

    barrier = Barrier.HOST

    def __init__(self, name: str = "cpu") -> None:
        self.name = name
        self._helpers: ThreadPoolExecutor | None = None

    def copy(self, destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        """Move the bytes. Version counters are not touched: the caller bumps them."""
        num_helpers = min(torch.get_num_threads(), _MOST_COPY_THREADS) - 1
        if num_helpers < 1 or sum(source.numel() for source in sources) < _LARGE_COPY_BYTES:
            if sources:
                torch._foreach_copy_(list(destinations), list(sources))
            return
        if self._helpers is None:
            self._helpers = ThreadPoolExecutor(num_helpers, thread_name_prefix="tolaria-copy")
        jobs = _cut(destinations, sources)
        running = [self._helpers.submit(_move, jobs) for _ in range(num_helpers)]
        try:
            _move(jobs)
        finally:
            wait(running)  # never leave while somebody else still writes

    def synchronize(self) -> None:
        """Nothing runs behind our back."""


Job = list[tuple[int, int, int]]


def _cut(destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> deque[Job]:
    """Jobs of (destination address, source address, bytes), about equal in bytes."""
    jobs: deque[Job] = deque([[]])
    room = _JOB_BYTES
    for destination, source in zip(destinations, sources, strict=True):
        target, origin, left = destination.data_ptr(), source.data_ptr(), source.numel()
        while left:
            size = min(left, room)
            jobs[-1].append((target, origin, size))
            target, origin, left, room = target + size, origin + size, left - size, room - size
            if not room:
                jobs.append([])
                room = _JOB_BYTES
    return jobs


def _move(jobs: deque[Job]) -> None:
    while True:
        try:
            job = jobs.popleft()
        except IndexError:
            return
        for destination, source, size in job:
            ctypes.memmove(destination, source, size)  # releases the interpreter lock


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
