"""Trials on a CUDA device: each race forced by a gate, first without protection (it must be seen), then with it.

    python -m tolaria.testing.trials context

prints one JSON object per trial. Meant to be run by `gates.run_in_subprocess`, which sets what CUDA needs before it
starts and ends what hangs. No assertion here depends on time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Generator
from dataclasses import asdict
from typing import Any, Literal, cast
from unittest import mock

import torch
from torch import nn

from tolaria import CaptureInProgress, GovernorConfig, TolariaGovernor, capture, judge
from tolaria.cuda import ContextDevice
from tolaria.device import BlockingDevice
from tolaria.driver import Driver
from tolaria.route import DeviceRoute
from tolaria.testing.gates import Gate, Trial, distinct_streams, driver, gets_through

OLD, NEW = 1.0, 2.0
_ROUNDS = 4
_PATIENCE_S = 30.0
BarrierName = Literal["context", "blocking"]
Values = list[float]


class Picture:
    """A model of two parameters whose every element tells which step it is from."""

    def __init__(self, num_streams: int, elements: int = 120 << 15, barrier: BarrierName | None = None) -> None:
        self.model = nn.ParameterList([nn.Parameter(torch.full((elements,), OLD, device="cuda")) for _ in range(2)])
        config = GovernorConfig(rng="keep", barrier=barrier)
        self.governor = TolariaGovernor(self.model, config=config, detector=judge.non_finite())
        *self.writers, self.reader, self.control = distinct_streams(num_streams + 2)
        self.share = elements // num_streams
        torch.cuda.synchronize()

    def part(self, parameter: int, number: int) -> torch.Tensor:
        """The share of one stream in one parameter."""
        part: torch.Tensor = self.model[parameter][number * self.share : (number + 1) * self.share]
        return part

    def write_gated(self, gate: Gate, value: float = NEW) -> None:
        """From another thread: each stream writes its share of one parameter, waits, writes its share of the other."""

        def run() -> None:
            with torch.no_grad(), self.governor.using(write=True):
                for number, stream in enumerate(self.writers):
                    with torch.cuda.stream(stream):
                        self.part(0, number).fill_(value)
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


def _no_wait(device: ContextDevice, event: Any) -> None:
    pass


def _no_synchronize(device: BlockingDevice) -> None:
    pass


def _no_section(self: Driver, *_: Any) -> int:
    return self.state.epoch


def unordered(barrier: BarrierName) -> contextlib.ExitStack:
    """Inside, the governor orders nothing on the device."""
    stack = contextlib.ExitStack()
    if barrier == "context":
        # an event of the governor's own, idle stream in the place of one that covers all streams
        stack.enter_context(mock.patch.object(ContextDevice, "context_record", ContextDevice.stream_record))
        stack.enter_context(mock.patch.object(ContextDevice, "context_wait", _no_wait))
    else:
        stack.enter_context(mock.patch.object(BlockingDevice, "synchronize", _no_synchronize))
    return stack


@contextlib.contextmanager
def held(gate: Gate) -> Generator[None]:
    """Inside, the governor's own stream is held back just before its copies."""

    def holding(original: Any) -> Any:
        def copy(route: Any, *answer: Any) -> None:
            gate.close(torch.cuda.ExternalStream(int(route._port._stream)))
            original(route, *answer)

        return copy

    capture, restore = holding(DeviceRoute.capture), holding(DeviceRoute.restore)
    with mock.patch.object(DeviceRoute, "capture", capture), mock.patch.object(DeviceRoute, "restore", restore):
        yield


def settle(picture: Picture, barrier: BarrierName) -> None:
    """Wait for the governor's copies alone, although other streams are held back."""
    if barrier == "context":
        for device in picture.governor._keeper.devices.values():
            device.synchronize()
    else:
        torch.cuda.current_stream().synchronize()


def submitted(picture: Picture, gate: Gate, barrier: BarrierName, work: Callable[[], Any]) -> Any:
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


