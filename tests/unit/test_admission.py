"""Sections and captures whose wait fails: what was to be waited for is not forgotten, and nobody is kept out."""

from __future__ import annotations

from typing import Any

import pytest

from tolaria.admission import begin_capture, open_section
from tolaria.operations import Await, CallerWait, Change, ContextWait, HostState, SectionKind
from tolaria.protocol import drive


class Host:
    """Performs what changes the host state; waits fail while `fails`."""

    def __init__(self) -> None:
        self.state = HostState(ring=(), buffers_done=(("d", 1),), all_done=(("d", 2),))
        self.waited: list[Any] = []
        self.fails = True

    def perform(self, op: Any) -> Any:
        if isinstance(op, (Change, Await)):
            answer = op.function(self.state)
            assert answer is not None
            self.state, result = answer
            return (result, 0.0) if isinstance(op, Await) else result
        assert isinstance(op, (ContextWait, CallerWait))
        if self.fails:
            raise RuntimeError("the driver's own")
        self.waited.append(op.event)
        return None


def test_what_everything_could_not_be_made_to_wait_for_is_waited_for_by_the_next() -> None:
    host = Host()
    with pytest.raises(RuntimeError, match="the driver's own"):
        drive(open_section(1, SectionKind.FOREIGN, False), host.perform)
    assert (host.state.all_done, host.state.buffers_done, host.state.ordering) == ((("d", 2),), (("d", 1),), 0)
    host.fails = False
    drive(open_section(2, SectionKind.FOREIGN, False), host.perform)
    assert host.waited == [2]
    assert (host.state.all_done, host.state.buffers_done, host.state.ordering) == ((), (), 0)


def test_a_capture_whose_wait_fails_never_began() -> None:
    host = Host()
    with pytest.raises(RuntimeError, match="the driver's own"):
        drive(begin_capture(1, 7, False), host.perform)
    assert host.state.captures == ()
    host.fails = False
    drive(begin_capture(1, 8, False), host.perform)
    assert (host.state.captures, host.waited) == (((8, 1),), [2])
