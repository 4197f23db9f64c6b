"""ENGINE: many copies inside the memory of one device as one command of the driver: a batch, or a graph.

Both are made once for a list of moves and asked for any number of times. The graph is built node by node and not
captured: a capture is invalidated by the next barrier of another governor in the process, and that barrier fails.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

Moves = Sequence[tuple[int, int, int]]
"""Of (destination address, source address, bytes), none of them empty."""

Call = Callable[..., Any]
"""Calls the driver by name, and raises what it answers."""

_GRAPH_CALLS = (
    "cuGraphCreate", "cuGraphAddMemcpyNode", "cuGraphInstantiate", "cuGraphLaunch", "cuGraphDestroy",
    "cuGraphExecDestroy", "CUDA_MEMCPY3D",
)  # fmt: skip
_MOST_NODE_BYTES = 1 << 30  # a node describes a pitched copy, and devices take no pitch of 2 GiB
_BATCHES_VERSION = 13000  # both of the driver and of its bindings: their older ones ask for it otherwise
_OVERLAPS = 1  # CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE: leave the multiprocessors to others


def takes_batches(driver: Any) -> bool:
    """Whether many copies can be asked for in one call."""
    if not hasattr(driver, "cuMemcpyBatchAsync") or getattr(driver, "CUDA_VERSION", 0) < _BATCHES_VERSION:
        return False
    code, version = driver.cuDriverGetVersion()
    return not int(code) and version >= _BATCHES_VERSION


def takes_graphs(driver: Any) -> bool:
    """Whether graphs can be built node by node."""
    return all(hasattr(driver, name) for name in _GRAPH_CALLS)


class Batch:
    """Copies for the copy engines, in one call that the device may carry out in any order.

    Args:
        driver: See `takes_batches`.
        call: Calls it; a context of the device is current whenever this is called.
        moves: Which copies.
        overlaps: Leave the multiprocessors to others where that can be helped.
    """

    def __init__(self, driver: Any, call: Call, moves: Moves, *, overlaps: bool = False) -> None:
        self._call = call
        attributes = driver.CUmemcpyAttributes()
        attributes.srcAccessOrder = driver.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
        if overlaps:
            attributes.flags = _OVERLAPS
        to = [driver.CUdeviceptr(destination) for destination, _, _ in moves]
        of = [driver.CUdeviceptr(source) for _, source, _ in moves]
        self._arguments = (to, of, [size for *_, size in moves], len(moves), [attributes], [0], 1)

    def launch(self, stream: int) -> None:
        """Ask for it on a stream, which must not be the default one of the context."""
        if self._arguments[3]:
            self._call("cuMemcpyBatchAsync", *self._arguments, stream)


class Graph:
    """Copies as a graph without edges: one launch, however many they are.

    Args:
        driver: See `takes_graphs`.
        call: Calls it; a context of the device is current whenever this is called.
        moves: Which copies.
        context: The device's primary one.
        relaxed: Inside, this thread's calls invalidate no capture of another thread.
    """

    def __init__(
        self,
        driver: Any,
        call: Call,
        moves: Moves,
        context: Any,
        relaxed: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        self._driver, self._call, self._relaxed = driver, call, relaxed
        self._whole: Any = None
        if not moves:
            return
        with relaxed():
            graph = call("cuGraphCreate", 0)
            try:
                for destination, source, size in moves:
                    for begin in range(0, size, _MOST_NODE_BYTES):
                        part = min(_MOST_NODE_BYTES, size - begin)
                        node = _node(driver, destination + begin, source + begin, part)
                        call("cuGraphAddMemcpyNode", graph, [], 0, node, context)
                self._whole = call("cuGraphInstantiate", graph, 0)
            finally:
                call("cuGraphDestroy", graph)

    def launch(self, stream: int) -> None:
        """Enqueue it. One thread at a time."""
        if self._whole is not None:
            self._call("cuGraphLaunch", self._whole, stream)

    def __del__(self) -> None:
        # one that is under way is freed when it has ended
        with contextlib.suppress(Exception):
            if self._whole is not None:
                with self._relaxed():
                    self._driver.cuGraphExecDestroy(self._whole)


def _node(driver: Any, destination: int, source: int, size: int) -> Any:
    made = driver.CUDA_MEMCPY3D()
    made.srcMemoryType = made.dstMemoryType = driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
    made.srcDevice, made.dstDevice = driver.CUdeviceptr(source), driver.CUdeviceptr(destination)
    made.srcPitch = made.dstPitch = made.WidthInBytes = size
    made.srcHeight = made.dstHeight = made.Height = made.Depth = 1
    return made
