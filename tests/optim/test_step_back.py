"""A governor goes back by single steps, with what our optimizers leave behind and a note of the rest."""

import contextlib
import copy
import gc
import random
import threading
import weakref

import pytest
import torch
from torch import nn

from tolaria import GovernorConfig, TolariaGovernor, judge, memory, notes
from tolaria.errors import (
    BudgetExceeded,
    InvalidConfig,
    NoSnapshot,
    PhaseError,
    RollbackFailed,
    StateMismatch,
    UnsupportedState,
    UsageError,
)
from tolaria.follow import FollowingGovernor
from tolaria.optim import SGD, AdamW, marks, past
from tolaria.rounds import Rounds
from tolaria.state import parts
from tolaria.values import replace

KINDS = {
    "adamw": lambda p, **own: AdamW(p, lr=0.001, **own),
    "in place": lambda p, **own: AdamW(p, lr=0.001, alternate=False, **own),
    "amsgrad": lambda p, **own: AdamW(p, lr=0.001, amsgrad=True, fused=True, **own),
    "momentum": lambda p, **own: SGD(p, lr=0.001, momentum=0.9, **own),
    "sgd": lambda p, **own: SGD(p, lr=0.001, **own),
}


class Run:
    """Buffers, random state, a schedule, an average of the weights: what a step changes besides the optimizer's own."""

    def __init__(self, make, steps=2, cadence=100, **settings):
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2))
        self.average = torch.optim.swa_utils.AveragedModel(self.model, use_buffers=True)
        self.optimizer = make(self.model.parameters(), history=3)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, gamma=0.5)
        self.batches = [torch.randn(6, 4) for _ in range(16)]
        self.states = []
        self.governor = TolariaGovernor(
            self.model,
            self.optimizer,
            scheduler=self.scheduler,
            config=GovernorConfig(cadence=cadence, past_steps=steps, **settings),
            detector=judge.non_finite(),
        )
        self.governor.register("average", self.average)

    def state(self):
        return self.governor.digest(), tuple(torch.get_rng_state().tolist())

    def loss(self, number):
        loss = self.model(self.batches[number]).square().mean()
        loss.backward()
        return loss

    def train(self, *numbers):
        """By hand, without `watch`: what comes after `step` has to come before it."""
        for number in numbers:
            self.states[number:] = [self.state()]
            self.governor.step(loss=self.loss(number))

    def watch(self, count):
        """By `watch`: the body goes on after `step`."""
        for number, _ in enumerate(self.governor.watch(range(count))):
            self.states[number:] = [self.state()]
            self.governor.step(loss=self.loss(number))
            with self.governor.using():
                self.average.update_parameters(self.model)


@pytest.fixture
def run(alone):
    made = []

    def make(kind="adamw", **settings):
        for one in made:
            one.governor.close()  # random state is rolled back where one governor lives
        made.append(Run(KINDS[kind] if isinstance(kind, str) else kind, **settings))
        return made[-1]

    yield make
    for one in made:
        one.governor.close()


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_back_and_forth(kind, steps, compiled, run, request):
    if compiled:
        request.getfixturevalue("interpreted")
    one = run(kind, steps=3)
    one.train(*range(6))
    last = one.state()
    addresses = [p.data_ptr() for p in one.model.parameters()]
    report = one.governor.step_back(steps)
    assert one.state() == one.states[6 - steps]
    assert (report.success, report.snapshot_step, report.steps_lost, report.tier) == (True, 6 - steps, steps, "past")
    one.train(*range(6 - steps, 6))
    assert one.state() == last
    for back in range(1, steps + 1):  # one by one
        one.governor.step_back()
        assert one.state() == one.states[6 - back]
    one.train(*range(6 - steps, 6))
    assert one.state() == last
    assert [p.data_ptr() for p in one.model.parameters()] == addresses
    assert one.optimizer.kept().compiled == compiled
    assert one.governor.statistics().rollbacks == 1 + steps
    assert report.wait().verified is None


@pytest.mark.parametrize("kind", KINDS)
def test_under_watch_a_note_holds_the_whole_body(kind, run):
    one = run(kind)
    one.watch(5)
    last = one.state()
    one.governor.step_back(2)
    assert one.state() == one.states[3]
    for number in (3, 4):
        one.governor.step(loss=one.loss(number))
        with one.governor.using():
            one.average.update_parameters(one.model)
    assert one.state() == last


def test_a_loop_that_fetches_ahead(run):
    one = run()
    before = {}
    batches = iter(one.governor.watch(range(6)))
    here = next(batches)
    for number in range(6):
        ahead = next(batches, None)
        before[number] = one.state()
        one.governor.step(loss=one.loss(here))
        here = ahead
        if number in (3, 5):
            after = one.state()
            one.governor.step_back(1)
            assert one.state() == before[number]
            one.governor.step(loss=one.loss(number))
            assert one.state() == after


