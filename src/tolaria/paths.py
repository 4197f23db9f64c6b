"""PATHS: the ways in which bytes move inside the memory of one device, and which of them is the fastest here.

All write the same bytes. Where nobody has chosen, the compiled kernel copies until the others have been tried: once per
layout, when a slot takes its memory, inside that memory, on the governor's own stream and behind nobody's back. Their
times are asked for when they have arrived; nothing waits for them. Another path is taken only where it was faster.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, cast

import torch

from tolaria.config import CopyPathChoice
from tolaria.cuda import ContextDevice
from tolaria.device import Device
from tolaria.errors import DeviceLost, UnsupportedState
from tolaria.kernels import Finite, Side, Sweep
from tolaria.words import prepare_words

logger = logging.getLogger("tolaria")

_SMALLEST_TRIAL_BYTES = 64 << 20  # below it the launches decide, and the kernel has one
_LARGEST_TRIAL_BYTES = 1 << 30
_ROUNDS = 2  # that count, after one that does not
_MARGIN = 0.02  # what is faster by less than noise changes nothing
_LAUNCH_MS = 0.05  # by which a batch of few blocks takes the host longer to launch than the kernel (docs/measured.md)
_ALIGNMENT = 64

Flat = Sequence[torch.Tensor]


class CopyPath(Enum):
    """A way in which bytes move inside the memory of one device."""

    KERNEL = "kernel"
    FOREACH = "foreach"
    GRAPH = "graph"
    BATCH = "batch"


_WORDS = {
    CopyPath.KERNEL: "one compiled kernel for all storages",
    CopyPath.FOREACH: "foreach copy of whole storages",
    CopyPath.GRAPH: "one graph of copies",
    CopyPath.BATCH: "one batch for the copy engines",
}


def prepare(path: CopyPath, port: Device, destinations: Flat, sources: Flat) -> Callable[[], None]:
    """A copy of flat uint8 tensors of one device, pairwise, to be enqueued on its current stream any number of times.

    For as long as all of them stay where they are. Only paths of `offered`; `KERNEL` has no digest taken.
    """
    if path is CopyPath.KERNEL:
        sweep = Sweep(sources, destinations, [Finite.ANYTHING] * len(sources))
        return lambda: sweep.run(Side.LIVE, copy=True)
    if path is CopyPath.FOREACH:
        return prepare_words(destinations, sources)
    engine = cast("ContextDevice", port)
    return (engine.graph if path is CopyPath.GRAPH else engine.batch)(destinations, sources)


def offered(port: Device, device: torch.device) -> tuple[CopyPath, ...]:
    """What works on that device, the best guess first. Compiles the kernel, on the current stream."""
    byte = torch.empty(1, dtype=torch.uint8, device=device)
    found = [CopyPath.KERNEL] if Sweep([byte], None, [Finite.ANYTHING]).is_compiled else []
    found.append(CopyPath.FOREACH)
    if getattr(port, "takes_graphs", False):
        found.append(CopyPath.GRAPH)
    if getattr(port, "takes_batches", False):
        found.append(CopyPath.BATCH)
    return tuple(found)


@dataclass(slots=True, eq=False)
class Choice:
    """The paths between the storages and the slots of one device.

    Attributes:
        capture: Into a slot.
        restore: Out of one.
        reason: Why these.
        is_wanted: They were asked for. A snapshot is taken by no other.
        plain: What stands in for a path that cannot be had.
    """

    capture: CopyPath
    restore: CopyPath
    reason: str
    plain: CopyPath
    _trial: _Trial | None = None
    is_wanted: bool = False

    def give_up(self, path: CopyPath, error: Exception) -> None:
        """It was only measured, and cannot be had now: nobody asks for it any more."""
        if not self.is_wanted and path is not self.plain:
            self.capture, self.restore = (self.plain if one is path else one for one in (self.capture, self.restore))
            self.reason = f"{path.value} was measured to be faster, and has failed: {type(error).__name__}"

    def settle(self) -> None:
        """Take over what a trial has found, if it has ended. Waits for nothing."""
        trial = self._trial
        if trial is not None and trial.has_ended():
            self._trial = None
            self.capture, self.restore, self.reason = trial.result(self.restore)

    @property
    def is_being_measured(self) -> bool:
        """Whether a trial has not been asked for its times yet. It holds memory of a slot until then."""
        return self._trial is not None

    def drop_trial(self) -> None:
        """Learn nothing more."""
        if self._trial is not None:
            self._trial, self.reason = None, "not measured"

    def __str__(self) -> str:
        ways = _WORDS[self.restore]
        if self.capture is not self.restore:
            ways = f"{_WORDS[self.capture]} into slots, {ways} out of them"
        return f"{ways} ({self.reason})"


class _Trial:
    """Every path over the same blocks, in turns. Enqueued by its construction, on the governor's own stream."""

    def __init__(
        self, port: ContextDevice, paths: Sequence[CopyPath], destinations: Flat, sources: Flat, total: int
    ) -> None:
        self._port, self._num_bytes = port, sum(map(torch.Tensor.numel, sources))
        self._scale = total / self._num_bytes
        self._tasks: dict[CopyPath | str, Callable[[], None]] = {}
        with port.on_stream():
            for path in paths:
                try:
                    self._tasks[path] = prepare(path, port, destinations, sources)
                except DeviceLost:
                    raise
                except Exception as error:
                    self._leave_out(path, error)
            answer = torch.zeros(2, dtype=torch.int64, device=sources[0].device)
            sweep = Sweep(sources, destinations, [Finite.ANYTHING] * len(sources))
            self._tasks[_READ] = lambda: sweep.run(Side.LIVE, copy=False, answer=answer)
            if sweep.is_compiled:
                self._tasks[_BOTH] = lambda: sweep.run(Side.LIVE, copy=True, answer=answer)
        self._spans: list[tuple[CopyPath | str, Any, Any]] = []
        for number in range(1 + _ROUNDS):
            for name, task in list(self._tasks.items()):
                began = port.stream_record()
                try:
                    port.enqueue(task)
                except DeviceLost:
                    raise
                except Exception as error:
                    self._leave_out(name, error)
                    continue
                if number:
                    self._spans.append((name, began, port.stream_record()))

    def _leave_out(self, name: CopyPath | str, error: Exception) -> None:
        """Whatever does not work here is not taken."""
        logger.info("copies are not made by %s: %s: %s", name, type(error).__name__, error)
        self._tasks.pop(name, None)

    def has_ended(self) -> bool:
        """Whether the device is through with it."""
        return all(self._port.has_passed(ended) for *_, ended in self._spans[-1:])

    def result(self, incumbent: CopyPath) -> tuple[CopyPath, CopyPath, str]:
        """Which path into slots, which out of them, and why. The digest of a slot counts into the first."""
        ms: dict[CopyPath | str, float] = {}
        for name, began, ended in self._spans:
            ms[name] = min(self._port.elapsed_ms(began, ended), ms.get(name, float("inf")))
        copies = {path: ms[path] for path in self._tasks if isinstance(path, CopyPath)}
        if not copies:  # what failed fails here no more: this is asked amid a snapshot or rollback
            return incumbent, incumbent, "not measured"
        reading = {path: took + ms.get(_READ, 0.0) for path, took in copies.items()}
        if _BOTH in ms and CopyPath.KERNEL in reading:
            reading[CopyPath.KERNEL] = ms[_BOTH]
        shown = ", ".join(f"{path.value} {took:.3f}" for path, took in copies.items())
        reason = f"measured over {self._num_bytes / 1e6:.0f} MB, in ms: {shown}"
        return _fastest(reading, incumbent, self._scale), _fastest(copies, incumbent, self._scale), reason


