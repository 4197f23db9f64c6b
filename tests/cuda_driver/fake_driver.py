"""A GPU made of CPU tensors: the CUDA driver and torch's streams as the governor sees them, as late as is legal.

Every stream is a first-in-first-out queue of closures, and nothing in it runs until something forces it: a wait of the
host, or a wait of a stream whose work must run. Even then only what that needs runs, never more.

The *main* stream of a device (handle 0, current on every thread unless a test says otherwise) is where the test's own
CPU operators are. They run in their caller, so whatever main is told to wait for has to run at that very moment, and
never does a moment earlier. The exception are transfers to page-locked memory (`PageLockedRow`): they wait in main's
queue like on a device. Further streams (`Machine.side_stream`) are the user's and as lazy as the governor's own.

A query answers `CUDA_ERROR_NOT_READY` until the host has waited for that work; with `Machine.lag = n` until n more
events were recorded on a main stream.

Nothing is forgiven: unknown, destroyed or foreign handles, missing contexts and calls that would invalidate a capture
are noted in `violations`, and the calls in the order in which they were made in `calls`.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tolaria.kernels import Sweep, Tally

MAIN = 0
GLOBAL, RELAXED = 0, 2

BOOKKEEPING = {"cuCtxGetDevice", "cuCtxGetCurrent", "cuEventCreate"}
"""Left out of `Machine.calls`: how often they are made depends on what the pools hold, not on the protocol."""


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_INVALID_HANDLE = 400
    CUDA_ERROR_NOT_READY = 600
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_ASSERT = 710
    CUDA_ERROR_LAUNCH_FAILED = 719
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900


class CUstreamCaptureMode(IntEnum):
    CU_STREAM_CAPTURE_MODE_GLOBAL = GLOBAL
    CU_STREAM_CAPTURE_MODE_RELAXED = RELAXED


class CUmemcpySrcAccessOrder(IntEnum):
    CU_MEMCPY_SRC_ACCESS_ORDER_INVALID = 0
    CU_MEMCPY_SRC_ACCESS_ORDER_STREAM = 1


class CUmemcpyAttributes:
    srcAccessOrder = CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_INVALID
    flags = 0


class CUmemorytype(IntEnum):
    CU_MEMORYTYPE_HOST = 1
    CU_MEMORYTYPE_DEVICE = 2


class CUDA_MEMCPY3D:
    srcMemoryType = dstMemoryType = None
    srcDevice = dstDevice = srcPitch = dstPitch = srcHeight = dstHeight = WidthInBytes = Height = Depth = 0


@dataclass(eq=False)
class Graph:
    context: Context | None = None
    nodes: list[tuple[int, int, int]] = field(default_factory=list)
    is_destroyed: bool = False


OK = CUresult.CUDA_SUCCESS


@dataclass(eq=False)
class Stream:
    name: str
    device: int
    handle: int
    queue: deque[Any] = field(default_factory=deque)
    launched: int = 0
    ran: int = 0  # done
    seen: int = 0  # done, and the host knows
    is_destroyed: bool = False

    def __int__(self) -> int:
        return self.handle


Pairs = tuple[tuple[Stream, int], ...]


@dataclass(eq=False)
class Event:
    device: int
    name: str = "never recorded"
    pairs: Pairs | None = None
    at: int = 0
    ticks: int = 0
    is_destroyed: bool = False


@dataclass(eq=False)
class Context:
    name: str
    device: int
    retained: int = 0

    def __int__(self) -> int:
        return id(self)


@dataclass(eq=False)
class Work:
    run: Callable[[], None]

    def tensors(self) -> Iterator[torch.Tensor]:
        return _reachable(self.run)


@dataclass(eq=False)
class Wait:
    pairs: Pairs

    def tensors(self) -> Iterator[torch.Tensor]:
        return iter(())


def _reachable(value: Any) -> Iterator[torch.Tensor]:
    """Tensors that a closure holds: what it may read or write when it runs."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _reachable(item)
    elif isinstance(value, functools.partial):
        yield from _reachable((value.func, *value.args, *value.keywords.values()))
    elif isinstance(value, Sweep):
        yield from (*value._live, *value._held)
    elif isinstance(getattr(value, "__self__", None), Tally):
        yield from (value.__self__.total, value.__self__.row)
    else:
        for cell in getattr(value, "__closure__", None) or ():
            yield from _reachable(cell.cell_contents)


