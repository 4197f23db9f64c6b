"""ROUTE: the way between live storages and their places in a slot, for one device and one part of the train state.

Chosen by where the two ends are: inside main memory, inside one accelerator, or between an accelerator and page-locked
main memory.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Protocol, cast

import torch

from tolaria.device import Device, HostDevice
from tolaria.errors import TolariaInternalError
from tolaria.kernels import Finite, Side, Sweep, Tally, addresses_of
from tolaria.operations import Barrier
from tolaria.state.leaves import finiteness


class Route(Protocol):
    """Copies and readings of one device and one part. What is asked for is enqueued where the device has a queue.

    Readings are added to a `Tally`. Main memory takes none: it is read by `Vault` as a whole.
    """

    reads_while_copying: bool
    """Whether a capture takes the digest in passing; else the slot has to be read afterwards."""

    num_chunks: int
    """By which the numbers of the digest's chunks go on."""

    is_compiled: bool | None
    """Whether a kernel of ours does the work; None where none is needed."""

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
    is_compiled: bool | None = None

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
    """

    def __init__(
        self,
        port: Device,
        live: Sequence[torch.Tensor],
        held: Sequence[torch.Tensor],
        finite: Sequence[Finite],
        first: int,
        doubtful: Sequence[torch.Tensor],
    ) -> None:
        self._port, self._live, self._held, self._doubtful = port, list(live), list(held), list(doubtful)
        with port.on_stream():
            self._sweep = Sweep(self._live, self._swept(), finite, first)
        self._first = first
        self.num_chunks = self._sweep.num_chunks
        self.is_compiled: bool | None = self._sweep.is_compiled
        self.reads_while_copying = self._sweep.is_compiled

    def _swept(self) -> Sequence[torch.Tensor] | None:
        return self._held

    def capture(self, tally: Tally | None) -> None:
        doubtful, answer = self._doubtful, None if tally is None else tally.total
        before = [] if tally is None else tally.adding()[0]

        def copy() -> None:
            for launch in before:
                launch()
            self._take(answer)
            if answer is not None and doubtful:
                answer[1] |= ~torch.stack([finiteness(tensor) for tensor in doubtful]).all()

        self._port.enqueue(copy)

    def _take(self, answer: torch.Tensor | None) -> None:
        """Launch the copy, and the reading if that is made in passing."""
        self._sweep.run(Side.LIVE, copy=True, answer=answer if self.reads_while_copying else None)

    def restore(self) -> None:
        sweep = self._sweep

        def copy() -> None:
            sweep.run(Side.HELD, copy=True)

        self._port.enqueue(copy)

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
    ) -> None:
        super().__init__(port, live, held, finite, first, doubtful)
        self.reads_while_copying = True

    def _swept(self) -> Sequence[torch.Tensor] | None:
        return None

    def _take(self, answer: torch.Tensor | None) -> None:
        if answer is not None:
            self._sweep.run(Side.LIVE, copy=False, answer=answer)
        self._port.move(self._held, self._live)

    def restore(self) -> None:
        port, live, held = self._port, self._live, self._held

        def copy() -> None:
            port.move(live, held)

        self._port.enqueue(copy)


def lay(
    port: Device,
    live: Sequence[torch.Tensor],
    held: Sequence[torch.Tensor],
    finite: Sequence[Finite],
    first: int,
    doubtful: Sequence[torch.Tensor],
    *,
    on_host: bool,
) -> HostRoute | DeviceRoute:
    """The route for that device."""
    if port.barrier is Barrier.HOST:
        return HostRoute(cast("HostDevice", port), live, held)
    kind = TransferRoute if on_host else DeviceRoute
    return kind(port, live, held, finite, first, doubtful)
