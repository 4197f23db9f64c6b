"""SNAPSHOT: the memory behind the ring. Each slot owns its bytes; captures fill it, restores read it.

A slot's memory is one flat arena per device. Storages lie in it in the order (part, trained, dtype), each aligned to
64 bytes, so that one reduction per element type looks for non-finite values and one pass takes the digest. An arena is
allocated when the layout of the train state is new to its slot, and never between layout changes; on the governor's own
stream, so that the allocator gives its memory to nobody whose work is not ordered behind ours.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch

from tolaria import kernels, memory
from tolaria.device import Device, DeviceSet, QueuedDevice
from tolaria.errors import DeviceLost, TolariaInternalError, UnsupportedState
from tolaria.operations import (
    Barrier,
    CaptureHost,
    Check,
    Copy,
    Direction,
    Examine,
    Inspect,
    Inspection,
    Part,
    Places,
    Reserve,
    RestoreHost,
    Survey,
)
from tolaria.records import Journal
from tolaria.state.digest import host_digest
from tolaria.state.leaves import Leaf, Storage, finiteness, is_finite, is_page_locked
from tolaria.state.train_state import HostValues, SurveyResult, TrainState

_ALIGNMENT = 64
_numbers = itertools.count(1)
_WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32}  # a sum of many overflows in 16 bits

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


Digest = tuple[tuple[str, int], ...]
"""Per device, in order of names: xxh3-128 of host memory, `kernels.digest` of device memory."""


@dataclass(slots=True, eq=False)
class Examination:
    """One reading of a slot, perhaps still under way on a device.

    Attributes:
        digests: Of host memory, by device name.
        finite: Host memory holds no non-finite value that ought not to be there.
        rows: Page-locked answers of queued devices by name, shape [2], int64: digest, and 1 if finite.
        events: When they will be there.
    """

    digests: dict[str, int] = field(default_factory=dict)
    finite: bool = True
    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    events: dict[str, Any] = field(default_factory=dict)

    def digest(self) -> Digest:
        """The digest of the whole slot; every answer must be there."""
        found = {**self.digests, **{name: int(row[0]) for name, row in self.rows.items()}}
        return tuple(sorted(found.items()))

    def is_finite(self) -> bool:
        """Whether all is well; False means: look again, tensor by tensor."""
        return self.finite and all(bool(row[1]) for row in self.rows.values())


@dataclass(slots=True, eq=False)
class SlotMemory:
    """What one slot owns.

    Attributes:
        arena: The bytes.
        survey: What they are the bytes of.
        host: Values besides.
        copies: By device and part: places in the arena, and the storages that they are copies of.
        digest: From the first reading; None until its answer was asked for.
        nonfinite: Names of tensors that it found not to be finite.
        examination: The first reading, while it is under way.
        rows: Where its answers arrive, by device.
        rows_again: The same for later readings.
    """

    arena: Arena | None = None
    survey: SurveyResult | None = None
    host: HostValues | None = None
    copies: dict[tuple[str, Part], tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]] = field(default_factory=dict)
    digest: Digest | None = None
    nonfinite: tuple[str, ...] = ()
    examination: Examination | None = None
    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    rows_again: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Vault:
    """Performs the protocol's operations on the train state and on slot memory.

    Args:
        state: The train state.
        num_slots: Slots in the ring.
        devices: Ports by name; new ones are opened as state appears on further devices.
        with_rng: Whether snapshots hold global random state.
        read_journal: Called at a capture: the governor's own counters and detector states (immutable values).
        write_journal: Called at a restore with what `read_journal` returned.

    Threads: every method except `inspect` is called by the holder of the exclusive gate. Each leaves the caller's
    inference mode: what is allocated under it could not be written later.
    """

    state: TrainState
    num_slots: int
    devices: DeviceSet
    with_rng: Callable[[], bool]
    read_journal: Callable[[], Journal]
    write_journal: Callable[[Journal], None]
    slots: list[SlotMemory] = field(init=False)
    _surveyed: SurveyResult | None = field(default=None, init=False)
    _reading: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __post_init__(self) -> None:
        self.slots = [SlotMemory() for _ in range(self.num_slots)]

    @torch.inference_mode(False)
    def survey(self, _: Survey) -> Places:
        """Perform `Survey`; a device that is new to us gets its port."""
        surveyed = self.state.survey()
        keys = {storage.key[0] for storage in surveyed.leaves.storages}
        if self.devices.barrier is Barrier.HOST and any(device.type != "cpu" for device in keys):
            raise UnsupportedState(
                "surveying the train state",
                f"tensors are on {sorted(map(str, keys))}, but everything was on the CPU when the governor was built",
                "Build the governor after moving the model.",
            )
        self.devices.open(keys)
        self._surveyed = surveyed
        return self._places(surveyed)

    def _places(self, survey: SurveyResult) -> Places:
        storages = survey.leaves.storages
        names = sorted(map(str, {storage.key[0] for storage in storages}))
        pinned = torch.accelerator.is_available() and any(
            storage.key[0].type == "cpu" and is_page_locked(storage.bytes) for storage in storages
        )
        # a device that holds nothing of ours may still be reading page-locked memory that is
        there = list(self.devices) if pinned else names
        queued = tuple(sorted(name for name in there if self.devices[name].barrier is not Barrier.HOST))
        host = tuple(name for name in names if name not in queued)
        return Places(queued, host, pinned=pinned, unguarded=bool(survey.gradients) or self.state.is_written_outside())

    @torch.inference_mode(False)
    def reserve(self, op: Reserve) -> None:
        """Perform `Reserve`. The slot's former contents are given up here, not before."""
        slot = self.slots[op.slot]
        surveyed = self._take_survey()
        signature = _signature(surveyed.leaves.storages)
        slot.survey = slot.host = slot.digest = slot.examination = None
        slot.copies = {}
        if slot.arena is None or slot.arena.signature != signature:
            slot.arena = None  # freed before its successor is allocated: the slot was claimed, nobody reads it
            with self._on_streams():
                slot.arena = _allocate(signature, f"reserving slot {op.slot}")
            # here and not when they are needed: taking page-locked memory invalidates captures of other threads
            names = [n for n in map(str, slot.arena.flat) if self.devices[n].barrier is Barrier.CONTEXT]
            slot.rows, slot.rows_again = (
                {name: torch.zeros(2, dtype=torch.int64).pin_memory() for name in names} for _ in range(2)
            )
        slot.survey = surveyed
        copies: dict[tuple[torch.device, Part], tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for view, storage in zip(slot.arena.views, surveyed.leaves.storages, strict=True):
            held, live = copies.setdefault((storage.key[0], _part(storage)), ([], []))
            held.append(view)
            live.append(storage.bytes)
        slot.copies = {(str(device), part): pair for (device, part), pair in copies.items()}

    def _on_streams(self) -> contextlib.ExitStack:
        """Inside, what is launched on any governed device is ordered with our copies."""
        stack = contextlib.ExitStack()
        for port in self.devices.values():
            stack.enter_context(port.on_stream())
        return stack

    def _take_survey(self) -> SurveyResult:
        if self._surveyed is None:
            raise TolariaInternalError("reserving a slot", "there was no survey, expected one", "Please report this.")
        surveyed, self._surveyed = self._surveyed, None
        return surveyed

    @torch.inference_mode(False)
    def copy(self, op: Copy) -> None:
        """Perform `Copy`: one call on the device port."""
        self._filled(op.slot)
        held, live = self.slots[op.slot].copies.get((op.device, op.part), ((), ()))
        pair = (held, live) if op.direction is Direction.CAPTURE else (live, held)
        self.devices[op.device].copy(*pair)

    @torch.inference_mode(False)
    def capture_host(self, op: CaptureHost) -> int:
        """Perform `CaptureHost`."""
        journal = self.read_journal()
        with self._on_streams():
            self.slots[op.slot].host = self.state.capture(self._devices(), self.with_rng(), journal)
        return journal.completed

    @torch.inference_mode(False)
    def check(self, op: Check) -> Places:
        """Perform `Check`."""
        survey = self.slots[op.slot].survey
        if survey is None:
            raise TolariaInternalError("rolling back", f"slot {op.slot} is empty", "Please report this.")
        self.state.check(survey, "rolling back")
        return self._places(survey)

    @torch.inference_mode(False)
    def examine(self, op: Examine) -> None:
        """Perform `Examine`."""
        slot = self.slots[op.slot]
        slot.examination = self._examine(slot.rows, *self._filled(op.slot)[:2])

    def is_examined(self, index: int) -> bool:
        """Whether `inspect` would find its answer there."""
        examination = self.slots[index].examination
        if examination is None:
            return True
        return all(_queued(self.devices[name]).has_passed(event) for name, event in examination.events.items())

    @torch.inference_mode(False)
    def inspect(self, op: Inspect) -> Inspection:
        """Perform `Inspect`. Reads the slot only, so it runs beside training."""
        with self._reading:
            return self._inspect(self.slots[op.slot], *self._filled(op.slot)[:2], op.again)

    def _inspect(self, slot: SlotMemory, arena: Arena, survey: SurveyResult, again: bool) -> Inspection:
        if slot.digest is None:
            examination, slot.examination = slot.examination or self._examine(slot.rows, arena, survey), None
            slot.digest = self._digest_of(examination)
            slot.nonfinite = () if examination.is_finite() else self._nonfinite(arena, survey)
        if not again:
            return Inspection(nonfinite=slot.nonfinite)
        return Inspection(intact=self._digest_of(self._examine(slot.rows_again, arena, survey)) == slot.digest)

    def _digest_of(self, examination: Examination) -> Digest:
        for name, event in examination.events.items():
            _queued(self.devices[name]).host_wait(event)
        return examination.digest()

    def _examine(self, rows: dict[str, torch.Tensor], arena: Arena, survey: SurveyResult) -> Examination:
        """Start a reading. On a queued device this enqueues and returns; elsewhere the answer is there at the end."""
        found = Examination(rows=rows)
        doubtful = _outside_of_stretches(arena, survey)
        for device, flat in arena.flat.items():
            name, port = str(device), self.devices[str(device)]
            stretches = [stretch for stretch in arena.ranges if stretch.device == device]
            leaves = [tensor for tensor in doubtful if tensor.device == device]
            if port.barrier is Barrier.HOST:
                found.digests[name] = host_digest(flat)
                found.finite = found.finite and bool(_all_finite(stretches, leaves, device))
            elif port.barrier is Barrier.BLOCKING:
                found.digests[name] = int(kernels.digest(flat))
                found.finite = found.finite and bool(_all_finite(stretches, leaves, device))
            else:
                # an answer that never came must not pass for one: no two readings start from the same number
                rows[name][0], rows[name][1] = -next(_numbers), 0
                port.enqueue(functools.partial(_read, rows[name], flat, stretches, leaves))
                found.events[name] = _queued(port).stream_record()
        return found

    def _nonfinite(self, arena: Arena, survey: SurveyResult) -> tuple[str, ...]:
        with self._on_streams():  # the slot's bytes are there for that stream only
            return _nonfinite(arena, survey)

    @torch.inference_mode(False)
    def restore_host(self, op: RestoreHost) -> bool:
        """Perform `RestoreHost`. The journal comes back first: it is ours and cannot fail."""
        _, survey, host = self._filled(op.slot)
        if host is None:
            raise TolariaInternalError("rolling back", f"slot {op.slot} has no host values", "Please report this.")
        self.write_journal(host.journal)
        callers = {
            str(device): torch.cuda.current_stream(device) for device in self._devices() if device.type == "cuda"
        }

        def adopt(tensor: torch.Tensor) -> None:
            # allocated on our stream, and the user's from now on: not to be given away while his work uses it
            if str(tensor.device) in callers:
                tensor.record_stream(callers[str(tensor.device)])

        with self._on_streams():
            # the policy may have become "keep" since, when a second governor was built
            self.state.restore(survey, host if self.with_rng() else replace(host, rng=None), self._devices(), adopt)
            for optimizer in op.reset:
                optimizer.state.clear()
        return any(parameter.grad is not None for parameter in self.state.parameters())

    def num_bytes(self, index: int) -> int:
        """Bytes of tensors that a slot holds."""
        arena = self.slots[index].arena
        return 0 if arena is None else sum(size for _, size, *_ in arena.signature)

    def close(self) -> None:
        """Wait for copies under way, free all slot memory and forget every governed tensor. Idempotent."""
        for port in self.devices.values():
            with contextlib.suppress(DeviceLost):  # nothing is under way there any more
                port.close()
        self.slots = [SlotMemory() for _ in self.slots]
        self._surveyed = None
        self.state.forget_survey()

    def __del__(self) -> None:
        # dropped without `close`: copies may still be under way from or to memory that is about to be given back
        with contextlib.suppress(Exception):
            self.close()

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


def _queued(port: Device) -> QueuedDevice:
    return cast("QueuedDevice", port)


def _read(
    row: torch.Tensor, flat: torch.Tensor, stretches: Sequence[torch.Tensor], leaves: Sequence[torch.Tensor]
) -> None:
    """Digest and finiteness of one device's arena, on their way to `row` when this returns."""
    finite = _all_finite(stretches, leaves, flat.device).long()
    row.copy_(torch.stack((kernels.digest(flat), finite)), non_blocking=True)


def _all_finite(
    stretches: Sequence[torch.Tensor], leaves: Sequence[torch.Tensor], device: torch.device
) -> torch.Tensor:
    """Shape [], bool, on the device. One sum per stretch: a NaN or an infinity makes it one; it may also overflow."""
    sums = [stretch.sum(dtype=_WIDER.get(stretch.dtype)) for stretch in stretches]
    flags = [torch.isfinite(total) for total in sums] + [finiteness(leaf) for leaf in leaves]
    return torch.stack(flags).all() if flags else torch.ones((), dtype=torch.bool, device=device)


def _leaf_in(arena: Arena, leaf: Leaf) -> torch.Tensor:
    """The snapshot's copy of one leaf."""
    dtype, offset, shape, strides = leaf.geometry
    held = arena.views[leaf.storage]
    start = held.storage_offset() // dtype.itemsize + offset
    return torch.empty(0, dtype=dtype, device=held.device).set_(held.untyped_storage(), start, shape, strides)


def _outside_of_stretches(arena: Arena, survey: SurveyResult) -> list[torch.Tensor]:
    """Copies of the leaves that ought to be finite and that no sum over a stretch looks at."""
    storages = survey.leaves.storages
    return [
        _leaf_in(arena, leaf)
        for leaf in survey.leaves.leaves
        if leaf.trained and not _is_in_a_stretch(leaf, storages[leaf.storage])
    ]


def _nonfinite(arena: Arena, survey: SurveyResult) -> tuple[str, ...]:
    """Names of leaves that ought to be finite and are not, each looked at by itself. Waits for the device.

    A sum of finite values may have overflowed, and a storage may hold bytes that belong to no leaf.
    """
    suspects = [leaf for leaf in survey.leaves.leaves if leaf.trained and _may_be_nonfinite(leaf.geometry[0])]
    return tuple(leaf.name for leaf in suspects if not is_finite(_leaf_in(arena, leaf)))


def _may_be_nonfinite(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _is_in_a_stretch(leaf: Leaf, storage: Storage) -> bool:
    dtype = leaf.geometry[0]
    if not _may_be_nonfinite(dtype):
        return True  # nothing to look for
    return storage.trained and storage.dtype is dtype and _is_summable(dtype)
