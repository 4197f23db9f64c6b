"""Where it ends: memory, sticky errors, machines without context events, page-locked parameters."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from tolaria import BudgetExceeded, GovernorConfig, TolariaGovernor, judge, kernels
from tolaria.kernels import Finite, Side, Sweep
from tolaria.words import copy_words, portable_digest

pytestmark = pytest.mark.cuda


def test_a_machine_without_context_events_blocks_and_says_so(monkeypatch):
    from tolaria import device

    monkeypatch.setattr(device, "find_driver", lambda: (None, "the driver offers CUDA 12.4"))
    with TolariaGovernor(nn.Linear(4, 4).cuda()) as governor:
        found = governor.capabilities()
        assert (found.barrier, found.barrier_reason) == ("blocking", "the driver offers CUDA 12.4")
        governor.snapshot()
        assert governor.execute_rollback().barrier == "blocking"


def test_out_of_memory_while_staging_keeps_the_last_good_snapshot():
    model = nn.ParameterList([nn.Parameter(torch.ones(1 << 26, device="cuda"))])  # 256 MiB
    with TolariaGovernor(model, config=GovernorConfig(slots=4, tier="device"), detector=judge.non_finite()) as governor:
        governor.snapshot().wait("sealed")
        with torch.no_grad(), governor.using():
            model[0].add_(1)
        torch.cuda.empty_cache()
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (64 << 20)) / total)
        try:
            with pytest.raises(BudgetExceeded):
                governor.snapshot()
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert governor.execute_rollback().wait().verified
        assert bool((model[0] == 1).all())
        governor.snapshot()


def test_a_sticky_error_is_named():
    program = f"""
import sys; sys.path[:0] = {sys.path!r}
import os, torch
from tolaria import DeviceLost, TolariaGovernor
model = torch.nn.Linear(4, 4).cuda()
governor = TolariaGovernor(model)
governor.snapshot().wait("sealed")
torch.zeros(4, device="cuda")[torch.tensor([9], device="cuda")]
try:
    governor.execute_rollback().wait()
except DeviceLost as error:
    print("named:", error, flush=True)
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("named:"), done.stderr[-2000:]
    assert "checkpoint" in done.stdout


def test_page_locked_parameters_wait_for_transfers_under_way():
    """A parameter in page-locked host memory, with a transfer out of it held back on the device."""
    from tolaria.testing.gates import Gate

    class Offloaded(nn.Module):
        def __init__(self):
            super().__init__()
            self.here = nn.Parameter(torch.ones(1024).pin_memory())
            self.there = nn.Parameter(torch.ones(1024, device="cuda"))

    model = Offloaded()
    arrived = torch.zeros(1024, device="cuda")
    stream = torch.cuda.Stream()
    with TolariaGovernor(model, detector=judge.non_finite()) as governor:
        assert governor.capabilities().barrier == "context"
        governor.snapshot().wait("sealed")
        with torch.no_grad(), governor.using():
            model.here.fill_(2.0)
        with Gate(limit_s=2.0) as gate:
            with torch.cuda.stream(stream):
                gate.close(stream)
                arrived.copy_(model.here, non_blocking=True)
            governor.execute_rollback()  # has to wait for the transfer: only the watchdog lets it through
            assert gate.was_forced
        torch.cuda.synchronize()
        assert bool((arrived == 2.0).all())
        assert bool((model.here == 1.0).all())


def test_both_implementations_of_the_digest_agree():
    """And copy the same bytes, from any address, of any size, between fences."""
    generator = torch.Generator().manual_seed(0)
    chunk = kernels.CHUNK_BYTES
    for _ in range(20):
        shapes = [
            (
                int(torch.randint(0, size, (), generator=generator)),
                *torch.randint(0, 20, (2,), generator=generator).tolist(),
            )
            for size in (9, 9, 70, 3000, chunk + 3, 3 * chunk + 20, 2, 1)
        ] + [(chunk, 0, 0), (2 * chunk, 16, 4)]
        host = [torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator) for size, _, _ in shapes]
        live, held = [], []
        for data, (size, at, other) in zip(host, shapes, strict=True):
            live.append(torch.full((size + 64,), 0x5A, dtype=torch.uint8, device="cuda")[at : at + size])
            live[-1].copy_(data)
            held.append(torch.full((size + 64,), 0xA5, dtype=torch.uint8, device="cuda")[other : other + size])
        sweep = Sweep(live, held, [Finite.ANYTHING] * len(live), first=11)
        assert sweep.is_compiled
        answer = torch.zeros(2, dtype=torch.int64, device="cuda")
        sweep.run(Side.LIVE, copy=True, answer=answer)
        expected = int(portable_digest(host, 11))
        assert int(answer[0]) == int(portable_digest(live, 11)) == expected
        for data, block, (size, _, other) in zip(host, held, shapes, strict=True):
            assert torch.equal(block.cpu(), data)
            around = torch.empty(0, dtype=torch.uint8, device="cuda").set_(block.untyped_storage())
            assert int((around != 0xA5)[:other].sum()) == int((around != 0xA5)[other + size :].sum()) == 0
        for block in live:
            block.zero_()
        sweep.run(Side.HELD, copy=True)
        assert all(torch.equal(block.cpu(), data) for block, data in zip(live, host, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64])
def test_the_kernel_finds_what_is_not_finite(dtype):
    size = 40_001
    for at in (0, 1, 2, 3, 8191, 8192, 20_000, size - 1):
        for bad in (float("nan"), float("inf"), float("-inf"), None):
            values = torch.full((size,), torch.finfo(dtype).max, dtype=dtype, device="cuda")
            if bad is not None:
                values[at] = bad
            for flat in (values.view(torch.uint8), values.view(torch.uint8)[dtype.itemsize :]):
                sweep, answer = (
                    Sweep([flat], None, [Finite.of(dtype)]),
                    torch.zeros(2, dtype=torch.int64, device="cuda"),
                )
                sweep.run(Side.LIVE, copy=False, answer=answer)
                assert bool(answer[1]) == (bad is not None and (at > 0 or flat.numel() == size * dtype.itemsize))


@pytest.mark.parametrize("first", ["snapshot", "rollback"])
def test_calls_from_a_thread_that_has_never_used_cuda(first):
    """A rollback begins with a launch of ours, before torch has bound the thread to a context."""
    import threading

    model = nn.Linear(8, 8).cuda()
    with TolariaGovernor(model) as governor:
        governor.snapshot().wait("sealed")
        before = governor.digest()
        with torch.no_grad(), governor.using():
            model.weight.add_(1)
        errors = []

        def run():
            try:
                if first == "snapshot":
                    governor.snapshot()
                governor.execute_rollback().wait()
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert not errors
        assert (governor.digest() == before) == (first == "rollback")


def test_odd_sizes_are_copied_whole():
    sizes = [1, 3, 4, 5, 127, 4096, 4097]
    sources = [torch.randint(0, 256, (n,), dtype=torch.uint8, device="cuda") for n in sizes]
    targets = [torch.full_like(source, 77) for source in sources]
    copy_words(targets, sources)
    assert all(torch.equal(a, b) for a, b in zip(sources, targets, strict=True))
