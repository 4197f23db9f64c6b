"""Where a recorder listens: the governor's driver calls, launches and operations, torch's operators, streams, threads.

Everything is put back at the end, except torch's own hooks for its stream sanitizer: they cannot be taken off. Once a
recorder has been used on a machine with CUDA, every event of the process costs a call into Python that finds nobody to
tell.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from typing import Any, Protocol
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tolaria import capture
from tolaria.device import Device, DeviceSet
from tolaria.driver import Driver
from tolaria.operations import Await, Change, Copy, Examine, Inspect, ReadLive, Survey, Transfer
from tolaria.shield import Shield
from tolaria.testing.races import Ledger


class Listener(Protocol):
    """Who is told: a `Recorder`."""

    ledger: Ledger

    @property
    def lock(self) -> AbstractContextManager[object]:
        """Held while something is told."""
        ...

    def thread(self) -> str:
        """The calling thread's name."""
        ...

    def name_of(self, thread: threading.Thread) -> str:
        """A thread's name."""
        ...

    def stream(self, device: str, handle: int) -> str:
        """A stream's name."""
        ...

    def following(self) -> AbstractContextManager[None]:
        """Follows the calling thread's operators."""
        ...

    def operator(self, thread: str, func: Any, args: Any, kwargs: Any) -> None:
        """A torch operator is about to be called."""

    def performed(self, op: Any, perform: Callable[[Any], Any]) -> Any:
        """Performs an operation of the governor's that reads or writes bytes."""

    def enqueued(self, device: str, handle: int) -> None:
        """The governor is about to launch on that stream."""

    def changed(self, op: Change | Await) -> Any:
        """The same change of the host state, telling of itself."""

    def replayed(self) -> None:
        """A graph is about to be replayed."""


# ---------------------------------------------------------------- the user


class Following(TorchDispatchMode):
    """Operators of one thread, and of autograd's threads on its behalf."""

    def __init__(self, listener: Listener, thread: str) -> None:
        super().__init__()
        self._listener, self._thread = listener, thread

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._listener.operator(self._thread, func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def on_threads(listener: Listener) -> Generator[None]:
    """Threads that are started inside are followed, and ordered behind who starts and before who joins them."""
    start, join = threading.Thread.start, threading.Thread.join
    ledger, lock = listener.ledger, listener.lock

    def started(thread: threading.Thread) -> None:
        run = thread.run

        def followed() -> None:
            with lock:
                ledger.acquired(listener.thread(), ("started", listener.thread()))
            try:
                with listener.following():
                    run()
            finally:
                with lock:
                    ledger.released(listener.thread(), ("ended", listener.thread()))

        vars(thread)["run"] = followed
        with lock:
            ledger.released(listener.thread(), ("started", listener.name_of(thread)))
        start(thread)

    def joined(thread: threading.Thread, timeout: float | None = None) -> None:
        join(thread, timeout)
        if not thread.is_alive():
            with lock:
                ledger.acquired(listener.thread(), ("ended", listener.name_of(thread)))

    with mock.patch.object(threading.Thread, "start", started), mock.patch.object(threading.Thread, "join", joined):
        yield


class _Replays:
    """What `capture` tells."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    def begin_capture(self, token: int, thread: int) -> None:
        """Nothing happens yet."""

    def end_capture(self, token: int, *, succeeded: bool) -> None:
        """Nor now."""

    @contextlib.contextmanager
    def replaying(self) -> Generator[None]:
        """Inside the governor's section, which was there before."""
        self._listener.replayed()
        yield


@contextlib.contextmanager
def on_replays(listener: Listener) -> Generator[None]:
    """Replays of graphs are told of."""
    replays = _Replays(listener)
    capture.listen(replays)
    try:
        yield
    finally:
        capture.ignore(replays)


# ---------------------------------------------------------------- torch's streams

_told: list[Listener] = []


@contextlib.contextmanager
def on_torch_streams(listener: Listener) -> Generator[None]:
    """Events, waits and synchronisation of torch's streams are told of. Without CUDA there are none."""
    if torch.cuda.is_available():
        _install()
    _told.append(listener)
    try:
        yield
    finally:
        _told.remove(listener)


@functools.cache
def _install() -> None:
    from torch.cuda import _gpu_trace as trace

    trace.register_callback_for_event_record(_event_record)
    trace.register_callback_for_event_wait(_event_wait)
    trace.register_callback_for_event_synchronization(_event_synchronization)
    trace.register_callback_for_stream_synchronization(_stream_synchronization)
    trace.register_callback_for_device_synchronization(_device_synchronization)
    torch._C._activate_gpu_trace()


def _event_record(event: int, stream: int) -> None:
    for one in list(_told):
        with one.lock:
            one.ledger.recorded(event, _torchs(one, stream))


def _event_wait(event: int, stream: int) -> None:
    for one in list(_told):
        with one.lock:
            one.ledger.waited(_torchs(one, stream), event)


def _event_synchronization(event: int) -> None:
    for one in list(_told):
        with one.lock:
            one.ledger.host_waited(one.thread(), event)


def _stream_synchronization(stream: int) -> None:
    for one in list(_told):
        with one.lock:
            one.ledger.synchronized(one.thread(), [_torchs(one, stream)])


def _device_synchronization() -> None:
    for one in list(_told):
        with one.lock:
            one.ledger.synchronized(one.thread())


def _torchs(listener: Listener, handle: int) -> str:
    # a handle says nothing of its device; the default stream's is 0 on each
    return listener.stream(f"cuda:{torch.cuda.current_device()}", handle)


# ---------------------------------------------------------------- the governor


class Calls:
    """The CUDA driver of one port; the calls that order something are told of as they are made, if they succeed.

    Stands for the module itself wherever that is a key.
    """

    def __init__(self, driver: Any, listener: Listener, device: str) -> None:
        self._driver, self._listener, self._device = driver, listener, device

    def __eq__(self, other: object) -> bool:
        return other is self._driver or other is self

    def __hash__(self) -> int:
        return hash(self._driver)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._driver, name)

    def _make(self, call: Callable[..., Any], arguments: tuple[Any, ...], tell: Callable[..., None], *what: Any) -> Any:
        with self._listener.lock:
            answer = call(*arguments)
            if not int(answer[0]):
                tell(*what)
        return answer

    def _stream(self, handle: Any) -> str:
        return self._listener.stream(self._device, int(handle))

    def cuCtxRecordEvent(self, context: Any, event: Any) -> Any:
        told = self._listener.ledger.recorded_all, event_key(event), self._device
        return self._make(self._driver.cuCtxRecordEvent, (context, event), *told)

    def cuCtxWaitEvent(self, context: Any, event: Any) -> Any:
        told = self._listener.ledger.waited_all, event_key(event), self._device
        return self._make(self._driver.cuCtxWaitEvent, (context, event), *told)

    def cuEventRecord(self, event: Any, stream: Any) -> Any:
        told = self._listener.ledger.recorded, event_key(event), self._stream(stream)
        return self._make(self._driver.cuEventRecord, (event, stream), *told)

    def cuStreamWaitEvent(self, stream: Any, event: Any, flags: int) -> Any:
        told = self._listener.ledger.waited, self._stream(stream), event_key(event)
        return self._make(self._driver.cuStreamWaitEvent, (stream, event, flags), *told)

    def cuEventQuery(self, event: Any) -> Any:
        told = self._listener.ledger.host_waited, self._listener.thread(), event_key(event)
        return self._make(self._driver.cuEventQuery, (event,), *told)

    # told of before: they wait for what is there now, and others must be able to go on meanwhile

    def cuEventSynchronize(self, event: Any) -> Any:
        with self._listener.lock:
            self._listener.ledger.host_waited(self._listener.thread(), event_key(event))
        return self._driver.cuEventSynchronize(event)

    def cuStreamSynchronize(self, stream: Any) -> Any:
        with self._listener.lock:
            self._listener.ledger.synchronized(self._listener.thread(), [self._stream(stream)])
        return self._driver.cuStreamSynchronize(stream)


