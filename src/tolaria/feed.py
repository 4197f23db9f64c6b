"""FEED: delivers batches, keeps the last ones, and delivers them again after a rollback.

The data cursor and the optimizer cursor are two things: a rollback moves the optimizer's; whether batches are delivered
again (replay) or not (skip) is the recovery's decision. A live loader is never rewound.

Fetching may draw from global random state (shuffle seeds, augmentation in the main process). In an undisturbed run
those draws lie between two steps, so an exact replay must make them too: each delivery remembers random state before
and after its fetch where the two differ, and a repeated delivery that meets the same state moves on to the same
successor.

The body of a loop is only run again for its own batches: they come again in their order to the loop that they were
delivered to, or to a later one over the same loader or at the same place in the program (the next epoch). What belongs
to another loop is left out when its turn comes.
"""

from __future__ import annotations

import copy
import os
import sys
import sysconfig
import threading
import weakref
from collections import UserDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
import xxhash
from torch.utils import _pytree

from tolaria.report import logger
from tolaria.state import rng

_INSTALLED = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")})


class _Pass:
    """One loop over a loader.

    Args:
        loader: What it goes over; held weakly where Python can.

    Attributes:
        has_ended: Whether it asks for no more.
    """

    def __init__(self, loader: Any) -> None:
        self.has_ended = False
        self._place = _place()
        try:
            self._loader: Callable[[], Any] = weakref.ref(loader)
        except TypeError:  # a list, a tuple
            self._loader = lambda: loader

    def may_have(self, other: _Pass, loader: Any) -> bool:
        """Whether what was delivered to `other` may come to this loop, which goes over `loader`."""
        return other is self or (other.has_ended and (other._place == self._place or other._loader() is loader))


def _place() -> tuple[Any, int] | None:
    """Where in the program the loop stands that asks.

    Outside of this library, and of all that are installed (a progress bar, a framework), if there is such a place.
    """
    frame: Any = sys._getframe(1)
    nearest = None
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] != __package__:
            place = frame.f_code, frame.f_lineno
            if not frame.f_code.co_filename.startswith(_INSTALLED):
                return place
            nearest = nearest or place
        frame = frame.f_back
    return nearest


@dataclass(slots=True, eq=False)
class Delivery:
    """One batch that was handed out.

    Attributes:
        index: Running number over all loaders, from 0.
        batch: The batch, by reference.
        versions: Marks of its tensors and arrays at delivery; a batch that was changed in place cannot be replayed.
        drew: Fetching it drew from global random state.
        before: Random state before the fetch; None when the fetch drew nothing, or states are not followed.
        after: Random state when it was handed out last; None when states are not followed.
        loop: To which it was handed out first.
    """

    index: int
    batch: Any
    versions: tuple[Any, ...]
    drew: bool
    before: rng.RngState | None
    after: rng.RngState | None
    loop: _Pass

    def is_unchanged(self) -> bool:
        """Whether nobody wrote into the batch since it was first delivered."""
        return self.versions == _versions(self.batch)


def _versions(batch: Any) -> tuple[Any, ...]:
    """Version counters of tensors; digests of NumPy arrays, which have no counter."""
    marks: list[Any] = []
    for leaf in _pytree.tree_leaves(batch):
        if isinstance(leaf, torch.Tensor):
            marks.append(None if leaf.is_inference() else leaf._version)
        elif type(leaf).__module__ == "numpy" and hasattr(leaf, "tobytes"):
            marks.append(xxhash.xxh3_64_intdigest(leaf.tobytes()))
        elif (content := _content(leaf)) is not None:
            marks.append(_versions(content))
    return tuple(marks)


def _content(leaf: Any) -> dict[str, Any] | None:
    """What is in a container that torch's pytree takes for a leaf: a dataclass or a `UserDict` (`BatchEncoding`)."""
    if isinstance(leaf, UserDict):
        return leaf.data
    if is_dataclass(leaf) and not isinstance(leaf, type):
        return {field.name: getattr(leaf, field.name) for field in fields(leaf) if hasattr(leaf, field.name)}
    return None


