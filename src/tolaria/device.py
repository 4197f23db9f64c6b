"""The `Device` port: the few calls through which the protocol touches a device, and its real implementations.

Every operation of `tolaria.protocol` that orders a device ends in exactly one method here. CPU operators run in their
caller, so a CPU needs no ordering beyond the gate. CUDA is ordered by context-wide events where the driver has them
(`tolaria.cuda`). Any other accelerator is ordered by blocking the host on both sides, which is sound under the gate and
says so in `capabilities()`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from tolaria.cuda import ContextDevice, TorchStreams, find_driver
from tolaria.errors import CaptureInProgress, UnsupportedState, UsageError
from tolaria.operations import Barrier, Streams

_LARGE_COPY_BYTES = 16 * 2**20
_JOB_BYTES = 8 * 2**20
_CRUMB_BYTES = 16 * 2**10
_MOST_COPY_THREADS = 4


class Device(Protocol):
    """One device with governed tensors. Copies are asked for under the gate, on the thread that submits.

    `tolaria.testing.device_contract.check_device` looks whether an implementation keeps what is said here.
    """

    name: str
    barrier: Barrier

    def synchronize(self) -> None:
        """Return when the governor's work on this device is done; with the `blocking` barrier: all work."""

    def enqueue(self, work: Callable[[], None]) -> None:
        """Call `work` once; what it launches is ordered behind the governor's copies."""

    def transfer(self, work: Callable[[], None]) -> Any:
        """Call `work` once, a transfer to main memory that nothing else should wait for.

        It begins behind the governor's copies so far. Answers the event of its end, or None when it is over.
        """

    def move(self, destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        """Copy flat uint8 tensors pairwise between this device and page-locked memory, on the current stream."""

    def on_stream(self) -> AbstractContextManager[None]:
        """What is launched inside is ordered behind the governor's copies."""
        ...

    def close(self) -> None:
        """Wait until nothing of ours is under way, and give resources back. A second call does nothing."""


class QueuedDevice(Device, Protocol):
    """A device whose work can be ordered, awaited and asked for by events. Only `host_wait` blocks the host."""

    def context_record(self) -> Any:
        """An event that covers the work of all streams of the device so far, known or not."""
        ...

    def context_wait(self, event: Any) -> None:
        """All later work of all streams of the device waits for the event."""
        ...

    def stream_record(self) -> Any:
        """An event that covers the governor's own work so far, and nobody else's."""
        ...

    def stream_wait(self, event: Any) -> None:
        """Later work of the governor's own waits for the event."""
        ...

    def caller_wait(self, event: Any) -> None:
        """Later work of the caller's current stream waits for the event, and no other stream's."""
        ...

    def caller_stream(self) -> Any:
        """What the caller's current stream is called by the two below."""
        ...

    def known_record(self, stream: Any) -> Any:
        """An event that covers the work of that stream so far."""
        ...

    def known_wait(self, stream: Any, event: Any) -> None:
        """Later work of that stream waits for the event."""
        ...

    def transfer_record(self) -> Any:
        """An event that covers the transfers so far; None before the first."""
        ...

    def host_wait(self, event: Any) -> None:
        """Block the host until the event has passed."""
        ...

    def mark(self) -> Any:
        """An event that covers the work of the caller's current stream so far."""
        ...

    def has_passed(self, event: Any) -> bool:
        """Whether the device has reached the event. Waits for nothing."""
        ...

    def elapsed_ms(self, began: Any, ended: Any) -> float:
        """Milliseconds on the device between two events that have passed."""
        ...


class _AtOnce:
    """What a device without a queue of ours does when asked for order: nothing, since its callers wait."""

    def move(self, destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        for destination, source in zip(destinations, sources, strict=True):
            destination.copy_(source, non_blocking=True)

    def enqueue(self, work: Callable[[], None]) -> None:
        work()

    def transfer(self, work: Callable[[], None]) -> Any:
        work()

    def on_stream(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def close(self) -> None:
        pass


class CpuDevice(_AtOnce):
    """Main memory. A copy is done when `copy` returns.

    Copies are cut into jobs of about 8 MiB. The caller and a few helper threads take those of a large copy in turns.
    torch's own parallel copy meets at a barrier after every tensor, which costs a multiple of the copy itself when
    another process holds one of the cores. The threads start with the first large copy and end with the governor.
    """

    barrier = Barrier.HOST

    def __init__(self, name: str = "cpu") -> None:
        self.name = name
        self._helpers: ThreadPoolExecutor | None = None

    def copy(self, destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        """Copy each source into the destination of the same index: flat uint8 tensors of pairwise equal size.

        Version counters are not touched: the caller bumps them.
        """
        self.prepare(destinations, sources)()

    def prepare(self, destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> Callable[[], None]:
        """`copy`, to be called any number of times, for as long as all these tensors stay where they are."""
        jobs = [_Job(*zip(*moves, strict=True)) for moves in _cut(destinations, sources) if moves]
        is_large = sum(source.numel() for source in sources) >= _LARGE_COPY_BYTES
        return functools.partial(self._carry_out, jobs, is_large)

    def _carry_out(self, jobs: Sequence[_Job], is_large: bool) -> None:
        num_helpers = min(torch.get_num_threads(), _MOST_COPY_THREADS) - 1 if is_large else 0
        left = deque(jobs)
        if num_helpers < 1:
            _move(left)
            return
        if self._helpers is None:
            self._helpers = ThreadPoolExecutor(num_helpers, thread_name_prefix="tolaria-copy")
        running = [self._helpers.submit(_move, left) for _ in range(num_helpers)]
        try:
            _move(left)
        finally:
            wait(running)  # never leave while somebody else still writes

    def synchronize(self) -> None:
        """Nothing runs behind our back."""


Moves = list[tuple[int, int, int]]
"""Of (destination address, source address, bytes)."""


class _Job:
    """About 8 MiB to be moved by one thread, in few or many pieces."""

    def __init__(self, destinations: Sequence[int], sources: Sequence[int], sizes: Sequence[int]) -> None:
        self._pieces = destinations, sources, sizes
        # giving the interpreter lock up costs more than a small piece, and whoever takes it keeps it for milliseconds
        is_crumbs = sum(sizes) < _CRUMB_BYTES * len(sizes)
        self._memmove = _memmove_holding_the_lock if is_crumbs else ctypes.memmove

    def __call__(self) -> None:
        deque(map(self._memmove, *self._pieces), maxlen=0)


_memmove_holding_the_lock: Any = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0
)


def _cut(destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> list[Moves]:
    """Lists of moves, about equal in bytes."""
    jobs: list[Moves] = [[]]
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


def _move(jobs: deque[_Job]) -> None:
    while True:
        try:
            job = jobs.popleft()
        except IndexError:
            return
        job()


class HostDevice(Device, Protocol):
    """Main memory: the caller copies."""

    def copy(self, destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None: ...
    def prepare(self, destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> Callable[[], None]: ...


class BlockingDevice(_AtOnce):
    """Any accelerator known to `torch.accelerator`, ordered by device synchronise before and after the copies."""

    barrier = Barrier.BLOCKING

    def __init__(self, name: str) -> None:
        self.name = name

    def transfer(self, work: Callable[[], None]) -> Any:
        """Call `work` and wait for the device: what it moves is there when this returns."""
        work()
        self.synchronize()

    def synchronize(self) -> None:
        """`torch.accelerator.synchronize`: covers every stream of this process on the device."""
        torch.accelerator.synchronize(torch.device(self.name))


class DeviceSet(dict[str, Device]):
    """The ports of one train state by name, all of them under one barrier. Grows as state appears on further devices.

    Args:
        wanted: ``"context"``, ``"streams"``, ``"blocking"``, or None for the best that this machine has.

    Attributes:
        reason: Why the barrier is not `context`; empty where it is, and on a CPU.
    """

    def __init__(self, wanted: str | None = None) -> None:
        super().__init__()
        self._wanted = wanted
        self._driver: Any = None
        self.reason = ""

    @property
    def barrier(self) -> Barrier:
        """The barrier that orders these devices."""
        kinds = {port.barrier for port in self.values()} - {Barrier.HOST}
        return kinds.pop() if kinds else Barrier.HOST

    def open(self, devices: Iterable[torch.device]) -> None:
        """Open a port for each device that has none yet.

        Raises:
            UnsupportedState: A device type that torch offers no synchronisation for, or no context-wide events although
                they were asked for.
            CaptureInProgress: Called while the current stream captures a graph.
        """
        for name in sorted({str(device) for device in devices} - set(self)):
            self[name] = self._open(name)

    def named(self, streams: Iterable[Any]) -> Streams:
        """What the `streams` barrier calls the streams that a section names; nothing with any other barrier.

        Args:
            streams: `torch.cuda.Stream`, each of a governed device.

        Raises:
            UsageError: One is something else, or of another device.
        """
        if self.barrier is not Barrier.STREAMS:
            return ()
        found = []
        for stream in streams:
            name, handle = str(getattr(stream, "device", None)), getattr(stream, "cuda_stream", None)
            if handle is None or name not in self:
                raise UsageError(
                    "opening a section",
                    f"{stream!r} was named, expected CUDA streams of {', '.join(self)}",
                    "Name the streams that launch on governed tensors.",
                )
            found.append((name, handle))
        return tuple(found)

    def _open(self, name: str) -> Device:
        kind = torch.device(name).type
        if kind == "cpu":
            return CpuDevice(name)
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is None or accelerator.type != kind:
            raise UnsupportedState(
                "attaching the governor",
                f"governed tensors are on {name}, expected the CPU or the accelerator that torch.accelerator knows "
                f"({accelerator})",
                "Move the model to a supported device.",
            )
        if kind == "cuda" and torch.cuda.is_current_stream_capturing():
            raise CaptureInProgress("attaching the governor", "the current stream captures a graph", "Attach before.")
        self._choose(kind)
        if self._driver is None:
            return BlockingDevice(name)
        chosen = Barrier.STREAMS if self._wanted == "streams" else Barrier.CONTEXT
        return ContextDevice(name, self._driver, TorchStreams(), chosen)

    def _choose(self, kind: str) -> None:
        """Once for all devices: a barrier is as good as its weakest part."""
        if self._driver is None and not self.reason:
            if self._wanted == "blocking":
                self.reason = 'barrier="blocking" was asked for'
            elif kind == "cuda":
                self._driver, self.reason = find_driver()
            else:
                self.reason = f"{kind} has no context-wide events"
        if self._wanted in ("context", "streams") and self._driver is None:
            raise UnsupportedState(
                "attaching the governor",
                f'barrier="{self._wanted}" was asked for, but {self.reason}',
                "Leave the barrier to the governor, or mend that.",
            )
