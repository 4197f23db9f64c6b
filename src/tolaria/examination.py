"""EXAMINATION: one reading of a slot, or of the storages restored from it, perhaps still under way on a device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from tolaria.arena import WIDER, Arena, needs_a_look
from tolaria.device import Device, DeviceSet, QueuedDevice
from tolaria.kernels import Tally
from tolaria.operations import Barrier
from tolaria.state.leaves import Leaf, Leaves, finiteness, is_finite

_numbers = itertools.count(1)

Digest = tuple[tuple[str, int], ...]
"""Per device, in order of names: xxh3-128 of main memory, that of `kernels` elsewhere."""


@dataclass(slots=True, eq=False)
class Examination:
    """One reading, made anew any number of times.

    Attributes:
        digests: Of main memory, by device name.
        finite: Main memory holds no non-finite value that ought not to be there.
        under_way: It was begun, and its answer has not been asked for.
    """

    devices: DeviceSet
    digests: dict[str, int] = field(default_factory=dict)
    finite: bool = True
    under_way: bool = False
    _tallies: dict[str, Tally] = field(default_factory=dict)
    _events: dict[str, Any] = field(default_factory=dict)

    def reserve(self, names: Iterable[str]) -> None:
        """Take the memory that the answers of these devices need. Page-locks some: no capture may be in progress."""
        wanted = set(names)
        for name in set(self._tallies) - wanted:
            del self._tallies[name]
        for name in sorted(wanted):
            port = self.devices[name]
            if port.barrier is not Barrier.HOST and name not in self._tallies:
                with port.on_stream():
                    total = torch.zeros(2, dtype=torch.int64, device=name)
                self._tallies[name] = Tally(total, torch.zeros(2, dtype=torch.int64, device="cpu").pin_memory())

    def begin(self) -> None:
        """Start from nothing. What is added is launched behind what the devices' own streams were given so far."""
        self.digests.clear()
        self._events.clear()
        self.finite = self.under_way = True
        for tally in self._tallies.values():
            tally.begin(unlike=-next(_numbers))

    def tally(self, name: str) -> Tally:
        """What readings of that device are added to."""
        return self._tallies[name]

    def send(self) -> None:
        """Everything of a device has been asked for: let the answers travel that do not yet."""
        for name, tally in self._tallies.items():
            port = self.devices[name]
            if not tally.is_sent:
                port.enqueue(_send(tally))
            if port.barrier.has_events:
                self._events[name] = _queued(port).stream_record()

    def has_arrived(self) -> bool:
        """Whether asking for the answer would not wait."""
        return all(_queued(self.devices[name]).has_passed(event) for name, event in self._events.items())

    def wait(self) -> None:
        """Until the answer is there. Who asks again does not wait again."""
        if not self.under_way:
            return
        for name in self._tallies:
            port = self.devices[name]
            if name in self._events:
                _queued(port).host_wait(self._events[name])
            elif port.barrier is Barrier.BLOCKING:
                port.synchronize()
        self.under_way = False

    def digest(self) -> Digest:
        """The digest; the answer must be there."""
        found = {**self.digests, **{name: tally.digest for name, tally in self._tallies.items()}}
        return tuple(sorted(found.items()))

    def is_finite(self) -> bool:
        """Whether all is well; False means: look again, tensor by tensor."""
        return self.finite and all(tally.is_finite for tally in self._tallies.values())


def _queued(port: Device) -> QueuedDevice:
    return cast("QueuedDevice", port)


def _send(tally: Tally) -> Callable[[], None]:
    before, behind = tally.adding(last=True)

    def send() -> None:
        for launch in (*before, *behind):
            launch()

    return send


def host_is_finite(arena: Arena, single: Sequence[Leaf], device: torch.device) -> bool:
    """Whether what one device's storages hold in main memory is finite, as far as it ought to be.

    One sum per stretch: a NaN or an infinity makes it one. It may also overflow, so False means: look again. `single`:
    the leaves that are in no stretch.
    """
    stretches = [stretch for stretch in arena.ranges if stretch.device == device]
    flags = [torch.isfinite(stretch.sum(dtype=WIDER.get(stretch.dtype))) for stretch in stretches]
    flags += [finiteness(arena.leaf(leaf)) for leaf in single if arena.signature[leaf.storage][0] == device]
    return bool(torch.stack(flags).all()) if flags else True


def nonfinite_names(arena: Arena, leaves: Leaves) -> tuple[str, ...]:
    """Names of leaves that ought to be finite and are not, each looked at by itself. Waits for the devices.

    A sum of finite values may have overflowed, and a storage may hold bytes that belong to no leaf.
    """
    return tuple(leaf.name for leaf in leaves.leaves if leaf.trained and not is_finite(arena.leaf(leaf)))


def doubtful(leaves: Leaves) -> list[Leaf]:
    """Those that ought to be finite and that have to be looked at one by one."""
    return [leaf for leaf in leaves.leaves if needs_a_look(leaf, leaves.storages[leaf.storage])]
