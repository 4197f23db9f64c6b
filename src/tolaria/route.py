"""ROUTE: the way between live storages and their places in a slot, for one device and one part of the train state.

Chosen by where the two ends are: inside main memory, inside one accelerator, or between an accelerator and page-locked
main memory.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Sequence
from typing import Protocol, cast

import torch

from tolaria.cuda import named
from tolaria.device import Device, HostDevice
from tolaria.errors import CaptureInProgress, DeviceLost, TolariaInternalError
from tolaria.kernels import Finite, Side, Sweep, Tally, addresses_of
from tolaria.operations import Barrier
from tolaria.paths import Choice, CopyPath, Paths, prepare
from tolaria.state.leaves import finiteness

logger = logging.getLogger("tolaria")


class Route(Protocol):
    """Copies and readings of one device and one part. What is asked for is enqueued where the device has a queue.

    Readings are added to a `Tally`. Main memory takes none: it is read by `Vault` as a whole.
    """

    reads_while_copying: bool
    """Whether a capture takes the digest in passing; else the slot has to be read afterwards."""

    num_chunks: int
    """By which the numbers of the digest's chunks go on."""

    def capture(self, tally: Tally | None) -> None:
        """Live storages -> slot."""

    def restore(self) -> None:
        """Slot -> live storages."""

    def read(self, side: Side, tally: Tally, *, last: bool = False) -> None:
        """Read one side; with `last` the answer travels right behind it."""

    def leads_to(self, live: Sequence[torch.Tensor], first: int, doubtful: Sequence[torch.Tensor]) -> bool:
        """Whether it would be laid the same way again."""
        ...


class HostRoute:
    """Inside main memory, by the calling thread and a few more."""

    reads_while_copying = False
    num_chunks = 0

    def __init__(self, port: HostDevice, live: Sequence[torch.Tensor], held: Sequence[torch.Tensor]) -> None:
        self._addresses = addresses_of(live)
        self._capture, self._restore = port.prepare(held, live), port.prepare(live, held)

    def capture(self, tally: Tally | None) -> None:
        self._capture()

    def restore(self) -> None:
        self._restore()

    def read(self, side: Side, tally: Tally, *, last: bool = False) -> None:
        raise TolariaInternalError(
            "reading a slot", "main memory was asked for a tally, expected no", "Please report this."
        )

    def leads_to(self, live: Sequence[torch.Tensor], first: int, doubtful: Sequence[torch.Tensor]) -> bool:
        return addresses_of(live) == self._addresses


class DeviceRoute:
    """Inside the memory of one accelerator: one pass over all blocks.

    Args:
        port: The device.
        live: Storages, shape [bytes] each, uint8.
        held: Their places.
        finite: Per storage, what ought to be finite in it.
        first: Number of the first chunk of the digest.
        doubtful: Tensors in these storages that ought to be finite and that no sweep can check.
        choice: How bytes move. It may still change; each call follows it.
    """

    def __init__(
        self,
        port: Device,
        live: Sequence[torch.Tensor],
        held: Sequence[torch.Tensor],
        finite: Sequence[Finite],
        first: int,
        doubtful: Sequence[torch.Tensor],
        choice: Choice,
    ) -> None:
        self._choice = choice
        self._copies: dict[tuple[CopyPath, Side], Callable[[], None]] = {}
        self._port, self._live, self._held, self._doubtful = port, list(live), list(held), list(doubtful)
        with port.on_stream():
            self._sweep = Sweep(self._live, self._swept(), finite, first)
        self._first = first
        self.num_chunks = self._sweep.num_chunks
        self.reads_while_copying = self._sweep.is_compiled

    def _swept(self) -> Sequence[torch.Tensor] | None:
        return self._held

    def capture(self, tally: Tally | None) -> None:
        self._choice.settle()
        doubtful, answer = self._doubtful, None if tally is None else tally.total
        launch = self._taking(answer)
        before = [] if tally is None else tally.adding()[0]

        def copy() -> None:
            for begin in before:
                begin()
            launch()
            if answer is not None and doubtful:
                answer[1] |= ~torch.stack([finiteness(tensor) for tensor in doubtful]).all()

        self._port.enqueue(copy)

    def _taking(self, answer: torch.Tensor | None) -> Callable[[], None]:
        """What launches the copy, and the reading if that is made in passing."""
        path, sweep = self._choice.capture, self._sweep
        self.reads_while_copying = sweep.is_compiled and path is CopyPath.KERNEL
        if path is not CopyPath.KERNEL:
            return self._copy(path, Side.LIVE)
        reading = answer if self.reads_while_copying else None
        return lambda: sweep.run(Side.LIVE, copy=True, answer=reading)

    def _copy(self, path: CopyPath, source: Side) -> Callable[[], None]:
        """A copy by that path, prepared at its first use."""
        copy = self._copies.get((path, source))
        if copy is None:
            copy = self._copies[path, source] = self._prepared(path, source)
        return copy

    def _prepared(self, path: CopyPath, source: Side) -> Callable[[], None]:
        sweep = self._sweep

        def plain() -> None:
            sweep.run(source, copy=True)

        if path is CopyPath.KERNEL:
            return plain
        origin, target = (self._live, self._held) if source is Side.LIVE else (self._held, self._live)
        if source is Side.LIVE and self._choice.is_wanted:  # a snapshot fails by itself: nothing is damaged
            return prepare(path, self._port, target, origin)
        passed_on = (DeviceLost, CaptureInProgress) if source is Side.LIVE else (DeviceLost,)
        return _or_else(plain, path, lambda: prepare(path, self._port, target, origin), passed_on, self._choice)

    def restore(self) -> None:
        self._choice.settle()
        copy = self._copy(self._choice.restore, Side.HELD)

        def restore() -> None:
            copy()

        self._port.enqueue(restore)

    def read(self, side: Side, tally: Tally, *, last: bool = False) -> None:
        sweep, answer = self._sweep, tally.total
        before, behind = tally.adding(last=last)

        def read() -> None:
            for launch in before:
                launch()
            sweep.run(side, copy=False, answer=answer)
            for launch in behind:
                launch()

        self._port.enqueue(read)

    def leads_to(self, live: Sequence[torch.Tensor], first: int, doubtful: Sequence[torch.Tensor]) -> bool:
        same = len(doubtful) == len(self._doubtful) and all(map(operator.is_, doubtful, self._doubtful))
        return same and first == self._first and self._sweep.fits(live)


