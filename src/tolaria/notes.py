"""NOTES: the memory of notes (`tolaria.noting`): whatever a step changes, less what the optimizers leave behind.

A note surveys the train state as a snapshot does, and holds its host values; of its bytes only those in storages that
hold anything else than parameters, moments and step counts of `tolaria.optim`. Of those it holds a mark of each
optimizer, and the steps after it leave their old bytes behind.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch.optim import Optimizer

from tolaria import arena, budget
from tolaria.arena import Arena, Signature
from tolaria.barriers import Ground
from tolaria.driver import Driver, Table
from tolaria.errors import InvalidConfig, NoSnapshot, UnsupportedState
from tolaria.noting import Place, SteppedBack, note, step_back
from tolaria.operations import (
    Barrier,
    CaptureHost,
    Check,
    Copy,
    Direction,
    Part,
    Places,
    Reserve,
    RestoreHost,
    Survey,
)
from tolaria.optim import marks
from tolaria.optim.leaving import Leaving
from tolaria.optim.marks import Mark, Pair
from tolaria.ring import Tier
from tolaria.shield import Shield
from tolaria.snapshot import Vault
from tolaria.state.standing import StateImprint
from tolaria.state.train_state import SurveyResult
from tolaria.state.wrappers import is_wrapper

_FIRST_PART, *_ = Part
_DOING = "stepping back"


@dataclass(slots=True, eq=False)
class _Note:
    """What is known of one note besides its memory.

    Attributes:
        place: Where it is.
        marked: Ids of the tensors whose bytes are left to the optimizers.
        marks: Of each optimizer.
        back: The copies of what the optimizers have left, by device, once somebody goes back.
    """

    place: Place
    marked: frozenset[int]
    marks: list[Mark]
    back: dict[str, list[Pair]] = field(default_factory=dict)


class Notes(Vault):
    """Notes of the last steps of one train state.

    Args:
        vault: Of its snapshots: the same state, devices and journal.
        driver: Runs the protocols, and performs what concerns no memory.
        optimizers: All that are governed.
        steps: How many steps back notes are kept for.
        witness: A method that counts sections of writers whose writes torch may not see. The optimizers hold it weakly.

    Raises:
        UnsupportedState: An optimizer leaves nothing behind, or parameters are wrapper subclasses.
        InvalidConfig: One keeps fewer steps.

    Threads: as of `Vault`. Notes come and go under the exclusive gate, or as a whole (`forget`).
    """

    def __init__(
        self, vault: Vault, driver: Driver, optimizers: Sequence[Optimizer], steps: int, witness: Callable[[], int]
    ) -> None:
        self._optimizers = [_leaving(optimizer, steps) for optimizer in optimizers]
        if not self._optimizers:
            raise _unsupported("the governor has no optimizer, expected some")
        self._driver, self._witness = driver, _weak(witness)
        tier = Tier.HOST if vault.devices.barrier is Barrier.HOST else Tier.DEVICE
        room = budget.Request({}, 0, steps + 1, 0, tier.value, None, None)
        taken = vault.with_rng, vault.read_journal, vault.write_journal
        super().__init__(vault.state, [tier] * (steps + 1), vault.devices, room, *taken)
        self._notes: dict[int, _Note] = {}
        self.are_forgotten = False  # and none was taken since
        self._target: _Note | None = None  # under the gate: a rollback that has left it may forget all notes meanwhile
        self._imprints: dict[tuple[int, ...], StateImprint | None] = {}  # by where the moments are; the newest last
        kept = [each._past.options.history for each in self._optimizers if each._past.options.alternate]
        self._most_places = 1 + max(kept, default=0)
        self._left_out: dict[int, frozenset[int]] = {}  # by note: storages without a place in its memory
        self._table: Table = {
            Survey: self.survey,
            Reserve: self.reserve,
            Copy: self.copy,
            CaptureHost: self.capture_host,
            Check: self.check,
            RestoreHost: self.restore_host,
        }

    # ------------------------------------------------------------ from outside

    def take(self, shield: Shield, ground: Ground) -> None:
        """Take a note of the present state, in the place of the oldest one. Raises as `noting.note`."""
        held = dict(self._notes)
        free = [index for index in range(len(self.slots)) if index not in held]
        index = free[0] if free else min(held, key=lambda one: held[one].place.step)
        before, self.are_forgotten = held.get(index), False
        try:
            self._driver.submit(note(threading.get_ident(), ground, index), shield, self._table)
        except BaseException:
            if self._notes.get(index) is not before:  # else nothing was changed, and what is there is as good as it was
                self._notes.pop(index, None)
            raise

    def can_be_taken(self) -> bool:
        """Whether there is something to note, and nothing that would make it worthless."""
        return not self._driver.state.torn and not any(optimizer._past.captured for optimizer in self._optimizers)

    def step_back(self, shield: Shield, ground: Ground, wanted: Callable[[int], int]) -> SteppedBack:
        """Go back to the note of a step.

        Args:
            shield: Holds signals back until the caller has noted the result as well.
            ground: Barrier and time-out.
            wanted: That step, by the number of those completed when nobody makes any more.

        Raises:
            NoSnapshot: There is no note of that step, or something is in the way of what the optimizers have left.
            StateMismatch, and what else `noting.step_back` raises.
        """
        choose = functools.partial(self._choose, wanted)
        protocol = step_back(threading.get_ident(), ground, choose, _DOING)
        done: SteppedBack = self._driver.submit(protocol, shield, self._table)
        return done

    def forget(self) -> None:
        """A rollback by other means: the notes are of another past."""
        self._notes.clear()
        self.are_forgotten = True

    def num_bytes_held(self) -> int:
        """Memory that the notes take."""
        return sum(self.num_bytes(index) for index in range(len(self.slots)))

    def needed_bytes(self, surveyed: SurveyResult) -> Counter[str]:
        """Memory that all notes take once they are there, by device, or `budget.MAIN_MEMORY`: for a budget.

        Args:
            surveyed: For a snapshot: notes hold no gradients.
        """
        leaves, found = surveyed.leaves, Counter[str]()
        gradients = {leaves.leaves[ref.index].storage for _, ref in surveyed.gradients if not ref.wrapped}
        left_out, signature = self._of_the_optimizers(surveyed) | gradients, arena.signature_of(leaves.storages)
        sizes = arena.num_bytes(_of(signature, _kept(signature, left_out)))
        for device, size in sizes.items():
            found[self._place(str(device), self.tiers[0])] += size * len(self.tiers)
        return found

    def close(self) -> None:
        """Let go of everything. The devices are the vault's."""
        self._notes.clear()
        self._target = None
        self._imprints.clear()
        self.slots = [self._empty_slot(tier) for tier in self.tiers]
        self._surveyed = self._layout = None
        for optimizer in self._optimizers:
            if optimizer._past.witness is self._witness:  # and not of a governor that came after this one
                optimizer._past.witness = None

    # ------------------------------------------------------------ operations

    def survey(self, op: Survey) -> Places:
        """Perform `Survey`. Where moments alternate, a survey that stands is that of when they were there before."""
        where = tuple(map(_first_moment, self._optimizers))
        self.state.exchange_imprint(self._imprints.pop(where, None))
        places = super().survey(op)
        self._imprints[where] = self.state.exchange_imprint()
        while len(self._imprints) > self._most_places:
            del self._imprints[next(iter(self._imprints))]
        return places

    def lay_plan(self, surveyed: SurveyResult) -> None:
        """Notes have no tier to choose: they stay beside the train state."""

    def reserve(self, op: Reserve) -> None:
        """Perform `Reserve`, for what the optimizers do not leave behind."""
        slot, surveyed = self.slots[op.slot], self._take_survey()
        self._notes.pop(op.slot, None)
        slot.empty()
        if surveyed.leaves.wrappers:
            raise _unsupported(f"{surveyed.leaves.wrappers[0].name} is a wrapper subclass")
        left_out, signature = self._of_the_optimizers(surveyed), self._layout_of(surveyed.leaves).signature
        fits = slot.arena is not None and slot.arena.signature == signature
        if slot.arena is None or not fits or self._left_out.get(op.slot) != left_out:
            slot.arena = slot.laid = None  # freed before its successor is allocated
            slot.routes.clear()
            with self._on_streams():
                slot.arena = _without(left_out, signature, slot.tier)
            self._left_out[op.slot] = left_out
        self._lay_routes(slot, slot.arena, surveyed)
        slot.survey = surveyed

    def _of_the_optimizers(self, surveyed: SurveyResult) -> frozenset[int]:
        """Storages of which the steps of one optimizer leave every byte behind that they change."""
        counts = Counter(id(tensor) for optimizer in self._optimizers for tensor in marks.tensors_of(optimizer))
        leaves = surveyed.leaves
        others = {leaf.storage for leaf in leaves.leaves if counts[id(leaf.tensor)] != 1}
        return frozenset(range(len(leaves.storages))) - others

    def copy(self, op: Copy) -> None:
        """Perform `Copy`."""
        route = self.slots[op.slot].routes.get((op.device, op.part))
        if op.direction is Direction.CAPTURE:
            if route is not None:
                route.capture(None)
            return
        if op.part is _FIRST_PART:
            # before what the note holds itself: of a parameter that two optimizers step it is the note that knows
            pairs = self._going_to().back.pop(op.device, [])
            if pairs:
                self._move(op.device, pairs)
        if route is not None:
            route.restore()

    def _move(self, device: str, pairs: list[Pair]) -> None:
        self.devices[device].enqueue(functools.partial(marks.copy, pairs))

    def capture_host(self, op: CaptureHost) -> int:
        """Perform `CaptureHost`: the note is complete but for its publication."""
        completed = Vault.capture_host(self, op)
        _, surveyed, _ = self._filled(op.slot)
        left_out = self._left_out[op.slot]
        marked = frozenset(id(leaf.tensor) for leaf in surveyed.leaves.leaves if leaf.storage in left_out)
        place = Place(op.slot, completed, self._driver.state.next_snapshot)
        self._drop(lambda step: step >= completed)  # of the same step once more, or of a future that was abandoned
        self._notes[op.slot] = _Note(place, marked, self._mark(marked))
        return completed

    def _mark(self, marked: frozenset[int]) -> list[Mark]:
        for optimizer in self._optimizers:
            optimizer._past.witness = self._witness  # gone where a state was loaded
        return [marks.mark(optimizer, marked) for optimizer in self._optimizers]

    def newest_before(self, step: int) -> int | None:
        """The newest step before this one that there is a note of."""
        return max((one.place.step for one in list(self._notes.values()) if one.place.step < step), default=None)

    def _choose(self, wanted: Callable[[int], int]) -> Place:
        completed = self.read_journal(False).completed
        step, held = wanted(completed), {one.place.step: one for one in list(self._notes.values())}
        self._target = held.get(step)
        if self._target is None:
            raise NoSnapshot(
                _DOING,
                f"from step {completed} to step {step}: notes are held of steps {sorted(held)}",
                "Notes are taken by step(), and dropped by a rollback. Use execute_rollback(), or raise past_steps.",
            )
        return self._target.place

    def _going_to(self) -> _Note:
        assert self._target is not None
        return self._target

    def check(self, op: Check) -> Places:
        """Perform `Check`, and find the copies."""
        known = self._going_to()
        for optimizer, mark in zip(self._optimizers, known.marks, strict=True):
            reason = marks.obstacle(optimizer, mark)
            if reason:
                raise NoSnapshot(_DOING, f"to step {known.place.step}: {reason}", "Use execute_rollback().")
        places = Vault.check(self, op)
        known.back = {}
        for pair in (pair for mark in known.marks for pair in marks.way_back(mark)):
            known.back.setdefault(str(pair[0].device), []).append(pair)
        return places

    def restore_host(self, op: RestoreHost) -> bool:
        """Perform `RestoreHost`. Later notes are of an abandoned future; this one is of the present state again."""
        known = self._going_to()
        alive = Vault.restore_host(self, op)
        for mark in known.marks:
            marks.rewind(mark)
        known.marks = self._mark(known.marked)
        self._drop(lambda step: step > known.place.step)
        self._notes[op.slot], self._target = known, None
        return alive

    def _drop(self, unwanted: Callable[[int], bool]) -> None:
        for index, one in list(self._notes.items()):
            if unwanted(one.place.step):
                self._notes.pop(index, None)


