"""How long things take, on the host and on the device, and the floors that they are compared with."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

_BUSY_CYCLES = 60_000_000  # some 30 ms: in which the host can enqueue whatever is to be timed


class Clock:
    """Times calls whose work is on one device.

    Args:
        device: CUDA, where what a call enqueues goes on after it, or the CPU, where it does not.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_queued = device.type == "cuda"

    def rest(self) -> None:
        """Wait until the device has nothing left to do."""
        if self.is_queued:
            torch.cuda.synchronize(self.device)

    def occupy(self) -> None:
        """Keep the device busy, so that what is enqueued next runs without gaps. Nothing on the CPU."""
        if self.is_queued:
            torch.cuda._sleep(_BUSY_CYCLES)

    def host_ms(self, call: Callable[[], object]) -> tuple[float, float]:
        """Milliseconds until the call returned, and until the device was at rest. It is at rest before."""
        self.rest()
        started = time.perf_counter()
        call()
        returned = time.perf_counter()
        self.rest()
        return (returned - started) * 1e3, (time.perf_counter() - started) * 1e3

    def device_ms(self, call: Callable[[], object]) -> float:
        """Milliseconds of the work on the current stream; on the CPU of the call."""
        if not self.is_queued:
            return self.host_ms(call)[0]
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.occupy()
        began.record()
        call()
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended)


class Floors:
    """The least that moving or reading some bytes costs here.

    Args:
        clock: Of the device that the bytes are on.
        num_bytes: How many.
    """

    def __init__(self, clock: Clock, num_bytes: int) -> None:
        self._clock = clock
        self._source = torch.zeros(num_bytes, dtype=torch.uint8, device=clock.device)
        self._target = torch.ones(num_bytes, dtype=torch.uint8, device=clock.device)
        for _ in range(2):
            self.copy_ms()

    def copy_ms(self) -> float:
        """One `copy_` of all of them in one piece, on the device; on the CPU that is memcpy on all threads."""
        return self._clock.device_ms(lambda: self._target.copy_(self._source))


class PinnedFloors:
    """The least that moving bytes between a device and page-locked main memory costs: copies in one piece."""

    def __init__(self, clock: Clock, num_bytes: int) -> None:
        self._clock = clock
        self._there = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)
        self._here = torch.zeros(num_bytes, dtype=torch.uint8, device=clock.device)
        self.out_ms(), self.back_ms()

    def out_ms(self) -> float:
        """To main memory."""
        return self._clock.device_ms(lambda: self._there.copy_(self._here, non_blocking=True))

    def back_ms(self) -> float:
        """From main memory."""
        return self._clock.device_ms(lambda: self._here.copy_(self._there, non_blocking=True))


class ReadFloor:
    """The least that looking at some tensors costs: one norm over one tensor of as many numbers."""

    def __init__(self, clock: Clock, num_numbers: int) -> None:
        self._clock = clock
        self._numbers = torch.zeros(num_numbers, device=clock.device)
        self.read_ms()

    def read_ms(self) -> float:
        """One pass."""
        return self._clock.device_ms(lambda: torch.linalg.vector_norm(self._numbers))
