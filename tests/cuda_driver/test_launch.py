"""Launches of the compiled kernel, over a driver library that notes what it is given instead of running it."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tolaria import kernels
from tolaria.cuda import named
from tolaria.errors import DeviceLost
from tolaria.kernels import Finite, Side, Sweep, launcher
from tolaria.words import CHUNK_BYTES

FUNCTION, STREAM = 0xF00D, 0x57


class Library:
    """`cuLaunchKernel` alone. Arguments are read where the driver would read them, at the moment of the launch."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.code, self.stream = 0, STREAM

    def cuLaunchKernel(self, function: Any, *rest: Any) -> int:
        *shape, stream, addresses, extra = rest
        assert extra is None
        pointers = [ctypes.cast(address, ctypes.POINTER(ctypes.c_int64))[0] for address in addresses]
        self.launches.append((function.value, tuple(shape), stream, pointers))
        return self.code


class Kernel:
    """What torch answers at compilation: its private handle, and a slow launch."""

    def __init__(self) -> None:
        self.func = ctypes.c_void_p(FUNCTION)
        self.slow: list[dict[str, Any]] = []

    def __call__(self, **launch: Any) -> None:
        self.slow.append(launch)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    made = Library()
    monkeypatch.setattr(kernels, "_driver_library", lambda: made)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: made.stream + index, raising=False)
    return made


def low_words(pointers: list[int]) -> list[int]:
    """The integers among the arguments have 32 bits; what stands behind them in memory is nobody's business."""
    return [pointer & 0xFFFFFFFF for pointer in pointers]


def test_a_launch_hands_over_addresses_and_numbers_as_they_are(library: Library) -> None:
    table, answer = torch.arange(4), torch.zeros(2, dtype=torch.int64)
    launch = launcher(Kernel(), 3, 7, [table, 5, -1, answer])
    for _ in range(2):
        launch()
    first, second = library.launches
    assert first == second
    function, shape, stream, pointers = first
    assert (function, shape, stream) == (FUNCTION, (7, 1, 1, 256, 1, 1, 0), STREAM + 3)
    assert [pointers[0], pointers[3]] == [table.data_ptr(), answer.data_ptr()]
    assert low_words(pointers[1:3]) == [5, 0xFFFFFFFF]


def test_the_stream_is_the_one_that_is_current_at_the_launch(library: Library) -> None:
    launch = launcher(Kernel(), 2, 1, [torch.zeros(1)])
    for stream in (0x99, 0xAA):
        library.stream = stream
        launch()
    assert [stream for _, _, stream, _ in library.launches] == [0x99 + 2, 0xAA + 2]


def test_the_memory_of_the_arguments_is_held(library: Library) -> None:
    """Else its address might be somebody else's at the next launch."""
    freed: list[int] = []

    class Watched(torch.Tensor):
        def __del__(self) -> None:
            freed.append(1)

    launch = launcher(Kernel(), 0, 1, [torch.zeros(4).as_subclass(Watched)])
    launch()
    assert freed == []
    del launch
    assert freed == [1]


def test_an_error_of_the_launch_is_named(library: Library) -> None:
    launch = launcher(Kernel(), 0, 1, [torch.zeros(1)])
    library.code = 700  # an illegal address
    with pytest.raises(RuntimeError, match="CUDA error 700") as caught:
        launch()
    assert isinstance(named(caught.value, "copying"), DeviceLost)
    library.code = 701  # out of resources: no sticky one
    with pytest.raises(RuntimeError, match="CUDA error 701") as caught:
        launch()
    assert named(caught.value, "copying") is caught.value


class Contexts(Library):
    """A launch needs a context, and the calling thread has none."""

    def __init__(self, fails: str = "") -> None:
        super().__init__()
        self.fails, self.calls, self.current = fails, list[str](), 0

    def _do(self, name: str) -> int:
        self.calls.append(name)
        return 100 if name == self.fails else 0

    def cuDeviceGet(self, device: Any, index: int) -> int:
        device._obj.value = 40 + index
        return self._do("get")

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:
        context._obj.value = 1000 + device.value
        return self._do("retain")

    def cuCtxSetCurrent(self, context: Any) -> int:
        self.current = context.value
        return self._do("set")

    def cuLaunchKernel(self, function: Any, *rest: Any) -> int:
        if not self.current:
            return 201
        return super().cuLaunchKernel(function, *rest)


