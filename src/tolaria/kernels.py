"""SWEEP over many blocks of memory of one device: copy, digest, and search for non-finite values, in one pass.

The digest is order-sensitive and has 64 bits. Every block is cut into chunks of 32 KiB, which are numbered through, and
each chunk into words x[i] of 32 bits, missing bytes at the end counting as zeros. With the odd constants K[0..3] and
mix(k), the finaliser of splitmix64 for k * 0x9E3779B97F4A7C15 (Steele, Lea and Flood, "Fast splittable pseudorandom
number generators", 2014), made odd:

    digest = sum over chunks c of  mix(4096 + c) * sum over i of  x[i] * K[i % 4] * mix(1 + i // 4)   modulo 2**64

All weights are odd, so any change of a single word changes the digest. Two different words that change places change it
too if they stand in one quad (the differences of the K are not divisible by 8), else they go unseen with a probability
of about 2**-32.

Two implementations give the same bytes and the same number: a compiled kernel (CUDA, one pass at the speed of memory),
and plain torch operators (every device).
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import logging
import sys
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import torch

from tolaria.words import CHUNK_BYTES, copy_words, portable_digest, typed

logger = logging.getLogger("tolaria")

_THREADS = 256
_CHUNKS_PER_READER = 4  # a thread that reads computes eight weights first; one that only copies is best left alone
_COPY, _READ, _FROM_HELD = 1, 2, 4

_SOURCE = """
typedef unsigned long long u64;
__device__ __forceinline__ u64 mix(u64 k) {
  k *= 0x9E3779B97F4A7C15ull;
  k = (k ^ (k >> 30)) * 0xBF58476D1CE4E5B9ull;
  k = (k ^ (k >> 27)) * 0x94D049BB133111EBull;
  return (k ^ (k >> 31)) | 1ull;
}
__device__ __forceinline__ u64 lane_weight(int lane) {
  return lane == 0 ? 0x9E3779B97F4A7C15ull : lane == 1 ? 0xC2B2AE3D27D4EB4Full
       : lane == 2 ? 0x165667B19E3779F9ull : 0xD6E8FEB86659FD93ull;
}
__device__ __forceinline__ u64 of_quad(uint4 x) {
  return x.x * 0x9E3779B97F4A7C15ull + x.y * 0xC2B2AE3D27D4EB4Full
       + x.z * 0x165667B19E3779F9ull + x.w * 0xD6E8FEB86659FD93ull;
}
// what the exponent bits of a word are, twice where it holds two numbers; 0: nothing to look for
__device__ __forceinline__ unsigned high_mask(int kind) {
  return kind == 1 ? 0x7F800000u : kind == 2 ? 0x7F800000u : kind == 3 ? 0x7C000000u : kind == 4 ? 0x7FF00000u : 0u;
}
__device__ __forceinline__ unsigned low_mask(int kind) { return kind == 2 ? 0x7F80u : kind == 3 ? 0x7C00u : 0u; }
__device__ __forceinline__ bool is_bad(unsigned x, unsigned high, unsigned low) {
  return (high && (x & high) == high) || (low && (x & low) == low);
}

