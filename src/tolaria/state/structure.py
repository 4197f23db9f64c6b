"""Structure: which modules, parameters and buffers stand where in a module tree, and how they come back there.

A survey holds the objects themselves. So what was removed or replaced is put back as the object that it was, and what
was added is taken out again. That is exact only if nothing else about the modules decides what they compute, so across
a change of structure their plain attributes and the `requires_grad` flags come back too, and what cannot be put back
(hooks, replaced methods, another class, parameters in the buckets of DDP) is an obstacle and is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from tolaria.errors import UnsupportedState
from tolaria.state.leaves import Leaves, Ref, clone_tree, put_back

OWN = frozenset(vars(nn.Module())) | {"_initialize_hook", "_load_hook"}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_SCALARS = (int, float, bool, str, type(None))


@dataclass(frozen=True, slots=True, eq=False)
class Blank:
    """A parameter or buffer of a lazy module that has no shape yet, so no bytes either."""

    tensor: torch.Tensor
    kind: type[torch.Tensor]
    dtype: torch.dtype
    device: torch.device

    def is_filled(self) -> bool:
        """Whether a batch has given it a shape since."""
        return type(self.tensor) is not self.kind

    def put_back(self) -> torch.Tensor:
        """The same object without a shape again."""
        if self.is_filled():
            self.tensor.grad = None
            self.tensor.data = torch.empty(0, dtype=self.dtype, device=self.device)
            self.tensor.__class__ = self.kind
        return self.tensor


Member = Ref | Blank | None


def member(tensor: torch.Tensor | None, add: Callable[[torch.Tensor], Ref]) -> Member:
    """How a survey notes one entry of a module or of a parameter group."""
    if tensor is None:
        return None
    if is_lazy(tensor):
        return Blank(tensor, type(tensor), tensor.dtype, tensor.device)
    return add(tensor)


def held(leaves: Leaves, noted: Member) -> torch.Tensor | None:
    """The object that was noted."""
    if isinstance(noted, Ref):
        return leaves.tensor(noted)
    return None if noted is None else noted.tensor


def found_again(leaves: Leaves, noted: Member) -> torch.Tensor | None:
    """The object that was noted; without a shape if it had none."""
    return noted.put_back() if isinstance(noted, Blank) else held(leaves, noted)


def put_member_back(leaves: Leaves, noted: Member) -> torch.Tensor | None:
    """The object that was noted, as it was."""
    if isinstance(noted, Ref):
        return put_back(leaves, noted)
    return None if noted is None else noted.put_back()


@dataclass(slots=True, eq=False)
class _Laziness:
    """The hooks of a lazy module that waits for its first batch; it gives them up with its class when that comes."""

    handles: dict[str, Any]
    hooks: tuple[tuple[str, int, Any], ...]

    def put_back(self, module: nn.Module) -> None:
        vars(module).update(self.handles)  # handles find their hook by number, so they work again
        for table, number, hook in self.hooks:
            live = vars(module)[table]
            refill(live, {number: hook, **live})


@dataclass(slots=True, eq=False)
class ModuleRecord:
    """What one module held at a survey.

    Attributes:
        name: Its path, for messages.
        module: The module. Held.
        children: Its submodules by name.
        parameters: Its own parameters.
        buffers: Its own buffers.
        transient: Names of buffers that are not persistent.
        flags: `requires_grad` of its parameters.
        kind: Its class; parametrizations and lazy modules exchange it.
        properties: Those of a class that a parametrization made for this one module; else None.
        plain: Attributes that are numbers, strings, or containers of such.
        names: All its attributes; what is plain now and was something else is left alone.
        callables: Attributes of the instance that can be called (a replaced method, an activation).
        hooks: Numbers of its hooks.
        laziness: While it waits for its first batch.
    """

    name: str
    module: nn.Module
    children: dict[str, nn.Module | None]
    parameters: dict[str, Member]
    buffers: dict[str, Member]
    transient: set[str]
    flags: dict[str, bool]
    kind: type[nn.Module]
    properties: dict[str, property] | None
    plain: dict[str, Any]
    names: set[str]
    callables: dict[str, Any]
    hooks: dict[str, set[int]]
    laziness: _Laziness | None

    def facts(self) -> Any:
        """What a digest takes of it."""
        names = {key: None if child is None else type(child).__qualname__ for key, child in self.children.items()}
        tables = [
            {k: noted if isinstance(noted, Ref) else noted is None for k, noted in table.items()}
            for table in (self.parameters, self.buffers)
        ]
        return [self.name, names, *tables, sorted(self.transient)]

    def changed(self, leaves: Leaves) -> bool:
        """Whether other modules or parameters stand in it than at the survey. Buffers come and go without notice."""
        parameters = {key: held(leaves, noted) for key, noted in self.parameters.items()}
        blanks = (noted for table in (self.parameters, self.buffers) for noted in table.values())
        return (
            type(self.module) is not self.kind
            or not _are_the_same(self.children, self.module._modules)
            or not _are_the_same(parameters, self.module._parameters)
            or any(isinstance(noted, Blank) and noted.is_filled() for noted in blanks)
        )

    def taken_back(self, leaves: Leaves) -> Iterator[str]:
        """By name, what a rollback of this module will do to its entries: to say so, since nobody's code runs again."""
        parameters = {key: held(leaves, noted) for key, noted in self.parameters.items()}
        for was, live in ((self.children, self.module._modules), (parameters, self.module._parameters)):
            for key in dict.fromkeys((*was, *live)):
                before, now = was.get(key), live.get(key)
                if before is not now:
                    what = "removed" if before is None else "put back" if now is None else "replaced by its former self"
                    yield f"{self.name}.{key} {what}"
        if type(self.module) is not self.kind:
            yield f"{self.name} a {self.kind.__qualname__} again"

    def obstacles(self) -> Iterator[str]:
        """Why this module could not be what it was, although the objects in it are put back."""
        module = self.module
        if isinstance(module, nn.parallel.DistributedDataParallel):
            yield f"{self.name} is a DistributedDataParallel, whose buckets are made for the parameters that it has now"
        live = type(module)
        if live is not self.kind and self.laziness is None and not (_is_injected(live) or _is_injected(self.kind)):
            yield f"{self.name} became a {live.__qualname__}, was a {self.kind.__qualname__}"
        waiting = () if self.laziness is None else self.laziness.hooks
        for table, numbers in self.hooks.items():
            gone = {number for own_table, number, _ in waiting if own_table == table}
            if set(vars(module).get(table, ())) | gone != numbers:
                yield f"{self.name} has other {table.strip('_').replace('_', ' ')}"
        callables = _callables(module)
        for key in dict.fromkeys((*self.callables, *callables)):
            if callables.get(key) is not self.callables.get(key):
                yield f"{self.name}.{key} was replaced on the instance"
        for key in (*self.children, *self.parameters, *self.buffers):
            if key in vars(module):
                yield f"{self.name}.{key} is hidden by an attribute of that name"

    def restore(self, leaves: Leaves) -> None:
        """Put every entry back in its place, in its order."""
        module = self.module
        refill(module._modules, self.children)
        # parameters lie where they lay, or the rollback was refused; buffers may have been given other memory
        refill(module._parameters, {key: found_again(leaves, noted) for key, noted in self.parameters.items()})
        refill(module._buffers, {key: put_member_back(leaves, noted) for key, noted in self.buffers.items()})
        refill_set(module._non_persistent_buffers_set, self.transient)

    def restore_rest(self, leaves: Leaves) -> None:
        """Across a change of structure: class, hooks of a lazy module, plain attributes, `requires_grad` flags."""
        module = self.module
        if self.properties is not None:
            for key in properties_of(self.kind):
                delattr(self.kind, key)
            for key, value in self.properties.items():
                setattr(self.kind, key, value)
        if type(module) is not self.kind:
            module.__class__ = self.kind
            if self.laziness is not None:
                self.laziness.put_back(module)
        for key in _plain(module):
            if key not in self.names:
                del vars(module)[key]
        vars(module).update(clone_tree(self.plain))
        for key, flag in self.flags.items():
            parameter = held(leaves, self.parameters[key])
            if parameter is not None and parameter.requires_grad is not flag:
                parameter.requires_grad = flag  # not `requires_grad_`, which one without a shape refuses


