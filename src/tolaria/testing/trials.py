"""Trials on a CUDA device: each race forced by a gate, first without protection (it must be seen), then with it.

    python -m tolaria.testing.trials context                  # or blocking
    python -m tolaria.testing.trials context held between     # trials with one of these words in their names

prints one JSON object per trial. Meant to be run by `gates.run_in_subprocess`, which sets what CUDA needs before it
starts and ends what hangs. Nothing here depends on time: not on how long a copy takes, nor on who else uses the device.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict
from typing import Any, cast
from unittest import mock

import torch

from tolaria import CaptureInProgress, capture, ring
from tolaria.cuda import ContextDevice
from tolaria.driver import Driver
from tolaria.route import DeviceRoute
from tolaria.testing.gates import Gate, Trial, gets_through
from tolaria.testing.picture import (
    NEW,
    OLD,
    BarrierName,
    Picture,
    Values,
    at_synchronize,
    held,
    no_section,
    no_wait,
    nothing,
    raw_stream,
    settle,
    submitted,
    unordered,
)

_ROUNDS = 4
_PATIENCE_S = 30.0
_OTHERS = 5.0  # what somebody else writes into memory that was given to him
_MOST_ASKED = 64  # allocations until the freed memory is among them
_LARGE = 3 << 20  # elements: the allocator cuts such tensors from nothing larger, if it has a block of that size


# ---------------------------------------------------------------- the trials


@contextlib.contextmanager
def _gate() -> Generator[Gate]:
    """A gate that the trial alone opens. What came of one that the watchdog had to open depends on the time."""
    with Gate() as gate:
        yield gate
    assert not gate.was_forced, "the watchdog had to open the gate: nothing can be shown"


def no_aliasing(picture: Picture, barrier: BarrierName) -> tuple[str, str]:
    """The control of all others: a stream that stands behind no gate gets through."""
    with _gate() as gate:
        picture.write_gated(gate)
        free = gets_through(picture.control, _PATIENCE_S)
        still = not gate.is_open
    picture.governor.execute_rollback().wait()
    return "none needed", "ok" if free and still else "streams share a hardware queue: nothing can be shown"


def torn_write(picture: Picture, barrier: BarrierName) -> tuple[str, str]:
    """Steps of another thread on many streams, half done when a rollback comes."""
    seen = []
    for _ in range(_ROUNDS):
        with unordered(barrier), _gate() as gate:
            picture.write_gated(gate)
            picture.governor.execute_rollback()
            settle(picture.governor, barrier)
            gate.open()
            seen.append(picture.values())
        picture.governor.execute_rollback().wait()
    whole = []
    for _ in range(_ROUNDS):
        with _gate() as gate:
            picture.write_gated(gate)
            submitted(gate, barrier, picture.governor.execute_rollback)
            early = barrier != "context" or not gate.is_open
            read = picture.read(picture.reader)
            gate.open()
            whole.append(picture.values() == read.tolist() == [OLD] * 4 and early)
    return _judged(seen, [OLD, OLD, NEW, NEW], whole)


def torn_snapshot(picture: Picture, barrier: BarrierName) -> tuple[str, str]:
    """A snapshot of a step that is half done."""
    seen: list[Values] = []
    whole: list[bool] = []
    for protected in (False, True):
        for _ in range(_ROUNDS):
            picture.governor.execute_rollback().wait()
            with contextlib.ExitStack() as stack:
                gate = stack.enter_context(_gate())
                if not protected:
                    stack.enter_context(unordered(barrier))
                picture.write_gated(gate)
                if protected:
                    info = submitted(gate, barrier, picture.governor.snapshot)
                else:
                    info = picture.governor.snapshot()
                    settle(picture.governor, barrier)
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
                gate = stack.enter_context(_gate())
                stack.enter_context(held(gate))
                picture.spoil()
                if barrier == "blocking":
                    # the host waits for the copies, so nobody could open the gate but this wait itself
                    stack.enter_context(at_synchronize(nothing, gate.open if protected else None))
                elif not protected:
                    stack.enter_context(mock.patch.object(ContextDevice, "context_wait", no_wait))
                picture.governor.execute_rollback()
                early = gate.is_open is (barrier == "blocking" and protected)
                stream = raw_stream()
                read = picture.read(stream)
                if not protected:
                    stream.synchronize()
                early = early and gate.is_open is (barrier == "blocking" and protected)
                gate.open()
                torch.cuda.synchronize()
            if protected:
                whole.append(early and read.tolist() == [OLD] * 4)
            else:
                seen.append(read.tolist())
    return _judged(seen, [NEW] * 4, whole)


def freed_storage(picture: Picture, barrier: BarrierName) -> tuple[str, str]:
    """The user lets go of a parameter whose copy into a slot is held back, and its memory is asked for again.

    Without protection somebody frees the memory itself, whoever holds on to it: what is allocated next gets it.
    """
    seen = [_freed(barrier, kept=False) for _ in range(_ROUNDS)]
    whole = [_freed(barrier, kept=True) == [OLD] * 4 for _ in range(_ROUNDS)]
    return _judged(seen, [_OTHERS, _OTHERS, OLD, OLD], whole)


def _freed(barrier: BarrierName, *, kept: bool) -> Values:
    """One round, of which no memory is left behind. Answers what the slot holds."""
    subject = Picture(1, _LARGE, barrier)
    try:
        subject.warm_up()
        _spare(_LARGE)
        with contextlib.ExitStack() as stack:
            gate = stack.enter_context(_gate())
            stack.enter_context(held(gate))

            def let_go() -> None:
                _replace_memory(subject, kept=kept)
                gate.open()

            if barrier == "blocking":  # before the wait that ends the copies
                stack.enter_context(at_synchronize(nothing, nothing, let_go))
                subject.governor.snapshot()
            else:
                subject.governor.snapshot()
                let_go()
            torch.cuda.synchronize()
        return _newest_held(subject)
    finally:
        subject.governor.close()


def _replace_memory(picture: Picture, *, kept: bool) -> None:
    """Let go of the first parameter's memory, or free it, and fill on another stream what is allocated next.

    As often as it takes until all of that memory was given out again: which of the free blocks comes first depends on
    what was allocated before, in this process.
    """
    memory, size = picture.model[0].data_ptr(), picture.share * 4
    if kept:
        picture.model[0].data = torch.empty(0, device="cuda")
    else:
        picture.model[0].untyped_storage().resize_(0)
    others: list[torch.Tensor] = []
    given_out = 0
    while given_out < size and len(others) < _MOST_ASKED:
        others.append(torch.empty(picture.share, device="cuda"))
        given_out += max(0, size - abs(others[-1].data_ptr() - memory))
    assert kept or given_out == size, "the allocator did not give the memory out again: nothing can be shown"
    with torch.cuda.stream(picture.control):
        for other in others:
            other.fill_(_OTHERS)
    picture.control.synchronize()


def _spare(elements: int) -> None:
    """Cache a block that is somewhat larger, and none that fits as well."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.empty(elements + (1 << 20), device="cuda")