_READ, _BOTH = "read", "copy and read"


def _fastest(ms: dict[CopyPath, float], incumbent: CopyPath, scale: float) -> CopyPath:
    """The path to take. What the device gains over the whole must be more than the host may lose at the launch."""
    best = min(ms, key=lambda path: ms[path])
    if incumbent not in ms:
        return best
    gained = ms[incumbent] - ms[best]
    return best if gained > _MARGIN * ms[incumbent] and gained * scale > _LAUNCH_MS else incumbent


@dataclass(slots=True, eq=False)
class Paths:
    """The choices of one governor, by device.

    Args:
        wanted: The path that was asked for; None: whichever is the fastest.

    Threads: the holder of the exclusive gate; `str` of a choice: any.
    """

    wanted: CopyPathChoice | None = None
    _offered: dict[str, tuple[CopyPath, ...]] = field(default_factory=dict)
    _chosen: dict[str, Choice] = field(default_factory=dict)
    _tried: dict[tuple[str, int, int], Choice] = field(default_factory=dict)

    def of(self, port: Device, device: torch.device) -> Choice:
        """The choice for a device that is not main memory. No capture may be in progress at the first call for it.

        Args:
            port: It.
            device: Where its tensors are.

        Raises:
            UnsupportedState: The path that was asked for does not work there.
        """
        choice = self._chosen.get(port.name)
        if choice is None:
            choice = self._chosen[port.name] = self._made(port, device)
        return choice

    def forget(self) -> None:
        """Hold no memory any more: trials under way come to nothing. The device is at rest."""
        for choice in (*self._chosen.values(), *self._tried.values()):
            choice.drop_trial()

    def describe(self) -> str:
        """Which paths, and why, in words."""
        for choice in list(self._chosen.values()):
            choice.settle()
        found = {str(choice) for choice in list(self._chosen.values())}
        return "; ".join(sorted(found)) or "not chosen before the first snapshot"

    def _made(self, port: Device, device: torch.device) -> Choice:
        paths = self._offered.get(port.name)
        if paths is None:
            with port.on_stream():
                paths = self._offered[port.name] = offered(port, device)
        if self.wanted is None:
            return Choice(paths[0], paths[0], "not measured", paths[0])
        wanted = CopyPath(self.wanted)
        if wanted not in paths:
            raise UnsupportedState(
                "choosing how copies are made",
                f'copy_path="{self.wanted}" was asked for, but {port.name} offers only '
                f"{', '.join(path.value for path in paths)}",
                "Leave copy_path to the governor, or choose one of these.",
            )
        return Choice(wanted, wanted, "asked for", paths[0], is_wanted=True)

    def try_out(self, port: Device, memory: torch.Tensor, sizes: Sequence[int]) -> None:
        """Measure the paths for a layout, unless that was done for one like it. Enqueues, and waits for nothing.

        No capture may be in progress.

        Args:
            port: The device.
            memory: Of a slot, of which nothing is needed: shape [bytes], uint8. It is written.
            sizes: Bytes of its blocks.
        """
        if self.wanted is not None or not isinstance(port, ContextDevice):
            return
        total = sum(sizes)
        key = port.name, len(sizes).bit_length(), total.bit_length()
        choice = self._tried.get(key)
        if choice is None:
            choice = self._tried[key] = self._made(port, memory.device)
            destinations, sources = _halves(memory, sizes)
            if total >= _SMALLEST_TRIAL_BYTES and len(self._offered[port.name]) > 1 and sources:
                choice._trial = _Trial(port, self._offered[port.name], destinations, sources, total)
                choice.reason = "being measured"
        self._chosen[port.name] = choice
        self._drop_former(port.name)

    def _drop_former(self, name: str) -> None:
        """Trials for former layouts of a device: their slots give the memory up, and nobody asks for their times."""
        for key, choice in list(self._tried.items()):
            if key[0] == name and choice is not self._chosen[name] and choice.is_being_measured:
                choice.drop_trial()
                del self._tried[key]  # measured when such a layout comes again


def _halves(memory: torch.Tensor, sizes: Sequence[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Blocks like those, as many as find room, from one half of some memory into the other."""
    half = memory.numel() // 2 // _ALIGNMENT * _ALIGNMENT
    room = min(half, _LARGEST_TRIAL_BYTES)
    every = max(1, -(-sum(sizes) // max(1, room)))
    destinations, sources, begin = list[torch.Tensor](), list[torch.Tensor](), 0
    for size in sizes[::every]:
        size = min(size, room - begin)
        if size > 0:
            sources.append(memory[begin : begin + size])
            destinations.append(memory[half + begin : half + begin + size])
            begin += -(-size // _ALIGNMENT) * _ALIGNMENT
    return destinations, sources
