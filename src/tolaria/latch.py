"""LATCH: a decision that a captured graph takes by itself, and copies that do nothing unless it was taken that way.

A graph cannot ask the host, and a flag that several launches read could change in between. So one thread of one launch
notes the decision in words of its own, and every later launch of that replay reads those: sound as long as all of them
stand on one stream. Where a replay goes back to a snapshot it *parks*: it notes which one, and every replay after it
goes back there too, until the host has learnt of it and releases the latch.

Which snapshot that is stands in device memory as well, so the host can aim at a newer one between two replays and the
graph need not be captured again.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tolaria.errors import UnsupportedState
from tolaria.kernels import table_of
from tolaria.words import CHUNK_BYTES

logger = logging.getLogger("tolaria")

NOW, PARKED, TARGET = 0, 1, 2
"""Words of a latch: 1 in a replay that is refused; the address of the slot it is parked at, 0 for none; the address of
the slot to go back to, 0 for none."""

_THREADS = 256
_MOST_BLOCKS = 1024  # what a launch that has nothing to do costs grows with them

_SOURCE = """
extern "C" __global__ void tolaria_latch(const float* bad, long long* words, float* flag) {
  const bool is_bad = *bad != 0.0f;
  if (is_bad && words[1] == 0) words[1] = words[2];
  words[0] = is_bad || words[1] != 0;
  *flag = words[0] ? 1.0f : 0.0f;
}
extern "C" __global__ void __launch_bounds__(256)
tolaria_copy_if(const long long* table, int blocks, int chunks, const long long* words, int from_parked, int to_live) {
  if (words[from_parked ? 1 : 0] == 0) return;
  const char* base = (const char*)(from_parked ? words[1] : 0);
  const int* block_of = (const int*)(table + 4 * blocks);
  const int t = threadIdx.x;
  for (int chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const int block = block_of[chunk];
    const long long offset = (chunk - table[block]) << 15, left = table[3 * blocks + block] - offset;
    const int size = left < 32768 ? (int)left : 32768;
    char* live = (char*)table[blocks + block] + offset;
    char* held = (char*)base + table[2 * blocks + block] + offset;
    const char* from = to_live ? held : live;
    char* to = to_live ? live : held;
    int done = 0;
    if ((((size_t)from | (size_t)to) & 15) == 0) {
      const uint4* source = (const uint4*)from;
      uint4* target = (uint4*)to;
      const int quads = size >> 4;
      done = quads * 16;
      if (quads == 2048) {
        uint4 x[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) x[j] = source[t + 256 * j];
#pragma unroll
        for (int j = 0; j < 8; ++j) target[t + 256 * j] = x[j];
      } else {
        for (int q = t; q < quads; q += 256) target[q] = source[q];
      }
    }
    for (int i = done + t; i < size; i += 256) to[i] = from[i];
  }
}
"""


@dataclass(frozen=True, slots=True, eq=False)
class Kernels:
    """The two launches, each called with (grid, block, arguments) on the current stream of the device.

    Attributes:
        latch: Notes a decision.
        copy: Copies blocks if it was taken.
    """

    latch: Callable[[tuple[int, int, int], tuple[int, int, int], list[Any]], None]
    copy: Callable[[tuple[int, int, int], tuple[int, int, int], list[Any]], None]


@functools.cache
def compiled(device: torch.device) -> Kernels:
    """The kernels for that device; compiled on first use (two seconds), which must not happen inside a capture.

    Raises:
        UnsupportedState: They cannot be compiled here.
    """
    if device.type != "cuda":
        raise UnsupportedState(
            "capturing a step", f"the train state is on {device}, and only CUDA has graphs", "Use governor.step()."
        )

    def load(name: str) -> Callable[..., None]:
        with torch.cuda.device(device):
            kernel = torch.cuda._compile_kernel(_SOURCE, name)

        def launch(grid: tuple[int, int, int], block: tuple[int, int, int], arguments: list[Any]) -> None:
            with torch.cuda.device(device):
                kernel(grid=grid, block=block, args=arguments)

        return launch

    try:
        return Kernels(load("tolaria_latch"), load("tolaria_copy_if"))
    except Exception as error:  # a private function of torch: it may be missing, or want what this machine lacks
        raise UnsupportedState(
            "capturing a step",
            f"its kernels could not be compiled: {type(error).__name__}: {error}",
            "Use governor.step(), whose veto needs none.",
        ) from error


class Latch:
    """The words of one captured step.

    Args:
        device: Where the graph runs.

    Attributes:
        words: shape [3], int64, on the device; see `NOW`, `PARKED`, `TARGET`.
        flag: shape [], float32, on the device: 1 in a replay that is refused, else 0. For optimizers that take one.

    Everything is enqueued on the current stream, and waits for nothing. Only `decide` belongs inside a graph.
    """

    def __init__(self, device: torch.device) -> None:
        self.kernels = compiled(device)
        self.words = torch.zeros(3, dtype=torch.int64, device=device)
        self.flag = torch.zeros((), dtype=torch.float32, device=device)
        self._aimed = 0

    def decide(self, bad: torch.Tensor) -> None:
        """Note whether this replay is refused.

        Args:
            bad: shape [], float32, on the device: not 0 where a gradient is not finite. Written earlier on this stream.
        """
        self.kernels.latch((1, 1, 1), (1, 1, 1), [bad, self.words, self.flag])

    def aim(self, base: int) -> None:
        """Go back to the slot at that address from now on; 0: to none. Between replays."""
        if base != self._aimed:
            self.words[TARGET].fill_(base)
            self._aimed = base

    def release(self) -> None:
        """Parked no more. Between replays, behind the rollback that has put the state back."""
        self.words[PARKED].zero_()


class PredicatedCopy:
    """Copies between live storages and other memory that happen only in a replay that is refused.

    Args:
        latch: Of the graph.
        live: Storages, shape [bytes] each, uint8, on the latch's device.
        held: Their places: addresses, or with `parked` offsets in the slot that the latch is parked at.
        parked: See `held`; nothing is copied then unless the latch is parked.

    The addresses must hold for as long as the graph is replayed. Construction enqueues, and must not happen inside a
    capture; `run` belongs inside, behind `Latch.decide`.
    """

    def __init__(
        self, latch: Latch, live: Sequence[torch.Tensor], held: Sequence[int], *, parked: bool = False
    ) -> None:
        pairs = [(block, place) for block, place in zip(live, held, strict=True) if block.numel()]
        counts = [-(-block.numel() // CHUNK_BYTES) for block, _ in pairs]
        rows = ([b.data_ptr() for b, _ in pairs], [place for _, place in pairs], [b.numel() for b, _ in pairs])
        self._latch, self._from_parked = latch, int(parked)
        self._num_blocks, self._num_chunks = len(pairs), sum(counts)
        self._table = table_of(rows, counts).to(latch.words.device, non_blocking=True)

    def run(self, *, to_live: bool) -> None:
        """Enqueue it in one of the two directions."""
        arguments = [
            self._table,
            self._num_blocks,
            self._num_chunks,
            self._latch.words,
            self._from_parked,
            int(to_live),
        ]
        self._latch.kernels.copy((min(self._num_chunks, _MOST_BLOCKS), 1, 1), (_THREADS, 1, 1), arguments)