template <bool COPY, bool READ>
__device__ void sweep(const long long* table, int blocks, int chunks, int first, int from_held, u64* answer) {
  const int t = threadIdx.x;
  const int* block_of = (const int*)(table + 5 * blocks);
  u64 weight[8], total = 0;
  bool bad = false;
  if (READ)
    for (int j = 0; j < 8; ++j) weight[j] = mix(1 + t + 256 * j);
  for (int chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const int block = block_of[chunk];
    const long long offset = (chunk - table[block]) << 15, left = table[3 * blocks + block] - offset;
    const int size = left < 32768 ? (int)left : 32768, kind = (int)table[4 * blocks + block];
    const char* live = (const char*)table[blocks + block] + offset;
    const char* held = (const char*)table[2 * blocks + block] + offset;
    const char* from = from_held ? held : live;
    char* to = COPY ? (char*)(from_held ? live : held) : (char*)from;
    const unsigned high = high_mask(kind), low = low_mask(kind), even = kind == 4 ? 0u : high;
    u64 sum = 0;
    int done = 0;  // words
    if ((((size_t)from | (size_t)to) & 15) == 0) {
      const uint4* source = (const uint4*)from;
      uint4* target = (uint4*)to;
      const int quads = size >> 4;
      done = quads * 4;
      if (quads == 2048) {
        uint4 x[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) x[j] = source[t + 256 * j];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          if (COPY) target[t + 256 * j] = x[j];
          if (READ) {
            sum += of_quad(x[j]) * weight[j];
            bad |= is_bad(x[j].x, even, low) | is_bad(x[j].y, high, low)
                 | is_bad(x[j].z, even, low) | is_bad(x[j].w, high, low);
          }
        }
      } else {
        for (int q = t; q < quads; q += 256) {
          const uint4 x = source[q];
          if (COPY) target[q] = x;
          if (READ) {
            sum += of_quad(x) * mix(1 + q);
            bad |= is_bad(x.x, even, low) | is_bad(x.y, high, low)
                 | is_bad(x.z, even, low) | is_bad(x.w, high, low);
          }
        }
      }
    }
    const bool by_words = (((size_t)from | (size_t)to) & 3) == 0;
    for (int w = done + t; w * 4 < size; w += 256) {
      const int here = size - w * 4 < 4 ? size - w * 4 : 4;
      unsigned x = 0;
      if (by_words && here == 4) {
        x = ((const unsigned*)from)[w];
        if (COPY) ((unsigned*)to)[w] = x;
      } else {
        for (int i = 0; i < here; ++i) {
          const unsigned char byte = ((const unsigned char*)from)[w * 4 + i];
          x |= (unsigned)byte << (8 * i);
          if (COPY) to[w * 4 + i] = (char)byte;
        }
      }
      if (READ) {
        sum += x * lane_weight(w & 3) * mix(1 + (w >> 2));
        bad |= is_bad(x, (w & 1) ? high : even, low);
      }
    }
    if (READ) total += sum * mix(4096 + (u64)(first + chunk));
  }
  if (READ) {
    for (int lane = 16; lane; lane >>= 1) total += __shfl_down_sync(0xffffffffu, total, lane);
    const bool any = __any_sync(0xffffffffu, bad);
    if ((t & 31) == 0) {
      atomicAdd(answer, total);
      if (any) atomicOr(answer + 1, 1ull);
    }
  }
}
extern "C" __global__ void __launch_bounds__(256)
tolaria_sweep(const long long* table, int blocks, int chunks, int first, int what, u64* answer) {
  const int from_held = what & 4;
  if ((what & 3) == 3) sweep<true, true>(table, blocks, chunks, first, from_held, answer);
  else if (what & 1) sweep<true, false>(table, blocks, chunks, first, from_held, answer);
  else sweep<false, true>(table, blocks, chunks, first, from_held, answer);
}
"""


class Side(Enum):
    """One of the two ends of a sweep."""

    LIVE = "live"
    HELD = "held"


class Finite(Enum):
    """Which values of a block ought to be finite; the number is the kernel's."""

    ANYTHING = 0
    FLOAT32 = 1  # complex64 as well
    BFLOAT16 = 2
    FLOAT16 = 3
    FLOAT64 = 4  # complex128 as well

    @classmethod
    def of(cls, dtype: torch.dtype | None) -> Finite | None:
        """The check for an element type that a sweep can look for non-finite values of; None for others."""
        return _KINDS.get(dtype)


_KINDS: dict[torch.dtype | None, Finite] = {
    torch.float32: Finite.FLOAT32,
    torch.complex64: Finite.FLOAT32,
    torch.bfloat16: Finite.BFLOAT16,
    torch.float16: Finite.FLOAT16,
    torch.float64: Finite.FLOAT64,
    torch.complex128: Finite.FLOAT64,
}
_VIEWS = {
    Finite.FLOAT32: torch.float32,
    Finite.BFLOAT16: torch.bfloat16,
    Finite.FLOAT16: torch.float16,
    Finite.FLOAT64: torch.float64,
}


class Tally:
    """Where the readings of one device add up, and where the answer arrives.

    Attributes:
        total: shape [2], int64, on the device: the digest, and 1 if something is not finite.
        row: The same in page-locked memory.
        is_fresh: Nothing has been added since it was begun, so `total` still has to be cleared.
        is_sent: The answer is on its way to `row`.
    """

    def __init__(self, total: torch.Tensor, row: torch.Tensor) -> None:
        self.total, self.row = total, row
        self.is_fresh = self.is_sent = False
        # the same memory: an element of a tensor takes microseconds, and each reading writes and reads two
        self._numbers = (ctypes.c_int64 * 2).from_address(row.data_ptr())

    def begin(self, unlike: int) -> None:
        """Start from nothing.

        Args:
            unlike: What stands for the digest until the answer has come. An answer that never came must not pass for
                one: no two readings start from the same number.
        """
        self.is_fresh, self.is_sent = True, False
        self._numbers[:] = unlike, 1

    @property
    def digest(self) -> int:
        """The answer, once it has come: the digest, as a signed number."""
        return int(self._numbers[0])

    @property
    def is_finite(self) -> bool:
        """The answer, once it has come: whether all that ought to be finite is."""
        return not self._numbers[1]

    def adding(self, *, last: bool = False) -> tuple[list[Callable[[], None]], list[Callable[[], None]]]:
        """What has to be launched together with something that adds: before it, and behind it. Once per launch."""
        before, behind = [self.clear] if self.is_fresh else [], [self.send] if last else []
        self.is_fresh, self.is_sent = False, self.is_sent or last
        return before, behind

    def clear(self) -> None:
        """Launch: forget what was added."""
        self.total.zero_()

    def send(self) -> None:
        """Launch: let the answer travel."""
        self.row.copy_(self.total, non_blocking=True)