def record(name: str, module: nn.Module, add: Callable[[str, torch.Tensor, bool], Ref]) -> ModuleRecord:
    """Look at one module.

    Args:
        name: Its path, for messages.
        module: The module itself; its submodules have records of their own.
        add: Notes one of its tensors: (name within the module, tensor, whether it is a buffer).

    Raises:
        UnsupportedState: One of them cannot be restored exactly.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise UnsupportedState(
            "surveying the train state",
            f"{name} is a {type(module).__qualname__}, whose tensors live outside of Python, expected an nn.Module",
            "Govern the module that it was scripted from, or use torch.compile.",
        )
    buffers = {key: member(b, lambda t, k=key: add(k, t, True)) for key, b in module._buffers.items()}
    parameters = {key: member(p, lambda t, k=key: add(k, t, False)) for key, p in module._parameters.items()}
    kind = type(module)
    return ModuleRecord(
        name=name,
        module=module,
        children=dict(module._modules),
        parameters=parameters,
        buffers=buffers,
        transient=set(module._non_persistent_buffers_set),
        flags={key: p.requires_grad for key, p in module._parameters.items() if p is not None},
        kind=kind,
        properties=properties_of(kind) if _is_injected(kind) else None,
        plain=clone_tree(_plain(module)),
        names=set(vars(module)),
        callables=_callables(module),
        hooks={table: set(vars(module).get(table, ())) for table in HOOKS},
        laziness=_laziness(module),
    )


def record_again(known: ModuleRecord) -> ModuleRecord:
    """Look once more at a module that holds the very modules and tensors that it held."""
    module = known.module
    return replace(
        known,
        transient=set(module._non_persistent_buffers_set),
        flags={key: p.requires_grad for key, p in module._parameters.items() if p is not None},
        properties=properties_of(known.kind) if known.properties is not None else None,
        plain=clone_tree(_plain(module)),
        names=set(vars(module)),
        callables=_callables(module),
        hooks={table: set(vars(module).get(table, ())) for table in HOOKS},
    )


def refill(live: dict[Any, Any], items: dict[Any, Any]) -> None:
    """Give a dict these items in this order. It is rebuilt only when keys came, went or changed places."""
    if len(live) != len(items) or not all(map(_is_key, live, items)):
        live.clear()
    live.update(items)


def _is_key(one: Any, other: Any) -> bool:
    """Whether two keys are the same. Those of an optimizer's state are tensors, whose `==` compares elements."""
    return one is other or (not isinstance(one, torch.Tensor) and not isinstance(other, torch.Tensor) and one == other)


