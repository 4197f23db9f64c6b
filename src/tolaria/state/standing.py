"""STANDING: the imprints of modules, optimizers and scalers: which of their containers a survey has read.

Each answers two questions. `stands`: are the same tensors and modules in the same places? `again`: what would a survey
answer now, given that they are? Host values (a learning rate, a counter, a hook) may have changed meanwhile; the part
that holds them is read anew.
"""

from __future__ import annotations

import bisect
import itertools
import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from tolaria.state.imprint import Contents, Unfit, Values, Whereabouts
from tolaria.state.leaves import Identity, Leaves, Ref
from tolaria.state.structure import HOOKS, OWN, Blank, ModuleRecord, is_plain, properties_of, record_again

_TABLES = ("_modules", "_parameters", "_buffers")
_TRANSIENT = "_non_persistent_buffers_set"
_WAYS = {"named_modules": nn.Module.named_modules, "modules": nn.Module.modules}
_UNRECORDED = OWN - {*HOOKS, _TRANSIENT}  # what no record says anything of, or what is compared by itself
_flat = itertools.chain.from_iterable


class PartImprint(Protocol):
    """Of one part of a train state."""

    def stands(self) -> bool:
        """Whether a survey would meet the same tensors and modules in the same places."""
        ...

    def again(self) -> Any:
        """What a survey would answer now, if `stands`. Raises `Unfit` where only a survey can tell."""


class HostImprint:
    """Of a part without tensors."""

    def stands(self) -> bool:
        return True

    def again(self) -> Any:
        return None


class ModuleImprint:
    """Of a module tree.

    Args:
        records: What a survey has recorded of each module.
        extra: The modules with extra state.

    Raises:
        Unfit: A lazy module waits for its first batch, a table of a module is no plain dict of its own, or a module has
            a way of its own to say which modules are in it.
    """

    def __init__(self, records: list[ModuleRecord], extra: list[Identity]) -> None:
        entries = [noted for each in records for noted in (*each.parameters.values(), *each.buffers.values())]
        if any(each.laziness is not None for each in records) or any(isinstance(noted, Blank) for noted in entries):
            raise Unfit
        self._records, self._extra = records, extra
        self._modules = [each.module for each in records]
        self._kinds = [each.kind for each in records]
        self._with_extra = {kind: has_extra_state(kind) for kind in self._kinds}
        self._vars: list[dict[str, Any]] = list(map(vars, self._modules))
        for module, values in zip(self._modules, self._vars, strict=True):
            if any(getattr(module, name) is not values.get(name) for name in (*_TABLES, _TRANSIENT)):
                raise Unfit  # handed out by something else than the module itself
            if not walks_plainly(module):
                raise Unfit
        self._tables = {name: [values[name] for values in self._vars] for name in _TABLES}
        self._contents = Contents([table for tables in self._tables.values() for table in tables])
        self._note()

    def _note(self) -> None:
        """Take down everything else that records hold."""
        self._names = list(_flat(self._vars))
        self._ends = list(itertools.accumulate(map(len, self._vars)))
        self._recorded = [name not in _UNRECORDED for name in self._names]
        self._values = list(itertools.compress(_flat(map(dict.values, self._vars)), self._recorded))
        hooks = [values[name] for values in self._vars for name in HOOKS if name in values]
        self._boxes = Contents(
            [*hooks, *_containers([vars(each.module)[key] for each in self._records for key in each.plain])]
        )
        # plain as soon as what is not has gone out of them
        self._mixed = [
            value
            for values, each in zip(self._vars, self._records, strict=True)
            for name, value in values.items()
            if name not in OWN and type(value) in (list, tuple, dict) and name not in each.plain
        ]
        self._transient = [values[_TRANSIENT] for values in self._vars]
        self._injected = [each for each in self._records if each.properties is not None]

    def stands(self) -> bool:
        if not (
            all(map(operator.is_, map(type, self._modules), self._kinds))
            and all(map(operator.is_, map(vars, self._modules), self._vars))
            and self._contents.stand()
        ):
            return False
        try:
            return all(
                all(map(operator.is_, map(operator.itemgetter(name), self._vars), tables))
                for name, tables in self._tables.items()
            )
        except KeyError:
            return False

    def again(self) -> Any:
        if any(has_extra_state(kind) is not known for kind, known in self._with_extra.items()):
            raise Unfit
        changed = self._changed()
        if changed:
            self._records = [
                record_again(each) if index in changed else each for index, each in enumerate(self._records)
            ]
            self._note()
        return self._records, self._extra

    def _changed(self) -> Collection[int]:
        """Indices of the records that have to be made anew."""
        everything = range(len(self._records))
        if (
            list(_flat(self._vars)) != self._names
            or list(itertools.accumulate(map(len, self._vars))) != self._ends
            or not self._boxes.stand()
            or any(map(is_plain, self._mixed))
            or any(each.transient != live for each, live in zip(self._records, self._transient, strict=True))
            or any(properties_of(each.kind) != each.properties for each in self._injected)
        ):
            return everything
        now = itertools.compress(_flat(map(dict.values, self._vars)), self._recorded)
        if all(map(operator.is_, now, self._values)):
            return ()
        places = itertools.compress(itertools.count(), self._recorded)
        now = itertools.compress(_flat(map(dict.values, self._vars)), self._recorded)
        moved = itertools.compress(places, map(operator.is_not, now, self._values))
        return {bisect.bisect_right(self._ends, place) for place in moved}


