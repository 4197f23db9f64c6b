"""The protocol and the driver over several devices of the machine; tensors and slots are plain tensors by device."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from cuda_driver.fake_driver import Machine

from tolaria import protocol, ring
from tolaria.cuda import ContextDevice
from tolaria.driver import Driver
from tolaria.kernels import Finite, Side, Tally
from tolaria.operations import Barrier, Direction, Events, HostState, Inspection, Part, Places
from tolaria.protocol import Ground
from tolaria.ring import Tier
from tolaria.route import lay

GROUND = Ground(Barrier.CONTEXT, 5.0)


def transfer(destinations: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """What a slot moves to main memory is one piece for each device."""
    for destination, source in zip(destinations, sources, strict=True):
        destination.copy_(source, non_blocking=True)


class Store:
    """One buffer and one weight per device, and slots of the same shape."""

    def __init__(self, devices: dict[str, Any], host: tuple[str, ...], pinned: bool) -> None:
        self.devices, self.host, self.pinned = devices, host, pinned
        self.live = {(name, part): torch.zeros(4, dtype=torch.uint8) for name in devices for part in Part}
        self.tallies = {name: Tally(*torch.zeros(2, 2, dtype=torch.int64)) for name in devices}
        self.tier = Tier.HOST
        self.at_rest: list[torch.Tensor] = []
        self.held = [{key: torch.full((4,), 99, dtype=torch.uint8) for key in self.live} for _ in range(3)]

    def places(self, _: Any) -> Places:
        queued = tuple(name for name in self.devices if name not in self.host)
        return Places(queued, self.host, self.pinned, tier=self.tier)

    survey = check = places

    def reserve(self, op: Any) -> None:
        pass

    def capture_host(self, op: Any) -> int:
        return 0

    def restore_host(self, op: Any) -> bool:
        return False

    def examine(self, op: Any) -> None:
        pass

    def inspect(self, op: Any) -> Inspection:
        """At rest: what the host finds in the slot now."""
        if op.at_rest:
            self.at_rest = [tensor.clone() for tensor in self.held[op.slot].values()]
        return Inspection()

    def copy(self, op: Any) -> None:
        route = self._route(op.slot, op.device, op.part)
        if op.direction is Direction.RESTORE:
            route.restore()
        else:
            route.capture(None)

    def _route(self, slot: int, name: str, part: Part) -> Any:
        """The real one: what is enqueued, and where, is its business."""
        live, held = [self.live[name, part]], [self.held[slot][name, part]]
        return lay(self.devices[name], live, held, [Finite.ANYTHING], 0, [], on_host=False)

    def read_live(self, op: Any) -> None:
        parts = list(Part)
        for name, tally in self.tallies.items():
            if name not in self.host:
                tally.is_fresh = tally.is_fresh or op.part is parts[0]
                self._route(op.slot, name, op.part).read(Side.LIVE, tally, last=op.part is parts[-1])

    def transfer(self, op: Any) -> Events:
        moves = {
            name: functools.partial(
                transfer,
                [self.held[op.target][name, part] for part in Part],
                [self.held[op.source][name, part] for part in Part],
            )
            for name in self.devices
            if name not in self.host
        }
        return tuple((name, self.devices[name].transfer(move)) for name, move in moves.items())


class Pair:
    """A driver over two devices, unless told otherwise."""

    def __init__(self, machine: Machine, pinned: bool = False) -> None:
        names = ("cuda:0", "cuda:1")
        self._build({name: ContextDevice(name, machine.driver, machine.streams) for name in names}, (), pinned)

    @classmethod
    def in_two_tiers(cls, machine: Machine) -> Pair:
        """With two slots on the devices and one in main memory, which snapshots are drained into."""
        made = cls(machine)
        made.store.tier = Tier.DEVICE
        made.driver.state = HostState(ring=ring.empty_ring(host=1, device=2))
        return made

    @classmethod
    def on(cls, devices: dict[str, Any], host: tuple[str, ...], pinned: bool) -> Pair:
        made = cls.__new__(cls)
        made._build(devices, host, pinned)
        return made

    def _build(self, devices: dict[str, Any], host: tuple[str, ...], pinned: bool) -> None:
        self.devices = devices
        self.store: Any = Store(devices, host, pinned)
        self.driver = Driver(HostState(ring=ring.empty_ring(3)), self.store, devices)

    def weight(self, index: int) -> torch.Tensor:
        return self.tensor(f"cuda:{index}")

    def tensor(self, name: str) -> torch.Tensor:
        return self.store.live[name, Part.REST]

    def held(self, slot: int, index: int) -> torch.Tensor:
        return self.slot_tensor(slot, f"cuda:{index}")

    def slot_tensor(self, slot: int, name: str) -> torch.Tensor:
        return self.store.held[slot][name, Part.REST]

    def snapshot(self) -> protocol.Taken:
        return self.driver.submit(protocol.snapshot(1, GROUND, None, manual=True))

    def rollback(self, *, read_back: bool = False) -> protocol.RolledBack:
        def choose(slots: Any, before: Any) -> Any:
            return ring.newest_good(slots, before)

        return self.driver.submit(protocol.rollback(1, GROUND, choose, "rolling back", read_back=read_back))

    def drain(self, taken: protocol.Taken) -> int | None:
        """Certify a snapshot (which here waits for nothing) and copy it into main memory. Answers the slot."""
        self.driver.submit(protocol.seal(1, taken.slot, taken.snapshot, True, GROUND))
        self.driver.change(lambda s: (replace(s, ring=ring.certify(s.ring, taken.slot, taken.snapshot)), None))
        return self.driver.submit(protocol.drain(1, replace(GROUND, drained=1), taken.slot, taken.snapshot))

    def close(self) -> None:
        for device in self.devices.values():
            device.close()