class Machine:
    """The hardware: streams, what is in them, and what was asked of the driver.

    Attributes:
        driver: Stands in for the module `cuda.bindings.driver`.
        streams: Stands in for `tolaria.cuda.Streams`.
        calls: ``"name argument argument"`` per call, in order. Events are named by when they were recorded.
        violations: What no correct program does.
        lag: Events recorded on a main stream after which a query succeeds; None: only once the host has waited.
        green: Contexts on the same device as the primary one that are current instead of it, by device.
        base_device: The device whose context is current on every thread that has pushed none; None for none at all.
        capturing: Threads whose current stream captures a graph.
        fails: Name of a driver call -> code that it answers instead of being performed.
        broken_launch: Raised by the next launch on a governor's stream.
    """

    def __init__(self, num_devices: int = 1) -> None:
        self.lock = threading.RLock()
        self.calls: list[str] = []
        self.violations: list[str] = []
        self.lag: int | None = None
        self.base_device: int | None = 0
        self.green: dict[int, Context] = {}
        self.capturing: set[int] = set()
        self.fails: dict[str, int] = {}
        self.broken_launch: BaseException | None = None
        self.contexts = [Context(f"ctx{i}", i) for i in range(num_devices)]
        self.mains = [Stream(f"main{i}", i, MAIN) for i in range(num_devices)]
        self.by_handle: dict[int, Stream] = {}
        self.events: list[Event] = []
        self.graphs: list[Graph] = []  # instantiated
        self.recorded = self.ticks = 0
        self.local = threading.local()
        self.driver = FakeDriver(self)
        self.streams = FakeStreams(self)

    # ------------------------------------------------------------ what tests use

    @contextmanager
    def tape(self) -> Iterator[list[str]]:
        """The calls made inside, with events renamed a, b, c in order of appearance; complete when the block ends."""
        start, found = len(self.calls), []
        yield found
        names: dict[str, str] = {}
        for call in self.calls[start:]:
            words = call.split(" ")
            for i, word in enumerate(words):
                if word.startswith("event"):
                    words[i] = names.setdefault(word, chr(ord("a") + len(names)))
            found.append(" ".join(words))

    def side_stream(self, device: int = 0) -> Stream:
        """One more stream of the user's, as lazy as any."""
        number = sum(stream.name.startswith("side") for stream in self.by_handle.values())
        return self.new_stream(f"side{device}.{number}", device)

    def launch(self, stream: Stream, work: Callable[[], Any]) -> None:
        """The user launches work on a lazy stream."""
        with self.lock:
            self._push(stream, Work(work))

    def own(self, device: int = 0) -> Stream:
        """The newest of the governor's own streams there."""
        return next(s for s in reversed(self.by_handle.values()) if s.name.startswith("own") and s.device == device)

    def pending(self, stream: Stream) -> int:
        """Closures launched on it that have not run."""
        return sum(isinstance(item, Work) for item in stream.queue)

    def finish(self) -> None:
        """Run everything, as time does."""
        with self.lock:
            for stream in self.all_streams():
                self._force(stream, stream.launched)

    def depth(self) -> int:
        """Contexts pushed on this thread and not popped."""
        return len(self._stack())

    def mode(self) -> int:
        """The calling thread's capture interaction mode."""
        return getattr(self.local, "mode", GLOBAL)

    def clear(self) -> None:
        """Forget the calls made so far."""
        self.calls.clear()

    # ------------------------------------------------------------ streams

    def all_streams(self, device: int | None = None) -> list[Stream]:
        found = [*self.mains, *self.by_handle.values()]
        return [s for s in found if not s.is_destroyed and device in (None, s.device)]

    def new_stream(self, name: str, device: int) -> Stream:
        stream = Stream(name, device, 0x100 + len(self.by_handle))
        self.by_handle[stream.handle] = stream
        return stream

    def stream(self, handle: Any) -> Stream | None:
        """What the driver takes a handle for: 0 is the default stream of the *current* context."""
        if int(handle) != MAIN:
            stream = self.by_handle.get(int(handle))
            if stream is None or stream.is_destroyed:
                self.violate(f"stream {int(handle):#x} does not exist")
                return None
            return stream
        context = self.current_context()
        if context is None:
            self.violate("the default stream was named without a current context")
            return None
        return self.mains[context.device]

    def _stack(self) -> list[Context]:
        if not hasattr(self.local, "stack"):
            self.local.stack = []
        return self.local.stack

    def current_context(self) -> Context | None:
        if self._stack():
            return self._stack()[-1]
        if self.base_device is None:
            return None
        return self.green.get(self.base_device, self.contexts[self.base_device])

    def _push(self, stream: Stream, item: Work | Wait) -> None:
        stream.queue.append(item)
        stream.launched += 1

    def _force(self, stream: Stream, count: int, seen: bool = False) -> None:
        """Run what makes the first `count` entries of a stream done, and nothing else."""
        while stream.ran < count and stream.queue:
            item = stream.queue.popleft()
            if isinstance(item, Wait):
                for other, needed in item.pairs:
                    self._force(other, needed, seen)
            else:
                # whatever modes are on where the device happens to be waited for are no business of the device
                with torch.inference_mode(False), torch.no_grad(), _disable_current_modes():
                    item.run()
            stream.ran += 1
        if seen:
            stream.seen = max(stream.seen, min(count, stream.ran))

    def let_wait(self, stream: Stream, event: Event) -> None:
        self._push(stream, Wait(event.pairs or ()))
        if stream.handle == MAIN:
            # operators of the test run in their caller: what they are to wait for has to be done now. Transfers that
            # are pending on main itself are none of that.
            for other, needed in event.pairs or ():
                if other is not stream:
                    self._force(other, needed)

    def now(self, device: int | None, stream: Stream | None = None) -> Pairs:
        found = self.all_streams(device) if stream is None else [stream]
        return tuple((one, one.launched) for one in found)

    def has_passed(self, event: Event) -> bool:
        """What a query answers."""
        if event.pairs is None:
            return True
        if self.lag is not None and self.ticks - event.ticks >= self.lag:
            for stream, count in event.pairs:
                self._force(stream, count, seen=True)
        return all(stream.seen >= count for stream, count in event.pairs)

    def before_operator(self, stream: Stream, tensors: Sequence[torch.Tensor]) -> None:
        """An operator on a lazy stream is about to run in its caller: what it depends on comes first.

        Everything launched on that stream is ahead of it. It is all run if the operator touches memory of anything that
        is still under way, and stays where it is if nobody could tell.
        """
        touched = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        with self.lock:
            under_way = {
                tensor.untyped_storage().data_ptr()
                for one in self.all_streams()
                for item in one.queue
                for tensor in item.tensors()
            }
            if touched & under_way:
                self._force(stream, stream.launched)

    # ------------------------------------------------------------ the log

    def note(self, name: str, *arguments: str) -> None:
        if name not in BOOKKEEPING:
            self.calls.append(" ".join((name, *arguments)))

    def violate(self, what: str) -> None:
        self.violations.append(what)