class OptimizerImprint:
    """Of one optimizer.

    Args:
        optimizer: It.
        listed: `param_groups`, and of each group the dict, the list of its members, and its options as encoded.
        state: Of each entry of `state`, its key and its values as encoded.
        attributes: Surveys its plain attributes, among which there is no tensor.

    Raises:
        Unfit: Containers of other types than torch's own optimizers have, parameters without a shape yet, or an
            optimizer around another one.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        listed: tuple[Identity, list[tuple[Identity, Identity, list[Any], dict[str, Any]]]],
        state: list[tuple[Any, Any]],
        attributes: Callable[[], tuple[dict[str, Any], set[str]]],
    ) -> None:
        groups = listed[1]
        if holds_an_optimizer(optimizer) or any(
            isinstance(noted, Blank) for *_, members, _ in groups for noted in members
        ):
            raise Unfit
        if any(type(values) is not dict for _, values in state):
            raise Unfit
        self._optimizer, self._groups, self._state = optimizer, listed[0].value, optimizer.state
        self._lists = Contents([self._groups, *(params.value for _, params, *_ in groups), self._state])
        self._members = [(group, params, members) for group, params, members, _ in groups]
        self._options = Values([group.value for group, *_ in groups], [options for *_, options in groups], ("params",))
        self._entries = Values(list(self._state.values()), [values for _, values in state])
        self._state_saved = state
        self._attributes = attributes
        self._option_changes: Sequence[tuple[int, Any]] = ()
        self._entry_changes: Sequence[tuple[int, Any]] = ()

    def stands(self) -> bool:
        if self._optimizer.param_groups is not self._groups or self._optimizer.state is not self._state:
            return False
        if holds_an_optimizer(self._optimizer) or not self._lists.stand():
            return False
        options, entries = self._options.changes(), self._entries.changes()
        if options is None or entries is None:
            return False
        changed = (value for _, value in (*options, *entries))
        if any(isinstance(value, torch.Tensor) for value in changed):  # where none was
            return False
        self._option_changes, self._entry_changes = options, entries
        return True

    def again(self) -> Any:
        self._options.update(self._option_changes)
        if self._entry_changes:
            self._entries.update(self._entry_changes)
            keys = (key for key, _ in self._state_saved)
            self._state_saved = list(zip(keys, self._entries.encoded, strict=True))
        groups = [(*member, options) for member, options in zip(self._members, self._options.encoded, strict=True)]
        return (Identity(self._groups), groups), self._state_saved, *self._attributes(), list[Any]()

    def put_back(self, listed: Any, state: Any, leaves: Leaves) -> None:
        """Give groups and state the host values of an earlier survey of the very same tensors."""
        self._options.put_back([options for *_, options in listed[1]], leaves.decode)
        self._entries.put_back([values for _, values in state], leaves.decode)


class ScalerImprint:
    """Of a `GradScaler`: tensors that stay, numbers that may change."""

    def __init__(self, scaler: Any, names: Sequence[str], saved: dict[str, Any], leaves: Leaves) -> None:
        self._scaler, self._names = scaler, names
        self._tensors = {key: (tree, leaves.tensor(tree)) for key, tree in saved.items() if isinstance(tree, Ref)}
        self._keys = list(saved)

    def stands(self) -> bool:
        values = vars(self._scaler)
        return [name for name in self._names if name in values] == self._keys and all(
            self._tensors[key][1] is values[key] if key in self._tensors else not isinstance(values[key], torch.Tensor)
            for key in self._keys
        )

    def again(self) -> Any:
        values = vars(self._scaler)
        return {key: self._tensors[key][0] if key in self._tensors else values[key] for key in self._keys}


def walks_plainly(module: nn.Module) -> bool:
    """Whether it says what modules are in it as torch's own do."""
    return all(getattr(getattr(module, way), "__func__", None) is plain for way, plain in _WAYS.items())


def has_extra_state(kind: type[nn.Module]) -> bool:
    """Whether modules of that class have state of their own besides tensors."""
    return kind.get_extra_state is not nn.Module.get_extra_state


def holds_an_optimizer(optimizer: Optimizer) -> bool:
    """Whether it has been put around another one."""
    return any(isinstance(value, Optimizer) for value in vars(optimizer).values())


def _containers(values: Sequence[Any]) -> Iterator[Collection[Any]]:
    """Whatever can change inside of these plain values."""
    for value in values:
        if type(value) in (list, dict):
            yield value
        if type(value) in (list, tuple):
            yield from _containers(value)
        elif type(value) is dict:
            yield from _containers(list(value.values()))


class StateImprint:
    """Of a whole train state: its parts, and where its tensors lie.

    Args:
        leaves: The tensors, of a survey that has just been made.
        parts: The imprints of its parts.
        parameters: Those whose gradients a rollback drops.

    Raises:
        Unfit: See the parts.
    """

    def __init__(self, leaves: Leaves, parts: Sequence[PartImprint], parameters: Sequence[nn.Parameter]) -> None:
        self.leaves, self.parts, self.parameters = leaves, list(parts), list(parameters)
        self.tensors = [leaf.tensor for leaf in leaves.leaves]
        self.memory = frozenset(storage.key for storage in leaves.storages)
        self._whereabouts = Whereabouts(leaves)

    def stands(self) -> bool:
        """Whether every tensor and module that the survey met is where it was, and no other has come."""
        return all(part.stands() for part in self.parts) and self._whereabouts.stands()

    def again(self) -> tuple[Any, ...] | None:
        """What the parts' `survey` would answer now; None where only a survey can tell."""
        try:
            return tuple(part.again() for part in self.parts) if self.stands() else None
        except Unfit:
            return None