def _handed_out(leaf: Any) -> Any:
    """The leaf itself; a container among the leaves as a copy of its own."""
    content = _content(leaf)
    if content is None:
        return leaf
    own, content = copy.copy(leaf), _pytree.tree_map(_handed_out, content)
    if isinstance(own, UserDict):
        own.data = content
    else:
        for name, value in content.items():
            object.__setattr__(own, name, value)  # it may be frozen
    return own


@dataclass(frozen=True, slots=True)
class Rewind:
    """What a rewind came to.

    Attributes:
        replayed: Batches that will be delivered again.
        skipped: Batches that will not.
        note: Why fewer could be replayed than was asked for; empty otherwise.
        drew: Some skipped batch had drawn from global random state while it was fetched.
        ahead: Batches that were not fetched yet, and will be left out when they are.
    """

    replayed: int
    skipped: int
    note: str
    drew: bool
    ahead: int = 0


NO_REWIND = Rewind(0, 0, "", False)


class Feed:
    """The governed side of all loaders of one governor.

    Args:
        keep: Deliveries kept for replay; None: those of `num_steps` steps, however many batches a step consumes.
        devices: Accelerators whose random state may be drawn from while fetching.
        track_draws: Whether global random state is restored by rollbacks, so that draws have to be followed.

    Attributes:
        passes: Deliveries of a loader that have ended; what follows one is not the body of its loop.
        first_of_pass: Index of the first batch of the pass that began last.
        num_steps: Asked for how many steps batches are to be kept. Its greatest answer so far counts: snapshots of a
            slower pace are still there.
        on_left_out: Called for each batch that is left out when its turn comes.

    Threads: one may rewind while others are delivered to; a loader itself is asked without any lock held.
    """

    def __init__(self, keep: int | None, devices: Sequence[torch.device], track_draws: Callable[[], bool]) -> None:
        self._kept: deque[Delivery] = deque()
        self._keep, self._widest = keep, 1
        self.num_steps: Callable[[], int] = lambda: 1
        self._most_steps = 0
        self._queue: deque[Delivery] = deque()
        self._open: list[int] = []
        self._next = 0
        self._dropped: set[int] = set()
        self._left_out_before = 0  # batches below this index are left out when they are fetched
        self.on_left_out: Callable[[], None] = lambda: None
        self._delivering = 0
        self.passes = self.first_of_pass = 0
        self._taken: list[int] = []  # batches consumed by the first step of this pass, and by the last two
        self._left_over = 0  # open ones of a body that broke off: they do not count there
        self._last_draw_not_kept = -1  # index of the latest delivery that drew and is not kept any more
        self._exact_before = 0  # deliveries again below this index find the random state they found before
        self._stale: set[int] = (
            set()
        )  # behind a batch that was left out, and not delivered since: theirs is of another run
        self._devices, self._track_draws = devices, track_draws
        self._lock = threading.RLock()

    @property
    def is_used(self) -> bool:
        """Whether any batch was ever delivered here."""
        return self._next > 0

    @property
    def position(self) -> int:
        """Index of the first batch that no completed step has consumed."""
        with self._lock:
            if self._open:
                return self._open[0]
            return self._queue[0].index if self._queue else self._next

    @property
    def upcoming(self) -> int:
        """Index of the next batch to be handed out."""
        with self._lock:
            return self._queue[0].index if self._queue else self._next

    @property
    def num_again(self) -> int:
        """Batches that wait to be delivered again."""
        return len(self._queue)

    @property
    def capacity(self) -> int:
        """Deliveries kept for replay now."""
        if self._keep is not None:
            return self._keep
        self._most_steps = max(self._most_steps, self.num_steps())
        return self._most_steps * self._widest

    def consume(self) -> tuple[int, ...]:
        """A step has completed: the indices of the batches delivered for it."""
        with self._lock:
            taken = tuple(self._open)
            self._open.clear()
            count, self._left_over = len(taken) - self._left_over, 0
            self._taken = [*self._taken[:1], *self._taken[1:][-1:], count]
            return taken

    @property
    def is_in_step(self) -> bool:
        """Whether the loop holds no batch back: its steps, two at least in this pass, took as many batches each.

        The first step of a loop that fetches ahead takes what it has fetched for later ones as well.
        """
        return len(self._taken) > 1 and len(set(self._taken)) == 1

    @property
    def is_delivering(self) -> bool:
        """Whether a loop is being fed now, so that the end of its body will be seen."""
        return self._delivering > 0

    @property
    def num_delivering(self) -> int:
        """Loops that are being fed now."""
        return self._delivering

    @property
    def has_open(self) -> bool:
        """Whether a batch was delivered that no step has consumed yet."""
        return bool(self._open)

    def deliver(self, loader: Iterable[Any], settle: Callable[[bool], None]) -> Iterator[Any]:
        """Yield the batches of `loader`, and again those that a rollback put back.

        Args:
            loader: Any iterable.
            settle: Called with False whenever the loop asks for more, so at the end of its body, and with True at the
                end of the loader. It may rewind, and so demand more deliveries.
        """
        loop = _Pass(loader)
        with self._lock:
            self._delivering += 1
            self.first_of_pass = self._next
            self._taken = []
            self._left_over = len(self._open)
        try:
            source: Iterator[Any] | None = None
            while True:
                settle(False)
                delivery = self._again(loop, loader)
                if delivery is None:
                    before = rng.read(self._devices) if self._track_draws() else None
                    source = iter(loader) if source is None else source
                    try:
                        batch = self._next_wanted(source)
                    except StopIteration:
                        source = iter(())  # some begin anew when they are asked once more, as after a replay
                        settle(True)
                        if self._queue:
                            continue
                        return
                    delivery = self._first(batch, before, loop)
                # containers of its own: what the loop puts into or takes out of them does not reach the kept batch
                yield _pytree.tree_map(_handed_out, delivery.batch)
        finally:
            with self._lock:
                self._delivering -= 1
                self.passes += 1
                loop.has_ended = True

    def _next_wanted(self, source: Iterator[Any]) -> Any:
        """The next batch of the loader that no rollback has decided to leave out."""
        while True:
            batch = next(source)
            with self._lock:
                if self._next >= self._left_out_before:
                    return batch
                self._dropped.add(self._next)
                self._next += 1
            self.on_left_out()

    def _first(self, batch: Any, before: rng.RngState | None, loop: _Pass) -> Delivery:
        after = None if before is None else rng.read(self._devices)
        drew = before is not None and after is not None and not before.equals(after)
        with self._lock:
            delivery = Delivery(self._next, batch, _versions(batch), drew, before if drew else None, after, loop)
            self._next += 1
            self._kept.append(delivery)
            self._open.append(delivery.index)
            self._widest = max(self._widest, len(self._open))
            while len(self._kept) > self.capacity:
                given_up = self._kept.popleft()
                if given_up.drew:
                    self._last_draw_not_kept = given_up.index
        return delivery

    def _again(self, loop: _Pass, loader: Any) -> Delivery | None:
        self._leave_out_others(loop, loader)
        with self._lock:
            if not self._queue:
                return None
            delivery = self._queue.popleft()
            self._stale.discard(delivery.index)
            self._open.append(delivery.index)
        if delivery.after is None or not self._track_draws():
            return delivery
        if delivery.index < self._exact_before:
            # whatever drew between two steps, fetching or the user's code between epochs, has drawn the same again
            rng.write(delivery.after)
        else:
            now = rng.read(self._devices)
            if delivery.before is not None and now.equals(delivery.before):
                rng.write(delivery.after)
            else:
                delivery.before, delivery.after = None, now
        return delivery

    def _leave_out_others(self, loop: _Pass, loader: Any) -> None:
        """What comes before the next batch of this loop and belongs to another one, whose body will not run for it."""
        others: list[int] = []
        drew = False
        with self._lock:
            while self._queue and not loop.may_have(self._queue[0].loop, loader):
                drew = drew or self._queue[0].drew
                others.append(self._queue.popleft().index)
            if others:
                gone = set(others)
                self._kept = deque(delivery for delivery in self._kept if delivery.index not in gone)
                self._dropped |= gone
                # from here on the run is another one
                self._stale |= {delivery.index for delivery in self._queue}
                self._exact_before = min(self._exact_before, others[0])
        if others:
            logger.warning(
                "%d batches do not come again (%d to %d): they belong to another loop than the one that asks",
                len(others),
                others[0],
                others[-1],
            )
        if drew and self._track_draws():
            rng.rekey(others[-1])  # random state is that of before their fetches, and would repeat their shuffle
        for _ in others:
            self.on_left_out()

    def note_random_state(self) -> None:
        """Random state was set since the last delivery: should it come again, it finds random state as it is now."""
        with self._lock:
            if self._kept and self._kept[-1].after is not None:
                self._kept[-1].after = rng.read(self._devices)

    def rewind(self, position: int, skip: range | None, restores_random_state: bool, further: int = 0) -> Rewind:
        """Deliver again everything from `position` on, except the indices in `skip`; None skips all of it.

        `further` batches behind `skip` are left out as well, also those that no loader has delivered yet.

        Up to the first batch that is left out the run repeats itself, so random state at each delivery is put back to
        what it was there (if rollbacks restore it at all).

        What is no longer kept, or was changed in place, makes a replay impossible: then all of it is skipped.
        """
        with self._lock:
            before = self._left_out_before
            if skip is not None and further:
                skip = range(skip.start, skip.stop + further)
                self._left_out_before = max(before, skip.stop)
            ahead = max(0, self._left_out_before - max(self._next, before))
            found = self._rewind(position, skip, restores_random_state)
            return replace(found, ahead=ahead) if ahead else found

    def obstacle(self, position: int) -> str:
        """Why not everything from `position` on could be delivered again; empty if it could."""
        with self._lock:
            return self._obstacle(position, [delivery for delivery in self._kept if delivery.index >= position], [])

    def _rewind(self, position: int, skip: range | None, restores_random_state: bool) -> Rewind:
        if not self._next:
            return NO_REWIND  # no loader is watched
        due = [delivery for delivery in self._kept if delivery.index >= position]
        upcoming = self.upcoming
        self._open.clear()
        self._left_over = 0
        delivered = [d for d in due if d.index < upcoming]
        dropped = delivered if skip is None else [d for d in due if d.index in skip]
        note = self._obstacle(position, due, dropped) if skip is not None else ""
        if note:
            dropped = [d for d in due if d.index < upcoming or (skip is not None and d.index in skip)]
            note = f"{note}: replay became a skip"
        gone = {d.index for d in dropped}
        if note or skip is None:
            gone |= set(self._missing(position, due))
        self._queue = deque(d for d in due if d.index not in gone)
        self._kept = deque(d for d in self._kept if d.index not in gone)
        self._dropped |= gone
        drew = self._last_draw_not_kept >= position or any(d.drew for d in dropped)
        repeats = restores_random_state and not (gone and drew)
        self._stale = {d.index for d in self._queue if d.index in self._stale or (gone and d.index > min(gone))}
        self._exact_before = min(gone | self._stale, default=self._next) if repeats else 0
        return Rewind(len(self._queue), len(gone), note, drew)

    def _obstacle(self, position: int, due: list[Delivery], dropped: list[Delivery]) -> str:
        missing = self._missing(position, due)
        if missing:
            return f"{len(missing)} batches are no longer kept (keep_batches={self.capacity})"
        gone = {d.index for d in dropped}
        changed = sum(1 for d in due if d.index not in gone and not d.is_unchanged())
        if changed:
            return f"{changed} batches were changed in place after delivery"
        return ""

    def _missing(self, position: int, due: list[Delivery]) -> list[int]:
        """Batches from `position` on that should come again, and are not kept."""
        have = {d.index for d in due}
        return [i for i in range(position, self._next) if i not in have and i not in self._dropped]
