"""Bytes that change in a sealed slot are noticed, and an older snapshot is used. Reaches into internals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tolaria
from tolaria import SnapshotInfo, TolariaGovernor

Govern = Callable[..., TolariaGovernor]
Freeze = Callable[..., Any]
CPU = torch.device("cpu")


class Rows(nn.Module):
    """Two rows of a parameter and some moments, in a slot of three."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(32.0).view(2, 16))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.count.add_(1)
        return inputs @ self.weight


class Held:
    """A governor with snapshots of steps 0, 1 and 2, what the state was at each of them, and one more step."""

    def __init__(self, govern: Govern, freeze: Freeze, num_snapshots: int = 3) -> None:
        self.model = Rows()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.1)
        self.governor = govern(self.model, self.optimizer, slots=3)
        self.taken: list[SnapshotInfo] = []
        self.states: list[Any] = []
        self.freeze = lambda: freeze(self.model, self.optimizer)
        self.step()
        for number in range(num_snapshots):
            self.taken.append(self.governor.snapshot(step=number))
            self.states.append(self.freeze())
            self.step()

    def step(self) -> None:
        self.model(torch.ones(1, 2)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def memory(self, number: int) -> torch.Tensor:
        slot = next(s for s in self.governor._keeper.ring if s.snapshot == self.taken[number].serial)
        arena = self.governor._keeper.vault.slots[slot.index].arena
        assert arena is not None
        return arena.flat[CPU]

    def flip(self, number: int, byte: int = 5, bit: int = 0) -> None:
        self.memory(number)[byte] ^= 1 << bit


@pytest.fixture
def held(govern: Govern, freeze: Freeze) -> Held:
    return Held(govern, freeze)


def test_intact_slots_pass(held: Held) -> None:
    report = held.governor.execute_rollback(verify="before").wait()
    assert (report.snapshot_step, report.corrupted_steps, report.verified, report.status) == (2, (), True, "done")
    assert held.freeze() == held.states[2]


def test_a_flipped_bit_falls_back_to_the_next_older_snapshot(held: Held) -> None:
    held.flip(2)
    report = held.governor.execute_rollback(verify="before")
    assert report.success
    assert (report.snapshot_step, report.corrupted_steps) == (1, (2,))
    assert held.freeze() == held.states[1]
    assert held.taken[2].state == "dropped"
    assert report.wait().verified


def test_two_corrupted_slots_fall_back_twice(held: Held) -> None:
    held.flip(2)
    held.flip(1, byte=0, bit=7)
    report = held.governor.execute_rollback(verify="before")
    assert (report.snapshot_step, report.corrupted_steps) == (0, (2, 1))
    assert held.freeze() == held.states[0]


@pytest.mark.parametrize("to", [None, 1, "handle"])
def test_no_good_slot_left_is_refused(to: int | str | None, held: Held, freeze: Freeze) -> None:
    """`to` names a snapshot: only older ones may stand in for it, never a newer one."""
    for number in (0, 1) if to is not None else (0, 1, 2):
        held.flip(number)
    before, digest = held.freeze(), held.governor.digest()
    with pytest.raises(tolaria.SnapshotRejected, match="changed since they were sealed") as caught:
        held.governor.execute_rollback(to=held.taken[1] if isinstance(to, str) else to, verify="before")
    assert caught.value.state_intact
    assert (held.freeze(), held.governor.digest()) == (before, digest)
    held.step()
    held.governor.snapshot(step=7)
    good = held.freeze()
    held.step()
    report = held.governor.execute_rollback(verify="before")
    assert (report.snapshot_step, report.corrupted_steps) == (7, ())
    assert held.freeze() == good


def test_a_corrupted_slot_that_is_not_chosen_does_not_matter(held: Held) -> None:
    held.flip(2)
    report = held.governor.execute_rollback(to=1, verify="before")
    assert (report.snapshot_step, report.corrupted_steps) == (1, ())
    assert held.freeze() == held.states[1]


def test_every_byte_of_every_storage_is_covered(govern: Govern, freeze: Freeze) -> None:
    """Walks through the whole slot, byte by byte: each flipped bit must be noticed by itself."""
    held = Held(govern, freeze, num_snapshots=2)
    memory = held.memory(1)
    slot = next(s for s in held.governor._keeper.ring if s.snapshot == held.taken[1].serial)
    for byte in range(memory.numel()):
        memory[byte] ^= 1 << (byte % 8)
        assert not held.governor._keeper.vault.inspect(tolaria.operations.Inspect(slot.index, again=True)).intact, byte
        memory[byte] ^= 1 << (byte % 8)
    report = held.governor.execute_rollback(verify="before")
    assert (report.snapshot_step, report.corrupted_steps) == (1, ())
    assert held.freeze() == held.states[1]


@pytest.mark.parametrize("width", [4, 64], ids=["elements", "rows"])
def test_swapped_elements_are_noticed(width: int, held: Held) -> None:
    """Sum and XOR of the bytes stay the same: only an order-sensitive digest sees it."""
    memory = held.memory(2)
    first, second = memory[:width].clone(), memory[width : 2 * width].clone()
    assert not torch.equal(first, second)
    total = int(memory.long().sum())
    memory[:width], memory[width : 2 * width] = second, first
    assert int(memory.long().sum()) == total
    report = held.governor.execute_rollback(verify="before")
    assert (report.snapshot_step, report.corrupted_steps) == (1, (2,))
    assert held.freeze() == held.states[1]


def test_without_verify_the_report_raises_after_the_fact(held: Held) -> None:
    held.flip(2)
    report = held.governor.execute_rollback()
    assert (report.success, report.status, report.verified) == (True, "submitted", None)
    assert held.freeze() != held.states[2]
    with pytest.raises(tolaria.SnapshotRejected, match="verifying a rollback"):
        report.wait()
    again = held.governor.execute_rollback(verify="before")
    assert (again.snapshot_step, again.corrupted_steps) == (1, (2,))
    assert held.freeze() == held.states[1]


def test_a_second_wait_raises_as_well(held: Held) -> None:
    held.flip(2)
    report = held.governor.execute_rollback()
    for _ in range(2):
        with pytest.raises(tolaria.SnapshotRejected, match="verifying a rollback"):
            report.wait()
        assert report.verified is False


def test_an_automatic_rollback_passes_corrupted_slots_over(govern: Govern, freeze: Freeze) -> None:
    model = Rows()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    incidents: list[tolaria.Incident] = []
    governor = govern(model, optimizer, slots=4, cadence=1, probation=1, on_incident=incidents.append)
    states = {0: freeze(model, optimizer)}
    corrupted = None
    for number in governor.watch(range(5)):
        loss = model(torch.ones(1, 2)).sum()
        loss.backward()
        if governor.step(loss=float("nan") if number == 4 else loss).rolled_back:
            break
        states[number + 1] = freeze(model, optimizer)
        if number == 3:
            corrupted = tolaria.ring.newest_good(governor._keeper.ring)
            assert corrupted is not None
            arena = governor._keeper.vault.slots[corrupted.index].arena
            assert arena is not None
            arena.flat[CPU][3] ^= 4
    assert corrupted is not None
    (incident,) = incidents
    assert incident.restored_step == corrupted.step - 1
    assert f"corrupted snapshots passed over: {[corrupted.step]}" in incident.note
    assert freeze(model, optimizer) == states[corrupted.step - 1]