def _answers(function: Callable[..., Any]) -> Callable[..., Any]:
    """Serialise a driver call, and let it fail where the test says so."""

    @functools.wraps(function)
    def call(self: FakeDriver, *arguments: Any) -> Any:
        with self._machine.lock:
            code = self._machine.fails.get(function.__name__)
            if code is not None:
                return (CUresult(code), None)
            return function(self, *arguments)

    return call


class FakeDriver:
    """`cuda.bindings.driver`, as far as `tolaria.cuda` knows it. Every call answers a tuple that begins with a code."""

    CUresult = CUresult
    CUstreamCaptureMode = CUstreamCaptureMode
    CUDA_VERSION = 13000
    CUdeviceptr = int
    CUmemcpyAttributes = CUmemcpyAttributes
    CUmemorytype = CUmemorytype
    CUDA_MEMCPY3D = CUDA_MEMCPY3D
    CUmemcpySrcAccessOrder = CUmemcpySrcAccessOrder

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.version = 13000

    @_answers
    def cuDriverGetVersion(self) -> Any:
        return OK, self.version

    @_answers
    def cuDeviceGet(self, index: int) -> Any:
        self._machine.note("cuDeviceGet", str(index))
        return OK, index

    @_answers
    def cuDevicePrimaryCtxRetain(self, device: int) -> Any:
        self._machine.note("cuDevicePrimaryCtxRetain", str(device))
        self._machine.contexts[device].retained += 1
        return OK, self._machine.contexts[device]

    @_answers
    def cuDevicePrimaryCtxRelease(self, device: int) -> Any:
        self._machine.note("cuDevicePrimaryCtxRelease", str(device))
        self._machine.contexts[device].retained -= 1
        if self._machine.contexts[device].retained < 0:
            self._machine.violate("a context was released more often than retained")
        return (OK,)

    # ------------------------------------------------------------ contexts

    @_answers
    def cuCtxGetDevice(self) -> Any:
        context = self._machine.current_context()
        if context is None:
            return CUresult.CUDA_ERROR_INVALID_CONTEXT, None
        return OK, context.device

    @_answers
    def cuCtxGetCurrent(self) -> Any:
        return OK, self._machine.current_context()

    @_answers
    def cuCtxPushCurrent(self, context: Context) -> Any:
        self._machine.note("cuCtxPushCurrent", context.name)
        self._machine._stack().append(context)
        return (OK,)

    @_answers
    def cuCtxPopCurrent(self) -> Any:
        if not self._machine._stack():
            self._machine.violate("a context was popped that this thread never pushed")
            return CUresult.CUDA_ERROR_INVALID_CONTEXT, None
        context = self._machine._stack().pop()
        self._machine.note("cuCtxPopCurrent")
        return OK, context

    @_answers
    def cuCtxGetStreamPriorityRange(self) -> Any:
        self._machine.note("cuCtxGetStreamPriorityRange")
        if self._machine.current_context() is None:
            return CUresult.CUDA_ERROR_INVALID_CONTEXT, None, None
        return OK, 0, -5

    @_answers
    def cuCtxRecordEvent(self, context: Context, event: Event) -> Any:
        self._refuse_in_capture("cuCtxRecordEvent")
        return self._record("cuCtxRecordEvent", event, context.device, context.name, self._machine.now(context.device))

    @_answers
    def cuCtxWaitEvent(self, context: Context, event: Event) -> Any:
        self._refuse_in_capture("cuCtxWaitEvent")
        self._machine.note("cuCtxWaitEvent", context.name, self._name(event))
        for stream in self._machine.all_streams(context.device):
            self._machine.let_wait(stream, event)
        return (OK,)

    # ------------------------------------------------------------ streams

    @_answers
    def cuStreamCreateWithPriority(self, flags: int, priority: int) -> Any:
        context = self._machine.current_context()
        if context is None:
            return CUresult.CUDA_ERROR_INVALID_CONTEXT, None
        number = sum(s.name.startswith("own") and s.device == context.device for s in self._machine.by_handle.values())
        name = f"own{context.device}" + (f".{number}" if number else "")
        self._machine.note("cuStreamCreateWithPriority", str(flags), str(priority), context.name)
        return OK, self._machine.new_stream(name, context.device)

    @_answers
    def cuStreamDestroy(self, stream: Stream) -> Any:
        self._machine.note("cuStreamDestroy", stream.name)
        if stream.is_destroyed:
            self._machine.violate(f"{stream.name} was destroyed twice")
        if self._machine.pending(stream):
            self._machine.violate(f"{stream.name} was destroyed with work under way")
        stream.is_destroyed = True
        return (OK,)

    @_answers
    def cuStreamWaitEvent(self, handle: Any, event: Event, flags: int) -> Any:
        stream = self._machine.stream(handle)
        if stream is None or flags != 0:
            return (CUresult.CUDA_ERROR_INVALID_HANDLE,)
        if not stream.name.startswith("own"):
            self._refuse_on_capturing("cuStreamWaitEvent")
        self._machine.note("cuStreamWaitEvent", stream.name, self._name(event))
        self._machine.let_wait(stream, event)
        return (OK,)

    @_answers
    def cuStreamSynchronize(self, stream: Stream) -> Any:
        self._must_be_relaxed("cuStreamSynchronize")
        self._machine.note("cuStreamSynchronize", stream.name)
        self._machine._force(stream, stream.launched, seen=True)
        return (OK,)

    # ------------------------------------------------------------ events

    @_answers
    def cuEventCreate(self, flags: int) -> Any:
        context = self._machine.current_context()
        if context is None:
            return CUresult.CUDA_ERROR_INVALID_CONTEXT, None
        if flags != 0:
            self._machine.violate("an event without timing: elapsed times could not be read from it")
        self._machine.events.append(Event(context.device))
        return OK, self._machine.events[-1]

    @_answers
    def cuEventDestroy(self, event: Event) -> Any:
        if event.is_destroyed:
            self._machine.violate(f"{event.name} was destroyed twice")
        event.is_destroyed = True
        return (OK,)

    @_answers
    def cuEventRecord(self, event: Event, handle: Any) -> Any:
        stream = self._machine.stream(handle)
        if stream is None:
            return (CUresult.CUDA_ERROR_INVALID_HANDLE,)
        if not stream.name.startswith("own"):
            self._refuse_on_capturing("cuEventRecord")
        return self._record("cuEventRecord", event, stream.device, stream.name, self._machine.now(None, stream))

    @_answers
    def cuEventSynchronize(self, event: Event) -> Any:
        self._must_be_relaxed("cuEventSynchronize")
        self._machine.note("cuEventSynchronize", self._name(event))
        for stream, count in event.pairs or ():
            self._machine._force(stream, count, seen=True)
        return (OK,)

    @_answers
    def cuEventQuery(self, event: Event) -> Any:
        self._must_be_relaxed("cuEventQuery")
        self._machine.note("cuEventQuery", self._name(event))
        return (OK if self._machine.has_passed(event) else CUresult.CUDA_ERROR_NOT_READY,)

    @_answers
    def cuEventElapsedTime(self, began: Event, ended: Event) -> Any:
        self._machine.note("cuEventElapsedTime", self._name(began), self._name(ended))
        if began.pairs is None or ended.pairs is None or began.device != ended.device:
            return CUresult.CUDA_ERROR_INVALID_HANDLE, None
        if not (self._machine.has_passed(began) and self._machine.has_passed(ended)):
            return CUresult.CUDA_ERROR_NOT_READY, None
        return OK, float(ended.at - began.at)

    @_answers
    def cuThreadExchangeStreamCaptureMode(self, mode: int) -> Any:
        before = self._machine.mode()
        self._machine.local.mode = int(mode)
        return OK, CUstreamCaptureMode(before)

    @_answers
    def cuMemcpyBatchAsync(
        self,
        destinations: list[int],
        sources: list[int],
        sizes: list[int],
        count: int,
        attributes: list[CUmemcpyAttributes],
        begins: list[int],
        num_attributes: int,
        handle: Any,
    ) -> Any:
        """At once: it is asked for by work whose turn has come."""
        self._machine.note("cuMemcpyBatchAsync", str(count))
        if not len(destinations) == len(sources) == len(sizes) == count or begins != [0] or num_attributes != 1:
            return (CUresult.CUDA_ERROR_INVALID_HANDLE,)
        if attributes[0].srcAccessOrder is not CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM:
            self._machine.violate("cuMemcpyBatchAsync: the sources may be read before their stream has come there")
        if 0 in sizes:
            self._machine.violate("cuMemcpyBatchAsync: a copy of nothing")
        for destination, source, size in zip(destinations, sources, sizes, strict=True):
            ctypes.memmove(destination, source, size)
        return (OK,)

    # ------------------------------------------------------------ graphs

    @_answers
    def cuGraphCreate(self, flags: int) -> Any:
        self._must_be_relaxed("cuGraphCreate")
        return OK, Graph()

    @_answers
    def cuGraphAddMemcpyNode(self, graph: Graph, before: list[Any], count: int, copy: Any, context: Context) -> Any:
        self._must_be_relaxed("cuGraphAddMemcpyNode")
        on_device = copy.srcMemoryType is copy.dstMemoryType is CUmemorytype.CU_MEMORYTYPE_DEVICE
        is_flat = copy.Height == copy.Depth == 1 and copy.srcPitch == copy.dstPitch == copy.WidthInBytes
        if graph.is_destroyed or before or count or not on_device or not is_flat or not copy.WidthInBytes:
            return CUresult.CUDA_ERROR_INVALID_HANDLE, None
        if copy.WidthInBytes >= 1 << 31:
            self._machine.violate("cuGraphAddMemcpyNode: a pitch that no device takes")
        graph.context = context
        graph.nodes.append((copy.dstDevice, copy.srcDevice, copy.WidthInBytes))
        return OK, object()

    @_answers
    def cuGraphInstantiate(self, graph: Graph, flags: int) -> Any:
        self._must_be_relaxed("cuGraphInstantiate")
        self._machine.note("cuGraphInstantiate", str(len(graph.nodes)))
        self._machine.graphs.append(Graph(graph.context, list(graph.nodes)))
        return OK, self._machine.graphs[-1]

    @_answers
    def cuGraphDestroy(self, graph: Graph) -> Any:
        graph.is_destroyed = True
        return (OK,)

    @_answers
    def cuGraphExecDestroy(self, graph: Graph) -> Any:
        self._must_be_relaxed("cuGraphExecDestroy")
        if graph.is_destroyed:
            self._machine.violate("a graph was destroyed twice")
        graph.is_destroyed = True
        return (OK,)

    @_answers
    def cuGraphLaunch(self, graph: Graph, handle: Any) -> Any:
        """At once: it is asked for by work whose turn has come. In the other order: there are no edges."""
        self._machine.note("cuGraphLaunch", str(len(graph.nodes)))
        if graph.is_destroyed:
            self._machine.violate("a graph was launched after it was destroyed")
        for destination, source, size in reversed(graph.nodes):
            ctypes.memmove(destination, source, size)
        return (OK,)

    # ------------------------------------------------------------ rules

    def _record(self, call: str, event: Event, device: int, where: str, pairs: Pairs) -> Any:
        if event.device != device or event.is_destroyed:
            self._machine.violate(f"{call}: the event belongs to another device, or was destroyed")
            return (CUresult.CUDA_ERROR_INVALID_HANDLE,)
        machine = self._machine
        machine.recorded += 1
        machine.ticks += where.startswith("main")
        event.name, event.pairs, event.at, event.ticks = (
            f"event{machine.recorded}",
            pairs,
            machine.recorded,
            machine.ticks,
        )
        machine.note(call, where, event.name)
        return (OK,)

    def _name(self, event: Event) -> str:
        if event.is_destroyed:
            self._machine.violate(f"{event.name} was used after it was destroyed")
        return event.name

    def _refuse_in_capture(self, call: str) -> None:
        if self._machine.capturing:
            self._machine.violate(f"{call} while a graph is being captured: the capture is invalid now")

    def _refuse_on_capturing(self, call: str) -> None:
        if threading.get_ident() in self._machine.capturing:
            self._machine.violate(f"{call} on a stream that captures: it ties the capture to work outside of it")

    def _must_be_relaxed(self, call: str) -> None:
        if self._machine.capturing and self._machine.mode() != RELAXED:
            self._machine.violate(f"{call} in global mode while a graph is being captured: the capture is invalid now")


