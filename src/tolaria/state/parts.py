"""The parts of a train state: module, optimizer, scheduler, scaler, registered extras.

Each part answers four questions. `survey`: which tensors does it hold (they become leaves; everything else in the
answer is a host value)? `capture`: which further host values does it hold? `differences`: can this survey still be
restored? `restore`: put everything back that is not bytes. Bytes are somebody else's job (`tolaria.snapshot`).

All are called under the exclusive gate. `survey`, `capture` and `differences` change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.optim import Optimizer

from tolaria.errors import UnsupportedState, UsageError
from tolaria.state.leaves import Leaves, Ref, clone_tree

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

    def capture(self) -> Any:
        """Clone host values that hold no leaf. May run the user's code (`state_dict` of an extra)."""
        return None

    def differences(self, saved: Any, leaves: Leaves) -> Iterator[str]:
        """Why `saved` could not be restored exactly, by name. Nothing if it can."""
        yield from ()

    def restore(self, saved: Any, captured: Any, leaves: Leaves) -> None:
        """Put identities and host values back. The bytes of every leaf have been ordered before this is called."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Parameters whose gradients a rollback drops."""
        yield from ()


def _put_back(leaves: Leaves, ref: Ref) -> torch.Tensor:
    leaf = leaves.leaves[ref.index]
    leaf.put_back(leaves.storages[leaf.storage])
    return leaf.tensor


def _is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


