"""A model that tells which step every element is from, and ways to take the governor's protection away from it.

For races that are forced on a CUDA device: `trials` and the GPU tests are made of these.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator
from typing import Any, Literal
from unittest import mock

import torch
from torch import nn

from tolaria import GovernorConfig, TolariaGovernor, judge
from tolaria.cuda import ContextDevice
from tolaria.device import BlockingDevice
from tolaria.driver import Driver
from tolaria.route import DeviceRoute
from tolaria.testing.gates import Gate, distinct_streams, driver, own_streams

OLD, NEW = 1.0, 2.0
BarrierName = Literal["context", "blocking"]
Values = list[float]


class Picture:
    """A model of two parameters whose every element tells which step it is from."""

    def __init__(self, num_streams: int, elements: int = 120 << 15, barrier: BarrierName | None = None) -> None:
        self.model = nn.ParameterList([nn.Parameter(torch.full((elements,), OLD, device="cuda")) for _ in range(2)])
        config = GovernorConfig(rng="keep", barrier=barrier)
        self.governor = TolariaGovernor(self.model, config=config, detector=judge.non_finite())
        *self.writers, self.reader, self.control = distinct_streams(num_streams + 2, own_streams(self.governor))
        self.share = elements // num_streams
        torch.cuda.synchronize()

    def part(self, parameter: int, number: int) -> torch.Tensor:
        """The share of one stream in one parameter."""
        part: torch.Tensor = self.model[parameter][number * self.share : (number + 1) * self.share]
        return part

    def write_gated(self, gate: Gate, value: float = NEW) -> None:
        """From another thread: each stream writes its share of one parameter, waits, writes its share of the other.

        Half done for certain when this returns: every first share has been written.
        """

        def run() -> None:
            with torch.no_grad(), self.governor.using(write=True):
                for number, stream in enumerate(self.writers):
                    with torch.cuda.stream(stream):
                        self.part(0, number).fill_(value)
                for stream in self.writers:  # before any is held back: some may share a hardware queue
                    stream.synchronize()
                for number, stream in enumerate(self.writers):
                    with torch.cuda.stream(stream):
                        gate.close(stream)
                        self.part(1, number).fill_(value)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    def spoil(self) -> None:
        """A step that is over when this returns."""
        with torch.no_grad(), self.governor.using():
            for parameter in self.model:
                parameter.fill_(NEW)
        torch.cuda.synchronize()

    def read(self, stream: torch.cuda.Stream) -> torch.Tensor:
        """What a forward on `stream` sees: smallest and largest element of each parameter, shape [4], on the device."""
        with torch.no_grad(), self.governor.using(write=False), torch.cuda.stream(stream):
            return torch.stack([extreme for p in self.model for extreme in p.detach().aminmax()])

    def values(self) -> Values:
        """The same now, when the device is idle."""
        torch.cuda.synchronize()
        return [float(v) for p in self.model for v in p.detach().aminmax()]

    def warm_up(self) -> None:
        """Every kernel, slot and event once: nothing may be loaded or allocated behind a closed gate."""
        self.governor.snapshot().wait("sealed")
        for _ in range(2):
            with Gate() as gate:
                gate.open()
                self.write_gated(gate, OLD)
            self.read(self.reader)
            self.governor.execute_rollback().wait()


# ---------------------------------------------------------------- taking protection away


def no_wait(device: ContextDevice, event: Any) -> None:
    """In the place of a wait: waits for nothing."""


def no_synchronize(device: BlockingDevice) -> None:
    """In the place of `BlockingDevice.synchronize`: waits for nothing."""


def synchronize_here(device: BlockingDevice) -> None:
    """In the place of `BlockingDevice.synchronize`: waits for the caller's current stream, and so for the copies."""
    torch.cuda.current_stream().synchronize()


def no_section(driver: Driver, *_: Any) -> int:
    """In the place of `Driver.open_section`: asks nobody."""
    return driver.state.epoch


@contextlib.contextmanager
def unordered(barrier: BarrierName) -> Generator[None]:
    """Inside, the governor orders nothing on the device but its own copies."""
    with contextlib.ExitStack() as stack:
        if barrier == "context":
            # an event of the governor's own, idle stream in the place of one that covers all streams
            stack.enter_context(mock.patch.object(ContextDevice, "context_record", ContextDevice.stream_record))
            stack.enter_context(mock.patch.object(ContextDevice, "context_wait", no_wait))
        else:
            stack.enter_context(mock.patch.object(BlockingDevice, "synchronize", synchronize_here))
        yield


@contextlib.contextmanager
def at_synchronize(*turns: Callable[[], object] | None) -> Generator[None]:
    """Inside, the `blocking` barrier does one thing more before each wait for the device, in turn.

    Args:
        turns: For the first wait, the second and so on; None: that wait is left out. Later ones are as they are.
    """
    original, left = BlockingDevice.synchronize, iter(turns)

    def synchronize(device: BlockingDevice) -> None:
        turn = next(left, nothing)
        if turn is not None:
            turn()
            original(device)

    with mock.patch.object(BlockingDevice, "synchronize", synchronize):
        yield


def nothing() -> None:
    """A turn of `at_synchronize` in which the wait is as it is."""


@contextlib.contextmanager
def held(gate: Gate) -> Generator[None]:
    """Inside, copies are held back: the stream that they go to, just before each of them."""

    def holding(original: Any) -> Any:
        def copy(route: Any, *answer: Any) -> None:
            own = getattr(route._port, "_stream", None)  # the blocking barrier copies on its caller's
            gate.close(torch.cuda.current_stream() if own is None else torch.cuda.ExternalStream(int(own)))
            original(route, *answer)

        return copy

    capture, restore = holding(DeviceRoute.capture), holding(DeviceRoute.restore)
    with mock.patch.object(DeviceRoute, "capture", capture), mock.patch.object(DeviceRoute, "restore", restore):
        yield


# ---------------------------------------------------------------- between gates


def settle(governor: TolariaGovernor, barrier: BarrierName) -> None:
    """Wait for the governor's copies alone, although other streams are held back."""
    if barrier == "context":
        for device in governor._keeper.devices.values():
            device.synchronize()
    else:
        torch.cuda.current_stream().synchronize()


def submitted(gate: Gate, barrier: BarrierName, work: Callable[[], Any]) -> Any:
    """Submit a snapshot or rollback behind a closed gate.

    With `context` it returns at once. With `blocking` the gate is opened as soon as the host waits for the device.
    """
    if barrier == "context":
        return work()
    original = BlockingDevice.synchronize

    def synchronize(device: BlockingDevice) -> None:
        gate.open()
        original(device)

    with mock.patch.object(BlockingDevice, "synchronize", synchronize):
        return work()


def raw_stream() -> torch.cuda.Stream:
    """A new, non-blocking stream of the driver's, made by nobody whom torch knows. Never destroyed."""
    code, raw = driver().cuStreamCreate(1)
    assert int(code) == 0
    return torch.cuda.ExternalStream(int(raw))
