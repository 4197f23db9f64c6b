"""What follows a panic, decided from values."""

import pytest

from tolaria.config import Recovery
from tolaria.recover import Action, Consumption, RecoveryState, cooled, decide, is_known, learning_rate_factor


def panic(state, tick, onset, batch, *, can_replay=True, disagreements=0, **policy):
    policy = Recovery(**policy)
    return decide(
        state,
        policy=policy,
        tick=tick,
        onset_batch=onset,
        panic_batch=batch,
        reach=5,
        can_replay=can_replay,
        disagreements=disagreements,
    )


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
    policy = Recovery(cool_lr=0.5, warm_steps=100)
    state, _ = panic(RecoveryState(), 10, 30, 30)
    assert not panic(state, 200, 200, 200)[1].cools  # two transient ones: nobody cools
    state, plan = panic(state, 20, 30, 30)  # lasting
    assert not plan.cools
    state, plan = panic(state, 200, 200, 200)
    assert not plan.cools
    state, plan = panic(state, 210, 200, 200)  # the second one
    assert plan.cools
    assert learning_rate_factor(state, 150, policy) == 1.0  # nothing is restored yet
    state = cooled(state, plan, 150)
    factors = [learning_rate_factor(state, step, policy) for step in (140, 150, 200, 249, 250, 300)]
    assert factors == pytest.approx([1.0, 0.5, 0.75, 0.995, 1.0, 1.0])
    assert learning_rate_factor(state, 150, Recovery(cool_lr=1.0)) == 1.0
    _, plan = panic(state, 220, 200, 200)  # and again
    assert plan.cools
    assert cooled(state, plan, 140).cooled_at == 140
    again = cooled(state, plan, 200)
    assert [learning_rate_factor(again, step, policy) for step in (149, 199, 200)] == pytest.approx([1.0, 0.745, 0.5])
    undone = cooled(again, plan, 160)
    assert [learning_rate_factor(undone, step, policy) for step in (159, 160, 210)] == pytest.approx([0.545, 0.5, 0.75])


@pytest.mark.parametrize(("second", "cools"), [(1019, True), (1020, False)])
def test_lasting_incidents_far_apart_do_not_cool(second, cools):
    state, _ = panic(RecoveryState(), 10, 30, 30)
    state, _ = panic(state, 20, 30, 30)
    state, _ = panic(state, second - 1, 500, 500)
    assert panic(state, second, 500, 500)[1].cools == cools
    assert not panic(state, second, 500, 500, cool_lr=1.0)[1].cools
    assert panic(state, 1020, 500, 500, cool_after=1)[1].cools


# ------------------------------------------------------------ what a user may want besides


def returned(times, **policy):
    """The plan for the return of a panic at the same place."""
    state, plan = RecoveryState(), None
    for attempt in range(times + 1):
        state, plan = panic(state, 10 * attempt, 30, 33, **policy)
    return state, plan


def test_a_further_window_is_skipped_and_grows_with_every_return():
    policy = {"skip_further": 30, "widen": 3.0, "most_further": 200}
    plans = [returned(times, **policy)[1] for times in range(5)]
    assert [plan.further for plan in plans] == [0, 30, 90, 200, 200]
    assert [plan.skipped for plan in plans[:2]] == [range(0), range(30, 34)]
    assert returned(99, max_retries=1000, **policy)[1].further == 200
    # what comes right behind the window is still the same trouble
    state, _ = returned(1, **policy)
    assert panic(state, 50, 33 + 30 + 5, 70, **policy)[1].attempt == 3
    assert panic(state, 50, 33 + 30 + 6, 70, **policy)[1].attempt == 1
    # nobody who could leave them out
    assert panic(returned(0, **policy)[0], 50, 30, 33, can_replay=False, **policy)[1].further == 0


def test_policies_wait_for_the_return():
    policy = {"go_back": 100, "moments": "damp", "rng": "rekey"}
    _, first = returned(0, **policy)
    assert (first.steps_back, first.moments, first.rekeys) == (0, "keep", False)
    _, second = returned(1, **policy)
    assert (second.steps_back, second.moments, second.rekeys) == (100, "damp", True)
    _, known = panic(RecoveryState(), 10, 30, 33, disagreements=1, **policy)
    assert (known.action, known.steps_back, known.moments, known.rekeys) == (Action.REPLAY, 0, "keep", False)
    _, last = returned(1, max_retries=1, **policy)
    assert (last.action, last.steps_back, last.moments, last.further) == (Action.STOP, 0, "keep", 0)
    assert last.skipped is None


def test_a_first_panic_may_be_skipped():
    _, plan = returned(0, first="skip", go_back=100)
    assert (plan.action, plan.skipped, plan.attempt, plan.steps_back) == (Action.SKIP, range(30, 34), 1, 0)
    assert returned(1, first="skip")[1].attempt == 2


def test_an_older_snapshot_comes_when_the_policy_says():
    assert [returned(times, skips_before_older=0)[1].generations_back for times in range(4)] == [0, 1, 2, 3]
    assert [returned(times, skips_before_older=3)[1].generations_back for times in range(6)] == [0, 0, 0, 0, 1, 2]


def test_which_batches_some_steps_have_consumed():
    taken = Consumption(4)
    for step, batches in ((1, (0,)), (2, (1, 2)), (3, ()), (4, (3,)), (5, (4, 5))):
        taken.note(step, batches)
    assert taken.of(2, 4) == (1, 3)
    assert taken.of(3, 3) is None
    assert taken.of(1, 1) is None  # too long ago
    taken.undo(3)
    assert taken.of(2, 5) == (1, 2)


def test_a_known_trouble_reaches_a_little_beyond_its_last_batch():
    state, _ = panic(RecoveryState(), 10, 30, 33)
    assert is_known(state, 38, 5)
    assert not is_known(state, 39, 5)
    assert not is_known(RecoveryState(), -1, 5)


def test_what_is_not_the_datas_fault_is_always_replayed_and_still_counted():
    state, _ = panic(RecoveryState(), 10, 30, 33)
    after, plan = panic(state, 20, 30, 33, disagreements=3)
    assert (plan.action, plan.first_skipped, plan.generations_back, plan.attempt) == (Action.REPLAY, None, 0, 3)
    assert after == RecoveryState(ticks=(10, 20), first_batch=30, last_batch=33, attempt=1)
    _, plan = panic(after, 30, 30, 33, disagreements=1, max_retries=2)
    assert plan.action is Action.STOP
    _, plan = panic(after, 30, 30, 33, disagreements=1, can_replay=False)
    assert (plan.action, plan.first_skipped) == (Action.SKIP, None)


def test_the_widest_step_of_an_episode():
    taken = Consumption(10)
    for step, batches in ((1, (0, 1, 2)), (2, (3,)), (3, (4, 5)), (4, ())):
        taken.note(step, batches)
    assert [taken.widest(*steps) for steps in ((1, 4), (2, 3), (2, 2), (4, 4), (5, 9))] == [3, 2, 1, 1, 1]
