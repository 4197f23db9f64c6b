"""Ctrl-C at every operation of a snapshot and of a rollback: raised to the caller, and the state is one of two."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from tolaria import Detector, GovernorConfig, Health, TolariaGovernor, Verdict
from tolaria.operations import (
    Await,
    CaptureHost,
    Change,
    Check,
    Copy,
    Inspect,
    Op,
    ReadLive,
    Reserve,
    RestoreHost,
    Survey,
)
from tolaria.ring import SlotPhase, newest_good
from tolaria.vitals import Arrived

Govern = Callable[..., TolariaGovernor]

MANUAL = ["snapshot", "rollback", "verified rollback"]
AUTOMATIC = ["step with a snapshot", "step with a rollback"]


class At:
    """Performs the operations of a driver, and does something of its own before or after the k-th one.

    Only operations of submissions count (they come with a shield), so the sections of forwards and steps do not.
    """

    def __init__(self, governor: TolariaGovernor, index: int, act: Callable[[], Any], when: str = "before") -> None:
        self.seen: list[Op] = []
        self.acted = 0
        self._index, self._act, self._when = index, act, when
        self._driver = governor._keeper.driver
        self._perform = self._driver.perform
        self._driver.perform = self  # type: ignore[method-assign]

    def __call__(self, op: Op, shield: Any = None) -> Any:
        if shield is None:
            return self._perform(op, shield)
        self.seen.append(op)
        if len(self.seen) - 1 != self._index:
            return self._perform(op, shield)
        self.acted += 1
        if self._when == "before":
            self._act()
            return self._perform(op, shield)
        result = self._perform(op, shield)
        self._act()
        return result

    def remove(self) -> None:
        del self._driver.perform


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


class Scene:
    """A run with a certified snapshot, a few steps further on, and one thing that is about to be done."""

    def __init__(self, kit: Any, govern: Govern, what: str) -> None:
        self.run = kit.Run()
        self.what = what
        self.governor = govern(
            self.run.model,
            self.run.optimizer,
            scheduler=self.run.scheduler,
            detector=kit.scripted({4: "panic"} if what == "step with a rollback" else {}),
            config=GovernorConfig(cadence=4 if what == "step with a snapshot" else 100, probation=2, slots=4),
        )
        self.feed = self.governor.watch(self.run.batches)
        first = next(self.feed)
        self.good = self.run.state()  # of the snapshot that `watch` took
        self.run.step(self.governor, first)
        for _ in range(2):
            self.run.step(self.governor, next(self.feed))
        self.loss = self.run.backward(next(self.feed)) if what.startswith("step") else None
        self.before = self.run.state()

    def act(self) -> Any:
        if self.what == "snapshot":
            return self.governor.snapshot()
        if self.loss is not None:
            result = self.governor.step(loss=self.loss)
            if self.what == "step with a snapshot":
                next(self.feed)  # the end of the loop body, where the snapshot is taken
            return result
        return self.governor.execute_rollback(verify="before" if self.what.startswith("verified") else None)

    @property
    def certified(self) -> list[int]:
        return [slot.step for slot in self.governor._keeper.ring if slot.phase is SlotPhase.CERTIFIED]


def operations_of(kit: Any, govern: Govern, what: str) -> list[Op]:
    scene = Scene(kit, govern, what)
    at = At(scene.governor, -1, interrupt)
    scene.act()
    at.remove()
    scene.governor.close()
    return at.seen


EXPECTED = {
    "snapshot": {Change, Await, Survey, Reserve, Copy, CaptureHost, Inspect},
    "rollback": {Change, Await, Check, Copy, RestoreHost},
    "verified rollback": {Change, Await, Check, Copy, RestoreHost, ReadLive, Inspect},
    "step with a snapshot": {Change, Await, Survey, Reserve, Copy, CaptureHost, Inspect},
    "step with a rollback": {Change, Await, Check, Copy, RestoreHost, ReadLive, Inspect},
}


@pytest.mark.parametrize("what", [*MANUAL, *AUTOMATIC])
def test_every_kind_of_operation_is_met(what: str, govern: Govern, kit: Any) -> None:
    seen = operations_of(kit, govern, what)
    assert {type(op) for op in seen} == EXPECTED[what]
    assert len(seen) >= 9


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", [*MANUAL, *AUTOMATIC])
def test_an_interrupt_at_every_operation(what: str, when: str, govern: Govern, kit: Any) -> None:
    operations = operations_of(kit, govern, what)
    for index, op in enumerate(operations):
        scene = Scene(kit, govern, what)
        governor, run = scene.governor, scene.run
        handler = signal.getsignal(signal.SIGINT)
        at = At(governor, index, interrupt, when)
        with pytest.raises(KeyboardInterrupt):
            scene.act()
        at.remove()
        assert at.acted == 1, op
        assert signal.getsignal(signal.SIGINT) is handler
        kit.assert_at_rest(governor)
        assert not governor._keeper.driver.state.torn
        assert scene.certified[:1] == [0], f"the certified snapshot is gone after an interrupt at {op}"

        state = run.state(with_rng=False)
        entered = [type(one) for one in operations].index(Await)
        early = index < entered or (index == entered and when == "before")
        if what in ("rollback", "verified rollback"):
            assert (run.state() == scene.before) if early else (run.state() == scene.good), op
        elif what == "snapshot":
            assert run.state() == scene.before
            assert len(scene.certified) == 1
            taken = newest_good(governor._keeper.ring)
            assert taken is not None
            assert taken.step == (0 if early else 3), op
        elif what == "step with a rollback" and not early:
            assert run.state() == scene.good, op

        run.optimizer.zero_grad()
        info = governor.snapshot(step=99)
        assert info.state == "sealed"
        run.plain_step(run.batches[9])
        governor.execute_rollback()
        assert run.state(with_rng=False) == state
        assert governor.execute_rollback(to=0).certified
        assert run.state() == scene.good
        governor.close()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_loop_that_catches_the_interrupt_of_a_recovery_goes_on_exactly(when: str, govern: Govern, kit: Any) -> None:
    """A rollback that was completed is accounted for: the batches come again, and the ledger has its line."""
    clean = kit.Run()
    for batch in clean.batches:
        clean.plain_step(batch)
    operations = operations_of(kit, govern, "step with a rollback")
    entered = [type(one) for one in operations].index(Await)
    for index in range(entered + 1, len(operations)):
        scene = Scene(kit, govern, "step with a rollback")
        at = At(scene.governor, index, interrupt, when)
        with pytest.raises(KeyboardInterrupt):
            scene.act()
        at.remove()
        assert scene.governor.statistics().rollbacks == 1
        for batch in scene.feed:
            scene.run.step(scene.governor, batch)
        assert scene.run.state() == clean.state(), operations[index]
        scene.governor.close()


@pytest.mark.parametrize("what", ["rollback", "verified rollback"])
def test_an_interrupted_manual_rollback_is_accounted_for(what: str, govern: Govern, kit: Any) -> None:
    operations = operations_of(kit, govern, what)
    entered = [type(one) for one in operations].index(Await)
    for index in range(entered + 1, len(operations)):
        scene = Scene(kit, govern, what)
        at = At(scene.governor, index, interrupt)
        with pytest.raises(KeyboardInterrupt):
            scene.act()
        at.remove()
        assert scene.governor.statistics().rollbacks == 1
        assert scene.governor.statistics().steps_lost == 3
        scene.governor.close()


def test_ctrl_c_ends_a_wait_for_open_sections(govern: Govern, kit: Any) -> None:
    """Waiting has changed nothing yet and may last: there the signal is not held back."""
    run = kit.Run()
    governor = govern(run.model, run.optimizer, config=GovernorConfig(gate_timeout_s=kit.PATIENCE_S))
    governor.snapshot()
    before = run.state()
    with kit.a_section_elsewhere(governor, lambda _: interrupt()):
        for act in (governor.snapshot, governor.execute_rollback):
            with pytest.raises(KeyboardInterrupt):
                act()
            assert governor._keeper.driver.state.gate.waiting == ()
    assert run.state() == before
    assert governor.execute_rollback().success


def test_numbers_whose_judgement_was_interrupted_are_judged_again(govern: Govern, kit: Any) -> None:
    """As often as it takes, with the memory that the detectors had before them."""
    judged: list[tuple[tuple[int, ...], int]] = []

    def update(seen: tuple[int, ...], signs: Any) -> Any:
        judged.append((seen, signs.step))
        times = sum(step == 4 for _, step in judged) * (signs.step == 4)
        if times in (1, 2):
            interrupt()
        health = Health.PANIC if times == 3 else Health.HEALTHY
        return (*seen, signs.step), Verdict(health, signs.step, "", signs.step)

    run = kit.Run()
    detector = Detector(tuple, update)
    config = GovernorConfig(cadence=100, probation=2)
    governor = govern(run.model, run.optimizer, scheduler=run.scheduler, detector=detector, config=config)
    for batch in governor.watch(run.batches):
        loss = run.backward(batch)
        try:
            governor.step(loss=loss)
        except KeyboardInterrupt:
            run.optimizer.zero_grad()
            assert governor.rollbacks == 0
            assert governor._course.unsettled()[0] > 0
    assert governor.rollbacks == 1
    assert governor.statistics().panics == 1
    assert [one for one in judged if one[1] == 4][:3] == [((1, 2, 3), 4)] * 3


def test_a_panic_that_an_interrupt_has_kept_from_being_answered_is_answered(govern: Govern, kit: Any) -> None:
    scene = Scene(kit, govern, "step with a rollback")
    course = scene.governor._course
    answer, course.answer = course.answer, lambda *_: interrupt()  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        scene.act()
    course.answer = answer  # type: ignore[method-assign]
    assert course.unsettled()[1] is not None
    assert scene.governor.finish()
    assert scene.run.state() == scene.good
    assert course.unsettled() == (0, None)
    assert scene.governor.statistics().panics == 1


class _Signalling(deque[Any]):
    """Calls something when `len` asks it, before it answers. Whether it is empty is no call."""

    def __init__(self, items: Iterable[Any], call: Callable[[], None]) -> None:
        super().__init__(items)
        self._call = call

    def __bool__(self) -> bool:
        return super().__len__() > 0

    def __len__(self) -> int:
        self._call()
        return super().__len__()


@pytest.mark.parametrize("moment", ["judging", "suspending", "counting"])
@pytest.mark.parametrize("rolls_back", [False, True])
def test_a_signal_handler_may_use_the_governor_while_a_step_is_judged(
    rolls_back: bool, moment: str, govern: Govern, kit: Any
) -> None:
    """A checkpoint at SIGTERM reads `state_dict`, which judges what is outstanding."""
    arrived: list[int] = []

    def arrive() -> None:
        if not arrived:
            arrived.append(signal.SIGUSR1)
            signal.raise_signal(signal.SIGUSR1)

    def update(seen: tuple[int, ...], signs: Any) -> Any:
        if signs.step == 3 and moment == "judging":
            arrive()
        health = Health.SUSPECT if signs.step == 3 and moment == "suspending" else Health.HEALTHY
        return (*seen, signs.step), Verdict(health, signs.step)

    run = kit.Run()
    config = GovernorConfig(cadence=2, probation=1)
    governor = govern(run.model, run.optimizer, detector=Detector(tuple, update), config=config)
    course, suspend, account = governor._course, governor._keeper.suspend, governor._course.account

    def suspended() -> None:
        arrive()
        suspend()

    def accounted(sent: Any) -> None:
        account(sent)
        if sent.step == 3 and moment == "counting":
            course._outstanding = _Signalling(course._outstanding, arrive)

    governor._keeper.suspend = suspended  # type: ignore[method-assign]
    course.account = accounted  # type: ignore[method-assign]
    act: Callable[[], object] = governor.execute_rollback if rolls_back else governor.state_dict
    before = signal.signal(signal.SIGUSR1, lambda *_: act() and None)
    try:
        for batch in run.batches[:3]:
            run.step(governor, batch)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert arrived
    assert governor.rollbacks == int(rolls_back)
    assert course._judgement == (1, 2, 3)[: course.completed]
    assert [step for step, _ in course._judged if step > course.completed] == []
    assert course.unsettled() == (0, None)


def test_a_step_whose_verdict_was_being_noted_is_judged_again_from_before_it(
    govern: Govern, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def update(seen: tuple[int, ...], signs: Any) -> Any:
        health = Health.SUSPECT if signs.step == 2 else Health.HEALTHY
        return (*seen, signs.step), Verdict(health, signs.step)

    run = kit.Run()
    governor = govern(run.model, run.optimizer, detector=Detector(tuple, update))
    course, suspend = governor._course, governor._keeper.suspend

    def interrupted() -> None:
        monkeypatch.setattr(governor._keeper, "suspend", suspend)
        interrupt()

    monkeypatch.setattr(Arrived, "skips", lambda arrived, before: before + 1)
    monkeypatch.setattr(governor._keeper, "suspend", interrupted)
    run.step(governor, run.batches[0])
    with pytest.raises(KeyboardInterrupt):
        run.step(governor, run.batches[1])
    run.step(governor, run.batches[2])
    assert course._judgement == (1, 2, 3)
    assert course._skips == 3


def test_a_detector_that_raises_does_so_once(govern: Govern, kit: Any) -> None:
    def update(seen: tuple[int, ...], signs: Any) -> Any:
        if signs.step == 2:
            raise ValueError("detector")
        return (*seen, signs.step), Verdict(Health.HEALTHY, signs.step)

    run = kit.Run()
    governor = govern(run.model, run.optimizer, detector=Detector(tuple, update))
    run.step(governor, run.batches[0])
    with pytest.raises(ValueError, match="detector"):
        run.step(governor, run.batches[1])
    run.step(governor, run.batches[2])
    assert governor._course.unsettled() == (0, None)
    assert governor._course._judgement == (1, 3)


def test_a_panic_of_a_state_that_was_replaced_is_not_answered(govern: Govern, kit: Any) -> None:
    """Whoever loads a checkpoint after Ctrl-C goes on from there."""
    run = kit.Run()
    governor = govern(run.model, run.optimizer, detector=kit.scripted({3: "panic"}))
    for batch in run.batches[:2]:
        run.step(governor, batch)
    saved, course = governor.state_dict(), governor._course
    answer, course.answer = course.answer, lambda *_: interrupt()  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        run.step(governor, run.batches[2])
    course.answer = answer  # type: ignore[method-assign]
    assert course.unsettled()[1] is not None
    governor.load_state_dict(saved)
    assert course.unsettled() == (0, None)
    assert governor.finish() is False