def test_a_thread_that_has_not_used_cuda_is_given_the_context_of_the_device(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts = Contexts()
    monkeypatch.setattr(kernels, "_driver_library", lambda: contexts)
    launch = launcher(Kernel(), 2, 1, [torch.zeros(1)])
    for _ in range(2):
        launch()
    assert (contexts.current, contexts.calls, len(contexts.launches)) == (1042, ["get", "retain", "set"], 2)


@pytest.mark.parametrize("fails", ["get", "retain", "set"])
def test_where_it_cannot_be_given_one_the_launch_says_so(
    fails: str, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts = Contexts(fails)
    monkeypatch.setattr(kernels, "_driver_library", lambda: contexts)
    with pytest.raises(RuntimeError, match="CUDA error 201"):
        launcher(Kernel(), 2, 1, [torch.zeros(1)])()
    assert contexts.launches == []
    assert contexts.calls[-1] == fails


@pytest.mark.parametrize("missing", ["library", "handle"])
def test_without_what_is_private_torch_launches(
    missing: str, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, table = Kernel(), torch.zeros(2)
    if missing == "library":
        monkeypatch.setattr(kernels, "_driver_library", lambda: None)
    else:
        kernel.func = FUNCTION  # type: ignore[assignment]
    launcher(kernel, 0, 9, [table, 4])()
    assert library.launches == []
    assert kernel.slow == [{"grid": (9, 1, 1), "block": (256, 1, 1), "args": [table, 4]}]


# ------------------------------------------------------------ sweeps


@pytest.fixture
def sweep(library: Library, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    """Of two blocks, as if they were on device 1."""
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1, raising=False)
    live, held = ([torch.zeros(size, dtype=torch.uint8) for size in (5 * CHUNK_BYTES, 8)] for _ in range(2))
    made = Sweep(live, held, [Finite.ANYTHING] * 2, first=11)
    made._table, made._num_blocks, made._kernel, made._index = torch.arange(16), 2, Kernel(), 1
    return made


def test_a_sweep_launches_what_it_is_asked_for(library: Library, sweep: Sweep) -> None:
    one, other = (torch.zeros(2, dtype=torch.int64) for _ in range(2))
    table = sweep._table.data_ptr()  # type: ignore[union-attr]
    asked = [
        (Side.LIVE, True, None, (6, 1, table)),
        (Side.HELD, True, None, (6, 1 | 4, table)),
        (Side.LIVE, True, one, (2, 1 | 2, one.data_ptr())),
        (Side.LIVE, False, one, (2, 2, one.data_ptr())),
        (Side.HELD, False, one, (2, 2 | 4, one.data_ptr())),
        (Side.HELD, False, other, (2, 2 | 4, other.data_ptr())),
    ]
    for _ in range(2):  # what was made the first time is used the second time
        library.launches.clear()
        for side, copy, answer, _ in asked:
            sweep.run(side, copy=copy, answer=answer)
        found = []
        for _, (grid, *_), stream, pointers in library.launches:
            assert stream == STREAM + 1
            assert [pointers[0], *low_words(pointers[1:4])] == [table, 2, 6, 11]
            found.append((grid, *low_words(pointers[4:5]), pointers[5]))
        assert found == [expected for *_, expected in asked]
    assert len(sweep._launches) == len(asked)


def test_a_sweep_launches_on_its_own_device(library: Library, sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    current = [0]
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current[-1], raising=False)

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    seen: list[int] = []
    monkeypatch.setattr(library, "cuLaunchKernel", lambda *_: seen.append(current[-1]) or 0)
    sweep.run(Side.LIVE, copy=True)
    assert (seen, current) == ([1], [0])