# ---------------------------------------------------------------- the trials


def no_aliasing(picture: Picture, barrier: BarrierName) -> tuple[str, str]:
    """The control of all others: a stream that stands behind no gate gets through."""
    with Gate() as gate:
        picture.write_gated(gate)
        free = gets_through(picture.control)
        still = not gate.is_open
    picture.governor.execute_rollback().wait()
    return "none needed", "ok" if free and still else "streams share a hardware queue: nothing can be shown"


def torn_write(picture: Picture, barrier: BarrierName) -> tuple[str, str]:
    """Steps of another thread on many streams, half done when a rollback comes."""
    seen = []
    for _ in range(_ROUNDS):
        with unordered(barrier), Gate() as gate:
            picture.write_gated(gate)
            picture.governor.execute_rollback()
            settle(picture, barrier)
            gate.open()
            seen.append(picture.values())
        picture.governor.execute_rollback().wait()
    whole = []
    for _ in range(_ROUNDS):
        with Gate() as gate:
            picture.write_gated(gate)
            submitted(picture, gate, barrier, picture.governor.execute_rollback)
            early = barrier != "context" or not gate.is_open
            read = picture.read(picture.reader)
            gate.open()
            whole.append(picture.values() == read.tolist() == [OLD] * 4 and early and not gate.was_forced)
    return _judged(seen, [OLD, OLD, NEW, NEW], whole)


def torn_snapshot(picture: Picture, barrier: BarrierName) -> tuple[str, str]:
    """A snapshot of a step that is half done."""
    seen: list[Values] = []
    whole: list[bool] = []
    for protected in (False, True):
        for _ in range(_ROUNDS):
            picture.governor.execute_rollback().wait()
            with contextlib.ExitStack() as stack:
                gate = stack.enter_context(Gate())
                if not protected:
                    stack.enter_context(unordered(barrier))
                picture.write_gated(gate)
                if protected:
                    info = submitted(picture, gate, barrier, picture.governor.snapshot)
                else:
                    info = picture.governor.snapshot()
                    settle(picture, barrier)
                gate.open()
                torch.cuda.synchronize()
            picture.governor.execute_rollback(to=info).wait()
            values = picture.values()
            _back_to_old(picture)
            if protected:
                whole.append(values == [NEW] * 4)
            else:
                seen.append(values)
    return _judged(seen, [NEW, NEW, OLD, OLD], whole)


def _back_to_old(picture: Picture) -> None:
    """A manual snapshot of OLD is the newest again."""
    with torch.no_grad(), picture.governor.using():
        for parameter in picture.model:
            parameter.fill_(OLD)
    picture.governor.snapshot().wait("sealed")


def post_edge(picture: Picture, barrier: BarrierName) -> tuple[str, str]:
    """A reader on a raw stream that was made after the rollback had returned, while the copies are held back."""
    seen: list[Values] = []
    whole: list[bool] = []
    for protected in (False, True):
        for _ in range(_ROUNDS):
            with contextlib.ExitStack() as stack:
                gate = stack.enter_context(Gate())
                stack.enter_context(held(gate))
                picture.spoil()
                if not protected:
                    patch = mock.patch.object(ContextDevice, "context_wait", _no_wait)
                    stack.enter_context(patch)
                picture.governor.execute_rollback()
                code, raw = driver().cuStreamCreate(1)  # non-blocking, made by nobody whom torch knows
                assert int(code) == 0
                stream = torch.cuda.ExternalStream(int(raw))
                read = picture.read(stream)
                if not protected:
                    stream.synchronize()
                closed = not gate.is_open
                gate.open()
                torch.cuda.synchronize()
            if protected:
                whole.append(closed and read.tolist() == [OLD] * 4)
            else:
                seen.append(read.tolist())
    return _judged(seen, [NEW] * 4, whole)


