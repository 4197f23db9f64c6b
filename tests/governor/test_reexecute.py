"""Steps that are run again: what two executions that differ lead to, and when nothing is run again at all."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tolaria import Incident, RetryBudgetExceeded, TolariaGovernor
from tolaria.config import GovernorConfig, Recovery
from tolaria.reexecute import SILENT
from tolaria.ring import SlotPhase

Govern = Callable[..., TolariaGovernor]

CADENCE = 5
SEED = 11


def undisturbed(kit: Any, batches: int = 30) -> Any:
    run = kit.Run(batches=batches)
    torch.manual_seed(SEED)
    for batch in run.batches:
        run.plain_step(batch)
    return run.state()


class Fit:
    """A governed run whose weights are disturbed at rest, after chosen visits of a batch.

    Args:
        flips: Batch -> the visits (from 1) after which a mantissa bit of a weight flips.
    """

    def __init__(self, kit: Any, govern: Govern, flips: dict[int, set[int]] | None = None, **settings: Any) -> None:
        self.run = kit.Run(batches=settings.pop("batches", 30))
        self.flips = flips or {}
        self.incidents: list[Incident] = []
        self.steps: list[int] = []
        self.visits: dict[int, int] = {}
        config = {"cadence": CADENCE, "probation": CADENCE, "reexecute_every": CADENCE, **settings}
        self.governor = govern(
            self.run.model,
            self.run.optimizer,
            scheduler=self.run.scheduler,
            config=GovernorConfig(**config, on_incident=self.incidents.append),
        )
        torch.manual_seed(SEED)

    def train(self) -> Fit:
        for number, batch in self.governor.watch(list(enumerate(self.run.batches))):
            self.steps.append(self.step(batch).step)
            self.visits[number] = self.visits.get(number, 0) + 1
            if self.visits[number] in self.flips.get(number, ()):
                self.flip()
        return self

    def step(self, batch: Any) -> Any:
        return self.run.step(self.governor, batch)

    def flip(self) -> None:
        self.run.model[0].weight.data.view(torch.int32)[0, 0] ^= 1 << 20

    @property
    def silent(self) -> list[tuple[int, int | None, str]]:
        assert all(incident.reason == SILENT for incident in self.incidents)
        return [(incident.step, incident.restored_step, incident.action) for incident in self.incidents]


# ------------------------------------------------------------ healthy runs


def test_a_healthy_run_is_the_run_without_it(govern: Govern, kit: Any) -> None:
    """Every step is run twice; the first two once more, before anything is trusted."""
    fit = Fit(kit, govern, batches=12).train()
    assert fit.run.state() == undisturbed(kit, 12)
    assert fit.steps == [1, 2, 1, 2, 3, 4, 5, *range(1, 11), *range(6, 11), 11, 12]
    found = fit.governor.statistics()
    assert (found.reexecutions, found.reexecuted_steps) == (3, 12)
    assert (found.rollbacks, found.panics, found.steps_lost, found.replayed_batches) == (0, 0, 0, 0)
    assert fit.incidents == []
    assert fit.governor.capabilities().reexecution == "on"


@pytest.mark.parametrize(
    ("every", "ends"), [(1, [5, 10, 15, 20, 25, 30]), (10, [10, 20, 30]), (12, [15, 25]), (31, [])]
)
def test_the_steps_that_hold_a_multiple_are_run_again(every: int, ends: list[int], govern: Govern, kit: Any) -> None:
    fit = Fit(kit, govern, reexecute_every=every).train()
    back = [(last, first - 1) for last, first in zip(fit.steps, fit.steps[1:], strict=False) if first <= last]
    assert back == [(2, 0), *((end, end - CADENCE) for end in ends)]


def test_what_follows_the_step_in_the_loop_body_is_repeated_too(govern: Govern, kit: Any) -> None:
    states = []
    for every in (0, CADENCE):
        fit = Fit(kit, govern, reexecute_every=every)
        average = torch.optim.swa_utils.AveragedModel(fit.run.model)
        fit.governor.register("average", average)
        for batch in fit.governor.watch(fit.run.batches):
            fit.step(batch)
            average.update_parameters(fit.run.model)
        states.append([fit.run.state(), kit.freeze(average.state_dict())])
        assert fit.governor.statistics().reexecutions == (7 if every else 0)
        fit.governor.close()
    assert states[0] == states[1]


def test_accumulated_batches_come_again_together(govern: Govern, kit: Any) -> None:
    states = []
    for every in (0, CADENCE):
        fit, losses, taken = Fit(kit, govern, reexecute_every=every), [], []
        for batch in fit.governor.watch(fit.run.batches):
            losses.append(fit.run.backward(batch))
            if len(losses) == 2:
                taken.append(fit.governor.step(loss=losses).step)
                losses = []
        states.append(fit.run.state())
        assert fit.governor.statistics().reexecuted_steps == (17 if every else 0)
        assert sorted(set(taken)) == list(range(1, 16))
        fit.governor.close()
    assert states[0] == states[1]


def test_a_loader_that_shuffles_is_not_asked_again(govern: Govern, kit: Any) -> None:
    orders, states = [], []
    for every in (0, CADENCE):
        fit = Fit(kit, govern, reexecute_every=every)
        data = TensorDataset(torch.cat([x for x, _ in fit.run.batches]), torch.cat([y for _, y in fit.run.batches]))
        order: dict[int, Any] = {}
        torch.manual_seed(SEED)
        for _ in range(2):
            for batch in fit.governor.watch(DataLoader(data, batch_size=32, shuffle=True)):
                order[fit.step(batch).step] = kit.freeze(batch)
        orders.append(order)
        states.append(fit.run.state())
        fit.governor.close()
    assert orders[0] == orders[1]
    assert states[0] == states[1]


def test_code_between_two_passes_is_never_skipped(govern: Govern, kit: Any) -> None:
    """A schedule per epoch, and epochs that are shorter than what would be run again."""
    found = []
    for every in (0, 1):
        fit = Fit(kit, govern, reexecute_every=every)
        schedule = torch.optim.lr_scheduler.StepLR(fit.run.optimizer, 1, gamma=0.5)
        fit.governor.register("schedule", schedule)
        for epoch in range(5):
            for batch in fit.governor.watch(fit.run.batches[3 * epoch : 3 * epoch + 3]):
                fit.step(batch)
            schedule.step()
        found.append(fit.run.state())
        # the one before anything is trusted, and what follows a snapshot inside of its own pass
        assert fit.governor.statistics().reexecutions == 4 * every
        fit.governor.close()
    assert found[0] == found[1]


# ------------------------------------------------------------ disturbed ones


@pytest.mark.parametrize("visit", [1, 2], ids=["first", "second"])
@pytest.mark.parametrize("at", [5, 7, 9, 24])
def test_a_flip_at_rest_is_found_and_undone(
    at: int, visit: int, govern: Govern, kit: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "tolaria"):
        fit = Fit(kit, govern, {at: {visit}}).train()
    end = at - at % CADENCE + CADENCE
    assert fit.silent == [(end, end - CADENCE, "replay")]
    assert fit.run.state() == undisturbed(kit)
    assert f"the {'first' if visit == 1 else 'second'} execution was disturbed" in caplog.text
    found = fit.governor.statistics()
    assert (found.rollbacks, found.panics, found.steps_lost) == (1, 1, CADENCE)
    assert fit.governor.capabilities().reexecution == "on"


@pytest.mark.parametrize("visit", [1, 2], ids=["first", "second"])
def test_a_flip_before_anything_is_trusted_does_not_switch_it_off(
    visit: int, govern: Govern, kit: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A third execution tells it from a model that is not deterministic."""
    with caplog.at_level(logging.WARNING, "tolaria"):
        fit = Fit(kit, govern, {0: {visit}}).train()
    assert fit.governor.capabilities().reexecution == "on"
    assert f"the {'first' if visit == 1 else 'second'} execution was disturbed" in caplog.text
    assert fit.run.state() == undisturbed(kit)


