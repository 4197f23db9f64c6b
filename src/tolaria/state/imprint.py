"""IMPRINT: what a survey has found, in a form that is compared in bulk: does everything still stand where it stood?

A survey walks modules, parameter groups and state dicts in Python and takes microseconds per tensor. Between two
snapshots nothing of that moves, as a rule. An imprint holds the objects of the last survey and proves it: by the
identity of every object in every container, by the memory and geometry of every tensor, and by the address and size of
every storage. It believes nothing that it has not compared, and notices no less than a survey would, only without a
bytecode per tensor. Where it finds a difference, or cannot tell, the survey is made again from the start.
"""

from __future__ import annotations

import bisect
import functools
import importlib
import itertools
import operator
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from tolaria.state.leaves import IMMUTABLE, Leaf, Leaves, Ref

_DICTS = (dict, OrderedDict, defaultdict)
_LISTS = (list, tuple)
_flat = itertools.chain.from_iterable


class Unfit(Exception):
    """This state has something in it that no imprint can vouch for, so each snapshot surveys it from the start."""


class Contents:
    """What is in some containers, by identity and in order.

    Args:
        containers: Dicts, lists or tuples of the plain types.

    Raises:
        Unfit: One of them is of another type, which may iterate otherwise than it is compared here.
    """

    def __init__(self, containers: Sequence[Collection[Any]]) -> None:
        if any(type(each) not in (*_DICTS, *_LISTS) for each in containers):
            raise Unfit
        self._containers = list(containers)
        self._sizes = list(map(len, containers))
        self._filled = [each for each in containers if each]
        self._dicts: list[dict[Any, Any]] = [each for each in self._filled if isinstance(each, dict)]
        self._items = list(_flat(self._filled))  # of a dict: its keys
        self._values = list(_flat(map(dict.values, self._dicts)))

    def stand(self) -> bool:
        """Whether each has the same objects in the same order."""
        return (
            list(map(len, self._containers)) == self._sizes
            and all(map(operator.is_, _flat(self._filled), self._items))
            and all(map(operator.is_, _flat(map(dict.values, self._dicts)), self._values))
        )


class Values:
    """Dicts of tensors and host values, beside what a survey has encoded of them: parameter groups, optimizer state.

    The tensors must stay; numbers, strings and small trees may change and are encoded anew.

    Args:
        dicts: The live ones.
        encoded: Of each, key by key, what `Leaves.encode` answered.
        pinned: Keys whose values must stay as well, whatever they are.

    Raises:
        Unfit: A tensor stands in a list or dict among the values.
    """

    def __init__(
        self,
        dicts: Sequence[dict[Any, Any]],
        encoded: Sequence[dict[Any, Any]],
        pinned: Collection[str] = (),
    ) -> None:
        if any(type(each) not in _DICTS for each in dicts):
            raise Unfit
        self._dicts, self.encoded = list(dicts), list(encoded)
        self._sizes = list(map(len, dicts))
        self._ends = list(itertools.accumulate(self._sizes))
        self._keys = list(_flat(dicts))
        self._values = list(_flat(map(dict.values, dicts)))
        self._volatile: list[int] = []  # may change inside
        self._loose: list[tuple[int, Any]] = []  # (dict, key) of whatever is no tensor
        trees = _flat(map(dict.values, encoded))
        self._stays = list(map(self._classify, itertools.count(), self._keys, trees, itertools.repeat(pinned)))

    def _classify(self, number: int, key: Any, tree: Any, pinned: Collection[str]) -> bool:
        """Whether the value at this place must stay the object that it is."""
        if isinstance(tree, Ref) or (isinstance(key, str) and key in pinned):
            return True
        holds_tensor, is_fixed = _look_into(tree)
        if holds_tensor:
            if not is_fixed:
                raise Unfit
            return True
        if not is_fixed:
            self._volatile.append(number)
        self._loose.append((bisect.bisect_right(self._ends, number), key))
        return False

    def changes(self) -> list[tuple[int, Any]] | None:
        """Places whose host values may have changed, with what is there now; None when anything else has."""
        if list(map(len, self._dicts)) != self._sizes or not all(map(operator.is_, _flat(self._dicts), self._keys)):
            return None
        now = list(_flat(map(dict.values, self._dicts)))
        changed = self._volatile
        if not all(map(operator.is_, now, self._values)):
            same = map(operator.is_, now, self._values)
            changed = sorted({*changed, *(number for number, stays in enumerate(same) if not stays)})
            if any(self._stays[number] for number in changed):
                return None
        return [(number, now[number]) for number in changed]

    def update(self, changes: Sequence[tuple[int, Any]]) -> None:
        """Encode anew what has changed. Raises `Unfit` for a tensor in the place of a host value."""
        fresh: dict[int, dict[Any, Any]] = {}
        for number, value in changes:
            index = bisect.bisect_right(self._ends, number)
            # what earlier snapshots hold stays as it is
            own = fresh.setdefault(index, dict(self.encoded[index]))
            own[self._keys[number]] = value if isinstance(value, IMMUTABLE) else HostOnly().encode("", value)
            self._values[number] = value
        for index, own in fresh.items():
            self.encoded[index] = own

    def put_back(self, encoded: Sequence[dict[Any, Any]], decode: Callable[[Any], Any]) -> None:
        """Give the live dicts the host values of an earlier encoding of the very same tensors."""
        for index, key in self._loose:
            live, tree = self._dicts[index], encoded[index][key]
            if live[key] is not tree:
                live[key] = decode(tree)


