"""Threads, and on a CUDA device streams, that keep a model busy while something else is done to it.

    with Turbulence(model, section=governor.using, seed=1) as turbulence:
        for _ in range(100):
            turbulence.during(governor.execute_rollback)
    assert not turbulence.found.torn

The tensors are dealt out to groups, and each group holds tags (`tags`). Workers exclude each other within a group, as a
program's own threads would; between them and what is done meanwhile stands only `section`. Without one they are writers
that nobody knows of.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from tolaria.errors import InvalidConfig, QuiesceTimeout
from tolaria.testing.gates import make_current
from tolaria.testing.tags import Tags, Torn, tag_in

T = TypeVar("T")

_LIMIT_S = 60.0
_MOST_LOOKS = 256
_MOST_CYCLES = 2_000_000  # about a millisecond of a device


class Turn:
    """The right to use some tensors: one thread at a time, and on a device behind what the last one launched."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._last: Any = None

    @contextlib.contextmanager
    def used(self, stream: torch.cuda.Stream | None) -> Generator[None]:
        """On that stream, behind what was launched before. The caller has taken `lock`."""
        if stream is None:
            yield
            return
        with torch.cuda.stream(stream):
            if self._last is not None:
                stream.wait_event(self._last)
            yield
            self._last = stream.record_event()


@dataclass(frozen=True, slots=True)
class Found:
    """What a turbulence did and saw.

    Attributes:
        writes: Steps of its writers.
        reads: Looks at a group, each inside a read section.
        calls: Of the user's own `work`.
        torn: Of the looks, those that saw several steps.
    """

    writes: int
    reads: int
    calls: int
    torn: tuple[Torn, ...]


class _Group:
    """Tensors that are written together, and the step that they hold."""

    def __init__(self, tags: Tags) -> None:
        self.tags, self.turn, self.tag = tags, Turn(), 1