def test_a_later_note_of_the_same_step_takes_the_place_of_the_first(run):
    """The body of the loop went on after it had gone back."""
    one = run(steps=3)
    for number, batch in enumerate(one.governor.watch(range(6))):
        before = one.state()
        one.governor.step(loss=one.loss(batch))
        if number == 1:
            one.governor.step_back(1)
        if number == 2:
            one.governor.step_back(1)
            assert one.state() == before
            break
        with one.governor.using():
            one.average.update_parameters(one.model)


@pytest.mark.parametrize("kind", KINDS)
def test_before_the_very_first_step(kind, run):
    one = run(kind)
    one.watch(1)
    after = one.state()
    one.governor.step_back(1)
    assert one.state() == one.states[0]
    assert not one.optimizer.state_dict()["state"]
    one.governor.step(loss=one.loss(0))
    with one.governor.using():
        one.average.update_parameters(one.model)
    assert one.state() == after


def test_what_optimizers_leave_behind_is_not_copied(run):
    """Of the model's own only the buffers are; the average is a part of its own, and copied whole."""
    one = run()
    one.train(0, 1, 2)
    held = one.governor._keeper.notes
    buffers = sum(b.nbytes for b in one.model.buffers())
    average = sum(t.nbytes for t in (*one.average.parameters(), *one.average.buffers()))
    assert held.num_bytes_held() == 3 * (buffers + average)


