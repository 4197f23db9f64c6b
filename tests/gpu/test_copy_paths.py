"""Every path inside a device, and the transfers between tiers, write the same bytes on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from state.blocks import POISONS, Blocks, shapes
from torch import nn

from tolaria import GovernorConfig, TolariaGovernor, judge
from tolaria.config import CopyPathChoice
from tolaria.cuda import ContextDevice, TorchStreams, find_driver
from tolaria.device import BlockingDevice
from tolaria.kernels import Finite, Side, Sweep
from tolaria.paths import CopyPath, offered, prepare
from tolaria.words import copy_words, portable_digest

pytestmark = pytest.mark.cuda
Flat = Sequence[torch.Tensor]


def by_sweep(destinations: Flat, sources: Flat) -> None:
    sweep = Sweep(sources, destinations, [Finite.ANYTHING] * len(sources))
    assert sweep.is_compiled or not any(source.numel() for source in sources)
    sweep.run(Side.LIVE, copy=True)


def by_sweep_back(destinations: Flat, sources: Flat) -> None:
    Sweep(destinations, sources, [Finite.ANYTHING] * len(sources)).run(Side.HELD, copy=True)


def by_reading_sweep(destinations: Flat, sources: Flat) -> None:
    answer = torch.zeros(2, dtype=torch.int64, device="cuda")
    Sweep(sources, destinations, [Finite.FLOAT32] * len(sources)).run(Side.LIVE, copy=True, answer=answer)
    assert int(answer[0]) == int(portable_digest([source.cpu() for source in sources]))


def by_words(destinations: Flat, sources: Flat) -> None:
    copy_words(destinations, sources)


def inside(path: CopyPath) -> Callable[[Flat, Flat], None]:
    """On the governor's own stream, asked for three times: a command may be used again."""

    def copy(destinations: Flat, sources: Flat) -> None:
        driver, why_not = find_driver()
        assert driver is not None, why_not
        torch.cuda.synchronize()
        port = ContextDevice("cuda:0", driver, TorchStreams())
        with port.on_stream():
            assert path in offered(port, torch.device("cuda:0"))
            launch = prepare(path, port, destinations, sources)
        for _ in range(3):
            port.enqueue(launch)
        port.close()

    return copy


def by_main_memory(destinations: Flat, sources: Flat) -> None:
    """There and back again, block by block."""
    held = [torch.empty(source.numel(), dtype=torch.uint8).pin_memory() for source in sources]
    port = BlockingDevice("cuda:0")
    port.move(held, sources)
    port.move(destinations, held)
    port.synchronize()


def by_main_memory_at_once(destinations: Flat, sources: Flat) -> None:
    """There and back again, in two calls of the driver, on the governor's own stream."""
    driver, why_not = find_driver()
    assert driver is not None, why_not
    held = [torch.empty(source.numel(), dtype=torch.uint8).pin_memory() for source in sources]
    torch.cuda.synchronize()
    port = ContextDevice("cuda:0", driver, TorchStreams())
    port.enqueue(lambda: port.move(held, sources))
    port.enqueue(lambda: port.move(destinations, held))
    port.close()


PATHS = {
    "sweep": by_sweep,
    "sweep back": by_sweep_back,
    "sweep that reads": by_reading_sweep,
    "words": by_words,
    "kernel": inside(CopyPath.KERNEL),
    "foreach": inside(CopyPath.FOREACH),
    "graph": inside(CopyPath.GRAPH),
    "batch": inside(CopyPath.BATCH),
    "main memory": by_main_memory,
    "main memory at once": by_main_memory_at_once,
}


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=25)
@given(drawn=shapes, seed=st.integers(0, 2**16))
def test_the_bytes_arrive_and_nothing_else_is_written(path: str, drawn: list[tuple[int, int, int]], seed: int) -> None:
    Blocks(drawn, seed, "cuda").verify(PATHS[path])


@pytest.mark.parametrize("path", ["sweep", "sweep that reads", "graph", "batch"])
def test_ten_thousand_tiny_blocks(path: str) -> None:
    Blocks([(1 + i % 9, i % 3, i % 5) for i in range(10_000)], 1, "cuda").verify(PATHS[path])


