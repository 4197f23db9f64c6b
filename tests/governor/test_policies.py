"""What a `Recovery` adds to replay and skip, bit for bit against runs that do the same by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from governor.story import Story

from tolaria import GovernorConfig, Recovery, RetryBudgetExceeded, TolariaGovernor, UnsupportedState, recover
from tolaria.follow import FollowingGovernor
from tolaria.judge import non_finite
from tolaria.rounds import Rounds

Govern = Callable[..., TolariaGovernor]
ALWAYS = 10_000


def plain(
    kit: Any,
    numbers: Sequence[int],
    before: Callable[[Any, int], float | None] = lambda run, step: None,
    optimizer: Any = None,
) -> Any:
    """The state of an undisturbed run. `before` is called ahead of each step and may answer a factor on its rate."""
    run = kit.Run(optimizer=optimizer)
    for step, number in enumerate(numbers):
        factor = before(run, step)
        rates = [group["lr"] for group in run.optimizer.param_groups]
        run.backward(run.batches[number])
        for group, rate in zip(run.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1.0 if factor is None else factor)
        run.optimizer.step()
        for group, rate in zip(run.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        run.scheduler.step()
        run.optimizer.zero_grad()
    return run.state()


def without(count: int, *left_out: int) -> list[int]:
    return [number for number in range(count) if number not in left_out]


# ------------------------------------------------------------ the learning rate, on by default


def test_what_replay_or_one_skip_mends_stays_exact_on_defaults(govern: Govern, kit: Any) -> None:
    """Any number of transient faults, and one lasting one: the state is that of the data without that batch."""
    story = Story(kit, govern).train(range(40), {3: 1, 10: 1, 17: ALWAYS, 25: 1, 32: 1})
    assert story.actions == ["replay", "replay", "replay", "skip", "replay", "replay"]
    assert story.run.state() == plain(kit, without(40, 17))
    statistics = story.governor.statistics()
    assert (statistics.troubles, statistics.troubles_returned) == (5, 1)
    assert {incident.lr_factor for incident in story.incidents} == {1.0}


def cooled_from(step: int) -> Callable[[Any, int], float]:
    return lambda _, now: 1.0 if now < step else min(1.0, 0.5 + 0.5 * (now - step) / 100)


def test_the_second_lasting_fault_cools_and_the_rate_warms_back(govern: Govern, kit: Any) -> None:
    story = Story(kit, govern).train(range(30), {3: ALWAYS, 15: ALWAYS})
    assert story.actions == ["replay", "skip", "replay", "skip"]
    assert [incident.lr_factor for incident in story.incidents] == [1.0, 1.0, 1.0, 0.5]
    restored = story.incidents[3].restored_step
    assert restored is not None
    assert story.run.state() == plain(kit, without(30, 3, 15), cooled_from(restored))
    assert story.run.state() != plain(kit, without(30, 3, 15))  # the red twin: never cooled


def test_a_transient_fault_inside_the_cool_down_is_replayed_exactly(govern: Govern, kit: Any) -> None:
    """The rate follows the step and not the clock: a replayed step has the rate that it had."""
    story = Story(kit, govern).train(range(36), {3: ALWAYS, 15: ALWAYS, 26: 1, 33: 1})
    assert story.actions[4:] == ["replay", "replay"]
    restored = story.incidents[3].restored_step
    assert restored is not None
    assert 0.5 < story.incidents[4].lr_factor < story.incidents[5].lr_factor < 1.0
    assert story.run.state() == plain(kit, without(36, 3, 15), cooled_from(restored))


def test_steps_from_before_the_cool_down_are_made_again_at_the_rate_that_they_had(govern: Govern, kit: Any) -> None:
    story = Story(kit, govern, slots=8)
    rates: dict[int, set[float]] = {}

    def note(*_: Any) -> None:
        step = story.governor._course.completed + 1
        rates.setdefault(step, set()).add(story.run.optimizer.param_groups[0]["lr"])

    story.run.scheduler.step = lambda: None
    story.run.optimizer.register_step_pre_hook(note)
    story.train(range(20), {3: ALWAYS, 15: ALWAYS})
    restored = story.incidents[3].restored_step
    assert restored is not None
    story.governor.execute_rollback(to=restored - 2)
    for batch in story.run.batches[20:24]:
        story.run.step(story.governor, batch)
    assert [len(rates[step]) for step in (restored - 1, restored)] == [1, 1]
    assert max(rates[restored + 1]) == 2 * min(rates[restored + 1])


def test_running_steps_again_inside_the_cool_down_finds_nothing(govern: Govern, kit: Any) -> None:
    story = Story(kit, govern, reexecute_every=2).train(range(36), {3: ALWAYS, 15: ALWAYS})
    assert story.actions == ["replay", "skip", "replay", "skip"]
    assert story.governor.capabilities().reexecution == "on"
    assert story.governor.statistics().reexecutions > 3


def test_the_cool_down_goes_into_a_checkpoint(govern: Govern, kit: Any) -> None:
    story = Story(kit, govern).train(range(20), {3: ALWAYS, 15: ALWAYS})
    other = kit.Run()
    resumed = govern(other.model, other.optimizer, config=GovernorConfig(rng="keep"))
    resumed.load_state_dict(story.governor.state_dict())
    assert resumed._course.learning_rate_factor() == story.governor._course.learning_rate_factor() < 1.0
    old = story.governor.state_dict()
    del old["recovery"]["cooled_at"]  # written before there was one
    resumed.load_state_dict(old)
    assert resumed._course.learning_rate_factor() == 1.0


def test_a_framework_s_steps_are_cooled_too(kit: Any) -> None:
    run, incidents = kit.Run(), []
    config = GovernorConfig(cadence=2, probation=1, rng="restore", on_incident=incidents.append)
    governor = FollowingGovernor(
        run.model, run.optimizer, scheduler=run.scheduler, config=config, detector=non_finite()
    )
    with governor:
        for number in governor.watch(range(30)):
            batch = run.batches[number]
            loss = run.backward(kit.nan_batch(batch) if number in (3, 15) else batch)
            governor.gradients_ready(run.optimizer)
            run.optimizer.step()
            run.scheduler.step()
            run.optimizer.zero_grad()
            governor.stepped(loss=loss)
    assert [incident.action for incident in incidents] == ["replay", "skip", "replay", "skip"]
    assert run.state() == plain(kit, without(30, 3, 15), cooled_from(incidents[3].restored_step))


def test_the_rate_is_back_when_a_framework_s_step_raises(kit: Any) -> None:
    run = kit.Run(optimizer=lambda params: torch.optim.SGD(params, lr=0.05))
    with FollowingGovernor(run.model, run.optimizer) as governor:
        governor._course.recovery = recover.RecoveryState(cooled_at=0)
        seen: list[float] = []

        def closure() -> float:
            seen.append(run.optimizer.param_groups[0]["lr"])
            raise OSError("the user's own")

        with pytest.raises(OSError, match="own"):
            run.optimizer.step(closure)
        assert (seen, run.optimizer.param_groups[0]["lr"]) == ([0.025], 0.05)


# ------------------------------------------------------------ a further window


@pytest.mark.parametrize("lookahead", [0, 3])
def test_a_window_after_the_fault_is_left_out(lookahead: int, govern: Govern, kit: Any) -> None:
    """Also where the loader is slow, and where a loop has fetched some of the window before."""
    fetched: list[int] = []

    def loader() -> Iterator[int]:
        for number in range(30):
            fetched.append(number)
            yield number

    story = Story(kit, govern, recovery=Recovery(skip_further=6))
    if lookahead:  # a first rollback makes some of the window wait to be delivered again
        story.train(loader(), {8: ALWAYS, 8 + lookahead: 1})
    else:
        story.train(loader(), {8: ALWAYS})
    assert story.actions == ["replay", "skip"]
    assert fetched == list(range(30))
    assert story.run.state() == plain(kit, without(30, *range(8, 15)))
    assert story.incidents[1].batches_skipped == 7
    assert story.governor.statistics().skipped_batches == 7


def test_without_the_window_it_is_the_episode_alone(govern: Govern, kit: Any) -> None:
    """The red twin."""
    story = Story(kit, govern).train(range(30), {8: ALWAYS})
    assert story.run.state() == plain(kit, without(30, 8))
    assert story.run.state() != plain(kit, without(30, *range(8, 15)))


def test_a_window_reaches_into_the_next_pass(govern: Govern, kit: Any) -> None:
    story = Story(kit, govern, recovery=Recovery(skip_further=4))
    story.train(range(10), {8: ALWAYS}).train(range(10, 20))
    assert story.run.state() == plain(kit, without(20, 8, 9, 10, 11, 12))
    assert story.governor.statistics().skipped_batches == 5


def test_data_that_ends_inside_a_window(govern: Govern, kit: Any) -> None:
    """What was announced is in the incident, what has happened in the statistics."""
    story = Story(kit, govern, recovery=Recovery(skip_further=50)).train(range(10), {8: ALWAYS})
    assert story.run.state() == plain(kit, range(8))
    assert story.incidents[1].batches_skipped == 51
    assert story.governor.statistics().skipped_batches == 2


def test_a_rollback_to_before_a_window_does_not_bring_it_back(govern: Govern, kit: Any) -> None:
    """The batch right after the window is bad, once: the snapshot restored then is from before the window."""
    story = Story(kit, govern, cadence=4, recovery=Recovery(skip_further=3)).train(range(24), {9: ALWAYS, 13: 1})
    assert story.actions == ["replay", "skip", "skip"]  # so close behind, it counts as the same trouble
    assert story.run.state() == plain(kit, without(24, *range(9, 14), *range(14, 20)))
    quiet = Story(kit, govern, cadence=4, recovery=Recovery(skip_further=3)).train(range(24), {9: ALWAYS, 15: 1})
    assert quiet.actions == ["replay", "skip", "replay"]
    assert quiet.run.state() == plain(kit, without(24, *range(9, 13)))


def test_a_window_under_a_loader_that_draws(govern: Govern, kit: Any) -> None:
    """Fetching what is left out draws as well, and a later replay finds the state that followed."""

    def loader() -> Iterator[int]:
        for number in range(30):
            torch.rand(1)
            yield number

    story = Story(kit, govern, recovery=Recovery(skip_further=4)).train(loader(), {6: ALWAYS})
    again = Story(kit, govern, recovery=Recovery(skip_further=4)).train(loader(), {6: ALWAYS, 20: 1})
    assert again.actions == [*story.actions, "replay"]
    assert again.run.state() == story.run.state()


def test_where_a_window_cannot_be_kept_it_is_refused(govern: Govern, kit: Any) -> None:
    run = kit.Run()
    config = GovernorConfig(recovery=Recovery(skip_further=1))
    with pytest.raises(UnsupportedState, match="skip_further=1"):
        FollowingGovernor(run.model, run.optimizer, config=config)
    governor = govern(run.model, run.optimizer, config=config)  # so the one above has let go
    with pytest.raises(UnsupportedState, match="skip_further=1"):
        Rounds(governor)
    other = kit.Run()
    far = govern(other.model, other.optimizer, config=GovernorConfig(recovery=Recovery(go_back=1)))
    with pytest.raises(UnsupportedState, match="go_back=1"):
        Rounds(far)


# ------------------------------------------------------------ further back, and the budget


@pytest.mark.parametrize(("go_back", "restored"), [(0, 18), (3, 18), (4, 16), (6, 14), (1000, 6)])
def test_a_lasting_fault_goes_back_as_far_as_asked(go_back: int, restored: int, govern: Govern, kit: Any) -> None:
    story = Story(kit, govern, slots=8, recovery=Recovery(go_back=go_back)).train(range(30), {20: ALWAYS})
    assert story.actions == ["replay", "skip"]
    assert story.incidents[0].restored_step == 18  # the first panic loses no more than it must
    assert story.incidents[1].restored_step == restored
    assert story.run.state() == plain(kit, without(30, 20))  # all of it comes again, and is kept for that


def test_the_budget_ends_a_run_with_its_last_good_state_and_a_report(govern: Govern, kit: Any, tmp_path: Any) -> None:
    path = tmp_path / "ledger.jsonl"
    recovery = Recovery(max_retries=2, moments="reset", rng="rekey", skip_further=3)
    story = Story(kit, govern, recovery=recovery, ledger=str(path))
    with pytest.raises(RetryBudgetExceeded):
        story.train(range(30), dict.fromkeys(range(8, 30), ALWAYS))
    assert story.actions == ["replay", "skip", "stop"]
    last = story.incidents[-1]
    assert (last.attempt, last.moments, last.certified) == (3, "keep", True)
    assert len(path.read_text().splitlines()) == 3
    model, optimizer = kit.freeze(story.run.model.state_dict()), kit.freeze(story.run.optimizer.state_dict())
    assert last.restored_step == 6
    reference = plain(kit, range(6))
    assert (model, optimizer) == (reference["model"], reference["optimizer"])


# ------------------------------------------------------------ moments

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05),
    "AdamW-amsgrad": lambda p: torch.optim.AdamW(p, lr=0.05, amsgrad=True),
    "Adam-fused": lambda p: torch.optim.Adam(p, lr=0.05, fused=True),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.05),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.05),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.05),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "SGD-plain": lambda p: torch.optim.SGD(p, lr=0.05),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_reset_moments_make_the_next_step_a_first_step(name: str, govern: Govern, kit: Any) -> None:
    """Bit for bit that of an optimizer that has never stepped, in the same tensors."""
    make = OPTIMIZERS[name]
    story = Story(kit, govern, optimizer=make, recovery=Recovery(moments="reset"))
    places: list[Any] = []

    def note(*_: Any) -> None:
        state = story.run.optimizer.state
        places.append({(id(p), key): id(v) for p, entry in state.items() for key, v in entry.items()})

    story.run.optimizer.register_step_post_hook(note)
    story.train(range(20), {9: ALWAYS})
    assert story.actions == ["replay", "skip"]
    restored = story.incidents[1].restored_step
    assert story.incidents[1].moments == "reset"
    assert places[-1] == {**places[0], **places[-1]} == places[4]

    def forget(run: Any, step: int) -> None:
        if step == restored:
            run.optimizer.state.clear()

    assert story.run.state() == plain(kit, without(20, 9), forget, make)
    if name != "SGD-plain":
        assert story.run.state() != plain(kit, without(20, 9), optimizer=make)


@pytest.mark.parametrize("name", ["AdamW", "NAdam", "RMSprop", "SGD"])
def test_damped_moments_are_the_first_ones_scaled(name: str, govern: Govern, kit: Any) -> None:
    make = OPTIMIZERS[name]
    story = Story(kit, govern, optimizer=make, recovery=Recovery(moments="damp", damp=0.25)).train(
        range(20), {9: ALWAYS}
    )
    restored = story.incidents[1].restored_step
    assert [incident.moments for incident in story.incidents] == ["keep", "damp"]

    def scale(run: Any, step: int) -> None:
        if step == restored:
            for entry in run.optimizer.state.values():
                for key in {"exp_avg", "momentum_buffer"} & entry.keys():
                    entry[key] *= 0.25

    assert story.run.state() == plain(kit, without(20, 9), scale, make)
    assert story.run.state() != plain(kit, without(20, 9), optimizer=make)


def test_a_later_rollback_to_the_same_snapshot_finds_its_moments(govern: Govern, kit: Any) -> None:
    """The change is made to the restored state and not to the snapshot."""
    story = Story(kit, govern, recovery=Recovery(moments="reset"))
    seen: list[Any] = []
    story.governor.register("probe", (lambda: None, lambda _: None))
    for number in story.governor.watch(range(14)):
        batch = story.run.batches[number]
        bad = number == 9
        rolled_back = story.run.step(story.governor, story.kit.nan_batch(batch) if bad else batch).rolled_back
        if rolled_back and len(story.incidents) == 2:
            seen.append(kit.freeze(story.run.optimizer.state_dict()))
            report = story.governor.execute_rollback(to=story.incidents[1].restored_step, verify="after")
            assert report.wait().verified
            seen.append(kit.freeze(story.run.optimizer.state_dict()))
    reset, kept = seen
    assert reset != kept
    assert kept == plain(kit, range(story.incidents[1].restored_step or 0))["optimizer"]


@pytest.mark.parametrize(
    ("make", "how"),
    [
        (lambda p: torch.optim.Adagrad(p), "reset"),
        (lambda p: torch.optim.LBFGS(p), "reset"),
        (lambda p: torch.optim.Adadelta(p), "damp"),
        (lambda p: torch.optim.SGD(p, momentum=0.9, dampening=0.1), "damp"),
        (lambda p: type("Mine", (torch.optim.AdamW,), {})(p), "damp"),
    ],
)
def test_moments_that_nobody_knows_are_refused_at_once(make: Any, how: Any, govern: Govern, kit: Any) -> None:
    run = kit.Run(optimizer=make)
    with pytest.raises(UnsupportedState, match=rf"moments='{how}'"):
        TolariaGovernor(run.model, run.optimizer, config=GovernorConfig(recovery=Recovery(moments=how)))
    assert govern(run.model, run.optimizer).snapshot().state == "sealed"


# ------------------------------------------------------------ random state


def test_a_lasting_fault_can_re_key_random_state(govern: Govern, kit: Any) -> None:
    """The first panic replays with the same draws; its return draws others, the same ones in every run."""
    transient = Story(kit, govern, recovery=Recovery(rng="rekey")).train(range(20), {9: 1})
    assert transient.run.state() == plain(kit, range(20))
    restored, first, second = (
        Story(kit, govern, recovery=Recovery(rng=rng)).train(range(20), {9: ALWAYS}).run.state()
        for rng in ("restore", "rekey", "rekey")
    )
    assert restored == plain(kit, without(20, 9))
    assert first == second
    assert first["rng"] != restored["rng"]
    assert first["model"] != restored["model"]  # dropout has drawn
