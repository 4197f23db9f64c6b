"""Leaves: the governed tensors, the storages under them, and host values that refer to them.

A *leaf* is one tensor at one named place. Leaves that share a storage (tied weights, views, flat buffers) are copied
once, as that storage's bytes. After a rollback every place holds the very tensor object it held at the snapshot, with
the bytes it had then; so identities, aliasing and addresses come back together.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tolaria.errors import UnsupportedState
from tolaria.state.wrappers import Wrapper, is_wrapper, unwrap

_PLAIN_TYPES = (torch.Tensor, nn.Parameter, nn.Buffer)
IMMUTABLE = (int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device)


@dataclass(frozen=True, slots=True)
class Ref:
    """Stands for a tensor inside a tree of host values.

    Attributes:
        index: Of its leaf; with `wrapped`: of its wrapper.
        wrapped: It is a subclass that holds its bytes in other tensors, which are leaves.
    """

    index: int
    wrapped: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Identity:
    """Stands for an object of the user's that is put back as it is; no digest looks at it."""

    value: Any


@dataclass(slots=True, eq=False)
class Leaf:
    """One governed tensor.

    Attributes:
        name: Where it lives, for messages: ``"model.layer.weight"``, ``"optimizer.state[3].exp_avg"``.
        tensor: The live object at the time of the survey. Held, so that its memory cannot be given to anybody else.
        storage: Index of its storage.
        geometry: (dtype, storage offset in elements, shape, strides).
        trained: Expected to be finite at all times (see `TrainState`); False for buffers and frozen parameters that
            held non-finite values from the start, such as attention masks of -inf.
        bits: Whether its bytes are taken as conjugated, and as negated.
    """

    name: str
    tensor: torch.Tensor
    storage: int
    geometry: tuple[torch.dtype, int, tuple[int, ...], tuple[int, ...]]
    trained: bool = True
    bits: tuple[bool, bool] = (False, False)

    def moved(self, storage: Storage) -> bool:
        """Whether the live tensor no longer lies where it lay at the survey."""
        return (
            storage_key(self.tensor) != storage.key
            or _geometry(self.tensor) != self.geometry
            or _bits(self.tensor) != self.bits
        )

    def put_back(self, storage: Storage) -> None:
        """Make the tensor a view of its storage as of the survey again (it may have been given other data)."""
        if self.moved(storage):
            dtype, offset, shape, strides = self.geometry
            place = torch.empty(0, dtype=dtype, device=storage.bytes.device)
            # `.data =` and not `set_`, which would keep the element type of the other data
            place.set_(storage.bytes.untyped_storage(), offset, shape, strides)
            place = place.conj() if self.bits[0] else place
            self.tensor.data = torch._neg_view(place) if self.bits[1] else place


StorageKey = tuple[torch.device, int, int]


@dataclass(slots=True, eq=False)
class Storage:
    """One block of memory under governed tensors.

    Attributes:
        key: (device, address, size in bytes).
        bytes: All of it as a flat tensor, shape [size], uint8. Holds the memory.
        has_buffers: Some buffer lies in it, so a train-mode forward may write it.
        dtype: Element type when all its leaves agree, else None.
        trained: Every leaf in it is expected to be finite.
    """

    key: StorageKey
    bytes: torch.Tensor
    has_buffers: bool
    dtype: torch.dtype | None
    trained: bool

    def shrunk(self) -> bool:
        """Whether somebody has freed a part of it since the survey, so that its old bytes have no place any more."""
        return self.bytes.untyped_storage().nbytes() < self.key[2]