def test_a_flip_directly_after_a_rollback_is_found(govern: Govern, kit: Any) -> None:
    fit = Fit(kit, govern)
    step, poisoned, flipped = fit.step, [13], [11]

    def disturbed(batch: Any) -> Any:
        number = fit.governor._course.completed
        if poisoned == [number] and fit.steps.count(12) == 1:
            return step(kit.nan_batch(batch))
        result = step(batch)
        if fit.incidents and flipped == [result.step]:
            flipped.clear()
            fit.flip()
        return result

    fit.step = disturbed  # type: ignore[method-assign]
    fit.train()
    assert [incident.reason for incident in fit.incidents] == ["non-finite loss", SILENT]
    assert fit.run.state() == undisturbed(kit)


@pytest.mark.parametrize(
    "settings", [{"recovery": Recovery(moments="reset")}, {"rng": "fork"}], ids=["moments", "fork"]
)
def test_steps_that_did_not_begin_with_the_snapshot_are_not_compared(
    settings: dict[str, Any], govern: Govern, kit: Any
) -> None:
    """What recovery has changed in the restored state is not in the snapshot: going back would undo it."""
    fit = Fit(kit, govern, **settings)
    dropout = torch.nn.Dropout(0.1)
    step = fit.step
    fit.step = lambda batch: step((dropout(batch[0]), batch[1]))  # type: ignore[method-assign]
    fit.run.batches[12] = kit.nan_batch(fit.run.batches[12])
    fit.train()
    assert [incident.reason for incident in fit.incidents] == ["non-finite loss"] * 2
    assert fit.governor.capabilities().reexecution == "on"


