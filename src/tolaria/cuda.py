"""CUDA without stopping the host: the `context` barrier as a thin table of driver calls.

`cuCtxRecordEvent` and `cuCtxWaitEvent` on a device's *primary* context cover every stream of the process on that
device, known to us or not, and cost microseconds. They also invalidate every graph capture in progress in that
context. So the protocol never yields them while one is (`HostState.captures`), and they are looked for, never tried.

The copies run on a stream of the governor's own that no pool hands out, so that it can never turn out to be a user's.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch

from tolaria import engine
from tolaria.errors import CaptureInProgress, DeviceLost, TolariaError, TolariaInternalError
from tolaria.operations import Barrier

_NEEDED_VERSION = 12050  # CUDA 12.5, the first driver API with context-wide events
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: does not wait for the legacy default stream behind our back
_WITH_TIMING = 0  # CU_EVENT_DEFAULT
_CAPTURE_CODES = range(900, 910)  # CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED and its kin

# Errors after which the context is unusable for good, by their number in both CUDA APIs: an ECC error, an illegal
# address, a launch time-out, a failed assert, and the ways in which a kernel can break its own hardware state.
STICKY_CODES = frozenset({214, 220, 226, 700, 702, 710, 714, 715, 716, 717, 718, 719, 721})


_idle_streams: weakref.WeakKeyDictionary[Any, dict[int, list[Any]]] = weakref.WeakKeyDictionary()


class Streams(Protocol):
    """What of torch a `ContextDevice` needs: which stream the caller is on, and launching on another."""

    def current(self, index: int) -> int:
        """Handle of the calling thread's current stream on that device."""
        ...

    def is_capturing(self) -> bool:
        """Whether the calling thread's current stream is in capture mode."""
        ...

    def use(self, index: int, stream: int) -> AbstractContextManager[None]:
        """Make a stream current inside."""
        ...

    def enqueue(self, index: int, stream: int, work: Callable[[], None]) -> None:
        """Call `work`; what it launches goes to that stream."""
        ...


class TorchStreams:
    """The real `Streams`."""

    def current(self, index: int) -> int:
        handle: int = torch._C._cuda_getCurrentRawStream(index)
        return handle

    def is_capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], _Named] = {}

    def _enter(self, index: int, stream: int) -> tuple[int, _Named]:
        """Make a stream current on its device. Answers what `_leave` puts back: the current device, and its stream."""
        named = self._known.get((index, stream))
        if named is None:
            torch.cuda.init()
            external = torch.cuda.ExternalStream(stream, device=index)
            named = self._known[index, stream] = external.stream_id, external.device_index, external.device_type
        device, before = torch._C._cuda_getDevice(), torch._C._cuda_getCurrentStream(index)
        _set_stream(named)
        if device != index:
            torch._C._cuda_setDevice(device)
        return device, before

    @contextmanager
    def use(self, index: int, stream: int) -> Generator[None]:
        # what `torch.cuda.stream` does, without its checks and its objects: this is done a dozen times per rollback
        device, before = self._enter(index, stream)
        try:
            yield
        finally:
            _leave(index, device, before)

    def enqueue(self, index: int, stream: int, work: Callable[[], None]) -> None:
        # as `use`, whose generator takes as long as some launches
        device, before = self._enter(index, stream)
        try:
            work()
        finally:
            _leave(index, device, before)


_Named = tuple[int, int, int]
"""What torch calls a stream: its number, device and kind of device."""


def _leave(index: int, device: int, before: _Named) -> None:
    _set_stream(before)
    if device != index:
        torch._C._cuda_setDevice(device)


def _set_stream(named: _Named) -> None:
    """Make a stream current on its device, and that device current."""
    torch._C._cuda_setStream(stream_id=named[0], device_index=named[1], device_type=named[2])


class Event:
    """One recorded event. Its handle goes back to its device when nobody refers to it any more."""

    __slots__ = ("_give_back", "handle")

    def __init__(self, handle: Any, give_back: Callable[[Any], None]) -> None:
        self.handle, self._give_back = handle, give_back

    def __del__(self) -> None:
        self._give_back(self.handle)


