"""LAUNCH: one compiled kernel for the vital signs of a step, launched without torch's checks of every argument.

It does three things, each in one launch whatever the number of tensors (up to `MOST_TENSORS`): sums of squares of the
parts of tensors; their total; and sending numbers to page-locked memory. Whatever a launch needs to know travels by
value with it: nothing has to be laid on the device first, and nothing there can be out of date.

Squares are taken and added in float64, each part by one block in a fixed order and the parts by one block in a fixed
order, so equal bytes give equal bits, and the square root of the total is that of the exact sum up to a relative
error of 1e-12. A finite number of 32 bits or fewer never overflows; of float64 the square does beyond 1e154, and
counts as not finite.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import logging
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

logger = logging.getLogger("tolaria")

MOST_TENSORS = 160
"""Of one launch: kernels take 4 KB of arguments."""

MOST_ENTRIES = MOST_TENSORS
"""Of one `send`."""

_PARTS, _TOTAL, _SEND = 0, 1, 2
_THREADS = 256

KINDS: dict[torch.dtype, int] = {
    torch.float32: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.float64: 4,
    torch.complex64: 1,
    torch.complex128: 4,
}
"""What the kernel reads; complex numbers as two real ones."""

_SOURCE = """
typedef unsigned long long u64;
typedef long long i64;
struct Call {
  u64 first[160], second[160], third[160], out, scratch, flag;
  i64 size, offset;
  int count, what;
};

__device__ __forceinline__ float of_half(unsigned bits) {
  float found;
  asm("cvt.f32.f16 %0, %1;" : "=f"(found) : "h"((unsigned short)bits));
  return found;
}
__device__ __forceinline__ double square(double x) { return x * x; }
template <int KIND> __device__ __forceinline__ double of_word(unsigned x) {
  if (KIND == 1) return square(__uint_as_float(x));
  if (KIND == 2) return square(__uint_as_float(x << 16)) + square(__uint_as_float(x & 0xFFFF0000u));
  return square(of_half(x & 0xFFFFu)) + square(of_half(x >> 16));
}
template <int KIND> __device__ __forceinline__ double of_quad(uint4 x) {
  if (KIND == 4) return square(__hiloint2double((int)x.y, (int)x.x)) + square(__hiloint2double((int)x.w, (int)x.z));
  return (of_word<KIND>(x.x) + of_word<KIND>(x.y)) + (of_word<KIND>(x.z) + of_word<KIND>(x.w));
}
// by bytes: an address may be any
template <int KIND> __device__ __forceinline__ double value(const unsigned char* at) {
  const int size = KIND == 4 ? 8 : KIND == 1 ? 4 : 2;
  u64 bits = 0;
  for (int i = 0; i < size; ++i) bits |= (u64)at[i] << (8 * i);
  if (KIND == 1) return __uint_as_float((unsigned)bits);
  if (KIND == 2) return __uint_as_float((unsigned)bits << 16);
  if (KIND == 3) return of_half((unsigned)bits);
  return __longlong_as_double((i64)bits);
}
template <int KIND> __device__ double squares(const unsigned char* at, i64 bytes) {
  double sums[4] = {0.0, 0.0, 0.0, 0.0};
  i64 done = 0;
  if (((size_t)at & 15) == 0) {
    const uint4* source = (const uint4*)at;
    const i64 quads = bytes >> 4;
    i64 i = threadIdx.x;
    for (; i + 768 < quads; i += 1024) {
      uint4 x[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) x[j] = source[i + 256 * j];
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[j] += of_quad<KIND>(x[j]);
    }
    for (; i < quads; i += 256) sums[0] += of_quad<KIND>(source[i]);
    done = quads << 4;
  }
  const int size = KIND == 4 ? 8 : KIND == 1 ? 4 : 2;
  for (i64 b = done + (i64)threadIdx.x * size; b < bytes; b += 256 * size) sums[1] += square(value<KIND>(at + b));
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}
__device__ double over_block(double sum) {
  __shared__ double held[8];
  for (int lane = 16; lane; lane >>= 1) sum += __shfl_down_sync(0xffffffffu, sum, lane);
  if ((threadIdx.x & 31) == 0) held[threadIdx.x >> 5] = sum;
  __syncthreads();
  sum = held[0];
  for (int warp = 1; warp < 8; ++warp) sum += held[warp];
  return sum;
}
__device__ __forceinline__ bool is_bad(double x) { return !(x * 0.0 == 0.0); }