def refill_set(live: set[Any], items: set[Any]) -> None:
    """The same for a set."""
    live.clear()
    live.update(items)


def _are_the_same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return list(one) == list(other) and all(item is other[key] for key, item in one.items())


def _is_injected(kind: type) -> bool:
    """Whether `torch.nn.utils.parametrize` made this class for one module."""
    return kind.__module__ == nn.utils.parametrize.__name__ and kind.__name__.startswith("Parametrized")


def properties_of(kind: type) -> dict[str, property]:
    """The properties that this class itself defines."""
    return {key: value for key, value in vars(kind).items() if isinstance(value, property)}


def _added(module: nn.Module) -> list[tuple[str, Any]]:
    """Attributes besides those of every module."""
    return [pair for pair in vars(module).items() if pair[0] not in OWN]


def _plain(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in _added(module) if is_plain(value)}


def is_plain(value: Any) -> bool:
    """Whether it is a number, a string, or a container of such."""
    if type(value) in (list, tuple):
        return all(map(is_plain, value))
    if type(value) is dict:
        return all(map(is_plain, value.values()))
    return isinstance(value, _SCALARS)


def _callables(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in _added(module) if callable(value)}


def _laziness(module: nn.Module) -> _Laziness | None:
    if not isinstance(module, LazyModuleMixin) or "_initialize_hook" not in vars(module):
        return None
    values = vars(module)
    handles = {key: values[key] for key in ("_initialize_hook", "_load_hook") if key in values}
    numbers = {handle.id for handle in handles.values()}
    tables = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_load_state_dict_pre_hooks")
    hooks = ((table, number, hook) for table in tables for number, hook in values[table].items() if number in numbers)
    return _Laziness(handles, tuple(hooks))