def lay_first_plan(vault: Vault, notes: Notes | None, surveyed: SurveyResult) -> None:
    """Lay the first plan of a vault, which from now on leaves room for notes.

    Raises:
        BudgetExceeded: It fits nowhere. The vault is closed.
    """
    vault.beside = notes
    try:
        vault.lay_plan(surveyed)
    except BaseException:
        vault.close()
        raise


def _leaving(optimizer: Optimizer, steps: int) -> Leaving:
    if not isinstance(optimizer, Leaving):
        raise _unsupported(f"{type(optimizer).__module__}.{type(optimizer).__qualname__} leaves nothing behind")
    if any(is_wrapper(parameter) for group in optimizer.param_groups for parameter in group["params"]):
        raise _unsupported("parameters are wrapper subclasses")
    if optimizer._past.options.history < steps:
        raise InvalidConfig(
            "attaching the governor",
            f"past_steps={steps}, and an optimizer has history={optimizer._past.options.history}",
            f"Build it with history={steps} or more; nothing was attached.",
        )
    return optimizer


def _first_moment(optimizer: Leaving) -> int:
    """Tells which of its sets of moments an optimizer holds, if it holds any."""
    moments = (state[name] for state in optimizer.state.values() for name in optimizer._names_in(state))
    return id(next(moments, None))


