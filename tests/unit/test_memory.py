"""Memory is asked for before it is taken, and a refusal says how much was wanted and how much there is."""

import pytest
import torch

from tolaria import memory
from tolaria.errors import BudgetExceeded

CPU = torch.device("cpu")


def test_allocated_memory_is_zeroed_bytes():
    block = memory.allocate(1000, CPU, "testing")
    assert block.dtype is torch.uint8
    assert block.shape == (1000,)
    assert not block.any()


def test_what_is_not_available_is_refused_with_the_arithmetic(monkeypatch):
    monkeypatch.setattr(memory, "available_host_bytes", lambda: 3 * 2**20)
    memory.allocate(2 * 2**20, CPU, "testing")
    with pytest.raises(BudgetExceeded, match=r"needs 4\.0 MiB on cpu, but 3\.0 MiB are available") as caught:
        memory.allocate(4 * 2**20, CPU, "testing")
    assert caught.value.state_intact


def test_an_allocator_that_refuses_is_understood(monkeypatch):
    monkeypatch.setattr(memory, "available_host_bytes", lambda: None)
    with pytest.raises(BudgetExceeded, match="the allocator refused"):
        memory.allocate(1 << 60, CPU, "testing")


def test_other_errors_are_not_mistaken_for_it(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("something else")

    monkeypatch.setattr(torch, "zeros", broken)
    with pytest.raises(RuntimeError, match="something else"):
        memory.allocate(10, CPU, "testing")


def test_the_lesser_of_machine_and_container_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("600000\n")
    (tmp_path / "memory.stat").write_text("anon 500000\ninactive_file 100000\n")
    assert memory.available_host_bytes() == 500_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_host_bytes() == memory._machine_bytes()
