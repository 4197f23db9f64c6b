"""WORDS: what the sweep does, in torch's operators alone, so that it can be done everywhere: copies, and the digest.

`kernels` says what the digest is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

CHUNK_BYTES = 1 << 15
_CHUNK_WORDS = CHUNK_BYTES // 4
_FIRST_CHUNK = 4096  # of the numbers that chunks are weighted by; smaller ones belong to the quads of a chunk
_LANES = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93)
_STEP = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_PORTABLE_CHUNKS = 512  # at a time: bounds the memory that plain operators take


def typed(block: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The whole values in a block of bytes."""
    whole = block[: block.numel() // dtype.itemsize * dtype.itemsize]
    aligned = whole.storage_offset() % dtype.itemsize == 0 and whole.data_ptr() % dtype.itemsize == 0
    return (whole if aligned else whole.clone()).view(dtype)


_WORD_BYTES = 4


def copy_words(destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """`prepare_words`, once."""
    prepare_words(destinations, sources)()


def prepare_words(destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> Callable[[], None]:
    """A copy of flat uint8 tensors of one device pairwise, on the stream that is current at each call.

    As 4-byte words wherever size and address allow: torch's multi-tensor copy moves those at 1.2 times the duration of
    one flat copy on an H200, and single bytes at 2.3 times. It takes one type at a time, hence two lists.
    """
    words: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    rest: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for destination, source in zip(destinations, sources, strict=True):
        if not source.numel():
            continue
        if (source.numel() | source.data_ptr() | destination.data_ptr()) % _WORD_BYTES == 0:
            words[0].append(destination.view(torch.int32))
            words[1].append(source.view(torch.int32))
        else:
            rest[0].append(destination)
            rest[1].append(source)
    return functools.partial(_copy_lists, [pair for pair in (words, rest) if pair[0]])


def _copy_lists(pairs: Sequence[tuple[list[torch.Tensor], list[torch.Tensor]]]) -> None:
    for destinations, sources in pairs:
        torch._foreach_copy_(destinations, sources)


# ---------------------------------------------------------------- the digest in torch operators


def portable_digest(blocks: Sequence[torch.Tensor], first: int = 0) -> torch.Tensor:
    """The digest of flat uint8 tensors of one device, in torch operators alone: shape [], int64."""
    chunk = first
    device = blocks[0].device if blocks else torch.device("cpu")
    total = torch.zeros((), dtype=torch.int64, device=device)
    for block in blocks:
        whole = block.numel() // CHUNK_BYTES * CHUNK_BYTES
        rows = typed(block[:whole], torch.int32).view(-1, _CHUNK_WORDS)
        for piece in rows.split(_PORTABLE_CHUNKS) if whole else ():
            total += _digest_rows(piece, chunk)
            chunk += len(piece)
        if block.numel() > whole:
            padded = torch.zeros(CHUNK_BYTES, dtype=torch.uint8, device=device)
            padded[: block.numel() - whole] = block[whole:]
            total += _digest_rows(padded.view(torch.int32).view(1, -1), chunk)
            chunk += 1
    return total


def _digest_rows(rows: torch.Tensor, first: int) -> torch.Tensor:
    # words are unsigned: the sign of an int32 must not reach the upper half
    weighted = rows.to(torch.int64).bitwise_and_(0xFFFFFFFF).mul_(_word_weights(rows.device))
    numbers = torch.arange(_FIRST_CHUNK + first, _FIRST_CHUNK + first + len(rows), device=rows.device)
    return (weighted.sum(1) * _mixed(numbers)).sum()


@functools.cache
def _word_weights(device: torch.device) -> torch.Tensor:
    """Of the words of one chunk: shape [_CHUNK_WORDS], int64."""
    lanes = torch.tensor([_signed(lane) for lane in _LANES], dtype=torch.int64, device=device)
    quads = _mixed(torch.arange(1, _CHUNK_WORDS // 4 + 1, dtype=torch.int64, device=device))
    return (quads[:, None] * lanes).view(-1)


def mix(k: int) -> int:
    """The weight for a position, an odd number below 2**64."""
    mask = (1 << 64) - 1
    k = k * _STEP & mask
    k = (k ^ (k >> 30)) * _FACTORS[0] & mask
    k = (k ^ (k >> 27)) * _FACTORS[1] & mask
    return (k ^ (k >> 31)) | 1


def _mixed(k: torch.Tensor) -> torch.Tensor:
    k = k * _signed(_STEP)
    k = (k ^ _shifted(k, 30)) * _signed(_FACTORS[0])
    k = (k ^ _shifted(k, 27)) * _signed(_FACTORS[1])
    return (k ^ _shifted(k, 31)) | 1


def _shifted(k: torch.Tensor, by: int) -> torch.Tensor:
    """A logical shift to the right; torch's is arithmetic."""
    return (k >> by) & ((1 << (64 - by)) - 1)


def _signed(k: int) -> int:
    return k - (1 << 64) if k >= 1 << 63 else k
