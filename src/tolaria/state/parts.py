"""The parts of a train state: module, optimizer, scheduler, scaler, registered extras.

Each part answers four questions. `survey`: which tensors does it hold (they become leaves; everything else in the
answer is a host value)? `capture`: which further host values does it hold? `differences`: can this survey still be
restored? `restore`: put everything back that is not bytes. Bytes are somebody else's job (`tolaria.snapshot`).

All are called under the exclusive gate. `survey`, `capture` and `differences` change nothing.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from tolaria.errors import UnsupportedState, UsageError
from tolaria.state.imprint import HostOnly, Unfit
from tolaria.state.leaves import (
    Identity,
    Leaves,
    Ref,
    clone_tree,
    has_nan,
    is_finite,
    plain_tensors,
    put_back,
)
from tolaria.state.standing import (
    HostImprint,
    ModuleImprint,
    OptimizerImprint,
    PartImprint,
    ScalerImprint,
    has_extra_state,
)
from tolaria.state.structure import ModuleRecord, found_again, member, record, refill, refill_set

logger = logging.getLogger("tolaria")

_SCALARS = (int, float, bool, str, type(None))


@runtime_checkable
class Stateful(Protocol):
    """Anything with the two methods that PyTorch's own checkpointing uses."""

    def state_dict(self) -> Any:
        """A tree of the object's state; may alias live tensors, they are cloned."""

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Take the state of such a tree; it is handed a copy of its own each time."""


class StatePart:
    """Base: a part without tensors, host values or complaints. Subclasses override what they have."""

    name: str

    def survey(self, leaves: Leaves) -> Any:
        """Add this part's tensors to `leaves`; return its host values with `Ref` in the place of tensors."""
        return None

    def imprint(self, saved: Any, leaves: Leaves) -> PartImprint:
        """What tells whether `survey`, which has just answered `saved`, would answer the same again.

        Raises `Unfit` where only a survey can.
        """
        return HostImprint()

    def take_over(self, saved: Any) -> None:
        """An imprint has answered `saved` in the place of `survey`, which may have met something else meanwhile."""

    def capture(self) -> Any:
        """Clone host values that hold no leaf. May run the user's code (`state_dict` of an extra)."""
        return None

    def differences(self, saved: Any, leaves: Leaves) -> Iterator[str]:
        """Why `saved` could not be restored exactly, by name. Nothing if it can."""
        yield from ()

    def restore(self, saved: Any, captured: Any, leaves: Leaves) -> None:
        """Put identities and host values back. The bytes of every leaf have been ordered before this is called.

        `captured` is a copy that may be given away.
        """

    def restore_standing(self, saved: Any, captured: Any, leaves: Leaves, imprint: PartImprint) -> None:
        """The same where `imprint` stands, so that all but host values is in its place."""
        self.restore(saved, captured, leaves)

    def calls_the_user(self) -> bool:
        """Whether `capture` or `restore` runs methods of the user's own."""
        return False

    def parameters(self) -> Iterator[nn.Parameter]:
        """Parameters whose gradients a rollback drops."""
        yield from ()

    def constants(self) -> Iterator[nn.Parameter]:
        """Those of them that are not finite by intention."""
        yield from ()


