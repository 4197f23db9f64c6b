"""SLOT: what one slot of the ring owns, and what follows from the layout of the train state that it is to hold."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tolaria import arena
from tolaria.arena import Arena
from tolaria.examination import Digest, Examination
from tolaria.operations import Part
from tolaria.ring import Tier
from tolaria.route import Route
from tolaria.state.leaves import Leaf, Leaves
from tolaria.state.train_state import HostValues, SurveyResult


@dataclass(slots=True, eq=False)
class SlotMemory:
    """What one slot owns.

    Attributes:
        tier: Where its bytes are.
        arena: The bytes.
        survey: What they are the bytes of.
        host: Values besides.
        routes: Between the arena and the storages that it holds the bytes of, by device and part.
        laid: What the routes lead to, as long as it stands where its survey found it.
        single: What of it is searched for non-finite values leaf by leaf.
        standing: At the last check, every tensor and module stood where the survey had found it.
        first: The first reading of the bytes; `again`: a later one; `restored`: of storages restored from here.
        digest: From the first reading; None until its answer was asked for.
        at_rest: In the host tier, of the bytes of accelerators' storages here: xxh3-128 by device.
        nonfinite: Names of tensors that were found not to be finite.
        reading: Held by whoever asks for a reading.
    """

    tier: Tier
    first: Examination
    again: Examination
    restored: Examination
    arena: Arena | None = None
    survey: SurveyResult | None = None
    host: HostValues | None = None
    routes: dict[tuple[str, Part], Route] = field(default_factory=dict)
    laid: Leaves | None = None
    single: Sequence[Leaf] = ()
    standing: bool = False
    digest: Digest | None = None
    at_rest: dict[str, int] = field(default_factory=dict)
    nonfinite: tuple[str, ...] = ()
    reading: threading.Lock = field(default_factory=threading.Lock)

    def empty(self) -> None:
        """Its contents are given up; memory and routes stay for the next ones."""
        self.survey = self.host = self.digest = None
        self.standing = False
        self.at_rest.clear()
        self.nonfinite = ()
        self.first.under_way = self.restored.under_way = False


class Beside(Protocol):
    """Memory of ours besides slots, for which a budget has to leave room. By device, or `budget.MAIN_MEMORY`."""

    def held_bytes(self) -> Counter[str]:
        """What it takes now."""
        ...

    def needed_bytes(self, surveyed: SurveyResult) -> Counter[str]:
        """What it takes at most, for that layout."""
        ...


class Layout:
    """What follows from where tensors are, for as long as surveys meet the very same ones.

    Attributes:
        leaves: The tensors.
        signature: Their layout.
        names: The devices that hold them, sorted.
        on_host: Those of their storages that are in main memory.
    """

    def __init__(self, leaves: Leaves) -> None:
        self.leaves = leaves
        self.signature = arena.signature_of(leaves.storages)
        self.names = sorted({str(storage.key[0]) for storage in leaves.storages})
        self.on_host = [storage.bytes for storage in leaves.storages if storage.key[0].type == "cpu"]
