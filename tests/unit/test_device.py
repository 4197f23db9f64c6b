"""The CPU port moves exactly the bytes it is told to, whatever their sizes and however the work is cut."""

import threading

import pytest
import torch

from tolaria import device as device_module
from tolaria.device import BlockingDevice, CpuDevice, DeviceSet
from tolaria.errors import UnsupportedState
from tolaria.operations import Barrier

SIZES = [0, 1, 3, 64, 1000, 4096, 70_001]


def pattern(size, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("job_bytes", [1, 100, 4096, 1 << 20])
def test_copies_are_exact_by_either_path(monkeypatch, threads, job_bytes):
    if job_bytes == 1 and threads > 1:
        job_bytes = 7  # one job per byte is slow, seven are as uneven
    monkeypatch.setattr(device_module, "_LARGE_COPY_BYTES", 1)
    monkeypatch.setattr(device_module, "_JOB_BYTES", max(job_bytes, 7))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    sources = [pattern(size, size) for size in SIZES]
    # destinations are slices with guards on both sides: nothing beyond them may change
    guarded = [torch.full((size + 16,), 171, dtype=torch.uint8) for size in SIZES]
    CpuDevice().copy([g[8 : 8 + size] for g, size in zip(guarded, SIZES, strict=True)], sources)
    for whole, source in zip(guarded, sources, strict=True):
        assert torch.equal(whole[8:-8], source)
        assert whole[:8].eq(171).all()
        assert whole[-8:].eq(171).all()


def test_a_copy_of_nothing():
    CpuDevice().copy([], [])


def test_small_copies_start_no_thread():
    port = CpuDevice()
    port.copy([torch.zeros(64, dtype=torch.uint8)], [pattern(64, 0)])
    assert port._helpers is None


def test_devices_are_opened_by_name_with_their_barrier():
    ports = DeviceSet()
    ports.open([torch.device("cpu"), torch.device("cpu")])
    (port,) = ports.values()
    assert (port.name, port.barrier) == ("cpu", Barrier.HOST)


def test_an_unknown_device_is_refused_by_name():
    with pytest.raises(UnsupportedState, match="meta"):
        DeviceSet().open([torch.device("meta")])


def test_a_blocking_device_waits_for_a_transfer(monkeypatch):
    done = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda where: done.append(f"waited for {where}"))
    assert BlockingDevice("cuda:1").transfer(lambda: done.append("moved")) is None
    assert done == ["moved", "waited for cuda:1"]


def test_a_large_copy_is_over_when_its_threads_are(monkeypatch):
    """A job is still under way in another thread when the caller has none left."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    both, waits, done = threading.Barrier(2), threading.Event(), []

    def waited(futures):
        waits.set()
        return wait(futures)

    def job():
        both.wait(30)  # one each
        if threading.current_thread() is not caller:
            waits.wait(30)
        done.append(threading.current_thread() is caller)

    caller, wait = threading.current_thread(), device_module.wait
    monkeypatch.setattr(device_module, "wait", waited)
    CpuDevice()._carry_out([job, job], is_large=True)
    assert done == [True, False]
    waits.set()
