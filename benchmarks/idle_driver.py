"""A CUDA driver that does nothing, and tensors on the CPU as if they were on its device.

What a call then takes is what the host does besides the driver, the launches and the copies. For measurements only: no
byte is moved and no order is kept, so nothing that is restored here is right.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from enum import IntEnum
from typing import Any
from unittest import mock

import torch

from tolaria.cuda import ContextDevice
from tolaria.device import DeviceSet
from tolaria.kernels import Sweep, Tally


class CUresult(IntEnum):
    """The codes that are looked up by name."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_NOT_READY = 600


class CUstreamCaptureMode(IntEnum):
    """The modes that a thread may be in."""

    CU_STREAM_CAPTURE_MODE_GLOBAL = 0
    CU_STREAM_CAPTURE_MODE_RELAXED = 2


_ANSWERS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxGetCurrent", "cuCtxGetDevice"), (0,)),
    **dict.fromkeys(("cuEventCreate", "cuStreamCreateWithPriority", "cuCtxPopCurrent"), (1,)),
    **dict.fromkeys(("cuThreadExchangeStreamCaptureMode", "cuEventElapsedTime"), (0,)),
    "cuCtxGetStreamPriorityRange": (0, -5),
}
"""What calls answer besides success."""


class IdleDriver:
    """Stands in for the module `cuda.bindings.driver`: every call succeeds at once."""

    CUresult = CUresult
    CUstreamCaptureMode = CUstreamCaptureMode
    CUDA_VERSION = 12080

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        answer = (CUresult.CUDA_SUCCESS, *_ANSWERS.get(name, ()))

        def call(*_: Any) -> tuple[Any, ...]:
            return answer

        setattr(self, name, call)
        return call


class IdleStreams:
    """torch's notion of streams, of which there is one."""

    def current(self, index: int) -> int:
        """The default stream."""
        return 0

    def is_capturing(self) -> bool:
        """Nobody captures."""
        return False

    def use(self, index: int, stream: int) -> contextlib.AbstractContextManager[None]:
        """Nothing changes."""
        return contextlib.nullcontext()

    def enqueue(self, index: int, stream: int, work: Callable[[], None]) -> None:
        """Launch at once."""
        work()


@contextlib.contextmanager
def on_an_idle_device() -> Generator[None]:
    """Governors that are built inside take the CPU for a device of this driver, with the barrier `context`."""
    driver = IdleDriver()

    def opened(_: DeviceSet, name: str) -> ContextDevice:
        return ContextDevice(name, driver, IdleStreams())

    def arrive(tally: Tally) -> None:
        tally.row.zero_()  # the same digest of whatever is read, and nothing wrong with it

    def itself(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def nothing(*_: Any, **__: Any) -> None:
        pass

    with (
        mock.patch.object(DeviceSet, "_open", opened),
        mock.patch.object(torch.Tensor, "pin_memory", itself),
        mock.patch.object(Sweep, "is_compiled", True),
        mock.patch.object(Sweep, "run", nothing),
        mock.patch.object(Tally, "clear", nothing),
        mock.patch.object(Tally, "send", arrive),
    ):
        yield