def aligned(*tensors):
    return sum(-(-tensor.nbytes // 64) * 64 for tensor in tensors)


def test_a_budget_counts_notes_before_there_are_any(alone):
    """What no optimizer steps, in each of them: a large frozen parameter is in three here, and a small one in none."""
    model = nn.Linear(8, 8)
    model.register_parameter("frozen", nn.Parameter(torch.ones(4096), requires_grad=False))
    slots, notes_of = 3 * aligned(*model.parameters()), 3 * aligned(model.frozen)
    for budget in (slots + notes_of - 1, slots + notes_of):
        optimizer = AdamW([model.weight, model.bias], history=2)
        config = GovernorConfig(past_steps=2, slots=3, host_budget=budget)
        if budget < slots + notes_of:
            with pytest.raises(BudgetExceeded, match="of notes"):
                TolariaGovernor(model, optimizer, config=config, detector=judge.non_finite())
            assert "forward" not in vars(model)
        else:
            with TolariaGovernor(model, optimizer, config=config, detector=judge.non_finite()) as governor:
                assert governor.capabilities().notes_bytes == 0


def test_what_is_counted_is_what_they_take(run):
    one = run(steps=2)
    survey, held = one.governor._keeper.state.survey, one.governor._keeper.notes
    for number in range(5):
        one.train(number)
        assert held.needed_bytes(survey())["host"] >= held.held_bytes()["host"]
        assert one.governor.capabilities().notes_bytes == held.num_bytes_held() > 0
    assert held.needed_bytes(survey()) == held.held_bytes()
    one.loss(5)
    assert held.needed_bytes(survey(gradients=True)) == held.held_bytes()  # notes hold none


def test_what_notes_have_taken_is_not_missed_for_slots(run, monkeypatch):
    """What is available does not include it any more."""
    one = run(steps=2, slots=3)
    one.train(0, 1, 2)
    vault, notes_of = one.governor._keeper.vault, one.governor._keeper.notes
    survey = one.governor._keeper.state.survey()
    needed = 3 * aligned(*(storage.bytes for storage in survey.leaves.storages)) + notes_of.held_bytes()["host"]
    for missing in (0, 1):
        left = needed - vault.held_bytes()["host"] - notes_of.held_bytes()["host"] - missing
        monkeypatch.setattr(memory, "available_host_bytes", lambda left=left: left)
        vault._planned = None
        with pytest.raises(BudgetExceeded, match="are available") if missing else contextlib.nullcontext():
            vault.lay_plan(survey)


def test_without_a_note_of_the_rest_it_is_half_of_two_states(run, monkeypatch):
    monkeypatch.setattr(notes.Notes, "_lay_routes", lambda *_, **__: None)
    one = run()
    one.train(*range(4))
    one.governor.step_back(1)
    assert one.state() != one.states[3]


def test_without_the_optimizers_past_as_well(run, monkeypatch):
    monkeypatch.setattr(marks, "way_back", lambda _: [])
    one = run()
    one.train(*range(4))
    one.governor.step_back(1)
    assert one.state() != one.states[3]


# ---------------------------------------------------------------- further than it goes


def test_as_far_as_notes_and_history_go(run):
    one = run(steps=2)
    one.train(*range(5))
    before = one.state()
    for steps in (0, 3, 6):
        with pytest.raises((NoSnapshot, UsageError)):
            one.governor.step_back(steps)
    assert one.state() == before
    one.governor.step_back(2)
    with pytest.raises(NoSnapshot, match=r"of steps \[3\]"):
        one.governor.step_back(1)
    assert one.state() == one.states[3]


def test_a_rollback_drops_the_notes(run):
    one = run()
    one.train(0, 1)
    one.governor.snapshot()
    kept = one.state()
    one.train(2, 3)
    one.governor.execute_rollback()
    with pytest.raises(NoSnapshot, match=r"of steps \[2\]"):
        one.governor.step_back(1)
    assert one.state() == kept
    one.train(2, 3)
    one.governor.step_back(2)
    assert one.state() == kept


@pytest.mark.parametrize("protected", [True, False])
def test_nothing_is_left_of_the_notes_before_a_rollback(protected, run, monkeypatch):
    """A red twin: one of before would be taken."""
    if not protected:
        monkeypatch.setattr(notes.Notes, "forget", lambda _: None)
    one = run()
    for number, _ in enumerate(one.governor.watch(range(4))):
        one.governor.step(loss=one.loss(number))
        if number == 2:
            one.governor.snapshot()
            one.governor.execute_rollback()
            break
    with pytest.raises(NoSnapshot, match=r"of steps \[3\]") if protected else contextlib.nullcontext():
        one.governor.step_back(1)


def test_notes_of_an_abandoned_future_are_not_taken_for_those_of_the_present(run):
    one = run(steps=3)
    one.train(*range(4))
    one.governor.step_back(2)
    one.governor.step(loss=one.loss(8))  # another batch than the first time
    expected = one.state()
    one.governor.step(loss=one.loss(9))
    one.governor.step_back(1)
    assert one.state() == expected


def test_snapshots_of_its_future_go_with_it(run):
    one = run()
    one.train(0, 1)
    one.governor.snapshot()
    early = one.state()
    one.train(2)
    late = one.governor.snapshot()
    one.governor.step_back(1)
    assert one.state() == early
    assert late.state == "dropped"
    one.train(2)
    one.governor.execute_rollback()
    assert one.state() == early


def test_the_probation_of_candidates_begins_again(run):
    one = run(cadence=2, probation=5)
    one.train(*range(6))

    def candidates():
        return [(slot.completed, slot.healthy) for slot in one.governor._keeper.ring if slot.in_probation]

    assert (4, 2) in candidates()
    one.governor.step_back(1)
    assert candidates() == [(2, 0), (4, 0)]


def test_an_incident_tells_of_it(run):
    told = []
    one = run(on_incident=told.append)
    one.train(*range(4))
    report = one.governor.step_back(2, reason="the learner said so")
    (incident,) = told
    assert (incident.action, incident.reason, incident.restored_step) == ("manual", "the learner said so", 2)
    assert (report.reason, report.panic_step, report.certified) == ("the learner said so", 4, False)
    assert one.governor.statistics().steps_lost == 2
    assert one.governor._course.completed == 2


# ---------------------------------------------------------------- other writers


def clamp(one):
    with torch.no_grad():
        one.model[0].weight.clamp_(-0.1, 0.1)


def clamp_unseen(one):
    one.model[0].weight.data.clamp_(-0.1, 0.1)


def clamp_moments(one):
    one.optimizer.state[one.model[0].weight]["exp_avg"].mul_(0.5)


def clamp_registered(one):
    with one.governor.using():
        clamp_unseen(one)


def replay(one):
    with one.governor._keeper.sections.replaying():
        clamp_unseen(one)


@pytest.mark.parametrize("write", [clamp, clamp_moments, clamp_registered, replay])
@pytest.mark.parametrize("protected", [True, False])
def test_a_writer_between_the_note_and_the_step(write, protected, run, monkeypatch):
    """A red twin: without a look at them the weights come back as they were before the step, not as at the note."""
    if not protected:
        monkeypatch.setattr(marks, "obstacle", lambda *_: "")
    one = run()
    one.train(0, 1, 2)
    noted = one.state()
    write(one)
    one.governor.step(loss=one.loss(3))
    after = one.state()
    with pytest.raises(NoSnapshot, match="between the note and the step") if protected else contextlib.nullcontext():
        one.governor.step_back(1)
    assert one.state() == after if protected else one.state()[0] != noted[0]
    before = one.state()
    one.governor.step(loss=one.loss(4))
    one.governor.step_back(1)  # of what follows, notes are good again
    assert one.state() == before


def clear_state(one):
    one.optimizer.state.clear()


def replace_moments(one):
    for state in one.optimizer.state.values():
        state.update({name: value.clone() for name, value in state.items() if name != "step"})


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("replaced", [clear_state, replace_moments])
@pytest.mark.parametrize("kind", ["adamw", "in place", "momentum"])
@pytest.mark.parametrize("before", [2, 3, 4, 5])
def test_moments_that_somebody_has_replaced(before, kind, replaced, compiled, run, request):
    """Steps that follow use the memory of the former ones again, which no version tells of where kernels write it."""
    if compiled:
        request.getfixturevalue("interpreted")
    one = run(kind, steps=3)
    one.train(*range(before))
    noted = one.state()
    replaced(one)
    for number in (6, 7):
        one.governor.step(loss=one.loss(number))
    with contextlib.suppress(NoSnapshot):
        one.governor.step_back(2)
        assert one.state() == noted


def test_a_writer_during_the_step(run, monkeypatch):
    """What the step has left behind may be from before it or from behind it."""
    one = run()
    one.train(0, 1, 2)
    real = AdamW._copy_away

    def beside(self, group, batch):
        thread = threading.Thread(target=clamp_registered, args=(one,))
        thread.start()
        thread.join()
        return real(self, group, batch)

    with monkeypatch.context() as patch:
        patch.setattr(AdamW, "_copy_away", beside)
        one.governor.step(loss=one.loss(3))
    after = one.state()
    with pytest.raises(NoSnapshot, match="between the note and the step"):
        one.governor.step_back(1)
    assert one.state() == after
    one.train(4)
    one.governor.step_back(1)
    assert one.state() == after


@pytest.mark.parametrize("when", ["obstacle", "way_back", "rewind"])
def test_a_rollback_of_another_thread_forgets_the_notes_meanwhile(when, run, monkeypatch):
    """It does so when it has left the gate, so that somebody who goes back may have come in."""
    one = run()
    one.train(*range(4))
    real = getattr(marks, when)

    def forgetting(*args):
        one.governor._keeper.notes.forget()
        return real(*args)

    monkeypatch.setattr(marks, when, forgetting)
    one.governor.step_back(1)
    assert one.state() == one.states[3]


def test_a_note_that_is_refused_costs_no_other(run):
    one = run()
    one.train(*range(4))
    driver, here = one.governor._keeper.driver, threading.get_ident()
    driver.begin_capture(1, here, False, 1.0)
    one.governor._stepping._note()
    driver.end_capture(1)
    one.governor.step_back(2)
    assert one.state() == one.states[2]


def test_a_governor_that_is_gone_leaves_the_notes_of_the_next_alone(run):
    one = run()
    one.train(0, 1)
    optimizer = one.optimizer
    optimizer._past.witness = witness = one.governor._keeper.sections.count_foreign  # of another one's
    one.governor.close()
    assert optimizer._past.witness is witness


@pytest.mark.parametrize("protected", [True, False])
def test_a_writer_of_moments_that_somebody_has_kept(protected, run, monkeypatch):
    """A red twin: the set that the steps have left where it was is not what it was."""
    if not protected:
        monkeypatch.setattr(marks, "_is_untouched", lambda _: True)
    one = run()
    one.train(0, 1, 2)
    kept = one.optimizer.state[one.model[0].weight]["exp_avg"]
    one.train(3)
    kept.mul_(0.5)
    with pytest.raises(NoSnapshot, match="earlier step") if protected else contextlib.nullcontext():
        one.governor.step_back(1)
    assert protected or one.state() != one.states[3]


@pytest.mark.parametrize("protected", [True, False])
def test_an_undo_does_not_go_behind_a_writer_before_the_note(protected, run, monkeypatch):
    """A red twin: after a step back the last step would seem to be the last word."""
    if not protected:
        monkeypatch.setattr(past.Past, "forget", lambda _: None)
    one = run()
    one.train(0, 1, 2)
    clamp(one)
    one.governor._stepping._note()
    noted = one.state()
    one.train(3)
    one.governor.step_back(1)
    assert one.state() == noted
    assert one.optimizer.kept().steps == (0 if protected else 2)


@pytest.mark.parametrize("write", [clamp, clamp_unseen, clamp_registered])
def test_a_writer_after_the_step_is_taken_back_with_it(write, run):
    one = run()
    one.train(*range(4))
    write(one)
    one.governor.step_back(1)
    assert one.state() == one.states[3]


@pytest.mark.parametrize("protected", [True, False])
def test_a_step_that_raises_half_way(protected, run, monkeypatch):
    """A red twin: what the step before has left was written over by the half of one."""
    one = run()
    one.train(*range(4))
    real = AdamW._operate

    def breaks(self, batch, group, parameters, flags):
        parameters[0].data.add_(1)
        raise RuntimeError("half-way")

    monkeypatch.setattr(AdamW, "_operate", breaks)
    loss = one.loss(4)
    with pytest.raises(RuntimeError, match="half-way"):
        one.governor.step(loss=loss)
    monkeypatch.setattr(AdamW, "_operate", real)
    if not protected:
        one.governor._keeper.driver.change(lambda s: (replace(s, torn=False), None))
    with pytest.raises(StateMismatch if protected else NoSnapshot):
        one.governor.step_back(1)
    one.governor.execute_rollback()
    assert one.governor._course.completed == 0


def test_a_state_that_was_loaded(run):
    one = run()
    one.train(*range(3))
    with one.governor.using():
        one.optimizer.load_state_dict(one.optimizer.state_dict())
    with pytest.raises(NoSnapshot, match="loaded"):
        one.governor.step_back(1)
    one.train(3, 4)
    one.governor.step_back(1)
    assert one.state() == one.states[4]


def test_after_a_capture_no_notes_are_taken(run):
    one = run()
    one.train(*range(3))
    one.optimizer._past.captured = True  # as a captured step leaves it
    with pytest.raises(NoSnapshot, match="captured"):
        one.governor.step_back(1)
    one.train(3)
    with pytest.raises(NoSnapshot, match=r"captured|notes are held"):
        one.governor.step_back(1)


def test_a_parameter_that_no_optimizer_steps_any_more_is_in_the_note(run):
    """The layout is as it was: what is left to the optimizer is not."""
    one = run("sgd")
    one.train(0, 1, 2)
    left = one.optimizer.param_groups[0]["params"].pop()
    for number in range(3, 7):
        one.states[number:] = [one.state()]
        one.governor.step(loss=one.loss(number))
        with one.governor.using():
            left.data.add_(1)  # by nobody that torch knows
    one.governor._stepping._note()
    before = one.state()
    one.governor.step(loss=one.loss(7))
    with one.governor.using():
        left.data.add_(1)
    one.governor.step_back(1)
    assert one.state() == before


def test_parameters_without_a_gradient_now_and_then(run):
    one = run()
    one.train(0, 1)
    seen = []
    for number, frozen in ((2, True), (3, False), (4, True)):
        one.model[3].weight.requires_grad_(not frozen)
        seen.append(one.state())
        one.governor.step(loss=one.loss(number))
    one.governor.step_back(2)
    assert one.state() == seen[1]


@pytest.mark.parametrize("given", [True, False])
def test_a_section_behind_the_step_and_a_parameter_that_is_frozen(given, run):
    """Of one that the optimizer has, nothing is left behind; one that it was not given is in the note."""

    def make(parameters, **own):
        frozen, *others = parameters
        frozen.requires_grad_(False)
        return AdamW([frozen, *others] if given else others, lr=0.001, **own)

    one = run(make)
    one.train(0, 1)
    one.watch(3)  # an average is updated behind each step
    before = one.state()
    one.governor.step(loss=one.loss(4))
    with one.governor.using():
        one.average.update_parameters(one.model)
    refused = pytest.raises(NoSnapshot, match="that no step has written since")
    with refused if given else contextlib.nullcontext():
        one.governor.step_back(1)
    assert given or one.state() == before


# ---------------------------------------------------------------- several optimizers, other states


def test_a_parameter_that_two_optimizers_step(alone):
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizers = [AdamW(model.parameters(), history=2), SGD([model.weight], lr=0.1, momentum=0.5, history=2)]
    config = GovernorConfig(past_steps=2, cadence=100)
    with TolariaGovernor(model, optimizers, config=config, detector=judge.non_finite()) as governor:
        seen = []
        for number in range(4):
            seen.append(governor.digest())
            loss = model(torch.full((2, 4), float(number))).square().mean()
            loss.backward()
            governor.step(loss=loss)
        with pytest.raises(NoSnapshot, match="last writer"):
            governor.step_back(2)  # of each step the other optimizer has written as well
        governor.step_back(1)
        assert governor.digest() == seen[3]


def test_gradients_that_cannot_be_dropped_are_of_the_present(run):
    """Views of one bucket stay, as zeros; what somebody adds there is as young as the state."""
    one = run()
    one.train(0, 1)
    parameters = list(one.model.parameters())
    bucket = torch.zeros(sum(p.numel() for p in parameters))
    for parameter, part in zip(parameters, bucket.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)
    one.loss(2)
    one.governor.step_back(1)
    assert not bucket.any()
    state = one.governor._keeper.driver.state
    assert state.grad_epoch == state.epoch
    bucket.fill_(1.0)
    with pytest.raises(PhaseError, match="gradients are alive"):
        one.governor.snapshot()
    assert not one.governor._keeper.sections.are_stale()


def test_gradients_that_came_meanwhile_are_of_the_past(run, monkeypatch):
    """A backward of before has ended amid the step back: what it has left may not be stepped with."""
    restore_host = notes.Notes.restore_host

    def then_a_backward_ends(self, op):
        alive = restore_host(self, op)
        self._driver.change(lambda s: (replace(s, grad_epoch=0), None))
        return alive or True

    monkeypatch.setattr(notes.Notes, "restore_host", then_a_backward_ends)
    one = run()
    one.train(0, 1)
    one.governor.step_back(1)
    assert one.governor._keeper.sections.are_stale()


def test_a_step_back_leaves_no_gradients(run):
    one = run()
    one.train(0, 1)
    one.loss(2)
    one.governor.step_back(1)
    assert one.governor._keeper.driver.state.grad_epoch is None
    assert all(parameter.grad is None for parameter in one.model.parameters())


def test_a_refused_step_is_a_step(run):
    one = run(on_veto="keep")
    one.train(0, 1)
    before = one.state()
    loss = one.loss(2)
    one.model[0].weight.grad.fill_(float("nan"))
    assert one.governor.step(loss=loss).skipped
    one.train(3)
    assert one.governor._course.completed == 4
    one.governor.step_back(2)
    assert one.state() == before


def test_a_failure_after_the_first_write_leaves_it_to_the_ring(run, monkeypatch):
    one = run()
    one.train(0, 1)
    one.governor.snapshot()
    kept = one.state()
    one.train(2, 3)
    with monkeypatch.context() as patch:
        patch.setattr(marks, "rewind", lambda _: 1 / 0)
        with pytest.raises(RollbackFailed, match="ZeroDivisionError"):
            one.governor.step_back(1)
    with pytest.raises(StateMismatch, match="half-way"):
        one.governor.step_back(1)
    one.governor.execute_rollback()
    assert one.state() == kept
    one.train(2, 3)
    one.governor.step_back(2)
    assert one.state() == kept


# ---------------------------------------------------------------- a panic, answered from a note first


def poisoned(one, at, times):
    """A loop by `watch` in which a gradient is not finite at that batch, so many times. Answers the incidents."""
    left = times
    for number, batch in enumerate(one.governor.watch(range(12))):
        one.states[batch:] = [one.state()]
        loss = one.loss(batch)
        if batch == at and left:
            one.model[0].weight.grad.fill_(float("nan"))
            left -= 1
        one.governor.step(loss=loss)
        assert number < 60
    return left


@pytest.mark.parametrize("cadence", [4, 100])
def test_a_transient_fault_costs_one_step(cadence, run):
    calm = run(past_first=True, cadence=cadence)
    poisoned(calm, 9, 0)
    expected, told = calm.state(), []
    one = run(past_first=True, cadence=cadence, on_incident=told.append)
    assert poisoned(one, 9, 1) == 0
    assert one.state() == expected
    assert [(i.action, i.restored_step, i.steps_lost, i.tier, i.attempt) for i in told] == [("replay", 9, 1, "past", 0)]


def test_a_lasting_fault_is_met_as_ever(run):
    """Once more from a note, and from there on as without."""
    ends, stories = [], []
    for first in (True, False):
        told = []
        one = run(past_first=first, on_incident=told.append)
        assert poisoned(one, 9, -1) < 0
        ends.append(one.state()[0])
        stories.append([(i.action, i.restored_step, i.attempt) for i in told])
    assert ends[0] == ends[1]
    assert stories[0] == [("replay", 9, 0), *stories[1]]
    assert [action for action, *_ in stories[1]] == ["replay", "skip"]


def test_the_same_batch_is_not_tried_twice_from_a_note(run, monkeypatch):
    """A red twin: it would be for ever."""
    one = run(past_first=True)
    course = one.governor._course
    answer = course.from_past

    def forgetful(vital, verdict):
        one.governor._stepping._tried = -1
        return answer(vital, verdict)

    monkeypatch.setattr(course, "from_past", forgetful)
    with pytest.raises(AssertionError):
        poisoned(one, 9, -1)


@pytest.mark.parametrize("protected", [True, False])
def test_a_snapshot_that_is_not_finite_is_not_answered_from_a_note(protected, run, monkeypatch):
    """A red twin: the note may hold the same, since nobody has looked at it."""
    told = []
    one = run(past_first=True, on_incident=told.append, cadence=4, probation=0, check_weights_every=1000)
    if not protected:
        course, answer = one.governor._course, one.governor._course.from_past
        monkeypatch.setattr(course, "from_past", lambda vital, verdict: answer(replace(vital, loss=0.0), verdict))
    struck = False
    for batch in one.governor.watch(range(12)):
        one.governor.step(loss=one.loss(batch))
        if batch == 7 and not struck:
            struck = True
            with one.governor.using(), torch.no_grad():
                one.model[1].running_mean[0] = float("inf")
    assert [incident.reason for incident in told][:1] == ["non-finite train state"]
    assert (told[0].tier != "past") == protected


# ---------------------------------------------------------------- who may ask for it


def test_what_is_refused(alone):
    model = nn.Linear(2, 2)
    config = GovernorConfig(past_steps=2)
    for optimizer in (torch.optim.AdamW(model.parameters()), None):
        with pytest.raises(UnsupportedState, match="past_steps"):
            TolariaGovernor(model, optimizer, config=config)
    with pytest.raises(InvalidConfig, match="history=1"):
        TolariaGovernor(model, AdamW(model.parameters()), config=config)
    for wrong in ({"past_steps": -1}, {"past_first": True}):
        with pytest.raises(InvalidConfig, match="past_"):
            GovernorConfig(**wrong)
    with pytest.raises(UnsupportedState, match="past_steps"):
        FollowingGovernor(model, AdamW(model.parameters(), history=2), config=config)
    with TolariaGovernor(model, AdamW(model.parameters())) as governor:
        with pytest.raises(UnsupportedState, match="past_steps"):
            governor.step_back()
        with governor.using(), pytest.raises(PhaseError):
            governor.step_back()
    with TolariaGovernor(model, AdamW(model.parameters(), history=2), config=config) as governor:
        with pytest.raises(UnsupportedState, match="past_steps"):
            Rounds(governor)
        with pytest.raises(UsageError, match="steps is 0"):
            governor.step_back(0)


def test_who_only_observes_or_is_disabled_touches_nothing(alone, monkeypatch):
    model = nn.Linear(2, 2)
    optimizer = AdamW(model.parameters())
    with TolariaGovernor(model, optimizer, config=GovernorConfig(past_steps=1, mode="observe")) as governor:
        assert not governor.step_back().success
    monkeypatch.setenv("TOLARIA_DISABLE", "1")
    with TolariaGovernor(model, optimizer, config=GovernorConfig(past_steps=1)) as governor:
        assert not governor.step_back().success


def test_nothing_is_noted_for_others(run):
    one = run(steps=0)
    one.train(0, 1)
    assert one.governor._keeper.notes is None
    assert one.optimizer._past.witness is None
    assert one.optimizer._past.left[-1].before is None


@pytest.mark.parametrize("kind", ["adamw", "in place", "momentum"])
def test_moments_that_were_loaded_over_are_held_by_nobody(kind, run):
    one = run(kind)
    one.train(0, 1, 2)
    held = [weakref.ref(tensor) for state in one.optimizer.state.values() for tensor in state.values()]
    with one.governor.using():
        one.optimizer.load_state_dict(copy.deepcopy(one.optimizer.state_dict()))
    one.train(*range(3, 9))
    gc.collect()
    assert not any(ref() is not None for ref in held)


def test_after_a_rollback_between_two_bodies_there_is_a_note(run):
    """A snapshot that is not finite is answered where it is taken."""
    one = run(cadence=4, probation=0, check_weights_every=1000)
    number, struck = 0, False
    for batch in one.governor.watch(range(12)):
        if struck and one.governor.statistics().rollbacks == 1 and not number:
            before = one.state()
            one.governor.step(loss=one.loss(batch))
            one.governor.step_back(1)
            assert one.state() == before
            number += 1
            continue
        one.governor.step(loss=one.loss(batch))
        if batch == 7 and not struck:
            struck = True
            with one.governor.using(), torch.no_grad():
                one.model[1].running_mean[0] = float("inf")
    assert number == 1


def test_beside_steps_that_are_run_again(run):
    """Their rollbacks drop the notes, and each is followed by one."""
    ends = []
    for every in (0, 2):
        one = run(cadence=4, reexecute_every=every)
        for number, batch in enumerate(one.governor.watch(range(12))):
            before = one.state()
            one.governor.step(loss=one.loss(batch))
            if number == 16:
                one.governor.step_back(1)
                assert one.state() == before
                one.governor.step(loss=one.loss(batch))
        ends.append(one.state())
    assert ends[0] == ends[1]
    assert one.governor.statistics().reexecutions >= 2
    assert one.governor._keeper.notes.newest_before(13) == 12


def test_closing_leaves_no_trace(run):
    one = run()
    one.train(0, 1)
    one.governor.close()
    assert one.optimizer._past.witness is None
    one.optimizer.undo()


# ---------------------------------------------------------------- whatever happens in between


def happen(one, dice, number):
    """One thing that a user may do between two steps."""
    what = dice.choice(
        ["nothing"] * 6 + ["clamp", "registered", "moments", "freeze", "poison", "load", "group", "undo"]
    )
    weight = one.model[0].weight
    if what == "clamp":
        clamp(one)
    elif what == "registered":
        with one.governor.using():
            weight.data.mul_(0.9)
    elif what == "moments" and one.optimizer.state:
        with one.governor.using(), torch.no_grad():
            for state in one.optimizer.state.values():
                for value in state.values():
                    value.mul_(1.0 if value.dim() == 0 else 0.5)
    elif what == "freeze":
        one.model[3].weight.requires_grad_(not one.model[3].weight.requires_grad)
    elif what == "load":
        with one.governor.using():
            one.optimizer.load_state_dict(one.optimizer.state_dict())
    elif what == "group":
        one.optimizer.param_groups[0]["lr"] *= 0.9
    elif what == "undo" and one.optimizer.kept().steps:
        with one.governor.using():
            one.optimizer.undo()
    loss = one.loss(number % 16)
    if what == "poison":
        weight.grad.fill_(float("nan"))
    one.governor.step(loss=loss)


def story(one, chance, monkeypatch):
    """Sixty steps and what chance has happen; every step back is compared with the note it went to."""
    dice, noted, backs = random.Random(chance), {}, 0
    take = notes.Notes.take

    def taken(self, *args):
        take(self, *args)
        noted[one.governor._course.completed] = one.state()

    with monkeypatch.context() as patch:
        patch.setattr(notes.Notes, "take", taken)
        for number in range(60):
            happen(one, dice, number)
            if dice.random() < 0.3:
                steps, before, completed = dice.randint(1, 4), one.state(), one.governor._course.completed
                try:
                    one.governor.step_back(steps)
                except NoSnapshot:
                    assert one.state() == before
                else:
                    assert one.state() == noted[completed - steps]
                    backs += 1
            elif dice.random() < 0.1:
                one.governor.execute_rollback()
    return backs


@pytest.mark.parametrize("kind", ["adamw", "in place", "momentum"])
@pytest.mark.parametrize("chance", range(4))
def test_it_is_the_state_of_the_note_or_nothing(kind, chance, run, monkeypatch):
    """Every step back comes to the very state that its note was taken of, or raises and changes nothing."""
    assert story(run(kind, steps=3, on_veto="keep", cadence=5, probation=3), chance, monkeypatch)


@pytest.mark.parametrize("kind", ["adamw", "in place", "momentum"])
def test_without_a_look_at_other_writers_it_is_not(kind, run, monkeypatch):
    monkeypatch.setattr(marks, "obstacle", lambda *_: "")

    def all_stories():
        for chance in range(4):
            story(run(kind, steps=3, on_veto="keep", cadence=5, probation=3), chance, monkeypatch)

    with pytest.raises(AssertionError):
        all_stories()


def test_a_layer_that_came_between(run):
    one = run()
    one.train(0, 1, 2)
    noted, layers = one.state(), len(one.model)
    one.model.append(nn.Linear(2, 2))
    one.optimizer.add_param_group({"params": one.model[-1].parameters()})
    one.governor.step(loss=one.loss(3))
    one.governor.step_back(1)
    assert one.state() == noted
    assert (len(one.model), len(one.optimizer.param_groups)) == (layers, 1)
    one.train(3, 4)
    one.governor.step_back(2)
    assert one.state() == noted


def test_under_a_scaler_that_skips(alone):
    torch.manual_seed(0)
    model, scaler, seen = nn.Linear(4, 2), torch.amp.GradScaler("cpu", init_scale=4.0), []
    optimizer = AdamW(model.parameters(), history=3)
    config = GovernorConfig(past_steps=3, cadence=100)
    with TolariaGovernor(model, optimizer, scaler=scaler, config=config, detector=judge.non_finite()) as governor:

        def train(number):
            loss = model(torch.full((2, 4), float(number + 1))).square().mean()
            scaler.scale(loss).backward()
            if number == 3:
                model.weight.grad[0, 0] = float("inf")
            governor.step(loss=loss)

        for number in range(5):
            seen.append((governor.digest(), scaler.get_scale()))
            train(number)
        last = governor.digest(), scaler.get_scale()
        assert seen[4][1] < seen[3][1]
        governor.step_back(3)
        assert (governor.digest(), scaler.get_scale()) == seen[2]
        for number in (2, 3, 4):
            train(number)
        assert (governor.digest(), scaler.get_scale()) == last


def test_a_note_that_cannot_be_taken_is_told_of_once(run, monkeypatch, caplog):
    one = run()
    one.train(0, 1)

    def fails(*_):
        raise RuntimeError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(notes, "_without", fails)
        one.governor._keeper.notes._left_out.clear()
        one.train(2, 3)
    assert caplog.text.count("no note could be taken: no room") == 1
    with pytest.raises(NoSnapshot, match="notes are held"):
        one.governor.step_back(1)
    one.train(4, 5)
    one.governor.step_back(1)
    assert one.state() == one.states[5]


def test_a_governor_that_is_dropped_is_gone(alone):
    model = nn.Linear(2, 2)
    optimizer = AdamW(model.parameters())
    governor = TolariaGovernor(model, optimizer, config=GovernorConfig(past_steps=1), detector=judge.non_finite())
    for _ in range(2):
        loss = model(torch.ones(1, 2)).sum()
        loss.backward()
        governor.step(loss=loss)
    gone = weakref.ref(governor._keeper)
    del governor
    gc.collect()
    assert gone() is None
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.undo()


def test_the_train_state_is_not_walked_again_where_moments_alternate(run, monkeypatch):
    """Once for each set of moments; from then on an earlier survey stands."""
    walked = []
    survey = parts.OptimizerPart.survey

    def counted(self, leaves):
        walked.append(self.name)
        return survey(self, leaves)

    one = run()
    one.train(*range(6))
    monkeypatch.setattr(parts.OptimizerPart, "survey", counted)
    monkeypatch.setattr(one, "state", lambda: None)  # a digest walks
    one.train(*range(6, 12))
    assert walked == []
    one.governor.step_back(2)
    assert len(one.governor._keeper.notes._imprints) <= 4
