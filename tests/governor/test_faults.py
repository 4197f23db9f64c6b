"""Errors at every operation, no memory, failing extras: the run goes on, or the caller learns where it stands."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

import tolaria.memory
from tolaria import BudgetExceeded, GovernorConfig, RollbackFailed, TolariaGovernor, ring
from tolaria.operations import Change, Copy, Direction, Op, ReadLive
from tolaria.ring import SlotPhase

Govern = Callable[..., TolariaGovernor]

CLEAN_UP = ("leave", "unpin", "give the slot up")
"""Changes of host state in `finally` blocks: pure functions over tuples, which do not fail."""

ERRORS: list[type[BaseException]] = [RuntimeError, MemoryError]


class Failing:
    """Performs the operations of submissions and raises before or after the k-th; notes what came before.

    After a change of host state nothing can raise any more (signals are held back), so those fail before only.
    """

    def __init__(self, governor: TolariaGovernor, index: int, error: BaseException, when: str = "before") -> None:
        self.done: list[Op] = []
        self.raised = self.while_reading_back = False
        self._index, self._error, self._when = index, error, when
        self._driver = governor._keeper.driver
        self._perform = self._driver.perform
        self._driver.perform = self  # type: ignore[method-assign]

    def __call__(self, op: Op, shield: Any = None) -> Any:
        if shield is None or (isinstance(op, Change) and op.label in CLEAN_UP):
            return self._perform(op, shield)
        number = len(self.done)
        if number == self._index and self._when == "before":
            self._fail(op)
        self.done.append(op)
        result = self._perform(op, shield)
        if number == self._index and not isinstance(op, Change):
            self._fail(op)
        return result

    def _fail(self, op: Op) -> None:
        self._index = -1
        self.raised = True
        # what is restored is read back during and after the rollback proper, which such a failure does not undo
        self.while_reading_back = isinstance(op, ReadLive) or (
            any(isinstance(one, ReadLive) for one in self.done)
            and (any(isinstance(one, Change) and one.label == "commit" for one in self.done))
        )
        raise self._error

    def remove(self) -> None:
        del self._driver.perform

    @property
    def has_written(self) -> bool:
        return any(isinstance(op, Copy) and op.direction is Direction.RESTORE for op in self.done)


class Scene:
    """Three steps after a certified snapshot."""

    def __init__(self, kit: Any, govern: Govern, **config: Any) -> None:
        self.run = kit.Run()
        self.governor = govern(
            self.run.model,
            self.run.optimizer,
            scheduler=self.run.scheduler,
            config=GovernorConfig(**{"cadence": 100, "probation": 2, "slots": 4, **config}),
        )
        self.feed = self.governor.watch(self.run.batches)
        first = next(self.feed)
        self.good = self.run.state()
        self.run.step(self.governor, first)
        for _ in range(2):
            self.run.step(self.governor, next(self.feed))
        self.before = self.run.state()

    @property
    def slots(self) -> list[tuple[str, int]]:
        return [(slot.phase.value, slot.step) for slot in self.governor._keeper.ring]


def count_operations(kit: Any, govern: Govern, act: Callable[[TolariaGovernor], Any]) -> int:
    scene = Scene(kit, govern)
    failing = Failing(scene.governor, -1, RuntimeError())
    act(scene.governor)
    failing.remove()
    scene.governor.close()
    return len(failing.done)


# ------------------------------------------------------------ an error at every operation


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("error", ERRORS)
def test_a_snapshot_that_fails_changes_nothing(error: type[BaseException], when: str, govern: Govern, kit: Any) -> None:
    count = count_operations(kit, govern, lambda governor: governor.snapshot())
    assert count >= 11
    for index in range(count):
        scene = Scene(kit, govern)
        held = scene.slots
        failing = Failing(scene.governor, index, error(), when)
        with contextlib.suppress(error):  # as it is: none of ours
            scene.governor.snapshot()
        failing.remove()
        assert scene.run.state() == scene.before
        kit.assert_at_rest(scene.governor)
        if not failing.raised:
            assert when == "after"
            scene.governor.close()
            continue
        assert scene.slots == held, f"after an error {when} operation {index}: {failing.done[-1:]}"
        info = scene.governor.snapshot(step=99)
        assert info.state == "sealed"
        scene.run.plain_step(scene.run.batches[5])
        assert scene.governor.execute_rollback(verify="before").snapshot_step == 99
        assert scene.run.state() == scene.before
        scene.governor.close()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("verify", [None, "before"])
def test_a_rollback_that_fails_is_all_or_says_so(
    verify: Any, error: type[BaseException], when: str, govern: Govern, kit: Any
) -> None:
    count = count_operations(kit, govern, lambda governor: governor.execute_rollback(verify=verify))
    assert count >= 7
    outcomes = set()
    # after: may it run, choose, inspect, announce, await, still held, check; or announce, await, choose, check
    first_write = 7 if verify else 4
    for index in range(count):
        scene = Scene(kit, govern)
        held = scene.slots
        failing = Failing(scene.governor, index, error(), when)
        caught: BaseException | None = None
        try:
            scene.governor.execute_rollback(verify=verify)
        except (error, RollbackFailed) as found:
            caught = found
        failing.remove()
        kit.assert_at_rest(scene.governor)
        if not failing.raised:
            assert when == "after"
            scene.governor.close()
            continue
        if failing.while_reading_back:
            assert caught is None
            assert scene.run.state() == scene.good
            scene.governor.close()
            continue
        touched = failing.has_written or (when == "before" and index == first_write)
        assert isinstance(caught, RollbackFailed) == touched, failing.done[-1:]
        outcomes.add(touched)
        assert scene.slots == held
        if isinstance(caught, RollbackFailed):
            assert not caught.state_intact
            assert isinstance(caught.__cause__, error)
        else:
            assert scene.run.state() == scene.before
        assert scene.governor.execute_rollback().success
        assert scene.run.state() == scene.good
        scene.run.step(scene.governor, scene.run.batches[3])
        scene.governor.close()
    assert outcomes == {True, False}


def test_a_failed_rollback_is_no_state_to_snapshot_from(govern: Govern, kit: Any) -> None:
    """Between `RollbackFailed` and its repair the train state is undefined; the next governed step repairs it."""
    scene = Scene(kit, govern)
    failing = Failing(scene.governor, 5, RuntimeError("boom"))
    with pytest.raises(RollbackFailed):
        scene.governor.execute_rollback()
    failing.remove()
    result = scene.run.step(scene.governor, next(scene.feed))
    assert result.rolled_back
    assert scene.run.state() == scene.good


@pytest.mark.parametrize("error", ERRORS)
def test_automatic_snapshots_may_fail_at_any_operation(error: type[BaseException], govern: Govern, kit: Any) -> None:
    """Training goes on with the last certified snapshot, and no slot is lost."""
    clean = kit.Run()
    for batch in clean.batches[:20]:
        clean.plain_step(batch)
    for index in range(count_operations(kit, govern, lambda governor: governor.snapshot())):
        run = kit.Run()
        governor = govern(
            run.model, run.optimizer, scheduler=run.scheduler, config=GovernorConfig(cadence=2, probation=2)
        )
        failing: Failing | None = None
        for number, batch in enumerate(governor.watch(run.batches[:20])):
            if failing is not None:
                failing.remove()
                failing = None
            if number < 12:  # every snapshot of the first twelve steps fails
                failing = Failing(governor, index, error())
            run.step(governor, batch)
        statistics = governor.statistics()
        assert statistics.snapshots_failed == 6
        assert statistics.snapshots_deferred == 0, f"operation {index} cost a slot"
        certified = [slot.step for slot in governor._keeper.ring if slot.phase is SlotPhase.CERTIFIED]
        assert max(certified) == 18
        assert run.state() == clean.state()
        governor.close()


# ------------------------------------------------------------ no memory


def no_memory(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "asked":
        monkeypatch.setattr(tolaria.memory, "available_host_bytes", lambda: 16)
        return
    error = {
        "torch.OutOfMemoryError": torch.OutOfMemoryError("no"),
        "MemoryError": MemoryError(),
        "the CPU allocator": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    }[how]

    def zeros(*_: Any, **__: Any) -> torch.Tensor:
        raise error

    monkeypatch.setattr(torch, "zeros", zeros)


NO_MEMORY = ["asked", "torch.OutOfMemoryError", "MemoryError", "the CPU allocator"]


@pytest.mark.parametrize("how", NO_MEMORY)
def test_no_memory_for_a_manual_snapshot(how: str, govern: Govern, kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(kit, govern)
    held = scene.slots
    with monkeypatch.context() as patch:
        no_memory(patch, how)
        with pytest.raises(BudgetExceeded, match="MiB") as caught:
            scene.governor.snapshot()
    assert caught.value.state_intact
    assert scene.run.state() == scene.before
    assert scene.slots == held
    assert scene.governor.execute_rollback().certified
    assert scene.run.state() == scene.good


@pytest.mark.parametrize("how", NO_MEMORY)
def test_no_memory_for_automatic_snapshots(
    how: str, govern: Govern, kit: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scene = Scene(kit, govern, cadence=2)
    held = [slot for slot in scene.slots if slot[0] == "certified"]
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "tolaria"):
        no_memory(patch, how)
        for _ in range(6):
            assert not scene.run.step(scene.governor, next(scene.feed)).rolled_back
    failed = scene.governor.statistics().snapshots_failed
    assert failed == 3
    assert [slot for slot in scene.slots if slot[0] == "certified"][:1] == held
    assert sum("no snapshot could be taken" in record.message for record in caplog.records) == failed
    for _ in range(6):
        scene.run.step(scene.governor, next(scene.feed))
    assert scene.governor.statistics().snapshots_failed == failed
    assert scene.governor.statistics().snapshots >= 4


def test_a_state_that_cannot_fit_is_refused_at_once(govern: Govern, kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = kit.Run()
    monkeypatch.setattr(tolaria.memory, "available_host_bytes", lambda: 100)
    with pytest.raises(BudgetExceeded, match="slots"):
        govern(run.model, run.optimizer)
    assert "forward" not in vars(run.model)


def test_no_memory_for_the_very_first_snapshot_is_an_error(
    govern: Govern, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = kit.Run()
    governor = govern(run.model, run.optimizer)
    with monkeypatch.context() as patch:
        no_memory(patch, "asked")
        with pytest.raises(BudgetExceeded):
            next(iter(governor.watch(run.batches)))
    run.train(governor, run.batches[:3])


# ------------------------------------------------------------ failing extras


class Extra:
    """A registered object that fails when told."""

    def __init__(self) -> None:
        self.value, self.fails = 0, ""

    def state_dict(self) -> dict[str, int]:
        if self.fails == "state_dict":
            raise OSError("the extra's own")
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if self.fails == "load_state_dict":
            raise OSError("the extra's own")
        self.value = state["value"]


def test_an_extra_that_cannot_be_read(govern: Govern, kit: Any) -> None:
    run, extra = kit.Run(), Extra()
    governor = govern(run.model, run.optimizer, config=GovernorConfig(cadence=1, probation=1))
    governor.register("extra", extra)
    feed = governor.watch(run.batches)
    for _ in range(4):
        run.step(governor, next(feed))
        extra.value += 1
    newest = ring.newest_good(governor._keeper.ring)
    assert newest is not None
    extra.fails = "state_dict"
    before = run.state()
    with pytest.raises(OSError, match="own"):
        governor.snapshot()
    assert run.state() == before
    assert ring.newest_good(governor._keeper.ring) == newest  # an older one may have made room for the attempt
    for _ in range(3):
        run.step(governor, next(feed))
    assert governor.statistics().snapshots_failed == 3
    extra.fails = ""
    report = governor.execute_rollback()
    assert report.certified
    assert report.snapshot_step is not None
    assert report.snapshot_step >= newest.step
    assert extra.value == report.snapshot_step  # it is counted after each step, and belongs to it


def test_an_extra_that_cannot_be_restored(govern: Govern, kit: Any) -> None:
    run, extra, other = kit.Run(), Extra(), Extra()
    governor = govern(run.model, run.optimizer)
    governor.register("extra", extra)
    governor.register("other", other)
    governor.snapshot()
    good = run.state()
    run.step(governor, run.batches[0])
    extra.value = other.value = 7
    extra.fails = "load_state_dict"
    for _ in range(2):
        with pytest.raises(RollbackFailed, match="extra could not be restored") as caught:
            governor.execute_rollback()
        assert not caught.value.state_intact
        assert run.state() == good  # everything else was restored all the same
        assert (extra.value, other.value) == (7, 0)
    extra.fails = ""
    assert governor.execute_rollback().success
    assert (extra.value, other.value) == (0, 0)


def test_an_extra_that_cannot_be_restored_in_a_panic(govern: Govern, kit: Any) -> None:
    run, extra = kit.Run(), Extra()
    governor = govern(run.model, run.optimizer, scheduler=run.scheduler)
    governor.register("extra", extra)
    feed = governor.watch(run.batches)
    run.step(governor, next(feed))
    extra.fails = "load_state_dict"
    with pytest.raises(RollbackFailed):
        run.step(governor, kit.nan_batch(next(feed)))
    kit.assert_at_rest(governor)
    extra.fails = ""
    assert governor.execute_rollback().success


# ------------------------------------------------------------ slots that rot


def test_a_corrupted_slot_is_passed_over(govern: Govern, kit: Any) -> None:
    scene = Scene(kit, govern)
    newer = scene.governor.snapshot(step=3)
    slot = next(s for s in scene.governor._keeper.ring if s.snapshot == newer.serial)
    arena = scene.governor._keeper.vault.slots[slot.index].arena
    assert arena is not None
    next(iter(arena.flat.values()))[5] ^= 1
    report = scene.governor.execute_rollback(verify="before")
    assert (report.snapshot_step, report.corrupted_steps) == (0, (3,))
    assert scene.run.state() == scene.good
    assert newer.state == "dropped"