class Turbulence:
    """Writers and readers at work on a model for as long as the block lasts. What its tensors held is overwritten.

    Args:
        sources: As for `Tags`: the model, its optimizers, or tensors.
        section: Opens a section, called as ``section(write=True)``: `TolariaGovernor.using`, or a lock of your own.
            None: the writers are unregistered, and ask nobody.
        work: Something of your own that reads the model, a forward for example. Called in read sections, without
            gradients, by any worker.
        threads: Workers.
        streams: Of the CUDA device of the tensors, which workers choose from; on a CPU there are none.
        groups: That the tensors are dealt out to. What is done meanwhile must keep each of them whole.
        seed: Of every choice that a worker makes. How threads take turns is up to the system.
        most: Steps after which a worker ends.
        pause_s: Longest time for which a writer waits half-way for `during`: what a call costs that waits for it.

    Threads: used by the one that built it.

    Raises:
        InvalidConfig: No worker, no group, or no step.
        UnsupportedState: Nothing can hold a tag.
    """

    def __init__(
        self,
        *sources: Any,
        section: Callable[..., AbstractContextManager[Any]] | None = None,
        work: Callable[[], object] | None = None,
        threads: int = 3,
        streams: int = 8,
        groups: int = 2,
        seed: int = 0,
        most: int = 1_000_000,
        pause_s: float = 0.2,
    ) -> None:
        if min(threads, groups, most) < 1 or streams < 0:
            seen = (
                f"threads={threads}, groups={groups}, most={most}, streams={streams}, expected 1 or more (streams: 0)"
            )
            raise InvalidConfig("building a turbulence", seen, "Correct the values.")
        tensors = Tags(*sources).tensors
        names = list(tensors)
        shares = [names[first::groups] for first in range(min(groups, len(names)))]
        self.seed = seed
        self._groups = [_Group(Tags({name: tensors[name] for name in share})) for share in shares]
        self._section = _unasked if section is None else section
        self._do, self._most, self._pause_s = work, most, pause_s
        self._device = device = next(iter(tensors.values())).device
        self._streams = [torch.cuda.Stream(device) for _ in range(streams)] if device.type == "cuda" else []
        self._lock = threading.Lock()
        self._looks: list[tuple[_Group, torch.Tensor]] = []
        self._torn: list[Torn] = []
        self._counts = {"writes": 0, "reads": 0, "calls": 0}
        self._errors: list[BaseException] = []
        self._stop = False
        self._wanted, self._midway, self._over = threading.Event(), threading.Event(), threading.Event()
        self._workers = [
            threading.Thread(target=self._run, args=(number,), name=f"turbulence-{number}", daemon=True)
            for number in range(threads)
        ]
        if self._streams:
            torch.cuda.synchronize(device)

    def __repr__(self) -> str:
        return f"Turbulence(threads={len(self._workers)}, streams={len(self._streams)}, seed={self.seed})"

    def __enter__(self) -> Turbulence:
        for worker in self._workers:
            worker.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """End all workers.

        Raises:
            QuiesceTimeout: One does not end.
            Whatever a worker raised, unless the block raised itself.
        """
        self._stop = True
        self._over.set()
        for worker in self._workers:
            worker.join(_LIMIT_S)
        left = [worker.name for worker in self._workers if worker.is_alive()]
        if left and kind is None:
            raise QuiesceTimeout(
                "ending a turbulence", f"{left} did not end within {_LIMIT_S:g} s", "Look at what holds their sections."
            )
        self._judge()
        if self._errors and kind is None:
            raise self._errors[0]

    # ------------------------------------------------------------ what the block does

    def during(self, call: Callable[[], T]) -> T:
        """Call something while a writer stands in the middle of a step, and answer what it answers.

        The writer goes on when the call has returned, or after `pause_s`: a call that waits for its section gets its
        way. So a call that keeps no order at all meets a half-written group each time, and not now and then.

        Raises:
            QuiesceTimeout: No writer gets to the middle of a step: all have ended, or something holds them up.
        """
        self._over.clear()
        self._midway.clear()
        self._wanted.set()
        try:
            if not self._waits_for_a_writer():
                alive = sum(worker.is_alive() for worker in self._workers)
                raise QuiesceTimeout(
                    "waiting for a writer to be in the middle of a step",
                    f"{alive} of {len(self._workers)} workers are at work, and none got there",
                    "Enter the block first, allow more steps (`most`), or look at what holds their sections.",
                ) from next(iter(self._errors), None)
            return call()
        finally:
            self._wanted.clear()
            self._over.set()
            if len(self._looks) > _MOST_LOOKS:
                self._judge()

    def _waits_for_a_writer(self) -> bool:
        for _ in range(int(_LIMIT_S * 20)):
            if self._midway.wait(0.05):
                return True
            if not any(worker.is_alive() for worker in self._workers):
                return False
        return False

    def torn(self, copy: Mapping[str, torch.Tensor]) -> list[Torn]:
        """What is torn in a copy of the tensors that somebody made meanwhile, group by group. Waits for the device.

        Args:
            copy: By name, for example from a `state_dict`. Groups without a name in it are passed over.
        """
        found = [one.tags.torn(copy) for one in self._groups if not copy.keys().isdisjoint(one.tags.tensors)]
        return [torn for torn in found if torn is not None]

    @property
    def found(self) -> Found:
        """What was done and seen so far; complete behind the block."""
        self._judge()
        with self._lock:
            return Found(**self._counts, torn=tuple(self._torn))

    def _judge(self) -> None:
        with self._lock:
            looks = list(self._looks)
            self._looks.clear()
        for group, extremes in looks:
            if tag_in(extremes) is None:  # waits for the device
                rows = zip(group.tags.tensors, extremes.tolist(), strict=True)
                torn = Torn({name: (row[0], row[1]) for name, row in rows})
                with self._lock:
                    self._torn.append(torn)

    # ------------------------------------------------------------ what workers do

    def _run(self, number: int) -> None:
        source = random.Random(f"{self.seed}/{number}")
        try:
            if self._device.type == "cuda":
                make_current(torch.cuda.current_stream(self._device))
            with torch.no_grad():
                for _ in range(self._most):
                    if self._stop:
                        return
                    self._choice(source)(source)
        except BaseException as error:
            self._errors.append(error)
            self._stop = True

    def _choice(self, source: random.Random) -> Callable[[random.Random], None]:
        choices: Sequence[Callable[[random.Random], None]] = (self._write, self._write, self._look)
        return source.choice((*choices, self._call) if self._do is not None else choices)

    def _write(self, source: random.Random) -> None:
        group = source.choice(self._groups)
        order = list(group.tags.tensors)
        source.shuffle(order)
        cycles = source.randrange(_MOST_CYCLES)
        stream = source.choice(self._streams) if self._streams else None

        def halfway() -> None:
            if stream is not None:
                torch.cuda._sleep(cycles)  # so that the second half is still to come when the section is over
            if self._wanted.is_set() and not self._midway.is_set():
                self._midway.set()
                self._over.wait(self._pause_s)

        with self._section(write=True), group.turn.lock, group.turn.used(stream):
            group.tag = group.tags.after(group.tag)
            group.tags.write(group.tag, order=order, halfway=halfway)
        self._count("writes")

    def _look(self, source: random.Random) -> None:
        group = source.choice(self._groups)
        stream = source.choice(self._streams) if self._streams else None
        with self._section(write=False), group.turn.lock, group.turn.used(stream):
            found = group.tags.look()
        with self._lock:
            self._looks.append((group, found))
            self._counts["reads"] += 1
            full = len(self._looks) > 4 * _MOST_LOOKS
        if full:
            self._judge()

    def _call(self, source: random.Random) -> None:
        assert self._do is not None
        stream = source.choice(self._streams) if self._streams else None
        with self._section(write=False), contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
            self._do()
        self._count("calls")

    def _count(self, what: str) -> None:
        with self._lock:
            self._counts[what] += 1


def _unasked(*, write: bool) -> AbstractContextManager[None]:
    """No section: nobody is asked."""
    return contextlib.nullcontext()
