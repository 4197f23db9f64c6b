"""What arrives late is looked at by the thread that steps, while any other may roll back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from tolaria.arrivals import Arrivals, Finding
from tolaria.errors import QuiesceTimeout
from tolaria.operations import Barrier
from tolaria.ring import Slot, SlotPhase


@dataclass
class Taken:
    """A snapshot, whose number does something when it is first looked at, as another thread might just then."""

    number: int
    meanwhile: Callable[[], Any] | None = None
    completed: int = 5

    @property
    def snapshot(self) -> int:
        act, self.meanwhile = self.meanwhile, None
        if act is not None:
            act()
        return self.number


def finding(number: int, meanwhile: Callable[[], Any] | None = None) -> Any:
    taken: Any = Taken(number, meanwhile)
    return Finding(taken, False, None)


def arrivals(slots: tuple[Slot, ...] = (), on_look: Callable[[], Any] = lambda: None) -> Any:
    """With a device on which everything has arrived, and reads back as it should."""
    driver: Any = SimpleNamespace(
        state=SimpleNamespace(ring=slots, captures=()), submit=lambda *_: SimpleNamespace(intact=True)
    )

    def is_read_back(index: int) -> bool:
        on_look()
        return True

    vault: Any = SimpleNamespace(is_read_back=is_read_back)
    ground: Any = SimpleNamespace(barrier=Barrier.CONTEXT)
    return Arrivals(driver, vault, ground)


def test_a_finding_that_a_rollback_forgets_meanwhile_is_not_told() -> None:
    late = arrivals()
    late._findings.extend([finding(3), finding(4, lambda: late.forget_after(3)), finding(4)])
    assert late.findings(4) == []
    assert [one.taken.number for one in late.findings()] == [3]


def test_a_finding_that_is_told_meanwhile_is_not_forgotten_twice() -> None:
    late = arrivals()
    told: list[Any] = []
    late._findings.extend([finding(3), finding(4, lambda: told.extend(late.findings()))])
    late.forget_after(2)
    assert [one.taken.number for one in told] == [4]
    assert late.findings() == []


@pytest.mark.parametrize("wait", [False, True])
def test_a_rollback_made_while_an_earlier_one_is_looked_at_is_read_back_itself(wait: bool) -> None:
    """Else candidates were certified although nobody has seen whether it is undisturbed."""
    slots = tuple(Slot(index, SlotPhase.CERTIFIED, snapshot=index) for index in range(2))
    earlier, later = (SimpleNamespace(slot=slot) for slot in slots)
    others = [lambda: late.expect_read_back(later)]
    late = arrivals(slots, lambda: others.pop()() if others else None)
    late.expect_read_back(earlier)
    seen = late.read_back(wait=wait)
    assert seen is not None
    assert (seen.slot, seen.intact) == (slots[1], True)
    assert not late.is_unverified
    assert late.read_back() is None


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(), QuiesceTimeout("", "", "")])
def test_a_reading_back_that_is_broken_off_is_told_the_next_time(error: BaseException) -> None:
    late = arrivals((Slot(0, SlotPhase.CERTIFIED, snapshot=0),))
    submit = late._driver.submit

    def interrupted(*_: Any) -> Any:
        late._driver.submit = submit
        raise error

    late._driver.submit = interrupted
    late.expect_read_back(SimpleNamespace(slot=Slot(0, SlotPhase.CERTIFIED, snapshot=0)))
    with pytest.raises(type(error)):
        late.read_back()
    assert late.is_unverified
    seen = late.read_back()
    assert seen is not None
    assert seen.intact
    assert late.read_back() is None


def test_a_newer_rollback_stays_the_one_to_be_read_back() -> None:
    slots = tuple(Slot(index, SlotPhase.CERTIFIED, snapshot=index) for index in range(2))
    earlier, later = (SimpleNamespace(slot=slot) for slot in slots)
    late = arrivals(slots)
    submit = late._driver.submit

    def interrupted(*_: Any) -> Any:
        late._driver.submit = submit
        late.expect_read_back(later)
        raise KeyboardInterrupt

    late._driver.submit = interrupted
    late.expect_read_back(earlier)
    with pytest.raises(KeyboardInterrupt):
        late.read_back(wait=True)
    seen = late.read_back()
    assert seen is not None
    assert seen.slot is slots[1]
