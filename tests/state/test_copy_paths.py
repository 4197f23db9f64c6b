"""Every way in which bytes move writes the same bytes, all of them and no others, whatever is to be moved.

The compiled sweep and the transfers between tiers are tested in `gpu/test_copy_paths.py`, with the same blocks; graphs
and batches of copies on the simulated driver in `cuda_driver/test_paths.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from state.blocks import POISONS, Blocks, shapes
from torch import nn

from tolaria import TolariaGovernor
from tolaria import device as device_module
from tolaria.device import CpuDevice
from tolaria.kernels import Finite, Side, Sweep
from tolaria.route import HostRoute
from tolaria.words import copy_words

Flat = Sequence[torch.Tensor]


def by_threads(destinations: Flat, sources: Flat) -> None:
    port = CpuDevice()
    port.prepare(destinations, sources)()


def by_words(destinations: Flat, sources: Flat) -> None:
    copy_words(destinations, sources)


def by_sweep(destinations: Flat, sources: Flat) -> None:
    Sweep(sources, destinations, [Finite.ANYTHING] * len(sources)).run(Side.LIVE, copy=True)


def by_sweep_back(destinations: Flat, sources: Flat) -> None:
    Sweep(destinations, sources, [Finite.ANYTHING] * len(sources)).run(Side.HELD, copy=True)


def by_transfer(destinations: Flat, sources: Flat) -> None:
    CpuDevice().move(destinations, sources)


def by_route(destinations: Flat, sources: Flat) -> None:
    HostRoute(CpuDevice(), sources, destinations).capture(None)


PATHS: dict[str, Callable[[Flat, Flat], None]] = {
    "threads": by_threads,
    "words": by_words,
    "sweep": by_sweep,
    "sweep back": by_sweep_back,
    "transfer": by_transfer,
    "route": by_route,
}


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    drawn=shapes, seed=st.integers(0, 2**16), job=st.sampled_from([7, 4096, 50_000, 1 << 23]), crumb=st.integers(0, 1)
)
def test_the_bytes_arrive_and_nothing_else_is_written(
    path: str, drawn: list[tuple[int, int, int]], seed: int, job: int, crumb: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if job == 7:
        drawn = [(size % 200, *rest) for size, *rest in drawn]  # a job of its own for each seven bytes
    monkeypatch.setattr(device_module, "_LARGE_COPY_BYTES", 1)
    monkeypatch.setattr(device_module, "_JOB_BYTES", job)
    monkeypatch.setattr(device_module, "_CRUMB_BYTES", crumb << 20)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    Blocks(drawn, seed).verify(PATHS[path])


@pytest.mark.parametrize("path", ["threads", "sweep", "transfer"])
def test_ten_thousand_tiny_blocks(path: str) -> None:
    Blocks([(1 + i % 9, i % 3, i % 5) for i in range(10_000)], 1).verify(PATHS[path])


@pytest.mark.parametrize("path", ["threads", "sweep"])
def test_one_large_block(path: str) -> None:
    Blocks([((48 << 20) + 13, 0, 8)], 2).verify(PATHS[path])


@pytest.mark.parametrize("path", ["threads", "route"])
def test_a_block_that_is_left_out_is_seen(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The red twin."""
    cut = device_module._cut
    monkeypatch.setattr(device_module, "_cut", lambda to, of: cut(to[:-1], of[:-1]))
    with pytest.raises(AssertionError):
        Blocks([(64, 0, 0), (9, 0, 0)], 3).verify(PATHS[path])


DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.int64, torch.uint8, torch.bool,
    torch.float8_e4m3fn,
)  # fmt: skip


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(0, 300), st.integers(0, 5), st.booleans()), max_size=12),
    st.integers(0, 2**16),
)
def test_a_train_state_of_any_kind_comes_back(
    govern: Callable[..., TolariaGovernor], drawn: list[tuple[torch.dtype, int, int, bool]], seed: int
) -> None:
    """Mixed element types, odd sizes, views at odd offsets: into poisoned slots, and back over poisoned storages."""
    generator = torch.Generator().manual_seed(seed)
    model: Any = nn.Module()
    memory = []
    for number, (dtype, size, offset, is_view) in enumerate(drawn):
        count = (size + offset + 1) * dtype.itemsize
        flat = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
        values = flat.view(dtype) if not is_view else flat[dtype.itemsize :].view(dtype)[offset:]
        model.register_buffer(f"b{number}", values)
        memory.append(flat)
    governor = govern(model, slots=2, probation=0)
    governor.snapshot()
    for poison in POISONS:
        expected = [flat.clone() for flat in memory]
        for slot in governor._keeper.vault.slots:
            for flat in () if slot.arena is None else slot.arena.views:
                flat.fill_(poison)
        governor.snapshot()
        for flat in memory:
            flat.fill_(poison)
        governor.execute_rollback()
        assert all(map(torch.equal, memory, expected))
    governor.close()


def test_storage_that_has_grown_gets_its_bytes_where_it_is_now(govern: Callable[..., TolariaGovernor]) -> None:
    """Its address of then belongs to somebody else."""
    model = nn.BatchNorm1d(1000)
    governor = govern(model)
    mean = model.running_mean
    mean.fill_(3.0)
    governor.snapshot()
    before = mean.untyped_storage().data_ptr()
    kept = mean.untyped_storage()
    kept.resize_(1 << 20)
    assert kept.data_ptr() != before
    stranger = [torch.full((1000,), 7.0) for _ in range(64)]  # one of them takes the memory, if it is to be had
    mean.fill_(5.0)
    governor.execute_rollback()
    assert model.running_mean is mean
    assert bool((mean == 3.0).all())
    assert all(bool((each == 7.0).all()) for each in stranger)