@pytest.mark.parametrize("path", ["sweep", "words", "graph", "batch"])
def test_one_block_of_eight_gigabytes(path: str) -> None:
    """Beyond what 32 bits count, in bytes and in words."""
    size = (8 << 30) + 13
    source = torch.empty(size, dtype=torch.uint8, device="cuda").random_(0, 256)
    for poison in POISONS:
        destination = torch.full((size,), poison, dtype=torch.uint8, device="cuda")
        PATHS[path]([destination], [source])
        assert torch.equal(destination, source)
        del destination


@pytest.mark.parametrize("barrier", ["context", "blocking"])
@pytest.mark.parametrize("tier", ["device", "host"])
def test_storage_that_has_grown_gets_its_bytes_where_it_is_now(barrier: str, tier: str) -> None:
    """Its address of then may belong to somebody else by now."""
    model = nn.BatchNorm1d(1 << 20).cuda()
    config = GovernorConfig(barrier=barrier, tier=tier, rng="keep", probation=0, slots=2)
    with TolariaGovernor(model, config=config, detector=judge.non_finite()) as governor:
        mean = model.running_mean
        mean.fill_(3.0)
        governor.snapshot().wait("sealed")
        before = mean.untyped_storage().data_ptr()
        mean.untyped_storage().resize_(16 << 20)
        assert mean.untyped_storage().data_ptr() != before
        strangers = [torch.full((1 << 20,), 7.0, device="cuda") for _ in range(64)]
        assert before in [stranger.data_ptr() for stranger in strangers], "or this shows nothing"
        mean.fill_(5.0)
        governor.execute_rollback().wait()
        assert bool((mean == 3.0).all())
        assert all(bool((stranger == 7.0).all()) for stranger in strangers)


def test_host_time_is_spent_on_no_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between layout changes neither a snapshot nor a rollback surveys, lays a route or takes memory."""
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(20))).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    config = GovernorConfig(rng="keep", probation=0, slots=2)
    with TolariaGovernor(model, optimizer, config=config, detector=judge.non_finite()) as governor:
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
            governor.snapshot().wait("sealed")
        state = governor._keeper.state
        expected = [p.detach().clone() for p in model.parameters()]
        for part in state.parts:
            monkeypatch.setattr(part, "survey", lambda leaves: pytest.fail("was walked"))
        taken = torch.cuda.memory_stats()["allocation.all.allocated"]
        for _ in range(3):
            governor.snapshot().wait("sealed")
            governor.execute_rollback().wait()
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == taken
        assert all(torch.equal(p, e) for p, e in zip(model.parameters(), expected, strict=True))


@pytest.mark.parametrize("path", ["kernel", "foreach", "graph", "batch", None])
def test_a_governor_comes_back_by_every_path(path: CopyPathChoice | None) -> None:
    """In half a gigabyte, so that the choice is measured where it is left to the governor."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(32)), nn.BatchNorm1d(2048)).cuda()
    model.register_buffer("odd", torch.arange(100_001, device="cuda", dtype=torch.uint8)[1:])
    config = GovernorConfig(copy_path=path, rng="keep", probation=0, slots=2)
    tensors = [*model.parameters(), *model.buffers()]
    with TolariaGovernor(model, config=config, detector=judge.non_finite()) as governor, torch.no_grad():
        before = [tensor.clone() for tensor in tensors]
        for value in (7, 9, 11):
            governor.snapshot().wait("sealed")
            with governor.using():
                for tensor in tensors:
                    tensor.fill_(value)
            assert governor.execute_rollback().wait().verified
            assert all(map(torch.equal, tensors, before))
        shown = governor.capabilities().copy_path
        assert ("measured over" if path is None else "asked for") in shown


def test_a_graph_of_copies_is_dropped_while_it_runs() -> None:
    driver, why_not = find_driver()
    assert driver is not None, why_not
    blocks = Blocks([(1 << 20, 0, 0)] * 300, 1, "cuda")
    torch.cuda.synchronize()
    port = ContextDevice("cuda:0", driver, TorchStreams())
    launch = port.graph(blocks.destinations, blocks.sources)
    for _ in range(20):
        port.enqueue(launch)
    del launch
    port.close()
    assert all(map(torch.equal, blocks.destinations, blocks.sources))