class TransferRoute(DeviceRoute):
    """Between the memory of an accelerator and page-locked main memory, block by block on the copy engines.

    The digest is taken of the live storages, on the device.
    """

    def __init__(
        self,
        port: Device,
        live: Sequence[torch.Tensor],
        held: Sequence[torch.Tensor],
        finite: Sequence[Finite],
        first: int,
        doubtful: Sequence[torch.Tensor],
        choice: Choice,
    ) -> None:
        super().__init__(port, live, held, finite, first, doubtful, choice)
        self.reads_while_copying = True

    def _swept(self) -> Sequence[torch.Tensor] | None:
        return None

    def _taking(self, answer: torch.Tensor | None) -> Callable[[], None]:
        sweep, port, held, live = self._sweep, self._port, self._held, self._live

        def take() -> None:
            if answer is not None:
                sweep.run(Side.LIVE, copy=False, answer=answer)
            port.move(held, live)

        return take

    def restore(self) -> None:
        port, live, held = self._port, self._live, self._held

        def copy() -> None:
            port.move(live, held)

        self._port.enqueue(copy)


def _or_else(
    plain: Callable[[], None],
    path: CopyPath,
    make: Callable[[], Callable[[], None]],
    passed_on: tuple[type[Exception], ...],
    choice: Choice,
) -> Callable[[], None]:
    """A copy by a path, and by `plain` where that path cannot be had now: the device may be out of memory.

    `plain` takes no memory. What a copy has written before it failed is written once more, with the same bytes.
    Errors of the kinds in `passed_on` are not made up for. `choice` learns of the others.
    """

    def instead(error: Exception) -> None:
        told = named(error, f"copying by {path}")  # torch has an error of its own for a lost device
        if isinstance(told, passed_on):
            raise told from (None if told is error else error)
        logger.warning("a copy was not made by %s, but plainly: %s: %s", path, type(error).__name__, error)
        if not isinstance(told, CaptureInProgress):  # that one will end
            choice.give_up(path, error)

    try:
        copy = make()
    except Exception as error:
        instead(error)
        return plain

    def copied() -> None:
        try:
            copy()
        except Exception as error:
            instead(error)
            plain()

    return copied


def lay(
    port: Device,
    live: Sequence[torch.Tensor],
    held: Sequence[torch.Tensor],
    finite: Sequence[Finite],
    first: int,
    doubtful: Sequence[torch.Tensor],
    *,
    on_host: bool,
    paths: Paths | None = None,
) -> HostRoute | DeviceRoute:
    """The route for that device."""
    if port.barrier is Barrier.HOST:
        return HostRoute(cast("HostDevice", port), live, held)
    kind = TransferRoute if on_host else DeviceRoute
    return kind(port, live, held, finite, first, doubtful, (paths or Paths()).of(port, live[0].device))


def transferring(destination: torch.Tensor, source: torch.Tensor) -> Callable[[], None]:
    """What launches the transfer of a whole slot."""

    def copy() -> None:
        destination.copy_(source, non_blocking=True)

    return copy