class Sweep:
    """Pairs of equally large blocks on one device. The table of addresses is laid once and used any number of times.

    Args:
        live: Flat uint8 tensors, shape [bytes] each, contiguous.
        held: Their partners, pairwise as large, on the same device; None to read only.
        finite: Per block, what ought to be finite in it.
        first: Number of the first chunk: sweeps over the parts of a whole continue each other's count.

    Construction and every call enqueue on the current stream of the device and wait for nothing (the table travels from
    page-locked memory, so construction must not happen while any thread captures a graph).
    """

    def __init__(
        self,
        live: Sequence[torch.Tensor],
        held: Sequence[torch.Tensor] | None,
        finite: Sequence[Finite],
        first: int = 0,
    ) -> None:
        self._live, self._held, self._finite = list(live), list(live if held is None else held), list(finite)
        self._first = first
        self._addresses = addresses_of(live)
        counts = [-(-block.numel() // CHUNK_BYTES) for block in self._live]
        self.num_chunks = sum(counts)
        self._table: torch.Tensor | None = None
        self._num_blocks = 0
        self._kernel: Callable[..., Any] | None = None
        self._index = -1
        self._launches: dict[tuple[int, int], Callable[[], None]] = {}
        if self._live and self.num_chunks and self._live[0].device.type == "cuda":
            with torch.cuda.device(self._live[0].device):
                self._index = torch.cuda.current_device()
                self._kernel = compiled(self._index)
        if self._kernel is not None:
            self._table = self._laid(counts)

    def _laid(self, counts: Sequence[int]) -> torch.Tensor:
        """The table: per block its first chunk, both addresses, bytes and kind; then per chunk its block."""
        kept = [i for i, count in enumerate(counts) if count]
        rows = (
            [self._live[i].data_ptr() for i in kept],
            [self._held[i].data_ptr() for i in kept],
            [self._live[i].numel() for i in kept],
            [self._finite[i].value for i in kept],
        )
        self._num_blocks = len(kept)
        return table_of(rows, [counts[i] for i in kept]).to(self._live[0].device, non_blocking=True)

    @property
    def is_compiled(self) -> bool:
        """Whether the kernel does the work, and not torch's operators."""
        return self._table is not None

    def fits(self, live: Sequence[torch.Tensor]) -> bool:
        """Whether these are the very blocks that the table was laid for, where they were then."""
        return addresses_of(live) == self._addresses

    def run(self, source: Side, *, copy: bool, answer: torch.Tensor | None = None) -> None:
        """One pass.

        Args:
            source: The side that is read (and copied to the other one).
            copy: Copy.
            answer: shape [2], int64, on the device: the digest of the source is added to the first number, the second
                becomes 1 if a value that ought to be finite is not.
        """
        if not self.num_chunks:
            return
        if self._table is None or self._kernel is None:
            self._run_portably(source, copy, answer)
            return
        what = (_COPY if copy else 0) | (0 if answer is None else _READ) | (_FROM_HELD if source is Side.HELD else 0)
        if not what & (_COPY | _READ):
            return
        grid = self.num_chunks if answer is None else -(-self.num_chunks // _CHUNKS_PER_READER)
        counted = self._table if answer is None else answer  # never written without _READ
        # by address: whoever has it holds that memory, so it is given to nobody else
        launch = self._launches.get((what, counted.data_ptr()))
        if launch is None:
            arguments = [self._table, self._num_blocks, self.num_chunks, self._first, what, counted]
            launch = launcher(self._kernel, self._index, grid, arguments)
            self._launches[what, counted.data_ptr()] = launch
        if torch._C._cuda_getDevice() == self._index:
            launch()
        else:
            with torch.cuda.device(self._index):
                launch()

    def _run_portably(self, source: Side, copy: bool, answer: torch.Tensor | None) -> None:
        origin, target = (self._live, self._held) if source is Side.LIVE else (self._held, self._live)
        if copy:
            copy_words(target, origin)
        if answer is not None:
            answer[0] += portable_digest(origin, self._first)
            flags = [
                torch.isfinite(view).all()
                for block, kind in zip(origin, self._finite, strict=True)
                if kind is not Finite.ANYTHING and (view := typed(block, _VIEWS[kind])).numel()
            ]
            if flags:
                answer[1] |= ~torch.stack(flags).all()


def table_of(rows: Sequence[Sequence[int]], counts: Sequence[int]) -> torch.Tensor:
    """A table for a kernel that goes through blocks chunk by chunk: shape [n], int64, page-locked.

    Args:
        rows: Facts of the blocks, each as long as there are blocks.
        counts: Chunks of each block, at least one.

    Returns:
        Per block the number of its first chunk; the rows; then per chunk the number of its block, as int32.
    """
    num_chunks, num_blocks = sum(counts), len(counts)
    firsts = list(itertools.accumulate(counts, initial=0))[:-1]
    owners = torch.arange(num_blocks, dtype=torch.int32, device="cpu")  # the user may have set another default
    owners = owners.repeat_interleave(torch.tensor(counts, device="cpu"), output_size=num_chunks)
    head = num_blocks * (len(rows) + 1)
    table = torch.zeros(head + -(-num_chunks // 2), dtype=torch.int64, device="cpu").pin_memory()
    table[:head] = torch.tensor((firsts, *rows), dtype=torch.int64, device="cpu").view(-1)
    table[head:].view(torch.int32)[:num_chunks] = owners
    return table


def addresses_of(blocks: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """Where blocks are now and how large: (address, bytes) each. The memory under a tensor may be moved."""
    return list(zip(map(torch.Tensor.data_ptr, blocks), map(torch.Tensor.numel, blocks), strict=True))


def launcher(kernel: Any, index: int, grid: int, arguments: Sequence[torch.Tensor | int]) -> Callable[[], None]:
    """A call that launches a compiled kernel on the current stream of its device, any number of times, by any thread.

    torch's own launch opens the driver library and converts every argument anew each time, which takes several times as
    long as the launch itself. It is used where it does not say what this needs to know.

    Args:
        kernel: What `compiled` has answered for the device of that index, which has to be current at each launch.
        index: The device.
        grid: Number of thread blocks.
        arguments: Tensors on the device, and 32-bit integers. They are held.
    """
    library, function = _driver_library(), getattr(kernel, "func", None)
    if library is None or not isinstance(function, ctypes.c_void_p):
        return lambda: kernel(grid=(grid, 1, 1), block=(_THREADS, 1, 1), args=list(arguments))
    kept = list(arguments)
    values = [
        ctypes.c_void_p(each.data_ptr()) if isinstance(each, torch.Tensor) else ctypes.c_int(each) for each in kept
    ]
    addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
    launch_kernel, stream_of = library.cuLaunchKernel, torch._C._cuda_getCurrentRawStream

    def launch(_held: object = (kept, values, kernel)) -> None:
        code = launch_kernel(function, grid, 1, 1, _THREADS, 1, 1, 0, stream_of(index), addresses, None)
        if code == _NO_CONTEXT and _bind(library, index):
            code = launch_kernel(function, grid, 1, 1, _THREADS, 1, 1, 0, stream_of(index), addresses, None)
        if code:
            error = RuntimeError(f"CUDA error {code} at the launch of a sweep")
            vars(error)["error_code"] = code  # where torch has it too, so that a lost device is recognised
            raise error

    return launch


_NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT


def _bind(library: Any, index: int) -> bool:
    """Give the calling thread, which has not used CUDA yet, the primary context of its device. So does torch later."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    return not (
        library.cuDeviceGet(ctypes.byref(device), index)
        or library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)  # torch keeps it for good, too
        or library.cuCtxSetCurrent(context)
    )


@functools.cache
def _driver_library() -> Any:
    """CUDA's driver library, which torch has loaded already; None on ROCm, and where it has another name."""
    if torch.version.hip is not None:
        return None
    try:
        # calls let other threads run: a launch may have to wait for room in the queue of the device
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        address, number = ctypes.c_void_p, ctypes.c_uint
        library.cuLaunchKernel.argtypes = (address, *[number] * 7, address, address, address)
    except (OSError, AttributeError):
        return None
    return library


@functools.cache
def compiled(index: int) -> Callable[..., Any] | None:
    """The kernel for that device, which must be current; compiled on first use (a second). None where impossible.

    One for each device: a kernel belongs to the context that it was loaded in.
    """
    try:
        kernel: Callable[..., Any] = torch.cuda._compile_kernel(_SOURCE, "tolaria_sweep")
    except Exception as error:  # a private function of torch: it may be missing, or want what this machine lacks
        logger.info("copies and digests use plain torch operators: %s: %s", type(error).__name__, error)
        return None
    return kernel
