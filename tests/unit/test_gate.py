"""The gate as plain functions."""

import pytest

from tolaria.errors import PhaseError
from tolaria.gate import (
    GateState,
    announce_exclusive,
    enter_exclusive,
    enter_section,
    leave_exclusive,
    leave_section,
)


def test_sections_nest_and_close_to_an_absolute_depth():
    state = enter_section(enter_section(GateState(), 1, False), 1, False)
    assert state.depth(1) == 2
    assert leave_section(state, 1, 1).depth(1) == 1
    assert leave_section(state, 1, 0) == GateState()
    assert leave_section(GateState(), 1, 0) == GateState()  # closing twice changes nothing


def test_several_threads_share():
    state = enter_section(enter_section(GateState(), 1, False), 2, False)
    assert dict(state.sections) == {1: 1, 2: 1}


def test_exclusive_waits_for_sections_and_sections_wait_for_it():
    state = announce_exclusive(enter_section(GateState(), 1, False), 2, "test")
    assert enter_exclusive(state, 2) is None
    owned = enter_exclusive(leave_section(state, 1, 0), 2)
    assert owned.owner == 2
    assert owned.waiting == ()
    assert enter_section(owned, 1, False) is None
    assert enter_section(owned, 1, True) is None  # autograd passes those who wait, not those who hold


def test_a_waiting_request_keeps_new_sections_out_but_not_nested_or_autograd_ones():
    state = announce_exclusive(enter_section(GateState(), 1, False), 2, "test")
    assert enter_section(state, 3, False) is None
    assert enter_section(state, 1, False).depth(1) == 2
    assert enter_section(state, 3, True).depth(3) == 1


def test_the_owner_may_open_sections_of_its_own():
    owned = enter_exclusive(announce_exclusive(GateState(), 1, "test"), 1)
    assert enter_section(owned, 1, False).depth(1) == 1


@pytest.mark.parametrize(
    "state", [enter_section(GateState(), 1, False), GateState(owner=1)], ids=["inside a section", "submitting"]
)
def test_a_thread_never_waits_for_itself(state):
    with pytest.raises(PhaseError, match="test:"):
        announce_exclusive(state, 1, "test")


def test_leaving_is_idempotent_and_withdraws_an_announcement():
    state = announce_exclusive(GateState(owner=3), 1, "test")
    assert leave_exclusive(state, 1) == GateState(owner=3)
    assert leave_exclusive(GateState(owner=1), 1) == GateState()
    assert leave_exclusive(GateState(), 1) == GateState()