class ModulePart(StatePart):
    """Parameters, buffers (persistent or not, re-assigned or not), extra state, and which of them stand where.

    Constants that are not finite, such as attention masks of -inf, are no damage: frozen parameters and buffers that
    held non-finite values when they were first seen here are exempt from the search for them. What appears later is
    exempt only if it holds infinities and no NaN.

    Args:
        name: Prefix of the leaves' names.
        module: The module. Its structure may change between snapshots: see `tolaria.state.structure`.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self._extra: list[nn.Module] = []  # with extra state, at the last survey
        self._trained: dict[str, bool] = {}  # by name within the module, for all that has been seen
        parameters, buffers = module.named_parameters, module.named_buffers
        for key, tensor in (*parameters(remove_duplicate=False), *buffers(remove_duplicate=False)):
            with contextlib.suppress(UnsupportedState):  # the survey will name it
                plain = plain_tensors(key, tensor)
                self._trained[key] = tensor.requires_grad or all(map(is_finite, plain))

    @property
    def known(self) -> Sized:
        """Grows with what `constants` depends on."""
        return self._trained

    def parameters(self) -> Iterator[nn.Parameter]:
        # without the names that `Module.parameters` spends most of its time on
        for module in self.module.modules():
            yield from (parameter for parameter in module._parameters.values() if parameter is not None)

    def constants(self) -> Iterator[nn.Parameter]:
        if not all(self._trained.values()):  # asked once a step
            yield from (p for key, p in self.module.named_parameters() if not self._trained.get(key, True))

    def survey(self, leaves: Leaves) -> Any:
        records: dict[int, ModuleRecord] = {}
        for prefix, module in self.module.named_modules(remove_duplicate=False):
            if id(module) not in records:
                path = f"{prefix}." if prefix else ""
                add = functools.partial(self._add, leaves, path)
                records[id(module)] = record(f"{self.name}.{prefix}" if prefix else self.name, module, add)
        saved = list(records.values()), [Identity(m) for m in self.module.modules() if has_extra_state(type(m))]
        self.take_over(saved)
        return saved

    def imprint(self, saved: Any, leaves: Leaves) -> PartImprint:
        return ModuleImprint(*saved)

    def take_over(self, saved: Any) -> None:
        self._extra = [module.value for module in saved[1]]

    def calls_the_user(self) -> bool:
        return bool(self._extra)

    def _add(self, leaves: Leaves, path: str, key: str, tensor: torch.Tensor, buffer: bool) -> Ref:
        key = path + key
        if key not in self._trained:
            plain = plain_tensors(f"{self.name}.{key}", tensor)
            self._trained[key] = tensor.requires_grad or all(is_finite(t) or has_nan(t) for t in plain)
        return leaves.add(f"{self.name}.{key}", tensor, buffer=buffer, trained=self._trained[key])

    def capture(self) -> Any:
        return [clone_tree(module.get_extra_state()) for module in self._extra]

    def differences(self, saved: Any, leaves: Leaves) -> Iterator[str]:
        records: list[ModuleRecord] = saved[0]
        for each in records:
            refs = [ref for ref in each.parameters.values() if isinstance(ref, Ref)]
            yield from _moved(leaves, refs)
        if any(each.changed(leaves) for each in records):
            for each in records:
                yield from each.obstacles()

    def restore(self, saved: Any, captured: Any, leaves: Leaves) -> None:
        records, extra = saved
        structural = any(each.changed(leaves) for each in records)
        changes = [change for each in records for change in each.taken_back(leaves)] if structural else []
        for each in records:
            each.restore(leaves)
        if structural:
            for each in records:
                each.restore_rest(leaves)
            logger.warning("a rollback took back a change of structure: %s", "; ".join(changes))
        self._put_extra_state_back(extra, captured)

    def restore_standing(self, saved: Any, captured: Any, leaves: Leaves, imprint: PartImprint) -> None:
        records, extra = saved
        for each in records:
            if each.module._non_persistent_buffers_set != each.transient:
                refill_set(each.module._non_persistent_buffers_set, each.transient)
        self._put_extra_state_back(extra, captured)

    @staticmethod
    def _put_extra_state_back(extra: Iterable[Identity], captured: Iterable[Any]) -> None:
        for module, state in zip(extra, captured, strict=True):
            module.value.set_extra_state(state)


def _moved(leaves: Leaves, refs: Iterable[Ref]) -> Iterator[str]:
    names = (leaves.moved(ref) for ref in refs)
    yield from (f"{name} was given other storage, shape or dtype" for name in names if name is not None)


class OptimizerPart(StatePart):
    """State tensors and scalars, keys that come and go, hyper-parameters (tensors too), plain attributes.

    An attribute is plain when it is a number, string, tensor, or a list, tuple or dict of such. One that appeared after
    the snapshot is deleted. An attribute that is an optimizer itself (the one that SAM or Lookahead wraps) is a part of
    its own; others are left alone.

    Restored in place: `Optimizer.load_state_dict` would alias the snapshot, cast moments to the parameter's dtype and
    replace every tensor.
    """

    def __init__(self, name: str, optimizer: Optimizer, around: tuple[Optimizer, ...] = ()) -> None:
        if not isinstance(optimizer, Optimizer):
            raise UnsupportedState(
                "attaching the governor",
                f"{name} is a {type(optimizer).__qualname__}, expected a torch.optim.Optimizer",
                "Pass the optimizer that it wraps (often its `.optimizer`).",
            )
        self.name, self.optimizer = name, optimizer
        self._around = (*around, optimizer)

    def parameters(self) -> Iterator[nn.Parameter]:
        for group in self.optimizer.param_groups:
            yield from group["params"]
        for key, optimizer in self._wrapped().items():
            yield from self._inner(key, optimizer).parameters()

    def _wrapped(self) -> dict[str, Optimizer]:
        found = {key: value for key, value in vars(self.optimizer).items() if isinstance(value, Optimizer)}
        return {key: value for key, value in found.items() if all(value is not outer for outer in self._around)}

    def _inner(self, key: str, optimizer: Optimizer) -> OptimizerPart:
        return OptimizerPart(f"{self.name}.{key}", optimizer, self._around)

    def survey(self, leaves: Leaves) -> Any:
        groups = []
        for i, group in enumerate(self.optimizer.param_groups):
            label = f"{self.name}.param_groups[{i}]"
            members = [
                member(parameter, functools.partial(leaves.add, f"{label}.params[{j}]"))
                for j, parameter in enumerate(group["params"])
            ]
            # "params" only keeps its place among them
            options = {k: leaves.encode(f"{label}.{k}", None if k == "params" else v) for k, v in group.items()}
            groups.append((Identity(group), Identity(group["params"]), members, options))
        state = [
            (key, leaves.encode(f"{self.name}.state[{i}]", values))
            for i, (key, values) in enumerate(self.optimizer.state.items())
        ]
        attributes, known = self._survey_attributes(leaves)
        wrapped = [(k, Identity(o), self._inner(k, o).survey(leaves)) for k, o in self._wrapped().items()]
        return (Identity(self.optimizer.param_groups), groups), state, attributes, known, wrapped

    def _survey_attributes(self, leaves: Leaves) -> tuple[dict[str, Any], set[str]]:
        attributes = {
            key: leaves.encode(f"{self.name}.{key}", getattr(self.optimizer, key)) for key in self._plain_attributes()
        }
        # without methods: whether `step` is replaced on the instance is no part of the state
        return attributes, {key for key, value in vars(self.optimizer).items() if not callable(value)}

    def imprint(self, saved: Any, leaves: Leaves) -> PartImprint:
        listed, state, attributes, *_ = saved
        if any(_refs(attributes)):
            raise Unfit
        return OptimizerImprint(self.optimizer, listed, state, lambda: self._survey_attributes(HostOnly()))

    def _plain_attributes(self) -> list[str]:
        return [
            key
            for key, value in vars(self.optimizer).items()
            if key not in ("param_groups", "state") and _is_plain(value)
        ]

    def differences(self, saved: Any, leaves: Leaves) -> Iterator[str]:
        (_, groups), *_, wrapped = saved
        for key, inner, inside in wrapped:
            yield from self._inner(key, inner.value).differences(inside, leaves)
        yield from _moved(leaves, [ref for *_, members, _ in groups for ref in members if isinstance(ref, Ref)])

    def restore(self, saved: Any, captured: Any, leaves: Leaves) -> None:
        (listed, groups), state, attributes, known, wrapped = saved
        for group, params, members, options in groups:
            values = {key: self._decode(leaves, tree) for key, tree in options.items()}
            found = [found_again(leaves, noted) for noted in members]
            if isinstance(params.value, list):
                params.value[:] = found
                found = params.value
            refill(group.value, {**values, "params": found})
        # the lists themselves: others may share them (the optimizer inside an optimizer does)
        listed.value[:] = [group.value for group, *_ in groups]
        if self.optimizer.param_groups is not listed.value:
            self.optimizer.param_groups = listed.value
        live = self.optimizer.state
        restored: dict[Any, Any] = {}
        for key, tree in state:
            restored[key] = values = self._decode(leaves, tree)
            if isinstance(values, dict) and isinstance(live.get(key), dict):
                refill(live[key], values)
                restored[key] = live[key]
        refill(live, restored)  # what was created after the snapshot the optimizer will create again, from scratch
        self._restore_attributes(attributes, known, leaves)
        for key, inner, inside in wrapped:
            setattr(self.optimizer, key, inner.value)
            self._inner(key, inner.value).restore(inside, None, leaves)

    def restore_standing(self, saved: Any, captured: Any, leaves: Leaves, imprint: PartImprint) -> None:
        listed, state, attributes, known, _ = saved
        if isinstance(imprint, OptimizerImprint):
            imprint.put_back(listed, state, leaves)
        self._restore_attributes(attributes, known, leaves)

    def _restore_attributes(self, attributes: dict[str, Any], known: set[str], leaves: Leaves) -> None:
        for key in self._plain_attributes():
            if key not in known:
                delattr(self.optimizer, key)
        for key, tree in attributes.items():
            setattr(self.optimizer, key, self._decode(leaves, tree))

    @staticmethod
    def _decode(leaves: Leaves, tree: Any) -> Any:
        for ref in _refs(tree):
            put_back(leaves, ref)
        return leaves.decode(tree)


def _is_plain(value: Any) -> bool:
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(map(_is_plain, value.values()))
    return isinstance(value, (*_SCALARS, torch.Tensor))


def _refs(tree: Any) -> Iterator[Ref]:
    if isinstance(tree, Ref):
        yield tree
    elif type(tree) is dict:
        for item in tree.values():
            yield from _refs(item)
    elif type(tree) in (list, tuple):
        for item in tree:
            yield from _refs(item)


class ScalerPart(StatePart):
    """`torch.amp.GradScaler`: scale and growth tracker as leaves, never through `state_dict` (which synchronises)."""

    _TENSORS = ("_scale", "_growth_tracker")
    _NUMBERS = ("_init_scale", "_init_growth_tracker", "_growth_factor", "_backoff_factor", "_growth_interval")

    def __init__(self, name: str, scaler: torch.amp.GradScaler) -> None:
        if not isinstance(scaler, torch.amp.GradScaler):
            raise UnsupportedState(
                "attaching the governor",
                f"{name} is a {type(scaler).__qualname__}, expected a torch.amp.GradScaler",
                "Pass the GradScaler itself, or register(name, obj) anything with state_dict/load_state_dict.",
            )
        self.name, self.scaler = name, scaler

    def survey(self, leaves: Leaves) -> Any:
        values = vars(self.scaler)
        return {
            key: leaves.encode(f"{self.name}.{key}", values.get(key))
            for key in (*self._TENSORS, *self._NUMBERS)
            if key in values
        }

    def imprint(self, saved: Any, leaves: Leaves) -> PartImprint:
        return ScalerImprint(self.scaler, (*self._TENSORS, *self._NUMBERS), saved, leaves)

    def refuse_unscaled(self) -> None:
        """Raise `UnsupportedState` between `unscale_` and `step`: a rollback forgets which gradients were unscaled."""
        if any(state["stage"] is not OptState.READY for state in self._stages().values()):
            raise UnsupportedState(
                "capturing gradients",
                f"{self.name} has unscaled some of them for a step that did not follow yet, expected scaled ones",
                "Take the snapshot before unscale_, or after step and update.",
            )

    def restore(self, saved: Any, captured: Any, leaves: Leaves) -> None:
        for key, tree in saved.items():
            setattr(self.scaler, key, put_back(leaves, tree) if isinstance(tree, Ref) else tree)
        self._stages().clear()  # whatever was unscaled belongs to gradients that are gone

    def _stages(self) -> dict[int, dict[str, Any]]:
        """Which optimizers have been unscaled; a scaler that is not enabled has no such table."""
        stages: dict[int, dict[str, Any]] = getattr(self.scaler, "_per_optimizer_states", {})
        return stages


class StatefulPart(StatePart):
    """Anything with `state_dict` and `load_state_dict`: schedulers and user objects.

    The object gets a fresh deep copy at every restore, so that it can never reach the snapshot.
    """

    def __init__(self, name: str, obj: Stateful) -> None:
        self.name, self.obj = name, obj

    def calls_the_user(self) -> bool:
        return True

    def capture(self) -> Any:
        return clone_tree(self.obj.state_dict())

    def restore(self, saved: Any, captured: Any, leaves: Leaves) -> None:
        self.obj.load_state_dict(captured)


class GeneratorPart(StatePart):
    """A `torch.Generator` of the user's own (a noise sampler's). Not a loader's: loaders never go back."""

    def __init__(self, name: str, generator: torch.Generator) -> None:
        self.name, self.generator = name, generator

    def capture(self) -> Any:
        return self.generator.get_state()

    def restore(self, saved: Any, captured: Any, leaves: Leaves) -> None:
        self.generator.set_state(captured)


