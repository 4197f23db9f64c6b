r"""Feeds the race oracle from a real run: on a GPU, on a CPU, or on a stand-in for either.

    with Recorder(governor) as recorder:
        train()
    print(*recorder.races, sep="\n\n")      # two accesses each, both stacks, and the edge that is missing

A run in which nothing went wrong is enough: what counts is whether anything *orders* two accesses, not in which order
they happened. Actors are streams and host threads; locations are the bytes of the train state, of the slots, and of the
page-locked rows that answers of a device arrive in, plus what `watch` is told of.

What is seen:
    the governor    every call of the CUDA driver that orders something, as it is made; sections and submissions; every
                    launch of a copy or reading, with the stream it really goes to; what the host reads of an answer
    the user        torch operators of the thread that records and of threads started meanwhile, backward included;
                    on CUDA also events, waits and synchronisation of torch's streams; start and end of threads;
                    replays of graphs, as if each wrote the whole train state
What is not: kernels that torch does not dispatch, events of other libraries, locks and queues between the user's own
threads, memory that the allocator hands over by an event of its own (`record_stream`). Tell of those: `launched`,
`did`, and the methods of `ledger`. An edge that is not seen makes a false report and hides nothing; an access that is
not seen hides its races. Bytes between the elements of a strided view count as touched.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch.utils import _pytree

from tolaria import TolariaGovernor
from tolaria.operations import (
    Await,
    Barrier,
    Change,
    Copy,
    Direction,
    Examine,
    HostState,
    Inspect,
    Part,
    ReadLive,
    Survey,
    Transfer,
)
from tolaria.testing import taps
from tolaria.testing.races import Ledger, Race, Range
from tolaria.testing.recording import tell_gate

_SEES_NOTHING = ("detach", "detach_", "set_", "record_stream", "_record_function_enter_new", "is_pinned")


@dataclass(slots=True)
class _Place:
    """Bytes that are watched, and what they are, for people."""

    where: Range
    name: str


@dataclass(slots=True)
class _Errand:
    """What the next launch of the governor on one device reads and writes."""

    reads: list[Range]
    writes: list[Range]
    what: str


class Recorder:
    """Records what happens inside, and finds what nothing orders.

    Args:
        governor: Whose train state is watched. Attached and open; nothing of it may be in flight when this is entered.
        with_stacks: Keep the stack of every access.

    Attributes:
        ledger: What was recorded. Hold `lock` to tell it more.
        lock: Held while something is told.

    Threads: any. Enter and leave it on one thread, while no other uses the governor.
    """

    def __init__(self, governor: TolariaGovernor, *, with_stacks: bool = True) -> None:
        self.ledger = Ledger(with_stacks=with_stacks, device_of=lambda stream: stream.split(" ")[0])
        self.lock = threading.RLock()
        self._keeper = governor._keeper
        self._places: list[_Place] = []
        self._local = threading.local()
        self._names: weakref.WeakKeyDictionary[threading.Thread, str] = weakref.WeakKeyDictionary()
        self._numbers = itertools.count()
        self._stack = contextlib.ExitStack()

    @property
    def races(self) -> list[Race]:
        """Found so far."""
        return self.ledger.races

    def __enter__(self) -> Recorder:
        self._watch_state()
        stack = self._stack
        stack.enter_context(taps.on_governor(self, self._keeper.driver, self._keeper.devices))
        stack.enter_context(taps.on_threads(self))
        stack.enter_context(taps.on_replays(self))
        stack.enter_context(taps.on_torch_streams(self))
        stack.enter_context(self.following())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    # ------------------------------------------------------------ what a program may tell by itself

    def watch(self, name: str, tensor: torch.Tensor) -> None:
        """Follow accesses to one more tensor, for example a page-locked buffer that a device writes."""
        self._places.append(_Place(range_of(tensor), name))

    def launched(
        self, reads: Sequence[torch.Tensor] = (), writes: Sequence[torch.Tensor] = (), what: str = "a kernel"
    ) -> None:
        """The calling thread is about to launch something on its current stream that torch does not see."""
        with self.lock:
            self._tell(self.thread(), self._current((*reads, *writes)), reads, writes, what)

    def did(
        self, reads: Sequence[torch.Tensor] = (), writes: Sequence[torch.Tensor] = (), what: str = "the host"
    ) -> None:
        """The calling thread itself reads or writes now, without an operator of torch."""
        with self.lock:
            self._tell(self.thread(), "", reads, writes, what)

    @contextlib.contextmanager
    def following(self) -> Generator[None]:
        """Follow the calling thread's operators; needed for threads that were started before the recording."""
        with taps.Following(self, self.thread()):
            yield

    # ------------------------------------------------------------ names

    def thread(self) -> str:
        """The calling thread, as an actor."""
        return self.name_of(threading.current_thread())

    def name_of(self, thread: threading.Thread) -> str:
        """A thread, as an actor. Two of the same name are two."""
        with self.lock:
            if thread not in self._names:
                self._names[thread] = f"thread {next(self._numbers)} ({thread.name})"
            return self._names[thread]

    def stream(self, device: str, handle: int) -> str:
        """A stream, as an actor."""
        port = self._keeper.devices.get(device)
        for attribute, name in (("_stream", "tolaria's copies"), ("_second", "tolaria's transfers")):
            own = getattr(port, attribute, None)
            if own is not None and int(own) == handle:
                return f"{device} {name}"
        return f"{device} stream {handle:#x}" if handle else f"{device} default stream"

    def _current(self, tensors: Iterable[torch.Tensor]) -> str:
        """The stream that an operator on these tensors goes to; empty where its caller does it."""
        for tensor in tensors:
            name = str(tensor.device)
            port: Any = self._keeper.devices.get(name)
            if port is not None and port.barrier.has_events:
                return self.stream(name, port._streams.current(port.index))
            if tensor.device.type == "cuda":
                return self.stream(name, torch._C._cuda_getCurrentRawStream(tensor.device.index))
        return ""

    # ------------------------------------------------------------ telling

    def _watch_state(self) -> None:
        known = {place.where for place in self._places}
        with torch.inference_mode(False):
            leaves = self._keeper.vault.state.survey().leaves
        for leaf in leaves.leaves:
            where = range_of(leaves.storages[leaf.storage].bytes)
            if where not in known:
                known.add(where)
                self._places.append(_Place(where, leaf.name))

    def _tell(
        self, thread: str, stream: str, reads: Iterable[torch.Tensor], writes: Iterable[torch.Tensor], what: str
    ) -> None:
        """Of what is watched among these."""
        touched = [
            (is_write, clipped, place)
            for tensors, is_write in ((reads, False), (writes, True))
            for tensor in tensors
            for clipped, place in self._watched(tensor)
        ]
        for is_write, where, place in touched:
            told = f"{what} of {place.name}"
            pair = ([], [where]) if is_write else ([where], [])
            self._tell_ranges(thread, stream, *pair, told)

    def _tell_ranges(self, thread: str, stream: str, reads: list[Range], writes: list[Range], what: str) -> None:
        if stream:
            self.ledger.launched(thread, stream, reads, writes, what)
        else:
            self.ledger.did(thread, reads, writes, what)

    def _watched(self, tensor: torch.Tensor) -> Iterator[tuple[Range, _Place]]:
        found = _range_or_none(tensor)
        if found is None:
            return
        space, start, size = found
        for place in self._places:
            if place.where[0] == space and (common := _overlap(place.where, start, size)):
                yield (space, *common), place

    # ------------------------------------------------------------ the user's operators

    def operator(self, thread: str, func: Any, args: Any, kwargs: Any) -> None:
        """A torch operator is about to be called."""
        if getattr(self._local, "is_ours", False) or func.is_view or func.overloadpacket.__name__ in _SEES_NOTHING:
            return
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return  # nothing happens now; replays are told of as a whole
        reads: list[torch.Tensor] = []
        writes: list[torch.Tensor] = []
        declared = func._schema.arguments
        named = {argument.name: argument for argument in declared}
        pairs = [*zip(declared, args, strict=False), *((named[key], value) for key, value in kwargs.items())]
        for argument, value in pairs:
            info = argument.alias_info
            tensors = [leaf for leaf in _pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
            (writes if info is not None and info.is_write else reads).extend(tensors)
        with self.lock:
            self._tell(thread, self._current((*writes, *reads)), reads, writes, str(func.overloadpacket))

    # ------------------------------------------------------------ the governor's copies and readings

    def performed(self, op: Any, perform: Callable[[Any], Any]) -> Any:
        """The governor performs an operation that reads or writes bytes."""
        errands, here = self._errands(op)
        before = getattr(self._local, "errands", None), getattr(self._local, "is_ours", False)
        self._local.errands, self._local.is_ours = errands, True
        try:
            with self.lock:
                for errand in here:
                    self._tell_ranges(self.thread(), "", errand.reads, errand.writes, errand.what)
            result = perform(op)
        finally:
            self._local.errands, self._local.is_ours = before
        if isinstance(op, Inspect):
            with self.lock:
                rows = [range_of(row) for row in self._rows_read(op)]
                self._tell_ranges(self.thread(), "", rows, [], f"Inspect(slot {op.slot})")
        elif isinstance(op, Survey):
            self._watch_state()
        return result

    def enqueued(self, device: str, handle: int) -> None:
        """The governor has a launch made on that stream."""
        errand = (getattr(self._local, "errands", None) or {}).pop(device, None)
        if errand is not None:
            with self.lock:
                actor = self.stream(device, handle)
                self.ledger.launched(self.thread(), actor, errand.reads, errand.writes, errand.what)

    def _errands(self, op: Any) -> tuple[dict[str, _Errand], list[_Errand]]:
        """What an operation does, by device where it is launched, and what its caller does."""
        found: dict[str, _Errand] = {}
        for name, errand in self._touches(op):
            if name in found:
                found[name] = _Errand(found[name].reads + errand.reads, found[name].writes + errand.writes, errand.what)
            else:
                found[name] = errand
        devices = self._keeper.devices
        at_once = [name for name in found if not devices[name].barrier.has_events]
        here = [found.pop(name) for name in at_once if devices[name].barrier is Barrier.HOST]
        for name in [name for name in at_once if name in found]:
            # the blocking barrier copies on its caller's stream
            errand = found.pop(name)
            with self.lock:
                handle = torch._C._cuda_getCurrentRawStream(torch.device(name).index or 0)
                stream = self.stream(name, handle)
                self.ledger.launched(self.thread(), stream, errand.reads, errand.writes, errand.what)
        return found, here

    def _touches(self, op: Any) -> Iterator[tuple[str, _Errand]]:
        vault = self._keeper.vault
        if isinstance(op, Copy):
            live, held = self._ends(op.slot, op.device, op.part)
            way = (live, held) if op.direction is Direction.CAPTURE else (held, live)
            yield op.device, _Errand(*way, f"Copy(slot {op.slot}, {op.part.value}, {op.direction.value})")
        elif isinstance(op, ReadLive):
            slot, is_last = vault.slots[op.slot], op.part is list(Part)[-1]
            for name in sorted({name for name, _ in slot.routes}):
                live, _ = self._ends(op.slot, name, op.part)
                yield name, _Errand(live, [], f"ReadLive(slot {op.slot}, {op.part.value})")
                if is_last and name in slot.restored._tallies:
                    row = range_of(slot.restored._tallies[name].row)
                    yield name, _Errand([], [row], f"ReadLive(slot {op.slot}, answer)")
        elif isinstance(op, Examine):
            for name, tally in vault.slots[op.slot].first._tallies.items():
                yield name, _Errand([], [range_of(tally.row)], f"Examine(slot {op.slot})")
        elif isinstance(op, Transfer):
            source, target = (vault.slots[index].arena for index in (op.source, op.target))
            assert source is not None
            assert target is not None
            for device, flat in source.flat.items():
                moved = [range_of(flat)], [range_of(target.flat[device])]
                yield str(device), _Errand(*moved, f"Transfer(slot {op.source} -> {op.target})")

    def _ends(self, slot: int, device: str, part: Part) -> tuple[list[Range], list[Range]]:
        memory = self._keeper.vault.slots[slot]
        assert memory.arena is not None
        assert memory.survey is not None
        indices = memory.arena.of(torch.device(device), part)
        live = [range_of(memory.survey.leaves.storages[i].bytes) for i in indices]
        return live, [range_of(memory.arena.views[i]) for i in indices]

    def _rows_read(self, op: Inspect) -> list[torch.Tensor]:
        slot = self._keeper.vault.slots[op.slot]
        examination = slot.restored if op.live else slot.first
        return [tally.row for tally in examination._tallies.values()]

    # ------------------------------------------------------------ the gate

    def changed(self, op: Change | Await) -> Any:
        """The same change of the host state, which tells of itself at the very moment in which it is made."""
        number, thread = threading.get_ident(), self.thread()

        def function(state: HostState) -> Any:
            answer = op.function(state)
            if answer is not None:
                with self.lock:
                    tell_gate(self.ledger, thread, number, state.gate, answer[0].gate)
            return answer

        return replace(op, function=function)

    def replayed(self) -> None:
        """A graph is about to be replayed on the current stream."""
        with self.lock, torch.inference_mode(False):
            storages = [storage.bytes for storage in self._keeper.vault.state.survey().leaves.storages]
            self._tell(self.thread(), self._current(storages), (), storages, "replay of a graph")


# ---------------------------------------------------------------- bytes


def range_of(tensor: torch.Tensor) -> Range:
    """The bytes from a tensor's first element to its last."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return str(tensor.device), tensor.data_ptr(), (reach + 1) * tensor.itemsize if tensor.numel() else 0


def _range_or_none(tensor: torch.Tensor) -> Range | None:
    try:
        return range_of(tensor)
    except RuntimeError:  # sparse, or of a class without memory of its own
        return None


def _overlap(where: Range, start: int, size: int) -> tuple[int, int] | None:
    first, end = max(where[1], start), min(where[1] + where[2], start + size)
    return (first, end - first) if first < end else None
