"""SNAPSHOT: the memory behind the ring. Each slot owns its bytes; captures fill it, restores read it.

A slot's memory (`arena`) is allocated when the layout of the train state is new to the slot, and never between layout
changes; on the governor's own streams, so that the allocator gives it to nobody whose work is not ordered behind ours.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch

from tolaria import arena, budget, memory, words
from tolaria.arena import Arena
from tolaria.budget import Plan
from tolaria.device import Device, DeviceSet, HostDevice, QueuedDevice
from tolaria.errors import BudgetExceeded, DeviceLost, TolariaInternalError, UnsupportedState
from tolaria.examination import Examination, doubtful, host_is_finite, nonfinite_names
from tolaria.kernels import Side
from tolaria.operations import (
    PARTS,
    Barrier,
    CaptureHost,
    Check,
    Copy,
    Direction,
    Events,
    Examine,
    Inspect,
    Inspection,
    Places,
    ReadLive,
    Reserve,
    RestoreHost,
    Survey,
    Transfer,
)
from tolaria.paths import Paths
from tolaria.records import Journal
from tolaria.ring import Tier
from tolaria.route import lay, transferring
from tolaria.slot import Beside, Layout, SlotMemory
from tolaria.state.digest import host_digest, host_digest_of
from tolaria.state.leaves import Leaves, any_page_locked
from tolaria.state.train_state import HostValues, SurveyResult, TrainState

logger = logging.getLogger("tolaria")

_FIRST_PART, *_, _LAST_PART = PARTS
_device_of = functools.cache(torch.device)


@dataclass(slots=True, eq=False)
class Vault:
    """Performs the protocol's operations on the train state and on slot memory.

    Args:
        state: The train state.
        tiers: Per slot of the ring, where its bytes are.
        devices: Ports by name; new ones are opened as state appears on further devices.
        room: What the user allows: a request in which the bytes are still to be filled in.
        with_rng: Whether snapshots hold global random state.
        read_journal: Called at a capture, with whether it holds gradients: the governor's own counters and detectors.
        write_journal: Called at a restore with what `read_journal` returned.
        paths: How bytes move between a train state and slots on the same device.

    Attributes:
        plan: Which tier snapshots are taken into, for the present layout.
        beside: What else of ours takes memory.

    Threads: every method except `inspect` and `transfer` is called by the holder of the exclusive gate; so is
    `reserve`, except for draining. The caller has left inference mode: what is allocated under it could not be written
    later.
    """

    state: TrainState
    tiers: Sequence[Tier]
    devices: DeviceSet
    room: budget.Request
    with_rng: Callable[[], bool]
    read_journal: Callable[[bool], Journal]
    write_journal: Callable[[Journal], None]
    paths: Paths = field(default_factory=Paths)
    slots: list[SlotMemory] = field(init=False)
    plan: Plan = field(init=False)
    beside: Beside | None = field(default=None, init=False)
    _planned: arena.Signature | None = field(default=None, init=False)
    _surveyed: SurveyResult | None = field(default=None, init=False)
    _layout: Layout | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.slots = [self._empty_slot(tier) for tier in self.tiers]
        self.plan = Plan(Tier.HOST if self.devices.barrier is Barrier.HOST else Tier.DEVICE, 0)
        if self.paths.wanted is not None:
            for port in self.devices.values():
                if port.barrier is not Barrier.HOST:
                    self.paths.of(port, torch.device(port.name))  # refused now, and not at the first snapshot

    def _empty_slot(self, tier: Tier) -> SlotMemory:
        first, again, restored = (Examination(self.devices) for _ in range(3))
        return SlotMemory(tier, first, again, restored)

    # ------------------------------------------------------------ layout

    def survey(self, op: Survey) -> Places:
        """Perform `Survey`; a device that is new to us gets its port, and a layout that is new its plan."""
        memory.refuse_fake_tensors("taking a snapshot")
        surveyed = self.state.survey(gradients=op.gradients)
        names = self._layout_of(surveyed.leaves).names
        if any(name not in self.devices for name in names):
            self._open(list(map(torch.device, names)))
        self.lay_plan(surveyed)
        self._surveyed = surveyed
        return self._places(surveyed)

    def _open(self, keys: Sequence[torch.device]) -> None:
        if self.devices.barrier is Barrier.HOST and any(device.type != "cpu" for device in keys):
            raise UnsupportedState(
                "surveying the train state",
                f"tensors are on {sorted(map(str, keys))}, but everything was on the CPU when the governor was built",
                "Build the governor after moving the model.",
            )
        self.devices.open(keys)

    def _layout_of(self, leaves: Leaves) -> Layout:
        known = self._layout  # draining asks from a thread of its own
        if known is None or known.leaves is not leaves:
            known = self._layout = Layout(leaves)
        return known

    def lay_plan(self, surveyed: SurveyResult) -> None:
        """Choose the tier for a layout. Says so when it is not the device tier.

        Raises:
            BudgetExceeded: It fits nowhere.
        """
        signature = self._layout_of(surveyed.leaves).signature
        if signature is self._planned or signature == self._planned:
            return
        sizes = arena.num_bytes(signature)
        accelerators = {str(d): n for d, n in sizes.items() if self.devices[str(d)].barrier is not Barrier.HOST}
        held, beside = self.held_bytes(), Counter[str]()
        if self.beside is not None:
            held, beside = held + self.beside.held_bytes(), self.beside.needed_bytes(surveyed)
        request = replace(self.room, device_bytes=accelerators, host_bytes=sum(sizes.values()), beside=beside)
        known = {name: found for name in accelerators if (found := memory.device_memory(torch.device(name)))}
        rooms = {name: budget.Room(total, max(0, used - held[name])) for name, (total, used) in known.items()}
        available = memory.available_host_bytes()
        if available is not None:
            available += held[budget.MAIN_MEMORY]
        plan = budget.plan(request, rooms, available)
        if accelerators and plan.tier is Tier.HOST and self.plan.tier is not Tier.HOST:
            logger.info("snapshots are held in main memory: %s", plan.reason)
        self.plan, self._planned = plan, signature

    def held_bytes(self) -> Counter[str]:
        """Memory of the slots by device, or `budget.MAIN_MEMORY`."""
        found = Counter[str]()
        for slot in self.slots:
            for device, flat in () if slot.arena is None else slot.arena.flat.items():
                found[self._place(str(device), slot.tier)] += flat.numel()
        return found

    def _place(self, device: str, tier: Tier) -> str:
        on_host = tier is Tier.HOST or self.devices[device].barrier is Barrier.HOST
        return budget.MAIN_MEMORY if on_host else device

    def _places(self, survey: SurveyResult) -> Places:
        layout = self._layout_of(survey.leaves)
        names = layout.names
        # asked each time: memory may be page-locked where it lies
        pinned = bool(layout.on_host) and any_page_locked(layout.on_host)
        # a device that holds nothing of ours may still be reading page-locked memory that is
        there = sorted(self.devices) if pinned else names
        queued = tuple([name for name in there if self.devices[name].barrier is not Barrier.HOST])
        host = tuple([name for name in names if name not in queued])
        unguarded = bool(survey.gradients) or self.state.is_written_outside()
        return Places(queued, host, pinned=pinned, unguarded=unguarded, tier=self.plan.tier)

    def reserve(self, op: Reserve) -> None:
        """Perform `Reserve`. The slot's former contents are given up here, not before."""
        slot = self.slots[op.slot]
        surveyed = self._take_survey() if op.like is None else self._filled(op.like)[1]
        layout = self._layout_of(surveyed.leaves)
        signature = layout.signature
        slot.empty()
        if slot.arena is None or slot.arena.signature != signature:
            # freed before its successor is allocated: the slot was claimed, nobody reads it
            slot.arena = None
            slot.routes.clear()
            slot.laid = None
            try:
                with self._on_streams():
                    slot.arena = arena.allocate(signature, slot.tier, f"reserving slot {op.slot}")
            except BudgetExceeded as error:
                self._give_up_devices(slot.tier, op, error)
                raise
            if slot.tier is Tier.DEVICE:
                self._try_paths(slot.arena)
            # here and not when they are needed: taking page-locked memory invalidates captures of other threads
            for examination in (slot.first, slot.again, slot.restored):
                examination.reserve(layout.names)
        self._lay_routes(slot, slot.arena, surveyed)
        slot.survey = surveyed
        if op.like is None:
            slot.first.begin()

    def _try_paths(self, fresh: Arena) -> None:
        for device, flat in fresh.flat.items():
            if (port := self.devices[str(device)]).barrier is not Barrier.HOST:
                self.paths.try_out(port, flat, [fresh.signature[i][1] for i in fresh.of(device)])

    def _give_up_devices(self, tier: Tier, op: Reserve, error: BudgetExceeded) -> None:
        """The device tier is full although there was room by the arithmetic: the next snapshot goes to main memory."""
        if tier is Tier.DEVICE and self.room.tier is None and op.like is None:
            self.plan = Plan(Tier.HOST, 0, f"out of memory: {error}")
            logger.info("snapshots are held in main memory from now on: %s", error)

    def _lay_routes(self, slot: SlotMemory, held: Arena, surveyed: SurveyResult, *, standing: bool = True) -> None:
        if slot.laid is surveyed.leaves and standing:
            return
        slot.laid = None
        storages, slot.single = surveyed.leaves.storages, doubtful(surveyed.leaves)
        chunks: dict[str, int] = {}
        for device in held.flat:
            for part in PARTS:
                key, indices = (str(device), part), held.of(device, part)
                live, within = [storages[i].bytes for i in indices], frozenset(indices)
                single = [leaf.tensor for leaf in slot.single if leaf.storage in within]
                first = chunks.get(str(device), 0)
                known = slot.routes.get(key)
                if indices and (known is None or not known.leads_to(live, first, single)):
                    slot.routes[key] = known = lay(
                        self.devices[str(device)],
                        live,
                        [held.views[i] for i in indices],
                        [held.finite(i) for i in indices],
                        first,
                        single,
                        on_host=slot.tier is Tier.HOST,
                        paths=self.paths,
                    )
                chunks[str(device)] = first + (known.num_chunks if indices and known else 0)
        # a storage may lie elsewhere than the survey found it: then they lead there, and are laid anew next time
        if all(storage.bytes.untyped_storage().data_ptr() == storage.key[1] for storage in storages):
            slot.laid = surveyed.leaves

    def _on_streams(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, what is launched on any governed device is ordered with our copies."""
        ports = [port for port in self.devices.values() if port.barrier is not Barrier.HOST]
        if len(ports) == 1:
            return ports[0].on_stream()
        stack = contextlib.ExitStack()
        for port in ports:
            stack.enter_context(port.on_stream())
        return stack

    def _take_survey(self) -> SurveyResult:
        if self._surveyed is None:
            raise TolariaInternalError("reserving a slot", "there was no survey, expected one", "Please report this.")
        surveyed, self._surveyed = self._surveyed, None
        return surveyed

    # ------------------------------------------------------------ copies

    def copy(self, op: Copy) -> None:
        """Perform `Copy`."""
        self._filled(op.slot)
        slot = self.slots[op.slot]
        route = slot.routes.get((op.device, op.part))
        if route is None:
            return
        if op.direction is Direction.RESTORE:
            route.restore()
        else:
            host = self.devices[op.device].barrier is Barrier.HOST
            route.capture(None if host else slot.first.tally(op.device))

    def transfer(self, op: Transfer) -> Events:
        """Perform `Transfer`. The target takes over what is known of the source."""
        origin, survey, host = self._filled(op.source)
        goal, _, _ = self._filled(op.target)
        source, target = self.slots[op.source], self.slots[op.target]
        target.survey, target.host = survey, host
        target.digest, target.nonfinite = source.digest, source.nonfinite
        events: list[tuple[str, Any]] = []
        for device, flat in origin.flat.items():
            port = self.devices[str(device)]
            if port.barrier is Barrier.HOST:
                cast("HostDevice", port).copy([goal.flat[device]], [flat])
            else:
                event = port.transfer(transferring(goal.flat[device], flat))
                events += [] if event is None else [(str(device), event)]
        return tuple(events)

    def capture_host(self, op: CaptureHost) -> int:
        """Perform `CaptureHost`."""
        journal = self.read_journal(bool(self._filled(op.slot)[1].gradients))
        with self._on_streams():
            self.slots[op.slot].host = self.state.capture(self._devices(), self.with_rng(), journal)
        return journal.completed

    def check(self, op: Check) -> Places:
        """Perform `Check`."""
        memory.refuse_fake_tensors("rolling back")
        slot = self.slots[op.slot]
        if slot.survey is None or slot.arena is None:
            raise TolariaInternalError("rolling back", f"slot {op.slot} is empty", "Please report this.")
        slot.standing = self.state.check(slot.survey, "rolling back")
        # storages that have grown lie elsewhere: what is restored goes where they are now
        self._lay_routes(slot, slot.arena, slot.survey, standing=slot.standing)
        return self._places(slot.survey)

    def restore_host(self, op: RestoreHost) -> bool:
        """Perform `RestoreHost`. The journal comes back first: it is ours and cannot fail."""
        _, survey, host = self._filled(op.slot)
        if host is None:
            raise TolariaInternalError("rolling back", f"slot {op.slot} has no host values", "Please report this.")
        self.write_journal(host.journal)
        devices = self._devices()
        callers = {device: torch._C._cuda_getCurrentStream(device.index) for device in devices if device.type == "cuda"}

        def adopt(tensor: torch.Tensor) -> None:
            # allocated on our stream, and the user's from now on: not to be given away while his work uses it
            if tensor.device in callers:
                number, index, kind = callers[tensor.device]
                tensor.record_stream(torch.cuda.Stream(stream_id=number, device_index=index, device_type=kind))

        with self._on_streams():
            # the policy may have become "keep" since, when a second governor was built
            host = host if host.rng is None or self.with_rng() else replace(host, rng=None)
            slot = self.slots[op.slot]
            alive = self.state.restore(survey, host, devices, adopt, standing=slot.standing)
            for optimizer in op.reset:
                optimizer.state.clear()
        return alive

    # ------------------------------------------------------------ readings

    def examine(self, op: Examine) -> None:
        """Perform `Examine`."""
        self._examine(self.slots[op.slot])

    def _examine(self, slot: SlotMemory) -> None:
        """Complete the first reading. What the copies have not read in passing is read now."""
        for (name, _), route in slot.routes.items():
            if self.devices[name].barrier is not Barrier.HOST and not route.reads_while_copying:
                route.read(Side.HELD, slot.first.tally(name))
        slot.first.send()

    def is_examined(self, index: int) -> bool:
        """Whether `inspect` would find its answer there."""
        slot = self.slots[index]
        return not slot.first.under_way or slot.first.has_arrived()

    def is_read_back(self, index: int) -> bool:
        """Whether `inspect` with `live` would find its answer there."""
        return self.slots[index].restored.has_arrived()

    def read_live(self, op: ReadLive) -> None:
        """Perform `ReadLive`. Main memory is read whole with the last part."""
        held, survey, _ = self._filled(op.slot)
        slot = self.slots[op.slot]
        if op.part is _FIRST_PART:
            slot.restored.begin()
        for (name, part), route in slot.routes.items():
            if part is op.part and self.devices[name].barrier is not Barrier.HOST:
                route.read(Side.LIVE, slot.restored.tally(name), last=part is _LAST_PART)
        if op.part is _LAST_PART:
            for device in held.flat:
                if self.devices[str(device)].barrier is Barrier.HOST:
                    blocks = [survey.leaves.storages[i].bytes for i in held.of(device)]
                    slot.restored.digests[str(device)] = host_digest_of(blocks, held.flat[device].numel())
            slot.restored.send()

    def inspect(self, op: Inspect) -> Inspection:
        """Perform `Inspect`. Reads the slot only, so it runs beside training."""
        held, survey, _ = self._filled(op.slot)
        slot = self.slots[op.slot]
        with slot.reading:
            self._conclude(slot, held, survey)
            if op.live:
                slot.restored.wait()
                intact = slot.restored.digest() == slot.digest
                if not intact:
                    slot.at_rest.clear()  # perhaps taken of bytes that had changed on their way here
                return Inspection(intact=intact)
            intact = not op.again or self._is_intact(slot, held)
            if op.at_rest and intact:
                missing = [(name, flat) for name, flat in self._resting(slot, held) if name not in slot.at_rest]
                slot.at_rest |= {name: host_digest(flat) for name, flat in missing}
            return Inspection(intact=intact) if op.again else Inspection(nonfinite=slot.nonfinite)

    def _conclude(self, slot: SlotMemory, held: Arena, survey: SurveyResult) -> None:
        """Take over the first reading, if that has not been done; make it, where it was not enqueued."""
        if slot.digest is not None:
            return
        if not self.devices.barrier.has_events:
            self._examine(slot)
        first = slot.first
        for device in held.flat:
            if self.devices[str(device)].barrier is Barrier.HOST:
                first.digests[str(device)] = host_digest(held.flat[device])
                first.finite = first.finite and host_is_finite(held, slot.single, device)
        first.wait()
        slot.digest = first.digest()
        if not first.is_finite():
            with self._on_streams():  # the slot's bytes are there for that stream only
                slot.nonfinite = nonfinite_names(held, survey.leaves)

    def _resting(self, slot: SlotMemory, held: Arena) -> list[tuple[str, torch.Tensor]]:
        """Main memory that holds bytes of accelerators."""
        if slot.tier is Tier.DEVICE:
            return []
        return [(str(d), flat) for d, flat in held.flat.items() if self.devices[str(d)].barrier is not Barrier.HOST]

    def _is_intact(self, slot: SlotMemory, held: Arena) -> bool:
        """Whether the slot has the bytes of its first reading."""
        known = dict(slot.digest or ())
        resting = dict(self._resting(slot, held))
        for device, flat in held.flat.items():
            name = str(device)
            if self.devices[name].barrier is Barrier.HOST:
                known[name] -= host_digest(flat)
            elif name in resting and name in slot.at_rest:
                known[name] = host_digest(flat) - slot.at_rest[name]
            elif name in resting:
                known[name] -= int(words.portable_digest([held.views[i] for i in held.of(device)]))
        if not resting:
            slot.again.begin()
            for (name, _), route in slot.routes.items():
                if self.devices[name].barrier is not Barrier.HOST:
                    route.read(Side.HELD, slot.again.tally(name))
            slot.again.send()
            slot.again.wait()
            for name, number in slot.again.digest():
                known[name] -= number
        return not any(known.values())

    # ------------------------------------------------------------ facts

    def duration_s(self, began: Events, ended: Events) -> float:
        """Seconds between events that have passed, of the slowest device."""
        spans = zip(began, ended, strict=True)
        return max((_queued(self.devices[n]).elapsed_ms(a, b) / 1e3 for (n, a), (_, b) in spans), default=0.0)

    def num_bytes(self, index: int) -> int:
        """Bytes of tensors that a slot holds."""
        held = self.slots[index].arena
        return 0 if held is None else held.num_bytes

    @property
    def copy_path(self) -> str:
        """How bytes move between live storages and slots."""
        if self.devices.barrier is Barrier.HOST:
            return "memmove of whole storages"
        on_host = self.plan.tier is Tier.HOST
        return "transfers between device and page-locked memory" if on_host else self.paths.describe()

    def close(self) -> None:
        """Wait for copies under way, free all slot memory and forget every governed tensor. Idempotent."""
        for port in self.devices.values():
            with contextlib.suppress(DeviceLost):  # nothing is under way there any more
                port.close()
        self.slots = [self._empty_slot(tier) for tier in self.tiers]
        self._surveyed = self._layout = None
        self.paths.forget()
        self.state.forget_survey()

    def __del__(self) -> None:
        # dropped without `close`: copies may still be under way from or to memory that is about to be given back
        with contextlib.suppress(Exception):
            self.close()

    def _devices(self) -> list[torch.device]:
        return [_device_of(name) for name in self.devices]

    def _filled(self, index: int) -> tuple[Arena, SurveyResult, HostValues | None]:
        slot = self.slots[index]
        if slot.arena is None or slot.survey is None:
            raise TolariaInternalError("moving bytes", f"slot {index} has no memory", "Please report this.")
        return slot.arena, slot.survey, slot.host


def _queued(port: Device) -> QueuedDevice:
    return cast("QueuedDevice", port)