class HostOnly(Leaves):
    """Encodes values among which there is no tensor."""

    def add(self, name: str, tensor: torch.Tensor, *, buffer: bool = False, trained: bool = True) -> Ref:
        raise Unfit


def _look_into(tree: Any) -> tuple[bool, bool]:
    """Whether an encoded value holds a tensor; whether nothing in it can change while it stays the same object."""
    if isinstance(tree, Ref):
        return True, True
    if isinstance(tree, IMMUTABLE):
        return False, True
    if type(tree) is tuple:
        inside = list(map(_look_into, tree))
        return any(holds for holds, _ in inside), all(fixed for _, fixed in inside)
    if type(tree) is list:
        return any(_look_into(item)[0] for item in tree), False
    if type(tree) is dict:
        return any(_look_into(item)[0] for item in tree.values()), False
    return False, False


class Whereabouts:
    """Where the tensors of a survey lie, and what they look like.

    Args:
        leaves: The survey's.

    Raises:
        Unfit: Wrappers are among them, whose context can only be compared one by one; or something has moved already.
    """

    def __init__(self, leaves: Leaves) -> None:
        if leaves.wrappers:
            raise Unfit
        self._blocks = [
            _Block(leaves, leaves.leaves[start : start + _BLOCK]) for start in range(0, len(leaves.leaves), _BLOCK)
        ]
        if not self.stands():
            raise Unfit

    def stands(self) -> bool:
        """Whether every tensor lies where it lay, in memory that is as it was, and has its type, shape and strides."""
        return all(block.stands() for block in self._blocks)


_BLOCK = 256
"""Tensors that are looked at from all sides before the next ones are: what is read of them stays in the cache."""