class ModulePart(StatePart):
    """Parameters, buffers (persistent or not, re-assigned or not), extra state, and on request gradients.

    Args:
        name: Prefix of the leaves' names.
        module: The module. Its structure may change between snapshots; a rollback across such a change is refused.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self.include_gradients = False
        # constants such as attention masks of -inf are no damage: exempt what was not finite when we first saw it
        self._exempt = {
            id(tensor)
            for tensor in (*module.buffers(), *(p for p in module.parameters() if not p.requires_grad))
            if type(tensor) in (torch.Tensor, nn.Parameter, nn.Buffer) and not tensor.is_meta and not _is_finite(tensor)
        }
        self._exempt_names = {n for n, b in module.named_buffers(remove_duplicate=False) if id(b) in self._exempt}

    def parameters(self) -> Iterator[nn.Parameter]:
        yield from self.module.parameters()

    def survey(self, leaves: Leaves) -> Any:
        parameters, buffers, gradients, extra = [], [], [], []
        for prefix, module in self.module.named_modules(remove_duplicate=False):
            path = f"{prefix}." if prefix else ""
            for key, buffer in module._buffers.items():
                name = path + key
                trained = name not in self._exempt_names
                label = f"{self.name}.{name}"
                ref = None if buffer is None else leaves.add(label, buffer, fixed=False, buffer=True, trained=trained)
                buffers.append((module, key, ref))
            for key, parameter in module._parameters.items():
                if parameter is None:
                    continue
                name = f"{self.name}.{path}{key}"
                trained = id(parameter) not in self._exempt
                parameters.append((name, parameter, leaves.add(name, parameter, fixed=True, trained=trained)))
                if self.include_gradients and parameter.grad is not None:
                    gradients.append((parameter, leaves.add(f"{name}.grad", parameter.grad, fixed=False)))
            if type(module).get_extra_state is not nn.Module.get_extra_state:
                extra.append((module, clone_tree(module.get_extra_state())))
        return parameters, buffers, gradients, extra

    def differences(self, saved: Any, leaves: Leaves) -> Iterator[str]:
        was = {name: (parameter, ref) for name, parameter, ref in saved[0]}
        now = {
            f"{self.name}.{name}": parameter for name, parameter in self.module.named_parameters(remove_duplicate=False)
        }
        yield from (f"{name} was added" for name in now if name not in was)
        yield from (f"{name} was removed" for name in was if name not in now)
        for name, (parameter, ref) in was.items():
            if name not in now:
                continue
            if now[name] is not parameter:
                yield f"{name} was replaced by another Parameter"
            elif leaves.leaves[ref.index].moved(leaves.storages[leaves.leaves[ref.index].storage]):
                yield f"{name} was given other storage, shape or dtype"
        live = {id(module) for module in self.module.modules()}
        yield from (
            f"{self.name}: the module that holds buffer {key!r} was removed"
            for m, key, _ in saved[1]
            if id(m) not in live
        )

    def restore(self, saved: Any, captured: Any, leaves: Leaves) -> None:
        _, buffers, gradients, extra = saved
        for module, key, ref in buffers:
            module._buffers[key] = None if ref is None else _put_back(leaves, ref)
        known = {(id(module), key) for module, key, _ in buffers}
        for module in self.module.modules():
            for key in [key for key in module._buffers if (id(module), key) not in known]:
                del module._buffers[key]
                module._non_persistent_buffers_set.discard(key)
        for parameter, ref in gradients:
            parameter.grad = _put_back(leaves, ref)
        for module, state in extra:
            module.set_extra_state(clone_tree(state))


class OptimizerPart(StatePart):
    """State tensors and scalars, keys that come and go, hyper-parameters (tensors too), plain scalar attributes.

    Restored in place: `Optimizer.load_state_dict` would alias the snapshot, cast moments to the parameter's dtype and
    replace every tensor.
    """

    def __init__(self, name: str, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, Optimizer):
            raise UnsupportedState(
                "attaching the governor",
                f"{name} is a {type(optimizer).__qualname__}, expected a torch.optim.Optimizer",
                "Pass the optimizer that it wraps (often its `.optimizer`).",
            )
        self.name, self.optimizer = name, optimizer

    def parameters(self) -> Iterator[nn.Parameter]:
        for group in self.optimizer.param_groups:
            yield from group["params"]

    def survey(self, leaves: Leaves) -> Any:
        groups = []
        for i, group in enumerate(self.optimizer.param_groups):
            label = f"{self.name}.param_groups[{i}]"
            members = [
                (parameter, leaves.add(f"{label}.params[{j}]", parameter, fixed=True))
                for j, parameter in enumerate(group["params"])
            ]
            options = {k: leaves.encode(f"{label}.{k}", v) for k, v in group.items() if k != "params"}
            groups.append((members, options))
        state = [
            (key, leaves.encode(f"{self.name}.state[{i}]", values))
            for i, (key, values) in enumerate(self.optimizer.state.items())
        ]
        attributes = {
            key: leaves.encode(f"{self.name}.{key}", value)
            for key, value in vars(self.optimizer).items()
            if not key.startswith("_") and isinstance(value, (*_SCALARS, torch.Tensor))
        }
        return groups, state, attributes

    def differences(self, saved: Any, leaves: Leaves) -> Iterator[str]:
        groups = saved[0]
        live = self.optimizer.param_groups
        if len(groups) != len(live):
            yield f"{self.name} has {len(live)} parameter groups, had {len(groups)}"
            return
        for i, ((members, _), group) in enumerate(zip(groups, live, strict=True)):
            if [id(p) for p, _ in members] != [id(p) for p in group["params"]]:
                yield f"{self.name}.param_groups[{i}] holds other parameters than it did"
                continue
            for _, ref in members:
                leaf = leaves.leaves[ref.index]
                if leaf.moved(leaves.storages[leaf.storage]):
                    yield f"{leaf.name} was given other storage, shape or dtype"

    def restore(self, saved: Any, captured: Any, leaves: Leaves) -> None:
        groups, state, attributes = saved
        for (_, options), group in zip(groups, self.optimizer.param_groups, strict=True):
            for key in [key for key in group if key != "params" and key not in options]:
                del group[key]
            group.update({key: self._decode(leaves, tree) for key, tree in options.items()})
        live = self.optimizer.state
        kept = {id(key) for key, _ in state}
        for key in [key for key in live if id(key) not in kept]:
            del live[key]  # created after the snapshot: the optimizer will create it again, from scratch
        for key, tree in state:
            values = self._decode(leaves, tree)
            if isinstance(values, dict) and isinstance(live.get(key), dict):
                live[key].clear()
                live[key].update(values)
            else:
                live[key] = values
        for key, tree in attributes.items():
            setattr(self.optimizer, key, self._decode(leaves, tree))

    @staticmethod
    def _decode(leaves: Leaves, tree: Any) -> Any:
        for ref in _refs(tree):
            _put_back(leaves, ref)
        return leaves.decode(tree)


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

    def restore(self, saved: Any, captured: Any, leaves: Leaves) -> None:
        for key, tree in saved.items():
            setattr(self.scaler, key, _put_back(leaves, tree) if isinstance(tree, Ref) else tree)
        self.scaler._per_optimizer_states.clear()  # whatever was unscaled belongs to gradients that are gone


class StatefulPart(StatePart):
    """Anything with `state_dict` and `load_state_dict`: schedulers and user objects.

    The object gets a fresh deep copy at every restore, so that it can never reach the snapshot.
    """

    def __init__(self, name: str, obj: Stateful) -> None:
        self.name, self.obj = name, obj

    def capture(self) -> Any:
        return clone_tree(self.obj.state_dict())

    def restore(self, saved: Any, captured: Any, leaves: Leaves) -> None:
        self.obj.load_state_dict(clone_tree(captured))


class GeneratorPart(StatePart):
    """A `torch.Generator` of the user's own (a loader's, an environment's)."""

    def __init__(self, name: str, generator: torch.Generator) -> None:
        self.name, self.generator = name, generator

    def capture(self) -> Any:
        return self.generator.get_state()

    def restore(self, saved: Any, captured: Any, leaves: Leaves) -> None:
        self.generator.set_state(captured.clone())


class AccessorPart(StatePart):
    """A (getter, setter) pair of the user's own."""

    def __init__(self, name: str, getter: Callable[[], Any], setter: Callable[[Any], Any]) -> None:
        self.name, self.getter, self.setter = name, getter, setter

    def capture(self) -> Any:
        return clone_tree(self.getter())

    def restore(self, saved: Any, captured: Any, leaves: Leaves) -> None:
        self.setter(clone_tree(captured))


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
    if isinstance(obj, Stateful):
        return StatefulPart(name, obj)
    raise UsageError(
        f"registering {name!r}",
        f"it is a {type(obj).__qualname__}, expected state_dict and load_state_dict, a torch.Generator, "
        "or a (getter, setter) pair",
        "Pass a pair of functions that read and write its state.",
    )
