"""Python signal handlers around a submission: held back, then called in order, once each, and put back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType, SimpleNamespace
from typing import Any

import pytest

import tolaria.driver
import tolaria.shield
from tolaria import TolariaGovernor, gate
from tolaria.driver import Driver
from tolaria.operations import Await, HostState, RestoreHost
from tolaria.report import SnapshotInfo
from tolaria.shield import Shield

Govern = Callable[..., TolariaGovernor]
NUMBERS = (signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1)


class Heard:
    """Handlers of SIGTERM, SIGALRM and SIGUSR1 that note what they get, and raise what they are told to."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, Any]] = []
        self.look: Callable[[], Any] = lambda: None
        self.raises: dict[int, BaseException] = {}

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.calls.append((number, self.look()))
        if number in self.raises:
            raise self.raises[number]

    @property
    def numbers(self) -> list[int]:
        return [number for number, _ in self.calls]


@pytest.fixture
def heard() -> Iterator[Heard]:
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    heard = Heard()
    for number in NUMBERS:
        signal.signal(number, heard)
    yield heard
    kept = {number: signal.getsignal(number) for number in before if number not in NUMBERS}
    for number in NUMBERS:
        signal.signal(number, before[number])
    assert kept == {number: handler for number, handler in before.items() if number not in NUMBERS}


def assert_put_back(heard: Heard) -> None:
    assert [signal.getsignal(number) for number in NUMBERS] == [heard] * 3


@pytest.fixture
def run(kit: Any) -> Any:
    return kit.Run()


@pytest.fixture
def governor(govern: Govern, run: Any) -> TolariaGovernor:
    governor = govern(run.model, run.optimizer)
    governor.snapshot()
    return governor


def during_restore(governor: TolariaGovernor, act: Callable[[], Any]) -> None:
    """Do something once in the middle of the next rollback, when some of the state is back and some is not."""
    driver = governor._keeper.driver
    perform = driver.perform

    def wrapped(op: Any, shield: Any = None) -> Any:
        if isinstance(op, RestoreHost):
            del driver.perform
            act()
        return perform(op, shield)

    driver.perform = wrapped  # type: ignore[method-assign]


def test_handlers_run_after_the_submission_in_order_and_once(
    governor: TolariaGovernor, run: Any, heard: Heard, kit: Any
) -> None:
    good = run.state()
    run.step(governor, run.batches[0])
    arrived: list[list[int]] = []

    def arrive() -> None:
        for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            signal.raise_signal(number)
        arrived.append(heard.numbers)

    heard.look = lambda: (run.state() == good, governor._keeper.driver.state.gate.owner)
    during_restore(governor, arrive)
    governor.execute_rollback()
    assert arrived == [[]]  # not before
    assert heard.numbers == [signal.SIGALRM, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM]
    assert {seen for _, seen in heard.calls} == {(True, None)}  # the state was whole, the gate free
    assert_put_back(heard)
    signal.raise_signal(signal.SIGTERM)
    assert len(heard.calls) == 5


def test_a_handler_that_raises_keeps_none_of_the_others_from_running(
    governor: TolariaGovernor, run: Any, heard: Heard
) -> None:
    """Ctrl-C and a pre-emption notice at once: the notice must not be lost."""
    run.step(governor, run.batches[0])
    heard.raises = {signal.SIGALRM: TimeoutError("the user's own")}
    during_restore(governor, lambda: [signal.raise_signal(n) for n in (signal.SIGINT, signal.SIGALRM, signal.SIGTERM)])
    with pytest.raises(TimeoutError) as caught:
        governor.execute_rollback()
    assert isinstance(caught.value.__context__, KeyboardInterrupt)
    assert heard.numbers == [signal.SIGALRM, signal.SIGTERM]
    assert_put_back(heard)


def test_a_handler_may_use_the_governor(governor: TolariaGovernor, run: Any, heard: Heard) -> None:
    """A pre-emption handler that snapshots or rolls back runs when the submission is over, so it may."""
    good = run.state()
    run.step(governor, run.batches[0])
    heard.look = lambda: (governor.execute_rollback().success, governor.snapshot(step=50).state)
    during_restore(governor, lambda: signal.raise_signal(signal.SIGTERM))
    governor.execute_rollback()
    assert heard.calls == [(signal.SIGTERM, (True, "sealed"))]
    assert run.state() == good
    assert governor.statistics().rollbacks == 2


