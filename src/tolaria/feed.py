"""FEED: delivers batches, keeps the last ones, and delivers them again after a rollback.

The data cursor and the optimizer cursor are two things: a rollback moves the optimizer's; whether batches are delivered
again (replay) or not (skip) is the recovery's decision. A live loader is never rewound.

Fetching may draw from global random state (shuffle seeds, augmentation in the main process). In an undisturbed run
those draws lie between two steps, so an exact replay must make them too: each delivery remembers random state before
and after its fetch where the two differ, and a repeated delivery that meets the same state moves on to the same
successor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree

from tolaria.state import rng


@dataclass(slots=True, eq=False)
class Delivery:
    """One batch that was handed out.

    Attributes:
        index: Running number over all loaders, from 0.
        batch: The batch, by reference.
        versions: Version counters of its tensors at delivery; a batch that was changed in place cannot be replayed.
        draws: Random state before and after the fetch, None when the fetch drew nothing.
    """

    index: int
    batch: Any
    versions: tuple[int, ...]
    draws: tuple[rng.RngState, rng.RngState] | None

    def is_unchanged(self) -> bool:
        """Whether nobody wrote into the batch since it was first delivered."""
        return self.versions == _versions(self.batch)


def _versions(batch: Any) -> tuple[int, ...]:
    return tuple(
        leaf._version
        for leaf in _pytree.tree_leaves(batch)
        if isinstance(leaf, torch.Tensor) and not leaf.is_inference()
    )


@dataclass(frozen=True, slots=True)
class Rewind:
    """What a rewind came to.

    Attributes:
        replayed: Batches that will be delivered again.
        skipped: Batches that will not.
        note: Why fewer could be replayed than was asked for; empty otherwise.
        drew: Some skipped batch had drawn from global random state while it was fetched.
    """

    replayed: int
    skipped: int
    note: str
    drew: bool


NO_REWIND = Rewind(0, 0, "", False)


class Feed:
    """The governed side of all loaders of one governor.

    Args:
        keep: Deliveries kept for replay.
        devices: Accelerators whose random state may be drawn from while fetching.
        track_draws: Whether global random state is restored by rollbacks, so that draws have to be followed.
    """

    def __init__(self, keep: int, devices: Sequence[torch.device], track_draws: Callable[[], bool]) -> None:
        self._kept: deque[Delivery] = deque(maxlen=keep)
        self._queue: deque[Delivery] = deque()
        self._open: list[int] = []
        self._next = 0
        self._dropped: set[int] = set()
        self._delivering = 0
        self._last_draw_not_kept = -1  # index of the latest delivery that drew and is not kept any more
        self._devices, self._track_draws = devices, track_draws

    @property
    def is_used(self) -> bool:
        """Whether any batch was ever delivered here."""
        return self._next > 0

    @property
    def position(self) -> int:
        """Index of the first batch that no completed step has consumed."""
        if self._open:
            return self._open[0]
        return self._queue[0].index if self._queue else self._next

    def consume(self) -> tuple[int, ...]:
        """A step has completed: the indices of the batches delivered for it."""
        taken = tuple(self._open)
        self._open.clear()
        return taken

    @property
    def is_delivering(self) -> bool:
        """Whether a loop is being fed now, so that the end of its body will be seen."""
        return self._delivering > 0

    @property
    def has_open(self) -> bool:
        """Whether a batch was delivered that no step has consumed yet."""
        return bool(self._open)

    def deliver(self, loader: Iterable[Any], settle: Callable[[], None]) -> Iterator[Any]:
        """Yield the batches of `loader`, and again those that a rollback put back.

        Args:
            loader: Any iterable.
            settle: Called whenever the loop asks for more, so at the end of its body, and again at the end of the
                loader. It may rewind, and so demand more deliveries.
        """
        self._delivering += 1
        try:
            source: Iterator[Any] | None = None
            while True:
                settle()
                if self._queue:
                    delivery = self._again(self._queue.popleft())
                else:
                    before = rng.read(self._devices) if self._track_draws() else None
                    source = iter(loader) if source is None else source
                    try:
                        batch = next(source)
                    except StopIteration:
                        return
                    delivery = self._first(batch, before)
                self._open.append(delivery.index)
                yield delivery.batch
        finally:
            self._delivering -= 1

    def _first(self, batch: Any, before: rng.RngState | None) -> Delivery:
        draws = None
        if before is not None:
            after = rng.read(self._devices)
            draws = None if before.equals(after) else (before, after)
        delivery = Delivery(self._next, batch, _versions(batch), draws)
        self._next += 1
        if len(self._kept) == self._kept.maxlen and self._kept[0].draws is not None:
            self._last_draw_not_kept = self._kept[0].index
        self._kept.append(delivery)
        return delivery

    def _again(self, delivery: Delivery) -> Delivery:
        if delivery.draws is not None and rng.read(self._devices).equals(delivery.draws[0]):
            rng.write(delivery.draws[1])
        return delivery

    def rewind(self, position: int, skip: range | None) -> Rewind:
        """Deliver again everything from `position` on, except the indices in `skip`; None skips all of it.

        What is no longer kept, or was changed in place, makes a replay impossible: then all of it is skipped.
        """
        due = [delivery for delivery in self._kept if delivery.index >= position]
        upcoming = self._queue[0].index if self._queue else self._next
        self._open.clear()
        delivered = [d for d in due if d.index < upcoming]
        dropped = delivered if skip is None else [d for d in due if d.index in skip]
        note = self._obstacle(position, due, dropped) if skip is not None else ""
        if note:
            dropped = delivered
        gone = {d.index for d in dropped}
        self._queue = deque(d for d in due if d.index not in gone)
        self._kept = deque((d for d in self._kept if d.index not in gone), maxlen=self._kept.maxlen)
        self._dropped |= gone
        drew = self._last_draw_not_kept >= position or any(d.draws is not None for d in dropped)
        return Rewind(len(self._queue), len(gone), note, drew)

    def _obstacle(self, position: int, due: list[Delivery], dropped: list[Delivery]) -> str:
        have = {d.index for d in due}
        missing = [i for i in range(position, self._next) if i not in have and i not in self._dropped]
        if missing:
            return f"{len(missing)} batches are no longer kept (keep_batches={self._kept.maxlen}): replay became a skip"
        gone = {d.index for d in dropped}
        changed = sum(1 for d in due if d.index not in gone and not d.is_unchanged())
        if changed:
            return f"{changed} batches were changed in place after delivery: replay became a skip"
        return ""
