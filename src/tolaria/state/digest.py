"""Order-sensitive 128-bit digests of tensors and host values (xxh3-128)."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import xxhash

_CHUNK_BYTES = 1 << 28


def update_bytes(hasher: xxhash.xxh3_128, flat: torch.Tensor) -> None:
    """Feed a flat uint8 tensor to the hasher. From an accelerator it is fetched in chunks of 256 MiB, blocking."""
    if flat.device.type == "cpu":
        _update_host(hasher, flat)
        return
    for chunk in flat.split(_CHUNK_BYTES):
        _update_host(hasher, chunk.cpu())


def _update_host(hasher: xxhash.xxh3_128, flat: torch.Tensor) -> None:
    if flat.numel():
        # numpy is no dependency: hand the memory over by address; `flat` keeps it alive during the call
        hasher.update((ctypes.c_ubyte * flat.numel()).from_address(flat.data_ptr()))


def update_tree(hasher: xxhash.xxh3_128, value: Any) -> None:
    """Feed a tree of host values; tensors by dtype, shape and bytes, numbers by their exact representation."""
    if isinstance(value, torch.Tensor):
        dense = value.detach().resolve_conj().resolve_neg().contiguous()
        hasher.update(f"{dense.dtype}{tuple(dense.shape)}".encode())
        if dense.numel():
            update_bytes(hasher, dense.reshape(-1).view(torch.uint8))
    elif isinstance(value, dict):
        for key, item in value.items():
            hasher.update(repr(key).encode())
            update_tree(hasher, item)
    elif isinstance(value, (list, tuple)):
        hasher.update(f"{type(value).__name__}{len(value)}".encode())
        for item in value:
            update_tree(hasher, item)
    elif isinstance(value, (int, float, str, bytes, bool, complex, type(None))):
        hasher.update(repr(value).encode())
    else:
        hasher.update(type(value).__qualname__.encode())
        update_tree(hasher, {k: v for k, v in getattr(value, "__dict__", {}).items() if not callable(v)})