LOCKS: dict[str, Callable[[TolariaGovernor], Any]] = {
    "host state": lambda governor: governor._keeper.driver._lock,
    "statistics": lambda governor: governor._course._tally._lock,
    "what arrives": lambda governor: governor._keeper.arrivals._noting,
}


def _assert_lets_in(lock: Any) -> None:
    assert lock.acquire(blocking=False), "the handler would wait for its own thread"
    lock.release()


@pytest.mark.parametrize("name", LOCKS)
def test_a_handler_may_use_the_governor_whatever_its_thread_holds(
    name: str, governor: TolariaGovernor, run: Any, heard: Heard
) -> None:
    """A checkpoint at SIGTERM would otherwise wait for the very thread that it has interrupted, for ever."""
    good, lock = run.state(), LOCKS[name](governor)
    run.step(governor, run.batches[0])

    def use() -> bool:
        _assert_lets_in(lock)
        governor.state_dict()
        return governor.snapshot(step=50).state == "sealed" and governor.execute_rollback(to=0, verify="after").success

    heard.look = use
    with lock:
        signal.raise_signal(signal.SIGTERM)
    assert heard.calls == [(signal.SIGTERM, True)]
    assert run.state() == good
    assert governor.statistics().rollbacks == 1


def _made_of_the_state_before(self: Driver, function: Callable[[HostState], Any]) -> Any:
    made = function(self.state)
    if made is not None:
        self.state = made[0]
    return made