def replay_in_flight(picture: Picture, barrier: BarrierName) -> tuple[str, str]:
    """The replay of a captured step, queued behind a gate when a rollback comes."""
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        for parameter in picture.model:
            parameter.fill_(NEW)
    torch.cuda.synchronize()
    picture.governor.execute_rollback().wait()
    stream = picture.writers[0]
    seen: list[Values] = []
    whole: list[bool] = []
    for protected in (False, True):
        for _ in range(_ROUNDS):
            with contextlib.ExitStack() as stack:
                gate = stack.enter_context(Gate())
                if not protected:
                    stack.enter_context(unordered(barrier))
                gate.close(stream)
                with torch.cuda.stream(stream):
                    graph.replay()
                if protected:
                    submitted(picture, gate, barrier, picture.governor.execute_rollback)
                else:
                    picture.governor.execute_rollback()
                    settle(picture, barrier)
                gate.open()
                values = picture.values()
            if protected:
                whole.append(values == [OLD] * 4)
            else:
                seen.append(values)
                picture.governor.execute_rollback().wait()
    return _judged(seen, [NEW] * 4, whole)


def window(picture: Picture, barrier: BarrierName) -> tuple[str, str]:
    """A step of another thread that comes between the two barriers of a rollback; without the gate it gets in."""
    seen: list[Values] = []
    whole: list[bool] = []
    for protected in (False, True):
        for _ in range(_ROUNDS):
            with contextlib.ExitStack() as stack:
                gate = stack.enter_context(Gate())
                late = _Late(picture, gate, waits=not protected)
                if not protected:
                    nothing = mock.patch.object(Driver, "open_section", _no_section)
                    stack.enter_context(nothing)
                stack.enter_context(mock.patch.object(DeviceRoute, "restore", late.before(DeviceRoute.restore)))
                if not protected and barrier == "blocking":
                    stack.enter_context(_opening_last(gate))
                picture.governor.execute_rollback()
                gate.open()
                late.thread.join(_PATIENCE_S)
                values = picture.values()
            if protected:
                # it comes after the rollback, so it writes everything
                whole.append(not late.got_in and values == [NEW] * 4)
            else:
                seen.append(values)
            picture.governor.execute_rollback().wait()
    return _judged(seen, [OLD, OLD, NEW, NEW], whole)


class _Late:
    """A thread that steps when the copies of a rollback are about to be submitted."""

    def __init__(self, picture: Picture, gate: Gate, *, waits: bool) -> None:
        self.picture, self.gate, self.waits = picture, gate, waits
        self.asks, self.was_in, self.got_in = threading.Event(), False, False
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        stream = self.picture.writers[0]
        self.asks.set()
        with torch.no_grad(), self.picture.governor.using(), torch.cuda.stream(stream):
            self.was_in = True
            self.picture.model[0].fill_(NEW)
            stream.synchronize()
            self.gate.close(stream)
            self.picture.model[1].fill_(NEW)

    def before(self, original: Callable[..., None]) -> Callable[..., None]:
        """A copy that starts the thread first; without protection it lets the thread get done."""

        def copy(route: Any) -> None:
            if self.thread.ident is None:
                self.thread.start()
                assert self.asks.wait(_PATIENCE_S)
                if self.waits:
                    self.thread.join(_PATIENCE_S)
            original(route)
            self.got_in = self.got_in or self.was_in

        return copy


@contextlib.contextmanager
def _opening_last(gate: Gate) -> Generator[None]:
    """The `blocking` barrier waits for everything after its copies: let the copies through, then the held step."""
    original, turns = BlockingDevice.synchronize, iter((False, True))

    def synchronize(device: BlockingDevice) -> None:
        if next(turns, False):
            torch.cuda.current_stream().synchronize()
            gate.open()
        original(device)

    with mock.patch.object(BlockingDevice, "synchronize", synchronize):
        yield