def _newest_held(picture: Picture) -> Values:
    """Smallest and largest element of each parameter in the newest snapshot's slot."""
    keeper = picture.governor._keeper
    newest = ring.newest_good(keeper.ring)
    assert newest is not None
    held_bytes = keeper.vault.slots[newest.index].arena
    assert held_bytes is not None
    views = [view.view(torch.float32) for view in held_bytes.views if view.numel()]
    return [float(extreme) for view in views for extreme in view.aminmax()]


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
                gate = stack.enter_context(_gate())
                if not protected:
                    stack.enter_context(unordered(barrier))
                gate.close(stream)
                with torch.cuda.stream(stream):
                    graph.replay()
                if protected:
                    submitted(gate, barrier, picture.governor.execute_rollback)
                else:
                    picture.governor.execute_rollback()
                    settle(picture.governor, barrier)
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
                gate = stack.enter_context(_gate())
                late = _Late(picture, gate, waits=not protected)
                if not protected:
                    stack.enter_context(mock.patch.object(Driver, "open_section", no_section))
                stack.enter_context(mock.patch.object(DeviceRoute, "restore", late.before(DeviceRoute.restore)))
                if not protected and barrier == "blocking":
                    # it waits for everything after its copies: let the copies through, then the held step
                    stack.enter_context(at_synchronize(nothing, lambda g=gate: (_wait_here(), g.open())))
                picture.governor.execute_rollback()
                if not protected:  # the held half of the step comes last, however long the copies take
                    settle(picture.governor, barrier)
                gate.open()
                late.join()
                values = picture.values()
            if protected:
                # it comes after the rollback, so it writes everything
                whole.append(not late.got_in and values == [NEW] * 4)
            else:
                seen.append(values)
            picture.governor.execute_rollback().wait()
    return _judged(seen, [OLD, OLD, NEW, NEW], whole)


def _wait_here() -> None:
    torch.cuda.current_stream().synchronize()


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

    def join(self) -> None:
        """Wait until its step is submitted."""
        self.thread.join(_PATIENCE_S)
        assert not self.thread.is_alive(), "the other thread's step did not come to its end: nothing can be shown"

    def before(self, original: Callable[..., None]) -> Callable[..., None]:
        """A copy that starts the thread first; without protection it lets the thread get done."""

        def copy(route: Any) -> None:
            if self.thread.ident is None:
                self.thread.start()
                assert self.asks.wait(_PATIENCE_S)
                if self.waits:
                    self.join()
            original(route)
            self.got_in = self.got_in or self.was_in

        return copy


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
        other = next(values for values in seen if values != expected)
        return control, f"without protection nothing was torn in {len(seen) - torn} rounds ({other}): nothing was shown"
    return control, "ok" if all(whole) else f"torn {len(whole) - sum(whole)} of {len(whole)}"


TRIALS: dict[str, tuple[Callable[[Picture, BarrierName], tuple[str, str]], tuple[str, ...], int]] = {
    "no aliasing": (no_aliasing, ("context", "blocking"), 30),
    "rollback over held steps, 1 stream": (torn_write, ("context", "blocking"), 1),
    "rollback over held steps, 30 streams": (torn_write, ("context", "blocking"), 30),
    "snapshot of held steps": (torn_snapshot, ("context", "blocking"), 8),
    "reader on a later raw stream": (post_edge, ("context", "blocking"), 1),
    "storage freed behind a copy": (freed_storage, ("context", "blocking"), 1),
    "graph replay in flight": (replay_in_flight, ("context", "blocking"), 1),
    "step between the barriers": (window, ("context", "blocking"), 1),
    "capture in progress": (capture_in_progress, ("context", "blocking"), 1),
}
"""Name -> (trial, barriers, streams that are held), in the order in which they are made."""


def main(barrier: BarrierName, words: Sequence[str] = ()) -> None:
    """Make every trial with one barrier, or those with one of the words in their names."""
    logging.getLogger("tolaria").setLevel(logging.CRITICAL)
    for name, (trial, barriers, num_streams) in TRIALS.items():
        if barrier not in barriers or (words and not any(word in name for word in words)):
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
    main(cast("BarrierName", sys.argv[1]), sys.argv[2:])
