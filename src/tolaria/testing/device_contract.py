"""Whether a `Device` port keeps its contract (`tolaria.device`): for ports of your own.

    check_device(MyDevice("cuda:0"))

in a test says by name which sentence is broken. Nothing is hoped for: work is held back on the device, and what ought
to stand behind it must not get through. On a CUDA device `Gate` holds it; other machines bring a `Bench` of their own,
which is also how the ports are checked over a simulated driver.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch

from tolaria.device import Device, HostDevice, QueuedDevice
from tolaria.errors import UnsupportedState
from tolaria.operations import Barrier
from tolaria.testing.bench import Bench, CudaBench
from tolaria.testing.contract import Examination

RULES: Mapping[str, str] = {
    "name": "`name` is a device as torch spells it.",
    "barrier": "`barrier` is a kind that the protocol knows, and the port has the methods that this kind needs.",
    "enqueue": "`enqueue` calls its work once.",
    "enqueue: order": "What `enqueue` launches runs in the order in which it was launched.",
    "enqueue: errors": "What the work raises comes out, and the port goes on.",
    "on_stream": "What is launched inside `on_stream` is ordered behind what `enqueue` launched before.",
    "on_stream: errors": "An error inside `on_stream` comes out, and the caller's stream is current again.",
    "transfer": "`transfer` calls its work once, behind the governor's copies so far.",
    "transfer: end": "`transfer` answers the event of its end, or None when it is over.",
    "transfer: alone": "Nothing else waits for a transfer.",
    "synchronize": "`synchronize` returns when the governor's work on this device is done.",
    "synchronize: all": "With the `blocking` barrier `synchronize` returns when all work of the device is done.",
    "copy": "`copy` moves each source into the destination of the same index, and is done when it returns.",
    "copy: nothing else": "`copy` writes nothing else.",
    "context_record": "`context_record` covers the work of all streams of the device so far.",
    "context_wait": "`context_wait` makes all later work of all streams of the device wait.",
    "stream_record": "`stream_record` covers the governor's own work so far.",
    "stream_record: alone": "`stream_record` covers nobody else's work.",
    "stream_wait": "`stream_wait` makes later work of the governor's own wait.",
    "caller_wait": "`caller_wait` makes later work of the caller's current stream wait.",
    "caller_wait: alone": "`caller_wait` makes no other stream wait.",
    "host_wait": "`host_wait` blocks the host until the event has passed.",
    "mark": "`mark` covers the work of the caller's current stream so far.",
    "has_passed": "`has_passed` is false until the device has reached the event, and true behind `host_wait`.",
    "elapsed_ms": "`elapsed_ms` is a number of milliseconds, not below zero.",
    "waits for nothing": "Only `host_wait`, `synchronize` and `close` block the host.",
    "close": "`close` waits until nothing of the governor's is under way.",
    "close: twice": "A second `close` does nothing.",
}
"""The contract, sentence by sentence."""

_ALWAYS = ("synchronize", "enqueue", "transfer", "on_stream", "close")
_NEEDED: Mapping[Barrier, tuple[str, ...]] = {
    Barrier.HOST: (*_ALWAYS, "copy"),
    Barrier.BLOCKING: _ALWAYS,
    Barrier.CONTEXT: (
        *_ALWAYS,
        "context_record",
        "context_wait",
        "stream_record",
        "stream_wait",
        "caller_wait",
        "host_wait",
        "mark",
        "has_passed",
        "elapsed_ms",
    ),
}
_LARGE_BYTES = 17 * 2**20
_GUARD, _FILL = 64, 171


def check_device(device: Device, bench: Bench | None = None) -> None:
    """Use a port as the protocol does, and look whether it keeps every sentence of `RULES` that its barrier has.

    The port should be fresh; it is closed when this returns. On a CUDA device nothing else should be running there, and
    `gates.ENVIRONMENT` ought to be set before CUDA starts.

    Args:
        device: The port.
        bench: What stands around it. Needed for `blocking` and `context` on anything but a CUDA device.

    Raises:
        ContractBroken: One or more sentences do not hold; `rules` has their names.
        UnsupportedState: Work cannot be held back here, so nothing could be shown.
    """
    advice = "docs/testing.md says what a port is; the protocol is unsound on this one."
    examination = Examination(f"checking the port {type(device).__name__} against its contract", RULES, advice)
    kind = _kind(device, examination)
    if kind is None:
        examination.conclude()
        return
    if kind is Barrier.HOST:
        _at_once(device, examination)
        _copies(cast("HostDevice", device), examination)
    else:
        _Queued(device, kind, _bench_for(device) if bench is None else bench, examination).check()
    with examination.trying("close: twice"):
        device.close()
        device.close()
    examination.conclude()


def _kind(device: Device, examination: Examination) -> Barrier | None:
    """The barrier, if the port has what that needs."""
    with examination.trying("name"):
        spelled = str(torch.device(device.name))
        examination.expect("name", spelled == device.name, f"{device.name!r}, which torch spells {spelled!r}")
    kind = getattr(device, "barrier", None)
    needed = _NEEDED.get(kind) if isinstance(kind, Barrier) else None
    if not examination.expect("barrier", needed is not None, f"barrier is {kind!r}"):
        return None
    missing = [name for name in needed or () if not callable(getattr(device, name, None))]
    return kind if examination.expect("barrier", not missing, f"{kind} without {missing}") else None


def _bench_for(device: Device) -> Bench:
    if torch.device(device.name).type != "cuda":
        raise UnsupportedState(
            "checking a port",
            f"work cannot be held back on {device.name}, so nothing could be shown",
            "Pass a bench of your own.",
        )
    return CudaBench(device.name)


class _Expected(Exception):
    """Raised by work on purpose."""


def _raise() -> None:
    raise _Expected


def _fill(tensor: torch.Tensor, value: float) -> Callable[[], None]:
    """Work that writes a value."""

    def work() -> None:
        tensor.fill_(value)

    return work


def _move(destination: torch.Tensor, source: torch.Tensor) -> Callable[[], None]:
    """Work that copies."""

    def work() -> None:
        destination.copy_(source)

    return work


def _at_once(device: Device, examination: Examination) -> None:
    """What holds without a queue: work is called once and its errors come out."""
    for rule, call in (("enqueue", device.enqueue), ("transfer", device.transfer)):
        calls: list[int] = []
        with examination.trying(rule):
            answer: Any = cast("Any", call)(lambda calls=calls: calls.append(threading.get_ident()))
            expected = [threading.get_ident()]
            examination.expect(rule, calls == expected, f"called {len(calls)} times, on threads {calls}")
            if rule == "transfer":
                examination.expect("transfer: end", answer is None, f"answered {answer!r}, it is over")
    examination.expect("enqueue: errors", _comes_out(lambda: device.enqueue(_raise)), "an error was swallowed")
    examination.expect("enqueue: errors", _comes_out(lambda: device.transfer(_raise)), "`transfer` swallowed an error")
    examination.expect("on_stream: errors", _comes_out(lambda: _raise_inside(device)), "an error was swallowed")
    with examination.trying("synchronize"):
        device.synchronize()


def _comes_out(call: Callable[[], Any]) -> bool:
    try:
        call()
    except _Expected:
        return True
    except Exception:
        return False
    return False


def _raise_inside(device: Device) -> None:
    with device.on_stream():
        raise _Expected


def _copies(device: HostDevice, examination: Examination) -> None:
    """Nothing, many sizes at odd addresses, and more than one thread would move alone."""
    batches: tuple[list[int], ...] = ([], [0, 1, 3, 64, 1000, 4097, 70_001], [_LARGE_BYTES + 5, 7])
    for sizes in batches:
        sources = [_pattern(size, number) for number, size in enumerate(sizes)]
        kept = [source.clone() for source in sources]
        around = [torch.full((size + 2 * _GUARD + 1,), _FILL, dtype=torch.uint8) for size in sizes]
        inside = [whole[_GUARD + 1 : _GUARD + 1 + size] for whole, size in zip(around, sizes, strict=True)]
        with examination.trying("copy"):
            device.copy(inside, sources)
            for size, destination, source in zip(sizes, inside, kept, strict=True):
                wrong = int((destination != source).sum())
                examination.expect("copy", not wrong, f"{wrong} of {size} bytes are wrong behind `copy`")
            for size, whole in zip(sizes, around, strict=True):
                guards = torch.cat([whole[: _GUARD + 1], whole[_GUARD + 1 + size :]])
                examination.expect(
                    "copy: nothing else", bool((guards == _FILL).all()), f"bytes beside a destination of {size} changed"
                )
            untouched = all(torch.equal(a, b) for a, b in zip(sources, kept, strict=True))
            examination.expect("copy: nothing else", untouched, "a source has changed")


def _pattern(size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)


class _Queued:
    """The scenarios of a port that works asynchronously. Each begins and ends with an idle device."""

    def __init__(self, device: Device, kind: Barrier, bench: Bench, examination: Examination) -> None:
        self.device, self.kind, self.bench, self.examination = device, kind, bench, examination
        self.queued = cast("QueuedDevice", device)
        self.x, self.y, self.z = bench.tensor(), bench.tensor(), bench.tensor()
        self.arrived = bench.tensor(on_host=True)

    def check(self) -> None:
        scenarios: list[tuple[str, Callable[[], None]]] = [
            ("enqueue", self.enqueue),
            ("on_stream", self.on_stream),
            ("synchronize", self.synchronize),
        ]
        if self.kind is Barrier.BLOCKING:
            scenarios += [("synchronize: all", self.synchronize_all), ("transfer", self.transfer_at_once)]
        else:
            scenarios += [
                ("transfer", self.transfer),
                ("transfer: alone", self.transfer_alone),
                ("context_record", self.context_record),
                ("context_wait", self.context_wait),
                ("stream_record", self.stream_record),
                ("stream_wait", self.stream_wait),
                ("caller_wait", self.caller_wait),
                ("caller_wait: alone", self.caller_wait_alone),
                ("host_wait", self.host_wait),
                ("mark", self.mark),
                ("elapsed_ms", self.elapsed_ms),
                ("waits for nothing", self.waits_for_nothing),
                ("close", self.close),
            ]
        for rule, scenario in scenarios:
            for tensor in (self.x, self.y, self.z, self.arrived):
                tensor.zero_()
            self.bench.finish()
            with self.examination.trying(rule):
                scenario()
            self.bench.finish()

    def held(self, tensor: torch.Tensor, value: float) -> Callable[[], None]:
        """Work that writes a value once it is let through."""

        def work() -> None:
            self.bench.hold()
            tensor.fill_(value)

        return work

    def blocks(self, rule: str, call: Callable[[], Any], what: str, tensor: torch.Tensor, value: float) -> None:
        """`call` must not return before what is held is let through, and then `tensor` holds `value`."""
        early = self.bench.returns(call)
        self.bench.finish()
        self.examination.expect(rule, not early, f"{what} was held back, and it returned")
        found = tensor.tolist()
        self.examination.expect(rule, found == [value] * len(found), f"{what}: read {found[0]:g}, expected {value:g}")

    # ------------------------------------------------------------ every port

    def enqueue(self) -> None:
        calls: list[int] = []
        self.device.enqueue(lambda: calls.append(1))
        self.device.enqueue(_fill(self.x, 1))
        self.device.enqueue(_move(self.y, self.x))
        self.device.enqueue(_fill(self.x, 2))
        before = self.bench.current()
        self.device.synchronize()
        self.examination.expect("enqueue", calls == [1], f"called {len(calls)} times")
        found = self.x.tolist()[0], self.y.tolist()[0]
        self.examination.expect("enqueue: order", found == (2.0, 1.0), f"read {found}, expected (2.0, 1.0)")

        def fails() -> None:
            self.device.enqueue(_raise)
            self.device.synchronize()

        self.examination.expect("enqueue: errors", _comes_out(fails), "an error was swallowed")
        self.device.enqueue(_fill(self.x, 3))
        self.device.synchronize()
        goes_on = self.x.tolist()[0] == 3.0 and self.bench.current() == before
        self.examination.expect("enqueue: errors", goes_on, "behind an error it does not go on as before")

    def on_stream(self) -> None:
        before = self.bench.current()
        self.device.enqueue(self.held(self.x, 1))
        with self.device.on_stream():
            self.y.copy_(self.x)
            inside = self.bench.current()
        self.blocks("on_stream", self.device.synchronize, "work enqueued before", self.y, 1)
        if self.kind is Barrier.CONTEXT:
            self.examination.expect("on_stream", inside != before, "the caller's own stream is current inside")
        out = _comes_out(lambda: _raise_inside(self.device))
        self.examination.expect("on_stream: errors", out, "an error was swallowed")
        self.examination.expect("on_stream: errors", self.bench.current() == before, "another stream stays current")

    def synchronize(self) -> None:
        self.device.enqueue(self.held(self.x, 1))
        self.blocks("synchronize", self.device.synchronize, "the governor's work", self.x, 1)

    def synchronize_all(self) -> None:
        self.bench.launch(self.bench.stream(), self.held(self.x, 1))
        self.blocks("synchronize: all", self.device.synchronize, "work of a stream of the user's", self.x, 1)

    def transfer_at_once(self) -> None:
        answers: list[Any] = []
        self.x.fill_(1)
        self.bench.finish()

        def move() -> None:
            self.bench.hold()
            self.arrived.copy_(self.x, non_blocking=True)

        call = lambda: answers.append(self.device.transfer(move))  # noqa: E731
        self.blocks("transfer: end", call, "the transfer", self.arrived, 1)
        self.examination.expect("transfer: end", answers == [None], f"answered {answers}, it is over")

    # ------------------------------------------------------------ context

    def transfer(self) -> None:
        calls: list[int] = []

        def move() -> None:
            calls.append(1)
            self.arrived.copy_(self.x, non_blocking=True)

        self.device.enqueue(self.held(self.x, 1))
        end = self.device.transfer(move)
        if not self.examination.expect("transfer: end", end is not None, "answered None, it is not over"):
            return
        self.blocks(
            "transfer", lambda: self.queued.host_wait(end), "a copy of the governor's before it", self.arrived, 1
        )
        self.examination.expect("transfer", calls == [1], f"called {len(calls)} times")

    def transfer_alone(self) -> None:
        self.device.transfer(self.held(self.x, 1))
        alone = self.bench.returns(self.device.synchronize)
        self.examination.expect("transfer: alone", alone, "the governor's own work waits for a transfer")

    def context_record(self) -> None:
        one, other = self.bench.stream(), self.bench.stream()
        self.bench.launch(other, _fill(self.y, 2))
        self.bench.launch(one, self.held(self.x, 1))
        event = self.queued.context_record()
        passed = self.queued.has_passed(event)
        self.examination.expect("context_record", not passed, "it has passed ahead of a stream that is held back")
        self.blocks("context_record", lambda: self.queued.host_wait(event), "a stream of the user's", self.x, 1)

    def context_wait(self) -> None:
        for stream in (self.bench.stream(), self.bench.stream()):
            self.x.zero_()
            self.bench.finish()
            self.device.enqueue(self.held(self.x, 1))
            self.queued.context_wait(self.queued.stream_record())
            self.bench.launch(stream, _move(self.y, self.x))
            self.blocks("context_wait", lambda s=stream: self.bench.wait(s), "what all streams wait for", self.y, 1)

    def stream_record(self) -> None:
        self.device.enqueue(self.held(self.x, 1))
        event = self.queued.stream_record()
        passed = self.queued.has_passed(event)
        self.examination.expect("stream_record", not passed, "it has passed ahead of what it covers")
        self.blocks("stream_record", lambda: self.queued.host_wait(event), "the governor's work", self.x, 1)
        self.bench.launch(self.bench.stream(), self.held(self.x, 2))
        later = self.queued.stream_record()
        alone = self.bench.returns(lambda: self.queued.host_wait(later))
        self.examination.expect("stream_record: alone", alone, "it waits for a stream of the user's")

    def stream_wait(self) -> None:
        stream = self.bench.stream()
        self.bench.launch(stream, self.held(self.x, 1))
        with self.bench.on(stream):
            event = self.queued.mark()
        self.queued.stream_wait(event)
        self.device.enqueue(_move(self.y, self.x))
        self.blocks("stream_wait", self.device.synchronize, "what it was to wait for", self.y, 1)

    def caller_wait(self) -> None:
        stream = self.bench.stream()
        self.device.enqueue(self.held(self.x, 1))
        event = self.queued.stream_record()
        with self.bench.on(stream):
            self.queued.caller_wait(event)
        self.bench.launch(stream, _move(self.y, self.x))
        self.blocks("caller_wait", lambda: self.bench.wait(stream), "what it was to wait for", self.y, 1)

    def caller_wait_alone(self) -> None:
        stream, other = self.bench.stream(), self.bench.stream()
        self.device.enqueue(self.held(self.x, 1))
        event = self.queued.stream_record()
        with self.bench.on(stream):
            self.queued.caller_wait(event)
        self.bench.launch(other, _fill(self.z, 1))
        alone = self.bench.returns(lambda: self.bench.wait(other))
        self.examination.expect("caller_wait: alone", alone, "another stream waits as well")

    def host_wait(self) -> None:
        self.device.enqueue(self.held(self.x, 1))
        event = self.queued.stream_record()
        self.blocks("host_wait", lambda: self.queued.host_wait(event), "what it waits for", self.x, 1)
        self.queued.host_wait(event)
        self.examination.expect("has_passed", self.queued.has_passed(event), "false behind `host_wait`")

    def mark(self) -> None:
        stream = self.bench.stream()
        self.bench.launch(stream, self.held(self.x, 1))
        with self.bench.on(stream):
            event = self.queued.mark()
        self.examination.expect("has_passed", not self.queued.has_passed(event), "true ahead of work that is held back")
        self.blocks("mark", lambda: self.queued.host_wait(event), "the caller's stream", self.x, 1)

    def elapsed_ms(self) -> None:
        began = self.queued.stream_record()
        self.device.enqueue(_fill(self.x, 1))
        ended = self.queued.stream_record()
        for event in (began, ended):
            self.queued.host_wait(event)
        found = self.queued.elapsed_ms(began, ended)
        self.examination.expect("elapsed_ms", math.isfinite(found) and found >= 0, f"answered {found}")

    def waits_for_nothing(self) -> None:
        """A stream of the user's is held; what orders must not stand behind it."""
        stream, caller = self.bench.stream(), self.bench.stream()
        self.bench.launch(stream, self.held(self.x, 1))

        def order() -> None:
            everywhere = self.queued.context_record()
            own = self.queued.stream_record()
            self.queued.stream_wait(own)
            self.queued.context_wait(own)
            with self.bench.on(caller):
                self.queued.caller_wait(own)
                self.queued.mark()
            self.queued.has_passed(everywhere)
            self.device.enqueue(_fill(self.y, 1))
            self.device.transfer(lambda: None)

        self.examination.expect("waits for nothing", self.bench.returns(order), "the host stood behind a held stream")

    def close(self) -> None:
        self.device.enqueue(self.held(self.x, 1))
        self.blocks("close", self.device.close, "the governor's work", self.x, 1)