class _InOrder(TorchDispatchMode):
    """Operators inside run in their caller, but not ahead of what is on their stream already."""

    def __init__(self, machine: Machine, stream: Stream) -> None:
        super().__init__()
        self._machine, self._stream = machine, stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # a view of memory under way is nobody's business: nothing is read and nothing written
        if not (func.is_view or func.overloadpacket.__name__ in ("set_", "detach", "detach_")):
            tensors = [leaf for leaf in _pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            self._machine.before_operator(self._stream, tensors)
        return func(*args, **kwargs)


class FakeStreams:
    """`tolaria.cuda.Streams` of the machine."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def _current(self) -> dict[int, list[int]]:
        if not hasattr(self._machine.local, "current"):
            self._machine.local.current = {}
        return self._machine.local.current

    def current(self, index: int) -> int:
        stack = self._current().get(index)
        return stack[-1] if stack else MAIN

    def is_capturing(self) -> bool:
        return threading.get_ident() in self._machine.capturing

    @contextmanager
    def use(self, index: int, stream: int) -> Iterator[None]:
        stack = self._current().setdefault(index, [])
        stack.append(stream)
        try:
            with _InOrder(self._machine, self._machine.by_handle[stream]):
                yield
        finally:
            stack.pop()

    @contextmanager
    def on_side(self, stream: Stream) -> Iterator[None]:
        """The test makes a lazy stream of its own current; its operators still run in their caller."""
        stack = self._current().setdefault(stream.device, [])
        stack.append(stream.handle)
        try:
            yield
        finally:
            stack.pop()

    def enqueue(self, index: int, stream: int, work: Callable[[], None]) -> None:
        machine = self._machine
        with machine.lock:
            if machine.broken_launch is not None:
                error, machine.broken_launch = machine.broken_launch, None
                raise error
            target = machine.by_handle[stream]
            if target.is_destroyed or target.device != index:
                machine.violate(f"work was launched on {target.name}, which is gone or belongs to another device")
            machine.note("launch", target.name, _purpose(work))
            machine._push(target, Work(work))


def _purpose(work: Any) -> str:
    if isinstance(work, functools.partial):
        return work.func.__name__
    return work.__qualname__.split(".<locals>")[0].split(".")[-1]


class PageLockedRow:
    """A row of page-locked memory: what is copied into it arrives when the stream of the copy gets there."""

    def __init__(self, machine: Machine, width: int) -> None:
        self._machine = machine
        self._values = torch.zeros(width, dtype=torch.float64, device="cpu")  # stale, and plausible: nothing is wrong

    def numel(self) -> int:
        return self._values.numel()

    def tolist(self) -> list[float]:
        return self._values.tolist()

    def __getitem__(self, where: slice) -> PageLockedRow:
        part = PageLockedRow.__new__(PageLockedRow)
        part._machine, part._values = self._machine, self._values[where]
        return part

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> None:
        machine = self._machine
        handle = machine.streams.current(0)
        stream = machine.by_handle[handle] if handle else machine.mains[0]
        # main's operators have run up to here and no further: that is what the transfer reads
        origin = source.detach().clone() if stream.handle == MAIN else source.detach()
        with machine.lock:
            machine._push(stream, Work(functools.partial(self._values.copy_, origin)))
            if not non_blocking:
                machine._force(stream, stream.launched, seen=True)