def test_the_steps_after_the_last_snapshot_are_run_again_at_the_end(govern: Govern, kit: Any) -> None:
    fit = Fit(kit, govern, {31: {1}}, batches=32, reexecute_every=1).train()
    assert fit.silent == [(32, 25, "replay")]  # 30 is not certified yet
    assert fit.run.state() == undisturbed(kit, 32)


def test_nobody_else_finds_it(govern: Govern, kit: Any) -> None:
    """The red twin."""
    fit = Fit(kit, govern, {7: {1}}, reexecute_every=0).train()
    assert fit.incidents == []
    assert fit.run.state() != undisturbed(kit)


def test_what_lies_outside_of_the_steps_run_again_is_not_found(govern: Govern, kit: Any) -> None:
    outside = Fit(kit, govern, {12: {1}}, reexecute_every=10).train()
    assert outside.incidents == []
    outside.governor.close()  # random state belongs to one governor
    assert len(Fit(kit, govern, {16: {1}}, reexecute_every=10).train().incidents) == 1


def test_a_flip_between_the_step_and_the_snapshot_is_in_both(govern: Govern, kit: Any) -> None:
    """The next executions start from that snapshot: they agree. Certified all the same: this is no proof of health."""
    fit = Fit(kit, govern, {9: {1, 2}}).train()
    assert fit.incidents == []
    assert fit.run.state() != undisturbed(kit)


