"""Random trees of modules and tensors with random views, ties and types, under random changes of both.

Bytes, objects, places, addresses and sharing all come back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tolaria import GovernorConfig, TolariaGovernor, judge

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int16, torch.uint8, torch.complex64, torch.float8_e5m2]
NUM_PLACES = 6


class Tree(nn.Module):
    """Three levels of modules and an optimizer whose state holds nested containers."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Module()
        self.child.child = nn.Module()
        self.weight = nn.Parameter(torch.zeros(2))
        self.optimizer = [torch.optim.SGD([self.weight], lr=0.1)]  # in a list: not a part of the module
        self.first_weight = [self.weight]  # stays a key of the optimizer's state when it leaves the module


@dataclass
class Forest:
    """A tree under test with the memory pools that its tensors are views of."""

    tree: Tree = field(default_factory=Tree)
    pools: list[torch.Tensor] = field(default_factory=list)
    tensors: list[torch.Tensor] = field(default_factory=list)

    def put(self, place: int, name: str, tensor: torch.Tensor | None) -> None:
        optimizer = self.tree.optimizer[0]
        if place < 3:
            modules = list(self.tree.modules())
            modules[place % len(modules)].register_buffer(name, tensor)
        elif place == 3:
            optimizer.state[self.tree.first_weight[0]][name] = tensor
        elif place == 4:
            optimizer.state["shared"].setdefault("nested", [0, {"deep": []}])[1]["deep"].append((name, tensor))
        else:
            optimizer.param_groups[0][name] = [tensor, 1.5]

    def places(self) -> list[tuple[str, Any]]:
        """Every place with the object in it, in order, found without any help of tolaria."""
        optimizer = self.tree.optimizer[0]
        modules = list(self.tree.named_modules(remove_duplicate=False))
        found: list[tuple[str, Any]] = list(modules)
        for table in ("_buffers", "_parameters", "_modules"):
            found += [(f"{path}.{key}", item) for path, m in modules for key, item in vars(m)[table].items()]
        for group in optimizer.param_groups:
            found += [("group", id(group))] + [("member", parameter) for parameter in group["params"]]
        for number, values in enumerate(optimizer.state.values()):
            found += _flatten(f"state {number}", values)
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        return found + _flatten("groups", groups)


def _flatten(name: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [pair for key, item in value.items() for pair in _flatten(f"{name}.{key}", item)]
    if isinstance(value, (list, tuple)):
        return [(name, type(value))] + [pair for i, item in enumerate(value) for pair in _flatten(f"{name}[{i}]", item)]
    return [(name, value)]


def _bytes(tensor: torch.Tensor) -> bytes:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy().tobytes()


def _look(forest: Forest) -> tuple[Any, ...]:
    """What has to be the same after a rollback: objects by identity, geometry, addresses, bytes, sharing."""
    seen = forest.places()
    tensors = [value for _, value in seen if isinstance(value, torch.Tensor)]
    return (
        [(name, id(value) if isinstance(value, (torch.Tensor, nn.Module)) else repr(value)) for name, value in seen],
        [(t.dtype, tuple(t.shape), t.stride(), t.storage_offset(), t.data_ptr()) for t in tensors],
        [_bytes(t) for t in tensors],
        [[a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() for a in tensors] for b in tensors],
    )


@st.composite
def views(draw: st.DrawFn, pool: torch.Tensor) -> torch.Tensor:
    """Any strided view of a pool of bytes: gaps, overlaps, expanded and empty dimensions, scalars."""
    dtype = draw(st.sampled_from(DTYPES))
    flat = pool.view(dtype)
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    strides = [draw(st.integers(0, 3)) for _ in shape]
    reach = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if all(shape) else 0
    if reach >= flat.numel():
        return flat
    return flat.as_strided(shape, strides, draw(st.integers(0, flat.numel() - 1 - reach)))


@st.composite
def forests(draw: st.DrawFn) -> Forest:
    forest = Forest()
    for size in draw(st.lists(st.sampled_from([16, 48, 64]), min_size=1, max_size=3)):
        forest.pools.append(torch.arange(size, dtype=torch.uint8))
    for number in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["view", "view", "fresh", "tie", "none"]))
        tensor: torch.Tensor | None = None
        if kind == "view":
            tensor = draw(views(draw(st.sampled_from(forest.pools))))
        elif kind == "fresh":
            tensor = draw(views(torch.arange(32, dtype=torch.uint8))).clone()
        elif kind == "tie" and forest.tensors:
            tensor = draw(st.sampled_from(forest.tensors))
        if tensor is not None:
            forest.tensors.append(tensor)
        forest.put(draw(st.integers(0, NUM_PLACES - 1)), f"t{number}", tensor)
    return forest