// first: addresses, second: bytes * 8 + kind, third: number of the first part; size: bytes of a part
__device__ void parts(const Call& call) {
  const int block = blockIdx.x;
  int low = 0, high = call.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if ((int)call.third[middle] <= block) low = middle; else high = middle - 1;
  }
  const int kind = (int)(call.second[low] & 7);
  const i64 whole = (i64)(call.second[low] >> 3), begin = (block - (i64)call.third[low]) * call.size;
  const i64 bytes = whole - begin < call.size ? whole - begin : call.size;
  const unsigned char* at = (const unsigned char*)call.first[low] + begin;
  const double sum = over_block(kind == 1 ? squares<1>(at, bytes) : kind == 2 ? squares<2>(at, bytes)
                                : kind == 3 ? squares<3>(at, bytes) : squares<4>(at, bytes));
  if (threadIdx.x == 0) {
    ((double*)call.scratch)[call.offset + block] = sum;
    if (begin == 0) ((i64*)call.out)[low] = call.offset + block;
  }
}
// scratch: sums of the `size` parts, behind them the first part of each of the `count` tensors
__device__ void total(const Call& call) {
  const double* sums = (const double*)call.scratch;
  const i64* firsts = (const i64*)(sums + call.size);
  double sum = 0.0;
  for (i64 i = threadIdx.x; i < call.size; i += 256) sum += sums[i];
  sum = over_block(sum);
  __shared__ int bad;
  if (threadIdx.x == 0) bad = 0;
  __syncthreads();
  if (is_bad(sum))
    for (int tensor = threadIdx.x; tensor < call.count; tensor += 256) {
      const i64 end = tensor + 1 < call.count ? firsts[tensor + 1] : call.size;
      bool found = false;
      for (i64 i = firsts[tensor]; i < end; ++i) found |= is_bad(sums[i]);
      if (found) atomicAdd(&bad, 1);
    }
  __syncthreads();
  if (threadIdx.x == 0) {
    ((double*)call.out)[0] = sqrt(sum);
    ((double*)call.out)[1] = bad;
    if (call.flag) *(float*)call.flag = is_bad(sum) ? 1.0f : 0.0f;
  }
}
// first: addresses, second: count * 8 + kind, third: where in the row; at its end, at `offset`, the ticket `size`
__device__ void send(const Call& call) {
  volatile double* row = (volatile double*)call.out;
  for (int entry = 0; entry < call.count; ++entry) {
    const int kind = (int)(call.second[entry] & 7), number = (int)(call.second[entry] >> 3);
    const int size = kind == 4 ? 8 : kind == 1 ? 4 : 2;
    const unsigned char* at = (const unsigned char*)call.first[entry];
    for (int i = threadIdx.x; i < number; i += 256) {
      const unsigned char* here = at + (i64)i * size;
      row[call.third[entry] + i] = kind == 1 ? value<1>(here) : kind == 2 ? value<2>(here)
                                 : kind == 3 ? value<3>(here) : value<4>(here);
    }
  }
  __threadfence_system();  // whoever sees the ticket sees the numbers
  __syncthreads();
  if (threadIdx.x == 0) row[call.offset] = (double)call.size;
}
extern "C" __global__ void __launch_bounds__(256) tolaria_signs(const __grid_constant__ Call call) {
  if (call.what == 0) parts(call);
  else if (call.what == 1) total(call);
  else send(call);
}
"""


class Call(ctypes.Structure):
    """The kernel's argument. What the fields mean for each of its three tasks stands in the source above."""

    _fields_ = [
        ("first", ctypes.c_uint64 * MOST_TENSORS),
        ("second", ctypes.c_uint64 * MOST_TENSORS),
        ("third", ctypes.c_uint64 * MOST_TENSORS),
        ("out", ctypes.c_uint64),
        ("scratch", ctypes.c_uint64),
        ("flag", ctypes.c_uint64),
        ("size", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("count", ctypes.c_int),
        ("what", ctypes.c_int),
    ]


class LaunchFailed(Exception):
    """The driver refused. Torch's own operators say why, if it is more than that."""


class Launcher:
    """Launches the kernel on one device.

    Args:
        index: Of the device.
        kernel: As `torch.cuda._compile_kernel` answers it.
    """

    def __init__(self, index: int, kernel: Any) -> None:
        self.index, self._kernel = index, kernel
        self._function = ctypes.c_void_p(int(getattr(kernel.func, "value", kernel.func)))
        self._driver = ctypes.CDLL("libcuda.so.1")
        number, pointer = ctypes.c_uint, ctypes.c_void_p
        self._launch = self._driver.cuLaunchKernel
        self._launch.argtypes = [pointer, *[number] * 7, pointer, ctypes.POINTER(pointer), pointer]

    def arguments(self, call: Call) -> Any:
        """What `launch` takes for this call: made once, good for as long as the call is held."""
        return (ctypes.c_void_p * 1)(ctypes.addressof(call))

    def launch(self, arguments: Any, blocks: int) -> None:
        """Launch on the caller's current stream. What the call holds is copied before this returns.

        Raises:
            LaunchFailed: Nothing was launched.
        """
        if torch._C._cuda_getDevice() == self.index:
            self._submit(arguments, blocks)
        else:  # the default stream has the same handle on every device: it is the one of the context that is current
            with torch.cuda.device(self.index):
                self._submit(arguments, blocks)

    def _submit(self, arguments: Any, blocks: int) -> None:
        stream = torch._C._cuda_getCurrentRawStream(self.index)
        code = self._launch(self._function, blocks, 1, 1, _THREADS, 1, 1, 0, stream, arguments, None)
        if code:
            raise LaunchFailed(f"cuLaunchKernel answered {code}")

    def can_write(self, row: torch.Tensor) -> bool:
        """Whether the device knows page-locked memory by the address that the host has for it."""
        seen, address = ctypes.c_uint64(), row.data_ptr()
        ask = self._driver.cuMemHostGetDevicePointer_v2
        ask.argtypes = [ctypes.POINTER(ctypes.c_uint64), ctypes.c_void_p, ctypes.c_uint]
        return ask(ctypes.byref(seen), address, 0) == 0 and seen.value == address


def launcher_of(device: torch.device) -> Launcher | None:
    """The launcher of that device. None where there is none: plain torch operators do the same."""
    return _compiled(device.index or 0) if device.type == "cuda" else None


@functools.cache
def _compiled(index: int) -> Launcher | None:
    """Compiled on first use (a second). One for each device: a kernel belongs to the context that it was loaded in."""
    try:
        with torch.cuda.device(index):
            return Launcher(index, torch.cuda._compile_kernel(_SOURCE, "tolaria_signs"))
    except Exception as error:  # a private function of torch: it may be missing, or want what this machine lacks
        logger.info("vital signs use plain torch operators: %s: %s", type(error).__name__, error)
        return None


class Share:
    """The tensors of one device whose norms are taken together, by what they look like. Addresses are given each time.

    Args:
        launcher: Of the device.
        device: It.
        sizes: Of each tensor its bytes, all of them above 0, and its kind; see `KINDS`.

    Threads: one at a time.
    """

    def __init__(self, launcher: Launcher, device: torch.device, sizes: Sequence[tuple[int, int]]) -> None:
        self._launcher, self._device, self._num_tensors = launcher, device, len(sizes)
        part = _PART_BYTES * max(1, -(-sum(size for size, _ in sizes) // (_PART_BYTES * _MOST_PARTS)))
        self._pages: list[_Page] = []
        self._num_parts = 0
        for start in range(0, len(sizes), MOST_TENSORS):
            some = sizes[start : start + MOST_TENSORS]
            counts = [-(-size // part) for size, _ in some]
            call = Call(size=part, count=len(some), what=_PARTS, offset=self._num_parts)
            call.second[: len(some)] = [size << 3 | kind for size, kind in some]
            call.third[: len(some)] = [sum(counts[:i]) for i in range(len(some))]
            self._pages.append(_Page(call, launcher.arguments(call), start, len(some), sum(counts)))
            self._num_parts += sum(counts)
        self._total = Call(size=self._num_parts, count=len(sizes), what=_TOTAL)
        self._total_arguments = launcher.arguments(self._total)
        self._addresses: list[int] = []

    def measure(self, tensors: Sequence[torch.Tensor], flag: torch.Tensor | None) -> torch.Tensor:
        """Enqueue on the caller's current stream: norm and number of non-finite tensors; shape [2], float64.

        Args:
            tensors: In the order of `sizes`.
            flag: shape [], float32, on the device: becomes 1 where the norm is not finite, else 0.

        Raises:
            LaunchFailed: Not all was launched; `flag` is undefined.
        """
        addresses = list(map(torch.Tensor.data_ptr, tensors))
        if addresses != self._addresses:
            if 0 in addresses:
                raise LaunchFailed("the memory of a tensor was freed")
            self._addresses = addresses
            for page in self._pages:
                page.call.first[: page.count] = addresses[page.start : page.start + page.count]
        scratch = torch.empty(self._num_parts + self._num_tensors, dtype=torch.float64, device=self._device)
        answer = torch.empty(2, dtype=torch.float64, device=self._device)
        sums, launch = scratch.data_ptr(), self._launcher.launch
        firsts = sums + 8 * self._num_parts
        for page in self._pages:
            page.call.scratch, page.call.out = sums, firsts + 8 * page.start
            launch(page.arguments, page.num_parts)
        total = self._total
        total.scratch, total.out, total.flag = sums, answer.data_ptr(), 0 if flag is None else flag.data_ptr()
        launch(self._total_arguments, 1)
        return answer


class _Page(NamedTuple):
    """Tensors of one launch: which of them, and in how many parts."""

    call: Call
    arguments: Any
    start: int
    count: int
    num_parts: int


_PART_BYTES = 1 << 16
_MOST_PARTS = 8192  # besides the one that a tensor has at least: what the total is made of


class Sender:
    """Sends numbers of one device to rows of page-locked memory, a ticket behind them.

    Args:
        launcher: Of the device.

    Threads: any.
    """

    def __init__(self, launcher: Launcher) -> None:
        self._launcher, self._call = launcher, Call(what=_SEND)
        self._arguments = launcher.arguments(self._call)
        self._lock = threading.Lock()

    def send(self, tensors: Sequence[torch.Tensor], row: torch.Tensor) -> Ticket | None:
        """Enqueue on the caller's current stream. None where nothing was, because they are not of kinds that it sends.

        Args:
            tensors: Each of one dimension at most, contiguous.
            row: shape [more than all of them], float64, page-locked, and known to the device by its address.
        """
        kinds = [KINDS.get(tensor.dtype, 0) if not tensor.is_complex() else 0 for tensor in tensors]
        if not all(kinds) or len(tensors) > MOST_ENTRIES or not all(map(torch.Tensor.is_contiguous, tensors)):
            return None
        counts, address, end, call = list(map(torch.Tensor.numel, tensors)), row.data_ptr(), row.numel() - 1, self._call
        ticket, place = next(_tickets), 0
        with self._lock:
            for i, (tensor, kind, count) in enumerate(zip(tensors, kinds, counts, strict=True)):
                call.first[i], call.second[i], call.third[i] = tensor.data_ptr(), count << 3 | kind, place
                place += count
            call.count, call.out, call.offset, call.size = len(tensors), address, end, ticket
            try:
                self._launcher.launch(self._arguments, 1)
            except LaunchFailed as error:
                logger.info("numbers are sent by plain torch operators: %s", error)
                return None
        sent = Ticket(address, place, end, float(ticket))
        _hold(sent, row)
        return sent


_tickets = itertools.count(1)  # of the process: devices share rows
# torch's allocator knows nothing of our writing: a row must outlive it, whoever let go of it
_under_way: deque[tuple[Ticket, torch.Tensor]] = deque()
_holding = threading.Lock()


def _hold(sent: Ticket, row: torch.Tensor) -> None:
    """Hold that row until its numbers have arrived, and let go of those that have."""
    with _holding:  # senders of several governors: between the look at the first one and its removal it may be another
        while _under_way and _under_way[0][0].has_arrived():
            _under_way.popleft()
        _under_way.append((sent, row))


class Ticket:
    """Numbers on their way to a row: whether they are there, and what they are.

    Args:
        address: Of the row.
        count: Numbers in it.
        place: Where in it the ticket arrives, behind them.
        number: Of the ticket: larger than any before it, smaller than any after it.
    """

    def __init__(self, address: int, count: int, place: int, number: float) -> None:
        self._address, self._count, self._number = address, count, number
        self._seen = ctypes.c_double.from_address(address + 8 * place)

    def has_arrived(self) -> bool:
        """Reads memory, asks no driver."""
        return self._seen.value >= self._number

    def values(self) -> list[float]:
        """The numbers, once they have arrived."""
        return list((ctypes.c_double * self._count).from_address(self._address))
