"""The driver: performs the protocol's operations on a real machine. One per governor.

It owns the host state, the lock and condition variable behind `Change` and `Await`, and a table from operation to
call. It decides nothing.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable
from typing import Any, cast

import torch

from tolaria.admission import begin_capture, close_section, end_capture, open_section
from tolaria.cuda import named
from tolaria.device import Device, QueuedDevice
from tolaria.errors import QuiesceTimeout, TolariaInternalError
from tolaria.operations import (
    Await,
    CallerStreams,
    CallerWait,
    CaptureHost,
    Change,
    Check,
    ContextRecord,
    ContextWait,
    Copy,
    DeviceName,
    Examine,
    HostState,
    HostWait,
    Inspect,
    KnownRecord,
    KnownWait,
    Op,
    Protocol,
    ReadLive,
    Reserve,
    RestoreHost,
    SectionKind,
    StreamRecord,
    Streams,
    StreamWait,
    Survey,
    Synchronize,
    Transfer,
    TransferRecord,
)
from tolaria.protocol import drive
from tolaria.shield import Shield
from tolaria.snapshot import Vault

Table = dict[type[Any], Callable[[Any], Any]]
"""Calls by the kind of operation that they perform."""


class Driver:
    """Runs protocols on the calling thread.

    Args:
        state: The initial host state.
        vault: Performs what concerns the train state and slot memory.
        devices: Ports by name.

    Threads: any number may run protocols at once; the protocols order themselves through the host state.
    """

    def __init__(self, state: HostState, vault: Vault, devices: dict[str, Device]) -> None:
        self.state = state
        self._lock = threading.RLock()  # the condition's own, which is entered without a call in Python
        self._changed = threading.Condition(self._lock)
        self._num_waiting = 0  # under the lock; a notification takes longer than most changes
        queued = cast("dict[DeviceName, QueuedDevice]", devices)  # only barriers with events yield what asks these

        def caller_streams(_: CallerStreams) -> Streams:
            return tuple((name, queued[name].caller_stream()) for name in devices if devices[name].barrier.has_events)

        self._table: Table = {
            Change: self._change,
            Survey: vault.survey,
            Reserve: vault.reserve,
            CaptureHost: vault.capture_host,
            Check: vault.check,
            Examine: vault.examine,
            Inspect: vault.inspect,
            RestoreHost: vault.restore_host,
            Copy: vault.copy,
            ReadLive: vault.read_live,
            Transfer: vault.transfer,
            ContextRecord: lambda op: queued[op.device].context_record(),
            ContextWait: lambda op: queued[op.device].context_wait(op.event),
            StreamRecord: lambda op: queued[op.device].stream_record(),
            StreamWait: lambda op: queued[op.device].stream_wait(op.event),
            CallerWait: lambda op: queued[op.device].caller_wait(op.event),
            CallerStreams: caller_streams,
            KnownRecord: lambda op: queued[op.device].known_record(op.stream),
            KnownWait: lambda op: queued[op.device].known_wait(op.stream, op.event),
            TransferRecord: lambda op: queued[op.device].transfer_record(),
            HostWait: lambda op: queued[op.device].host_wait(op.event),
            Synchronize: lambda op: devices[op.device].synchronize(),
        }

    def submit(self, protocol: Protocol, shield: Shield | None = None, instead: Table | None = None) -> Any:
        """Run a snapshot, seal or rollback. Signals are held back, except while it waits for open sections.

        The caller's inference mode is left meanwhile.

        Args:
            protocol: What to run.
            shield: The caller's, when signals are to be held back for longer than the submission.
            instead: Calls in the place of the vault's, for a protocol over other memory.
        """
        if torch.is_inference_mode_enabled():  # what is allocated under it could not be written later
            with torch.inference_mode(False):
                return self.submit(protocol, shield, instead)
        perform = self.perform if instead is None else functools.partial(self.perform, instead=instead)
        if shield is not None:
            return drive(protocol, functools.partial(perform, shield=shield))
        with Shield() as own:
            return drive(protocol, functools.partial(perform, shield=own))

    def change(self, function: Callable[[HostState], tuple[HostState, Any]]) -> Any:
        """Apply one atomic change outside of a protocol."""
        return self._change(Change("change", function))

    def open_section(self, kind: SectionKind, in_autograd: bool, timeout_s: float, named: Streams = ()) -> int:
        """Open a section for the calling thread; returns the epoch. Pair with `close_section` in a `finally`."""
        epoch: int = drive(open_section(threading.get_ident(), kind, in_autograd, timeout_s, named), self.perform)
        return epoch

    def depth(self) -> int:
        """Sections that the calling thread has open."""
        return self.state.gate.depth(threading.get_ident())

    def close_section(self, to_depth: int) -> None:
        """Close sections of the calling thread until `to_depth` are left; survives one interrupt half-way."""
        try:
            drive(close_section(threading.get_ident(), to_depth), self.perform)
        except KeyboardInterrupt:
            drive(close_section(threading.get_ident(), to_depth), self.perform)
            raise

    def begin_capture(self, token: int, thread: int, in_autograd: bool, timeout_s: float) -> None:
        """Announce a graph capture of that thread. Pair with `end_capture`."""
        drive(begin_capture(thread, token, in_autograd, timeout_s), self.perform)

    def end_capture(self, token: int) -> None:
        """The capture is over, or never began."""
        drive(end_capture(token), self.perform)

    def perform(self, op: Op, shield: Shield | None = None, instead: Table | None = None) -> Any:
        """Perform one operation."""
        call = self._table.get(type(op))
        if instead is not None:
            call = instead.get(type(op), call)
        if call is None:
            if isinstance(op, Await):
                return self._await(op, shield)
            raise TolariaInternalError(
                "running the protocol", f"this machine's driver has no call for {op}", "Please report this."
            )
        try:
            return call(op)
        except Exception as error:
            lost = named(error, f"performing {type(op).__name__}")
            if lost is error:
                raise
            raise lost from error

    def _change(self, op: Change) -> Any:
        with self._lock:
            _, result = self._made(op.function)
        return result

    def _await(self, op: Await, shield: Shield | None) -> tuple[Any, float]:
        """Answers (result, seconds waited)."""
        if shield is None or not shield.holds_any:
            with self._lock:
                made = self._made(op.function)
            if made is not None:
                return made[1], 0.0
        # from here on it may take long; and who has already been signalled is told while nothing is changed
        with contextlib.nullcontext() if shield is None else shield.interruptible():
            started = time.monotonic()
            with self._lock:
                made = self._made(op.function, shield)
                if made is None:
                    self._num_waiting += 1
                    try:
                        made = self._wait_for(op, started, shield)
                    finally:
                        self._num_waiting -= 1
            return made[1], time.monotonic() - started

    def _made(self, function: Callable[[HostState], Any], shield: Shield | None = None) -> Any:
        """Make a change of the host state, under the lock. Answers what the function does: None, if it cannot be made.

        A signal handler may run in the middle of it, on the same thread, and use the governor, which is why the lock
        lets that thread in again. What the handler has changed is in the state that the function then gets.
        """
        while True:
            before = self.state
            made = function(before)
            if self.state is before:  # no handler runs from here to the assignment: nothing is called, nothing loops
                if made is not None:
                    if shield is not None:
                        shield.lets_through = False  # what arrives from now on is for after the submission
                    self.state = made[0]
                    if self._num_waiting:
                        self._changed.notify_all()
                return made

    def _wait_for(self, op: Await, started: float, shield: Shield | None) -> tuple[HostState, Any]:
        while True:
            left = None if op.timeout_s is None else op.timeout_s - (time.monotonic() - started)
            if left is not None and left <= 0:
                raise QuiesceTimeout(
                    op.label,
                    f"not possible within {op.timeout_s:g} s: sections open in threads "
                    f"{[thread for thread, _ in self.state.gate.sections]}, submitting thread "
                    f"{self.state.gate.owner}; expected them to end",
                    "Nothing was changed. Repeat the call, or raise gate_timeout_s if sections may be that long.",
                )
            self._changed.wait(None if left is None else min(left, threading.TIMEOUT_MAX))
            made: tuple[HostState, Any] | None = self._made(op.function, shield)
            if made is not None:
                return made
