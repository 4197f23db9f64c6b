"""DIGEST of memory on a device: order-sensitive, 64 bits, without a transfer to the host.

With x[i] the i-th 32-bit word, C = 2**22, and mix(k) the finaliser of splitmix64 for k * 0x9E3779B97F4A7C15 (Steele,
Lea and Flood, "Fast splittable pseudorandom number generators", 2014), made odd:

    digest = sum over i of  x[i] * mix(i % C) * mix(C + i // C)   modulo 2**64

The weights are odd, so any change of a single word changes the digest; two words that change places go unseen with
probability 2**-32 or less. Two implementations give the same number: a compiled kernel (CUDA, one pass at the speed of
memory) and plain torch operators (every device, about nine times slower on an H200).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

logger = logging.getLogger("tolaria")

CHUNK_WORDS = 1 << 22
_STEP = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_BLOCKS, _THREADS = 132 * 8, 256

_SOURCE = """
__device__ unsigned long long mix(unsigned long long k) {
  k *= 0x9E3779B97F4A7C15ull;
  k = (k ^ (k >> 30)) * 0xBF58476D1CE4E5B9ull;
  k = (k ^ (k >> 27)) * 0x94D049BB133111EBull;
  return (k ^ (k >> 31)) | 1ull;
}
// torch hands Python numbers over as 32-bit ints, so the count comes in two parts
extern "C" __global__ void tolaria_digest(const uint4* words, int high, int low, unsigned long long* digest) {
  const long long chunk = 1ll << 22, quads = ((long long)high << 20) + low;
  unsigned long long sum = 0;
  const long long stride = gridDim.x * (long long)blockDim.x;
  for (long long q = blockIdx.x * (long long)blockDim.x + threadIdx.x; q < quads; q += stride) {
    const uint4 x = words[q];
    const long long i = q * 4, j = i & (chunk - 1);
    const unsigned long long part = x.x * mix(j) + x.y * mix(j + 1) + x.z * mix(j + 2) + x.w * mix(j + 3);
    sum += part * mix(chunk + i / chunk);
  }
  for (int lane = 16; lane; lane >>= 1) sum += __shfl_down_sync(0xffffffffu, sum, lane);
  if ((threadIdx.x & 31) == 0) atomicAdd(digest, sum);
}
"""


def digest(flat: torch.Tensor) -> torch.Tensor:
    """The digest of a flat tensor, computed on its device and the current stream; nothing waits.

    Args:
        flat: shape [bytes], uint8, contiguous, 16-byte aligned, bytes a multiple of 16.

    Returns:
        shape [], int64, on the device of `flat`.
    """
    if flat.device.type == "cuda" and flat.numel():
        with torch.cuda.device(flat.device):
            kernel = _compiled(torch.cuda.current_device())
            if kernel is not None:
                total = torch.zeros((), dtype=torch.int64, device=flat.device)
                high, low = divmod(flat.numel() // 16, 1 << 20)
                kernel(grid=(_BLOCKS, 1, 1), block=(_THREADS, 1, 1), args=[flat, high, low, total.view(1)])
                return total
    return portable_digest(flat)


def portable_digest(flat: torch.Tensor) -> torch.Tensor:
    """`digest` in torch operators alone."""
    words = flat.view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    if not words.numel():
        return total
    weights = _weights(min(CHUNK_WORDS, words.numel()), flat.device)
    product = torch.empty_like(weights)
    for number, chunk in enumerate(words.split(CHUNK_WORDS)):
        # words are unsigned: the sign of an int32 must not reach the upper half
        part = product[: chunk.numel()].copy_(chunk).bitwise_and_(0xFFFFFFFF).mul_(weights[: chunk.numel()])
        total += part.sum() * _signed(mix(CHUNK_WORDS + number))
    return total


def mix(k: int) -> int:
    """The weight for a position, an odd number below 2**64."""
    mask = (1 << 64) - 1
    k = k * _STEP & mask
    k = (k ^ (k >> 30)) * _FACTORS[0] & mask
    k = (k ^ (k >> 27)) * _FACTORS[1] & mask
    return (k ^ (k >> 31)) | 1


def _weights(count: int, device: torch.device) -> torch.Tensor:
    k = torch.arange(count, dtype=torch.int64, device=device) * _signed(_STEP)
    k = (k ^ _shifted(k, 30)) * _signed(_FACTORS[0])
    k = (k ^ _shifted(k, 27)) * _signed(_FACTORS[1])
    return (k ^ _shifted(k, 31)) | 1


def _shifted(k: torch.Tensor, by: int) -> torch.Tensor:
    """A logical shift to the right; torch's is arithmetic."""
    return (k >> by) & ((1 << (64 - by)) - 1)


def _signed(k: int) -> int:
    return k - (1 << 64) if k >= 1 << 63 else k


@functools.cache
def _compiled(index: int) -> Callable[..., Any] | None:
    """The kernel for that device, which must be current; compiled on first use (half a second). None where impossible.

    One for each device: a kernel belongs to the context that it was loaded in.
    """
    try:
        kernel: Callable[..., Any] = torch.cuda._compile_kernel(_SOURCE, "tolaria_digest")
    except Exception as error:  # a private function of torch: it may be missing, or want what this machine lacks
        logger.info("digests use plain torch operators: %s: %s", type(error).__name__, error)
        return None
    return kernel