@pytest.mark.parametrize("is_red", [False, True])
def test_what_a_handler_changes_amid_a_change_is_not_lost(
    is_red: bool, governor: TolariaGovernor, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The red twin does not look again, and the handler's snapshot is gone."""
    taken: list[SnapshotInfo] = []
    enter = gate.enter_section

    def interrupted(*arguments: Any) -> Any:
        after = enter(*arguments)
        if not heard.calls:
            signal.raise_signal(signal.SIGTERM)
        return after

    def take() -> None:
        _assert_lets_in(governor._keeper.driver._lock)
        taken.append(governor.snapshot(step=50))

    heard.look = take
    monkeypatch.setattr(gate, "enter_section", interrupted)
    if is_red:
        monkeypatch.setattr(Driver, "_made", _made_of_the_state_before)
    with governor.using():
        assert governor._keeper.driver.depth() == 1
    assert heard.numbers == [signal.SIGTERM]
    assert [info.state for info in taken] == (["dropped"] if is_red else ["sealed"])
    if not is_red:
        assert governor.execute_rollback(to=taken[0]).snapshot_step == 50


@pytest.fixture
def held_open(governor: TolariaGovernor, kit: Any) -> Iterator[None]:
    """A section of another thread, which ends as soon as this one waits for it."""
    with kit.a_section_elsewhere(governor, lambda leave: leave.set()):
        yield


def test_the_time_of_a_handler_is_not_waited_for_sections(
    held_open: None, governor: TolariaGovernor, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that arrives before the wait, and writes a checkpoint for longer than `gate_timeout_s`."""
    seconds = [0.0]
    monkeypatch.setattr(tolaria.driver, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    driver = governor._keeper.driver
    perform = driver.perform

    def wrapped(op: Any, shield: Any = None) -> Any:
        if isinstance(op, Await) and not heard.calls:
            signal.raise_signal(signal.SIGTERM)
        return perform(op, shield)

    def write_a_checkpoint() -> None:
        seconds[0] += 1e6

    heard.look = write_a_checkpoint
    monkeypatch.setattr(driver, "perform", wrapped)
    report = governor.execute_rollback()
    assert report.success
    assert report.wait_ms == 0.0
    assert heard.numbers == [signal.SIGTERM]


def test_what_arrives_as_a_wait_ends_is_for_after_the_submission(
    held_open: None, governor: TolariaGovernor, heard: Heard
) -> None:
    """The gate is taken by then, so that the handler could not use the governor."""
    driver, notify_all = governor._keeper.driver, governor._keeper.driver._changed.notify_all

    def notified() -> None:
        if driver.state.gate.owner == threading.get_ident() and not raised:
            raised.append(True)
            signal.raise_signal(signal.SIGTERM)
        notify_all()

    raised: list[bool] = []
    heard.look = lambda: governor.snapshot(step=50).state
    driver._changed.notify_all = notified  # type: ignore[method-assign]
    assert governor.execute_rollback().success
    driver._changed.notify_all = notify_all  # type: ignore[method-assign]
    assert raised
    assert heard.calls == [(signal.SIGTERM, "sealed")]


def test_handlers_run_even_if_the_submission_fails(governor: TolariaGovernor, run: Any, heard: Heard) -> None:
    def fail() -> None:
        signal.raise_signal(signal.SIGTERM)
        raise ValueError("boom")

    governor.register("bad", (fail, lambda _: None))
    with pytest.raises(ValueError, match="boom"):
        governor.snapshot()
    assert heard.numbers == [signal.SIGTERM]
    assert_put_back(heard)


def test_other_threads_neither_hold_back_nor_touch_handlers(
    governor: TolariaGovernor, run: Any, heard: Heard, kit: Any
) -> None:
    run.step(governor, run.batches[0])
    seen: list[Any] = []

    def act() -> None:
        seen.append([signal.getsignal(number) for number in NUMBERS])
        signal.raise_signal(signal.SIGTERM)

    during_restore(governor, act)
    assert kit.Worker(governor.execute_rollback).join().success
    assert seen == [[heard] * 3]
    for _ in range(100):  # Python runs the handler in the main thread, between two of its byte codes
        pass
    assert heard.numbers == [signal.SIGTERM]
    assert_put_back(heard)


def test_the_main_thread_is_not_held_up_by_a_submission_elsewhere(
    governor: TolariaGovernor, run: Any, heard: Heard, kit: Any
) -> None:
    run.step(governor, run.batches[0])
    inside, go_on = kit.Flag(), kit.Flag()

    def act() -> None:
        inside.set()
        go_on.wait()

    during_restore(governor, act)
    worker = kit.Worker(governor.execute_rollback)
    inside.wait()
    signal.raise_signal(signal.SIGTERM)
    assert heard.numbers == [signal.SIGTERM]
    go_on.set()
    assert worker.join().success


# ------------------------------------------------------------ the shield itself


def test_a_nested_shield_hands_on_to_the_outer_one(heard: Heard) -> None:
    with Shield():
        with Shield():
            signal.raise_signal(signal.SIGTERM)
        assert heard.numbers == []
    assert heard.numbers == [signal.SIGTERM]
    assert_put_back(heard)


def test_interruptible_delivers_what_has_arrived_and_what_arrives(heard: Heard) -> None:
    with Shield() as shield:
        signal.raise_signal(signal.SIGTERM)
        with shield.interruptible():
            assert heard.numbers == [signal.SIGTERM]
            signal.raise_signal(signal.SIGUSR1)
            assert heard.numbers == [signal.SIGTERM, signal.SIGUSR1]
        signal.raise_signal(signal.SIGALRM)
        assert len(heard.calls) == 2
    assert heard.numbers == [signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM]
    assert_put_back(heard)


def test_interruptible_loses_nothing_when_a_handler_raises(heard: Heard) -> None:
    heard.raises = {signal.SIGTERM: TimeoutError()}

    def wait() -> None:
        with Shield() as shield:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGUSR1)
            with shield.interruptible():
                raise AssertionError("never reached")

    with pytest.raises(TimeoutError):
        wait()
    assert heard.numbers == [signal.SIGTERM, signal.SIGUSR1]
    assert_put_back(heard)


class _Meddling:
    """Sets handlers, with a signal that arrives right after one of them."""

    def __init__(self, after: int, arrives: int, when: Callable[[Any], bool]) -> None:
        self._after, self._arrives, self._when = after, arrives, when
        self.fired = 0

    def set_handler(self, number: int, handler: Any) -> Any:
        before = signal.signal(number, handler)
        if number == self._after and self._when(handler) and not self.fired:
            self.fired += 1
            signal.raise_signal(self._arrives)
        return before


@pytest.mark.parametrize("after", NUMBERS)
def test_a_handler_that_raises_while_handlers_are_put_back(
    after: int, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is back, so it runs at once; the others come back all the same, and nothing that had arrived is lost."""
    heard.raises = {after: TimeoutError()}
    module = _Meddling(after, after, lambda handler: handler is heard)
    monkeypatch.setattr(tolaria.shield, "_set_handler", module.set_handler)
    late = signal.SIGUSR1 if after != signal.SIGUSR1 else signal.SIGTERM

    def work() -> None:
        with Shield():
            signal.raise_signal(late)

    with pytest.raises(TimeoutError):
        work()
    assert module.fired == 1
    assert sorted(heard.numbers) == sorted([after, late])
    assert_put_back(heard)


@pytest.mark.parametrize("after", NUMBERS)
def test_a_handler_that_raises_while_the_shield_goes_up(
    after: int, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last of the three is not covered yet when the first two are: what they noted is handed on."""
    last = max(NUMBERS)
    heard.raises = {last: TimeoutError()}
    module = _Meddling(after, last, lambda handler: handler is not heard)
    monkeypatch.setattr(tolaria.shield, "_set_handler", module.set_handler)

    def work() -> None:
        with Shield():
            signal.raise_signal(signal.SIGUSR1)

    with pytest.raises(TimeoutError):
        work()
    assert heard.numbers.count(last) == 1
    assert_put_back(heard)


def test_a_handler_that_is_set_while_the_shield_goes_up_comes_back(
    heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler runs between asking for the handlers and covering them, and has set another one for a later signal."""
    first, other = min(NUMBERS), max(NUMBERS)

    def replacement(number: int, frame: object) -> None:
        raise AssertionError("never called")

    class Running(_Meddling):
        def set_handler(self, number: int, handler: Any) -> Any:
            if number == first and not self.fired:
                self.fired += 1
                signal.signal(other, replacement)
            return signal.signal(number, handler)

    monkeypatch.setattr(tolaria.shield, "_set_handler", Running(first, first, bool).set_handler)
    with Shield():
        pass
    assert signal.getsignal(other) is replacement
    signal.signal(other, heard)
    assert_put_back(heard)


def test_a_signal_that_is_left_to_the_system_while_the_shield_goes_up_is_left_to_it(
    heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler that a second Ctrl-C is to end the program, and that runs at the wrong moment."""
    first, other = min(NUMBERS), max(NUMBERS)

    class Running(_Meddling):
        def set_handler(self, number: int, handler: Any) -> Any:
            if number == first and not self.fired:
                self.fired += 1
                signal.signal(other, signal.SIG_IGN)
            return signal.signal(number, handler)

    monkeypatch.setattr(tolaria.shield, "_set_handler", Running(first, first, bool).set_handler)
    with Shield():
        assert signal.getsignal(other) is signal.SIG_IGN
        signal.raise_signal(other)
    assert signal.getsignal(other) is signal.SIG_IGN
    signal.signal(other, heard)
    assert_put_back(heard)


@pytest.mark.parametrize("wanted", [signal.SIG_IGN, signal.default_int_handler])
def test_a_handler_that_another_one_sets_during_a_wait_stays(heard: Heard, wanted: Any) -> None:
    """As of a program that ends at the second Ctrl-C."""
    heard.look = lambda: signal.signal(signal.SIGTERM, wanted)
    with Shield() as shield, shield.interruptible():
        signal.raise_signal(signal.SIGTERM)
    assert heard.numbers == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is wanted
    signal.signal(signal.SIGTERM, heard)
    assert_put_back(heard)


def test_a_handler_that_python_no_longer_knows_ends_in_what_was_asked_for(
    heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    def set_handler(number: int, handler: Any) -> None:
        signal.signal(number, handler)  # answers None, as where a handler was not set by Python

    monkeypatch.setattr(tolaria.shield, "_set_handler", set_handler)
    with Shield():
        signal.raise_signal(signal.SIGUSR1)
    assert heard.numbers == [signal.SIGUSR1]
    assert_put_back(heard)


def test_system_defaults_are_left_alone() -> None:
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    with Shield():
        now = {number: signal.getsignal(number) for number in signal.valid_signals()}
    changed = {number for number in before if now[number] != before[number]}
    assert changed == {number for number, handler in before.items() if callable(handler)}
    assert {number: signal.getsignal(number) for number in signal.valid_signals()} == before
    assert threading.current_thread() is threading.main_thread()
