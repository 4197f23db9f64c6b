"""A state machine: governor and a reference that only remembers, through random programs. Every bit is compared."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tolaria import GovernorConfig, PhaseError, Recovery, RollbackFailed, SnapshotInfo, TolariaGovernor

SLOTS = 4


class Extra:
    """A registered object that fails when told."""

    def __init__(self) -> None:
        self.value, self.fails = 0, False

    def state_dict(self) -> dict[str, int]:
        if self.fails:
            raise OSError("the extra's own")
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if self.fails:
            raise OSError("the extra's own")
        self.value = state["value"]


class Machine(RuleBasedStateMachine):
    """The reference is `held`: handle, step and state of every snapshot that ought to be in the ring, oldest first."""

    kit: Any

    def __init__(self) -> None:
        super().__init__()
        self.run = self.kit.Run()
        self.extra = Extra()
        self.governor = TolariaGovernor(
            self.run.model,
            self.run.optimizer,
            scheduler=self.run.scheduler,
            detector=self.kit.non_finite(),
            config=GovernorConfig(
                cadence=10_000, slots=SLOTS, probation=1, recovery=Recovery(max_retries=10_000), rng="restore"
            ),
        )
        self.governor.register("extra", self.extra)
        self.held: list[tuple[SnapshotInfo, int, Any]] = []
        self.section: AbstractContextManager[None] | None = None
        self.steps = 0
        self.number = 0

    def teardown(self) -> None:
        if self.section is not None:
            self.section.__exit__(None, None, None)
        self.governor.close()

    def state(self) -> Any:
        buffers = dict(self.run.model.named_buffers())
        return [self.run.state(), self.kit.freeze(buffers), self.extra.value]

    def batch(self) -> Any:
        self.number += 1
        return self.run.batches[self.number % len(self.run.batches)]

    # ------------------------------------------------------------ what a program may do to its state

    @rule()
    def train(self) -> None:
        if self.section is None:
            assert not self.run.step(self.governor, self.batch()).rolled_back
            self.steps += 1
        else:
            self.run.plain_step(self.batch())  # inside a section only the optimizer itself may step
        self.extra.value += 1

    @rule(factor=st.sampled_from([0.5, 0.9, 1.1]))
    def change_lr(self, factor: float) -> None:
        self.run.optimizer.param_groups[0]["lr"] *= factor
        self.run.optimizer.param_groups[0]["betas"] = (0.9 * factor / 1.1, 0.999)

    @rule(in_place=st.booleans())
    def change_buffer(self, in_place: bool) -> None:
        norm = self.run.model[1]
        if in_place:
            norm.running_mean.add_(0.25)
        else:
            norm.running_mean = norm.running_mean + 0.25

    @rule(index=st.integers(0, 5))
    def new_optimizer_state(self, index: int) -> None:
        values = self.run.optimizer.state.get(self.run.optimizer.param_groups[0]["params"][index])
        if values:
            values[f"extra{self.number}"] = torch.full((2,), float(self.number))

    @rule()
    def drop_optimizer_state(self) -> None:
        self.run.optimizer.state.clear()

    @rule()
    def draw(self) -> None:
        torch.rand(3)

    # ------------------------------------------------------------ snapshots and rollbacks

    @rule(fails=st.booleans(), step=st.integers(0, 3))
    def snapshot(self, fails: bool, step: int) -> None:
        before, self.extra.fails = self.state(), fails
        try:
            info = self.governor.snapshot(step=step)
        except PhaseError:
            assert self.section is not None
        except OSError:
            assert fails
            self.held = self.held[-SLOTS + 1 :]  # the oldest may have made room for the attempt
        else:
            assert self.section is None
            assert not fails
            self.held = [*self.held[-SLOTS + 1 :], (info, step, copy.copy(before))]
        self.extra.fails = False
        assert self.state() == before

    @precondition(lambda self: self.held)
    @rule(data=st.data(), by=st.sampled_from(["newest", "handle", "step"]), fails=st.booleans())
    def rollback(self, data: st.DataObject, by: str, fails: bool) -> None:
        index = len(self.held) - 1 if by == "newest" else data.draw(st.integers(0, len(self.held) - 1))
        info, step, state = self.held[index]
        if by == "step":  # several may have the same number: the newest of them is meant
            index = max(i for i, (_, other, _) in enumerate(self.held) if other == step)
            info, step, state = self.held[index]
        to = {"newest": None, "handle": info, "step": step}[by]
        if self.section is not None:
            before = self.state()
            with pytest.raises(PhaseError):
                self.governor.execute_rollback(to=to)
            assert self.state() == before
            return
        if fails:
            self.extra.fails = True
            with pytest.raises(RollbackFailed):
                self.governor.execute_rollback(to=to)
            self.extra.fails = False
        report = self.governor.execute_rollback(to=to)
        assert (report.success, report.snapshot_step) == (True, step)
        assert report.wait().verified
        assert self.state() == state
        del self.held[index + 1 :]

    @precondition(lambda self: self.held and self.section is None)
    @rule()
    def train_on_nan(self) -> None:
        result = self.run.step(self.governor, self.kit.nan_batch(self.batch()))
        assert (result.rolled_back, result.skipped) == (True, True)
        assert self.state() == self.held[-1][2]
        self.governor.reset()

    # ------------------------------------------------------------ sections

    @precondition(lambda self: self.section is None)
    @rule(write=st.booleans())
    def open_section(self, write: bool) -> None:
        self.section = self.governor.using(write=write)
        self.section.__enter__()

    @precondition(lambda self: self.section is not None)
    @rule()
    def close_section(self) -> None:
        assert self.section is not None
        self.section.__exit__(None, None, None)
        self.section = None

    # ------------------------------------------------------------ always

    @invariant()
    def the_ring_holds_what_the_reference_holds(self) -> None:
        assert [info.state for info, _, _ in self.held] == ["sealed"] * len(self.held)
        if self.section is None:
            self.kit.assert_at_rest(self.governor)


@pytest.mark.slow
def test_random_programs(kit: Any) -> None:
    machine = type("KitMachine", (Machine,), {"kit": kit})
    run_state_machine_as_test(machine, settings=settings(max_examples=40, stateful_step_count=40, deadline=None))
