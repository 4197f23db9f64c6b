"""SNAPSHOT: the memory behind the ring. Each slot owns its bytes; captures fill it, restores read it.

A slot's memory is one flat arena per device. Storages lie in it in the order (part, trained, dtype), each aligned to
64 bytes, so that one reduction per element type looks for non-finite values and one pass takes the digest. An arena is
allocated when the layout of the train state is new to its slot, and never between layout changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import xxhash

from tolaria import memory
from tolaria.device import Device, open_devices
from tolaria.errors import TolariaInternalError, UnsupportedState
from tolaria.operations import (
    Barrier,
    CaptureHost,
    Check,
    Copy,
    Direction,
    Inspect,
    Inspection,
    Part,
    Reserve,
    RestoreHost,
    Survey,
)
from tolaria.records import Journal
from tolaria.state.digest import update_bytes
from tolaria.state.leaves import Leaf, Storage, is_finite
from tolaria.state.train_state import HostValues, SurveyResult, TrainState

_ALIGNMENT = 64

Signature = tuple[tuple[torch.device, int, Part, bool, torch.dtype | None], ...]


def _part(storage: Storage) -> Part:
    return Part.BUFFERS if storage.has_buffers else Part.REST


def _signature(storages: Sequence[Storage]) -> Signature:
    return tuple((s.key[0], s.key[2], _part(s), s.trained, s.dtype) for s in storages)


@dataclass(slots=True, eq=False)
class Arena:
    """Memory for one layout.

    Attributes:
        signature: The layout it was made for.
        flat: Per device, all of it: shape [bytes], uint8.
        views: Per storage of the survey, its place: shape [storage bytes], uint8.
        ranges: Homogeneous stretches that ought to be finite, as 1-d floating-point tensors.
    """

    signature: Signature
    flat: dict[torch.device, torch.Tensor]
    views: list[torch.Tensor]
    ranges: list[torch.Tensor]


def _allocate(signature: Signature, doing: str) -> Arena:
    order = sorted(
        range(len(signature)),
        key=lambda i: (str(signature[i][0]), signature[i][2].value, signature[i][3], str(signature[i][4])),
    )
    used: dict[torch.device, int] = {}
    offsets: dict[int, int] = {}
    stretches: dict[tuple[torch.device, Part, torch.dtype], list[int]] = {}
    for i in order:
        device, size, part, trained, dtype = signature[i]
        offsets[i] = start = used.get(device, 0)
        used[device] = end = start + -(-size // _ALIGNMENT) * _ALIGNMENT
        if trained and dtype is not None and _is_summable(dtype):
            stretches.setdefault((device, part, dtype), [start, end])[1] = end
    flat = {device: memory.allocate(size, device, doing) for device, size in used.items()}
    views = [flat[signature[i][0]][offsets[i] : offsets[i] + signature[i][1]] for i in range(len(signature))]
    ranges = [flat[device][start:end].view(dtype) for (device, _, dtype), (start, end) in stretches.items()]
    return Arena(signature, flat, views, ranges)


@dataclass(slots=True, eq=False)
class SlotMemory:
    """What one slot owns."""

    arena: Arena | None = None
    survey: SurveyResult | None = None
    host: HostValues | None = None
    digest: bytes | None = None


@dataclass(slots=True, eq=False)
class Vault:
    """Performs the protocol's operations on the train state and on slot memory.

    Args:
        state: The train state.
        num_slots: Slots in the ring.
        devices: Ports by name; new ones are added as state appears on further devices.
        barrier: The barrier kind in use.
        with_rng: Whether snapshots hold global random state.
        read_journal: Called at a capture: the governor's own counters and detector states (immutable values).
        write_journal: Called at a restore with what `read_journal` returned.

    Threads: every method except `inspect` is called by the holder of the exclusive gate. Each leaves the caller's
    inference mode: what is allocated under it could not be written later.
    """

    state: TrainState
    num_slots: int
    devices: dict[str, Device]
    barrier: Barrier
    with_rng: Callable[[], bool]
    read_journal: Callable[[], Journal]
    write_journal: Callable[[Journal], None]
    slots: list[SlotMemory] = field(init=False)
    _surveyed: SurveyResult | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.slots = [SlotMemory() for _ in range(self.num_slots)]

    @torch.inference_mode(False)
    def survey(self, _: Survey) -> tuple[str, ...]:
        """Perform `Survey`; a device that is new to us gets its port."""
        surveyed = self.state.survey()
        names = _device_names(surveyed)
        for port in open_devices(torch.device(name) for name in names if name not in self.devices):
            if port.barrier is not Barrier.HOST and self.barrier is Barrier.HOST:
                raise UnsupportedState(
                    "surveying the train state",
                    f"tensors are on {port.name}, but everything was on the CPU when the governor was built",
                    "Build the governor after moving the model.",
                )
            self.devices[port.name] = port
        self._surveyed = surveyed
        return names

    @torch.inference_mode(False)
    def reserve(self, op: Reserve) -> None:
        """Perform `Reserve`. The slot's former contents are given up here, not before."""
        slot = self.slots[op.slot]
        surveyed = self._take_survey()
        signature = _signature(surveyed.leaves.storages)
        slot.survey = slot.host = slot.digest = None
        if slot.arena is None or slot.arena.signature != signature:
            slot.arena = None  # freed before its successor is allocated: the slot was claimed, nobody reads it
            slot.arena = _allocate(signature, f"reserving slot {op.slot}")
        slot.survey = surveyed

    def _take_survey(self) -> SurveyResult:
        if self._surveyed is None:
            raise TolariaInternalError("reserving a slot", "there was no survey, expected one", "Please report this.")
        surveyed, self._surveyed = self._surveyed, None
        return surveyed

    @torch.inference_mode(False)
    def copy(self, op: Copy) -> None:
        """Perform `Copy`: one call on the device port."""
        arena, survey, _ = self._filled(op.slot)
        held: list[torch.Tensor] = []
        live: list[torch.Tensor] = []
        for view, storage in zip(arena.views, survey.leaves.storages, strict=True):
            if _part(storage) is op.part and str(storage.key[0]) == op.device:
                held.append(view)
                live.append(storage.bytes)
        pair = (held, live) if op.direction is Direction.CAPTURE else (live, held)
        self.devices[op.device].copy(*pair)

    @torch.inference_mode(False)
    def capture_host(self, op: CaptureHost) -> int:
        """Perform `CaptureHost`."""
        journal = self.read_journal()
        self.slots[op.slot].host = self.state.capture(self._devices(), self.with_rng(), journal)
        return journal.completed

    @torch.inference_mode(False)
    def check(self, op: Check) -> tuple[str, ...]:
        """Perform `Check`."""
        survey = self.slots[op.slot].survey
        if survey is None:
            raise TolariaInternalError("rolling back", f"slot {op.slot} is empty", "Please report this.")
        self.state.check(survey, "rolling back")
        return _device_names(survey)

    @torch.inference_mode(False)
    def inspect(self, op: Inspect) -> Inspection:
        """Perform `Inspect`. Reads the slot only, so it runs beside training."""
        slot = self.slots[op.slot]
        arena, survey, _ = self._filled(op.slot)
        digest = _digest(arena)
        if slot.digest is not None:
            return Inspection(intact=digest == slot.digest)
        slot.digest = digest
        return Inspection(nonfinite=_nonfinite(arena, survey))

    @torch.inference_mode(False)
    def restore_host(self, op: RestoreHost) -> bool:
        """Perform `RestoreHost`. The journal comes back first: it is ours and cannot fail."""
        _, survey, host = self._filled(op.slot)
        if host is None:
            raise TolariaInternalError("rolling back", f"slot {op.slot} has no host values", "Please report this.")
        self.write_journal(host.journal)
        # the policy may have become "keep" since, when a second governor was built
        self.state.restore(survey, host if self.with_rng() else replace(host, rng=None), self._devices())
        for optimizer in op.reset:
            optimizer.state.clear()
        return any(parameter.grad is not None for parameter in self.state.parameters())

    def num_bytes(self, index: int) -> int:
        """Bytes of tensors that a slot holds."""
        arena = self.slots[index].arena
        return 0 if arena is None else sum(size for _, size, *_ in arena.signature)

    def close(self) -> None:
        """Free all slot memory and forget every governed tensor."""
        self.slots = [SlotMemory() for _ in self.slots]
        self._surveyed = None

    def _devices(self) -> list[torch.device]:
        return [torch.device(name) for name in self.devices]

    def _filled(self, index: int) -> tuple[Arena, SurveyResult, HostValues | None]:
        slot = self.slots[index]
        if slot.arena is None or slot.survey is None:
            raise TolariaInternalError("moving bytes", f"slot {index} has no memory", "Please report this.")
        return slot.arena, slot.survey, slot.host