@pytest.mark.parametrize("settings", [{}, {"rng": "fork"}], ids=["restore", "fork"])
@pytest.mark.parametrize("visits", [{1, 3}, {2, 3}, {1, 2, 3}], ids=str)
def test_a_second_disturbance_is_outlasted(
    visits: set[int], settings: dict[str, Any], govern: Govern, kit: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Each in its own way: steps are run until two executions agree, with the random draws of the first."""
    fit = restless(Fit(kit, govern, {8: visits}, **settings))
    with caplog.at_level(logging.WARNING, "tolaria"):
        fit.train()
    assert fit.silent == [(10, 5, "replay")] * len(visits)
    assert fit.run.state() == undisturbed(kit)
    assert fit.governor.capabilities().reexecution == "on"
    names = {(1, 3): "first and third", (2, 3): "second and third", (1, 2, 3): "first, second and third"}
    assert f"the {names[tuple(sorted(visits))]} executions were disturbed" in caplog.text
    assert [incident.attempt for incident in fit.incidents] == list(range(1, len(fit.incidents) + 1))
    found = fit.governor.statistics()
    assert (found.panics, found.troubles, found.skipped_batches) == (len(fit.incidents), 1, 0)


def restless(fit: Fit) -> Fit:
    """Its flips differ from each other."""
    noise = torch.Generator().manual_seed(1)
    fit.flip = lambda: fit.run.model[0].weight.data.add_(torch.rand((), generator=noise) * 1e-4)  # type: ignore[method-assign]
    return fit


def test_five_results_switch_it_off(govern: Govern, kit: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A machine that disturbs every execution: the state may be wrong, and an incident says so."""
    fit = restless(Fit(kit, govern, {8: {1, 2, 3, 4, 5}}))
    with caplog.at_level(logging.WARNING, "tolaria"):
        fit.train()
    assert fit.silent == [*[(10, 5, "replay")] * 3, (10, None, "observe")]
    assert "run five times, came to five results" in fit.incidents[-1].note
    assert fit.incidents[-1].note == fit.governor.capabilities().reexecution.removeprefix("off: ")
    assert caplog.text.count("switched off") == 1
    assert fit.steps[-1] == 30


def test_disturbances_without_end_spend_the_retry_budget(govern: Govern, kit: Any) -> None:
    fit = restless(Fit(kit, govern, {8: {1, 2, 3, 4, 5}}, recovery=Recovery(max_retries=2)))
    with pytest.raises(RetryBudgetExceeded, match=SILENT):
        fit.train()
    assert fit.silent == [(10, 5, "replay"), (10, 5, "replay"), (10, 5, "stop")]
    assert fit.governor._course.completed == 5


def test_a_panic_while_steps_are_run_again_is_answered_as_any_other(govern: Govern, kit: Any) -> None:
    fit = Fit(kit, govern)
    step = fit.step

    def poisoned(batch: Any) -> Any:
        second = len(fit.steps) == 14  # the second execution of step 8
        return step(kit.nan_batch(batch) if second else batch)

    fit.step = poisoned  # type: ignore[method-assign]
    fit.train()
    assert [(incident.reason, incident.action) for incident in fit.incidents] == [("non-finite loss", "replay")]
    assert fit.run.state() == undisturbed(kit)
    assert fit.governor.capabilities().reexecution == "on"


def test_differences_count_in_the_retry_budget(govern: Govern, kit: Any) -> None:
    fit = Fit(kit, govern, {7: {1}, 12: {1}, 17: {1}}, recovery=Recovery(max_retries=2))
    with pytest.raises(RetryBudgetExceeded, match=SILENT):
        fit.train()
    assert fit.silent == [(10, 5, "replay"), (15, 10, "replay"), (20, 15, "stop")]


def test_neighbouring_differences_cost_no_batches(govern: Govern, kit: Any) -> None:
    """They are not the data's fault, whatever happened just before."""
    fit = Fit(kit, govern, {7: {1}, 12: {1}, 17: {2}}).train()
    assert [action for _, _, action in fit.silent] == ["replay"] * 3
    assert fit.governor.statistics().skipped_batches == 0
    assert fit.run.state() == undisturbed(kit)


def test_a_corrupted_snapshot_is_passed_over(govern: Govern, kit: Any) -> None:
    """The one to run again from: its older neighbour does as well, and the results still agree."""
    fit = Fit(kit, govern)
    step = fit.step

    def corrupt(batch: Any) -> Any:
        if fit.steps and fit.steps[-1] == 13 and fit.steps.count(13) == 1:
            newest = max(fit.governor._keeper.ring, key=lambda slot: slot.snapshot)
            assert newest.completed == 10
            fit.governor._keeper.vault.slots[newest.index].arena.views[0][1] ^= 1  # type: ignore[union-attr]
        return step(batch)

    fit.step = corrupt  # type: ignore[method-assign]
    fit.train()
    (incident,) = fit.incidents
    assert (incident.step, incident.reason, incident.restored_step) == (15, "corrupted snapshot", 5)
    assert "[10]" in incident.note
    assert fit.run.state() == undisturbed(kit)
    assert fit.governor.capabilities().reexecution == "on"


# ------------------------------------------------------------ when nothing is run again


def test_a_model_that_is_not_deterministic_is_recognised(
    govern: Govern, kit: Any, caplog: pytest.LogCaptureFixture
) -> None:
    fit = Fit(kit, govern)
    noise = torch.Generator().manual_seed(1)
    fit.run.loss = lambda batch: type(fit.run).loss(fit.run, batch) * (1 + torch.rand((), generator=noise) * 1e-3)
    with caplog.at_level(logging.WARNING, "tolaria"):
        fit.train()
    assert fit.incidents == []
    assert fit.steps == [1, 2, 1, 2, *range(1, 31)]
    assert fit.governor.capabilities().reexecution.startswith(
        "off: steps 1 to 2, run three times, came to three results"
    )
    assert caplog.text.count("switched off") == 1


def test_random_state_that_is_kept_makes_dropout_not_deterministic(govern: Govern, kit: Any) -> None:
    fit = Fit(kit, govern, rng="keep").train()
    assert "not deterministic" in fit.governor.capabilities().reexecution
    assert fit.incidents == []


def test_random_state_that_forks_forks_after_panics_only(govern: Govern, kit: Any) -> None:
    fit = Fit(kit, govern, rng="fork").train()
    assert fit.run.state() == undisturbed(kit)
    assert fit.governor.statistics().reexecutions == 7


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"reexecute_every": 0}, "off: not asked for"),
        ({"mode": "observe"}, "off: not asked for"),
        ({"keep_batches": 3}, "off: 2 batches are no longer kept (keep_batches=3)"),
    ],
    ids=["off", "observe", "keep_batches"],
)
def test_it_says_why_not(settings: dict[str, Any], why: str, govern: Govern, kit: Any) -> None:
    fit = Fit(kit, govern, **settings).train()
    assert fit.governor.capabilities().reexecution == why
    assert fit.run.state() == undisturbed(kit)
    assert fit.incidents == []


