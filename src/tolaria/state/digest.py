"""Order-sensitive 128-bit digests of tensors and host values (xxh3-128)."""

from __future__ import annotations

import ctypes
import types
from collections.abc import Sequence
from typing import Any

import torch
import xxhash

_CHUNK_BYTES = 1 << 28
_NAMED = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType)


def update_bytes(hasher: xxhash.xxh3_128, flat: torch.Tensor) -> None:
    """Feed a flat uint8 tensor to the hasher. From an accelerator it is fetched in chunks of 256 MiB, blocking."""
    if flat.device.type == "cpu":
        _update_host(hasher, flat)
        return
    for chunk in flat.split(_CHUNK_BYTES):
        _update_host(hasher, chunk.cpu())


def host_digest(flat: torch.Tensor) -> int:
    """xxh3-128 of a flat uint8 tensor in main memory."""
    hasher = xxhash.xxh3_128()
    _update_host(hasher, flat)
    return hasher.intdigest()


def host_digest_of(blocks: Sequence[torch.Tensor], num_bytes: int) -> int:
    """`host_digest` of a flat tensor of `num_bytes` that holds these blocks, each aligned to 64 bytes, and zeros."""
    hasher = xxhash.xxh3_128()
    done = 0
    for block in blocks:
        _update_host(hasher, block)
        padding = -block.numel() % 64
        hasher.update(bytes(padding))
        done += block.numel() + padding
    hasher.update(bytes(num_bytes - done))
    return hasher.intdigest()


def _update_host(hasher: xxhash.xxh3_128, flat: torch.Tensor) -> None:
    if flat.numel():
        # numpy is no dependency: hand the memory over by address; `flat` keeps it alive during the call
        hasher.update((ctypes.c_ubyte * flat.numel()).from_address(flat.data_ptr()))


def update_tree(hasher: xxhash.xxh3_128, value: Any) -> None:
    """Feed a tree of host values; tensors by dtype, shape and bytes, numbers by their exact representation.

    Every value says its type and its length before its contents, so that no two trees run together to the same bytes.
    Functions and classes count by name.
    """
    _update(hasher, value, ())


def _update(hasher: xxhash.xxh3_128, value: Any, around: tuple[int, ...]) -> None:
    if id(value) in around:  # an object that refers back to what holds it
        _tell(hasher, "back", len(around) - around.index(id(value)))
        return
    inside = (*around, id(value))
    if isinstance(value, torch.Tensor):
        dense = value.detach().resolve_conj().resolve_neg().contiguous()
        _tell(hasher, "tensor", f"{dense.dtype}{tuple(dense.shape)}")
        if dense.numel():
            # as_strided: one element with a stride of 0 counts as contiguous, and cannot be viewed as bytes
            update_bytes(hasher, dense.as_strided((dense.numel(),), (1,)).view(torch.uint8))
    elif isinstance(value, dict):
        _tell(hasher, "dict", len(value))
        for key, item in value.items():
            _tell(hasher, "key", type(key).__qualname__ if type(key).__repr__ is object.__repr__ else repr(key))
            _update(hasher, item, inside)
    elif isinstance(value, (list, tuple)):
        _tell(hasher, type(value).__qualname__, len(value))
        for item in value:
            _update(hasher, item, inside)
    elif isinstance(value, (set, frozenset)):
        _tell(hasher, type(value).__qualname__, sorted(map(repr, value)))
    elif isinstance(value, (int, float, str, bytes, bool, complex, type(None))):
        _tell(hasher, type(value).__qualname__, repr(value))
    elif isinstance(value, _NAMED):
        _tell(hasher, "named", value.__qualname__)
    else:
        _update_object(hasher, value, inside)


def _update_object(hasher: xxhash.xxh3_128, value: Any, inside: tuple[int, ...]) -> None:
    """Anything else (an array, a deque, an instance of the user's class) by what pickle would write of it."""
    _tell(hasher, "object", type(value).__qualname__)
    try:
        reduced = value.__reduce_ex__(4)
    except Exception:  # cannot be taken apart: locks, handles
        return
    if isinstance(reduced, tuple):
        _, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
        for piece in (arguments, state, list(items or ()), list(pairs or ())):
            _update(hasher, piece, inside)


def _tell(hasher: xxhash.xxh3_128, kind: str, what: object) -> None:
    text = f"{kind}:{what}".encode()
    hasher.update(f"{len(text)}:".encode() + text)