def event_key(event: Any) -> int:
    """By which an event is known, whoever made it."""
    try:
        return int(event)
    except TypeError:
        return id(event)


class Launches:
    """`Streams` of one port; what the governor launches is told of where it goes."""

    def __init__(self, streams: Any, listener: Listener, device: str) -> None:
        self._streams, self._listener, self._device = streams, listener, device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._streams, name)

    def enqueue(self, index: int, stream: int, work: Callable[[], None]) -> None:
        self._listener.enqueued(self._device, stream)
        self._streams.enqueue(index, stream, work)


@contextlib.contextmanager
def on_governor(listener: Listener, driver: Driver, devices: DeviceSet) -> Generator[None]:
    """Operations of a governor and the calls that they end in are told of."""
    replaced: list[tuple[Any, str, Any]] = []

    def follow(port: Any) -> Device:
        if port.barrier.has_events:
            replaced.extend(((port, "_driver", port._driver), (port, "_streams", port._streams)))
            port._driver = Calls(port._driver, listener, port.name)
            port._streams = Launches(port._streams, listener, port.name)
        found: Device = port
        return found

    opened, change, wait, table = devices._open, driver._change, driver._await, dict(driver._table)

    def open_one(name: str) -> Device:
        return follow(opened(name))

    def changing(op: Change) -> Any:
        return change(listener.changed(op))

    def awaiting(op: Await, shield: Shield | None) -> Any:
        return wait(listener.changed(op), shield)

    for port in devices.values():
        follow(port)
    followed: dict[Any, Any] = {kind: functools.partial(listener.performed, perform=table[kind]) for kind in _OF_BYTES}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(driver._table, {**followed, Change: changing}))
        stack.enter_context(mock.patch.object(devices, "_open", open_one))
        stack.enter_context(mock.patch.object(driver, "_change", changing))
        stack.enter_context(mock.patch.object(driver, "_await", awaiting))
        try:
            yield
        finally:
            for owner, name, value in replaced:
                setattr(owner, name, value)


_OF_BYTES = (Survey, Copy, Examine, Inspect, ReadLive, Transfer)
