"""One fault more on a device that works asynchronously: writes that are still under way when the panic is answered.

A kernel that is no operator of torch, launched by another thread on a stream that the governor was never told of, is
held back on the device before it overwrites the weights. A rollback that does not stand behind *all* streams restores
first and is overwritten afterwards, which costs a second, false rollback or the run.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch

from tolaria.drill.faults import FaultKind, Scene
from tolaria.testing.faults import Moment

NAME = "foreign_kernel"

HOLD_MS = 30
"""Milliseconds for which the kernel is held back: several steps of a small model, longer than a late verdict takes."""

_THREADS = 256
_KHZ_IF_UNKNOWN = 1_500_000

_SOURCE = """
// One block. Held back for `cycles` clock cycles (at most cycles / 4 turns, should the clock stand still), during which
// the first value is NaN whatever anybody else writes there; then all of them are overwritten.
extern "C" __global__ void tolaria_drill_overwrite(float* values, int count, int cycles) {
  const float poison = __int_as_float(0x7fc00000);
  volatile float* first = values;
  const long long began = clock64();
  for (int turn = 0; turn < cycles / 4 && clock64() - began < cycles; ++turn)
    if (threadIdx.x == 0 && turn % 1024 == 0) *first = poison;
  for (int i = threadIdx.x; i < count; i += blockDim.x) values[i] = i % 64 ? 1000.0f * (i % 7 - 3) : poison;
}
"""


class Foreign(Protocol):
    """A stream of nobody's and what writes on it. `CudaForeign` on a device, stand-ins in tests."""

    title: str
    """For people: who writes, and how."""

    def settle(self) -> None:
        """Wait until the device has done what the calling thread's stream was given, so that the fault begins now."""
        ...

    def stream(self) -> AbstractContextManager[None]:
        """A new stream, current for the calling thread inside. At its end a mark is left on it."""
        ...

    def write(self, values: torch.Tensor, *, held: bool) -> None:
        """Launch on the current stream: overwrite all values with garbage and NaNs; never waits.

        Args:
            values: Any shape, float32, contiguous.
            held: Poison the first value at once, and hold the rest back for `HOLD_MS`. Later launches stand behind it.
        """
        ...

    def is_under_way(self) -> bool:
        """Whether the mark of the newest stream has not been passed. Waits for nothing."""
        ...

    def wait(self) -> None:
        """Wait for that mark."""
        ...


class CudaForeign:
    """A pool stream of torch, made anew for each fault, and a kernel compiled here from CUDA C.

    Where this torch or machine cannot compile one, operators of torch do the same on that stream; `title` says so.

    Args:
        device: A CUDA device. The kernel is compiled (once per process and device, about half a second) and launched
            once on the current stream, so that its first use in a run loads nothing.
    """

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)
        self._kernel, obstacle = _compiled(index)
        self._cycles = _cycles(getattr(torch.cuda.get_device_properties(index), "clock_rate", 0))
        self._end: torch.cuda.Event | None = None
        writer = f"torch operators (no custom kernel: {obstacle})" if obstacle else "a custom kernel"
        self.title = f"{writer} on an unknown stream, in flight at the panic"

    def settle(self) -> None:
        """Wait for the calling thread's current stream."""
        torch.cuda.current_stream(self._device).synchronize()

    @contextmanager
    def stream(self) -> Generator[None]:
        """A new stream, current inside, and an event at its end."""
        stream = torch.cuda.Stream(self._device)
        with torch.cuda.stream(stream):
            torch.zeros(1, device=self._device)  # a thread has no context of the driver before its first operator
            try:
                yield
            finally:
                self._end = torch.cuda.Event()
                self._end.record(stream)

    def write(self, values: torch.Tensor, *, held: bool) -> None:
        """Launch the kernel, or its substitute, on the current stream."""
        cycles = self._cycles if held else 0
        if self._kernel is not None:
            self._kernel(grid=(1, 1, 1), block=(_THREADS, 1, 1), args=[values, values.numel(), cycles])
            return
        if held:
            values.view(-1)[:1].fill_(torch.nan)
            torch.cuda._sleep(cycles)
        values.fill_(1e3)
        values.view(-1)[::64].fill_(torch.nan)

    def is_under_way(self) -> bool:
        """Whether the device has yet to reach the event."""
        return self._end is not None and not self._end.query()

    def wait(self) -> None:
        """Block the host until the device has reached the event."""
        if self._end is not None:
            self._end.synchronize()


@functools.cache
def _compiled(index: int) -> tuple[Callable[..., Any] | None, str]:
    """The kernel for that device, launched once; or None and why there is none."""
    try:
        with torch.cuda.device(index):
            kernel: Callable[..., Any] = torch.cuda._compile_kernel(_SOURCE, "tolaria_drill_overwrite")
            scratch = torch.zeros(1, device="cuda")
            kernel(grid=(1, 1, 1), block=(_THREADS, 1, 1), args=[scratch, 1, 0])
            if not bool(scratch.isnan()):
                return None, "it wrote nothing"
    except Exception as error:  # a private function of torch: it may be missing, or want what this machine lacks
        return None, type(error).__name__
    return kernel, ""


def _cycles(khz: int) -> int:
    """Clock cycles of `HOLD_MS` at that rate (0: unknown), as many as an `int` of the kernel holds."""
    return min((khz or _KHZ_IF_UNKNOWN) * HOLD_MS, 2**31 - 1)


def overwrite_in_flight(foreign: Foreign, scene: Scene) -> None:
    """Every third parameter is overwritten on a foreign stream by another thread, the first one's writes held back.

    The launches stand in a section of the governor (if there is one), as it asks of custom kernels. The stream is
    current in it, so that the writes stand behind copies of a snapshot; when they end, the governor cannot know.
    """
    assert scene.training is not None
    parameters = [p.data for p in scene.training.model.parameters() if p.dtype == torch.float32 and p.is_contiguous()]
    errors: list[BaseException] = []

    def launch() -> None:
        try:
            with foreign.stream(), scene.section():
                for number, values in enumerate(parameters[::3]):
                    foreign.write(values, held=number == 0)
        except BaseException as error:
            errors.append(error)

    foreign.settle()  # else the poison could be seen in the numbers of the step before
    thread = threading.Thread(target=launch, name="foreign-kernel")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def foreign_kernel(foreign: Foreign, at: float) -> FaultKind:
    """`overwrite_in_flight` as a fault. It strikes early between two snapshots, so that none is due meanwhile.

    Args:
        foreign: Where it launches.
        at: When in a run, as a share of its steps.
    """
    act = functools.partial(overwrite_in_flight, foreign)
    return FaultKind(NAME, foreign.title, Moment.UPDATE, act, at, beat=(10, 2), under_way=foreign)