@dataclass(slots=True, eq=False)
class Leaves:
    """Everything a survey found, in the order it was found.

    Attributes:
        leaves: The tensors.
        storages: The memory under them.
        wrappers: Tensors that consist of leaves.
        previous: An earlier survey. Its tensors are held by it, so one that is met again is the same object, and needs
            to be looked at only as far as it may have changed.
    """

    leaves: list[Leaf] = field(default_factory=list)
    storages: list[Storage] = field(default_factory=list)
    wrappers: list[Wrapper] = field(default_factory=list)
    previous: Leaves | None = None
    _index: dict[StorageKey, int] = field(default_factory=dict)
    _known: dict[int, int] = field(default_factory=dict)
    _known_wrappers: dict[int, int] = field(default_factory=dict)

    def add(self, name: str, tensor: torch.Tensor, *, buffer: bool = False, trained: bool = True) -> Ref:
        """Note one governed tensor; one that is in several places (tied weights) is noted at the first.

        Raises:
            UnsupportedState: It is of a kind that cannot be restored exactly yet.
        """
        known = self._known.get(id(tensor))
        if known is not None:
            self.storages[self.leaves[known].storage].has_buffers |= buffer
            return Ref(known)
        if type(tensor) not in _PLAIN_TYPES and is_wrapper(tensor):
            return self._add_wrapper(name, tensor, buffer=buffer, trained=trained)
        met = self._met(tensor)
        if met is None:
            refuse_unsupported(name, tensor)
        key, geometry = storage_key(tensor), _geometry(tensor)
        index = self._index.get(key)
        if index is None:
            index = self._index[key] = len(self.storages)
            if met is None:
                flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
            else:
                flat = met.bytes
            self.storages.append(Storage(key, flat, buffer, tensor.dtype, trained))
        else:
            storage = self.storages[index]
            storage.has_buffers |= buffer
            storage.trained &= trained
            if storage.dtype is not tensor.dtype:
                storage.dtype = None
        self.leaves.append(Leaf(name, tensor, index, geometry, trained, _bits(tensor)))
        self._known[id(tensor)] = len(self.leaves) - 1
        return Ref(len(self.leaves) - 1)

    def _add_wrapper(self, name: str, tensor: torch.Tensor, *, buffer: bool, trained: bool) -> Ref:
        number = self._known_wrappers.get(id(tensor))
        wrapper = self.wrappers[number] if number is not None else unwrap(name, tensor)
        for key, inner in wrapper.tensors():
            self.add(key, inner, buffer=buffer, trained=trained)
        if number is None:
            number = self._known_wrappers[id(tensor)] = len(self.wrappers)
            self.wrappers.append(wrapper)
        return Ref(number, wrapped=True)

    def tensor(self, ref: Ref) -> torch.Tensor:
        """The live object that a `Ref` stands for."""
        return self.wrappers[ref.index].tensor if ref.wrapped else self.leaves[ref.index].tensor

    def moved(self, ref: Ref) -> str | None:
        """The name of a plain tensor that no longer lies where it lay at the survey."""
        if ref.wrapped:
            return None  # see `changed_wrappers`
        leaf = self.leaves[ref.index]
        return leaf.name if leaf.moved(self.storages[leaf.storage]) else None

    def changed_wrappers(self) -> Iterator[str]:
        """Wrappers that changed in more than the bytes of their inner tensors, which is all that can be put back."""
        for wrapper in self.wrappers:
            difference = wrapper.difference()
            if difference is not None:
                yield difference
            for name, inner in wrapper.tensors():
                known = self._known.get(id(inner))  # a wrapper in a wrapper stands in this list by itself
                if known is not None and self.moved(Ref(known)) is not None:
                    yield f"{name} was given other storage, shape or dtype"

    def _met(self, tensor: torch.Tensor) -> Storage | None:
        """The storage of a tensor that the previous survey has met, if it still lies there and looks the same."""
        if self.previous is None or (number := self.previous._known.get(id(tensor))) is None:
            return None
        leaf = self.previous.leaves[number]  # the same object: the leaf has held it, so its id was not given away
        storage = self.previous.storages[leaf.storage]
        # the same address again is not the same memory, if that was freed and taken once more
        same = storage.bytes.untyped_storage()._cdata == tensor.untyped_storage()._cdata
        return storage if same and not leaf.moved(storage) else None

    def encode(self, name: str, value: Any) -> Any:
        """A copy of `value` in which every tensor has become a `Ref` to a leaf of this collection.

        Plain dicts, lists and tuples are walked; anything else is deep-copied whole.
        """
        if isinstance(value, torch.Tensor):
            return self.add(name, value)
        if isinstance(value, IMMUTABLE):
            return value
        if type(value) is dict:
            return {key: self.encode(f"{name}.{key}", item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self.encode(f"{name}[{i}]", item) for i, item in enumerate(value))
        return clone_tree(value)

    def decode(self, tree: Any) -> Any:
        """The inverse of `encode`: fresh containers, the leaves' own tensor objects."""
        if isinstance(tree, Ref):
            return self.tensor(tree)
        if isinstance(tree, IMMUTABLE):
            return tree
        if type(tree) is dict:
            return {key: self.decode(item) for key, item in tree.items()}
        if type(tree) in (list, tuple):
            return type(tree)(map(self.decode, tree))
        return clone_tree(tree)


def put_back(leaves: Leaves, ref: Ref) -> torch.Tensor:
    """The tensor that a `Ref` stands for, a view of its storage as of the survey again."""
    if ref.wrapped:
        return leaves.tensor(ref)  # unchanged but for bytes: anything else was refused
    leaf = leaves.leaves[ref.index]
    leaf.put_back(leaves.storages[leaf.storage])
    return leaf.tensor


def storage_key(tensor: torch.Tensor) -> StorageKey:
    """Device, address and size of the memory under `tensor`."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


Geometry = tuple[torch.dtype, int, tuple[int, ...], tuple[int, ...]]


def _geometry(tensor: torch.Tensor) -> Geometry:
    return tensor.dtype, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride()


def _bits(tensor: torch.Tensor) -> tuple[bool, bool]:
    return tensor.is_conj(), tensor.is_neg()


def clone_tree(value: Any) -> Any:
    """A deep copy that shares nothing with `value`; tensors are detached and cloned."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, IMMUTABLE):
        return value
    if type(value) is dict:
        return {key: clone_tree(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(clone_tree, value))
    if isinstance(value, Mapping) and hasattr(value, "_metadata"):  # the OrderedDict of Module.state_dict
        copied = OrderedDict((key, clone_tree(item)) for key, item in value.items())
        vars(copied)["_metadata"] = copy.deepcopy(value._metadata)  # the versions of its modules
        return copied
    return copy.deepcopy(value)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a strided tensor holds neither a NaN nor an infinity. True for types that have none."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    values = _comparable(tensor)
    # the sum is many times faster; that of finite values may overflow, so it can only clear a tensor
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def is_page_locked(tensor: torch.Tensor) -> bool:
    """Whether a CPU tensor is in page-locked memory, so that a device may be transferring it."""
    return torch.accelerator.is_available() and tensor.is_pinned()


def any_page_locked(tensors: Iterable[torch.Tensor]) -> bool:
    """The same of several."""
    return torch.accelerator.is_available() and any(map(torch.Tensor.is_pinned, tensors))


def finiteness(tensor: torch.Tensor) -> torch.Tensor:
    """`is_finite` without waiting for the device: shape [], bool."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    return torch.isfinite(_comparable(tensor)).all()


def has_nan(tensor: torch.Tensor) -> bool:
    """Whether a strided tensor holds a NaN."""
    return bool(torch.isnan(_comparable(tensor)).any())


def _comparable(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().float() if tensor.dtype.itemsize == 1 else tensor.detach()  # float8 knows no comparison


def plain_tensors(name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that hold the bytes of `tensor`: itself, or what it wraps, however deep.

    Raises:
        UnsupportedState: One of them cannot be restored exactly.
    """
    if is_wrapper(tensor):
        return [plain for key, inner in unwrap(name, tensor).tensors() for plain in plain_tensors(key, inner)]
    refuse_unsupported(name, tensor)
    return [tensor]


def refuse_unsupported(name: str, tensor: torch.Tensor) -> None:
    """Raise `UnsupportedState` for tensors whose bytes alone do not restore them."""
    if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
        raise _unsupported(name, "is not initialised yet", "Run one batch through the lazy module first.")
    if type(tensor) not in _PLAIN_TYPES:
        raise _unsupported(name, f"is a {type(tensor).__module__}.{type(tensor).__qualname__}")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        raise _unsupported(name, f"has layout {tensor.layout} (quantized: {tensor.is_quantized})")
    if tensor.is_meta:
        raise _unsupported(name, "is on the meta device and has no bytes", "Materialise the model first.")
    if tensor.is_inference():
        raise _unsupported(
            name, "is an inference tensor, which cannot be written outside of inference mode", "Clone it first."
        )


def _unsupported(name: str, seen: str, advice: str = "") -> UnsupportedState:
    advice = advice or 'See "not yet" in docs/guarantees.md; leave this part of the model out of the governed module.'
    return UnsupportedState(
        "surveying the train state", f"{name} {seen}, expected a plain strided torch.Tensor or Parameter", advice
    )