def _change(draw: st.DrawFn, forest: Forest, number: int) -> None:
    """One of the things that training, or a fault, may do to the tree."""
    optimizer = forest.tree.optimizer[0]
    holder = draw(st.sampled_from(list(forest.tree.modules())))
    keys = sorted(holder._buffers)
    kind = draw(st.sampled_from(["bytes", "assign", "data", "delete", "add", "state", "group", "forget", *STRUCTURE]))
    if kind == "bytes":
        draw(st.sampled_from(forest.pools)).bitwise_not_()
    elif kind == "assign" and keys:
        holder._buffers[draw(st.sampled_from(keys))] = draw(views(draw(st.sampled_from(forest.pools))))
    elif kind == "data" and forest.tensors:
        draw(st.sampled_from(forest.tensors)).data = torch.ones(
            draw(st.integers(0, 3)), dtype=draw(st.sampled_from(DTYPES))
        )
    elif kind == "delete" and keys:
        del holder._buffers[draw(st.sampled_from(keys))]
    elif kind == "add":
        forest.put(draw(st.integers(0, NUM_PLACES - 1)), f"late{number}", torch.ones(2))
    elif kind == "state":
        optimizer.state["shared"] = {"nested": [draw(st.integers(0, 9)), {"deep": []}]}
    elif kind == "group":
        optimizer.param_groups[0]["lr"] = draw(st.floats(0, 1))
    elif kind == "forget":
        optimizer.state.clear()
    elif kind in STRUCTURE[:4]:
        _change_modules(draw, kind, holder, forest.tree)
    else:
        _change_parameters(draw, kind, holder, optimizer)


STRUCTURE = ["grow", "cut", "hang", "reorder", "parameter", "tie", "drop", "join", "leave", "split"]


def _change_modules(draw: st.DrawFn, kind: str, holder: nn.Module, tree: nn.Module) -> None:
    children = sorted(holder._modules)
    if kind == "grow":
        free = [f"n{i}" for i in range(4) if not hasattr(holder, f"n{i}") or f"n{i}" in holder._modules]
        if free:
            holder.add_module(draw(st.sampled_from(free)), nn.Linear(1, 1, bias=draw(st.booleans())))
    elif kind == "cut" and children:
        del holder._modules[draw(st.sampled_from(children))]
    elif kind == "hang" and children:  # the same module in a second place, or moved there
        child = draw(st.sampled_from(children))
        module = holder._modules[child]
        if draw(st.booleans()):
            del holder._modules[child]
        tree._modules["hung"] = module
    elif kind == "reorder":
        for child in reversed(children):
            holder._modules[child] = holder._modules.pop(child)


def _change_parameters(draw: st.DrawFn, kind: str, holder: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    group = draw(st.sampled_from(optimizer.param_groups))
    parameters = sorted(holder._parameters)
    if kind == "parameter":
        names = [*parameters, *(f"p{i}" for i in range(3))]
        holder._parameters[draw(st.sampled_from(names))] = nn.Parameter(torch.ones(draw(st.integers(0, 3))))
    elif kind == "tie" and parameters:
        holder._parameters["tied"] = holder._parameters[draw(st.sampled_from(parameters))]
    elif kind == "drop" and parameters:
        name = draw(st.sampled_from(parameters))
        if draw(st.booleans()):
            del holder._parameters[name]
        else:
            holder._parameters[name] = None
    elif kind == "join":
        group["params"].append(nn.Parameter(torch.ones(2)))
    elif kind == "leave" and group["params"]:
        group["params"].pop(draw(st.integers(0, len(group["params"]) - 1)))
    elif kind == "split":
        if draw(st.booleans()):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
        elif len(optimizer.param_groups) > 1:
            optimizer.param_groups.pop(draw(st.integers(0, len(optimizer.param_groups) - 1)))


@settings(max_examples=150)
@given(data=st.data(), forest=forests())
def test_any_tree_comes_back_exactly(data: st.DataObject, forest: Forest) -> None:
    config = GovernorConfig(slots=3, rng="restore")
    with TolariaGovernor(forest.tree, forest.tree.optimizer, config=config, detector=judge.non_finite()) as governor:
        snapshots = []
        for number in range(data.draw(st.integers(1, 3))):
            snapshots.append((governor.snapshot(), _look(forest), governor.digest()))
            for _ in range(data.draw(st.integers(1, 4))):
                _change(data.draw, forest, number)
        while snapshots:
            info, seen, digest = snapshots.pop(data.draw(st.integers(0, len(snapshots) - 1)))
            snapshots = [other for other in snapshots if other[0].serial < info.serial]  # later ones are undone
            governor.execute_rollback(to=info)
            assert _look(forest) == seen
            assert governor.digest() == digest
            _change(data.draw, forest, 9)
