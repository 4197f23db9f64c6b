"""What follows a panic, decided from values."""

import pytest

from tolaria.recover import Action, RecoveryState, decide, learning_rate_factor

SETTINGS = {"reach": 5, "can_replay": True, "max_retries": 20, "retry_window": 1000}


def panic(state, tick, onset, batch, **settings):
    return decide(state, tick=tick, onset_batch=onset, panic_batch=batch, **{**SETTINGS, **settings})


def test_first_replays_its_return_skips_and_then_an_older_snapshot_is_used():
    state, plan = panic(RecoveryState(), 10, 30, 33)
    assert (plan.action, plan.first_skipped, plan.generations_back) == (Action.REPLAY, None, 0)
    state, plan = panic(state, 20, 30, 33)
    assert (plan.action, plan.first_skipped, plan.generations_back) == (Action.SKIP, 30, 0)
    state, plan = panic(state, 30, 34, 37)  # the window of bad data goes on
    assert (plan.action, plan.first_skipped, plan.generations_back) == (Action.SKIP, 34, 0)
    state, plan = panic(state, 40, 38, 41)
    assert (plan.action, plan.first_skipped, plan.generations_back) == (Action.SKIP, 30, 1)


def test_trouble_further_on_is_new_trouble():
    state, _ = panic(RecoveryState(), 10, 30, 33)
    _, plan = panic(state, 60, 39, 39)  # 33 + reach is 38
    assert (plan.action, plan.attempt) == (Action.REPLAY, 1)
    _, plan = panic(state, 60, 38, 38)
    assert (plan.action, plan.attempt) == (Action.SKIP, 2)


def test_without_kept_batches_there_is_nothing_to_replay():
    _, plan = panic(RecoveryState(), 10, 30, 33, can_replay=False)
    assert (plan.action, plan.first_skipped) == (Action.SKIP, None)


def test_the_budget_counts_within_its_window_only():
    state = RecoveryState()
    for tick in (1, 2, 3):
        state, plan = panic(state, tick, tick * 100, tick * 100, max_retries=3, retry_window=10)
        assert plan.action is not Action.STOP
    assert panic(state, 4, 400, 400, max_retries=3, retry_window=10)[1].action is Action.STOP
    assert panic(state, 12, 400, 400, max_retries=3, retry_window=10)[1].action is not Action.STOP


def test_cool_down_begins_with_the_second_lasting_incident():
    state, _ = panic(RecoveryState(), 10, 30, 30)
    assert not panic(state, 200, 200, 200)[1].cooled  # two transient ones: nobody cools
    state, _ = panic(state, 20, 30, 30)  # lasting
    state, _ = panic(state, 200, 200, 200)
    assert learning_rate_factor(state, 200, 0.5, 100) == 1.0
    state, plan = panic(state, 210, 200, 200)  # the second one
    assert plan.cooled
    factors = [learning_rate_factor(state, tick, 0.5, 100) for tick in (210, 260, 310, 400)]
    assert factors == pytest.approx([0.5, 0.75, 1.0, 1.0])
    assert learning_rate_factor(state, 210, 1.0, 100) == 1.0


def test_what_is_not_the_datas_fault_is_always_replayed_and_still_counted():
    state, _ = panic(RecoveryState(), 10, 30, 33)
    after, plan = panic(state, 20, 30, 33, transient=True)
    assert (plan.action, plan.first_skipped, plan.generations_back) == (Action.REPLAY, None, 0)
    assert after == RecoveryState(ticks=(10, 20), first_batch=30, last_batch=33, attempt=1)
    _, plan = panic(after, 30, 30, 33, transient=True, max_retries=2)
    assert plan.action is Action.STOP
    _, plan = panic(after, 30, 30, 33, transient=True, can_replay=False)
    assert (plan.action, plan.first_skipped) == (Action.SKIP, None)
