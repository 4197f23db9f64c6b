"""`TrainState`: the whole of what a rollback restores, as a list of parts plus global random state."""

from __future__ import annotations

import contextlib
import itertools
import operator
import threading
import weakref
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import nn
from torch.optim import Optimizer
from torch.utils import _pytree

from tolaria.errors import StateMismatch, UnsupportedState, UsageError
from tolaria.state import rng
from tolaria.state.digest import update_tree
from tolaria.state.imprint import Unfit
from tolaria.state.leaves import Identity, Leaves, Ref, Storage, StorageKey, clone_tree, put_back, storage_key
from tolaria.state.parts import ModulePart, OptimizerPart, ScalerPart, StatefulPart, StatePart, make_part
from tolaria.state.roster import Parameters, Roster, find
from tolaria.state.standing import StateImprint
from tolaria.state.structure import Blank, ModuleRecord
from tolaria.state.wrappers import inner_tensors


@dataclass(slots=True, eq=False)
class SurveyResult:
    """The tensors of the train state and the host values around them, at one moment.

    Attributes:
        leaves: Every governed tensor with its storage.
        saved: Per part, what its `survey` returned.
        gradients: Parameters with the gradients that the snapshot holds, if it was asked to.
    """

    leaves: Leaves
    saved: tuple[Any, ...]
    gradients: tuple[tuple[nn.Parameter, Ref], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class HostValues:
    """What a snapshot holds besides bytes.

    Attributes:
        captured: Per part, what its `capture` returned.
        rng: Global random state; None under the policy ``"keep"``.
        journal: The governor's own counters and detector states.
    """

    captured: tuple[Any, ...]
    rng: rng.RngState | None
    journal: Any


class TrainState:
    """Model, optimizers, schedulers, scaler and registered extras.

    Args:
        model: The governed module.
        optimizers: Zero or more optimizers over its parameters (or others; those are governed too).
        schedulers: LR schedulers.
        scaler: A `torch.amp.GradScaler` or None.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer] = (),
        schedulers: Sequence[Any] = (),
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.model = ModulePart("model", model)
        self.optimizers = [OptimizerPart(_numbered("optimizer", i, optimizers), o) for i, o in enumerate(optimizers)]
        self.schedulers = [StatefulPart(_numbered("scheduler", i, schedulers), s) for i, s in enumerate(schedulers)]
        self.parts: list[StatePart] = [self.model, *self.optimizers, *self.schedulers]
        if scaler is not None:
            self.parts.append(ScalerPart("scaler", scaler))
        self._extras: list[StatePart] = []  # written outside of sections
        self._last_survey: Leaves | None = None
        self._asking = threading.RLock()  # an imprint takes notes: two surveys at once would mix theirs
        self._imprint: StateImprint | None = None  # of the last survey from the start that it could be taken of
        self._roster: Roster | None = None
        self._rosters_in_vain = 0  # in a row
        self._in_vain = (
            0  # imprints in a row that did not stand at the next survey, and surveys that took none for that
        )
        # by storage; held, so that the memory stays what the graphs take it for
        self._in_graphs: dict[StorageKey, tuple[str, Storage]] = {}
        self._static: dict[int, weakref.ref[torch.Tensor]] = {}

    def register(self, name: str, obj: Any) -> None:
        """Add one more thing. Raises `UsageError` for a name in use or an object without readable state."""
        if any(part.name == name for part in self.parts):
            raise UsageError(f"registering {name!r}", "the name is in use, expected a new one", "Choose another name.")
        part = make_part(name, obj)
        self.parts.append(part)
        if not isinstance(part, ScalerPart):
            self._extras.append(part)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every governed parameter once."""
        seen: set[int] = set()
        for part in self.parts:
            for parameter in part.parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield parameter

    def survey(self, *, gradients: bool = False) -> SurveyResult:
        """Find every governed tensor. Raises `UnsupportedState` for the first that cannot be restored exactly.

        Surveys between which no tensor and no module has come, gone, moved or changed places share their `Leaves`.

        Args:
            gradients: Find live gradients as well.
        """
        with self._asking:
            return self._survey(gradients)

    def _survey(self, gradients: bool) -> SurveyResult:
        imprint = self._imprint
        if imprint is not None and len(imprint.parts) == len(self.parts) and not gradients:
            again = imprint.again()
            if again is not None:
                self._in_vain = 0
                for part, noted in zip(self.parts, again, strict=True):
                    part.take_over(noted)
                return SurveyResult(imprint.leaves, again)
            self._in_vain += 1
            self._imprint = None  # it may have noted a part of what has changed; the survey below may raise
        leaves = Leaves(previous=self._last_survey)
        saved = tuple(part.survey(leaves) for part in self.parts)
        leaves.previous = None
        self._last_survey = leaves
        if gradients:
            return SurveyResult(leaves, saved, self._survey_gradients(leaves))
        self._imprint = None
        # where something moves each time an imprint is as much again as the survey, for nothing: try now and then
        if leaves.wrappers or self._in_vain % _TRY_EVERY >= _TRIES:
            self._in_vain += self._in_vain % _TRY_EVERY >= _TRIES
            return SurveyResult(leaves, saved)
        with contextlib.suppress(Unfit):
            imprints = [part.imprint(noted, leaves) for part, noted in zip(self.parts, saved, strict=True)]
            self._imprint = StateImprint(leaves, imprints, list(self.parameters()))
        return SurveyResult(leaves, saved)

    def exchange_imprint(self, *put: StateImprint | None) -> StateImprint | None:
        """Put another imprint in the place of the last survey's, if one is given; answers what is there or was.

        For whoever knows that the tensors are back where an earlier survey has found them. It is believed as far as it
        stands.
        """
        before = self._imprint
        if put:
            (self._imprint,) = put
        return before

    def forget_survey(self) -> None:
        """Hold no tensor any more that the last survey met."""
        self._last_survey = self._imprint = self._roster = None

    def _survey_gradients(self, leaves: Leaves) -> tuple[tuple[nn.Parameter, Ref], ...]:
        for part in self.parts:
            if isinstance(part, ScalerPart):
                part.refuse_unscaled()
        names = {id(known.tensor): known.name for known in (*leaves.leaves, *leaves.wrappers)}
        return tuple(
            (parameter, leaves.add(f"{names[id(parameter)]}.grad", parameter.grad))
            for parameter in list(self.parameters())
            if parameter.grad is not None
        )

    def capture(self, devices: Sequence[torch.device], with_rng: bool, journal: Any) -> HostValues:
        """Clone the host values.

        Invariant: random state after a capture equals random state before it, and that is what is captured: it is read
        first and, if a `state_dict` of the user's has drawn, written back last. Else it is not touched: writing the
        state that a generator of CUDA has makes cuDNN seed the dropout of its RNNs anew.
        """
        calls_the_user = self._calls_the_user()
        before = rng.read(devices) if with_rng or calls_the_user else None
        try:
            captured = tuple(part.capture() for part in self.parts)
        finally:
            if before is not None and calls_the_user and not before.equals(rng.read(devices)):
                rng.write(before)
        return HostValues(captured, before if with_rng else None, journal)

    def is_written_outside(self) -> bool:
        """Whether something is written outside of sections: registered objects, extra state of modules."""
        return bool(self._extras) or self.model.calls_the_user()

    def _calls_the_user(self, host: HostValues | None = None) -> bool:
        """Whether some part is captured, or restored to `host`, by the user's own methods, which may draw numbers."""
        if any(part.calls_the_user() for part in self.parts):
            return True
        return host is not None and any(isinstance(captured, list) and captured for captured in host.captured)

    def check(self, survey: SurveyResult, doing: str) -> bool:
        """Raise `StateMismatch`, naming every difference, if `survey` can no longer be restored exactly.

        Answers whether all its tensors and modules stand where it found them, and no others have come.
        """
        imprint = self._imprint
        known = imprint is not None and imprint.leaves is survey.leaves and len(survey.saved) == len(self.parts)
        if known and imprint is not None:
            with self._asking:
                if imprint.stands():
                    return True
        if len(survey.saved) != len(self.parts):
            found = [f"{part.name} was registered later" for part in self.parts[len(survey.saved) :]]
        else:
            found = [
                difference
                for part, saved in zip(self.parts, survey.saved, strict=True)
                for difference in part.differences(saved, survey.leaves)
            ]
            freed = {index for index, storage in enumerate(survey.leaves.storages) if storage.shrunk()}
            found += survey.leaves.changed_wrappers()
            found += self._lost_to_a_graph(survey.leaves)
            found += [f"the memory of {leaf.name} was freed" for leaf in survey.leaves.leaves if leaf.storage in freed]
        found = list(dict.fromkeys(found))
        if found:
            shown = "; ".join(found[:8]) + (f"; and {len(found) - 8} more" if len(found) > 8 else "")
            raise StateMismatch(
                doing,
                f"the train state changed its structure since the snapshot: {shown}",
                "Undo the change, or take a new snapshot: older ones cannot be restored any more.",
            )
        return False

    def _lost_to_a_graph(self, leaves: Leaves) -> list[str]:
        """Tensors that a captured graph uses and that the rollback would let go of: its replays would go astray."""
        if not self._in_graphs:
            return []
        held = {storage.key for storage in leaves.storages}
        missing = {key: name for key, (name, _) in self._in_graphs.items() if key not in held}
        if not missing:
            return []
        live = Leaves()
        try:
            for part in self.parts:
                part.survey(live)
        except UnsupportedState:  # what is there now cannot be told
            present = set(missing)
        else:
            present = {storage.key for storage in live.storages}  # the rest was let go of before, by somebody else
        return [
            f"{name} did not exist, and a graph captured since then uses its memory"
            for key, name in missing.items()
            if key in present
        ]

    def restore(
        self,
        survey: SurveyResult,
        host: HostValues,
        devices: Sequence[torch.device],
        adopt: Callable[[torch.Tensor], None] = lambda _: None,
        *,
        standing: bool = False,
    ) -> bool:
        """Put back everything that is not bytes: identities, host values, then random state.

        `adopt` is called with each tensor that is handed over to the user's objects. Random state is written last, also
        when the snapshot holds none but a `load_state_dict` of the user's may draw. `standing`: what `check` has
        answered, and nothing but bytes has changed since. Answers whether there are gradients afterwards.
        """
        imprint = self._imprint if standing else None
        if imprint is not None and imprint.leaves is not survey.leaves:  # a digest was taken meanwhile
            imprint = None
        random_state, calls_the_user = host.rng, self._calls_the_user(host)
        if random_state is None and calls_the_user:
            random_state = rng.read(devices)
        keep = frozenset(storage.key for storage in survey.leaves.storages) if imprint is None else imprint.memory
        left = self.drop_gradients(keep, None if imprint is None else imprint.parameters)
        errors = []
        for i, (part, saved, captured) in enumerate(zip(self.parts, survey.saved, host.captured, strict=True)):
            try:
                own = clone_tree(captured)  # each time, so that nobody can ever reach the snapshot
                is_empty = own is None or (type(own) is list and not own)
                for tensor in () if is_empty else _pytree.tree_leaves(own):
                    if isinstance(tensor, torch.Tensor):
                        adopt(tensor)
                if imprint is None:
                    part.restore(saved, own, survey.leaves)
                else:
                    part.restore_standing(saved, own, survey.leaves, imprint.parts[i])
            except Exception as error:  # the other parts come back all the same; the caller learns of the first failure
                errors.append((part.name, error))
        if imprint is None or calls_the_user:
            left = self.drop_gradients(keep)  # of parameters that are back in their places
        for parameter, ref in survey.gradients:
            parameter.grad = put_back(survey.leaves, ref)
        known = (*survey.leaves.leaves, *survey.leaves.wrappers) if imprint is None else ()
        bumped = [each.tensor for each in known] if imprint is None else imprint.tensors
        if bumped:
            # a backward over a graph that saved one of these now raises instead of using restored bytes silently
            torch.autograd.graph.increment_version(bumped)
        if random_state is not None:
            rng.write(random_state)
        if errors:
            names = ", ".join(name for name, _ in errors)
            raise RuntimeError(f"{names} could not be restored ({errors[0][1]}); everything else was") from errors[0][1]
        return left or bool(survey.gradients)

    def drop_gradients(
        self, keep: Container[StorageKey] = (), parameters: Sequence[nn.Parameter] | None = None
    ) -> bool:
        """Set every governed gradient to None; one that is a view of a bucket or belongs to a captured graph is zeroed.

        Args:
            keep: Memory that has its bytes already: views of it are not zeroed.
            parameters: The governed ones, if they are known.

        Returns:
            Whether some gradient is there still.
        """
        left = False
        known = list(self.parameters()) if parameters is None else parameters
        gradients = list(map(_gradient_of, known))
        there = map(operator.is_not, gradients, itertools.repeat(None))
        for parameter, grad in list(itertools.compress(zip(known, gradients, strict=True), there)):
            if not grad._is_view() and not self.is_static(grad):
                parameter.grad = None
                continue
            left = True
            if storage_key(grad) not in keep:
                grad.zero_()
        return left

    def note_capture(self, *, with_optimizers: bool) -> None:
        """A graph capture has ended: whatever exists now may be written at its address by every replay.

        Args:
            with_optimizers: An optimizer stepped inside, so its state is among it.
        """
        leaves = Leaves()
        for part in self.parts:
            if with_optimizers or not isinstance(part, OptimizerPart):
                part.survey(leaves)
        for leaf in leaves.leaves:
            storage = leaves.storages[leaf.storage]
            self._in_graphs.setdefault(storage.key, (leaf.name, storage))
        self._static = {id(p.grad): weakref.ref(p.grad) for p in self.parameters() if p.grad is not None}

    def is_static(self, grad: torch.Tensor) -> bool:
        """Whether a captured graph may write this gradient, so that it may be zeroed but not dropped."""
        noted = self._static.get(id(grad))
        return noted is not None and noted() is grad

    def has_live_gradients(self) -> bool:
        """Whether some governed gradient exists and is not zero."""
        found = [p.grad._values() if p.grad.is_sparse else p.grad for p in self.parameters() if p.grad is not None]
        return any(bool(torch.count_nonzero(inner)) for grad in found for inner in inner_tensors(grad))

    def roster(self) -> tuple[Parameters, Parameters]:
        """Every governed parameter once; and those that ought to be finite: all but constants such as masks of -inf.

        Parameters of lazy modules that wait for their first batch are only among the former. The same lists as the time
        before where nothing has come, gone or changed places; not to be changed.
        """
        roster = self._roster
        if roster is not None and roster.stands(self.parts):
            self._rosters_in_vain = 0
            return roster.found
        self._roster = None
        self._rosters_in_vain += 1
        if self._rosters_in_vain % _TRY_EVERY <= _TRIES:
            with contextlib.suppress(Unfit):
                self._roster = Roster(self.parts)
                return self._roster.found
        return find(self.parts)

    def digest(self) -> str:
        """xxh3-128 (hex) over every governed tensor and every captured host value. Blocks the host; changes nothing."""
        survey = self.survey()
        host = self.capture((), with_rng=False, journal=None)
        hasher = xxhash.xxh3_128()
        for leaf in survey.leaves.leaves:
            update_tree(hasher, leaf.tensor)
        update_tree(hasher, [_without_identities(saved) for saved in survey.saved])
        update_tree(hasher, host.captured)
        return hasher.hexdigest()


_TRIES, _TRY_EVERY = 4, 16
_gradient_of = operator.attrgetter("grad")


def _without_identities(tree: Any) -> Any:
    """Host values of a survey without modules, optimizers and tensors, whose identity differs from run to run."""
    if isinstance(tree, dict):
        return {key: _without_identities(item) for key, item in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_without_identities(item) for item in tree]
    if isinstance(tree, ModuleRecord):
        return _without_identities(tree.facts())
    if isinstance(tree, Ref):
        return tree.index
    return None if isinstance(tree, (nn.Module, torch.Tensor, Optimizer, Identity, Blank)) else tree


def _numbered(kind: str, index: int, of: Sequence[Any]) -> str:
    return kind if len(of) == 1 else f"{kind}[{index}]"