def _is_summable(dtype: torch.dtype) -> bool:
    """Whether one sum over a stretch tells if all of it is finite."""
    return dtype.is_complex or (dtype.is_floating_point and dtype.itemsize > 1)


def _device_names(survey: SurveyResult) -> tuple[str, ...]:
    """Devices of a survey, CPU last: its copies run at once, while an accelerator's are under way."""
    names = {str(storage.key[0]) for storage in survey.leaves.storages}
    return tuple(sorted(names, key=lambda name: (name == "cpu", name)))


def _digest(arena: Arena) -> bytes:
    hasher = xxhash.xxh3_128()
    for flat in arena.flat.values():
        update_bytes(hasher, flat)
    return hasher.digest()


def _nonfinite(arena: Arena, survey: SurveyResult) -> tuple[str, ...]:
    """Names of leaves that ought to be finite and are not. One sum per element type when all is well."""
    storages = survey.leaves.storages
    odd = any(leaf.trained and not _is_in_a_stretch(leaf, storages[leaf.storage]) for leaf in survey.leaves.leaves)
    # a sum of finite values may overflow, and a storage may hold bytes that belong to no leaf: both are looked at again
    if not odd and all(bool(torch.isfinite(stretch.sum())) for stretch in arena.ranges):
        return ()
    found = []
    for leaf in survey.leaves.leaves:
        dtype, offset, shape, strides = leaf.geometry
        if not leaf.trained or not (dtype.is_floating_point or dtype.is_complex):
            continue
        held = arena.views[leaf.storage]
        start = held.storage_offset() // dtype.itemsize + offset
        typed = torch.empty(0, dtype=dtype, device=held.device).set_(held.untyped_storage(), start, shape, strides)
        if not is_finite(typed):
            found.append(leaf.name)
    return tuple(found)


def _is_in_a_stretch(leaf: Leaf, storage: Storage) -> bool:
    dtype = leaf.geometry[0]
    if not (dtype.is_floating_point or dtype.is_complex):
        return True  # nothing to look for
    return storage.trained and storage.dtype is dtype and _is_summable(dtype)
