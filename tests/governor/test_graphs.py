"""What a captured graph may write must stay where it is: gradients of its backward, state of its optimizer."""

import threading

import pytest
import torch
from torch import nn

from tolaria import CaptureInProgress, StateMismatch, UnsupportedState


@pytest.fixture
def model():
    return nn.Linear(3, 2)


def backward(model):
    model(torch.ones(4, 3)).sum().backward()


def captured(governor, work):
    """Do `work` as a capture of this thread would be announced around it."""
    sections = governor._keeper.sections
    sections.begin_capture(7, threading.get_ident())
    work()
    sections.end_capture(7, succeeded=True)


@pytest.mark.parametrize("by", ["step", "rollback"])
@pytest.mark.parametrize("in_graph", [True, False])
def test_gradients_of_a_captured_backward_are_zeroed_and_others_dropped(by, in_graph, govern, model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    governor = govern(model, optimizer)
    governor.snapshot()
    if in_graph:
        captured(governor, lambda: backward(model))
    else:
        backward(model)
    before = [parameter.grad for parameter in model.parameters()]
    if by == "step":
        governor.step(loss=1.0)
    else:
        governor.execute_rollback()
    after = [parameter.grad for parameter in model.parameters()]
    if in_graph:
        assert all(a is b and not b.any() for a, b in zip(after, before, strict=True))
    else:
        assert after == [None, None]


@pytest.mark.parametrize("in_graph", [True, False])
def test_state_that_a_captured_optimizer_uses_is_not_let_go(in_graph, govern, model):
    optimizer = torch.optim.AdamW(model.parameters())
    governor = govern(model, optimizer)
    early = governor.snapshot()  # no optimizer state yet

    def step():
        backward(model)
        optimizer.step()
        optimizer.zero_grad()

    step()
    if in_graph:
        captured(governor, step)
        before = governor.digest()
        with pytest.raises(StateMismatch, match="a graph captured since then uses its memory"):
            governor.execute_rollback(to=early)
        assert governor.digest() == before
    else:
        captured(governor, lambda: backward(model))  # a graph without the optimizer needs none of its state
        assert governor.execute_rollback(to=early).success
        assert not optimizer.state


def test_state_that_was_let_go_of_before_is_no_obstacle(govern, model):
    """A layer that a captured graph uses leaves the model: snapshots from after that can be restored."""
    governor = govern(model)
    early = governor.snapshot()
    late = torch.nn.Parameter(torch.zeros(2))
    model.register_parameter("late", late)
    captured(governor, lambda: backward(model))
    with pytest.raises(StateMismatch, match=r"model\.late did not exist, and a graph captured since"):
        governor.execute_rollback(to=early)
    del model.late
    assert governor.execute_rollback(to=governor.snapshot(grads="drop")).success
    assert governor.execute_rollback(to=early).success


def test_during_a_capture_requests_are_refused_or_queued(govern, model):
    governor = govern(model)
    governor.snapshot()

    def inside():
        for call in (governor.snapshot, governor.execute_rollback):
            with pytest.raises(CaptureInProgress):
                call()

    captured(governor, inside)
    assert governor.execute_rollback().success


def test_a_governed_step_is_no_part_of_a_graph(govern, model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    governor = govern(model, optimizer)
    governor.snapshot()
    before = governor.digest()
    backward(model)

    def inside():
        with pytest.raises(UnsupportedState, match="capturing a CUDA graph"):
            governor.step(loss=1.0)

    captured(governor, inside)
    assert governor.digest() == before
    assert governor.statistics().steps == 0
    assert all(parameter.grad is not None for parameter in model.parameters())
    governor.step(loss=1.0)
    assert governor.statistics().steps == 1


def test_a_replay_is_a_write_section(govern, model):
    governor = govern(model)
    with governor._keeper.sections.replaying():
        assert governor._keeper.driver.depth() == 1
    assert governor._keeper.driver.depth() == 0


def test_gradients_are_not_read_during_a_capture(govern, kit, monkeypatch):
    """Reading waits for the device, and would invalidate it: the snapshot is refused for the capture anyway."""
    run = kit.Run()
    governor = govern(run.model, run.optimizer)
    run.backward(run.batches[0])
    state, driver = governor._keeper.state, governor._keeper.driver
    monkeypatch.setattr(state, "has_live_gradients", lambda: pytest.fail("gradients were read"))
    driver.begin_capture(7, -1, False, 1.0)
    with pytest.raises(CaptureInProgress):
        governor.snapshot()
    driver.end_capture(7)
    with pytest.raises(pytest.fail.Exception):
        governor.snapshot()
