"""Which past do gradients belong to? The rules as plain functions."""

from dataclasses import replace

from tolaria.gradients import are_gradients_stale, begin_backward, end_backward, forget_gradients
from tolaria.operations import HostState

OUTSIDE = -1


def roll_back(state):
    return replace(state, epoch=state.epoch + 1, grad_epoch=None)


def backward(state, token, epoch):
    state, is_new = begin_backward(state, token, epoch)
    assert is_new
    return end_backward(state, token, epoch)[0]


def test_gradients_of_this_epoch_are_fresh():
    assert not are_gradients_stale(backward(HostState(), 1, 0), OUTSIDE)


def test_a_pass_that_ends_after_a_rollback_is_stale():
    state, _ = begin_backward(HostState(), 1, 0)
    state, _ = end_backward(roll_back(state), 1, 0)
    assert are_gradients_stale(state, OUTSIDE)


def test_a_pass_that_ended_before_a_rollback_is_forgotten():
    state = roll_back(backward(HostState(), 1, 0))
    assert not are_gradients_stale(state, OUTSIDE)
    assert not are_gradients_stale(backward(state, 2, 1), OUTSIDE)


def test_a_forward_before_and_a_backward_after_a_rollback_is_stale():
    assert are_gradients_stale(backward(roll_back(HostState()), 1, 0), OUTSIDE)


def test_one_old_graph_among_new_ones_makes_the_sum_stale():
    state = backward(roll_back(HostState()), 1, 1)
    assert are_gradients_stale(backward(state, 2, 0), OUTSIDE)


def test_a_pass_that_reaches_graphs_of_two_epochs_counts_as_the_older():
    state, first = begin_backward(roll_back(HostState()), 1, 1)
    state, again = begin_backward(state, 1, 0)
    assert (first, again) == (True, False)
    assert are_gradients_stale(end_backward(state, 1, 1)[0], OUTSIDE)


def test_an_optimizer_inside_a_backward_asks_about_that_pass():
    state, _ = begin_backward(HostState(), 1, 0)
    assert not are_gradients_stale(state, 1)
    state = roll_back(state)
    assert are_gradients_stale(state, 1)
    assert not are_gradients_stale(state, 2)
    # refused once, the rest of the same pass is refused as well
    assert are_gradients_stale(forget_gradients(state, 1)[0], 1)


def test_a_pass_that_failed_half_way_is_forgotten_by_the_next_step():
    state, _ = begin_backward(HostState(), 1, 0)
    state = forget_gradients(roll_back(state), OUTSIDE)[0]
    assert state.running == ()
    assert not are_gradients_stale(state, OUTSIDE)


def test_a_step_of_another_thread_does_not_launder_a_running_pass():
    state, _ = begin_backward(HostState(), 1, 0)
    state = forget_gradients(roll_back(state), OUTSIDE)[0]  # the other thread steps
    assert are_gradients_stale(end_backward(state, 1, 0)[0], OUTSIDE)
