"""What follows a panic: replay, then skip, then an older snapshot, then the end; and which batches come again."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from governor.story import Story

from tolaria import (
    Detector,
    GovernorConfig,
    Health,
    Recovery,
    RetryBudgetExceeded,
    StateMismatch,
    TolariaGovernor,
    Verdict,
    VitalSigns,
)
from tolaria.feed import Feed
from tolaria.pace import Pace
from tolaria.state import rng

Govern = Callable[..., TolariaGovernor]


def plain(kit: Any, numbers: Any) -> Any:
    """The state of a run that trained on these batches, and no others, undisturbed."""
    run = kit.Run()
    for number in numbers:
        run.plain_step(run.batches[number])
    return run.state()


ALWAYS = 10_000
EXACT = Recovery(cool_lr=1.0)  # the learning rate stays, whatever lasts


# ------------------------------------------------------------ replay and skip


@pytest.mark.parametrize("bad", range(12))
def test_a_fault_that_does_not_return_is_replayed(bad: int, govern: Govern, kit: Any) -> None:
    """At every place, the first and the last batch of the loader included."""
    expected = plain(kit, range(12))
    story = Story(kit, govern).train(range(12), {bad: 1})
    assert story.actions == ["replay"]
    restored = story.incidents[0].restored_step
    assert story.delivered == [*range(bad + 1), *range(restored, 12)]
    assert story.run.state() == expected
    statistics = story.governor.statistics()
    assert (statistics.replayed_batches, statistics.skipped_batches) == (bad + 1 - restored, 0)


@pytest.mark.parametrize("bad", range(12))
def test_a_batch_that_is_bad_again_is_skipped(bad: int, govern: Govern, kit: Any) -> None:
    """The run then equals one whose data never held that batch."""
    expected = plain(kit, [number for number in range(12) if number != bad])
    story = Story(kit, govern).train(range(12), {bad: ALWAYS})
    assert story.actions == ["replay", "skip"]
    restored = story.incidents[0].restored_step
    assert story.delivered == [
        *range(bad + 1),
        *range(restored, bad + 1),
        *(number for number in range(restored, 12) if number != bad),
    ]
    assert story.run.state() == expected
    assert story.governor.statistics().skipped_batches == 1


def test_two_troubles_are_two(govern: Govern, kit: Any) -> None:
    expected = plain(kit, [number for number in range(20) if number not in (3, 15)])
    story = Story(kit, govern, recovery=EXACT).train(range(20), {3: ALWAYS, 15: ALWAYS})
    assert story.actions == ["replay", "skip", "replay", "skip"]
    assert story.run.state() == expected


def test_the_whole_episode_is_skipped(govern: Govern, kit: Any) -> None:
    """From its onset, which the detector names, to the panic: nothing in between is delivered again."""
    first = {6: "suspect", 7: "suspect", 8: ("panic", 6)}
    again = {10: "suspect", 11: "suspect", 12: ("panic", 6)}  # the same steps, replayed
    story = Story(kit, govern, kit.scripted({**first, **again}), cadence=4, probation=1).train(range(12))
    assert story.actions == ["replay", "skip"]
    assert [incident.restored_step for incident in story.incidents] == [4, 4]
    assert story.delivered == [*range(8), 4, 5, 6, 7, 4, 8, 9, 10, 11]
    assert story.run.state() == plain(kit, [*range(5), *range(8, 12)])


def test_neighbouring_bad_batches(govern: Govern, kit: Any) -> None:
    """A window of garbage: each return skips what it found, until all of it is out."""
    garbage = {5, 6, 7}
    expected = plain(kit, [number for number in range(14) if number not in garbage])
    story = Story(kit, govern, recovery=Recovery(max_retries=10), probation=2).train(
        range(14), dict.fromkeys(garbage, ALWAYS)
    )
    assert story.actions[0] == "replay"
    assert set(story.actions[1:]) == {"skip"}
    assert len(story.delivered) == len(set(story.delivered)) + story.governor.statistics().steps_lost - 3
    assert story.run.state() == expected


# ------------------------------------------------------------ further back, and the end


def test_trouble_that_stays_reaches_further_back(govern: Govern, kit: Any) -> None:
    """The snapshot itself may hold the damage: after one replay and two skips an older one is used."""
    story = Story(kit, govern, kit.scripted(dict.fromkeys(range(9, 13), "panic")), slots=6)
    story.train(range(30))
    assert story.actions == ["replay", "skip", "skip", "skip"]
    steps = [incident.restored_step for incident in story.incidents]
    assert steps[0] == steps[1] == steps[2]
    assert steps[3] < steps[2]
    assert all(incident.certified for incident in story.incidents)


@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize(("later", "attempts"), [(12, [1, 2]), (15, [1, 1])])
def test_the_same_trouble_is_a_matter_of_steps(
    later: int, attempts: list[int], micro: int, govern: Govern, kit: Any
) -> None:
    """However many batches each of them accumulates. Twelve is within the four steps of probation behind nine."""
    left = {9, later}

    def update(state: int, signs: VitalSigns) -> tuple[int, Verdict]:
        bad = signs.step in left
        left.discard(signs.step)
        return state, Verdict(Health.PANIC if bad else Health.HEALTHY, signs.step, "scripted" if bad else "")

    story = Story(kit, govern, Detector(lambda: 0, update), probation=4, recovery=EXACT)
    losses: list[Any] = []
    for number in story.governor.watch(range(20 * micro)):
        losses.append(story.run.backward(story.run.batches[number % 40]))
        if len(losses) == micro:
            story.governor.step(loss=losses)
            losses = []
    assert [incident.attempt for incident in story.incidents] == attempts


def test_the_retry_budget_ends_the_run_at_the_last_good_state(govern: Govern, kit: Any) -> None:
    story = Story(kit, govern, kit.scripted(dict.fromkeys(range(6, 100), "panic")), recovery=Recovery(max_retries=3))
    good: list[Any] = []
    story.governor.register("probe", (lambda: good.append(story.run.state()), lambda _: None))
    with pytest.raises(RetryBudgetExceeded) as caught:
        story.train(range(30))
    assert story.actions == ["replay", "skip", "skip", "stop"]
    assert caught.value.state_intact
    assert story.run.state() in good
    assert "4 panics within 1000 steps" in str(caught.value)
    assert story.governor.statistics().rollbacks == 4
    story.governor.snapshot()  # it can be inspected, saved, or trained on
    story.run.plain_step(story.run.batches[0])


def test_panics_far_apart_do_not_add_up(govern: Govern, kit: Any) -> None:
    panics = dict.fromkeys(range(5, 60, 6), "panic")
    story = Story(kit, govern, kit.scripted(panics), recovery=Recovery(max_retries=2, retry_window=10))
    story.train([number % 40 for number in range(45)])
    assert len(story.actions) == len(panics)
    assert "stop" not in story.actions


def test_the_very_first_step_of_a_loop_without_watch_may_panic(govern: Govern, kit: Any) -> None:
    """`step` takes the first snapshot before it does anything."""
    run = kit.Run()
    governor = govern(run.model, run.optimizer, detector=kit.scripted({1: "panic"}))
    run.backward(run.batches[0])
    before = run.state()
    assert governor.step(loss=1.0).rolled_back
    assert run.state() == before


def test_a_panic_that_cannot_be_answered(govern: Govern, kit: Any) -> None:
    """A parameter lies elsewhere than at every snapshot: the error names it, and nothing was written."""
    run = kit.Run()
    governor = govern(run.model, run.optimizer)
    run.step(governor, run.batches[0])
    run.model[0].weight.data = run.model[0].weight.data.clone()
    run.backward(run.batches[1])
    run.model[4].weight.grad[0, 0] = float("nan")
    before = run.state()
    with pytest.raises(StateMismatch, match=r"0\.weight was given other storage") as caught:
        governor.step(loss=1.0)
    assert caught.value.state_intact
    assert run.state() == before
    assert governor.statistics().rollbacks == 0
    info = governor.snapshot()  # of the new place
    assert governor.execute_rollback().success
    assert info.state == "sealed"


def test_a_loop_without_watch_is_rolled_back_and_goes_on(govern: Govern, kit: Any) -> None:
    run, incidents = kit.Run(), []
    governor = govern(
        run.model,
        run.optimizer,
        scheduler=run.scheduler,
        detector=kit.scripted({5: "panic"}),
        config=GovernorConfig(cadence=2, probation=1, on_incident=incidents.append),
    )
    states = []
    for batch in run.batches[:8]:
        states.append(run.state())
        run.step(governor, batch)
    assert [incident.action for incident in incidents] == ["skip"]  # nobody can deliver its batches again
    assert incidents[0].restored_step == 2
    assert states[5] == states[2]  # the state before the sixth step is that after the second
    assert governor.statistics().replayed_batches == 0


# ------------------------------------------------------------ loaders


@pytest.mark.parametrize("bad", [6, 7, 8])
def test_a_replay_reaches_into_the_last_epoch(bad: int, govern: Govern, kit: Any) -> None:
    """Two epochs of six batches; the snapshot is from the first, the panic in the second."""
    expected = plain(kit, range(12))
    story = Story(kit, govern, cadence=5, probation=1)
    story.train(range(6), {bad: 1}).train(range(6, 12), {bad: 1})
    assert story.actions == ["replay"]
    assert story.incidents[0].restored_step == 5
    assert story.delivered == [*range(bad + 1), *range(5, 12)]
    assert story.run.state() == expected


def test_panics_on_the_last_batches_are_answered_before_the_loader_ends(govern: Govern, kit: Any) -> None:
    expected = plain(kit, range(10))
    story = Story(kit, govern, cadence=4).train(range(10), {8: 1, 9: 1})
    assert story.actions == ["replay", "skip"]  # so soon after the first, it counts as the same trouble
    assert story.run.state() == plain(kit, range(9))
    other = Story(kit, govern, cadence=4).train(range(10), {9: 1})
    assert other.run.state() == expected


def test_a_loop_that_breaks_off_and_begins_again(govern: Govern, kit: Any) -> None:
    """What a panic put back comes first, also from the next `watch` of that loop."""
    expected = plain(kit, range(10))
    story = Story(kit, govern)

    def train(numbers: range, bad: int) -> None:
        for number in story.governor.watch(numbers):
            story.delivered.append(number)
            batch = story.run.batches[number]
            if story.run.step(story.governor, kit.nan_batch(batch) if number == bad else batch).rolled_back:
                break

    train(range(6), bad=5)
    train(range(6, 10), bad=-1)
    assert story.delivered == [*range(6), 4, 5, *range(6, 10)]
    assert story.run.state() == expected


@pytest.mark.parametrize("again", [False, True], ids=["another loader", "the same loader"])
def test_batches_come_again_to_their_own_loop(again: bool, govern: Govern, kit: Any, caplog: Any) -> None:
    """The panic is in the second loop, the snapshot is from the first, whose body will not run any more."""
    story = Story(kit, govern, cadence=4, probation=0)
    first = list(range(6))
    second = first if again else list(range(6, 10))
    for number in story.governor.watch(first):
        story.run.step(story.governor, story.run.batches[number])
    arrived = []
    for number in story.governor.watch(second):
        arrived.append(number)
        bad = len(arrived) == 1
        story.run.step(story.governor, kit.nan_batch(story.run.batches[number]) if bad else story.run.batches[number])
    told = [record.getMessage() for record in caplog.records if "another loop" in record.getMessage()]
    if again:
        assert arrived == [0, 4, 5, 0, 1, 2, 3, 4, 5]
        assert not told
        assert story.run.state() == plain(kit, [*first, *second])
    else:
        assert arrived == [6, 6, 7, 8, 9]
        assert told == ["2 batches do not come again (4 to 5): they belong to another loop than the one that asks"]
        assert story.governor.statistics().skipped_batches == 2
        assert story.run.state() == plain(kit, [0, 1, 2, 3, 6, 7, 8, 9])


def test_a_loop_inside_another_is_handed_no_batch_of_it(govern: Govern, kit: Any) -> None:
    """A panic in the inner loop of the second round, a snapshot in that of the first: no outer batch comes to it."""
    story = Story(kit, govern, cadence=3, probation=0)
    arrived: list[Any] = []
    for name in story.governor.watch("ab"):
        for number in story.governor.watch(range(4)):
            arrived.append((name, number))
            bad = len(arrived) == 6
            batch = story.run.batches[number]
            story.run.step(story.governor, kit.nan_batch(batch) if bad else batch)
    first = [("a", number) for number in range(4)]
    assert arrived == [*first, ("b", 0), ("b", 1), ("b", 3), *(("b", number) for number in range(4))]


def test_two_loops_in_turns_are_handed_their_own_batches_again(govern: Govern, kit: Any) -> None:
    """Two loaders of unequal length, the shorter one begun anew where it ends, as with labelled and unlabelled data."""
    story = Story(kit, govern, cadence=4, probation=0)
    bad = iter([*[False] * 6, True, *[False] * 9])
    arrived: list[tuple[str, int]] = []

    def short() -> Iterator[str]:
        while True:
            yield from story.governor.watch(letters)

    letters = ["x", "y", "z"]
    others = short()
    for number in story.governor.watch(range(10)):
        arrived.append((next(others), number))
        batch = story.run.batches[number]
        story.run.step(story.governor, kit.nan_batch(batch) if next(bad) else batch)
    expected = [("xyz"[number % 3], number) for number in range(10)]
    assert arrived == [*expected[:7], *expected[4:]]
    assert story.run.state() == plain(kit, range(10))


def test_a_loader_that_raises(govern: Govern, kit: Any) -> None:
    def loader() -> Iterator[int]:
        yield from range(3)
        raise OSError("the loader's own")

    story = Story(kit, govern)
    with pytest.raises(OSError, match="own"):
        story.train(loader())
    assert story.delivered == [0, 1, 2]
    story.train(range(3, 6), {4: 1})
    assert story.run.state() == plain(kit, range(6))


def test_an_empty_loader_and_one_that_is_never_asked(govern: Govern, kit: Any) -> None:
    story = Story(kit, govern).train([])
    assert story.governor.execute_rollback().certified
    asked: list[int] = []
    story.governor.watch(iter(asked.append(1) or [1]))
    assert story.governor.statistics().snapshots == 1


def test_a_manual_rollback_lets_the_batches_go_on(govern: Govern, kit: Any) -> None:
    """They are not delivered again, neither now nor by a replay later: the state is that of a run without them."""
    story = Story(kit, govern, cadence=100)
    for number in story.governor.watch(range(10)):
        story.delivered.append(number)
        batch = story.run.batches[number]
        poisoned = number == 6 and story.delivered.count(6) == 1
        story.run.step(story.governor, kit.nan_batch(batch) if poisoned else batch)
        if number == 3 and story.delivered.count(3) == 1:
            story.governor.execute_rollback()
    assert story.delivered == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8, 9]
    assert story.run.state() == plain(kit, range(4, 10))


# ------------------------------------------------------------ what cannot be replayed


def test_a_replay_beyond_keep_batches_becomes_a_skip(govern: Govern, kit: Any) -> None:
    story = Story(kit, govern, cadence=100, keep_batches=3).train(range(10), {6: 1})
    assert story.actions == ["skip"]
    assert "no longer kept (keep_batches=3)" in story.incidents[0].note
    assert (story.incidents[0].batches_replayed, story.incidents[0].batches_skipped) == (0, 7)
    assert story.governor.statistics().skipped_batches == 7
    assert story.delivered == list(range(10))
    assert story.run.state() == plain(kit, range(7, 10))  # back to the start, and on with the next batch


@pytest.mark.parametrize("later", [12, 1])
def test_what_is_kept_follows_the_cadence_in_force(later: int, govern: Govern, kit: Any, monkeypatch: Any) -> None:
    """Snapshots are dear, and 12 steps apart; or cheap from the 24th step on, when the older ones are still there."""
    governor: list[TolariaGovernor] = []

    def cadence(_: Pace) -> int:
        return later if governor and governor[0].statistics().steps >= 24 else 12

    monkeypatch.setattr(Pace, "cadence", property(cadence))
    story = Story(kit, govern, cadence="auto", probation=2)
    governor.append(story.governor)
    story.train(range(30), {24: 1})
    assert (story.actions, story.incidents[0].steps_lost) == (["replay"], 13)
    assert story.run.state() == plain(kit, range(30))


def test_keep_batches_is_just_enough(govern: Govern, kit: Any) -> None:
    story = Story(kit, govern, cadence=100, keep_batches=7).train(range(10), {6: 1})
    assert story.actions == ["replay"]
    assert story.run.state() == plain(kit, range(10))


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict", "nested"])
def test_a_batch_that_was_changed_in_place_becomes_a_skip(form: str, govern: Govern, kit: Any) -> None:
    def wrap(tensor: torch.Tensor) -> Any:
        return {
            "tensor": tensor,
            "tuple": (0, tensor),
            "dict": {"x": tensor, "text": "no tensor"},
            "nested": [{"x": (tensor, None)}],
        }[form]

    run, incidents = kit.Run(), []
    governor = govern(
        run.model,
        run.optimizer,
        detector=kit.scripted({4: "panic"}),
        config=GovernorConfig(cadence=100, on_incident=incidents.append),
    )
    seen = 0
    for batch in governor.watch([wrap(x.clone()) for x, _ in run.batches[:6]]):
        [x] = [leaf for leaf in torch.utils._pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
        seen += 1
        if seen == 2:
            x.mul_(0.5)  # normalised in place
        loss = run.model(x).square().mean()
        loss.backward()
        governor.step(loss=loss)
    assert [incident.action for incident in incidents] == ["skip"]
    assert "1 batches were changed in place" in incidents[0].note
    assert seen == 6


def test_a_changed_batch_that_is_skipped_anyway_is_no_obstacle(govern: Govern, kit: Any) -> None:
    story = Story(kit, govern, cadence=100)
    changed = torch.zeros(3)
    bad = 0
    order = []
    for number, extra in story.governor.watch([(n, changed if n == 4 else torch.zeros(3)) for n in range(8)]):
        order.append(number)
        batch = story.run.batches[number]
        if number == 4:
            bad += 1
            if bad == 2:
                extra.add_(1)
            batch = kit.nan_batch(batch)
        story.run.step(story.governor, batch)
    assert story.actions == ["replay", "skip"]
    assert [incident.note for incident in story.incidents] == ["", ""]
    assert order == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2, 3, 5, 6, 7]


# ------------------------------------------------------------ cool-down


@pytest.mark.parametrize("as_tensor", [False, True])
def test_cool_down_touches_the_rate_during_the_step_only(as_tensor: bool, govern: Govern, kit: Any) -> None:
    rate = torch.tensor(0.05) if as_tensor else 0.05
    run = kit.Run(optimizer=lambda params: torch.optim.SGD(params, lr=rate))
    governor = govern(
        run.model,
        run.optimizer,
        config=GovernorConfig(cadence=2, probation=1, recovery=Recovery(cool_lr=0.5, warm_steps=4), rng="restore"),
    )
    group = run.optimizer.param_groups[0]
    held = group["lr"]
    during: list[float] = []
    run.optimizer.register_step_pre_hook(lambda *_: during.append(float(group["lr"])))
    after: list[float] = []
    bad = {3, 15}
    number = -1
    for number in governor.watch(range(26)):
        batch = run.batches[number]
        run.step(governor, kit.nan_batch(batch) if number in bad else batch)
        after.append(float(group["lr"]))
        assert group["lr"] is held or not as_tensor
    assert number == 25
    base = float(torch.tensor(0.05)) if as_tensor else 0.05
    assert set(after) == {base}
    cooled = [value for value in during if value != base]
    assert cooled == pytest.approx([base * factor for factor in (0.5, 0.625, 0.75, 0.875)])
    assert during[-7:] == [base] * 7  # and back, exactly


def test_one_lasting_incident_does_not_cool(govern: Govern, kit: Any) -> None:
    story = Story(kit, govern, recovery=Recovery(cool_lr=0.1))
    rates = set()
    lr = story.run.optimizer.param_groups[0]
    story.run.optimizer.register_step_pre_hook(lambda *_: rates.add(lr["lr"]))
    story.run.scheduler = None
    story.train(range(12), {5: ALWAYS})
    assert story.run.optimizer.param_groups[0]["lr"] in rates
    assert min(rates) > 0.05 * 0.7**4


# ------------------------------------------------------------ whose batches they are


def _installed(source: str) -> Any:
    """A generator function as an installed package has it, such as a progress bar."""
    names: dict[str, Any] = {}
    exec(compile(source, str(Path(sysconfig.get_path("purelib")) / "bar.py"), "exec"), names)
    return names["bar"]


def test_a_progress_bar_around_two_loops_does_not_make_them_one(govern: Govern, kit: Any) -> None:
    bar = _installed("def bar(loader):\n    for batch in loader:\n        yield batch\n")
    story = Story(kit, govern, cadence=4, probation=0)
    for number in bar(story.governor.watch(range(6))):
        story.run.step(story.governor, story.run.batches[number])
    arrived = []
    for number in bar(story.governor.watch(range(6, 10))):
        arrived.append(number)
        batch = story.run.batches[number]
        story.run.step(story.governor, kit.nan_batch(batch) if len(arrived) == 1 else batch)
    assert arrived == [6, 6, 7, 8, 9]


def test_two_loops_at_one_place_that_are_both_under_way_are_two() -> None:
    """As in a `zip`; here the second asks first after the rollback."""
    feed = Feed(10, [], lambda: False)
    first, second = (feed.deliver(batches, lambda _: None) for batches in ("ab", "xy"))
    assert (next(first), next(second)) == ("a", "x")
    feed.consume()
    feed.rewind(0, range(0), restores_random_state=False)
    assert next(second) == "x"
    assert next(first) == "b"


def test_what_was_left_out_is_not_missed_later() -> None:
    feed = Feed(10, [], lambda: False)
    assert list(feed.deliver("ab", lambda _: None)) == ["a", "b"]
    feed.consume()
    feed.rewind(0, range(0), restores_random_state=False)
    other = feed.deliver("xy", lambda _: None)
    assert next(other) == "x"
    feed.consume()
    again = feed.rewind(0, range(0), restores_random_state=False)
    assert (again.replayed, again.note) == (1, "")
    assert next(other) == "x"


def test_what_is_left_out_repeats_no_shuffle() -> None:
    """The rollback has put random state back to before the first loop's shuffle; the second draws another one."""
    torch.manual_seed(3)
    random.seed(3)
    before = rng.read([])
    feed = Feed(10, [], lambda: True)

    def shuffled(letters: str) -> Iterator[str]:
        yield from [letters[index] for index in torch.randperm(len(letters)).tolist()]

    letters = "abcdefgh"
    first = list(feed.deliver(shuffled(letters), lambda _: None))
    feed.consume()
    rng.write(before)
    feed.rewind(0, range(0), restores_random_state=True)
    assert list(feed.deliver(shuffled(letters), lambda _: None)) != first