def capture_in_progress(picture: Picture, barrier: BarrierName) -> tuple[str, str]:
    """A rollback during a capture by another thread is refused, and the capture stays valid. The last trial.

    Without the guard the capture is invalidated, which leaves torch's allocator in a state of its own.
    """
    result = "ok"
    for mode in ("global", "thread_local", "relaxed"):
        with _Capturing(mode) as other:
            try:
                picture.governor.execute_rollback()
                result = f"{mode}: not refused"
            except CaptureInProgress:
                pass
        if not other.is_valid:
            result = f"{mode}: the capture was invalidated"
    capture.ignore(picture.governor._keeper.sections)
    with _Capturing("relaxed") as other, contextlib.suppress(Exception):  # whatever the driver says, it is too late
        picture.governor.execute_rollback()
    if other.is_valid:
        result = "without the guard the capture survived too: nothing was shown"
    return ("valid" if other.is_valid else "invalidated"), result


class _Capturing:
    """Another thread in the middle of a capture for as long as the block lasts."""

    def __init__(self, mode: str) -> None:
        self._mode, self.is_valid = mode, False
        self._begun, self._may_end = threading.Event(), threading.Event()
        self._x, self._stream = torch.zeros(8, device="cuda"), torch.cuda.Stream()
        torch.cuda.synchronize()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(self._stream):
                graph.capture_begin(capture_error_mode=self._mode)
                try:
                    self._x.add_(1)
                    self._begun.set()
                    self._may_end.wait(_PATIENCE_S)
                    self._x.add_(1)
                finally:
                    graph.capture_end()
            self.is_valid = True
        except RuntimeError:
            self._begun.set()

    def __enter__(self) -> _Capturing:
        self._thread.start()
        assert self._begun.wait(_PATIENCE_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._may_end.set()
        self._thread.join()


def _judged(seen: list[Values], expected: Values, whole: list[bool]) -> tuple[str, str]:
    """Control and result: every unprotected round must show the race, every protected one must not."""
    torn = sum(values == expected for values in seen)
    control = f"torn {torn} of {len(seen)}"
    if torn != len(seen):
        return control, f"without protection nothing was torn in {len(seen) - torn} rounds: nothing was shown"
    return control, "ok" if all(whole) else f"torn {len(whole) - sum(whole)} of {len(whole)}"


TRIALS: dict[str, tuple[Callable[[Picture, BarrierName], tuple[str, str]], tuple[str, ...], int]] = {
    "no aliasing": (no_aliasing, ("context", "blocking"), 30),
    "rollback over held steps, 1 stream": (torn_write, ("context", "blocking"), 1),
    "rollback over held steps, 30 streams": (torn_write, ("context", "blocking"), 30),
    "snapshot of held steps": (torn_snapshot, ("context", "blocking"), 8),
    "reader on a later raw stream": (post_edge, ("context",), 1),
    "graph replay in flight": (replay_in_flight, ("context", "blocking"), 1),
    "step between the barriers": (window, ("context", "blocking"), 1),
    "capture in progress": (capture_in_progress, ("context", "blocking"), 1),
}
"""Name -> (trial, barriers, streams that are held), in the order in which they are made."""


def main(barrier: BarrierName) -> None:
    """Make every trial with one barrier."""
    logging.getLogger("tolaria").setLevel(logging.CRITICAL)
    for name, (trial, barriers, num_streams) in TRIALS.items():
        if barrier not in barriers:
            continue
        try:
            picture = Picture(num_streams, barrier=barrier)
            picture.warm_up()
            control, result = trial(picture, barrier)
        except Exception as error:
            control, result = "not known", f"{type(error).__name__}: {error}"
        line = json.dumps(asdict(Trial(f"{name} [{barrier}]", control, result)))
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    os._exit(0)  # an invalidated capture leaves torch in no state to clean up


if __name__ == "__main__":
    main(cast("BarrierName", sys.argv[1]))