class AccessorPart(StatePart):
    """A (getter, setter) pair of the user's own."""

    def __init__(self, name: str, getter: Callable[[], Any], setter: Callable[[Any], Any]) -> None:
        self.name, self.getter, self.setter = name, getter, setter

    def calls_the_user(self) -> bool:
        return True

    def capture(self) -> Any:
        return clone_tree(self.getter())

    def restore(self, saved: Any, captured: Any, leaves: Leaves) -> None:
        self.setter(captured)


def make_part(name: str, obj: Any) -> StatePart:
    """The part for a registered object.

    Raises:
        UsageError: It offers no way to read and write its state.
    """
    if isinstance(obj, nn.Module):
        return ModulePart(name, obj)
    if isinstance(obj, Optimizer):
        return OptimizerPart(name, obj)
    if isinstance(obj, torch.amp.GradScaler):
        return ScalerPart(name, obj)
    if isinstance(obj, torch.Generator):
        return GeneratorPart(name, obj)
    if isinstance(obj, tuple) and len(obj) == 2 and all(map(callable, obj)):
        return AccessorPart(name, *obj)
    if isinstance(obj, Stateful) and not isinstance(obj, type):
        return StatefulPart(name, obj)
    raise UsageError(
        f"registering {name!r}",
        f"it is a {type(obj).__qualname__}, expected state_dict and load_state_dict, a torch.Generator, "
        "or a (getter, setter) pair",
        "Pass a pair of functions that read and write its state.",
    )