def test_batches_changed_in_place_cannot_come_again(govern: Govern, kit: Any) -> None:
    fit = Fit(kit, govern)
    for batch in fit.governor.watch([(x.clone(), y) for x, y in fit.run.batches]):
        fit.step(batch)
        batch[0].mul_(2)
    assert "changed in place" in fit.governor.capabilities().reexecution
    assert fit.governor.statistics().steps == 30


def test_several_ranks(govern: Govern, kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tolaria.reexecute.world_size", lambda: 2)
    fit = Fit(kit, govern).train()
    assert "several ranks" in fit.governor.capabilities().reexecution
    assert fit.steps == list(range(1, 31))


def test_a_snapshot_by_hand_is_not_undone(govern: Govern, kit: Any) -> None:
    fit = Fit(kit, govern, batches=15)
    infos = []
    for batch in fit.governor.watch(fit.run.batches):
        if fit.step(batch).step == 7 and len(infos) == 0:
            infos.append(fit.governor.snapshot())
    assert infos[0].state == "sealed"
    assert fit.governor.statistics().reexecuted_steps == 2 + 5 + 5  # 1 to 5 and 11 to 15, but not 6 to 10
    assert fit.run.state() == undisturbed(kit, 15)


def test_a_rollback_by_hand_is_no_base(govern: Govern, kit: Any) -> None:
    """What the body does after it is not in any snapshot."""
    fit = Fit(kit, govern, batches=15)
    for batch in fit.governor.watch(fit.run.batches):
        if fit.step(batch).step == 7 and fit.governor.rollbacks == 0:
            fit.governor.execute_rollback()
            fit.run.model[0].weight.data.mul_(0.5)
    assert {incident.action for incident in fit.incidents} == {"manual"}
    assert fit.governor.capabilities().reexecution == "on"


def test_a_loop_that_fetches_ahead_is_left_alone(govern: Govern, kit: Any, caplog: pytest.LogCaptureFixture) -> None:
    """It holds a batch that would be trained twice."""
    fit = Fit(kit, govern)

    def ahead(batches: Iterator[Any]) -> Iterator[Any]:
        held = next(batches)
        for batch in batches:
            yield held
            held = batch
        yield held

    with caplog.at_level(logging.WARNING, "tolaria"):
        for batch in ahead(fit.governor.watch(fit.run.batches)):
            fit.step(batch)
    assert caplog.text.count("as in a loop that fetches ahead") == 1
    assert fit.governor.statistics().reexecutions == 0
    assert fit.run.state() == undisturbed(kit)


@pytest.mark.parametrize("stays", [True, False])
def test_a_pass_after_one_that_broke_off_inside_its_body_is_compared_too(stays: bool, govern: Govern, kit: Any) -> None:
    """The first step takes the batch that was left over as well, and so says nothing of how its own loop fetches."""
    fit = Fit(kit, govern)
    for number, batch in fit.governor.watch(list(enumerate(fit.run.batches))):
        if number == 8:
            break  # before its step
        fit.step(batch)
    if not stays:
        fit.governor.execute_rollback()
    before = fit.governor.statistics().reexecutions
    fit.train()
    assert fit.governor.statistics().reexecutions - before >= 4


def test_two_loops_at_once_are_left_alone(govern: Govern, kit: Any) -> None:
    fit = Fit(kit, govern)
    other = fit.governor.watch(range(100))
    next(other)
    fit.governor.step(loss=1.0)
    for batch in fit.governor.watch(fit.run.batches):
        fit.step(batch)
    assert fit.governor.statistics().reexecutions == 0


def test_a_rollback_that_is_refused_changes_nothing(
    govern: Govern, kit: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Sections of another thread that stay open: the steps are not run again, and training goes on."""
    fit = Fit(kit, govern, gate_timeout_s=0.01)
    keeper = fit.governor._keeper
    restore = keeper.restore

    def held(*args: Any, **kwargs: Any) -> Any:
        reading = kit.Flag()
        leave = kit.Flag()

        def work() -> None:
            with fit.governor.using():
                reading.set()
                leave.wait()

        worker = kit.Worker(work)
        reading.wait()
        try:
            return restore(*args, **kwargs)
        finally:
            leave.set()
            worker.join()

    monkeypatch.setattr(keeper, "restore", held)
    with caplog.at_level(logging.WARNING, "tolaria"):
        fit.train()
    assert "steps are not run again" in caplog.text
    assert fit.run.state() == undisturbed(kit)
    assert fit.governor.statistics().reexecutions == 0


def test_disabled_steps_are_counted_too(govern: Govern, kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOLARIA_DISABLE", "1")
    assert Fit(kit, govern, batches=3).train().steps == [1, 2, 3]


def test_candidates_stay_in_the_ring(govern: Govern, kit: Any) -> None:
    """Probation longer than the cadence: going back begins it again, and the last certified snapshot stays."""
    fit = Fit(kit, govern, probation=12)
    certified = []
    for batch in fit.governor.watch(fit.run.batches):
        fit.step(batch)
        certified.append(max(s.completed for s in fit.governor._keeper.ring if s.phase is SlotPhase.CERTIFIED))
    assert certified == sorted(certified)
    assert certified[-1] >= 10
    assert fit.run.state() == undisturbed(kit)


def test_a_snapshot_by_hand_is_no_base_when_the_automatic_one_fails(
    govern: Govern, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was taken in the middle of the loop body; what the body does after it would be left out."""
    fit = Fit(kit, govern)
    keeper = fit.governor._keeper
    take = keeper.take

    def failing(*args: Any, manual: bool, **kwargs: Any) -> Any:
        if not manual and fit.steps[-1:] == [10] and fit.steps.count(10) == 2:
            raise MemoryError
        return take(*args, manual=manual, **kwargs)

    monkeypatch.setattr(keeper, "take", failing)
    for batch in fit.governor.watch(fit.run.batches):
        fit.steps.append(fit.step(batch).step)
        if fit.steps[-1] == 10 and fit.steps.count(10) == 2:
            fit.governor.snapshot()
        fit.run.model[0].weight.data.mul_(0.999)
    assert fit.governor.statistics().snapshots_failed == 1
    assert fit.incidents == []
    assert fit.steps[-1] == 30


def test_a_batch_that_is_skipped_meanwhile_leaves_nothing_to_compare(govern: Govern, kit: Any) -> None:
    """It turns bad in the second execution, and stays so: what the first came to is no measure any more."""
    fit = Fit(kit, govern)
    for number, batch in fit.governor.watch(list(enumerate(fit.run.batches))):
        fit.visits[number] = fit.visits.get(number, 0) + 1
        fit.steps.append(fit.step(kit.nan_batch(batch) if number == 7 and fit.visits[7] > 1 else batch).step)
    assert [(incident.reason, incident.action) for incident in fit.incidents] == [
        ("non-finite loss", "replay"),
        ("non-finite loss", "skip"),
    ]
    assert fit.steps[-1] == 29


def test_only_healthy_steps_are_run_again(govern: Govern, kit: Any) -> None:
    """The second step is suspicious: the trial waits for the third."""
    run = kit.Run(batches=4)
    config = GovernorConfig(cadence=CADENCE, reexecute_every=CADENCE)
    governor = govern(run.model, run.optimizer, config=config, detector=kit.scripted({2: "suspect"}))
    assert [result.step for result in run.train(governor)] == [1, 2, 3, 1, 2, 3, 4]