class ContextDevice:
    """One CUDA device, ordered by context-wide events. No call here waits for the device, except where it says so.

    Args:
        name: ``"cuda:0"``.
        driver: The module `cuda.bindings.driver`, or a stand-in with the functions used here.
        streams: torch's notion of streams, or a stand-in.
        barrier: `context`; or `streams`, where the protocol orders stream by stream instead.

    Threads: any, whatever device or context is current on it.
    """

    def __init__(self, name: str, driver: Any, streams: Streams, barrier: Barrier = Barrier.CONTEXT) -> None:
        self.name, self._driver, self._streams, self.barrier = name, driver, streams, barrier
        self.index = torch.device(name).index or 0
        self._free: deque[Any] = deque()
        self._device = self._call("cuDeviceGet", self.index)
        # not the current context: that may be a green one, whose events cover its own work only
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        self._stream: Any = None
        self._second: Any = None
        self._transferring = threading.Lock()
        self._batches = engine.takes_batches(driver)
        try:
            with self._current(self._context):
                self._stream = self._take_stream()
        except BaseException:
            self._call("cuDevicePrimaryCtxRelease", self._device)
            raise

    def _take_stream(self) -> Any:
        with contextlib.suppress(IndexError):
            return _idle_streams.setdefault(self._driver, {}).setdefault(self.index, []).pop()
        _, highest = self._call("cuCtxGetStreamPriorityRange")
        return self._call("cuStreamCreateWithPriority", _NON_BLOCKING, highest)

    # ------------------------------------------------------------ the protocol's operations

    def context_record(self) -> Event:
        """An event that covers the work of all streams of the device so far."""
        event = self._event()
        self._call("cuCtxRecordEvent", self._context, event.handle)
        return event

    def context_wait(self, event: Event) -> None:
        """All later work of all streams of the device waits for the event."""
        self._call("cuCtxWaitEvent", self._context, event.handle)

    def stream_record(self) -> Event:
        """An event on the governor's own stream."""
        event = self._event()
        self._call("cuEventRecord", event.handle, self._stream)
        return event

    def stream_wait(self, event: Event) -> None:
        """Later work of the governor's own stream waits for the event."""
        self._call("cuStreamWaitEvent", self._stream, event.handle, 0)

    def caller_wait(self, event: Event) -> None:
        """Later work of the caller's current stream waits for the event.

        Not inside a capture: there it would invalidate the capture, whose stream has waited before it began.
        """
        if not self._streams.is_capturing():
            with self._current():
                self._call("cuStreamWaitEvent", self._streams.current(self.index), event.handle, 0)

    def caller_stream(self) -> int:
        """Handle of the caller's current stream; 0 is the default stream of the primary context."""
        return self._streams.current(self.index)

    def known_record(self, stream: int) -> Event:
        """An event that covers the work of that stream so far. It must not be capturing."""
        event = self._event()
        with self._current(self._context):
            self._call("cuEventRecord", event.handle, stream)
        return event

    def known_wait(self, stream: int, event: Event) -> None:
        """Later work of that stream waits for the event. It must not be capturing."""
        with self._current(self._context):
            self._call("cuStreamWaitEvent", stream, event.handle, 0)

    def host_wait(self, event: Event) -> None:
        """Block the host until the event has passed. Leaves captures of other threads alone."""
        with self._relaxed():
            self._call("cuEventSynchronize", event.handle)

    def synchronize(self) -> None:
        """Block the host until the governor's own stream is idle."""
        with self._relaxed():
            self._call("cuStreamSynchronize", self._stream)

    # ------------------------------------------------------------ transfers and readings

    def transfer(self, work: Callable[[], None]) -> Event:
        """Call `work` on a second stream, behind what the first was given so far. Answers the event of its end.

        A transfer to main memory takes long, and neither a rollback nor the next snapshot should wait for it.
        """
        behind = self.stream_record()
        with self._transferring:
            if self._second is None:
                with self._current(self._context):
                    self._second = self._take_stream()
            self._call("cuStreamWaitEvent", self._second, behind.handle, 0)
            self._streams.enqueue(self.index, int(self._second), work)
            event = self._event()
            self._call("cuEventRecord", event.handle, self._second)
        return event

    def transfer_record(self) -> Event | None:
        """An event that covers the transfers so far; None before the first."""
        with self._transferring:
            if self._second is None:
                return None
            event = self._event()
            self._call("cuEventRecord", event.handle, self._second)
            return event

    def move(self, destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        """Copy flat uint8 tensors pairwise between this device and page-locked memory, on the current stream.

        In one call where the driver offers that. The queue of a device takes about a thousand launches: with more
        tensors the host would wait until the device has come to the last of them, and copies begin later besides.
        """
        pairs = [(to, source) for to, source in zip(destinations, sources, strict=True) if source.numel()]
        if self._batches and len(pairs) > 1:
            # the last one is left to torch, whose allocator of page-locked memory learns so that this stream uses it
            many, pairs = pairs[:-1], pairs[-1:]
            with self._current(self._context):
                engine.Batch(self._driver, self._call, _moves(many)).launch(self._streams.current(self.index))
        for to, source in pairs:
            to.copy_(source, non_blocking=True)

    @property
    def takes_batches(self) -> bool:
        """Whether `batch` works here."""
        return self._batches

    @property
    def takes_graphs(self) -> bool:
        """Whether `graph` works here."""
        return engine.takes_graphs(self._driver)

    def batch(self, destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> Callable[[], None]:
        """Copies inside this device by its copy engines, beside whatever computes; see `device.QueuedDevice`."""
        return self._prepared(
            destinations, sources, lambda moves: engine.Batch(self._driver, self._call, moves, overlaps=True)
        )

    def graph(self, destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> Callable[[], None]:
        """Copies inside this device in one launch; see `device.QueuedDevice`."""
        return self._prepared(
            destinations,
            sources,
            lambda moves: engine.Graph(self._driver, self._call, moves, self._context, self._relaxed),
        )

    def _prepared(
        self,
        destinations: Sequence[torch.Tensor],
        sources: Sequence[torch.Tensor],
        make: Callable[[engine.Moves], engine.Batch | engine.Graph],
    ) -> Callable[[], None]:
        pairs = [(to, source) for to, source in zip(destinations, sources, strict=True) if source.numel()]
        with self._current(self._context):
            command = make(_moves(pairs))

        def copy(_held: object) -> None:
            with self._current(self._context):
                command.launch(self._streams.current(self.index))

        return functools.partial(copy, pairs)

    def enqueue(self, work: Callable[[], None]) -> None:
        """Call `work`; everything it launches on this device goes to the governor's own stream."""
        self._streams.enqueue(self.index, int(self._stream), work)

    def on_stream(self) -> AbstractContextManager[None]:
        """Everything launched inside goes to the governor's own stream."""
        return self._streams.use(self.index, int(self._stream))

    def mark(self) -> Event:
        """An event on the caller's current stream."""
        event = self._event()
        with self._current():
            self._call("cuEventRecord", event.handle, self._streams.current(self.index))
        return event

    def has_passed(self, event: Event) -> bool:
        """Whether the device has reached the event. Waits for nothing and leaves captures alone."""
        with self._relaxed():
            (code, *_) = self._driver.cuEventQuery(event.handle)
        if int(code) == _code(self._driver, "CUDA_ERROR_NOT_READY"):
            return False
        self._check("cuEventQuery", code)
        return True

    def elapsed_ms(self, began: Event, ended: Event) -> float:
        """Milliseconds on the device between two events that have passed."""
        with self._relaxed():
            found: float = self._call("cuEventElapsedTime", began.handle, ended.handle)
        return found

    def close(self) -> None:
        """Wait for the governor's own stream and give everything back.

        The stream is kept for the next governor of the process: torch's allocators may remember it for as long as
        memory lives that was used on it, and touch it when that memory is freed.
        """
        if self._stream is None:
            return
        self.synchronize()
        if self._second is not None:
            with self._relaxed():
                self._call("cuStreamSynchronize", self._second)
        streams, self._stream, self._second = (self._stream, self._second), None, None
        _idle_streams[self._driver][self.index] += [stream for stream in streams if stream is not None]
        while self._free:
            self._call("cuEventDestroy", self._free.popleft())
        self._call("cuDevicePrimaryCtxRelease", self._device)

    # ------------------------------------------------------------ calling the driver

    def _event(self) -> Event:
        try:
            handle = self._free.popleft()
        except IndexError:
            with self._current(self._context):
                handle = self._call("cuEventCreate", _WITH_TIMING)
        return Event(handle, self._take_back)

    def _take_back(self, handle: Any) -> None:
        if self._stream is not None:
            self._free.append(handle)
        else:  # a report outlived its governor
            with contextlib.suppress(Exception):
                self._driver.cuEventDestroy(handle)

    def _call(self, name: str, *arguments: Any) -> Any:
        found = getattr(self._driver, name)(*arguments)
        if int(found[0]):
            self._check(name, found[0])
        return found[1] if len(found) == 2 else found[1:]

    def _check(self, name: str, code: Any) -> None:
        if int(code) in STICKY_CODES:
            raise device_lost(f"calling {name}", str(getattr(code, "name", code)))
        if int(code) in _CAPTURE_CODES:
            raise CaptureInProgress(
                f"calling {name} on {self.name}",
                f"it answered {code}: a graph capture is in progress that was not made through torch.cuda.CUDAGraph, "
                "and this call may have invalidated it",
                "Announce such captures: take no snapshot and roll back nothing until they have ended.",
            )
        if int(code):
            raise TolariaInternalError(
                f"calling {name} on {self.name}", f"it answered {code}, expected success", "Please report this."
            )

    @contextmanager
    def _current(self, wanted: Any = None) -> Generator[None]:
        """Inside, the calling thread has a context of this device; it may have none yet, or one of another device.

        Args:
            wanted: This very context, for what is to be made in it. None: any will do, since the caller's default
                stream, whose handle is 0 in each of them, is the one of the context that is current.
        """
        _, context = self._driver.cuCtxGetCurrent()
        code, device = self._driver.cuCtxGetDevice()
        if not int(code) and int(device) == int(self._device) and (wanted is None or int(context) == int(wanted)):
            yield
            return
        self._call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent")

    @contextmanager
    def _relaxed(self) -> Generator[None]:
        """Queries and waits of this thread invalidate no capture of another thread that was begun in global mode."""
        relaxed = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        before = self._call("cuThreadExchangeStreamCaptureMode", relaxed)
        try:
            yield
        finally:
            self._call("cuThreadExchangeStreamCaptureMode", before)


def _moves(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> engine.Moves:
    return [(to.data_ptr(), source.data_ptr(), source.numel()) for to, source in pairs]


def _code(driver: Any, name: str) -> int:
    return int(getattr(driver.CUresult, name))


def find_driver() -> tuple[Any, str]:
    """The driver module if this machine has context-wide events, and else why it has not. Tries nothing out."""
    if torch.version.hip is not None:
        return None, "ROCm's counterpart of context-wide events orders nothing for torch's streams"
    try:
        driver = importlib.import_module("cuda.bindings.driver")
    except ImportError:
        return None, "the package cuda-bindings is missing: pip install 'tolaria[cuda]'"
    if not hasattr(driver, "cuCtxRecordEvent"):
        return None, "this version of cuda-bindings does not know cuCtxRecordEvent"
    try:
        code, version = driver.cuDriverGetVersion()
    except Exception as error:  # no driver library at all: each version of the bindings has an error of its own
        return None, f"the CUDA driver library cannot be loaded ({type(error).__name__})"
    if int(code) or version < _NEEDED_VERSION:
        return None, f"the driver offers CUDA {version // 1000}.{version % 1000 // 10}, context-wide events need 12.5"
    return driver, ""


def device_lost(doing: str, seen: str) -> DeviceLost:
    """The error for a device that this process cannot use any more."""
    return DeviceLost(
        doing,
        f"the device reports {seen}, after which it refuses all work of this process",
        "No rollback can repair this. Start a new process from a checkpoint on disk; CUDA_LAUNCH_BLOCKING=1 shows "
        "which kernel it was.",
    )


def named(error: Exception, doing: str) -> Exception:
    """`DeviceLost` in the place of torch's error if it is a sticky one, else the error itself."""
    if isinstance(error, TolariaError) or getattr(error, "error_code", None) not in STICKY_CODES:
        return error
    return device_lost(doing, next(iter(str(error).splitlines()), "") or f"error {getattr(error, 'error_code', '')}")
