"""Ctrl-C at every line between the arrival of a step's numbers and the rollback that answers them."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_driver.fake_driver import Machine
from torch import nn

from tolaria import TolariaGovernor
from tolaria.arrivals import Arrivals, Finding, ReadBack
from tolaria.config import Recovery
from tolaria.course import Course
from tolaria.observe import Reading
from tolaria.protocol import Taken
from tolaria.shield import Shield
from tolaria.snapshot import Vault
from tolaria.vitals import Sent

FUNCTIONS = (Reading.wait, Sent.read, Course._judge, Course.catch_up, Course.conclude, Course.answer)
CODES = {function.__code__ for function in FUNCTIONS}
POISONED_AT, BATCHES = 1, 4


class AtLine:
    """Ctrl-C at the k-th line of some functions; counts the lines.

    Args:
        codes: Of the functions.
        index: Counted from 0; -1: never.
    """

    def __init__(self, codes: set[Any], index: int) -> None:
        self.lines: list[tuple[str, int]] = []
        self.raised = 0
        self._codes, self._index = codes, index

    def _enter(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        return self._line if frame.f_code in self._codes else None

    def _line(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any]:
        if event == "line":
            self.lines.append((frame.f_code.co_name, frame.f_lineno))
            if len(self.lines) - 1 == self._index:
                self.raised += 1
                signal.raise_signal(signal.SIGINT)
        return self._line

    def __enter__(self) -> AtLine:
        self._before = sys.gettrace()
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)


def train(make_run: Any, govern: Any, index: int) -> tuple[Any, Any, AtLine, range]:
    """A batch that is not a number; the interrupt comes in the step that sees it, and the loop goes on."""
    run = make_run(BATCHES)
    governor = govern(
        run.model, run.optimizer, scheduler=run.scheduler, cadence=4, probation=2, recovery=Recovery(cool_lr=1.0)
    )
    at = AtLine(CODES, index)
    seen = range(0)
    for batch in governor.watch(run.poisoned(POISONED_AT)):
        loss = run.backward(batch)
        before = len(at.lines)
        try:
            with at:
                governor.step(loss=loss)
        except KeyboardInterrupt:
            run.optimizer.zero_grad()
        if governor.rollbacks and not seen:
            seen = range(before, len(at.lines))
    return run, governor, at, seen


@pytest.mark.slow
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__qualname__)
def test_an_interrupt_at_every_line_loses_no_panic(function: Any, late: Any, govern: Any, make_run: Any) -> None:
    late.lag = 1
    clean = make_run(BATCHES)
    clean.plain()
    expected = clean.state()
    _, governor, at, seen = train(make_run, govern, -1)
    assert governor.rollbacks == 2
    governor.close()
    lines = {at.lines[index]: index for index in reversed(seen) if at.lines[index][0] == function.__name__}
    assert lines
    for line, index in lines.items():
        run, governor, at, _ = train(make_run, govern, index)
        assert at.raised == 1
        assert governor.rollbacks == 2, line
        assert run.state() == expected, line
        assert governor._course.unsettled() == (0, None)
        governor.close()


def test_numbers_that_were_being_read_are_read_again(late: Any, govern: Any, make_run: Any) -> None:
    """The interrupt comes when they have just been taken from page-locked memory."""
    run = make_run(4)
    governor = govern(run.model, run.optimizer)
    reading = governor._readings.send({"loss": torch.tensor(float("nan"))}, {"gradients": [torch.ones(3)]})
    with AtLine({Reading.wait.__code__}, -1) as at:
        reading.wait()
    for index in range(len(at.lines)):
        sent = governor._readings.send({"loss": torch.tensor(2.5)}, {"gradients": [torch.ones(3), torch.zeros(2)]})
        with pytest.raises(KeyboardInterrupt), AtLine({Reading.wait.__code__}, index):
            sent.wait()
        sent.wait()
        assert sent.numbers == {"loss": 2.5}
        assert sent.lists == {"gradients": [1.0, 1.0, 1.0, 0.0, 0.0]}


@pytest.mark.parametrize("what", ["finding", "read back"])
def test_what_is_told_once_is_noted_before_the_interrupt(what: str, late: Any, govern: Any, make_run: Any) -> None:
    """A snapshot that is not finite, and a rollback that was disturbed: Ctrl-C comes while they are counted."""
    run = make_run(4)
    governor = govern(run.model, run.optimizer, cadence=100)
    governor.snapshot()
    course, arrivals = governor._course, governor._keeper.arrivals
    course.catch_up(wait=True)
    late.finish()
    if what == "finding":
        found: Any = SimpleNamespace(nonfinite=("0.weight",))
        arrivals._findings.append(Finding(SimpleNamespace(completed=1, snapshot=7), False, found))  # type: ignore[arg-type]
    else:
        governor.execute_rollback()
        disturbed = ReadBack(next(slot for slot in governor._keeper.ring if slot.is_good), False)
        arrivals.judge = lambda *_: disturbed
    count = course.count

    def counted(**increments: float) -> None:
        count(**increments)
        signal.raise_signal(signal.SIGINT)

    course.count = counted
    with pytest.raises(KeyboardInterrupt):
        course.catch_up(wait=True)
    course.count = count
    reason = {"finding": "non-finite train state", "read back": "a writer disturbed the rollback"}[what]
    assert course.unsettled()[1].reason == reason
    assert course.catch_up(wait=True)[1].reason == reason
    assert course.statistics.panics == 1


@pytest.mark.parametrize("takes_another", [False, True])
def test_a_signal_handler_may_seal_what_is_about_to_be_sealed(
    takes_another: bool, late: Machine, govern: Callable[..., TolariaGovernor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that reads `state_dict` while it is asked what has arrived, and one that takes a snapshot besides."""
    model = nn.Linear(4, 4)
    governor = govern(model, slots=3, probation=0)
    late.lag = 0
    first, others, examined, sealed = governor.snapshot(step=1), [], Vault.is_examined, Arrivals._seal
    heard: list[int] = []
    read: list[int] = []

    def sealing(arrivals: Arrivals, shield: Shield, taken: Taken, manual: bool) -> None:
        read.append(taken.snapshot)
        sealed(arrivals, shield, taken, manual)

    def seal(number: int, _: FrameType | None) -> None:
        heard.append(number)
        governor.state_dict()
        if takes_another:
            late.lag = 1_000
            others.append(governor.snapshot(step=2))

    def is_examined(vault: Vault, index: int) -> bool:
        found = examined(vault, index)
        if not heard:
            signal.raise_signal(signal.SIGUSR1)
        return found

    monkeypatch.setattr(Vault, "is_examined", is_examined)
    monkeypatch.setattr(Arrivals, "_seal", sealing)
    before = signal.signal(signal.SIGUSR1, seal)
    try:
        governor._course.catch_up()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard
    late.lag = 0
    late.finish()
    governor.state_dict()
    assert [info.state for info in (first, *others)] == ["sealed"] * (1 + takes_another)
    assert read == [info.serial for info in (first, *others)]  # each once, or what was found would be told twice