def _weak(witness: Callable[[], int]) -> Callable[[], int]:
    method = weakref.WeakMethod(witness)

    def count() -> int:
        live = method()
        return -1 if live is None else live()  # whoever would ask is gone as well

    return count


def _unsupported(seen: str) -> UnsupportedState:
    return UnsupportedState(
        "keeping notes of single steps",
        f"past_steps is set, and {seen}",
        "Use the optimizers of tolaria.optim, or past_steps=0; docs/optim.md says what else is in the way.",
    )


def _kept(signature: Signature, left_out: frozenset[int]) -> list[int]:
    return [index for index in range(len(signature)) if index not in left_out]


def _of(signature: Signature, kept: Sequence[int]) -> Signature:
    return tuple(signature[index] for index in kept)


def _without(left_out: frozenset[int], signature: Signature, tier: Tier) -> Arena:
    """Memory for a layout without some of its storages. Indices stay those of the survey."""
    kept = _kept(signature, left_out)
    held = arena.allocate(_of(signature, kept), tier, "keeping notes of single steps")
    views = [torch.empty(0, dtype=torch.uint8)] * len(signature)
    for place, index in enumerate(kept):
        views[index] = held.views[place]
    return Arena(signature, held.flat, views, [kept[place] for place in held.order], held.ranges, held.num_bytes)