class _Block:
    def __init__(self, leaves: Leaves, some: Sequence[Leaf]) -> None:
        self._tensors = [leaf.tensor for leaf in some]
        # the objects are kept, and torch hands out the same one for the same memory for as long as it lives
        self._under = list(map(torch.Tensor.untyped_storage, self._tensors))
        keys = [leaves.storages[leaf.storage].key for leaf in some]
        memory = {id(under): (under, key[2]) for under, key in zip(self._under, keys, strict=True)}
        self._memory = [under for under, _ in memory.values()]
        self._sizes = [size for _, size in memory.values()]
        # the address of its memory and its offset in one; an empty tensor begins nowhere
        self._begins = [
            address + leaf.geometry[1] * leaf.geometry[0].itemsize if leaf.tensor.numel() else 0
            for leaf, (_, address, _) in zip(some, keys, strict=True)
        ]
        empty = [i for i, leaf in enumerate(some) if not leaf.tensor.numel()]
        self._empty, self._under_empty = [self._tensors[i] for i in empty], [self._under[i] for i in empty]
        self._of_empty = [(keys[i][1], some[i].geometry[1]) for i in empty]
        self._looks = looks(self._tensors)
        if [(each.dtype, tuple(each.shape), each.stride()) for each in self._tensors] != [
            (leaf.geometry[0], *leaf.geometry[2:]) for leaf in some
        ]:
            raise Unfit

    def stands(self) -> bool:
        return (
            all(map(operator.is_, map(torch.Tensor.untyped_storage, self._tensors), self._under))
            and list(map(torch.Tensor.data_ptr, self._tensors)) == self._begins
            and list(map(torch.UntypedStorage.nbytes, self._memory)) == self._sizes
            and (not self._empty or self._where_the_empty_are() == self._of_empty)
            and self._looks()
        )

    def _where_the_empty_are(self) -> list[tuple[int, Any]]:
        addresses = map(torch.UntypedStorage.data_ptr, self._under_empty)
        return list(zip(addresses, map(torch.Tensor.storage_offset, self._empty), strict=True))


def looks(tensors: Sequence[torch.Tensor]) -> Callable[[], bool]:
    """A question: have these tensors the types, dtypes, devices, shapes, strides and flags that they have now?

    The flag is `requires_grad`. Answered in one call by what torch guards its compiled code with. That is private to
    torch: where it is missing, or does not notice what it should, attributes are compared.
    """
    kept = tuple(tensors)
    return functools.partial(look_alike(kept), *kept)


def look_alike(tensors: Sequence[torch.Tensor]) -> Callable[..., bool]:
    """`looks` to be asked of others: as many tensors, one by one. These here are not held."""
    guards = _guards()
    return _compared(tensors) if guards is None else guards(tensors)


def _compared(tensors: Sequence[torch.Tensor]) -> Callable[..., bool]:
    asked: tuple[Callable[[Any], Any], ...] = (
        type,
        operator.attrgetter("shape"),
        torch.Tensor.stride,
        operator.attrgetter("dtype"),
        operator.attrgetter("device"),
        operator.attrgetter("requires_grad"),
        torch.is_conj,
        torch.is_neg,
    )

    def read(some: Sequence[torch.Tensor]) -> list[list[Any]]:
        return [list(map(ask, some)) for ask in asked]

    before = read(tensors)

    def is_alike(*others: torch.Tensor) -> bool:
        return read(others) == before

    return is_alike


@functools.cache
def _guards() -> Callable[[Sequence[torch.Tensor]], Callable[..., bool]] | None:
    try:
        made: Any = importlib.import_module("torch._C._dynamo.guards").TensorGuards

        def guard(tensors: Sequence[torch.Tensor]) -> Callable[..., bool]:
            shapes = [list(tensor.shape) for tensor in tensors]
            strides = [list(tensor.stride()) for tensor in tensors]
            check: Callable[..., bool] = made(*tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides).check
            return check

        return guard if _notices(guard) else None
    except Exception:  # private to torch: it may be missing, or want other arguments
        return None


def _notices(guard: Callable[[Sequence[torch.Tensor]], Callable[..., bool]]) -> bool:
    """Whether such guards tell apart what they have to."""
    flat = torch.zeros(12, device="cpu")
    plain, scalar = flat[:6].view(2, 3), flat[0]
    others = (
        flat[:6].view(3, 2),
        flat[::2].view(2, 3),
        flat[:6].view(3, 2).t(),
        flat[:6].view(torch.int32).view(2, 3),
        plain.to_sparse(),
        torch.nn.Parameter(plain),
        torch.zeros(2, 3, device="cpu", requires_grad=True),
        torch.zeros(2, 3, device="meta"),
        torch._neg_view(plain),
    )
    check = guard((plain, scalar))
    return check(plain, scalar) and not any(check(other, scalar) for other in others) and not check(plain, flat[:1])
